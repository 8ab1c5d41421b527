"""One tree of errors. Each class has a stable `code`, an HTTP status for the API's edge, and says whether a retry is safe.

Expected answers (does not fit, over quota) are values, not errors.
"""

from __future__ import annotations

import enum


class Retry(enum.StrEnum):
    """Whether the same call may be made again."""

    NEVER = "never"
    SAFE = "safe"
    OUTCOME_UNKNOWN = "outcome-unknown"


class AtollError(Exception):
    """Something went wrong, and `str(error)` names the cause; `mend` says what would help.

    `field` is the path of the offending input (`resources.memory`), where there is one.
    """

    code = "internal"
    status = 500
    retry = Retry.NEVER

    def __init__(self, message: str, *, mend: str | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.mend = mend
        self.field = field

    @property
    def message(self) -> str:
        return str(self)


class Invalid(AtollError):
    """The input breaks a rule; nothing was changed."""

    code = "invalid"
    status = 400


class Unauthenticated(AtollError):
    """No token, or one that is not known, or has expired."""

    code = "unauthenticated"
    status = 401


class Forbidden(AtollError):
    """The token is good, but its role or project does not allow this."""

    code = "forbidden"
    status = 403


class Revoked(Forbidden):
    """The node or ingress was revoked: whatever it holds counts for nothing until an operator lets it join again."""

    code = "revoked"


class NotFound(AtollError):
    """There is no such thing."""

    code = "not-found"
    status = 404


class Conflict(AtollError):
    """The thing exists already, or has changed since it was read; read again before the next try."""

    code = "conflict"
    status = 409


class StaleRevision(Conflict):
    """A conditional write named a revision that is no longer the newest; nothing was written."""

    code = "stale-revision"
    retry = Retry.SAFE


class Fenced(Conflict):
    """The caller no longer holds the lease that its write was made under; nothing was written."""

    code = "fenced"


class Compacted(AtollError):
    """The revision asked for is older than what the store still holds; list, then watch from there."""

    code = "compacted"
    status = 410
    retry = Retry.SAFE


class TooLarge(AtollError):
    """The input is over a named bound."""

    code = "too-large"
    status = 413


class Exhausted(AtollError):
    """A bounded pool, queue or quota is full; try again later or raise the bound."""

    code = "exhausted"
    status = 429
    retry = Retry.SAFE


class Unsupported(AtollError):
    """This runtime or machine cannot do that; the message says which can."""

    code = "unsupported"
    status = 422


class VersionSkew(Unsupported):
    """The two sides speak versions of the API that are too far apart; nothing was done."""

    code = "version-skew"


class Unavailable(AtollError):
    """A part that is needed does not answer; nothing was changed."""

    code = "unavailable"
    status = 503
    retry = Retry.SAFE


class DeadlineExceeded(AtollError):
    """It took longer than its deadline; what was begun has been undone or will be."""

    code = "deadline-exceeded"
    status = 504
    retry = Retry.SAFE


class OutcomeUnknown(AtollError):
    """A write may or may not have happened; read before trying again."""

    code = "outcome-unknown"
    status = 500
    retry = Retry.OUTCOME_UNKNOWN


class Corrupt(AtollError):
    """Stored data fails its check (a digest, a database page); it was not used."""

    code = "corrupt"
    status = 500


class ImageError(AtollError):
    """An image cannot be had: absent, refused, damaged or not for this machine."""

    code = "image"
    status = 422


class RuntimeFailed(AtollError):
    """The runtime's tool failed; the message carries its own words."""

    code = "runtime-failed"
    status = 500


class CommandNotFound(RuntimeFailed):
    """There is no such command in the instance, or its interpreter is missing; it did not run."""

    code = "command-not-found"


BY_CODE: dict[str, type[AtollError]] = {}


def _index(cls: type[AtollError]) -> None:
    BY_CODE[cls.code] = cls
    for child in cls.__subclasses__():
        _index(child)


_index(AtollError)
