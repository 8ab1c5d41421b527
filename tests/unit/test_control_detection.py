"""The leader's loop with the detection: nodes given up in seconds, the brake, places, and how long instances are waited for."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from control_cell import Cell, run_virtual
from msgspec import structs

from atoll.control.detection.awake import BEHIND_MAX_S
from atoll.control.detection.brake import HOLD_S
from atoll.control.detection.exchange import Exchange
from atoll.control.detection.rules import TICK_S
from atoll.control.nodes import LOST_S
from atoll.control.patience import STOP_MARGIN_S, patience_s
from atoll.model import keys
from atoll.model.errors import Invalid
from atoll.model.records import AppPhase, Brake, BrakeRelease, Event, Instance, JobPhase, Node, NodeHealth, NodeLiveness
from atoll.model.spec import AppSpec, JobSpec, Lost, LostReplace, Stop, Volume, check_app
from atoll.model.states import Phase
from atoll.model.units import Seconds

WEB = AppSpec(name="web", image="x")


class BeatingCell(Cell):
    """Every node that is not in `dead` beats; those in `silent` send no heartbeats over HTTP, as in `Cell`."""

    def __init__(self) -> None:
        super().__init__()
        self.dead: set[str] = set()
        self.flooded = False
        """The leader's socket is full of what others sent, and no beat gets through."""

    async def begin(self, **sites: str) -> None:
        """Start with these nodes, each in its site; what stands behind a slash is its region."""
        self.detection = Exchange(
            key_of=lambda node, epoch: bytes(32),
            site_of=lambda name: sites.get(name, "a").partition("/")[0],
            last_seen=self.last_seen,
            clock=self.clock,
            chance=random.Random(3),
        )
        for name, place in sites.items():
            site, _, region = place.partition("/")
            await self.add_node(name, site=site, region=region or "r")
            self.detection.peers.add(name)
        self.keep(asyncio.ensure_future(self._beat()))
        self.agents()
        self.lead()
        await asyncio.sleep(3)

    async def _beat(self) -> None:
        detection = self.detection
        assert detection is not None
        while True:
            now = detection.awake.now()
            for name in self.state.records(Node):
                peer = detection.peers.get(name)
                if peer is not None and name not in self.dead and not self.flooded:
                    detection.peers.heard[peer.row] = now
                    self.detection.peers.direct[peer.row] = now
            detection.tick(behind=self.flooded)
            await asyncio.sleep(TICK_S)

    def die(self, *names: str) -> float:
        self.dead |= set(names)
        self.silent |= set(names)
        return self.clock.now()

    def come_back(self, *names: str) -> None:
        self.dead -= set(names)
        self.silent -= set(names)

    def health(self, name: str) -> NodeHealth:
        held = self.state.get(NodeLiveness, name)
        return held.record.health if held is not None else NodeHealth.READY

    def events(self, code: str) -> list[Event]:
        found = [held.record for held in self.state.records(Event).values() if held.record.code == code]
        return sorted(found, key=lambda event: event.id)

    def on(self, node: str) -> list[Instance]:
        return [instance for instance in self.instances() if instance.node == node]

    def serves(self, name: str = "web") -> bool:
        status = self.app_status(name)
        return status is not None and status.phase is AppPhase.RUNNING


def live(main: Any) -> None:
    async def begin() -> None:
        async with BeatingCell() as cell:
            await main(cell)

    run_virtual(begin())


def test_a_dead_nodes_work_has_a_place_elsewhere_within_five_seconds() -> None:
    async def main(cell: BeatingCell) -> None:
        await cell.begin(n1="a", n2="a", n3="b")
        await cell.deploy(WEB, replicas=6)
        await cell.until(cell.serves)
        gone = {instance.id for instance in cell.on("n1")}
        died = cell.die("n1")
        await cell.until(lambda: len([i for i in cell.instances() if i.id not in gone and i.node in ("n2", "n3")]) == 6)
        assert 3.5 < cell.clock.now() - died < 5.0
        assert cell.health("n1") is NodeHealth.LOST
        await cell.until(lambda: cell.serves() and not cell.on("n1"))

    live(main)


