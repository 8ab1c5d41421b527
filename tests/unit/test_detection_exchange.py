"""Pulses and exchange together, on a network that loses, delays and is cut, in virtual time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest
from control_cell import LoopClock, run_virtual
from detection_net import CELL_KEY, Net

from atoll.control.detection.awake import BEHIND_MAX_S, AwakeClock
from atoll.control.detection.decide import Standing
from atoll.model import beats
from atoll.model.beats import Kind, Relayed
from atoll.model.ports.datagrams import Udp
from atoll.node.beating import DEAF_S as HTTP_DEAF_S
from atoll.node.beating import HEARTBEAT_S
from atoll.node.pulse import DEAF_S, RATE_MAX, RATE_MIN

GOAL_S = 5.0


class Wall(LoopClock):
    """Its wall clock can be set."""

    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


def on_net(test: Callable[[Net], Awaitable[None]], **net: float) -> None:
    async def main() -> None:
        made = Net(**net)  # type: ignore[arg-type]
        try:
            await test(made)
        finally:
            await made.close()

    run_virtual(main())


async def fleet(net: Net, count: int = 6) -> list[str]:
    await net.server()
    names = [f"n{number}" for number in range(count)]
    for number, name in enumerate(names):
        await net.agent(name, site="ab"[number % 2])
    await asyncio.sleep(6.0)
    assert all(net.servers["leader"].standing(name) is Standing.HEARD for name in names)
    return names


@pytest.mark.parametrize(("loss", "jitter_s"), [(0.0, 0.01), (0.2, 0.5)])
def test_a_dead_node_is_silent_within_five_seconds_and_no_other_is(loss: float, jitter_s: float) -> None:
    async def test(net: Net) -> None:
        await fleet(net)
        await net.kill("n3")
        assert 3.5 < await net.until_silent("n3") < GOAL_S
        await asyncio.sleep(20)
        assert net.silent() == {"n3"}
        await net.agent("n3")
        await asyncio.sleep(3)
        assert net.silent() == set()

    on_net(test, loss=loss, jitter_s=jitter_s)


def test_pauses_of_three_seconds_in_bad_weather_accuse_nobody() -> None:
    async def test(net: Net) -> None:
        names = await fleet(net)
        believed: set[str] = set()
        for round in range(21):
            who = ["leader", *names][round % 7]
            await net.pause(who, 3.0)
            await asyncio.sleep(1.0)
            believed |= net.silent()
        assert believed == set()

    on_net(test, loss=0.2, jitter_s=0.5)


def test_a_leader_that_stood_still_for_a_minute_accuses_nobody_and_still_finds_the_dead() -> None:
    async def test(net: Net) -> None:
        await fleet(net)
        pausing = asyncio.ensure_future(net.pause("leader", 60.0))
        await asyncio.sleep(1.0)
        await net.kill("n1")
        await pausing
        assert net.silent() == set()
        assert await net.until_silent("n1") < GOAL_S
        assert net.silent() == {"n1"}

    on_net(test)


def test_a_broken_way_to_the_leader_is_no_dead_node() -> None:
    async def test(net: Net) -> None:
        await fleet(net)
        net.cut |= {("n2", "leader"), ("leader", "n2")}
        await asyncio.sleep(60)
        assert net.silent() == set()
        assert net.servers["leader"].roundabout() == {"n2"}
        net.cut.clear()
        await asyncio.sleep(2)
        assert net.servers["leader"].roundabout() == set()

    on_net(test)


def test_a_leader_that_is_cut_off_from_everybody_believes_nothing() -> None:
    async def test(net: Net) -> None:
        names = await fleet(net)
        net.cut |= {(name, "leader") for name in names}
        await asyncio.sleep(120)
        assert net.silent() == set()

    on_net(test)


def test_a_server_that_takes_over_knows_at_once_who_is_there() -> None:
    async def test(net: Net) -> None:
        await net.server("old")
        await net.server("leader", leads=False)
        for name in ("n0", "n1", "n2"):
            await net.agent(name)
        await asyncio.sleep(5)
        await net.kill("n1")
        await asyncio.sleep(2)
        await net.kill("old")
        net.servers["leader"].lead(True)
        assert await net.until_silent("n1") < GOAL_S - 2, "what it had heard before it led counts"
        await asyncio.sleep(10)
        assert net.silent() == {"n1"}

    on_net(test)


def test_a_server_that_starts_anew_hears_everybody_within_two_beats() -> None:
    async def test(net: Net) -> None:
        names = await fleet(net)
        await net.kill("leader")
        await asyncio.sleep(1.0)
        await net.server()
        await asyncio.sleep(1.2)
        assert all(net.servers["leader"].standing(name) is Standing.HEARD for name in names)

    on_net(test)


def test_what_was_recorded_keeps_no_dead_node_alive() -> None:
    async def test(net: Net) -> None:
        await fleet(net)
        await net.kill("n1")
        old = [data for data, sender, _ in net.seen if sender[0] == "n1"]

        async def replay() -> None:
            while True:
                for data in old:
                    net.servers["leader"].receive(data, ("n1", 7000))
                await asyncio.sleep(0.3)

        replaying = asyncio.ensure_future(replay())
        assert await net.until_silent("n1") < GOAL_S
        await net.kill("leader")
        await net.server()
        await asyncio.sleep(5)
        assert net.servers["leader"].standing("n1") is None, "nor does it count for a server that started since"
        replaying.cancel()

    on_net(test)


def test_a_helper_cannot_make_an_answer_nor_hand_on_an_old_one() -> None:
    async def test(net: Net) -> None:
        await fleet(net)
        await net.kill("n1")
        leader = net.servers["leader"]
        stolen: list[bytes] = []
        epoch = beats.epoch_at(net.clock.now())
        key = beats.key_of(CELL_KEY, "n0", epoch)
        for _ in range(60):
            await asyncio.sleep(0.1)
            relays = [beats.read_relay(key, d) for d, s, to in net.seen if to[0] == "n0" and beats.kind_of(d)[0] is Kind.RELAY]
            for relay in relays[-3:]:
                forged = beats.pack_pong(key, relay.nonce)  # with the only key that it has, its own
                for pong in (forged, *stolen[-1:]):
                    leader.receive(beats.pack_relayed(key, Relayed("n0", epoch, relay.nonce, pong)), ("n0", 7000))
            stolen += [d for d, s, _ in net.seen if beats.kind_of(d)[0] is Kind.PONG][-1:]
        assert net.silent() == {"n1"}
        assert leader.traffic.refused > 0

    on_net(test)


@pytest.mark.parametrize("inside", ["", "nonsense", "10.0.0.1:", "10.0.0.1:99999", "10.0.0.1:²", ":7000", "10.0.0.1:" + "9" * 90])
def test_a_node_that_says_nonsense_of_where_it_is_is_heard_and_harms_nobody(inside: str) -> None:
    async def test(net: Net) -> None:
        await fleet(net, 3)
        net.pulses["n1"].inside = inside
        await asyncio.sleep(3)
        await net.kill("n1")
        assert await net.until_silent("n1") < GOAL_S

    on_net(test)


def test_foreign_keys_and_unknown_nodes_are_not_heard() -> None:
    async def test(net: Net) -> None:
        await fleet(net, 3)
        leader = net.servers["leader"]
        epoch = beats.epoch_at(net.clock.now())
        before = leader.traffic.sent
        for node, key in (("n1", beats.key_of(b"x" * 32, "n1", epoch)), ("n9", beats.key_of(CELL_KEY, "n9", epoch))):
            leader.receive(beats.pack_beat(key, beats.Beat(node, epoch, 0, 10**15, beats.Flag.ASKS, "")), ("evil", 1))
        old = beats.key_of(CELL_KEY, "n1", epoch - 2)
        leader.receive(beats.pack_beat(old, beats.Beat("n1", epoch - 2, 0, 10**15, beats.Flag.ASKS, "")), ("evil", 1))
        assert leader.traffic.sent == before, "and get no answer"
        assert leader.standing("n9") is None

    on_net(test)


def test_the_key_of_a_machine_that_was_replaced_under_its_name_fits_no_more() -> None:
    async def test(net: Net) -> None:
        await fleet(net, 3)
        leader = net.servers["leader"]
        net.enrolments["n1"] = "second"
        refused = leader.traffic.refused
        assert await net.until_silent("n1") < GOAL_S, "though what it says was opened by that key a moment ago"
        assert leader.traffic.refused > refused
        await net.kill("n1")
        await net.agent("n1")
        await asyncio.sleep(3)
        assert net.silent() == set()

    on_net(test)


def test_a_key_that_has_run_out_is_not_taken_from_one_who_was_heard_with_it() -> None:
    async def test(net: Net) -> None:
        wall = net.clock = Wall()
        await fleet(net, 3)
        day = beats.epoch_at(net.clock.now())
        wall.ahead_s = beats.EPOCH_S
        leader = net.servers["leader"]
        key = beats.key_of(CELL_KEY, "n1", day)
        beat = beats.pack_beat(key, beats.Beat("n1", day, 0, 1, beats.Flag.ASKS, ""))
        refused = leader.traffic.refused
        leader.receive(beat, ("n1", 7000))
        assert leader.traffic.refused == refused, "that of the day before counts"
        wall.ahead_s = 2 * beats.EPOCH_S
        leader.receive(beat, ("n1", 7000))
        assert leader.traffic.refused == refused + 1

    on_net(test)


def test_an_agent_whose_clock_was_set_back_between_two_lives_is_heard_again() -> None:
    async def test(net: Net) -> None:
        await fleet(net)
        await net.kill("n1")
        await net.agent("n1", counter=5)
        await asyncio.sleep(3)
        assert net.silent() == set()
        assert net.servers["leader"].silence_s("n1") < 1.0

    on_net(test)


def test_an_agent_that_says_goodbye_is_waited_for() -> None:
    async def test(net: Net) -> None:
        await fleet(net)
        net.pulses["n1"].say_goodbye(net.clock.monotonic())
        await net.kill("n1")
        await asyncio.sleep(50)
        assert net.silent() == set()
        assert await net.until_silent("n1") < 20, "but not for ever"

    on_net(test)


def test_heartbeats_over_http_keep_a_node_whose_datagrams_are_lost() -> None:
    async def test(net: Net) -> None:
        await fleet(net)
        net.cut |= {(a, b) for a in ("n1",) for b in ("leader", "n0", "n2", "n3", "n4", "n5")}
        for beat in range(30):
            net.last_seen["n1"] = float(beat)
            await asyncio.sleep(2.0)
            assert net.silent() == set()
        assert net.pulses["n1"].deaf(net.clock.monotonic())
        assert 1.5 < await net.until_silent("n1") < GOAL_S, "the last heartbeat was two seconds ago"

    on_net(test)


def test_nodes_whose_datagrams_reach_all_servers_but_the_one_that_leads_are_kept_by_their_heartbeats() -> None:
    async def test(net: Net) -> None:
        await net.server("other", leads=False)
        names = await fleet(net)

        async def heartbeats(name: str) -> None:
            while True:
                net.last_seen[name] = net.clock.monotonic()
                pulse, waited = net.pulses[name], 0.0
                while waited < (HTTP_DEAF_S if pulse.deaf(net.clock.monotonic()) else HEARTBEAT_S):
                    await asyncio.sleep(0.1)
                    waited += 0.1

        beating = []
        for name in names:
            beating.append(asyncio.ensure_future(heartbeats(name)))
            await asyncio.sleep(0.8)  # not all at once: some are heard while the others are not
        assert not any(pulse.deaf(net.clock.monotonic()) for pulse in net.pulses.values())
        net.cut |= {(name, "leader") for name in names}
        for _ in range(600):
            await asyncio.sleep(0.1)
            assert net.silent() == set()
        assert all(pulse.deaf(net.clock.monotonic()) for pulse in net.pulses.values())
        assert {pulse.rate(net.clock.monotonic()) for pulse in net.pulses.values()} == {RATE_MIN}, "what others hear is no loss"
        net.cut.clear()
        await asyncio.sleep(2)
        assert not any(pulse.deaf(net.clock.monotonic()) for pulse in net.pulses.values())
        for task in beating:
            task.cancel()
        await asyncio.gather(*beating, return_exceptions=True)

    on_net(test)


def test_when_the_leader_dies_the_server_that_takes_over_is_not_flooded() -> None:
    async def test(net: Net) -> None:
        await net.server("other", leads=False)
        names = await fleet(net)
        await net.kill("leader")
        await asyncio.sleep(DEAF_S + 0.5)
        net.seen.clear()
        await asyncio.sleep(5.0)

        def beats_a_second(server: str) -> float:
            return sum(to[0] == server for _, sender, to in net.seen if sender[0] in names) / 5.0 / len(names)

        assert all(pulse.deaf(net.clock.monotonic()) for pulse in net.pulses.values())
        assert beats_a_second("other") < RATE_MIN + 0.3
        assert beats_a_second("leader") > RATE_MAX - 1, "it may be there, and lose what it is sent"
        net.servers["other"].lead(True)
        await asyncio.sleep(1.5)
        assert not any(pulse.deaf(net.clock.monotonic()) for pulse in net.pulses.values())
        assert net.silent("other") == set()

    on_net(test)


def test_a_server_that_is_behind_believes_nothing_and_is_not_sent_more_for_it() -> None:
    async def test(net: Net) -> None:
        names = await fleet(net)
        leader, here = net.servers["leader"], ("leader", 7600)
        net.net.behind.add(here)
        net.loss = 0.5
        await asyncio.sleep(BEHIND_MAX_S)
        net.seen.clear()
        await net.kill("n0")
        await asyncio.sleep(60)
        sent = sum(to == here for _, _, to in net.seen) / 60 / (len(names) - 1)
        assert sent < RATE_MIN + 0.5, "what is lost in its own queue is no loss on the way"
        assert net.silent() == set()
        assert leader.traffic.shed > 60
        net.net.behind.clear()
        net.loss = 0.0
        assert await net.until_silent("n0") < BEHIND_MAX_S + GOAL_S, "it catches up for as long as it was behind, and no longer"
        await asyncio.sleep(20)
        assert net.silent() == {"n0"}

    on_net(test)


@pytest.mark.parametrize(("behind_of_10", "overrun"), [(5, False), (6, True), (10, True)])
def test_who_is_behind_for_long_lets_time_go_on_and_at_half_speed_at_least(behind_of_10: int, overrun: bool) -> None:
    awake = AwakeClock(0.0)
    for tick in range(1, 3_001):
        awake.tick(tick / 10, behind=tick % 10 < behind_of_10)
    assert awake.overrun is overrun
    assert awake.now() > 140
    for tick in range(3_001, 3_201):
        awake.tick(tick / 10)
    assert not awake.overrun


def test_while_nobody_leads_nothing_is_said_over_http_for_it_as_it_would_help_nobody() -> None:
    async def test(net: Net) -> None:
        await net.server("other", leads=False)
        await fleet(net)
        net.servers["leader"].lead(False)
        await asyncio.sleep(10)
        pulses = net.pulses.values()
        assert all(pulse.deaf(net.clock.monotonic()) and not pulse.cut_off(net.clock.monotonic()) for pulse in pulses)
        net.cut |= {("other", name) for name in net.pulses}
        await asyncio.sleep(DEAF_S + 1)
        assert all(pulse.cut_off(net.clock.monotonic()) for pulse in pulses), "that one may lead"

    on_net(test)


def test_the_leader_is_beaten_to_though_it_is_not_listed_any_more() -> None:
    async def test(net: Net) -> None:
        await net.server("other", leads=False)
        await fleet(net)
        pulse, day = net.pulses["n1"], beats.epoch_at(net.clock.now())
        grant = beats.BeatGrant(key=beats.key_of(CELL_KEY, "n1", day), epoch=day, lasts_s=1e6)
        pulse.serve(grant, [("other", 7600)])
        await asyncio.sleep(30)
        assert net.silent() == set()
        assert not pulse.deaf(net.clock.monotonic())
        net.servers["leader"].lead(False)
        net.servers["other"].lead(True)
        await asyncio.sleep(5)
        pulse.serve(grant, [("other", 7600)])
        net.seen.clear()
        await asyncio.sleep(5)
        assert not [to for _, sender, to in net.seen if sender[0] == "n1" and to[0] == "leader"], "nor is one that leads no more"

    on_net(test)


async def test_a_socket_in_which_much_waits_says_so_until_it_is_taken() -> None:
    taken = 0

    def take(data: bytes, sender: tuple[str, int]) -> None:
        nonlocal taken
        taken += 1

    end = await Udp().open(("127.0.0.1", 0), take)
    assert not end.behind()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
        for _ in range(30_000):
            far.sendto(bytes(60), end.address)
    assert end.behind()
    async with asyncio.timeout(30):
        while end.behind():  # noqa: ASYNC110 - the socket is taken from in between, and tells nobody
            await asyncio.sleep(0)
    assert taken > 100
    end.close()


@pytest.mark.parametrize("cut_off", [False, True])
def test_the_only_one_that_beats_is_given_up_where_others_are_heard_over_http_and_not_where_nobody_is(cut_off: bool) -> None:
    async def test(net: Net) -> None:
        names = await fleet(net, 1)
        net.sites |= {"old1": "a", "old2": "b"}

        async def heartbeats(name: str) -> None:
            while True:
                net.last_seen[name] = net.clock.monotonic()
                await asyncio.sleep(HEARTBEAT_S)

        beating = [asyncio.ensure_future(heartbeats(name)) for name in ("old1", "old2")]
        await asyncio.sleep(20)
        assert net.silent() == set()
        await net.kill(names[0])
        if cut_off:
            for task in beating:
                task.cancel()
            await asyncio.sleep(120)
            assert net.silent() == set(), "it is we who hear nobody"
            net.last_seen["old1"] = net.clock.monotonic()
            await asyncio.sleep(2)
            assert net.silent() == {names[0]}
        else:
            assert await net.until_silent(names[0]) < GOAL_S + HEARTBEAT_S
        for task in beating:
            task.cancel()
        await asyncio.gather(*beating, return_exceptions=True)

    on_net(test)


def test_a_cells_only_node_is_never_given_up_as_there_is_nowhere_else() -> None:
    async def test(net: Net) -> None:
        names = await fleet(net, 1)
        await net.kill(names[0])
        await asyncio.sleep(120)
        assert net.silent() == set()
        assert net.servers["leader"].silence_s(names[0]) > 100

    on_net(test)


@pytest.mark.parametrize(("loss", "least", "most"), [(0.0, 1.9, 2.1), (0.2, 9.0, 10.2)])
def test_agents_beat_the_faster_the_more_is_lost(loss: float, least: float, most: float) -> None:
    async def test(net: Net) -> None:
        await fleet(net, 3)
        await asyncio.sleep(10)
        before = net.pulses["n1"].sent
        net.seen.clear()
        await asyncio.sleep(60)
        sent = sum(s[0] == "n1" and beats.kind_of(d)[0] is Kind.BEAT for d, s, _ in net.seen)
        assert least < sent / 60 < most
        assert net.pulses["n1"].sent - before < 1.5 * sent + 60

    on_net(test, loss=loss, jitter_s=0.3)


def test_contact_is_proved_by_the_leader_alone_and_from_when_the_beat_was_sent() -> None:
    async def test(net: Net) -> None:
        await net.server("other", leads=False)
        await net.server()
        await net.agent("n1")
        await net.agent("n2")
        await asyncio.sleep(5)
        contact = net.contacts["n1"]
        assert contact.cut_off_s(net.clock.monotonic()) < 1.5
        net.servers["leader"].affirm(0.0)  # it still thinks that it leads, and cannot be sure any more
        await asyncio.sleep(0.1)
        since = contact.at
        await asyncio.sleep(20)
        assert contact.at == since, "neither who may have been replaced nor who does not lead proves anything"
        net.servers["leader"].affirm(float("inf"))
        await asyncio.sleep(2)
        assert contact.cut_off_s(net.clock.monotonic()) < 1.5

    on_net(test)
