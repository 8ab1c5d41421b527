"""Edits put together, where an instance gets devices from more than one hand."""

from __future__ import annotations

from atoll.model.ports.devices import Edits


def merge_edits(one: Edits, other: Edits) -> Edits:
    """Return what makes both appear. Of two values for one variable the later stands; gVisor can only what it can for both."""
    if not one:
        return other
    if not other:
        return one
    return Edits(
        nodes=tuple({node.path: node for node in (*one.nodes, *other.nodes)}.values()),
        mounts=tuple(dict.fromkeys((*one.mounts, *other.mounts))),
        env=tuple({**dict(one.env), **dict(other.env)}.items()),
        library_directories=tuple(dict.fromkeys((*one.library_directories, *other.library_directories))),
        links=tuple(dict.fromkeys((*one.links, *other.links))),
        masked=tuple(dict.fromkeys((*one.masked, *other.masked))),
        devices=tuple(dict.fromkeys((*one.devices, *other.devices))),
        pci=tuple(dict.fromkeys((*one.pci, *other.pci))),
        pci_window_bytes=_room(one.pci_window_bytes, other.pci_window_bytes),
        gvisor_driver=one.gvisor_driver if one.gvisor_driver == other.gvisor_driver else "",
    )


def _room(one: int, other: int) -> int:
    """Return the power of two that holds both."""
    total = one + other
    return 1 << (total - 1).bit_length() if total else 0
