"""Hostnames on demand: an Envoy in memory that asks for what it does not have, as the real one does."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from test_ingress_delta import BAD, Envoy, World

from atoll.ingress.hostnames import MISS_PAUSE_S
from atoll.ingress.resources import ANY, NOBODY, Kind, Resource
from atoll.model.certificates import wildcards_over

AHEAD_MAX = 4


def world_of(*hosts: str, ahead_max: int = AHEAD_MAX, asked_max: int = 1_000) -> World:
    world = World(ahead_max=ahead_max, asked_max=asked_max)
    names = (NOBODY, ANY, *(f"http/{host}" for host in hosts))
    world.resources[Kind.HOST].update({name: Resource(Kind.HOST, name, "v0", b"good") for name in names})
    world.session.changed({(Kind.HOST, name) for name in names})
    world.settle()
    return world


def ask(world: World, host: str) -> str | None:
    """Return which virtual host leads a request for `host`, which waits until Envoy knows."""
    found = led(world.envoy, host)
    if found is None:
        alias, before = f"http/{host}:8080", len(world.envoy.told)
        new = [] if alias in world.envoy.asked else [alias]
        world.envoy.want(alias)
        world.settle()
        assert world.envoy.told[before:] == new
        found = led(world.envoy, host)
    return None if found == ANY else found


def led(envoy: Envoy, host: str) -> str | None:
    has = envoy.has[Kind.HOST]
    names = (f"http/{host}", *(f"http/{over}" for over in wildcards_over(host)), ANY)
    return next((name for name in names if name in has), None)


def test_few_hostnames_are_told_ahead_and_no_name_at_all_is_asked_for() -> None:
    world = world_of("a.test", "b.test")
    assert world.has(Kind.HOST) == world.wanted(Kind.HOST)
    assert ask(world, "a.test") == "http/a.test"
    assert ask(world, "made-up.test") is None
    assert world.envoy.asked == []


def test_of_many_envoy_has_those_that_were_asked_for() -> None:
    hosts = [f"h{n}.test" for n in range(20)]
    world = world_of(*hosts)
    assert set(world.has(Kind.HOST)) == {NOBODY}
    assert ask(world, "h7.test") == "http/h7.test"
    assert ask(world, "none.test") is None
    assert set(world.has(Kind.HOST)) == {NOBODY, "http/h7.test"}
    world.put(Kind.HOST, "http/h7.test", b"newer")
    world.put(Kind.HOST, "http/h8.test", b"newer")
    world.settle()
    assert world.has(Kind.HOST)["http/h7.test"] == world.wanted(Kind.HOST)["http/h7.test"]
    assert "http/h8.test" not in world.has(Kind.HOST)


def test_a_name_that_nobody_had_is_led_as_soon_as_somebody_has_it() -> None:
    world = world_of(*(f"h{n}.test" for n in range(20)))
    assert ask(world, "new.test") is None
    world.put(Kind.HOST, "http/new.test")
    world.settle()
    assert ask(world, "new.test") == "http/new.test"
    del world.resources[Kind.HOST]["http/new.test"]
    world.session.changed({(Kind.HOST, "http/new.test")})
    world.settle()
    assert ask(world, "new.test") is None


def test_what_lies_below_a_wildcard_is_never_led_by_it() -> None:
    world = world_of(*(f"h{n}.test" for n in range(20)), "shop.example")
    world.put(Kind.HOST, "http/a.shop.example")
    world.put(Kind.HOST, "http/*.shop.example")
    world.settle()
    assert led(world.envoy, "a.shop.example") == "http/a.shop.example"
    assert led(world.envoy, "other.shop.example") == "http/*.shop.example"
    world.put(Kind.HOST, "http/b.shop.example")
    world.settle()
    assert led(world.envoy, "b.shop.example") == "http/b.shop.example"


def test_a_wildcard_comes_after_all_that_it_would_hide() -> None:
    world = World(ahead_max=10_000)
    hosts = [ANY, "http/*.test", *(f"http/h{n}.test" for n in range(2_100))]
    for host in hosts:
        world.put(Kind.HOST, host)
    for _ in range(20):
        world.step()
        has = world.envoy.has[Kind.HOST]
        assert "http/*.test" not in has or len(has) >= len(hosts) - 1
        assert ANY not in has or len(has) == len(hosts)
    assert len(world.envoy.has[Kind.HOST]) == len(hosts)


def test_names_that_strangers_make_up_are_answered_together_and_never_hold_others_up() -> None:
    world = world_of(*(f"h{n}.test" for n in range(20)))
    assert ask(world, "made-up-0.test") is None
    began = world.now
    for n in range(1, 50):
        world.envoy.want(f"http/made-up-{n}.test")
    while world.step():
        pass
    assert len(world.envoy.told) == 1
    assert world.session.held_until == began + MISS_PAUSE_S
    world.envoy.want("http/h1.test")
    while world.step():
        pass
    assert led(world.envoy, "h1.test") == "http/h1.test"
    assert set(world.envoy.told) == set(world.envoy.asked), "an answer takes along what nobody has"
    assert world.now == began


def test_an_envoy_that_was_asked_for_too_many_names_is_told_all_and_asks_no_more() -> None:
    hosts = [f"h{n}.test" for n in range(20)]
    world = world_of(*hosts, asked_max=30)
    for n in range(31):
        assert ask(world, f"made-up-{n}.test") is None
    world.settle()
    assert world.has(Kind.HOST) == world.wanted(Kind.HOST)
    asked = len(world.envoy.asked)
    assert ask(world, "made-up-99.test") is None
    assert ask(world, "h3.test") == "http/h3.test"
    assert len(world.envoy.asked) == asked
    world.connect()
    world.settle()
    assert world.has(Kind.HOST) == world.wanted(Kind.HOST)
    world.envoy = Envoy()
    world.connect()
    world.settle()
    assert set(world.has(Kind.HOST)) < set(world.wanted(Kind.HOST))


def test_more_hostnames_than_are_told_ahead_take_nothing_from_those_that_are_served() -> None:
    world = world_of("a.test", "b.test")
    for n in range(5):
        world.put(Kind.HOST, f"http/n{n}.test")
        world.settle()
    assert led(world.envoy, "a.test") == "http/a.test"
    assert ANY not in world.has(Kind.HOST)
    assert ask(world, "n4.test") == "http/n4.test"


def test_a_hostname_that_envoy_refuses_is_answered_as_nobodys() -> None:
    world = world_of(*(f"h{n}.test" for n in range(20)))
    world.put(Kind.HOST, "http/h5.test", BAD)
    assert ask(world, "h5.test") is None
    assert world.refused == [(Kind.HOST, "http/h5.test")]
    for n in range(4, 8):
        world.envoy.want(f"http/h{n}.test")
    world.settle()
    assert {f"http/h{n}.test" for n in (4, 6, 7)} <= set(world.has(Kind.HOST))


def test_an_envoy_that_reconnects_keeps_what_it_has_and_one_that_is_new_gets_what_the_last_one_had() -> None:
    world = world_of(*(f"h{n}.test" for n in range(20)))
    ask(world, "h1.test")
    ask(world, "none.test")
    world.connect()
    world.settle()
    assert set(world.has(Kind.HOST)) == {NOBODY, "http/h1.test"}
    world.envoy = Envoy()
    world.connect()
    world.settle()
    assert set(world.has(Kind.HOST)) == {NOBODY, "http/h1.test"}


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_whatever_happens_each_name_is_led_as_if_envoy_had_all(seed: int, steps: int) -> None:
    choose = random.Random(seed)
    world = world_of(ahead_max=choose.randrange(2, 8), asked_max=choose.choice([3, 1_000]))
    hosts = ["a.test", "b.test", "x.a.test", "y.a.test", "z.x.a.test", "*.a.test", "*.x.a.test", "c.test", "d.test", "e.test"]
    for _ in range(steps):
        host = choose.choice(hosts)
        match choose.randrange(7):
            case 0 | 1 | 2:
                world.put(Kind.HOST, f"http/{host}")
            case 3:
                world.resources[Kind.HOST].pop(f"http/{host}", None)
                world.session.changed({(Kind.HOST, f"http/{host}")})
            case 4:
                world.envoy.want(f"http/{host.removeprefix('*.')}:80")
            case 5:
                world.envoy = choose.choice([Envoy(), world.envoy])
                world.connect()
            case _:
                world.now += choose.choice([0.0, 1.0])
                for _ in range(choose.randrange(4)):
                    world.step()
    world.settle()
    for host in (host for host in hosts if not host.startswith("*.")):
        names = (f"http/{host}", *(f"http/{over}" for over in wildcards_over(host)))
        assert ask(world, host) == next((name for name in names if name in world.resources[Kind.HOST]), None)
