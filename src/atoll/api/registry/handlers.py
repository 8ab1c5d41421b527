"""`/v2/`: the OCI distribution specification 1.1 over HTTP, with Atoll's tokens as passwords."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog
from litestar.handlers import ASGIRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send

from atoll.api.http.answers import JSON, Answer, Header
from atoll.api.http.calls import identify, internal, parse_query
from atoll.api.registry.blobs import BLOB_BYTES_MAX, Upload
from atoll.api.registry.exchange import Asked, BlobAnswer
from atoll.api.registry.names import RegistryError, check_digest, check_tag, is_digest, manifest_unknown
from atoll.api.registry.registry import Registry
from atoll.api.registry.repositories import MANIFEST_BYTES_MAX
from atoll.api.service import Need, Service
from atoll.model.errors import AtollError, Forbidden, Invalid, TooLarge, Unauthenticated

TAGS_MAX = 1_000
_VERSION = (b"docker-distribution-api-version", b"registry/2.0")
_CHALLENGE = (b"www-authenticate", b'Basic realm="atoll"')
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{0,15})")
_CONTENT_RANGE = re.compile(r"(?:bytes )?(\d{1,15})-(\d{1,15})(?:/\S*)?")
_CODES = {Unauthenticated: "UNAUTHORIZED", Forbidden: "DENIED", TooLarge: "SIZE_INVALID", Invalid: "UNSUPPORTED"}

log = structlog.get_logger()


class Handlers:
    """What each path of the registry does."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        pull, push = Need.PULL, Need.DEPLOY
        self.routes: list[tuple[re.Pattern[str], dict[str, tuple[Need, Callable[[Asked], Awaitable[ASGIApp]]]]]] = [
            (re.compile(r"/blobs/uploads/?"), {"POST": (push, self.begin)}),
            (
                re.compile(r"/blobs/uploads/([^/]+)"),
                {
                    "GET": (push, self.progress),
                    "PATCH": (push, self.receive),
                    "PUT": (push, self.finish),
                    "DELETE": (push, self.cancel),
                },
            ),
            (
                re.compile(r"/blobs/([^/]+)"),
                {"GET": (pull, self.get_blob), "HEAD": (pull, self.get_blob), "DELETE": (push, self.delete_blob)},
            ),
            (
                re.compile(r"/manifests/([^/]+)"),
                {
                    "GET": (pull, self.get_manifest),
                    "HEAD": (pull, self.get_manifest),
                    "PUT": (push, self.put_manifest),
                    "DELETE": (push, self.delete_manifest),
                },
            ),
            (re.compile(r"/tags/list"), {"GET": (pull, self.list_tags)}),
        ]

    async def begin(self, asked: Asked) -> ASGIApp:
        """Begin an upload; with `mount` take the blob from another repository, with `digest` take all of it at once."""
        mount, source, digest = asked.query.get("mount"), asked.query.get("from"), asked.query.get("digest")
        if mount is not None:
            check_digest(mount)
            if source and await self._registry.mount(asked.caller, source, asked.repository, mount):
                return self._made("blobs", asked.repository, mount)
        if digest is not None:
            check_digest(digest)
        upload = await self._registry.blobs.begin(asked.repository)
        if digest is None:
            return _accepted(asked.repository, upload)
        await self._registry.blobs.receive(upload, asked.chunks())
        return await self._finish(asked.repository, upload, digest)

    async def progress(self, asked: Asked) -> ASGIApp:
        upload = await self._registry.blobs.find(asked.rest[0], asked.repository)
        return _accepted(asked.repository, upload, 204)

    async def receive(self, asked: Asked) -> ASGIApp:
        """Take the next part. Raises RegistryError 416 for one that does not follow what is here."""
        upload = await self._registry.blobs.find(asked.rest[0], asked.repository)
        if not _follows(asked, upload):
            return _elsewhere(asked, upload)
        await self._registry.blobs.receive(upload, asked.chunks())
        return _accepted(asked.repository, upload)

    async def finish(self, asked: Asked) -> ASGIApp:
        upload = await self._registry.blobs.find(asked.rest[0], asked.repository)
        digest = check_digest(asked.query.get("digest", ""))
        if not _follows(asked, upload):
            return _elsewhere(asked, upload)
        await self._registry.blobs.receive(upload, asked.chunks())
        return await self._finish(asked.repository, upload, digest)

    async def _finish(self, repository: str, upload: Upload, digest: str) -> ASGIApp:
        await self._registry.blobs.finish(upload, digest)
        await asyncio.to_thread(self._registry.repositories.link_blob, repository, digest)
        return self._made("blobs", repository, digest)

    async def cancel(self, asked: Asked) -> ASGIApp:
        await self._registry.blobs.abort(await self._registry.blobs.find(asked.rest[0], asked.repository))
        return Answer(b"", 204, (_VERSION,))

    async def get_blob(self, asked: Asked) -> ASGIApp:
        digest = check_digest(asked.rest[0])
        size = self._registry.check_blob(asked.repository, digest)
        headers: list[Header] = [
            _VERSION,
            (b"content-type", b"application/octet-stream"),
            (b"docker-content-digest", digest.encode()),
            (b"accept-ranges", b"bytes"),
            (b"etag", b'"%s"' % digest.encode()),
        ]
        wanted = _RANGE.fullmatch(asked.header(b"range"))
        if wanted is None:
            return BlobAnswer(self._registry, digest, 0, size, 200, headers)
        start = int(wanted[1])
        end = min(int(wanted[2]) if wanted[2] else size - 1, size - 1)
        if start > end:
            return Answer(b"", 416, (_VERSION, (b"content-range", b"bytes */%d" % size)))
        headers.append((b"content-range", b"bytes %d-%d/%d" % (start, end, size)))
        return BlobAnswer(self._registry, digest, start, end - start + 1, 206, headers)

    async def delete_blob(self, asked: Asked) -> ASGIApp:
        digest = check_digest(asked.rest[0])
        self._registry.check_blob(asked.repository, digest)
        await asyncio.to_thread(self._registry.repositories.remove_blob, asked.repository, digest)
        return Answer(b"", 202, (_VERSION,))

    async def get_manifest(self, asked: Asked) -> ASGIApp:
        reference = _reference(asked.rest[0])
        digest, media_type, size = self._registry.find_manifest(asked.repository, reference)
        headers: list[Header] = [
            _VERSION,
            (b"content-type", media_type.encode()),
            (b"docker-content-digest", digest.encode()),
            (b"etag", b'"%s"' % digest.encode()),
        ]
        return BlobAnswer(self._registry, digest, 0, size, 200, headers)

    async def put_manifest(self, asked: Asked) -> ASGIApp:
        reference = _reference(asked.rest[0])
        data = await asked.body(MANIFEST_BYTES_MAX)
        content_type = asked.header(b"content-type")
        digest = await self._registry.put_manifest(asked.repository, reference, data, content_type)
        return self._made("manifests", asked.repository, digest)

    async def delete_manifest(self, asked: Asked) -> ASGIApp:
        reference = _reference(asked.rest[0])
        repositories = self._registry.repositories
        remove = repositories.remove_manifest if is_digest(reference) else repositories.remove_tag
        if not await asyncio.to_thread(remove, asked.repository, reference):
            raise manifest_unknown(reference)
        return Answer(b"", 202, (_VERSION,))

    async def list_tags(self, asked: Asked) -> ASGIApp:
        tags = await asyncio.to_thread(self._registry.repositories.tags, asked.repository)
        if tags is None:
            raise RegistryError("NAME_UNKNOWN", 404, f"no repository {asked.repository}")
        last = asked.query.get("last", "")
        text = asked.query.get("n", "")
        count = min(int(text), TAGS_MAX) if text.isascii() and text.isdecimal() and len(text) < 9 else TAGS_MAX
        rest = [tag for tag in tags if tag > last]
        some = rest[:count]
        headers: list[Header] = [_VERSION, JSON]
        if len(rest) > count > 0:
            headers.append((b"link", f'</v2/{asked.repository}/tags/list?n={count}&last={some[-1]}>; rel="next"'.encode()))
        return Answer(msgspec.json.encode({"name": asked.repository, "tags": some}), 200, headers)

    def _made(self, kind: str, repository: str, digest: str) -> ASGIApp:
        location = f"/v2/{repository}/{kind}/{digest}".encode()
        return Answer(b"", 201, (_VERSION, (b"location", location), (b"docker-content-digest", digest.encode())))


