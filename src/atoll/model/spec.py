"""What a user asks for: the spec of an app and of a job. Durations, sizes and cores are written as in `units`."""

from __future__ import annotations

import enum
import re
from pathlib import PurePosixPath
from typing import Annotated, TypeVar

from msgspec import UNSET, Meta, UnsetType, field
from msgspec.structs import force_setattr

from atoll.model.devices import GpuSharing, GpuVendor
from atoll.model.errors import Invalid
from atoll.model.names import NAME_PATTERN as NAME_PATTERN
from atoll.model.names import EnvName as EnvName
from atoll.model.names import Name as Name
from atoll.model.names import PortNumber as PortNumber
from atoll.model.names import SpecRecord as _Spec
from atoll.model.signals import signal_number
from atoll.model.units import Bytes, Cores, Seconds
from atoll.model.worker import ALIVE, ALIVE_PORT, MODULES, PORT, STATE, STATE_VOLUME, Worker, check_worker

EnvValue = Annotated[str, Meta(max_length=32_768)]
Argument = Annotated[str, Meta(max_length=131_072, pattern=r"^[^\x00]*$(?!\n)")]
AbsolutePath = Annotated[str, Meta(pattern=r"^/[^\x00]*$(?!\n)", max_length=4_096)]
Hostname = Annotated[
    str,
    Meta(
        pattern=r"^(\*\.)?[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*$(?!\n)",
        max_length=253,
    ),
]

REPLICAS_MAX = 100_000
STANDBY_MAX = 100
"""Instances of one app that wait, parked."""
PROFILE_PATTERN = r"[1-7]g\.[1-9][0-9]{0,3}gb(\+[a-z.]{1,12})?"
DRIVER_PATTERN = r"[0-9]{1,4}(\.[0-9]{1,4}){0,2}"
SHARE_BYTES_MIN = 1 << 20
"""A share of no memory would be one without a limit."""
METRIC_PATTERN = r"^[a-zA-Z_:][a-zA-Z0-9_:]{0,127}$(?!\n)"


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


T = TypeVar("T")


def _default(value: T) -> T:
    """A default that msgspec itself cannot write into a schema; `codec.json_schema` adds it."""
    return field(default_factory=lambda: value)


class Build(_Spec, frozen=True, kw_only=True):
    """How to make the image from the app's directory, on a Debian base. Same inputs, same digest."""

    base: Annotated[str, Meta(pattern=r"^(debian:[a-z]+|scratch)$(?!\n)")] = "debian:bookworm"
    """`scratch` is nothing at all: the image has the files and no more, as for a volume or a program that needs no other."""
    apt: tuple[Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9+.-]+$(?!\n)")], ...] = ()
    pip: tuple[Annotated[str, Meta(pattern=r"^[A-Za-z0-9].*$(?!\n)", max_length=256)], ...] = ()
    files: tuple[str, ...] = (".",)
    """Paths below the app's directory that go into the image's `workdir`."""
    ignore: tuple[str, ...] = (".git", "__pycache__", "*.pyc", ".venv")
    workdir: AbsolutePath = "/app"
    command: tuple[Argument, ...] = ()
    user: str | None = None
    env: dict[EnvName, EnvValue] = {}


class GpuCapability(enum.StrEnum):
    """A class of the driver's libraries that the instance gets to see."""

    COMPUTE = "compute"
    UTILITY = "utility"
    """`nvidia-smi` and the management library."""
    GRAPHICS = "graphics"
    VIDEO = "video"


class GpuTopology(enum.StrEnum):
    """How near the devices of one instance must be to each other."""

    ANY = "any"
    NUMA = "numa"
    """All on one NUMA node."""
    NVLINK = "nvlink"
    """Every two of them joined by NVLink."""


