"""Machines that boot again and again: none may hang. Long: run by `-m soak`."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from runtime_world import make_layer, real_world

BOOTS = 200
BOOT_S_MAX = 300.0
"""What took longer hung. An emulated machine needs some 2 s of a core, and may wait long for them where much else runs."""


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.system
async def test_200_cold_boots_in_a_row_all_run_and_end(tmp_path: Path) -> None:
    world = real_world("qemu", tmp_path, make_layer(tmp_path / "image"))
    took_ms: list[float] = []
    world.runtime.boot_s_max = BOOT_S_MAX  # type: ignore[attr-defined]
    try:
        for at in range(BOOTS):
            began = time.perf_counter()
            async with asyncio.timeout(BOOT_S_MAX):
                await world.launch(f"boot{at}", "exit", "7")
            took_ms.append((time.perf_counter() - began) * 1000)
            assert (await asyncio.wait_for(world.runtime.wait(f"boot{at}"), BOOT_S_MAX)).code == 7
            await world.runtime.delete(f"boot{at}")
    finally:
        await world.close()
    ordered = sorted(took_ms)
    p50, p99, most = ordered[BOOTS // 2], ordered[BOOTS * 99 // 100], ordered[-1]
    print(f"{len(ordered)} boots, p50 {p50:.0f} ms, p99 {p99:.0f} ms, most {most:.0f} ms")
