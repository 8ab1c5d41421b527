"""Every command against an API in memory: what people see, and what programs get with --json."""

from __future__ import annotations

import io
import json
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from atoll.cli.main import COMMANDS, cli
from atoll.cli.session import Session
from atoll.model.errors import Unavailable
from atoll.model.records import Capacity, Instance, Job, Node, OwnerKind, Severity, Usage
from atoll.model.spec import JobSpec, RuntimeName
from atoll.model.streams import LogLine
from atoll.sdk.fake import FakeApi

APP = """
name = "web"
image = "registry.example/web:1"
[[ports]]
port = 8000
[scale]
replicas = 2
"""


class Atoll:
    """`atoll` as a function, over an API in memory."""

    def __init__(self, directory: Path) -> None:
        self.api = FakeApi()
        self.directory = directory
        self.spec = directory / "atoll.toml"
        self.spec.write_text(APP)
        self.environment = {"ATOLL_API": "http://fake", "ATOLL_TOKEN": "t", "XDG_CONFIG_HOME": str(directory), "NO_COLOR": "1"}

    def run(self, *arguments: str, stdin: str | bytes | None = None, code: int = 0) -> Result:
        session = Session(dial=lambda _: self.api)
        result = CliRunner().invoke(cli, list(arguments), obj=session, input=stdin, env=self.environment, catch_exceptions=False)
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
        return result

    def json(self, *arguments: str, stdin: str | None = None) -> Any:
        return json.loads(self.run(*arguments, "--json", stdin=stdin).stdout)

    def deploy(self) -> None:
        self.run("deploy", str(self.directory))


@pytest.fixture
def atoll(tmp_path: Path) -> Atoll:
    return Atoll(tmp_path)


def test_a_deploy_ends_with_the_url(atoll: Atoll) -> None:
    result = atoll.run("deploy", str(atoll.directory))
    assert result.stdout == "http://web.localhost:8080\n"
    assert "web release 1: 2 ready" in result.stderr


def test_a_deploy_in_json_is_the_app_alone(atoll: Atoll) -> None:
    view = atoll.json("deploy", "-f", str(atoll.spec))
    assert view["app"]["name"] == "web"
    assert view["status"]["phase"] == "running"
    assert view["urls"] == ["http://web.localhost:8080"]


def test_a_deploy_of_an_image_needs_no_file(atoll: Atoll) -> None:
    view = atoll.json(
        "deploy",
        "--image",
        "registry.example/x:2",
        "--name",
        "x",
        "--port",
        "80",
        "--replicas",
        "3",
        "-e",
        "A=b=c",
        "-p",
        "default",
    )
    spec = view["app"]["spec"]
    assert (spec["image"], spec["ports"][0]["port"], spec["env"], view["app"]["replicas"]) == (
        "registry.example/x:2",
        80,
        {"A": "b=c"},
        3,
    )


def test_a_deploy_that_fails_says_why_with_the_last_lines_and_exits_1(atoll: Atoll) -> None:
    atoll.api.failing["web"] = "exited with status 1"
    for index in range(2):
        atoll.api.logs[f"web-11{index}abc"] = [LogLine(at=1.0, stream="stderr", text="ModuleNotFoundError: no module named flask")]
    result = atoll.run("deploy", str(atoll.directory), code=1)
    assert "error: exited with status 1" in result.stderr or "cannot run: exited with status 1" in result.stderr
    assert "│ ModuleNotFoundError: no module named flask" in result.stderr
    assert "mend: " in result.stderr
    assert result.stdout == ""


def test_a_detached_deploy_returns_at_once(atoll: Atoll) -> None:
    atoll.api.failing["web"] = "never comes up"
    assert "follow it with: atoll status web" in atoll.run("deploy", str(atoll.directory), "--detach").stderr


def test_the_same_deploy_again_makes_no_new_release(atoll: Atoll) -> None:
    atoll.deploy()
    assert atoll.json("deploy", str(atoll.directory))["app"]["release"] == 1


