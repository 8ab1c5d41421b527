"""How much a machine may do with its disk and its network: token buckets, which both monitors with an HTTP API know alike."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

REFILL_MS = 100


class Rates(Struct, frozen=True, kw_only=True):
    """Per second and machine, of each direction of its network; 0 is no limit."""

    disk_bytes: int = 0
    disk_operations: int = 0
    net_bytes: int = 0
    net_packets: int = 0


def limiter(bytes_per_s: int, operations_per_s: int) -> dict[str, Any]:
    """Return the monitors' `RateLimiter` of a size for REFILL_MS; empty for no limit."""
    buckets = {"bandwidth": bytes_per_s, "ops": operations_per_s}
    return {
        name: {"size": max(1, rate * REFILL_MS // 1000), "refill_time": REFILL_MS} for name, rate in buckets.items() if rate > 0
    }


def with_limiter(body: dict[str, Any], key: str, bytes_per_s: int, operations_per_s: int) -> dict[str, Any]:
    """Return `body`, with a limiter at `key` where there is one."""
    found = limiter(bytes_per_s, operations_per_s)
    return body | {key: found} if found else body
