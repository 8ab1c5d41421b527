"""Requests to a registry: scheme, credentials, redirects, retries and deadlines. Knows nothing of images.

The token flow is the distribution project's "Token Authentication Specification"; Basic is RFC 7617.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import random
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import TypeVar

import httpx
import msgspec
from msgspec import Struct

from atoll.model.errors import AtollError, DeadlineExceeded, ImageError, Unavailable

T = TypeVar("T")
TOKEN_BYTES_MAX = 64 << 10
TOKENS_MAX = 256
TOKEN_LIFE_S = 50.0
"""How long a token is used that does not say how long it lives (the specification's default is 60 s)."""
REDIRECTS_MAX = 5
RETRY_AFTER_S_MAX = 30.0
_CHALLENGE = re.compile(r'([a-zA-Z]+)="([^"]*)"')


class Access(Struct, frozen=True, kw_only=True):
    """How one registry is reached: `url` where it is not `https://HOST`, and credentials or a bearer token."""

    url: str | None = None
    username: str = ""
    password: str = ""
    token: str = ""
    insecure: bool = False
    """Plain http is allowed even though the host is not this machine."""

    def __repr__(self) -> str:
        return f"Access(url={self.url!r}, username={self.username!r}, insecure={self.insecure})"


class Patience(Struct, frozen=True, kw_only=True):
    """How long to wait, in seconds, and how often to try."""

    connect_s: float = 10.0
    stall_s: float = 20.0
    """Without a byte for so long, the connection counts as hanging."""
    tries: int = 5
    backoff_s: float = 0.25
    """Before the second try; doubled each time, with jitter, up to `backoff_s_max`."""
    backoff_s_max: float = 8.0


class Retriable(Exception):
    """The try failed in a way that another may mend; `error` is what the caller sees after the last."""

    def __init__(self, error: AtollError, *, after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.after_s = after_s


class _Token(Struct):
    value: str
    expires_at: float


class _TokenAnswer(Struct):
    token: str = ""
    access_token: str = ""
    expires_in: float = TOKEN_LIFE_S


class Transport:
    """Sends requests to registries by host name. One per process is enough; `aclose` it in the end."""

    def __init__(
        self,
        access: Mapping[str, Access] | None = None,
        *,
        patience: Patience | None = None,
        http: httpx.AsyncClient | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._access = dict(access or {})
        self.patience = patience or Patience()
        timeout = httpx.Timeout(self.patience.stall_s, connect=self.patience.connect_s, pool=None)
        self._http = http or httpx.AsyncClient(follow_redirects=False, timeout=timeout, verify=ssl.create_default_context())
        self._owns_http = http is None
        self._rng = rng or random.Random()
        self._tokens: dict[tuple[str, str], _Token] = {}

    async def aclose(self) -> None:
        if self._owns_http:
            await self._http.aclose()

    def base(self, host: str) -> str:
        """Return the URL that the host's paths are appended to."""
        access = self._access.get(host, Access())
        if access.url is not None:
            return access.url.rstrip("/")
        return f"{'http' if access.insecure or is_loopback(host) else 'https'}://{host}"

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
                sent.update(self._authorization(host, scope))
            body = content() if callable(content) else content
            async with contextlib.AsyncExitStack() as stack:
                response = await self._send(stack, method, url, sent, body, host)
                if response.status_code in (301, 302, 303, 307, 308) and method in ("GET", "HEAD"):
                    redirects += 1
                    url = self._redirected(host, url, response, redirects)
                    continue
                if response.status_code == 401 and not authorized and _origin(url) == _origin(base):
                    authorized = True
                    await self._authorize(host, scope, response.headers.get("WWW-Authenticate", ""))
                    continue
                _raise_for_status(response, host, method)
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

    def _authorization(self, host: str, scope: str) -> dict[str, str]:
        access = self._access.get(host, Access())
        if access.token:
            return {"Authorization": f"Bearer {access.token}"}
        token = self._tokens.get((host, scope))
        if token is not None and token.expires_at > asyncio.get_running_loop().time():
            return {"Authorization": token.value}
        return {}

    async def _authorize(self, host: str, scope: str, challenge: str) -> None:
        """Answer a 401: keep the credentials or fetch the token that the challenge asks for."""
        access = self._access.get(host, Access())
        scheme, _, rest = challenge.partition(" ")
        now = asyncio.get_running_loop().time()
        if access.token:
            raise refused(host, "it does not accept this token")
        if scheme.lower() == "basic":
            if not access.username:
                raise refused(host, "it asks for a user name and a password")
            credentials = httpx.BasicAuth(access.username, access.password)
            request = next(credentials.auth_flow(httpx.Request("GET", "http://x")))
            self._keep_token(host, scope, _Token(request.headers["Authorization"], now + 3600))
        elif scheme.lower() == "bearer":
            parameters = {key.lower(): value for key, value in _CHALLENGE.findall(rest)}
            answer = await self._fetch_token(host, access, parameters, scope)
            value = answer.token or answer.access_token
            if not value:
                raise refused(host, "its token service gave no token")
            self._keep_token(host, scope, _Token(f"Bearer {value}", now + max(answer.expires_in - 10, 1)))
        else:
            raise refused(host, f"it asks for {scheme[:40] or 'nothing'} authentication, which is not known")

    async def _fetch_token(self, host: str, access: Access, parameters: dict[str, str], scope: str) -> _TokenAnswer:
        realm = parameters.get("realm", "")
        url = _url(realm)
        secure = self.base(host).startswith("https:")
        if url is None or url.scheme not in ("http", "https") or (secure and url.scheme == "http"):
            raise refused(host, "its token service has no secure address")
        query = {"service": parameters.get("service", ""), "scope": parameters.get("scope") or scope}
        credentials = httpx.BasicAuth(access.username, access.password) if access.username else None
        with network_errors(host):
            async with self._http.stream(
                "GET", url.copy_merge_params({k: v for k, v in query.items() if v}), auth=credentials
            ) as response:
                if response.status_code in (401, 403):
                    raise refused(host, "its token service refuses these credentials" if credentials else "it asks for credentials")
                _raise_for_status(response, host, "GET")
                body = await read_bounded(response, TOKEN_BYTES_MAX, f"the token of registry {host}")
        try:
            return msgspec.json.decode(body, type=_TokenAnswer)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise refused(host, "its token service answers in no known form") from None

    def _keep_token(self, host: str, scope: str, token: _Token) -> None:
        if len(self._tokens) >= TOKENS_MAX:
            self._tokens.pop(next(iter(self._tokens)))
        self._tokens[host, scope] = token


@contextlib.contextmanager
def network_errors(host: str) -> Iterator[None]:
    """Turn httpx's errors into ours: a hang into DeadlineExceeded, other failures of the connection into Retriable."""
    try:
        yield
    except httpx.TimeoutException as error:
        kind = "does not accept a connection" if isinstance(error, httpx.ConnectTimeout) else "hangs: no byte arrived in time"
        raise Retriable(DeadlineExceeded(f"registry {host} {kind}", mend="check the registry and the network between")) from None
    except httpx.TransportError as error:
        raise Retriable(
            Unavailable(
                f"registry {host} does not answer: {str(error) or type(error).__name__}", mend="check its address and that it runs"
            )
        ) from None
    except (httpx.InvalidURL, UnicodeError):
        raise ImageError(f"registry {host} has no usable address", mend="check the image's host name") from None


async def read_bounded(response: httpx.Response, bytes_max: int, what: str) -> bytes:
    """Return the body. Raises ImageError when it is longer than `bytes_max`, however long it says it is."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > bytes_max:
            raise ImageError(f"{what} has more than {bytes_max} bytes")
    return bytes(body)


def refused(host: str, why: str) -> ImageError:
    return ImageError(f"registry {host} refuses: {why}", mend="check the registry's credentials and the image's name")


def is_loopback(host: str) -> bool:
    """Whether `HOST[:PORT]` is this machine, so that plain http is safe."""
    name = host.rpartition(":")[0] if re.search(r":[0-9]+$", host) else host
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _raise_for_status(response: httpx.Response, host: str, method: str) -> None:
    status = response.status_code
    if status == 429 or status >= 500:
        after = response.headers.get("Retry-After", "")
        error = Unavailable(f"registry {host} answers {status} to {method}", mend="try again later")
        raise Retriable(error, after_s=float(after) if after.isascii() and after.isdigit() else None)
    if status in (401, 403):
        raise refused(host, f"status {status}")


def _origin(url: str) -> tuple[str, str, int | None]:
    parsed = httpx.URL(url)
    return parsed.scheme, parsed.host, parsed.port or {"http": 80, "https": 443}.get(parsed.scheme)


def _url(text: str) -> httpx.URL | None:
    try:
        return httpx.URL(text)
    except httpx.InvalidURL:
        return None