@pytest.mark.parametrize(
    ("text", "said", "mend"),
    [
        ('name = "web"\nimage = "x"\nreplcias = 3', "atoll.toml: unknown field `replcias`", "`atoll schema app` prints all"),
        ('name = "web"\nimage = "x"\nresorces = {}', "unknown field `resorces`", "did you mean `resources`?"),
        ('name = "web"\nimage = "x"\n[resources]\nmemry = "1GiB"', "resources: ", "did you mean `memory`?"),
        ('name = "web"\nimage = "x"\n[resources]\nmemory = "-1"', "resources.memory: ", "schema"),
        ('name = "web"\nimage = "x"\ncompletions = 3', "completions", "that is for jobs: run it with `atoll jobs run`"),
        ('name = "web"', "image: missing", "[build]"),
        ('name = "Web!"\nimage = "x"', "name: ", "schema"),
        ("name = ", "atoll.toml: not valid TOML", ""),
        ('kind = "job"\nname = "web"\nimage = "x"', "this is a job", "atoll jobs run -f"),
        ('image = "x"', "name: missing", "--name"),
        ("- a\n- b", "atoll.toml: not valid TOML", ""),
        ('name = "web"\nimage = "Bad Image!"', "atoll.toml: image: ", ""),
    ],
)
def test_a_wrong_spec_names_file_field_and_mend(atoll: Atoll, text: str, said: str, mend: str) -> None:
    atoll.spec.write_text(text)
    result = atoll.run("deploy", str(atoll.directory), code=2)
    assert mend in result.stderr
    assert said in result.stderr
    assert not atoll.api.under("apps")


def test_specs_in_json_and_yaml_are_the_same(atoll: Atoll) -> None:
    yaml = atoll.directory / "web.yaml"
    yaml.write_text("name: web\nimage: registry.example/web:1\nports: [{port: 8000}]\nscale: {replicas: 2}\n")
    jsonf = atoll.directory / "web.json"
    jsonf.write_text('{"name":"web","image":"registry.example/web:1","ports":[{"port":8000}],"scale":{"replicas":2}}')
    atoll.deploy()
    for path in (yaml, jsonf):
        assert atoll.json("deploy", "-f", str(path))["app"]["release"] == 1


def test_a_directory_without_a_spec_says_what_to_do(atoll: Atoll) -> None:
    atoll.spec.unlink()
    assert "no atoll.toml here" in atoll.run("deploy", str(atoll.directory), code=4).stderr


def test_apps_are_listed(atoll: Atoll) -> None:
    assert "no apps in project 'default'" in atoll.run("apps").stderr
    atoll.deploy()
    lines = atoll.run("apps").stdout.splitlines()
    assert lines[0].split() == ["APP", "STATE", "READY", "RELEASE", "CHANGED", "URL", "NOTE"]
    assert lines[1].split()[:4] == ["web", "●", "running", "2/2"]
    assert "http://web.localhost:8080" in lines[1]
    assert [view["app"]["name"] for view in atoll.json("apps")] == ["web"]


def test_status_shows_state_instances_and_events(atoll: Atoll) -> None:
    atoll.deploy()
    text = atoll.run("status", "web").stdout
    for part in ("registry.example/web:1", "2 of 2", "web-110abc", "rolled-out", "0.1 cores · 128.0MiB memory"):
        assert part in text
    found = atoll.json("status", "web")
    assert set(found) == {"app", "instances", "events", "releases"}


def test_an_app_that_is_not_there_exits_4(atoll: Atoll) -> None:
    assert "error: no app 'nope'" in atoll.run("status", "nope", code=4).stderr


def test_instances_are_listed_by_project_and_by_owner(atoll: Atoll) -> None:
    atoll.deploy()
    lines = atoll.run("ps").stdout.splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:4] == ["web-110abc", "web", "1", "●"]
    assert [view["instance"]["id"] for view in atoll.json("ps", "web")] == ["web-110abc", "web-111abc"]
    assert "no app, job or instance 'nope'" in atoll.run("ps", "nope", code=4).stderr


def test_scale_restart_and_rollback_follow_to_the_end(atoll: Atoll) -> None:
    atoll.deploy()
    assert "web release 1: 5 ready" in atoll.run("scale", "web", "5").stderr
    assert atoll.json("scale", "web", "0")["status"]["phase"] == "stopped"
    assert "2 ready" in atoll.run("scale", "web", "2").stderr
    assert atoll.json("restart", "web")["app"]["generation"] == 2
    atoll.spec.write_text(APP.replace("web:1", "web:2"))
    atoll.deploy()
    assert atoll.json("rollback", "web")["app"]["spec"]["image"] == "registry.example/web:1"
    assert "going" not in atoll.run("rollback", "web", "--to", "2").stdout
    atoll.run("rollback", "web", "--to", "99", code=4)


