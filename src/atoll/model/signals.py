"""Signal names as users write them."""

from __future__ import annotations

import re
import signal

from atoll.model.errors import Invalid

_REALTIME = re.compile(r"SIGRTM(?P<end>IN|AX)(?:(?P<sign>[+-])(?P<offset>[0-9]{1,2}))?")


def signal_number(name: str) -> int:
    """Return the number of a signal such as `"SIGTERM"` or `"SIGRTMIN+3"`. Raises Invalid for an unknown name."""
    match = _REALTIME.fullmatch(name)
    if match is not None:
        base = signal.SIGRTMIN if match["end"] == "IN" else signal.SIGRTMAX
        number = int(base) + int((match["sign"] or "+") + (match["offset"] or "0"))
        if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
            return number
    elif name in signal.Signals.__members__:
        return int(signal.Signals[name])
    raise Invalid(f"{name!r} is not a signal", mend="write a name such as SIGTERM, SIGINT or SIGRTMIN+3")
