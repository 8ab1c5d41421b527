"""A private Atoll on free ports over a temporary directory: for demos, tests and benchmarks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from atoll.entry.config import Config
from atoll.entry.up import OWNER_VARIABLE, holder
from atoll.model.errors import Exhausted

SUBNETS = 128
"""From 10.100.0.0/16 on."""
COMMAND_S = 300.0
"""The longest wait for one `atoll` command."""
STOP_S = 30.0
"""The longest wait for the end of a further node's agent."""


class CommandFailed(Exception):
    """An `atoll` command ended with a status other than 0; the message has what it printed."""

    def __init__(self, arguments: tuple[str, ...], done: subprocess.CompletedProcess[str]) -> None:
        super().__init__(f"`atoll {' '.join(arguments)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        self.returncode = done.returncode
        self.stdout = done.stdout
        self.stderr = done.stderr


class ScratchAtoll:
    """A context that starts `atoll up --detach` and at its end stops it, instances and all, and removes its data."""

    def __init__(self, prefix: str = "atoll-scratch-") -> None:
        self.data = Path(tempfile.mkdtemp(prefix=prefix))
        self.api = f"127.0.0.1:{free_port()}"
        self.ingress = f"127.0.0.1:{free_port()}"
        self.subnet = free_subnet(int(self.api.rsplit(":", 1)[1]))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ATOLL_")}
        own = {"ATOLL_DATA": str(self.data), "XDG_CONFIG_HOME": str(self.data / "config"), OWNER_VARIABLE: str(os.getpid())}
        self.environment = {**inherited, **own, "NO_COLOR": "1"}

    def __enter__(self) -> ScratchAtoll:
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self.remove()

    def start(self) -> None:
        """Run `atoll up --detach` and wait until it serves. Raises CommandFailed."""
        where = ("--data", str(self.data), "--api", self.api, "--ingress", self.ingress, "--subnet", self.subnet)
        self.atoll("up", "--detach", *where)

    def stop(self) -> None:
        """Stop the instances and every process. Safe to repeat."""
        if holder(Config(data=self.data)) is not None:
            self.atoll("down", "--data", str(self.data))

    def remove(self) -> None:
        """Remove the data. Safe to repeat."""
        shutil.rmtree(self.data, ignore_errors=True)

    def atoll(self, *arguments: str, stdin: str | None = None) -> str:
        """Run one `atoll` command and return what it printed. Raises CommandFailed."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name("atoll")), *arguments],
            env=self.environment,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        if done.returncode != 0:
            raise CommandFailed(arguments, done)
        return done.stdout

    def atoll_json(self, *arguments: str) -> Any:
        """Run one `atoll` command with `--json` and return what it said."""
        return json.loads(self.atoll(*arguments, "--json"))

    @property
    def token(self) -> str:
        """The admin's token."""
        token: str = json.loads((self.data / "client.json").read_text())["token"]
        return token

    @property
    def log(self) -> str:
        """What all its processes logged so far."""
        path = self.data / "atoll.log"
        return path.read_text(errors="replace") if path.exists() else ""


class ScratchNode:
    """A further node of a `ScratchAtoll`, on the same machine: an agent with data of its own. A context that starts and ends it.

    It ends without stopping its instances: have what runs on it deleted before.
    """

    def __init__(self, scratch: ScratchAtoll, name: str) -> None:
        self.name = name
        self.data = scratch.data / "nodes" / name
        (self.data / "agent").mkdir(parents=True)
        token = scratch.atoll_json("token", "create", name, "--role", "agent", "--subject", name)["token"]
        file = self.data / "agent" / "token"
        file.touch(mode=0o600)
        file.write_text(token)
        self.config = Config(data=self.data, api=scratch.api, node=name, subnet=free_subnet(os.getpid() + free_port()))
        self._arguments = self.config.arguments()
        self._environment = scratch.environment
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ScratchNode:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def begin_with(self, arguments: list[str], environment: dict[str, str]) -> None:
        """Have the agent be started with these: another version's, say."""
        self._arguments, self._environment = arguments, environment

    def start(self) -> None:
        """Start the agent; it is ready when the control plane lists the node with a heartbeat."""
        arguments = [sys.executable, "-m", "atoll.entry.agent", *self._arguments]
        with open(self.data / "log", "ab") as log:
            self._process = subprocess.Popen(arguments, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self) -> None:
        """End the agent. Safe to repeat."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(STOP_S)
            self._process = None

    @property
    def log(self) -> str:
        """What its agent logged so far."""
        path = self.data / "log"
        return path.read_text(errors="replace") if path.exists() else ""


def free_subnet(start: int) -> str:
    """Return a /16 away from the default one into which no route of this machine leads; `start` says where to look first.

    Two that look at the same moment should start differently. Raises Exhausted.
    """
    lines = Path("/proc/net/route").read_text().splitlines()[1:]
    # Addresses there are little-endian hexadecimal: the first two octets are the last two pairs of digits.
    taken = {(int(line.split()[1][6:8], 16), int(line.split()[1][4:6], 16)) for line in lines}
    for step in range(SUBNETS):
        second = 100 + (start + step) % SUBNETS
        if (10, second) not in taken:
            return f"10.{second}.0.0/16"
    raise Exhausted("every subnet from 10.100.0.0/16 to 10.227.0.0/16 is in use on this machine")


def free_port() -> int:
    """Return a TCP port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
