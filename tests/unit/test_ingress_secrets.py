"""Secrets on the discovery stream: asked for one by one, answered also where there is none, bounded; and what a name is shown."""

from __future__ import annotations

from envoy.config.route.v3.route_components_pb2 import VirtualHost
from envoy.extensions.transport_sockets.tls.v3.secret_pb2 import Secret
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse

from atoll.ingress.certificates import CertificateTable
from atoll.ingress.delta import DeltaSession, Verdicts
from atoll.ingress.held_secrets import SECRETS_MAX
from atoll.ingress.resources import Kind
from atoll.ingress.table import RoutingTable
from atoll.model.certificates import CHALLENGE_PATH, CertificateBatch, ChallengeAnswer, Material
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Routing
from atoll.model.spec import AppSpec, Port


def material(host: str, *, project: str = "default", chain: str = "chain", shared: bool = False) -> Material:
    return Material(host=host, project=project, chain=chain, key=f"key of {host}", shared=shared)


class Stream:
    """One stream of an Envoy that asks for secrets."""

    def __init__(self, *materials: Material, owners: dict[str, str] | None = None) -> None:
        self.owners = owners or {}
        self.table = CertificateTable(self.owners.get)
        self.refused: list[str] = []
        self.withheld: set[Kind] = set()
        self._verdicts = Verdicts(lambda resource, words: self.refused.append(resource.name))
        self.session = self.connect()
        self.put(*materials)

    def connect(self) -> DeltaSession:
        resources = {**{kind: {} for kind in Kind}, Kind.SECRET: self.table}
        self.session = DeltaSession(resources, self._verdicts, self.withheld)
        return self.session

    def put(self, *materials: Material, removed: tuple[str, ...] = ()) -> None:
        changed, _ = self.table.apply(CertificateBatch(1, False, materials, removed))
        self.session.changed(changed)

    def ask(self, *names: str, known: dict[str, str] | None = None) -> None:
        request = DeltaDiscoveryRequest(type_url=Kind.SECRET, resource_names_subscribe=names, initial_resource_versions=known or {})
        self.session.receive(request)

    def answer(self, *, refuse: str = "") -> tuple[dict[str, str], set[str]]:
        """Return all that is sent now as name → chain, and the names of which it is said that there is none."""
        chains: dict[str, str] = {}
        none: set[str] = set()
        while (response := self.session.respond(0.0)) is not None:
            chains |= {
                part.name: Secret.FromString(part.resource.value).tls_certificate.certificate_chain.inline_string
                for part in response.resources
            }
            none |= set(response.removed_resources)
            self._say(response, refuse)
        return chains, none

    def _say(self, response: DeltaDiscoveryResponse, refuse: str) -> None:
        request = DeltaDiscoveryRequest(type_url=Kind.SECRET, response_nonce=response.nonce)
        if refuse and any(part.name == refuse for part in response.resources):
            request.error_detail.message = "bad"
        self.session.receive(request)


def test_only_what_a_client_has_asked_for_is_sent() -> None:
    stream = Stream(material("a.test"), material("b.test"))
    stream.ask("a.test")
    assert stream.answer() == ({"a.test": "chain"}, set())
    stream.put(material("b.test", chain="newer"))
    assert stream.answer() == ({}, set())


def test_a_name_that_has_no_certificate_is_answered_and_may_be_asked_for_again() -> None:
    stream = Stream()
    for _ in range(2):
        stream.ask("none.test")
        assert stream.answer() == ({}, {"none.test"})
    stream.put(material("none.test"))
    assert stream.answer() == ({}, set())
    stream.ask("none.test")
    assert stream.answer() == ({"none.test": "chain"}, set())


def test_a_newer_certificate_is_sent_and_a_removed_one_withdrawn() -> None:
    stream = Stream(material("a.test"))
    stream.ask("a.test")
    stream.answer()
    stream.put(material("a.test", chain="newer"))
    assert stream.answer() == ({"a.test": "newer"}, set())
    stream.put(removed=("a.test",))
    assert stream.answer() == ({}, {"a.test"})


