"""An API in memory for tests of clients and of the CLI: the same calls, records and errors, with a world that obeys at once.

What is deployed is ready right away, unless `failing` says that it is not; jobs succeed. Pass it to `Client` as its transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from msgspec.structs import replace

from atoll.model import codec
from atoll.model.errors import AtollError, Compacted, Conflict, Invalid, NotFound, StaleRevision, Unavailable
from atoll.model.ports.control_plane import Channel
from atoll.model.records import (
    App,
    AppPhase,
    AppStatus,
    Event,
    Exit,
    Heartbeat,
    Ingress,
    Instance,
    Job,
    JobPhase,
    JobStatus,
    Node,
    NodePolicy,
    OwnerKind,
    Project,
    Release,
    Role,
    Secret,
    Severity,
    Status,
    Usage,
)
from atoll.model.spec import AppSpec, JobSpec, RuntimeName, check_app, check_job
from atoll.model.states import Phase
from atoll.model.streams import ErrorBody, ExecOptions, FilesOptions, LogLine, LogOptions
from atoll.model.views import (
    AppView,
    ErrorAnswer,
    Info,
    InstanceView,
    JobView,
    NodeView,
    Page,
    RollbackRequest,
    ScaleRequest,
    SecretRequest,
    SecretView,
    TokenRequest,
    TokenView,
    WatchLine,
)
from atoll.sdk import fake_streams
from atoll.sdk.transport import REQUEST_S, SILENCE_S, Answer

START_AT = 1_700_000_000.0
INGRESS_PORT = 8080


class FakeApi:
    """Implements `transport.Transport`. Everything that it holds may be read and changed by a test."""

    def __init__(self) -> None:
        self.revision = 0
        self.now = START_AT
        self.records: dict[tuple[str, str], tuple[Any, int]] = {}
        """(kind, key) → record and its revision."""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        """Method, path and headers of each request."""
        self.failing: dict[str, str] = {}
        """App or job → why its instances fail."""
        self.logs: dict[str, list[LogLine]] = {}
        self.files: dict[str, bytes] = {}
        """Instance and path → tar stream: what `get` answers, and what `put` left."""
        self.usage: list[Usage] = []
        self.down: AtollError | None = None
        """Raised by every call, as when nothing answers."""
        self._answers: dict[str, Answer] = {}
        self._watchers: set[asyncio.Queue[WatchLine | None]] = set()
        self._tokens: dict[str, TokenView] = {}
        self.put("projects", "default", Project(name="default", created_at=self.now))

    # The store

    def put(self, kind: str, key: str, record: Any) -> int:
        """Write a record and tell the watchers."""
        self.revision += 1
        self.records[kind, key] = (record, self.revision)
        self._tell(WatchLine(revision=self.revision, kind=kind, key=key, record=codec.to_plain(record)))
        return self.revision

    def remove(self, kind: str, key: str) -> None:
        if self.records.pop((kind, key), None) is not None:
            self.revision += 1
            self._tell(WatchLine(revision=self.revision, kind=kind, key=key))

    def get(self, kind: str, key: str) -> tuple[Any, int]:
        """Raises NotFound."""
        try:
            return self.records[kind, key]
        except KeyError:
            raise NotFound(f"no {kind.rstrip('s')} {key.rpartition('/')[2]!r}") from None

    def under(self, kind: str, prefix: str = "") -> list[tuple[Any, int]]:
        return [found for (of, key), found in sorted(self.records.items()) if of == kind and key.startswith(prefix)]

    def event(self, subject: str, code: str, message: str, *, project: str = "default", severity: Severity = Severity.INFO) -> None:
        self.now += 1
        id = f"{int(self.now)}-{self.revision:06d}"
        record = Event(id=id, at=self.now, project=project, subject=subject, code=code, message=message, severity=severity)
        self.put("events", f"{project}/{id}", record)

    def cut_watches(self) -> None:
        """Break every watch's connection."""
        for queue in self._watchers:
            queue.put_nowait(None)

    def _tell(self, line: WatchLine) -> None:
        for queue in self._watchers:
            queue.put_nowait(line)

    # The transport

    async def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"", timeout_s: float = REQUEST_S
    ) -> Answer:
        headers = dict(headers or {})
        self.requests.append((method, path, headers))
        key = headers.get("Idempotency-Key", "")
        if key in self._answers:
            return self._answers[key]
        try:
            self._check_up()
            segments, query = _parts(path)
            content = self._handle(method, segments, query, headers, body)
            answer = Answer(200, {}, b"" if content is None else codec.encode(content))
        except Unavailable:
            raise
        except AtollError as error:
            told = ErrorBody(code=error.code, message=error.message, mend=error.mend, field=error.field)
            answer = Answer(error.status, {}, codec.encode(ErrorAnswer(told)))
        if key:
            self._answers[key] = answer
        return answer

    @asynccontextmanager
    async def lines(self, path: str, *, silence_s: float = SILENCE_S) -> AsyncIterator[AsyncIterator[bytes]]:
        self._check_up()
        segments, query = _parts(path)
        if segments != ["watch"]:
            raise NotFound(f"no stream {path}")
        if query.get("from") == "-1":
            raise Compacted("too old")
        queue: asyncio.Queue[WatchLine | None] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            yield self._watch(query, queue)
        finally:
            self._watchers.discard(queue)

    async def _watch(self, query: dict[str, str], queue: asyncio.Queue[WatchLine | None]) -> AsyncIterator[bytes]:
        kinds = query["kinds"].split(",")
        project = query.get("project")

        def wanted(kind: str, key: str) -> bool:
            return kind in kinds and (project is None or key.startswith(f"{project}/"))

        begin = int(query.get("from", "0"))
        for (kind, key), (record, revision) in list(self.records.items()):
            if wanted(kind, key) and revision >= begin:
                yield codec.encode(WatchLine(revision=revision, kind=kind, key=key, record=codec.to_plain(record)))
        yield codec.encode(WatchLine(revision=self.revision))
        while (line := await queue.get()) is not None:
            if wanted(line.kind or "", line.key or ""):
                yield codec.encode(line)
        raise Unavailable("the connection was cut")

    async def channel(self, path: str) -> Channel:
        self._check_up()
        segments, query = _parts(path)
        match segments:
            case ["projects", project, "instances", id, "exec"]:
                self.get("instances", f"{project}/{id}")
                return fake_streams.exec_channel(codec.decode(query["options"].encode(), ExecOptions))
            case ["projects", project, "instances", id, "logs"]:
                self.get("instances", f"{project}/{id}")
                return fake_streams.log_channel(self.logs.get(id, []), codec.decode(query["options"].encode(), LogOptions))
            case ["projects", project, "instances", id, "files"]:
                self.get("instances", f"{project}/{id}")
                where = f"{id}:{codec.decode(query['options'].encode(), FilesOptions).path}"
                return fake_streams.files_channel(self.files, where, query["mode"])
            case _:
                raise NotFound(f"no stream {path}")

    async def close(self) -> None: ...

    def _check_up(self) -> None:
        if self.down is not None:
            raise self.down

    # The calls

    def _handle(self, method: str, segments: list[str], query: dict[str, str], headers: Mapping[str, str], body: bytes) -> object:
        match (method, segments):
            case "GET", ["info"]:
                ingress = Ingress(name="local", http_port=INGRESS_PORT)
                return Info(version="fake", cell="main", revision=self.revision, store="memory", ingresses=(ingress,))
            case "GET", ["schema", "app" | "job" as kind]:
                return codec.json_schema(AppSpec if kind == "app" else JobSpec)
            case "GET", ["projects"]:
                return self._page([record for record, _ in self.under("projects")])
            case "PUT", ["projects", name]:
                record = Project(name=name, created_at=self.now)
                self.put("projects", name, record)
                return record
            case _, ["projects", project, "apps", *rest]:
                return self._apps(method, project, rest, headers, body)
            case _, ["projects", project, "jobs", *rest]:
                return self._jobs(method, project, rest, body)
            case "GET", ["projects", project, "instances"]:
                return self._page(self._instances(project, query))
            case _, ["projects", project, "instances", id, *rest]:
                if rest == ["stop"]:
                    self.event(f"instance/{id}", "stop", "told to stop by the user", project=project)
                return self._instance_view(project, id)
            case _, ["projects", project, "secrets", *rest]:
                return self._secrets(method, project, rest, body)
            case "GET", ["projects", project, "events"]:
                return self._events(project, query)
            case _, ["nodes", *rest]:
                return self._nodes(method, rest)
            case "GET", ["usage"]:
                return self.usage
            case _, ["tokens", *rest]:
                return self._token_calls(method, rest, body)
            case _:
                raise NotFound(f"{method} /v1/{'/'.join(segments)}: no such call")

    def _page(self, items: list[Any]) -> Page[Any]:
        return Page(items=tuple(items), revision=self.revision)

    def _apps(self, method: str, project: str, rest: list[str], headers: Mapping[str, str], body: bytes) -> object:
        match (method, rest):
            case "GET", []:
                return self._page([self._app_view(project, record.name) for record, _ in self.under("apps", f"{project}/")])
            case "GET", [name]:
                return self._app_view(project, name)
            case "PUT", [name]:
                spec = codec.decode(body, AppSpec)
                check_app(spec)
                return self._put_app(project, name, spec, headers)
            case "DELETE", [name]:
                self.get("apps", f"{project}/{name}")
                for kind in ("apps", "app-statuses"):
                    self.remove(kind, f"{project}/{name}")
                self._stop_all(project, name)
                return {}
            case "POST", [name, "scale"]:
                app, _ = self.get("apps", f"{project}/{name}")
                self.put("apps", f"{project}/{name}", replace(app, replicas=codec.decode(body, ScaleRequest).replicas))
            case "POST", [name, "restart"]:
                app, _ = self.get("apps", f"{project}/{name}")
                self.put("apps", f"{project}/{name}", replace(app, generation=app.generation + 1))
            case "POST", [name, "rollback"]:
                app, _ = self.get("apps", f"{project}/{name}")
                wanted = codec.decode(body, RollbackRequest).release or app.release - 1
                release, _ = self.get("releases", f"{project}/{name}/{wanted:08d}")
                self.put("apps", f"{project}/{name}", replace(app, spec=release.spec, release=wanted, updated_at=self.now))
            case "GET", [name, "releases"]:
                self.get("apps", f"{project}/{name}")
                return self._page([record for record, _ in reversed(self.under("releases", f"{project}/{name}/"))])
            case _:
                raise NotFound("no such call")
        self.settle(project, name)
        return self._app_view(project, name)

    def _put_app(self, project: str, name: str, spec: AppSpec, headers: Mapping[str, str]) -> AppView:
        key = f"{project}/{name}"
        old, revision = self.records.get(("apps", key), (None, 0))
        if "If-Match" in headers and headers["If-Match"].strip('"') != str(revision):
            raise StaleRevision(f"app '{name}' has changed since it was read", mend="read it again")
        if old is None or old.spec != spec:
            number = 1 if old is None else old.release + 1
            replicas = spec.scale.replicas if spec.scale else (old.replicas if old else 1)
            created = old.created_at if old else self.now
            app = App(
                project=project, name=name, spec=spec, release=number, replicas=replicas, created_at=created, updated_at=self.now
            )
            self.put("apps", key, app)
            release = Release(project=project, app=name, number=number, spec=spec, created_at=self.now, author="admin")
            self.put("releases", f"{key}/{number:08d}", release)
            self.settle(project, name)
        return self._app_view(project, name)

    def settle(self, project: str, name: str) -> None:
        """Bring instances and status of an app to what its record wants, as controllers and agents would in time."""
        key = f"{project}/{name}"
        app, _ = self.get("apps", key)
        why = self.failing.get(name)
        if not why:
            self._stop_all(project, name)
        for index in range(app.replicas):
            id = f"{name}-{app.release}{app.generation}{index}abc"
            instance = Instance(
                id=id,
                project=project,
                owner_kind=OwnerKind.APP,
                owner=name,
                release=app.release,
                generation=app.generation,
                node="n1",
                runtime=RuntimeName.RUNC,
                created_at=self.now,
            )
            self.put("instances", f"{project}/{id}", instance)
            status = Status(instance=id, project=project, node="n1", phase=Phase.RUNNING, ready=True, pid=100 + index)
            status = replace(status, address="10.64.0.2", started_at=self.now, phase_at=self.now, ready_at=self.now)
            if why:
                ended = Exit(code=1, at=self.now)
                status = Status(instance=id, project=project, node="n1", phase=Phase.FAILED, message=why, exit=ended)
            self.put("statuses", f"{project}/{id}", status)
        phase = AppPhase.FAILED if why else AppPhase.RUNNING if app.replicas else AppPhase.STOPPED
        ready = 0 if why else app.replicas
        told = AppStatus(
            project=project,
            name=name,
            phase=phase,
            release=app.release,
            ready=ready,
            updated=ready,
            total=app.replicas,
            message=why or "",
        )
        self.put("app-statuses", key, told)
        self.event(f"app/{name}", "failed" if why else "rolled-out", why or f"release {app.release} serves", project=project)

    def _stop_all(self, project: str, owner: str) -> None:
        for instance, _ in self.under("instances", f"{project}/"):
            if instance.owner == owner:
                self.remove("instances", f"{project}/{instance.id}")
                self.remove("statuses", f"{project}/{instance.id}")

    def _app_view(self, project: str, name: str) -> AppView:
        app, revision = self.get("apps", f"{project}/{name}")
        status, _ = self.records.get(("app-statuses", f"{project}/{name}"), (None, 0))
        urls = (f"http://{name}.localhost:{INGRESS_PORT}",) if app.spec.port_named(None) else ()
        return AppView(app=app, status=status, revision=revision, urls=urls)

    def _instances(self, project: str, query: dict[str, str]) -> list[InstanceView]:
        wanted = query.get("app") or query.get("job")
        found = [instance for instance, _ in self.under("instances", f"{project}/") if wanted in (None, instance.owner)]
        return [self._instance_view(project, instance.id) for instance in found]

    def _instance_view(self, project: str, id: str) -> InstanceView:
        instance, revision = self.get("instances", f"{project}/{id}")
        status, _ = self.records.get(("statuses", f"{project}/{id}"), (None, 0))
        return InstanceView(instance=instance, status=status, revision=revision)

    def _jobs(self, method: str, project: str, rest: list[str], body: bytes) -> object:
        match (method, rest):
            case "GET", []:
                return self._page([self._job_view(project, record.name) for record, _ in self.under("jobs", f"{project}/")])
            case "POST", []:
                spec = codec.decode(body, JobSpec)
                check_job(spec)
                if ("jobs", f"{project}/{spec.name}") in self.records:
                    raise Conflict(f"job '{spec.name}' exists already", mend="give it another name, or delete it first")
                self.put("jobs", f"{project}/{spec.name}", Job(project=project, name=spec.name, spec=spec, created_at=self.now))
                self._finish(project, spec, JobPhase.FAILED if spec.name in self.failing else JobPhase.SUCCEEDED)
                return self._job_view(project, spec.name)
            case "GET", [name]:
                return self._job_view(project, name)
            case "POST", [name, "cancel"]:
                job, _ = self.get("jobs", f"{project}/{name}")
                self.put("jobs", f"{project}/{name}", replace(job, cancelled=True))
                self._finish(project, job.spec, JobPhase.CANCELLED)
                return self._job_view(project, name)
            case "DELETE", [name]:
                self.get("jobs", f"{project}/{name}")
                self.remove("jobs", f"{project}/{name}")
                return {}
            case _:
                raise NotFound("no such call")

    def _finish(self, project: str, spec: JobSpec, phase: JobPhase) -> None:
        id = f"{spec.name}-0abc"
        instance = Instance(
            id=id,
            project=project,
            owner_kind=OwnerKind.JOB,
            owner=spec.name,
            node="n1",
            runtime=RuntimeName.RUNC,
            created_at=self.now,
        )
        self.put("instances", f"{project}/{id}", instance)
        ok = phase is JobPhase.SUCCEEDED
        ended = Exit(code=0 if ok else 1, at=self.now + 2)
        result = Phase.SUCCEEDED if ok else Phase.FAILED
        self.put("statuses", f"{project}/{id}", Status(instance=id, project=project, node="n1", phase=result, exit=ended))
        status = JobStatus(project=project, name=spec.name, phase=phase, message=self.failing.get(spec.name, ""))
        status = replace(status, succeeded=(0,) if ok else (), started_at=self.now, finished_at=self.now + 2)
        self.put("job-statuses", f"{project}/{spec.name}", status)

    def _job_view(self, project: str, name: str) -> JobView:
        job, revision = self.get("jobs", f"{project}/{name}")
        status, _ = self.records.get(("job-statuses", f"{project}/{name}"), (None, 0))
        return JobView(job=job, status=status, revision=revision)

    def _secrets(self, method: str, project: str, rest: list[str], body: bytes) -> object:
        def view(secret: Secret) -> SecretView:
            return SecretView(project=project, name=secret.name, version=secret.version, updated_at=secret.updated_at)

        match (method, rest):
            case "GET", []:
                return self._page([view(secret) for secret, _ in self.under("secrets", f"{project}/")])
            case "PUT", [name]:
                old, _ = self.records.get(("secrets", f"{project}/{name}"), (None, 0))
                sealed = codec.decode(body, SecretRequest).value.encode()
                version = old.version + 1 if old else 1
                secret = Secret(project=project, name=name, sealed=sealed, version=version, updated_at=self.now)
                self.put("secrets", f"{project}/{name}", secret)
                return view(secret)
            case "DELETE", [name]:
                self.get("secrets", f"{project}/{name}")
                self.remove("secrets", f"{project}/{name}")
                return {}
            case _:
                raise NotFound("no such call")

    def _events(self, project: str, query: dict[str, str]) -> Page[Event]:
        subject, limit, after = query.get("subject"), int(query.get("limit", "100")), query.get("after")
        found = [event for event, _ in reversed(self.under("events", f"{project}/")) if subject in (None, event.subject)]
        found = [event for event in found if after is None or event.id < after]
        rest = found[limit:]
        return Page(items=tuple(found[:limit]), revision=self.revision, next=found[limit - 1].id if rest else None)

    def _nodes(self, method: str, rest: list[str]) -> object:
        match (method, rest):
            case "GET", []:
                return self._page([self._node_view(node.name) for node, _ in self.under("nodes")])
            case "GET", [name]:
                return self._node_view(name)
            case "POST", [name, "cordon" | "uncordon" as verb]:
                self.get("nodes", name)
                self.put("node-policies", name, NodePolicy(name=name, cordoned=verb == "cordon"))
                return self._node_view(name)
            case _:
                raise NotFound("no such call")

    def _node_view(self, name: str) -> NodeView:
        node, revision = self.get("nodes", name)
        assert isinstance(node, Node)  # noqa: S101 - a test put it there
        policy, _ = self.records.get(("node-policies", name), (None, 0))
        beat = Heartbeat(node=name, at=self.now, cpu_milli=250, memory_bytes=1 << 30)
        return NodeView(
            node=node, policy=policy, heartbeat=beat, allocated_cpu_milli=500, allocated_memory_bytes=1 << 28, revision=revision
        )

    def _token_calls(self, method: str, rest: list[str], body: bytes) -> object:
        match (method, rest):
            case "GET", []:
                return self._page(list(self._tokens.values()))
            case "POST", []:
                request = codec.decode(body, TokenRequest)
                if request.role in (Role.AGENT, Role.INGRESS) and not request.subject:
                    raise Invalid("subject: missing", field="subject")
                id = f"tok{len(self._tokens) + 1}"
                view = TokenView(id=id, name=request.name, role=request.role, project=request.project, created_at=self.now)
                self._tokens[id] = view
                return replace(view, token=f"atoll_{id}_value")
            case "DELETE", [id]:
                if self._tokens.pop(id, None) is None:
                    raise NotFound(f"no token {id!r}")
                return {}
            case _:
                raise NotFound("no such call")


def _parts(path: str) -> tuple[list[str], dict[str, str]]:
    parts = urlsplit(path)
    segments = [unquote(segment) for segment in parts.path.removeprefix("/v1/").split("/")]
    return segments, {key: values[0] for key, values in parse_qs(parts.query).items()}
