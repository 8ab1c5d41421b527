"""Rules that are gone, or half there, are written again until they are whole."""

from __future__ import annotations

import errno

import pytest

from atoll.model.errors import RuntimeFailed
from atoll.network.upkeep import Upkeep


class Kernel:
    """Has what the two transactions have made; the next `failures` of the second fail."""

    def __init__(self, *failures: Exception) -> None:
        self.first = self.second = True
        self.failures = list(failures)
        self.written = 0

    def intact(self) -> bool:
        return self.first

    def write(self) -> None:
        self.written += 1
        self.first, self.second = True, False  # the first replaces the whole table
        if self.failures:
            raise self.failures.pop(0)
        self.second = True


@pytest.mark.parametrize("error", [RuntimeFailed("busy"), OSError(errno.ENOBUFS, "no room"), TimeoutError("no answer")])
def test_rules_whose_second_half_was_refused_are_written_again_until_it_is_there(error: Exception) -> None:
    kernel = Kernel(error, error)
    upkeep = Upkeep(kernel.intact, kernel.write)
    kernel.first = False  # somebody flushed them
    for _ in range(2):
        with pytest.raises(type(error)):
            upkeep.look()
        assert kernel.first
    assert upkeep.look()
    assert kernel.second
    assert kernel.written == 3


def test_rules_that_are_whole_are_left_alone_and_seen_when_they_go_again() -> None:
    kernel = Kernel()
    upkeep = Upkeep(kernel.intact, kernel.write)
    assert not upkeep.look()
    for _ in range(2):
        kernel.first = kernel.second = False
        assert upkeep.look()
        assert kernel.second
        assert not upkeep.look()
    assert kernel.written == 2
