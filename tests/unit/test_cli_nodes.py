"""`atoll nodes show`: the images of a node."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from atoll.cli.main import cli
from atoll.cli.session import Session
from atoll.model.records import Capacity, Node, Prefetch
from atoll.sdk.fake import FakeApi

HERE, COMING, LATER = (f"cell.internal/default/{name}@sha256:{name * 16}" for name in ("abcd", "bcde", "cdef"))


def shown(api: FakeApi, directory: Path) -> list[str]:
    environment = {"ATOLL_API": "http://fake", "ATOLL_TOKEN": "t", "XDG_CONFIG_HOME": str(directory), "NO_COLOR": "1"}
    result = CliRunner().invoke(
        cli, ["nodes", "show", "n1"], obj=Session(dial=lambda _: api), env=environment | {"COLUMNS": "200"}, catch_exceptions=False
    )
    assert result.exit_code == 0, result.stderr
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_what_a_node_fetches_before_it_is_needed_is_shown_with_how_far_it_is(tmp_path: Path) -> None:
    api = FakeApi()
    api.put("nodes", "n1", Node(name="n1", capacity=Capacity(cpu_milli=2000, memory_bytes=4 << 30, disk_bytes=50 << 30)))
    lines = shown(api, tmp_path)
    assert "images none" in lines
    assert not any("LATER" in line for line in lines)
    api.put("prefetches", "n1", Prefetch(node="n1", images=(HERE, COMING, LATER)))
    api.node_images["n1"] = (HERE.partition("@")[2], "sha256:another")
    api.node_fetches["n1"] = f"{COMING} (download 12.0MiB of 500MiB)"
    lines = shown(api, tmp_path)
    assert "images 2 here" in lines
    assert lines[-3:] == [f"{HERE} here", f"{COMING} fetching (download 12.0MiB of 500MiB)", f"{LATER} waits"]
