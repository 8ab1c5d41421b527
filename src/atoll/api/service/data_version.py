"""Which version of Atoll a cell's records are written for, so that one that is too old, or too new, says so before it does harm.

A record may have fields that the version before does not know: that one reads it without them, and when it writes the record they
are gone. Servers that are one apart work over one store, as in a rolling upgrade, and going back by one is allowed. More is not.
"""

from __future__ import annotations

import structlog

from atoll.model import codec, keys
from atoll.model.errors import Corrupt, Unsupported
from atoll.model.membership import DATA_VERSION, SKEW_MAX, Server
from atoll.model.ports.store import KeyValue, Put, Store, absent, unchanged

BEFORE = 1
"""The version of data that says none."""
SERVERS_MAX = 100
"""Servers that are looked at; a cell has a handful."""

log = structlog.get_logger()


async def check_data(store: Store, ours: int = DATA_VERSION) -> None:
    """See that a server of version `ours` may work over `store`; the newest one's version is the data's from then on.

    Raises Unsupported: it may not, and nothing was written. Corrupt: what says the version is none. A retry is safe.
    """
    while True:
        held = await store.get(keys.CELL_DATA)
        there = _version_in(held)
        if held is None and not (await store.range("", limit=1)).items:
            there = max(BEFORE, ours - SKEW_MAX)  # a new cell: there is nothing that could be too old
        if there - ours > SKEW_MAX:
            raise Unsupported(
                f"the cell's data is of version {there}, of a newer Atoll; this one writes {ours}, and takes {ours + SKEW_MAX}",
                mend="use the newer Atoll, or restore a backup from before the upgrade",
            )
        if ours - there > SKEW_MAX:
            raise Unsupported(
                f"the cell's data is of version {there}; this Atoll writes {ours}, and takes {ours - SKEW_MAX}",
                mend=f"upgrade by one version at a time: first to the one that writes {there + SKEW_MAX}",
            )
        if ours <= there:
            return
        await _check_servers(store, ours)
        mine = [absent(keys.CELL_DATA) if held is None else unchanged(keys.CELL_DATA, held.mod_revision)]
        if (await store.txn(mine, [Put(keys.CELL_DATA, b"%d" % ours)])).succeeded:
            log.info("the cell's data is of this version from now on", version=ours)
            return


async def _check_servers(store: Store, ours: int) -> None:
    """Raise Unsupported while a server runs that would not understand what this one writes."""
    for item in (await store.range(keys.SERVERS, limit=SERVERS_MAX)).items:
        server = codec.decode_known(item.value, Server)
        if ours - server.data > SKEW_MAX:
            raise Unsupported(
                f"server {server.id} at {', '.join(server.urls)} is of version {server.version}, too old to run beside this one",
                mend="upgrade that server first, by one version at a time",
            )


def _version_in(held: KeyValue | None) -> int:
    if held is None:
        return BEFORE
    if not held.value.isdigit() or len(held.value) > 6:
        raise Corrupt(f"{keys.CELL_DATA} in the store holds no version of data", mend="restore a backup")
    return int(held.value)
