"""The text form of Cap'n Proto, in which workerd is configured. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence


def quoted(text: str) -> str:
    """Return `text` as a literal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", escaped) + '"'


def service(name: str, what: str) -> str:
    """Return one of workerd's services."""
    return f"(name = {quoted(name)}, {what})"


def listed(name: str, items: Sequence[str]) -> str:
    """Return a field that is a list, one item a line."""
    return f"  {name} = [\n    " + ",\n    ".join(items) + "\n  ]," if items else f"  {name} = [],"
