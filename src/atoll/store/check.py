"""Reading a whole store, or a backup, to say whether every record in it is one that this Atoll understands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from atoll.model import stored
from atoll.model.errors import Invalid
from atoll.model.ports.store import KeyValue, Revision
from atoll.store.backup import BackupSnapshot
from atoll.store.migrate import snapshot_of
from atoll.store.place import Place, open_etcd
from atoll.store.snapshot import Digest, Snapshot, digest_of

BROKEN_MAX = 1_000
"""Keys of unreadable records that are named; more are only counted."""


class Found(Struct, frozen=True):
    content: Digest
    revision: Revision
    kinds: dict[str, int]
    """Records by the first word of their key."""
    broken: tuple[str, ...]
    broken_count: int
    members: tuple[str, ...] = ()
    """One line for each member of an etcd."""


async def check_backup(path: Path, kinds: Mapping[str, type[Any]]) -> Found:
    """Raises Corrupt, Unsupported, NotFound, Unavailable."""
    return await _check(BackupSnapshot.open(path), kinds)


async def check_store(place: Place, kinds: Mapping[str, type[Any]]) -> Found:
    """Read the newest state beside whoever uses it. Raises as `snapshot_of`."""
    members: tuple[str, ...] = ()
    if not isinstance(place, Path):
        store = await open_etcd(place)
        try:
            members = await store.describe()
        finally:
            await store.close()
    async with snapshot_of(place, offline=False) as snapshot:
        return await _check(snapshot, kinds, members)


async def _check(snapshot: Snapshot, kinds: Mapping[str, type[Any]], members: tuple[str, ...] = ()) -> Found:
    counts: Counter[str] = Counter()
    broken: list[str] = []

    def look(item: KeyValue) -> None:
        word, slash, _ = item.key.partition("/")
        counts[word] += 1
        if (kind := kinds.get(word + slash)) is None:
            return
        try:
            stored.decode(item.value, kind)
        except Invalid:
            broken.append(item.key)

    digest = await digest_of(snapshot, look)
    return Found(digest, snapshot.revision, dict(counts), tuple(broken[:BROKEN_MAX]), len(broken), members)
