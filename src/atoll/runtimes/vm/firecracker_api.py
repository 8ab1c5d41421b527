"""What Firecracker is asked, as values: its API's requests in the order that it wants them (its OpenAPI document, version 1.17).

Before the boot everything can be set and nothing can be done; after it, the other way round. Paths are the jail's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from atoll.runtimes.vm.boxes import VmPlan
from atoll.runtimes.vm.http_api import Call
from atoll.runtimes.vm.hybrid_vsock import GUEST_CID, SOCKET
from atoll.runtimes.vm.rates import Rates, with_limiter
from atoll.runtimes.vm.tap import TAP

KERNEL, INITRAMFS, IMAGE, DISK = "kernel", "initramfs", "image", "disk.img"
"""Names in the jail."""
LOG, METRICS, CONSOLE = "firecracker.log", "metrics", "console.log"
STATE, MEMORY = "state", "ram"
"""What a machine is written down in, and what a copy is made from."""
LINK = "eth0"
VCPUS_MAX = 32
CONSOLE_BURST_BYTES, CONSOLE_REFILL_BYTES, CONSOLE_REFILL_MS = 128 << 10, 16 << 10, 60_000
"""What a guest's kernel may say, at once and then in every minute: beyond it, its words are dropped."""
METADATA_ADDRESS = "169.254.169.254"


class InstanceInfo(Struct, frozen=True):
    app_name: str
    id: str
    state: Literal["Not started", "Running", "Paused"]
    vmm_version: str


class Version(Struct, frozen=True):
    firecracker_version: str


class MachineOptions(Struct, frozen=True, kw_only=True):
    """What a node decides about all of its machines."""

    rates: Rates = Rates()
    track_dirty_pages: bool = False
    """For snapshots of what has changed since the last one; costs a fault for each page that is written first."""
    metadata: bool = False
    """Whether a machine is told about itself at METADATA_ADDRESS (MMDS)."""


def put(path: str, body: Any) -> Call:
    return Call(method="PUT", path=path, body=body)


def patch(path: str, body: Any = None) -> Call:
    return Call(method="PATCH", path=path, body=body)


def get(path: str) -> Call:
    return Call(method="GET", path=path)


DESCRIBE = get("/")
VERSION = get("/version")
FULL_CONFIG = get("/vm/config")
MACHINE_CONFIG = get("/machine-config")
START = put("/actions", {"action_type": "InstanceStart"})
CTRL_ALT_DEL = put("/actions", {"action_type": "SendCtrlAltDel"})
FLUSH_METRICS = put("/actions", {"action_type": "FlushMetrics"})
PAUSE = patch("/vm", {"state": "Paused"})
RESUME = patch("/vm", {"state": "Resumed"})
BALLOON = get("/balloon")
BALLOON_STATISTICS = get("/balloon/statistics")
METADATA = get("/mmds")

SERIAL = put(
    "/serial",
    {
        "serial_out_path": f"/{CONSOLE}",
        "rate_limiter": {
            "size": CONSOLE_REFILL_BYTES,
            "one_time_burst": CONSOLE_BURST_BYTES,
            "refill_time": CONSOLE_REFILL_MS,
        },
    },
)
"""Older versions do not know it, and are given no console instead."""


def vcpus(wanted: int) -> int:
    """Return the number of processors that Firecracker can give for `wanted`: one, or an even number."""
    return wanted if wanted == 1 else wanted + wanted % 2


def boot_args(*, console: bool) -> str:
    """Return the kernel's command line: it ends by a reset, which ends the monitor, as there is no other way to."""
    words = ["console=ttyS0"] if console else ["8250.nr_uarts=0"]
    words += ["pci=off", "i8042.noaux", "i8042.nomux", "i8042.dumbkbd"]  # there is none of it, and looking takes time
    words += ["quiet", "loglevel=3", "reboot=k", "panic=1", "random.trust_cpu=on", "cryptomgr.notests=1"]
    return " ".join([*words, "atoll.channel=vsock", "atoll.end=restart"])


def observing() -> tuple[Call, ...]:
    """Return what comes first, so that what goes wrong later is told."""
    return (
        put("/logger", {"log_path": f"/{LOG}", "level": "Warning", "show_level": True, "show_log_origin": False}),
        put("/metrics", {"metrics_path": f"/{METRICS}"}),
    )