class Gpu(_Spec, frozen=True, kw_only=True):
    """What each instance gets of GPUs: whole devices (`count`), a share of one (`count` below 1), or MIG partitions (`profile`)."""

    model: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    """Words of the device's name, whatever their case: `H100` is found in `NVIDIA H100 80GB HBM3`."""
    vendor: GpuVendor | None = None
    count: Annotated[float, Meta(gt=0, le=64)] = 1
    """Whole devices, or below 1 a share of one device's compute (and of its memory unless `memory` says otherwise)."""
    memory: Bytes | None = None
    """Of whole devices and partitions: what each must have at least. Of a share: what is set aside for it."""
    profile: Annotated[str, Meta(max_length=32)] | None = None
    """A MIG partition such as `1g.10gb`; `count` of them, each on a device in MIG mode."""
    sharing: GpuSharing | None = None
    """How a share is held to its size: `time-slice` (where absent) or `mps`."""
    topology: GpuTopology = GpuTopology.ANY
    driver: Annotated[str, Meta(max_length=32)] | None = None
    """The oldest version of the driver that will do."""
    capabilities: tuple[GpuCapability, ...] = (GpuCapability.COMPUTE, GpuCapability.UTILITY)


class Resources(_Spec, frozen=True, kw_only=True):
    """What each instance may use. All are limits; `cpu` and `memory` are also what placement reserves."""

    cpu: Cores = _default(Cores(0.1))
    memory: Bytes = _default(Bytes(128 << 20))
    disk: Bytes = _default(Bytes(1 << 30))
    """Writable space of the instance's root; images and volumes do not count."""
    pids: Annotated[int, Meta(ge=1, le=4_194_304)] = 1024
    gpu: Gpu | None = None


class PortProtocol(enum.StrEnum):
    HTTP = "http"
    TCP = "tcp"
    UDP = "udp"


class Port(_Spec, frozen=True, kw_only=True):
    """A port that the instance listens on. Nothing else of it can be reached."""

    name: Name = "http"
    port: PortNumber
    protocol: PortProtocol = PortProtocol.HTTP
    http2: bool = False
    """The instance speaks HTTP/2 without TLS (gRPC)."""


class Route(_Spec, frozen=True, kw_only=True):
    """A hostname and path that lead to the app's port."""

    host: Hostname
    path: Annotated[str, Meta(pattern=r"^/", max_length=1024)] = "/"
    port: Name | None = None
    """The name of the port; the first `http` port where absent."""


class HealthKind(enum.StrEnum):
    HTTP = "http"
    TCP = "tcp"
    EXEC = "exec"


class Health(_Spec, frozen=True, kw_only=True):
    """When an instance counts as ready, and when it is restarted."""

    kind: HealthKind = HealthKind.TCP
    port: Name | None = None
    path: Annotated[str, Meta(pattern=r"^/", max_length=1024)] = "/"
    command: tuple[Argument, ...] = ()
    start: Seconds = _default(Seconds(60))
    """How long it may take until the first success; failures before that do not count."""
    interval: Seconds = _default(Seconds(5))
    timeout: Seconds = _default(Seconds(2))
    retries: Annotated[int, Meta(ge=1, le=100)] = 3


class Scale(_Spec, frozen=True, kw_only=True):
    """How many instances there are: `replicas`, or with `max` between the two, as the metric asks for."""

    replicas: Annotated[int, Meta(ge=0, le=REPLICAS_MAX)] = 1
    max: Annotated[int, Meta(ge=1, le=REPLICAS_MAX)] | None = None
    metric: Annotated[str, Meta(pattern=METRIC_PATTERN)] | None = None
    """A metric that the app gives away (`metrics`), such as the depth of its queue."""
    target: Annotated[float, Meta(gt=0)] | None = None
    """As many instances are wanted as make the metric, summed up and divided by them, at most this."""
    down: Seconds = _default(Seconds(60))
    """An instance is taken away once it has not been needed for so long."""
    standby: Annotated[int, Meta(ge=0, le=STANDBY_MAX)] = 0
    """So many more are started, made ready, and parked: frozen, and off their devices. One of them takes the place of an instance
    that is missing."""


class Metrics(_Spec, frozen=True, kw_only=True):
    """Where the node asks each ready instance for its metrics (Prometheus text), along with each heartbeat."""

    port: Name | None = None
    """The name of the port; the first `http` port where absent."""
    path: Annotated[str, Meta(pattern=r"^/", max_length=1024)] = "/metrics"
    names: Annotated[tuple[Annotated[str, Meta(max_length=128)], ...], Meta(max_length=16)] = ()
    """Those that are shown and kept, beside the one that `scale` names."""


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


class Constraint(_Spec, frozen=True, kw_only=True):
    """A hard rule on a node's label; `node`, `site`, `region` and `arch` are labels that every node has."""

    label: Annotated[str, Meta(min_length=1, max_length=253)]
    operator: Operator = Operator.EQUAL
    value: str | tuple[str, ...] = ""


