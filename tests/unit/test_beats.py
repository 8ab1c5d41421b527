"""Datagrams of liveness: what goes in comes out, and nothing that was changed, cut or sealed by another is taken."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.api.service import KINDS, Service
from atoll.api.service.beat_keys import beat_key, grant_of
from atoll.model import beats, codec, keys
from atoll.model.beats import Ack, Beat, Flag, Kind, NotOurs, Relay, Relayed
from atoll.model.membership import Identity, MemberKind
from atoll.model.ports.clock import SystemClock
from atoll.store.cache import State
from atoll.store.memory import MemoryStore

KEY = beats.key_of(bytes(32), "n1", 7)
U64 = st.integers(0, 2**64 - 1)


@given(U64, U64, st.text(st.characters(codec="utf-8"), max_size=60), st.sampled_from([Flag.NONE, Flag.ASKS, Flag.AWAY]))
def test_a_beat_is_read_as_it_was_written(session: int, counter: int, inside: str, flags: int) -> None:
    beat = Beat("n1", 7, session, counter, flags, inside)
    data = beats.pack_beat(KEY, beat)
    kind, said = beats.kind_of(data)
    beats.opened(KEY, data)
    assert (kind, beats.read_beat(data, said)) == (Kind.BEAT, beat)


@given(U64, U64, U64, st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_an_ack_is_read_as_it_was_written(session: int, counter: int, last: int, window: int, leads: bool, busy: bool) -> None:
    ack = Ack(session, counter, last, window, leads, busy)
    data = beats.pack_ack(KEY, ack)
    assert beats.read_ack(KEY, data, beats.kind_of(data)[1]) == ack


@given(U64, st.sampled_from(["10.0.0.1", "fe80::1", "2001:db8::2"]), st.integers(1, 65_535))
def test_what_is_carried_comes_out_whole(nonce: int, host: str, port: int) -> None:
    ping = beats.pack_ping(KEY, nonce)
    relay = Relay(nonce, (host, port), ping)
    assert beats.read_relay(KEY, beats.pack_relay(KEY, relay)) == relay
    relayed = Relayed("n2", 7, nonce, beats.pack_pong(KEY, nonce))
    data = beats.pack_relayed(KEY, relayed)
    beats.opened(KEY, data)
    assert beats.read_relayed(data) == relayed


def samples() -> list[bytes]:
    return [
        beats.pack_beat(KEY, Beat("n1", 7, 1, 2, Flag.ASKS, "10.0.0.1:9")),
        beats.pack_ack(KEY, Ack(1, 2, 3, 4, True)),
        beats.pack_ping(KEY, 5),
        beats.pack_pong(KEY, 5),
        beats.pack_relay(KEY, Relay(5, ("10.0.0.1", 9), beats.pack_ping(KEY, 5))),
        beats.pack_relayed(KEY, Relayed("n2", 7, 5, b"")),
    ]


@pytest.mark.parametrize("data", samples())
def test_one_changed_bit_anywhere_breaks_the_seal(data: bytes) -> None:
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(NotOurs):
            beats.opened(KEY, bytes(changed))


@pytest.mark.parametrize("data", samples())
def test_another_key_does_not_open_it(data: bytes) -> None:
    for other in (beats.key_of(bytes(32), "n2", 7), beats.key_of(bytes(32), "n1", 8), beats.key_of(b"x" * 32, "n1", 7)):
        with pytest.raises(NotOurs):
            beats.opened(other, data)


def test_each_enrolment_has_a_key_of_its_own_and_a_node_with_a_token_alone_the_one_it_had() -> None:
    assert beats.key_of(bytes(32), "n1", 7, "") == KEY
    assert len({beats.key_of(bytes(32), "n1", 7, enrolment) for enrolment in ("", "a", "b")}) == 3


async def test_the_server_makes_and_takes_the_key_of_the_enrolment_that_counts_now() -> None:
    clock = SystemClock()
    store = MemoryStore(clock)
    async with State(store, KINDS) as state:
        service = Service(store, state, clock, random.Random(1), bytes(range(32)))
        made = [(grant_of(service.context, "n1"), beat_key(service.context, "n1", 7))]
        for enrolment in ("first", "second"):
            identity = Identity(kind=MemberKind.NODE, name="n1", enrolment=enrolment, joined_at=1.0)
            await state.reach(await store.put(keys.identity(MemberKind.NODE, "n1"), codec.encode(identity)))
            grant = grant_of(service.context, "n1")
            assert grant.key == beat_key(service.context, "n1", grant.epoch)
            made.append((grant, beat_key(service.context, "n1", 7)))
        assert len({key for _, key in made}) == len({grant.key for grant, _ in made}) == 3
    await store.close()


def test_whatever_a_stranger_sends_is_refused_and_nothing_else_happens() -> None:
    chance = random.Random(1)
    cut = [whole[:end] for whole in samples() for end in range(len(whole))]
    for data in [*cut, *(chance.randbytes(size) for size in range(0, 700, 7))]:
        try:
            kind, flags = beats.kind_of(data)
            match kind:
                case Kind.BEAT:
                    beats.read_beat(data, flags)
                case Kind.RELAYED:
                    beats.read_relayed(data)
                case Kind.PING | Kind.PONG:
                    beats.nonce_of(data)
                case _:
                    pass
            beats.opened(KEY, data)
        except NotOurs:
            continue
        pytest.fail(f"{data!r} was taken")


def test_no_answer_is_more_than_a_fifth_longer_than_its_question() -> None:
    shortest = len(beats.pack_beat(KEY, Beat("n", 7, 1, 2, Flag.ASKS, "")))
    assert len(beats.pack_ack(KEY, Ack(1, 2, 3, 4, True))) <= 1.2 * shortest
    assert len(beats.pack_pong(KEY, 5)) <= len(beats.pack_ping(KEY, 5))
