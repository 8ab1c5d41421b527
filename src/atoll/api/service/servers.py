"""The servers of the cell: each is written down under a lease, and carries a stream to the server that has the node's tunnel."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import structlog

from atoll.api.service.access import Caller
from atoll.api.service.context import Context
from atoll.api.service.tunnels import ANSWER_S, let_go
from atoll.model import codec, keys
from atoll.model.errors import AtollError, Conflict, Corrupt, NotFound, Unauthenticated
from atoll.model.membership import Server, ServerView
from atoll.model.ports.control_plane import Channel
from atoll.model.ports.store import LeaseId, Put, absent
from atoll.model.records import Role

LEASE_S = 10.0
"""How long a server that died is still listed."""
KEEP_ALIVE_S = 3.0
RETRY_S = 1.0
TAKEN_S = 3 * LEASE_S
"""How long a server waits for another of the same id to be gone before it gives up."""
TOKEN_LIFE_S = 60.0
"""Of what one server shows another; also how far apart their clocks may be."""
ASK_S = ANSWER_S
"""How long another server has: one that has the tunnel answers when the agent has dialled in, any other at once."""
ASK_AGAIN_S = 0.25
PEER_PREFIX = "atollpeer"

Dial = Callable[[str, str, str], Awaitable[Channel]]
"""`(url, path, token)` → the channel; raises as `Transport.channel`."""

log = structlog.get_logger()


class Servers:
    """`own` is this server's record; None where it runs alone (in tests, in the simulator). `dial` reaches another server."""

    def __init__(self, context: Context, own: Server | None = None, dial: Dial | None = None) -> None:
        self._context = context
        self._state = context.state
        self.own = own
        self._dial = dial
        self._key = context.sealer.derive("servers")

    def all(self) -> tuple[ServerView, ...]:
        """Return the servers that run, by id. Which one leads is told by `leader`."""
        return tuple(ServerView(server=held.record) for _, held in sorted(self._state.records(Server).items()))

    async def listed(self) -> tuple[ServerView, ...]:
        """Return the servers that run, and which of them leads. Raises Unavailable."""
        leader = await self._context.store.get(keys.LEADER)
        leads = leader.value.decode(errors="replace") if leader is not None else ""
        return tuple(ServerView(server=view.server, leads=view.server.id == leads) for view in self.all())

    async def run(self) -> None:
        """Keep this server listed, for ever. Raises Conflict: another server runs under the same id."""
        if self.own is None:
            return
        first = True
        while True:
            try:
                lease = await self._enter(patience_s=TAKEN_S if first else 0.0)
                first = False
                while True:
                    await asyncio.sleep(KEEP_ALIVE_S)
                    await self._context.store.lease_keep_alive(lease)
            except Conflict:
                raise
            except AtollError as error:
                log.warning("this server is not listed; trying again", cause=error.message)
                await asyncio.sleep(RETRY_S)

    async def _enter(self, *, patience_s: float) -> LeaseId:
        """Write our record under a new lease, in place of one of ours from before; wait for the end of another's with our id."""
        assert self.own is not None  # noqa: S101 (`run` has seen to it)
        key = keys.server(self.own.id)
        deadline = self._context.clock.monotonic() + patience_s
        while True:
            held = await self._context.store.get(key)
            if held is not None:
                there = codec.decode(held.value, Server)
                if there.urls == self.own.urls:
                    await self._context.store.lease_revoke(held.lease)
                elif self._context.clock.monotonic() < deadline:
                    await asyncio.sleep(RETRY_S)
                    continue
                else:
                    raise Conflict(
                        f"a server with the id '{self.own.id}' runs at {', '.join(there.urls)}",
                        mend="the data directory was copied: remove the file 'server/id' from it, and start again",
                    )
            lease = await self._context.store.lease_grant(LEASE_S)
            result = await self._context.store.txn([absent(key)], [Put(key, codec.encode(self.own), lease.id)])
            if result.succeeded:
                return lease.id
            await self._context.store.lease_revoke(lease.id)

    def token(self) -> str:
        """Return what shows another server that this one holds the cell's key; good for `TOKEN_LIFE_S`."""
        who = self.own.id if self.own is not None else "alone"
        return self._sealed(who, int(self._context.clock.now() + TOKEN_LIFE_S))

    def authenticate(self, token: str) -> Caller:
        """Return which server shows `token`. Raises Unauthenticated."""
        parts = token.split(".")
        now = self._context.clock.now()
        good = len(parts) == 4 and parts[0] == PEER_PREFIX and parts[2].isdecimal() and len(parts[2]) < 16
        if not good or not hmac.compare_digest(self._sealed(parts[1], int(parts[2])).encode(), token.encode()):
            raise Unauthenticated("this is for servers of the cell only", mend="every server needs the same key")
        if not now < int(parts[2]) <= now + 2 * TOKEN_LIFE_S:
            raise Unauthenticated("the other server's clock is too far from this one's", mend="set both clocks")
        return Caller(id="system", role=Role.ADMIN, name=f"server {parts[1]}")

    async def elsewhere(self, node: str, kind: str, instance: str, options: dict[str, Any]) -> Channel:
        """Return a stream to `node` by the server that has its tunnel, asking again until there is one; the caller cancels.

        Raises what that server says: it had the tunnel, and the agent did not answer, say.
        """
        query = f"node={quote(node)}&kind={quote(kind)}&instance={quote(instance)}"
        path = f"/v1/servers/streams?{query}&options={quote(codec.encode(options).decode(), safe='')}"
        while True:
            others = [view.server for view in self.all() if self.own is not None and view.server.id != self.own.id]
            if self._dial is not None and others and (channel := await self._ask(others, path)) is not None:
                return channel
            await asyncio.sleep(ASK_AGAIN_S)

    async def _ask(self, others: list[Server], path: str) -> Channel | None:
        asking = [asyncio.ensure_future(self._ask_one(server, path)) for server in others]
        kept = None
        try:
            waits = set(asking)
            while waits:
                done, waits = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for kept in done:
                    if (channel := kept.result()) is not None:
                        return channel
            return None
        finally:
            for one in asking:
                if one is not kept:
                    # Only one has the tunnel; were there two for a moment, the second's stream is let go.
                    one.cancel()
                    one.add_done_callback(_let_go)

    async def _ask_one(self, server: Server, path: str) -> Channel | None:
        assert self._dial is not None  # noqa: S101 (`elsewhere` has seen to it)
        try:
            async with asyncio.timeout(ASK_S):
                return await self._dial(server.urls[0], path, self.token())
        except TimeoutError:
            return None
        except NotFound:
            return None
        except AtollError as error:
            if error.status < 500 or error.code == "deadline-exceeded":
                raise
            log.info("another server did not answer", server=server.id, cause=error.message)
            return None

    def _sealed(self, who: str, until: int) -> str:
        said = f"{PEER_PREFIX}.{who}.{until}"
        return f"{said}.{hmac.new(self._key, said.encode(), hashlib.sha256).hexdigest()}"


def _let_go(future: asyncio.Future[Channel | None]) -> None:
    if not future.cancelled() and future.exception() is None and future.result() is not None:
        let_go(future)


async def check_key(context: Context) -> None:
    """See that this server has the cell's key; the first server's is the cell's. Raises Corrupt."""
    ours = context.sealer.fingerprint(b"the cell's key").encode()
    held = await context.store.get(keys.CELL_KEY)
    if held is None:
        await context.store.txn([absent(keys.CELL_KEY)], [Put(keys.CELL_KEY, ours)])
        held = await context.store.get(keys.CELL_KEY)
    if held is not None and not hmac.compare_digest(held.value, ours):
        raise Corrupt(
            "this server's key is not the cell's: it can open no secret, and would seal what no other can open",
            mend="copy 'server/key' of another server or of the backup here, or name it with --key FILE; "
            "where it is lost for good: atoll store forget-key",
        )
