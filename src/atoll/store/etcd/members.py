"""Calls to the members of an etcd, each with a deadline; when one member fails, the next is asked.

One member is used at a time. What may be repeated is tried at the others until the deadline; a write is tried again only when it
surely was not done, and otherwise ends in OutcomeUnknown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import structlog
from aetcd import rpc
from grpc import ChannelConnectivity
from grpc.aio import AioRpcError

from atoll.model.errors import AtollError, OutcomeUnknown, TooLarge, Unavailable
from atoll.store.etcd.address import EtcdAddress
from atoll.store.etcd.errors import Fault, judge

CALL_S = 6.0
"""The longest that any call takes, all its tries together: an election with etcd's default timers fits in."""
TRY_S = 2.0
"""The longest that one member may take for what may be repeated at another."""
CONNECT_S = 1.0
PROBE_S = 1.0
SLOW_S = 0.3
"""A write without an answer for so long is looked after: a member that is silent, or has a new leader since, may never answer."""
LATE_S = 0.15
"""How long a write may still be answered after its member has a new leader; what was sent to the old one may be lost."""
RETRY_MIN_S = 0.02
RETRY_MAX_S = 0.1
"""Between two tries, doubled from the one to the other."""
TELL_S = 2.0
"""A change of member this soon after the last is logged for debugging only."""
MESSAGE_BYTES_MAX = 64 << 20
"""The largest answer that is taken; listings ask for less when they meet it."""
KEEPALIVE_MS = 6_000
"""Members allow no more than one ping in 5 s; an open connection that carries nothing is found dead after this and the next."""
KEEPALIVE_TIMEOUT_MS = 2_000
RESERVED = b"\0atoll/"
"""Keys of the store itself. No key of the contract holds NUL, so that they lie before all others and in no listing."""
PROBE_KEY = RESERVED + b"probe"

OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Two stores in one process must not share a connection: one would not notice the other's trouble.
    ("grpc.use_local_subchannel_pool", 1),
]

log = structlog.get_logger()


class AnswerTooLarge(Exception):
    """The answer is over MESSAGE_BYTES_MAX; ask for less."""


class Member:
    """One member's connection, made when it is first used."""

    def __init__(self, target: str, address: EtcdAddress) -> None:
        self.target = target
        if address.ca is None:
            self.channel = grpc.aio.insecure_channel(target, options=OPTIONS)
        else:
            credentials = grpc.ssl_channel_credentials(address.ca, address.key, address.cert)
            self.channel = grpc.aio.secure_channel(target, credentials, options=OPTIONS)
        self.kv = rpc.KVStub(self.channel)
        self.lease = rpc.LeaseStub(self.channel)
        self.watch = rpc.WatchStub(self.channel)
        self.auth = rpc.AuthStub(self.channel)
        self.maintenance = rpc.MaintenanceStub(self.channel)
        self.term = 0
        """Of the election that its answers tell of; a new leader raises it."""

    async def settled(self, wait_s: float) -> bool:
        """Return whether the connection is made or refused; while it is neither, a call would wait unsent."""
        state = self.channel.get_state(try_to_connect=True)
        if state is ChannelConnectivity.READY:
            return True
        try:
            async with asyncio.timeout(wait_s):
                while state in (ChannelConnectivity.IDLE, ChannelConnectivity.CONNECTING):
                    await self.channel.wait_for_state_change(state)
                    state = self.channel.get_state(try_to_connect=True)
        except TimeoutError:
            return False
        return state is not ChannelConnectivity.SHUTDOWN


Method = Callable[[Member], Callable[..., Any]]
"""Which call of a member's stubs: `lambda member: member.kv.Range`."""


