"""The calls about who belongs to the cell: joining, renewing, revoking, authorities, servers."""

from __future__ import annotations

from typing import Any

from atoll.api.http.answers import NO_STORE, Answer
from atoll.api.http.calls import Call, Route
from atoll.api.service import Need
from atoll.model import codec
from atoll.model.membership import (
    AuthorityView,
    Bundle,
    Certified,
    IdentityView,
    JoinRequest,
    JoinTokenRequest,
    JoinTokenView,
    MemberKind,
    RenewRequest,
    RotateRequest,
    ServerView,
)
from atoll.model.records import CELL
from atoll.model.views import IngressView

MEMBER_BYTES_MAX = 65_536
"""Of what a stranger may send."""


async def bundle(call: Call) -> Bundle:
    return Bundle(cell=CELL, bundle=call.service.authorities.bundle())


async def join(call: Call) -> Answer:
    return _private(await call.service.membership.join(call.body(JoinRequest)))


async def renew(call: Call) -> Answer:
    return _private(await call.service.membership.renew(call.body(RenewRequest)))


async def create_join_token(call: Call) -> JoinTokenView:
    asked = call.body(JoinTokenRequest) if call.has_body else JoinTokenRequest()
    return await call.service.join_tokens.create(asked, request=call.request_key)


async def list_join_tokens(call: Call) -> tuple[JoinTokenView, ...]:
    return call.service.join_tokens.all()


async def delete_join_token(call: Call) -> JoinTokenView:
    return await call.service.join_tokens.delete(call.path["token"], request=call.request_key)


async def revoke_node(call: Call) -> IdentityView:
    return await call.service.membership.revoke(MemberKind.NODE, call.path["node"], call.caller, request=call.request_key)


async def revoke_ingress(call: Call) -> IdentityView:
    return await call.service.membership.revoke(MemberKind.INGRESS, call.path["ingress"], call.caller, request=call.request_key)


async def list_ingresses(call: Call) -> tuple[IngressView, ...]:
    return call.service.ingress_records.all()


async def forget_ingress(call: Call) -> IngressView:
    return await call.service.ingress_records.forget(call.path["ingress"], call.caller, request=call.request_key)


async def remove_node(call: Call) -> IdentityView:
    return await call.service.membership.remove_node(call.path["node"], call.caller, request=call.request_key)


async def list_identities(call: Call) -> tuple[IdentityView, ...]:
    return call.service.membership.identities()


async def list_authorities(call: Call) -> tuple[AuthorityView, ...]:
    return call.service.authorities.views()


async def rotate(call: Call) -> tuple[AuthorityView, ...]:
    asked = call.body(RotateRequest) if call.has_body else RotateRequest()
    return await call.service.authorities.rotate(at_once=asked.at_once, request=call.request_key)


async def list_servers(call: Call) -> tuple[ServerView, ...]:
    return await call.service.servers.listed()


def _private(certified: Certified) -> Answer:
    return Answer(codec.encode(certified), 200, ((b"content-type", b"application/json"), NO_STORE))


def _admin(method: str, path: str, run: Any, summary: str, answer: Any, **more: Any) -> Route:
    repeatable = method != "GET"
    return Route(method=method, path=path, need=Need.ADMIN, run=run, summary=summary, answer=answer, repeatable=repeatable, **more)


def _open(method: str, path: str, run: Any, summary: str, answer: Any, **more: Any) -> Route:
    return Route(
        method=method,
        path=path,
        need=Need.NOTHING,
        run=run,
        summary=summary,
        answer=answer,
        body_bytes_max=MEMBER_BYTES_MAX,
        **more,
    )


ROUTES: tuple[Route, ...] = (
    _open("GET", "/v1/identity/bundle", bundle, "The certificates of the cell's authorities", Bundle),
    _open("POST", "/v1/identity/join", join, "A machine joins with a join token", Certified, body=JoinRequest),
    _open(
        "POST",
        "/v1/identity/renew",
        renew,
        "A machine's next certificate, for who holds the key of the last",
        Certified,
        body=RenewRequest,
    ),
    _admin("GET", "/v1/join-tokens", list_join_tokens, "Join tokens, without their secrets", tuple[JoinTokenView, ...]),
    _admin("POST", "/v1/join-tokens", create_join_token, "Make a join token", JoinTokenView, body=JoinTokenRequest, status=201),
    _admin("DELETE", "/v1/join-tokens/{token}", delete_join_token, "Withdraw a join token", JoinTokenView),
    _admin(
        "GET", "/v1/identities", list_identities, "Machines that joined, with when their certificates end", tuple[IdentityView, ...]
    ),
    _admin("POST", "/v1/nodes/{node}/revoke", revoke_node, "Refuse a node from now on", IdentityView),
    _admin("DELETE", "/v1/nodes/{node}", remove_node, "Forget a node that is lost or revoked", IdentityView),
    _admin("POST", "/v1/ingresses/{ingress}/revoke", revoke_ingress, "Refuse an ingress from now on", IdentityView),
    _admin("GET", "/v1/ingresses", list_ingresses, "The ingresses that have registered", tuple[IngressView, ...]),
    _admin("DELETE", "/v1/ingresses/{ingress}", forget_ingress, "Forget an ingress that is gone for good", IngressView),
    _admin("GET", "/v1/authorities", list_authorities, "The cell's certificate authorities", tuple[AuthorityView, ...]),
    _admin("POST", "/v1/authorities/rotate", rotate, "Make a new authority", tuple[AuthorityView, ...], body=RotateRequest),
    _admin("GET", "/v1/servers", list_servers, "The servers that run, and which leads", tuple[ServerView, ...]),
)
