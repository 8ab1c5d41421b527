"""`atoll cp`: files and directories into and out of a running instance, as a tar stream."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tarfile
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from atoll.cli.finding import Finder, of_any, of_sandbox
from atoll.cli.session import Session, command
from atoll.cli.untar import unpack
from atoll.model.errors import AtollError, Invalid, NotFound, RuntimeFailed
from atoll.model.units import format_bytes

if TYPE_CHECKING:
    from atoll.sdk.client import Client

T = TypeVar("T")
PART_BYTES = 65_536
PARTS_MAX = 16
"""Parts of a tar stream that wait between the disk and the network."""
PIPE_S = 60.0
"""The longest that one side waits for the other to move."""


def copy_command(find: Finder, *, example: str, help: str) -> click.Command:
    """Return a `cp` into and out of what `find` finds."""

    @command(name="cp", example=example, help=help)
    @click.argument("source", metavar="SRC")
    @click.argument("target", metavar="DST")
    async def made(session: Session, source: str, target: str) -> None:
        there, here = _remote(source), _remote(target)
        if bool(there) == bool(here):
            mend = f"e.g. {example.splitlines()[0]}"
            raise Invalid("one of SRC and DST must be NAME:PATH, the other a path here", mend=mend)
        name = (there or here or ("", ""))[0]
        async with session.client() as client:
            id = await find(client, session.project, name)
            with _Counter(session, f"{source} → {target}") as counter:
                if there:
                    size = await _fetch(client, session.project, id, there[1], Path(target), target.endswith("/"), counter.add)
                else:
                    assert here  # noqa: S101 - one of the two
                    size = await _store(client, session.project, id, Path(source), here[1], counter.add)
        if session.json:
            session.output.json({"source": source, "target": target, "instance": id, "bytes": size})
        else:
            session.output.say(f"[green]✓[/] {source} → {target} ({format_bytes(size)})")

    return made


_NAMES = "A DST that ends in / (or is a directory here) keeps the name of SRC; any other DST is the new name."

copy = copy_command(
    of_any,
    example="atoll cp app.conf hello:/etc/app.conf\natoll cp hello:/var/log ./logs\natoll cp site/ hello-1-abc:/srv/",
    help=f"Copy a file or directory; one side is APP:PATH or INSTANCE:PATH.\n\n{_NAMES}",
)
copy_sandbox = copy_command(
    of_sandbox,
    example="atoll sandbox cp script.py try:/tmp/\natoll sandbox cp try:/tmp/out ./out",
    help=f"Copy a file or directory; one side is SANDBOX:PATH.\n\n{_NAMES}",
)


def _remote(text: str) -> tuple[str, str] | None:
    """Return name and path of `NAME:PATH`; None for a path here. `./a:b` is a path here."""
    name, colon, path = text.partition(":")
    if not colon or "/" in name or not name:
        return None
    if not path.startswith("/"):
        raise Invalid(f"{text}: the path in an instance must be absolute", mend=f"write {name}:/{path}")
    return name, path


class _Counter:
    """Counts the bytes of a tar stream, and shows them while they move."""

    def __init__(self, session: Session, what: str) -> None:
        self._bytes = 0
        self._what = what
        self._status = session.output.err.status(what) if session.output.err.is_terminal else None

    def __enter__(self) -> _Counter:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def add(self, count: int) -> None:
        self._bytes += count
        if self._status is not None:
            self._status.update(f"{self._what} [dim]{format_bytes(self._bytes)}[/]")


async def _store(client: Client, project: str, id: str, source: Path, target: str, count: Callable[[int], None]) -> int:
    """Copy into the instance; return how many bytes are in the files."""
    if not source.exists() and not source.is_symlink():
        raise NotFound(f"{source}: no such file or directory")
    into = target.endswith("/")
    directory = target if into else str(PurePosixPath(target).parent)
    name = source.resolve().name if into else PurePosixPath(target).name
    if not name:
        raise Invalid(f"{target}: no name to give to {source}", mend="end DST in / to keep the name")

    sizes: list[int] = []

    async def parts() -> AsyncIterator[bytes]:
        pipe = _Pipe()
        packing = asyncio.create_task(asyncio.to_thread(_pack, source, name, pipe))
        try:
            async for part in pipe:
                count(len(part))
                yield part
            sizes.append(await packing)
        finally:
            pipe.close()
            with contextlib.suppress(AtollError, OSError, tarfile.TarError):
                await packing

    await client.put_files(project, id, directory, parts())
    return sum(sizes)


def _pack(source: Path, name: str, pipe: _Pipe) -> int:
    """Write `source` as a tar stream in which it is called `name`; owners are the instance's root. Return the size of its files."""
    size = 0

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        nonlocal size
        size += member.size if member.isreg() else 0
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member if member.isreg() or member.isdir() or member.issym() or member.islnk() else None

    try:
        with tarfile.open(mode="w|", fileobj=cast(Any, pipe), format=tarfile.PAX_FORMAT, bufsize=PART_BYTES) as archive:
            archive.add(source, name, filter=plain)
        pipe.end()
    except OSError as error:
        pipe.end(_failed(error, source))
    return size


