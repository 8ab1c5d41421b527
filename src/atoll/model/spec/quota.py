"""What a project may have."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from atoll.model.errors import Invalid
from atoll.model.names import SpecRecord
from atoll.model.spec.serving import HOST_PORT_MIN
from atoll.model.units import Bytes, Cores

PORT_MAX = 65_535


class Quota(SpecRecord, frozen=True, kw_only=True):
    """The most that all placed instances of a project may ask for together, of every release; None for no limit."""

    cpu: Cores | None = None
    memory: Bytes | None = None
    gpu: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    """Whole devices."""
    instances: Annotated[int, Meta(ge=0, le=10_000_000)] | None = None
    host_port_min: Annotated[int, Meta(ge=1, le=65_535)] = HOST_PORT_MIN
    """No limit on amounts: the lowest port of nodes that the project's apps may be published on (`ports[].host`)."""
    weight: Annotated[int, Meta(ge=1, le=1000)] = 1
    """No limit: how much the project counts beside others when there is not room for all that wait (fair shares)."""
    public_ports: Annotated[str, Meta(pattern=r"^([0-9]{1,5}-[0-9]{1,5})?$(?!\n)", max_length=11, description="FIRST-LAST")] = ""
    """The ports of ingresses that the project's apps may have (`ingress.ports`), as `FIRST-LAST`; empty for none."""
    requests_per_s: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """What each ingress lets through to all apps of the project together; what is more is answered 429."""

    def may_publish(self, port: int) -> bool:
        """Whether the project's apps may have this port of ingresses."""
        first, _, last = self.public_ports.partition("-")
        return bool(first) and int(first) <= port <= int(last)


def check_quota(quota: Quota) -> None:
    """Raise Invalid, naming the field, for a range of ports that is none. What is kept already is not asked."""
    if not quota.public_ports:
        return
    first, last = (int(port) for port in quota.public_ports.split("-"))
    if not 1 <= first <= last <= PORT_MAX:
        what = "the first is above the last" if first > last else f"ports go from 1 to {PORT_MAX}"
        mend = "write the lowest and the highest, for example 15000-15999"
        raise Invalid(f"public_ports: {quota.public_ports} is no range of ports: {what}", field="public_ports", mend=mend)
