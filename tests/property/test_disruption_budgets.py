"""Whatever wants instances away, and however much of it at once: no budget is ever exceeded, and in the end all is served again."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from control_cell import Cell, node, run_virtual

from atoll.model import keys
from atoll.model.devices import GpuDevice, GpuHealth
from atoll.model.maintenance import Drain, Maintenance, MaintenanceSpec
from atoll.model.records import App, Instance, Node, NodePolicy, OwnerKind, Status
from atoll.model.spec import AppSpec, Disruption, Gpu, Health, Placement, Port, Resources, Rollout
from atoll.model.states import Desired
from atoll.model.units import Bytes, Cores, Seconds
from atoll.scheduling.budget import least_ready

NODES = ("n1", "n2", "n3", "n4")
CPU = 4000

amounts = st.one_of(st.integers(0, 4), st.sampled_from(("20%", "50%", "80%")))
budgets = st.one_of(
    st.none(),
    st.builds(lambda amount: Disruption(max_unavailable=amount), amounts),
    st.builds(lambda a: Disruption(min_ready=a), amounts),
)


@st.composite
def apps(draw: st.DrawFn, name: str) -> tuple[AppSpec, int]:
    surge = draw(st.integers(0, 2))
    unavailable = draw(st.integers(0 if surge else 1, 2))
    replicas = draw(st.integers(1, 6))
    rule = draw(budgets) if surge else None
    gpu = Gpu(count=1) if name == "gpu" else None
    spec = AppSpec(
        name=name,
        image="x",
        ports=(Port(port=80),),
        health=Health(),
        resources=Resources(cpu=Cores(0.5), memory=Bytes(64 << 20), gpu=gpu),
        rollout=Rollout(max_surge=surge, max_unavailable=unavailable, drain=Seconds(2)),
        disruption=rule,
        placement=Placement(priority=40),
    )
    return spec, min(replicas, 4) if gpu else replicas


steps = st.lists(
    st.tuples(
        st.sampled_from(("drain", "undrain", "maintain", "restart", "release", "urgent", "quarantine", "pause")),
        st.integers(0, 1_000_000),
    ),
    min_size=3,
    max_size=12,
)


def machine(name: str, *, sick: frozenset[str] = frozenset()) -> Node:
    devices = tuple(
        GpuDevice(
            id=f"{name}-{index}",
            model="fake",
            memory_bytes=1 << 30,
            health=GpuHealth.QUARANTINED if f"{name}-{index}" in sick else GpuHealth.OK,
        )
        for index in range(3)
    )
    made = node(name, cpu=CPU)
    return replace(made, capacity=replace(made.capacity, gpus=devices))


class Watch:
    """Looks at every revision: what was ready and is told to leave must leave enough behind."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.taken = 0
        self.broken: list[str] = []

    async def run(self) -> None:
        state = self.cell.state
        instances = {key: held.record for key, held in state.records(Instance).items()}
        ready = {key for key, held in state.records(Status).items() if held.record.ready}
        async for deltas in state.changes():
            left: set[str] = set()
            for delta in deltas.deltas:
                if delta.kind is Status:
                    (ready.add if delta.new is not None and delta.new.record.ready else ready.discard)(delta.key)
                elif delta.kind is Instance:
                    before, after = instances.pop(delta.key, None), delta.new.record if delta.new is not None else None
                    if after is not None:
                        instances[delta.key] = after
                    serves = after is not None and after.desired is Desired.RUN
                    if before is not None and before.desired is Desired.RUN and delta.key in ready and not serves:
                        left.add(f"{before.project}/{before.owner}")
                        self.taken += 1
            for owner in left:
                self.check(owner, [key for key, i in instances.items() if f"{i.project}/{i.owner}" == owner], instances, ready)

    def check(self, owner: str, there: list[str], instances: dict[str, Instance], ready: set[str]) -> None:
        held = self.cell.state.get(App, owner)
        if held is None:
            return
        serves = sum(key in ready and instances[key].desired is Desired.RUN for key in there)
        least = least_ready(held.record.spec, held.record.replicas)
        if serves < least:
            why = sorted({i.reason for key in there if (i := instances[key]).desired is not Desired.RUN})
            self.broken.append(f"{serves} of {owner} are ready and {least} must be; those that leave: {why}")


