"""URLs that people give us: of Prometheus servers, of authorities, of collectors. One place says which are refused. Pure."""

from __future__ import annotations

from urllib.parse import urlsplit

from msgspec import Struct

from atoll.model.errors import Invalid

PORTS = {"http": 80, "https": 443}
SHOWN_CHARS = 80


class Url(Struct, frozen=True, kw_only=True):
    """`port` is None where the URL has none."""

    scheme: str
    host: str
    port: int | None
    path: str


def url_of(
    text: str, *, what: str, field: str, mend: str, schemes: tuple[str, ...] = ("http", "https"), query: bool = False
) -> Url:
    """Return the parts of a URL. Raises Invalid, which begins with `what`, and never shows what may hold a password.

    Refused are other schemes, user and password (a spec is read by many, and so is a log), a query unless `query` allows it, a
    fragment, ports that there are not, spaces and control characters.
    """

    def refused(why: str) -> Invalid:
        shown = "" if "@" in text else f"{text[:SHOWN_CHARS]!r}: "
        return Invalid(f"{what}: {shown}{why}", field=field, mend=mend)

    if any(char <= " " or char == "\x7f" for char in text):
        raise refused("a URL has no spaces and control characters")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise refused("not a URL" if "@" in text else f"not a URL: {error}") from None
    if parts.scheme not in schemes or not parts.hostname:
        raise refused(f"not a URL that begins with {' or '.join(f'{scheme}://HOST' for scheme in schemes)}")
    if "@" in parts.netloc:
        raise refused("user and password have no place in it")
    if port == 0:
        raise refused("there is no port 0")
    if parts.fragment or (parts.query and not query):
        raise refused("without a fragment" if query else "without query and fragment")
    return Url(scheme=parts.scheme, host=parts.hostname, port=port, path=parts.path)
