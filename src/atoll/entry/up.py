"""`atoll up`: one server, one agent and one ingress as children over one data directory.

Restarts a child that ends. SIGTERM or SIGINT stops the ingress, then the instances, then the rest. SIGHUP does the same but
leaves the instances running, for the next `atoll up` to adopt.
Imports little, since it stays for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from atoll.entry.config import EXIT_HOPELESS, Config, split_address
from atoll.entry.unbreakable import guard_stderr
from atoll.model.errors import AtollError, Conflict, Unsupported

ROLES = ("server", "agent", "ingress")
RESTART_DELAY_S = 0.5
RESTART_DELAY_MAX_S = 15.0
SERVER_FIRST_S = 10.0
"""Agent and ingress wait so long for the server at first, and then start without it: they can work alone."""
SERVER_POLL_S = 0.02
STABLE_S = 30.0
"""A child that ran for so long is restarted without delay growth."""
STOP_S = 25.0
"""The longest wait for a child's own end, before SIGKILL."""
PR_SET_CHILD_SUBREAPER = 36
OWNER_VARIABLE = "ATOLL_OWNER_PID"
"""An Atoll that is for one process only (a test, a benchmark) ends when that process does, however it ends."""


@dataclass
class _Child:
    role: str
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    failures: int = 0
    retry_at: float = 0.0


