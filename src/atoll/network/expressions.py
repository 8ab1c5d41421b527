"""Rules of nftables, expression by expression, as the kernel takes them: for what the library's language cannot say.

A rule is the concatenation of its expressions. Fields of a key stand in registers of four bytes, one after the other from `at`.
Layouts are those of <linux/netfilter/nf_tables.h>.
"""

from __future__ import annotations

import struct

from atoll.network.netlink import attribute

_NESTED = 0x8000
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_META_MARK, _META_IN, _META_OUT, _META_PROTOCOL = 3, 6, 7, 16
_FIRST_REGISTER, _VERDICT_REGISTER = 8, 0
_EQUAL = 0
_INVERTED = 1
_ADD, _UPDATE = 0, 1
_DROP, _ACCEPT = 0, 1
_JUMP, _GOTO, _RETURN = -3, -4, -5
_OVER = 1
_TARGET_TRANSLATION, _IPV6 = 1, 10


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("!I", value & 0xFFFFFFFF))


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _expression(name: str, data: bytes) -> bytes:
    return attribute(1 | _NESTED, _text(1, name) + attribute(2 | _NESTED, data))


def _register(at: int) -> int:
    return _FIRST_REGISTER + at


def header(offset: int, length: int, at: int = 0) -> bytes:
    """Take bytes of the packet's network header. What has no such bytes the rule does not match."""
    return _payload(_NETWORK_HEADER, offset, length, at)


def port(at: int) -> bytes:
    """Take the port that the packet is for; where there is none, whatever stands there."""
    return _payload(_TRANSPORT_HEADER, 2, 2, at)


def _payload(base: int, offset: int, length: int, at: int) -> bytes:
    return _expression("payload", _number(1, _register(at)) + _number(2, base) + _number(3, offset) + _number(4, length))


def protocol(at: int) -> bytes:
    return _expression("meta", _number(2, _META_PROTOCOL) + _number(1, _register(at)))


def mark(at: int) -> bytes:
    return _expression("meta", _number(2, _META_MARK) + _number(1, _register(at)))


def comes_by(at: int) -> bytes:
    """Take the name of the link that the packet comes by: four registers."""
    return _expression("meta", _number(2, _META_IN) + _number(1, _register(at)))


def by_link(beginning: str) -> bytes:
    """Only what comes by a link whose name begins so."""
    return comes_by(0) + _equals(beginning.encode())


def leaves_by(name: str) -> bytes:
    """Only what leaves by the link of this name."""
    loaded = _expression("meta", _number(2, _META_OUT) + _number(1, _register(0)))
    return loaded + _equals(name.encode().ljust(16, b"\0"))


def begins(offset: int, data: bytes) -> bytes:
    """Only what has `data` at this place of its network header."""
    return header(offset, len(data)) + _equals(data)


def _equals(data: bytes) -> bytes:
    return _expression("cmp", _number(1, _register(0)) + _number(2, _EQUAL) + attribute(3 | _NESTED, attribute(1, data)))


def within(name: str) -> bytes:
    """Only what is in the set; the key begins in the first register."""
    return _expression("lookup", _text(1, name) + _number(2, _register(0)))


def not_within(name: str) -> bytes:
    return _expression("lookup", _text(1, name) + _number(2, _register(0)) + _number(5, _INVERTED))


def found_by(name: str, key: int, at: int) -> bytes:
    """Take what the map has for the key that begins at `key`; only what the map has."""
    return _expression("lookup", _text(1, name) + _number(2, _register(key)) + _number(3, _register(at)))


def put(data: bytes, at: int) -> bytes:
    """Take these bytes, 16 at most."""
    return _expression("immediate", _number(1, _register(at)) + attribute(2 | _NESTED, attribute(1, data)))


def led_to(address: int, port: int) -> bytes:
    """Send the connection to the IPv6 address and the port that are taken there; in a chain of addresses' translation only."""
    where = _number(3, _register(address)) + _number(5, _register(port))
    return _expression("nat", _number(1, _TARGET_TRANSLATION) + _number(2, _IPV6) + where)


def mark_by(name: str) -> bytes:
    """Mark the packet with what the map has for the key; only what the map has."""
    found = _expression("lookup", _text(1, name) + _number(2, _register(0)) + _number(3, _register(0)))
    return found + _expression("meta", _number(2, _META_MARK) + _number(3, _register(0)))


def marked(value: int) -> bytes:
    """Mark the packet."""
    data = attribute(2 | _NESTED, attribute(1, struct.pack("=I", value)))
    loaded = _expression("immediate", _number(1, _register(0)) + data)
    return loaded + _expression("meta", _number(2, _META_MARK) + _number(3, _register(0)))


def counted(name: str) -> bytes:
    """Count the packet in the set's element for the key, which is made where there is none."""
    counter = _text(1, "counter") + attribute(2 | _NESTED, b"")
    return _expression("dynset", _text(1, name) + _number(3, _UPDATE) + _number(4, _register(0)) + attribute(7 | _NESTED, counter))


def crowded(name: str, most: int) -> bytes:
    """Only what belongs to a connection beyond `most` of the key's."""
    count = _text(1, "connlimit") + attribute(2 | _NESTED, _number(1, most) + _number(2, _OVER))
    return _expression("dynset", _text(1, name) + _number(3, _ADD) + _number(4, _register(0)) + attribute(7 | _NESTED, count))


def _verdict(code: int, chain: str = "") -> bytes:
    said = _number(1, code) + (_text(2, chain) if chain else b"")
    return _expression("immediate", _number(1, _VERDICT_REGISTER) + attribute(2 | _NESTED, attribute(2 | _NESTED, said)))


def jump(chain: str) -> bytes:
    return _verdict(_JUMP, chain)


def goto(chain: str) -> bytes:
    return _verdict(_GOTO, chain)


DROP, ACCEPT, RETURN = _verdict(_DROP), _verdict(_ACCEPT), _verdict(_RETURN)
