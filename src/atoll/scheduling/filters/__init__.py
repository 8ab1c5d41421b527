"""Hard rules, one per file. Nodes are asked in the order of these lists, cheapest and plainest reason first."""

from atoll.scheduling.filters.capacity import CPU_ROOM, DISK_SIZE, MEMORY_ROOM
from atoll.scheduling.filters.devices import Devices
from atoll.scheduling.filters.gpu import GpuModel, GpuRoom
from atoll.scheduling.filters.gpu_runtime import GpuRuntimes
from atoll.scheduling.filters.labels import LabelRules
from atoll.scheduling.filters.regions import Regions
from atoll.scheduling.filters.residency import Residency
from atoll.scheduling.filters.runtime import Runtimes
from atoll.scheduling.filters.standing import Standings
from atoll.scheduling.filters.taints import Taints
from atoll.scheduling.interface import Filter, Limit

FILTERS: tuple[Filter, ...] = (
    Standings(),
    Regions(),
    Residency(),
    LabelRules(),
    Taints(),
    Runtimes(),
    GpuModel(),
    GpuRuntimes(),
    Devices(),
    DISK_SIZE,
)
LIMITS: tuple[Limit, ...] = (GpuRoom(), MEMORY_ROOM, CPU_ROOM)
