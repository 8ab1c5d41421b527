"""The spec of an app."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import force_setattr

from atoll.model.errors import Invalid
from atoll.model.names import Name
from atoll.model.spec.build import Build
from atoll.model.spec.disruption import Disruption, check_disruption
from atoll.model.spec.ingress import IngressRules, check_ingress
from atoll.model.spec.instance_tls import CALLER_CA_DIRECTORY
from atoll.model.spec.isolation import Isolation
from atoll.model.spec.lifecycle import Restart, Stop
from atoll.model.spec.placement import check_gang
from atoll.model.spec.rollout import Rollout, Strategy, check_rollout
from atoll.model.spec.scale import Scale, check_scale
from atoll.model.spec.serving import Health, HealthKind, Metrics, Port, PortProtocol, Route, check_metrics, check_route, host_ports
from atoll.model.spec.values import check_unique, default
from atoll.model.spec.volumes import Volume
from atoll.model.spec.workload import Workload, check_workload
from atoll.model.units import Seconds
from atoll.model.worker import ALIVE, ALIVE_PORT, MODULES, PORT, STATE, STATE_VOLUME, Worker, check_worker

DEPENDENCIES_MAX = 32
"""Apps that one app may depend on."""


class AppSpec(Workload, frozen=True, kw_only=True, tag_field="kind", tag="app"):
    """A long-running service. A spec may say `kind = "app"`; an assignment tells apps and jobs apart by it."""

    ports: Annotated[tuple[Port, ...], Meta(max_length=32)] = ()
    routes: Annotated[tuple[Route, ...], Meta(max_length=256)] = ()
    """Beside these, every app with an `http` port has `APP.DOMAIN` (in project `default`) or `APP.PROJECT.DOMAIN`."""
    ingress: IngressRules | None = None
    """How the ingress treats its requests. Changing it makes no release."""
    health: Health | None = None
    metrics: Metrics | None = None
    scale: Scale | UnsetType = UNSET
    restart: Restart = default(Restart())
    rollout: Rollout = default(Rollout())
    worker: Worker | None = None
    """Modules that workerd runs (isolation `isolate`) instead of a program."""
    disruption: Disruption | None = None
    """How many may be away for others' sake; where it is left out as many as `rollout.max_unavailable`, and at least one."""
    depends_on: Annotated[tuple[Name, ...], Meta(max_length=DEPENDENCIES_MAX)] = ()
    """Apps of the project that must be ready at their wanted release before this one starts or rolls."""

    def __post_init__(self) -> None:
        if self.worker is not None:
            _complete_worker(self, self.worker)

    @property
    def wakes(self) -> bool:
        """Whether requests wake it where it has no instance."""
        return self.scale is not UNSET and self.scale.sleeps

    def port_named(self, name: str | None) -> Port | None:
        """Return the port called `name`, or without a name the first `http` port."""
        for port in self.ports:
            if port.name == name or (name is None and port.protocol is PortProtocol.HTTP):
                return port
        return None

    def public_ports(self) -> tuple[tuple[int, Port], ...]:
        """Return (port of every ingress, port of the instance) for all that `ingress.ports` names rightly."""
        wanted = self.ingress.ports if self.ingress is not None else ()
        named = ((each.public, self.port_named(each.port)) for each in wanted)
        return tuple((public, port) for public, port in named if port is not None and port.protocol is not PortProtocol.HTTP)


def _complete_worker(spec: AppSpec, worker: Worker) -> None:
    """Fill in what follows from a spec being a worker's, where it says nothing else; doing it again changes nothing."""
    if spec.isolation is Isolation.CONTAINER and spec.runtime is None:
        force_setattr(spec, "isolation", Isolation.ISOLATE)
    if spec.image is None and spec.build is None:
        build = Build(base="scratch", files=worker.files, ignore=worker.ignore, workdir=MODULES)
        force_setattr(spec, "build", build)
    ports = spec.ports or (Port(port=PORT),)
    if spec.health is None:
        # Asked by a port of its own: a worker that answers 404, or that waits for others, is alive for all that.
        if all(port.name != ALIVE for port in ports):
            taken = {port.port for port in ports}
            number = next(number for number in range(ALIVE_PORT, 65_536) if number not in taken)
            ports = (*ports, Port(name=ALIVE, port=number, protocol=PortProtocol.TCP))
        health = Health(kind=HealthKind.HTTP, port=ALIVE, start=Seconds(20), interval=Seconds(2))
        force_setattr(spec, "health", health)
    force_setattr(spec, "ports", ports)
    if spec.stop == Stop():
        # Requests have been let out before, and an endless loop hears no signal: what it would wait for is nothing.
        force_setattr(spec, "stop", Stop(grace=Seconds(3)))
    if worker.stateful:
        if all(volume.path != STATE for volume in spec.volumes):
            force_setattr(spec, "volumes", (*spec.volumes, Volume(name=STATE_VOLUME, path=STATE)))
        if spec.rollout == Rollout():
            force_setattr(spec, "rollout", Rollout(max_surge=0, max_unavailable=1))


