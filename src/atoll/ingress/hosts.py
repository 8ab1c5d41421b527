"""What a hostname leads to: Envoy's virtual hosts and their routes. Pure.

All of them are made anew in Envoy whenever one changes, so that a route of the common kind says no more than where it leads: tries
belong to the cluster, the idle time to the listener, and filters are off where no route asks for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from envoy.config.core.v3 import base_pb2
from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.filters.http.buffer.v3 import buffer_pb2
from envoy.extensions.filters.http.stateful_session.v3 import stateful_session_pb2
from envoy.extensions.http.stateful_session.cookie.v3 import cookie_pb2
from envoy.type.v3 import range_pb2
from google.protobuf import any_pb2, duration_pb2, wrappers_pb2
from google.protobuf.message import Message
from msgspec import Struct

from atoll.ingress.clusters import tries
from atoll.ingress.http3 import MAX_AGE_S
from atoll.ingress.resources import ANY, NOBODY, ROUTE_CONFIG, Kind, Resource, Target, from_us, resource
from atoll.model.certificates import CHALLENGE_PATH
from atoll.model.spec import CanaryChoice, HeaderEdit, IngressRules, Route

RATE_FILTER, BODY_FILTER, STICKY_FILTER = "rate", "body", "sticky"
"""The names of the filters that are off but for routes that ask for them."""
APP, PROJECT = "app", "project"
"""What requests are counted by against a rate."""
HTTPS_PORT = 443
"""Of a URL with https that names none."""
_ADD = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


class Leg(Struct, frozen=True):
    """One way that a place leads: to `target`, for requests with `headers`, treated by `rules` and what `route` says instead."""

    target: Target
    headers: tuple[tuple[str, str], ...] = ()
    rules: IngressRules | None = None
    route: Route | None = None
    chosen: CanaryChoice | None = None
    """Only requests that it chooses."""
    limited: tuple[tuple[str, str], ...] = ()
    """What requests are counted by against a rate: (`app`, `PROJECT/APP`), (`project`, PROJECT)."""


def virtual_host(
    host: str,
    places: Sequence[tuple[str, Sequence[Leg]]],
    *,
    https_port: int = 0,
    served: bool = True,
    challenges: Mapping[str, str] = {},
    http3_port: int = 0,
) -> Resource:
    """Return what a hostname leads to; of several path prefixes that match, the longest wins, and of one the most headers.

    `https_port` is where requests are led that want TLS, and `served` whether there is a certificate for it: where there is none,
    they are refused in words. `http3_port` is where HTTP/3 is served for it, 0 for nowhere. `challenges` are what a certificate
    authority looks for, by token.
    """
    name = f"{ROUTE_CONFIG}/{host}"
    ordered = sorted(places, key=lambda place: (-len(place[0].rstrip("/")), place[0]))
    message = route_components_pb2.VirtualHost(name=name, domains=[host])
    if http3_port:
        message.response_headers_to_add.append(_header("alt-svc", f'h3=":{http3_port}"; ma={MAX_AGE_S}'))
    message.routes.extend(_challenge(token, answer) for token, answer in sorted(challenges.items()))
    for path, legs in ordered:
        for leg in sorted(legs, key=_order):
            if https_port and leg.rules is not None and leg.rules.https_only:
                message.routes.extend(_to_https(path, leg, https_port) if served else [_without_certificate(path, leg, host)])
            message.routes.extend(_routes(path, leg))
    # A request whose body is there before Envoy has heard of the host goes on without the filters that its route would ask for.
    filtered = any(route.typed_per_filter_config for route in message.routes)
    return resource(Kind.HOST, name, message, ahead=filtered)


def nobody() -> Resource:
    """Return a virtual host that no request can name. Without any, Envoy waits 15 s for one before it begins to listen."""
    return _empty(NOBODY)


def anybody() -> Resource:
    """Return the virtual host of all names that have none: without it, Envoy asks for one that it does not know."""
    return _empty(ANY)


def _empty(name: str) -> Resource:
    route = route_components_pb2.Route(match=route_components_pb2.RouteMatch(prefix="/"))
    route.direct_response.status = 404
    host = name.removeprefix(f"{ROUTE_CONFIG}/")
    return resource(Kind.HOST, name, route_components_pb2.VirtualHost(name=name, domains=[host], routes=[route]))


def route_configuration() -> Resource:
    """Return the frame that the virtual hosts go into. It never changes."""
    message = route_pb2.RouteConfiguration(
        name=ROUTE_CONFIG,
        vhds=route_pb2.Vhds(config_source=from_us()),
        # The Host header reaches the app with its port, as the client wrote it; only the choice of the app ignores it.
        ignore_port_in_host_matching=True,
        request_headers_to_remove=["x-envoy-external-address"],
    )
    for header, value in (("x-forwarded-host", "%REQ(:AUTHORITY)%"), ("x-forwarded-port", "%DOWNSTREAM_LOCAL_PORT%")):
        message.request_headers_to_add.append(
            base_pb2.HeaderValueOption(header=base_pb2.HeaderValue(key=header, value=value), append_action=_ADD)
        )
    return resource(Kind.ROUTES, ROUTE_CONFIG, message)


def _order(leg: Leg) -> tuple[int, tuple[tuple[str, str], ...], bool]:
    """Of two legs the one that asks more of a request goes first."""
    return -len(leg.headers), leg.headers, leg.chosen is None


def _routes(path: str, leg: Leg) -> Iterable[route_components_pb2.Route]:
    body_max = leg.rules.body_max if leg.rules is not None else None
    if body_max is None:
        yield _route(path, leg)
        return
    # What says how long it is streams through, and an upgrade has no end; only the rest must be seen whole before it goes on.
    said = _route(path, leg)
    said.match.headers.add(name="content-length").range_match.CopyFrom(range_pb2.Int64Range(start=0, end=int(body_max) + 1))
    yield said
    # No range holds every length that can be said: what is in none is more.
    refused = route_components_pb2.Route(name=_name(leg), match=_match(path, leg))
    refused.direct_response.status = 413
    refused.match.headers.add(name="content-length", present_match=True)
    yield refused
    upgrade = _route(path, leg)
    upgrade.match.headers.add(name="upgrade", present_match=True)
    yield upgrade
    held = _route(path, leg)
    buffer = buffer_pb2.BufferPerRoute(buffer=buffer_pb2.Buffer(max_request_bytes=wrappers_pb2.UInt32Value(value=int(body_max))))
    held.typed_per_filter_config[BODY_FILTER].CopyFrom(_packed(buffer))
    yield held


def _to_https(path: str, leg: Leg, port: int) -> Iterable[route_components_pb2.Route]:
    """Lead what came without TLS to the same place with it: a client that named a port to ours, any other to 443."""
    for named in (True, False):
        route = _plain(path, leg)
        if named:
            route.match.headers.add(name=":authority").string_match.safe_regex.regex = r".*:[0-9]+"
        route.redirect.https_redirect = True
        route.redirect.port_redirect = port if named else HTTPS_PORT
        route.redirect.response_code = route_components_pb2.RedirectAction.PERMANENT_REDIRECT
        yield route


def _without_certificate(path: str, leg: Leg, host: str) -> route_components_pb2.Route:
    """Refuse what came without TLS, as nobody could be served with it either."""
    route = _plain(path, leg)
    route.direct_response.status = 503
    words = f"{host} is served with TLS only, and has no certificate now: `atoll certificates` lists those to come"
    route.direct_response.body.inline_string = words
    return route


def _plain(path: str, leg: Leg) -> route_components_pb2.Route:
    """Return a route for what came without TLS."""
    route = route_components_pb2.Route(name=_name(leg), match=_match(path, leg))
    # Envoy itself says this of each connection, whatever the client sent.
    route.match.headers.add(name="x-forwarded-proto").string_match.exact = "http"
    return route


def _challenge(token: str, answer: str) -> route_components_pb2.Route:
    """Answer a certificate authority, also where the app of this hostname takes every path (RFC 8555, 8.3)."""
    route = route_components_pb2.Route(match=route_components_pb2.RouteMatch(path=CHALLENGE_PATH + token))
    route.direct_response.status = 200
    route.direct_response.body.inline_string = answer
    return route


def _name(leg: Leg) -> str:
    return f"{leg.target.project}/{leg.target.app}"


def _match(path: str, leg: Leg) -> route_components_pb2.RouteMatch:
    """`/api` matches `/api` and `/api/…` but not `/apis`; `/api/` matches just what begins with it."""
    match = route_components_pb2.RouteMatch()
    if path.endswith("/"):
        match.prefix = path
    else:
        match.path_separated_prefix = path
    for name, value in leg.headers:
        header = match.headers.add(name=name)
        if value == "*":
            header.present_match = True
        else:
            header.string_match.exact = value
    if leg.chosen is not None and leg.chosen.header is not None:
        match.headers.add(name=leg.chosen.header).string_match.exact = leg.chosen.value
    elif leg.chosen is not None:
        wanted = re.escape(f"{leg.chosen.cookie}={leg.chosen.value}")
        match.headers.add(name="cookie").string_match.safe_regex.regex = rf"(.*;)?\s*{wanted}\s*(;.*)?"
    return match


def _route(path: str, leg: Leg) -> route_components_pb2.Route:
    rules, own = leg.rules, leg.route
    action = route_components_pb2.RouteAction(cluster=leg.target.cluster, timeout=duration_pb2.Duration())
    timeout = own.timeout if own is not None and own.timeout is not None else rules.timeout if rules is not None else None
    if timeout is not None:
        action.timeout.FromMilliseconds(round(timeout * 1000))
    if rules is not None and rules.try_timeout is not None:
        # Envoy takes the time of a try from a route alone.
        action.retry_policy.CopyFrom(tries(rules, sites=True))
    for key, value in leg.limited:
        count = action.rate_limits.add().actions.add().generic_key
        count.descriptor_key, count.descriptor_value = key, value
    route = route_components_pb2.Route(name=_name(leg), match=_match(path, leg), route=action)
    if leg.limited:
        route.typed_per_filter_config[RATE_FILTER].CopyFrom(_packed(route_components_pb2.FilterConfig(config=any_pb2.Any())))
    if rules is not None and rules.sticky is not None:
        route.typed_per_filter_config[STICKY_FILTER].CopyFrom(_packed(_sticky(rules)))
    for source in (rules, own):
        if source is not None:
            _edit(source.request_headers, route.request_headers_to_add, route.request_headers_to_remove)
            _edit(source.response_headers, route.response_headers_to_add, route.response_headers_to_remove)
    if own is not None and own.retries is not None:
        route.request_headers_to_add.append(_header("x-envoy-max-retries", str(own.retries)))
    return route


def _edit(edit: HeaderEdit | None, add: list[base_pb2.HeaderValueOption], remove: list[str]) -> None:
    if edit is not None:
        add.extend(_header(name, value.replace("%", "%%")) for name, value in sorted(edit.set.items()))
        remove.extend(edit.remove)


def _header(name: str, value: str) -> base_pb2.HeaderValueOption:
    header = base_pb2.HeaderValue(key=name, value=value)
    return base_pb2.HeaderValueOption(header=header, append_action=_ADD, keep_empty_value=True)


def _sticky(rules: IngressRules) -> Message:
    cookie = cookie_pb2.CookieBasedSessionState()
    if rules.sticky is not None:
        cookie.cookie.name, cookie.cookie.path = rules.sticky.cookie, "/"
        if rules.sticky.ttl is not None:
            cookie.cookie.ttl.FromSeconds(round(rules.sticky.ttl))
    per_route = stateful_session_pb2.StatefulSessionPerRoute()
    state = per_route.stateful_session.session_state
    state.name = "envoy.http.stateful_session.cookie"
    state.typed_config.Pack(cookie)
    return per_route


def _packed(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
