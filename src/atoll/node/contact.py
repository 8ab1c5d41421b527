"""When this node was last known to be heard by the control plane; kept across restarts of the agent, not of the machine.

Measured by the sender's clock from when it spoke, not from when the answer came: whoever counts from when they heard it counts
from later, so that the node is never the last to know that it is cut off.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Contact:
    """`file` keeps it; without one it is forgotten with this object. Times are monotonic, and so those of one boot."""

    def __init__(self, file: Path | None = None, boot_id: str | None = None) -> None:
        self._file = file
        self._boot_id = boot_id if boot_id is not None else _boot_id()
        self._saved: float | None = None
        self.at: float | None = None
        """None: never, as far as anyone knows."""

    def load(self, monotonic: float) -> None:
        """Take over what an earlier agent of this boot knew; what cannot be read, or is from another boot, counts as never."""
        with contextlib.suppress(OSError, ValueError):
            boot_id, _, at = self._read().strip().partition(" ")
            if boot_id == self._boot_id and float(at) <= monotonic:
                self.at = float(at)

    def prove(self, sent_at: float) -> None:
        """Take in that what was sent at `sent_at` has been heard."""
        if self.at is None or sent_at > self.at:
            self.at = sent_at

    def save(self) -> None:
        """Write it down, if it has changed. Not synced: what it is for does not outlive the machine either."""
        if self.at is None or self.at == self._saved:
            return
        with contextlib.suppress(OSError):  # a full disk makes the next agent more careful, and nothing worse
            self._write(f"{self._boot_id} {self.at:.3f}\n")
            self._saved = self.at

    def _read(self) -> str:
        return self._file.read_text() if self._file is not None else ""

    def _write(self, text: str) -> None:
        if self._file is not None:
            new = self._file.with_name(self._file.name + ".new")
            new.write_text(text)
            new.replace(self._file)

    def cut_off_s(self, monotonic: float) -> float:
        """Return for how long nobody is known to have heard this node."""
        return float("inf") if self.at is None else max(0.0, monotonic - self.at)


def _boot_id() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"
