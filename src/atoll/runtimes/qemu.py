"""The QEMU runtime: an instance in a virtual machine of its own, of QEMU's smallest kind (`microvm`), or one with PCI (`q35`) where
it is handed a device of the node.

KVM is used where it boots our guest, found out by booting it: a /dev/kvm that cannot run an unmodified kernel exists. Elsewhere
QEMU emulates the processor (TCG), which is slower by an order of magnitude and isolates as well.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import structlog

from atoll.model.errors import AtollError, RuntimeFailed, Unsupported
from atoll.model.ports.devices import DeviceNode
from atoll.model.ports.runtime import Box, Compatibility, Feature, Found, Started
from atoll.model.spec import RuntimeName
from atoll.runtimes.box_record import BoxRecord
from atoll.runtimes.cgroup import Group
from atoll.runtimes.native import jail_path
from atoll.runtimes.oci_box import RUNTIME_DIRECTORY, OciBoxes
from atoll.runtimes.oci_container import Container
from atoll.runtimes.oci_probe import check_machine, once_per_boot, version_of
from atoll.runtimes.snapshots import EMULATED, processor
from atoll.runtimes.trial import run_once
from atoll.runtimes.vm.boxes import SLOT_MIN, VmPlan, load_plan
from atoll.runtimes.vm.jail import INSIDE, STDERR_FD, STDOUT_FD, TAP_FD, Jail, make_tools, top_level
from atoll.runtimes.vm.kernel import MODULES, PLACES, GuestKernel
from atoll.runtimes.vm.pci import check_devices, check_locking, locked_bytes, shown_of
from atoll.runtimes.vm.qemu_snapshot import (
    DESCRIPTORS,
    OWN_DESCRIPTORS,
    RAM,
    RAM_FD,
    REMOVED_S,
    STATE,
    STATE_FD,
    SharedMemories,
    go_on,
    memory_budget_bytes,
    save,
    shared_memory,
)
from atoll.runtimes.vm.qmp import command as qmp
from atoll.runtimes.vm.runtime import VmContainer, VmRuntime, last_words
from atoll.runtimes.vm.sockets import open_socket
from atoll.runtimes.vm.tap import TAP
from atoll.runtimes.vm.told import file_bytes
from atoll.runtimes.vm.volumes import volume_devices

VERSION_MIN = (7, 0)
KVM_S_MAX = 10.0
"""Within it KVM has run a program in a guest to its end, or is not used."""
TCG_S_MAX = 60.0
OVERHEAD_KVM_BYTES, OVERHEAD_TCG_BYTES = 64 << 20, 192 << 20
"""QEMU's own memory: of TCG, translated code and what translating takes among it."""
TCG_CODE_MIB = 32
KVM_NODE = DeviceNode(path="/dev/kvm", host_path="/dev/kvm", major=10, minor=232)
AGENT, MONITOR = "agent.sock", "qmp.sock"
Machine = Literal["microvm", "q35"]
"""Microvm has no PCI, and no firmware that looks for it."""
_DATA, _FIRMWARE = Path("/usr/share/qemu"), Path("/usr/share/seabios")
"""Where QEMU's files are, and where Debian keeps those of SeaBIOS, which q35 begins with."""
_FILES = ("bios-microvm.bin", "qboot.rom", "linuxboot_dma.bin", "pvh.bin", "kvmvapic.bin", "bios-256k.bin")
_WINDOW_BYTES = 32 << 30
"""What q35 keeps for 64-bit windows when it is told nothing."""
_MODULES = Path("/usr/lib/x86_64-linux-gnu/qemu")
_KERNEL_HZ = 250

log = structlog.get_logger()


