"""The HTTP client against a real socket whose server does what servers do on bad days."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from control_cell import run_virtual

from atoll.model import codec
from atoll.model.errors import Conflict, Invalid, NotFound, OutcomeUnknown, Unauthenticated, Unavailable
from atoll.model.ports.control_plane import AssignmentBatch, RoutingBatch
from atoll.model.records import Assignment, Heartbeat, IngressHeartbeat, Instance, OwnerKind, Status
from atoll.model.spec import Allow, AppSpec, JobSpec, NetworkRules, Port
from atoll.model.states import Desired, Phase
from atoll.model.traffic import TrafficReport
from atoll.sdk.control_plane import SLOW_S, HttpControlPlane
from atoll.sdk.failover import Failover
from atoll.sdk.http import HttpTransport
from atoll.sdk.transport import Address, Answer, Unreachable, path

Handler = Callable[[str, bytes, asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes = b"{}", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Server:
    """Reads requests from each connection and lets `handler` write whatever it likes."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections = 0
        self.requests: list[str] = []
        self.address = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next((int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:")), 0)
                body = await reader.readexactly(length)
                self.requests.append(head)
                await self.handler(head, body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(handler: Handler, socket: Path | None = None) -> AsyncIterator[Server]:
    server = Server(handler)
    if socket:
        listener = await asyncio.start_unix_server(server.serve, socket)
        server.address = f"unix://{socket}"
    else:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.address = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()


async def ok(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(answer(body or b'{"ok":true}'))


async def test_calls_share_one_connection() -> None:
    async with serving(ok) as server:
        transport = HttpTransport(server.address, "t0ken")
        for _ in range(5):
            assert (await transport.request("GET", "/v1/info")).body == b'{"ok":true}'
        assert server.connections == 1
        assert "Authorization: Bearer t0ken\r\n" in server.requests[0]
        await transport.close()


async def test_a_unix_socket_is_an_address(tmp_path: Path) -> None:
    async with serving(ok, tmp_path / "api.sock") as server:
        transport = HttpTransport(server.address)
        assert (await transport.request("POST", "/v1/x", body=b"[1]")).body == b"[1]"
        await transport.close()


async def test_a_chunked_answer_is_joined() -> None:
    async def chunked(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")

    async with serving(chunked) as server:
        transport = HttpTransport(server.address)
        assert (await transport.request("GET", "/")).body == b"abcde"
        assert (await transport.request("GET", "/")).body == b"abcde"
        assert server.connections == 1
        await transport.close()


async def test_a_kept_connection_that_the_server_closed_is_replaced() -> None:
    seen: list[str] = []

    async def closes_after_first(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(head)
        if len(seen) == 2:
            writer.transport.abort()
        else:
            writer.write(answer())

    async with serving(closes_after_first) as server:
        transport = HttpTransport(server.address)
        await transport.request("GET", "/one")
        assert (await transport.request("GET", "/two")).status == 200
        assert server.connections == 2
        await transport.close()


async def test_a_write_that_was_cut_says_that_its_outcome_is_unknown() -> None:
    async def cut(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        await writer.drain()
        writer.transport.abort()

    async with serving(cut) as server:
        transport = HttpTransport(server.address)
        with pytest.raises(OutcomeUnknown):
            await transport.request("POST", "/v1/x", body=b"{}")
        with pytest.raises(Unavailable):
            await transport.request("GET", "/v1/x")
        await transport.close()


async def test_a_silent_server_is_given_up() -> None:
    async def silent(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async with serving(silent) as server:
        transport = HttpTransport(server.address)
        with pytest.raises(OutcomeUnknown, match="no answer within"):
            await transport.request("PUT", "/v1/x", body=b"{}", timeout_s=0.05)
        await transport.close()


async def test_a_server_that_is_not_there_is_unavailable_with_a_mend() -> None:
    transport = HttpTransport("http://127.0.0.1:1")
    with pytest.raises(Unavailable, match="connection refused") as caught:
        await transport.request("GET", "/v1/info")
    assert "atoll up" in (caught.value.mend or "")


async def test_a_thing_that_does_not_speak_http_is_unavailable() -> None:
    async def ssh(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")

    async with serving(ssh) as server:
        transport = HttpTransport(server.address)
        with pytest.raises(Unavailable, match="not an HTTP answer"):
            await transport.request("GET", "/v1/info")


def batch_stream(*parts: bytes, status: str = "200 OK") -> Handler:
    async def stream(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for part in parts:
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    return stream


async def test_batches_come_whole_however_they_are_cut() -> None:
    parts = (b'{"revision":1,"comp', b'lete":true}\n{"revision":2,', b'"complete":false,"removed":["a"]}\n')
    async with serving(batch_stream(*parts)) as server:
        plane = HttpControlPlane(server.address, None)
        batches = plane.assignments("n1")
        got = [await anext(batches), await anext(batches)]
        with pytest.raises(Unavailable):
            await anext(batches)
        assert got == [AssignmentBatch(1, True), AssignmentBatch(2, False, removed=("a",))]
        assert server.requests[0].startswith("GET /v1/nodes/n1/assignments ")


async def test_a_stream_that_is_refused_raises_the_servers_error() -> None:
    body = b'{"error":{"code":"unauthenticated","message":"no such token"}}'
    async with serving(batch_stream(body, status="401 Unauthorized")) as server:
        with pytest.raises(Unauthenticated, match="no such token"):
            async for _ in HttpControlPlane(server.address, "bad").routing("g1"):
                pass


async def test_a_stream_gone_silent_is_broken() -> None:
    async def mute(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(5)

    async with serving(mute) as server, HttpTransport(server.address).lines("/x", silence_s=0.05) as lines:
        with pytest.raises(Unavailable, match="silent"):
            async for _ in lines:
                pass


async def test_a_slow_reader_holds_the_server_back() -> None:
    """8 MiB of lines are offered; what the client holds unread stays bounded."""
    sent = 0

    async def flood(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        line = b"x" * 65_535 + b"\n"
        for _ in range(512):
            writer.write(line)
            await writer.drain()
            sent += len(line)
        writer.close()

    async with serving(flood) as server, HttpTransport(server.address).lines("/x") as lines:
        iterator = aiter(lines)
        await anext(iterator)
        await asyncio.sleep(0.1)
        assert sent < 16 << 20
        for _ in range(511):
            await anext(iterator)
        with pytest.raises(Unavailable):
            await anext(iterator)


async def test_a_report_carries_statuses_and_its_errors_are_told() -> None:
    bodies: list[bytes] = []

    async def take(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        bodies.append(body)
        if len(bodies) == 2:
            writer.write(answer(b'{"error":{"code":"conflict","message":"not your instance"}}', "409 Conflict"))
        elif len(bodies) == 3:
            writer.write(answer(b"oops", "500 Internal Server Error"))
        else:
            writer.write(answer(b"{}"))

    status = Status(instance="i", project="p", node="n", phase=Phase.RUNNING, ready=True)
    async with serving(take) as server:
        plane = HttpControlPlane(server.address, "t")
        await plane.report("n", [status])
        assert b'"statuses":[{"instance":"i","project":"p","node":"n","phase":"running","ready":true}]' in bodies[0]
        with pytest.raises(Conflict, match="not your instance"):
            await plane.report("n", [status])
        with pytest.raises(Unavailable):
            await plane.report("n", [status])
        await plane.close()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://h", "http://h"),
        ("h:7600", "http://h:7600"),
        ("https://h/base/", "https://h/base"),
        ("/run/a.sock", "unix:///run/a.sock"),
        ("unix:///run/a.sock", "unix:///run/a.sock"),
        ("http://[::1]:7600", "http://[::1]:7600"),
    ],
)
def test_addresses_read_as_they_print(text: str, shown: str) -> None:
    assert str(Address.parse(text)) == shown


@pytest.mark.parametrize("text", ["ftp://h", "http://", "http://h:99999", "http://u:p@h", "http://h?x=1", ""])
def test_a_bad_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(Invalid) as caught:
        Address.parse(text)
    assert caught.value.field == "api"


async def test_an_assignment_of_an_app_and_of_a_job_come_back_as_what_they_were() -> None:
    specs = (AppSpec(name="web", image="x", ports=(Port(port=80),)), JobSpec(name="sum", image="x", completions=3))
    instance = Instance(id="i", project="p", owner_kind=OwnerKind.APP, owner="web", created_at=1.0)
    sent = AssignmentBatch(1, True, tuple(Assignment(instance=instance, workload=spec, revision=1) for spec in specs))
    async with serving(batch_stream(codec.encode(sent) + b"\n")) as server:
        assert await anext(HttpControlPlane(server.address, None).assignments("n1")) == sent


async def test_an_assignment_that_is_not_understood_is_left_as_it_is_and_the_others_are_taken() -> None:
    allow = Allow(cidr="192.0.2.0/24")
    specs = {"a": AppSpec(name="web", image="x"), "b": AppSpec(name="web", image="x", network=NetworkRules(egress=(allow,)))}
    put = tuple(
        Assignment(
            instance=Instance(id=id, project="p", owner_kind=OwnerKind.APP, owner="web", created_at=1.0, desired=Desired.STOP),
            workload=spec,
            revision=1,
        )
        for id, spec in specs.items()
    )
    sent = codec.encode(AssignmentBatch(1, True, put, kept={"c": Desired.RUN}))
    longer = sent.replace(allow.cidr.encode(), b"a text of the next version that is longer than this one takes")  # type: ignore[union-attr]
    nameless = longer.replace(b'"id":"b"', b'"id":3')
    assert sent != longer != nameless
    async with serving(batch_stream(longer + b"\n" + nameless + b"\n")) as server:
        batches = HttpControlPlane(server.address, None).assignments("n1")
        got = await anext(batches)
        assert (got.revision, got.complete, got.put) == (1, True, put[:1])
        assert got.kept == {"b": Desired.STOP, "c": Desired.RUN}
        assert [(one.project, one.instance) for one in got.unread] == [("p", "b")]
        assert "cidr" in got.unread[0].why
        # It may be of any instance here, and as if it were not there that one would be removed.
        with pytest.raises(Unavailable, match="does not understand"):
            await anext(batches)


def test_paths_quote_what_people_name() -> None:
    assert path("projects", "a/b", "events", subject="app/x", limit=None, after="1 2") == (
        "/v1/projects/a%2Fb/events?subject=app%2Fx&after=1%202"
    )


async def test_an_unknown_path_is_not_found_even_from_a_proxy() -> None:
    async def proxy(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"<html>nope</html>", "404 Not Found"))

    async with serving(proxy) as server:
        with pytest.raises(NotFound, match="answered 404"):
            await HttpControlPlane(server.address, None, node="n").instance_secrets("i")


async def test_what_an_ingress_counted_is_told_to_every_server_and_is_lost_only_if_none_takes_it() -> None:
    async def broken(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"{}", "503 Service Unavailable"))

    report = TrafficReport(ingress="g", started=1.0)
    async with serving(ok) as one, serving(broken) as two, serving(ok) as three:
        control = HttpControlPlane(",".join(each.address for each in (one, two, three)), None)
        await control.traffic(report)
        assert [len(each.requests) for each in (one, two, three)] == [1, 1, 1]
        one.handler = three.handler = broken
        with pytest.raises(Unavailable):
            await control.traffic(report)
        await control.close()


class Elsewhere(HttpTransport):
    """A server that takes `after_s` to answer with `status`."""

    def __init__(self, name: str, after_s: float = 0.01, status: int = 200) -> None:
        super().__init__(f"http://{name}")
        self.after_s = after_s
        self.status = status
        self.taken: list[str] = []

    async def request(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"", timeout_s: float = 30.0
    ) -> Answer:
        if self.after_s > timeout_s:
            await asyncio.sleep(timeout_s)
            raise OutcomeUnknown("no answer")
        await asyncio.sleep(self.after_s)
        self.taken.append(path)
        return Answer(self.status, {}, b"{}")


async def test_an_ingress_hears_that_it_was_forgotten_though_the_first_server_is_away() -> None:
    async def forgotten(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b'{"error": {"code": "not-found", "message": "no ingress"}}', "404 Not Found"))

    async def peers(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b'{"sites": {"ams": 3.0}}'))

    async def broken(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"{}", "503 Service Unavailable"))

    beat = IngressHeartbeat(ingress="g", at=1.0)
    async with serving(broken) as one, serving(forgotten) as two, serving(forgotten) as three:
        control = HttpControlPlane(",".join(each.address for each in (one, two, three)), None)
        with pytest.raises(NotFound):
            await control.ingress_heartbeat(beat)
        three.handler = peers
        assert (await control.ingress_heartbeat(beat)).sites == {"ams": 3.0}
        assert [len(each.requests) for each in (one, two, three)] == [2, 2, 2]
        await control.close()


async def test_a_server_that_is_behind_is_left_for_the_next_and_so_is_one_whose_stream_ends_in_an_error() -> None:
    told = [codec.encode(RoutingBatch(revision, True)) + b"\n" for revision in (9, 8, 10)]
    sorry = b'{"error":{"code":"unavailable","message":"not current"}}\n'
    async with (
        serving(batch_stream(told[0])) as first,
        serving(batch_stream(told[1])) as behind,
        serving(batch_stream(sorry)) as ails,
    ):
        control = HttpControlPlane(",".join(each.address for each in (first, behind, ails)), None)
        first.handler = batch_stream(told[0], sorry)
        follow = control.routing("g1")
        assert (await anext(follow)).revision == 9
        with pytest.raises(Unavailable, match="not current"):
            await anext(follow)
        with pytest.raises(Unavailable, match="at revision 8, and 9 is known"):
            await anext(control.routing("g1"))
        with pytest.raises(Unavailable, match="not current"):
            await anext(control.routing("g1"))
        first.handler = batch_stream(told[2])
        assert (await anext(control.routing("g1"))).revision == 10
        assert [len(each.requests) for each in (first, behind, ails)] == [2, 1, 1]
        await control.close()


def test_a_heartbeat_is_told_to_every_server_and_one_that_hangs_does_not_hold_up_the_next() -> None:
    async def main() -> None:
        servers = [Elsewhere("hangs", 1e9), Elsewhere("leads"), Elsewhere("ails", status=503)]
        control = HttpControlPlane("", None, transport=Failover(servers))
        loop = asyncio.get_running_loop()
        await control.heartbeat(Heartbeat(node="n1", at=1.0))
        assert loop.time() == pytest.approx(SLOW_S, abs=0.1)
        assert servers[1].taken == ["/v1/nodes/n1/heartbeat"]
        began, servers[1].after_s = loop.time(), 2 * SLOW_S
        await control.heartbeat(Heartbeat(node="n1", at=2.0))
        assert loop.time() - began == pytest.approx(2 * SLOW_S, abs=0.1), "the first that takes it is waited for"
        servers[1].status = 503
        with pytest.raises(Unavailable):
            await control.heartbeat(Heartbeat(node="n1", at=3.0))
        await control.close()

    run_virtual(main())


async def breaks(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def behind(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b"{}", "503 Service Unavailable"))


async def gone(head: str, body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b"{}", "404 Not Found"))


@pytest.mark.parametrize(
    ("first", "acts", "told", "asked"),
    [
        (breaks, True, OutcomeUnknown, 0),
        (breaks, False, NotFound, 1),
        (behind, True, NotFound, 1),
        (None, True, NotFound, 1),
    ],
)
async def test_a_command_is_asked_of_the_next_server_only_where_the_last_cannot_have_begun_it(
    first: Handler | None, acts: bool, told: type[Exception], asked: int
) -> None:
    async with serving(first or gone) as one, serving(gone) as two:
        addresses = ("http://127.0.0.1:1" if first is None else one.address, two.address)
        both = Failover([HttpTransport(address, connect_s=1.0) for address in addresses])
        with pytest.raises(told):
            await both.channel("/v1/projects/default/instances/web-1/exec", acts=acts)
        assert len(two.requests) == asked
        assert str(both.address) == two.address, "the one that broke is left"
        await both.close()


async def test_a_handshake_that_broke_says_whether_anything_was_asked() -> None:
    nobody = HttpTransport("http://127.0.0.1:1")
    with pytest.raises(Unreachable):
        await nobody.channel("/v1/x", acts=True)
    async with serving(breaks) as server:
        transport = HttpTransport(server.address)
        with pytest.raises(OutcomeUnknown, match="it may have been begun"):
            await transport.channel("/v1/x", acts=True)
        with pytest.raises(Unavailable) as caught:
            await transport.channel("/v1/x")
        assert not isinstance(caught.value, Unreachable)
