"""Indexes of `State`: what is found is what looking at every record would find, whatever is written in whatever order."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.model import codec, keys
from atoll.model.ports.store import Delete, Op, Put
from atoll.model.records import Instance, OwnerKind
from atoll.store.cache import State
from atoll.store.index import by_project
from atoll.store.memory import MemoryStore

PROJECTS = ("a", "a-b", "b")
NODES = (None, "n1", "n2")
CHANGES = st.lists(
    st.tuples(st.sampled_from(PROJECTS), st.sampled_from("xyz"), st.sampled_from((*NODES, "gone"))),
    max_size=30,
)


def by_node(key: str, instance: Instance) -> str | None:
    return instance.node


def write(project: str, id: str, node: str | None) -> Op:
    if node == "gone":
        return Delete(keys.instance(project, id))
    record = Instance(id=id, project=project, owner_kind=OwnerKind.APP, owner="app", node=node, created_at=0.0)
    return Put(keys.instance(project, id), codec.encode(record))


def check(state: State) -> None:
    held = state.records(Instance)
    for project in (*PROJECTS, "other"):
        assert dict(state.found(Instance, by_project, project)) == {k: h for k, h in held.items() if k.startswith(project + "/")}
    for node in ("n1", "n2", "n3"):
        assert dict(state.found(Instance, by_node, node)) == {k: h for k, h in held.items() if h.record.node == node}


@settings(max_examples=60, deadline=None)
@given(CHANGES, CHANGES)
def test_an_index_finds_what_a_look_at_every_record_would(
    before: list[tuple[str, str, str]], after: list[tuple[str, str, str]]
) -> None:
    async def run() -> None:
        store = MemoryStore()
        for change in before:
            await store.txn([], [write(*change)])
        async with State(store, {keys.INSTANCES: Instance}) as state:
            check(state)
            for change in after:
                await state.reach((await store.txn([], [write(*change)])).revision)
                check(state)
            assert state.found(Instance, by_node, None) == {}

    asyncio.run(run())
