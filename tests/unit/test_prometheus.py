"""Apps that scale by what a Prometheus server says: what is an answer, who may be asked, and the leader that asks."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from control_cell import Cell, run_virtual

from atoll.control.queries import ANSWER_S, EVERY_S, NO_ROOM, PROJECT_QUERIES_MAX, QUERIES_MAX, Ask, Queries, rooms_of
from atoll.control.world import World
from atoll.entry.prometheus import ANSWER_BYTES_MAX, PrometheusClient, servers_of, value_in
from atoll.model import keys
from atoll.model.errors import AtollError, Forbidden, Invalid, Unavailable
from atoll.model.records import App, Event, OwnerKind
from atoll.model.spec import AppSpec, PrometheusQuery, Scale
from atoll.model.spec.sources import check_sources
from atoll.model.units import Seconds


def vector(*values: str) -> dict[str, Any]:
    series = [{"metric": {"a": str(at)}, "value": [1_700_000_000.5, value]} for at, value in enumerate(values)]
    return {"status": "success", "data": {"resultType": "vector", "result": series}}


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (vector("35"), 35.0),
        (vector("1e3"), 1000.0),
        ({"status": "success", "data": {"resultType": "scalar", "result": [1, "7"]}}, 7.0),
    ],
)
def test_one_number_is_an_answer(answer: dict[str, Any], value: float) -> None:
    assert value_in(json.dumps(answer).encode()) == value


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (vector(), Unavailable, "finds no series"),
        (vector("1", "2"), Invalid, "finds 2 series"),
        (vector("NaN"), Unavailable, "is NaN"),
        (vector("+Inf"), Unavailable, "Inf"),
        (vector("x"), Invalid, "no number"),
        ({"status": "error", "error": "parse error at 1"}, Invalid, "parse error at 1"),
        ({"status": "success", "data": {"resultType": "matrix", "result": [{"values": [[1, "2"]]}]}}, Invalid, "instant query"),
        ("<html>", Invalid, "instant query"),
    ],
)
def test_anything_else_is_none_and_says_why(body: Any, error: type[AtollError], words: str) -> None:
    with pytest.raises(error, match=words):
        value_in(json.dumps(body).encode())


def test_servers_that_may_be_asked_are_named_with_their_ports() -> None:
    assert servers_of("a.example:9090, [::1]:80,") == {("a.example", 9090), ("::1", 80)}
    assert servers_of("") == frozenset()
    for text in ("a.example", "a.example:0", ":9090", "a:b"):
        with pytest.raises(Invalid, match="not HOST:PORT"):
            servers_of(text)


@pytest.mark.parametrize(
    "url",
    ["http://[x", "http://a:99999", "http://a:0", "http://:pw@a", "http://a/\x01", "ftp://a", "http://", "http://a?b", "a:9090"],
)
async def test_what_is_no_servers_url_is_refused_in_words_when_it_is_given_and_when_it_is_asked(url: str) -> None:
    query = PrometheusQuery(url=url, query="a", target=1)
    scale = Scale(max=8, prometheus=query)
    with pytest.raises(Invalid, match=r"scale\.prometheus\.url") as refused:
        check_sources(AppSpec(name="web", image="x", scale=scale), scale)
    assert "pw" not in str(refused.value)
    client = PrometheusClient(frozenset({("a", 80), ("a", 9090)}))
    with pytest.raises(Invalid, match=r"scale\.prometheus\.url"):
        await client.ask(query)
    await client.close()


class Server:
    """Answers everything with `answer`, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answer = b""
        self.status = "200 OK"
        self.asked: list[str] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.asked.append(head.split(b"\r\n")[0].decode())
        location = f"Location: http://127.0.0.1:{self.port}/elsewhere\r\n"
        writer.write(f"HTTP/1.1 {self.status}\r\n{location}Content-Length: {len(self.answer)}\r\n\r\n".encode() + self.answer)
        writer.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    yield server
    listening.close()


async def test_only_a_server_that_the_operator_named_is_asked_and_no_other_that_it_names(server: Server) -> None:
    client = PrometheusClient(frozenset({("127.0.0.1", server.port)}))
    query = PrometheusQuery(url=f"http://127.0.0.1:{server.port}/prom/", query='sum(a{b="c d"})', target=1)
    server.answer = json.dumps(vector("4")).encode()
    assert await client.ask(query) == 4.0
    assert server.asked == ["GET /prom/api/v1/query?query=sum%28a%7Bb%3D%22c+d%22%7D%29 HTTP/1.1"]
    for other in (f"http://localhost:{server.port}", "http://169.254.169.254", f"https://127.0.0.1:{server.port + 1}"):
        with pytest.raises(Forbidden, match="not allowed"):
            await client.ask(PrometheusQuery(url=other, query="a", target=1))
    server.status = "302 Found"
    server.answer = b""
    with pytest.raises(Invalid, match="answers 302"):
        await client.ask(query)
    assert len(server.asked) == 2
    server.status, server.answer = "200 OK", b" " * (ANSWER_BYTES_MAX + 1)
    with pytest.raises(Invalid, match="over 1 MiB"):
        await client.ask(query)
    await client.close()


async def test_a_server_that_is_not_there_is_unavailable(server: Server) -> None:
    client = PrometheusClient(frozenset({("127.0.0.1", 1)}))
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 does not answer"):
        await client.ask(PrometheusQuery(url="http://127.0.0.1:1", query="a", target=1))
    await client.close()


