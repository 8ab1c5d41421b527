"""Which API to call, and with which token: said outright, by the environment, or in a file that `atoll up` wrote.

A token from a file is used only for that file's address, so that naming another API never sends it a foreign token.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from atoll.model import codec
from atoll.model.errors import Invalid, Unauthenticated
from atoll.sdk.private_file import write_private
from atoll.sdk.transport import ADDRESS_DEFAULT, addresses_of

DATA_DEFAULT = Path("/var/lib/atoll")


class Saved(Struct, frozen=True, kw_only=True):
    """What `config.json` and `client.json` hold."""

    address: str
    token: str | None = None
    project: str | None = None
    ca: str | None = None
    """The cell's authority, PEM or pins; see `trust.Tls`."""


class Context(Struct, frozen=True, kw_only=True):
    """`source` says in words where the address came from."""

    address: str
    token: str | None
    project: str
    source: str
    ca: str | None = None


def config_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where the user's own context is kept: `$XDG_CONFIG_HOME/atoll/config.json`."""
    home = environment.get("XDG_CONFIG_HOME") or str(Path(environment.get("HOME") or "/root") / ".config")
    return Path(home) / "atoll" / "config.json"


def save(path: Path, saved: Saved) -> None:
    """Write `saved` for its owner alone, whole or not at all. Raises Unavailable."""
    write_private(path, codec.encode(saved) + b"\n")


def load(path: Path) -> Saved | None:
    """Return what `path` holds, None where there is no such file.

    Raises Invalid for a damaged file, Unauthenticated for one that the user may not read.
    """
    try:
        return codec.decode(path.read_bytes(), Saved)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise Unauthenticated(
            f"{path} may not be read by this user", mend="run as the user who ran `atoll up`, or set ATOLL_TOKEN"
        ) from None
    except Invalid as error:
        raise Invalid(f"{path}: {error}", mend="remove the file; `atoll up` writes DATA/client.json again") from None


def resolve(
    address: str | None = None,
    token: str | None = None,
    project: str | None = None,
    *,
    ca: str | None = None,
    environment: Mapping[str, str] = os.environ,
    data: Path | None = None,
) -> Context:
    """Return the context; what is given outright beats ATOLL_API, ATOLL_TOKEN, ATOLL_PROJECT and ATOLL_CA, and those the files."""
    source = "what was given"
    address = address or None
    if address is None and environment.get("ATOLL_API"):
        address, source = environment["ATOLL_API"], "ATOLL_API"
    token = token or environment.get("ATOLL_TOKEN") or None
    project = project or environment.get("ATOLL_PROJECT") or None
    ca = ca or environment.get("ATOLL_CA") or None
    if ca is not None:
        from atoll.sdk.trust import read_ca  # `ssl` takes 10 ms to import, and most addresses are plain ones of this machine

        ca = read_ca(ca)
    for path in (config_path(environment), (data or Path(environment.get("ATOLL_DATA") or DATA_DEFAULT)) / "client.json"):
        if address is not None and token is not None:
            break
        try:
            saved = load(path)
        except Unauthenticated:
            if address is None and token is None:
                raise
            continue
        if saved is not None and (address is None or set(addresses_of(address)) <= set(addresses_of(saved.address))):
            if address is None:
                address, source = saved.address, str(path)
            token = token or saved.token
            project = project or saved.project
            ca = ca or saved.ca
    return Context(address=address or ADDRESS_DEFAULT, token=token, project=project or "default", source=source, ca=ca)
