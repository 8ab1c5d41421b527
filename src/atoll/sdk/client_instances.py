"""Calls about instances: looking at them, commands, logs and files in them, and holding them still as a whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from atoll.model import codec
from atoll.model.streams import ExecOptions, FilesOptions, Held, LogLine, LogOptions, NextCommand
from atoll.model.views import (
    InstanceExplanation,
    InstanceView,
    SnapshotsView,
)
from atoll.sdk import answers, streams
from atoll.sdk.ahead import Ahead
from atoll.sdk.calls import Calls
from atoll.sdk.transport import Transport, path

HOLD_S = 140.0
"""Of one call that may have to wait for a snapshot."""


class InstanceCalls(Calls):
    """Part of `Client`."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self._ahead = Ahead(transport)

    async def instances(self, project: str, *, app: str | None = None, job: str | None = None) -> list[InstanceView]:
        return await self._all(InstanceView, "projects", project, "instances", app=app, job=job)

    async def instance(self, project: str, id: str) -> InstanceView:
        return await self._get(InstanceView, path("projects", project, "instances", id))

    async def explain(self, project: str, id: str) -> InstanceExplanation:
        """Return what the scheduler would answer for an instance now, were it not there."""
        return await self._get(InstanceExplanation, path("projects", project, "instances", id, "explain"))

    async def stop_instance(self, project: str, id: str) -> InstanceView:
        """Drain and stop one instance; its app gets another."""
        return await self._write(InstanceView, "POST", path("projects", project, "instances", id, "stop"))

    async def exec(self, project: str, id: str, options: ExecOptions) -> streams.Exec:
        """Start a command in a running instance. Raises OutcomeUnknown: it may run."""
        channel = await self._ahead.command(project, NextCommand(instance=id, options=options))
        if channel is None:
            where = path("projects", project, "instances", id, "exec", options=codec.encode(options).decode())
            channel = await self._transport.channel(where, acts=True)
        return streams.Exec(channel)

    async def logs(self, project: str, id: str, options: LogOptions = LogOptions()) -> AsyncIterator[LogLine]:
        """Yield the instance's lines, oldest first; with `follow`, until the instance is gone or the iterator is closed."""
        where = path("projects", project, "instances", id, "logs", options=codec.encode(options).decode())
        channel = await self._transport.channel(where)
        try:
            async for line in streams.log_lines(channel):
                yield line
        finally:
            await channel.close()

    async def get_files(self, project: str, id: str, source: str) -> AsyncGenerator[bytes, None]:
        """Yield a tar stream of a file or directory in the instance."""
        channel = await self._transport.channel(self._files(project, id, "get", source))
        try:
            async for part in streams.receive_files(channel):
                yield part
        finally:
            await channel.close()

    async def put_files(self, project: str, id: str, target: str, parts: AsyncIterator[bytes]) -> None:
        """Unpack a tar stream into directory `target` of the instance; returns when all of it is there."""
        channel = await self._transport.channel(self._files(project, id, "put", target), acts=True)
        try:
            await streams.send_files(channel, parts)
        finally:
            await channel.close()

    def _files(self, project: str, id: str, mode: str, where: str) -> str:
        options = codec.encode(FilesOptions(path=where)).decode()
        return path("projects", project, "instances", id, "files", mode=mode, options=options)

    async def hold_instance(self, project: str, id: str, what: str) -> Held:
        """Have a running instance stand still (`what` is `pause`), go on (`resume`) or be written down (`snapshot`).

        Takes up to two minutes, and is asked once; safe to repeat. Raises Unsupported, naming the runtimes that can.
        """
        where = path("projects", project, "instances", id, what)
        return answers.read(await self._transport.request("POST", where, timeout_s=HOLD_S), Held)

    async def snapshots(self, project: str, node: str | None = None) -> SnapshotsView:
        """Return the project's snapshots, of all nodes or one, and the nodes that did not answer."""
        return await self._get(SnapshotsView, path("projects", project, "snapshots", node=node))

    async def remove_snapshot(self, project: str, digest: str, node: str) -> None:
        """Remove a snapshot from its node; sandboxes that went on from it go on. Raises NotFound."""
        await self._delete(path("projects", project, "snapshots", digest.removeprefix("sha256:"), node=node))
