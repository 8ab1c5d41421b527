"""Asking a Prometheus server (prometheus.io/docs/prometheus/latest/querying/api).

The address is a user's, and the one who asks is the leader, which reaches what users do not: so only servers are asked that the
operator has named.
"""

from __future__ import annotations

import math
from typing import Any

import httpx
import msgspec
from msgspec import Struct, field

from atoll.control.queries import ANSWER_S
from atoll.model.errors import Forbidden, Invalid, Unavailable
from atoll.model.spec import PrometheusQuery
from atoll.model.spec.sources import prometheus_url
from atoll.model.urls import PORTS

ANSWER_BYTES_MAX = 1 << 20
SERVERS_MAX = 64


class _Series(Struct):
    value: tuple[float, str]


class _Data(Struct):
    kind: str = field(name="resultType")
    result: Any


class _Answer(Struct):
    status: str
    data: _Data | None = None
    error: str = ""


class PrometheusClient:
    """Asks servers of `allowed`, each `(host, port)`, and no other; it follows no redirect and heeds no proxy."""

    def __init__(self, allowed: frozenset[tuple[str, int]]) -> None:
        self._allowed = allowed
        self._client = httpx.AsyncClient(timeout=ANSWER_S, follow_redirects=False, trust_env=False)

    async def ask(self, query: PrometheusQuery) -> float:
        """See `control.queries.Ask`. A repeat is safe."""
        parts = prometheus_url(query)  # a spec from before may hold what is refused today
        host, port = parts.host, parts.port or PORTS[parts.scheme]
        if (host, port) not in self._allowed:
            raise Forbidden(
                f"the operator has not allowed '{host[:80]}:{port}' to be asked",
                mend=f"start the servers with --prometheus {host[:80]}:{port}",
            )
        try:
            request = self._client.build_request("GET", f"{query.url.rstrip('/')}/api/v1/query", params={"query": query.query})
            answer = await self._client.send(request, stream=True)
            try:
                body = await _read(answer)
            finally:
                await answer.aclose()
        except httpx.InvalidURL as error:
            raise Invalid(f"scale.prometheus.url: {error}", field="scale.prometheus.url") from None
        except httpx.HTTPError as error:
            raise Unavailable(f"{host}:{port} does not answer: {error or type(error).__name__}") from None
        return value_in(body, answer.status_code)

    async def close(self) -> None:
        await self._client.aclose()


async def _read(answer: httpx.Response) -> bytes:
    body = bytearray()
    async for part in answer.aiter_bytes():
        body += part
        if len(body) > ANSWER_BYTES_MAX:
            raise Invalid(f"the answer has over {ANSWER_BYTES_MAX >> 20} MiB", mend="ask for one number, as with sum()")
    return bytes(body)


def value_in(body: bytes, status: int = 200) -> float:
    """Return the number of an answer. Raises Invalid where it is none, or several; Unavailable where there is none now."""
    try:
        answer = msgspec.json.decode(body, type=_Answer)
        if answer.status != "success" or answer.data is None:
            raise Invalid(f"it answers {status}: {answer.error[:200] or 'without a reason'}")
        if answer.data.kind == "scalar":
            return _number(msgspec.convert(answer.data.result, tuple[float, str])[1])
        series = msgspec.convert(answer.data.result, list[_Series])
    except msgspec.MsgspecError:
        raise Invalid(f"it answers {status}, and not as Prometheus does to an instant query") from None
    if not series:
        raise Unavailable("the query finds no series now")
    if len(series) > 1:
        raise Invalid(f"the query finds {len(series)} series, and one number is needed", mend="put sum() around it")
    return _number(series[0].value[1])


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise Invalid(f"{text[:40]!r} is no number") from None
    if not math.isfinite(value):
        raise Unavailable(f"the query's answer is {text[:40]}")
    return value


def servers_of(text: str) -> frozenset[tuple[str, int]]:
    """Return what `--prometheus HOST:PORT,…` names. Raises Invalid."""
    found = set()
    for each in filter(None, (part.strip() for part in text.split(","))):
        host, _, port = each.rpartition(":")
        host = host.removeprefix("[").removesuffix("]").lower()
        if not host or not port.isdigit() or not 1 <= int(port) <= 65_535:
            raise Invalid(f"--prometheus: {each[:80]!r} is not HOST:PORT", field="prometheus", mend="write prometheus.example:9090")
        found.add((host, int(port)))
    if len(found) > SERVERS_MAX:
        raise Invalid(f"--prometheus: {len(found)} servers; at most {SERVERS_MAX}", field="prometheus")
    return frozenset(found)
