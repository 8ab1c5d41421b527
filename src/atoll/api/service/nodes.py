"""Nodes, as operators see them; and what runs on them uses."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from msgspec.structs import replace

from atoll.api.service.access import EVERY_PROJECT, SYSTEM, Caller, check_id
from atoll.api.service.asking import answer_of
from atoll.api.service.context import Context, Draft, RequestKey
from atoll.api.service.heartbeats import Heartbeats
from atoll.api.service.holdings import holdings_of
from atoll.api.service.lookups import by_node
from atoll.api.service.node_reports import checked
from atoll.api.service.pages import page
from atoll.api.service.specs import spec_of
from atoll.api.service.tunnels import Tunnels
from atoll.model import codec, keys, stored
from atoll.model.devices import GpuDevice
from atoll.model.errors import Conflict, Invalid, NotFound
from atoll.model.evacuation import evacuation_of, in_force
from atoll.model.flows import Flow, Flows, Refusal
from atoll.model.labels import described, labelled, tainted
from atoll.model.maintenance import Maintenance, Window
from atoll.model.ports.control_plane import StreamKind
from atoll.model.ports.store import Put, absent, unchanged
from atoll.model.records import Heartbeat, Instance, Node, NodeHealth, NodeLiveness, NodePolicy, OwnerKind, Prefetch, Status, Usage
from atoll.model.streams import ReinstateOptions
from atoll.model.views import LabelRequest, NodeView, Page, TaintRequest
from atoll.store.cache import Held, State
from atoll.store.index import by_project

REINSTATE_S = 110.0
"""How long an agent has to reinstate a GPU, with a reset of it: above its own deadline."""


class Sizes:
    """What instances may use, for one answer: the same for all of one release, of which a page of nodes shows many."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._known: dict[tuple[str, OwnerKind, str, int], tuple[int, int] | None] = {}

    def of(self, instance: Instance) -> tuple[int, int] | None:
        """Return milli-cores and bytes; None where the spec is no longer kept."""
        which = (instance.project, instance.owner_kind, instance.owner, instance.release)
        if which not in self._known:
            spec = spec_of(self._state, instance)
            self._known[which] = (spec.resources.cpu.milli, spec.resources.memory) if spec is not None else None
        return self._known[which]