def _check_mutual(spec: AppSpec) -> None:
    """Raise Invalid where instances could not ask the ingress for its certificate."""
    field = "ingress.instance_tls.mutual"
    if spec.worker is not None:
        raise Invalid(f"{field}: a worker speaks no TLS", field=field, mend="leave instance_tls out")
    named = [port for port in spec.ports if spec.health is not None and (spec.health.port is None or port.name == spec.health.port)]
    if spec.health is not None and spec.health.kind is HealthKind.HTTP and named and named[0].protocol is PortProtocol.HTTP:
        mend = "use kind = 'tcp' or 'exec', or a port of protocol 'tcp' without TLS for it"
        raise Invalid(
            f"health.kind: a check by http shows no certificate, and {field} asks for one", field="health.kind", mend=mend
        )
    own = PurePosixPath(CALLER_CA_DIRECTORY)
    for index, volume in enumerate(spec.volumes):
        path = PurePosixPath(volume.path)
        if path == own or own in path.parents or path in own.parents:
            where = f"volumes[{index}].path"
            mend = "mount it elsewhere"
            raise Invalid(f"{where}: {CALLER_CA_DIRECTORY} is where {field} puts its file", field=where, mend=mend)


def check_app(spec: AppSpec) -> None:
    """Raise Invalid for an app spec that contradicts itself, naming the field."""
    check_workload(spec)
    if spec.worker is not None:
        if spec.isolation is not Isolation.ISOLATE:
            raise Invalid(
                f"isolation: a worker runs in an isolate, not in '{spec.isolation}'", field="isolation", mend="leave isolation out"
            )
        check_worker(spec, spec.worker)
    elif spec.isolation is Isolation.ISOLATE:
        raise Invalid(
            "worker: missing; isolation 'isolate' runs JavaScript modules, not an image's program",
            field="worker",
            mend="add a [worker] table with main and compatibility_date, or use another isolation",
        )
    check_unique([port.name for port in spec.ports], "ports", "name")
    check_unique([f"{port.port}/{'udp' if port.protocol is PortProtocol.UDP else 'tcp'}" for port in spec.ports], "ports", "port")
    check_unique(list(host_ports(spec.ports)), "ports", "host")
    check_unique([route.place for route in spec.routes], "routes", "host, path and headers")
    if spec.ingress is not None:
        check_ingress(spec.ingress)
        if spec.ingress.certificate is not None and spec.port_named(None) is None:
            raise Invalid(
                "ingress.certificate: no http port, and so no hostname to sign",
                field="ingress.certificate",
                mend="add a port with protocol = 'http', or leave certificate out",
            )
        if spec.ingress.mutual:
            _check_mutual(spec)
    _check_public_ports(spec)
    for index, route in enumerate(spec.routes):
        check_route(f"routes[{index}]", route)
        port = spec.port_named(route.port)
        if port is None or port.protocol is not PortProtocol.HTTP:
            raise Invalid(
                f"routes[{index}].port: no http port {route.port or ''}".rstrip(),
                field=f"routes[{index}].port",
                mend="add it to ports with protocol = 'http'",
            )
    health = spec.health
    if health is not None:
        if health.kind is HealthKind.EXEC:
            if not health.command:
                raise Invalid("health.command: missing for kind 'exec'", field="health.command")
        elif not any(port.name == health.port for port in spec.ports) if health.port else not spec.ports:
            raise Invalid(f"health.port: no port {health.port or ''}".rstrip(), field="health.port", mend="add it to ports")
        if health.interval <= 0 or health.timeout <= 0:
            raise Invalid("health.interval: must be above 0", field="health.interval")
    check_rollout(spec.rollout, served=spec.port_named(None) is not None)
    if spec.worker is not None and spec.worker.stateful and spec.rollout.strategy is not Strategy.ROLLING:
        raise Invalid(
            "rollout.strategy: the old process must let go of the state before the new one starts",
            field="rollout.strategy",
            mend="leave strategy out",
        )
    if spec.disruption is not None:
        replicas = spec.scale.replicas if spec.scale is not UNSET else None
        check_disruption(spec.disruption, surge=spec.rollout.max_surge, replicas=replicas)
    check_unique(list(spec.depends_on), "depends_on", "app")
    if spec.name in spec.depends_on:
        raise Invalid(f"depends_on: '{spec.name}' depends on itself", field="depends_on", mend="leave it out")
    if spec.metrics is not None:
        check_metrics(spec, spec.metrics)
    if spec.scale is not UNSET:
        check_scale(spec, spec.scale)
    else:
        check_gang(spec, 1, "replicas")


def _check_public_ports(spec: AppSpec) -> None:
    named = spec.public_ports()
    for index, wanted in enumerate(spec.ingress.ports if spec.ingress is not None else ()):
        field = f"ingress.ports[{index}].port"
        port = spec.port_named(wanted.port)
        if port is None:
            raise Invalid(f"{field}: no port {wanted.port}", field=field, mend="add it to ports")
        if port.protocol is PortProtocol.HTTP:
            mend = "leave it out: the ingress leads to it by hostname; or declare the port's protocol as 'tcp'"
            raise Invalid(f"{field}: '{wanted.port}' is an http port", field=field, mend=mend)
    check_unique([f"{port.protocol}/{public}" for public, port in named], "ingress.ports", "public")


def check_gang_of(spec: AppSpec, replicas: int) -> None:
    """Raise Invalid where an app cannot have so many instances because they are a gang."""
    check_gang(spec, replicas, "replicas")