def test_what_happened_before_is_not_told_again_where_nothing_changes(atoll: Atoll) -> None:
    atoll.deploy()
    atoll.api.event("app/web", "app-deployed", "old news")
    assert "old news" not in atoll.run("scale", "web", "2").stderr
    assert "old news" not in atoll.run("deploy", str(atoll.directory)).stderr


def test_status_tells_the_age_of_the_release_from_that_of_the_last_change(atoll: Atoll) -> None:
    atoll.deploy()
    assert "changed" not in atoll.run("status", "web").stdout
    app, _ = atoll.api.get("apps", "default/web")
    release, _ = atoll.api.get("releases", "default/web/00000001")
    atoll.api.put("releases", "default/web/00000001", replace(release, created_at=time.time() - 7_200))
    atoll.api.put("apps", "default/web", replace(app, updated_at=time.time() - 60))
    shown = atoll.run("status", "web").stdout
    assert re.search(r"release +1, made 2h\S* ago\n *changed +(1m|59|6)", shown), shown


def test_the_log_of_a_schedule_is_that_of_its_latest_run_and_names_the_others(atoll: Atoll) -> None:
    spec = JobSpec(name="report", image="x", schedule="@daily")
    atoll.api.put("jobs", "default/report", Job(project="default", name="report", spec=spec, created_at=1.0))
    said = atoll.run("jobs", "logs", "report", code=4).stderr
    assert "'report' runs by a schedule, and has had no run yet" in said
    assert "atoll jobs trigger report" in said
    run = replace(spec, schedule=None)
    for number in (1, 2):
        name = f"report-{number}"
        atoll.api.put("jobs", f"default/{name}", Job(project="default", name=name, spec=run, created_at=number, parent="report"))
        one = Instance(id=f"{name}-a", project="default", owner_kind=OwnerKind.JOB, owner=name, node="n1", created_at=number)
        atoll.api.put("instances", f"default/{one.id}", one)
        atoll.api.logs[one.id] = [LogLine(at=1.0, stream="stdout", text=f"said by {name}")]
    shown = atoll.run("jobs", "logs", "report")
    assert shown.stdout == "said by report-2\n"
    assert "report-2, the latest run of report" in shown.stderr
    assert "others: report-1" in shown.stderr
    assert "its latest run: atoll jobs logs report" in atoll.run("logs", "report", code=4).stderr


def test_releases_show_which_is_current(atoll: Atoll) -> None:
    atoll.deploy()
    atoll.spec.write_text(APP.replace("web:1", "web:2"))
    atoll.deploy()
    lines = atoll.run("releases", "web").stdout.splitlines()
    assert lines[1].split()[:2] == ["2", "●"]
    assert [release["number"] for release in atoll.json("releases", "web")] == [2, 1]


def test_delete_asks_where_nobody_answers_only_with_yes(atoll: Atoll) -> None:
    atoll.deploy()
    assert "pass --yes" in atoll.run("delete", "web", code=2).stderr
    assert atoll.api.under("apps")
    assert "web is deleted" in atoll.run("delete", "web", "--yes").stderr
    assert not atoll.api.under("instances")


def test_logs_are_merged_by_time_and_say_whose(atoll: Atoll) -> None:
    atoll.deploy()
    atoll.api.logs["web-110abc"] = [LogLine(at=at, stream="stdout", text=f"a{at:.0f}") for at in (1.0, 3.0)]
    atoll.api.logs["web-111abc"] = [LogLine(at=2.0, stream="stderr", text="b2 [red]not markup[/red]")]
    assert atoll.run("logs", "web").stdout.splitlines() == [
        "web-110abc | a1",
        "web-111abc | b2 [red]not markup[/red]",
        "web-110abc | a3",
    ]
    assert atoll.run("logs", "web", "--tail", "1").stdout == "web-110abc | a3\n"
    assert atoll.run("logs", "web-110abc").stdout == "a1\na3\n"
    assert atoll.run("logs", "-f", "web-110abc").stdout == "a1\na3\n"
    assert atoll.run("logs", "-t", "--no-prefix", "web-111abc").stdout.startswith("1970-01-01T00:00:02.000Z b2")
    lines = [json.loads(line) for line in atoll.run("logs", "web", "--json").stdout.splitlines()]
    assert (lines[0]["instance"], lines[0]["text"]) == ("web-110abc", "a1")
    assert "no app, job or instance" in atoll.run("logs", "nope", code=4).stderr
    assert "'xyz' is not a duration" in atoll.run("logs", "web", "--since", "xyz", code=2).stderr


