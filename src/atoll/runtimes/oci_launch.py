"""How a process comes to run beside an instance's first one: by a runtime's tool or by entering, under a shim of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from atoll.runtimes.exec_tool import ExecFiles, ExecTool, Inner, inner_file
from atoll.runtimes.oci import process as oci_process
from atoll.runtimes.oci_box import NETNS, load_config, user_in, write_private
from atoll.runtimes.oci_console import ConsoleSocket
from atoll.runtimes.oci_container import failure
from atoll.runtimes.shim import Launch
from atoll.runtimes.users import User

START_S_MAX = 60.0
CLOSE_S_MAX = 2.0
_HANDED = "/proc/self/fd/4"
"""Where a process finds the descriptor that was handed to its shim."""


class Place(Struct, frozen=True):
    """A running instance, as processes beside its first one are started there."""

    directory: Path
    """Its box's."""
    tool: ExecTool
    base_id: int | None
    """The id on the node of its root; None without ids of its own."""
    inner: Inner | None = None


class Prepared(Struct, frozen=True):
    """What a shim starts one process with."""

    arguments: list[str]
    """The shim's."""
    log: Path
    output: Path
    handed: Sequence[int]
    console: ConsoleSocket | None

    async def launch(self, stdio: tuple[int, int, int] | None, name: str) -> tuple[Launch, int]:
        """Start it on `stdio`; return its shim and its id, as the node's kernel knows it, when it runs.

        Raises RuntimeFailed, which names it.
        """
        launch = Launch(self.arguments, stdio=stdio, output=self.output, handed=self.handed, close_at_end=True)
        try:
            news = await launch.news(START_S_MAX)
            if news is None or news[0] != "pid":
                raise failure(self.log, name)
        except BaseException:
            launch.close()  # should it start after all, its shim kills it
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(launch.ending.event.wait(), CLOSE_S_MAX)
            raise
        return launch, news[1]


@contextmanager
def prepared(place: Place, body: dict[str, Any], *, program: int | None = None) -> Iterator[Prepared]:
    """Give what starts `body`, the `process` of an OCI configuration; its files are gone afterwards.

    With `program`, a descriptor, that one is run in the place of the first argument; it is linked statically, and the tool hands
    descriptors on. Raises Unsupported, RuntimeFailed where a filter cannot be had.
    """
    directory = place.directory / "exec"
    directory.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as files:
        names = iter(f"{uuid.uuid4().hex[:12]}.{kind}" for kind in ("json", "log", "out", "pid", "console"))
        process, log_path, output, pid_file, console_name = (directory / name for name in names)
        for path in (process, log_path, output):
            files.callback(path.unlink, missing_ok=True)
        if program is not None:
            body = {**body, "args": [_HANDED, *body["args"][1:]]}
        write_private(process, place.tool.encode(body))
        shim = ["exec", load_config(place.directory).annotations[NETNS], str(pid_file)]
        if place.inner is not None:
            shim += [str(inner_file(pid_file)), *place.inner.command("@", signal.SIGKILL)]
        console = None
        if body["terminal"]:
            console = ConsoleSocket(directory, console_name.name)
            files.callback(console.close)
        tool = place.tool.command(ExecFiles(process, log_path, pid_file, console.path if console else None))
        yield Prepared([*shim, "--", *tool], log_path, output, () if program is None else (program,), console)


def process_of(
    place: Place,
    argv: Sequence[str],
    env: Sequence[tuple[str, str]],
    workdir: str | None,
    user: str | None,
    size: tuple[int, int] | None,
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Return a command's `process`, and the ids on the node that it runs as. Raises RuntimeFailed, ImageError (no such user)."""
    config = load_config(place.directory)
    own = config.process
    who = own["user"]
    variables = [(name, value) for name, _, value in (entry.partition("=") for entry in own["env"])]
    if user is None:
        account = User(who["uid"], who["gid"], tuple(who.get("additionalGids", ())))
    else:
        account = user_in(Path(config.root["path"]), user)
        variables = [*((name, value) for name, value in variables if name != "HOME"), ("HOME", account.home)]
    body = oci_process(argv, [*variables, *env], workdir or own["cwd"], account, tty=size is not None)
    if size is not None:
        body["consoleSize"] = {"height": size[0], "width": size[1]}
    return body, ((place.base_id or 0) + account.uid, (place.base_id or 0) + account.gid)


def make_pipes(owner: tuple[int, int], directions: Sequence[bool], theirs: ExitStack) -> tuple[list[int], list[int]]:
    """Return our ends and the process's of a pipe for each of `directions`, True for one that we write to.

    The process's ends are its `owner`'s, so that /dev/stdout can be opened by name; they close with `theirs`.
    """
    ours, given = [], []
    for writing in directions:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        ours.append(writer if writing else reader)
        given.append(reader if writing else writer)
        theirs.callback(os.close, given[-1])
        os.fchown(given[-1], *owner)
    return ours, given
