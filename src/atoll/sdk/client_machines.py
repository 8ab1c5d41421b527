"""Calls about the cell's machines and places: nodes, sites, the network between them, who belongs to the cell, what is reserved."""

from __future__ import annotations

from atoll.model import codec
from atoll.model.devices import GpuDevice
from atoll.model.fabric import Fabric, FabricNode, ReachView
from atoll.model.flows import Flows
from atoll.model.maintenance import MaintenanceSpec
from atoll.model.membership import (
    AuthorityView,
    IdentityView,
    JoinTokenRequest,
    JoinTokenView,
    RotateRequest,
    ServerView,
)
from atoll.model.records import Site, Usage
from atoll.model.reservation import ReservationSpec
from atoll.model.views import (
    BrakeView,
    DrainRequest,
    DrainView,
    IngressView,
    LabelRequest,
    MaintenanceView,
    NodeView,
    ReinstateRequest,
    ReservationView,
    SiteView,
    TaintRequest,
    TokenRequest,
    TokenView,
)
from atoll.sdk import answers
from atoll.sdk.calls import Calls
from atoll.sdk.transport import path

REINSTATE_S = 130.0
"""Of one call that may have to wait for a GPU's reset."""


class MachineCalls(Calls):
    """Part of `Client`."""

    async def reach(
        self, project: str, source: str, target: str, port: int, *, protocol: str = "tcp", to_project: str | None = None
    ) -> ReachView:
        """Return whether an app, job or instance reaches a port of another, and what stops it."""
        query = {"from": source, "to": target, "port": str(port), "protocol": protocol, "to_project": to_project or project}
        return await self._get(ReachView, path("projects", project, "reach", **query))

    async def flows(self, project: str) -> Flows:
        """Return what apps sent each other and what was refused, as of each node's last heartbeat."""
        return await self._get(Flows, path("projects", project, "flows"))

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

    async def label(self, name: str, request: LabelRequest) -> NodeView:
        """Say labels of the node, before its agent's own."""
        return await self._write(NodeView, "POST", path("nodes", name, "label"), request)

    async def taint(self, name: str, request: TaintRequest) -> NodeView:
        """Add taints to the node, and take others away; what runs there stays."""
        return await self._write(NodeView, "POST", path("nodes", name, "taint"), request)

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

    async def ingresses(self) -> list[IngressView]:
        """Return the ingresses that have registered."""
        return await self._get(list[IngressView], path("ingresses"))

    async def forget_ingress(self, name: str) -> IngressView:
        """Forget an ingress that is gone for good. Raises NotFound, Conflict where it was heard of lately."""
        return await self._write(IngressView, "DELETE", path("ingresses", name))

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
