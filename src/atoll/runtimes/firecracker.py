"""The Firecracker runtime: an instance in a virtual machine of the smallest monitor there is, put into its jail by its own jailer.

It needs KVM, and hands on no device of the node. Its monitor is told everything over its API (`vm/firecracker_api.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from atoll.model.errors import Unsupported
from atoll.model.ports.runtime import Box
from atoll.model.spec import GPU_RUNTIMES, RuntimeName
from atoll.runtimes.cgroup import Cgroups, Group
from atoll.runtimes.oci_box import RUNTIME_DIRECTORY
from atoll.runtimes.oci_probe import check_machine, once_per_boot, version_of
from atoll.runtimes.shim import ShimFiles
from atoll.runtimes.trial import run_once
from atoll.runtimes.vm import firecracker_api as ask
from atoll.runtimes.vm.boxes import SLOT_MIN, VmBoxes, VmPlan
from atoll.runtimes.vm.http_api import HttpApi, Refused
from atoll.runtimes.vm.jail import LOG, Jail
from atoll.runtimes.vm.jailer import Jailer, furnish, jail_id, jailer_command
from atoll.runtimes.vm.kernel import MODULES, PLACES, GuestKernel
from atoll.runtimes.vm.told import BOOT_CALL_S_MAX, SAVE_CALL_S_MAX, ToldRuntime, boots, file_bytes, program
from atoll.runtimes.vm.written import keep_base, show

VERSION_MIN = (1, 12)
BOOT_S_MAX = 20.0
OVERHEAD_BYTES = 32 << 20
"""Of the monitor itself 5 MiB, by its makers' promise; the rest is what the kernel counts beside it, page tables above all."""
API = "api.sock"
MEND = "put firecracker and jailer of one release (1.12 or newer) into /usr/local/bin"
_BASE = "vm"
_MEMORY_BASE = "base.ram"
"""In the box's directory, out of the monitor's reach: the memory as it was written last, where changes alone are written."""
# The jailer ends once the monitor runs: its own words go to the log, the monitor's id to where the shim and later agents look.
_SCRIPT = r"""
log=$1 from=$2 to=$3; shift 3
"$@" >>"$log" 2>&1 </dev/null || {
    words=$(tail -c 300 "$log" | tr -cd '[:print:]' | tr -d '"\\')
    printf '{"level":"error","msg":"%s"}\n' "$words" >>"$log"
    exit 1
}
cat "$from" >"$to.next" && mv "$to.next" "$to"
"""