class SpreadBy(enum.StrEnum):
    NODE = "node"
    SITE = "site"
    REGION = "region"


class Affinity(_Spec, frozen=True, kw_only=True):
    """Beside, or away from, the instances of an app or job of the same project; its own name means its own instances."""

    app: Name
    by: Annotated[str, Meta(min_length=1, max_length=253)] = "node"
    """The label whose equal value makes two nodes one place: `node`, `site`, `region` or any other."""
    weight: Annotated[int, Meta(ge=1, le=100)] | None = None
    """None for a rule that must hold; else a wish, and how strong it is."""


GANG_MAX = 500
"""Instances that are placed all at once or not at all: what is written in one transaction."""
NVLINK = "nvlink"
"""As `Placement.together`: one node, and every two devices joined."""
RULES_MAX = 16
"""Constraints, and affinities of either kind, in one spec."""


class Placement(_Spec, frozen=True, kw_only=True):
    regions: tuple[str, ...] = ()
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


class Quota(_Spec, frozen=True, kw_only=True):
    """The most that all placed instances of a project may ask for together, of every release; None for no limit."""

    cpu: Cores | None = None
    memory: Bytes | None = None
    gpu: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    """Whole devices."""
    instances: Annotated[int, Meta(ge=0, le=10_000_000)] | None = None
    weight: Annotated[int, Meta(ge=1, le=1000)] = 1
    """No limit: how much the project counts beside others when there is not room for all that wait (fair shares)."""


class RestartPolicy(enum.StrEnum):
    ALWAYS = "always"
    ON_FAILURE = "on-failure"
    NEVER = "never"


class Restart(_Spec, frozen=True, kw_only=True):
    """What the node does when the process ends: wait `delay * factor**n`, at most `delay_max`, and start it again.

    After `reset` seconds of running, `n` is 0 again.
    """

    policy: RestartPolicy = RestartPolicy.ALWAYS
    delay: Seconds = _default(Seconds(0.2))
    factor: Annotated[float, Meta(ge=1, le=10)] = 2.0
    delay_max: Seconds = _default(Seconds(60))
    reset: Seconds = _default(Seconds(60))


class Stop(_Spec, frozen=True, kw_only=True):
    signal: Annotated[str, Meta(pattern=r"^SIG[A-Z0-9+]{1,10}$(?!\n)")] = "SIGTERM"
    grace: Seconds = _default(Seconds(10))
    """From the signal to SIGKILL."""


class Rollout(_Spec, frozen=True, kw_only=True):
    """How a new release replaces the old: never fewer than `replicas - max_unavailable` ready."""

    max_surge: Annotated[int, Meta(ge=0, le=REPLICAS_MAX)] = 1
    max_unavailable: Annotated[int, Meta(ge=0, le=REPLICAS_MAX)] = 0
    drain: Seconds = _default(Seconds(30))
    """The longest wait for active requests before an instance is told to stop."""
    deadline: Seconds = _default(Seconds(300))
    """Without progress for so long, the rollout has failed, and the old release keeps serving."""


class Volume(_Spec, frozen=True, kw_only=True):
    """A directory of the node, kept across restarts and releases, shared by the app's instances on that node."""

    name: Name
    path: AbsolutePath
    read_only: bool | None = None
    """Where it is left out: false, or with `image` true, and so it is stored."""
    image: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    """Show the files of this image (a model's weights, say), read-only: pulled once per node and shared by all that use it."""

    def __post_init__(self) -> None:
        if self.read_only is None:
            force_setattr(self, "read_only", self.image is not None)


class Workload(_Spec, frozen=True, kw_only=True):
    """What apps and jobs have in common: the image and how to run it."""

    name: Name
    project: Name = "default"
    image: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    build: Build | None = None
    command: tuple[Argument, ...] = ()
    """Replaces the image's entry point and arguments; empty keeps them."""
    env: dict[EnvName, EnvValue] = {}
    secrets: dict[EnvName, Name] = {}
    """Environment variable → name of the project's secret."""
    workdir: AbsolutePath | None = None
    user: str | None = None
    resources: Resources = _default(Resources())
    isolation: Isolation = Isolation.CONTAINER
    runtime: RuntimeName | None = None
    placement: Placement = _default(Placement())
    stop: Stop = _default(Stop())
    volumes: Annotated[tuple[Volume, ...], Meta(max_length=32)] = ()
    read_only_root: bool = False
    labels: dict[str, str] = {}

    @property
    def runtimes(self) -> tuple[RuntimeName, ...]:
        """The runtimes that may run this, preferred first."""
        return (self.runtime,) if self.runtime else RUNTIMES_BY_ISOLATION[self.isolation]


