"""Requests to a registry: redirects, retries and deadlines. Knows nothing of images."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

import httpx
from msgspec import Struct

from atoll.images.answers import Retriable, is_loopback, network_errors, raise_for_status
from atoll.images.auth import Access as Access
from atoll.images.auth import Credentials, Find
from atoll.model.errors import ImageError
from atoll.model.tls import trusting

T = TypeVar("T")
REDIRECTS_MAX = 5
RETRY_AFTER_S_MAX = 30.0
_NEVER_PROXIED = ("all://localhost", "all://127.0.0.1", "all://[::1]")


class Patience(Struct, frozen=True, kw_only=True):
    """How long to wait, in seconds, and how often to try."""

    connect_s: float = 10.0
    stall_s: float = 20.0
    """Without a byte for so long, the connection counts as hanging."""
    tries: int = 5
    backoff_s: float = 0.25
    """Before the second try; doubled each time, with jitter, up to `backoff_s_max`."""
    backoff_s_max: float = 8.0


class Transport:
    """Sends requests to registries by host name. One per process is enough; `aclose` it in the end."""

    def __init__(
        self,
        access: Mapping[str, Access] | None = None,
        *,
        patience: Patience | None = None,
        http: httpx.AsyncClient | None = None,
        rng: random.Random | None = None,
        find: Find | None = None,
    ) -> None:
        self.patience = patience or Patience()
        timeout = httpx.Timeout(self.patience.stall_s, connect=self.patience.connect_s, pool=None)
        self._http = http or httpx.AsyncClient(
            follow_redirects=False, timeout=timeout, verify=ssl.create_default_context(), mounts=_ways(access or {})
        )
        self._owns_http = http is None
        self._rng = rng or random.Random()
        self._credentials = Credentials(access or {}, self._http, find)

    async def aclose(self) -> None:
        if self._owns_http:
            await self._http.aclose()

    def base(self, host: str) -> str:
        """Return the URL that the host's paths are appended to."""
        return self._credentials.base(host)

    @contextlib.asynccontextmanager
    async def stream(
        self,
        method: str,
        host: str,
        path: str,
        *,
        scope: str,
        headers: Mapping[str, str] | None = None,
        content: Callable[[], AsyncIterator[bytes]] | bytes | None = None,
    ) -> AsyncGenerator[httpx.Response, None]:
        """Send one request and give its response, whose body the caller reads (`aiter_raw`).

        `path` is below the host's base, or an absolute URL that the registry named. Redirects are followed; credentials
        go to the registry's own origin only. Raises Retriable, ImageError (refused), DeadlineExceeded.
        """
        base = self.base(host)
        url = path if path.startswith(("http://", "https://")) else base + path
        authorized = False
        redirects = 0
        while True:
            sent = {"Accept-Encoding": "identity", **(headers or {})}
            if _origin(url) == _origin(base):
                sent.update(self._credentials.header(host, scope))
            body = content() if callable(content) else content
            async with contextlib.AsyncExitStack() as stack:
                response = await self._send(stack, method, url, sent, body, host)
                if response.status_code in (301, 302, 303, 307, 308) and method in ("GET", "HEAD"):
                    redirects += 1
                    url = self._redirected(host, url, response, redirects)
                    continue
                if response.status_code == 401 and not authorized and _origin(url) == _origin(base):
                    authorized = True
                    await self._credentials.answer(host, scope, response.headers.get("WWW-Authenticate", ""))
                    continue
                raise_for_status(response, host, method)
                yield response
                return

    async def retried(self, attempt: Callable[[], Awaitable[T]], *, progress: Callable[[], int] = lambda: 0) -> T:
        """Await `attempt()` until it does not raise Retriable, with back-off.

        It is given up after `patience.tries` tries in a row without `progress()` having grown.
        """
        count, before = 1, progress()
        while True:
            try:
                return await attempt()
            except Retriable as error:
                if progress() > before:
                    count, before = 1, progress()
                if count >= self.patience.tries:
                    raise error.error from None
                wait = min(self.patience.backoff_s * 2 ** (count - 1), self.patience.backoff_s_max)
                count += 1
                wait *= self._rng.uniform(0.5, 1.0)
                await asyncio.sleep(wait if error.after_s is None else min(error.after_s, RETRY_AFTER_S_MAX))

    async def _send(
        self,
        stack: contextlib.AsyncExitStack,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: AsyncIterator[bytes] | bytes | None,
        host: str,
    ) -> httpx.Response:
        with network_errors(host):
            return await stack.enter_async_context(self._http.stream(method, url, headers=dict(headers), content=body))

    def _redirected(self, host: str, url: str, response: httpx.Response, redirects: int) -> str:
        if redirects > REDIRECTS_MAX:
            raise ImageError(f"registry {host} redirects more than {REDIRECTS_MAX} times")
        try:
            target = httpx.URL(url).join(response.headers.get("Location", ""))
        except httpx.InvalidURL:
            raise ImageError(f"registry {host} redirects to something that is no URL") from None
        secure = url.startswith("https:")
        if target.scheme not in ("http", "https") or (secure and target.scheme == "http" and not is_loopback(target.host)):
            raise ImageError(f"registry {host} redirects to an insecure address ({target.scheme}://{target.host})")
        return str(target)


def _ways(access: Mapping[str, Access]) -> dict[str, httpx.AsyncBaseTransport | None]:
    """Return what is reached in a way of its own: this machine by no proxy, the cell's registry by the cell's TLS."""
    ways: dict[str, httpx.AsyncBaseTransport | None] = dict.fromkeys(_NEVER_PROXIED)
    for one in access.values():
        if one.ca and one.url is not None and one.url.startswith("https://"):
            context = trusting(one.ca if "-----BEGIN" in one.ca else Path(one.ca), Path(one.identity) if one.identity else None)
            origin = httpx.URL(one.url)
            ways[f"https://{origin.netloc.decode()}"] = httpx.AsyncHTTPTransport(verify=context)
    return ways


def _origin(url: str) -> tuple[str, str, int | None]:
    parsed = httpx.URL(url)
    return parsed.scheme, parsed.host, parsed.port or {"http": 80, "https": 443}.get(parsed.scheme)
