"""Every request that the drivers of Firecracker and Cloud Hypervisor can make, held against the monitors' OpenAPI documents."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from openapi_check import Document, cloud_hypervisor, firecracker

from atoll.model.ports.runtime import Limits
from atoll.runtimes.vm import cloud_hypervisor_api as hypervisor
from atoll.runtimes.vm import firecracker_api as fire
from atoll.runtimes.vm.boxes import VmPlan
from atoll.runtimes.vm.http_api import Call, fault_words
from atoll.runtimes.vm.jailer import Jailer, furnish, jail_id, jailer_command
from atoll.runtimes.vm.rates import Rates, limiter
from atoll.runtimes.vm.tap import GuestLink

FIRECRACKER = firecracker()
CLOUD_HYPERVISOR = cloud_hypervisor()
RATES = Rates(disk_bytes=100 << 20, disk_operations=5000, net_bytes=50 << 20, net_packets=20_000)


def plan(**changes: Any) -> VmPlan:
    fields: dict[str, Any] = {
        "id": "i1",
        "directory": "/box/i1",
        "uid": 1000,
        "vcpus": 3,
        "ram_bytes": 192 << 20,
        "limits": Limits(cpu_milli=2500, memory_bytes=128 << 20, disk_bytes=1 << 30, pids=64),
        "disk_bytes": 1 << 30,
        "image": "/images/x",
        "netns": "/run/netns/i1",
        "link": GuestLink("10.0.0.5", "02:61:74:00:00:05", 1500),
        "stdout": "/o",
        "stderr": "/e",
        "hostname": "i1",
        "process": {"args": ["a"], "env": ["SECRET=hidden"]},
    }
    return VmPlan(**(fields | changes))


FIRE_CALLS: list[Call] = [
    *fire.observing(),
    fire.SERIAL,
    *fire.machine(plan(), fire.MachineOptions(rates=RATES, track_dirty_pages=True, metadata=True)),
    *fire.machine(plan(vcpus=1, link=None), fire.MachineOptions(), console=False),
    fire.START,
    fire.CTRL_ALT_DEL,
    fire.FLUSH_METRICS,
    fire.PAUSE,
    fire.RESUME,
    fire.DESCRIBE,
    fire.VERSION,
    fire.FULL_CONFIG,
    fire.MACHINE_CONFIG,
    fire.BALLOON,
    fire.BALLOON_STATISTICS,
    fire.METADATA,
    fire.balloon(64),
    fire.balloon_polling(1),
    fire.metadata({"a": {"b": 1}}),
    fire.metadata({"a": None}, merge=True),
    *fire.rate(RATES, network=True),
    *fire.rate(Rates(), network=False),
    fire.snapshot("/state", "/memory"),
    fire.snapshot("/state", "/memory", changes_only=True),
    fire.restore("/state", "/memory"),
    fire.restore("/state", "/uffd.sock", faults=True, resume=True, track_dirty_pages=True, taps=[("eth0", "tap0")], vsock="/v"),
]
HYPERVISOR_CALLS: list[Call] = [
    hypervisor.PING,
    hypervisor.INFO,
    hypervisor.COUNTERS,
    *hypervisor.making(plan(), hypervisor.MachineOptions(rates=RATES, landlock=True)),
    *hypervisor.making(plan(pci=("0000:01:00.0", "0000:01:00.1")), hypervisor.MachineOptions(landlock=True)),
    *hypervisor.making(plan(link=None), hypervisor.MachineOptions()),
    hypervisor.create(plan(), hypervisor.MachineOptions(queues=4), vhost_socket="/vhost.sock"),
    hypervisor.BOOT,
    hypervisor.PAUSE,
    hypervisor.RESUME,
    hypervisor.SHUTDOWN,
    hypervisor.DELETE,
    hypervisor.REBOOT,
    hypervisor.POWER_BUTTON,
    hypervisor.END,
    hypervisor.add_device("0000:01:00.0"),
    hypervisor.remove_device("pci-0"),
    hypervisor.resize(vcpus=2),
    hypervisor.resize(ram_bytes=256 << 20, balloon_bytes=0),
    hypervisor.snapshot("/box/snapshot"),
    hypervisor.restore("/box/snapshot"),
    hypervisor.restore("/box/snapshot", on_demand=True, resume=True),
]


def name_of(call: Call) -> str:
    return f"{call.method} {call.path}"


def problem(document: Document, call: Call) -> str:
    body = None if call.body is None else msgspec.json.decode(msgspec.json.encode(call.body))
    return document.request_problem(call.method, document.base + call.path, body)


@pytest.mark.parametrize("call", FIRE_CALLS, ids=name_of)
def test_firecracker_is_asked_what_its_document_knows(call: Call) -> None:
    assert problem(FIRECRACKER, call) == ""


@pytest.mark.parametrize("call", HYPERVISOR_CALLS, ids=name_of)
def test_cloud_hypervisor_is_asked_what_its_document_knows(call: Call) -> None:
    assert problem(CLOUD_HYPERVISOR, call) == ""


def test_the_check_itself_finds_what_is_wrong() -> None:
    bad = fire.put("/machine-config", {"vcpu_count": 0, "mem_size_mib": 1})
    assert "minimum" in problem(FIRECRACKER, bad)
    assert "unexpected" in problem(FIRECRACKER, fire.put("/vsock", {"guest_cid": 3, "uds_path": "/v", "port": 1}))
    assert "required" in problem(FIRECRACKER, fire.put("/snapshot/load", {}))
    assert "not in the document" in problem(FIRECRACKER, fire.put("/nothing", {}))
    assert "needs a body" in problem(CLOUD_HYPERVISOR, Call(method="PUT", path="/vm.create"))
    assert "takes no body" in problem(CLOUD_HYPERVISOR, Call(method="PUT", path="/vm.boot", body={}))
    assert "minimum" in problem(CLOUD_HYPERVISOR, hypervisor.resize(vcpus=0))


def test_every_refusal_that_the_documents_know_is_understood() -> None:
    """Firecracker says why in `fault_message`; Cloud Hypervisor's document has codes alone, and it sends a list of words."""
    seen = 0
    for document, body in (
        (FIRECRACKER, b'{"fault_message":"the reason"}'),
        (CLOUD_HYPERVISOR, b'["Error from API","the reason"]'),
    ):
        for method, template in document.operations:
            answers = document.content["paths"][template][method.lower()]["responses"]
            for code in answers:
                if code == "default" or int(code) >= 400:
                    seen += 1
                    status = 400 if code == "default" else int(code)
                    decoded = msgspec.json.decode(body)
                    assert (
                        document.answer_problem(method, document.base + template.replace("{", "").replace("}", ""), status, decoded)
                        == ""
                    )
                    assert "the reason" in fault_words(body)
    assert seen > 100