class AppSpec(Workload, frozen=True, kw_only=True, tag_field="kind", tag="app"):
    """A long-running service. A spec may say `kind = "app"`; an assignment tells apps and jobs apart by it."""

    ports: Annotated[tuple[Port, ...], Meta(max_length=32)] = ()
    routes: Annotated[tuple[Route, ...], Meta(max_length=256)] = ()
    """Beside these, every app with an `http` port has `APP.DOMAIN` (in project `default`) or `APP.PROJECT.DOMAIN`."""
    health: Health | None = None
    metrics: Metrics | None = None
    scale: Scale | UnsetType = UNSET
    restart: Restart = _default(Restart())
    rollout: Rollout = _default(Rollout())
    worker: Worker | None = None
    """Modules that workerd runs (isolation `isolate`) instead of a program."""

    def __post_init__(self) -> None:
        if self.worker is not None:
            _complete_worker(self, self.worker)

    def port_named(self, name: str | None) -> Port | None:
        """Return the port called `name`, or without a name the first `http` port."""
        for port in self.ports:
            if port.name == name or (name is None and port.protocol is PortProtocol.HTTP):
                return port
        return None


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


class JobSpec(Workload, frozen=True, kw_only=True, tag_field="kind", tag="job"):
    """Work that runs to completion: `completions` instances with indices 0…, at most `parallelism` at a time."""

    completions: Annotated[int, Meta(ge=1, le=REPLICAS_MAX)] = 1
    parallelism: Annotated[int, Meta(ge=1, le=REPLICAS_MAX)] = 1
    retries: Annotated[int, Meta(ge=0, le=1000)] = 0
    """New tries of each index after a failure; the delay between them doubles from 1 s to 60 s."""
    deadline: Seconds | None = None
    """From the job's creation; what still runs then is stopped, and the job has failed."""
    keep: Seconds = _default(Seconds(86_400))
    """How long a finished job and its logs are kept."""


_TARGET_RESERVED = ("/proc", "/sys", "/dev")


def check_workload(spec: Workload) -> None:
    """Raise Invalid for what the types alone do not rule out, naming the field."""
    if re.fullmatch(NAME_PATTERN, spec.project) is None:
        raise Invalid(f"project: {spec.project!r} is not a name", field="project")
    if spec.image is None and spec.build is None:
        raise Invalid("image: missing; give an image or a build", field="image", mend="add image = '…' or a [build] table")
    try:
        signal_number(spec.stop.signal)
    except Invalid as error:
        raise Invalid(f"stop.signal: {error}", field="stop.signal", mend=error.mend) from None
    if spec.runtime and spec.runtime not in RUNTIMES_BY_ISOLATION[spec.isolation]:
        names = ", ".join(RUNTIMES_BY_ISOLATION[spec.isolation])
        raise Invalid(
            f"runtime: {spec.runtime} does not give isolation '{spec.isolation}'",
            field="runtime",
            mend=f"use one of {names}, or change isolation",
        )
    if spec.resources.memory < 4 << 20:
        raise Invalid("resources.memory: below 4MiB nothing starts", field="resources.memory", mend="ask for 16MiB or more")
    if spec.resources.gpu is not None:
        _check_gpu(spec, spec.resources.gpu)
    _check_unique([volume.name for volume in spec.volumes], "volumes", "name")
    _check_unique([volume.path for volume in spec.volumes], "volumes", "path")
    for index, volume in enumerate(spec.volumes):
        parts = volume.path.split("/")
        if (
            volume.path == "/"
            or ".." in parts
            or any(volume.path == p or volume.path.startswith(p + "/") for p in _TARGET_RESERVED)
        ):
            raise Invalid(f"volumes[{index}].path: cannot mount at {volume.path}", field=f"volumes[{index}].path")
    _check_image_volumes(spec)
    _check_placement(spec)
    both = sorted(set(spec.env) & set(spec.secrets))
    if both:
        raise Invalid(f"secrets: {both[0]} is also set in env", field=f"secrets.{both[0]}")


