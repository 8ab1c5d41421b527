"""A network in memory that keeps every promise of the port but moving packets. Public: the simulator and tests use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from atoll.model.errors import Exhausted, Unavailable
from atoll.model.fabric import ipv6_of
from atoll.model.flows import Flows
from atoll.model.ports.network import Counters, Link
from atoll.model.spec import NetworkRules, Port, host_ports
from atoll.network.addresses import AddressPool


class FakeNetworkState:
    """What a node's kernel would hold: it outlives the agent and its `FakeNetwork`, so that a crash can be simulated."""

    def __init__(self, subnet: str = "10.64.0.0/16", ula: str = "") -> None:
        self.ula = ula
        self.addresses = AddressPool(subnet)
        self.links: dict[str, Link] = {}
        self.numbers: dict[str, int] = {}
        self.projects: dict[str, str] = {}
        self.ports: dict[str, tuple[Port, ...]] = {}
        """Instance → what of it can be reached."""
        self.rules: dict[str, NetworkRules | None] = {}
        self.exhausted = False
        """Set it, and every new `attach` raises Exhausted."""
        self.failures = 0
        """So many of the next calls raise Unavailable, having changed nothing."""
        self.attached_total = 0
        self.flows = Flows()
        """What was counted; set it."""

    def published(self) -> dict[str, str]:
        """Return port of the node → the instance that answers there."""
        return {port: id for id, ports in self.ports.items() for port in host_ports(ports)}

    def reachable(self, id: str, port: int) -> bool:
        """Return whether the node's ingress would reach `port` of the instance."""
        return id in self.links and any(declared.port == port for declared in self.ports[id])


class FakeNetwork:
    """Implements `Network` on a `FakeNetworkState`; several in turn may use one state, as agents of one node do."""

    def __init__(self, state: FakeNetworkState | None = None) -> None:
        self.state = state if state is not None else FakeNetworkState()

    async def attach(self, id: str, *, project: str, ports: Sequence[Port], rules: NetworkRules | None = None) -> Link:
        state = self.state
        self._fail_if_told()
        for port in host_ports(ports):
            other = next((other for other, theirs in state.ports.items() if other != id and port in host_ports(theirs)), None)
            if other is not None:
                raise Unavailable(f"the port {port} of this node is taken: instance {other} has it", mend="wait until it is gone")
        link = state.links.get(id)
        if link is None:
            if state.exhausted:
                raise Exhausted("all addresses are in use", mend="stop instances, or give this node a larger subnet")
            number = state.addresses.take()
            address = state.addresses.address(number)
            link = Link(
                id=id,
                netns=Path(f"/run/netns/atoll-fake-{number}"),
                address=address,
                interface=f"atfake{number}",
                ipv6=ipv6_of(state.ula, address) if state.ula else None,
            )
            state.links[id] = link
            state.numbers[id] = number
            state.projects[id] = project
            state.attached_total += 1
        state.ports[id] = tuple(ports)
        state.rules[id] = rules
        return link

    async def detach(self, id: str) -> None:
        self._fail_if_told()
        self._remove(id)

    async def recover(self, keep: Sequence[str]) -> Sequence[Link]:
        self._fail_if_told()
        for id in [id for id in self.state.links if id not in set(keep)]:
            self._remove(id)
        return tuple(self.state.links[id] for id in dict.fromkeys(keep) if id in self.state.links)

    def counters(self) -> Mapping[str, Counters]:
        """Nothing ever goes over a link."""
        return {id: Counters(0, 0, 0, 0, 0) for id in self.state.links}

    async def flows(self) -> Flows:
        """What the state was given to tell."""
        return self.state.flows

    async def close(self) -> None:
        """Let go; the state keeps every link."""

    def _remove(self, id: str) -> None:
        state = self.state
        if state.links.pop(id, None) is not None:
            state.addresses.give_back(state.numbers.pop(id))
            state.projects.pop(id)
            state.ports.pop(id)
            state.rules.pop(id, None)

    def _fail_if_told(self) -> None:
        if self.state.failures > 0:
            self.state.failures -= 1
            raise Unavailable("the fake network was told to fail")
