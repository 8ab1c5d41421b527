"""What is wrong with an option is said by the option's name, whichever field of a record it fills."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from test_cli_draining import call

from atoll.model.errors import AtollError, Conflict, Invalid
from atoll.sdk.fake import FakeApi


class Refusing(FakeApi):
    """Refuses whatever is written, for one reason."""

    def __init__(self, error: AtollError) -> None:
        super().__init__()
        self.error = error

    def handle(self, method: str, segments: list[str], query: dict[str, str], headers: Mapping[str, str], body: bytes) -> object:
        if method != "GET":
            raise self.error
        return super().handle(method, segments, query, headers, body)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("sandbox create s --image x --time-limit 0", "--time-limit: must be above 0"),
        ("template create s --pool 1 --image x --time-limit 0s", "--time-limit: must be above 0"),
        ("template create s --pool 1 --image x --idle-limit 0", "--idle-limit: below 1 s"),
        ("sandbox create s --image x --runtime zzz", "--runtime: no such value: 'zzz'"),
        ("deploy --image x --name X!", "--name: expected lower-case letters"),
        ("jobs run --image x --name j --completions 5000000", "--completions: expected a whole number <= 100000"),
        ("projects quota default --requests 0", "--requests: expected a whole number >= 1"),
        ("token create x --expires 0s", "--expires: expected a number > 0.0"),
        ("sites set ams --at 100,7", "--at: '100,7' is no latitude and longitude"),
        ("sites set ams --at users", "--at: 'users' is no latitude and longitude"),
        ("maintenance add --nodes * --every never --for 1h", "--every: 'never' does not say when it comes again"),
        ("maintenance add --nodes * --from soon --for 1h", "--from: 'soon' is no moment"),
        ("maintenance add --nodes * --every @daily --for 0s", "--for: must be above 0"),
        ("reserve add --nodes * --until soon", "--until: 'soon' is no moment"),
        ("reserve add --nodes * --for 1h --cpu -1", "--cpu: cores must lie between"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_its_name_with_what_would_help(tmp_path: Path, words: str, told: str) -> None:
    said = call(FakeApi(), tmp_path, *words.split())
    assert said.exit_code == 2
    assert said.stderr.splitlines()[0].startswith(f"error: {told}")


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (
            "sandbox create s --template t --time-limit 1h",
            Invalid("deadline: too long", field="deadline"),
            "--time-limit: too long",
        ),
        ("sandbox create s --template t -e A=1", Invalid("env.A: too long", field="env.A"), "--env A: too long"),
        ("join-token create --expires 1h", Invalid("expires_in_s: too long", field="expires_in_s"), "--expires: too long"),
        ("join-token create --ingress g", Invalid("subject: not now", field="subject"), "--ingress: not now"),
        ("sites set ams --at 1,2", Invalid("latitude: not now", field="latitude"), "--at: not now"),
        ("sites set ams --rtt b=1", Invalid("round_trips_ms: too many", field="round_trips_ms"), "--rtt: too many"),
        ("reserve add --nodes * --for 1h", Invalid("end: it is over", field="end"), "--for: it is over"),
        ("certificates add x.y --acme", Invalid("source: no authority", field="source"), "--acme: no authority"),
        (
            "deploy --image x --name w --replicas 3",
            Invalid("scale.replicas: not now", field="scale.replicas"),
            "--replicas: not now",
        ),
        # What was not typed, or is not said of a field, stays as the API says it.
        ("join-token create", Invalid("expires_in_s: too long", field="expires_in_s"), "expires_in_s: too long"),
        ("sandbox create s --image x", Invalid("deadline: too long", field="deadline"), "deadline: too long"),
        ("deploy --image x --name w", Conflict("app 'w' is being deleted", field="name"), "app 'w' is being deleted"),
    ],
)
def test_what_the_api_refuses_is_said_by_what_was_typed(tmp_path: Path, words: str, error: AtollError, told: str) -> None:
    said = call(Refusing(error), tmp_path, *words.split())
    assert said.stderr.splitlines()[0] == f"error: {told}"


def test_an_option_that_goes_before_a_file_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text("name = 'x'\nimage = 'y'\nidle_limit = '0s'\n")
    wrong = call(FakeApi(), tmp_path, "sandbox", "create", "s", "-f", f"{tmp_path}/job.toml", "--idle-limit", "0").stderr
    assert wrong.startswith("error: --idle-limit: below 1 s")
    wrong = call(FakeApi(), tmp_path, "sandbox", "create", "s", "-f", f"{tmp_path}/job.toml").stderr
    assert wrong.startswith(f"error: {tmp_path}/job.toml: idle_limit: below 1 s")
