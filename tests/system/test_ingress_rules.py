"""What `[ingress]` and `[[routes]]` ask for, and bad input, on one real Envoy: each is contained, and another app is served on."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from msgspec.structs import replace
from test_ingress import TIMEOUT_S, Answer, Backend, Site, eventually, get, read_answer, request, routing, serves, site_at
from test_ingress import pytestmark as system

from atoll.ingress.bootstrap import ACCESS_LOG, HEADERS_TIMEOUT_S
from atoll.ingress.clusters import Nearness
from atoll.model.records import Endpoint, Routing, Rule
from atoll.model.spec import HeaderEdit, IngressRules, Limits, Outliers, Rate, Route, Sticky
from atoll.model.units import Bytes, Seconds

pytestmark = [*system, pytest.mark.asyncio(loop_scope="module")]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OTHER = "other.localhost"


@pytest.fixture(scope="module")
def slow() -> list[asyncio.Task[Answer]]:
    return []


async def slowly(port: int) -> Answer:
    """Send headers and never their end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET / HTTP/1.1\r\nHost: other.localhost\r\n")
        answer = asyncio.ensure_future(read_answer(reader))
        for n in range(HEADERS_TIMEOUT_S * 4):
            if answer.done() or writer.is_closing():
                break
            writer.write(b"X-%d: x\r\n" % n)
            await asyncio.wait({answer}, timeout=1)
        return await asyncio.wait_for(answer, TIMEOUT_S)
    finally:
        writer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(slow: list[asyncio.Task[Answer]]) -> AsyncIterator[Site]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        async with site_at(Path(directory) / "i") as site, AsyncExitStack() as stack:
            (backend,) = await site.backends(1)
            site.control.put(routing("other", backend))
            await eventually(lambda: serves(site, OTHER))
            # It takes as long as the listener waits; the other tests go on meanwhile.
            slow.extend(asyncio.create_task(slowly(site.port)) for _ in range(20))
            yield site
            for task in slow:
                task.cancel()
            await stack.aclose()


@asynccontextmanager
async def answering(serve: Serve, address: str = "127.0.0.1") -> AsyncIterator[Backend]:
    """A backend that does as `serve` says with each connection."""
    server = await asyncio.start_server(serve, address, 0)
    backend = Backend("odd", address)
    backend.port = server.sockets[0].getsockname()[1]
    try:
        yield backend
    finally:
        server.close()


def with_rules(routing: Routing, rules: IngressRules, *routes: Route) -> Routing:
    return replace(routing, spec=replace(routing.spec, ingress=rules, routes=routes))


async def put(site: Site, routing: Routing) -> str:
    """Put it, and return its hostname once Envoy has it."""
    site.control.put(routing)
    host = routing.hosts[0][0]

    async def known() -> bool:
        answer = await get(site.port, host, "/probe", "X-Probe: 1")
        return answer.status != 404

    await eventually(known)
    return host


def plain(status: int, body: bytes = b"", *headers: str) -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body


