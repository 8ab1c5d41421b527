"""By what the ingress knows instances that speak TLS: what says nothing, or says what cannot be, is refused by its field."""

from __future__ import annotations

import base64

import pytest

from atoll.model.errors import Invalid
from atoll.model.spec import AppSpec, IngressRules, InstanceTls, Port, check_app
from made_certificates import Maker

CA = Maker().pem
PIN = base64.b64encode(bytes(32)).decode()


def check(tls: InstanceTls) -> None:
    check_app(AppSpec(name="web", image="x", ports=(Port(port=443),), ingress=IngressRules(instance_tls=tls)))


@pytest.mark.parametrize("tls", [InstanceTls(ca=CA), InstanceTls(ca=CA, name="web.internal"), InstanceTls(pins=(PIN,))])
def test_an_authority_or_keys_make_an_instance_known(tls: InstanceTls) -> None:
    check(tls)


@pytest.mark.parametrize(
    ("tls", "field"),
    [
        (InstanceTls(), ""),
        (InstanceTls(ca=CA, pins=(PIN,)), ""),
        (InstanceTls(ca="nothing"), ".ca"),
        (InstanceTls(pins=("nothing",)), ".pins[0]"),
        (InstanceTls(pins=(PIN, base64.b64encode(bytes(20)).decode())), ".pins[1]"),
        (InstanceTls(pins=(PIN,), name="web.internal"), ".name"),
    ],
)
def test_what_makes_nobody_or_anybody_known_is_refused(tls: InstanceTls, field: str) -> None:
    with pytest.raises(Invalid) as caught:
        check(tls)
    assert caught.value.field == f"ingress.instance_tls{field}"
    assert caught.value.mend or not field
