"""A private etcd on free ports of loopback, for tests and benchmarks: real members, ended by their process ids."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from atoll.model.errors import Unavailable, Unsupported
from atoll.store.etcd.address import SCHEME, EtcdAddress, members_of
from atoll.store.etcd.errors import FLAGS

HEARTBEAT_MS = 50
ELECTION_MS = 500
"""Timers for members that share a machine; etcd's own defaults are twice these."""
START_S = 20.0
STOP_S = 5.0
POLL_S = 0.02


class PrivateEtcd:
    """A context that starts `count` members and removes everything at its end. Members are numbered from 0.

    Data lies in memory where the machine has /dev/shm, unless `data` says where. `flags` replaces those that Atoll asks for.
    `certificates`, a directory with ca.pem, member.pem and member-key.pem, makes clients' connections use TLS.
    """

    def __init__(self, count: int = 1, *, data: Path | None = None, flags: str = FLAGS, certificates: Path | None = None) -> None:
        if shutil.which("etcd") is None:
            raise Unsupported("there is no etcd on this machine", mend="apt-get install etcd-server etcd-client")
        memory = Path("/dev/shm")  # noqa: S108 - the file system itself; the directory in it is made safely
        self.data = data or Path(tempfile.mkdtemp(prefix="atoll-etcd-", dir=memory if memory.is_dir() else None))
        self._flags = flags.split()
        self._certificates = certificates
        self._ports = _free_ports(2 * count)
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * count

    def __enter__(self) -> PrivateEtcd:
        try:
            for number in range(len(self._processes)):
                self.start(number)
            self.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in range(len(self._processes)):
            self.kill(number)
        shutil.rmtree(self.data, ignore_errors=True)

    @property
    def url(self) -> str:
        return SCHEME + ",".join(self.target(number) for number in range(len(self._processes)))

    @property
    def address(self) -> EtcdAddress:
        return EtcdAddress(members_of(self.url))

    def target(self, number: int) -> str:
        return f"127.0.0.1:{self._ports[2 * number]}"

    def start(self, number: int) -> None:
        """Start one member, anew or with the data that it had."""
        scheme = "https" if self._certificates else "http"
        client, peer = f"{scheme}://{self.target(number)}", self._peer(number)
        # The kernel ends it with us, however we end.
        command = ["setpriv", "--pdeathsig=KILL", "etcd"]
        command += [f"--name=m{number}", f"--data-dir={self.data / str(number)}", "--initial-cluster-state=new"]
        command += [f"--listen-client-urls={client}", f"--advertise-client-urls={client}"]
        command += [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
        command += ["--initial-cluster=" + ",".join(f"m{n}={self._peer(n)}" for n in range(len(self._processes)))]
        command += [f"--heartbeat-interval={HEARTBEAT_MS}", f"--election-timeout={ELECTION_MS}", "--logger=zap", *self._flags]
        if self._certificates:
            pair = (self._certificates / "member.pem", self._certificates / "member-key.pem")
            command += [f"--cert-file={pair[0]}", f"--key-file={pair[1]}", "--client-cert-auth"]
            command += [f"--trusted-ca-file={self._certificates / 'ca.pem'}"]
        with (self.data / f"{number}.log").open("ab") as log:
            self._processes[number] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def wait(self, *, members: int | None = None) -> None:
        """Return when at least `members` (all, if not said) serve under one leader. Raises Unavailable."""
        wanted = len(self._processes) if members is None else members
        deadline = time.monotonic() + START_S
        while self._serving() < wanted:
            if time.monotonic() > deadline or all(p is None or p.poll() is not None for p in self._processes):
                logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(self.data.glob("*.log")))
                raise Unavailable(f"etcd did not start:\n{logs}")
            time.sleep(POLL_S)

    def signal(self, number: int, what: signal.Signals) -> None:
        """Send a signal to one member, e.g. SIGSTOP and later SIGCONT."""
        process = self._processes[number]
        if process is not None and process.poll() is None:
            os.kill(process.pid, what)

    def kill(self, number: int) -> None:
        """End one member by SIGKILL. Safe to repeat."""
        process = self._processes[number]
        if process is not None:
            process.kill()
            process.wait(STOP_S)
            self._processes[number] = None

    def pid(self, number: int) -> int:
        """Return a member's process id. Raises Unavailable when it does not run."""
        process = self._processes[number]
        if process is None:
            raise Unavailable(f"member {number} does not run")
        return process.pid

    def leader(self) -> int:
        """Return which member leads. Raises Unavailable while none does, or more than one believes so."""
        found = [number for number, status in self._statuses().items() if status["leader"] == status["header"]["member_id"]]
        if len(found) != 1:
            raise Unavailable(f"{len(found)} members lead")
        return found[0]

    def _peer(self, number: int) -> str:
        return f"http://127.0.0.1:{self._ports[2 * number + 1]}"

    def _serving(self) -> int:
        """How many members agree on the most popular leader."""
        leaders = [status.get("leader", 0) for status in self._statuses().values()]
        return max((leaders.count(leader) for leader in leaders if leader), default=0)

    def _statuses(self) -> dict[int, dict[str, Any]]:
        found = {}
        for number, process in enumerate(self._processes):
            if process is None or process.poll() is not None:
                continue
            status = self.control("endpoint", "status", "--write-out=json", member=number)
            if status.returncode == 0 and status.stdout:
                found[number] = json.loads(status.stdout)[0]["Status"]
        return found

    def control(self, *arguments: str, member: int = 0) -> subprocess.CompletedProcess[str]:
        """Run etcdctl at one member and return what it said, whatever its status."""
        scheme = "https" if self._certificates else "http"
        command = ["etcdctl", f"--endpoints={scheme}://{self.target(member)}", "--dial-timeout=1s", "--command-timeout=2s"]
        if self._certificates:
            files = {"cacert": "ca.pem", "cert": "member.pem", "key": "member-key.pem"}
            command += [f"--{option}={self._certificates / name}" for option, name in files.items()]
        environment = {**os.environ, "ETCDCTL_API": "3"}
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in held]
    finally:
        for one in held:
            one.close()