def test_exec_passes_output_input_and_exit_status_on(atoll: Atoll) -> None:
    atoll.deploy()
    assert atoll.run("exec", "web", "--", "echo", "--json", "-p").stdout == "--json -p\n"
    assert atoll.run("exec", "web", "exit", "7", code=7).stderr == "bye\n"
    assert "cannot start 'nope'" in atoll.run("exec", "web-111abc", "--", "nope", code=127).stderr
    assert "not a terminal" in atoll.run("exec", "-it", "web", code=2).stderr
    assert "is not NAME=VALUE" in atoll.run("exec", "-e", "x", "web", "--", "echo", code=2).stderr


def test_exec_in_an_app_that_does_not_run_says_what_it_does(atoll: Atoll) -> None:
    atoll.api.failing["web"] = "boom"
    atoll.run("deploy", str(atoll.directory), "-d")
    assert "web-110abc is failed" in atoll.run("exec", "web", "--", "echo", code=4).stderr


def tar_of(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_cp_brings_a_file_out_under_either_name(atoll: Atoll) -> None:
    atoll.deploy()
    atoll.api.files["web-110abc:/etc/app.conf"] = tar_of(**{"app.conf": b"x=1\n"})
    atoll.run("cp", "web:/etc/app.conf", str(atoll.directory))
    assert (atoll.directory / "app.conf").read_bytes() == b"x=1\n"
    assert atoll.json("cp", "web:/etc/app.conf", str(atoll.directory / "other"))["instance"] == "web-110abc"
    assert (atoll.directory / "other").read_bytes() == b"x=1\n"
    assert atoll.json("cp", "web:/etc/app.conf", str(atoll.directory / "other"))["bytes"] == 4
    assert "no such file or directory: /nope" in atoll.run("cp", "web:/nope", str(atoll.directory), code=4).stderr
    assert "mkdir -p" in atoll.run("cp", "web:/etc/app.conf", str(atoll.directory / "no" / "where"), code=4).stderr


def test_cp_takes_directories_in(atoll: Atoll) -> None:
    atoll.deploy()
    site = atoll.directory / "site"
    (site / "sub").mkdir(parents=True)
    (site / "sub" / "page").write_bytes(b"y" * 300_000)
    atoll.run("cp", str(site), "web-111abc:/srv/")
    with tarfile.open(fileobj=io.BytesIO(atoll.api.files["web-111abc:/srv/"])) as archive:
        assert archive.getnames() == ["site", "site/sub", "site/sub/page"]
        assert archive.getmember("site/sub/page").uid == 0
    (site / "sub" / "small").write_bytes(b"z" * 12)
    assert atoll.json("cp", str(site), "web-111abc:/srv/www")["bytes"] == 300_012
    assert "(12B)" in atoll.run("cp", str(site / "sub" / "small"), "web-111abc:/srv/").stderr
    with tarfile.open(fileobj=io.BytesIO(atoll.api.files["web-111abc:/srv"])) as archive:
        assert archive.getnames()[0] == "www"
    assert "no such file" in atoll.run("cp", str(site / "nope"), "web:/srv/", code=4).stderr
    assert "must be absolute" in atoll.run("cp", str(site), "web:srv", code=2).stderr
    assert "one of SRC and DST" in atoll.run("cp", str(site), str(site), code=2).stderr


def test_cp_refuses_what_would_leave_the_target(atoll: Atoll) -> None:
    atoll.deploy()
    atoll.api.files["web-110abc:/x"] = tar_of(**{"../evil": b"!"})
    target = atoll.directory / "in"
    target.mkdir()
    assert "not unpacked here" in atoll.run("cp", "web:/x", str(target), code=2).stderr
    assert not (atoll.directory / "evil").exists()
    atoll.api.files["web-110abc:/x"] = b"not a tar" * 100
    assert "did not send a tar stream" in atoll.run("cp", "web:/x", str(target), code=2).stderr


def test_a_job_runs_to_its_end(atoll: Atoll) -> None:
    result = atoll.run("jobs", "run", "--image", "x", "--name", "sum", "--", "./sum", "--all")
    assert "sum succeeded" in result.stderr
    assert atoll.json("jobs", "show", "sum")["job"]["job"]["spec"]["command"] == ["./sum", "--all"]
    assert atoll.json("jobs")[0]["status"]["phase"] == "succeeded"
    assert atoll.run("jobs", "list").stdout.splitlines()[1].split()[:4] == ["sum", "●", "succeeded", "1/1"]
    assert "sum-0abc" in atoll.run("jobs", "show", "sum").stdout
    assert "exists already" in atoll.run("jobs", "run", "--image", "x", "--name", "sum", code=6).stderr
    atoll.api.logs["sum-0abc"] = [LogLine(at=1.0, stream="stdout", text="42")]
    assert atoll.run("jobs", "logs", "sum").stdout == "42\n"
    assert "sum is deleted" in atoll.run("jobs", "delete", "sum", "-y").stderr


def test_a_failed_job_exits_1_with_the_reason(atoll: Atoll) -> None:
    atoll.api.failing["sum"] = "index 0 exited with status 1"
    assert (
        "job sum failed: index 0 exited with status 1" in atoll.run("jobs", "run", "--image", "x", "--name", "sum", code=1).stderr
    )
    assert "cancelled" in atoll.run("jobs", "cancel", "sum").stderr
    assert atoll.json("jobs", "cancel", "sum")["status"]["phase"] == "cancelled"


def test_a_job_from_a_file_takes_what_is_given_on_top(atoll: Atoll) -> None:
    path = atoll.directory / "job.toml"
    path.write_text('name = "sum"\nimage = "x"\ncompletions = 2\n')
    view = atoll.json("jobs", "run", "-f", str(path), "--parallelism", "2", "-e", "A=1", "--detach")
    assert (view["job"]["spec"]["completions"], view["job"]["spec"]["parallelism"]) == (2, 2)


def test_a_secret_comes_from_stdin_or_a_file_and_never_goes_out(atoll: Atoll) -> None:
    assert "version 1" in atoll.run("secrets", "set", "db", stdin="hunter2\n").stderr
    assert atoll.api.get("secrets", "default/db")[0].sealed == b"hunter2"
    path = atoll.directory / "key"
    path.write_text("two\nlines\n")
    assert atoll.json("secrets", "set", "db", "--from-file", str(path))["version"] == 2
    assert atoll.api.get("secrets", "default/db")[0].sealed == b"two\nlines\n"
    assert "hunter2" not in atoll.run("secrets", "list").stdout + json.dumps(atoll.json("secrets", "list"))
    assert "is empty" in atoll.run("secrets", "set", "db", stdin="", code=2).stderr
    assert "no such file" in atoll.run("secrets", "set", "db", "--from-file", str(path) + "x", code=4).stderr
    assert "pass --yes" in atoll.run("secrets", "delete", "db", code=2).stderr
    assert atoll.json("secrets", "delete", "db", "-y") == {"deleted": "db"}


def add_node(atoll: Atoll) -> None:
    capacity = Capacity(cpu_milli=2000, memory_bytes=4 << 30, disk_bytes=50 << 30)
    atoll.api.put(
        "nodes", "n1", Node(name="n1", capacity=capacity, runtimes=(RuntimeName.RUNC,), version="0.1.0", registered_at=1.0)
    )


def test_nodes_are_shown_and_cordoned(atoll: Atoll) -> None:
    assert "no nodes" in atoll.run("nodes").stderr
    add_node(atoll)
    assert atoll.run("nodes").stdout.splitlines()[1].split()[:3] == ["n1", "●", "ready"]
    assert "0.5 of 2 cores reserved" in atoll.run("nodes", "show", "n1").stdout
    assert atoll.json("nodes", "show", "n1")["node"]["name"] == "n1"
    assert "takes nothing new" in atoll.run("nodes", "cordon", "n1").stderr
    assert "cordoned" in atoll.run("nodes", "list").stdout
    assert atoll.json("nodes", "uncordon", "n1")["policy"] == {"name": "n1"}
    assert atoll.json("nodes")[0]["node"]["name"] == "n1"


def test_top_shows_use_against_limits(atoll: Atoll) -> None:
    add_node(atoll)
    atoll.deploy()
    atoll.api.usage = [Usage(instance="web-111abc", cpu_milli=50, memory_bytes=64 << 20, pids=3)]
    text = atoll.run("top").stdout
    assert "0.05/0.1" in text
    assert "64.0MiB/128.0MiB" in text
    assert atoll.json("top")["instances"][1]["usage"]["pids"] == 3


def test_events_are_shown_oldest_first(atoll: Atoll) -> None:
    assert "nothing has happened yet" in atoll.run("events").stderr
    atoll.deploy()
    atoll.api.event("instance/web-110abc", "oom", "out of memory", severity=Severity.ERROR)
    assert [event["code"] for event in atoll.json("events")] == ["rolled-out", "oom"]
    assert "app/web  rolled-out  release 1 serves" in atoll.run("events", "web").stdout
    assert "out of memory" in atoll.run("events", "instance/web-110abc").stdout


def test_a_token_is_printed_alone_on_stdout(atoll: Atoll) -> None:
    result = atoll.run("token", "create", "ci", "--role", "read", "--expires", "30d")
    assert result.stdout == "atoll_tok1_value\n"
    assert "shown only now" in result.stderr
    assert atoll.json("token", "create", "root", "--role", "admin")["project"] == "*"
    assert atoll.json("token", "list")[0]["project"] == "default"
    assert "ci" in atoll.run("token", "list").stdout
    assert atoll.json("token", "delete", "tok1") == {"deleted": "tok1"}
    assert "not a duration" in atoll.run("token", "create", "x", "--expires", "soon", code=2).stderr
    assert "subject: missing" in atoll.run("token", "create", "x", "--role", "agent", code=2).stderr


def test_projects_are_made_and_listed(atoll: Atoll) -> None:
    assert "project shop" in atoll.run("projects", "create", "shop").stderr
    assert [project["name"] for project in atoll.json("projects")] == ["default", "shop"]
    assert "shop" in atoll.run("projects", "list").stdout


def test_a_project_keeps_its_apps_to_itself(atoll: Atoll) -> None:
    atoll.run("-p", "shop", "deploy", str(atoll.directory))
    assert atoll.json("apps") == []
    assert atoll.json("apps", "--project", "shop")[0]["app"]["project"] == "shop"


def test_images_in_use_are_listed(atoll: Atoll) -> None:
    atoll.deploy()
    assert atoll.json("image", "list") == [{"image": "registry.example/web:1", "tags": ["1"], "used_by": ["web"]}]
    assert atoll.run("image", "list").stdout.splitlines()[1].split() == ["web", "1", "registry.example/web:1"]
    assert "no such file" in atoll.run("image", "import", "/no/such", "--name", "x", code=4).stderr


def test_schemas_are_printed_without_a_server(atoll: Atoll) -> None:
    atoll.api.down = Unavailable("away")
    for kind in ("app", "job"):
        schema = json.loads(atoll.run("schema", kind).stdout)
        assert schema["$schema"].startswith("https://json-schema.org/")
    assert "is not one of" in atoll.run("schema", "pod", code=2).stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(atoll: Atoll, shell: str) -> None:
    assert "_ATOLL_COMPLETE" in atoll.run("completion", shell).stdout


def test_names_are_completed_by_the_shell(atoll: Atoll) -> None:
    atoll.deploy()
    for words, expected in (("atoll status ", "web"), ("atoll logs web-11", "web-110abc"), ("atoll depl", "deploy")):
        count = len(words.split(" ")) - 1
        environment = {**atoll.environment, "_ATOLL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
        result = CliRunner().invoke(cli, [], prog_name="atoll", obj=Session(dial=lambda _: atoll.api), env=environment)
        assert f"plain,{expected}" in result.stdout.splitlines(), (words, result.stdout, result.stderr)


def test_version_speaks_of_both_sides(atoll: Atoll) -> None:
    assert "server  fake (cell main, store memory)" in atoll.run("version").stdout
    atoll.api.down = Unavailable("away")
    assert atoll.json("version")["server"] is None


def test_an_api_that_does_not_answer_exits_3(atoll: Atoll) -> None:
    atoll.api.down = Unavailable("http://fake does not answer: connection refused", mend="start it with `atoll up`")
    result = atoll.run("apps", code=3)
    assert result.stderr == "error: http://fake does not answer: connection refused\nmend: start it with `atoll up`\n"
    assert result.stdout == ""


def test_a_misspelt_command_is_guessed(atoll: Atoll) -> None:
    assert "Did you mean 'deploy'?" in atoll.run("delpoy", code=2).stderr


def test_every_command_has_help_with_an_example(atoll: Atoll) -> None:
    assert "Exit status:" in atoll.run("--help").stdout
    for name in COMMANDS:
        text = atoll.run(name, "--help").stdout
        assert "Example:" in text, name
        assert f"atoll {name}" in text, name


def test_an_unexpected_error_is_no_traceback(atoll: Atoll) -> None:
    class Broken(FakeApi):
        async def request(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("a bug")

    atoll.api = Broken()
    result = atoll.run("apps", code=1)
    assert "error: unexpected RuntimeError: a bug" in result.stderr
    assert "Traceback" not in result.stderr
