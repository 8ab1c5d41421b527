"""The Cloud Hypervisor runtime: an instance in a virtual machine that can have whole PCI devices of the node, GPUs above all.

It needs KVM. Its monitor runs in the node's own jail (`native/jail.c`) and is told everything over its API
(`vm/cloud_hypervisor_api.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog

from atoll.model.errors import Unsupported
from atoll.model.ports.devices import DeviceNode
from atoll.model.ports.runtime import Box, Feature
from atoll.model.spec import RuntimeName
from atoll.runtimes.cgroup import Group
from atoll.runtimes.native import jail_path
from atoll.runtimes.oci_box import RUNTIME_DIRECTORY
from atoll.runtimes.oci_probe import check_machine, once_per_boot, version_of
from atoll.runtimes.trial import run_once
from atoll.runtimes.vm import cloud_hypervisor_api as ask
from atoll.runtimes.vm.boxes import SLOT_MIN, VmPlan
from atoll.runtimes.vm.http_api import HttpApi, Refused
from atoll.runtimes.vm.jail import INSIDE, Jail, make_tools, top_level
from atoll.runtimes.vm.kernel import MODULES, PLACES, GuestKernel
from atoll.runtimes.vm.pci import check_devices, check_locking, locked_bytes, shown_of
from atoll.runtimes.vm.tap import TAP
from atoll.runtimes.vm.told import BOOT_CALL_S_MAX, SAVE_CALL_S_MAX, ToldRuntime, boots, file_bytes, program
from atoll.runtimes.vm.written import open_to, show

VERSION_MIN = (40, 0)
BOOT_S_MAX = 20.0
OVERHEAD_BYTES = 64 << 20
API = "api.sock"
MEND = "put cloud-hypervisor 40 or newer into /usr/local/bin"
NODES = (
    DeviceNode(path="/dev/kvm", host_path="/dev/kvm", major=10, minor=232),
    DeviceNode(path="/dev/urandom", host_path="/dev/urandom", major=1, minor=9),
)
TUN = DeviceNode(path="/dev/net/tun", host_path="/dev/net/tun", major=10, minor=200)
_LSM = Path("/sys/kernel/security/lsm")
VHOST = Path("/vhost.sock")

log = structlog.get_logger()


class CloudHypervisorRuntime(ToldRuntime):
    """Runs instances with Cloud Hypervisor for x86-64, 40 or newer, as root."""

    name = RuntimeName.CLOUD_HYPERVISOR
    slots = range(SLOT_MIN + 4096, SLOT_MIN + 6144)
    modules = ("virtio_pci", "virtio_balloon", "vmw_vsock_virtio_transport", *MODULES)
    features = ToldRuntime.features | {Feature.GPU}
    written = ask.WRITTEN

    def __init__(
        self,
        directory: Path,
        *,
        binary: str = "cloud-hypervisor",
        cgroup: str = "/atoll",
        userns: bool | None = None,
        kernels: Sequence[Path] = PLACES,
        cache: Path | None = None,
        options: ask.MachineOptions | None = None,
        vhost: Path | None = None,
    ) -> None:
        """`options` are found out where they are not given.

        `vhost` is where a switch in user space has a socket `ID.sock` for an instance that it connects (vhost-user); one without is
        connected by its tap.
        """
        super().__init__(directory, binary=binary, cgroup=cgroup, userns=userns, kernels=kernels, cache=cache)
        self._options = options or ask.MachineOptions(landlock=has_landlock())
        self._vhost = vhost

    async def probe(self) -> str:
        return await asyncio.to_thread(self._probe)

    def _probe(self) -> str:
        program(self._binary, MEND)
        check_machine()
        jail_path()
        self.kernel()
        return once_per_boot(RUNTIME_DIRECTORY, self._binary, self._try, file="cloud-hypervisor-probe.json")

    def _try(self) -> str:
        version = version_of(self._binary, package="cloud-hypervisor", oldest=VERSION_MIN)
        boots(lambda directory: asyncio.run(run_once(self._another(directory), directory, BOOT_S_MAX)), "Cloud Hypervisor")
        return version

    def _another(self, directory: Path) -> CloudHypervisorRuntime:
        """Return a runtime like this one, for machines that are none of the node's."""
        return CloudHypervisorRuntime(
            directory / "runtime", binary=self._binary, cgroup=self._cgroup, kernels=self._kernels, cache=self._cache
        )

    def overhead_bytes(self) -> int:
        return OVERHEAD_BYTES

    def check(self, box: Box) -> None:
        check_devices(box, self.name)

    def jail(self, plan: VmPlan, kernel: GuestKernel, group: Group) -> Jail:
        check_locking(locked_bytes(plan))
        tools = make_tools(self._cache / "tools", self._binary)
        shown = [
            *top_level(tools),
            (kernel.image, Path(ask.KERNEL)),
            (kernel.initramfs, Path(ask.INITRAMFS)),
            (plan.image_disk, Path(ask.IMAGE)),
            *shown_of(plan),
        ]
        if plan.snapshot:
            show(self.written_in(Path(plan.directory)), Path(plan.snapshot), self.written)
        if plan.link:
            # That the tap is there already is seen by this directory alone: the monitor then leaves its address as it is.
            shown.append((_empty(Path(plan.directory)), Path("/sys/class/net") / TAP))
        if (switch := self._switch(plan)) is not None:
            shown.append((switch, VHOST))
        return Jail(
            directory=Path(plan.directory),
            uid=plan.uid,
            shown=tuple(shown),
            nodes=(*NODES, *((TUN,) if plan.link else ()), *plan.nodes),
            file_bytes=file_bytes(plan),
            locked_bytes=locked_bytes(plan),
            groups=tuple(path for path in group.directories if (path / "cgroup.procs").exists()),
        )

    def _switch(self, plan: VmPlan) -> Path | None:
        socket = self._vhost / f"{plan.id}.sock" if self._vhost else None
        return socket if socket is not None and socket.exists() else None

    def monitor(self, plan: VmPlan) -> list[str]:
        return [str(Path("/usr/bin") / self._binary), "--api-socket", f"path={INSIDE / API}", "--seccomp", "true"]

    def own(self, directory: Path) -> Path:
        return directory / "vm"

    def api(self, directory: Path) -> HttpApi:
        return HttpApi(self.own(directory) / API, name="Cloud Hypervisor", base=ask.BASE, deadline_s=self.answer_s)

    async def answers(self, api: HttpApi) -> None:
        await api.ask(ask.PING, ask.Ping)

    async def tell(self, api: HttpApi, plan: VmPlan) -> None:
        switch = await asyncio.to_thread(self._switch, plan)
        for call in ask.making(plan, self._options, vhost_socket=str(VHOST) if switch else ""):
            await api.send(call)

    async def boot(self, api: HttpApi) -> None:
        await api.send(ask.BOOT, deadline_s=BOOT_CALL_S_MAX)

    def written_in(self, directory: Path) -> Path:
        return self.own(directory) / ask.SNAPSHOT

    async def write_down(self, api: HttpApi, plan: VmPlan) -> None:
        if await asyncio.to_thread(self._switch, plan) is not None:
            raise Unsupported("a machine at a switch in user space cannot be written down", mend="connect it by its tap")
        await asyncio.to_thread(open_to, self.written_in(Path(plan.directory)), plan.uid)
        await api.send(ask.snapshot(str(INSIDE / ask.SNAPSHOT)), deadline_s=SAVE_CALL_S_MAX)

    async def load(self, api: HttpApi, plan: VmPlan) -> None:
        try:
            await api.send(ask.restore(str(INSIDE / ask.SNAPSHOT), on_demand=True, resume=True), deadline_s=BOOT_CALL_S_MAX)
        except Refused as error:
            # A version that cannot read memory as it is touched reads all of it; what else it refused, it refuses again.
            log.info("vm.memory-read-at-once", instance=plan.id, why=str(error))
            await api.send(ask.restore(str(INSIDE / ask.SNAPSHOT), resume=True), deadline_s=BOOT_CALL_S_MAX)

    def version(self) -> str:
        return version_of(self._binary, package="cloud-hypervisor", oldest=VERSION_MIN)

    async def is_paused(self, api: HttpApi) -> bool:
        return (await api.ask(ask.INFO, ask.Info)).state == "Paused"

    async def pause_machine(self, directory: Path) -> None:
        await self.api(directory).send(ask.PAUSE)

    async def resume_machine(self, directory: Path) -> None:
        await self.api(directory).send(ask.RESUME)

    async def press_power(self, api: HttpApi) -> None:
        await api.send(ask.POWER_BUTTON)


def has_landlock() -> bool:
    """Whether this kernel can confine a process to paths."""
    try:
        return "landlock" in _LSM.read_text().strip().split(",")
    except OSError:
        return False


def _empty(directory: Path) -> Path:
    place = directory / "tap"
    place.mkdir(mode=0o755, exist_ok=True)
    return place
