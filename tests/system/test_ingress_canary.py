"""A canary that requests choose by header or cookie, on the real Envoy."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from msgspec.structs import replace
from test_ingress import eventually, get, routing, serves, site_at
from test_ingress import pytestmark as pytestmark

from atoll.model.records import Routing
from atoll.model.spec import CanaryChoice, IngressRules, Route

HOST = "web.localhost"


def rolling(made: Routing, choice: CanaryChoice, *, canary: int = 2) -> Routing:
    """Instance n runs release n; the new one has one request in a hundred."""
    ends = tuple(replace(each, release=n) for n, each in enumerate(made.endpoints, 1))
    spec = replace(made.spec, ingress=IngressRules(canary=choice), routes=(Route(host=HOST),))
    return replace(made, spec=spec, endpoints=ends, weights={1: 99, 2: 1}, canary=canary)


async def test_a_header_or_cookie_chooses_the_new_release_and_nobody_else_stays_with_it() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        async with site_at(Path(directory) / "i") as site:
            old, new = await site.backends(2)
            made = routing("web", old, new)
            by_header = rolling(made, CanaryChoice(header="x-canary", value="always"))
            site.control.put(by_header)
            await eventually(lambda: serves(site, HOST))
            for _ in range(20):
                assert (await get(site.port, HOST, "/", "X-Canary: always")).body == b"b3"
            others = [(await get(site.port, HOST, "/", "X-Canary: no")).body for _ in range(30)]
            assert others.count(b"b2") > 20
            site.control.put(rolling(made, CanaryChoice(cookie="canary")))

            async def chosen(cookies: str) -> bool:
                return (await get(site.port, HOST, "/", f"Cookie: {cookies}")).body == b"b3"

            await eventually(lambda: chosen("canary=1"))
            for cookies in ("canary=1", "a=b; canary=1", "canary=1; z=y", "a=b; canary=1;z=y"):
                for _ in range(5):
                    assert await chosen(cookies), cookies
            for cookies in ("canary=11", "xcanary=1", "a=canary=1", "canary=0"):
                found = [await chosen(cookies) for _ in range(20)]
                assert found.count(True) < 10, cookies
            # When nothing of it serves any more, who chose it is served by the other.
            gone = replace(rolling(made, CanaryChoice(cookie="canary")), weights={1: 100})
            site.control.put(replace(gone, endpoints=gone.endpoints[:1]))
            await eventually(lambda: _body(site.port, b"b2"))
            for _ in range(10):
                assert (await get(site.port, HOST, "/", "Cookie: canary=1")).body == b"b2"


async def test_a_canary_that_is_taken_back_drains_what_chose_it_and_nobody_is_turned_away() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        async with site_at(Path(directory) / "i") as site:
            old, new = await site.backends(2)
            going = rolling(routing("web", old, new), CanaryChoice(header="x-canary"))
            back = replace(
                rolling(routing("web", old, draining=(new,)), CanaryChoice(header="x-canary"), canary=0), weights={1: 100}
            )
            site.control.put(going)
            await eventually(lambda: serves(site, HOST))
            assert (await get(site.port, HOST, "/", "X-Canary: 1")).body == b"b3"
            slow = asyncio.create_task(get(site.port, HOST, "/slow", "X-Canary: 1"))
            await eventually(lambda: new.active == 1)
            statuses: list[int] = []

            async def choose() -> None:
                while len(statuses) < 400:
                    statuses.append((await get(site.port, HOST, "/", "X-Canary: 1")).status)

            load = [asyncio.create_task(choose()) for _ in range(4)]
            await eventually(lambda: len(statuses) > 20)
            site.control.put(back)
            await asyncio.gather(*load)
            assert set(statuses) == {200}
            assert new.active == 1
            assert site.control.drained_instances == []
            new.release.set()
            assert (await slow).body == b"b3"
            await eventually(lambda: site.control.drained_instances == ["web-b3"])


async def _body(port: int, body: bytes) -> bool:
    return (await get(port, HOST, "/", "Cookie: canary=1")).body == body
