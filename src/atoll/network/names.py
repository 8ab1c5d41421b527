"""Names of the fabric, answered from what this node knows: `APP.PROJECT.internal`, `ID.APP.PROJECT.internal` (an instance, by its
id or its number), `SITE.site.APP.PROJECT.internal`. Who asks for another project's is told that there is none.

All other names are asked of the node's own name servers, and their answers passed on as they are.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import structlog
from msgspec import Struct

from atoll.model.fabric import DOMAIN, Member, ipv6_of

TTL_S = 2
"""So soon does who holds a name look again."""
ANSWERS_MAX = 16
"""Addresses in one answer: they fit a datagram of 512 bytes."""
ANSWERS_IPV6_MAX = 14
FORWARD_S = 3.0
PENDING_MAX = 512
"""Questions for the node's name servers that are under way; more are refused."""
PENDING_OF_ONE_MAX = 32
"""Those of one instance, so that none takes the others' share."""
TCP_MAX = 64
TCP_OF_ONE_MAX = 8
"""Connections of one instance."""
CACHED_MAX = 4_096
"""Answers that are kept until something changes; making one takes a quarter of a millisecond."""
CACHED_BYTES_MAX = 512
"""Of a question whose answer is kept: whoever asks says how long it is, with options of no meaning."""
TCP_IDLE_S = 10.0
MESSAGE_MAX = 65_535

log = structlog.get_logger()


class Found(Struct, frozen=True):
    """`known`: there is such a name, even if nobody healthy answers to it now."""

    known: bool
    addresses: tuple[str, ...] = ()
    ipv6: tuple[str, ...] = ()


class Directory:
    """Who answers to which name, nearest first, as seen from `node` of `site` in `region`. `ula`: the cell's IPv6 network, where
    the node has IPv6."""

    def __init__(self, node: str, site: str, region: str, ula: str = "") -> None:
        self._here = (node, site, region)
        self._ula = ula
        self._apps: dict[tuple[str, str], list[Member]] = {}
        self.version = 0
        """Another number whenever any name may mean something else."""

    def see(self, members: Iterable[Member], away: frozenset[str] = frozenset()) -> None:
        """Take in all members; those on nodes that are `away` count as unhealthy."""
        apps: dict[tuple[str, str], list[Member]] = {}
        for member in members:
            if member.app:
                healthy = member.ready and member.node not in away
                entry = member if healthy == member.ready else _unready(member)
                apps.setdefault((member.project, member.owner), []).append(entry)
        for found in apps.values():
            found.sort(key=self._distance)
        if apps != self._apps:
            self._apps = apps
            self.version += 1

    def find(self, name: Sequence[str], project: str) -> Found:
        """Return who answers to the labels of `name`, without its last one, for somebody of `project`."""
        if len(name) < 2 or name[-1] != project:
            return Found(False)
        members = self._apps.get((project, name[-2]))
        if members is None:
            return Found(False)
        match list(name[:-2]):
            case []:
                return self._found(members)
            case [one]:
                return self._found([m for m in members if m.id == one or str(m.index) == one])
            case [site, "site"]:
                return self._found([m for m in members if m.site.lower() == site])
            case _:
                return Found(False)

    def _found(self, members: Sequence[Member]) -> Found:
        ready = [member for member in members if member.ready]
        six = [member for member in ready if member.ipv6 and self._ula][:ANSWERS_IPV6_MAX]
        return Found(
            bool(members),
            tuple(member.address for member in ready[:ANSWERS_MAX]),
            tuple(ipv6_of(self._ula, member.address) for member in six),
        )

    def _distance(self, member: Member) -> tuple[int, str]:
        node, site, region = self._here
        if member.node == node:
            return 0, member.id
        if (member.site, member.region) == (site, region):
            return 1, member.id
        return (2 if member.region == region else 3), member.id


def _unready(member: Member) -> Member:
    return Member(
        id=member.id,
        project=member.project,
        owner=member.owner,
        index=member.index,
        node=member.node,
        site=member.site,
        region=member.region,
        address=member.address,
        ready=False,
        ipv6=member.ipv6,
    )


