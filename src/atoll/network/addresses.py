"""Which addresses of a subnet are free: pure bookkeeping, so that none leaks or is given twice."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from atoll.model.errors import Exhausted, Invalid
from atoll.model.fabric import PREFIX_MAX, PREFIX_MIN


class AddressPool:
    """The host numbers of one IPv4 subnet, given out in turn, so that a freed address comes back as late as possible.

    Number 0 is the network, 1 the node itself, and the last one the broadcast address; none of them is ever given out.
    """

    def __init__(self, subnet: str) -> None:
        """Raises Invalid for what is not a network such as `10.64.0.0/16`, from /8 to /29."""
        try:
            self.network = ipaddress.IPv4Network(subnet)
        except ValueError as error:
            raise Invalid(f"subnet: {error}", field="subnet", mend="write a network such as 10.64.0.0/16") from None
        if not PREFIX_MIN <= self.network.prefixlen <= PREFIX_MAX:
            raise Invalid(f"subnet: /{self.network.prefixlen} is not between /{PREFIX_MIN} and /{PREFIX_MAX}", field="subnet")
        self._first = 2
        self._end = self.network.num_addresses - 1
        self._next = self._first
        self._used: set[int] = set()

    @property
    def node_address(self) -> str:
        """The address that the node uses towards its instances."""
        return self.address(1)

    @property
    def size(self) -> int:
        """How many instances the subnet has room for."""
        return self._end - self._first

    @property
    def used(self) -> int:
        return len(self._used)

    def address(self, number: int) -> str:
        return str(self.network.network_address + number)

    def take(self) -> int:
        """Return a number that nobody has. Raises Exhausted when there is none."""
        if len(self._used) >= self.size:
            raise Exhausted(
                f"all {self.size} addresses of {self.network} are in use",
                mend="stop instances, or give this node a larger subnet",
            )
        while self._next in self._used:
            self._next = self._first if self._next + 1 >= self._end else self._next + 1
        number = self._next
        self._used.add(number)
        self._next = self._first if number + 1 >= self._end else number + 1
        return number

    def claim(self, numbers: Iterable[int]) -> None:
        """Mark `numbers` as used, as they were found to be; those outside the subnet's range are ignored."""
        self._used.update(number for number in numbers if self._first <= number < self._end)

    def go_on_after(self, number: int) -> None:
        """Give out what comes after `number` next, as an earlier pool would have; ignored outside the subnet's range."""
        if self._first <= number < self._end:
            self._next = self._first if number + 1 >= self._end else number + 1

    def give_back(self, number: int) -> None:
        """Make `number` free again. Safe to repeat."""
        self._used.discard(number)