def machine(plan: VmPlan, options: MachineOptions, *, console: bool = True) -> tuple[Call, ...]:
    """Return the requests that make the machine of `plan`, each after those that it depends on; then START."""
    rates = options.rates
    memory_mib = plan.ram_bytes >> 20
    calls = [
        put(
            "/machine-config",
            {
                "vcpu_count": vcpus(plan.vcpus),
                "mem_size_mib": memory_mib,
                "smt": False,
                "track_dirty_pages": options.track_dirty_pages,
            },
        ),
        put(
            "/boot-source",
            {"kernel_image_path": f"/{KERNEL}", "initrd_path": f"/{INITRAMFS}", "boot_args": boot_args(console=console)},
        ),
        put("/drives/image", drive("image", IMAGE, read_only=True)),
        put(
            "/drives/disk",
            with_limiter(drive("disk", DISK, read_only=False), "rate_limiter", rates.disk_bytes, rates.disk_operations),
        ),
    ]
    if plan.link is not None:
        card: dict[str, Any] = {"iface_id": LINK, "host_dev_name": TAP, "guest_mac": plan.link.mac}
        for key in ("rx_rate_limiter", "tx_rate_limiter"):
            card = with_limiter(card, key, rates.net_bytes, rates.net_packets)
        calls.append(put(f"/network-interfaces/{LINK}", card))
    calls.append(put("/vsock", {"guest_cid": GUEST_CID, "uds_path": f"/{SOCKET}"}))
    calls.append(put("/balloon", {"amount_mib": 0, "deflate_on_oom": True, "stats_polling_interval_s": 0}))
    if options.metadata and plan.link is not None:
        calls.append(put("/mmds/config", {"version": "V2", "network_interfaces": [LINK], "ipv4_address": METADATA_ADDRESS}))
        calls.append(put("/mmds", metadata_of(plan)))
    return tuple(calls)


def drive(id: str, name: str, *, read_only: bool) -> dict[str, Any]:
    """Return a disk; the instance's own is written through its cache, the image's never is."""
    cache = "Unsafe" if read_only else "Writeback"
    return {"drive_id": id, "path_on_host": f"/{name}", "is_root_device": False, "is_read_only": read_only, "cache_type": cache}


def metadata_of(plan: VmPlan) -> dict[str, Any]:
    """Return what a machine may know of itself; no secret is in it."""
    return {"atoll": {"instance": plan.id, "hostname": plan.hostname, "address": plan.link.address if plan.link else ""}}


def balloon(amount_mib: int) -> Call:
    return patch("/balloon", {"amount_mib": amount_mib})


def balloon_polling(interval_s: int) -> Call:
    """Possible where the balloon was made with statistics."""
    return patch("/balloon/statistics", {"stats_polling_interval_s": interval_s})


def metadata(contents: Mapping[str, Any], *, merge: bool = False) -> Call:
    return patch("/mmds", contents) if merge else put("/mmds", contents)


def rate(rates: Rates, *, network: bool) -> tuple[Call, ...]:
    """Return what changes a running machine's limits."""
    disk = with_limiter({"drive_id": "disk"}, "rate_limiter", rates.disk_bytes, rates.disk_operations)
    calls = [patch("/drives/disk", disk)]
    if network:
        card: dict[str, Any] = {"iface_id": LINK}
        for key in ("rx_rate_limiter", "tx_rate_limiter"):
            card = with_limiter(card, key, rates.net_bytes, rates.net_packets)
        calls.append(patch(f"/network-interfaces/{LINK}", card))
    return tuple(calls)


def snapshot(state: str, memory: str, *, changes_only: bool = False) -> Call:
    """Return what writes a paused machine into two files of its jail. `changes_only` needs `track_dirty_pages` to be small."""
    kind = "Diff" if changes_only else "Full"
    return put("/snapshot/create", {"snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory})


def restore(
    state: str,
    memory: str,
    *,
    faults: bool = False,
    resume: bool = False,
    track_dirty_pages: bool = False,
    taps: Sequence[tuple[str, str]] = (),
    vsock: str = "",
) -> Call:
    """Return what makes a monitor that was told nothing yet into the machine of a snapshot.

    `memory` is a file, which is mapped and not read, or with `faults` the unix socket of a process that answers the guest's page
    faults (userfaultfd). `taps` are (card, tap of this node); `vsock` is the socket's new path, where it is another.
    """
    body: dict[str, Any] = {
        "snapshot_path": state,
        "mem_backend": {"backend_type": "Uffd" if faults else "File", "backend_path": memory},
        "track_dirty_pages": track_dirty_pages,
        "resume_vm": resume,
    }
    if taps:
        body["network_overrides"] = [{"iface_id": card, "host_dev_name": tap} for card, tap in taps]
    if vsock:
        body["vsock_override"] = {"uds_path": vsock}
    return put("/snapshot/load", body)
