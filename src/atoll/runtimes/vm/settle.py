"""Puts what was made beside its place into it, where another start may have made the same meanwhile."""

from __future__ import annotations

from pathlib import Path


def settle(made: Path, place: Path) -> None:
    """Rename the directory `made` to `place`; one that is there already is as good, and stays. Raises OSError."""
    try:
        made.rename(place)
    except OSError:
        if not place.is_dir():
            raise