async def _fetch(client: Client, project: str, id: str, source: str, target: Path, into: bool, count: Callable[[int], None]) -> int:
    """Copy out of the instance; return how many bytes are in the files."""
    if into or target.is_dir():
        directory, name = target, None
    else:
        directory, name = target.parent, target.name
    if not directory.is_dir():
        raise NotFound(f"{directory}: no such directory", mend=f"make it first: mkdir -p {directory}")
    pipe = _Pipe()
    unpacking = asyncio.create_task(asyncio.to_thread(_unpack, pipe, directory, name))
    try:
        async with contextlib.aclosing(client.get_files(project, id, source)) as parts:
            async for part in parts:
                count(len(part))
                await pipe.put(part)
                if unpacking.done() and unpacking.exception() is not None:
                    break  # the disk is full, say: what is still to come is of no use
        await pipe.put(b"")
    except BaseException:
        pipe.close()
        with contextlib.suppress(AtollError, OSError, tarfile.TarError):
            await unpacking
        raise
    return await unpacking


def _unpack(pipe: _Pipe, directory: Path, name: str | None) -> int:
    """Unpack below `directory`; what leads out of it, and devices, are refused. With `name`, the top is called that."""
    try:
        with tarfile.open(mode="r|", fileobj=cast(Any, pipe), bufsize=PART_BYTES) as archive:
            return unpack(archive, directory, top=name)
    except tarfile.TarError as error:
        raise Invalid(f"the instance did not send a tar stream: {error}") from None
    except OSError as error:
        raise _failed(error, directory) from None
    finally:
        pipe.close()


def _failed(error: OSError, where: Path) -> RuntimeFailed:
    """Say what went wrong; the pipe's own errors have words and no number."""
    return RuntimeFailed(f"{error.filename or where}: {os.strerror(error.errno).lower() if error.errno else error}")


class _Pipe:
    """A bounded pipe between a thread that packs or unpacks and the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[bytes | AtollError] = asyncio.Queue(PARTS_MAX)
        self._rest = b""
        self._ended = False
        self._closed = False

    # The event loop's side

    async def put(self, part: bytes) -> None:
        """Wait for room. After the other side has closed, do nothing: why is in what it raised."""
        while not self._closed:
            try:
                async with asyncio.timeout(0.2):
                    await self._parts.put(part)
                return
            except TimeoutError:
                continue

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            part = await self._parts.get()
            if isinstance(part, AtollError):
                raise part
            if not part:
                return
            yield part

    def close(self) -> None:
        """Let go of whoever waits; from either side."""
        self._closed = True
        self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        while not self._parts.empty():
            self._parts.get_nowait()  # makes room for a writer that waits
        self._parts.put_nowait(b"")  # the end, for a reader that waits

    # The thread's side: a file

    def write(self, data: bytes) -> int:
        if data:
            self._put(bytes(data))
        return len(data)

    def end(self, error: AtollError | None = None) -> None:
        self._put(error or b"")

    def _put(self, part: bytes | AtollError) -> None:
        if self._closed:
            raise BrokenPipeError("the copy was ended")
        self._wait(self._parts.put(part))

    def _wait(self, step: Coroutine[Any, Any, T]) -> T:
        moving = asyncio.run_coroutine_threadsafe(step, self._loop)
        try:
            return moving.result(PIPE_S)
        except TimeoutError:
            moving.cancel()
            raise TimeoutError(f"the other side did not move for {PIPE_S:.0f} s") from None

    def read(self, size: int) -> bytes:
        while not self._rest and not self._ended and not self._closed:
            part = self._wait(self._parts.get())
            if isinstance(part, AtollError):
                raise part
            self._rest, self._ended = part, not part
        data, self._rest = self._rest[:size], self._rest[size:]
        return data
