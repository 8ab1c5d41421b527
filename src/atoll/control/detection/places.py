"""Whether it is a node, a site or a whole region that is silent. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

NODES_MIN = 2
"""A site of one node is that node; a region of one site is that site."""

Place = tuple[str, str]
"""`site` or `region`, and its name."""


def dark(nodes: Iterable[tuple[str, str, bool]]) -> frozenset[Place]:
    """Return the places of which every node is silent, from (site, region, silent) of each node.

    A site of two nodes or more; a region of two sites or more. Of a region that is dark its sites are not listed: one word for
    one cause.
    """
    sites: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for site, region, silent in nodes:
        sites[region, site].append(silent)
    regions: dict[str, list[bool]] = defaultdict(list)
    for (region, _), silents in sites.items():
        regions[region].append(all(silents))
    found: set[Place] = {("region", region) for region, darks in regions.items() if len(darks) >= NODES_MIN and all(darks)}
    gone = {name for _, name in found}
    for (region, site), silents in sites.items():
        if region not in gone and len(silents) >= NODES_MIN and all(silents):
            found.add(("site", site))
    return frozenset(found)