class FirecrackerRuntime(ToldRuntime):
    """Runs instances with Firecracker for x86-64, 1.12 or newer, as root."""

    name = RuntimeName.FIRECRACKER
    slots = range(SLOT_MIN + 2048, SLOT_MIN + 4096)
    modules = ("virtio_mmio", "virtio_balloon", "vmw_vsock_virtio_transport", *MODULES)
    written = (ask.STATE, ask.MEMORY)

    def __init__(
        self,
        directory: Path,
        *,
        binary: str = "firecracker",
        jailer: str = "jailer",
        cgroup: str = "/atoll",
        userns: bool | None = None,
        kernels: Sequence[Path] = PLACES,
        cache: Path | None = None,
        options: ask.MachineOptions = ask.MachineOptions(),
    ) -> None:
        super().__init__(directory, binary=binary, cgroup=cgroup, userns=userns, kernels=kernels, cache=cache)
        self._jailer = jailer
        self._options = options

    async def probe(self) -> str:
        return await asyncio.to_thread(self._probe)

    def _probe(self) -> str:
        program(self._binary, MEND)
        program(self._jailer, MEND)
        check_machine()
        self.kernel()
        return once_per_boot(RUNTIME_DIRECTORY, self._binary, self._try, file="firecracker-probe.json")

    def _try(self) -> str:
        version = version_of(self._binary, package="firecracker", oldest=VERSION_MIN)
        boots(lambda directory: asyncio.run(run_once(self._another(directory), directory, BOOT_S_MAX)), "Firecracker")
        return version

    def _another(self, directory: Path) -> FirecrackerRuntime:
        """Return a runtime like this one, for machines that are none of the node's."""
        return FirecrackerRuntime(
            directory / "runtime",
            binary=self._binary,
            jailer=self._jailer,
            cgroup=self._cgroup,
            kernels=self._kernels,
            cache=self._cache,
        )

    def overhead_bytes(self) -> int:
        return OVERHEAD_BYTES

    def check(self, box: Box) -> None:
        if box.devices:
            able = ", ".join(name for name in GPU_RUNTIMES)
            raise Unsupported("Firecracker hands on no devices", mend=f"use one of: {able}", field="resources.gpu")
        vcpus = ask.vcpus(max(1, -(-box.limits.cpu_milli // 1000)))
        if vcpus > ask.VCPUS_MAX:
            raise Unsupported(
                f"Firecracker's machines have {ask.VCPUS_MAX} processors at most", mend="ask for fewer", field="resources.cpu"
            )

    def jail(self, plan: VmPlan, kernel: GuestKernel, group: Group) -> Jail:
        raise AssertionError("Firecracker brings its own jailer")

    def monitor(self, plan: VmPlan) -> list[str]:
        return ["--api-sock", f"/{API}"]

    def jailer(self, plan: VmPlan) -> Jailer:
        """Return the jail of a machine. Raises Unsupported."""
        return Jailer(
            jailer=program(self._jailer, MEND),
            executable=program(self._binary, MEND),
            id=jail_id(plan.id),
            uid=plan.uid,
            base=Path(plan.directory) / _BASE,
            cgroup_version=2 if Cgroups.detect().pure else 1,
            # With v1 the jailer makes a group in the group, whose processes nobody would count: `begin` puts it in ours.
            parent_cgroup=f"{self._cgroup}/{plan.id}" if Cgroups.detect().pure else "",
            netns=Path(plan.netns) if plan.netns else None,
            file_bytes=file_bytes(plan),
        )

    def _command(self, boxes: VmBoxes, plan: VmPlan) -> list[str]:
        boxes.open_group(plan.id, plan.limits)
        kernel, files, jail = self.kernel(), ShimFiles(Path(plan.directory)), self.jailer(plan)
        furnish(
            jail.root,
            [
                (kernel.image, ask.KERNEL),
                (kernel.initramfs, ask.INITRAMFS),
                (plan.image_disk, ask.IMAGE),
                (plan.disk, ask.DISK),
            ],
        )
        (Path(plan.directory) / _MEMORY_BASE).unlink(missing_ok=True)  # of a machine that has ended
        if plan.snapshot:
            show(jail.root, Path(plan.snapshot), self.written)
            self.written_down(plan, Path(plan.snapshot))
        for name in (ask.LOG, ask.METRICS, ask.CONSOLE):
            place = jail.root / name
            place.touch(mode=0o600)
            os.chown(place, plan.uid, plan.uid, follow_symlinks=False)
        shim = ["run", "-", plan.stdout, plan.stderr, str(files.pid), str(files.exit), str(files.lock)]
        tool = ["/bin/sh", "-c", _SCRIPT, "jailer", str(Path(plan.directory) / LOG), str(jail.pid_file), str(files.pid)]
        return [*shim, "--", *tool, *jailer_command(jail, self.monitor(plan))]

    def begin(self, plan: VmPlan, pid: int) -> None:
        """The monitor does nothing before it is told to: there is time to count what it uses."""
        for path in Cgroups.detect().group(f"{self._cgroup}/{plan.id}").directories:
            if (path / "cgroup.procs").exists():
                (path / "cgroup.procs").write_text(str(pid))

    def own(self, directory: Path) -> Path:
        found = list((directory / _BASE).glob("*/*/root"))
        if len(found) != 1:
            raise FileNotFoundError(f"there is no jail in {directory}")
        return found[0]

    def api(self, directory: Path) -> HttpApi:
        return HttpApi(self.own(directory) / API, name="Firecracker", deadline_s=self.answer_s)

    async def answers(self, api: HttpApi) -> None:
        await api.ask(ask.DESCRIBE, ask.InstanceInfo)

    async def tell(self, api: HttpApi, plan: VmPlan) -> None:
        for call in ask.observing():
            await api.send(call)
        console = True
        try:
            await api.send(ask.SERIAL)
        except Refused:
            console = False  # an older version, whose guest would write to the monitor's own output without a bound
        for call in ask.machine(plan, self._options, console=console):
            await api.send(call)

    async def boot(self, api: HttpApi) -> None:
        await api.send(ask.START, deadline_s=BOOT_CALL_S_MAX)

    async def write_down(self, api: HttpApi, plan: VmPlan) -> None:
        changes_only = await asyncio.to_thread(self.base_of, plan, ask.MEMORY) is not None
        call = ask.snapshot(f"/{ask.STATE}", f"/{ask.MEMORY}", changes_only=changes_only)
        await api.send(call, deadline_s=SAVE_CALL_S_MAX)

    def base_of(self, plan: VmPlan, name: str) -> Path | None:
        base = Path(plan.directory) / _MEMORY_BASE
        return base if name == ask.MEMORY and self._options.track_dirty_pages and base.exists() else None

    def written_down(self, plan: VmPlan, directory: Path) -> None:
        if self._options.track_dirty_pages:
            keep_base(Path(plan.directory) / _MEMORY_BASE, directory / ask.MEMORY)

    async def load(self, api: HttpApi, plan: VmPlan) -> None:
        for call in ask.observing():
            await api.send(call)
        with contextlib.suppress(Refused):  # of a version that does not know it
            await api.send(ask.SERIAL)
        # The memory is mapped from its file, each page read when the guest touches it, and its own where it writes.
        load = ask.restore(f"/{ask.STATE}", f"/{ask.MEMORY}", resume=True, track_dirty_pages=self._options.track_dirty_pages)
        await api.send(load, deadline_s=BOOT_CALL_S_MAX)

    def version(self) -> str:
        return version_of(self._binary, package="firecracker", oldest=VERSION_MIN)

    async def is_paused(self, api: HttpApi) -> bool:
        return (await api.ask(ask.DESCRIBE, ask.InstanceInfo)).state == "Paused"

    async def pause_machine(self, directory: Path) -> None:
        await self.api(directory).send(ask.PAUSE)

    async def resume_machine(self, directory: Path) -> None:
        await self.api(directory).send(ask.RESUME)

    async def press_power(self, api: HttpApi) -> None:
        await api.send(ask.CTRL_ALT_DEL)
