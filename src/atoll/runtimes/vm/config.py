"""What a guest is told and what it tells at its end, both at the end of its own disk: `native/guest/boot.c` is the other side.

The disk: an empty ext4 of `disk_bytes`, the words, 4,096 bytes of trailer. So an instance starts and ends with nobody listening.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from atoll.model.errors import Invalid
from atoll.runtimes.loop_disk import open_file
from atoll.runtimes.mounts import descriptor
from atoll.runtimes.snapshots import machine_id
from atoll.runtimes.vm.tap import GuestLink
from atoll.runtimes.vm.volumes import VmVolume

TRAILER_BYTES = 4096
ENDING_AT = 2048
CONFIG_BYTES_MAX = 4 << 20
"""As in boot.c."""
_TRAILER = struct.Struct("<8sIIQ")
_ENDING = struct.Struct("<8sIIiIqq256s")
_VERSION = 1
CAPABILITY_MASK = 0xA80425FB
"""`atoll.runtimes.oci.CAPABILITIES`, which are Docker's, by the kernel's numbers."""


class GuestConfig(Struct, frozen=True, kw_only=True):
    hostname: str
    hosts: str
    resolv_conf: str = ""
    address: str = ""
    ipv6: str = ""
    outward: bool = False
    """That IPv6 leads to everywhere, and not to the cell alone."""
    mtu: int = 0
    read_only_root: bool = False
    volumes: tuple[VmVolume, ...] = ()
    pids: int
    memory_bytes: int
    entropy: bytes
    process: bytes
    """As `process_words` makes it."""


class Ending(Struct, frozen=True):
    """How the instance's first process ended, by the guest's own word."""

    started: bool
    status: int
    """As of wait(2)."""
    killed_for_memory: int
    at: float
    text: str
    """Why it did not start."""


def process_words(process: dict[str, Any], *, make_directory: bool) -> bytes:
    """Return the `process` of an OCI configuration as the guest reads it (`native/guest/box.c`)."""
    who = process["user"]
    files = next(limit for limit in process["rlimits"] if limit["type"] == "RLIMIT_NOFILE")
    groups = ",".join(str(group) for group in who.get("additionalGids", ()))
    words = [str(who["uid"]), str(who["gid"]), groups, f"{CAPABILITY_MASK:x}", str(files["soft"]), str(files["hard"])]
    words += ["1" if make_directory else "0", process["cwd"]]
    words += [str(len(process["args"])), *process["args"], str(len(process["env"])), *process["env"]]
    return _words(words)


def _words(words: Sequence[str]) -> bytes:
    return b"".join(word.encode(errors="surrogateescape") + b"\0" for word in words)


def config_words(config: GuestConfig) -> bytes:
    """Return all that the guest is told, secrets included. Raises Invalid for more than CONFIG_BYTES_MAX."""
    head = ["atoll-guest-3", config.hostname, config.hosts, config.resolv_conf, config.address, config.ipv6]
    head += ["1" if config.outward else "0", str(config.mtu)]
    head += ["1" if config.read_only_root else "0", str(config.pids), str(config.memory_bytes), config.entropy.hex()]
    head.append(str(len(config.volumes)))
    for volume in config.volumes:
        head += [volume.tag, volume.target, "1" if volume.read_only else "0"]
    words = _words(head) + config.process
    if len(words) > CONFIG_BYTES_MAX:
        raise Invalid(
            f"command and environment have {len(words)} bytes, and a virtual machine takes {CONFIG_BYTES_MAX}",
            mend="put large values into files",
            field="env",
        )
    return words


def refreshing(instance: str, hostname: str, link: GuestLink | None, *, entropy: bytes, now_ns: int) -> bytes:
    """Return what makes a copy of a machine one of its own, as the guest reads it: `entropy` are 64 random bytes of the node's.

    Without a network, all addresses are empty.
    """
    addresses = [link.address, link.mac, link.ipv6, "1" if link.outward else "0"] if link is not None else [""] * 4
    return entropy + now_ns.to_bytes(8, "little") + _words([machine_id(instance, entropy), hostname, *addresses])


def write_config(disk: Path, disk_bytes: int, config: GuestConfig) -> None:
    """Append what the guest is told to a disk of `disk_bytes`, whatever was there. Blocking."""
    words = config_words(config)
    with descriptor(os.open(disk, os.O_WRONLY | os.O_CLOEXEC)) as fd:
        os.ftruncate(fd, disk_bytes)
        os.pwrite(fd, words, disk_bytes)
        end = -(-(disk_bytes + len(words)) // TRAILER_BYTES) * TRAILER_BYTES
        os.pwrite(fd, _TRAILER.pack(b"atollbox", _VERSION, len(words), disk_bytes).ljust(TRAILER_BYTES, b"\0"), end)


def read_ending(disk: Path) -> Ending | None:
    """Return what the guest wrote at its end; None where it did not come to that. Its bytes are the tenant's to forge. Blocking."""
    try:
        with open_file(disk) as fd:
            size = os.fstat(fd).st_size
            data = os.pread(fd, _ENDING.size, size - TRAILER_BYTES + ENDING_AT) if size >= TRAILER_BYTES else b""
    except OSError:
        return None
    if len(data) < _ENDING.size:
        return None
    magic, version, started, status, killed, seconds, nanoseconds, text = _ENDING.unpack(data)
    if magic != b"atollend" or version != _VERSION:
        return None
    words = text.partition(b"\0")[0].decode(errors="replace")
    return Ending(bool(started), status & 0xFFFF, killed, seconds + nanoseconds / 1e9, words)
