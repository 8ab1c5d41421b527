"""An app that wants TLS only: what comes without is led there, in no other words than where."""

from __future__ import annotations

import json

from atoll.ingress.bootstrap import Listener, bootstrap


def test_the_answer_that_leads_on_to_tls_has_no_body_of_an_error() -> None:
    listeners = bootstrap(Listener(address="127.0.0.1", port=80, connections_max=9), name="n")["static_resources"]["listeners"]
    replies = listeners[0]["filter_chains"][0]["filters"][0]["typed_config"]["local_reply_config"]
    (found,) = [mapper for mapper in replies["mappers"] if '"default_value": 308' in json.dumps(mapper)]
    assert found["body_format_override"]["text_format_source"] == {"inline_string": "%LOCAL_REPLY_BODY%"}