def registry_handler(registry: Registry, service: Service) -> ASGIRouteHandler:
    """Return what serves everything under `/v2`; give it to `create_app` as one of its `mounts`."""
    handlers = Handlers(registry)

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await _answer(registry, service, handlers, scope, receive)
        except AtollError as error:
            answer = _refusal(error)
        except Exception as error:
            log.exception("a fault in the registry", path=scope.get("raw_path"))
            answer = _refusal(internal(error))
        await answer(scope, receive, send)

    return ASGIRouteHandler("/v2", is_mount=True, copy_scope=True)(handle)


async def _answer(registry: Registry, service: Service, handlers: Handlers, scope: Any, receive: Receive) -> ASGIApp:
    caller = identify(service, scope, lambda: _password(scope))
    path = "/" + str(scope["path"]).removeprefix("/v2").strip("/")
    if path == "/":
        return Answer(b"{}", 200, (_VERSION, JSON))
    parts = path.split("/", 3)
    if len(parts) < 4:
        raise RegistryError("NAME_INVALID", 404, f"no such path: {path[:200]}; a repository is PROJECT/NAME")
    repository, rest = f"{parts[1]}/{parts[2]}", f"/{parts[3]}"
    for pattern, methods in handlers.routes:
        match = pattern.fullmatch(rest)
        if match is None:
            continue
        if scope["method"] not in methods:
            raise RegistryError("UNSUPPORTED", 405, f"{scope['method']} is not offered here")
        need, run = methods[scope["method"]]
        registry.admit(caller, repository, need)
        stated = next((value for key, value in scope["headers"] if key == b"content-length"), b"0")
        if stated.isdigit() and int(stated[:18]) > BLOB_BYTES_MAX:
            raise TooLarge(f"a blob has at most {BLOB_BYTES_MAX} bytes")
        return await run(Asked(scope, receive, caller, repository, match.groups(), parse_query(scope["query_string"])))
    raise RegistryError("NAME_UNKNOWN", 404, f"no such path: {path[:200]}")


