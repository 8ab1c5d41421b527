"""Where the contract of runtimes runs on Firecracker's and Cloud Hypervisor's drivers over stand-ins for their monitors.

The drivers are the real ones, with the real shim, jail, control groups and disks. What cannot be: no kernel boots, and the
instance's processes are the jail's own, not a machine's.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec import structs
from runtime_world import World

from atoll.model.ports.devices import DeviceNode
from atoll.runtimes.cgroup import Group
from atoll.runtimes.cloud_hypervisor import CloudHypervisorRuntime
from atoll.runtimes.firecracker import FirecrackerRuntime
from atoll.runtimes.native import guest_path, shim_path
from atoll.runtimes.vm import cloud_hypervisor_api, firecracker_api
from atoll.runtimes.vm.boxes import VmPlan
from atoll.runtimes.vm.jail import Jail
from atoll.runtimes.vm.kernel import GuestKernel

HERE = Path(__file__).parent
TESTS = HERE.parent
STAND_INS = ("firecracker-stand-in", "cloud-hypervisor-stand-in")
PLACES = {Path("/kernel"), Path("/initramfs"), Path("/image"), Path("/vhost.sock")}
NULL = DeviceNode(path="/dev/null", host_path="/dev/null", major=1, minor=3)
_SHOWN = ("/usr", "/lib", "/lib64")


def make_program(kind: str, directory: Path, layer: Path, trouble: str = "") -> Path:
    """Return an executable that is the stand-in for `kind`."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    program = directory / kind
    paths = f"layer=Path({str(layer)!r}), server=Path({str(guest_path())!r}), probe=Path({str(shim_path())!r})"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\nsys.path.insert(0, {str(HERE)!r})\n"
        f"from vmm_stand_ins import main\nmain({kind!r}, sys.argv[1:], {paths}, trouble={trouble!r})\n"
    )
    program.chmod(0o755)
    return program


def make_kernel(directory: Path) -> Path:
    """Return a place with what looks like a kernel."""
    (directory / "boot").mkdir(parents=True, exist_ok=True)
    (directory / "lib/modules/6.1.0-1-cloud-amd64").mkdir(parents=True, exist_ok=True)
    (directory / "boot/vmlinuz-6.1.0-1-cloud-amd64").write_bytes(b"\x7fELF no kernel")
    return directory


class JailedStandIn(CloudHypervisorRuntime):
    """What the stand-in needs in the jail beside what the real one would: Python, and the programs of the instance's image."""

    def __init__(
        self, directory: Path, *, layer: Path, program: Path, cgroup: str, kernels: Sequence[Path], **options: Any
    ) -> None:
        options = {"options": cloud_hypervisor_api.MachineOptions(landlock=True)} | options
        super().__init__(directory, binary=str(program), cgroup=cgroup, kernels=kernels, **options)
        self._layer, self._program = layer, program

    def jail(self, plan: VmPlan, kernel: GuestKernel, group: Group) -> Jail:
        jail = super().jail(plan, kernel, group)
        shown = [pair for pair in jail.shown if pair[1] in PLACES or pair[1].is_relative_to("/sys")]
        shown += [(Path(name), Path(name)) for name in _SHOWN if Path(name).exists()]
        shown += [
            (self._layer / "bin", Path("/bin")),
            (shim_path(), Path("/probe")),
            (self._program, self._program),
            (TESTS, TESTS),
        ]
        shown += [(path, path) for path in (Path(sys.prefix), guest_path())]
        return structs.replace(jail, shown=tuple(shown), nodes=(*jail.nodes, NULL))

    def _another(self, directory: Path) -> JailedStandIn:
        return JailedStandIn(
            directory / "runtime", layer=self._layer, program=self._program, cgroup=self._cgroup, kernels=self._kernels
        )

    def monitor(self, plan: VmPlan) -> list[str]:
        return [sys.executable, str(self._program), *super().monitor(plan)[1:]]


def stand_in_runtime(
    name: str, directory: Path, layer: Path, cgroup: str, trouble: str = "", **options: Any
) -> Callable[[], FirecrackerRuntime | CloudHypervisorRuntime]:
    """Return what makes the driver `name` (one of STAND_INS) over its stand-in, any number of times."""
    kernels = (make_kernel(directory / "kernel"),)
    programs = directory / "programs"
    if name == "firecracker-stand-in":
        firecracker, jailer = (make_program(kind, programs, layer, trouble) for kind in ("firecracker", "jailer"))
        options = {"options": firecracker_api.MachineOptions(track_dirty_pages=True, metadata=True)} | options
        return lambda: FirecrackerRuntime(
            directory / "runtime", binary=str(firecracker), jailer=str(jailer), cgroup=cgroup, kernels=kernels, **options
        )
    program = make_program("cloud-hypervisor", programs, layer, trouble)
    return lambda: JailedStandIn(directory / "runtime", layer=layer, program=program, cgroup=cgroup, kernels=kernels, **options)


def stand_in_world(name: str, directory: Path, layer: Path, trouble: str = "", **options: Any) -> World:
    cgroup = f"/atoll-test-{name}-{uuid.uuid4().hex[:8]}"
    return World(directory, stand_in_runtime(name, directory, layer, cgroup, trouble, **options), (layer,), cgroup=cgroup)
