"""What the firewall counted, read out of its sets: who sent how much to whom, and what was refused and why.

The elements come and go by themselves: each is made by the first packet and goes after ten minutes without one. Layouts are those
of <linux/netfilter/nf_tables.h>.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from msgspec import structs

from atoll.model.errors import RuntimeFailed
from atoll.model.flows import FLOWS_MAX, REFUSALS_MAX, Flow, Flows, Reason, Refusal
from atoll.network.elements import ElementSocket
from atoll.network.netlink import Refused, attribute, attributes, dump

ELEMENTS_MAX = 4096
"""Of one set, in one look: some 15 ms of the agent's time."""
KEPT_S = 600
"""Seconds after its last packet until an element goes."""
PAIRS_MAX, REFUSED_MAX = 65_535, 8_192
"""Elements that a set holds; what comes beyond is not counted, and passes or is refused as ever."""
REASONS = tuple(Reason)
"""In the order of the firewall's numbers, which begin at 1."""
EGRESS, PORT, INGRESS, PROJECT, CLOSED, NODE = range(1, 1 + len(REASONS))
"""What a packet is marked with before it is refused, so that what is counted says why."""
SETS = {"pairs": 2, "begun": 2, "turned_away": 2, "turned_away_six": 1, "opened": 1, "over": 1}
"""Set → how many addresses its keys begin with."""
DELETED_AT_ONCE = 512
"""Keys of one transaction, which has a bound of 64 KiB."""

_NETFILTER = 12
_FAMILY = struct.Struct("!BBH")
_GET, _NEW = 10 << 8 | 13, 10 << 8 | 12
_INET = 1
_LIST, _KEY, _VALUE, _EXPRESSION, _EXPRESSIONS, _DATA = 3, 1, 1, 7, 11, 2
_ELEMENT_KEY = 1
_REFUSED_END = struct.Struct("=BxxxBBxxI")
"""What the key of a refusal ends in: the protocol, the port, the reason's number."""
_BYTES, _PACKETS = 1, 2

OwnerOf = Callable[[str], tuple[str, str] | None]
"""Address → project, and app or job."""


class Counted(NamedTuple):
    key: bytes
    packets: int
    bytes: int

    @property
    def address(self) -> str:
        """The first of the key."""
        return _address(self.key, 0)


def read(table: str, name: str, *, most: int = ELEMENTS_MAX, near: Collection[bytes] = ()) -> tuple[list[Counted], bool]:
    """Return the first `most` elements of a set with their counters, and whether those are all. Blocking, for some ms.

    With `near` only those of messages in which one of these bytes occurs: some 400 elements come in one, and looking through it is
    quick. Raises RuntimeFailed. A set that is not there has no elements.
    """
    body = _FAMILY.pack(_INET, 0, 0) + attribute(1, table.encode() + b"\0") + attribute(2, name.encode() + b"\0")
    found: list[Counted] = []
    try:
        for kind, message in dump(_NETFILTER, _GET, body):
            if kind == _NEW and (not near or any(one in message for one in near)):
                found += elements_of(message[_FAMILY.size :])
                if len(found) >= most:
                    return found[:most], False
    except Refused:  # it is not there
        pass
    except OSError as error:
        raise RuntimeFailed(f"cannot read what the firewall counted: {error}") from None
    return found, True


def count(table: str, owners: Mapping[str, tuple[str, str]], ids: Mapping[str, str]) -> Flows:
    """Return all that a node's firewall counted; `owners` is address → project and app or job, `ids` address → instance of the
    node. Blocking, for some ms. Raises RuntimeFailed."""
    whole = True
    found: dict[str, list[Counted]] = {}
    for name in SETS:
        found[name], all_of_it = read(table, name)
        whole = whole and all_of_it
    refused = [*found["turned_away"], *found["turned_away_six"]]
    flows = flows_of(found["pairs"], found["begun"], refused, owners.get, complete=whole)
    singles = {
        name: {ids[each.address]: each.packets for each in found[name] if each.address in ids} for name in ("opened", "over")
    }
    return structs.replace(flows, begun=singles["opened"], over=singles["over"])