def test_nothing_new_goes_to_a_node_that_is_being_asked() -> None:
    async def main(cell: BeatingCell) -> None:
        await cell.begin(n1="a", n2="a", n3="b")
        cell.die("n1")
        await asyncio.sleep(2.0)
        assert cell.health("n1") is NodeHealth.READY
        await cell.deploy(WEB, replicas=4)
        await cell.until(lambda: len([i for i in cell.instances() if i.node]) == 4)
        assert cell.on("n1") == []

    live(main)


def test_when_many_fall_silent_at_once_none_is_given_up_until_they_are_back() -> None:
    async def main(cell: BeatingCell) -> None:
        names = [f"n{number}" for number in range(10)]
        await cell.begin(**{name: "a" if number < 5 else "b" for number, name in enumerate(names)})
        await cell.deploy(WEB, replicas=10)
        await cell.until(cell.serves)
        before = {instance.id for instance in cell.instances()}
        cell.die(*names[:3])
        await asyncio.sleep(60)
        assert {cell.health(name) for name in names[:3]} == {NodeHealth.UNREACHABLE}
        assert [event.subject for event in cell.events("brake-on")] == ["cell/main"]
        assert cell.state.get(Brake, "cell") is not None
        cell.come_back(*names[:3])
        await cell.until(lambda: all(cell.health(name) is NodeHealth.READY for name in names))
        assert cell.state.get(Brake, "cell") is None
        assert {instance.id for instance in cell.instances()} == before, "everything is where it was"
        assert not cell.events("node-lost")

    live(main)


@pytest.mark.parametrize("how", ["an operator", "time"])
def test_the_brake_lets_go_when_somebody_or_time_says_so(how: str) -> None:
    async def main(cell: BeatingCell) -> None:
        await cell.begin(**{f"n{number}": "a" for number in range(10)})
        await cell.deploy(WEB, replicas=10)
        await cell.until(cell.serves)
        died = cell.die("n0", "n1", "n2", "n3")
        await asyncio.sleep(30)
        if how == "an operator":
            await cell.put(keys.brake_release(), BrakeRelease(at=cell.clock.now(), by="ada"))
            await cell.until(lambda: cell.serves() and not any(cell.on(f"n{number}") for number in range(4)), 20)
            assert "ada" in cell.events("brake-off")[0].message
        else:
            await cell.until(lambda: cell.health("n0") is NodeHealth.LOST, 2 * HOLD_S)
            assert HOLD_S < cell.clock.now() - died < HOLD_S + 10
        assert len(cell.events("brake-on")) == 1

    live(main)


def test_a_new_leader_takes_the_brake_over_as_it_is() -> None:
    async def main(cell: BeatingCell) -> None:
        await cell.begin(**{f"n{number}": "a" for number in range(10)})
        cell.die("n0", "n1", "n2", "n3")
        await asyncio.sleep(30)
        cell.stop_leading()
        await asyncio.sleep(0.1)
        cell.lead()
        await asyncio.sleep(60)
        assert {cell.health(f"n{number}") for number in range(4)} == {NodeHealth.UNREACHABLE}
        assert len(cell.events("brake-on")) == 1

    live(main)


def test_a_site_and_a_region_that_fall_silent_are_told_as_such() -> None:
    async def main(cell: BeatingCell) -> None:
        fleet = {f"a{n}": "a/r" for n in range(2)} | {f"b{n}": "b/r" for n in range(2)} | {f"c{n}": "c/q" for n in range(16)}
        await cell.begin(**fleet)
        cell.die("a0", "a1")
        await asyncio.sleep(10)
        assert [event.subject for event in cell.events("site-unreachable")] == ["site/a"]
        cell.die("b0", "b1")
        await asyncio.sleep(10)
        assert [event.subject for event in cell.events("region-unreachable")] == ["region/r"]
        cell.come_back("a0", "a1", "b0", "b1")
        await asyncio.sleep(5)
        assert [event.subject for event in cell.events("region-ready")] == ["region/r"]
        assert [event.subject for event in cell.events("site-unreachable")] == ["site/a"]

    live(main)


