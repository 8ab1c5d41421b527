"""Hard rules that look at what is placed already, one per file. A class of instances that uses none of them pays for none."""

from atoll.scheduling.rules.apart import Apart
from atoll.scheduling.rules.backfill import Backfill
from atoll.scheduling.rules.beside import Beside
from atoll.scheduling.rules.caps import Caps
from atoll.scheduling.rules.devices import HeldDevices
from atoll.scheduling.rules.evacuation import Evacuations
from atoll.scheduling.rules.even import Even
from atoll.scheduling.rules.gang import Gang
from atoll.scheduling.rules.interface import Bound, Rule
from atoll.scheduling.rules.latency import Within
from atoll.scheduling.rules.ports import HostPorts
from atoll.scheduling.rules.reserved import ReservedNodes
from atoll.scheduling.rules.together import Together
from atoll.scheduling.rules.volumes import Volumes

RULES: tuple[Rule, ...] = (
    Evacuations(),
    Volumes(),
    Together(),
    Gang(),
    Beside(),
    Within(),
    Apart(),
    Caps(),
    Even(),
    HeldDevices(),
    HostPorts(),
    ReservedNodes(),
    Backfill(),
)

__all__ = ["RULES", "Backfill", "Bound", "ReservedNodes", "Rule"]
