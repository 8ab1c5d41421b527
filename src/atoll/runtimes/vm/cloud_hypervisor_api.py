"""What Cloud Hypervisor is asked, as values: its API's requests (its OpenAPI document, version 0.3.0). Paths are the jail's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from msgspec import Struct

from atoll.runtimes.vm.boxes import VmPlan
from atoll.runtimes.vm.http_api import Call
from atoll.runtimes.vm.hybrid_vsock import GUEST_CID, SOCKET
from atoll.runtimes.vm.jail import INSIDE
from atoll.runtimes.vm.rates import Rates, with_limiter
from atoll.runtimes.vm.tap import TAP

BASE = "/api/v1"
KERNEL, INITRAMFS, IMAGE = "/kernel", "/initramfs", "/image"
BOOT_ARGS = "console=ttyS0 quiet loglevel=3 panic=0 random.trust_cpu=on cryptomgr.notests=1 atoll.channel=vsock"
"""It ends by a power-off, which ends the monitor. A reset would start the machine again, and with it the instance's process, so a
kernel that fails stands still until its instance's health check or its user ends it."""
DEVICES = "/sys/bus/pci/devices"
SNAPSHOT = "snapshot"
"""Below INSIDE: where a machine is written down, and what a copy is made from; the monitor gives these files their names."""
WRITTEN = ("config.json", "state.json", "memory-ranges")


class Info(Struct, frozen=True):
    state: Literal["Created", "Running", "Shutdown", "Paused", "BreakPoint"]
    config: dict[str, Any]


class Ping(Struct, frozen=True):
    version: str


class PciDevice(Struct, frozen=True):
    id: str
    bdf: str


class MachineOptions(Struct, frozen=True, kw_only=True):
    """What a node decides about all of its machines."""

    rates: Rates = Rates()
    landlock: bool = False
    """Whether the kernel can bind the monitor to the paths that it was given, beside its jail."""
    queues: int = 1
    """Pairs of the network card's; more than 1 need a tap with as many."""


def _put(path: str, body: Any = None) -> Call:
    return Call(method="PUT", path=path, body=body)


PING = Call(method="GET", path="/vmm.ping")
INFO = Call(method="GET", path="/vm.info")
COUNTERS = Call(method="GET", path="/vm.counters")
BOOT = _put("/vm.boot")
PAUSE = _put("/vm.pause")
RESUME = _put("/vm.resume")
SHUTDOWN = _put("/vm.shutdown")
DELETE = _put("/vm.delete")
REBOOT = _put("/vm.reboot")
POWER_BUTTON = _put("/vm.power-button")
END = _put("/vmm.shutdown")


def create(plan: VmPlan, options: MachineOptions, *, vhost_socket: str = "") -> Call:
    """Return what makes the machine of `plan`, not booted. `vhost_socket` is that of a switch which is its network then."""
    rates = options.rates
    disk = {"id": "disk", "path": str(INSIDE / plan.disk.name), "readonly": False, "image_type": "Raw"}
    config: dict[str, Any] = {
        "cpus": {"boot_vcpus": plan.vcpus, "max_vcpus": plan.vcpus, "nested": False},
        # Whoever carries the guest's frames, or a device, must see its memory.
        "memory": {"size": plan.ram_bytes, "shared": bool(vhost_socket), "thp": True},
        "payload": {"kernel": KERNEL, "initramfs": INITRAMFS, "cmdline": BOOT_ARGS},
        "disks": [
            {"id": "image", "path": IMAGE, "readonly": True, "image_type": "Raw"},
            with_limiter(disk, "rate_limiter_config", rates.disk_bytes, rates.disk_operations),
        ],
        "rng": {"src": "/dev/urandom"},
        "balloon": {"size": 0, "deflate_on_oom": True, "free_page_reporting": True},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
        "vsock": {"id": "vsock", "cid": GUEST_CID, "socket": str(INSIDE / SOCKET)},
    }
    if plan.link is not None:
        config["net"] = [network(plan.link.mac, options, vhost_socket=vhost_socket)]
    if options.landlock:
        config["landlock_enable"] = True
        config["landlock_rules"] = landlock_rules(plan)
    return _put("/vm.create", config)


def network(mac: str, options: MachineOptions, *, vhost_socket: str = "") -> dict[str, Any]:
    """Return the machine's card. The tap's address and size are the node's: a monitor without capabilities cannot set them."""
    card: dict[str, Any] = {"id": "net", "mac": mac, "num_queues": 2 * options.queues}
    card |= {"vhost_user": True, "vhost_socket": vhost_socket, "vhost_mode": "Client"} if vhost_socket else {"tap": TAP}
    return with_limiter(card, "rate_limiter_config", options.rates.net_bytes, options.rates.net_packets)


def landlock_rules(plan: VmPlan) -> list[dict[str, str]]:
    """Return what the monitor needs beside the paths of its configuration."""
    rules = [{"path": str(INSIDE), "access": "rw"}, {"path": "/dev/net/tun", "access": "rw"}]
    if plan.pci:
        rules += [{"path": "/dev/vfio", "access": "rw"}, {"path": "/sys", "access": "r"}]
    return rules


def add_device(address: str) -> Call:
    """Return what hands on the PCI device at `address`, which is bound to vfio-pci: before the machine's boot, or while it runs."""
    return _put("/vm.add-device", {"id": device_id(address), "path": f"{DEVICES}/{address}/", "iommu": False})


def device_id(address: str) -> str:
    return "pci-" + address.replace(":", "-").replace(".", "-")


def remove_device(id: str) -> Call:
    return _put("/vm.remove-device", {"id": id})


def resize(*, vcpus: int | None = None, ram_bytes: int | None = None, balloon_bytes: int | None = None) -> Call:
    """Return what changes a running machine's size; what is None stays. Processors and memory grow to what it was created for."""
    wanted = {"desired_vcpus": vcpus, "desired_ram": ram_bytes, "desired_balloon": balloon_bytes}
    return _put("/vm.resize", {name: value for name, value in wanted.items() if value is not None})


def snapshot(directory: str) -> Call:
    """Return what writes a paused machine into an existing directory of its jail."""
    return _put("/vm.snapshot", {"destination_url": f"file://{directory}"})


def restore(directory: str, *, on_demand: bool = False, resume: bool = False) -> Call:
    """Return what gives a monitor without a machine that of a snapshot. `on_demand` reads memory as the guest touches it."""
    body: dict[str, Any] = {"source_url": f"file://{directory}", "resume": resume}
    if on_demand:
        body["memory_restore_mode"] = "OnDemand"
    return _put("/vm.restore", body)


def making(plan: VmPlan, options: MachineOptions, *, vhost_socket: str = "") -> Sequence[Call]:
    """Return the requests that make the machine with all of its devices; then BOOT."""
    return (create(plan, options, vhost_socket=vhost_socket), *(add_device(address) for address in plan.pci))
