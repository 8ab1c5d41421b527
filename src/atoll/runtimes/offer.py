"""Every runtime that a node may offer, and what each can do: the one list that the agent and the command line are made from."""

from __future__ import annotations

from atoll.model.errors import Unsupported
from atoll.model.ports.runtime import Feature
from atoll.model.spec import RUNTIMES_BY_ISOLATION, Isolation, RuntimeName
from atoll.runtimes.cloud_hypervisor import CloudHypervisorRuntime
from atoll.runtimes.crun import CrunRuntime
from atoll.runtimes.firecracker import FirecrackerRuntime
from atoll.runtimes.gvisor import GvisorRuntime
from atoll.runtimes.lxc import LxcRuntime
from atoll.runtimes.qemu import QemuRuntime
from atoll.runtimes.runc import RuncRuntime
from atoll.runtimes.workerd import WorkerdRuntime

AnyRuntime = (
    type[RuncRuntime]
    | type[CrunRuntime]
    | type[LxcRuntime]
    | type[GvisorRuntime]
    | type[FirecrackerRuntime]
    | type[CloudHypervisorRuntime]
    | type[QemuRuntime]
    | type[WorkerdRuntime]
)

RUNTIMES: tuple[AnyRuntime, ...] = (
    RuncRuntime,
    CrunRuntime,
    LxcRuntime,
    GvisorRuntime,
    FirecrackerRuntime,
    CloudHypervisorRuntime,
    QemuRuntime,
    WorkerdRuntime,
)
"""In the order in which a node probes them."""

FEATURES: dict[RuntimeName, frozenset[Feature]] = {runtime.name: runtime.features for runtime in RUNTIMES}


def isolation_of(name: RuntimeName) -> Isolation:
    return next(isolation for isolation, names in RUNTIMES_BY_ISOLATION.items() if name in names)


def having(feature: Feature) -> tuple[RuntimeName, ...]:
    """Return the runtimes that can do it."""
    return tuple(name for name, features in FEATURES.items() if feature in features)


def require(name: RuntimeName, feature: Feature) -> None:
    """Raises Unsupported, naming the runtimes that can, where `name` cannot."""
    if feature in FEATURES.get(name, frozenset()):
        return
    others = ", ".join(having(feature))
    mend = f"use one of: {others}" if others else "no runtime of this version can"
    raise Unsupported(f"the runtime {name} has no {feature}", mend=mend, field="runtime")
