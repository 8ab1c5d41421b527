"""One call of the API: who makes it, what its path, query, headers and body say. And the table's row that describes it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
from litestar.connection import ASGIConnection
from msgspec import UNSET, Struct, UnsetType

from atoll.api.service import Caller, Need, RequestKey, Service, authorize
from atoll.api.service.access import check_id, check_name
from atoll.api.service.context import revision_of
from atoll.api.service.pages import limit_of
from atoll.api.service.signing import Shown
from atoll.model import codec
from atoll.model.certificates import check_host
from atoll.model.errors import AtollError, Invalid, Unauthenticated
from atoll.model.membership import API_HEADER, check_skew
from atoll.model.spec import SITE_PATTERN, AppSpec, JobSpec

T = TypeVar("T")
W = TypeVar("W", AppSpec, JobSpec)
Connection = ASGIConnection[Any, Any, Any, Any]

_KEY = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SITE = re.compile(SITE_PATTERN)
_GPU = re.compile(r"[A-Za-z0-9][A-Za-z0-9:.-]{0,119}")
_NAMES = frozenset({"project", "app", "job", "secret"})
SHOWN = "atoll.shown"
"""In a connection's `extensions`: what of the client's certificate TLS has verified."""
QUERY_BYTES_MAX = 60_000
"""A command to run in an instance comes in the query."""


class Query(Struct, frozen=True):
    """A parameter of the query, for the description of the API."""

    name: str
    what: str
    schema: dict[str, Any] | None = None
    """Text, where it says nothing."""


class Route(Struct, frozen=True, kw_only=True):
    """One call that the API offers: a row of its table."""

    method: str
    path: str
    """With `{name}` for what varies; those called `project`, `app`, `job`, `secret` are names, `host` is a hostname, others ids."""
    need: Need
    run: Callable[[Call], Awaitable[Any]]
    """Returns the record to answer with, or an ASGI application."""
    summary: str
    body: Any = None
    """The type of the body."""
    answer: Any = None
    status: int = 200
    query: tuple[Query, ...] = ()
    media: str = "application/json"
    """The type of the answer's content."""
    lines: bool = False
    """The answer is a stream of lines of `answer`."""
    body_bytes_max: int = codec.INPUT_BYTES_MAX
    conditional: bool = False
    """Takes `If-Match`."""
    repeatable: bool = False
    """Takes `Idempotency-Key`."""


class _Named(Struct):
    project: str | UnsetType = UNSET


class _Kind(Struct):
    kind: str = "app"


class Call:
    """A call whose caller is known and may make it; `path` has the checked parts of its path."""

    __slots__ = ("_body", "_query", "caller", "connection", "path", "service")

    def __init__(self, service: Service, connection: Connection, caller: Caller, path: dict[str, str], body: bytes = b"") -> None:
        self.service = service
        self.connection = connection
        self.caller = caller
        self.path = path
        self._body = body
        self._query: dict[str, str] | None = None

    def query(self, name: str) -> str | None:
        """Return a parameter of the query. Raises Invalid for one that is given twice or is not text."""
        if self._query is None:
            self._query = parse_query(self.connection.scope["query_string"])
        return self._query.get(name)

    @property
    def limit(self) -> int:
        return limit_of(self.query("limit"))

    @property
    def after(self) -> str:
        return self.query("after") or ""

    @property
    def has_body(self) -> bool:
        return bool(self._body)

    @property
    def project(self) -> str:
        return self.path["project"]

    def body(self, kind: type[T]) -> T:
        """Return the body. Raises Invalid."""
        if not self._body:
            raise Invalid("the body is empty", mend="send JSON")
        return codec.decode(self._body, kind)

    def spec(self, kind: type[W], name: str | None) -> W:
        """Return the spec in the body, which must be for the project and name of the path."""
        spec = self.body(kind)
        if spec.project != self.project:
            # A spec that names no project is for the one of the path.
            if msgspec.json.decode(self._body, type=_Named).project is not UNSET:
                raise Invalid(f"project: the body says '{spec.project}', the path '{self.project}'", field="project")
            spec = msgspec.structs.replace(spec, project=self.project)
        if name is not None and spec.name != name:
            raise Invalid(f"name: the body says '{spec.name}', the path '{name}'", field="name")
        return spec

    def any_spec(self) -> AppSpec | JobSpec:
        """Return the spec in the body: a job's if it says `kind = "job"`, else an app's. Raises Invalid."""
        try:
            kind = msgspec.json.decode(self._body or b"{}", type=_Kind).kind
        except msgspec.ValidationError as error:
            raise codec.invalid(error) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Invalid(f"not valid JSON: {error}") from None
        return self.body(JobSpec) if kind == "job" else self.body(AppSpec)

    @property
    def if_match(self) -> int | None:
        """Return the revision that the write is conditional on; 0 when the thing must not exist yet."""
        headers = self.connection.headers
        match = headers.get("if-match")
        if match is not None and match.strip() != "*":
            return revision_of(match)
        none = headers.get("if-none-match")
        if none is not None:
            if none.strip() != "*":
                raise Invalid("If-None-Match: only * is understood, for 'must not exist yet'", field="If-None-Match")
            return 0
        return None

    @property
    def request_key(self) -> RequestKey | None:
        key = self.connection.headers.get("idempotency-key")
        if key is None:
            return None
        if _KEY.fullmatch(key) is None:
            raise Invalid("Idempotency-Key: 1 to 128 letters, digits and . _ : -", field="Idempotency-Key")
        scope = self.connection.scope
        method = str(scope.get("method", ""))
        fingerprint = self.service.context.sealer.fingerprint(method.encode(), scope["path"].encode(), self._body)
        return RequestKey(caller=self.caller.id, key=key, fingerprint=fingerprint)


