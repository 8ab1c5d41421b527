"""`atoll sandbox` and `atoll template` over an API in memory: which of several things a name means, and what people are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from atoll.cli.main import cli
from atoll.cli.session import Session
from atoll.model.errors import DeadlineExceeded
from atoll.model.records import Job, JobPhase, JobStatus, Rejection
from atoll.model.spec import JobSpec
from atoll.model.states import Phase
from atoll.sdk.client import Client
from atoll.sdk.fake import FakeApi
from atoll.sdk.sandboxes import running


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


def call(api: FakeApi, directory: Path, *arguments: str, code: int = 0) -> Result:
    environment = {"ATOLL_API": "http://fake", "ATOLL_TOKEN": "t", "XDG_CONFIG_HOME": str(directory), "NO_COLOR": "1"}
    result = CliRunner().invoke(
        cli, list(arguments), obj=Session(dial=lambda _: api), env=environment | {"COLUMNS": "200"}, catch_exceptions=False
    )
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


def make_app(api: FakeApi, directory: Path, name: str) -> None:
    call(api, directory, "deploy", "--image", "x:1", "--name", name, "--port", "80")


def make_sandbox(api: FakeApi, name: str, phase: JobPhase = JobPhase.RUNNING, message: str = "") -> None:
    """A job that is a sandbox, with its instance, which runs unless it has ended."""
    spec = JobSpec(name=name, image="x:1", sandbox=True)
    api.put("jobs", f"default/{name}", Job(project="default", name=name, spec=spec, created_at=1.0))
    api.finish("default", spec, phase if phase.final else JobPhase.SUCCEEDED)
    if not phase.final:
        id = f"default/{name}-0abc"
        status, _ = api.get("statuses", id)
        api.put("statuses", id, replace(status, phase=Phase.RUNNING, exit=None))
    api.put("job-statuses", f"default/{name}", JobStatus(project="default", name=name, phase=phase, message=message))


def test_exec_and_cp_work_in_the_sandbox_beside_an_app_of_the_same_name(api: FakeApi, tmp_path: Path) -> None:
    make_app(api, tmp_path, "hello")
    make_sandbox(api, "hello")
    assert call(api, tmp_path, "sandbox", "exec", "hello", "--", "echo", "hi").stdout == "hi\n"
    call(api, tmp_path, "exec", "hello", "--", "echo", "hi")
    (tmp_path / "file").write_text("x")
    call(api, tmp_path, "sandbox", "cp", str(tmp_path / "file"), "hello:/tmp/")
    assert [path.split("?")[0].split("/")[-2] for path in api.channels] == ["hello-0abc", "hello-110abc", "hello-0abc"]
    assert list(api.files) == ["hello-0abc:/tmp/"]


@pytest.mark.parametrize("words", [("exec", "hello", "--", "echo"), ("cp", "hello:/x", "."), ("pause", "hello"), ("rm", "hello")])
def test_an_app_or_a_job_is_no_sandbox(api: FakeApi, tmp_path: Path, words: tuple[str, ...]) -> None:
    make_app(api, tmp_path, "hello")
    call(api, tmp_path, "sandbox", *words, code=4)
    spec = JobSpec(name="hello", image="x:1")
    api.put("jobs", "default/hello", Job(project="default", name="hello", spec=spec, created_at=1.0))
    assert "'hello' is a job, and no sandbox" in call(api, tmp_path, "sandbox", *words, code=4).stderr
    assert not api.get("jobs", "default/hello")[0].cancelled


def test_a_node_that_is_not_there_is_refused_before_anything_is_made(api: FakeApi, tmp_path: Path) -> None:
    made = ("--image", "x:1", "--node", "nowhere")
    assert "no node 'nowhere'" in call(api, tmp_path, "sandbox", "create", "try", *made, code=4).stderr
    assert "no node 'nowhere'" in call(api, tmp_path, "template", "create", "tools", "--pool", "1", *made, code=4).stderr
    assert not api.under("jobs")


async def test_who_waits_for_a_sandbox_is_told_why_once_and_in_the_end(api: FakeApi) -> None:
    make_sandbox(api, "try")
    instance, _ = api.get("instances", "default/try-0abc")
    rejection = Rejection(code="no-room", message="none of 2 nodes fits: 2 have no room", mend="add a node")
    api.put("instances", "default/try-0abc", replace(instance, node=None, rejection=rejection))
    api.remove("statuses", "default/try-0abc")
    told: list[str] = []
    async with Client(api) as client:
        with pytest.raises(DeadlineExceeded, match="does not run after 0 s: none of 2 nodes fits: 2 have no room") as raised:
            await running(client, "default", "try", deadline_s=0.0, told=told.append)
    assert told == ["none of 2 nodes fits: 2 have no room"]
    assert raised.value.mend is not None
    assert raised.value.mend.startswith("add a node; ")
    assert raised.value.mend.endswith("atoll sandbox rm try")


def test_exec_in_what_has_ended_names_the_command_that_shows_why(api: FakeApi, tmp_path: Path) -> None:
    make_sandbox(api, "try", JobPhase.FAILED, "its time limit was reached")
    ended = call(api, tmp_path, "sandbox", "exec", "try", "--", "echo", code=6).stderr
    assert ended == "error: sandbox 'try' has ended: its time limit was reached\nmend: see why: atoll jobs show try\n"
    assert "mend: look why: atoll jobs show try\n" in call(api, tmp_path, "exec", "try", "--", "echo", code=4).stderr
    api.failing["web"] = "boom"
    call(api, tmp_path, "deploy", "--image", "x:1", "--name", "web", "--port", "80", "-d")
    assert "mend: look why: atoll status web\n" in call(api, tmp_path, "exec", "web", "--", "echo", code=4).stderr


def test_what_is_not_there_is_called_by_its_own_name(api: FakeApi, tmp_path: Path) -> None:
    for words in (("sandbox", "rm", "try"), ("sandbox", "pause", "try"), ("sandbox", "exec", "try", "echo")):
        told = call(api, tmp_path, *words, code=4).stderr
        assert told == "error: no sandbox 'try' in project 'default'\nmend: 'atoll sandbox list' lists them\n"
    told = call(api, tmp_path, "template", "rm", "tools", code=4).stderr
    assert told == "error: no template 'tools' in project 'default'\nmend: 'atoll template list' lists them\n"
    make_sandbox(api, "try")
    assert "'try' is a sandbox, and no template" in call(api, tmp_path, "template", "rm", "try", code=4).stderr


@pytest.mark.parametrize("words", [("sandbox", "create", "try"), ("template", "create", "tools", "--pool", "1")])
@pytest.mark.parametrize("option", ["--time-limit", "--idle-limit"])
def test_a_limit_that_is_no_duration_is_refused_by_the_name_of_its_option(
    api: FakeApi, tmp_path: Path, words: tuple[str, ...], option: str
) -> None:
    told = call(api, tmp_path, *words, "--image", "x:1", option, "soon", code=2).stderr
    assert option in told
    assert "'soon' is not a duration" in told
    assert "'1m30s'" in told
    assert not api.under("jobs")


def test_limits_are_seconds_where_they_are_numbers(api: FakeApi, tmp_path: Path) -> None:
    made = ("--image", "x:1", "--node", "nowhere", "--time-limit", "5", "--idle-limit", "1m30s")
    for words in (("sandbox", "create", "try"), ("template", "create", "tools", "--pool", "1")):
        assert "no node 'nowhere'" in call(api, tmp_path, *words, *made, code=4).stderr, "all else was well"


def test_lists_cut_the_digests_of_images(api: FakeApi, tmp_path: Path) -> None:
    image = "cell.internal/default/tools@sha256:" + "4f" * 32
    spec = JobSpec(name="try", image=image, sandbox=True)
    api.put("jobs", "default/try", Job(project="default", name="try", spec=spec, created_at=1.0))
    pool = JobSpec(name="tools", image=image, sandbox=True, pool=1)
    api.put("jobs", "default/tools", Job(project="default", name="tools", spec=pool, created_at=1.0))
    for noun in ("sandbox", "template"):
        listed = call(api, tmp_path, noun, "list").stdout
        assert "cell.internal/default/tools@sha256:" + "4f" * 6 in listed
        assert "4f" * 7 not in listed
