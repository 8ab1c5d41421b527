"""The one place that knows the compiler of the kernels; importing it costs memory, so only what needs kernels does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile `function` to machine code at its first call, and keep the result beside the source for the next process."""
    return cast(F, numba.njit(cache=True)(function))
