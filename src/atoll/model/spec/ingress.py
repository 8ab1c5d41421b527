"""How the ingress treats an app's requests: waits, tries, limits, headers, and who gets the same instance again."""

from __future__ import annotations

import enum
import re
from typing import Annotated

from msgspec import Meta

from atoll.model.errors import Invalid
from atoll.model.names import Name, PortNumber, SpecRecord
from atoll.model.spec.instance_tls import InstanceTls, check_instance_tls
from atoll.model.spec.values import default
from atoll.model.units import Bytes, Seconds

HEADERS_PER_EDIT_MAX = 32
PUBLIC_PORTS_MAX = 32
BODY_BYTES_MIN, BODY_BYTES_MAX = 1 << 10, 1 << 30
TIMEOUT_MAX_S = 24 * 3_600.0
HEADER_NAME = re.compile(r"[a-z0-9][-a-z0-9_]{0,63}")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]{0,1024}")
_FRAMING = frozenset({"host", "connection", "content-length", "transfer-encoding", "upgrade", "te", "trailer", "keep-alive"})
"""What says where a message ends or who it is for: changed by a rule, requests could be smuggled past others."""
_COOKIE = re.compile(r"[A-Za-z0-9][-A-Za-z0-9_.]{0,63}")
_COOKIE_VALUE = re.compile(r"[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]{1,256}")
"""RFC 6265, 4.1.1."""
_Text = Annotated[str, Meta(max_length=1_024)]
_Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class HeaderEdit(SpecRecord, frozen=True, kw_only=True):
    """What is changed of a request's or answer's headers on its way; `set` replaces what is there."""

    set: dict[str, _Text] = {}
    remove: Annotated[tuple[_Text, ...], Meta(max_length=HEADERS_PER_EDIT_MAX)] = ()


class Sticky(SpecRecord, frozen=True, kw_only=True):
    """A cookie brings a client back to its instance, as long as that takes requests."""

    cookie: Annotated[str, Meta(max_length=64)] = "atoll-instance"
    ttl: Seconds | None = None
    """None: until the browser is closed."""


class Rate(SpecRecord, frozen=True, kw_only=True):
    """The most requests that each ingress lets through; what is more is answered 429."""

    requests: _Count
    """A second."""
    burst: _Count | None = None
    """At once after a quiet time; `requests` where absent."""


class Limits(SpecRecord, frozen=True, kw_only=True):
    """What one ingress sends to all instances of the app at a time; what is more is answered 503."""

    connections: _Count | None = None
    requests: _Count | None = None
    pending: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    """Requests that wait for a connection."""


class Outliers(SpecRecord, frozen=True, kw_only=True):
    """An instance that fails again and again gets no request for a while."""

    failures: Annotated[int, Meta(ge=1, le=1_000)] = 5
    """Answers of 500 to 599 in a row, or connections that fail."""
    eject: Seconds = default(Seconds(30))
    """For how long the first time; each further time as much longer, up to 5 min."""
    share: Annotated[int, Meta(ge=1, le=100)] = 50
    """Percent of the instances that may be out at a time; with two instances, one."""


class Issuer(enum.StrEnum):
    """Who signs certificates."""

    OWN = "own"
    ACME = "acme"


class CanaryChoice(SpecRecord, frozen=True, kw_only=True):
    """Which requests go to the new release of a canary rollout, whatever its share: so one client sees one release."""

    header: Annotated[str, Meta(max_length=64)] | None = None
    cookie: Annotated[str, Meta(max_length=64)] | None = None
    value: _Text = "1"
    """Of the one of the two that is given."""


class PublicPort(SpecRecord, frozen=True, kw_only=True):
    """A port at which every ingress of the cell takes connections, or datagrams, for the app; no other app can have it."""

    public: PortNumber
    """Among those that the project's quota allows (`public_ports`)."""
    port: Name
    """The name of the app's port it leads to, whose protocol is `tcp` or `udp`."""


class IngressRules(SpecRecord, frozen=True, kw_only=True):
    """Every one optional; without it requests are treated as docs/ingress.md says."""

    certificate: Issuer | None = None
    """Who signs for those of its hostnames that have no certificate: the cell's own root, or the cell's ACME authority."""
    https_only: bool = False
    """Requests that come without TLS are led to the same URL with it (308)."""
    http3: bool = False
    """Those of its hostnames that have a certificate are served by HTTP/3, too."""
    instance_tls: InstanceTls | None = None
    """The instances speak TLS themselves. None: plainly, over the project's network."""
    timeout: Seconds | None = None
    """From the whole request to the whole answer; then 504. None: as long as something moves."""
    retries: Annotated[int, Meta(ge=0, le=10)] = 4
    """Other tries of a request that no instance has begun to work on."""
    retry_statuses: Annotated[tuple[Annotated[int, Meta(ge=500, le=599)], ...], Meta(max_length=16)] = ()
    """Answers after which another instance is asked, whatever the method."""
    try_timeout: Seconds | None = None
    """Of each try."""
    body_max: Bytes | None = None
    """A longer request body is answered 413."""
    rate: Rate | None = None
    limits: Limits | None = None
    outliers: Outliers | None = None
    spill: _Count | None = None
    """Requests under way for each instance of the nearest site, beyond which those of the next site get some, too."""
    sticky: Sticky | None = None
    request_headers: HeaderEdit | None = None
    response_headers: HeaderEdit | None = None
    canary: CanaryChoice | None = None
    ports: Annotated[tuple[PublicPort, ...], Meta(max_length=PUBLIC_PORTS_MAX)] = ()
    """Where the app's `tcp` and `udp` ports are reached from outside."""

    @property
    def mutual(self) -> bool:
        """Whether ingresses show instances who they are."""
        return self.instance_tls is not None and self.instance_tls.mutual


