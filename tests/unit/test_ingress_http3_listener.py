"""Which hostnames are served by HTTP/3: those that ask for it and have a certificate, as many as there is room for."""

from __future__ import annotations

import pytest
from envoy.config.listener.v3.listener_pb2 import Listener as EnvoyListener
from envoy.config.route.v3.route_components_pb2 import VirtualHost
from envoy.extensions.transport_sockets.quic.v3.quic_transport_pb2 import QuicDownstreamTransport
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest

from atoll.ingress.bootstrap import Listener, http3
from atoll.ingress.certificates import CertificateTable
from atoll.ingress.delta import DeltaSession, Verdicts
from atoll.ingress.held_secrets import SECRETS_MAX
from atoll.ingress.http3 import HOSTS_MAX, HTTP3
from atoll.ingress.resources import BUFFER_BYTES, HTTP3_SECRET, STREAMS_MAX, WINDOW_BYTES, Kind
from atoll.ingress.table import RoutingTable
from atoll.ingress.tracing import tracing_of
from atoll.model.certificates import CertificateBatch, Material
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Listening, Routing
from atoll.model.spec import AppSpec, IngressRules, Port, PortProtocol


class Site:
    """What an ingress has been told of apps and certificates; it speaks TLS at 8443."""

    def __init__(self) -> None:
        self.table = RoutingTable()
        self.certificates = CertificateTable(self.table.project_of)
        self.table.https_port = 8443
        self.table.serves, self.table.shows = self.certificates.serves, self.certificates.shows
        self.table.http3 = http3(Listener(address="192.0.2.1", port=80, connections_max=9, tls_port=8443), "n")

    def serve(self, app: str, *hosts: str, fast: bool = True) -> None:
        spec = AppSpec(name=app, image="x", ports=(Port(port=80),), ingress=IngressRules(http3=fast))
        places = tuple((host, "/", 80, False) for host in hosts)
        self.table.apply(RoutingBatch(1, False, (Routing(project="p", app=app, spec=spec, hosts=places, endpoints=()),)))

    def show(self, *hosts: str, removed: tuple[str, ...] = (), project: str = "p") -> None:
        put = tuple(Material(host=host, project=project, chain="c", key="k") for host in hosts)
        secrets, _ = self.certificates.apply(CertificateBatch(1, False, put, removed))
        self.table.certified({host for _, host in secrets})

    def fast(self) -> list[str]:
        self.table.take_changes()
        made = self.table.resources[Kind.LISTENER].get(HTTP3)
        chains = EnvoyListener.FromString(made.body).filter_chains if made is not None else ()
        return [chain.filter_chain_match.server_names[0] for chain in chains]

    def told(self, host: str) -> bool:
        made = VirtualHost.FromString(self.table.resources[Kind.HOST][f"http/{host}"].body)
        return [each.header.value for each in made.response_headers_to_add] == ['h3=":8443"; ma=86400']


def test_a_hostname_is_served_by_http3_while_it_asks_for_it_and_has_a_certificate() -> None:
    site = Site()
    site.serve("a", "a.test", "b.test", "*.c.test")
    site.serve("slow", "slow.test", fast=False)
    assert site.fast() == []
    site.show("a.test", "slow.test", "*.c.test")
    assert site.fast() == ["*.c.test", "a.test"]
    assert [site.told(host) for host in ("a.test", "b.test", "*.c.test", "slow.test")] == [True, False, True, False]
    site.show("b.test", removed=("a.test",))
    assert site.fast() == ["*.c.test", "b.test"]
    assert not site.told("a.test")
    site.serve("a", "b.test", fast=False)
    assert site.fast() == []
    assert HTTP3 not in site.table.resources[Kind.LISTENER]


def test_a_certificate_of_another_project_serves_no_hostname() -> None:
    site = Site()
    site.serve("a", "a.test")
    site.show("a.test", project="thief")
    assert site.fast() == []


def test_as_many_are_served_as_there_is_room_for() -> None:
    site = Site()
    hosts = [f"h{n:03}.test" for n in range(HOSTS_MAX + 3)]
    site.serve("a", *hosts)
    site.show(*hosts)
    assert len(site.fast()) == HOSTS_MAX
    assert sum(site.told(host) for host in hosts) == HOSTS_MAX


def test_an_app_that_had_the_port_before_the_ingress_came_takes_http3_from_nobody_and_is_told() -> None:
    site = Site()
    site.serve("a", "a.test")
    site.show("a.test")
    spec = AppSpec(name="dns", image="x", ports=(Port(name="dns", port=53, protocol=PortProtocol.UDP),))
    listens = tuple(Listening(public=public, protocol=PortProtocol.UDP, port=53) for public in (8443, 8444))
    app = Routing(project="p", app="dns", spec=spec, hosts=(), listens=listens)
    problems = site.table.apply(RoutingBatch(2, False, (app,)))
    assert [(each.app, each.message) for each in problems] == [("p/dns", "udp:8443 is where this ingress speaks HTTP/3")]
    assert site.fast() == ["a.test"]
    assert set(site.table.resources[Kind.LISTENER]) == {HTTP3, "udp:8444"}


