"""The calls of the API in memory: each answers as the real one does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from atoll.api.service.holdings import holdings_of
from atoll.model import codec
from atoll.model.certificates import AcmeRequest, AcmeView, CertificateRequest, CertificateView, RootView
from atoll.model.devices import GpuDevice, GpuHealth, GpuSample
from atoll.model.errors import Conflict, Invalid, NotFound, StaleRevision
from atoll.model.evacuation import evacuation_of, in_force, labels_of
from atoll.model.fabric import ReachView
from atoll.model.flows import Flows
from atoll.model.labels import described, labelled, tainted
from atoll.model.maintenance import Drain, Maintenance, MaintenanceSpec, selects, window_at
from atoll.model.records import (
    App,
    Brake,
    Event,
    Heartbeat,
    Ingress,
    Instance,
    Job,
    JobPhase,
    Node,
    NodePolicy,
    Project,
    Release,
    Role,
    Secret,
    Site,
    Usage,
)
from atoll.model.records.certificate import CertificatePhase, CertificateSource
from atoll.model.reservation import Reservation, ReservationSpec
from atoll.model.rollouts import RolloutOrder
from atoll.model.spec import AppSpec, JobSpec, Quota, check_app, check_job
from atoll.model.views import (
    AppGroup,
    AppView,
    BrakeView,
    DefragView,
    DrainRequest,
    DrainView,
    GroupView,
    Info,
    IngressView,
    InstanceView,
    JobView,
    LabelRequest,
    MaintenanceView,
    NodeView,
    Page,
    QuotaUse,
    QuotaView,
    ReinstateRequest,
    ReleaseView,
    ReservationView,
    RollbackRequest,
    RolloutView,
    ScaleRequest,
    SecretRequest,
    SecretView,
    SiteView,
    TaintRequest,
    TokenRequest,
    TokenView,
)
from atoll.scheduling.assembly import group_of
from atoll.scheduling.defrag import propose
from atoll.scheduling.demand import demand_of
from atoll.scheduling.dry_run import explain_instance, plan_spec
from atoll.scheduling.geography import UNKNOWN, Geography
from atoll.sdk.fake_world import FakeWorld

INGRESS_PORT = 8080


class FakeCalls(FakeWorld):
    """Method and path to answer."""

    def __init__(self) -> None:
        super().__init__()
        self.usage: list[Usage] = []
        self.flows: list[Flows] = [Flows()]
        """What nodes counted, one look after the other; the last stays."""
        self.reach: ReachView | None = None
        self.release_views: dict[str, tuple[ReleaseView, ...]] = {}
        """App (`project/name`) → its releases, as a rollout shows them."""
        self.refused: dict[str, dict[str, str]] = {}
        """App (`project/name`) → ingress → what that leaves out of its routing."""
        self.gpu_samples: dict[str, tuple[GpuSample, ...]] = {}
        """Node → what its devices do."""
        self.node_images: dict[str, tuple[str, ...]] = {}
        """Node → digests of the images that it has."""
        self.node_fetches: dict[str, str] = {}
        """Node → what it is fetching, in words."""
        self.brake: Brake | None = None
        self.drain_views: dict[str, list[DrainView]] = {}
        """Node → what is answered when it is asked how far it has been emptied, one after the other; the last stays."""
        self.acme = AcmeView()
        self.ingress_views: dict[str, IngressView] = {}
        self._tokens: dict[str, TokenView] = {}

    def handle(self, method: str, segments: list[str], query: dict[str, str], headers: Mapping[str, str], body: bytes) -> object:
        match (method, segments):
            case "GET", ["info"]:
                ingress = Ingress(name="local", http_port=INGRESS_PORT)
                return Info(version="fake", cell="main", revision=self.revision, store="memory", ingresses=(ingress,))
            case "GET", ["schema", "app" | "job" as kind]:
                return codec.json_schema(AppSpec if kind == "app" else JobSpec)
            case "POST", ["plan"]:
                job = b'"kind":"job"' in body
                return plan_spec(self.snapshot(), codec.decode(body, JobSpec) if job else codec.decode(body, AppSpec))
            case "GET", ["defrag"]:
                return self._defrag()
            case "GET", ["projects"]:
                return self._page([record for record, _ in self.under("projects")])
            case "PUT", ["projects", name]:
                record = Project(name=name, created_at=self.now)
                self.put("projects", name, record)
                return record
            case _, ["projects", name, "quota"]:
                return self._quota(method, name, headers, body)
            case _, ["projects", project, "apps", *rest]:
                return self._apps(method, project, rest, headers, body)
            case _, ["projects", project, "jobs", *rest]:
                return self._jobs(method, project, rest, body)
            case "GET", ["projects", project, "instances"]:
                return self._page(self._instances(project, query))
            case _, ["projects", project, "instances", id, *rest]:
                if rest == ["explain"]:
                    instance, _ = self.get("instances", f"{project}/{id}")
                    owner, _ = self.get("jobs" if instance.owner_kind == "job" else "apps", f"{project}/{instance.owner}")
                    return explain_instance(self.snapshot(), f"{project}/{id}", instance, owner.spec)
                if rest == ["stop"]:
                    self.event(f"instance/{id}", "stop", "told to stop by the user", project=project)
                return self._instance_view(project, id)
            case _, ["projects", project, "secrets", *rest]:
                return self._secrets(method, project, rest, body)
            case _, ["projects", project, "certificates", *rest]:
                return self._certificates(method, project, rest, body)
            case "GET", ["certificates", "root"]:
                return RootView(certificate="root\n", fingerprint="0" * 64, not_after=self.now)
            case _, ["certificates", "acme"]:
                if method == "PUT":
                    wish_acme = codec.decode(body, AcmeRequest)
                    self.acme = AcmeView(directory=wish_acme.directory, contact=wish_acme.contact, eab_kid=wish_acme.eab_kid)
                elif method == "DELETE":
                    self.acme = AcmeView()
                return self.acme
            case "GET", ["projects", _, "flows"]:
                return self.flows.pop(0) if len(self.flows) > 1 else self.flows[0]
            case "GET", ["projects", _, "reach"] if self.reach is not None:
                return self.reach
            case "GET", ["projects", project, "events"]:
                return self._events(project, query)
            case _, ["sites", *rest]:
                return self._sites(method, rest, body)
            case "GET", ["brake"]:
                return BrakeView(brake=self.brake)
            case "POST", ["brake", "release"]:
                if self.brake is None:
                    raise Conflict("the brake is not on")
                return BrakeView(brake=self.brake, released=True)
            case _, ["nodes", *rest]:
                return self._nodes(method, rest, body)
            case "GET", ["reservations"]:
                return self._page([self._reservation_view(each) for each, _ in self.under("reservations")])
            case "PUT", ["reservations", name]:
                wish = codec.decode(body, ReservationSpec)
                wish = replace(wish, start=self.now if wish.start is None else wish.start)
                self.put("reservations", name, Reservation(spec=wish, created_at=self.now))
                return self._reservation_view(self.get("reservations", name)[0])
            case "DELETE", ["reservations", name]:
                gone = self._reservation_view(self.get("reservations", name)[0])
                self.remove("reservations", name)
                return gone
            case "GET", ["maintenances"]:
                return self._page([self._maintenance_view(each) for each, _ in self.under("maintenances")])
            case "PUT", ["maintenances", name]:
                spec = codec.decode(body, MaintenanceSpec)
                self.put("maintenances", name, Maintenance(spec=spec, created_at=self.now))
                return self._maintenance_view(self.get("maintenances", name)[0])
            case "DELETE", ["maintenances", name]:
                view = self._maintenance_view(self.get("maintenances", name)[0])
                self.remove("maintenances", name)
                return view
            case "GET", ["usage"]:
                return self.usage
            case "GET", ["ingresses"]:
                return tuple(self.ingress_views.values())
            case "DELETE", ["ingresses", name]:
                if name not in self.ingress_views:
                    raise NotFound(f"no ingress '{name}'")
                return self.ingress_views.pop(name)
            case _, ["tokens", *rest]:
                return self._token_calls(method, rest, body)
            case _:
                raise NotFound(f"{method} /v1/{'/'.join(segments)}: no such call")

    def _defrag(self) -> DefragView:
        """As the server would, with one of each app at a time."""
        placed = [record for record, _ in self.under("instances") if record.node is not None]
        specs = {group_of(i): self.get("apps", f"{i.project}/{i.owner}")[0].spec for i in placed if i.owner_kind == "app"}
        demands = {group: demand_of(spec) for group, spec in specs.items()}
        return propose(self.snapshot(), demands, {f"{i.project}/{i.id}" for i in placed}, lambda owner: 1)

    def _page(self, items: list[Any]) -> Page[Any]:
        return Page(items=tuple(items), revision=self.revision)

    def _apps(self, method: str, project: str, rest: list[str], headers: Mapping[str, str], body: bytes) -> object:
        match (method, rest):
            case "GET", []:
                return self._page([self._app_view(project, record.name) for record, _ in self.under("apps", f"{project}/")])
            case "PUT", []:
                specs = codec.decode(body, AppGroup).apps
                for spec in specs:
                    check_app(spec)
                views = tuple(self._put_app(project, spec.name, spec, {}) for spec in specs)
                return GroupView(apps=views, revision=self.revision)
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
                self.stop_all(project, name)
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
            case "GET", [name, "rollout"]:
                view = self._app_view(project, name)
                status = view.status.rollout if view.status is not None else None
                found = self.release_views.get(f"{project}/{name}", ())
                return RolloutView(app=view.app, app_status=view.status, status=status, releases=found, revision=view.revision)
            case "POST", [name, "rollout", what]:
                app, _ = self.get("apps", f"{project}/{name}")
                before = app.order if app.order is not None and app.order.release == app.release else None
                order = _ordered(before or RolloutOrder(release=app.release), what)
                self.put("apps", f"{project}/{name}", replace(app, order=order))
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

    def _app_view(self, project: str, name: str) -> AppView:
        app, revision = self.get("apps", f"{project}/{name}")
        status, _ = self.records.get(("app-statuses", f"{project}/{name}"), (None, 0))
        urls = (f"http://{name}.localhost:{INGRESS_PORT}",) if app.spec.port_named(None) else ()
        return AppView(app=app, status=status, revision=revision, urls=urls, refused=self.refused.get(f"{project}/{name}", {}))

    def _instances(self, project: str, query: dict[str, str]) -> list[InstanceView]:
        def keep(instance: Instance) -> bool:
            return not query.keys() & {"app", "job"} or query.get(instance.owner_kind.value) == instance.owner

        found = [instance for instance, _ in self.under("instances", f"{project}/") if keep(instance)]
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
                self.finish(project, spec, JobPhase.FAILED if spec.name in self.failing else JobPhase.SUCCEEDED)
                return self._job_view(project, spec.name)
            case "GET", [name]:
                return self._job_view(project, name)
            case "POST", [name, "cancel"]:
                job, _ = self.get("jobs", f"{project}/{name}")
                self.put("jobs", f"{project}/{name}", replace(job, cancelled=True))
                self.finish(project, job.spec, JobPhase.CANCELLED)
                return self._job_view(project, name)
            case "DELETE", [name]:
                self.get("jobs", f"{project}/{name}")
                self.remove("jobs", f"{project}/{name}")
                return {}
            case _:
                raise NotFound("no such call")

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

    def _certificates(self, method: str, project: str, rest: list[str], body: bytes) -> object:
        match (method, rest):
            case "GET", []:
                return self._page([view for view, _ in self.under("certificates", f"{project}/")])
            case "GET", [host]:
                return self.get("certificates", f"{project}/{host}")[0]
            case "PUT", [host]:
                wish = codec.decode(body, CertificateRequest)
                signed = wish.source is CertificateSource.FILE
                phase = CertificatePhase.VALID if signed else CertificatePhase.WAITING
                view = CertificateView(
                    host=host, project=project, source=wish.source, state=phase, chain=wish.chain, shared=wish.shared
                )
                if signed:
                    view = replace(
                        view, names=(host,), issuer="CN=fake", fingerprint="0" * 64, not_before=self.now, not_after=self.now
                    )
                self.put("certificates", f"{project}/{host}", view)
                return view
            case "DELETE", [host]:
                self.get("certificates", f"{project}/{host}")
                self.remove("certificates", f"{project}/{host}")
                return {}
            case _:
                raise NotFound("no such call")

    def _events(self, project: str, query: dict[str, str]) -> Page[Event]:
        subject, limit, after = query.get("subject"), int(query.get("limit", "100")), query.get("after")
        found = [event for event, _ in reversed(self.under("events", f"{project}/")) if subject in (None, event.subject)]
        found = [event for event in found if after is None or event.id < after]
        rest = found[limit:]
        return Page(items=tuple(found[:limit]), revision=self.revision, next=found[limit - 1].id if rest else None)

    def _sites(self, method: str, rest: list[str], body: bytes) -> object:
        described = {site.name: site for site, _ in self.under("sites")}
        names = sorted({*described, *(node.site for node, _ in self.under("nodes"))})
        match (method, rest):
            case "GET", []:
                return self._page([self._site_view(name, described) for name in names])
            case "GET", [name] if name in names:
                return self._site_view(name, described)
            case "PUT", [name]:
                site = codec.decode(body, Site)
                self.put("sites", name, site)
                return self._site_view(name, {name: site})
            case "DELETE", [name] if name in described:
                self.remove("sites", name)
                return described[name]
            case _:
                raise NotFound(f"no site '{'/'.join(rest)}'")

    def _site_view(self, name: str, described: Mapping[str, Site]) -> SiteView:
        others = [other for other in sorted(described) if other != name]
        ms = Geography(described.values()).round_trips_ms([name], others)[0] if others else ()
        return SiteView(
            site=described.get(name, Site(name=name)),
            described=name in described,
            nodes=sum(node.site == name for node, _ in self.under("nodes")),
            round_trips_ms={other: float(one) for other, one in zip(others, ms, strict=True) if one < UNKNOWN},
            revision=self.revision,
        )

    def _nodes(self, method: str, rest: list[str], body: bytes) -> object:
        match (method, rest):
            case "GET", []:
                return self._page([self._node_view(node.name) for node, _ in self.under("nodes")])
            case "GET", [name]:
                return self._node_view(name)
            case "POST", [name, "cordon" | "uncordon" as verb]:
                self.get("nodes", name)
                self.put("node-policies", name, replace(self._policy(name), cordoned=verb == "cordon"))
                return self._node_view(name)
            case "POST", [name, "drain"]:
                wish = codec.decode(body, DrainRequest)
                drain = Drain(since=self.now, deadline=self.now + wish.deadline, leave_volumes=wish.leave_volumes)
                self.put("node-policies", name, replace(self._policy(name), drain=drain))
                return self._node_view(name)
            case "POST", [name, "undrain"]:
                self.put("node-policies", name, replace(self._policy(name), drain=None))
                return self._node_view(name)
            case "POST", [name, "label"]:
                label = codec.decode(body, LabelRequest)
                told = labelled(self.get("nodes", name)[0], self._policy(name), label.labels, reset=label.reset)
                self.put("node-policies", name, told)
                return self._node_view(name)
            case "POST", [name, "taint"]:
                taint = codec.decode(body, TaintRequest)
                told = tainted(self.get("nodes", name)[0], self._policy(name), taint.add, taint.remove, reset=taint.reset)
                self.put("node-policies", name, told)
                return self._node_view(name)
            case "GET", [name, "drain"]:
                views = self.drain_views.get(name, [])
                if not views:
                    return DrainView(node=name, evacuation=self._node_view(name).evacuation, left=0, kept=0, total=0, done=True)
                return views.pop(0) if len(views) > 1 else views[0]
            case "POST", [name, "gpus", gpu, "reinstate"]:
                return self._reinstate(name, gpu, codec.decode(body, ReinstateRequest).reset)
            case _:
                raise NotFound("no such call")

    def _quota(self, method: str, name: str, headers: Mapping[str, str], body: bytes) -> object:
        project, revision = self.get("projects", name)
        if method == "PUT":
            if "If-Match" in headers and headers["If-Match"].strip('"') != str(revision):
                raise StaleRevision(f"project '{name}' has changed since it was read", mend="read it again")
            wish = codec.decode(body, Quota)
            self.put("projects", name, replace(project, quota=wish if wish != Quota() else None))
            return self.get("projects", name)[0]
        use = self.snapshot().project_use(name)
        used = QuotaUse(cpu_milli=use[0], memory_bytes=use[1], gpu_milli=use[3], instances=use[4])
        return QuotaView(project=name, quota=project.quota, used=used, revision=revision)

    def _policy(self, name: str) -> NodePolicy:
        try:
            found: NodePolicy = self.get("node-policies", name)[0]
        except NotFound:
            found = NodePolicy(name=name)
        return found

    def _labels_of(self, node: Node) -> dict[str, str]:
        return labels_of(described(node, self._policy(node.name)))

    def _reservation_view(self, each: Reservation) -> ReservationView:
        nodes = sorted(node.name for node, _ in self.under("nodes") if selects(each.spec.nodes, self._labels_of(node)))
        return ReservationView(reservation=each, nodes=tuple(nodes[: each.spec.count]), revision=self.revision)

    def _maintenance_view(self, each: Maintenance) -> MaintenanceView:
        nodes = [node.name for node, _ in self.under("nodes") if selects(each.spec.nodes, self._labels_of(node))]
        return MaintenanceView(maintenance=each, window=window_at(each.spec, self.now), nodes=tuple(nodes), revision=self.revision)

    def _reinstate(self, name: str, gpu: str, reset: bool) -> GpuDevice:
        node, _ = self.get("nodes", name)
        assert isinstance(node, Node)  # noqa: S101 - a test put it there
        device = next((device for device in node.capacity.gpus if device.id.startswith(gpu)), None)
        if device is None:
            raise NotFound(f"node '{name}' has no GPU '{gpu}'", field="gpu")
        if reset and any(holding.device == device.id for holding in self._node_view(name).gpus):
            raise Conflict(f"{device.id} is still held")
        if not device.remap_failed:
            device = replace(device, health=GpuHealth.OK, reason="")
        gpus = tuple(device if one.id == device.id else one for one in node.capacity.gpus)
        self.put("nodes", name, replace(node, capacity=replace(node.capacity, gpus=gpus)))
        return device

    def _node_view(self, name: str) -> NodeView:
        node, revision = self.get("nodes", name)
        assert isinstance(node, Node)  # noqa: S101 - a test put it there
        policy, _ = self.records.get(("node-policies", name), (None, 0))
        prefetch, _ = self.records.get(("prefetches", name), (None, 0))
        beat = Heartbeat(
            node=name,
            at=self.now,
            cpu_milli=250,
            memory_bytes=1 << 30,
            gpus=self.gpu_samples.get(name, ()),
            images=self.node_images.get(name, ()),
            fetching=self.node_fetches.get(name, ""),
        )
        placed = [instance for instance, _ in self.under("instances") if instance.node == name]
        windows = in_force([maintenance for maintenance, _ in self.under("maintenances")], self.now)
        return NodeView(
            evacuation=evacuation_of(node, policy, windows),
            node=described(node, policy),
            policy=policy,
            heartbeat=beat,
            allocated_cpu_milli=500,
            allocated_memory_bytes=1 << 28,
            gpus=holdings_of(placed, node.capacity.gpus),
            prefetch=prefetch.images if prefetch is not None else (),
            revision=revision,
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


def _ordered(order: RolloutOrder, what: str) -> RolloutOrder:
    """Return what is asked of a rollout after one more wish."""
    match what:
        case "pause":
            return replace(order, paused=True)
        case "resume":
            return replace(order, paused=False, step=order.step + (not order.paused))
        case "promote":
            return replace(order, promoted=True, paused=False)
        case "abort" | "undo":
            return replace(order, aborted=True, paused=False)
        case _:
            raise NotFound("no such call")