class Supervisor:
    """Runs the children until told to stop. Use: `with lock(config): Supervisor(config).run()`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._keep_running = False
        self._status = 0
        self._served = False
        self._began = time.monotonic()
        self._children = {role: _Child(role) for role in ROLES}
        self._stopping = False

    def run(self) -> int:
        """Supervise until SIGTERM, SIGINT or SIGHUP; return the exit status."""
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # A signal between two waits leaves a byte here, so that none is missed.
        wake, woken = socket.socketpair()
        with wake, woken:
            wake.setblocking(False)
            woken.setblocking(False)
            signal.set_wakeup_fd(wake.fileno())
            owner = _watch_owner()
            watched: list[socket.socket | int] = [woken] if owner is None else [woken, owner]
            while not self._stopping:
                now = time.monotonic()
                for child in self._children.values():
                    if child.process is None and now >= child.retry_at:
                        self._start_in_order(child, now)
                waits = [child.retry_at - now for child in self._children.values() if child.process is None]
                ready, _, _ = select.select(watched, [], [], max(0.0, min(waits)) if waits else None)
                self._stopping |= owner in ready
                with contextlib.suppress(BlockingIOError):
                    woken.recv(4096)
                self._reap()
            signal.set_wakeup_fd(-1)
        self._stop_all()
        return self._status

    def _on_stop(self, number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        self._keep_running = number == signal.SIGHUP

    def _start_in_order(self, child: _Child, now: float) -> None:
        """Start `child`; agent and ingress only once the server has answered for the first time, if it does before long."""
        if child.role != "server" and not self._served:
            self._served = self._answers() or now - self._began > SERVER_FIRST_S
            if not self._served:
                child.retry_at = now + SERVER_POLL_S
                return
        self._start(child, now)

    def _answers(self) -> bool:
        """Whether the server serves: from then on the tokens that agent and ingress will read are known to it."""
        with (
            contextlib.suppress(OSError),
            socket.create_connection(split_address(self.config.listens, field="--listen"), timeout=1) as line,
            self._secured(line) as secured,
        ):
            secured.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            return secured.recv(12).endswith(b" 200")
        return False

    def _secured(self, line: socket.socket) -> socket.socket:
        """Return the connection as the server speaks; whether it is ours is not asked, because nothing is told it."""
        if not self.config.secure:
            return line
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context.wrap_socket(line)

    def _start(self, child: _Child, now: float) -> None:
        environment = {**os.environ, "ATOLL_SUPERVISOR": str(os.getpid())}
        command = [sys.executable, "-m", f"atoll.entry.{child.role}", *self.config.arguments()]
        child.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        child.started_at = now

    def _reap(self) -> None:
        """Collect every child that ended, adopted orphans too, and plan the restart of our own."""
        now = time.monotonic()
        for child in self._children.values():
            if child.process is not None and (status := child.process.poll()) is not None:
                child.process = None
                self._plan_restart(child, status, now)
        ours = {child.process.pid for child in self._children.values() if child.process is not None}
        while (info := _next_ended()) is not None and info not in ours:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(info, os.WNOHANG)

    def _plan_restart(self, child: _Child, status: int, now: float) -> None:
        if status == EXIT_HOPELESS:
            print(f"atoll: {child.role} cannot run, so everything ends; instances go on", file=sys.stderr)
            self._stopping, self._keep_running, self._status = True, True, 1
            return
        if now - child.started_at > STABLE_S:
            child.failures = 0
        delay = min(RESTART_DELAY_S * 2 ** (child.failures - 1), RESTART_DELAY_MAX_S) if child.failures else 0.0
        print(f"atoll: {child.role} ended with status {status}; starts again in {delay:.1f} s", file=sys.stderr)
        child.failures += 1
        child.retry_at = now + delay

    def _stop_all(self) -> None:
        # The agent's SIGINT means: stop the instances first. Ingress goes before them, so that no request is cut by us.
        self._stop(self._children["ingress"], signal.SIGTERM)
        self._stop(self._children["agent"], signal.SIGTERM if self._keep_running else signal.SIGINT)
        self._stop(self._children["server"], signal.SIGTERM)

    def _stop(self, child: _Child, number: signal.Signals) -> None:
        process = child.process
        if process is None or process.poll() is not None:
            return
        process.send_signal(number)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _watch_owner() -> int | None:
    """Return a descriptor that becomes readable when the process ends that this Atoll is for, if it is for one."""
    pid = os.environ.get(OWNER_VARIABLE, "")
    if not pid.isdigit():
        return None
    try:
        return os.pidfd_open(int(pid))
    except ProcessLookupError:
        sys.exit("the process that wanted this Atoll has ended")


def _next_ended() -> int | None:
    try:
        info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return info.si_pid if info is not None and info.si_pid else None


@contextlib.contextmanager
def lock(config: Config) -> Iterator[None]:
    """Hold the data directory for this process. Raises Conflict naming the process that holds it."""
    config.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = config.data / "lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise Conflict(
                f"{config.data} is in use by another `atoll up`, process {holder}",
                mend="use that one, end it with `atoll down`, or give another --data",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def holder(config: Config) -> int | None:
    """Return the process that holds the data directory, if one does."""
    path = config.data / "lock"
    if not path.exists():
        return None
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            text = file.read().strip()
            return int(text) if text.isdigit() else None
    return None


def check(config: Config) -> None:
    """Raise Unsupported or Conflict for what would keep `atoll up` from working, before anything is made."""
    check_root()
    wanted = [("--listen" if config.listen else "--api", config.listens), ("--ingress", config.ingress)]
    if config.tls_port is not None and config.ingress_tls_port:
        wanted.append(("--ingress-tls-port", f"{config.ingress.rpartition(':')[0]}:{config.tls_port}"))
    ours: list[tuple[str, tuple[str, int]]] = []
    for option, address in wanted:
        host, port = split_address(address, field=option)
        if (own := next((name for name, other in ours if _same(other, (host, port))), None)) is not None:
            raise Conflict(
                f"{option}: {address} is that of {own}",
                field=option,
                mend=f"give another, e.g. {option} {_another(option, host, port)}",
            )
        ours.append((option, (host, port)))
        try:
            _try(host, port)
        except OSError as error:
            raise Conflict(
                f"{option}: cannot listen on {address}: {os.strerror(error.errno or 0)}",
                field=option,
                mend=f"end what uses that port, or give another, e.g. {option} {_another(option, host, port)}",
            ) from None


def without_tls(config: Config) -> str:
    """Return why the ingress would do without TLS if it started now, though its port was not turned off; empty where it would not.

    Only a port that nobody has named: one that was is refused by `check`.
    """
    if config.tls_port is None or config.ingress_tls_port:
        return ""
    host = split_address(config.ingress, field="--ingress")[0]
    try:
        _try(host, config.tls_port)
    except OSError as error:
        words = os.strerror(error.errno or 0)
        return f"no TLS: cannot listen on {host}:{config.tls_port}: {words}; name another port with --ingress-tls-port"
    return ""


def _try(host: str, port: int) -> None:
    """Raise OSError where nobody can listen."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _same(one: tuple[str, int], other: tuple[str, int]) -> bool:
    """Whether nobody can listen at both; any free port is none that could be the same."""
    hosts = {one[0], other[0]}
    everywhere = bool(hosts & {"0.0.0.0", "::"}) and (":" in one[0]) == (":" in other[0])  # noqa: S104 - compared, not bound
    return 0 < one[1] == other[1] and (len(hosts) == 1 or everywhere)


def _another(option: str, host: str, port: int) -> str:
    return str(port + 1) if option.endswith("-port") else f"{host}:{port + 1}"


def check_root() -> None:
    """Raises Unsupported for any other user."""
    if os.geteuid() != 0:
        raise Unsupported("atoll up makes namespaces, mounts and cgroups, and so needs root", mend="run it as root, e.g. with sudo")


def log_path(config: Config) -> Path:
    """Return where a detached `atoll up` writes its log."""
    return config.data / "atoll.log"


def foreground(config: Config) -> int:
    """Run everything until told to stop; return the exit status. Raises Conflict, Unsupported before anything is made."""
    check(config)
    guard_stderr()
    with lock(config):
        return Supervisor(config).run()


if __name__ == "__main__":
    from atoll.entry.process import parse, report

    try:
        sys.exit(foreground(parse("up")))
    except AtollError as error:
        report(error)
        sys.exit(1)
