"""Nodes join the fabric here, and hear who else is in it. The API is the one writer of prefixes, so that no two overlap."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import TypeVar
from urllib.parse import urlsplit

from msgspec.structs import replace

from atoll.api.service.access import check_id
from atoll.api.service.context import Context, Draft
from atoll.api.service.feeds import Listener
from atoll.api.service.following import Following
from atoll.api.service.reach import end_of, reach
from atoll.model import codec, keys
from atoll.model.errors import Conflict, Exhausted, Invalid, Unavailable
from atoll.model.fabric import (
    PREFIX_LENGTH,
    ULA_BYTES,
    Fabric,
    FabricBatch,
    FabricGrant,
    FabricIpv6,
    FabricNode,
    FabricOffer,
    FabricPaths,
    Member,
    ReachView,
    network_of,
    new_ula,
)
from atoll.model.membership import Server
from atoll.model.ports.store import Compare, Op, Put, absent, unchanged
from atoll.model.records import Instance, Node, OwnerKind, Status
from atoll.store.cache import Deltas

GATHER_S = 0.02
"""News within so long is told together: a hundred instances that start at once are a few messages."""
PATHS_MAX = 2_048
"""Of nodes in one word on paths."""
KEY_LIFE_S = 30 * 86_400.0
"""A node's key that is older is replaced."""

_OTHER_SUBNET = "give this node another --subnet, or none so that the cell chooses"

T = TypeVar("T")


