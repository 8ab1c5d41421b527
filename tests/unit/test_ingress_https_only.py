"""An app that wants TLS only: what comes without is led there, in no other words than where."""

from __future__ import annotations

import json

from envoy.config.route.v3.route_components_pb2 import VirtualHost

from atoll.ingress.bootstrap import Listener, bootstrap
from atoll.ingress.certificates import CertificateTable
from atoll.ingress.resources import Kind
from atoll.ingress.table import RoutingTable
from atoll.model.certificates import CertificateBatch, Material
from atoll.model.ports.control_plane import RoutingBatch
from atoll.model.records import Routing
from atoll.model.spec import AppSpec, IngressRules, Port


def test_the_answer_that_leads_on_to_tls_has_no_body_of_an_error() -> None:
    listeners = bootstrap(Listener(address="127.0.0.1", port=80, connections_max=9), name="n")["static_resources"]["listeners"]
    replies = listeners[0]["filter_chains"][0]["filters"][0]["typed_config"]["local_reply_config"]
    (found,) = [mapper for mapper in replies["mappers"] if '"default_value": 308' in json.dumps(mapper)]
    assert found["body_format_override"]["text_format_source"] == {"inline_string": "%LOCAL_REPLY_BODY%"}


class Site:
    """What an ingress has been told of apps and certificates; it speaks TLS at 8443."""

    def __init__(self, *hosts: str) -> None:
        self.table = RoutingTable()
        self.certificates = CertificateTable(self.table.project_of)
        self.table.https_port, self.table.serves = 8443, self.certificates.serves
        spec = AppSpec(name="a", image="x", ports=(Port(port=80),), ingress=IngressRules(https_only=True))
        places = tuple((host, "/", 80, False) for host in hosts)
        self.table.apply(RoutingBatch(1, True, (Routing(project="p", app="a", spec=spec, hosts=places, endpoints=()),)))

    def tell(self, *hosts: str, removed: tuple[str, ...] = (), project: str = "p", complete: bool = False) -> None:
        put = tuple(Material(host=host, project=project, chain="c", key="k") for host in hosts)
        secrets, _ = self.certificates.apply(CertificateBatch(1, complete, put, removed))
        self.table.certified(None if complete else {host for _, host in secrets})

    def plain(self, host: str) -> int:
        """Return the status of what comes without TLS."""
        made = VirtualHost.FromString(self.table.resources[Kind.HOST][f"http/{host}"].body)
        first = made.routes[0]
        assert first.match.headers[0].name == "x-forwarded-proto"
        if first.HasField("redirect"):
            return 308
        assert host in first.direct_response.body.inline_string
        assert "no certificate" in first.direct_response.body.inline_string
        assert made.routes[-1].HasField("route"), "what comes with TLS goes to the app"
        return first.direct_response.status


def test_nobody_is_led_to_tls_where_there_is_no_certificate_and_it_is_said() -> None:
    site = Site("a.test", "b.test")
    assert [site.plain(host) for host in ("a.test", "b.test")] == [308, 308], "nothing is known of certificates yet"
    site.tell("a.test")
    assert site.plain("b.test") == 308, "not all is told yet"
    site.tell("a.test", complete=True)
    assert [site.plain(host) for host in ("a.test", "b.test")] == [308, 503]
    site.tell("b.test")
    assert site.plain("b.test") == 308
    site.tell(removed=("a.test",))
    assert [site.plain(host) for host in ("a.test", "b.test")] == [503, 308]


def test_a_wildcards_certificate_and_one_below_a_wildcard_are_good_to_lead_to_and_another_projects_is_not() -> None:
    site = Site("a.wild.test", "*.deep.test", "c.test")
    site.tell(complete=True)
    assert {site.plain(host) for host in ("a.wild.test", "*.deep.test", "c.test")} == {503}
    site.tell("*.wild.test", "x.y.deep.test")
    site.tell("c.test", project="other")
    assert [site.plain(host) for host in ("a.wild.test", "*.deep.test", "c.test")] == [308, 308, 503]
    site.tell(removed=("*.wild.test", "x.y.deep.test"))
    assert {site.plain(host) for host in ("a.wild.test", "*.deep.test")} == {503}
