"""Devices that go to virtual machines: whole IOMMU groups, drivers taken away and given back, whatever dies in between."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from fake_pci import AUDIO, BRIDGE, GPU, H200, NIC, Clock, FakeKernel

from atoll.devices.vfio import VFIO_DRIVER, Vfio
from atoll.devices.vfio_guest import Bar, read_bars, window_bytes
from atoll.model.errors import Conflict, Invalid, NotFound, Unavailable, Unsupported


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    kernel = FakeKernel(tmp_path / "sys")
    kernel.add(GPU, "nvidia")
    kernel.add(AUDIO, "snd_hda_intel", kind="0x040300")
    kernel.add(BRIDGE, "pcieport", kind="0x060400")
    return kernel


@pytest.fixture
def vfio(kernel: FakeKernel, tmp_path: Path) -> Vfio:
    return make(kernel, tmp_path)


def make(kernel: FakeKernel, tmp_path: Path, let_go_s: float = 20.0) -> Vfio:
    clock = Clock()
    return Vfio(tmp_path / "state", sysfs=kernel.sysfs, write=kernel.write, clock=clock, sleep=clock.sleep, let_go_s=let_go_s)


def test_a_whole_group_goes_and_its_bridges_stay(kernel: FakeKernel, vfio: Vfio) -> None:
    (group,) = vfio.bind([GPU])
    assert group.number == 7
    assert {address: kernel.driver(address) for address in (GPU, AUDIO, BRIDGE)} == {
        GPU: VFIO_DRIVER,
        AUDIO: VFIO_DRIVER,
        BRIDGE: "pcieport",
    }


def test_what_was_taken_is_given_back_to_the_driver_that_had_it(kernel: FakeKernel, vfio: Vfio) -> None:
    kernel.natural[GPU] = "nouveau"  # another driver that would take it, were it asked first
    kernel.load("nouveau")
    vfio.bind([GPU])
    vfio.release([GPU])
    assert (kernel.driver(GPU), kernel.driver(AUDIO)) == ("nvidia", "snd_hda_intel")
    assert kernel.override(GPU) == ""
    vfio.release([GPU])
    assert kernel.driver(GPU) == "nvidia"


def test_binding_twice_changes_nothing_and_forgets_nothing(kernel: FakeKernel, vfio: Vfio) -> None:
    vfio.bind([GPU])
    done = len(kernel.written)
    vfio.bind([GPU])
    assert len(kernel.written) == done
    vfio.release([GPU])
    assert kernel.driver(GPU) == "nvidia"


def test_a_device_that_had_no_driver_has_none_afterwards(kernel: FakeKernel, vfio: Vfio) -> None:
    kernel.add("0000:5e:00.0", "", group=9, natural="nvidia")
    vfio.bind(["0000:5e:00.0"])
    assert kernel.driver("0000:5e:00.0") == VFIO_DRIVER
    vfio.release(["0000:5e:00.0"])
    assert kernel.driver("0000:5e:00.0") == ""
    assert kernel.override("0000:5e:00.0") == ""


def test_a_group_with_another_device_in_use_is_refused_before_anything_is_changed(kernel: FakeKernel, vfio: Vfio) -> None:
    kernel.add(NIC, "mlx5_core", kind="0x020000")
    with pytest.raises(Conflict, match=r"IOMMU group 7 with devices in use: 0000:3c:00\.0 \(mlx5_core\)") as raised:
        vfio.bind([GPU])
    assert "ACS" in (raised.value.mend or "")
    assert kernel.written == []


def test_a_neighbour_without_a_driver_goes_along(kernel: FakeKernel, vfio: Vfio) -> None:
    kernel.add(NIC, "", kind="0x020000")
    vfio.bind([GPU])
    assert kernel.driver(NIC) == VFIO_DRIVER
    vfio.release([GPU])
    assert kernel.driver(NIC) == ""


def test_two_granted_devices_of_one_group_go_together(kernel: FakeKernel, vfio: Vfio) -> None:
    kernel.add("0000:3d:00.0", "nvidia")
    with pytest.raises(Conflict):
        vfio.bind([GPU])
    assert len(vfio.bind([GPU, "0000:3d:00.0"])) == 1


def test_without_an_iommu_it_says_how_to_have_one(kernel: FakeKernel, vfio: Vfio) -> None:
    kernel.add("0000:5e:00.0", "nvidia", group=None)
    with pytest.raises(Unsupported, match="in no IOMMU group") as raised:
        vfio.bind(["0000:5e:00.0"])
    assert "intel_iommu=on" in (raised.value.mend or "")
    (kernel.sysfs / "kernel/iommu_groups/7/name").write_text("vfio-noiommu\n")
    with pytest.raises(Unsupported, match="no IOMMU"):
        vfio.bind([GPU])


def test_what_is_missing_or_misnamed_is_told_apart(kernel: FakeKernel, vfio: Vfio) -> None:
    with pytest.raises(NotFound, match="0000:99:00"):
        vfio.bind(["0000:99:00.0"])
    for name in ("../../x", "0000:3B:00.0", "3b:00.0", f"{GPU}\n"):
        with pytest.raises(Invalid):
            vfio.bind([name])
    shutil.rmtree(kernel.sysfs / "bus/pci/drivers" / VFIO_DRIVER)
    with pytest.raises(Unsupported, match="not loaded") as raised:
        vfio.bind([GPU])
    assert raised.value.mend == "modprobe vfio-pci"


def test_a_driver_that_does_not_let_go_ends_at_the_deadline_and_all_is_as_before(kernel: FakeKernel, vfio: Vfio) -> None:
    kernel.stubborn = {"snd_hda_intel"}
    with pytest.raises(Unavailable, match=r"snd_hda_intel does not let go of 0000:3b:00\.1 within 20 s") as raised:
        vfio.bind([GPU])
    assert "lsof" in (raised.value.mend or "")
    assert (kernel.driver(GPU), kernel.driver(AUDIO)) == ("nvidia", "snd_hda_intel")
    assert (kernel.override(GPU), kernel.override(AUDIO)) == ("", "")


def test_a_write_that_the_kernel_never_answers_does_not_hang_the_agent_and_is_remembered(
    kernel: FakeKernel, tmp_path: Path
) -> None:
    kernel.hang = threading.Event()
    vfio = make(kernel, tmp_path, let_go_s=0.05)
    with pytest.raises(Unavailable, match="does not let go"):
        vfio.bind([GPU])
    assert vfio.recover(()) == (GPU,)  # still stuck: it is not forgotten
    kernel.hang.set()
    for thread in threading.enumerate():
        if thread.name.startswith("write "):
            thread.join(10)
    kernel.hang = None
    assert kernel.driver(GPU) == ""
    assert vfio.recover(()) == ()
    assert kernel.driver(GPU) == "nvidia"


def test_vfio_refusing_a_device_gives_it_back(kernel: FakeKernel, vfio: Vfio) -> None:
    kernel.refusing = {VFIO_DRIVER}
    with pytest.raises(Unavailable, match="vfio-pci does not take"):
        vfio.bind([GPU])
    assert (kernel.driver(GPU), kernel.driver(AUDIO)) == ("nvidia", "snd_hda_intel")


def test_an_error_of_the_kernel_is_told_in_its_words(kernel: FakeKernel, tmp_path: Path) -> None:
    def deny(path: Path, text: str) -> None:
        raise OSError(16, "Device or resource busy")

    vfio = Vfio(tmp_path / "state", sysfs=kernel.sysfs, write=deny)
    with pytest.raises(Unavailable, match="Device or resource busy"):
        vfio.bind([GPU])


@pytest.mark.parametrize("writes", range(15))
def test_an_agent_that_dies_anywhere_is_cleaned_up_after_by_the_next(kernel: FakeKernel, tmp_path: Path, writes: int) -> None:
    class Died(Exception):
        pass

    def clock() -> float:
        if len(kernel.written) >= writes:  # asked before each write: there the agent dies
            raise Died
        return 0.0

    def live() -> None:
        first.bind([GPU])
        first.release([GPU])
        raise Died

    first = Vfio(tmp_path / "state", sysfs=kernel.sysfs, write=kernel.write, clock=clock, sleep=lambda _: None)
    with pytest.raises(Died):
        live()
    second = make(kernel, tmp_path)
    assert second.recover(()) == ()
    assert (kernel.driver(GPU), kernel.driver(AUDIO)) == ("nvidia", "snd_hda_intel")
    assert list((tmp_path / "state").glob("*")) == []


def test_recovery_leaves_alone_what_someone_holds(kernel: FakeKernel, vfio: Vfio, tmp_path: Path) -> None:
    kernel.add("0000:5e:00.0", "nvidia", group=9)
    vfio.bind([GPU])
    vfio.bind(["0000:5e:00.0"])
    second = make(kernel, tmp_path)
    assert second.recover({GPU}) == ()
    assert (kernel.driver(GPU), kernel.driver(AUDIO), kernel.driver("0000:5e:00.0")) == (VFIO_DRIVER, VFIO_DRIVER, "nvidia")
    second.release([GPU])
    assert kernel.driver(GPU) == "nvidia"


def test_after_a_restart_of_the_machine_nothing_is_disturbed(kernel: FakeKernel, vfio: Vfio, tmp_path: Path) -> None:
    vfio.bind([GPU])
    for address in (GPU, AUDIO):  # as the kernel finds them anew
        (kernel.sysfs / "bus/pci/devices" / address / "driver").unlink()
        kernel._bind(address, kernel.natural[address])
    (tmp_path / f"state/{AUDIO}.json").write_bytes(b"")  # what a crash of the machine may leave
    assert make(kernel, tmp_path).recover(()) == ()
    assert (kernel.driver(GPU), kernel.driver(AUDIO)) == ("nvidia", "snd_hda_intel")
    assert list((tmp_path / "state").glob("*")) == []


def test_a_device_that_fell_off_the_bus_is_forgotten(kernel: FakeKernel, vfio: Vfio, tmp_path: Path) -> None:
    vfio.bind([GPU])
    shutil.rmtree(kernel.sysfs / "bus/pci/devices" / GPU)
    (kernel.sysfs / "kernel/iommu_groups/7/devices" / GPU).unlink()
    assert make(kernel, tmp_path).recover(()) == ()
    assert kernel.driver(AUDIO) == "snd_hda_intel"


def test_reset_methods_are_told_best_first_and_a_reset_is_made(kernel: FakeKernel, vfio: Vfio) -> None:
    assert vfio.reset_methods(GPU) == ()
    with pytest.raises(Unsupported, match="no reset"):
        vfio.reset(GPU)
    device = kernel.sysfs / "bus/pci/devices" / GPU
    (device / "reset_method").write_text("flr bus\n")
    (device / "reset").write_text("")
    assert vfio.reset_methods(GPU) == ("flr", "bus")
    vfio.reset(GPU)
    assert (device / "reset").read_text() == "1"


def test_the_sizes_of_windows_are_read(kernel: FakeKernel, vfio: Vfio) -> None:
    (kernel.sysfs / "bus/pci/devices" / GPU / "resource").write_text(H200)
    assert vfio.bars(GPU) == (
        Bar(0, 16 << 20, "memory", prefetchable=False),
        Bar(1, 256 << 30, "memory64", prefetchable=True),
        Bar(3, 32 << 20, "memory64", prefetchable=True),
        Bar(5, 128, "io", prefetchable=False),
    )
    assert vfio.bars(AUDIO) == ()


def test_a_machine_keeps_room_for_the_windows_of_all_of_its_devices() -> None:
    large = read_bars(H200)
    assert window_bytes(large) == 1 << 40
    assert window_bytes((*large, *large)) == 1 << 41
    assert window_bytes(()) == window_bytes([Bar(0, 16 << 20, "memory", prefetchable=False)]) == 0