def _check_image_volumes(spec: Workload) -> None:
    """An image's files cannot be written to, and so nothing can be shown below them either."""
    paths = [PurePosixPath(volume.path) for volume in spec.volumes]
    for index, volume in enumerate(spec.volumes):
        if volume.image is None:
            continue
        if not volume.read_only:
            field = f"volumes[{index}].read_only"
            raise Invalid(f"{field}: the files of an image are always read-only", field=field, mend="leave read_only out")
        for other, path in enumerate(paths):
            if other != index and (path == paths[index] or paths[index] in path.parents):
                field = f"volumes[{other}].path"
                raise Invalid(
                    f"{field}: {volume.path} has the files of the image of volume '{volume.name}', and nothing else can be there",
                    field=field,
                    mend="choose another path",
                )


GPU_RUNTIMES = (
    RuntimeName.RUNC,
    RuntimeName.CRUN,
    RuntimeName.GVISOR,
    RuntimeName.LXC,
    RuntimeName.CLOUD_HYPERVISOR,
    RuntimeName.QEMU,
)
"""Runtimes that can hand a GPU on at all; whether a node's own can is found out there."""


def _check_gpu(spec: Workload, gpu: Gpu) -> None:
    where = "resources.gpu"
    if gpu.profile is not None and re.fullmatch(PROFILE_PATTERN, gpu.profile) is None:
        raise Invalid(
            f"{where}.profile: {gpu.profile!r} is no MIG partition",
            field=f"{where}.profile",
            mend="write slices and memory, as in 1g.10gb or 3g.40gb; `atoll nodes show NODE` lists those of a node",
        )
    if gpu.driver is not None and re.fullmatch(DRIVER_PATTERN, gpu.driver) is None:
        raise Invalid(
            f"{where}.driver: {gpu.driver!r} is no version of a driver",
            field=f"{where}.driver",
            mend="write the oldest that will do, as in 550 or 550.54.15",
        )
    if gpu.memory is not None and gpu.memory < SHARE_BYTES_MIN:
        raise Invalid(f"{where}.memory: below 1MiB nothing runs", field=f"{where}.memory", mend="ask for more, or leave it out")
    if gpu.count > 1 and gpu.count != int(gpu.count):
        raise Invalid(
            f"{where}.count: {gpu.count:g} is neither a whole number nor below 1",
            field=f"{where}.count",
            mend="a share is always of one device: ask for whole devices, or for less than 1",
        )
    if gpu.profile is not None and gpu.count < 1:
        raise Invalid(
            f"{where}.count: a share of a partition ({gpu.profile}) cannot be had",
            field=f"{where}.count",
            mend="ask for a smaller profile, or leave profile out",
        )
    if gpu.sharing in (GpuSharing.MIG, GpuSharing.EXCLUSIVE):
        mend = "set profile instead" if gpu.sharing is GpuSharing.MIG else "leave it out: whole devices are never shared"
        raise Invalid(f"{where}.sharing: '{gpu.sharing}' is no way to share by shares", field=f"{where}.sharing", mend=mend)
    if gpu.sharing is not None and gpu.count >= 1:
        raise Invalid(
            f"{where}.sharing: only a share of a device (count below 1) is shared", field=f"{where}.sharing", mend="leave it out"
        )
    if gpu.topology is not GpuTopology.ANY and (gpu.count < 2 or gpu.profile is not None):
        raise Invalid(
            f"{where}.topology: '{gpu.topology}' is about two whole devices or more", field=f"{where}.topology", mend="leave it out"
        )
    if not any(runtime in GPU_RUNTIMES for runtime in spec.runtimes):
        raise Invalid(
            f"{where}: {' or '.join(spec.runtimes)} cannot hand on a GPU",
            field=where,
            mend=f"use one of the runtimes {', '.join(GPU_RUNTIMES)}",
        )


def _check_placement(spec: Workload) -> None:
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


def _check_gang(spec: Workload, count: int, field: str) -> None:
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


