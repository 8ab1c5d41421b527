"""Credentials for registries: Basic (RFC 7617), bearer tokens, and the distribution project's "Token Authentication
Specification", in which a registry's 401 names the service that gives a token.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping

import httpx
import msgspec
from msgspec import Struct

from atoll.images.answers import is_loopback, network_errors, raise_for_status, read_bounded, refused

TOKEN_BYTES_MAX = 64 << 10
TOKENS_MAX = 256
TOKEN_LIFE_S = 50.0
"""How long a token is used that does not say how long it lives (the specification's default is 60 s)."""
_CHALLENGE = re.compile(r'([a-zA-Z]+)="([^"]*)"')


class Access(Struct, frozen=True, kw_only=True):
    """How one registry is reached: `url` where it is not `https://HOST`, and credentials or a bearer token."""

    url: str | None = None
    username: str = ""
    password: str = ""
    token: str = ""
    insecure: bool = False
    """Plain http is allowed even though the host is not this machine."""
    ca: str = ""
    """PEM, or a file of it: its authority alone is trusted, and a server of the cell is expected (`model.tls`)."""
    identity: str = ""
    """With `ca`: a file (PEM) of the key and the certificate that are shown."""

    def __repr__(self) -> str:
        return f"Access(url={self.url!r}, username={self.username!r}, insecure={self.insecure})"


Find = Callable[[str], Access | None]
"""Tells of a registry, by its host, each time that it is asked: what it says may change."""


class _Token(Struct):
    value: str
    expires_at: float


class _TokenAnswer(Struct):
    token: str = ""
    access_token: str = ""
    expires_in: float = TOKEN_LIFE_S


class Credentials:
    """What is known of each registry, and the tokens that they have given."""

    def __init__(self, access: Mapping[str, Access], http: httpx.AsyncClient, find: Find | None = None) -> None:
        self._access = dict(access)
        self._find = find
        self._http = http
        self._tokens: dict[tuple[str, str], _Token] = {}

    def access(self, host: str) -> Access:
        known = self._access.get(host)
        if known is None and self._find is not None:
            known = self._find(host)
        return known or Access()

    def base(self, host: str) -> str:
        access = self.access(host)
        if access.url is not None:
            return access.url.rstrip("/")
        return f"{'http' if access.insecure or is_loopback(host) else 'https'}://{host}"

    def header(self, host: str, scope: str) -> dict[str, str]:
        access = self.access(host)
        if access.token:
            return {"Authorization": f"Bearer {access.token}"}
        token = self._tokens.get((host, scope))
        if token is not None and token.expires_at > asyncio.get_running_loop().time():
            return {"Authorization": token.value}
        return {}

    async def answer(self, host: str, scope: str, challenge: str) -> None:
        """Answer a 401: keep the credentials or fetch the token that the challenge asks for."""
        access = self.access(host)
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
                raise_for_status(response, host, "GET")
                body = await read_bounded(response, TOKEN_BYTES_MAX, f"the token of registry {host}")
        try:
            return msgspec.json.decode(body, type=_TokenAnswer)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise refused(host, "its token service answers in no known form") from None

    def _keep_token(self, host: str, scope: str, token: _Token) -> None:
        if len(self._tokens) >= TOKENS_MAX:
            self._tokens.pop(next(iter(self._tokens)))
        self._tokens[host, scope] = token


def _url(text: str) -> httpx.URL | None:
    try:
        return httpx.URL(text)
    except httpx.InvalidURL:
        return None
