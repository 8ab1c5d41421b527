"""How much isolation work asks for, and which runtimes give it."""

from __future__ import annotations

import enum


class Isolation(enum.StrEnum):
    """How much isolation the work needs; the runtime is chosen from it unless pinned."""

    CONTAINER = "container"
    SANDBOX = "sandbox"
    VM = "vm"
    ISOLATE = "isolate"


class RuntimeName(enum.StrEnum):
    RUNC = "runc"
    CRUN = "crun"
    GVISOR = "gvisor"
    LXC = "lxc"
    FIRECRACKER = "firecracker"
    CLOUD_HYPERVISOR = "cloud-hypervisor"
    QEMU = "qemu"
    WORKERD = "workerd"


RUNTIMES_BY_ISOLATION: dict[Isolation, tuple[RuntimeName, ...]] = {
    Isolation.CONTAINER: (RuntimeName.RUNC, RuntimeName.CRUN, RuntimeName.LXC),
    Isolation.SANDBOX: (RuntimeName.GVISOR,),
    Isolation.VM: (RuntimeName.FIRECRACKER, RuntimeName.CLOUD_HYPERVISOR, RuntimeName.QEMU),
    Isolation.ISOLATE: (RuntimeName.WORKERD,),
}
"""Which runtimes provide an isolation, preferred first."""

SNAPSHOT_RUNTIMES = (RuntimeName.GVISOR, RuntimeName.QEMU, RuntimeName.FIRECRACKER, RuntimeName.CLOUD_HYPERVISOR)
"""Those that can write an instance's state down and go on from it, elsewhere and many times."""
