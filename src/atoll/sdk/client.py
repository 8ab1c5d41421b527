"""The API from Python: a method per call, records and views as answers, errors of `model.errors`.

Every write carries an idempotency key, so that a call whose connection broke is repeated by itself and acts once.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from atoll.model import codec
from atoll.model.certificates import AcmeRequest, AcmeView, CertificateRequest, CertificateView, RootView
from atoll.model.devices import GpuDevice
from atoll.model.errors import OutcomeUnknown, Unavailable
from atoll.model.fabric import Fabric, FabricNode, ReachView
from atoll.model.maintenance import MaintenanceSpec
from atoll.model.membership import (
    AuthorityView,
    IdentityView,
    JoinTokenRequest,
    JoinTokenView,
    RotateRequest,
    ServerView,
)
from atoll.model.records import Event, Project, Release, Site, Usage
from atoll.model.reservation import ReservationSpec
from atoll.model.spec import AppSpec, JobSpec
from atoll.model.streams import ExecOptions, FilesOptions, Held, LogLine, LogOptions
from atoll.model.views import (
    PAGE_LIMIT_MAX,
    AppGroup,
    AppView,
    BrakeView,
    DefragView,
    DrainRequest,
    DrainView,
    GroupView,
    Info,
    InstanceExplanation,
    InstanceView,
    JobView,
    MaintenanceView,
    NodeView,
    Page,
    PlanView,
    ReinstateRequest,
    ReservationView,
    RollbackRequest,
    RolloutView,
    ScaleRequest,
    SecretRequest,
    SecretView,
    SiteView,
    SnapshotsView,
    TakeRequest,
    TokenRequest,
    TokenView,
    WatchLine,
)
from atoll.sdk import answers, context, streams, watching
from atoll.sdk.failover import transport_to
from atoll.sdk.transport import Answer, Transport, Unreachable, path

TRIES_MAX = 3
RETRY_DELAY_S = 0.1
"""Before the second try; doubled for each one after."""

REINSTATE_S = 130.0
"""Of one call that may have to wait for a GPU's reset."""

HOLD_S = 140.0
"""Of one call that may have to wait for a snapshot."""

T = TypeVar("T")


