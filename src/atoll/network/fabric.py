"""The node's part of the fabric: hears from the control plane who else there is, and keeps tunnels, rules and names as they
should be, also while it hears nothing. What it heard last is on disk (`fabric.json`), so that a restart needs nobody."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import structlog
from msgspec import Struct
from msgspec.structs import replace

from atoll.model import codec
from atoll.model.errors import AtollError, Conflict, Exhausted, Invalid, NotFound, Unavailable
from atoll.model.fabric import FabricBatch, FabricGrant, FabricNode, FabricOffer, FabricPaths, Member, node_address
from atoll.model.ports.clock import Clock
from atoll.model.ports.fabric import FabricControl
from atoll.network import wireguard
from atoll.network.ledger import Ledger
from atoll.network.links import LinkNetwork
from atoll.network.names import Directory, NameServer
from atoll.network.paths import Paths
from atoll.network.probe import Prober
from atoll.network.slots import tag_of
from atoll.network.tunnels import Tunnels, kind_of

FILE = "fabric.json"
KEY_FILE = "fabric.key"
PROBE_S = 0.4
"""Each node is asked so often, as long as there are at most `PROBES_MAX`; with more, as often as that allows."""
PROBES_MAX = 256
"""Probes in one round."""
LARGE_EVERY = 25
"""Every so many rounds the probes are as large as the tunnel takes."""
LARGE_LOST_MAX = 3
"""So many large ones in a row without an answer, while small ones have one, are trouble."""
RETRY_S = 2.0
PAUSE_MAX_S = 1.0
"""The longest wait between two changes that are made, when they take long."""
KEEP_S = 1.0
"""What was heard is written down at most so often."""
SILENCE_S = 30.0
FIRST_RETRY_S = 0.3
ASK_S = 3.0
"""The longest that a node waits when it starts for what it can do without."""
JOIN_AGAIN_S = 60.0

Say = Callable[[str, str, bool], Awaitable[None]]
"""Tells an operator: a code, words, and whether it is bad."""

log = structlog.get_logger()


class Kept(Struct, frozen=True, kw_only=True):
    """What is on disk."""

    grant: FabricGrant
    keys_after: float = 0.0
    nodes: tuple[FabricNode, ...] = ()
    members: tuple[Member, ...] = ()


def load(directory: Path) -> Kept | None:
    """Return what was kept in `directory`; None where there is nothing that can be read."""
    try:
        return codec.decode((directory / FILE).read_bytes(), Kept)
    except (OSError, AtollError):
        return None


async def settle(
    control: FabricControl, node: str, offer: FabricOffer, directory: Path, *, former: str, stopped: Callable[[], bool]
) -> str | None:
    """Return the subnet of this node's instances: what the operator wants, what it has, or else what the cell gives.

    Waits for the control plane only at a node's very first start; what it says is then in `directory` (`load`). Where instances run
    already nothing is waited for: what the cell says is kept when it is heard, and IPv6 is there from the next start. `former` is
    what nodes had before cells gave prefixes; None: told to stop.
    """
    kept = load(directory)
    if kept is not None:
        await _ask_for_ipv6(control, node, offer, directory, kept)
        return offer.subnet or kept.grant.prefix
    if Ledger(directory / "links").load():
        return offer.subnet or former  # its instances run, with addresses of it
    while not stopped():
        try:
            grant = await control.join_fabric(node, offer)
        except NotFound:
            return offer.subnet or former  # older servers
        except (Unavailable, Conflict) as error:
            if offer.subnet and error.field == "subnet":
                return offer.subnet  # the fabric refuses it, and says so as long as that is so
            await asyncio.sleep(FIRST_RETRY_S)
        except AtollError as error:
            log.warning("the cell gives no prefix", error=str(error), mend=error.mend)
            return offer.subnet or former
        else:
            _write(directory / FILE, codec.encode(Kept(grant=grant)))
            return grant.prefix
    return None


async def _ask_for_ipv6(control: FabricControl, node: str, offer: FabricOffer, directory: Path, kept: Kept) -> None:
    """Ask once for the cell's IPv6 network, where an earlier agent heard of none; without it the node goes on as before."""
    if kept.grant.ula:
        return
    with contextlib.suppress(AtollError, TimeoutError):
        async with asyncio.timeout(ASK_S):
            grant = await control.join_fabric(node, offer)
        _write(directory / FILE, codec.encode(replace(kept, grant=grant)))


