"""`atoll store`: the cell's state as a whole, on the machine where it lies; these commands call no API."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atoll.cli.session import Session, command, group
from atoll.cli.up import TLS_OPTIONS

if TYPE_CHECKING:
    from atoll.store.migrate import Filled
    from atoll.store.place import Place

PLACE = "sqlite:PATH or etcd://HOST:PORT,…"


def _tls(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(TLS_OPTIONS):
        function = option(function)
    return function


def _at(function: Callable[..., Any]) -> Callable[..., Any]:
    default = "ATOLL_STORE, else the file of `atoll up`"
    return click.option("--store", "place", metavar="PLACE", help=f"{PLACE}  [default: {default}]")(_tls(function))


@group(
    example="atoll store backup /backup/cell-1.atoll\n"
    "atoll store migrate --from sqlite:/var/lib/atoll/server/state.db --to etcd://10.0.0.1,10.0.0.2,10.0.0.3"
)
def store() -> None:
    """Move the cell's state to another store; back it up, restore and check it.

    A user of etcd comes from ATOLL_STORE_USER and ATOLL_STORE_PASSWORD_FILE (or ATOLL_STORE_PASSWORD). The key that seals secrets
    (DATA/server/key) is no part of the store: keep it, and give it to every server.
    """


@command(example="atoll store migrate --from sqlite:/var/lib/atoll/server/state.db --to etcd://10.0.0.1,10.0.0.2,10.0.0.3")
@click.option("--from", "source", metavar="PLACE", required=True, help=f"{PLACE}; every server must be stopped.")
@click.option("--to", "target", metavar="PLACE", required=True, help=f"{PLACE}; it must be empty.")
@_tls
async def migrate(session: Session, source: str, target: str, **files: Path | None) -> None:
    """Copy everything into an empty store of another kind, and compare it to the last byte. The old store stays as it is.

    Revisions are counted anew on etcd; whoever watches is told to list again.
    """
    from atoll.store import migrate as moving
    from atoll.store.place import name_of

    places = _place(source, files), _place(target, files)
    with session.output.err.status("copying"):
        done = await moving.migrate(*places)
    _say_filled(session, done, name_of(places[0]), name_of(places[1]))


@command(example="atoll store backup /backup/cell-1.atoll\natoll store backup cell.atoll --store etcd://10.0.0.1,10.0.0.2")
@click.argument("file", type=click.Path(path_type=Path))
@_at
async def backup(session: Session, file: Path, place: str | None, **files: Path | None) -> None:
    """Write the state at one moment into a new FILE (mode 0600), while servers go on."""
    import time

    from atoll.store.backup import write_backup
    from atoll.store.migrate import snapshot_of
    from atoll.store.place import name_of

    where = _place(place, files)
    with session.output.err.status("reading"):
        async with snapshot_of(where, offline=False) as snapshot:
            digest = await write_backup(snapshot, file, now=time.time())
            revision = snapshot.revision
    if session.json:
        session.output.json({"file": str(file), "store": name_of(where), "revision": revision, "content": digest})
        return
    session.output.say(f"[green]✓[/] {file}: {digest.items} records, {file.stat().st_size} bytes, revision {revision}")


@command(example="atoll store restore /backup/cell-1.atoll --store sqlite:/var/lib/atoll/server/state.db")
@click.argument("file", type=click.Path(path_type=Path))
@_at
async def restore(session: Session, file: Path, place: str | None, **files: Path | None) -> None:
    """Fill an empty store from FILE. All of FILE is checked before anything is written. Servers must be stopped."""
    from atoll.store.backup import BackupSnapshot
    from atoll.store.migrate import fill
    from atoll.store.place import name_of

    where = _place(place, files)
    with session.output.err.status("checking and copying"):
        done = await fill(where, BackupSnapshot.open(file))
    _say_filled(session, done, str(file), name_of(where))


@command(example="atoll store check\natoll store check /backup/cell-1.atoll\natoll store check --store etcd://10.0.0.1")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@_at
async def check(session: Session, file: Path | None, place: str | None, **files: Path | None) -> None:
    """Read every record of a store, or of a backup FILE, and say what is wrong with it. Changes nothing; servers go on."""
    from atoll.api.service import KINDS
    from atoll.model.errors import Corrupt
    from atoll.store.check import check_backup, check_store
    from atoll.store.place import name_of

    with session.output.err.status("reading"):
        if file is not None:
            name, found = str(file), await check_backup(file, KINDS)
        else:
            where = _place(place, files)
            name, found = name_of(where), await check_store(where, KINDS)
    if session.json:
        session.output.json({"store": name, "found": found})
    else:
        lines = (f"{kind} {count}" for kind, count in sorted(found.kinds.items()))
        session.output.say(f"{name}: {found.content.items} records of {found.content.bytes} bytes, revision {found.revision}")
        for line in (*found.members, *lines):
            session.output.say(f"  {line}")
    if found.broken:
        names = ", ".join(found.broken[:5])
        raise Corrupt(
            f"{found.broken_count} records cannot be read: {names}", mend="use the Atoll that wrote them, or restore a backup"
        )


@command(name="forget-key", example="atoll store forget-key --yes")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_at
async def forget_key(session: Session, yes: bool, place: str | None, **files: Path | None) -> None:
    """Let the cell take a new key, because the old one is lost for good. Every server must be stopped.

    The next server that starts makes the new key. Secrets and certificates from files must be set again, the ACME authority chosen
    again, and machines that joined must join again: what the lost key sealed can be opened by nobody.
    """
    from atoll.model import keys
    from atoll.model.ports.clock import SystemClock
    from atoll.model.ports.store import Delete
    from atoll.store.place import name_of, open_place

    where = _place(place, files)
    if not yes:
        click.confirm("Secrets and certificate authorities that the lost key sealed end for good. Go on?", abort=True, err=True)
    opened = await open_place(where, SystemClock())
    try:
        sealed = (keys.AUTHORITIES, keys.IDENTITIES, keys.CERTIFICATE_STATUSES, keys.CERTIFICATE_ROOTS, keys.ACME_SETTINGS)
        ops = [Delete(keys.CELL_KEY), *(Delete(prefix, prefix=True) for prefix in sealed)]
        await opened.txn((), ops)
    finally:
        await opened.close()
    if session.json:
        session.output.json({"forgotten": name_of(where)})
    else:
        session.output.say(f"[green]✓[/] {name_of(where)} takes the key of the next server that starts")


def _place(text: str | None, files: dict[str, Any]) -> Place:
    from atoll.entry.config import DATA_DEFAULT, Config

    data = Path(os.environ.get("ATOLL_DATA") or DATA_DEFAULT)
    return Config(data=data, store=text or "", **files).store_place


def _say_filled(session: Session, done: Filled, source: str, target: str) -> None:
    if session.json:
        session.output.json({"from": source, "to": target, "filled": done})
        return
    session.output.say(
        f"[green]✓[/] {done.content.items} records of {done.content.bytes} bytes are in {target}, compared;"
        f" revision {done.from_revision} there is {done.to_revision} here"
    )


for _each in (migrate, backup, restore, check, forget_key):
    store.add_command(_each)
