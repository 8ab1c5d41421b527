"""Trace replay through a whole cell: API, controllers, scheduler, detection and light agents."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from atoll.cli.main import cli
from atoll.model.errors import Invalid
from atoll.sim.replay import replay
from atoll.sim.replay_control import POLICIES, replay_controlled
from atoll.sim.replay_fleet import START_S
from atoll.sim.replay_report import Living, Report
from atoll.sim.replay_trace import Trace, load

NODES = "name,cpu_milli,memory_mib,gpus,model,site\na,4000,8192,0,,s1\nb,4000,8192,2,T4,s2\nc,4000,8192,0,,s2\n"
WORK = """name,arrive_s,run_s,cpu_milli,memory_mib,gpus,model
w1,0,100,4000,1024,0,
w2,10,100,2000,1024,1,T4
w3,20,50,4000,1024,0,
w4,30,50,4000,512,0,
w5,600,,500,512,1,A100
"""
SITES = (
    "name,region,country,latitude,longitude,demand\ns1,weur,NL,52.31,4.76,9\ns2,enam,US,38.94,-77.46,1\ns3,apac,SG,1.36,103.99,5\n"
)


def trace_of(tmp_path: Path, work: str = WORK, *, nodes: str = NODES, sites: str = "", failures: tuple[str, ...] = ()) -> Trace:
    for name, text in (("nodes.csv", nodes), ("work.csv", work), ("sites.csv", sites)):
        (tmp_path / name).write_text(text)
    return load(tmp_path / "nodes.csv", tmp_path / "work.csv", tmp_path / "sites.csv" if sites else None, failures)


def living(report: Report) -> Living:
    assert report.living is not None
    return report.living


@pytest.mark.parametrize("policy", ["pack", "spread"])
def test_work_arrives_runs_and_departs_and_what_does_not_fit_waits_for_room(tmp_path: Path, policy: str) -> None:
    report = replay_controlled(trace_of(tmp_path), policy)
    assert (report.arrived, report.placed, report.ended, report.never) == (5, 4, 4, 1)
    started = living(report).started
    assert started is not None
    assert started.count == 4
    assert started.p50_s >= START_S
    # The nodes without a GPU are taken until 70 s, when what came at 20 s ends; until then what came at 30 s waits.
    assert 40 <= started.max_s <= 45
    assert report.waiting_max == 1
    assert report.samples[-1].running == 0


def test_a_whole_cell_places_a_quiet_trace_as_its_scheduler_alone_does(tmp_path: Path) -> None:
    trace = trace_of(tmp_path)
    whole, alone = replay_controlled(trace, "pack"), replay(trace, "pack")
    assert (whole.placed, whole.never, whole.ended) == (alone.placed, alone.never, alone.ended)
    assert whole.cpu_mean == pytest.approx(alone.cpu_mean, abs=0.02)
    assert whole.gpu_mean == pytest.approx(alone.gpu_mean, abs=0.02)


def test_calls_of_the_scheduler_are_told_where_they_are_counted_and_through_a_cell_as_unknown(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, "name,arrive_s,run_s,cpu_milli,memory_mib\nw1,0,5,1000,512\n")
    alone, whole = (msgspec.json.decode(msgspec.json.encode(run(trace, "pack"))) for run in (replay, replay_controlled))
    assert alone["plans"] > 0
    assert whole["plans"] is None


@pytest.mark.parametrize("policy", ["pack", "spread"])
def test_a_node_that_fails_is_found_by_the_detection_and_what_it_ran_is_replaced(tmp_path: Path, policy: str) -> None:
    work = "name,arrive_s,run_s,cpu_milli,memory_mib\nw1,0,2000,3000,512\nw2,1,2000,3000,512\nlast,900,1,1,1\n"
    report = replay_controlled(trace_of(tmp_path, work, failures=("node:a@100+500",)), policy)
    found, replaced = living(report).found, living(report).replaced
    assert (report.lost, report.placed, report.never) == (1, 4, 0)
    assert found is not None
    assert 4.0 <= found.max_s <= 5.0  # docs/detection.md: silent for 4.2 s
    assert replaced is not None
    assert found.max_s + START_S <= replaced.max_s <= found.max_s + START_S + 5.0


@pytest.mark.parametrize("policy", ["pack", "spread"])
def test_what_is_placed_on_a_machine_before_anybody_knows_that_it_failed_runs_elsewhere(tmp_path: Path, policy: str) -> None:
    nodes = "name,cpu_milli,memory_mib\na,4000,8192\nb,4000,8192\n"
    work = "name,arrive_s,run_s,cpu_milli,memory_mib\nw1,0,9000,3000,512\nw2,101,9000,1000,512\nlast,5000,1,1,1\n"
    report = replay_controlled(trace_of(tmp_path, work, nodes=nodes, failures=("node:a@100+3000",)), policy)
    started, replaced = living(report).started, living(report).replaced
    assert (report.lost, report.never) == (1, 0)
    assert started is not None
    assert started.count == 3
    assert 4.0 <= started.max_s <= 12.0  # found at 104.3 s, and begun anew on the other node
    assert replaced is not None
    assert replaced.count == 1
    assert living(report).passed_s < 300, "the machine's time away is passed over"


def test_a_machine_that_is_back_at_once_runs_on_what_it_ran(tmp_path: Path) -> None:
    work = "name,arrive_s,run_s,cpu_milli,memory_mib\nw1,0,,3000,512\nw2,1,,3000,512\nlast,900,1,1,1\n"
    report = replay_controlled(trace_of(tmp_path, work, failures=("node:a@100+1",)), "pack")
    replaced = living(report).replaced
    assert living(report).found is None
    assert replaced is not None
    assert replaced.max_s == pytest.approx(1 + START_S, abs=0.5)


def test_a_site_that_takes_most_nodes_with_it_is_waited_for_as_the_brake_says(tmp_path: Path) -> None:
    nodes = "name,cpu_milli,memory_mib,site\n" + "".join(f"n{place},4000,8192,s{place % 2}\n" for place in range(8))
    work = (
        "name,arrive_s,run_s,cpu_milli,memory_mib\n" + "".join(f"w{place},0,,1000,512\n" for place in range(8)) + "z,2000,1,1,1\n"
    )
    report = replay_controlled(trace_of(tmp_path, work, nodes=nodes, failures=("site:s0@100+1500",)), "spread")
    found = living(report).found
    assert (living(report).nodes_failed, living(report).braked) == (4, 1)
    assert found is not None
    assert found.max_s > 600  # BRAKE: ten minutes
    assert report.never == 0


def test_near_its_users_the_weighted_round_trip_is_shorter_than_elsewhere(tmp_path: Path) -> None:
    nodes = "name,cpu_milli,memory_mib,site\n" + "".join(f"n{place},4000,8192,s{1 + place % 3}\n" for place in range(6))
    rows = "".join(f"t{place},{place},1000,1000,1024,app{place % 2}\n" for place in range(6))
    work = "name,arrive_s,run_s,cpu_milli,memory_mib,owner\n" + rows + "end,500,1,1,1,app0\n"
    trace = trace_of(tmp_path, work, nodes=nodes, sites=SITES)
    reports = {policy: replay_controlled(trace, policy) for policy in POLICIES}
    assert all(reports["near"].latency_ms_mean < reports[name].latency_ms_mean for name in ("pack", "spread"))


def test_a_quiet_year_is_passed_over_and_a_replay_has_one_answer(tmp_path: Path) -> None:
    work = "name,arrive_s,run_s,cpu_milli,memory_mib\nw1,0,30000000,1000,512\nw2,31000000,10,1000,512\nw3,31500000,1,1,1\n"
    trace = trace_of(tmp_path, work)
    first = replay_controlled(trace, "pack")
    assert first == replay_controlled(trace, "pack")
    assert first.ended == 2
    assert living(first).passed_s < 120
    assert first.cpu_mean == pytest.approx(30 / 31.5 / 12, rel=0.02)


def test_what_a_cell_does_not_do_is_refused_before_anything_is_replayed(tmp_path: Path) -> None:
    trace = trace_of(tmp_path)
    with pytest.raises(Invalid, match="pack-fifo"):
        replay_controlled(trace, "pack-fifo")
    with pytest.raises(Invalid, match="coordinates"):
        replay_controlled(trace, "near")
    arguments = ["sim", "--nodes", str(tmp_path / "nodes.csv"), "--work", str(tmp_path / "work.csv"), "--policy", "pack-fifo"]
    answer = CliRunner().invoke(cli, arguments)
    assert answer.exit_code == 2
    assert "add --planning-only" in answer.output


def test_the_command_tells_what_it_includes_and_when_things_ran(tmp_path: Path) -> None:
    trace_of(tmp_path)
    arguments = ["sim", "--nodes", str(tmp_path / "nodes.csv"), "--work", str(tmp_path / "work.csv"), "--fail", "node:b@50+100"]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    for word in ("through API, controllers", "RUNS P50", "REPLACED P50", "pack", "spread"):
        assert word in shown.output
    headings = next(line for line in shown.stdout.splitlines() if line.startswith("POLICY"))
    for column in ("PLACED", "UNPLACED", "ENDED", "LOST", "FOUND", "FRAGMENTED"):
        assert column in headings.split()
        assert f"{column}: " in shown.stderr, f"nothing says what {column} means"
    answer = CliRunner().invoke(cli, [*arguments, "--json", "--policy", "pack"])
    found = msgspec.json.decode(answer.stdout)
    assert found["reports"][0]["living"]["nodes_failed"] == 1


def test_the_help_of_the_replay_names_no_api_which_it_does_not_ask() -> None:
    shown = CliRunner().invoke(cli, ["sim", "--help"])
    assert "--json" in shown.output
    for option in ("--api", "--ca", "--project"):
        assert option not in shown.output
    [summary] = [line for line in CliRunner().invoke(cli, ["--help"]).output.splitlines() if line.startswith("  sim ")]
    assert "cell" in summary