class QemuRuntime(VmRuntime):
    """Runs instances with QEMU for x86-64, 7.0 or newer, as root."""

    name = RuntimeName.QEMU
    slots = range(SLOT_MIN, SLOT_MIN + 2048)
    modules = ("virtio_mmio", "virtio_pci", "virtio_console", *MODULES, "virtiofs")
    features = VmRuntime.features | {Feature.GPU, Feature.SNAPSHOT, Feature.FORK}
    takes_volumes = True

    def __init__(
        self,
        directory: Path,
        *,
        binary: str = "qemu-system-x86_64",
        cgroup: str = "/atoll",
        userns: bool | None = None,
        kernels: Sequence[Path] = PLACES,
        cache: Path | None = None,
        accelerator: str = "",
        machine: Machine = "microvm",
    ) -> None:
        """`accelerator` is `kvm` or `tcg`; empty to find out. `machine` is of instances without a device: with one it is q35."""
        super().__init__(directory, binary=binary, cgroup=cgroup, userns=userns, kernels=kernels, cache=cache)
        self._accelerator = accelerator
        self._without_devices = machine
        self._version = ""
        self._memories = SharedMemories(memory_budget_bytes())
        self.removed_s = REMOVED_S
        self._letting_go: asyncio.Task[None] | None = None

    async def probe(self) -> str:
        return await asyncio.to_thread(self._probe)

    def _probe(self) -> str:
        check_machine((self._binary, "qemu-system-x86"))
        jail_path()
        self.kernel()
        version = once_per_boot(RUNTIME_DIRECTORY, self._binary, self._try, file="qemu-probe.json")
        self._accelerator = version.rpartition(" ")[2]
        return version

    def _try(self) -> str:
        version = version_of(self._binary, package="qemu-system-x86", oldest=VERSION_MIN)
        whys = []
        for accelerator, deadline_s in (("kvm", KVM_S_MAX), ("tcg", TCG_S_MAX)):
            if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
                continue
            with tempfile.TemporaryDirectory(prefix="atoll-probe-") as directory:
                tried = QemuRuntime(
                    Path(directory) / "runtime",
                    binary=self._binary,
                    cgroup=self._cgroup,
                    kernels=self._kernels,
                    cache=self._cache,
                    accelerator=accelerator,
                )
                why = asyncio.run(run_once(tried, Path(directory), deadline_s))
            if not why:
                return f"{version} {accelerator}"
            whys.append(f"{accelerator}: {why}")
        raise Unsupported(f"QEMU boots no guest on this machine: {'; '.join(whys)}", mend="use runc or gvisor")

    @property
    def accelerator(self) -> str:
        """Blocking, where it was not probed."""
        if not self._accelerator:
            self._probe()
        return self._accelerator

    def overhead_bytes(self) -> int:
        return OVERHEAD_KVM_BYTES if self.accelerator == "kvm" else OVERHEAD_TCG_BYTES

    def check(self, box: Box) -> None:
        check_devices(box, self.name)

    def jail(self, plan: VmPlan, kernel: GuestKernel, group: Group) -> Jail:
        files = [place / name for name in _FILES for place in (_DATA, _FIRMWARE)] + [_MODULES / "accel-tcg-x86_64.so"]
        tools = make_tools(self._cache / "tools", self._binary, files)
        return Jail(
            directory=Path(plan.directory),
            uid=plan.uid,
            shown=(
                *top_level(tools),
                (kernel.image, Path("/kernel")),
                (kernel.initramfs, Path("/initramfs")),
                (plan.image_disk, Path("/image")),
                *shown_of(plan),
                *(((OWN_DESCRIPTORS, DESCRIPTORS),) if plan.snapshot else ()),
            ),
            nodes=(*((KVM_NODE,) if self.accelerator == "kvm" else ()), *plan.nodes),
            locked_bytes=locked_bytes(plan),
            tap=TAP if plan.link else None,
            opened=self._opened(plan),
            file_bytes=file_bytes(plan),
            groups=tuple(path for path in group.directories if (path / "cgroup.procs").exists()),
            small_pages=bool(plan.snapshot),
        )

    def monitor(self, plan: VmPlan) -> list[str]:
        check_locking(locked_bytes(plan))
        return [f"/usr/bin/{self._binary}", *machine(plan, self.accelerator, self._without_devices)]

    def compatibility(self) -> Compatibility:
        if not self._version:
            self._version = version_of(self._binary, package="qemu-system-x86", oldest=VERSION_MIN)
        version = f"{self._version} {self.accelerator} {self._without_devices}"
        if self.accelerator == "tcg":
            return Compatibility(self.name, version, EMULATED, "")
        return Compatibility(self.name, version, processor(), os.uname().release)

    async def save_machine(self, plan: VmPlan, directory: Path) -> Sequence[str]:
        await save(plan, directory, memory_name(self._without_devices))
        return (STATE, RAM)

    async def load_machine(self, container: VmContainer, plan: VmPlan) -> None:
        assert container.shim is not None  # noqa: S101 - it has just been started
        try:
            await go_on(Path(plan.directory) / "vm" / MONITOR, container.shim.event)
        except AtollError as error:
            words = await self._in_thread(last_words, Path(plan.directory))
            raise RuntimeFailed(f"the copy does not go on: {error}. {words}", mend="see vmm.log; take the snapshot again") from None

    def _opened(self, plan: VmPlan) -> tuple[tuple[str, int], ...]:
        if not plan.snapshot:
            return ()
        return ((self._memories.path(plan.snapshot), RAM_FD), (str(Path(plan.snapshot) / STATE), STATE_FD))

    async def _start(self, boxes: OciBoxes, container: Container) -> Started:
        plan = await self._in_thread(load_plan, container.record.directory)
        if not plan.snapshot:
            return await super()._start(boxes, container)
        await self._in_thread(self._memories.take, plan.snapshot)
        try:
            return await super()._start(boxes, container)
        finally:
            await asyncio.shield(self._in_thread(self._memories.give, plan.snapshot))
            if self._letting_go is None or self._letting_go.done():
                self._letting_go = asyncio.create_task(self._let_go_of_removed())

    async def _let_go_of_removed(self) -> None:
        """See that no memory is held for long of a snapshot that was removed, as long as any is held."""
        while await self._in_thread(self._memories.let_go_of_removed):  # noqa: ASYNC110 - whoever removes one does not tell
            await asyncio.sleep(self.removed_s)

    async def close(self) -> None:
        if self._letting_go is not None:
            self._letting_go.cancel()
            await asyncio.wait({self._letting_go})
        await super().close()
        self._memories.close()

    async def reach(self, directory: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await open_socket(directory / "vm" / AGENT)

    async def pause_machine(self, directory: Path) -> None:
        await qmp(directory / "vm" / MONITOR, "stop")

    async def resume_machine(self, directory: Path) -> None:
        await qmp(directory / "vm" / MONITOR, "cont")

    async def _adopt(self, boxes: OciBoxes, record: BoxRecord) -> Found:
        found = await super()._adopt(boxes, record)
        if found.pid is not None:
            container = await self._machine(record.id)
            try:
                status = await qmp(record.directory / "vm" / MONITOR, "query-status")
                container.paused = status.get("running") is False
            except AtollError as error:
                log.warning("vm.adopted-in-part", instance=record.id, error=str(error))
        return found


def machine(plan: VmPlan, accelerator: str, without_devices: Machine = "microvm") -> list[str]:
    """Return QEMU's arguments for the machine of `plan`: no device but what it needs, none that it could do without.

    It is a q35 where the plan has PCI devices, and what `without_devices` says where it has none.
    """
    kind = "q35" if plan.pci else without_devices
    # of virtio: on microvm's own bus, which is not PCI, or on PCI in its modern form alone
    bus, modern = ("device", "") if kind == "microvm" else ("pci", ",disable-legacy=on")
    options = "x-option-roms=off,rtc=on" if kind == "microvm" else "usb=off,sata=off,smbus=off,vmport=off,smm=off"
    words = ["-M", f"{kind},{options}", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    words += ["-L", str(_DATA), "-L", str(_FIRMWARE)]
    words += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    if accelerator == "kvm":
        words += ["-accel", "kvm", "-cpu", "host"]
    else:
        words += ["-accel", f"tcg,thread=multi,tb-size={TCG_CODE_MIB}", "-cpu", "max"]
    words += ["-m", f"{plan.ram_bytes >> 20}M", "-smp", str(plan.vcpus), "-global", "virtio-mmio.force-legacy=false"]
    if plan.snapshot:
        words += shared_memory(plan, memory_name(kind))
    else:
        words += ["-kernel", "/kernel", "-initrd", "/initramfs", "-append", kernel_line(accelerator)]
    words += ["-chardev", f"socket,id=qmp,path={INSIDE / MONITOR},server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
    words += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
    words += ["-device", f"virtio-serial-{bus},max_ports=4{modern}"]
    words += ["-chardev", f"socket,id=agent,path={INSIDE / AGENT},server=on,wait=off"]
    words += ["-device", "virtserialport,chardev=agent,name=io.atoll.agent"]
    for name, fd, number in (("stdout", STDOUT_FD, 1), ("stderr", STDERR_FD, 2)):
        words += ["-add-fd", f"fd={fd},set={number}", "-chardev", f"file,id={name},path=/dev/fdset/{number},append=on"]
        words += ["-device", f"virtserialport,chardev={name},name=io.atoll.{name}"]
    words += ["-drive", "if=none,id=image,file=/image,format=raw,readonly=on"]
    words += ["-device", f"virtio-blk-{bus},drive=image{modern}"]
    words += ["-drive", f"if=none,id=disk,file={INSIDE / plan.disk.name},format=raw,discard=unmap,cache=writeback"]
    words += ["-device", f"virtio-blk-{bus},drive=disk{modern}"]
    if plan.link is not None:
        rom = "" if kind == "microvm" else ",romfile="  # no start from the network
        words += ["-netdev", f"tap,id=net,fd={TAP_FD}", "-device", f"virtio-net-{bus},netdev=net,mac={plan.link.mac}{modern}{rom}"]
    words += volume_devices(plan.volumes, plan.ram_bytes, INSIDE, bus=bus)
    return words + pci_devices(plan.pci, plan.pci_window_bytes)


def memory_name(machine: Machine) -> str:
    """Return QEMU's name for the guest's memory, by which a snapshot knows it."""
    return "microvm.ram" if machine == "microvm" else "pc.ram"


def pci_devices(addresses: Sequence[str], window_bytes: int = 0) -> list[str]:
    """Return what hands the node's devices to a q35, each behind a port of its own, with room for `window_bytes` of windows."""
    words: list[str] = []
    if window_bytes > _WINDOW_BYTES:
        words += ["-global", f"q35-pcihost.pci-hole64-size={window_bytes}"]
    for at, address in enumerate(addresses):
        words += ["-device", f"pcie-root-port,id=port{at},bus=pcie.0,chassis={at + 1}"]
        words += ["-device", f"vfio-pci,host={address},bus=port{at}"]
    return words


def kernel_line(accelerator: str) -> str:
    """Return the kernel's command line.

    Where the processor is emulated, the kernel cannot measure how fast it is, and hangs in one boot of ten trying: it is told.
    There it is spared, too, what takes time and serves nobody: no speculation is to be kept in, no profile of AppArmor is loaded,
    nobody reads an audit trail, and pages are not cleared twice.
    """
    words = ["console=ttyS0", "quiet", "loglevel=3", "reboot=t", "panic=-1", "random.trust_cpu=on", "cryptomgr.notests=1"]
    if accelerator == "tcg":
        khz = tsc_khz()
        words += [f"tsc_early_khz={khz}", f"lpj={khz * 1000 // _KERNEL_HZ}", "mitigations=off"]
        words += ["audit=0", "lsm=landlock,lockdown,yama", "init_on_alloc=0"]
    return " ".join(words)


@functools.cache
def tsc_khz() -> int:
    """Return how fast this processor's time stamp counter runs. Blocking, for 50 ms. Raises Unsupported."""
    found = subprocess.run([jail_path(), "tsc"], capture_output=True, text=True, timeout=10, check=False)
    if not re.fullmatch(r"[1-9]\d{3,9}\n", found.stdout):
        raise Unsupported("this processor has no time stamp counter", mend="use runc or gvisor")
    return int(found.stdout)
