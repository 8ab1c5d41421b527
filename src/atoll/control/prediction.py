"""Which images nodes will need soon, from where the scheduler would put the next instances of each app. Pure.

A list says what a node should have, not what it lacks: what it has is on its list too, so that it is kept there, and a list stays
the same while it is being followed.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from msgspec import Struct

NODES_PER_APP_MAX = 3
"""Nodes that are to have an app's images beside those that run it."""
STAY = 2
"""A node that has been given an app's images keeps them while it is among so many times as many of the best."""
IMAGES_PER_NODE_MAX = 16
NEW_MAX = 64
"""Images that all nodes together are newly told to fetch in one prediction: registries are asked in a stream and no flood."""


class Likelihood(enum.IntEnum):
    """Why an app may come to a node where it is not yet, the likeliest last."""

    REPLACED = 1
    """A node of its instances may be lost."""
    STOOD_BY = 2
    """When one that stands by is taken, another is made."""
    SCALED = 3
    """Its metric may ask for more."""


class Wish(Struct, frozen=True, kw_only=True):
    """What is known of one app."""

    app: str
    """`project/name`."""
    images: tuple[str, ...]
    """References with digests: its own, and those that its volumes show."""
    likelihood: Likelihood
    nodes: int
    """How many more nodes are to have its images."""
    candidates: tuple[str, ...]
    """Nodes where an instance of it would go that run none, the best first."""


Lists = Mapping[str, tuple[str, ...]]
"""Node → images, the likeliest first."""


def predict(wishes: Sequence[Wish], before: Lists, has: Mapping[str, AbstractSet[str]]) -> dict[str, tuple[str, ...]]:
    """Return which images each node should have; nodes without any are left out.

    `before` is what the last prediction said: a node stays chosen while it is still good, so that small changes of load do not send
    images from node to node. `has` is node → digests that it says it has; what it has counts for none of `NEW_MAX`.
    """
    ranked: dict[str, dict[str, tuple[int, int, str]]] = defaultdict(dict)
    for wish in wishes:
        for place, node in enumerate(_chosen(wish, before)):
            for image in wish.images:
                rank = (-wish.likelihood, place, wish.app)
                ranked[node][image] = min(rank, ranked[node].get(image, rank))
    lists = {
        node: sorted(images, key=lambda image: (images[image], image))[:IMAGES_PER_NODE_MAX] for node, images in ranked.items()
    }
    fresh = [
        (ranked[node][image], node, image)
        for node, images in lists.items()
        for image in images
        if image not in before.get(node, ()) and digest_of(image) not in has.get(node, ())
    ]
    late = {(node, image) for _, node, image in sorted(fresh)[NEW_MAX:]}
    found = {node: tuple(image for image in images if (node, image) not in late) for node, images in sorted(lists.items())}
    # The same images in another order are not worth telling.
    return {node: _as_before(images, before.get(node, ())) for node, images in found.items() if images}


def _chosen(wish: Wish, before: Lists) -> list[str]:
    count = min(wish.nodes, NODES_PER_APP_MAX)
    given = [node for node in wish.candidates[: STAY * count] if set(wish.images) <= set(before.get(node, ()))][:count]
    others = [node for node in wish.candidates if node not in given]
    return [*given, *others][:count]


def _as_before(images: tuple[str, ...], before: tuple[str, ...]) -> tuple[str, ...]:
    return before if set(images) == set(before) else images


def digest_of(reference: str) -> str:
    """Return the digest that a reference names; empty where it names none."""
    return reference.partition("@")[2]
