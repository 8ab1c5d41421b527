"""What a user asks for of a worker: JavaScript or WebAssembly modules that workerd runs, and what they are bound to."""

from __future__ import annotations

import enum
import ipaddress
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from atoll.model.errors import Invalid
from atoll.model.names import EnvName, Name, PortNumber, SpecRecord
from atoll.model.units import Seconds
from atoll.model.worker_cron import check_worker_crons

if TYPE_CHECKING:
    from atoll.model.spec import AppSpec

PORT = 8080
"""Where a worker listens whose spec has no ports, and where a binding finds another app that says no port."""
ALIVE = "alive"
"""The port by which the node sees that the process still answers, whatever the worker itself answers."""
ALIVE_PORT = 8081
MODULES = "/worker"
"""Where the image has the modules."""
STATE = "/state"
"""Where the volume is seen that holds durable objects and KV."""
STATE_VOLUME = "worker-state"
KV_KEY, QUEUES_KEY, CRON_KEY = "atoll-kv", "atoll-queues", "atoll-cron"
"""The names on disk of all KV namespaces' state, of queues, and of what is known of cron triggers."""
CRON_PATTERN = r"^[0-9A-Za-z*/,#-]{1,64}( [0-9A-Za-z*/,#-]{1,64}){4}$(?!\n)"
SERVICES = "services"
"""The directory, in that of the node's ingress, of the socket by which workers reach other apps."""
SERVICES_SOCKET = "http.sock"
SERVICE_HEADER = "x-atoll-service"
"""Says on that socket which app a request is for: `PROJECT/APP/PORT`. workerd sets it, and a worker cannot."""
EGRESS_PUBLIC = "public"
MEMORY_BYTES_MIN = 64 << 20
SHARED_MEMORY_BYTES_MIN = 16 << 20
"""Of a worker that shares a process, which is not counted in it."""
VARS_BYTES_MAX = 128 << 10
BINDINGS_MAX = 256
BATCH_WAIT_S_MAX = 60
RETRY_DELAY_S_MAX = 12 * 3600
MAIN_SUFFIXES = (".js", ".mjs")

ClassName = Annotated[str, Meta(pattern=r"^[A-Za-z_$][A-Za-z0-9_$]{0,127}$(?!\n)", description="the name of a class in JavaScript")]
KEY_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$(?!\n)"
Key = Annotated[str, Meta(pattern=KEY_PATTERN, description="letters, digits, '_', '.' and '-', at most 128, no '.' or '-' first")]
"""A part of a path on disk, so neither hidden nor leading elsewhere."""
RelativePath = Annotated[
    str,
    Meta(pattern=r"^[^/\x00-\x1f\x7f][^\x00-\x1f\x7f]*$(?!\n)", description="a path below the app's directory", max_length=1024),
]


class ServiceBinding(SpecRecord, frozen=True, kw_only=True):
    """`env.BINDING.fetch(…)` goes to another app of the project, wherever it runs."""

    binding: EnvName
    app: Name
    port: PortNumber = PORT
    """The number of the `http` port that the app listens on."""


class DurableObject(SpecRecord, frozen=True, kw_only=True):
    """A class of the worker, of which each object exists once and keeps its state on the node's disk."""

    binding: EnvName
    class_name: ClassName
    key: Key | None = None
    """The name of its state on disk: keep the old one when a class is renamed. The class's name where absent."""
    sql: bool = True
    """Whether `ctx.storage.sql` is there."""


class KvNamespace(SpecRecord, frozen=True, kw_only=True):
    """Keys and values on the node's disk."""

    binding: EnvName
    id: Key | None = None
    """Which of the worker's namespaces; the binding's name where absent."""


class Queue(SpecRecord, frozen=True, kw_only=True):
    """Messages that the worker sends to itself, each delivered to its handler `queue` at least once, kept on the node's disk."""

    queue: Key
    binding: EnvName | None = None
    """What it sends by; none where it only gets what another of its queues gave up."""
    batch_size: Annotated[int, Meta(ge=1, le=100)] = 10
    batch_wait: Seconds = msgspec.field(default_factory=lambda: Seconds(5))
    """How long a batch waits to be full, at most a minute."""
    retries: Annotated[int, Meta(ge=0, le=100)] = 3
    retry_delay: Seconds = msgspec.field(default_factory=lambda: Seconds(0))
    dead_letter: Key | None = None
    """Another of the worker's queues, which gets what was tried in vain; it is dropped where absent."""
    concurrency: Annotated[int, Meta(ge=0, le=1024)] = 0
    """How many batches are under way at once; 0 for no limit."""


