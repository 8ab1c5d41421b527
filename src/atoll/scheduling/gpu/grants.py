"""One node's devices, apart from any plan: what the next instance would be given of them, and how many fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from atoll.model.devices import GpuDevice, GpuGrant
from atoll.model.spec import Gpu
from atoll.scheduling.gpu.asks import ask_of
from atoll.scheduling.gpu.choose import choose
from atoll.scheduling.gpu.devices import Shape, State, shape_key, taken_by


def grant(devices: Sequence[GpuDevice], held: Iterable[GpuGrant], gpu: Gpu) -> tuple[GpuGrant, ...] | None:
    """Return what an instance gets of `devices` beside what is `held` already; None where they have no room for it."""
    state = _state(devices, held)
    ask = ask_of(gpu)
    chosen = choose(state, ask, ask.matching(state.shape))
    ids = [device.id for device in devices]
    return None if chosen is None else tuple(part.grant(ids) for part in chosen)


def fits(devices: Sequence[GpuDevice], held: Iterable[GpuGrant], gpu: Gpu) -> int:
    """Return how many instances that ask for `gpu` could be given their devices, one after the other."""
    state, ask, count = _state(devices, held), ask_of(gpu), 0
    matching = ask.matching(state.shape)
    while (chosen := choose(state, ask, matching)) is not None:
        state, count = state.take(chosen), count + 1
    return count


def _state(devices: Sequence[GpuDevice], held: Iterable[GpuGrant]) -> State:
    places = {device.id: place for place, device in enumerate(devices)}
    return Shape(*shape_key(devices)).bare.take(taken_by(places, held))
