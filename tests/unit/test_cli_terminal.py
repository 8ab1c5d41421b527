"""What only shows on a terminal: colours, narrow tables, live views, raw input and sizes. A real pseudo-terminal each."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time

PROGRAM = """
import sys
from atoll.cli.main import cli
from atoll.cli.session import Session
from atoll.model.errors import Unavailable
from atoll.model.records import Capacity, Node
from atoll.sdk.fake import FakeApi
from atoll.model.spec import AppSpec, Port
from atoll.sdk.client import Client
import asyncio
api = FakeApi()
api.put("nodes", "n1", Node(name="n1", capacity=Capacity(cpu_milli=2000, memory_bytes=4 << 30, disk_bytes=1 << 30)))
asyncio.run(Client(api).put_app(AppSpec(name="web", image="x/y", ports=(Port(port=80),))))
cli(obj=Session(dial=lambda _: api))
"""
DEADLINE_S = 20.0


class Terminal:
    """`atoll` on a terminal of its own."""

    def __init__(self, *arguments: str, rows: int = 40, columns: int = 120) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # As a shell with job control starts it: in the background of a script SIGINT would be ignored, here and in it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
            own = {"TERM": "xterm-256color", "ATOLL_API": "http://fake", "XDG_CONFIG_HOME": "/nonexistent"}
            os.execve(sys.executable, [sys.executable, "-c", PROGRAM, *arguments], inherited | own)
        self.size(rows, columns)
        self.seen = ""

    def size(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, pattern: str) -> str:
        """Read until `pattern` has been printed."""
        deadline = time.monotonic() + DEADLINE_S
        while not re.search(pattern, self.seen):
            assert time.monotonic() < deadline, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self.fd, 65_536)
                except OSError:
                    data = b""
                if not data:
                    break
                self.seen += data.decode()
        assert re.search(pattern, self.seen), self.seen
        return self.seen

    def until_raw(self) -> None:
        """Wait until keys are taken as they are."""
        deadline = time.monotonic() + DEADLINE_S
        while termios.tcgetattr(self.fd)[3] & (termios.ICANON | termios.ISIG):
            assert time.monotonic() < deadline, self.seen
            time.sleep(0.01)

    def end(self) -> int:
        """Read to the end and return the exit status."""
        while True:
            try:
                data = os.read(self.fd, 65_536)
            except OSError:
                break
            if not data:
                break
            self.seen += data.decode()
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_states_have_colours_on_a_terminal() -> None:
    terminal = Terminal("apps")
    assert terminal.end() == 0
    assert "\x1b[32m● running" in terminal.seen


def test_help_is_plain() -> None:
    terminal = Terminal("--help")
    assert terminal.end() == 0
    assert "\x1b[" not in terminal.seen


def test_a_narrow_terminal_loses_columns_but_no_names() -> None:
    terminal = Terminal("ps", columns=64)
    assert terminal.end() == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.seen)
    assert "web-110abc" in plain
    assert "RUNTIME" not in plain
    assert all(len(line.rstrip("\r")) <= 64 for line in plain.split("\n"))


def test_top_goes_on_until_it_is_interrupted() -> None:
    terminal = Terminal("top", "--interval", "0.5")
    terminal.until("web-110abc")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert terminal.seen.endswith("\x1b[?25h\x1b[?1049l"), "the cursor and the screen are given back"


def test_a_command_gets_a_raw_terminal_with_its_size() -> None:
    terminal = Terminal("exec", "-it", "web", "--", "size", rows=33, columns=99)
    terminal.until_raw()
    terminal.until("33x99")
    terminal.size(50, 140)
    terminal.until("50x140")
    terminal.type("x")
    assert terminal.end() == 0


def test_keys_reach_the_command_as_they_are() -> None:
    terminal = Terminal("exec", "-it", "web", "--", "cat")
    terminal.until_raw()
    terminal.type("a\x03b")
    terminal.until("a\x03b")
    os.kill(terminal.pid, 9)
    terminal.end()


def test_a_secret_is_asked_for_and_not_shown() -> None:
    terminal = Terminal("secrets", "set", "db")
    terminal.until("Value of db")
    terminal.type("hunter2\n")
    terminal.until("Repeat")
    terminal.type("hunter2\n")
    assert terminal.end() == 0
    assert "hunter2" not in terminal.seen
    assert "version 1" in terminal.seen


def test_a_deletion_is_asked_for() -> None:
    terminal = Terminal("delete", "web")
    terminal.until(r"\[y/N\]")
    terminal.type("n\n")
    assert terminal.end() == 1
    assert "Aborted" in terminal.seen


def test_an_interrupted_follow_ends_with_130() -> None:
    terminal = Terminal("events", "-f")
    terminal.until("rolled-out")
    terminal.type("\x03")
    assert terminal.end() == 130