def test_what_the_drivers_read_of_an_answer_is_what_the_documents_promise() -> None:
    info = {"app_name": "Firecracker", "id": "a", "state": "Not started", "vmm_version": "1.17.0"}
    assert FIRECRACKER.answer_problem("GET", "/", 200, info) == ""
    assert msgspec.convert(info, fire.InstanceInfo).state == "Not started"
    states = FIRECRACKER.content["definitions"]["InstanceInfo"]["properties"]["state"]["enum"]
    assert set(states) == {"Not started", "Running", "Paused"}
    for state in CLOUD_HYPERVISOR.content["components"]["schemas"]["VmState"]["enum"]:
        assert msgspec.convert({"state": state, "config": {}}, hypervisor.Info).state == state
    assert msgspec.convert({"version": "48.0"}, hypervisor.Ping).version == "48.0"
    assert msgspec.convert({"id": "a", "bdf": "0000:00:05.0"}, hypervisor.PciDevice).id == "a"


def test_firecracker_s_machine_is_made_in_the_order_that_it_needs() -> None:
    calls = [name_of(call) for call in fire.machine(plan(), fire.MachineOptions(metadata=True))]
    assert calls == [
        "PUT /machine-config",
        "PUT /boot-source",
        "PUT /drives/image",
        "PUT /drives/disk",
        "PUT /network-interfaces/eth0",
        "PUT /vsock",
        "PUT /balloon",
        "PUT /mmds/config",
        "PUT /mmds",
    ]


def test_firecracker_gives_one_processor_or_an_even_number() -> None:
    assert [fire.vcpus(wanted) for wanted in (1, 2, 3, 4, 31)] == [1, 2, 4, 4, 32]


def test_a_guest_of_firecracker_ends_by_a_reset_and_one_of_cloud_hypervisor_never_resets() -> None:
    words = fire.boot_args(console=True).split()
    assert {"console=ttyS0", "reboot=k", "panic=1", "atoll.channel=vsock", "atoll.end=restart"} <= set(words)
    assert "8250.nr_uarts=0" in fire.boot_args(console=False)
    assert {"panic=0", "atoll.channel=vsock"} <= set(hypervisor.BOOT_ARGS.split())
    assert "atoll.end=restart" not in hypervisor.BOOT_ARGS


