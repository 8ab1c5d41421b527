"""What is wrong is said before `atoll up` starts anything, once, and a log that cannot be written ends no work."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from running_up import running_up

from atoll.cli.main import cli
from atoll.entry.agent import main as agent
from atoll.entry.config import EXIT_HOPELESS, Config
from atoll.entry.launch import error_in
from atoll.entry.preflight import CAPABILITIES, check_settings, held_capabilities, make_data
from atoll.entry.process import Stop, status_of
from atoll.entry.unbreakable import Unbreakable
from atoll.entry.up import check
from atoll.ingress.envoy import free_port
from atoll.model.errors import AtollError, Conflict, Invalid, Unavailable, Unsupported

ALL = sum(1 << bit for bit in CAPABILITIES.values())


@pytest.mark.parametrize("subnet", ["10.999.0.0/16", "10.9.0.0/30", "here", "10.1.2.3/16", "8.8.8.0/24"])
def test_a_subnet_that_is_none_is_refused(tmp_path: Path, subnet: str) -> None:
    with pytest.raises(Invalid) as refused:
        check_settings(Config(data=tmp_path, subnet=subnet))
    assert refused.value.field == "subnet"


def test_an_agent_whose_subnet_is_public_does_not_join(tmp_path: Path) -> None:
    stop = Stop()
    stop.set()
    with pytest.raises(Invalid, match=r"8\.8\.8\.0/24 is not of 10\.0\.0\.0/8") as refused:
        asyncio.run(agent(Config(data=tmp_path / "data", subnet="8.8.8.0/24"), stop))
    assert refused.value.field == "subnet"
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="what is asked first is whether it is root")
@pytest.mark.parametrize("ingress", ["127.0.0.1", "0.0.0.0"])
def test_an_ingress_where_the_own_api_listens_is_refused(ingress: str) -> None:
    port = free_port("127.0.0.1")
    with pytest.raises(Conflict, match=f"--ingress: {ingress}:{port} is that of --api") as refused:
        check(Config(api=f"127.0.0.1:{port}", ingress=f"{ingress}:{port}"))
    assert refused.value.field == "--ingress"


@pytest.mark.skipif(os.geteuid() != 0, reason="what is asked first is whether it is root")
def test_up_takes_the_data_directory_from_the_environment(tmp_path: Path) -> None:
    with running_up(tmp_path) as api:  # an address in use, so that nothing is started, whatever directory it takes
        result = CliRunner().invoke(cli, ["up", "--detach", "--api", api], env={"ATOLL_DATA": str(tmp_path)})
    assert f"{tmp_path} is in use by another `atoll up`, process 4711" in f"{result.stderr}{result.exception}"


def test_data_that_can_be_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(Invalid, match="is not a directory") as refused:
            check_settings(Config(data=path), held=ALL)
        assert refused.value.field == "data"
    with pytest.raises(Invalid, match="cannot use /proc/atoll"):
        make_data(Config(data=Path("/proc/atoll")))


@pytest.mark.parametrize("name", sorted(CAPABILITIES))
def test_a_missing_capability_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unsupported, match=f"CAP_{name},") as refused:
        check_settings(Config(data=tmp_path), held=ALL & ~(1 << CAPABILITIES[name]))
    assert refused.value.mend


def test_a_machine_that_has_all_passes_and_nothing_is_made(tmp_path: Path) -> None:
    check_settings(Config(data=tmp_path / "new" / "data"), held=ALL)
    assert not (tmp_path / "new").exists()
    assert held_capabilities() >= 0


def test_what_a_process_reported_is_found_among_its_log() -> None:
    lines = [
        "17:44:00.928381 [info     ] runtime usable  process=agent",
        "error: the database /x is damaged: *** in database main ***",
        "Page 8: btreeInitPage() returns error code 11",
        "mend: restore it",
        "atoll: server cannot run, so everything ends; instances go on",
    ]
    assert error_in(lines) == (
        "the database /x is damaged: *** in database main ***\nPage 8: btreeInitPage() returns error code 11",
        "restore it",
    )
    assert error_in(["error: no mend here", '{"event": "x"}', "mend: of another"]) == ("no mend here", "")
    assert error_in(lines[:1]) is None


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_on_a_full_disk_loses_lines_and_raises_nothing() -> None:
    log = Unbreakable(FullDisk())
    print("lost", file=log, flush=True)
    assert not log.isatty()


def test_what_a_log_takes_is_written() -> None:
    target = io.StringIO()
    print("kept", file=Unbreakable(target), flush=True)
    assert target.getvalue() == "kept\n"


def test_an_error_in_groups_has_its_own_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*errors: AtollError) -> None:
        raise ExceptionGroup("outer", [ExceptionGroup("inner", errors)])

    assert status_of(lambda: fail(Conflict("the subnet is taken", mend="choose another"))) == EXIT_HOPELESS
    assert capsys.readouterr().err == "error: the subnet is taken\nmend: choose another\n"
    assert status_of(lambda: fail(Unavailable("not now"))) == 1
    assert status_of(lambda: None) == 0


def test_a_process_opens_as_many_files_as_it_may() -> None:
    program = """
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
from atoll.entry.process import raise_open_files
raise_open_files()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
