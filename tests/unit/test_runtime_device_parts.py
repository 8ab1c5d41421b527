"""The parts by which a runtime hands on devices that need no root: configuration, environment, and what gVisor's proxy knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_runtime_parts import box, bundle, validator

from atoll.model.errors import Unsupported
from atoll.model.ports.devices import DeviceNode, Edits, FileMount
from atoll.runtimes.nvproxy import check_driver, check_edits, gvisor_drivers, options, proxied
from atoll.runtimes.oci import MASKED_PATHS, configuration
from atoll.runtimes.oci_devices import device_rules, environment

GPU = Edits(
    nodes=(
        DeviceNode("/dev/nvidia0", "/dev/nvidia0", 195, 0),
        DeviceNode("/dev/nvidiactl", "/dev/nvidiactl", 195, 255),
        DeviceNode("/dev/nvidia-uvm", "/dev/nvidia-uvm", 238, 0),
        DeviceNode("/dev/nvidia-uvm-tools", "/dev/nvidia-uvm-tools", 238, 1, "r"),
    ),
    mounts=(FileMount("/opt/libcuda.so.580.1", "/usr/local/nvidia/lib64/libcuda.so.580.1"),),
    env=(("NVIDIA_DRIVER_CAPABILITIES", "compute,utility"),),
    masked=("/proc/driver/nvidia/gpus/0000:af:00.0",),
    gvisor_driver="580.159.04",
)


@pytest.mark.parametrize("shown", [None, (Path("/n/0"), Path("/n/1"), Path("/n/2"), Path("/n/3"))])
def test_a_configuration_with_devices_is_what_the_specification_allows(shown: tuple[Path, ...] | None) -> None:
    made = bundle(base_id=None if shown is None else 1 << 20, nodes=shown)
    made.resources["devices"] += device_rules(GPU)
    config = configuration(box(devices=GPU), made)
    assert [error.message for error in validator().iter_errors(config)] == []
    assert config["linux"]["resources"]["devices"] == [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "major": 195, "minor": 0, "access": "rw"},
        {"allow": True, "type": "c", "major": 195, "minor": 255, "access": "rw"},
        {"allow": True, "type": "c", "major": 238, "minor": 0, "access": "rw"},
        {"allow": True, "type": "c", "major": 238, "minor": 1, "access": "r"},
    ]
    assert config["linux"]["maskedPaths"] == [*MASKED_PATHS, *GPU.masked]
    mounts = {entry["destination"]: entry for entry in config["mounts"]}
    assert mounts["/usr/local/nvidia/lib64/libcuda.so.580.1"]["source"] == "/opt/libcuda.so.580.1"
    if shown is None:
        assert [entry["path"] for entry in config["linux"]["devices"]] == [node.path for node in GPU.nodes]
        assert "/dev/nvidia0" not in mounts
    else:
        assert "devices" not in config["linux"]
        assert mounts["/dev/nvidia-uvm"]["source"] == "/n/2"
        assert "nodev" not in mounts["/dev/nvidia-uvm"]["options"]


def test_an_instance_without_devices_is_as_it_was() -> None:
    config = configuration(box(), bundle())
    assert "devices" not in config["linux"]
    assert config["linux"]["maskedPaths"] == list(MASKED_PATHS)
    assert environment((("A", "1"), ("LD_LIBRARY_PATH", "/x")), Edits()) == (("A", "1"), ("LD_LIBRARY_PATH", "/x"))


@pytest.mark.parametrize(
    ("had", "gets"),
    [(None, "/gpu"), ("", "/gpu"), ("/a:/b", "/gpu:/a:/b"), ("/a::/gpu:", "/gpu:/a")],
)
def test_the_linker_searches_the_driver_first_and_never_the_working_directory(had: str | None, gets: str) -> None:
    env = () if had is None else (("LD_LIBRARY_PATH", had),)
    assert dict(environment(env, Edits(library_directories=("/gpu",))))["LD_LIBRARY_PATH"] == gets


def test_a_spec_s_variable_stays_unless_it_says_which_devices_there_are() -> None:
    edits = Edits(env=(("PATH", "/device"), ("NEW", "1"), ("CUDA_VISIBLE_DEVICES", "MIG-x")))
    given = (("PATH", "/mine"), ("CUDA_VISIBLE_DEVICES", "all"))
    assert dict(environment(given, edits)) == {"PATH": "/mine", "NEW": "1", "CUDA_VISIBLE_DEVICES": "MIG-x"}


def fake_runsc(directory: Path, script: str) -> str:
    directory.mkdir(exist_ok=True)
    program = directory / "runsc"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


def test_the_drivers_are_those_that_runsc_lists(tmp_path: Path) -> None:
    listing = 'test "$1 $2" = "nvproxy list-supported-drivers" && printf "535.104.05\\n580.65.06\\nsome words\\n"'
    assert gvisor_drivers(fake_runsc(tmp_path, listing)) == {"535.104.05", "580.65.06"}


@pytest.mark.parametrize("script", ["echo usage; exit 128", "echo 580.65.06; exit 1", "exec /nonexistent", "true"])
def test_a_runsc_that_lists_none_knows_none(tmp_path: Path, script: str) -> None:
    assert gvisor_drivers(fake_runsc(tmp_path, script)) == frozenset()
    assert gvisor_drivers(str(tmp_path / "none")) == frozenset()


def test_it_is_asked_once_per_run_of_the_machine_and_again_when_it_was_replaced(tmp_path: Path) -> None:
    count = tmp_path / "count"
    binary = fake_runsc(tmp_path / "bin", f"echo >> {count}; echo 580.65.06")
    for _ in range(3):
        assert gvisor_drivers(binary, tmp_path / "own") == {"580.65.06"}
    assert count.read_text() == "\n"
    replaced = fake_runsc(tmp_path / "bin", f"echo >> {count}; echo 580.159.04")
    assert gvisor_drivers(replaced, tmp_path / "own") == {"580.159.04"}


KNOWN = frozenset({"535.104.05", "580.65.06", "580.126.20", "580.82.07"})


def test_a_driver_that_is_not_known_is_refused_with_those_of_its_branch() -> None:
    check_driver("580.126.20", KNOWN)
    with pytest.raises(Unsupported) as raised:
        check_driver("580.159.04", KNOWN)
    assert "does not know the driver 580.159.04; of branch 580 it knows 580.65.06, 580.82.07, 580.126.20" in str(raised.value)
    assert "newer runsc" in (raised.value.mend or "")
    with pytest.raises(Unsupported, match="none of that branch, only of 535, 580"):
        check_driver("570.86.10", KNOWN)
    with pytest.raises(Unsupported, match="no nvproxy") as raised:
        check_driver("580.159.04", frozenset())
    assert "runc or crun" in (raised.value.mend or "")


def test_what_the_proxy_cannot_do_at_all_is_refused() -> None:
    check_edits(Edits(), frozenset())
    with pytest.raises(Unsupported, match="no partitions"):
        check_edits(Edits(nodes=GPU.nodes), KNOWN)
    with pytest.raises(Unsupported, match=r"580\.159\.04"):
        check_edits(GPU, KNOWN)
    check_edits(GPU, KNOWN, forced="580.126.20")


def test_runsc_is_told_no_more_than_is_needed() -> None:
    assert options(Edits()) == []
    assert options(GPU) == ["--nvproxy"]
    assert options(GPU, "580.126.20") == ["--nvproxy", "--nvproxy-driver-version=580.126.20"]
    video = Edits(nodes=GPU.nodes, env=(("NVIDIA_DRIVER_CAPABILITIES", "compute,video"),))
    assert options(video) == ["--nvproxy", "--nvproxy-allowed-driver-capabilities=compute,video"]


def test_the_sandbox_gets_only_the_files_that_the_proxy_stands_in_for() -> None:
    assert [node.path for node in proxied(GPU).nodes] == ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"]
    assert proxied(GPU).masked == ()
    assert proxied(GPU).mounts == GPU.mounts
