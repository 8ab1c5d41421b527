"""The discovery protocol against an Envoy in memory that asks, confirms, refuses and reconnects as the real one does."""

from __future__ import annotations

import random
import sys

import pytest
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.ingress.delta import HOLD_S, LISTEN_AGAIN_S, RESPONSE_RESOURCES_MAX, DeltaSession, Verdicts
from atoll.ingress.hostnames import ASKED_MAX, Hostnames
from atoll.ingress.resources import Kind, Name, Resource

BAD = b"bad"


class Envoy:
    """Holds what it took. It refuses a response that has anything bad in it, whole."""

    def __init__(self) -> None:
        self.has: dict[Kind, dict[str, tuple[str, bytes]]] = {kind: {} for kind in Kind}
        self.gaps: list[str] = []
        self.asked: list[str] = []
        """Every hostname that it ever asked for."""
        self.told: list[str] = []
        """Those that were answered, each time."""
        self._asks: list[DeltaDiscoveryRequest] = []

    def connect(self) -> None:
        self._asks = [
            DeltaDiscoveryRequest(type_url=kind, initial_resource_versions={name: v for name, (v, _) in self.has[kind].items()})
            for kind in (Kind.CLUSTER, Kind.ROUTES, Kind.HOST)
        ]
        self._asks[1].resource_names_subscribe.append("http")
        self._asks[2].resource_names_subscribe.extend(self.asked)
        if self.has[Kind.CLUSTER]:
            self._subscribe(list(self.has[Kind.CLUSTER]))

    def want(self, alias: str) -> None:
        """Ask for a hostname that a request is for. None is asked for twice: what is not there then is 404."""
        if alias in self.asked:
            return
        self.asked.append(alias)
        self._asks.append(DeltaDiscoveryRequest(type_url=Kind.HOST, resource_names_subscribe=[alias]))

    def asks(self) -> list[DeltaDiscoveryRequest]:
        asks, self._asks = self._asks, []
        return asks

    def take(self, response: DeltaDiscoveryResponse) -> None:
        kind = Kind(response.type_url)
        answer = DeltaDiscoveryRequest(type_url=kind, response_nonce=response.nonce)
        if any(part.resource.value.startswith(BAD) for part in response.resources):
            answer.error_detail.message = "bad"
            self._asks.append(answer)
            return
        self.told += [alias for part in response.resources for alias in part.aliases]
        there = [part for part in response.resources if part.HasField("resource")]
        new = [part.name for part in there if part.name not in self.has[kind]]
        for part in there:
            self.has[kind][part.name] = (part.version, part.resource.value)
        for name in response.removed_resources:
            self.has[kind].pop(name, None)
        if kind is Kind.CLUSTER:
            if new:
                self._subscribe(new)
            for name in response.removed_resources:
                self.has[Kind.ENDPOINTS].pop(name, None)
                self._asks.append(DeltaDiscoveryRequest(type_url=Kind.ENDPOINTS, resource_names_unsubscribe=[name]))
        if kind is Kind.HOST:
            self.gaps += [name for name in new if name.removeprefix("http/") not in self.has[Kind.ENDPOINTS]]
        self._asks.append(answer)

    def _subscribe(self, names: list[str]) -> None:
        known = {name: self.has[Kind.ENDPOINTS][name][0] for name in names if name in self.has[Kind.ENDPOINTS]}
        request = DeltaDiscoveryRequest(type_url=Kind.ENDPOINTS, resource_names_subscribe=names, initial_resource_versions=known)
        self._asks.append(request)


class World:
    def __init__(self, *, ahead_max: int = sys.maxsize, asked_max: int = ASKED_MAX) -> None:
        self.resources: dict[Kind, dict[str, Resource]] = {kind: {} for kind in Kind}
        self.hostnames = Hostnames(self.resources[Kind.HOST], ahead_max=ahead_max, asked_max=asked_max)
        self.refused: list[Name] = []
        self.envoy = Envoy()
        self.now = 0.0
        self._version = 0
        self._verdicts = Verdicts(lambda resource, words: self.refused.append((resource.kind, resource.name)))
        self.put(Kind.ROUTES, "http")
        self.session = self.connect()

    def connect(self) -> DeltaSession:
        self.session = DeltaSession(self.resources, self._verdicts, hostnames=self.hostnames)
        self.envoy.connect()
        return self.session

    def put(self, kind: Kind, name: str, body: bytes = b"good") -> None:
        self._version += 1
        self.resources[kind][name] = Resource(kind, name, f"v{self._version}", body)
        if hasattr(self, "session"):
            self.session.changed({(kind, name)})

    def app(self, name: str, host: bytes = b"good") -> None:
        self.put(Kind.CLUSTER, name)
        self.put(Kind.ENDPOINTS, name)
        self.put(Kind.HOST, f"http/{name}", host)

    def drop(self, name: str) -> None:
        for kind, key in ((Kind.CLUSTER, name), (Kind.ENDPOINTS, name), (Kind.HOST, f"http/{name}")):
            self.resources[kind].pop(key, None)
            self.session.changed({(kind, key)})

    def step(self) -> bool:
        asked = self.envoy.asks()
        for ask in asked:
            self.session.receive(ask)
        response = self.session.respond(self.now)
        if response is not None:
            self.envoy.take(DeltaDiscoveryResponse.FromString(response.SerializeToString()))
        return bool(asked) or response is not None

    def settle(self) -> None:
        for _ in range(2_000):
            if not self.step():
                if self.session.held_until is None:
                    return
                self.now = self.session.held_until
        raise AssertionError("it never comes to rest")

    def wanted(self, kind: Kind) -> dict[str, str]:
        return {name: each.version for name, each in self.resources[kind].items()}

    def has(self, kind: Kind) -> dict[str, str]:
        return {name: version for name, (version, _) in self.envoy.has[kind].items()}


