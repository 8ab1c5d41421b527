"""Which images nodes are told to fetch: single predictions as tables, and the whole loop on a virtual clock."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from control_cell import Cell, run_virtual
from hypothesis import given
from hypothesis import strategies as st

from atoll.control.prediction import IMAGES_PER_NODE_MAX, NEW_MAX, NODES_PER_APP_MAX, Likelihood, Wish, digest_of, predict
from atoll.control.prefetch import APPS_PER_TICK, ROUND_S
from atoll.model import codec, keys
from atoll.model.records import Heartbeat, Prefetch
from atoll.model.spec import AppSpec, Resources, Scale, Volume
from atoll.model.units import Bytes, Cores, Seconds

WEB = "cell.internal/default/web:1@sha256:" + "a" * 64
WEIGHTS = "cell.internal/default/weights:1@sha256:" + "b" * 64
TAG = "registry.example/web:1"


def wish(app: str = "web", *candidates: str, images: tuple[str, ...] = (WEB,), nodes: int = 1, **more: Any) -> Wish:
    usual = {"likelihood": Likelihood.REPLACED}
    return Wish(**usual | {"app": f"default/{app}", "images": images, "nodes": nodes, "candidates": candidates} | more)


def image(number: int) -> str:
    return f"cell.internal/default/i@sha256:{number:064x}"


def test_the_best_nodes_are_given_all_images_of_an_app() -> None:
    assert predict([wish("web", "n2", "n3", "n4", images=(WEB, WEIGHTS), nodes=2)], {}, {}) == {
        "n2": (WEB, WEIGHTS),
        "n3": (WEB, WEIGHTS),
    }


def test_no_app_is_given_more_nodes_than_the_bound_and_none_without_a_candidate() -> None:
    nodes = [f"n{number}" for number in range(9)]
    assert len(predict([wish("web", *nodes, nodes=9)], {}, {})) == NODES_PER_APP_MAX
    assert predict([wish("web")], {}, {}) == {}


def test_what_is_likelier_comes_first_whatever_the_order_of_the_apps() -> None:
    wishes = [
        wish("a", "n1", images=(image(1),)),
        wish("b", "n1", images=(image(2),), likelihood=Likelihood.SCALED),
        wish("c", "n1", images=(image(3),), likelihood=Likelihood.STOOD_BY),
        wish("d", "n9", "n1", images=(image(4),), likelihood=Likelihood.SCALED, nodes=2),
    ]
    expected = (image(2), image(4), image(3), image(1))
    assert predict(wishes, {}, {})["n1"] == expected
    assert predict(wishes[::-1], {}, {})["n1"] == expected


def test_a_node_keeps_what_it_was_given_while_it_is_among_the_good_ones_and_loses_it_when_it_is_not() -> None:
    before = {"n3": (WEB,)}
    assert predict([wish("web", "n2", "n3", "n4")], before, {}) == before
    assert predict([wish("web", "n2", "n4", "n3")], before, {}) == {"n2": (WEB,)}
    assert predict([wish("web", "n2", "n4")], before, {}) == {"n2": (WEB,)}
    assert predict([], before, {}) == {}


def test_the_same_images_in_another_order_are_not_told_again() -> None:
    before = {"n1": (image(1), image(2))}
    wishes = [wish("a", "n1", images=(image(1),)), wish("b", "n1", images=(image(2),), likelihood=Likelihood.SCALED)]
    assert predict(wishes, before, {}) == before


def test_what_is_new_is_bounded_and_what_is_there_already_does_not_count() -> None:
    wishes = [wish(f"a{number:03}", f"n{number:03}", images=(image(number),)) for number in range(2 * NEW_MAX)]
    first = predict(wishes, {}, {})
    assert len(first) == NEW_MAX
    second = predict(wishes, first, {})
    assert len(second) == 2 * NEW_MAX
    assert first.items() <= second.items()
    has = {f"n{number:03}": frozenset({digest_of(image(number))}) for number in range(2 * NEW_MAX)}
    assert len(predict(wishes, {}, has)) == 2 * NEW_MAX


def test_a_node_is_told_of_a_bounded_number_of_images_the_likeliest() -> None:
    wishes = [wish(f"a{number:03}", "n1", images=(image(number),)) for number in range(IMAGES_PER_NODE_MAX + 5)]
    sure = wish("z", "n1", images=(WEB,), likelihood=Likelihood.SCALED)
    found = predict([*wishes, sure], {}, {})["n1"]
    assert len(found) == IMAGES_PER_NODE_MAX
    assert found[0] == WEB


@given(st.data())
def test_a_prediction_made_again_from_itself_stays_as_it_is(data: st.DataObject) -> None:
    names = [f"n{number}" for number in range(8)]
    wishes = [
        wish(
            f"a{number}",
            *data.draw(st.permutations(names)),
            images=(image(number),),
            nodes=data.draw(st.integers(1, 4)),
            likelihood=data.draw(st.sampled_from(Likelihood)),
        )
        for number in range(data.draw(st.integers(0, 12)))
    ]
    first = predict(wishes, {}, {})
    assert predict(wishes, first, {}) == first
    shuffled = list(wishes)
    random.Random(1).shuffle(shuffled)
    assert predict(shuffled, {}, {}) == first


# --- the whole loop

SPEC = AppSpec(name="web", image=WEB, volumes=(Volume(name="weights", path="/models", image=WEIGHTS),))
"""Both images are pinned, as the API does with the cell's own."""