def test_the_image_is_shared_read_only_and_the_disk_is_the_instance_s() -> None:
    bodies = {call.path: call.body for call in fire.machine(plan(), fire.MachineOptions())}
    assert bodies["/drives/image"]["is_read_only"] is True
    assert bodies["/drives/disk"]["is_read_only"] is False
    image, disk = hypervisor.create(plan(), hypervisor.MachineOptions()).body["disks"]
    assert (image["readonly"], disk["readonly"]) == (True, False)


def test_no_secret_of_the_instance_is_in_any_request() -> None:
    options = fire.MachineOptions(metadata=True)
    calls = [*fire.machine(plan(), options), *hypervisor.making(plan(), hypervisor.MachineOptions(landlock=True))]
    assert b"hidden" not in msgspec.json.encode(calls)


def test_rates_become_buckets_of_a_tenth_of_a_second() -> None:
    assert limiter(100 << 20, 5000) == {
        "bandwidth": {"size": (100 << 20) // 10, "refill_time": 100},
        "ops": {"size": 500, "refill_time": 100},
    }
    assert limiter(0, 0) == {}
    assert limiter(1, 0) == {"bandwidth": {"size": 1, "refill_time": 100}}
    bodies = {call.path: call.body for call in fire.machine(plan(), fire.MachineOptions())}
    assert "rate_limiter" not in bodies["/drives/disk"]


def test_a_switch_in_user_space_sees_the_guest_s_memory_and_there_is_no_tap() -> None:
    body = hypervisor.create(plan(), hypervisor.MachineOptions(), vhost_socket="/vhost.sock").body
    assert body["memory"]["shared"] is True
    assert body["net"][0]["vhost_socket"] == "/vhost.sock"
    assert "tap" not in body["net"][0]


def test_landlock_lets_the_monitor_at_its_own_directory_and_at_devices_only_with_devices() -> None:
    paths = {rule["path"] for rule in hypervisor.landlock_rules(plan())}
    assert paths == {"/box", "/dev/net/tun"}
    assert "/dev/vfio" in {rule["path"] for rule in hypervisor.landlock_rules(plan(pci=("0000:01:00.0",)))}


def jailer(**changes: Any) -> Jailer:
    fields: dict[str, Any] = {
        "jailer": Path("/usr/local/bin/jailer"),
        "executable": Path("/usr/local/bin/firecracker"),
        "id": "i1",
        "uid": 70001,
        "base": Path("/box/vm"),
        "cgroup_version": 2,
        "parent_cgroup": "/atoll/i1",
        "netns": Path("/run/netns/i1"),
        "file_bytes": 1 << 20,
    }
    return Jailer(**(fields | changes))


def test_the_jailer_is_given_a_user_a_root_a_group_a_namespace_and_processes_of_its_own() -> None:
    line = jailer_command(jailer(), ["--api-sock", "/api.sock"])
    assert line[:3] == ["/usr/local/bin/jailer", "--id", "i1"]
    pairs = dict(zip(line[1::2], line[2::2], strict=False))
    assert pairs["--uid"] == pairs["--gid"] == "70001"
    assert pairs["--chroot-base-dir"] == "/box/vm"
    assert (pairs["--cgroup-version"], pairs["--parent-cgroup"]) == ("2", "atoll/i1")
    assert pairs["--netns"] == "/run/netns/i1"
    assert line[-4:] == ["--new-pid-ns", "--", "--api-sock", "/api.sock"]
    assert "fsize=1048576" in line
    assert jailer().root == Path("/box/vm/firecracker/i1/root")
    assert jailer().pid_file == jailer().root / "firecracker.pid"


def test_the_jailer_writes_limits_of_cgroup_v1_where_it_is_told_to() -> None:
    line = jailer_command(
        jailer(cgroup_version=1, parent_cgroup="", cgroups=(("memory.limit_in_bytes", "1048576"), ("pids.max", "9")), netns=None),
        [],
    )
    assert line[line.index("--cgroup-version") + 1] == "1"
    assert [line[at + 1] for at, word in enumerate(line) if word == "--cgroup"] == ["memory.limit_in_bytes=1048576", "pids.max=9"]
    assert not {"--parent-cgroup", "--netns", "--daemonize"} & set(line)
    assert "--daemonize" in jailer_command(jailer(daemonize=True), [])


def test_names_that_the_jailer_does_not_take_become_such_that_it_does() -> None:
    assert jail_id("web_1.a") == "web-1-a"
    assert len(jail_id("x" * 100)) == 64


def test_a_jail_is_furnished_with_links_and_again_without_harm(tmp_path: Path) -> None:
    source = tmp_path / "image"
    source.write_text("image")
    for _ in range(2):
        furnish(tmp_path / "jail/root", [(source, "image")])
    assert (tmp_path / "jail/root/image").samefile(source)