def forget(table: str, addresses: Collection[str], sets: ElementSocket) -> None:
    """Delete what was counted from or to `addresses`: whoever gets one next begins at nothing. Blocking, for some ms; some 1 s
    for each full set. Safe to repeat: what was deleted stays so. Raises RuntimeFailed.
    """
    packed = {socket.inet_aton(address) for address in addresses}
    if not packed:
        return
    # One element that goes by itself meanwhile spoils a transaction: what is left then is deleted one by one.
    for at_once in (DELETED_AT_ONCE, 1):
        for name, heads in SETS.items():
            counted, _ = read(table, name, most=PAIRS_MAX, near=packed)
            keys = keys_of(counted, packed, heads)
            for at in range(0, len(keys), at_once):
                sets.change(delete=[(name, keys[at : at + at_once])])


def keys_of(counted: Iterable[Counted], packed: Collection[bytes], heads: int) -> list[bytes]:
    """Return the keys of which one of the first `heads` fields is one of the addresses."""
    return [each.key for each in counted if any(each.key[4 * at : 4 * at + 4] in packed for at in range(heads))]


def elements_of(body: bytes) -> Iterator[Counted]:
    """Yield the elements of one message; one without a counter has zeros."""
    for kind, listed in attributes(body):
        if kind != _LIST:
            continue
        for _, element in attributes(listed):
            key, packets, total = b"", 0, 0
            for part, value in attributes(element):
                if part == _ELEMENT_KEY:
                    key = next((data for inner, data in attributes(value) if inner == _VALUE), b"")
                elif part == _EXPRESSION:
                    packets, total = _counter(value)
                elif part == _EXPRESSIONS:
                    for _, one in attributes(value):
                        packets, total = _counter(one)
            yield Counted(key, packets, total)


def _counter(expression: bytes) -> tuple[int, int]:
    values = {}
    for kind, data in attributes(expression):
        if kind == _DATA:
            values = {inner: int.from_bytes(number, "big") for inner, number in attributes(data) if len(number) == 8}
    return values.get(_PACKETS, 0), values.get(_BYTES, 0)


def flows_of(
    pairs: Iterable[Counted], begun: Iterable[Counted], refused: Iterable[Counted], owner_of: OwnerOf, *, complete: bool = True
) -> Flows:
    """Return what was counted, by pair of apps: the busiest pairs, and what was refused most. Addresses of nobody are left out."""
    flows: dict[tuple[str, str, str], list[int]] = {}
    refusals: dict[tuple[str, str, str, str, str, int, Reason], int] = {}
    for counted, connections in ((pairs, False), (begun, True)):
        for each in counted:
            source, target = owner_of(_address(each.key, 0)), owner_of(_address(each.key, 4))
            if source is None or target is None or source[0] != target[0]:
                continue
            sums = flows.setdefault((source[0], source[1], target[1]), [0, 0, 0])
            if connections:
                sums[2] += each.packets
            else:
                sums[0] += each.bytes
                sums[1] += each.packets
    for each in refused:
        source, far = owner_of(_address(each.key, 0)), each.key[4 : -_REFUSED_END.size]
        if source is None or len(far) not in (4, 16):
            continue
        address = socket.inet_ntop(socket.AF_INET if len(far) == 4 else socket.AF_INET6, far)
        target = owner_of(address)
        number_of_protocol, high, low, number = _REFUSED_END.unpack_from(each.key, 4 + len(far))
        protocol, port = "udp" if number_of_protocol == socket.IPPROTO_UDP else "tcp", high << 8 | low
        reason = REASONS[number - 1] if 0 < number <= len(REASONS) else Reason.NODE
        # Whose an address of another project is, is that project's own.
        mine = target is not None and target[0] == source[0]
        name = target[1] if target is not None and mine else ""
        known = (source[0], source[1], name, "" if mine else address, protocol, port, reason)
        refusals[known] = refusals.get(known, 0) + each.packets
    busiest = sorted(flows.items(), key=lambda one: (-one[1][0], one[0]))[:FLOWS_MAX]
    most = sorted(refusals.items(), key=lambda one: (-one[1], one[0]))[:REFUSALS_MAX]
    return Flows(
        flows=tuple(
            Flow(project=project, source=source, target=target, bytes=sums[0], packets=sums[1], connections=sums[2])
            for (project, source, target), sums in busiest
        ),
        refusals=tuple(
            Refusal(
                project=project,
                source=source,
                target=target,
                address=address,
                protocol=protocol,
                port=port,
                reason=reason,
                packets=packets,
            )
            for (project, source, target, address, protocol, port, reason), packets in most
        ),
        complete=complete and len(flows) <= FLOWS_MAX and len(refusals) <= REFUSALS_MAX,
    )


def _address(key: bytes, at: int) -> str:
    return socket.inet_ntoa(key[at : at + 4].ljust(4, b"\0"))
