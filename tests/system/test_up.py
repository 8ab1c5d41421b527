"""`atoll up` as a whole: real server, agent, ingress and runc on this machine."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.entry.scratch import CommandFailed, ScratchAtoll
from atoll.images.minimal import docker_archive
from atoll.network.slots import tag_of

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes namespaces, mounts and cgroups"),
    pytest.mark.skipif(not Path("/bin/busybox").exists(), reason="needs the package busybox-static"),
]
WEB = "mkdir -p /www; echo $ATOLL_INSTANCE > /www/index.html; echo serving; exec httpd -f -p $PORT -h /www"


class Stage(ScratchAtoll):
    """An Atoll that has a busybox image in its registry."""

    image = ""

    def start(self) -> None:
        super().start()
        self.image = self.atoll_json("image", "import", str(busybox_archive(self.data)), "--name", "busybox", "--tag", "1")["image"]


@pytest.fixture(scope="module")
def atoll() -> Iterator[Stage]:
    with Stage("atoll-test-") as stage:
        yield stage


@pytest.fixture
def web(atoll: Stage, tmp_path: Path) -> Iterator[str]:
    deploy_web(atoll, tmp_path, "web")
    yield "web"
    atoll.atoll("delete", "web", "--yes")
    wait_for(lambda: not ready(atoll, "web", at_all=True), "the app's instances to go")


def busybox_archive(directory: Path) -> Path:
    return docker_archive(directory / "busybox.tar", "busybox:1", program=Path("/bin/busybox"), target="/bin/busybox")


def deploy_web(atoll: Stage, directory: Path, name: str, replicas: int = 2, extra: str = "") -> None:
    spec = f"""
name = "{name}"
image = "{atoll.image}"
command = ["/bin/busybox", "sh", "-c", '{WEB}']
ports = [{{ port = 8080 }}]
health = {{ kind = "http", interval = "0.5s" }}
scale = {{ replicas = {replicas} }}
resources = {{ memory = "32MiB" }}
stop = {{ grace = "1s" }}
{extra}
"""
    path = directory / "atoll.toml"
    path.write_text(spec)
    atoll.atoll("deploy", "-f", str(path))


def ready(atoll: Stage, app: str, *, at_all: bool = False) -> list[dict[str, Any]]:
    views = [view for view in atoll.atoll_json("ps") if view["instance"]["owner"] == app]
    return views if at_all else [view for view in views if (view.get("status") or {}).get("ready")]


def get(atoll: Stage, host: str, path: str = "/") -> tuple[int, str]:
    address, port = atoll.ingress.rsplit(":", 1)
    connection = http.client.HTTPConnection(address, int(port), timeout=10)
    try:
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def wait_for(holds: Callable[[], bool], what: str, seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)


def process(atoll: Stage, role: str) -> int:
    """Return the pid of one of the children of `atoll up`."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if f"atoll.entry.{role}" in command and f"--data={atoll.data}" in command:
                return int(folder.name)
    raise AssertionError(f"no {role} runs")


def test_a_deployed_app_answers_by_hostname_from_every_replica(atoll: Stage, web: str) -> None:
    assert len(ready(atoll, web)) == 2
    answers = {get(atoll, "web.localhost") for _ in range(20)}
    assert {status for status, _ in answers} == {200}
    assert {body.strip() for _, body in answers} == {view["instance"]["id"] for view in ready(atoll, web)}


def test_an_unknown_hostname_gets_an_answer_that_explains(atoll: Stage) -> None:
    status, body = get(atoll, "nobody.localhost")
    assert status == 404
    assert "nobody.localhost" in body or "no app" in body


def test_exec_passes_output_input_and_exit_status_through(atoll: Stage, web: str) -> None:
    assert atoll.atoll("exec", web, "--", "/bin/busybox", "echo", "inside").strip() == "inside"
    assert atoll.atoll("exec", "-i", web, "--", "/bin/busybox", "cat", stdin="from outside\n") == "from outside\n"
    with pytest.raises(CommandFailed) as failed:
        atoll.atoll("exec", web, "--", "/bin/busybox", "sh", "-c", "exit 7")
    assert failed.value.returncode == 7


def test_logs_hold_what_the_process_wrote(atoll: Stage, web: str) -> None:
    wait_for(lambda: atoll.atoll("logs", web).count("serving") == 2, "both replicas' first line")


