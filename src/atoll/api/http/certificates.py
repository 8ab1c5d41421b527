"""The calls about certificates of hostnames: users add them, ingresses are told of them with their keys."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from atoll.api.http.answers import Lines
from atoll.api.http.calls import Call, Route
from atoll.api.http.machines import KEEPALIVE_S
from atoll.api.http.users import PAGED
from atoll.api.service import Need
from atoll.model import codec
from atoll.model.certificates import (
    AcmeRequest,
    AcmeView,
    CallerCertificate,
    CallerRequest,
    CertificateBatch,
    CertificateRequest,
    CertificateView,
    RootView,
)
from atoll.model.views import Page

_ALL = "/v1/projects/{project}/certificates"
_ONE = f"{_ALL}/{{host}}"
_ACME = "/v1/certificates/acme"


async def list_certificates(call: Call) -> Page[CertificateView]:
    return call.service.certificates.all(call.project, limit=call.limit, after=call.after)


async def get_certificate(call: Call) -> CertificateView:
    return call.service.certificates.get(call.project, call.path["host"])


async def put_certificate(call: Call) -> CertificateView:
    return await call.service.certificates.put(
        call.caller,
        call.project,
        call.path["host"],
        call.body(CertificateRequest),
        if_match=call.if_match,
        request=call.request_key,
    )


async def delete_certificate(call: Call) -> CertificateView:
    return await call.service.certificates.remove(call.project, call.path["host"], request=call.request_key)


async def get_root(call: Call) -> RootView:
    return await call.service.certificate_roots.root()


async def get_acme(call: Call) -> AcmeView:
    return call.service.certificate_roots.acme()


async def put_acme(call: Call) -> AcmeView:
    return await call.service.certificate_roots.set_acme(call.body(AcmeRequest), request=call.request_key)


async def delete_acme(call: Call) -> AcmeView:
    return await call.service.certificate_roots.forget_acme(request=call.request_key)


async def watch_certificates(call: Call) -> Lines:
    return Lines(_encoded(call.service.certificate_feeds.certificates(call.path["ingress"], KEEPALIVE_S)))


async def certify_caller(call: Call) -> CallerCertificate:
    return await call.service.callers.certify(call.path["ingress"], call.body(CallerRequest))


async def _encoded(batches: AsyncIterator[CertificateBatch]) -> AsyncIterator[bytes]:
    async for batch in batches:
        yield codec.encode(batch) + b"\n"


def _write(method: str, path: str, need: Need, run: Any, summary: str, answer: Any, **more: Any) -> Route:
    return Route(method=method, path=path, need=need, run=run, summary=summary, answer=answer, repeatable=True, **more)


def _read(path: str, need: Need, run: Any, summary: str, answer: Any, **more: Any) -> Route:
    return Route(method="GET", path=path, need=need, run=run, summary=summary, answer=answer, **more)


ROUTES: tuple[Route, ...] = (
    _read(_ALL, Need.READ, list_certificates, "Certificates of hostnames, without keys", Page[CertificateView], query=PAGED),
    _read(_ONE, Need.READ, get_certificate, "A certificate, with its chain", CertificateView),
    _write(
        "PUT",
        _ONE,
        Need.DEPLOY,
        put_certificate,
        "Add or replace the certificate of a hostname",
        CertificateView,
        body=CertificateRequest,
        conditional=True,
    ),
    _write("DELETE", _ONE, Need.DEPLOY, delete_certificate, "Forget a certificate that was added", CertificateView),
    _read("/v1/certificates/root", Need.ANY, get_root, "What to trust for hostnames that the cell signs itself", RootView),
    _read(_ACME, Need.ANY, get_acme, "Which ACME authority signs", AcmeView),
    _write("PUT", _ACME, Need.ADMIN, put_acme, "Choose the ACME authority", AcmeView, body=AcmeRequest),
    _write("DELETE", _ACME, Need.ADMIN, delete_acme, "Have no ACME authority", AcmeView),
    _read(
        "/v1/ingresses/{ingress}/certificates",
        Need.INGRESS,
        watch_certificates,
        "All certificates with their keys, as they change",
        CertificateBatch,
        lines=True,
    ),
    Route(
        method="POST",
        path="/v1/ingresses/{ingress}/caller",
        need=Need.INGRESS,
        run=certify_caller,
        summary="A certificate that the ingress shows to instances",
        answer=CallerCertificate,
        body=CallerRequest,
    ),
)
