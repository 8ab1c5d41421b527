"""The API's errors back into our classes."""

from __future__ import annotations

from typing import TypeVar

from atoll.model import codec, errors
from atoll.model.streams import ErrorBody
from atoll.model.views import ErrorAnswer
from atoll.sdk.transport import Answer

T = TypeVar("T")

_BY_STATUS: dict[int, type[errors.AtollError]] = {
    400: errors.Invalid,
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    405: errors.NotFound,
    409: errors.Conflict,
    410: errors.Compacted,
    413: errors.TooLarge,
    422: errors.Unsupported,
    429: errors.Exhausted,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.DeadlineExceeded,
}
_WHERE = "run this where `atoll up` runs, as the same user, and after `atoll up --data D` with ATOLL_DATA=D"
_TOKEN_MEND = f"give a token: ATOLL_TOKEN=…, or {_WHERE}"


def from_body(body: ErrorBody) -> errors.AtollError:
    """Return the error that an answer or a stream carries; an unknown code becomes the general class."""
    error = body.error()
    if type(error) is errors.Unauthenticated:
        error.mend = _TOKEN_MEND
    return error


def from_answer(status: int, body: bytes) -> errors.AtollError:
    """Return the error in an answer of 400 or above, whoever gave it: a proxy in between does not speak our JSON."""
    try:
        return from_body(codec.decode(body, ErrorAnswer).error)
    except errors.Invalid:
        cls = _BY_STATUS.get(status, errors.AtollError)
        text = body[:200].decode("utf-8", "replace").strip().replace("\n", " ")
        return cls(f"the API answered {status}{': ' + text if text else ''}", mend=_TOKEN_MEND if status == 401 else None)


def read(answer: Answer, kind: type[T]) -> T:
    """Return the record in a good answer; raise the error in any other."""
    check(answer)
    try:
        return codec.decode_known(answer.body, kind)
    except errors.Invalid as error:
        raise errors.AtollError(
            f"the API's answer is not what this version understands: {error}", mend="use an `atoll` of the server's version"
        ) from None


def check(answer: Answer) -> None:
    """Raise the error in an answer whose body does not matter when it is good."""
    if answer.status >= 400:
        raise from_answer(answer.status, answer.body)