def test_files_go_in_and_out(atoll: Stage, web: str, tmp_path: Path) -> None:
    instance = ready(atoll, web)[0]["instance"]["id"]
    (tmp_path / "in.txt").write_text("carried")
    atoll.atoll("cp", str(tmp_path / "in.txt"), f"{instance}:/www/in.txt")
    assert atoll.atoll("exec", instance, "--", "/bin/busybox", "cat", "/www/in.txt") == "carried"
    atoll.atoll("cp", f"{instance}:/www/in.txt", str(tmp_path / "out.txt"))
    assert (tmp_path / "out.txt").read_text() == "carried"


def test_a_killed_process_is_replaced(atoll: Stage, web: str) -> None:
    victim = ready(atoll, web)[0]
    os.kill(victim["status"]["pid"], signal.SIGKILL)

    def replaced() -> bool:
        now = {view["instance"]["id"]: view["status"] for view in ready(atoll, web)}
        status = now.get(victim["instance"]["id"])
        return status is not None and status["pid"] != victim["status"]["pid"] and status["restarts"] == 1

    wait_for(replaced, "the replica to run again")


@pytest.mark.parametrize("role", ["agent", "server", "ingress"])
def test_kill_9_of_a_process_costs_no_instance_and_the_app_serves_again(atoll: Stage, web: str, role: str) -> None:
    before = {view["instance"]["id"]: view["status"]["pid"] for view in ready(atoll, web)}
    old = process(atoll, role)
    os.kill(old, signal.SIGKILL)
    if role != "ingress":
        for _ in range(20):
            assert get(atoll, "web.localhost")[0] == 200, "the data path needs no control plane"
    wait_for(lambda: process_or_none(atoll, role) not in (None, old), f"a new {role}")

    def same() -> bool:
        try:
            return {view["instance"]["id"]: view["status"]["pid"] for view in ready(atoll, web)} == before
        except CommandFailed:
            return False

    wait_for(same, "the same instances, adopted")
    wait_for(lambda: answers(atoll), "the app to answer")
    # What is adopted can be used and ended like anything else.
    assert atoll.atoll("exec", web, "--", "/bin/busybox", "echo", "still here").strip() == "still here"


def process_or_none(atoll: Stage, role: str) -> int | None:
    try:
        return process(atoll, role)
    except AssertionError:
        return None


def answers(atoll: Stage) -> bool:
    try:
        return get(atoll, "web.localhost")[0] == 200
    except OSError:
        return False


def test_a_second_up_on_the_same_data_names_the_first(atoll: Stage) -> None:
    with pytest.raises(CommandFailed) as failed:
        atoll.start()
    holder = (atoll.data / "lock").read_text().strip()
    assert holder in failed.value.stderr
    assert "mend:" in failed.value.stderr


def test_a_taken_port_is_named_before_anything_is_made(atoll: Stage, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed) as failed:
        atoll.atoll("up", "--detach", "--data", str(tmp_path / "other"), "--api", atoll.api)
    assert atoll.api in failed.value.stderr
    assert "mend:" in failed.value.stderr
    assert not (tmp_path / "other" / "server").exists()


