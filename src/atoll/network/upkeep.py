"""When the firewall's rules are written again: where somebody has removed them, and until all of them are there."""

from __future__ import annotations

from collections.abc import Callable


class Upkeep:
    """Rules come in two transactions, and what the first leaves looks intact: whether the second was made is remembered here.

    `intact` says whether the rules that were written are there still; `write` writes them all.
    """

    def __init__(self, intact: Callable[[], bool], write: Callable[[], None]) -> None:
        self._intact = intact
        self._write = write
        self._whole = True

    def look(self) -> bool:
        """Return whether they had to be written again. Raises what `intact` and `write` raise; the next look tries again."""
        if self._whole:
            self._whole = self._intact()
            if self._whole:
                return False
        self._write()
        self._whole = True
        return True