def test_without_tls_there_is_no_http3() -> None:
    assert http3(Listener(address="192.0.2.1", port=80, connections_max=9), "n") is None


@pytest.mark.parametrize("collector", ["", "http://127.0.0.1:4318"])
def test_requests_are_treated_as_at_the_other_ports(collector: str) -> None:
    tracing = tracing_of(collector, 5.0)
    made = http3(Listener(address="192.0.2.1", port=80, connections_max=9, tls_port=8443, tracing=tracing), "n")
    assert made is not None
    listener = EnvoyListener.FromString(made.listener(["a.test"]).body)
    assert (listener.address.socket_address.port_value, listener.address.socket_address.address) == (8443, "192.0.2.1")
    manager = listener.filter_chains[0].filters[0].typed_config.value
    for part in (b"envoy.filters.http.on_demand", b"retry-safe", b"envoy.filters.http.router", b"access.log", b"no app is served"):
        assert part in manager
    assert (b"OpenTelemetryConfig" in manager) == bool(collector)


def test_no_request_is_taken_before_its_handshake_and_a_client_has_as_much_room_as_at_the_other_ports() -> None:
    made = http3(Listener(address="192.0.2.1", port=80, connections_max=9, tls_port=8443), "n")
    assert made is not None
    listener = EnvoyListener.FromString(made.listener(["a.test"]).body)
    transport = QuicDownstreamTransport()
    assert listener.filter_chains[0].transport_socket.typed_config.Unpack(transport)
    assert transport.HasField("enable_early_data")
    assert not transport.enable_early_data.value
    assert listener.per_connection_buffer_limit_bytes.value == BUFFER_BYTES
    limits = listener.udp_listener_config.quic_options.quic_protocol_options
    windows = (limits.initial_stream_window_size.value, limits.initial_connection_window_size.value)
    assert (limits.max_concurrent_streams.value, windows) == (STREAMS_MAX, (WINDOW_BYTES, WINDOW_BYTES))


class Secrets:
    """What an Envoy asks for and hears of secrets; it confirms all."""

    def __init__(self, site: Site, verdicts: Verdicts) -> None:
        shown = {**site.table.resources, Kind.SECRET: site.certificates}
        self.session = DeltaSession(shown, verdicts, http3_hosts=site.table.http3_hosts)

    def ask(self, *names: str, known: dict[str, str] | None = None) -> None:
        request = DeltaDiscoveryRequest(type_url=Kind.SECRET, resource_names_subscribe=names, initial_resource_versions=known or {})
        self.session.receive(request)

    def told(self) -> tuple[dict[str, str], list[str]]:
        """Return what Envoy hears next: secrets with their versions, and names of those that are gone."""
        response = self.session.respond(0.0)
        if response is None:
            return {}, []
        self.session.receive(DeltaDiscoveryRequest(type_url=Kind.SECRET, response_nonce=response.nonce))
        return {part.name: part.version for part in response.resources}, list(response.removed_resources)

    def takes_away(self, name: str) -> bool:
        while (heard := self.told()) != ({}, []):
            if name in heard[1]:
                return True
        return False


def test_its_certificate_is_told_anew_and_comes_back_unasked_and_no_stranger_takes_it_away() -> None:
    site = Site()
    site.serve("a", "a.test")
    secrets = Secrets(site, Verdicts(lambda resource, words: None))
    name = f"{HTTP3_SECRET}a.test"
    site.show("a.test")
    secrets.ask(name)
    assert list(secrets.told()[0]) == [name]
    put = Material(host="a.test", project="p", chain="newer", key="k")
    for batch, gone in ((CertificateBatch(1, False, (put,), ()), False), (CertificateBatch(1, False, (), ("a.test",)), True)):
        changed, _ = site.certificates.apply(batch)
        site.table.certified({host for _, host in changed})
        secrets.session.changed(changed)
        got, removed = secrets.told()
        assert (list(got), removed) == (([], [name]) if gone else ([name], []))
    site.show("a.test")
    secrets.session.changed({(Kind.SECRET, "a.test")})
    assert list(secrets.told()[0]) == [name]
    for before in ("", HTTP3_SECRET):
        for n in range(SECRETS_MAX + 10):
            secrets.ask(f"{before}made-up-{n}.test")
        assert not secrets.takes_away(name)


def test_an_envoy_that_comes_back_with_very_many_names_keeps_those_of_the_listener() -> None:
    site = Site()
    site.serve("a", "a.test")
    site.show("a.test")
    verdicts = Verdicts(lambda resource, words: None)
    name = f"{HTTP3_SECRET}a.test"
    first = Secrets(site, verdicts)
    first.ask(name)
    known, _ = first.told()
    again = Secrets(site, verdicts)
    again.ask(name, *(f"n{n}.test" for n in range(SECRETS_MAX + 10)), known=known)
    assert not again.takes_away(name)
    changed, _ = site.certificates.apply(
        CertificateBatch(2, False, (Material(host="a.test", project="p", chain="newer", key="k"),))
    )
    again.session.changed(changed)
    assert list(again.told()[0]) == [name]