class Oracle:
    """Answers `value`; None hangs, an error is raised."""

    def __init__(self) -> None:
        self.value: float | AtollError | None = 0.0
        self.asked: list[str] = []

    async def ask(self, query: PrometheusQuery) -> float:
        self.asked.append(query.query)
        if isinstance(self.value, AtollError):
            raise self.value
        if self.value is None:
            await asyncio.sleep(1_000_000)
        return self.value or 0.0


class Asking(Cell):
    def __init__(self, oracle: Ask | None) -> None:
        super().__init__()
        self.prometheus = oracle

    async def begin(self, *names: str) -> None:
        for name in ("n1", "n2"):
            await self.add_node(name)
        self.agents()
        self.lead()
        query = PrometheusQuery(url="http://p.example:9090", query="sum(jobs)", target=10)
        for name in names:
            await self.deploy(AppSpec(name=name, image="x", scale=Scale(max=8, prometheus=query, down=Seconds(30))))

    def wanted(self, name: str = "web") -> int | None:
        status = self.app_status(name)
        return status.scaled if status is not None else None

    def failures(self) -> list[str]:
        return [held.record.message for held in self.state.records(Event).values() if held.record.code == "query-failed"]


def test_an_app_follows_the_answer_which_is_asked_for_once_for_all_apps_with_the_same_question() -> None:
    async def story() -> None:
        oracle = Oracle()
        async with Asking(oracle) as cell:
            await cell.begin("web", "api")
            oracle.value = 35.0
            await cell.until(lambda: cell.wanted() == 4 and cell.wanted("api") == 4, within_s=2 * EVERY_S)
            count = len(oracle.asked)
            await asyncio.sleep(10 * EVERY_S)
            assert len(oracle.asked) - count in (9, 10, 11)
            oracle.value = 5.0
            await cell.until(lambda: cell.wanted() == 1 and cell.wanted("api") == 1, within_s=100)

    run_virtual(story())


def test_without_an_answer_the_number_stays_and_it_is_said_once_and_again_after_it_has_worked() -> None:
    async def story() -> None:
        oracle = Oracle()
        async with Asking(oracle) as cell:
            await cell.begin("web")
            oracle.value = 20.0
            await cell.until(lambda: cell.wanted() == 2, within_s=2 * EVERY_S)
            oracle.value = None
            await asyncio.sleep(300)
            assert cell.wanted() == 2
            assert cell.failures() == [f"scale.prometheus: no answer within {ANSWER_S:g} s"]
            oracle.value = 20.0
            await asyncio.sleep(60)
            oracle.value = Unavailable("gone")
            await asyncio.sleep(60)
            assert set(cell.failures()) == {f"scale.prometheus: no answer within {ANSWER_S:g} s", "scale.prometheus: gone"}
            assert len(cell.failures()) == 2

    run_virtual(story())


def test_where_no_server_may_be_asked_the_app_says_so_and_stays() -> None:
    async def story() -> None:
        async with Asking(None) as cell:
            await cell.begin("web")
            await cell.until(lambda: cell.failures(), within_s=60)
            assert "--prometheus HOST:PORT" in cell.failures()[0]
            assert cell.wanted() == 1

    run_virtual(story())


class Moody:
    """Answers 1, and never where the query says so. Keeps when it was asked what."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []

    async def ask(self, query: PrometheusQuery) -> float:
        self.asked.append((asyncio.get_running_loop().time(), query.query))
        if query.query.startswith("slow"):
            await asyncio.sleep(1_000_000)
        return 1.0


async def ask_for(cell: Cell, project: str, name: str, query: str) -> None:
    scale = Scale(max=8, prometheus=PrometheusQuery(url="http://p.example:9090", query=query, target=10))
    spec = AppSpec(name=name, image="x", scale=scale)
    await cell.put(
        keys.app(project, name), App(project=project, name=name, spec=spec, release=1, replicas=1, created_at=0, updated_at=0)
    )


def test_a_project_whose_servers_are_slow_holds_back_nobodys_answers_and_hears_what_is_too_much() -> None:
    async def story() -> None:
        async with Cell() as cell:
            for at in range(PROJECT_QUERIES_MAX + 5):
                await ask_for(cell, "a", f"web{at:04}", f"slow{at}")
            await ask_for(cell, "b", "web", "quick")
            world = World(cell.state, cell.clock.monotonic)
            world.rebuild()
            moody = Moody()
            queries = Queries(world, cell.clock, moody)
            cell.keep(asyncio.ensure_future(queries.run()))
            await asyncio.sleep(10 * EVERY_S + 1)
            at = [when for when, query in moody.asked if query == "quick"]
            assert len(at) == 11
            assert max(later - sooner for sooner, later in itertools.pairwise(at)) < EVERY_S + 1
            slow = {query for _, query in moody.asked if query.startswith("slow")}
            assert len(slow) == PROJECT_QUERIES_MAX
            assert sum(problem == NO_ROOM for problem in queries.problems.values()) == 5
            assert (OwnerKind.APP, f"a/web{PROJECT_QUERIES_MAX:04}") in world.dirty

    run_virtual(story())


def test_projects_get_room_for_their_queries_in_turns() -> None:
    assert rooms_of({"a": 1_000, "b": 1}) == {"a": PROJECT_QUERIES_MAX, "b": 1}
    many = rooms_of({f"p{at:02}": 1_000 for at in range(20)} | {"z": 30})
    assert sum(many.values()) == QUERIES_MAX
    assert many["z"] == 30
    assert set(many.values()) - {30} == {48, 49}
    assert len(rooms_of({f"p{at:04}": 1 for at in range(QUERIES_MAX + 1)})) == QUERIES_MAX
