"""What a spec may not say, and that the error names where."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import UNSET

from atoll.model import codec
from atoll.model.errors import Invalid
from atoll.model.spec import AppSpec, JobSpec, check_app, check_job

APP: dict[str, Any] = {"name": "web", "image": "host.example/web:1", "ports": [{"port": 80}]}


def app(**changes: Any) -> AppSpec:
    spec = codec.convert({**APP, **changes}, AppSpec)
    check_app(spec)
    return spec


def test_a_plain_spec_is_taken_with_every_default() -> None:
    spec = app()
    assert spec.resources.memory == 128 << 20
    assert codec.decode(codec.encode(spec), AppSpec) == spec


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"imgae": "x"}, "imgae"),
        ({"resources": {"memroy": 1}}, "memroy"),
        ({"health": {"kind": "tcp", "pth": "/"}}, "pth"),
        ({"placement": {"constraints": [{"label": "disk", "vlaue": "ssd"}]}}, "vlaue"),
    ],
)
def test_an_unknown_key_is_refused_by_name(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(Invalid, match=names):
        app(**changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "Web"}, "name"),
        ({"name": "a" * 41}, "name"),
        ({"project": "a/b"}, "project"),
        ({"image": ""}, "image"),
        ({"ports": [{"port": 0}]}, "ports[0].port"),
        ({"ports": [{"port": 65_536}]}, "ports[0].port"),
        ({"resources": {"memory": "-5MiB"}}, "resources.memory"),
        ({"resources": {"memory": "2000TiB"}}, "resources.memory"),
        ({"resources": {"cpu": 0}}, "resources.cpu"),
        ({"resources": {"pids": 0}}, "resources.pids"),
        ({"scale": {"replicas": -1}}, "scale.replicas"),
        ({"scale": {"replicas": 100_001}}, "scale.replicas"),
        ({"stop": {"signal": "TERM"}}, "stop.signal"),
        ({"stop": {"signal": "SIGFOO"}}, "stop.signal"),
        ({"stop": {"grace": "-1s"}}, "stop.grace"),
        ({"command": ["a\0b"]}, "command[0]"),
        ({"workdir": "srv"}, "workdir"),
    ],
)
def test_a_bad_value_is_refused_with_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        app(**changes)
    assert (caught.value.field or "").startswith(field)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "web\n"},
        {"env": {"A\n": "x"}},
        {"volumes": [{"name": "data\n", "path": "/data"}]},
        {"routes": [{"host": "a.example\n"}]},
        {"stop": {"signal": "SIGTERM\n"}},
    ],
)
def test_no_name_ends_in_a_line_feed(changes: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        app(**changes)


def test_a_bad_name_of_a_variable_is_refused() -> None:
    with pytest.raises(Invalid, match="env"):
        app(env={"A B": "x"})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"image": None}, "image"),
        ({"runtime": "gvisor"}, "runtime"),
        ({"resources": {"memory": "1MiB"}}, "resources.memory"),
        ({"ports": [{"port": 80}, {"port": 81}]}, "ports"),
        ({"ports": [{"port": 80}, {"name": "b", "port": 80}]}, "ports"),
        ({"routes": [{"host": "a.example"}, {"host": "a.example"}]}, "routes"),
        ({"routes": [{"host": "a.example", "port": "grpc"}]}, "routes[0].port"),
        ({"health": {"kind": "exec"}}, "health.command"),
        ({"health": {"kind": "http", "port": "admin"}}, "health.port"),
        ({"health": {"interval": 0}}, "health.interval"),
        ({"rollout": {"max_surge": 0}}, "rollout.max_surge"),
        ({"metrics": {}, "ports": []}, "metrics.port"),
        ({"metrics": {"port": "admin"}, "ports": [{"port": 80}]}, "metrics.port"),
        ({"metrics": {"port": "raw"}, "ports": [{"name": "raw", "port": 80, "protocol": "tcp"}]}, "metrics.port"),
        ({"metrics": {}, "ports": [{"port": 80, "http2": True}]}, "metrics.port"),
        ({"metrics": {"names": ["ok", "tokens/s"]}, "ports": [{"port": 80}]}, "metrics.names[1]"),
        ({"metrics": {"names": ["a", "a"]}, "ports": [{"port": 80}]}, "metrics.names"),
        ({"scale": {"max": 4}}, "scale.metric"),
        ({"scale": {"max": 4, "metric": "depth"}}, "scale.target"),
        ({"scale": {"metric": "depth", "target": 8}}, "scale.max"),
        ({"scale": {"target": 8}}, "scale.max"),
        ({"scale": {"standby": 1}, "ports": []}, "scale.standby"),
        ({"scale": {"standby": 1}, "ports": [{"port": 53, "protocol": "udp"}]}, "scale.standby"),
        ({"scale": {"standby": 1, "replicas": 0}, "ports": [{"port": 80}]}, "scale.standby"),
        ({"scale": {"standby": 1}, "ports": [{"port": 80}], "volumes": [{"name": "a", "path": "/a"}]}, "scale.standby"),
        ({"scale": {"replicas": 5, "max": 4, "metric": "depth", "target": 8}}, "scale.max"),
        ({"scale": {"replicas": 0, "max": 4, "metric": "depth", "target": 8}}, "scale.metric"),
        ({"scale": {"replicas": 0, "max": 1}, "ports": [{"port": 53, "protocol": "tcp"}]}, "scale.replicas"),
        ({"scale": {"replicas": 0, "max": 1}, "ports": [{"port": 80, "host": 8080}]}, "ports.host"),
        ({"scale": {"replicas": 0, "max": 2}, "ports": [{"port": 80}]}, "scale.max"),
        ({"scale": {"replicas": 0, "max": 1, "idle_after": "4s"}, "ports": [{"port": 80}]}, "scale.idle_after"),
        ({"scale": {"replicas": 0, "max": 1}, "ports": [{"port": 80}], "rollout": {"strategy": "blue-green"}}, "rollout.strategy"),
        ({"scale": {"max": 4, "metric": "depth", "target": 8}}, "scale.metric"),
        ({"volumes": [{"name": "a", "path": "/proc/x"}]}, "volumes[0].path"),
        ({"volumes": [{"name": "a", "path": "/data/../etc"}]}, "volumes[0].path"),
        ({"volumes": [{"name": "a", "path": "/d"}, {"name": "b", "path": "/d"}]}, "volumes"),
        ({"env": {"A": "1"}, "secrets": {"A": "db"}}, "secrets.A"),
        ({"ingress": {"certificate": "own"}, "ports": []}, "ingress.certificate"),
        ({"ingress": {"certificate": "acme"}, "ports": [{"port": 53, "protocol": "udp"}]}, "ingress.certificate"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused_with_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        app(**changes)
    assert caught.value.field == field


def test_a_job_s_deadline_must_be_above_0() -> None:
    with pytest.raises(Invalid) as caught:
        check_job(codec.convert({"name": "sum", "image": "host.example/a:1", "deadline": 0}, JobSpec))
    assert caught.value.field == "deadline"


@pytest.mark.parametrize("text", [b"", b"name", b"[", b"name = 1 2", b"\xff\xfe"])
def test_a_file_that_does_not_parse_is_one_error(text: bytes) -> None:
    for suffix in (".toml", ".json", ".yaml"):
        try:
            data = codec.parse_text(text, suffix)
        except Invalid:
            continue
        assert not isinstance(data, dict) or data == {}


def test_a_deeply_nested_or_huge_file_is_refused() -> None:
    with pytest.raises(Invalid):
        codec.parse_text(b"[" * 200_000, ".json")
    with pytest.raises(Invalid, match="at most"):
        codec.parse_text(b" " * (codec.INPUT_BYTES_MAX + 1), ".toml")


def test_an_app_that_scales_by_its_metric_is_taken_with_its_least_and_most() -> None:
    spec = app(ports=[{"port": 80}], metrics={}, scale={"replicas": 2, "max": 2, "metric": "queue_depth", "target": 0.5})
    assert spec.scale is not UNSET
    assert (spec.scale.replicas, spec.scale.max, float(spec.scale.down)) == (2, 2, 60.0)