def test_a_new_host_comes_after_the_endpoints_that_it_leads_to() -> None:
    world = World()
    world.app("a")
    world.settle()
    world.app("b")
    world.app("c")
    world.settle()
    assert all(world.has(kind) == world.wanted(kind) for kind in Kind)
    assert world.envoy.gaps == []
    assert world.now == 0


def test_one_bad_host_among_many_is_found_and_the_others_go_on() -> None:
    world = World()
    world.app("a")
    world.settle()
    before = world.has(Kind.HOST)["http/a"]
    for name in "bcdef":
        world.app(name)
    world.put(Kind.HOST, "http/a", BAD)
    world.settle()
    assert world.refused == [(Kind.HOST, "http/a")]
    assert world.has(Kind.HOST) == {**world.wanted(Kind.HOST), "http/a": before}
    world.put(Kind.HOST, "http/a", b"good again")
    world.settle()
    assert world.has(Kind.HOST) == world.wanted(Kind.HOST)


def test_what_was_refused_once_is_not_sent_again_but_its_last_good_version_to_a_new_envoy() -> None:
    world = World()
    world.app("a")
    world.settle()
    good = world.has(Kind.HOST)["http/a"]
    world.put(Kind.HOST, "http/a", BAD)
    world.settle()
    world.envoy = Envoy()
    world.connect()
    world.settle()
    assert world.refused == [(Kind.HOST, "http/a")]
    assert world.has(Kind.HOST) == {"http/a": good}


def test_a_cluster_that_changes_gets_its_endpoints_again() -> None:
    world = World()
    world.app("a")
    world.settle()
    world.put(Kind.CLUSTER, "a")
    sent = []
    while True:
        for ask in world.envoy.asks():
            world.session.receive(ask)
        response = world.session.respond(0)
        if response is None:
            break
        sent.append(Kind(response.type_url))
        world.envoy.take(response)
    assert sent == [Kind.CLUSTER, Kind.ENDPOINTS]


def test_after_a_reconnect_only_the_difference_is_sent() -> None:
    world = World()
    for name in "abc":
        world.app(name)
    world.settle()
    world.drop("a")
    world.app("d")
    world.connect()
    for ask in world.envoy.asks():
        world.session.receive(ask)
    response = world.session.respond(0)
    assert response is not None
    assert [part.name for part in response.resources] == ["d"]
    world.envoy.take(response)
    world.settle()
    assert all(world.has(kind) == world.wanted(kind) for kind in Kind)


def test_an_envoy_that_never_asks_for_endpoints_holds_hosts_back_only_so_long() -> None:
    world = World()
    world.app("a")
    for ask in (DeltaDiscoveryRequest(type_url=kind) for kind in (Kind.CLUSTER, Kind.HOST)):
        world.session.receive(ask)
    first = world.session.respond(0)
    assert first is not None
    world.session.receive(DeltaDiscoveryRequest(type_url=Kind.CLUSTER, response_nonce=first.nonce))
    assert world.session.respond(0) is None
    assert world.session.held_until == HOLD_S
    late = world.session.respond(HOLD_S)
    assert late is not None
    assert late.type_url == Kind.HOST


def test_an_envoy_with_nothing_to_get_is_told_so() -> None:
    session = DeltaSession({kind: {} for kind in Kind}, Verdicts(lambda resource, words: None))
    session.receive(DeltaDiscoveryRequest(type_url=Kind.CLUSTER))
    response = session.respond(0)
    assert response is not None
    assert not response.resources
    assert session.respond(0) is None


def test_a_kind_that_is_not_ours_and_a_stale_answer_are_ignored() -> None:
    world = World()
    world.settle()
    world.session.receive(DeltaDiscoveryRequest(type_url="type.googleapis.com/envoy.extensions.Secret"))
    world.session.receive(DeltaDiscoveryRequest(type_url=Kind.HOST, response_nonce="12345"))
    assert world.session.respond(0) is None


def test_no_response_is_larger_than_its_bound() -> None:
    world = World()
    for n in range(RESPONSE_RESOURCES_MAX + 10):
        world.put(Kind.HOST, f"http/{n}")
    world.session.receive(DeltaDiscoveryRequest(type_url=Kind.HOST))
    response = world.session.respond(0)
    assert response is not None
    assert len(response.resources) == RESPONSE_RESOURCES_MAX


