"""What an image is called: `[HOST/]REPOSITORY[:TAG][@sha256:…]`, by the grammar of the OCI distribution specification."""

from __future__ import annotations

import re

from msgspec import Struct

from atoll.model.errors import ImageError

CELL_HOST = "cell.internal"
"""The host that stands for the cell's own registry; each node maps it to its API's address."""

REFERENCE_LENGTH_MAX = 512

_HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?"
)
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Reference(Struct, frozen=True):
    """A parsed reference; it has a tag or a digest or both, and then the digest decides."""

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"

    @property
    def version(self) -> str:
        """What the registry is asked for."""
        return self.digest or self.tag or "latest"


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def parse(text: str, *, default_registry: str | None = None) -> Reference:
    """Return the reference that `text` writes; without tag and digest the tag is `latest`.

    A name without a host is looked up in `default_registry` (`HOST[:PORT][/PREFIX]`). Raises ImageError with the mend.
    """
    if not text or len(text) > REFERENCE_LENGTH_MAX:
        raise _bad(text, f"must have 1 to {REFERENCE_LENGTH_MAX} characters")
    name, _, digest = text.partition("@")
    if digest and not is_digest(digest):
        raise _bad(text, "the digest must be 'sha256:' and 64 hexadecimal digits")
    if "@" in text and not digest:
        raise _bad(text, "there is no digest after '@'")
    tag: str | None = None
    if ":" in name.rpartition("/")[2]:
        name, _, tag = name.rpartition(":")
        if _TAG.fullmatch(tag) is None:
            raise _bad(text, f"{tag!r} is not a tag")
    first, slash, rest = name.partition("/")
    if slash and (first == "localhost" or "." in first or ":" in first):
        host, repository = first, rest
    else:
        host, repository = _without_host(text, name, default_registry)
    if _HOST.fullmatch(host) is None:
        raise _bad(text, f"{host!r} is not a host")
    if _REPOSITORY.fullmatch(repository) is None:
        mend = "names are in lower case" if repository.lower() != repository else None
        raise _bad(text, f"{repository!r} is not a repository name", mend)
    return Reference(host.lower(), repository, tag or (None if digest else "latest"), digest or None)


def _without_host(text: str, name: str, default_registry: str | None) -> tuple[str, str]:
    if not default_registry:
        raise ImageError(
            f"image {text!r} names no registry, and this node has no default",
            mend="write HOST/NAME, or start the node with --default-registry",
            field="image",
        )
    host, _, prefix = default_registry.strip("/").partition("/")
    return host, f"{prefix}/{name}" if prefix and "/" not in name else name


def _bad(text: str, why: str, mend: str | None = None) -> ImageError:
    return ImageError(
        f"image {text[:80]!r} is not a reference: {why}",
        mend=mend or "write HOST/NAME:TAG or HOST/NAME@sha256:…",
        field="image",
    )
