"""Whatever users do at the same time, each hostname and path has one owner, and each app owns all of its own."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from atoll.api.service import KINDS, SYSTEM, Service
from atoll.api.service.claims import hosts_of
from atoll.model import keys
from atoll.model.errors import Conflict, Forbidden, NotFound
from atoll.model.ports.clock import SystemClock
from atoll.model.ports.store import Delete
from atoll.model.records import App, Release, RouteClaim
from atoll.model.spec import AppSpec, Port, Route
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

APPS = ("a", "b", "c")
PLACES = [("x.test", "/"), ("x.test", "/api"), ("y.test", "/"), ("a.localhost", "/b")]
ROUTES = st.lists(st.sampled_from(PLACES), max_size=3, unique=True)
PUT = st.tuples(st.just("put"), st.sampled_from(APPS), ROUTES)
BACK = st.tuples(st.just("back"), st.sampled_from(APPS), st.just([]))
GONE = st.tuples(st.just("gone"), st.sampled_from(APPS), st.just([]))
ROUNDS = st.lists(st.lists(st.one_of(PUT, PUT, BACK, GONE), min_size=1, max_size=4), min_size=1, max_size=5)

Step = tuple[str, str, list[tuple[str, str]]]


async def take(service: Service, step: Step) -> None:
    what, name, routes = step
    try:
        match what:
            case "put":
                spec = AppSpec(name=name, image="x:1", ports=(Port(port=8000),))
                spec = replace(spec, routes=tuple(Route(host=host, path=path) for host, path in routes))
                await service.apps.put(SYSTEM, spec)
            case "back":
                await service.apps.rollback(SYSTEM, "default", name)
            case _:
                # As the controller does at the end of a deletion, but leaving the claims behind.
                gone = [Delete(keys.app("default", name)), Delete(f"{keys.RELEASES}default/{name}/", prefix=True)]
                await service.context.store.txn((), gone)
    except (Conflict, NotFound, Forbidden):
        pass


async def run(rounds: list[list[Step]]) -> None:
    store = MemoryStore(SystemClock())
    async with State(store, KINDS) as state:
        service = Service(store, state, SystemClock(), random.Random(1), bytes(32))
        for steps in rounds:
            await asyncio.gather(*(take(service, step) for step in steps))
            await service.context.reach(await store.revision())
            check(state)
    await store.close()


def check(state: State) -> None:
    claims = {key: held.record.app for key, held in state.records(RouteClaim).items()}
    for held in state.records(App).values():
        app = held.record
        for host in hosts_of(app.spec, "localhost"):
            assert claims.get(host.host + host.path) == app.name, f"{app.name} does not own {host.place}: {claims}"
        release = state.get(Release, keys.release("default", app.name, app.release).removeprefix(keys.RELEASES))
        assert release is not None
        assert release.record.spec == app.spec


@settings(max_examples=150, deadline=None)
@given(ROUNDS)
def test_every_place_has_one_owner_whatever_happens_at_once(rounds: list[list[Step]]) -> None:
    asyncio.run(run(rounds))