def check_gang_of(spec: AppSpec, replicas: int) -> None:
    """Raise Invalid where an app cannot have so many instances because they are a gang."""
    _check_gang(spec, replicas, "replicas")


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
    _check_unique([port.name for port in spec.ports], "ports", "name")
    _check_unique([f"{port.port}/{'udp' if port.protocol is PortProtocol.UDP else 'tcp'}" for port in spec.ports], "ports", "port")
    _check_unique([f"{route.host}{route.path}" for route in spec.routes], "routes", "host and path")
    for index, route in enumerate(spec.routes):
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
    if spec.rollout.max_surge == 0 and spec.rollout.max_unavailable == 0:
        raise Invalid("rollout.max_surge: 0 together with max_unavailable 0 could never progress", field="rollout.max_surge")
    if spec.metrics is not None:
        _check_metrics(spec, spec.metrics)
    if spec.scale is not UNSET:
        _check_scale(spec, spec.scale)
    else:
        _check_gang(spec, 1, "replicas")


def _check_metrics(spec: AppSpec, metrics: Metrics) -> None:
    port = spec.port_named(metrics.port)
    if port is None or port.protocol is not PortProtocol.HTTP:
        raise Invalid(
            f"metrics.port: no http port {metrics.port or ''}".rstrip(),
            field="metrics.port",
            mend="add it to ports with protocol = 'http'",
        )
    if port.http2:
        raise Invalid(
            f"metrics.port: '{port.name}' speaks HTTP/2 only, and metrics are asked for in HTTP/1.1",
            field="metrics.port",
            mend="give the metrics away on an http port of their own, without http2",
        )
    for index, name in enumerate(metrics.names):
        if re.fullmatch(METRIC_PATTERN, name) is None:
            raise Invalid(
                f"metrics.names[{index}]: {name[:60]!r} is no metric's name",
                field=f"metrics.names[{index}]",
                mend="write it as the app gives it away, without labels: letters, digits, '_' and ':'",
            )
    _check_unique(list(metrics.names), "metrics.names", "name")


def _check_standby(spec: AppSpec, scale: Scale) -> None:
    if scale.standby == 0:
        return
    if scale.replicas == 0:
        raise Invalid(
            "scale.standby: an app with replicas = 0 is stopped, and nothing stands by for it",
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


def _check_scale(spec: AppSpec, scale: Scale) -> None:
    _check_gang(spec, max(scale.replicas, scale.max or 0), "scale.replicas")
    if spec.placement.gang and scale.standby:
        raise Invalid("scale.standby: nothing stands by for a gang", field="scale.standby", mend="leave it out")
    _check_standby(spec, scale)
    given = {"scale.max": scale.max, "scale.metric": scale.metric, "scale.target": scale.target}
    missing = [field for field, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        there = ", ".join(field for field in given if field not in missing)
        raise Invalid(
            f"{missing[0]}: missing; max, metric and target go together",
            field=missing[0],
            mend=f"add it, or leave {there} out for a fixed number of instances",
        )
    if scale.max is not None and scale.max < scale.replicas:
        raise Invalid(
            f"scale.max: {scale.max} is below scale.replicas, {scale.replicas}",
            field="scale.max",
            mend="replicas is the least and max the most that there are",
        )
    if scale.replicas == 0:
        raise Invalid(
            "scale.replicas: 0 leaves nothing that could be asked for its metric",
            field="scale.replicas",
            mend="set 1 or more; 'atoll scale APP 0' stops an app",
        )
    if spec.metrics is None:
        raise Invalid(
            f"scale.metric: nothing says where '{scale.metric}' comes from",
            field="scale.metric",
            mend="add a [metrics] table with the port and path that the app gives its metrics away on",
        )


def check_job(spec: JobSpec) -> None:
    """Raise Invalid for a job spec that contradicts itself, naming the field."""
    check_workload(spec)
    if spec.isolation is Isolation.ISOLATE:
        raise Invalid("isolation: a job cannot be a worker", field="isolation", mend="use container, sandbox or vm")
    if spec.deadline is not None and spec.deadline <= 0:
        raise Invalid("deadline: must be above 0", field="deadline")
    _check_gang(spec, min(spec.parallelism, spec.completions), "parallelism")


def _check_unique(values: list[str], field: str, what: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise Invalid(f"{field}: {what} {value!r} is given twice", field=field)
        seen.add(value)