def names_served(address: str) -> bool:
    """Return whether port 53 of `address` is free, so that instances can be told to ask there. It need not be there yet."""
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(socket.AF_INET, kind) as tried:
            tried.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND
            if kind == socket.SOCK_STREAM:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((address, 53))
            except OSError:
                return False
    return True


class NodeFabric:
    """Use it as `async with`, while `network` is open; it runs until then. `remove` True at the end: no tunnel is left.

    `offer` is what the node says of itself, but for its key; `names`: answer names at the node's address.
    """

    def __init__(
        self,
        control: FabricControl,
        network: LinkNetwork,
        directory: Path,
        *,
        node: str,
        offer: FabricOffer,
        subnet: str,
        names: bool,
        clock: Clock,
        say: Say,
    ) -> None:
        self._control = control
        self._network = network
        self._directory = directory
        self._clock = clock
        self._say = say
        self._offer = replace(offer, subnet=subnet)
        self.own = FabricNode(
            name=node, site=offer.site, region=offer.region, prefix=subnet, endpoint=offer.endpoint,
            vxlan_port=offer.vxlan_port, wireguard_port=offer.wireguard_port, ipv6=offer.ipv6,
        )  # fmt: skip
        self.remove = False
        self.nodes: dict[str, FabricNode] = {}
        """The other nodes; for reading from outside."""
        self.members: dict[str, Member] = {}
        self.via: dict[str, str] = {}
        """Node → the one through which it is reached now."""
        self._grant: FabricGrant | None = None
        self._keys_after = 0.0
        self._key: wireguard.Key | None = None
        self._tunnels = Tunnels(tag_of(directory), network.ula)
        self.paths = Paths(self.own)
        self._names = Directory(node, offer.site, offer.region, network.ula)
        address = node_address(subnet)
        self._server = (
            NameServer(
                self._names,
                address,
                network.project_at,
                lambda: network.forwarders,
                passed_on=self._passed_on,
                has_ipv6=network.has_ipv6,
            )
            if names
            else None
        )
        self._prober = Prober(address)
        self._asked_at = 0.0
        self._changed = asyncio.Event()
        self._dirty = asyncio.Event()
        self._large_lost: dict[str, int] = {}
        self._troubled: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._stand_as_before(load(directory))

    async def __aenter__(self) -> NodeFabric:
        self._tasks.append(asyncio.create_task(self._run(), name="fabric"))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._tunnels.close, remove=self.remove)

    async def _run(self) -> None:
        try:
            await self._begin()
            async with asyncio.TaskGroup() as group:
                for work in (
                    self._follow(),
                    self._keep_applied(),
                    self._keep_written(),
                    self._probe(),
                    self._hear(),
                    self._tell_paths(),
                ):
                    group.create_task(work)
        except Exception:
            log.exception("the fabric has stopped; instances run on, but hear of no change")
        finally:
            self._prober.close()
            if self._server is not None:
                await self._server.close()

    def _stand_as_before(self, kept: Kept | None) -> None:
        """Know what an earlier agent knew, and have the rules know it from their first moment on, before anybody was asked."""
        if kept is None or kept.grant.prefix != self.own.prefix:
            return
        self._grant, self._keys_after = kept.grant, kept.keys_after
        self.nodes = {node.name: node for node in kept.nodes if node.name != self.own.name}
        self.members = {member.id: member for member in kept.members}
        self._network.foresee(self.own, self.nodes, self.members.values(), self._number)

    async def _begin(self) -> None:
        missing = await asyncio.to_thread(self._tunnels.missing_wireguard)
        if not missing and self.own.endpoint:
            await self._renew_key()
        while True:
            try:
                await self._network.see(self.own, self.nodes, self.members.values(), self._number)
                await self._prober.start()
                if self._server is not None:
                    await self._server.start()
                break
            except (AtollError, OSError) as error:
                log.warning("the fabric cannot begin yet", error=str(error))
                await asyncio.sleep(RETRY_S)
        self._changed.set()

    @property
    def _number(self) -> int | None:
        return self._grant.number if self._grant is not None else None

    async def _renew_key(self) -> bool:
        """Have a key that is as new as it must be; return whether it is another."""
        file = self._directory / KEY_FILE
        key = await asyncio.to_thread(wireguard.kept_key, file, self._clock.now(), after=self._keys_after)
        if key == self._key:
            return False
        self._key = key
        self.own = replace(self.own, public_key=key.public, key_made_at=key.made_at)
        self.paths.own = self.own
        self._offer = replace(self._offer, public_key=key.public, key_made_at=key.made_at)
        return True

    def _passed_on(self, source: str, name: str, addresses: Sequence[str]) -> None:
        host = self._network.wants_name(source, name)
        if host is not None:
            self._network.learn_name(source, host, addresses)

    # What the control plane says

    async def _follow(self) -> None:
        refused = ""
        while True:
            wait_s = RETRY_S
            try:
                self._grant = await self._control.join_fabric(self.own.name, self._offer)
                self._dirty.set()
                self._changed.set()
                refused = ""
                async with asyncio.timeout(SILENCE_S) as deadline:
                    async for batch in self._control.fabric(self.own.name):
                        deadline.reschedule(asyncio.get_running_loop().time() + SILENCE_S)
                        await self._take(batch)
            except (Conflict, Exhausted, Invalid) as error:
                wait_s = JOIN_AGAIN_S
                if refused != str(error):
                    refused = str(error)
                    await self._tell("fabric-refused", f"this node is not in the fabric: {error}", True)
            except (AtollError, TimeoutError) as error:
                log.info("the fabric hears nothing", error=str(error) or "silence")
            await asyncio.sleep(wait_s)

    async def _take(self, batch: FabricBatch) -> None:
        if batch.complete:
            self.nodes, self.members = {}, {}
        for node in batch.nodes:
            if node.name != self.own.name:
                self.nodes[node.name] = node
        for name in batch.nodes_removed:
            self.nodes.pop(name, None)
        self.members.update({member.id: member for member in batch.members})
        for id in batch.members_removed:
            self.members.pop(id, None)
        self._keys_after = max(self._keys_after, batch.keys_after)
        if self._key is not None and self._key.made_at <= self._keys_after and await self._renew_key():
            # Others first: what they send by the old key is lost from the moment that this node has the new one.
            await self._control.join_fabric(self.own.name, self._offer)
            await self._tell("fabric-key-renewed", "this node has a new WireGuard key", False)
        if batch.complete or batch.nodes or batch.nodes_removed or batch.members or batch.members_removed:
            self._dirty.set()
            self._changed.set()

    # What the kernel and the names are to be

    async def _keep_applied(self) -> None:
        told = ""
        while True:
            await self._changed.wait()
            self._changed.clear()
            began = self._clock.monotonic()
            try:
                await self._apply()
                told = ""
                # News that keep coming take a fifth of the agent's time at most, however many members there are.
                await asyncio.sleep(min(PAUSE_MAX_S, 4 * (self._clock.monotonic() - began)))
            except (AtollError, OSError) as error:
                if str(error) != told:
                    told = str(error)
                    await self._tell("fabric-trouble", f"not all ways to other nodes are there: {error}", True)
                await asyncio.sleep(RETRY_S)
                self._changed.set()

    async def _apply(self) -> None:
        nodes = dict(self.nodes)
        self.paths.knows(nodes, self._clock.monotonic())
        via = self.paths.via(nodes)
        await self._network.see(self.own, nodes, self.members.values(), self._number)
        self._names.see(self.members.values(), self.paths.away(nodes))
        self._prober.cannot = self.paths.cannot(nodes)
        before, self.via = self.via, via
        if self._grant is not None and self.own.endpoint:
            await asyncio.to_thread(self._tunnels.set, self.own, self._grant.number, nodes, via, self._key)
        for name in via.keys() | before.keys():
            if via.get(name) != before.get(name) and name in nodes:
                await self._tell_way(name, via.get(name))
        await self._network.cut_gone()  # the last, since nothing of the above is to wait for that

    async def _tell_paths(self) -> None:
        """Let the control plane know of what is not direct, for people who ask."""
        told = FabricPaths(node=self.own.name)
        while True:
            await asyncio.sleep(RETRY_S)
            paths = FabricPaths(node=self.own.name, relayed=dict(self.via), cut=tuple(sorted(self.paths.away(self.nodes))))
            if paths != told:
                with contextlib.suppress(AtollError):
                    await self._control.report_paths(paths)
                    told = paths

    async def _tell_way(self, name: str, through: str | None) -> None:
        if through is not None:
            await self._tell("fabric-relayed", f"node {name} cannot be reached directly, but through {through}", True)
        elif self.paths.reaches(name):
            await self._tell("fabric-direct", f"node {name} is reached directly", False)
        else:
            await self._tell("fabric-cut", f"node {name} cannot be reached, through no other node either", True)

    async def _keep_written(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            if self._grant is not None:
                nodes, members = tuple(self.nodes.values()), tuple(self.members.values())
                kept = Kept(grant=self._grant, keys_after=self._keys_after, nodes=nodes, members=members)
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(_write, self._directory / FILE, codec.encode(kept))
            await asyncio.sleep(KEEP_S)

    # Whether the ways lead somewhere

    async def _probe(self) -> None:
        sequence, begin = 0, 0
        while True:
            sequence += 1
            names = [name for name, node in sorted(self.nodes.items()) if kind_of(self.own, node) is not None]
            large = sequence % LARGE_EVERY == 0
            round_ = (names[begin:] + names[:begin])[:PROBES_MAX]
            begin = (begin + PROBES_MAX) % len(names) if len(names) > PROBES_MAX else 0
            self._asked_at = self._clock.monotonic()
            for name in round_:
                node = self.nodes[name]
                address = node_address(node.prefix)
                self._prober.ask(address, sequence << 1)
                kind = kind_of(self.own, node)
                if large and kind is not None:
                    self._prober.ask(address, sequence << 1 | 1, self._tunnels.mtu(kind))
                    self._large_lost[name] = self._large_lost.get(name, 0) + 1
            await asyncio.sleep(PROBE_S)
            changed = self.paths.look(self._clock.monotonic())
            if changed or self.paths.via(self.nodes) != self.via or self._prober.cannot != self.paths.cannot(self.nodes):
                self._changed.set()
            if large:
                await self._look_at_sizes()

    async def _hear(self) -> None:
        while True:
            answer = await self._prober.answers.get()
            names = self._by_address()
            name = names.get(answer.address)
            if name is None:
                continue
            if answer.sequence & 1:
                self._large_lost[name] = 0
                continue
            now = self._clock.monotonic()
            self.paths.heard(name, now, answer.cannot, now - self._asked_at)

    def _by_address(self) -> Mapping[str, str]:
        return {node_address(node.prefix): name for name, node in self.nodes.items()}

    async def _look_at_sizes(self) -> None:
        for name in list(self._large_lost):
            if name not in self.nodes:
                del self._large_lost[name]
                self._troubled.discard(name)
                continue
            lost = self._large_lost[name] >= LARGE_LOST_MAX and self.paths.reaches(name)
            kind = kind_of(self.own, self.nodes[name])
            if lost and name not in self._troubled and kind is not None:
                self._troubled.add(name)
                text = (
                    f"packets of {self._tunnels.mtu(kind)} bytes do not arrive at node {name}, small ones do: something on the way"
                    f" takes less than {self._tunnels.mtu(kind)} bytes and does not say so; lower the MTU of this node's uplink"
                )
                await self._tell("fabric-mtu", text, True)
            elif self._large_lost[name] == 0 and name in self._troubled:
                self._troubled.discard(name)
                await self._tell("fabric-mtu-mended", f"large packets arrive at node {name} again", False)

    async def _tell(self, code: str, message: str, bad: bool) -> None:
        (log.warning if bad else log.info)(code, message=message)
        try:
            await self._say(code, message, bad)
        except AtollError as error:
            log.info("nobody hears of it", code=code, error=str(error))


def _write(file: Path, content: bytes) -> None:
    partial = file.with_name(file.name + ".new")
    partial.write_bytes(content)
    partial.replace(file)