class Client:
    """Calls one cell's API. Safe for many tasks of one event loop; use as an async context, or `close` it.

    Every method may raise Unavailable (nothing answered), Unauthenticated, Forbidden, and OutcomeUnknown for a write whose
    repeats were cut too.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @classmethod
    def connect(cls, address: str | None = None, token: str | None = None, *, ca: str | None = None) -> Client:
        """Return a client for what was given, or for what the environment and `atoll up`'s files say. Opens nothing yet.

        `address` may name several servers with commas; `ca` is the cell's authority: a PEM file or text, or its `sha256:` pin.
        """
        found = context.resolve(address, token, ca=ca)
        return cls(transport_to(found.address, found.token, agent="atoll-client", ca=found.ca))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._transport.close()

    # The cell

    async def info(self) -> Info:
        return await self._get(Info, path("info"))

    async def schema(self, kind: str) -> dict[str, Any]:
        """Return the JSON Schema of an `app` or `job` spec."""
        return await self._get(dict[str, Any], path("schema", kind))

    async def projects(self) -> list[Project]:
        return await self._all(Project, "projects")

    async def put_project(self, name: str) -> Project:
        return await self._write(Project, "PUT", path("projects", name))

    async def reach(
        self, project: str, source: str, target: str, port: int, *, protocol: str = "tcp", to_project: str | None = None
    ) -> ReachView:
        """Return whether an app, job or instance reaches a port of another, and what stops it."""
        query = {"from": source, "to": target, "port": str(port), "protocol": protocol, "to_project": to_project or project}
        return await self._get(ReachView, path("projects", project, "reach", **query))

    async def fabric(self) -> tuple[FabricNode, ...]:
        """Return the nodes that are in the fabric."""
        return await self._get(tuple[FabricNode, ...], path("fabric"))

    async def rotate_fabric_keys(self) -> Fabric:
        """Have every node make a new WireGuard key."""
        return await self._write(Fabric, "POST", path("fabric", "rotate-keys"))

    async def sites(self) -> list[SiteView]:
        """Return every site that is described, or that a node or ingress names."""
        return await self._all(SiteView, "sites")

    async def site(self, name: str) -> SiteView:
        """Return one site, with the round trips to all others."""
        return await self._get(SiteView, path("sites", name))

    async def put_site(self, site: Site) -> SiteView:
        """Describe a site: all that is known of it, not only what changes."""
        return await self._write(SiteView, "PUT", path("sites", site.name), site)

    async def remove_site(self, name: str) -> Site:
        return await self._write(Site, "DELETE", path("sites", name))

    async def nodes(self) -> list[NodeView]:
        return await self._all(NodeView, "nodes")

    async def node(self, name: str) -> NodeView:
        return await self._get(NodeView, path("nodes", name))

    async def brake(self) -> BrakeView:
        """Return whether nodes that do not answer are kept from being given up, since too many do not at once."""
        return await self._get(BrakeView, path("brake"))

    async def release_brake(self) -> BrakeView:
        """Have them given up, and what they ran replaced. Raises Conflict: the brake is not on."""
        return await self._write(BrakeView, "POST", path("brake", "release"))

    async def cordon(self, name: str) -> NodeView:
        """Let the scheduler put nothing new on the node."""
        return await self._write(NodeView, "POST", path("nodes", name, "cordon"))

    async def uncordon(self, name: str) -> NodeView:
        return await self._write(NodeView, "POST", path("nodes", name, "uncordon"))

    async def drain(self, name: str, request: DrainRequest = DrainRequest()) -> NodeView:
        """Have everything leave the node, within the apps' budgets until a deadline. It goes on whoever asked is there or not."""
        return await self._write(NodeView, "POST", path("nodes", name, "drain"), request)

    async def undrain(self, name: str) -> NodeView:
        return await self._write(NodeView, "POST", path("nodes", name, "undrain"))

    async def drain_of(self, name: str) -> DrainView:
        """Return how far a drain, or the emptying before a maintenance, has come."""
        return await self._get(DrainView, path("nodes", name, "drain"))

    async def maintenances(self) -> list[MaintenanceView]:
        return await self._all(MaintenanceView, "maintenances")

    async def put_maintenance(self, spec: MaintenanceSpec) -> MaintenanceView:
        return await self._write(MaintenanceView, "PUT", path("maintenances", spec.name), spec)

    async def remove_maintenance(self, name: str) -> None:
        await self._delete(path("maintenances", name))

    async def reservations(self) -> list[ReservationView]:
        return await self._all(ReservationView, "reservations")

    async def put_reservation(self, spec: ReservationSpec) -> ReservationView:
        return await self._write(ReservationView, "PUT", path("reservations", spec.name), spec)

    async def remove_reservation(self, name: str) -> None:
        await self._delete(path("reservations", name))

    async def reinstate(self, node: str, gpu: str, *, reset: bool = False) -> GpuDevice:
        """Have a node offer a GPU again that was taken out for an error (`reset`: reset it before); return how it then stands.
        Takes up to two minutes, and is asked once; safe to repeat."""
        body = codec.encode(ReinstateRequest(reset=reset))
        where = path("nodes", node, "gpus", gpu, "reinstate")
        return answers.read(await self._transport.request("POST", where, body=body, timeout_s=REINSTATE_S), GpuDevice)

    async def revoke_node(self, name: str) -> IdentityView:
        """Have a node's certificate and tokens refused from now on."""
        return await self._write(IdentityView, "POST", path("nodes", name, "revoke"))

    async def revoke_ingress(self, name: str) -> IdentityView:
        return await self._write(IdentityView, "POST", path("ingresses", name, "revoke"))

    async def remove_node(self, name: str) -> IdentityView:
        """Forget a node that is lost or revoked. Raises Conflict where it answers, or holds instances."""
        return await self._write(IdentityView, "DELETE", path("nodes", name))

    async def identities(self) -> list[IdentityView]:
        """Return the machines that joined, with when their certificates end."""
        return await self._get(list[IdentityView], path("identities"))

    async def create_join_token(self, request: JoinTokenRequest) -> JoinTokenView:
        """Return the new join token; its `token` is never shown again."""
        return await self._write(JoinTokenView, "POST", path("join-tokens"), request)

    async def join_tokens(self) -> list[JoinTokenView]:
        return await self._get(list[JoinTokenView], path("join-tokens"))

    async def delete_join_token(self, id: str) -> None:
        await self._delete(path("join-tokens", id))

    async def authorities(self) -> list[AuthorityView]:
        return await self._get(list[AuthorityView], path("authorities"))

    async def rotate_authority(self, *, at_once: bool = False) -> list[AuthorityView]:
        """Make a new certificate authority; see `docs/identity.md` for what follows."""
        return await self._write(list[AuthorityView], "POST", path("authorities", "rotate"), RotateRequest(at_once=at_once))

    async def servers(self) -> list[ServerView]:
        """Return the servers that run, and which leads."""
        return await self._get(list[ServerView], path("servers"))

    async def usage(self, project: str | None = None) -> list[Usage]:
        """Return what every instance used at its node's last heartbeat."""
        return await self._get(list[Usage], path("usage", project=project))

    async def tokens(self) -> list[TokenView]:
        return await self._all(TokenView, "tokens")

    async def create_token(self, request: TokenRequest) -> TokenView:
        """Return the new token; its `token` is never shown again."""
        return await self._write(TokenView, "POST", path("tokens"), request)

    async def delete_token(self, id: str) -> None:
        await self._delete(path("tokens", id))

    # Instances as a whole

    async def hold_instance(self, project: str, id: str, what: str) -> Held:
        """Have a running instance stand still (`what` is `pause`), go on (`resume`) or be written down (`snapshot`).

        Takes up to two minutes, and is asked once; safe to repeat. Raises Unsupported, naming the runtimes that can.
        """
        where = path("projects", project, "instances", id, what)
        return answers.read(await self._transport.request("POST", where, timeout_s=HOLD_S), Held)

    async def snapshots(self, project: str, node: str | None = None) -> SnapshotsView:
        """Return the project's snapshots, of all nodes or one, and the nodes that did not answer."""
        return await self._get(SnapshotsView, path("projects", project, "snapshots", node=node))

    async def remove_snapshot(self, project: str, digest: str, node: str) -> None:
        """Remove a snapshot from its node; sandboxes that went on from it go on. Raises NotFound."""
        await self._delete(path("projects", project, "snapshots", digest.removeprefix("sha256:"), node=node))

    # Apps

    async def apps(self, project: str) -> list[AppView]:
        return await self._all(AppView, "projects", project, "apps")

    async def app(self, project: str, name: str) -> AppView:
        """Raises NotFound."""
        return await self._get(AppView, path("projects", project, "apps", name))

    async def put_app(self, spec: AppSpec, *, if_revision: int | None = None) -> AppView:
        """Make or change `spec.name` in `spec.project`; the same spec again makes no new release.

        With `if_revision`, raises StaleRevision when the app has changed since it was read (0: when it exists).
        """
        where = path("projects", spec.project, "apps", spec.name)
        return await self._write(AppView, "PUT", where, spec, if_revision=if_revision)

    async def put_apps(self, project: str, specs: Sequence[AppSpec]) -> GroupView:
        """Make or change several apps of a project: all of them, or none where one cannot be."""
        return await self._write(GroupView, "PUT", path("projects", project, "apps"), AppGroup(apps=tuple(specs)))

    async def delete_app(self, project: str, name: str) -> None:
        """Ask for the end of the app; it is gone when its last instance is."""
        await self._delete(path("projects", project, "apps", name))

    async def scale(self, project: str, name: str, replicas: int) -> AppView:
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "scale"), ScaleRequest(replicas))

    async def restart(self, project: str, name: str) -> AppView:
        """Replace every instance, keeping the app serving."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "restart"))

    async def rollback(self, project: str, name: str, release: int | None = None) -> AppView:
        """Go back to an earlier release; without `release`, to the one before the current."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "rollback"), RollbackRequest(release))

    async def rollout(self, project: str, name: str) -> RolloutView:
        """Return how the app's last rollout stands, with what was counted of each release."""
        return await self._get(RolloutView, path("projects", project, "apps", name, "rollout"))

    async def pause_rollout(self, project: str, name: str) -> AppView:
        """Have the rollout not go on by itself. Raises Conflict: none is under way."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "rollout", "pause"))

    async def resume_rollout(self, project: str, name: str) -> AppView:
        """Go on after a pause or past a step that waits, or begin anew after a revert. Raises Conflict."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "rollout", "resume"))

    async def promote_rollout(self, project: str, name: str) -> AppView:
        """Give the new release all requests. Raises Conflict."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "rollout", "promote"))

    async def abort_rollout(self, project: str, name: str) -> AppView:
        """Give the release before all requests again, at once. Raises Conflict."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "rollout", "abort"))

    async def undo_rollout(self, project: str, name: str) -> AppView:
        """Go back to what served before. Raises Conflict, NotFound."""
        return await self._write(AppView, "POST", path("projects", project, "apps", name, "rollout", "undo"))

    async def releases(self, project: str, name: str) -> list[Release]:
        """Return the app's releases, newest first."""
        return await self._all(Release, "projects", project, "apps", name, "releases")

    # Instances

    async def instances(self, project: str, *, app: str | None = None, job: str | None = None) -> list[InstanceView]:
        return await self._all(InstanceView, "projects", project, "instances", app=app, job=job)

    async def instance(self, project: str, id: str) -> InstanceView:
        return await self._get(InstanceView, path("projects", project, "instances", id))

    async def explain(self, project: str, id: str) -> InstanceExplanation:
        """Return what the scheduler would answer for an instance now, were it not there."""
        return await self._get(InstanceExplanation, path("projects", project, "instances", id, "explain"))

    async def defrag(self) -> DefragView:
        """Return which instances could be moved, and what that would free. Nothing is moved."""
        return await self._get(DefragView, path("defrag"))

    async def plan(self, spec: AppSpec | JobSpec) -> PlanView:
        """Return where the spec's instances would go now. Nothing is written."""
        return await self._write(PlanView, "POST", path("plan"), spec)

    async def stop_instance(self, project: str, id: str) -> InstanceView:
        """Drain and stop one instance; its app gets another."""
        return await self._write(InstanceView, "POST", path("projects", project, "instances", id, "stop"))

    async def exec(self, project: str, id: str, options: ExecOptions) -> streams.Exec:
        """Start a command in a running instance."""
        where = path("projects", project, "instances", id, "exec", options=codec.encode(options).decode())
        return streams.Exec(await self._transport.channel(where))

    async def logs(self, project: str, id: str, options: LogOptions = LogOptions()) -> AsyncIterator[LogLine]:
        """Yield the instance's lines, oldest first; with `follow`, until the instance is gone or the iterator is closed."""
        where = path("projects", project, "instances", id, "logs", options=codec.encode(options).decode())
        channel = await self._transport.channel(where)
        try:
            async for line in streams.log_lines(channel):
                yield line
        finally:
            await channel.close()

    async def get_files(self, project: str, id: str, source: str) -> AsyncIterator[bytes]:
        """Yield a tar stream of a file or directory in the instance."""
        channel = await self._transport.channel(self._files(project, id, "get", source))
        try:
            async for part in streams.receive_files(channel):
                yield part
        finally:
            await channel.close()

    async def put_files(self, project: str, id: str, target: str, parts: AsyncIterator[bytes]) -> None:
        """Unpack a tar stream into directory `target` of the instance; returns when all of it is there."""
        channel = await self._transport.channel(self._files(project, id, "put", target))
        try:
            await streams.send_files(channel, parts)
        finally:
            await channel.close()

    def _files(self, project: str, id: str, mode: str, where: str) -> str:
        options = codec.encode(FilesOptions(path=where)).decode()
        return path("projects", project, "instances", id, "files", mode=mode, options=options)

    # Jobs

    async def jobs(self, project: str) -> list[JobView]:
        return await self._all(JobView, "projects", project, "jobs")

    async def job(self, project: str, name: str) -> JobView:
        return await self._get(JobView, path("projects", project, "jobs", name))

    async def create_job(self, spec: JobSpec) -> JobView:
        """Raises Conflict when a job of that name is there."""
        return await self._write(JobView, "POST", path("projects", spec.project, "jobs"), spec)

    async def put_job(self, spec: JobSpec) -> JobView:
        """Make or change a job with a schedule, or a template of sandboxes."""
        return await self._write(JobView, "PUT", path("projects", spec.project, "jobs", spec.name), spec)

    async def take_sandbox(self, project: str, template: str, wish: TakeRequest) -> JobView:
        """Take a sandbox out of a template's pool; `instance` of the answer can be worked in at once, where it is not empty."""
        return await self._write(JobView, "POST", path("projects", project, "jobs", template, "take"), wish)

    async def suspend_job(self, project: str, name: str) -> JobView:
        return await self._write(JobView, "POST", path("projects", project, "jobs", name, "suspend"))

    async def resume_job(self, project: str, name: str) -> JobView:
        return await self._write(JobView, "POST", path("projects", project, "jobs", name, "resume"))

    async def trigger_job(self, project: str, name: str) -> JobView:
        """Make a run of a job with a schedule now, and return it."""
        return await self._write(JobView, "POST", path("projects", project, "jobs", name, "trigger"))

    async def cancel_job(self, project: str, name: str) -> JobView:
        return await self._write(JobView, "POST", path("projects", project, "jobs", name, "cancel"))

    async def delete_job(self, project: str, name: str) -> None:
        await self._delete(path("projects", project, "jobs", name))

    # Secrets and events

    async def secrets(self, project: str) -> list[SecretView]:
        return await self._all(SecretView, "projects", project, "secrets")

    async def put_secret(self, project: str, name: str, value: str) -> SecretView:
        return await self._write(SecretView, "PUT", path("projects", project, "secrets", name), SecretRequest(value))

    async def delete_secret(self, project: str, name: str) -> None:
        await self._delete(path("projects", project, "secrets", name))

    async def certificates(self, project: str) -> list[CertificateView]:
        return await self._all(CertificateView, "projects", project, "certificates")

    async def certificate(self, project: str, host: str) -> CertificateView:
        """Return one with its chain; its key comes out to nobody but ingresses."""
        return await self._get(CertificateView, path("projects", project, "certificates", host))

    async def put_certificate(self, project: str, host: str, wish: CertificateRequest) -> CertificateView:
        """Add or replace the certificate of a hostname. Raises Invalid, naming `chain` or `key`, and Conflict."""
        return await self._write(CertificateView, "PUT", path("projects", project, "certificates", host), wish)

    async def remove_certificate(self, project: str, host: str) -> None:
        await self._delete(path("projects", project, "certificates", host))

    async def certificate_root(self) -> RootView:
        """Return what to trust for hostnames that the cell signs itself."""
        return await self._get(RootView, path("certificates", "root"))

    async def acme(self) -> AcmeView:
        return await self._get(AcmeView, path("certificates", "acme"))

    async def set_acme(self, wish: AcmeRequest) -> AcmeView:
        """Choose the authority that signs where `acme` is asked for; whoever does agrees to its terms."""
        return await self._write(AcmeView, "PUT", path("certificates", "acme"), wish)

    async def forget_acme(self) -> None:
        await self._delete(path("certificates", "acme"))

    async def events(self, project: str, *, subject: str | None = None, limit: int = 100, after: str | None = None) -> Page[Event]:
        """Return up to `limit` events, newest first; pass `next` as `after` for older ones."""
        return await self._get(Page[Event], path("projects", project, "events", subject=subject, limit=limit, after=after))

    def watch(
        self, kinds: Sequence[str], *, project: str | None = None, start: int | None = None, bookmarks: bool = False
    ) -> AsyncIterator[WatchLine]:
        """Yield the state, then every change, for ever; goes on by itself after the connection broke.

        With `start`, only changes from that revision on; raises Compacted if it is no longer held.
        """
        return watching.watch(self._transport, kinds, project=project, start=start, bookmarks=bookmarks)

    # How calls are made

    async def _get(self, kind: type[T], where: str) -> T:
        return answers.read(await self._repeat(lambda: self._transport.request("GET", where)), kind)

    async def _all(self, kind: type[T], *segments: str, **query: str | None) -> list[T]:
        """Return all items of a list, page by page."""
        items: list[T] = []
        after: str | None = None
        while True:
            where = path(*segments, **query, limit=PAGE_LIMIT_MAX, after=after)
            page: Page[T] = await self._get(Page[kind], where)  # type: ignore[valid-type]
            items.extend(page.items)
            if page.next is None:
                return items
            after = page.next

    async def _write(
        self, kind: type[T], method: str, where: str, record: object | None = None, *, if_revision: int | None = None
    ) -> T:
        return answers.read(await self._send(method, where, record, if_revision), kind)

    async def _delete(self, where: str) -> None:
        answers.check(await self._send("DELETE", where))

    async def _send(self, method: str, where: str, record: object | None = None, if_revision: int | None = None) -> Answer:
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        if if_revision is not None:
            headers["If-Match"] = f'"{if_revision}"'
        body = b"" if record is None else codec.encode(record)
        return await self._repeat(lambda: self._transport.request(method, where, headers=headers, body=body))

    async def _repeat(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Make a call up to `TRIES_MAX` times while it is cut, or refused for now. Only for what acts once."""
        delay = RETRY_DELAY_S
        for _ in range(TRIES_MAX - 1):
            try:
                answer = await call()
                if answer.status not in (502, 503):
                    return answer
            except Unreachable:
                raise
            except (Unavailable, OutcomeUnknown):
                pass
            await asyncio.sleep(delay)
            delay *= 2
        return await call()