class HtmlHandling(enum.StrEnum):
    """What becomes of `.html` and of a slash at the end in the path of a file of HTML."""

    AUTO = "auto-trailing-slash"
    FORCE = "force-trailing-slash"
    DROP = "drop-trailing-slash"
    NONE = "none"


class NotFoundHandling(enum.StrEnum):
    """What is answered to a path that is no file, where the worker is not asked."""

    NONE = "none"
    PAGE = "404-page"
    SINGLE_PAGE = "single-page-application"


class Assets(SpecRecord, frozen=True, kw_only=True):
    """Files that are served as they are, before the worker is asked."""

    directory: RelativePath
    """Where they are, below the app's directory; none of them is a module."""
    binding: EnvName | None = None
    """`env.BINDING.fetch(request)` answers with a file."""
    html: HtmlHandling = HtmlHandling.AUTO
    not_found: NotFoundHandling = NotFoundHandling.NONE
    worker_first: Annotated[tuple[Annotated[str, Meta(max_length=100)], ...], Meta(max_length=100)] = ()
    """Paths for which the worker is asked although there is a file, such as `/api/*`; `/*` for all."""


class Worker(SpecRecord, frozen=True, kw_only=True):
    """Modules, and what they are given as `env`: these, and the spec's `env` and `secrets` as text."""

    main: RelativePath
    """The module with the handlers, below the app's directory. Modules are named by their path, and import each other by it."""
    files: tuple[str, ...] = (".",)
    """Paths below the app's directory where the modules are."""
    ignore: tuple[str, ...] = (".*", "node_modules", "atoll.*", "wrangler.*", "package*.json", "*.md", "*.map", "*.ts")
    compatibility_date: Annotated[
        str, Meta(pattern=r"^20[0-9]{2}-[01][0-9]-[0-3][0-9]$(?!\n)", description="a date such as 2026-11-27")
    ]
    """workerd behaves as it did on that day."""
    compatibility_flags: Annotated[
        tuple[
            Annotated[str, Meta(pattern=r"^[a-z0-9_]{1,64}$(?!\n)", description="lower-case letters, digits and '_', at most 64")],
            ...,
        ],
        Meta(max_length=64),
    ] = ()
    vars: Annotated[dict[EnvName, Any], Meta(max_length=BINDINGS_MAX)] = {}
    """Name → any value that JSON has. Not for secrets: specs are stored and shown."""
    services: Annotated[tuple[ServiceBinding, ...], Meta(max_length=64)] = ()
    durable_objects: Annotated[tuple[DurableObject, ...], Meta(max_length=64)] = ()
    kv: Annotated[tuple[KvNamespace, ...], Meta(max_length=64)] = ()
    queues: Annotated[tuple[Queue, ...], Meta(max_length=64)] = ()
    crons: Annotated[
        tuple[Annotated[str, Meta(pattern=CRON_PATTERN, description="five fields such as */5 * * * *")], ...], Meta(max_length=32)
    ] = ()
    """When its handler `scheduled` is called: minute, hour, day, month, weekday (1 to 7 from Sunday), in UTC."""
    assets: Assets | None = None
    egress: Annotated[tuple[str, ...], Meta(max_length=64)] = (EGRESS_PUBLIC,)
    """Where `fetch` and `connect` may go: `public`, or networks such as `203.0.113.0/24`; empty for nowhere."""
    shared: bool = False
    """Whether it shares a process with the other such workers of its project that are on the same node."""

    @property
    def stateful(self) -> bool:
        """Whether it keeps state on disk, and can then run only once."""
        return bool(self.durable_objects or self.kv or self.queues or self.crons)