def told(cell: Cell) -> dict[str, tuple[str, ...]]:
    return {name: held.record.images for name, held in cell.state.records(Prefetch).items()}


async def settled(cell: Cell, nodes: int = 3) -> None:
    cell.agents()
    for number in range(1, nodes + 1):
        await cell.add_node(f"n{number}")
    cell.lead()


async def rounds(count: float = 2.5) -> None:
    """Let some predictions pass, so that the newest has seen everything."""
    await asyncio.sleep(count * ROUND_S)


def test_where_an_instance_would_go_next_the_app_s_images_are_to_be() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await settled(cell)
            await cell.deploy(SPEC)
            await cell.until(lambda: cell.ready() == 1)
            await rounds()
            (node,) = told(cell)
            assert told(cell) == {node: (WEB, WEIGHTS)}
            assert node != cell.instances()[0].node
            # And there it goes when its node is lost.
            cell.silent.add(cell.instances()[0].node or "")
            await cell.until(lambda: any(i.node == node for i in cell.instances()), within_s=200)

    run_virtual(main())


def test_an_app_that_may_grow_has_more_nodes_ready_and_they_are_where_it_grows_to() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await settled(cell, nodes=6)
            scale = Scale(replicas=1, max=3, metric="depth", target=10, down=Seconds(60))
            app = await cell.deploy(
                AppSpec(name="web", image=WEB, scale=scale, resources=Resources(cpu=Cores(3.0), memory=Bytes(1 << 20)))
            )
            await cell.until(lambda: cell.ready() == 1)
            await rounds()
            ready = set(told(cell))
            assert len(ready) == 2
            await cell.change(app, replicas=3)
            await cell.until(lambda: cell.ready() == 3)
            assert {i.node for i in cell.instances()} >= ready

    run_virtual(main())


def test_nothing_is_told_of_what_is_not_pinned_stopped_or_bound_to_its_node_and_nothing_where_there_is_one_node() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await settled(cell)
            await cell.deploy(AppSpec(name="tag", image=TAG))
            await cell.deploy(AppSpec(name="bound", image=WEB, volumes=(Volume(name="data", path="/data"),)))
            await cell.deploy(AppSpec(name="stopped", image=WEB), replicas=0)
            await cell.until(lambda: cell.ready() == 2)
            await rounds()
            assert told(cell) == {}
        async with Cell() as cell:
            await settled(cell, nodes=1)
            await cell.deploy(SPEC)
            await cell.until(lambda: cell.ready() == 1)
            await rounds()
            assert told(cell) == {}

    run_virtual(main())


def test_a_tag_is_fetched_by_the_digest_that_an_instance_reports_on_machines_of_its_kind() -> None:
    async def main() -> None:
        digest = "sha256:" + "c" * 64
        async with Cell() as cell:
            cell.agents()
            await cell.add_node("n1")
            await cell.add_node("n2", arch="arm64")
            cell.lead()
            await cell.deploy(AppSpec(name="web", image=TAG))
            await cell.until(lambda: cell.ready() == 1)
            await cell.report(cell.instances()[0], image_digest=digest)
            await rounds()
            assert told(cell) == {}
            await cell.add_node("n3")
            await cell.add_node("n4", arch="arm64")
            home = cell.instances()[0].node
            await rounds()
            assert told(cell) == {("n3" if home == "n1" else "n4"): (f"{TAG}@{digest}",)}

    run_virtual(main())


def test_a_quiet_cell_is_written_nothing_and_another_leader_goes_on_with_what_was_told() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await settled(cell, nodes=5)
            for name in ("a", "b", "c"):
                await cell.deploy(AppSpec(name=name, image=WEB, volumes=SPEC.volumes))
            await cell.until(lambda: cell.ready() == 3)
            await rounds()
            before = told(cell)
            assert before
            cell.stop_leading()
            cell.lead("other")
            await rounds()
            assert told(cell) == before
            revisions = {name: held.revision for name, held in cell.state.records(Prefetch).items()}
            await rounds(10)
            assert {name: held.revision for name, held in cell.state.records(Prefetch).items()} == revisions

    run_virtual(main())


def test_every_app_has_its_turn_though_only_a_few_are_looked_at_in_a_tick() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await settled(cell, nodes=4)
            for number in range(3 * APPS_PER_TICK):
                await cell.deploy(AppSpec(name=f"app-{number}", image=image(number)))
            await cell.until(lambda: cell.ready() == 3 * APPS_PER_TICK)
            await rounds(4)
            assert {one for images in told(cell).values() for one in images} == {image(n) for n in range(3 * APPS_PER_TICK)}

    run_virtual(main())


def test_what_is_not_needed_any_more_is_taken_back_from_nodes_that_are_gone_too() -> None:
    async def main() -> None:
        async with Cell() as cell:
            await settled(cell)
            app = await cell.deploy(SPEC)
            await cell.until(lambda: cell.ready() == 1)
            await cell.put(keys.prefetch("gone"), Prefetch(node="gone", images=(WEB,)))
            await rounds()
            assert len(told(cell)) == 1
            await cell.change(app, replicas=0)
            await rounds()
            assert told(cell) == {}

    run_virtual(main())


@pytest.mark.parametrize("old", [b'{"node":"n1","at":1.0}'])
def test_an_older_agent_s_heartbeat_says_nothing_of_images(old: bytes) -> None:
    assert codec.decode(old, Heartbeat).images == ()