def check_ingress(rules: IngressRules) -> None:
    """Raise Invalid for rules that Envoy could not take, or that contradict themselves."""
    for name, value in (("timeout", rules.timeout), ("try_timeout", rules.try_timeout)):
        check_timeout(f"ingress.{name}", value)
    if rules.timeout is not None and rules.try_timeout is not None and rules.try_timeout > rules.timeout:
        raise Invalid("ingress.try_timeout: longer than ingress.timeout", field="ingress.try_timeout", mend="make it shorter")
    if rules.retries == 0 and (rules.retry_statuses or rules.try_timeout is not None):
        raise Invalid("ingress.retries: 0, and retry_statuses or try_timeout is given", field="ingress.retries")
    if rules.body_max is not None and not BODY_BYTES_MIN <= rules.body_max <= BODY_BYTES_MAX:
        raise Invalid("ingress.body_max: from 1KiB to 1GiB", field="ingress.body_max")
    if rules.rate is not None and rules.rate.burst is not None and rules.rate.burst < rules.rate.requests:
        raise Invalid("ingress.rate.burst: less than ingress.rate.requests", field="ingress.rate.burst")
    if rules.outliers is not None and not 1 <= rules.outliers.eject <= 300:
        raise Invalid("ingress.outliers.eject: from 1s to 5m", field="ingress.outliers.eject")
    if rules.canary is not None:
        _check_canary(rules.canary)
    sticky = rules.sticky
    if sticky is not None:
        _check_cookie("ingress.sticky.cookie", sticky.cookie)
        if sticky.ttl is not None and sticky.ttl < 1:
            raise Invalid("ingress.sticky.ttl: at least 1s", field="ingress.sticky.ttl")
    if rules.instance_tls is not None:
        check_instance_tls(rules.instance_tls)
    check_edit("ingress.request_headers", rules.request_headers)
    check_edit("ingress.response_headers", rules.response_headers)


def _check_canary(canary: CanaryChoice) -> None:
    field = "ingress.canary"
    if (canary.header is None) == (canary.cookie is None):
        raise Invalid(f"{field}: exactly one of header and cookie", field=field, mend="say by which of them a request is chosen")
    if canary.header is not None:
        check_header(f"{field}.header", canary.header)
        check_value(f"{field}.value", canary.header, canary.value)
    elif canary.cookie is not None:
        _check_cookie(f"{field}.cookie", canary.cookie)
        if _COOKIE_VALUE.fullmatch(canary.value) is None:
            mend = "printable ASCII without spaces, quotes, commas, semicolons and backslashes"
            raise Invalid(f"{field}.value: no cookie can have it", field=f"{field}.value", mend=mend)


def _check_cookie(field: str, name: str) -> None:
    if _COOKIE.fullmatch(name) is None:
        raise Invalid(f"{field}: {name!r} is no cookie's name", field=field, mend="letters, digits, '-', '_' and '.'")


def check_timeout(field: str, value: float | None) -> None:
    """Raise Invalid for a wait that is none: Envoy takes 0 for never."""
    if value is not None and not 0.001 <= value <= TIMEOUT_MAX_S:
        raise Invalid(f"{field}: from 1ms to 24h", field=field, mend="leave it out for as long as something moves")


def check_edit(field: str, edit: HeaderEdit | None) -> None:
    """Raise Invalid for headers that cannot be changed."""
    if edit is None:
        return
    if len(edit.set) > HEADERS_PER_EDIT_MAX:
        raise Invalid(f"{field}.set: at most {HEADERS_PER_EDIT_MAX} headers", field=f"{field}.set")
    for part, names in (("set", tuple(edit.set)), ("remove", edit.remove)):
        for name in names:
            check_header(f"{field}.{part}", name)
            if name in _FRAMING or name.startswith("x-envoy-"):
                raise Invalid(f"{field}.{part}: {name!r} is the ingress's own", field=f"{field}.{part}", mend="leave it out")
    for name, value in edit.set.items():
        check_value(f"{field}.set", name, value)


def check_header(field: str, name: str) -> None:
    if HEADER_NAME.fullmatch(name) is None:
        mend = "lower-case letters, digits, '-' and '_', at most 64"
        raise Invalid(f"{field}: {name[:80]!r} is no header's name", field=field, mend=mend)


def check_value(field: str, name: str, value: str) -> None:
    if _HEADER_VALUE.fullmatch(value) is None:
        raise Invalid(f"{field}: the value of {name!r} is not plain ASCII of at most 1,024 characters", field=field)
