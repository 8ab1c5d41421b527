"""Where a store lies: `sqlite:PATH`, or `etcd://HOST:PORT,…` with certificates and a user."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.model.errors import Invalid
from atoll.store.etcd.address import SCHEME, EtcdAddress, load

if TYPE_CHECKING:
    from atoll.model.ports.clock import Clock
    from atoll.model.ports.store import Store
    from atoll.store.etcd.store import EtcdStore

SQLITE = "sqlite:"
Place = Path | EtcdAddress


def place_of(
    text: str, environment: Mapping[str, str], *, ca: Path | None = None, cert: Path | None = None, key: Path | None = None
) -> Place:
    """Return the place that `text` names. Raises Invalid.

    What an etcd needs beside is taken from ATOLL_STORE_CA, _CERT, _KEY (files, unless given), _USER, _PASSWORD_FILE, _PASSWORD.
    """
    if text.startswith(SQLITE):
        path = Path(text.removeprefix(SQLITE))
        if not path.name:
            raise Invalid("sqlite: needs the path of a file", field="store", mend="write sqlite:/var/lib/atoll/server/state.db")
        return path.absolute()
    if not text.startswith(SCHEME):
        raise Invalid(
            f"{text.split('@')[-1]!r} is no place of a store", field="store", mend="write sqlite:PATH or etcd://HOST:PORT,…"
        )

    def file(name: str) -> Path | None:
        value = environment.get(f"ATOLL_STORE_{name}")
        return Path(value) if value else None

    return load(
        text,
        ca=ca or file("CA"),
        cert=cert or file("CERT"),
        key=key or file("KEY"),
        user=environment.get("ATOLL_STORE_USER", ""),
        password=environment.get("ATOLL_STORE_PASSWORD", ""),
        password_file=file("PASSWORD_FILE"),
    )


def name_of(place: Place) -> str:
    """Return how a place is called in messages: never with a secret."""
    return f"{SQLITE}{place}" if isinstance(place, Path) else str(place)


async def open_place(place: Place, clock: Clock) -> Store:
    """Return the store at `place`, made new where it is a file that is not there. Raises as the store's own `open`."""
    if isinstance(place, Path):
        from atoll.store.sqlite import SqliteStore

        return await SqliteStore.open(place, clock)
    return await open_etcd(place)


async def open_etcd(address: EtcdAddress, *, filling: bool = False) -> EtcdStore:
    # Who keeps to SQLite does not pay for gRPC.
    from atoll.store.etcd.store import EtcdStore

    return await EtcdStore.open(address, filling=filling)