class NameServer:
    """Answers on port 53 of `address`, UDP and TCP. `project_at` says whose an instance's address is, `has_ipv6` whether it has
    IPv6: others are told of no IPv6 addresses."""

    def __init__(
        self,
        directory: Directory,
        address: str,
        project_at: Callable[[str], str | None],
        forwarders: Callable[[], Sequence[str]],
        *,
        port: int = 53,
        passed_on: Callable[[str, str, Sequence[str]], None] | None = None,
        has_ipv6: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """`passed_on` hears, before the instance does, which addresses other servers gave it for a name."""
        self._directory = directory
        self._address = (address, port)
        self._project_at = project_at
        self._forwarders = forwarders
        self._passed_on = passed_on
        self._has_ipv6 = has_ipv6
        self._pending: Counter[str] = Counter()
        self._connections: Counter[str] = Counter()
        self._cached: dict[tuple[str | None, bool, bytes], bytes] = {}
        self._cached_version = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.DatagramTransport | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Raises OSError where the port is taken."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self), local_addr=self._address)
        self._server = await asyncio.start_server(self._serve, *self._address)

    async def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def answer(self, wire: bytes, source: str) -> bytes | None:
        """Return the answer to a question about the fabric's names; None for any other, which is to be passed on.

        Raises dns.exception.DNSException for what is no question.
        """
        project, ipv6 = self._project_at(source), self._has_ipv6(source)
        if self._cached_version != self._directory.version or len(self._cached) >= CACHED_MAX:
            self._cached.clear()
            self._cached_version = self._directory.version
        cached = self._cached.get((project, ipv6, wire[2:]))
        if cached is not None:
            return wire[:2] + cached
        query = dns.message.from_wire(wire)
        if query.flags & dns.flags.QR or len(query.question) != 1:
            raise dns.exception.FormError
        question = query.question[0]
        labels = [label.decode("ascii", "replace").lower() for label in question.name.labels if label]
        if not labels or labels[-1] != DOMAIN:
            return None
        answer = dns.message.make_response(query, recursion_available=True)
        answer.flags |= dns.flags.AA
        found = self._directory.find(labels[:-1], project) if project is not None else Found(False)
        if not found.known:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        else:
            # One by one, as the library would shuffle a set; nearest first is the point.
            if question.rdtype in (dns.rdatatype.A, dns.rdatatype.ANY):
                answer.answer += [dns.rrset.from_text(question.name, TTL_S, "IN", "A", each) for each in found.addresses]
            elif question.rdtype == dns.rdatatype.AAAA and ipv6:
                answer.answer += [dns.rrset.from_text(question.name, TTL_S, "IN", "AAAA", each) for each in found.ipv6]
        made = answer.to_wire()
        if len(wire) <= CACHED_BYTES_MAX:
            self._cached[project, ipv6, wire[2:]] = made[2:]
        return made

    def take(self, wire: bytes, source: tuple[str, int]) -> None:
        """Answer a datagram, at once or when the node's name server has."""
        if self._transport is None:
            return
        try:
            answer = self.answer(wire, source[0])
        except (dns.exception.DNSException, ValueError):
            return
        if answer is not None:
            self._transport.sendto(answer, source)
        elif self._begin(source[0]):
            task = asyncio.get_running_loop().create_task(self._pass_on(wire, source))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _: self._end(source[0]))

    def _begin(self, source: str) -> bool:
        """Count one more question that is passed on for `source`, if it may be; then `_end` must follow."""
        if self._pending[source] >= PENDING_OF_ONE_MAX or self._pending.total() >= PENDING_MAX:
            return False
        self._pending[source] += 1
        return True

    def _end(self, source: str) -> None:
        self._pending[source] -= 1
        if not self._pending[source]:
            del self._pending[source]

    async def _pass_on(self, wire: bytes, source: tuple[str, int]) -> None:
        answer = await self._ask(wire)
        if answer is not None:
            self._tell(answer, source[0])
        if answer is not None and self._transport is not None and not self._transport.is_closing():
            self._transport.sendto(answer, source)

    def _tell(self, wire: bytes, source: str) -> None:
        if self._passed_on is None:
            return
        try:
            answer = dns.message.from_wire(wire)
            name = answer.question[0].name.to_text(omit_final_dot=True).lower()
            kinds = (dns.rdatatype.A, dns.rdatatype.AAAA)
            found = [str(one) for rrset in answer.answer if rrset.rdtype in kinds for one in rrset]
        except (dns.exception.DNSException, IndexError, ValueError):
            return
        if found:
            self._passed_on(source, name, found)

    async def _ask(self, wire: bytes, *, tcp: bool = False) -> bytes | None:
        """Return what the first of the node's name servers that answers says; None when none does."""
        for server in self._forwarders():
            try:
                async with asyncio.timeout(FORWARD_S):
                    return await (_ask_tcp(server, wire) if tcp else _ask_udp(server, wire))
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                continue
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source = str(writer.get_extra_info("peername")[0])
        self._connections[source] += 1
        try:
            while self._connections[source] <= TCP_OF_ONE_MAX and self._connections.total() <= TCP_MAX:
                async with asyncio.timeout(TCP_IDLE_S):
                    length = struct.unpack("!H", await reader.readexactly(2))[0]
                    wire = await reader.readexactly(length)
                answer = self.answer(wire, source)
                if answer is None and self._begin(source):
                    try:
                        answer = await self._ask(wire, tcp=True)
                    finally:
                        self._end(source)
                    if answer is not None:
                        self._tell(answer, source)
                if answer is None:
                    return
                writer.write(struct.pack("!H", len(answer)) + answer)
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, dns.exception.DNSException, ValueError):
            return
        finally:
            self._connections[source] -= 1
            if not self._connections[source]:
                del self._connections[source]
            writer.close()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: NameServer) -> None:
        self._server = server

    def datagram_received(self, data: bytes, addr: tuple[str | int, ...]) -> None:
        try:
            self._server.take(data, (str(addr[0]), int(addr[1])))
        except Exception:
            # The outer edge: no datagram may end the names of all others.
            log.exception("a question for a name was not answered")


async def _ask_udp(server: str, wire: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.setblocking(False)
        asking.connect((server, 53))
        await loop.sock_sendall(asking, wire)
        while True:
            answer = await loop.sock_recv(asking, MESSAGE_MAX)
            if answer[:2] == wire[:2]:
                return answer


async def _ask_tcp(server: str, wire: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(server, 53)
    try:
        writer.write(struct.pack("!H", len(wire)) + wire)
        await writer.drain()
        return await reader.readexactly(struct.unpack("!H", await reader.readexactly(2))[0])
    finally:
        writer.close()
