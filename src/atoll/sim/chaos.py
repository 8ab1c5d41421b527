"""The larger faults, one after another, until all is healed: here those of machines; the others are in `cuts`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from atoll.api.service.access import SYSTEM
from atoll.devices.xid import classify_xid
from atoll.model.errors import AtollError, Unavailable
from atoll.model.ports.devices import Trouble
from atoll.model.records import Instance
from atoll.sim import cuts
from atoll.sim.cuts import Cuts, pairs
from atoll.sim.gpus import XIDS
from atoll.sim.machine import SimMachine
from atoll.sim.server import Server

if TYPE_CHECKING:
    from atoll.sim.world import World

DOWN_S = 8.0
"""The longest that a killed process usually stays away."""
PAUSE_S = 9.0
FULL_S = 20.0
"""The longest that a machine's disk is full."""
SILENT_S = 40.0
"""The longest that a GPU driver hangs."""
DEAD_MAX = 2
"""Machines outside a core: more that are silent at once, and nobody is given up for a while (`control/detection/brake.py`)."""
GIVEN_UP_S = 65.0
"""Sometimes a machine is away for longer than it takes to be given up."""


class Chaos:
    def __init__(self, world: World) -> None:
        self._world = world
        self._choose = world.choose
        self._story = world.story
        self._cuts = Cuts(world)
        self._cordoned: set[str] = set()

    async def run(self) -> None:
        """Do one thing after another, for ever; what takes its time goes on beside the next."""
        profile = self._world.profile
        if not profile.chaos:
            await asyncio.Event().wait()  # nothing is to happen: the run's end cancels this
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(self._choose.expovariate(1 / profile.chaos_every_s))
                kind = self._choose.choice(profile.chaos)
                self._story.mark(f"chaos: {kind}")
                group.create_task(self._do(kind))

    async def heal_core(self) -> None:
        """Undo all harm to a core (a majority of the store, one server, some machines), and leave the others for dead."""
        world = self._world
        members = self._choose.sample(list(world.cluster.members), world.cluster.quorum)
        world.net.mend_all()
        while not all(world.cluster.can_lose(name) for name in world.cluster.members if name not in members):
            # Who is to be left must know everything that counts: what only the others have would be lost with them.
            world.cluster.heal(list(world.cluster.members))
            await asyncio.sleep(1.0)
        server = self._choose.choice(world.servers)
        dead = self._choose.sample(list(world.machines.values()), self._choose.randint(0, min(DEAD_MAX, len(world.machines) - 1)))
        self._story.tell("a core is healed", members=members, server=server.name, dead=[machine.name for machine in dead])
        for name in world.cluster.members:
            if name not in members:
                world.cluster.crash(name)
        for other in world.servers:
            if other is not server:
                await other.crash()
        for machine in dead:
            await machine.restart()
            world.dead.add(machine.name)
        await self._heal_all(members, [server])

    async def heal(self) -> None:
        """Undo everything, so that from now on nothing fails any more."""
        self._world.net.mend_all()
        self._world.dead.clear()
        await self._heal_all(list(self._world.cluster.members), self._world.servers)

    async def _heal_all(self, members: Sequence[str], servers: Sequence[Server]) -> None:
        world = self._world
        world.faults.heal()
        world.cluster.heal(members)
        for server in servers:
            server.resume()
            server.start()
            server.kill_rivals()
            server.clock.skew_s = 0.0
            if server.store is not None:
                server.store.stalled_until = 0.0
        for machine in world.machines.values():
            machine.sick.clear()
            machine.disk.full = False
            machine.resume_agent()
            machine.clock.skew_s = 0.0
            if machine.rack is not None:
                machine.rack.hardware.answer()  # what has vanished stays away: its work must do without
            if machine.name not in world.dead:
                machine.start_agent()
        for name in sorted(self._cordoned):
            await self._cordon(name, False)
        self._cordoned.clear()

    async def _do(self, kind: str) -> None:
        if kind in cuts.KINDS:
            await self._cuts.do(kind)
            return
        world = self._world
        machine = self._choose.choice(list(world.machines.values()))
        match kind:
            case "agent-crash":
                await machine.crash_agent()
                await self._wait(DOWN_S)
                machine.start_agent()
            case "machine-restart":
                await machine.restart()
                await self._wait_long()
                machine.start_agent()
            case "agent-pause":
                if not machine.paused and machine.life.alive:
                    machine.pause_agent()
                    await self._wait(PAUSE_S)
                    machine.resume_agent()
            case "disk-full":
                machine.disk.full = True
                await self._wait(FULL_S)
                machine.disk.full = False
            case "record-lost":
                await machine.restart(forgets=True)
                await self._wait(DOWN_S)
                machine.start_agent()
            case "partition":
                # Sometimes from the other nodes, too, through which it would still be heard.
                others = [name for name in world.machines if name != machine.name] if self._choose.random() < 0.6 else []
                self._story.tell("a node is cut off from the servers", node=machine.name, others=others)
                links = pairs(machine.name, [*(server.name for server in world.servers), *others])
                world.net.cut(links)
                await self._wait_long()
                world.net.mend(links)
            case "ingress-cut":
                ingress = self._choose.choice(world.ingresses)
                links = pairs(ingress.name, [server.name for server in world.servers])
                world.net.cut(links)
                await self._wait(DOWN_S)
                world.net.mend(links)
            case "process-crash" | "sick":
                self._hurt(machine, kind)
            case "pull-fails":
                for reference in ("registry.test/app:1", "registry.test/job:1"):
                    machine.images.fail(reference, Unavailable("the registry hangs"), times=2)
                await machine.images.collect(())
            case "compaction":
                with contextlib.suppress(AtollError):
                    await world.store.compact(await world.store.revision())
            case "cordon":
                self._cordoned.add(machine.name)
                await self._cordon(machine.name, True)
            case "gpu-vanish" | "gpu-xid" | "gpu-silent":
                await self._break_gpu(kind)
            case "stop-instance":
                await self._stop_instance()
            case _:
                raise AssertionError(f"no chaos is called {kind}")

    async def _break_gpu(self, kind: str) -> None:
        racks = [(machine, machine.rack) for machine in self._world.machines.values() if machine.rack is not None]
        if not racks:
            return
        machine, rack = self._choose.choice(racks)
        device = self._choose.choice(rack.hardware.ids)
        self._story.tell(f"a GPU fails: {kind}", node=machine.name, device=device)
        match kind:
            case "gpu-silent":
                rack.hardware.hang(self._choose.random() * SILENT_S)
            case "gpu-vanish":
                rack.lost.add(device)
                rack.hardware.vanish(device, told=self._choose.random() < 0.7)
            case _:
                code = self._choose.choice(XIDS)
                if classify_xid(code).trouble in (Trouble.BROKEN, Trouble.VANISHED):
                    rack.lost.add(device)
                rack.hardware.xid(device, code)
        if kind != "gpu-silent" and self._choose.random() < 0.5:
            # A program whose device fails usually ends.
            for id in [id for id, grants in sorted(rack.held().items()) if any(grant.device == device for grant in grants)]:
                if id in machine.host.running():
                    machine.host.crash(id, oom=False)

    async def _wait(self, most_s: float) -> None:
        await asyncio.sleep(self._choose.random() * most_s)

    async def _wait_long(self) -> None:
        await self._wait(DOWN_S)
        if self._choose.random() < 0.5:
            await asyncio.sleep(GIVEN_UP_S)

    def _hurt(self, machine: SimMachine, kind: str) -> None:
        running = machine.host.running()
        if not running:
            return
        id = self._choose.choice(running)
        if kind == "sick":
            self._story.tell("a process hangs", node=machine.name, instance=id)
            machine.make_sick(id)
        else:
            self._story.tell("a process crashes", node=machine.name, instance=id)
            machine.host.crash(id, oom=self._choose.random() < 0.3)

    async def _cordon(self, name: str, cordoned: bool) -> None:
        user = self._world.app_users[0]
        try:
            await user.insist(f"cordon {name} {cordoned}", lambda s, r: s.nodes.cordon(name, cordoned, request=r))
        except AtollError as error:
            self._story.tell("cordoning was refused", cause=error.message)

    async def _stop_instance(self) -> None:
        ids = sorted(instance.id for instance in self._world.rules.records[Instance].values())
        if not ids:
            return
        id = self._choose.choice(ids)
        try:
            await self._world.app_users[0].insist(f"stop {id}", lambda s, r: s.instances.stop(SYSTEM, "default", id, request=r))
        except AtollError as error:
            self._story.tell("stopping was refused", cause=error.message)
