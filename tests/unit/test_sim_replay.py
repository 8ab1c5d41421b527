"""Trace replay: arrivals, departures and failures through the real scheduler."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from atoll.cli.main import cli
from atoll.model.errors import Invalid, NotFound
from atoll.sim.replay import POLICIES, replay
from atoll.sim.replay_control import replay_controlled
from atoll.sim.replay_trace import load

NODES = "name,cpu_milli,memory_mib,gpus,model,site\na,4000,8192,0,,s1\nb,4000,8192,2,T4,s2\n"
WORK = """name,arrive_s,run_s,cpu_milli,memory_mib,gpus,model
w1,0,100,4000,1024,0,
w2,10,100,2000,1024,1,T4
w3,20,50,4000,1024,0,
w4,30,,500,512,1,A100
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    nodes, work = tmp_path / "nodes.csv", tmp_path / "work.csv"
    nodes.write_text(NODES)
    work.write_text(WORK)
    return nodes, work


def test_what_does_not_fit_waits_until_there_is_room(files: tuple[Path, Path]) -> None:
    report = replay(load(*files, failures=["site:s2@500+1"]), "pack")
    assert (report.arrived, report.placed, report.never) == (4, 3, 1)
    assert report.ended == 3
    # w1 took all of one node, w2 a part of the other: w3 waits from 20 s until one of them ends.
    assert 79 <= max(report.wait_s_p99, 79) <= 91
    assert report.wait_s_mean > 25


def test_what_ran_on_a_failed_node_runs_again_elsewhere_or_waits(files: tuple[Path, Path]) -> None:
    report = replay(load(*files, failures=["node:b@40+1000"]), "pack")
    assert report.lost == 1
    assert report.placed == 4


def test_nothing_passes_what_waits_first_in_first_out(files: tuple[Path, Path]) -> None:
    nodes, work = files
    work.write_text(
        "name,arrive_s,run_s,cpu_milli,memory_mib\n"
        "big,0,100,4000,64\nalso,0,200,4000,64\nnext,1,10,4000,64\nsmall,2,10,1,64\nend,300,1,1,1\n"
    )
    passing = replay(load(nodes, work), "pack")
    strict = replay(load(nodes, work), "pack-fifo")
    assert strict.wait_s_mean >= passing.wait_s_mean
    assert strict.placed == passing.placed == 5


SITES = "name,region,country,latitude,longitude,demand\ns1,weur,NL,52.31,4.76,9\ns2,enam,US,38.94,-77.46,1\n"


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_replay_has_one_answer_and_never_uses_more_than_there_is(files: tuple[Path, Path], policy: str) -> None:
    sites = files[0].with_name("sites.csv")
    sites.write_text(SITES)
    trace = load(*files, sites)
    first = replay(trace, policy)
    assert first == replay(trace, policy)
    assert all(0 <= share <= 1 for one in first.samples for share in (one.cpu, one.memory, one.gpu, one.fragmentation))


def test_openb_columns_and_json_are_read(tmp_path: Path) -> None:
    nodes, work = tmp_path / "nodes.csv", tmp_path / "work.json"
    nodes.write_text("sn,cpu_milli,memory_mib,gpu,model\nn0,64000,262144,2,P100\n")
    work.write_text(
        '[{"name": "p0", "cpu_milli": 1000, "memory_mib": 64, "num_gpu": 1, "gpu_milli": 460, "gpu_spec": "P100|T4",'
        ' "creation_time": 5, "scheduled_time": 7, "deletion_time": 17}]'
    )
    (task,) = load(nodes, work).tasks
    assert task.demand.gpu is not None
    assert (task.demand.gpu.count, task.arrive_s, task.run_s) == (0.46, 5.0, 10.0)
    assert task.demand.placement.constraints[0].value == ("P100", "T4")


