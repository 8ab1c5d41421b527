"""Where requests for an app without an endpoint go: a socket of the activator, for each of the app's ports. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from atoll.ingress.resources import Target, check_address
from atoll.model.records import Endpoint, Routing

WAKE = "wake"
"""The activator's directory in the ingress's, which is Envoy's working directory."""
WAKE_S = 60.0
"""The longest wait for an app without a health check to wake."""
WAKE_MAX_S = 600.0


def socket_of(target: Target) -> str:
    """Return the activator's socket for `target`, relative to the ingress's directory."""
    return f"{WAKE}/{hashlib.blake2b(target.cluster.encode(), digest_size=12).hexdigest()}.sock"


def serving(endpoints: Iterable[Endpoint]) -> list[Endpoint]:
    """Return those that new requests may go to."""
    return [each for each in endpoints if not each.draining and check_address(each.address) is None]


def wake_s(routing: Routing) -> float:
    """Return the longest wait for the app to wake: what its first successful health check may take."""
    health = routing.spec.health
    return min(WAKE_MAX_S, float(health.start)) if health is not None else WAKE_S
