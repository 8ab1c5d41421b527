"""An account at a real ACME authority (RFC 8555), over certbot's library, whose calls block and so run in threads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar, cast

import requests
from acme import challenges, client, errors, messages
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from josepy import b64, jwa, jwk
from josepy.errors import Error as JoseError
from josepy.interfaces import JSONDeSerializable

from atoll import __version__
from atoll.control.orders import AcmeFailed, Challenge, Order, OrderState
from atoll.model.certificates import CHAIN_CHARS_MAX
from atoll.model.records.certificate import AcmeKeys, AcmeSettings

CALL_S = 15
"""The longest wait for one answer of the authority."""
RETRY_AFTER_MAX_S = 7 * 86_400.0
ANSWER_BYTES_MAX = 1 << 20
HTTP = "http-01"
T = TypeVar("T")


class AcmeAccount:
    """See `orders.Authority`. Registers its key at the first call; an account that is there already is found by it."""

    def __init__(self, settings: AcmeSettings, secret: AcmeKeys) -> None:
        key = serialization.load_pem_private_key(secret.account.encode(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)  # noqa: S101 (the API makes no other)
        self._settings = settings
        self._eab = secret.eab
        self._key = jwk.JWKEC(key=key)
        self._client: client.ClientV2 | None = None
        self._thread = ThreadPoolExecutor(1, "acme")
        """One call at a time, as the library's session and nonces want it, and never in a thread that others wait for."""

    async def begin(self, host: str) -> Order:
        def work(acme: client.ClientV2) -> Order:
            wanted = messages.NewOrder(identifiers=[messages.Identifier(typ=messages.IDENTIFIER_FQDN, value=host)])
            response = self._post(acme, acme.directory["newOrder"], wanted)
            return self._read(acme, response, response.headers.get("Location", ""))

        return await self._call(work)

    async def look(self, url: str) -> Order:
        return await self._call(lambda acme: self._read(acme, self._post(acme, url, None), url))

    async def answered(self, challenge: Challenge) -> None:
        # An empty object says that it is there (RFC 8555, 7.5.1).
        await self._call(lambda acme: self._post(acme, challenge.url, challenges.HTTP01Response()))

    async def finalize(self, order: Order, request: bytes) -> None:
        wrapped = messages.CertificateRequest(csr=x509.load_der_x509_csr(request))
        await self._call(lambda acme: self._post(acme, order.finalize, wrapped))

    async def fetch(self, order: Order) -> str:
        text = await self._call(lambda acme: str(self._post(acme, order.certificate, None).text))
        if len(text) > CHAIN_CHARS_MAX:
            raise AcmeFailed(f"the authority's chain has over {CHAIN_CHARS_MAX} characters", kind="badChain")
        return text

    async def _call(self, work: Callable[[client.ClientV2], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._work, work)

    def _work(self, work: Callable[[client.ClientV2], T]) -> T:
        retry_after: list[float] = []

        def note(response: requests.Response, *_: object, **__: object) -> None:
            retry_after.append(_retry_after_s(response))

        try:
            acme = self._connected(note)
            acme.net.session.hooks["response"] = [note]
            return work(acme)
        except messages.Error as error:
            words = error.detail or error.title or error.typ
            kind, told = error.typ.rpartition(":")[2], retry_after[-1] if retry_after else 0.0
            if kind == "accountDoesNotExist":
                self._client = None  # the authority has lost it: the next call registers the key again
            raise AcmeFailed(f"the authority refuses: {words[:500]}", kind=kind, retry_after_s=told) from None
        except errors.ConflictError as error:
            raise AcmeFailed(f"the authority has that already: {error}", kind="conflict") from None
        except (errors.Error, JoseError, ValueError, KeyError, TypeError, AttributeError) as error:
            text = f"the authority's answer is not understood: {type(error).__name__}: {str(error)[:300]}"
            raise AcmeFailed(text) from None
        except requests.RequestException as error:
            raise AcmeFailed(f"the authority cannot be reached: {_cause(error)}") from None

    def _connected(self, note: Callable[..., None]) -> client.ClientV2:
        if self._client is not None:
            return self._client
        net = client.ClientNetwork(self._key, alg=jwa.ES256, user_agent=f"atoll/{__version__}", timeout=CALL_S)
        net.session.hooks["response"] = [note]
        with self._trusting(net):
            directory = client.ClientV2.get_directory(self._settings.directory, net)
            acme = client.ClientV2(directory, net)
            binding: dict[str, Any] = {}
            if self._settings.eab_kid:
                binding["external_account_binding"] = messages.ExternalAccountBinding.from_data(
                    self._key.public_key(), self._settings.eab_kid, self._eab, directory
                )
            contact = ",".join(self._settings.contact) or None
            wanted = messages.NewRegistration.from_data(email=contact, terms_of_service_agreed=True, **binding)
            try:
                net.account = acme.new_account(wanted)
            except errors.ConflictError as known:
                net.account = messages.RegistrationResource(body=messages.Registration(), uri=known.location)
        self._client = acme
        return acme

    def _post(self, acme: client.ClientV2, url: str, what: JSONDeSerializable | None) -> requests.Response:
        with self._trusting(acme.net):
            # Without `what` it reads (RFC 8555, 6.3).
            return acme.net.post(url, cast(Any, what), new_nonce_url=acme.directory["newNonce"])

    @contextlib.contextmanager
    def _trusting(self, net: client.ClientNetwork) -> Iterator[None]:
        """Have the directory known by its own authority, where one was given: the library wants a file."""
        if not self._settings.ca:
            system = ssl.get_default_verify_paths().cafile
            net.verify_ssl = cast(bool, system) if system is not None else True
            yield
            return
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
            file.write(self._settings.ca)
            file.flush()
            net.verify_ssl = cast(bool, file.name)
            yield

    def _read(self, acme: client.ClientV2, response: requests.Response, url: str) -> Order:
        body = _json(response)
        found: list[Challenge] = []
        state = OrderState(body["status"])
        if state in (OrderState.PENDING, OrderState.INVALID):
            for authorization in body.get("authorizations", ()):
                found.extend(self._challenges(_json(self._post(acme, authorization, None))))
        return Order(
            url=url,
            state=state,
            finalize=str(body.get("finalize", "")),
            certificate=str(body.get("certificate", "")),
            challenges=tuple(found),
            error=_problem(body.get("error")),
            retry_after_s=_retry_after_s(response),
        )

    def _challenges(self, authorization: dict[str, Any]) -> list[Challenge]:
        """Return the HTTP challenge of an authorization that is not valid yet. Raises AcmeFailed where none is offered."""
        if authorization.get("status") == "valid":
            return []
        offered = authorization.get("challenges", ())
        for one in offered:
            if one.get("type") == HTTP:
                token = str(one["token"])
                thumbprint = b64.b64encode(self._key.thumbprint()).decode()
                return [
                    Challenge(
                        url=str(one["url"]),
                        token=token,
                        answer=f"{token}.{thumbprint}",
                        pending=one.get("status") == "pending",
                        error=_problem(one.get("error")),
                    )
                ]
        kinds = ", ".join(str(one.get("type")) for one in offered) or "nothing"
        raise AcmeFailed(f"the authority offers {kinds[:200]}, and not {HTTP}", kind="noChallenge")


def _json(response: requests.Response) -> dict[str, Any]:
    if len(response.content) > ANSWER_BYTES_MAX:
        raise AcmeFailed(f"an answer of the authority is over {ANSWER_BYTES_MAX} bytes")
    body = json.loads(response.content)
    if not isinstance(body, dict):
        raise AcmeFailed("an answer of the authority is no object")
    return body


def _problem(error: Any) -> str:
    """Return a problem document (RFC 7807) in words."""
    if not isinstance(error, dict):
        return ""
    kind = str(error.get("type", "")).rpartition(":")[2]
    detail = str(error.get("detail", ""))[:500]
    return f"{kind}: {detail}" if kind and detail else kind or detail


def _retry_after_s(response: requests.Response) -> float:
    """Return the seconds of a `Retry-After` header (RFC 9110, 10.2.3), 0 where there is none."""
    text = response.headers.get("Retry-After", "")
    if text.isascii() and text.isdecimal():
        return min(float(text[:9]), RETRY_AFTER_MAX_S)
    try:
        return min(max(0.0, parsedate_to_datetime(text).timestamp() - time.time()), RETRY_AFTER_MAX_S)
    except (ValueError, TypeError):
        return 0.0


def _cause(error: requests.RequestException) -> str:
    inner: BaseException = error
    while inner.__cause__ is not None or inner.__context__ is not None:
        inner = cast(BaseException, inner.__cause__ or inner.__context__)
    return f"{type(inner).__name__}: {inner}"[:300]