class Members:
    """The members of one etcd, the one that is in use, and the token of our user."""

    def __init__(self, address: EtcdAddress) -> None:
        self._address = address
        self.all = tuple(Member(target, address) for target in address.members)
        self._current = 0
        self._told_at = 0.0
        self._token: str | None = None
        self._authenticating = asyncio.Lock()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the store is closed."""

    @property
    def current(self) -> Member:
        return self.all[self._current]

    def turn_from(self, member: Member, cause: str) -> None:
        """Use the next member from now on, if `member` is still the one in use."""
        if self.current is member and len(self.all) > 1:
            self._current = (self._current + 1) % len(self.all)
            # While none serves, the turns go round fast: the first of them says all.
            tell = log.debug if time.monotonic() - self._told_at < TELL_S else log.info
            self._told_at = time.monotonic()
            tell("another member of etcd is asked", from_=member.target, to=self.current.target, cause=cause)

    def check_open(self) -> None:
        """Raises Unavailable."""
        if self.ended.done():
            raise Unavailable("the store is closed")

    def was_closed(self) -> bool:
        """Whether a cancellation that has just been seen is that of a closed channel's calls, and not that of our caller."""
        task = asyncio.current_task()
        return self.ended.done() and (task is None or task.cancelling() == 0)

    async def close(self) -> None:
        """Safe to repeat."""
        if not self.ended.done():
            self.ended.set_result(None)
            await asyncio.gather(*(member.channel.close() for member in self.all))

    async def metadata(self, *, alone: bool = False) -> tuple[tuple[str, str], ...]:
        """Return what goes with each call: who asks, and, unless a member may answer it `alone`, that one without a leader must
        refuse it. Raises as `call`."""
        demands = () if alone else (("hasleader", "true"),)
        if not self._address.user:
            return demands
        if self._token is None:
            await self._authenticate()
        return (*demands, ("token", self._token or ""))

    async def call(self, method: Method, request: Any, *, repeat: bool, alone: bool = False) -> Any:
        """Return the answer of some member. With `repeat`, doing it twice does no harm; with `alone`, it need not hear others.

        Raises Unavailable: nothing was done. OutcomeUnknown (never with `repeat`). AnswerTooLarge. What etcd refuses comes as
        the error that says so.
        """
        self.check_open()
        return await self._until(time.monotonic() + CALL_S, method, request, repeat=repeat, alone=alone)

    async def at(self, member: Member, method: Method, request: Any, wait_s: float) -> Any:
        """Return the answer of just this member, tried once. Raises Unavailable, or what etcd's refusal means."""
        self.check_open()
        try:
            if not await member.settled(wait_s):
                raise Unavailable(f"{member.target} of etcd does not answer")
            return _heard(member, await method(member)(request, timeout=wait_s, metadata=await self.metadata()))
        except AioRpcError as error:
            verdict = judge(error)
            if verdict is Fault.TOKEN:
                self._token = None
            raise _unavailable(member, error) if isinstance(verdict, Fault) else verdict from None

    async def _until(
        self, deadline: float, method: Method, request: Any, *, repeat: bool, authenticating: bool = False, alone: bool = False
    ) -> Any:
        cause = "no time"
        retry_s = RETRY_MIN_S
        tries = 0
        while (left_s := deadline - time.monotonic()) > 0:
            self.check_open()
            member = self.current
            tries += 1
            if not await member.settled(min(CONNECT_S, left_s)):
                cause = f"{member.target}: not connected within {CONNECT_S:g} s"
            else:
                metadata = () if authenticating else await self.metadata(alone=alone)
                try:
                    if not repeat:
                        return await self._send_once(member, method, request, left_s, metadata)
                    answer = await method(member)(request, timeout=min(TRY_S, left_s), metadata=metadata)
                    return _heard(member, answer)
                except _Silent as silent:
                    self.turn_from(member, str(silent))
                    raise OutcomeUnknown(
                        f"{member.target} of etcd did not say whether the write was done: {silent}", mend="read, then decide"
                    ) from None
                except AioRpcError as error:
                    self.check_open()
                    if self._may_go_on(member, error, repeat=repeat):
                        continue
                    cause = f"{member.target}: {error.details()}"
                except asyncio.CancelledError:
                    if not self.was_closed():
                        raise
                    raise (Unavailable if repeat else OutcomeUnknown)("the store was closed meanwhile") from None
            self.turn_from(member, cause)
            if tries % len(self.all) == 0:
                await asyncio.sleep(min(retry_s, max(0.0, deadline - time.monotonic())))
                retry_s = min(2 * retry_s, RETRY_MAX_S)
        raise Unavailable(
            f"no member of {self._address} answers: {cause}", mend="see that most members run: etcdctl endpoint status --cluster"
        )

    async def _send_once(self, member: Member, method: Method, request: Any, wait_s: float, metadata: Any) -> Any:
        """Return the answer to a write. Raises _Silent once it is plain that there will be none, long before `wait_s`."""
        call = method(member)(request, timeout=wait_s, metadata=metadata)
        guards: list[asyncio.Task[None]] = []
        timer = asyncio.get_running_loop().call_later(
            SLOW_S, lambda: guards.append(asyncio.create_task(self._guard(member, member.term, call), name="etcd slow write"))
        )
        try:
            return _heard(member, await call)
        except asyncio.CancelledError:
            if guards and guards[0].done() and not guards[0].cancelled() and not self.ended.done():
                guards[0].result()
            raise
        finally:
            timer.cancel()
            for guard in guards:
                if not guard.cancel() and not guard.cancelled():
                    guard.exception()  # where both came at once, the answer counts

    async def _guard(self, member: Member, term: int, call: Any) -> None:
        """Cancel a call that will not be answered, and raise _Silent."""
        cause = ""
        while not cause:
            try:
                request = rpc.RangeRequest(key=PROBE_KEY, serializable=True, count_only=True)
                await self.at(member, lambda m: m.kv.Range, request, PROBE_S)
                if member.term > term:
                    cause = "there is a new leader"
                await asyncio.sleep(LATE_S)
            except AtollError as error:
                cause = error.message
        call.cancel()
        raise _Silent(cause)

    def _may_go_on(self, member: Member, error: AioRpcError, *, repeat: bool) -> bool:
        """Say whether to try at once (with a new token), else the next member; raises what no other try can change."""
        verdict = judge(error)
        match verdict:
            case AtollError():
                raise verdict from None
            case Fault.TOKEN:
                self._token = None
                return True
            case Fault.ANSWER_TOO_LARGE:
                if repeat:
                    raise AnswerTooLarge from None
                raise TooLarge("the answer to a transaction is larger than one message may be") from None
            case Fault.LOST if not repeat:
                self.turn_from(member, error.details() or "")
                raise OutcomeUnknown(
                    f"{member.target} of etcd did not say whether the write was done: {error.details()}", mend="read, then decide"
                ) from None
        return False

    async def _authenticate(self) -> None:
        async with self._authenticating:
            if self._token is None:
                request = rpc.AuthenticateRequest(name=self._address.user, password=self._address.password)
                deadline = time.monotonic() + CALL_S
                answer = await self._until(deadline, lambda m: m.auth.Authenticate, request, repeat=True, authenticating=True)
                self._token = answer.token


class _Silent(Exception):
    """A write that was sent will not be answered."""


def _heard(member: Member, answer: Any) -> Any:
    member.term = max(member.term, answer.header.raft_term)
    return answer


def _unavailable(member: Member, error: AioRpcError) -> Unavailable:
    return Unavailable(f"{member.target} of etcd does not answer: {error.details()}")