def test_an_app_that_waits_is_replaced_when_its_patience_is_over() -> None:
    async def main(cell: BeatingCell) -> None:
        await cell.begin(n1="a", n2="a")
        spec = structs.replace(WEB, lost=Lost(replace=LostReplace.WAIT, wait=Seconds(120)))
        await cell.deploy(spec)
        await cell.until(cell.serves)
        home = cell.instances()[0]
        died = cell.die(home.node or "")
        await cell.until(lambda: cell.health(home.node or "") is NodeHealth.LOST)
        await asyncio.sleep(60)
        assert [i.id for i in cell.instances()] == [home.id]
        status = cell.app_status()
        assert status is not None
        assert (status.phase, status.ready) == (AppPhase.DEGRADED, 0)
        assert "waits for it" in status.message
        await cell.until(lambda: any(i.id != home.id and i.node for i in cell.instances()), 200)
        assert 120 < cell.clock.now() - died < 130

    live(main)


@pytest.mark.parametrize(
    "spec",
    [
        structs.replace(WEB, lost=Lost(replace=LostReplace.NEVER)),
        structs.replace(WEB, volumes=(Volume(name="data", path="/data"),)),
    ],
    ids=["never", "volumes of its node"],
)
def test_what_waits_for_its_node_is_taken_up_again_when_it_returns(spec: AppSpec) -> None:
    async def main(cell: BeatingCell) -> None:
        await cell.begin(n1="a", n2="a", n3="a")
        await cell.deploy(spec)
        await cell.until(cell.serves)
        home = cell.instances()[0]
        cell.die(home.node or "")
        await asyncio.sleep(300)
        assert [i.id for i in cell.instances()] == [home.id]
        cell.come_back(home.node or "")
        await cell.until(cell.serves)
        assert [i.id for i in cell.instances()] == [home.id]

    live(main)


def test_what_must_not_run_twice_is_replaced_only_when_its_node_has_stopped_it_for_certain() -> None:
    async def main(cell: BeatingCell) -> None:
        await cell.begin(n1="a", n2="a")
        lost = Lost(stop_after_disconnect=Seconds(30))
        await cell.deploy(structs.replace(WEB, lost=lost, stop=Stop(grace=Seconds(10))))
        await cell.until(cell.serves)
        home = cell.instances()[0]
        died = cell.die(home.node or "")
        await cell.until(lambda: any(i.id != home.id and i.node for i in cell.instances()), 200)
        assert 30 + 10 + STOP_MARGIN_S < cell.clock.now() - died < 30 + 10 + STOP_MARGIN_S + 8

    live(main)


def test_a_new_leader_waits_the_whole_span_again_before_it_replaces_what_must_not_run_twice() -> None:
    async def main(cell: BeatingCell) -> None:
        await cell.begin(n1="a", n2="a")
        await cell.deploy(structs.replace(WEB, lost=Lost(stop_after_disconnect=Seconds(30)), stop=Stop(grace=Seconds(0))))
        await cell.until(cell.serves)
        home = cell.instances()[0]
        cell.die(home.node or "")
        await asyncio.sleep(35)
        cell.stop_leading()
        await asyncio.sleep(0.1)
        began = cell.clock.now()
        cell.lead()
        await cell.until(lambda: any(i.id != home.id for i in cell.instances()), 200)
        assert cell.clock.now() - began > 30, "it does not know by its own clock for how long the node has been cut off"

    live(main)


