"""The application: every route of the tables, how errors become answers, the description of it all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import structlog
from litestar import Litestar, Request
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send

from atoll.api.http import certificates, fabric, machines, members, operators, users
from atoll.api.http.answers import Answer, Lines, error_answer, record_answer
from atoll.api.http.calls import Call, Route, admit, check_version, internal, pattern
from atoll.api.http.streams import stream_handlers
from atoll.api.service import SYSTEM, Caller, Need, Service
from atoll.model.errors import AtollError, Invalid, NotFound, TooLarge, Unavailable

ROUTES: tuple[Route, ...] = (
    *operators.ROUTES,
    *users.ROUTES,
    *machines.ROUTES,
    *fabric.ROUTES,
    *members.ROUTES,
    *certificates.ROUTES,
)
OPENAPI_PATH = "/schema/openapi.json"

CLOSE = ((b"connection", b"close"),)
BODY_SILENT_S = 30.0
"""How long nothing may come of a body that is still to come; one that comes slowly is waited for."""

log = structlog.get_logger()


def create_app(service: Service, *, mounts: Sequence[Any] = ()) -> Litestar:
    """Return the ASGI application over `service`; `mounts` are further handlers, such as the registry's."""
    handlers = [_handler(service, route) for route in ROUTES]
    return Litestar(
        route_handlers=[*handlers, _describe(), *stream_handlers(service), *mounts],
        openapi_config=None,
        logging_config=None,
        exception_handlers={AtollError: _on_error, HTTPException: _on_http_error, Exception: _on_fault},
    )


def _handler(service: Service, route: Route) -> HTTPRouteHandler:
    """Return a handler without any injection: the framework finds the route, everything else is ours."""
    reads_body = route.method not in ("GET", "HEAD")
    open_to_all = route.need is Need.NOTHING

    async def handle(request: Request[Any, Any, Any]) -> ASGIApp:
        unread = reads_body
        try:
            if open_to_all:
                check_version(service, request)
                caller, path = SYSTEM, dict(request.path_params)
            else:
                caller, path = admit(service, request, route.need)
            body = await _body(request, route.body_bytes_max) if reads_body else b""
            unread = False
            call = Call(service, request, caller, path, body)
            sure = not reads_body and not open_to_all
            result = await (service.context.look(lambda: route.run(call)) if sure else route.run(call))
            if isinstance(result, Lines):
                result = _While(service, caller, result)
        except AtollError as error:
            if error.status >= 500:
                log.warning("a call failed", method=route.method, path=request.scope["path"], code=error.code, cause=error.message)
            return error_answer(error, headers=CLOSE if unread and _more_to_come(request) else ())
        if result is None:
            return Answer(b"", 204, ())
        return result if callable(result) else record_answer(result, route.status)

    path = pattern(route.path)
    return HTTPRouteHandler(path, http_method=route.method, status_code=route.status, request_max_body_size=None)(handle)  # type: ignore[arg-type]


def _more_to_come(request: Request[Any, Any, Any]) -> bool:
    """Whether so much of a refused body may still come that it is better to hang up than to read it."""
    stated = request.headers.get("content-length")
    return "transfer-encoding" in request.headers or (stated is not None and len(stated) > 4)


async def _body(request: Request[Any, Any, Any], bytes_max: int) -> bytes:
    """Read the body within its bound. Raises TooLarge, Invalid (the client went away), Unavailable (it sends nothing)."""
    stated = request.headers.get("content-length")
    if stated is not None and stated.isdecimal() and int(stated[:18]) > bytes_max:
        raise TooLarge(f"the body has {stated[:18]} bytes; at most {bytes_max} are taken")
    parts: list[bytes] = []
    size = 0
    receive = request.receive
    while True:
        try:
            async with asyncio.timeout(BODY_SILENT_S):
                message: Any = await receive()
        except TimeoutError:
            raise Unavailable(f"nothing came of the body for {BODY_SILENT_S:g} s") from None
        if message["type"] != "http.request":
            raise Invalid("the body ended too early")
        part = message.get("body", b"")
        size += len(part)
        if size > bytes_max:
            raise TooLarge(f"the body has over {bytes_max} bytes")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts) if len(parts) > 1 else part


def _describe() -> HTTPRouteHandler:
    kept: list[bytes] = []

    async def handle(request: Request[Any, Any, Any]) -> ASGIApp:
        if not kept:
            from atoll.api.http.openapi import describe  # it is asked for rarely, and made once

            kept.append(describe(ROUTES))
        return Answer(kept[0])

    return HTTPRouteHandler(OPENAPI_PATH, http_method="GET")(handle)


def _on_error(request: Any, error: AtollError) -> Any:
    return _Raised(error_answer(error))


def _on_http_error(request: Any, error: HTTPException) -> Any:
    """What the framework itself refuses: paths and methods that are not there."""
    headers = [(name.encode(), value.encode()) for name, value in (error.headers or {}).items()]
    if error.status_code == 404:
        return _Raised(error_answer(NotFound(f"no such path: {request.scope['path'][:200]}", mend=f"see {OPENAPI_PATH}")))
    if error.status_code == 405:
        refused = Invalid(f"{request.scope['method']} is not offered here", mend=f"see {OPENAPI_PATH}")
        return _Raised(error_answer(refused, 405, headers))
    return _Raised(error_answer(Invalid(str(error.detail)), error.status_code))


def _on_fault(request: Any, error: Exception) -> Any:
    log.error("a fault in the server", path=request.scope["path"], exc_info=error)
    return _Raised(error_answer(internal(error)))


class _While:
    """A stream that lasts while its caller may have it."""

    def __init__(self, service: Service, caller: Caller, lines: Lines) -> None:
        self._service = service
        self._caller = caller
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._service.standing.watched(self._caller) as ended:
            self._lines.ended = ended
            await self._lines(scope, receive, send)


class _Raised:
    """An answer in the form that the framework wants of its exception handlers."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIApp:
        return self._answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)
