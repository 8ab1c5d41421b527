"""Envoy's files are kept to a size: Envoy itself lets them grow for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog

from atoll.ingress.admin import EnvoyAdmin
from atoll.model.errors import Unavailable

LOG_BYTES_MAX = 64 << 20
"""Of each file; one older file of that size is kept beside it."""
PERIOD_S = 5.0
"""At 10,000 requests a second some 20 MB are written meanwhile, by which a file may be over its size."""

log = structlog.get_logger()


def too_large(paths: Sequence[Path], bytes_max: int) -> list[Path]:
    """Return those of `paths` that have grown over `bytes_max`."""
    return [path for path in paths if path.exists() and path.stat().st_size > bytes_max]


async def keep_bounded(
    paths: Sequence[Path], admin: EnvoyAdmin, *, bytes_max: int = LOG_BYTES_MAX, period_s: float = PERIOD_S
) -> None:
    """Move each file that is too large aside, over the one before it, and have Envoy begin a new one. Never returns."""
    while True:
        await asyncio.sleep(period_s)
        try:
            full = too_large(paths, bytes_max)
            for path in full:
                path.replace(path.with_suffix(path.suffix + ".1"))
            if full:
                await admin.post("/reopen_logs")
        except (OSError, Unavailable) as error:
            log.warning("ingress.logs-not-rotated", message=str(error))
