"""Where instances may go, and where they had better."""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from atoll.model.errors import Invalid
from atoll.model.names import Name, SpecRecord
from atoll.model.spec.gpu import GpuTopology
from atoll.model.spec.locality import check_locality
from atoll.model.spec.values import REPLICAS_MAX
from atoll.model.units import Seconds

if TYPE_CHECKING:
    from atoll.model.spec.workload import Workload

GANG_MAX = 500
"""Instances that are placed all at once or not at all: what is written in one transaction."""
NVLINK = "nvlink"
"""As `Placement.together`: one node, and every two devices joined."""
RULES_MAX = 16
"""Constraints, and affinities of either kind, in one spec."""
REGIONS_MAX = 64
"""Regions, and names of `residency`, in one spec."""


class Operator(enum.StrEnum):
    EQUAL = "="
    NOT_EQUAL = "!="
    IN = "in"
    NOT_IN = "not in"
    EXISTS = "exists"
    NOT_EXISTS = "not exists"
    REGEXP = "regexp"
    VERSION = "version"
    IS = "IS"
    LIKE = "LIKE"
    """The whole value matches the expression."""
    UNLIKE = "UNLIKE"
    UNIQUE = "UNIQUE"
    """At most one instance of the app for each value of the label."""
    MAX_PER = "MAX_PER"
    """At most `value` of them."""
    CLUSTER = "CLUSTER"
    """All instances of the app where the label has one value: the given one, or without one that of the first."""
    GROUP_BY = "GROUP_BY"
    """Even over the values of the label: a release has nowhere over one more than where it has fewest. `value` is how many
    values there must be at least before any gets a second one; empty for those that there are."""


COUNTING = frozenset({Operator.UNIQUE, Operator.MAX_PER, Operator.CLUSTER, Operator.GROUP_BY})
"""Operators that look at where the app's other instances are, beside the node's label."""


class Constraint(SpecRecord, frozen=True, kw_only=True):
    """A hard rule on a node's label; `node`, `site`, `region` and `arch` are labels that every node has."""

    label: Annotated[str, Meta(min_length=1, max_length=253)]
    operator: Operator = Operator.EQUAL
    value: str | tuple[str, ...] = ""


class SpreadBy(enum.StrEnum):
    NODE = "node"
    SITE = "site"
    REGION = "region"


class Affinity(SpecRecord, frozen=True, kw_only=True):
    """Beside, or away from, the instances of an app or job of the same project; its own name means its own instances."""

    app: Name
    by: Annotated[str, Meta(min_length=1, max_length=253)] = "node"
    """The label whose equal value makes two nodes one place: `node`, `site`, `region` or any other."""
    weight: Annotated[int, Meta(ge=1, le=100)] | None = None
    """None for a rule that must hold; else a wish, and how strong it is."""


class Placement(SpecRecord, frozen=True, kw_only=True):
    regions: Annotated[tuple[str, ...], Meta(max_length=REGIONS_MAX)] = ()
    """In order of preference; the later ones, and with `any` among them all others, are for when there is no room before."""
    near: Annotated[str, Meta(max_length=128)] | None = None
    """`users`, `app:NAME`, `site:NAME`, or latitude and longitude: the nearest site that fits is the best."""
    latency_max: Seconds | None = None
    """A rule: the round trip to what `near` names takes no longer."""
    residency: Annotated[tuple[str, ...], Meta(max_length=REGIONS_MAX)] = ()
    """A rule: only at sites in one of these countries (`DE`), groups of countries (`eu`, `eea`) or regions."""
    constraints: Annotated[tuple[Constraint, ...], Meta(max_length=RULES_MAX)] = ()
    affinity: Annotated[tuple[Affinity, ...], Meta(max_length=RULES_MAX)] = ()
    anti_affinity: Annotated[tuple[Affinity, ...], Meta(max_length=RULES_MAX)] = ()
    max_skew: Annotated[int, Meta(ge=1, le=REPLICAS_MAX)] | None = None
    """With it `spread` must hold: a place has at most so many instances of a release more than the place with fewest."""
    cost: Annotated[int, Meta(ge=0, le=100)] = 0
    """How much a cheap node is wished for, by the nodes' label `price` (a number); 0 for not at all."""
    follow_volumes: bool = True
    """An app's instances go only where its volumes are, as long as such a node has none of the release."""
    spread: SpreadBy = SpreadBy.NODE
    gang: bool = False
    """Those that wait get their places all at once or none does: a job's parallel set, an app's first start."""
    together: Annotated[str, Meta(min_length=1, max_length=253)] | None = None
    """With `gang`: all in one place, by the label that says which (`node`, `site`, `region` or any other), or `nvlink`: on
    one node, with every two of all their devices joined."""
    tolerations: tuple[str, ...] = ()
    priority: Annotated[int, Meta(ge=0, le=100)] = 50


def check_placement(spec: Workload) -> None:
    """Raise Invalid for rules that contradict themselves."""
    check_locality(spec)
    for index, rule in enumerate(spec.placement.constraints):
        field = f"placement.constraints[{index}].value"
        values = (rule.value,) if isinstance(rule.value, str) else rule.value
        match rule.operator:
            case Operator.MAX_PER:
                if len(values) != 1 or re.fullmatch("[1-9][0-9]{0,5}", values[0]) is None:
                    raise Invalid(
                        f"{field}: MAX_PER takes a whole number from 1 on", field=field, mend="write for example value = '2'"
                    )
            case Operator.GROUP_BY:
                if len(values) != 1 or re.fullmatch("([1-9][0-9]{0,5})?", values[0]) is None:
                    raise Invalid(f"{field}: GROUP_BY takes a whole number, or nothing", field=field)
            case Operator.UNIQUE:
                if values not in ((), ("",)):
                    raise Invalid(f"{field}: UNIQUE takes no value", field=field, mend="use MAX_PER for more than one")
            case Operator.CLUSTER:
                if len(values) > 1:
                    raise Invalid(f"{field}: CLUSTER takes one value, or none", field=field)
            case _:
                pass
    for name in ("affinity", "anti_affinity"):
        for index, wish in enumerate(getattr(spec.placement, name)):
            if wish.app == spec.name and wish.weight is not None:
                field = f"placement.{name}[{index}].weight"
                mend = "remove the weight" if name == "affinity" else "remove the weight, or use placement.spread"
                raise Invalid(f"{field}: towards itself an app has a rule, not a wish", field=field, mend=mend)


def check_gang(spec: Workload, count: int, field: str) -> None:
    """Raise Invalid for a gang that could never be placed at once; `field` is what sets its `count`."""
    placement = spec.placement
    if not placement.gang:
        if placement.together is not None:
            raise Invalid(
                "placement.together: says where a gang goes, and placement.gang is not set",
                field="placement.together",
                mend="set gang = true, or use a constraint with the operator CLUSTER",
            )
        return
    if count > GANG_MAX:
        raise Invalid(f"{field}: {count} in a gang, which has at most {GANG_MAX}", field=field, mend="ask for fewer, or no gang")
    gpu = spec.resources.gpu
    if placement.together != NVLINK:
        return
    if gpu is None or gpu.count < 1 or gpu.profile is not None:
        raise Invalid(
            "placement.together: 'nvlink' joins whole devices, and the instances ask for none",
            field="placement.together",
            mend="set resources.gpu.count to 1 or more, or use together = 'node'",
        )
    if gpu.topology is GpuTopology.NUMA:
        field = "resources.gpu.topology"
        raise Invalid(f"{field}: 'numa' beside placement.together = 'nvlink'", field=field, mend="leave one of them out")
