"""`atoll plan` and `atoll explain` against an API in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from atoll.cli.main import cli
from atoll.cli.planning import placed_words
from atoll.cli.session import Session
from atoll.model.devices import GpuDevice
from atoll.model.records import App, Capacity, Instance, Node, OwnerKind
from atoll.model.spec import AppSpec, RuntimeName
from atoll.sdk.fake import FakeApi

GIB = 1 << 30
APP = """
name = "web"
image = "registry.example/web:1"
[resources]
memory = "1GiB"
[scale]
replicas = 3
"""


class Atoll:
    def __init__(self, directory: Path) -> None:
        self.api = FakeApi()
        self.directory = directory
        for name, memory in (("n1", 2 * GIB), ("n2", 2 * GIB), ("small", GIB >> 1)):
            capacity = Capacity(cpu_milli=4000, memory_bytes=memory, disk_bytes=100 * GIB)
            self.api.put("nodes", name, Node(name=name, capacity=capacity, runtimes=(RuntimeName.RUNC,)))
        self.environment = {"ATOLL_API": "http://fake", "ATOLL_TOKEN": "t", "XDG_CONFIG_HOME": str(directory), "NO_COLOR": "1"}

    def run(self, *arguments: str, code: int = 0) -> Result:
        session = Session(dial=lambda _: self.api)
        result = CliRunner().invoke(cli, list(arguments), obj=session, env=self.environment, catch_exceptions=False)
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
        return result

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code).stdout)


@pytest.fixture
def atoll(tmp_path: Path) -> Atoll:
    (tmp_path / "atoll.toml").write_text(APP)
    return Atoll(tmp_path)


def test_a_plan_shows_the_nodes_their_scores_and_what_the_others_lack(atoll: Atoll) -> None:
    before = atoll.api.revision
    said = atoll.run("plan", str(atoll.directory))
    assert "all 3 instances of web find a node" in said.stderr
    assert "n1" in said.stdout
    assert "PACKING" in said.stdout
    assert "-0" not in said.stdout.split()
    assert "the node with the highest TOTAL is taken first" in said.stderr
    assert "NODES TURNED AWAY" in said.stdout
    assert "memory" in said.stdout
    assert atoll.json("plan", str(atoll.directory))["placed"] == {"n1": 2, "n2": 1}
    assert atoll.api.revision == before


def test_a_plan_that_does_not_fit_says_what_would_help_and_fails(atoll: Atoll) -> None:
    file = atoll.directory / "big.toml"
    file.write_text(APP.replace("1GiB", "1536MiB"))
    said = atoll.run("plan", "-f", str(file), code=1)
    assert "2 of 3 instances of web find a node" in said.stderr
    assert "no-memory: none of 3 nodes fits" in said.stderr
    assert "mend: needs 1.0GiB more memory on the best node, n1" in said.stderr
    assert atoll.json("plan", "-f", str(file), code=1)["unplaced"] == 1


@pytest.mark.parametrize(
    ("instances", "unplaced", "words"),
    [
        (0, 0, "web wants no instance now"),
        (1, 0, "the one instance of web finds a node"),
        (1, 1, "the one instance of web finds no node"),
        (3, 0, "all 3 instances of web find a node"),
        (3, 1, "2 of 3 instances of web find a node"),
        (3, 3, "none of 3 instances of web finds a node"),
    ],
)
def test_what_a_plan_finds_is_said_once_in_words(instances: int, unplaced: int, words: str) -> None:
    assert placed_words("web", instances, unplaced) == words


def test_an_instance_is_explained(atoll: Atoll) -> None:
    atoll.run("deploy", str(atoll.directory))
    id = atoll.json("ps")[0]["instance"]["id"]
    said = atoll.run("explain", id)
    assert f"{id} is on n1; of 3 nodes" in said.stderr
    assert atoll.json("explain", id)["explanation"]["nodes"] == 3
    assert "no app, job or instance 'nobody'" in atoll.run("explain", "nobody", code=4).stderr


def test_to_explain_an_app_names_the_instances_that_can_be_explained(atoll: Atoll) -> None:
    atoll.run("deploy", str(atoll.directory))
    ids = sorted(view["instance"]["id"] for view in atoll.json("ps"))
    said = atoll.run("explain", "web", code=4).stderr
    assert f"'web' is no instance; an instance is what is explained, and it has: {', '.join(ids)}" in said
    assert f"mend: atoll explain {ids[0]}" in said or f"atoll explain {ids[0]}" in said
    atoll.run("scale", "web", "0")
    assert "'web' has no instances" in atoll.run("explain", "web", code=4).stderr


def test_a_jobs_spec_is_planned_as_a_job(atoll: Atoll) -> None:
    file = atoll.directory / "job.toml"
    file.write_text('kind = "job"\nname = "work"\nimage = "x/y:1"\ncompletions = 9\nparallelism = 4\n')
    assert atoll.json("plan", "-f", str(file))["instances"] == 4


def test_a_plan_with_gpus_shows_the_devices_and_the_wall(atoll: Atoll) -> None:
    devices = tuple(GpuDevice(id=f"GPU-{n}", model="NVIDIA H100", memory_bytes=80 * GIB) for n in range(2))
    capacity = Capacity(cpu_milli=4000, memory_bytes=8 * GIB, disk_bytes=100 * GIB, gpus=devices)
    atoll.api.put("nodes", "g1", Node(name="g1", capacity=capacity, runtimes=(RuntimeName.RUNC,)))
    (atoll.directory / "atoll.toml").write_text(APP.replace('"1GiB"', '"1GiB"\ngpu = { count = 0.5 }'))
    said = atoll.run("plan", str(atoll.directory))
    assert "50 %" in said.stdout or "50%" in said.stdout
    assert "time-slice (a convention" in said.stderr
    view = atoll.json("plan", str(atoll.directory))
    assert view["explanation"]["candidates"][0]["gpus"][0]["device"] == "GPU-0"
    (atoll.directory / "atoll.toml").write_text(APP.replace('"1GiB"', '"1GiB"\ngpu = { model = "B200" }'))
    assert "the models there are NVIDIA H100" in atoll.run("plan", str(atoll.directory), code=1).stderr


def test_defrag_proposes_moves_and_writes_nothing(atoll: Atoll) -> None:
    assert "no move would free" in atoll.run("defrag").stdout + atoll.run("defrag").stderr
    for number, node in enumerate(("n1", "n2")):
        name = f"app{number}"
        atoll.api.put("apps", f"default/{name}", made_app(name))
        at = Instance(id=f"{name}-1", project="default", owner_kind=OwnerKind.APP, owner=name, release=1, node=node, created_at=1.0)
        atoll.api.put("instances", f"default/{name}-1", at)
    before = atoll.api.revision
    said = atoll.run("defrag").stdout
    assert "node n1: 4 cores, 2.0GiB" in said
    assert "app0-1" in said
    [step] = atoll.json("defrag")["steps"]
    assert [(move["node"], move["to"]) for move in step["moves"]] == [("n1", "n2")]
    assert atoll.api.revision == before


def made_app(name: str) -> App:
    spec = AppSpec(name=name, image="x")
    return App(project="default", name=name, spec=spec, release=1, replicas=1, created_at=1.0, updated_at=1.0)