def test_a_wildcard_is_sent_under_each_name_and_its_change_to_all_of_them() -> None:
    stream = Stream(material("*.w.test"), material("own.w.test", chain="own"))
    stream.ask("a.w.test", "b.w.test", "own.w.test", "w.test", "x.a.w.test")
    chains, none = stream.answer()
    assert chains == {"a.w.test": "chain", "b.w.test": "chain", "own.w.test": "own"}
    assert none == {"w.test", "x.a.w.test"}
    stream.put(material("*.w.test", chain="newer"))
    assert stream.answer() == ({"a.w.test": "newer", "b.w.test": "newer"}, set())


def test_a_name_in_capitals_is_the_same_name_also_when_its_certificate_changes() -> None:
    stream = Stream(material("a.test"), material("*.w.test"))
    stream.ask("A.Test", "B.w.TEST")
    assert stream.answer() == ({"A.Test": "chain", "B.w.TEST": "chain"}, set())
    stream.put(material("a.test", chain="newer"), material("*.w.test", chain="newer"))
    assert stream.answer() == ({"A.Test": "newer", "B.w.TEST": "newer"}, set())


def test_nothing_is_said_while_it_is_not_known_what_there_is() -> None:
    stream = Stream()
    stream.withheld.add(Kind.SECRET)
    stream.ask("a.test", known={"a.test": "of before"})
    assert stream.answer() == ({}, set())
    stream.put(material("a.test"))
    stream.withheld.clear()
    assert stream.answer() == ({"a.test": "chain"}, set())


def test_after_a_reconnect_only_what_differs_is_sent_again() -> None:
    stream = Stream(material("a.test"), material("b.test"))
    stream.ask("a.test", "b.test")
    stream.answer()
    known = {name: stream.table[name].version for name in ("a.test", "b.test")}
    stream.put(material("b.test", chain="newer"))
    stream.connect()
    stream.ask("a.test", "b.test", known=known)
    assert stream.answer() == ({"b.test": "newer"}, set())


def test_a_refused_certificate_leaves_the_last_good_one_and_stops_no_other() -> None:
    stream = Stream(material("a.test"), material("b.test"))
    stream.ask("a.test", "b.test")
    stream.answer()
    stream.put(material("a.test", chain="bad"), material("b.test", chain="newer"))
    chains, none = stream.answer(refuse="a.test")
    assert chains["b.test"] == "newer"
    assert none == set()
    assert stream.refused == ["a.test"]
    # It still has the one of before, so there is nothing to say.
    assert stream.answer() == ({}, set())


def test_one_that_was_refused_at_once_is_answered_with_none_so_that_nobody_waits() -> None:
    stream = Stream(material("a.test", chain="bad"))
    stream.ask("a.test")
    assert stream.answer(refuse="a.test") == ({"a.test": "bad"}, {"a.test"})


def test_strangers_who_make_up_names_cannot_fill_envoys_memory() -> None:
    stream = Stream(material("*.w.test"))
    count = SECRETS_MAX + 100
    for number in range(count):
        stream.ask(f"n{number}.w.test")
        if number % 1_000 == 999:
            stream.answer()
    _, none = stream.answer()
    assert len(none) <= 100
    held = SECRETS_MAX
    stream.put(material("*.w.test", chain="newer"))
    chains, _ = stream.answer()
    assert len(chains) == held
    # One that was let go of is had again.
    assert "n0.w.test" not in chains
    stream.ask("n0.w.test")
    assert stream.answer()[0] == {"n0.w.test": "newer"}


def test_a_stranger_who_names_what_http3_asks_for_is_told_that_there_is_nothing_and_not_remembered() -> None:
    stream = Stream(material("*.w.test"))
    names = [f"HTTP3/n{number}.w.test" for number in range(SECRETS_MAX + 100)]
    stream.ask(*names)
    assert stream.answer() == ({}, set(names))
    stream.put(material("*.w.test", chain="newer"), material("n7.w.test"))
    assert stream.answer() == ({}, set())