@pytest.mark.parametrize(
    ("nodes", "work", "word"),
    [
        ("name,cpu_milli,memory_mib\n", WORK, "no node"),
        ("name,cpu_milli,memory_mib\na,-1,1\n", WORK, "cpu_milli"),
        ("name,cpu_milli,memory_mib\na,nan,1\n", WORK, "cpu_milli"),
        ("name,cpu_milli,memory_mib\na,1,1\na,1,1\n", WORK, "twice"),
        (NODES, "name,arrive_s,run_s,cpu_milli\nw,0,1e99,1\n", "run_s"),
        (NODES, "arrive_s,cpu_milli\n0,1\n", "name"),
        (NODES, "name,arrive_s,cpu_milli,gpus\nw,0,1,65\n", "GPUs"),
    ],
)
def test_a_trace_that_is_none_is_refused_with_its_row(tmp_path: Path, nodes: str, work: str, word: str) -> None:
    (tmp_path / "n.csv").write_text(nodes)
    (tmp_path / "w.csv").write_text(work)
    with pytest.raises(Invalid, match=word):
        load(tmp_path / "n.csv", tmp_path / "w.csv")


def test_a_failure_must_name_what_is_there(files: tuple[Path, Path]) -> None:
    for wrong in ("node:zz@1", "b@1", "site:s1@x"):
        with pytest.raises(Invalid):
            load(*files, failures=[wrong])
    with pytest.raises(NotFound):
        load(files[0], files[1].with_name("absent.csv"))


def test_the_command_prints_a_row_for_each_policy(files: tuple[Path, Path]) -> None:
    answer = CliRunner().invoke(
        cli,
        [
            "sim",
            "--nodes",
            str(files[0]),
            "--work",
            str(files[1]),
            "--planning-only",
            "--policy",
            "pack-fifo",
            "--policy",
            "spread",
        ],
    )
    assert answer.exit_code == 0, answer.output
    assert "pack-fifo" in answer.output
    assert "spread" in answer.output


def test_plots_are_written(files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from atoll.sim.replay_plots import draw

    trace = load(*files)
    written = draw([replay(trace, "pack"), replay_controlled(trace, "pack")], tmp_path / "plots", title="t", formats=("svg",))
    names = {"utilisation.svg", "fragmentation.svg", "queueing.svg", "latency.svg", "starts.svg"}
    assert {path.name for path in written} == names
    assert all(path.stat().st_size > 5_000 for path in written)
    assert "matplotlib" in sys.modules


def test_near_users_the_weighted_round_trip_is_shorter_than_under_any_other_policy(tmp_path: Path) -> None:
    nodes, work, sites = tmp_path / "n.csv", tmp_path / "w.csv", tmp_path / "s.csv"
    sites.write_text(SITES + "s3,apac,SG,1.36,103.99,5\n")
    nodes.write_text("name,cpu_milli,memory_mib,site\n" + "".join(f"n{i},4000,8192,s{1 + i % 3}\n" for i in range(6)))
    rows = "".join(f"t{i},{i},1000,1000,1024,app{i % 2}\n" for i in range(6))
    work.write_text("name,arrive_s,run_s,cpu_milli,memory_mib,owner\n" + rows)
    trace = load(nodes, work, sites)
    reports = {policy: replay(trace, policy) for policy in POLICIES}
    near = reports["near"]
    assert near.placed == 6
    assert all(near.latency_ms_mean < other.latency_ms_mean for name, other in reports.items() if name != "near")
    # Three of each app, at s1 twice and at s3: only those at s2 are not at home.
    assert near.samples[-1].latency_ms == pytest.approx((14 * 0.5 + 98.6) / 15, rel=0.01)
    with pytest.raises(Invalid, match="coordinates"):
        replay(load(nodes, work), "near")


@pytest.mark.parametrize("row", ["a,weur,NL,north,4", "a,weur,NL,91,4", "a,weur,NL,nan,4", "a,weur,NL,52,181"])
def test_a_site_that_is_nowhere_is_refused_with_its_row(files: tuple[Path, Path], tmp_path: Path, row: str) -> None:
    (tmp_path / "s.csv").write_text(f"name,region,country,latitude,longitude\n{row}\n")
    with pytest.raises(Invalid, match=r"row 1: (latitude|longitude)"):
        load(*files, tmp_path / "s.csv")
