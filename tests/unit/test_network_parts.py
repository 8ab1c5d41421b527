"""The parts of the network that are pure: addresses, resolvers, rules, and the pool's way with a kernel that fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.model import codec
from atoll.model.errors import Exhausted, Invalid, RuntimeFailed, Unavailable
from atoll.model.spec import Port, PortProtocol
from atoll.network import firewall, resolvers
from atoll.network.addresses import AddressPool
from atoll.network.ledger import JOURNAL, LINES_SPARE, Entry, Ledger
from atoll.network.pool import SlotPool
from atoll.network.slots import Slot
from atoll.network.together import TOGETHER_MAX, Together


@given(st.lists(st.one_of(st.none(), st.integers(0, 40)), max_size=120))
def test_no_address_is_given_twice_or_lost(steps: list[int | None]) -> None:
    pool, held = AddressPool("10.0.0.0/28"), set()
    for step in steps:
        if step is not None:
            held.discard(step)
            pool.give_back(step)
        elif len(held) < pool.size:
            number = pool.take()
            assert number not in held
            assert 2 <= number <= 14
            held.add(number)
        else:
            with pytest.raises(Exhausted):
                pool.take()
        assert pool.used == len(held)


def test_a_freed_address_comes_back_as_late_as_possible() -> None:
    pool = AddressPool("10.0.0.0/29")
    first = pool.take()
    pool.give_back(first)
    assert [pool.take() for _ in range(5)][-1] == first


def test_a_freed_address_comes_back_as_late_as_possible_after_a_restart_too(tmp_path: Path) -> None:
    ledger, pool = Ledger(tmp_path), AddressPool("10.0.0.0/29")
    assert ledger.last() is None
    for number in [pool.take() for _ in range(3)]:
        ledger.write([Entry(id=f"i{number}", project="p", number=number)], handed_out=True)
        ledger.remove([number])
    ledger.close()
    later = Ledger(tmp_path)
    assert later.load() == []
    last = later.last()
    assert last == 4
    later.compact()
    again_later = Ledger(tmp_path)
    assert again_later.load() == []
    assert again_later.last() == 4
    again = AddressPool("10.0.0.0/29")
    again.claim([2])
    again.go_on_after(last)
    assert [again.take() for _ in range(4)] == [5, 6, 3, 4]


@pytest.mark.parametrize("last", [-1, 0, 1, 7, 10**9])
def test_a_number_that_is_none_of_the_subnet_changes_nothing(last: int) -> None:
    pool = AddressPool("10.0.0.0/29")
    pool.go_on_after(last)
    assert pool.take() == 2


@pytest.mark.parametrize("subnet", ["", "10.0.0.0", "10.0.0.0/30", "10.0.0.1/24", "::/64", "10.0.0.0/4", "300.0.0.0/8"])
def test_a_subnet_that_is_none_is_refused_with_its_field(subnet: str) -> None:
    with pytest.raises(Invalid) as caught:
        AddressPool(subnet)
    assert caught.value.field == "subnet"


def test_loopback_resolvers_are_replaced_by_those_behind_them() -> None:
    stub = "nameserver 127.0.0.53\noptions edns0\nsearch home\n"
    real = "# made by systemd\nnameserver 192.0.2.1 # first\nnameserver fe80::1%eth0\nnameserver 192.0.2.1\nsearch home lan\n"
    found = resolvers.parse([stub, real])
    assert found.servers == ("192.0.2.1",)
    assert found.text == "nameserver 192.0.2.1\nsearch home lan\n"


@given(st.text(max_size=200))
def test_no_resolv_conf_breaks_the_parser(text: str) -> None:
    resolvers.parse([text, "nameserver " + text])


def test_rules_do_not_grow_with_instances() -> None:
    few, many = (
        firewall.ruleset(
            table="t",
            prefix="at",
            subnet="10.0.0.0/8",
            node_address="10.0.0.1",
            resolvers=(),
            elements=[firewall.add("t", "inbound", firewall.inbound("10.0.0.2", ports))],
        )
        for ports in ([], [Port(name=f"p{n}", port=n + 1, protocol=PortProtocol.TCP) for n in range(500)])
    )
    assert few.count("\n") == many.count("\n")


def test_a_damaged_ledger_entry_counts_as_absent(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write([Entry(id="a", project="p", number=3, ports=(Port(port=80),))])
    ledger.close()
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"entry": {"id": "b", "proj')  # the machine lost power
    later = Ledger(tmp_path)
    assert [entry.id for entry in later.load()] == ["a"]
    later.write([Entry(id="c", project="p", number=5)])
    assert [entry.id for entry in Ledger(tmp_path).load()] == ["a", "c"]
    later.close()


def test_what_agents_with_a_file_for_each_slot_kept_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "3.json").write_bytes(codec.encode(Entry(id="a", project="p", number=3)))
    (tmp_path / "last").write_text("7")
    ledger = Ledger(tmp_path)
    assert [entry.id for entry in ledger.load()] == ["a"]
    ledger.compact()
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL]
    later = Ledger(tmp_path)
    assert ([entry.id for entry in later.load()], later.last()) == (["a"], 7)


def test_the_ledger_stays_small_however_many_come_and_go(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write([Entry(id="stays", project="p", number=2)], handed_out=True)
    for number in range(3, 3 + 2 * LINES_SPARE):
        ledger.write([Entry(id=f"i{number}", project="p", number=number)], handed_out=True)
        ledger.remove([number])
    ledger.close()
    assert len((tmp_path / JOURNAL).read_bytes().splitlines()) <= LINES_SPARE + 10
    assert [entry.id for entry in Ledger(tmp_path).load()] == ["stays"]


async def test_what_is_asked_for_in_one_moment_is_done_together_and_one_refusal_spoils_nothing() -> None:
    calls: list[list[int]] = []

    def work(many: Sequence[int]) -> None:
        calls.append(list(many))
        if 2 in many:
            raise Unavailable("not this one")

    lost: list[int] = []
    together = Together(work, lost.append)
    answers = await asyncio.gather(*(together.ask(number) for number in range(4)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [type(None), type(None), Unavailable, type(None)]
    assert calls == [[0, 1, 2, 3], [0], [1], [2], [3]]
    gone = together.ask(2)
    gone.cancel()
    await together.ask(5)
    assert lost == [2]
    calls.clear()
    await asyncio.gather(*(together.ask(number) for number in range(10, 10 + TOGETHER_MAX + 1)))
    assert [len(many) for many in calls] == [TOGETHER_MAX, 1]


class Kernel:
    """Makes slots in memory; `refuse` so many times."""

    def __init__(self, refuse: int = 0) -> None:
        self.refuse = refuse
        self.refuse_removal = 0
        self.slots: set[int] = set()
        self.may_make = threading.Event()
        self.may_make.set()

    def make(self, number: int) -> Slot:
        self.may_make.wait(5)
        if self.refuse:
            self.refuse -= 1
            raise RuntimeFailed("the kernel refused")
        self.slots.add(number)
        return Slot(number, f"10.0.0.{number}", f"at{number}", number, Path(f"/run/netns/{number}"))

    def remove(self, numbers: Sequence[int]) -> None:
        if self.refuse_removal:
            self.refuse_removal -= 1
            raise RuntimeFailed("the kernel refused")
        self.slots -= set(numbers)


def pool_on(kernel: Kernel, prepared: int = 0, subnet: str = "10.0.0.0/29") -> SlotPool:
    pool = SlotPool(kernel, AddressPool(subnet), prepared=prepared, admit=lambda slot: None)
    pool.start()
    return pool


async def test_a_refusal_of_the_kernel_reaches_who_waits_and_leaves_nothing() -> None:
    kernel = Kernel(refuse=1)
    pool = pool_on(kernel)
    with pytest.raises(RuntimeFailed):
        await pool.take()
    assert (await pool.take()).number in kernel.slots
    await pool.close()


async def test_a_start_that_is_cancelled_while_its_slot_is_made_leaks_none() -> None:
    kernel = Kernel()
    kernel.may_make.clear()
    pool = pool_on(kernel)
    waiting = asyncio.create_task(pool.take())
    await asyncio.sleep(0.01)
    waiting.cancel()
    kernel.may_make.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await pool.close()
    assert kernel.slots == set()


async def test_slots_made_ahead_do_not_exhaust_a_small_subnet() -> None:
    kernel = Kernel()
    pool = pool_on(kernel, prepared=3)
    taken = [await pool.take() for _ in range(5)]
    with pytest.raises(Exhausted):
        await pool.take()
    await pool.remove(taken[0].number)
    assert (await pool.take()).number == taken[0].number
    await pool.close()
    assert kernel.slots == {slot.number for slot in taken}


async def test_a_removal_that_failed_is_said_and_never_frees_the_address() -> None:
    kernel = Kernel()
    pool = pool_on(kernel)
    slot = await pool.take()
    kernel.refuse_removal = 1
    with pytest.raises(RuntimeFailed):
        await pool.remove(slot.number)
    assert {(await pool.take()).number for _ in range(4)} & {slot.number} == set()
    await pool.close()
    assert slot.number not in kernel.slots