@settings(max_examples=15, deadline=None)
@given(web=apps("web"), gpu=apps("gpu"), does=steps)
def test_no_mix_of_disruptions_exceeds_a_budget_and_all_serve_in_the_end(
    web: tuple[AppSpec, int], gpu: tuple[AppSpec, int], does: list[tuple[str, int]]
) -> None:
    async def main() -> None:
        async with Cell() as cell:
            for name in NODES:
                await cell.put(keys.node(name), machine(name))
            await cell.add_ingress()
            cell.lead(chance=random.Random(7))
            cell.agents()
            held = {spec.name: await cell.deploy(spec, replicas=count) for spec, count in (web, gpu)}
            wanted = web[1] + gpu[1]
            await cell.until(lambda: cell.ready() == wanted)
            await cell.quiet(15)
            watch = Watch(cell)
            cell.keep(asyncio.ensure_future(watch.run()))
            sick: dict[str, frozenset[str]] = {}
            for number, (what, dice) in enumerate(does):
                name, which = NODES[dice % len(NODES)], ("web", "gpu")[dice % 2]
                app = held[which]
                match what:
                    case "drain":
                        drain = Drain(since=cell.clock.now(), deadline=cell.clock.now() + 1e6)
                        await cell.put(keys.node_policy(name), NodePolicy(name=name, drain=drain))
                    case "undrain":
                        await cell.put(keys.node_policy(name), NodePolicy(name=name))
                    case "maintain":
                        spec = MaintenanceSpec(
                            name="m", nodes=f"node={name}", start=cell.clock.now() + 5000, length=Seconds(10), lead=Seconds(5000)
                        )
                        await cell.put(keys.maintenance("m"), Maintenance(spec=spec, created_at=0.0))
                    case "restart":
                        held[which] = await cell.change(app, generation=app.generation + 1)
                    case "release":
                        spec = replace(app.spec, env={"N": str(number)})
                        held[which] = await cell.deploy(
                            spec, release=app.release + 1, replicas=app.replicas, generation=app.generation
                        )
                    case "urgent":
                        size = Resources(cpu=Cores(1 + dice % 3), memory=Bytes(64 << 20))
                        urgent = AppSpec(
                            name=f"urgent-{number}", image="x", health=Health(), resources=size, placement=Placement(priority=90)
                        )
                        await cell.deploy(urgent, replicas=1 + dice % 3)
                    case "quarantine":
                        sick[name] = sick.get(name, frozenset()) | {f"{name}-{dice % 3}"}
                        await cell.put(keys.node(name), machine(name, sick=sick[name]))
                    case _:
                        pass
                await asyncio.sleep((0, 0.01, 0.3, 3, 20)[dice % 5])
            await cell.quiet(60)
            assert watch.broken == []
            for name in NODES:
                await cell.put(keys.node_policy(name), NodePolicy(name=name))
                await cell.put(keys.node(name), machine(name))
            await cell.put(keys.node("n5"), replace(machine("n5"), capacity=replace(machine("n5").capacity, cpu_milli=64_000)))

            def all_serve() -> bool:
                apps_of = {"web": web[1], "gpu": gpu[1]}
                return all(
                    sum(i.owner == name and i.release == held[name].release and serves(cell, i) for i in cell.instances()) == count
                    for name, count in apps_of.items()
                )

            await cell.until(all_serve, within_s=6000)
            assert watch.broken == []
            assert all(i.owner_kind is OwnerKind.APP for i in cell.instances())

    run_virtual(main())


def serves(cell: Cell, instance: Instance) -> bool:
    status = cell.status(instance)
    return instance.desired is Desired.RUN and status is not None and status.ready