def test_when_a_lost_node_returns_the_ready_stay_and_it_is_told_which_and_why() -> None:
    async def main(cell: BeatingCell) -> None:
        await cell.begin(n1="a", n2="a")
        await cell.deploy(WEB)
        await cell.until(cell.serves)
        old = cell.instances()[0]
        cell.script = lambda instance: [(0.03, {"phase": Phase.RUNNING, "started_at": 0.0})]  # up, but not ready for a while
        cell.die(old.node or "")
        await cell.until(lambda: any(i.id != old.id and i.node for i in cell.instances()))
        new = next(i for i in cell.instances() if i.id != old.id)
        cell.come_back(old.node or "")
        await cell.until(lambda: cell.serves() and len(cell.instances()) == 1)
        assert cell.instances()[0].id == old.id
        [event] = cell.events("reconciled")
        assert event.data["kept"] == [old.id]
        assert event.data["stopped"] == [new.id]
        assert f"node {old.node} is back" in event.message

    live(main)


def test_a_job_with_retries_goes_on_elsewhere_at_once_and_one_without_waits_for_its_node() -> None:
    async def main(cell: BeatingCell) -> None:
        await cell.begin(n1="a", n2="a", n3="a")
        cell.script = lambda instance: [(0.03, {"phase": Phase.RUNNING, "started_at": 0.0})]
        await cell.submit(JobSpec(name="again", image="x", retries=1))
        await cell.submit(JobSpec(name="once", image="x"))
        await cell.until(lambda: len([i for i in cell.instances() if i.node]) == 2)
        await asyncio.sleep(1)
        died = cell.die(*{i.node or "" for i in cell.instances()})
        await cell.until(lambda: any(i.owner == "again" and i.attempt == 1 and i.node for i in cell.instances()))
        assert cell.clock.now() - died < 8, "the delay before a second try is among them"
        status = cell.job_status("once")
        assert status is not None
        assert status.phase is JobPhase.RUNNING
        await cell.until(lambda: (s := cell.job_status("once")) is not None and s.phase is JobPhase.FAILED)
        assert 60 < cell.clock.now() - died < 70

    live(main)


def test_too_short_a_time_without_contact_is_refused() -> None:
    spec = structs.replace(WEB, lost=Lost(stop_after_disconnect=Seconds(1)))
    with pytest.raises(Invalid, match=r"lost\.stop_after_disconnect"):
        check_app(spec)


def test_the_leaders_span_is_longer_than_the_nodes_whatever_the_policy() -> None:
    for replace in (None, *LostReplace):
        for limit in (5.0, 60.0, 86_400.0):
            lost = Lost(replace=replace, stop_after_disconnect=Seconds(limit))
            for leaving in (False, True):
                span = patience_s(structs.replace(WEB, lost=lost), leaving=leaving)
                assert span > limit + float(WEB.stop.grace) + 10


def test_while_strangers_flood_the_port_the_dead_are_found_over_http_and_that_is_told() -> None:
    async def main(cell: BeatingCell) -> None:
        await cell.begin(n1="a", n2="a", n3="b", n4="b")
        cell.die("n4")
        await cell.until(lambda: cell.health("n4") is NodeHealth.LOST)
        cell.flooded = True
        await asyncio.sleep(BEHIND_MAX_S + 2)
        assert [event.subject for event in cell.events("beats-overrun")] == ["cell/main"]
        died = cell.die("n1")
        await cell.until(lambda: cell.health("n1") is NodeHealth.LOST, within_s=2 * LOST_S)
        assert LOST_S - 10 < cell.clock.now() - died < LOST_S + 10
        await asyncio.sleep(300)
        lost = [event.subject for event in cell.events("node-lost")]
        assert lost == ["node/n4", "node/n1"], "no other, and none of them twice"
        assert not [event for event in cell.events("node-unreachable") if event.subject in ("node/n2", "node/n3")]
        cell.come_back("n4")
        await cell.until(lambda: cell.health("n4") is NodeHealth.READY, within_s=60)
        cell.flooded = False
        await asyncio.sleep(BEHIND_MAX_S + 2)
        assert len(cell.events("beats-heard")) == len(cell.events("beats-overrun")) == 1
        died = cell.die("n2")
        await cell.until(lambda: cell.health("n2") is NodeHealth.LOST)
        assert cell.clock.now() - died < 7.0, "in seconds, though its last heartbeat counts, too"
        assert [event.subject for event in cell.events("node-lost")] == ["node/n4", "node/n1", "node/n2"]

    live(main)
