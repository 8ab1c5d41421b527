"""Names, digests and errors of the OCI distribution specification 1.1."""

from __future__ import annotations

import re

from atoll.model.errors import AtollError

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"(?P<project>[a-z](?:[-a-z0-9]{{0,38}}[a-z0-9])?)/(?P<name>{_COMPONENT})")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
NAME_CHARS_MAX = 128


class RegistryError(AtollError):
    """An error with the code that the distribution specification gives it."""

    def __init__(self, oci_code: str, status: int, message: str) -> None:
        super().__init__(message)
        self.oci_code = oci_code
        self.status = status


def check_repository(repository: str) -> str:
    """Return the project of a repository `PROJECT/NAME`. Raises RegistryError; what passes is safe as a path."""
    match = _REPOSITORY.fullmatch(repository)
    if match is None or len(repository) > NAME_CHARS_MAX:
        raise RegistryError("NAME_INVALID", 400, f"{repository[:80]!r} is not PROJECT/NAME")
    return match["project"]


def check_digest(digest: str) -> str:
    if _DIGEST.fullmatch(digest) is None:
        raise RegistryError("DIGEST_INVALID", 400, f"{digest[:80]!r} is not sha256:HEX; other digests are not taken")
    return digest


def is_digest(reference: str) -> bool:
    return ":" in reference


def check_tag(tag: str) -> str:
    if _TAG.fullmatch(tag) is None:
        raise RegistryError("TAG_INVALID", 400, f"{tag[:80]!r} is not a tag")
    return tag


def blob_unknown(digest: str) -> RegistryError:
    return RegistryError("BLOB_UNKNOWN", 404, f"no blob {digest} in this repository")


def manifest_unknown(reference: str) -> RegistryError:
    return RegistryError("MANIFEST_UNKNOWN", 404, f"no manifest {reference[:140]} in this repository")