class Fabrics:
    """`start` before use; `close` ends every stream."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._state = context.state
        self._listeners: dict[str, dict[Listener, None]] = defaultdict(dict)  # in the order they came, which repeats
        self._members: dict[str, dict[str, Member]] = defaultdict(dict)
        """Project → instance → member."""
        self._present: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        """Node → project → instances of it there."""
        self._placed: dict[str, tuple[str, str]] = {}
        self._following = Following(self._state, "fabric", self._apply, self._rebuild)

    async def join(self, name: str, offer: FabricOffer) -> FabricGrant:
        """See `FabricControl.join_fabric`."""
        check_id(name, "node")
        if offer.endpoint:
            try:
                ipaddress.IPv4Address(offer.endpoint)
            except ValueError as error:
                raise Invalid(f"endpoint: {error}", field="endpoint") from None
        drawn = self._context.entropy(3 + ULA_BYTES)
        number, new = int.from_bytes(drawn[:3]) or 1, new_ula(drawn[3:])

        def build() -> Draft[FabricGrant]:
            compare: list[Compare] = []
            ops: list[Op] = []
            cell = self._state.get(Fabric, "cell")
            fabric = cell.record if cell is not None else Fabric(number=number)
            kept = self._state.get(FabricIpv6, "cell")
            ula = kept.record.ula if kept is not None else fabric.ula or new
            held = self._state.get(FabricNode, name)
            prefix = self._prefix(name, offer, fabric, held.record if held is not None else None)
            self._check_identity(name, offer, prefix, held.record if held is not None else None)
            node = FabricNode(
                name=name,
                site=offer.site,
                region=offer.region,
                prefix=prefix,
                endpoint=offer.endpoint,
                public_key=offer.public_key,
                key_made_at=offer.key_made_at,
                vxlan_port=offer.vxlan_port,
                wireguard_port=offer.wireguard_port,
                ipv6=offer.ipv6,
            )
            grant = FabricGrant(network=fabric.network, number=fabric.number, prefix=prefix, ula=ula)
            fresh = held is None or held.record.prefix != prefix
            if cell is not None and kept is not None and held is not None and held.record == node:
                return Draft(answer=lambda _: grant)
            key = keys.fabric_node(name)
            compare.append(absent(key) if held is None else unchanged(key, held.revision))
            ops.append(Put(key, codec.encode(node)))
            if fresh or cell is None:
                compare.append(absent(keys.fabric()) if cell is None else unchanged(keys.fabric(), cell.revision))
                ops.append(Put(keys.fabric(), codec.encode(replace(fabric, allocations=fabric.allocations + fresh))))
            if kept is None:
                compare.append(absent(keys.fabric_ipv6()))
                ops.append(Put(keys.fabric_ipv6(), codec.encode(FabricIpv6(ula=ula))))
            return Draft(compare=compare, ops=ops, answer=lambda _: grant)

        return await self._context.write(FabricGrant, build)

    async def rotate(self) -> Fabric:
        """Have every node make a new key; returns what holds then. Safe to repeat, but then they do it twice."""

        def build() -> Draft[Fabric]:
            held = self._state.get(Fabric, "cell")
            if held is None:
                raise Invalid("no node has joined the fabric yet")
            fabric = replace(held.record, keys_after=self._context.clock.now())
            ops = [Put(keys.fabric(), codec.encode(fabric))]
            return Draft(compare=[unchanged(keys.fabric(), held.revision)], ops=ops, answer=lambda _: fabric)

        return await self._context.write(Fabric, build)

    async def tell_paths(self, name: str, paths: FabricPaths) -> None:
        """Write what a node found of its ways to others, if that is new. Raises Invalid."""
        check_id(name, "node")
        if len(paths.relayed) + len(paths.cut) > PATHS_MAX:
            raise Invalid(f"paths: more than {PATHS_MAX}", field="relayed")

        def build() -> Draft[None]:
            held = self._state.get(FabricPaths, name)
            if held is not None and held.record == paths:
                return Draft(answer=lambda _: None)
            key = keys.fabric_paths(name)
            compare = [absent(key) if held is None else unchanged(key, held.revision)]
            return Draft(compare=compare, ops=[Put(key, codec.encode(paths))], answer=lambda _: None)

        await self._context.write(type(None), build)

    def reach(self, project: str, source: str, target: str, port: int, protocol: str, to_project: str) -> ReachView:
        """Return whether `source` (an app, job or instance) reaches `port` of `target`, and what stops it. Raises NotFound."""
        return reach(self._state, end_of(self._state, project, source), end_of(self._state, to_project, target), port, protocol)

    def nodes(self) -> tuple[FabricNode, ...]:
        return tuple(held.record for _, held in sorted(self._state.records(FabricNode).items()))

    async def feed(self, node: str, keepalive_s: float | None = None) -> AsyncIterator[FabricBatch]:
        """See `FabricControl.fabric`."""
        if self._following.closed:
            raise Unavailable("the server is stopping", mend="connect again")
        self.start()
        listener = Listener()
        self._listeners[node][listener] = None
        nodes: dict[str, FabricNode] = {}
        members: dict[str, Member] = {}
        try:
            while True:
                revision = self._following.revision
                complete, listener.everything = listener.everything, False
                listener.dirty.clear()
                if complete:
                    nodes, members = {}, {}
                wanted_nodes = {name: held.record for name, held in self._state.records(FabricNode).items()}
                wanted = {
                    id: member
                    for project, count in list(self._present.get(node, {}).items())
                    if count > 0
                    for id, member in self._members.get(project, {}).items()
                }
                cell = self._state.get(Fabric, "cell")
                batch = FabricBatch(
                    revision=revision,
                    complete=complete,
                    keys_after=max(cell.record.keys_after if cell is not None else 0.0, self._context.clock.now() - KEY_LIFE_S),
                    nodes=_news(nodes, wanted_nodes),
                    nodes_removed=tuple(nodes.keys() - wanted_nodes.keys()),
                    members=_news(members, wanted),
                    members_removed=tuple(members.keys() - wanted.keys()),
                )
                nodes, members = wanted_nodes, wanted
                yield batch
                await listener.wait(keepalive_s)
                await asyncio.sleep(GATHER_S)
        finally:
            self._listeners[node].pop(listener, None)
            if not self._listeners[node]:
                del self._listeners[node]

    def start(self) -> None:
        """Begin to follow; safe to repeat."""
        self._following.start()

    async def close(self) -> None:
        for group in self._listeners.values():
            for listener in group:
                listener.end()
        await self._following.close()

    def _prefix(self, name: str, offer: FabricOffer, fabric: Fabric, held: FabricNode | None) -> str:
        """Return the prefix that the node has, wants, or the first that is free. Raises Conflict, Exhausted, Invalid."""
        others = {n: ipaddress.IPv4Network(h.record.prefix) for n, h in self._state.records(FabricNode).items() if n != name}
        if offer.subnet:
            wanted = network_of(offer.subnet, "subnet")
            for other, network in others.items():
                if network.overlaps(wanted):
                    raise Conflict(
                        f"the subnet {wanted} overlaps {network} of node '{other}'",
                        mend=_OTHER_SUBNET,
                        field="subnet",
                    )
            if held is None or held.prefix != str(wanted):  # else nobody could register an address to shut this node out
                for who, address in self._addresses():
                    if address in wanted:
                        raise Conflict(f"the subnet {wanted} holds {address} of {who}", mend=_OTHER_SUBNET, field="subnet")
            return str(wanted)
        if held is not None:
            return held.prefix
        taken, known = sorted(others.values()), [address for _, address in self._addresses()]
        if offer.endpoint:
            known.append(ipaddress.IPv4Address(offer.endpoint))
        for candidate in ipaddress.IPv4Network(fabric.network).subnets(new_prefix=PREFIX_LENGTH):
            if not any(candidate.overlaps(one) for one in taken) and not any(address in candidate for address in known):
                return str(candidate)
        raise Exhausted(f"every prefix of {fabric.network} is taken", mend="remove nodes that are gone: atoll nodes remove NAME")

    def _check_identity(self, name: str, offer: FabricOffer, prefix: str, held: FabricNode | None) -> None:
        """Raise Invalid for an endpoint within a node's prefix, this one's included, Conflict for another node's key."""
        others = {n: h.record for n, h in self._state.records(FabricNode).items() if n != name}
        if offer.endpoint and (held is None or (held.endpoint, held.prefix) != (offer.endpoint, prefix)):
            endpoint = ipaddress.IPv4Address(offer.endpoint)
            for owner, taken in ((name, prefix), *((n, node.prefix) for n, node in others.items())):
                if endpoint in ipaddress.IPv4Network(taken):
                    mend = "give this node another --fabric-address or --subnet"
                    raise Invalid(f"the endpoint {endpoint} is within {taken} of node '{owner}'", mend=mend, field="endpoint")
        if offer.public_key and (held is None or held.public_key != offer.public_key):
            for other, node in others.items():
                if node.public_key == offer.public_key:
                    mend = f"remove '{other}' if it is gone, or this node's fabric.key if it was copied, and restart the agent"
                    raise Conflict(f"the public key is that of node '{other}'", mend=mend, field="public_key")

    def _addresses(self) -> Iterator[tuple[str, ipaddress.IPv4Address]]:
        """Yield what is reached by an address outside of the fabric, as far as that is written as one."""
        said = [(f"server '{id}'", url) for id, held in self._state.records(Server).items() for url in held.record.urls]
        said += [(f"node '{n}'", held.record.endpoint) for n, held in self._state.records(FabricNode).items()]
        said += [(f"node '{n}'", held.record.address) for n, held in self._state.records(Node).items()]
        for who, text in said:
            with contextlib.suppress(ValueError):
                yield who, ipaddress.IPv4Address(urlsplit(text if "//" in text else f"//{text}").hostname or "")

    def _rebuild(self) -> None:
        self._members.clear()
        self._present.clear()
        self._placed.clear()
        for key, held in self._state.records(Instance).items():
            self._look(key, held.record)
        self._mark(self._listeners, everything=True)

    def _mark(self, nodes: Iterable[str], *, everything: bool = False) -> None:
        for node in list(nodes):
            for listener in self._listeners.get(node, ()):
                if everything:
                    listener.mark_everything()
                else:
                    listener.mark("")

    def _look(self, key: str, instance: Instance | None) -> bool:
        """Take in how the instance under `key` stands now; return whether somebody must hear of it."""
        project, _, id = key.partition("/")
        changed = False
        place = (instance.node, project) if instance is not None and instance.node is not None else None
        before = self._placed.get(key)
        if place != before:
            changed = True
            if before is not None:
                self._present[before[0]][before[1]] -= 1
                del self._placed[key]
                self._mark([before[0]])
            if place is not None:
                self._present[place[0]][place[1]] += 1
                self._placed[key] = place
        member = self._member(key, instance) if instance is not None else None
        members = self._members[project]
        if member != members.get(id):
            changed = True
            if member is None:
                del members[id]
            else:
                members[id] = member
        return changed

    def _member(self, key: str, instance: Instance) -> Member | None:
        status = self._state.get(Status, key)
        if status is None or status.record.address is None or instance.node is None or status.record.phase.final:
            return None
        node = self._state.get(Node, instance.node)
        return Member(
            id=instance.id,
            project=instance.project,
            owner=instance.owner,
            app=instance.owner_kind is OwnerKind.APP,
            index=instance.index,
            node=instance.node,
            site=node.record.site if node is not None else "local",
            region=node.record.region if node is not None else "local",
            address=status.record.address,
            ready=status.record.ready and instance.desired == "run",
            ipv6=status.record.ipv6 is not None,
        )

    def _apply(self, deltas: Deltas) -> None:
        projects = set()
        for delta in deltas.deltas:
            if delta.kind is Instance or delta.kind is Status:
                held = self._state.get(Instance, delta.key)
                if self._look(delta.key, held.record if held is not None else None):
                    projects.add(delta.key.partition("/")[0])
            elif delta.kind is FabricNode or delta.kind is Fabric:
                self._mark(self._listeners)
        if projects:
            self._mark([node for node, there in self._present.items() if any(there.get(one) for one in projects)])


def _news(before: Mapping[str, T], now: Mapping[str, T]) -> tuple[T, ...]:
    return tuple(one for name, one in now.items() if before.get(name) != one)
