"""The puller against a registry that truncates, lies, hangs, redirects and refuses."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from atoll.images.manifest import OCI_CONFIG, OCI_MANIFEST, machine_architecture
from atoll.images.reference import CELL_HOST
from atoll.images.registry import Registries
from atoll.images.store import ImageStore
from atoll.images.transport import Access, Patience
from atoll.model.errors import AtollError, DeadlineExceeded, Exhausted, ImageError, Unavailable
from atoll.model.ports.images import PullProgress

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="unpacking layers needs root")

PATIENCE = Patience(connect_s=1, stall_s=0.3, tries=3, backoff_s=0.01)
Handler = Callable[["Request", asyncio.StreamWriter], Awaitable[bool]]
"""Answers the request and returns true, or returns false to let the honest answer be given."""


class Request:
    def __init__(self, method: str, path: str, headers: dict[str, str]) -> None:
        self.method, self.path, self.headers = method, path, headers


class FakeRegistry:
    """One image `app:1` of two layers, served honestly unless a handler steps in."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.handlers: list[Handler] = []
        layers, diff_ids = [], []
        for name, size in (("one", 3_000_000), ("two", 10)):
            plain = layer_tar(name, os.urandom(size))
            diff_ids.append(digest_of(plain))
            layers.append(self.put(gzip.compress(plain, 1), "application/vnd.oci.image.layer.v1.tar+gzip"))
        config = {"architecture": machine_architecture(), "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        config["config"] = {"Cmd": ["/app"], "Entrypoint": None}
        self.manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self.put(json.dumps(config).encode(), OCI_CONFIG),
            "layers": layers,
        }
        self.big = layers[0]["digest"]

    def put(self, data: bytes, media_type: str) -> dict[str, object]:
        self.blobs[digest_of(data)] = data
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> FakeRegistry:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                method, path, _ = line.decode().split(" ", 2)
                headers = {}
                while (line := await reader.readline()) not in (b"\r\n", b""):
                    key, _, value = line.decode().partition(":")
                    headers[key.lower()] = value.strip()
                request = Request(method, path, headers)
                self.requests.append(request)
                for handler in list(self.handlers):
                    if await handler(request, writer):
                        break
                else:
                    self._answer(request, writer)
                await writer.drain()
                if writer.is_closing():
                    return
        writer.close()

    def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        name = request.path.rpartition("/")[2]
        if "/manifests/" in request.path:
            if request.path != "/v2/app/manifests/1":
                respond(writer, 404)
            else:
                respond(writer, 200, json.dumps(self.manifest).encode(), {"Content-Type": OCI_MANIFEST})
            return
        data = self.blobs.get(name)
        if data is None:
            respond(writer, 404)
            return
        ranged = request.headers.get("range", "").removeprefix("bytes=").removesuffix("-")
        if ranged:
            start = int(ranged)
            respond(writer, 206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})
        else:
            respond(writer, 200, data)

    def asked_for(self, digest: str) -> list[Request]:
        return [request for request in self.requests if request.path.endswith(digest)]


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def layer_tar(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def respond(writer: asyncio.StreamWriter, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
    head = {"Content-Length": str(len(body)), **(headers or {})}
    writer.write(f"HTTP/1.1 {status} X\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in head.items()) + b"\r\n" + body)


def on(part: str, handler: Handler, *, times: int = 1000) -> Handler:
    """Let `handler` answer the next `times` requests whose path contains `part`."""
    left = times

    async def handle(request: Request, writer: asyncio.StreamWriter) -> bool:
        nonlocal left
        if part not in request.path or left == 0:
            return False
        left -= 1
        return await handler(request, writer)

    return handle


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as registry:
        yield registry


@contextlib.asynccontextmanager
async def storing(
    tmp_path: Path, registry: FakeRegistry, access: Access | None = None, **options: float
) -> AsyncIterator[ImageStore]:
    registries = Registries({registry.host: access or Access()}, patience=PATIENCE)
    store = ImageStore(tmp_path / "images", registries, **options)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        await store.close()
        await registries.aclose()


def left_behind(tmp_path: Path) -> list[str]:
    """What the store holds beside records, whole layers, and blobs that a repeat may use."""
    return [str(path) for part in ("making", "trash") for path in (tmp_path / "images" / part).iterdir()]


async def pull_fails(tmp_path: Path, registry: FakeRegistry, kind: type[AtollError], match: str | None) -> None:
    async with storing(tmp_path, registry) as store:
        with pytest.raises(kind, match=match):
            await store.ensure(f"{registry.host}/app:1")
        assert await store.find(f"{registry.host}/app:1") is None
        assert left_behind(tmp_path) == []
        registry.handlers.clear()
        assert (await store.ensure(f"{registry.host}/app:1")).config.command == ("/app",)


async def test_a_cut_pull_resumes_where_it_stopped(tmp_path: Path, registry: FakeRegistry) -> None:
    data = registry.blobs[registry.big]

    async def cut(request: Request, writer: asyncio.StreamWriter) -> bool:
        start = int(request.headers.get("range", "bytes=0-")[6:-1])
        headers = {"Content-Length": str(len(data) - start), "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        respond(writer, 206 if start else 200, data[start : start + 700_000], headers)
        await writer.drain()
        writer.close()
        return True

    registry.handlers.append(on(registry.big, cut))
    async with storing(tmp_path, registry) as store:
        image = await store.ensure(f"{registry.host}/app:1")
    assert (image.layers[0] / "one").stat().st_size == 3_000_000
    starts = [int(request.headers.get("range", "bytes=0-")[6:-1]) for request in registry.asked_for(registry.big)]
    assert starts == sorted(starts)
    assert len(set(starts)) == len(starts) >= 4


async def test_a_pull_resumes_after_the_process_has_died(tmp_path: Path, registry: FakeRegistry) -> None:
    data = registry.blobs[registry.big]

    async def hang(request: Request, writer: asyncio.StreamWriter) -> bool:
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data[:1_500_000])
        await writer.drain()
        await asyncio.sleep(30)
        return True

    registry.handlers.append(on(registry.big, hang))
    partial = tmp_path / "images/partial" / registry.big.removeprefix("sha256:")
    async with storing(tmp_path, registry) as store:
        task = asyncio.create_task(store.ensure(f"{registry.host}/app:1"))
        async with asyncio.timeout(30):
            while not partial.exists() or partial.stat().st_size < 1 << 20:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    kept = partial.stat().st_size
    assert kept >= 1 << 20
    registry.handlers.clear()
    async with storing(tmp_path, registry) as store:
        await store.ensure(f"{registry.host}/app:1")
    assert registry.asked_for(registry.big)[-1].headers["range"] == f"bytes={kept}-"


async def test_a_damaged_beginning_is_fetched_anew(tmp_path: Path, registry: FakeRegistry) -> None:
    async with storing(tmp_path, registry) as store:
        (tmp_path / "images/partial" / registry.big.removeprefix("sha256:")).write_bytes(b"\0" * 1000)
        assert await store.ensure(f"{registry.host}/app:1")


async def test_a_registry_without_ranges_is_read_from_the_start(tmp_path: Path, registry: FakeRegistry) -> None:
    data = registry.blobs[registry.big]

    async def whole(request: Request, writer: asyncio.StreamWriter) -> bool:
        respond(writer, 200, data)
        return True

    registry.handlers.append(on(registry.big, whole))
    async with storing(tmp_path, registry) as store:
        (tmp_path / "images/partial" / registry.big.removeprefix("sha256:")).write_bytes(data[:5000])
        assert await store.ensure(f"{registry.host}/app:1")


async def test_a_wrong_digest_is_refused(tmp_path: Path, registry: FakeRegistry) -> None:
    data = bytearray(registry.blobs[registry.big])
    data[1000] ^= 1

    async def lie(request: Request, writer: asyncio.StreamWriter) -> bool:
        respond(writer, 200, bytes(data))
        return True

    registry.handlers.append(on(registry.big, lie))
    await pull_fails(tmp_path, registry, ImageError, "damaged: its digest is")


async def test_a_pinned_manifest_with_another_digest_is_refused(tmp_path: Path, registry: FakeRegistry) -> None:
    async def other(request: Request, writer: asyncio.StreamWriter) -> bool:
        respond(writer, 200, json.dumps(registry.manifest).encode(), {"Content-Type": OCI_MANIFEST})
        return True

    registry.handlers.append(on("/manifests/", other))
    async with storing(tmp_path, registry) as store:
        with pytest.raises(ImageError, match="manifest has digest"):
            await store.ensure(f"{registry.host}/app@sha256:{'0' * 64}")


@pytest.mark.parametrize("claimed", [10, 2_000_000_000])
async def test_a_lying_content_length_is_no_image(tmp_path: Path, registry: FakeRegistry, claimed: int) -> None:
    data = registry.blobs[registry.big][:50_000]

    async def lie(request: Request, writer: asyncio.StreamWriter) -> bool:
        respond(writer, 200, data, {"Content-Length": str(claimed)})
        await writer.drain()
        writer.close()
        return True

    registry.handlers.append(on(registry.big, lie))
    await pull_fails(tmp_path, registry, Unavailable, "does not answer|ends sha256")


async def test_an_endless_body_is_cut_off(tmp_path: Path, registry: FakeRegistry) -> None:
    sent = 0

    async def endless(request: Request, writer: asyncio.StreamWriter) -> bool:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while sent < 200 << 20:
                writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
                await writer.drain()
                sent += 0x10000
        return True

    registry.handlers.append(on("/blobs/", endless))
    await pull_fails(tmp_path, registry, ImageError, "damaged: more than")
    registry.handlers.append(on("/manifests/", endless))
    sent = 0
    async with storing(tmp_path / "x", registry) as store:
        with pytest.raises(ImageError, match="more than"):
            await store.ensure(f"{registry.host}/app:1")
    assert sent < 50 << 20


@pytest.mark.parametrize("part", ["/manifests/", "/blobs/"])
async def test_a_registry_that_hangs_is_a_missed_deadline(tmp_path: Path, registry: FakeRegistry, part: str) -> None:
    async def hang(request: Request, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(30)
        return True

    registry.handlers.append(on(part, hang))
    await pull_fails(tmp_path, registry, DeadlineExceeded, "hangs")


async def test_a_registry_that_drips_is_a_missed_deadline(tmp_path: Path, registry: FakeRegistry) -> None:
    async def drip(request: Request, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)
        return True

    registry.handlers.append(on(registry.big, drip))
    async with storing(tmp_path, registry, pull_deadline_s=0.6) as store:
        with pytest.raises(DeadlineExceeded, match="took more than"):
            await store.ensure(f"{registry.host}/app:1")
        assert left_behind(tmp_path) == []


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_busy_registry_is_asked_again(tmp_path: Path, registry: FakeRegistry, status: int) -> None:
    async def busy(request: Request, writer: asyncio.StreamWriter) -> bool:
        respond(writer, status, headers={"Retry-After": "0"})
        return True

    registry.handlers += [on("/manifests/", busy, times=2), on(registry.big, busy, times=2)]
    async with storing(tmp_path, registry) as store:
        assert await store.ensure(f"{registry.host}/app:1")
        registry.handlers[:] = [on("/manifests/", busy)]
        with pytest.raises(Unavailable, match=str(status)):
            await store.ensure(f"{registry.host}/app:2")


async def test_tokens_are_fetched_as_the_registry_asks(tmp_path: Path, registry: FakeRegistry) -> None:
    async def guard(request: Request, writer: asyncio.StreamWriter) -> bool:
        if request.path.startswith("/token"):
            good = request.headers.get("authorization") == "Basic " + base64.b64encode(b"coral:reef").decode()
            assert "scope=repository%3Aapp%3Apull" in request.path
            respond(writer, 200 if good else 401, b'{"token": "abc", "expires_in": 300}')
            return True
        if request.headers.get("authorization") == "Bearer abc":
            return False
        challenge = f'Bearer realm="http://{registry.host}/token",service="reg",scope="repository:app:pull"'
        respond(writer, 401, headers={"WWW-Authenticate": challenge})
        return True

    registry.handlers.append(guard)
    async with storing(tmp_path, registry, Access(username="coral", password="reef")) as store:
        assert await store.ensure(f"{registry.host}/app:1")
    assert sum(request.path.startswith("/token") for request in registry.requests) == 1
    async with storing(tmp_path / "no", registry, Access(username="coral", password="wrong")) as store:
        with pytest.raises(ImageError, match="refuses") as caught:
            await store.ensure(f"{registry.host}/app:1")
    assert caught.value.mend
    assert "wrong" not in str(caught.value)


async def test_the_cells_own_registry_is_reached_at_its_address_with_the_nodes_token(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    access = {CELL_HOST: Access(url=f"http://{registry.host}/", token="node-token")}
    registries = Registries(access, patience=PATIENCE)
    store = ImageStore(tmp_path / "images", registries)
    assert (await store.ensure(f"{CELL_HOST}/app:1")).reference == "cell.internal/app:1"
    assert {request.headers.get("authorization") for request in registry.requests} == {"Bearer node-token"}
    assert "node-token" not in repr(access)
    await registries.aclose()


async def test_nothing_is_collected_that_a_pull_relies_on(tmp_path: Path, registry: FakeRegistry) -> None:
    now = 100.0
    async with storing(tmp_path, registry, hold_s=30, monotonic=lambda: now) as store:
        task = asyncio.create_task(store.ensure(f"{registry.host}/app:1"))
        while not task.done():
            await store.collect([])
            await asyncio.sleep(0)
        image = await task
        assert await store.collect([]) == 0
        assert all(layer.is_dir() for layer in image.layers)
        now += 31
        assert await store.collect([]) > 0
        assert not any(layer.exists() for layer in image.layers)


async def test_credentials_do_not_follow_a_redirect_to_another_host(tmp_path: Path, registry: FakeRegistry) -> None:
    async with FakeRegistry() as other:
        other.blobs = registry.blobs

        async def redirect(request: Request, writer: asyncio.StreamWriter) -> bool:
            respond(writer, 307, headers={"Location": f"http://{other.host}{request.path}"})
            return True

        registry.handlers.append(on("/blobs/", redirect))
        async with storing(tmp_path, registry, Access(token="secret")) as store:
            assert await store.ensure(f"{registry.host}/app:1")
    assert {request.headers.get("authorization") for request in registry.requests} == {"Bearer secret"}
    assert {request.headers.get("authorization") for request in other.requests} == {None}


async def test_a_ring_of_redirects_ends(tmp_path: Path, registry: FakeRegistry) -> None:
    async def redirect(request: Request, writer: asyncio.StreamWriter) -> bool:
        respond(writer, 302, headers={"Location": request.path})
        return True

    registry.handlers.append(on("/manifests/", redirect))
    await pull_fails(tmp_path, registry, ImageError, "redirects more than")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"schemaVersion": 1}',
        b'{"schemaVersion": 2, "manifests": [], "mediaType": "x"}',
        b'{"schemaVersion": 2, "config": {"mediaType": "x", "digest": "../../etc/passwd", "size": 1}, "layers": []}',
        b'{"schemaVersion": 2, "config": {"mediaType": "x", "digest": "sha256:%s", "size": -1}, "layers": []}' % (b"0" * 64),
        b'{"schemaVersion": 2, "config": {"mediaType": "x", "digest": "sha256:%s", "size": 99999999999}, "layers": []}'
        % (b"0" * 64),
        b"[" * 100_000,
    ],
)
async def test_a_senseless_manifest_is_one_clear_error(tmp_path: Path, registry: FakeRegistry, body: bytes) -> None:
    async def senseless(request: Request, writer: asyncio.StreamWriter) -> bool:
        respond(writer, 200, body)
        return True

    registry.handlers.append(on("/manifests/", senseless))
    await pull_fails(tmp_path, registry, ImageError, None)


async def test_concurrent_callers_share_one_pull_and_one_may_leave(tmp_path: Path, registry: FakeRegistry) -> None:
    seen: list[PullProgress] = []
    async with storing(tmp_path, registry) as store:
        name = f"{registry.host}/app:1"
        first = asyncio.create_task(store.ensure(name))
        others = [asyncio.create_task(store.ensure(name, progress=seen.append)) for _ in range(5)]
        await asyncio.sleep(0.005)
        first.cancel()
        images = await asyncio.gather(*others)
    assert len({image.digest for image in images}) == 1
    assert len(registry.asked_for(registry.big)) == 1
    assert seen


async def test_a_full_disk_is_one_clear_error(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.manifest["layers"][0]["size"] = 40 << 30  # type: ignore[index]
    async with storing(tmp_path, registry) as store:
        with pytest.raises(Exhausted, match="free") as caught:
            await store.ensure(f"{registry.host}/app:1")
        assert caught.value.mend
    assert left_behind(tmp_path) == []


async def test_half_made_things_are_removed_on_start(tmp_path: Path, registry: FakeRegistry) -> None:
    async with storing(tmp_path, registry) as store:
        image = await store.ensure(f"{registry.host}/app:1")
    images = tmp_path / "images"
    (images / "making/tmp1/it/sub").mkdir(parents=True)
    (images / "trash/x").mkdir()
    (images / "layers" / ("f" * 64)).mkdir()
    (images / "records/broken.json").write_bytes(b"{")
    async with storing(tmp_path, registry) as store:
        assert await store.find(f"{registry.host}/app:1") == image
        assert left_behind(tmp_path) == []
        assert len(list((images / "layers").iterdir())) == 2
        assert len(list((images / "records").iterdir())) == 1


async def test_an_image_whose_layer_has_vanished_is_pulled_again(tmp_path: Path, registry: FakeRegistry) -> None:
    async with storing(tmp_path, registry) as store:
        image = await store.ensure(f"{registry.host}/app:1")
    image.layers[1].rename(tmp_path / "gone")
    async with storing(tmp_path, registry) as store:
        assert await store.find(f"{registry.host}/app:1") is None
        assert await store.ensure(f"{registry.host}/app:1") == image
        assert image.layers[1].is_dir()
