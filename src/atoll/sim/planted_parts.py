"""Planted bugs of whole parts of a run: members of the store, machines, ingresses. What each does wrong is in its name."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from atoll.devices.node import NodeDevices
from atoll.model.devices import GpuDevice, GpuHealth
from atoll.model.records import Assignment, Endpoint
from atoll.model.states import Desired
from atoll.network.fake import FakeNetwork
from atoll.node.fake import FakeMachine
from atoll.node.record import Entry
from atoll.node.transitions import State as NodeState
from atoll.sim.gpus import Rack
from atoll.sim.ingress import SimIngress
from atoll.sim.lives import SimNetwork
from atoll.sim.machine import SimMachine
from atoll.sim.members import Apply, Cluster, Member
from atoll.sim.record import SimRecord

# The store's members.


class EagerCluster(Cluster):
    """Acknowledges what only its leader has."""

    async def led(self, member: Member, *, to_read: bool = False) -> None:
        if not self.hears(member):
            await super().led(member, to_read=to_read)

    def propose(self, apply: Apply) -> Any:
        answer = super().propose(apply)
        leader = self.leader
        if leader is not None:
            self._commit(leader, len(leader.log))
        return answer


class CarelessCluster(Cluster):
    """Makes anyone leader, whatever it has missed."""

    def _age(self, member: Member) -> tuple[int, int]:
        return (0, 0)


# Machines.


class LeakyNetwork(SimNetwork):
    async def detach(self, id: str) -> None:
        """Forget to."""


class LeakyMachine(SimMachine):
    def make_network(self) -> FakeNetwork:
        return LeakyNetwork(self.links, self.life, self._faults, self._story)


class BoastfulMachine(SimMachine):
    """Says that it has more than it has."""

    def __init__(self, *arguments: Any, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self._machine = FakeMachine(cpu_milli=8 * self.capacity[0], memory_bytes=8 * self.capacity[1])


class LostRecord(SimRecord):
    def load(self) -> list[Entry]:
        return []


class ForgetfulMachine(SimMachine):
    """Finds its record empty at every start."""

    def make_record(self) -> SimRecord:
        return LostRecord(self.disk, self.life)


class StaleRecord(SimRecord):
    """Keeps neither that an instance is to stop nor how far it came since it ran."""

    def _keep(self, assignment: Assignment) -> None:
        super()._keep(replace(assignment, instance=replace(assignment.instance, desired=Desired.RUN)))

    def put_state(self, id: str, state: NodeState) -> None:
        if state.desired is Desired.RUN and not state.phase.final:
            super().put_state(id, state)


class UndeadMachine(SimMachine):
    """Starts again what was to stop when its agent starts again."""

    def make_record(self) -> SimRecord:
        return StaleRecord(self.disk, self.life)


class TwoHeadedMachine(SimMachine):
    """Starts an agent beside the one that should have ended: both adopt what runs."""

    async def crash_agent(self) -> None:
        self._story.tell("the agent lives on beside the next", node=self.name)
        self.life = type(self.life)("nobody")
        self.life.end()
        self.agent = None


class Denying(NodeDevices):
    """Says of every device that it is well."""

    async def inventory(self) -> tuple[GpuDevice, ...]:
        return tuple(replace(each, health=GpuHealth.OK, present=True, reason="") for each in await super().inventory())


class DenyingRack(Rack):
    kind = Denying


class DenyingMachine(SimMachine):
    kind_of_rack = DenyingRack


# The ingress.


class DeafIngress(SimIngress):
    """Sends requests to what is draining."""

    def takes(self, endpoint: Endpoint) -> bool:
        return True
