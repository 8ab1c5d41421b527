"""What a node shows to private registries: a file as `docker login`, `podman login` and `skopeo login` write it (`auths`).

It is read again when it has changed, since passwords of many registries live for hours. A change that cannot be read is logged, and
what was read last counts.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

import msgspec
import structlog

from atoll.images.auth import Access
from atoll.model.errors import Invalid

FILE_BYTES_MAX = 1 << 20
HUB = ("registry-1.docker.io", "index.docker.io", "docker.io")
"""What Docker writes as `https://index.docker.io/v1/`."""

log = structlog.get_logger()


class _Auth(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""
    registrytoken: str = ""


class _File(msgspec.Struct):
    auths: dict[str, _Auth] | None = None


class RegistryAuth:
    """Raises Invalid for a file that cannot be read, naming it, or whose entries have nothing that could be shown."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._written = self._stat()
        self._known = read(file)

    def __call__(self, host: str) -> Access | None:
        """Return how a registry is reached; None for one that the file does not name."""
        written = self._stat()
        if written != self._written:
            self._written = written
            try:
                self._known = read(self._file)
            except Invalid as error:
                log.warning("credentials of registries stay as they were read last", cause=error.message, mend=error.mend)
        return self._known.get(host)

    @property
    def known(self) -> dict[str, Access]:
        """Host → access, as it was read last."""
        return dict(self._known)

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = self._file.stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_ino, found.st_mtime_ns, found.st_size)


def read(file: Path) -> dict[str, Access]:
    """Return host → access. Raises Invalid, and quotes nothing of what is secret."""
    try:
        with file.open("rb") as opened:
            data = opened.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise Invalid(f"registry-auth: {file}: {error.strerror}", field="registry-auth") from None
    try:
        found = msgspec.json.decode(data, type=_File).auths
    except (msgspec.DecodeError, UnicodeDecodeError):
        mend = "write it with: skopeo login --authfile FILE HOST"
        raise Invalid(f"registry-auth: {file} is no file of credentials in JSON", field="registry-auth", mend=mend) from None
    if found is None:
        mend = "credential helpers are not asked; write passwords into it: skopeo login --authfile FILE HOST"
        raise Invalid(f"registry-auth: {file} has no auths", field="registry-auth", mend=mend)
    known: dict[str, Access] = {}
    useless: list[Invalid] = []
    for name, auth in found.items():
        try:
            access = _access(file, name, auth)
        except Invalid as error:
            # Docker writes such entries beside good ones: for what a credential helper keeps.
            useless.append(error)
            log.warning("credentials that cannot be shown", cause=error.message, mend=error.mend)
        else:
            known.update(dict.fromkeys(_hosts(name), access))
    if useless and not known:
        raise useless[0]
    return known


def _hosts(name: str) -> tuple[str, ...]:
    host = name.removeprefix("https://").removeprefix("http://").partition("/")[0].lower()
    return HUB if host in HUB else (host,)


def _access(file: Path, name: str, auth: _Auth) -> Access:
    user, password = auth.username, auth.password
    if auth.registrytoken:
        return Access(token=auth.registrytoken)
    if auth.auth:
        try:
            user, colon, password = base64.b64decode(auth.auth, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            colon = ""
        if not colon:
            raise Invalid(f"registry-auth: {file}: auths.{name}.auth is no USER:PASSWORD in base64", field="registry-auth")
    if not user or not password:
        mend = f"credential helpers are not asked; write a password into it: skopeo login --authfile {file} {name}"
        raise Invalid(f"registry-auth: {file}: auths.{name} has no user and password", field="registry-auth", mend=mend)
    return Access(username=user, password=password)