def check_worker(spec: AppSpec, worker: Worker) -> None:
    """Raise Invalid for a worker's spec that contradicts itself or asks for what workerd has not, naming the field."""
    _check_main(worker)
    _check_bindings(spec, worker)
    _check_queues(worker)
    check_worker_crons(worker.crons, field="worker.crons")
    if worker.assets is not None:
        _check_assets(worker, worker.assets)
    _check_egress(worker)
    for field, given in {"command": spec.command, "workdir": spec.workdir, "user": spec.user}.items():
        if given:
            raise Invalid(f"{field}: a worker has none; its modules are what runs", field=field, mend="leave it out")
    if spec.build is not None and (spec.build.base != "scratch" or spec.build.workdir != MODULES or spec.build.command):
        raise Invalid(
            "build: a worker's image has its modules and nothing else", field="build", mend="leave [build] out; use worker.files"
        )
    for index, volume in enumerate(spec.volumes):
        if volume.path != STATE or volume.image is not None or volume.read_only:
            field = f"volumes[{index}].path"
            raise Invalid(f"{field}: a worker sees no volume but that of its state, at {STATE}", field=field, mend="leave it out")
    least, what = (SHARED_MEMORY_BYTES_MIN, "") if worker.shared else (MEMORY_BYTES_MIN, ", workerd's own included")
    if spec.resources.memory < least:
        raise Invalid(
            f"resources.memory: a worker needs {least >> 20}MiB{what}",
            field="resources.memory",
            mend=f"ask for {least >> 20}MiB or more",
        )
    if spec.health is not None and spec.health.kind.value == "exec":
        raise Invalid("health.kind: no command runs beside a worker", field="health.kind", mend="use http or tcp")
    _check_ports(spec)
    if worker.stateful:
        _check_single(spec)
    if worker.shared:
        _check_shared(spec, worker)


def _check_main(worker: Worker) -> None:
    path = PurePosixPath(worker.main)
    if ".." in path.parts or str(path) != worker.main.removeprefix("./"):
        raise Invalid(
            f"worker.main: {worker.main!r} leads elsewhere", field="worker.main", mend="name a file below the app's directory"
        )
    if path.suffix in (".ts", ".tsx", ".jsx", ".mts"):
        raise Invalid(
            f"worker.main: {worker.main} must be made into JavaScript first",
            field="worker.main",
            mend=f"bundle it, e.g. `npx esbuild {worker.main} --bundle --format=esm --outfile=dist/index.js`, and name the result",
        )
    if path.suffix not in MAIN_SUFFIXES:
        raise Invalid(
            f"worker.main: {worker.main} is no ES module",
            field="worker.main",
            mend=f"name a file that ends with {' or '.join(MAIN_SUFFIXES)}",
        )


def _check_bindings(spec: AppSpec, worker: Worker) -> None:
    taken: dict[str, str] = {name: f"env.{name}" for name in spec.env} | {name: f"secrets.{name}" for name in spec.secrets}
    given = [(f"worker.vars.{name}", name) for name in worker.vars]
    for table in ("services", "durable_objects", "kv", "queues"):
        each_binding = [(index, each.binding) for index, each in enumerate(getattr(worker, table))]
        given += [(f"worker.{table}[{index}].binding", binding) for index, binding in each_binding if binding is not None]
    if worker.assets is not None and worker.assets.binding is not None:
        given.append(("worker.assets.binding", worker.assets.binding))
    for field, name in given:
        if name.startswith("ATOLL_"):
            raise Invalid(f"{field}: names that begin with ATOLL_ are Atoll's own", field=field, mend="choose another name")
        if name in taken:
            raise Invalid(f"{field}: {name} is also {taken[name]}", field=field, mend="give each binding a name of its own")
        taken[name] = field
    if len(taken) > BINDINGS_MAX:
        raise Invalid(f"worker: {len(taken)} bindings; at most {BINDINGS_MAX}", field="worker")
    try:
        size = len(msgspec.json.encode(worker.vars))
    except (TypeError, RecursionError):
        raise Invalid("worker.vars: a value that JSON cannot hold", field="worker.vars", mend="write dates as text") from None
    if size > VARS_BYTES_MAX:
        raise Invalid(
            f"worker.vars: {size} bytes of JSON; at most {VARS_BYTES_MAX}", field="worker.vars", mend="put them into a .json module"
        )
    for table, keys in (
        ("durable_objects", [each.key or each.class_name for each in worker.durable_objects]),
        ("kv", [each.id or each.binding for each in worker.kv]),
    ):
        for index, key in enumerate(keys):
            if table == "durable_objects" and (
                re.fullmatch(KEY_PATTERN, key) is None or key in (KV_KEY, QUEUES_KEY, CRON_KEY) or key in keys[:index]
            ):
                field = f"worker.{table}[{index}].key"
                raise Invalid(f"{field}: {key!r} cannot name this state, or names another", field=field, mend="set another key")


