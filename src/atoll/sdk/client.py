"""The API from Python: a method per call, records and views as answers, errors of `model.errors`.

Every write carries an idempotency key, so that a call whose connection broke is repeated by itself and acts once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

from atoll.model.records import Event, Project
from atoll.model.spec import Quota
from atoll.model.views import (
    Info,
    Page,
    QuotaView,
    WatchLine,
)
from atoll.sdk import context, watching
from atoll.sdk.client_instances import InstanceCalls
from atoll.sdk.client_machines import MachineCalls
from atoll.sdk.client_secrets import SecretCalls
from atoll.sdk.client_workloads import WorkloadCalls
from atoll.sdk.failover import transport_to
from atoll.sdk.transport import path


class Client(MachineCalls, WorkloadCalls, InstanceCalls, SecretCalls):
    """Calls one cell's API. Safe for many tasks of one event loop; use as an async context, or `close` it.

    Every method may raise Unavailable (nothing answered), Unauthenticated, Forbidden, and OutcomeUnknown for a write whose
    repeats were cut too.
    """

    @classmethod
    def connect(cls, address: str | None = None, token: str | None = None, *, ca: str | None = None) -> Client:
        """Return a client for what was given, or for what the environment and `atoll up`'s files say. Opens nothing yet.

        `address` may name several servers with commas; `ca` is the cell's authority: a PEM file or text, or its `sha256:` pin.
        """
        found = context.resolve(address, token, ca=ca)
        return cls(transport_to(found.address, found.token, agent="atoll-client", ca=found.ca))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._ahead.close()
        await self._transport.close()

    async def info(self) -> Info:
        return await self._get(Info, path("info"))

    async def schema(self, kind: str) -> dict[str, Any]:
        """Return the JSON Schema of an `app` or `job` spec."""
        return await self._get(dict[str, Any], path("schema", kind))

    async def projects(self) -> list[Project]:
        return await self._all(Project, "projects")

    async def put_project(self, name: str) -> Project:
        return await self._write(Project, "PUT", path("projects", name))

    async def quota(self, project: str) -> QuotaView:
        """Return what the project may have, and what its instances hold of it."""
        return await self._get(QuotaView, path("projects", project, "quota"))

    async def set_quota(self, project: str, quota: Quota, *, if_revision: int | None = None) -> Project:
        """Limit what the project's instances may hold together; `Quota()` takes every limit away. What runs is left alone.

        `if_revision` is that of the `QuotaView` that it was made from. Raises StaleRevision if it is no longer the newest.
        """
        return await self._write(Project, "PUT", path("projects", project, "quota"), quota, if_revision=if_revision)

    async def events(self, project: str, *, subject: str | None = None, limit: int = 100, after: str | None = None) -> Page[Event]:
        """Return up to `limit` events, newest first; pass `next` as `after` for older ones."""
        return await self._get(Page[Event], path("projects", project, "events", subject=subject, limit=limit, after=after))

    def watch(
        self, kinds: Sequence[str], *, project: str | None = None, start: int | None = None, bookmarks: bool = False
    ) -> AsyncIterator[WatchLine]:
        """Yield the state, then every change, for ever; goes on by itself after the connection broke.

        With `start`, only changes from that revision on; raises Compacted if it is no longer held.
        """
        return watching.watch(self._transport, kinds, project=project, start=start, bookmarks=bookmarks)