class Nodes:
    def __init__(self, context: Context, heartbeats: Heartbeats, tunnels: Tunnels) -> None:
        self._context = context
        self._state = context.state
        self._heartbeats = heartbeats
        self._tunnels = tunnels

    def get(self, name: str, caller: Caller = SYSTEM) -> NodeView:
        """Return a node; instances of projects that `caller` does not see have no names. Raises NotFound."""
        held = self._state.get(Node, name)
        if held is None:
            raise NotFound(f"no node '{name[:60]}'", mend="'atoll nodes' lists them")
        return self._view(held, caller, self._windows(), Sizes(self._state))

    def all(self, *, limit: int, after: str = "", caller: Caller = SYSTEM) -> Page[NodeView]:
        windows, sizes = self._windows(), Sizes(self._state)

        def view(held: Held[Node]) -> NodeView:
            return self._view(held, caller, windows, sizes)

        return page(self._state, Node, "", view, limit=limit, after=after)

    async def cordon(self, name: str, cordoned: bool, *, request: RequestKey | None = None) -> NodeView:
        """Say whether new instances may be placed on a node; what runs there is left alone. Safe to repeat.

        Raises NotFound, and Conflict for a node that is being drained, which is not to be used again by that.
        """

        def change(_: Node, policy: NodePolicy) -> NodePolicy:
            if not cordoned and policy.drain is not None:
                raise Conflict(f"node '{name}' is being drained", mend=f"undo that: atoll nodes undrain {name}")
            return replace(policy, cordoned=cordoned)

        return await self._change_policy(name, change, request)

    async def label(self, name: str, wish: LabelRequest, *, request: RequestKey | None = None) -> NodeView:
        """Say labels of a node, before its agent's own; they hold until others are said, whatever becomes of the agent. Safe to
        repeat.

        Raises NotFound, Invalid.
        """

        def change(node: Node, policy: NodePolicy) -> NodePolicy:
            return labelled(node, policy, wish.labels, reset=wish.reset)

        return await self._change_policy(name, change, request)

    async def taint(self, name: str, wish: TaintRequest, *, request: RequestKey | None = None) -> NodeView:
        """Add taints to a node and take others away, its agent's too; as `label` otherwise. What runs there stays.

        Raises NotFound, Invalid (also for one to take away that is not there).
        """

        def change(node: Node, policy: NodePolicy) -> NodePolicy:
            return tainted(node, policy, wish.add, wish.remove, reset=wish.reset)

        return await self._change_policy(name, change, request)

    async def _change_policy(
        self, name: str, change: Callable[[Node, NodePolicy], NodePolicy], request: RequestKey | None
    ) -> NodeView:
        def build() -> Draft[NodeView]:
            node = self._state.get(Node, name)
            if node is None:
                raise NotFound(f"no node '{name[:60]}'", mend="'atoll nodes' lists them")
            held = self._state.get(NodePolicy, name)
            policy = change(node.record, held.record if held is not None else NodePolicy(name=name))
            key = keys.node_policy(name)
            if held is not None and held.record == policy:
                return Draft(answer=lambda _: self.get(name))
            shown = described(node.record, policy)
            return Draft(
                compare=[absent(key) if held is None else unchanged(key, held.revision)],
                ops=[Put(key, stored.encode_over(policy, held.beside if held is not None else None))],
                answer=lambda _: replace(self.get(name), policy=policy, node=shown),
            )

        return await self._context.write(NodeView, build, request)

    async def reinstate(self, name: str, gpu: str, *, reset: bool = False, caller: Caller = SYSTEM) -> GpuDevice:
        """Have a node offer a GPU again that was taken out for an error (with `reset`: reset it before), and return how it then
        stands. `gpu` is its id, or the beginning of one. Safe to repeat.

        Raises NotFound, Invalid (several begin so), and what the agent answers: Conflict (something holds it; with `reset`),
        Unsupported, Unavailable (no connection, or the driver refused), DeadlineExceeded, OutcomeUnknown.
        """
        held = self._state.get(Node, name)
        if held is None:
            raise NotFound(f"no node '{name[:60]}'", mend="'atoll nodes' lists them")
        device = _named(held.record, gpu)
        liveness = self._state.get(NodeLiveness, name)
        lost = liveness is not None and liveness.record.health is NodeHealth.LOST
        options = ReinstateOptions(device=device, reset=reset, by=caller.name or caller.id)
        pipe = await self._tunnels.open(name, StreamKind.GPU_REINSTATE, "", codec.to_plain(options), lost=lost)
        payload = await answer_of(pipe, name, REINSTATE_S, of_node=True)
        return codec.decode(payload, GpuDevice)

    async def register(self, node: Node) -> None:
        """Write what an agent says of its machine, if that is new. Safe to repeat.

        Raises Invalid, and Conflict for what is not the newest word (an agent whose date was set back says it again, with a higher
        number).
        """
        check_id(node.name, "name")
        node = checked(node)
        self._heartbeats.touch(node.name)

        def build() -> Draft[None]:
            held = self._state.get(Node, node.name)
            if held is not None and 0 < node.word < held.record.word:
                raise Conflict(f"a newer word of node '{node.name}' is known", mend="say it again as a newer one")
            first = held.record.registered_at if held is not None else self._context.clock.now()
            record = replace(node, registered_at=first)
            if held is not None and held.record == record:
                return Draft(answer=lambda _: None)
            key = keys.node(node.name)
            return Draft(
                compare=[absent(key) if held is None else unchanged(key, held.revision)],
                ops=[Put(key, codec.encode(record))],
                answer=lambda _: None,
            )

        await self._context.write(type(None), build)

    def usage(self, caller: Caller, project: str | None) -> tuple[Usage, ...]:
        """Return the latest usage of every instance that `caller` may see, as the node tells that it is on, by instance."""
        there = self._state.records(Instance) if project is None else self._state.found(Instance, by_project, project)
        nodes = {held.record.id: held.record.node for held in there.values() if caller.sees(held.record.project)}
        found = (
            usage for node, beat in self._heartbeats.all().items() for usage in beat.usage if nodes.get(usage.instance) == node
        )
        return tuple(sorted(found, key=lambda usage: usage.instance))

    def flows(self, project: str) -> Flows:
        """Return what instances of `project` sent each other and what was refused to them, as all nodes counted it."""
        flows: dict[tuple[str, str], Flow] = {}
        refusals: list[Refusal] = []
        complete = True
        for node, heartbeat in self._heartbeats.all().items():
            told = heartbeat.flows or Flows()
            complete = complete and told.complete
            for flow in (each for each in told.flows if each.project == project):
                held = flows.get((flow.source, flow.target), Flow(project=project, source=flow.source, target=flow.target))
                flows[flow.source, flow.target] = replace(
                    held,
                    bytes=held.bytes + flow.bytes,
                    packets=held.packets + flow.packets,
                    connections=held.connections + flow.connections,
                )
            refusals += [replace(each, node=node) for each in told.refusals if each.project == project]
        return Flows(
            flows=tuple(sorted(flows.values(), key=lambda flow: (-flow.bytes, flow.source, flow.target))),
            refusals=tuple(sorted(refusals, key=lambda each: (-each.packets, each.source, each.target, each.node))),
            complete=complete,
        )

    def _heartbeat(self, name: str, seen: Container[str], caller: Caller) -> Heartbeat | None:
        """Return a node's latest word, for a project's token without what instances of others use and say of themselves,
        and without images."""
        beat = self._heartbeats.latest(name)
        if beat is None or caller.project == EVERY_PROJECT:
            return beat
        return replace(
            beat, images=(), fetching="", flows=None, usage=tuple(usage for usage in beat.usage if usage.instance in seen)
        )

    def _windows(self) -> list[tuple[Maintenance, Window]]:
        """Return the windows of maintenance that are in force now."""
        return in_force((held.record for held in self._state.records(Maintenance).values()), self._context.clock.now())

    def _view(self, held: Held[Node], caller: Caller, windows: Sequence[tuple[Maintenance, Window]], sizes: Sizes) -> NodeView:
        name = held.record.name
        liveness = self._state.get(NodeLiveness, name)
        policy = self._state.get(NodePolicy, name)
        prefetch = self._state.get(Prefetch, name)
        statuses = self._state.records(Status)
        cpu_milli = memory_bytes = count = 0
        holding: list[Instance] = []
        seen: set[str] = set()
        for key, placed in self._state.found(Instance, by_node, name).items():
            instance = placed.record
            if caller.sees(instance.project):
                seen.add(instance.id)
            status = statuses.get(key)
            size = sizes.of(instance)
            if size is None or (status is not None and status.record.phase.final):
                continue
            cpu_milli += size[0]
            memory_bytes += size[1]
            count += 1
            if instance.gpus:
                holding.append(instance)
        return NodeView(
            node=described(held.record, policy.record if policy is not None else None),
            health=liveness.record.health if liveness is not None else NodeHealth.READY,
            since=liveness.record.since if liveness is not None else held.record.registered_at,
            policy=policy.record if policy is not None else None,
            heartbeat=self._heartbeat(name, seen, caller),
            allocated_cpu_milli=cpu_milli,
            allocated_memory_bytes=memory_bytes,
            instances=count,
            gpus=holdings_of(holding, held.record.capacity.gpus, caller.sees),
            evacuation=evacuation_of(held.record, policy.record if policy is not None else None, windows),
            prefetch=prefetch.record.images if prefetch is not None and caller.project == EVERY_PROJECT else (),
            revision=held.revision,
        )


def _named(node: Node, gpu: str) -> str:
    """Return the id of the node's one GPU whose id is, or begins with, `gpu`. Raises NotFound, Invalid."""
    ids = [device.id for device in node.capacity.gpus]
    found = [id for id in ids if id == gpu] or [id for id in ids if gpu and id.casefold().startswith(gpu.casefold())]
    if not found:
        there = f"it has: {', '.join(ids)}" if ids else "it has no GPU at all; `atoll nodes` lists those of each node"
        raise NotFound(f"node '{node.name}' has no GPU '{gpu[:60]}'", mend=there, field="gpu")
    if len(found) > 1:
        raise Invalid(f"several GPUs of node '{node.name}' begin with '{gpu[:60]}': {', '.join(found)}", field="gpu")
    return found[0]
