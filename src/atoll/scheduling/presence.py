"""Which images are on which nodes, as they say themselves; of a node that is not known yet, too."""

from __future__ import annotations

from collections.abc import Iterable

IMAGES_MAX = 16
"""Images of one node that are remembered."""


class Presence:
    def __init__(self) -> None:
        self._images: dict[str, tuple[str, ...]] = {}
        """Node → digests of images that it has."""
        self._with_image: dict[str, set[str]] = {}
        """The same by digest."""

    def copy(self) -> Presence:
        """Return another that says the same, and changes by itself."""
        other = Presence()
        other._images = self._images.copy()
        other._with_image = {digest: nodes.copy() for digest, nodes in self._with_image.items()}
        return other

    def set(self, node: str, digests: tuple[str, ...]) -> None:
        """Take over which images a node has; of many, those that it names first."""
        digests = digests[:IMAGES_MAX]
        before = self._images.get(node, ())
        if digests == before:
            return
        for digest in set(before).difference(digests):
            self._with_image[digest].discard(node)
            if not self._with_image[digest]:
                del self._with_image[digest]
        for digest in set(digests).difference(before):
            self._with_image.setdefault(digest, set()).add(node)
        if digests:
            self._images[node] = digests
        else:
            del self._images[node]

    def with_image(self, digest: str) -> Iterable[str]:
        """Return the nodes that have an image."""
        return self._with_image.get(digest, ())
