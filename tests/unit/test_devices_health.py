"""What an XID means, and how a device's health follows from what its driver says: pure, no clock and no driver."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from atoll.devices.fake import FakeHardware
from atoll.devices.health import (
    DEGRADED_S,
    KINDS_MAX,
    REPEATS_S,
    DeviceState,
    Gone,
    Happening,
    Held,
    Seen,
    Silent,
    Tick,
    Told,
    classify_xid,
    decide,
)
from atoll.devices.health_state import Cause
from atoll.model.devices import GpuDevice, GpuHealth
from atoll.model.ports.devices import DeviceEvent, Trouble

DEVICE = GpuDevice(id="GPU-1", model="NVIDIA H100 80GB HBM3", memory_bytes=80 << 30, driver="580.1")


class Life:
    """A device through what happens to it."""

    def __init__(self, *, held: bool = False) -> None:
        self.state: DeviceState | None = DeviceState(seen=DEVICE, held=held)
        self.told: list[DeviceEvent] = []
        self.now = 1_000.0

    def happens(self, event: Happening, *, after_s: float = 0.0) -> Life:
        self.now += after_s
        assert self.state is not None
        self.state, told = decide(self.state, event, self.now)
        self.told += told
        return self

    def xid(self, code: int) -> Life:
        meaning = classify_xid(code)
        return self.happens(Told(DeviceEvent(trouble=meaning.trouble, device=DEVICE.id, code=code, message=meaning.words)))

    def seen(self, **fields: object) -> Life:
        return self.happens(Seen(replace(DEVICE, **fields)))

    @property
    def health(self) -> GpuHealth:
        assert self.state is not None
        return self.state.health

    @property
    def reason(self) -> str:
        assert self.state is not None
        return self.state.reason

    @property
    def troubles(self) -> list[Trouble]:
        return [event.trouble for event in self.told]


@pytest.mark.parametrize("code", [13, 31, 43, 45, 68, 109])
def test_an_applications_own_fault_is_told_and_the_device_stays_on_offer(code: int) -> None:
    life = Life().xid(code)
    assert life.troubles == [Trouble.FAULT]
    assert life.told[0].code == code
    assert life.health is GpuHealth.OK


@pytest.mark.parametrize("code", [48, 64, 74, 79, 95, 119, 120, 140])
def test_a_fault_of_the_device_takes_it_out_and_the_reason_names_the_code(code: int) -> None:
    life = Life().xid(code)
    assert life.troubles == [Trouble.BROKEN]
    assert life.health is GpuHealth.QUARANTINED
    assert f"XID {code}" in life.reason


@pytest.mark.parametrize("code", [63, 92, 94, 154, 9_999])
def test_a_doubtful_or_unknown_code_degrades_and_takes_nothing_away(code: int) -> None:
    life = Life().xid(code)
    assert life.troubles == [Trouble.SUSPECT]
    assert life.health is GpuHealth.DEGRADED


def test_every_meaning_has_words_and_a_mend() -> None:
    meanings = [classify_xid(code) for code in range(1, 200)]
    assert all(meaning.words and meaning.mend for meaning in meanings)
    assert {meaning.trouble for meaning in meanings} == {Trouble.FAULT, Trouble.BROKEN, Trouble.SUSPECT}


def test_a_storm_is_told_once_and_summed_up_once() -> None:
    life = Life()
    for _ in range(5_000):
        life.xid(31)
    assert life.troubles == [Trouble.FAULT]
    life.happens(Tick(), after_s=REPEATS_S)
    assert life.troubles == [Trouble.FAULT, Trouble.FAULT]
    assert "4999 more" in life.told[1].message
    life.happens(Tick(), after_s=REPEATS_S)
    assert len(life.told) == 2
    assert life.state is not None
    assert life.state.due is None


def test_what_befalls_one_partition_is_told_beside_what_befell_another() -> None:
    life = Life()
    for start in (0, 4, 0, 4):
        life.happens(Told(DeviceEvent(trouble=Trouble.FAULT, device=DEVICE.id, start=start, code=31, message="a fault")))
    assert [event.start for event in life.told] == [0, 4]
    life.happens(Tick(), after_s=REPEATS_S)
    assert [event.start for event in life.told] == [0, 4, 0, 4]


def test_a_storm_of_all_codes_at_once_is_bounded_in_events_and_memory() -> None:
    life = Life()
    for code in range(500, 1_500):
        life.xid(code)
    assert len(life.told) == KINDS_MAX + 1
    assert life.state is not None
    assert len(life.state.repeats) == KINDS_MAX + 1
    assert len(life.state.ills) == 1


def test_a_broken_device_never_comes_back_because_time_goes_by() -> None:
    life = Life().xid(79).happens(Tick(), after_s=1e9).seen()
    assert life.health is GpuHealth.QUARANTINED
    assert Trouble.RECOVERED not in life.troubles


def test_a_broken_device_comes_back_when_the_driver_says_so() -> None:
    life = Life().xid(119).happens(Told(DeviceEvent(trouble=Trouble.RECOVERED, device=DEVICE.id, message="reset done")))
    assert life.health is GpuHealth.OK
    assert life.troubles == [Trouble.BROKEN, Trouble.RECOVERED]


def test_a_broken_device_comes_back_when_its_counters_show_a_reset() -> None:
    life = Life().seen(ecc_errors=3).xid(48)
    assert life.seen(ecc_errors=3).health is GpuHealth.QUARANTINED
    assert life.seen(ecc_errors=0).health is GpuHealth.OK
    assert life.troubles == [Trouble.BROKEN, Trouble.RECOVERED]


def test_a_driver_that_cannot_read_its_counters_for_once_is_not_taken_for_a_reset() -> None:
    unread = {"health": GpuHealth.QUARANTINED, "reason": "it does not answer its driver"}
    life = Life().seen(ecc_errors=3, remap_pending=True).xid(48).seen(ecc_errors=0, **unread).seen(ecc_errors=3, remap_pending=True)
    assert life.health is GpuHealth.QUARANTINED
    assert "XID 48" in life.reason
    assert Trouble.RECOVERED not in life.troubles
    assert life.seen(ecc_errors=0, **unread).seen(ecc_errors=0).health is GpuHealth.OK  # a reset that came meanwhile shows after it


def test_rows_that_wait_for_a_reset_take_a_device_out_until_it_was_reset() -> None:
    life = Life().seen(remap_pending=True).seen(remap_pending=True)
    assert life.troubles == [Trouble.BROKEN]
    assert life.health is GpuHealth.QUARANTINED
    assert life.seen().health is GpuHealth.OK
    assert life.troubles == [Trouble.BROKEN, Trouble.RECOVERED]


def test_rows_that_wait_after_correctable_errors_only_leave_a_device_in_use() -> None:
    life = Life().seen(remap_pending=True, health=GpuHealth.DEGRADED, reason="rows of memory wait for a reset")
    assert (life.health, life.troubles) == (GpuHealth.DEGRADED, [Trouble.SUSPECT])
    assert "wait for a reset" in life.reason
    assert life.seen(remap_pending=True, health=GpuHealth.QUARANTINED, reason="uncorrectable").health is GpuHealth.QUARANTINED
    assert life.seen().health is GpuHealth.OK


def test_rows_that_could_not_be_remapped_take_a_device_out_for_good() -> None:
    life = (
        Life()
        .seen(remap_failed=True)
        .happens(Told(DeviceEvent(trouble=Trouble.RECOVERED, device=DEVICE.id, message="reset")))
        .seen(remap_failed=True)
    )
    assert life.health is GpuHealth.QUARANTINED
    assert "replaced" in life.reason


def test_a_vanished_device_that_is_held_is_kept_and_shown_as_gone() -> None:
    life = Life(held=True).happens(Gone()).happens(Gone())
    assert life.troubles == [Trouble.VANISHED]
    assert life.state is not None
    device = life.state.device()
    assert (device.health, device.present) == (GpuHealth.QUARANTINED, False)
    life.happens(Held(False))
    assert life.state is None


def test_a_vanished_device_that_nothing_holds_is_told_and_forgotten() -> None:
    life = Life().happens(Gone())
    assert life.troubles == [Trouble.VANISHED]
    assert life.state is None


def test_a_device_that_comes_back_from_the_bus_is_well_again_whatever_it_had() -> None:
    life = Life(held=True).xid(79).happens(Gone()).seen()
    assert life.health is GpuHealth.OK
    assert life.troubles == [Trouble.BROKEN, Trouble.VANISHED, Trouble.RECOVERED]


def test_a_driver_changed_under_what_runs_takes_the_device_out_until_it_is_let_go() -> None:
    life = Life(held=True).seen(driver="590.2").seen(driver="590.2")
    assert life.troubles == [Trouble.DRIVER_CHANGED]
    assert life.health is GpuHealth.QUARANTINED
    assert "580.1" in life.reason
    assert "590.2" in life.reason
    assert life.happens(Held(False)).health is GpuHealth.OK


def test_a_driver_changed_under_nothing_is_told_and_the_device_stays_on_offer() -> None:
    life = Life().seen(driver="590.2")
    assert life.troubles == [Trouble.DRIVER_CHANGED]
    assert life.health is GpuHealth.OK


def test_a_silent_driver_takes_the_device_out_until_it_answers() -> None:
    life = Life().happens(Silent("no answer"))
    assert (life.health, life.reason) == (GpuHealth.QUARANTINED, "no answer")
    assert life.state is not None
    assert not life.state.device().answers
    assert life.seen().health is GpuHealth.OK
    assert life.troubles == [Trouble.RECOVERED]


@pytest.mark.parametrize("code", [119, 74, 62, 95, 63])
def test_a_driver_that_answers_again_mends_no_device(code: int) -> None:
    life = Life().xid(code)
    before = life.health, life.reason
    life.happens(Told(DeviceEvent(trouble=Trouble.SILENT, message="no answer")))
    life.happens(Told(DeviceEvent(trouble=Trouble.RECOVERED, message="the driver answers again")))
    assert (life.health, life.reason) == before


def test_one_ill_that_ends_leaves_the_others() -> None:
    life = Life().xid(79).happens(Silent("no answer"))
    assert life.state is not None
    assert life.state.device().answers  # it is broken for sure, and what runs on it is not to wait for the driver
    life.seen()
    assert life.health is GpuHealth.QUARANTINED
    assert "XID 79" in life.reason
    assert "no answer" not in life.reason


def test_a_suspicion_fades_by_itself() -> None:
    life = Life().xid(92)
    assert life.happens(Tick(), after_s=DEGRADED_S - 1).health is GpuHealth.DEGRADED
    assert life.happens(Tick(), after_s=1).health is GpuHealth.OK
    assert life.troubles == [Trouble.SUSPECT, Trouble.RECOVERED]


def test_what_the_driver_itself_says_of_health_is_believed() -> None:
    life = Life().seen(health=GpuHealth.DEGRADED, reason="hot").seen(health=GpuHealth.QUARANTINED, reason="wants a reset")
    assert life.troubles == [Trouble.SUSPECT, Trouble.BROKEN]
    assert "wants a reset" in life.reason
    assert life.seen().health is GpuHealth.OK


def test_the_first_error_is_the_reason_that_stays() -> None:
    life = Life().xid(79).xid(48)
    assert "XID 79" in life.reason
    assert life.state is not None
    assert [ill.cause for ill in life.state.ills] == [Cause.ERROR]


async def test_the_fakes_events_carry_the_meaning_of_their_code() -> None:
    hardware = FakeHardware()
    hardware.xid(hardware.ids[0], 79)
    event = await anext(aiter(hardware.events()))
    assert (event.trouble, event.device, event.code) == (Trouble.BROKEN, hardware.ids[0], 79)
    assert event.mend