def _password(scope: Any) -> str:
    """Return the token: the password of Basic, whoever the user, or what follows Bearer. Raises Unauthenticated."""
    header = next((value.decode("latin-1") for key, value in scope["headers"] if key == b"authorization"), "")
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        raise Unauthenticated("no token", mend="log in with any user name and an Atoll token as the password")
    try:
        return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        raise Unauthenticated("the Authorization header is not valid") from None


def _reference(text: str) -> str:
    return check_digest(text) if is_digest(text) else check_tag(text)


def _follows(asked: Asked, upload: Upload) -> bool:
    """Whether the part that comes begins where the upload ends; a part that does not say is taken to."""
    stated = asked.header(b"content-range")
    match = _CONTENT_RANGE.fullmatch(stated)
    return not stated or (match is not None and int(match[1]) == upload.size_bytes)


def _elsewhere(asked: Asked, upload: Upload) -> Answer:
    """Say where to go on."""
    return Answer(b"", 416, (_VERSION, (b"range", _range(upload)), (b"location", _location(asked.repository, upload))))


def _accepted(repository: str, upload: Upload, status: int = 202) -> Answer:
    headers = (
        _VERSION,
        (b"location", _location(repository, upload)),
        (b"range", _range(upload)),
        (b"docker-upload-uuid", upload.id.encode()),
        (b"oci-chunk-min-length", b"0"),
    )
    return Answer(b"", status, headers)


def _location(repository: str, upload: Upload) -> bytes:
    return f"/v2/{repository}/blobs/uploads/{upload.id}".encode()


def _range(upload: Upload) -> bytes:
    return b"0-%d" % max(0, upload.size_bytes - 1)


def _refusal(error: AtollError) -> Answer:
    code = error.oci_code if isinstance(error, RegistryError) else _CODES.get(type(error), "UNKNOWN")
    text = error.message + (f"; {error.mend}" if error.mend else "")
    body = msgspec.json.encode({"errors": [{"code": code, "message": text}]})
    headers = [_VERSION, JSON, *([_CHALLENGE] if isinstance(error, Unauthenticated) else [])]
    if isinstance(error, TooLarge):
        headers.append((b"connection", b"close"))
    return Answer(body, error.status, headers)
