"""The table of runtimes and their features, and the refusals that are made from it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from atoll.cli.main import cli
from atoll.cli.session import Session
from atoll.model.errors import Unsupported
from atoll.model.ports.runtime import Feature
from atoll.model.records import Capacity, Node
from atoll.model.spec import SNAPSHOT_RUNTIMES, RuntimeName
from atoll.runtimes.offer import FEATURES, RUNTIMES, having, require
from atoll.sdk.fake import FakeApi


def test_no_two_runtimes_share_user_ids() -> None:
    taken: set[int] = set()
    for runtime in RUNTIMES:
        assert taken.isdisjoint(runtime.slots)
        taken.update(runtime.slots)


def test_a_feature_that_a_runtime_lacks_is_refused_with_those_that_have_it() -> None:
    require(RuntimeName.RUNC, Feature.RESIZE)
    with pytest.raises(Unsupported, match="gvisor has no resize") as raised:
        require(RuntimeName.GVISOR, Feature.RESIZE)
    assert raised.value.mend == "use one of: runc, crun, lxc, firecracker, cloud-hypervisor, qemu"
    with pytest.raises(Unsupported) as raised:
        require(RuntimeName.RUNC, Feature.SNAPSHOT)
    assert raised.value.mend == "use one of: gvisor, firecracker, cloud-hypervisor, qemu"
    assert set(having(Feature.SNAPSHOT)) == set(having(Feature.FORK)) == set(SNAPSHOT_RUNTIMES)


def atoll(*arguments: str) -> Result:
    api = FakeApi()
    capacity = Capacity(cpu_milli=1000, memory_bytes=1, disk_bytes=1)
    api.put("nodes", "n1", Node(name="n1", capacity=capacity, runtimes=(RuntimeName.GVISOR,), registered_at=1.0))
    environment = {"ATOLL_API": "http://fake", "ATOLL_TOKEN": "t", "NO_COLOR": "1"}
    return CliRunner().invoke(cli, ["runtimes", *arguments], obj=Session(dial=lambda _: api), env=environment)


def test_the_table_is_the_code_s_and_says_which_nodes_offer_what() -> None:
    rows = {row["runtime"]: row for row in json.loads(atoll("--json").stdout)}
    assert set(rows) == set(FEATURES)
    for name, features in FEATURES.items():
        assert set(rows[name]["features"]) == features
    assert rows["gvisor"]["nodes"] == ["n1"]
    assert rows["runc"]["nodes"] == []
    lines = atoll().stdout.splitlines()
    assert lines[0].split()[:3] == ["RUNTIME", "ISOLATION", "EXEC"]
    assert any(line.split()[0] == "gvisor" and line.split()[-1] == "n1" for line in lines)


def test_a_need_that_is_not_met_fails_with_those_that_can() -> None:
    result = atoll("--runtime", "gvisor", "--needs", "resize")
    assert result.exit_code != 0
    assert "runc, crun" in result.stderr
    assert atoll("--runtime", "gvisor", "--needs", "exec").exit_code == 0
    assert "one of: runc" in atoll("--runtime", "nope").stderr
    assert {row["runtime"] for row in json.loads(atoll("--needs", "resize", "--json").stdout)} == {*having(Feature.RESIZE)}
