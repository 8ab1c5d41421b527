"""How many instances of an app there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from atoll.model.errors import Invalid
from atoll.model.names import SpecRecord
from atoll.model.spec.placement import check_gang
from atoll.model.spec.rollout import Strategy
from atoll.model.spec.serving import METRIC_PATTERN, PortProtocol, host_ports
from atoll.model.spec.sources import WINDOWS_MAX, Idle, PrometheusQuery, ScaleWindow, check_sources, sources_of
from atoll.model.spec.values import REPLICAS_MAX, default
from atoll.model.units import Seconds

if TYPE_CHECKING:
    from atoll.model.spec.app import AppSpec

STANDBY_MAX = 100
"""Instances of one app that wait, parked."""
IDLE_AFTER_MIN_S = 5.0
"""Ingresses say every 2 s what is at work."""


class Scale(SpecRecord, frozen=True, kw_only=True):
    """How many instances there are: `replicas`, or with `max` between the two, as the largest of what its sources ask for."""

    replicas: Annotated[int, Meta(ge=0, le=REPLICAS_MAX)] = 1
    max: Annotated[int, Meta(ge=1, le=REPLICAS_MAX)] | None = None
    metric: (
        Annotated[str, Meta(pattern=METRIC_PATTERN, description="letters, digits, '_' and ':', at most 128, no digit first")] | None
    ) = None
    """A metric that the app gives away (`metrics`), such as the depth of its queue."""
    target: Annotated[float, Meta(gt=0)] | None = None
    """As many instances are wanted as make the metric, summed up and divided by them, at most this."""
    concurrency: Annotated[float, Meta(gt=0)] | None = None
    """Requests under way, as the ingresses count them, that each instance is to have on average."""
    rps: Annotated[float, Meta(gt=0)] | None = None
    """Requests per second that each instance is to have on average."""
    stable: Seconds = default(Seconds(60))
    """Over so long `concurrency` and `rps` are averaged; over a tenth of it, too, where many come at once."""
    cpu: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Share of `resources.cpu` that each instance is to use; the next two likewise."""
    memory: Annotated[float, Meta(gt=0, le=1)] | None = None
    gpu: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Share of the time in which its devices are at work."""
    windows: Annotated[tuple[ScaleWindow, ...], Meta(max_length=WINDOWS_MAX)] = ()
    """Times in which there are at least so many."""
    prometheus: PrometheusQuery | None = None
    down: Seconds = default(Seconds(60))
    """An instance is taken away once it has not been needed for so long. What `concurrency` and `rps` say has its own window."""
    idle_after: Seconds = default(Seconds(300))
    """With `replicas = 0` and `max`: the last instance is taken away when no request was under way for so long. The next one
    wakes the app, and waits for it."""
    idle: Idle = Idle.FIXED
    standby: Annotated[int, Meta(ge=0, le=STANDBY_MAX)] = 0
    """So many more are started, made ready, and parked: frozen, and off their devices. One of them takes the place of an instance
    that is missing."""

    @property
    def sleeps(self) -> bool:
        """Whether there is no instance while nobody asks for the app."""
        return self.replicas == 0 and self.max is not None

    @property
    def counts_requests(self) -> bool:
        """Whether ingresses are to count what is under way."""
        return self.max is not None and (self.concurrency is not None or self.rps is not None)


def _check_standby(spec: AppSpec, scale: Scale) -> None:
    if scale.standby == 0:
        return
    if scale.replicas == 0:
        raise Invalid(
            "scale.standby: an app with replicas = 0 is stopped or sleeps, and nothing stands by for it",
            field="scale.standby",
            mend="leave it out, or set replicas to 1 or more",
        )
    if spec.health is None and all(port.protocol is PortProtocol.UDP for port in spec.ports):
        raise Invalid(
            "scale.standby: nothing says when an instance is warm enough to be parked",
            field="scale.standby",
            mend="add a [health] table, or a port that it listens on once it is ready",
        )
    if any(not volume.read_only for volume in spec.volumes):
        raise Invalid(
            "scale.standby: an app that writes to volumes has its instances where they are, and none can wait beside them",
            field="scale.standby",
            mend="make the volumes read-only, or leave it out",
        )


def _check_sleep(spec: AppSpec, scale: Scale) -> None:
    """Raise Invalid for an app that sleeps and could not be woken, or would be put to sleep while it is at work."""
    if scale.idle_after < IDLE_AFTER_MIN_S:
        raise Invalid(
            f"scale.idle_after: {scale.idle_after:g} s is too short: ingresses say only every 2 s what is at work",
            field="scale.idle_after",
            mend=f"set it to '{IDLE_AFTER_MIN_S:g}s' or more",
        )
    if spec.port_named(None) is None:
        raise Invalid(
            "scale.replicas: 0 with max, but the app has no http port, and nothing else wakes it",
            field="scale.replicas",
            mend="add an http port, or set replicas to 1 or more",
        )
    if host_ports(spec.ports):
        raise Invalid(
            "ports.host: nobody counts what comes in at a port of the node, so the app would be put to sleep while it is at work",
            field="ports.host",
            mend="leave host out, or set scale.replicas to 1 or more",
        )
    if spec.rollout.strategy is not Strategy.ROLLING:
        raise Invalid(
            f"rollout.strategy: '{spec.rollout.strategy}' needs requests to both releases, and an app that sleeps may have none",
            field="rollout.strategy",
            mend="leave strategy out, or set scale.replicas to 1 or more",
        )


def _check_bounds(spec: AppSpec, scale: Scale, sources: tuple[str, ...]) -> None:
    """Raise Invalid where `max`, or half of what goes together, is missing or out of order."""
    if scale.max is None:
        there = ", ".join(f"scale.{key}" for key in sources) or "scale.target"
        raise Invalid(
            "scale.max: missing; it is the most that there may be",
            field="scale.max",
            mend=f"add it, or leave {there} out for a fixed number of instances",
        )
    if not sources and scale.target is None:
        raise Invalid(
            "scale.metric: missing; max, metric and target go together",
            field="scale.metric",
            mend="add both, or concurrency, rps, cpu or another source, or leave scale.max out for a fixed number of instances",
        )
    if (scale.metric is None) is not (scale.target is None):
        missing, there = ("target", "metric") if scale.target is None else ("metric", "target")
        raise Invalid(
            f"scale.{missing}: missing; metric and target go together",
            field=f"scale.{missing}",
            mend=f"add it, or leave scale.{there} out",
        )
    if scale.max < scale.replicas:
        raise Invalid(
            f"scale.max: {scale.max} is below scale.replicas, {scale.replicas}",
            field="scale.max",
            mend="replicas is the least and max the most that there are",
        )
    if scale.metric is not None and spec.metrics is None:
        raise Invalid(
            f"scale.metric: nothing says where '{scale.metric}' comes from",
            field="scale.metric",
            mend="add a [metrics] table with the port and path that the app gives its metrics away on",
        )


def check_scale(spec: AppSpec, scale: Scale) -> None:
    """Raise Invalid for a scale that contradicts itself or the rest of `spec`."""
    check_gang(spec, max(scale.replicas, scale.max or 0), "scale.replicas")
    if spec.placement.gang and scale.standby:
        raise Invalid("scale.standby: nothing stands by for a gang", field="scale.standby", mend="leave it out")
    _check_standby(spec, scale)
    check_sources(spec, scale)
    sources = sources_of(scale)
    if scale.sleeps:
        _check_sleep(spec, scale)
        if not sources and scale.target is None:
            if scale.max != 1:
                raise Invalid(
                    f"scale.max: {scale.max}, and nothing says when more than one instance is needed",
                    field="scale.max",
                    mend="set it to 1, or add metric and target, concurrency, or another source",
                )
            return
    if scale.max is None and not sources and scale.target is None:
        return
    _check_bounds(spec, scale, sources)