async def each(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Callable[[bytes], bytes]) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            writer.write(answer(head))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def test_a_header_chooses_the_port_and_its_absence_the_other(site: Site) -> None:
    async def beta(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await each(reader, writer, lambda head: plain(200, b"beta"))

    async with answering(beta) as other:
        (main,) = await site.backends(1)
        one = routing("choosy", main)
        places = (
            Rule(host="choosy.localhost", path="/", port=other.port, headers={"x-beta": "1"}),
            Rule(host="choosy.localhost", path="/", port=main.port, headers={"x-beta": "1", "x-not": "*"}),
        )
        at = Endpoint(instance="choosy-odd", node="n", address="127.0.0.1")
        host = await put(site, replace(one, rules=places, endpoints=(*one.endpoints, at)))
        # Each port has one instance that listens; where it does not, another is asked.
        assert (await get(site.port, host)).body == b"b2"
        assert (await get(site.port, host, "/", "X-Beta: 1")).body == b"beta"
        assert (await get(site.port, host, "/", "X-Beta: 2")).body == b"b2"
        assert (await get(site.port, host, "/", "X-Beta: 1", "X-Not: whatever")).body == b"b2"


async def test_headers_are_set_and_taken_away_both_ways(site: Site) -> None:
    async def said(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await each(reader, writer, lambda head: plain(200, head, "X-Secret: 1", "X-Kept: 1"))

    async with answering(said) as backend:
        rules = IngressRules(
            request_headers=HeaderEdit(set={"x-env": "100% prod", "x-part": "all"}, remove=("x-debug",)),
            response_headers=HeaderEdit(set={"x-frame-options": "DENY"}, remove=("x-secret",)),
        )
        route = Route(host="edits.localhost", path="/api", request_headers=HeaderEdit(set={"x-part": "api"}))
        one = routing("edits", backend, hosts=(("edits.localhost", "/"), ("edits.localhost", "/api")))
        host = await put(site, with_rules(one, rules, route))
        answer = await get(site.port, host, "/", "X-Debug: 1", "X-Env: mine")
        head = answer.body.decode().lower()
        assert "x-env: 100% prod\r\n" in head
        assert "x-part: all\r\n" in head
        assert "x-debug" not in head
        assert "mine" not in head
        assert (answer.headers["x-frame-options"], answer.headers["x-kept"]) == ("DENY", "1")
        assert "x-secret" not in answer.headers
        assert "x-part: api\r\n" in (await get(site.port, host, "/api/x")).body.decode().lower()


async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await reader.read()
    finally:
        writer.close()


async def test_an_instance_that_never_answers_ends_in_504_with_words_and_other_apps_go_on(site: Site) -> None:
    async with answering(never) as backend:
        rules = IngressRules(timeout=Seconds(0.3), retries=0)
        host = await put(site, with_rules(routing("mute", backend), rules))
        waiting = [asyncio.create_task(get(site.port, host)) for _ in range(50)]
        assert await serves(site, OTHER)
        for answer in await asyncio.gather(*waiting):
            assert answer.status == 504
            assert answer.error["code"] == "deadline-exceeded"
            assert "did not answer in time" in answer.error["message"]


async def test_a_route_has_a_timeout_of_its_own_and_a_try_that_takes_too_long_is_made_elsewhere(site: Site) -> None:
    asked = 0

    async def first_never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"\r\n\r\n")
        asked += 1
        if asked % 2:
            await never(reader, writer)
        else:
            writer.write(plain(200, b"second"))
            writer.close()

    async with answering(first_never) as backend:
        rules = IngressRules(try_timeout=Seconds(1), timeout=Seconds(9))
        route = Route(host="tries.localhost", path="/once", timeout=Seconds(1), retries=0)
        one = routing("tries", backend, hosts=(("tries.localhost", "/"), ("tries.localhost", "/once")))
        host = await put(site, with_rules(one, rules, route))
        asked = 0
        assert (await get(site.port, host)).body == b"second"
        asked = 0
        assert (await get(site.port, host, "/once")).status == 504
        assert asked == 1


async def test_a_route_says_how_often_another_try_is_made(site: Site) -> None:
    asked: Counter[bytes] = Counter()

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked[head.split()[1]] += 1
        if head.split()[1] == b"/probe":
            writer.write(plain(200))
        writer.close()

    async with answering(hang_up) as backend:
        places = tuple(("hangs.localhost", path) for path in ("/", "/once", "/twice"))
        routes = tuple(Route(host="hangs.localhost", path=path, retries=n) for path, n in (("/once", 0), ("/twice", 1)))
        host = await put(site, with_rules(routing("hangs", backend, hosts=places), IngressRules(retries=3), *routes))
        for path in ("/", "/once", "/twice"):
            answer = await get(site.port, host, path)
            assert answer.status == 503
            assert "broke the connection" in answer.error["message"]
        assert (asked[b"/"], asked[b"/once"], asked[b"/twice"]) == (4, 1, 2)


async def test_statuses_that_the_app_names_are_tried_again_and_others_are_not(site: Site) -> None:
    counts: Counter[bytes] = Counter()

    async def flaky(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def answer(head: bytes) -> bytes:
            path = head.split()[1]
            counts[path] += 1
            status = {b"/busy": 503, b"/broken": 500}.get(path, 200)
            return plain(200 if counts[path] > 2 else status, b"x")

        await each(reader, writer, answer)

    async with answering(flaky) as backend:
        host = await put(site, with_rules(routing("flaky", backend), IngressRules(retry_statuses=(503,))))
        assert (await get(site.port, host, "/busy")).status == 200
        assert counts[b"/busy"] == 3
        assert (await get(site.port, host, "/broken")).status == 500
        assert counts[b"/broken"] == 1


async def test_a_cookie_brings_a_client_back_until_its_instance_drains(site: Site) -> None:
    backends = await site.backends(4)
    rules = IngressRules(sticky=Sticky(cookie="where", ttl=Seconds(60)))
    host = await put(site, with_rules(routing("sticky", *backends), rules))
    first = await get(site.port, host)
    cookie = first.headers["set-cookie"]
    assert cookie.startswith("where=")
    assert "Max-Age=60" in cookie
    own = f"Cookie: {cookie.partition(';')[0]}"
    assert {(await get(site.port, host, "/", own)).body for _ in range(20)} == {first.body}
    assert len({(await get(site.port, host)).body for _ in range(40)}) > 1
    there = next(backend for backend in backends if backend.name.encode() == first.body)
    rest = [backend for backend in backends if backend is not there]
    site.control.put(with_rules(routing("sticky", *rest, draining=(there,)), rules))
    await eventually(lambda: f"sticky-{there.name}" in site.control.drained_instances)
    moved = await get(site.port, host, "/", own)
    assert moved.status == 200
    assert moved.body != first.body
    assert "set-cookie" in moved.headers


async def test_what_is_more_than_its_rate_is_answered_429_and_other_apps_are_not(site: Site) -> None:
    one, two = await site.backends(2)
    limited = with_rules(routing("fast", one), IngressRules(rate=Rate(requests=1, burst=5)))
    host = await put(site, limited)
    # All at once: a machine that is slow fills the bucket meanwhile.
    answers = await asyncio.gather(*(get(site.port, host) for _ in range(60)))
    statuses = Counter(answer.status for answer in answers)
    assert statuses[200] >= 1, statuses
    refused = next(answer for answer in answers if answer.status == 429)
    assert statuses[429] == 60 - statuses[200]
    assert refused.headers["retry-after"] == "1"
    assert refused.error["code"] == "too-many-requests"
    assert {(await get(site.port, OTHER)).status for _ in range(30)} == {200}
    # A new hostname makes all routes anew; the limit is there afterwards.
    await put(site, routing("newcomer", two))
    again = Counter(answer.status for answer in await asyncio.gather(*(get(site.port, host) for _ in range(60))))
    assert again[429] >= 1, again


async def test_all_apps_of_a_project_share_its_rate(site: Site) -> None:
    (backend,) = await site.backends(1)
    for name in ("left", "right"):
        made = replace(routing(name, backend), project="shared", project_rate=3)
        await put(site, made)
    hosts = [f"{name}.localhost" for name in ("left", "right")] * 30
    answers = Counter(answer.status for answer in await asyncio.gather(*(get(site.port, host) for host in hosts)))
    assert set(answers) <= {200, 429}, answers
    assert answers[429] >= 1, answers


async def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(site: Site) -> None:
    async def length(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b"content-length: " in head:
            body = await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
        else:
            body = b"?"
        writer.write(plain(200, str(len(body)).encode()))
        writer.close()

    async with answering(length) as backend:
        host = await put(site, with_rules(routing("small", backend), IngressRules(body_max=Bytes(2048))))
        assert (await post(site, host, b"x" * 2048)).body == b"2048"
        refused = await post(site, host, b"x" * 2049)
        assert (refused.status, refused.error["code"]) == (413, "too-large")
        assert (await post(site, host, b"x" * 1000, chunked=True)).body == b"1000"
        assert (await post(site, host, b"x" * 9000, chunked=True)).status == 413
        assert (await get(site.port, host)).status == 200
        for length in (2049, (1 << 63) - 2, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
            async with asyncio.timeout(TIMEOUT_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
                writer.write(f"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\nx".encode())
                assert (await read_answer(reader)).status == 413, length
                writer.close()


async def post(site: Site, host: str, body: bytes, *, chunked: bool = False) -> Answer:
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        try:
            head = f"POST / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
            if chunked:
                parts = [body[at : at + 500] for at in range(0, len(body), 500)]
                data = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
                writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + data)
            else:
                writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            return await read_answer(reader)
        finally:
            writer.close()


async def test_more_than_an_app_s_limits_allow_is_answered_503_with_words(site: Site) -> None:
    (backend,) = await site.backends(1)
    rules = IngressRules(limits=Limits(connections=1, pending=1), retries=0)
    host = await put(site, with_rules(routing("narrow", backend), rules))
    waiting = [asyncio.create_task(get(site.port, host, "/slow")) for _ in range(8)]
    await eventually(lambda: sum(task.done() for task in waiting) >= 5)
    refused = next(task.result() for task in waiting if task.done())
    assert refused.status == 503
    assert "limits" in refused.error["message"]
    assert await serves(site, OTHER)
    backend.release.set()
    assert Counter(answer.status for answer in await asyncio.gather(*waiting))[200] >= 1


async def test_an_instance_that_fails_again_and_again_is_left_out(site: Site) -> None:
    good, bad = await site.backends(2)
    failing = 0

    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def answer(head: bytes) -> bytes:
            nonlocal failing
            failing += 1
            return plain(500, b"no")

        await each(reader, writer, answer)

    await bad.crash()
    server = await asyncio.start_server(fail, bad.address, good.port)
    try:
        rules = IngressRules(outliers=Outliers(failures=3, eject=Seconds(60)))
        host = await put(site, with_rules(routing("half", good, bad), rules))

        async def all_good() -> bool:
            return {(await get(site.port, host)).status for _ in range(20)} == {200}

        await eventually(all_good)
        before = failing
        assert {(await get(site.port, host)).status for _ in range(20)} == {200}
        assert failing == before
    finally:
        server.close()


async def test_a_backend_that_speaks_another_protocol_is_named_so(site: Site) -> None:
    async def ssh(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-OpenSSH_9.2p1\r\n")
        await never(reader, writer)

    async with answering(ssh) as backend:
        host = await put(site, routing("ssh", backend))
        answer = await get(site.port, host)
        assert answer.status == 502
        assert "not HTTP" in answer.error["message"]
    (plain_one,) = await site.backends(1)
    host = await put(site, routing("notgrpc", plain_one, http2=True))
    answer = await get(site.port, host)
    assert answer.status in (502, 503)
    assert answer.error["message"]
    assert await serves(site, OTHER)


async def test_a_bomb_of_headers_is_refused_alone(site: Site) -> None:
    many = await get(site.port, OTHER, "/", *(f"X-{n}: 1" for n in range(500)))
    large = await get(site.port, OTHER, "/", f"X-Large: {'x' * 70_000}")
    assert (many.status, large.status) == (431, 431)
    assert await serves(site, OTHER)


async def test_a_route_that_leads_to_nothing_says_so(site: Site) -> None:
    host = await put(site, routing("nothing", port=9))
    answer = await get(site.port, host)
    assert (answer.status, answer.error["code"]) == (503, "unavailable")


@asynccontextmanager
async def dark(address: str, port: int) -> AsyncIterator[None]:
    """A place whose packets get no answer: a listener that accepts nothing, and whose queue is full."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(0)
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex((address, port))
            fillers.append(filler)
        try:
            yield
        finally:
            for filler in fillers:
                filler.close()


def sited(app: str, *places: tuple[Backend, str]) -> Routing:
    made = routing(app, *(backend for backend, _ in places))
    sites = [site for _, site in places]
    return replace(made, endpoints=tuple(replace(one, site=at) for one, at in zip(made.endpoints, sites, strict=True)))


async def test_requests_go_to_the_nearest_site_and_on_when_it_is_gone_or_dark(site: Site) -> None:
    here, near, far = await site.backends(3)
    site.ingress.table.move(Nearness("local", {"ams": 10.0, "iad": 90.0}))
    host = await put(site, sited("world", (far, "iad"), (near, "ams"), (here, "local")))

    async def bodies() -> set[bytes]:
        return {(await get(site.port, host)).body for _ in range(20)}

    assert await bodies() == {b"b2"}
    await here.crash()
    assert await bodies() == {b"b3"}
    await near.crash()
    async with dark(near.address, near.port):
        assert await bodies() == {b"b4"}
    site.control.put(sited("world", (far, "iad")))
    await eventually(lambda: serves(site, host))
    back = Backend("b2", here.address)
    await back.start(far.port)
    site.control.put(sited("world", (far, "iad"), (back, "local")))

    async def home() -> bool:
        return await bodies() == {b"b2"}

    await eventually(home)
    await back.crash()


async def test_shares_of_releases_are_kept_to_while_the_nearest_site_lacks_one(site: Site) -> None:
    here, far = await site.backends(2)
    made = sited("canary", (here, "local"), (far, "iad"))
    old, new = (replace(one, release=number) for number, one in enumerate(made.endpoints, 1))
    host = await put(site, replace(made, endpoints=(old, new), weights={1: 50, 2: 50}))
    counts = Counter([(await get(site.port, host)).body for _ in range(100)])
    assert min(counts[b"b2"], counts[b"b3"]) >= 20, counts


async def test_the_access_log_names_release_site_and_instance(site: Site) -> None:
    (backend,) = await site.backends(1)
    made = sited("logged", (backend, "ams"))
    host = await put(site, replace(made, endpoints=(replace(made.endpoints[0], release=7),)))
    await get(site.port, host, "/logged")
    path = site.directory / ACCESS_LOG
    await eventually(lambda: "/logged" in path.read_text())
    line = next(json.loads(line) for line in path.read_text().splitlines() if "/logged" in line)
    assert (line["app"], line["release"], line["site"], line["instance"]) == ("default/logged", "7", "ams", "logged-b2")


async def test_headers_that_never_end_are_answered_408_and_cost_nobody_else(site: Site, slow: list[asyncio.Task[Answer]]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(request(OTHER, "/"))
    assert (await read_answer(reader)).status == 200
    writer.close()
    answers = await asyncio.wait_for(asyncio.gather(*slow), HEADERS_TIMEOUT_S * 4 + TIMEOUT_S)
    assert {answer.status for answer in answers} == {408}
    assert await serves(site, OTHER)