@pytest.mark.parametrize("kind", [Kind.CLUSTER, Kind.ENDPOINTS])
def test_a_bad_cluster_or_endpoint_stops_no_other_app(kind: Kind) -> None:
    world = World()
    for name in "abc":
        world.app(name)
    world.put(kind, "b", BAD)
    world.settle()
    assert world.refused == [(kind, "b")]
    for name in "ac":
        assert world.has(Kind.HOST)[f"http/{name}"] == world.wanted(Kind.HOST)[f"http/{name}"]
        assert world.has(Kind.ENDPOINTS)[name] == world.wanted(Kind.ENDPOINTS)[name]


class Ports:
    """Listeners, and an Envoy that takes each unless its port is `busy`."""

    def __init__(self) -> None:
        self.resources: dict[Kind, dict[str, Resource]] = {kind: {} for kind in Kind}
        self.busy: set[str] = set()
        self.told: list[tuple[str, str]] = []
        self.sent: list[list[str]] = []
        self._verdicts = Verdicts(
            lambda resource, words: self.told.append(("refused", resource.name)),
            lambda resource: self.told.append(("taken", resource.name)),
        )
        self.connect()

    def connect(self) -> None:
        self.session = DeltaSession(self.resources, self._verdicts)
        self.session.receive(DeltaDiscoveryRequest(type_url=Kind.LISTENER))

    def put(self, name: str, version: str = "v1") -> None:
        self.resources[Kind.LISTENER][name] = Resource(Kind.LISTENER, name, version, b"")
        self.session.changed({(Kind.LISTENER, name)})

    def settle(self, now: float) -> None:
        while (response := self.session.respond(now)) is not None:
            self.sent.append(names := [part.name for part in response.resources])
            answer = DeltaDiscoveryRequest(type_url=Kind.LISTENER, response_nonce=response.nonce)
            if self.busy & set(names):
                answer.error_detail.message = "it is busy"
            self.session.receive(answer)


def test_a_port_that_was_busy_for_a_moment_is_tried_again_by_itself_and_what_was_said_of_it_taken_back() -> None:
    ports = Ports()
    ports.busy = {"tcp:1", "tcp:2"}
    for name in ("tcp:1", "tcp:2", "tcp:3"):
        ports.put(name)
    ports.settle(100.0)
    assert ports.told == [("refused", "tcp:1"), ("refused", "tcp:2")]
    assert ports.session.applied((Kind.LISTENER, "tcp:3")) == "v1"
    for now in (100.0, 100.0 + LISTEN_AGAIN_S - 0.1):
        ports.sent.clear()
        ports.settle(now)
        assert ports.sent == []
    assert ports.session.held_until == 100.0 + LISTEN_AGAIN_S
    ports.busy = {"tcp:2"}
    ports.settle(100.0 + LISTEN_AGAIN_S)
    assert ports.sent == [["tcp:1"], ["tcp:2"]]
    assert ports.told[2:] == [("taken", "tcp:1")], "the other was refused once more, which is no news"
    assert ports.session.applied((Kind.LISTENER, "tcp:1")) == "v1"
    assert ports.session.held_until == 100.0 + 2 * LISTEN_AGAIN_S
    ports.busy = set()
    ports.settle(100.0 + 2 * LISTEN_AGAIN_S)
    assert ports.told[3:] == [("taken", "tcp:2")]
    assert ports.session.held_until is None


def test_a_port_that_was_refused_is_tried_by_a_new_connection_at_once_and_what_it_had_stays_meanwhile() -> None:
    ports = Ports()
    ports.put("tcp:1", "good")
    ports.settle(0.0)
    ports.busy = {"tcp:1"}
    ports.put("tcp:1", "bad")
    ports.settle(1.0)
    ports.busy = set()
    ports.connect()
    ports.settle(2.0)
    assert ports.session.applied((Kind.LISTENER, "tcp:1")) == "bad"
    assert ports.told == [("refused", "tcp:1"), ("taken", "tcp:1")]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_whatever_happens_envoy_ends_with_all_that_is_good(seed: int, steps: int) -> None:
    choose = random.Random(seed)
    world = World()
    for _ in range(steps):
        match choose.randrange(6):
            case 0 | 1:
                world.app(choose.choice("abcd"), BAD if choose.random() < 0.2 else b"good")
            case 2:
                world.drop(choose.choice("abcd"))
            case 3:
                world.connect()
            case 4:
                world.envoy = Envoy()
                world.connect()
            case _:
                for _ in range(choose.randrange(4)):
                    world.step()
    world.settle()
    for kind in Kind:
        good = {name: each.version for name, each in world.resources[kind].items() if not each.body.startswith(BAD)}
        bad = set(world.resources[kind]) - set(good)
        assert {name: version for name, version in world.has(kind).items() if name not in bad} == good
        assert set(world.has(kind)) <= set(world.resources[kind])
