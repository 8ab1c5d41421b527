"""The calls that concern the cell as a whole: health, schemas, nodes, tokens, usage, metrics."""

from __future__ import annotations

from functools import cache
from typing import Any

from msgspec import Struct

from atoll.api.http import brakes, evacuations, reservations
from atoll.api.http.answers import NO_STORE, Answer
from atoll.api.http.calls import Call, Query, Route
from atoll.api.http.users import PAGED
from atoll.api.service import Need, authorize
from atoll.api.service.exposition import CONTENT_TYPE
from atoll.model import codec
from atoll.model.devices import GpuDevice
from atoll.model.errors import Invalid, NotFound
from atoll.model.records import Site, Usage
from atoll.model.spec import AppSpec, JobSpec
from atoll.model.views import (
    Info,
    LabelRequest,
    NodeView,
    Page,
    ReinstateRequest,
    SiteView,
    TaintRequest,
    TokenRequest,
    TokenView,
)


class Healthy(Struct, frozen=True):
    """The store answers."""

    revision: int


async def healthz(call: Call) -> Answer:
    return Answer(codec.encode(Healthy(await call.service.healthy())))


async def info(call: Call) -> Info:
    return call.service.info(call.caller)


async def schema(call: Call) -> Answer:
    return Answer(_schema(call.path["kind"]))


@cache
def _schema(kind: str) -> bytes:
    kinds: dict[str, Any] = {"app": AppSpec, "job": JobSpec}
    if kind not in kinds:
        raise NotFound(f"no schema '{kind[:60]}'", mend="there are: app, job")
    return codec.encode(codec.json_schema(kinds[kind]))


async def list_nodes(call: Call) -> Page[NodeView]:
    return call.service.nodes.all(limit=call.limit, after=call.after, caller=call.caller)


async def get_node(call: Call) -> NodeView:
    return call.service.nodes.get(call.path["node"], call.caller)


async def cordon_node(call: Call) -> NodeView:
    return await call.service.nodes.cordon(call.path["node"], True, request=call.request_key)


async def uncordon_node(call: Call) -> NodeView:
    return await call.service.nodes.cordon(call.path["node"], False, request=call.request_key)


async def label_node(call: Call) -> NodeView:
    return await call.service.nodes.label(call.path["node"], call.body(LabelRequest), request=call.request_key)


async def taint_node(call: Call) -> NodeView:
    return await call.service.nodes.taint(call.path["node"], call.body(TaintRequest), request=call.request_key)


async def reinstate_gpu(call: Call) -> GpuDevice:
    asked = call.body(ReinstateRequest) if call.has_body else ReinstateRequest()
    return await call.service.nodes.reinstate(call.path["node"], call.path["gpu"], reset=asked.reset, caller=call.caller)


async def list_sites(call: Call) -> Page[SiteView]:
    return call.service.sites.all(limit=call.limit, after=call.after)


async def get_site(call: Call) -> SiteView:
    return call.service.sites.get(call.path["site"])


async def put_site(call: Call) -> SiteView:
    site = call.body(Site)
    if site.name != call.path["site"]:
        raise Invalid(f"name: the body says '{site.name[:60]}', the path '{call.path['site'][:60]}'", field="name")
    return await call.service.sites.put(site, request=call.request_key)


async def delete_site(call: Call) -> Site:
    return await call.service.sites.remove(call.path["site"], request=call.request_key)


async def usage(call: Call) -> tuple[Usage, ...]:
    project = call.query("project")
    if project is not None:
        authorize(call.caller, Need.READ, project=project)
    return call.service.nodes.usage(call.caller, project)


async def metrics(call: Call) -> Answer:
    project = call.query("project")
    if project is not None:
        authorize(call.caller, Need.READ, project=project)
    text = await call.service.exposition.text(call.caller, project)
    return Answer(text, headers=((b"content-type", CONTENT_TYPE.encode()), NO_STORE))


