"""`atoll doctor`: it finds what is there, survives what hangs, and says what keeps this machine from running anything."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from running_up import running_up

from atoll.cli.main import cli
from atoll.devices.fake import FakeHardware
from atoll.entry import doctor, findings
from atoll.entry.config import Config
from atoll.entry.doctor_gpus import gpus
from atoll.entry.findings import Level, Part, version_of, works_in_child
from atoll.entry.gpus import NVIDIA, vendors
from atoll.entry.scratch import free_port


def config(directory: Path) -> Config:
    return Config(data=directory, api=f"127.0.0.1:{free_port()}", ingress=f"127.0.0.1:{free_port()}", subnet="10.250.0.0/16")


def test_a_probe_that_works_has_nothing_to_say() -> None:
    assert works_in_child(lambda: None) is None


def test_a_probe_that_fails_says_why_and_leaves_no_child() -> None:
    def fails() -> None:
        raise OSError(1, "x")

    assert works_in_child(fails) == "Operation not permitted"
    assert works_in_child(lambda: os._exit(3)) is not None
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_probe_that_hangs_is_given_up() -> None:
    began = time.monotonic()
    assert works_in_child(lambda: time.sleep(60), deadline_s=0.1) == "no answer within 0.1 s"
    assert time.monotonic() - began < 5


def test_a_tool_that_is_not_there_has_no_version() -> None:
    assert version_of("no-such-tool-here", "--version") is None
    assert version_of("true") == ""


def test_every_part_says_why_it_matters_and_what_is_amiss_how_to_mend_it(tmp_path: Path) -> None:
    found = doctor.examine(config(tmp_path))
    names = {finding.name for finding in found}
    assert {"root", "cgroups", "overlayfs", "user namespaces", "idmapped mounts", "nftables", "namespaces and veth"} <= names
    assert {"runc", "KVM", "Envoy", "shim", "gcc", "mmdebstrap", "disk", "capabilities", "API address"} <= names
    for finding in found:
        assert finding.found, finding
        assert finding.why or finding.level is Level.OK, finding
        assert (finding.mend == "") == (finding.level is Level.OK), finding


def test_the_parts_of_an_area_stand_together(tmp_path: Path) -> None:
    areas = [area for area, _ in itertools.groupby(finding.area for finding in doctor.examine(config(tmp_path)))]
    assert len(areas) == len(set(areas)), areas


def test_a_device_that_is_there_is_not_called_usable(tmp_path: Path) -> None:
    kvm = next(finding for finding in doctor.runtimes() if finding.name == "KVM")
    assert kvm.level is not Level.OK


def test_only_a_missing_core_part_keeps_it_from_running() -> None:
    core, other = Part("a", "core", "why", core=True), Part("a", "other", "why")
    assert doctor.can_run([core(Level.OK, "x"), other(Level.MISSING, "x", "y"), core(Level.DEGRADED, "x", "y")])
    assert not doctor.can_run([core(Level.MISSING, "x", "y")])


def test_a_taken_port_is_found_and_exits_1(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = CliRunner().invoke(cli, ["doctor", "--json", "--data", str(tmp_path), "--ingress", address])
    assert result.exit_code == 1, result.stderr
    told = json.loads(result.stdout)
    finding = next(each for each in told["findings"] if each["name"] == "ingress address")
    assert finding["level"] == "missing"
    assert "in use" in finding["found"]
    assert not told["can_run"]


def test_the_table_ends_with_a_verdict(tmp_path: Path) -> None:
    given = config(tmp_path)
    arguments = ["doctor", "--data", str(tmp_path), "--ingress", given.ingress, "--api", given.api, "--subnet", given.subnet]
    result = CliRunner().invoke(cli, arguments)
    assert ("can run containers" in result.stdout) == (result.exit_code == 0)
    assert findings.PROBE_S > 0


def test_where_it_runs_already_the_verdict_does_not_say_to_start_it(tmp_path: Path) -> None:
    with running_up(tmp_path):
        result = CliRunner().invoke(cli, ["doctor", "--data", str(tmp_path)])
    if result.exit_code != 0:
        pytest.skip("this machine cannot run containers, and the verdict says so")
    assert "`atoll up` runs, process 4711" in result.stdout
    assert "start with" not in result.stdout


@pytest.mark.parametrize("named", ["option", "variable"])
def test_an_address_that_the_own_atoll_holds_is_well(tmp_path: Path, named: str) -> None:
    with running_up(tmp_path) as address:
        own = ["--data", str(tmp_path)] if named == "option" else []
        environment = {"ATOLL_DATA": str(tmp_path)} if named == "variable" else {}
        result = CliRunner().invoke(cli, ["doctor", "--json", *own, "--ingress", address], env=environment)
    finding = next(each for each in json.loads(result.stdout)["findings"] if each["name"] == "ingress address")
    assert (finding["level"], finding["found"]) == ("ok", f"{address}, held by `atoll up`, process 4711")


def looked(hardware: FakeHardware, root: Path) -> list[findings.Finding]:
    return list(gpus(root, hardware=lambda: [hardware]))


def test_a_machine_without_a_gpu_says_so_and_asks_nobody(tmp_path: Path) -> None:
    (found,) = gpus(tmp_path)
    assert (found.level, found.found) == (Level.OK, "none on this machine")
    device = tmp_path / "sys/bus/pci/devices/0000:3b:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1a03\n")
    (device / "class").write_text("0x030000\n")
    assert vendors(tmp_path) == frozenset(), "a board's own display is none"
    (device / "vendor").write_text("0x10de\n")
    assert vendors(tmp_path) == {NVIDIA}


def test_gpus_are_named_with_driver_health_and_what_can_hand_them_on(tmp_path: Path) -> None:
    hardware = FakeHardware(count=2, mig=[1])
    hardware.change(hardware.ids[0], remap_failed=True)
    found = {finding.name: finding for finding in looked(hardware, tmp_path)}
    assert found["driver"].found == "nvidia 580.159.04, CUDA 13.0"
    sick, well = (finding for name, finding in found.items() if name.startswith("0000:"))
    assert sick.level is Level.MISSING
    assert "could not be remapped" in sick.found
    assert well.level is Level.OK
    assert "in MIG mode: 1g.10gb" in well.found
    assert found["libraries"].level is Level.MISSING
    assert found["with runc"].level is Level.OK
    assert not any(finding.core for finding in found.values()), "a machine runs without them"


def test_a_gpu_inside_a_processor_is_named_and_not_missed(tmp_path: Path) -> None:
    device = tmp_path / "sys/devices/pci0000:00/0000:00:02.0"
    (device / "drm/renderD128").mkdir(parents=True)
    (device / "drm/renderD128/device").symlink_to("../..")
    (device / "vendor").write_text("0x8086\n")
    (device / "device").write_text("0x46a6\n")
    (device / "class").write_text("0x030000\n")
    for place, target in (("sys/class/drm", device / "drm/renderD128"), ("sys/bus/pci/devices", device)):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / target.name).symlink_to(target)
    (found,) = gpus(tmp_path)
    assert (found.name, found.level) == ("0000:00:02.0", Level.OK)
    assert "not offered: part of the processor" in found.found


def test_a_driver_that_cannot_be_asked_says_why(tmp_path: Path) -> None:
    hardware = FakeHardware()
    hardware.driver_mismatch()
    (found,) = looked(hardware, tmp_path)
    assert (found.name, found.level) == ("driver", Level.MISSING)
    assert "driver and library differ" in found.found
    assert found.mend