def test_a_hostname_is_shown_no_certificate_of_another_project_unless_it_is_shared() -> None:
    stream = Stream(material("app.test", project="a"), owners={"app.test": "b"})
    assert stream.table.material("app.test") is None
    stream.put(material("*.test", project="b"))
    found = stream.table.material("app.test")
    assert found is not None
    assert found.host == "*.test"
    stream.put(material("app.test", project="a", shared=True))
    found = stream.table.material("app.test")
    assert found is not None
    assert found.host == "app.test"


def test_a_complete_batch_replaces_all_but_what_cannot_be_read_now() -> None:
    table = CertificateTable(lambda host: None)
    table.apply(CertificateBatch(1, True, (material("a.test"), material("b.test"), material("c.test"))))
    changed, _ = table.apply(CertificateBatch(2, True, (material("a.test"),), kept=("b.test",)))
    assert changed == {(Kind.SECRET, "c.test")}
    assert sorted(table) == ["a.test", "b.test"]


def test_challenges_are_told_of_by_the_hosts_whose_answers_changed() -> None:
    table = CertificateTable(lambda host: None)
    one, two = ChallengeAnswer(host="a.test", token="t", answer="x"), ChallengeAnswer(host="b.test", token="u", answer="y")
    assert table.apply(CertificateBatch(1, True, challenges=(one,)))[1] == {"a.test"}
    assert table.apply(CertificateBatch(2, False, challenges=(one, two)))[1] == {"b.test"}
    assert table.apply(CertificateBatch(3, False))[1] == set()
    assert table.apply(CertificateBatch(4, False, challenges=(two,)))[1] == {"a.test"}
    assert table.challenges == {"b.test": {"u": "y"}}


def test_no_key_shows_in_what_is_printed() -> None:
    secret = material("a.test")
    assert "key of" not in f"{secret!r} {CertificateBatch(1, True, (secret,))!r}"


def test_a_challenge_for_a_name_below_a_wildcard_leaves_the_wildcards_app_in_its_place() -> None:
    table = RoutingTable()
    spec = AppSpec(name="web", project="p", image="x", ports=(Port(port=80),))
    routing = Routing(project="p", app="web", spec=spec, hosts=(("*.shop.test", "/", 80, False),))
    table.apply(RoutingBatch(1, True, (routing,)))
    assert table.project_of("a.shop.test") == "p"
    assert table.project_of("b.a.shop.test") == "p"
    assert table.project_of("shop.test") is None
    table.challenge({"a.shop.test": {"t": "answer"}}, {"a.shop.test"})
    host = VirtualHost.FromString(table.resources[Kind.HOST]["http/a.shop.test"].body)
    assert [route.match.path or route.match.prefix for route in host.routes] == [f"{CHALLENGE_PATH}t", "/"]
    assert host.routes[1].route.cluster == "p/web/80"
    table.challenge({}, {"a.shop.test"})
    assert "http/a.shop.test" not in table.resources[Kind.HOST]


def test_of_several_projects_on_one_hostname_the_shortest_path_says_whose_certificate_is_shown() -> None:
    """Stores from before a hostname had one project may have such."""
    table = RoutingTable()
    routings = []
    for project, path in (("b", "/zz"), ("c", "/z"), ("a", "/"), ("d", "/abc"), ("e", "/ab"), ("f", "/a")):
        spec = AppSpec(name="web", project=project, image="x", ports=(Port(port=80),))
        routings.append(Routing(project=project, app="web", spec=spec, hosts=(("shop.test", path, 80, False),)))
    table.apply(RoutingBatch(1, True, tuple(routings)))
    certificates = CertificateTable(table.project_of)
    certificates.apply(CertificateBatch(1, True, (material("shop.test", project="a"),)))
    assert certificates.material("shop.test") is not None
