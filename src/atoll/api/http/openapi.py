"""The description of the API (OpenAPI 3.1), made from the table of routes and from the types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from atoll import __version__
from atoll.api.http.calls import Route
from atoll.api.service import Need
from atoll.model import codec
from atoll.model.spec import NAME_PATTERN
from atoll.model.views import ErrorAnswer

_NAMES = frozenset({"project", "app", "job", "secret"})
_REF = "#/components/schemas/{name}"
_TEXT = """Every error is `{"error": {code, message, mend, field, retry}}`. `retry` says whether the same call may be made again."""


def describe(routes: Sequence[Route]) -> bytes:
    """Return the OpenAPI document as JSON."""
    kinds = [ErrorAnswer]
    for route in routes:
        kinds.extend(kind for kind in (route.body, route.answer) if kind is not None)
    schemas, components = codec.json_schemas(kinds, _REF)
    rest = iter(schemas[1:])
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        body = next(rest) if route.body is not None else None
        answer = next(rest) if route.answer is not None else None
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, body, answer)
    return codec.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Atoll", "version": __version__, "description": _TEXT, "license": {"name": "Apache-2.0"}},
            "servers": [{"url": "/"}],
            "paths": paths,
            "components": {
                "schemas": components,
                "responses": {"Error": {"description": "What went wrong", "content": _json(schemas[0])}},
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{"token": []}],
        }
    )


def _operation(route: Route, body: dict[str, Any] | None, answer: dict[str, Any] | None) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.run.__name__,
        "summary": route.summary,
        "description": _needs(route.need),
        "tags": [_tag(route.path)],
        "parameters": _parameters(route),
        "responses": {**_good(route, answer), "default": {"$ref": "#/components/responses/Error"}},
    }
    if route.need is Need.NOTHING:
        operation["security"] = []
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    return operation


def _good(route: Route, answer: dict[str, Any] | None) -> dict[str, Any]:
    if answer is None:
        return {"204": {"description": "Done"}}
    if route.lines:
        content = {"application/x-ndjson": {"schema": answer}}
        return {"200": {"description": "A stream: one such record in each line", "content": content}}
    return {str(route.status): {"description": "Done", "content": {route.media: {"schema": answer}}}}


def _parameters(route: Route) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in re.findall(r"\{(\w+)\}", route.path):
        schema: dict[str, Any] = {"type": "string"}
        if name in _NAMES:
            schema["pattern"] = NAME_PATTERN
        found.append({"name": name, "in": "path", "required": True, "schema": schema})
    text_schema = {"type": "string"}
    found.extend({"name": q.name, "in": "query", "description": q.what, "schema": q.schema or text_schema} for q in route.query)
    if route.conditional:
        text = "Write only if the record is still at this revision (its ETag)"
        found.append({"name": "If-Match", "in": "header", "description": text, "schema": {"type": "string"}})
    if route.repeatable:
        text = "A repeat under the same key is answered as the first was, and does nothing more"
        found.append(
            {"name": "Idempotency-Key", "in": "header", "description": text, "schema": {"type": "string", "maxLength": 128}}
        )
    return found


def _needs(need: Need) -> str:
    match need:
        case Need.NOTHING:
            return "Needs no token."
        case Need.ANY:
            return "Needs a token of any role."
        case Need.AGENT:
            return "Only for the agent of this node."
        case Need.INGRESS:
            return "Only for this ingress."
        case Need.PEER:
            return "Only for other servers of the cell."
        case Need.PULL:
            return "Needs a token with role read, or an agent's."
        case Need.ADMIN_OF_PROJECT:
            return "Needs a token with role admin."
        case Need.READ | Need.DEPLOY | Need.ADMIN:
            return f"Needs a token with role {need.value}."


def _tag(path: str) -> str:
    parts = [part for part in path.split("/") if part and not part.startswith("{") and part != "v1"]
    return parts[1] if len(parts) > 1 and parts[0] == "projects" else parts[0]


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