def pattern(path: str) -> str:
    """Return a path of our tables in the framework's words."""
    return re.sub(r"\{(\w+)\}", r"{\1:str}", path)


def parse_query(query: bytes) -> dict[str, str]:
    """Raises Invalid."""
    if not query:
        return {}
    if len(query) > QUERY_BYTES_MAX:
        raise Invalid(f"the query is over {QUERY_BYTES_MAX} bytes")
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=64)
    except (UnicodeDecodeError, ValueError):
        raise Invalid("the query is not valid") from None
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Invalid("a parameter of the query is given twice")
    return found


def bearer(connection: Connection) -> str:
    """Return the token of the `Authorization` header. Raises Unauthenticated."""
    header = connection.headers.get("authorization")
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("no token", mend="send 'Authorization: Bearer TOKEN'; 'atoll token create' makes one")
    return token.strip()


def identify(service: Service, connection: Any, token: Callable[[], str]) -> Caller:
    """Return who calls: the holder of the token, or where none is sent of the certificate that TLS has verified.

    `token` returns the token that was sent. Raises Unauthenticated, Revoked.
    """
    shown: Shown | None = (connection.get("extensions") or {}).get(SHOWN)
    if shown is not None and not any(name == b"authorization" for name, _ in connection["headers"]):
        return service.membership.caller(shown)
    caller = service.tokens.authenticate(token())
    service.membership.check(caller)
    return caller


def check_version(service: Service, connection: Connection) -> None:
    """Raises VersionSkew."""
    check_skew(service.api_version, connection.headers.get(API_HEADER), they="the caller", we="this server")


def admit(service: Service, connection: Connection, need: Need) -> tuple[Caller, dict[str, str]]:
    """Return who calls and the checked parts of the path. Raises Unauthenticated, Forbidden, Invalid, VersionSkew."""
    check_version(service, connection)
    if need is Need.PEER:
        return service.servers.authenticate(bearer(connection)), {}
    caller = identify(service, connection.scope, lambda: bearer(connection))
    path = dict(connection.path_params)
    for field, value in path.items():
        if field in _NAMES:
            check_name(value, field)
        elif field == "gpu":
            if _GPU.fullmatch(value) is None:
                raise Invalid(f"gpu: {value[:60]!r} is not the id of a GPU, nor the beginning of one", field="gpu")
        elif field == "host":
            check_host(value)
        elif field == "site":
            if _SITE.fullmatch(value) is None:
                raise Invalid(f"site: {value[:60]!r} is no site's name", field="site")
        else:
            check_id(value, field)
    project = path.get("project")
    if need is Need.ADMIN_OF_PROJECT:
        authorize(caller, Need.ADMIN, project=project or caller.project)
    else:
        subject = path.get("node") if need is Need.AGENT else path.get("ingress") if need is Need.INGRESS else None
        authorize(caller, need, project=project, subject=subject)
    return caller, path


def internal(error: Exception) -> AtollError:
    """Return what callers are told of a fault of ours: nothing that could hold a secret."""
    return AtollError(f"a fault in the server: {type(error).__name__}", mend="the server's log has the details")