def test_a_user_who_is_not_root_is_told_so_and_nothing_is_made(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    data = tmp_path / "data"
    atoll = str(Path(sys.executable).with_name("atoll"))
    command = ["setpriv", "--reuid", "65534", "--clear-groups", atoll, "up", "--detach", "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", timeout=60)
    assert done.returncode != 0
    assert "root" in done.stderr
    assert "mend:" in done.stderr
    assert not data.exists()


def test_a_command_that_does_not_exist_fails_the_deploy_with_its_name(atoll: Stage, tmp_path: Path) -> None:
    (tmp_path / "atoll.toml").write_text(
        f'name = "broken"\nimage = "{atoll.image}"\ncommand = ["/no/such/program"]\nrollout = {{ deadline = "3s" }}\n'
    )
    with pytest.raises(CommandFailed) as failed:
        atoll.atoll("deploy", "-f", str(tmp_path / "atoll.toml"))
    assert "/no/such/program" in failed.value.stderr + failed.value.stdout
    atoll.atoll("delete", "broken", "--yes")


def test_a_missing_image_fails_the_deploy_with_its_name(atoll: Stage, tmp_path: Path) -> None:
    (tmp_path / "atoll.toml").write_text(
        'name = "absent"\nimage = "cell.internal/default/absent:1"\nrollout = { deadline = "3s" }\n'
    )
    with pytest.raises(CommandFailed) as failed:
        atoll.atoll("deploy", "-f", str(tmp_path / "atoll.toml"))
    assert "default/absent" in failed.value.stderr + failed.value.stdout


def test_more_than_the_node_has_is_refused_with_what_would_fit(atoll: Stage, tmp_path: Path) -> None:
    (tmp_path / "atoll.toml").write_text(
        f'name = "huge"\nimage = "{atoll.image}"\nresources = {{ memory = "1TiB" }}\nrollout = {{ deadline = "2s" }}\n'
    )
    with pytest.raises(CommandFailed) as failed:
        atoll.atoll("deploy", "-f", str(tmp_path / "atoll.toml"))
    assert "memory" in failed.value.stderr + failed.value.stdout
    atoll.atoll("delete", "huge", "--yes")


def test_a_job_runs_to_its_end_and_keeps_its_logs(atoll: Stage) -> None:
    image = atoll.image
    atoll.atoll("jobs", "run", "--name", "sum", "--image", image, "--", "/bin/busybox", "sh", "-c", "echo total $((6*7))")
    wait_for(
        lambda: next(v for v in atoll.atoll_json("jobs", "list") if v["job"]["name"] == "sum")["status"]["phase"] == "succeeded",
        "the job to succeed",
    )
    assert "total 42" in atoll.atoll("jobs", "logs", "sum")


def test_a_secret_reaches_the_process_and_nobody_else(atoll: Stage, tmp_path: Path) -> None:
    atoll.atoll("secrets", "set", "pass", stdin="hush-4711")
    deploy_web(atoll, tmp_path, "keeper", 1, 'secrets = { PASSWORD = "pass" }')
    assert atoll.atoll("exec", "keeper", "--", "/bin/busybox", "sh", "-c", "echo $PASSWORD").strip() == "hush-4711"
    assert "hush-4711" not in atoll.log
    listed = atoll.atoll("secrets", "list", "--json") + atoll.atoll("ps", "--json") + atoll.atoll("status", "keeper", "--json")
    assert "hush-4711" not in listed
    atoll.atoll("delete", "keeper", "--yes")


def test_volumes_outlive_the_instances(atoll: Stage, tmp_path: Path) -> None:
    deploy_web(atoll, tmp_path, "store", 1, 'volumes = [{ name = "data", path = "/data" }]')
    atoll.atoll("exec", "store", "--", "/bin/busybox", "sh", "-c", "echo kept > /data/file")
    old = ready(atoll, "store")[0]["instance"]["id"]
    atoll.atoll("restart", "store")
    wait_for(lambda: [v["instance"]["id"] for v in ready(atoll, "store", at_all=True)] not in ([old], []), "another instance")
    wait_for(lambda: len(ready(atoll, "store")) == 1 and ready(atoll, "store")[0]["instance"]["id"] != old, "it to be ready")
    assert atoll.atoll("exec", "store", "--", "/bin/busybox", "cat", "/data/file") == "kept\n"
    atoll.atoll("delete", "store", "--yes")


def test_down_leaves_no_process_mount_namespace_link_or_cgroup(tmp_path: Path) -> None:
    with Stage("atoll-leak-") as other:
        deploy_web(other, tmp_path, "web")
        made = traces(other)
        assert all(made.values()), "a running app has left a trace of every kind"
        other.stop()
        assert traces(other) == {kind: set() for kind in made}


def traces(atoll: ScratchAtoll) -> dict[str, set[str]]:
    """Return what this Atoll has on the machine, by kind."""
    subnet = atoll.subnet.removesuffix(".0.0/16") + "."
    ids = {path.name for path in (atoll.data / "agent" / "instances").glob("*")}
    routes = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout.splitlines()
    loops = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True).stdout.splitlines()
    mounts = Path("/proc/mounts").read_text().splitlines()
    namespaces = json.loads(subprocess.run(["ip", "-j", "netns"], capture_output=True, text=True, check=True).stdout or "[]")
    tag = tag_of(atoll.data / "agent" / "network")
    return {
        "mounts": {line.split()[1] for line in mounts if str(atoll.data) in line or any(id in line for id in ids)},
        "routes": {line for line in routes if subnet in line},
        "namespaces": {space["name"] for space in namespaces if tag in space["name"]},
        "cgroups": {str(path) for path in Path("/sys/fs/cgroup").rglob("atoll/*") if path.is_dir() and path.name in ids},
        "loops": {line.split(":")[0] for line in loops if str(atoll.data) in line},
        "processes": {pid for pid in _processes() if str(atoll.data) in _command(pid)},
    }


def _processes() -> list[str]:
    return [folder.name for folder in Path("/proc").iterdir() if folder.name.isdigit()]


def _command(pid: str) -> str:
    try:
        return (Path("/proc") / pid / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