def _check_assets(worker: Worker, assets: Assets) -> None:
    path, field = PurePosixPath(assets.directory), "worker.assets.directory"
    if ".." in path.parts or str(path) != assets.directory.removeprefix("./").rstrip("/") or str(path) == ".":
        raise Invalid(f"{field}: {assets.directory!r} is no directory below the app's", field=field, mend="write e.g. public")
    if PurePosixPath(worker.main).is_relative_to(path):
        raise Invalid(f"{field}: worker.main is in it, and would be served", field=field, mend="move one of them elsewhere")


def _check_queues(worker: Worker) -> None:
    names = [queue.queue for queue in worker.queues]
    for index, queue in enumerate(worker.queues):
        field = f"worker.queues[{index}]"
        if queue.queue in names[:index]:
            raise Invalid(f"{field}.queue: {queue.queue} is there already", field=f"{field}.queue", mend="say all of a queue once")
        if queue.dead_letter is not None and (queue.dead_letter not in names or queue.dead_letter == queue.queue):
            raise Invalid(
                f"{field}.dead_letter: {queue.dead_letter} is no other queue of this worker",
                field=f"{field}.dead_letter",
                mend="add it to worker.queues",
            )
        if queue.batch_wait > BATCH_WAIT_S_MAX:
            raise Invalid(f"{field}.batch_wait: at most {BATCH_WAIT_S_MAX} s", field=f"{field}.batch_wait", mend="say less")
        if queue.retry_delay > RETRY_DELAY_S_MAX:
            raise Invalid(f"{field}.retry_delay: at most 12 hours", field=f"{field}.retry_delay", mend="say less")


def _check_egress(worker: Worker) -> None:
    for index, text in enumerate(worker.egress):
        if text == EGRESS_PUBLIC:
            continue
        field = f"worker.egress[{index}]"
        try:
            ipaddress.ip_network(text)
        except ValueError as error:
            raise Invalid(
                f"{field}: {text!r} is neither 'public' nor a network: {error}", field=field, mend="write e.g. 203.0.113.0/24"
            ) from None


def _check_ports(spec: AppSpec) -> None:
    http = [(index, port) for index, port in enumerate(spec.ports) if port.name != ALIVE]
    if len(http) != 1 or http[0][1].protocol.value != "http":
        raise Invalid("ports: a worker listens on one port, which speaks http", field="ports", mend=f"leave out all but {PORT}")
    index, port = http[0]
    if port.http2:
        field = f"ports[{index}].http2"
        raise Invalid(f"{field}: workerd speaks HTTP/1.1", field=field, mend="leave it out; the ingress speaks HTTP/2 to clients")


def _check_single(spec: AppSpec) -> None:
    """Two processes would each have every object once."""
    scale = spec.scale
    if not isinstance(scale, msgspec.UnsetType) and (scale.replicas > 1 or scale.max is not None):
        field = "scale.replicas" if scale.max is None else "scale.max"
        raise Invalid(
            f"{field}: a worker with durable objects, KV, queues or crons runs once, since its state is on one disk",
            field=field,
            mend="set replicas = 1; put what needs no state into a worker of its own, bound to this one",
        )
    if spec.rollout.max_surge:
        raise Invalid(
            "rollout.max_surge: the old process must let go of the state before the new one starts",
            field="rollout.max_surge",
            mend="set max_surge = 0 and max_unavailable = 1, or leave [rollout] out",
        )


def _check_shared(spec: AppSpec, worker: Worker) -> None:
    """A process has one way out, and is replaced by another that runs beside it for a while."""
    if worker.stateful:
        raise Invalid(
            "worker.shared: a worker with durable objects, KV, queues or crons has a process of its own, since its state has",
            field="worker.shared",
            mend="leave shared out; put what needs no state into a worker of its own, bound to this one",
        )
    if worker.egress not in ((), (EGRESS_PUBLIC,)):
        raise Invalid(
            "worker.egress: workers that share a process go to 'public', or nowhere: they leave the node by one address",
            field="worker.egress",
            mend="leave egress or shared out",
        )
    if spec.network is not None and spec.network.egress is not None:
        raise Invalid(
            "network.egress: workers that share a process leave the node by one address, which these rules cannot tell apart",
            field="network.egress",
            mend="use worker.egress, or leave shared out",
        )
    for name in ("bandwidth", "packets"):
        if spec.network is not None and getattr(spec.network, name) is not None:
            raise Invalid(
                f"network.{name}: workers that share a process send by one network, so that it would hold for none of them alone",
                field=f"network.{name}",
                mend=f"leave {name} or worker.shared out",
            )
