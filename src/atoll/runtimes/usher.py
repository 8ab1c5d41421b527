"""A process of ours that waits inside an instance and starts commands there, so that one begins by a message and not by a tool.

It is the guests' init without a machine of its own (`native/guest/init.c`), begun as any command beside the instance is: in its
namespaces, control group and system call filter, as its user, with no descriptor but two pipes. So it can do nothing that a command
could not, and neither can what it starts. Where the instance has ids of its own its file cannot be read there, and nobody inside
may trace it; he may end or stop it. What comes from it is the tenant's word: bounded by `GuestChannel`, and believed in what
concerns this instance's commands only.

A command is never started twice: only where the usher says that nothing ran, or is gone before it was asked, does the tool do it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from asyncio import ReadTransport, StreamReader, StreamReaderProtocol, StreamWriter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import IO

import structlog

from atoll.model.errors import AtollError, DeadlineExceeded, Exhausted, RuntimeFailed, TooLarge
from atoll.runtimes.oci_container import cannot_run
from atoll.runtimes.oci_launch import Place, make_pipes, prepared, process_of
from atoll.runtimes.shim import Launch
from atoll.runtimes.vm.channel import LOST, GuestChannel
from atoll.runtimes.vm.execution import GuestExecution, try_beside

SERVE = "serve"
GREETING_S_MAX = 10.0
ANSWER_S_MAX = 10.0
"""How long it has to start a command; then it counts as stopped from inside, and is ended."""
END_S_MAX = 2.0
LOSSES_MAX = 3
"""Ushers that failed to come or were ended from inside; after so many an instance's commands are started by the tool."""
NOTHING_RAN = ("cannot make a process", "too many commands")
"""How it says that it started nothing, and that it could be done another way (`native/guest/guest.h`)."""

log = structlog.get_logger()


class Usher:
    """Made by `bring_usher`. `close` ends it, and the commands that it started."""

    def __init__(self, launch: Launch, channel: GuestChannel, inward: ReadTransport, *, answer_s: float = ANSWER_S_MAX) -> None:
        self._launch = launch
        self.channel = channel
        self._inward = inward
        self._answer_s = answer_s
        self._closed = False

    @property
    def lost(self) -> bool:
        return self._closed or self.channel.lost.is_set()

    async def run(self, process: bytes, name: str, size: tuple[int, int] | None) -> GuestExecution | None:
        """Start a command; None where nothing ran, and another way may do.

        Raises CommandNotFound, RuntimeFailed, with the command's name; DeadlineExceeded, and then all that it started is ended.
        """
        late = asyncio.get_running_loop().call_later(self._answer_s, self._late)
        try:
            answer = await try_beside(self.channel, process, name, size)
        except (Exhausted, TooLarge):
            return None
        finally:
            late.cancel()
        if isinstance(answer, GuestExecution):
            return answer
        if self.channel.was_cut:
            self.close()
            raise DeadlineExceeded(f"what starts commands in the instance did not start {name!r} in time", mend="try again")
        if answer == LOST:
            raise RuntimeFailed(f"what starts commands in the instance was ended there; {name!r} may have run", mend="try again")
        if answer.startswith(NOTHING_RAN):
            return None
        raise cannot_run(name, answer)

    def _late(self) -> None:
        if not self.channel.stands_still():
            self.channel.cut()

    def close(self) -> None:
        """Hang up: it then ends by itself, and if not its shim ends it."""
        self._closed = True
        self.channel.hang_up()
        self._inward.close()
        self._launch.close()

    async def end(self) -> None:
        """As `close`, and return when it has ended, or after END_S_MAX."""
        self.channel.hang_up()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._launch.ending.event.wait(), END_S_MAX)
        self.close()


class Attendance:
    """Has an usher wait in one instance, from its first command on."""

    def __init__(self) -> None:
        self._usher: Usher | None = None
        self._bringing = asyncio.Lock()
        self._losses = 0

    async def run(
        self, bring: Callable[[], Awaitable[Usher]], process: bytes, name: str, size: tuple[int, int] | None
    ) -> GuestExecution | None:
        """Start a command by the usher, which `bring` starts where there is none; None where the tool has to do it.

        Raises as `Usher.run`.
        """
        usher = await self._present(bring)
        return None if usher is None else await usher.run(process, name, size)

    async def _present(self, bring: Callable[[], Awaitable[Usher]]) -> Usher | None:
        async with self._bringing:
            if self._usher is not None and self._usher.lost:
                self._lose("it was ended")
            if self._usher is None and self._losses < LOSSES_MAX:
                try:
                    self._usher = await bring()
                except AtollError as error:
                    self._lose(str(error))
            return self._usher

    def _lose(self, why: str) -> None:
        self._losses += 1
        log.info("usher.lost", why=why, losses=self._losses)
        self.close()

    def close(self) -> None:
        """End the usher; the next command brings another."""
        if self._usher is not None:
            self._usher.close()
        self._usher = None

    async def end(self) -> None:
        """As `close`, and return when it has ended, or after END_S_MAX."""
        async with self._bringing:
            usher, self._usher = self._usher, None
            if usher is not None:
                await usher.end()


async def bring_usher(
    place: Place, program: int | str, *, greeting_s: float = GREETING_S_MAX, answer_s: float = ANSWER_S_MAX
) -> Usher:
    """Start an usher in the instance; `program` is a descriptor of it, or its path there.

    Raises RuntimeFailed, DeadlineExceeded, Unavailable, Unsupported; nothing is left then.
    """
    path, descriptor = (program, None) if isinstance(program, str) else (SERVE, program)
    body, owner = process_of(place, [path, SERVE], (), "/", None, None)
    with ExitStack() as ours:
        with ExitStack() as theirs:
            ends, given = make_pipes(owner, (True, False), theirs)
            pipes = [ours.enter_context(os.fdopen(end, mode, 0)) for end, mode in zip(ends, ("wb", "rb"), strict=True)]
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            theirs.callback(os.close, null)
            with prepared(place, {**body, "env": []}, program=descriptor) as ready_made:
                launch, _ = await ready_made.launch((given[0], given[1], null), SERVE)
        ours.callback(launch.close)
        reader, writer, inward = await _streams(*pipes)
        ours.callback(inward.close)
        ours.callback(writer.close)

        async def connect() -> tuple[StreamReader, StreamWriter]:
            return reader, writer

        channel = await GuestChannel.open(connect, deadline_s=greeting_s, given_up=launch.ending.event, once=True)
        ours.pop_all()
    return Usher(launch, channel, inward, answer_s=answer_s)


async def _streams(outward: IO[bytes], inward: IO[bytes]) -> tuple[StreamReader, StreamWriter, ReadTransport]:
    loop = asyncio.get_running_loop()
    reader = StreamReader()
    reading, _ = await loop.connect_read_pipe(lambda: StreamReaderProtocol(reader), inward)
    writing, protocol = await loop.connect_write_pipe(lambda: StreamReaderProtocol(StreamReader()), outward)
    return reader, StreamWriter(writing, protocol, None, loop), reading