async def list_tokens(call: Call) -> Page[TokenView]:
    return call.service.tokens.all(call.caller, limit=call.limit, after=call.after)


async def create_token(call: Call) -> TokenView:
    return await call.service.tokens.create(call.caller, call.body(TokenRequest), request=call.request_key)


async def delete_token(call: Call) -> TokenView:
    return await call.service.tokens.delete(call.caller, call.path["token"], request=call.request_key)


def _route(method: str, path: str, need: Need, run: Any, summary: str, answer: Any, **more: Any) -> Route:
    return Route(method=method, path=path, need=need, run=run, summary=summary, answer=answer, **more)


ROUTES: tuple[Route, ...] = (
    _route("GET", "/healthz", Need.NOTHING, healthz, "Whether the store answers", Healthy),
    _route("GET", "/v1/info", Need.ANY, info, "This server, and the caller's own token", Info),
    _route("GET", "/v1/schema/{kind}", Need.NOTHING, schema, "JSON Schema of a spec: `app` or `job`", dict[str, Any]),
    _route("GET", "/v1/nodes", Need.READ, list_nodes, "Nodes", Page[NodeView], query=PAGED),
    _route("GET", "/v1/nodes/{node}", Need.READ, get_node, "A node", NodeView),
    _route("POST", "/v1/nodes/{node}/cordon", Need.ADMIN, cordon_node, "Place nothing new on a node", NodeView, repeatable=True),
    _route("POST", "/v1/nodes/{node}/uncordon", Need.ADMIN, uncordon_node, "Undo a cordon", NodeView, repeatable=True),
    _route(
        "POST",
        "/v1/nodes/{node}/label",
        Need.ADMIN,
        label_node,
        "Say labels of a node, before its agent's own",
        NodeView,
        body=LabelRequest,
        repeatable=True,
    ),
    _route(
        "POST",
        "/v1/nodes/{node}/taint",
        Need.ADMIN,
        taint_node,
        "Add taints to a node and take others away",
        NodeView,
        body=TaintRequest,
        repeatable=True,
    ),
    _route(
        "POST",
        "/v1/nodes/{node}/gpus/{gpu}/reinstate",
        Need.ADMIN,
        reinstate_gpu,
        "Offer a GPU again that was taken out for an error",
        GpuDevice,
        body=ReinstateRequest,
    ),
    _route("GET", "/v1/sites", Need.READ, list_sites, "Sites", Page[SiteView], query=PAGED),
    _route("GET", "/v1/sites/{site}", Need.READ, get_site, "A site, with the round trips to all others", SiteView),
    _route("PUT", "/v1/sites/{site}", Need.ADMIN, put_site, "Describe a site", SiteView, body=Site, repeatable=True),
    _route("DELETE", "/v1/sites/{site}", Need.ADMIN, delete_site, "Forget where a site is", Site, repeatable=True),
    _route(
        "GET",
        "/v1/usage",
        Need.READ,
        usage,
        "What every instance used last",
        tuple[Usage, ...],
        query=(Query("project", "only of this project"),),
    ),
    _route(
        "GET",
        "/metrics",
        Need.READ,
        metrics,
        "Nodes, devices, apps and instances for Prometheus",
        str,
        query=(Query("project", "only this project's apps and instances"),),
        media="text/plain",
    ),
    _route("GET", "/v1/tokens", Need.ADMIN_OF_PROJECT, list_tokens, "Tokens, without their secrets", Page[TokenView], query=PAGED),
    _route(
        "POST",
        "/v1/tokens",
        Need.ADMIN_OF_PROJECT,
        create_token,
        "Make a token; its secret is in this answer only",
        TokenView,
        body=TokenRequest,
        status=201,
        repeatable=True,
    ),
    _route("DELETE", "/v1/tokens/{token}", Need.ADMIN_OF_PROJECT, delete_token, "Withdraw a token", TokenView, repeatable=True),
    *brakes.ROUTES,
    *evacuations.ROUTES,
    *reservations.ROUTES,
)
