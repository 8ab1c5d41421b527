"""Many nodes silent at once: which places that is, and the brake, as the leader keeps them through its term."""

from __future__ import annotations

from atoll.control.actions import Decision, WriteBrake
from atoll.control.detection import brake as brakes
from atoll.control.detection.awake import BEHIND_MAX_S
from atoll.control.detection.places import Place, dark
from atoll.control.nodes import LOST_S
from atoll.control.world import World
from atoll.model.records import CELL_PROJECT, Brake, BrakeRelease, Node, NodeHealth, NodeLiveness, Severity

DARK_S = 1.0
"""A place must have been dark for so long before it is told: of a region its sites go dark one after the other."""
UNREACHABLE = {"site": "site-unreachable", "region": "region-unreachable"}
READY = {"site": "site-ready", "region": "region-ready"}
"""Codes of events."""
KEY = "cell"
"""Behind the kinds' prefixes: there is one brake."""


class Outages:
    def __init__(self, world: World) -> None:
        self._world = world
        self._brake = brakes.Brake()
        self._dark: dict[Place, float] = {}
        """Places → since when all of their nodes have been silent."""
        self._told: set[Place] | None = None
        self._roundabout: frozenset[str] = frozenset()
        self._overrun = False

    def look(self, silent: set[str], doubted: int, decision: Decision, monotonic: float) -> None:
        """Take in which nodes do not answer, and how many more are about to be believed silent."""
        self._places(silent, decision, monotonic)
        nodes = self._world.state.records(Node)
        gone = {name for name, since in self._world.lost_since.items() if monotonic - since >= brakes.RECENT_S}
        counted = len(silent - gone) + doubted
        there = len(nodes) - len(gone & nodes.keys())
        held, release = self._world.state.get(Brake, KEY), self._world.state.get(BrakeRelease, KEY)
        # By the store's order, and not by anybody's clock: a release is for the brake that was on when it was given.
        released = held is not None and release is not None and release.revision > held.revision
        before = self._brake
        self._brake = brakes.look(before, silent=counted, nodes=there, released=released, now=monotonic)
        if self._brake.on_since is not None and held is None:
            decision.do(WriteBrake(Brake(since=decision.now, silent=counted, nodes=there)))
            text = (
                f"{counted} of {there} nodes do not answer; none is given up, and nothing replaced, until more of them do, "
                f"{brakes.HOLD_S / 60:g} min have passed, or somebody says 'atoll nodes release-brake'"
            )
            self._tell("cell/main", "brake-on", text, decision, Severity.ERROR, silent=counted, nodes=there)
        elif self._brake.on_since is None and held is not None:
            decision.do(WriteBrake(None))
            why = "an operator said so" if released else "time is up" if self._brake.overruled else "enough of them answer"
            who = f" ({release.record.by})" if released and release is not None and release.record.by else ""
            self._tell("cell/main", "brake-off", f"nodes that do not answer are given up again: {why}{who}", decision)

    def may_lose(self) -> bool:
        """Whether one more node may be given up now; it counts."""
        self._brake, may = brakes.take(self._brake)
        return may

    def _places(self, silent: set[str], decision: Decision, monotonic: float) -> None:
        state = self._world.state
        nodes = state.records(Node)
        if not silent and not self._dark and self._told is not None and not self._told:
            return
        found = dark((held.record.site, held.record.region, name in silent) for name, held in nodes.items())
        self._dark = {place: self._dark.get(place, monotonic) for place in found}
        if self._told is None:
            # What was dark before this term began has been told.
            away = {name for name, held in state.records(NodeLiveness).items() if held.record.health is NodeHealth.LOST}
            self._told = set(dark((h.record.site, h.record.region, name in away) for name, h in nodes.items()))
        for place, since in self._dark.items():
            if monotonic - since >= DARK_S and place not in self._told:
                self._told.add(place)
                self._tell_dark(place, decision)
        for place in self._told - found:
            here = [name for name, held in nodes.items() if place == (place[0], getattr(held.record, place[0]))]
            if all(name in silent for name in here):
                continue  # one word for one cause: of a region that is dark, its sites are not listed any more
            self._told = self._told - {place}
            self._tell(f"{place[0]}/{place[1]}", READY[place[0]], f"{place[0]} {place[1]} answers again", decision)

    def _tell_dark(self, place: Place, decision: Decision) -> None:
        kind, name = place
        nodes = [held.record for held in self._world.state.records(Node).values() if getattr(held.record, kind) == name]
        what = f"{len({node.site for node in nodes})} sites, {len(nodes)} nodes" if kind == "region" else f"{len(nodes)} nodes"
        text = f"{kind} {name} does not answer: {what}, all at once or one after the other"
        self._tell(f"{kind}/{name}", UNREACHABLE[kind], text, decision, Severity.ERROR, nodes=len(nodes))

    def tell_roundabout(self, names: set[str], decision: Decision) -> None:
        """Tell of nodes that only others hear: they are well, but the way to the leader is not."""
        for name in sorted(names - self._roundabout):
            text = f"node {name} is heard through other nodes only; the way between it and the leader is broken"
            decision.tell(CELL_PROJECT, f"node/{name}", "path-broken", text, Severity.WARNING, node=name)
        self._roundabout = frozenset(names)

    def tell_overrun(self, overrun: bool, decision: Decision) -> None:
        """Tell that more beats come than are taken, which anybody can bring about who reaches the port, and that this is over."""
        if overrun is self._overrun:
            return
        self._overrun = overrun
        if overrun:
            text = (
                f"more comes to the port for beats than the leader takes, for {BEHIND_MAX_S:g} s: until that ends, heartbeats over "
                f"HTTP alone show which nodes are dead, after {LOST_S:g} s; let only nodes reach that port, or give the server "
                "more of a processor"
            )
            self._tell("cell/main", "beats-overrun", text, decision, Severity.ERROR)
        else:
            self._tell("cell/main", "beats-heard", "all beats are taken again, and nodes that die are found in seconds", decision)

    def _tell(
        self, subject: str, code: str, text: str, decision: Decision, severity: Severity = Severity.INFO, **data: int
    ) -> None:
        decision.tell(CELL_PROJECT, subject, code, text, severity, None, **data)
