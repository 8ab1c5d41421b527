"""docs/spec.md is made from the code; nobody has to remember it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atoll.model import codec
from atoll.model.spec import AppSpec, JobSpec, check_app, check_job
from made_certificates import Maker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made() -> str:
    code = "import sys; sys.path.insert(0, 'scripts'); from spec_reference import page; sys.stdout.write(page())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_on_the_spec_is_current(made: str) -> None:
    assert (ROOT / "docs" / "spec.md").read_text(encoding="utf-8") == made, "run: python scripts/spec_reference.py"


def test_every_example_of_the_page_is_a_spec_that_is_taken(made: str) -> None:
    seen = 0
    for section in made.split("\n## ")[1:]:
        title = section.partition("\n")[0]
        place, kind, base = _PLACES[title]
        for row in section.splitlines():
            example = row.rpartition("| `")[2].removesuffix("` |") if row.startswith("| `") else "["
            if not example.startswith("["):
                value = codec.parse_text(example.encode(), ".toml")
                beside = _BESIDE.get((place[-1:], *value), {})
                spec = _spec(place, {**base, **beside, **value}, kind)
                (check_app if isinstance(spec, AppSpec) else check_job)(spec)
                seen += 1
    assert seen > 60


def _spec(place: tuple[str, ...], value: dict[str, Any], kind: type[AppSpec] | type[JobSpec]) -> Any:
    for name in reversed(place):
        value = {name.strip("[]"): [value] if name.startswith("[") else value}
    if place[:1] == ("scale",):
        value["metrics"] = {}
        value["scale"].setdefault("max", 4)
        value["resources"] = {"gpu": {}}
    if place == ("ingress", "[ports]"):
        value["ports"] = [{"name": "db", "port": 5432, "protocol": "tcp"}]
    if place == ("rollout", "[steps]"):
        value["rollout"]["strategy"] = "canary"
    if place == ("worker", "[queues]") and (other := value["worker"]["queues"][0].get("dead_letter")):
        value["worker"]["queues"].append({"queue": other})
    if place[:1] == ("worker",):
        value["worker"] = {"main": "index.js", "compatibility_date": "2026-11-01", **value["worker"]}
    ports = [{"port": 80}] if kind is AppSpec else None
    return codec.convert({"name": "a", "image": "host.example/a:1", **({"ports": ports} if ports else {}), **value}, kind)


_BESIDE: dict[tuple[Any, ...], dict[str, Any]] = {
    (("[egress]",), "ports"): {"app": "db"},
    (("[egress]",), "protocol"): {"app": "db"},
    ((), "snapshot"): {"sandbox": True},
    ((), "idle_limit"): {"sandbox": True},
    ((), "pool"): {"sandbox": True},
    (("gpu",), "sharing"): {"count": 0.5},
    (("instance_tls",), "name"): {"ca": Maker().pem},
    (("instance_tls",), "mutual"): {"ca": Maker().pem},
    (("canary",), "value"): {"cookie": "canary"},
    (("gpu",), "topology"): {"count": 2},
    (("scale",), "idle"): {"replicas": 0},
    (("placement",), "together"): {"gang": True},
    (("rollout",), "strategy"): {"steps": [{"weight": 5}]},
    (("rollout",), "promote_after"): {"strategy": "blue-green"},
    (("placement",), "latency_max"): {"near": "users"},
}
"""What some examples only make sense with."""
_PLACES: dict[str, tuple[tuple[str, ...], Any, dict[str, Any]]] = {
    "An app: `atoll.toml`": ((), AppSpec, {}),
    "A job: `atoll jobs run -f job.toml`": ((), JobSpec, {}),
    "`[build]`": (("build",), AppSpec, {}),
    "`[resources]`": (("resources",), AppSpec, {}),
    "`[resources.gpu]`": (("resources", "gpu"), AppSpec, {}),
    "`[[ports]]` (apps, at most 32)": (("[ports]",), AppSpec, {"port": 80}),
    "`[[routes]]` (apps, at most 256)": (("[routes]",), AppSpec, {"host": "a.example"}),
    "`[ingress]` (apps)": (("ingress",), AppSpec, {}),
    "`[ingress.canary]`": (("ingress", "canary"), AppSpec, {}),
    "`[[ingress.ports]]` (at most 32)": (("ingress", "[ports]"), AppSpec, {"public": 5432, "port": "db"}),
    "`[ingress.rate]`": (("ingress", "rate"), AppSpec, {"requests": 100}),
    "`[ingress.limits]`": (("ingress", "limits"), AppSpec, {}),
    "`[ingress.outliers]`": (("ingress", "outliers"), AppSpec, {}),
    "`[ingress.sticky]`": (("ingress", "sticky"), AppSpec, {}),
    "`[ingress.instance_tls]`": (("ingress", "instance_tls"), AppSpec, {}),
    "`[ingress.request_headers]`, `[ingress.response_headers]`, and those of a route": (
        ("ingress", "request_headers"),
        AppSpec,
        {},
    ),
    "`[health]` (apps)": (("health",), AppSpec, {"command": ["true"]}),
    "`[scale]` (apps)": (("scale",), AppSpec, {"max": 4, "metric": "depth", "target": 8}),
    "`[[scale.windows]]` (at most 16)": (
        ("scale", "[windows]"),
        AppSpec,
        {"start": "0 7 * * *", "end": "0 19 * * *", "replicas": 2},
    ),
    "`[scale.prometheus]`": (("scale", "prometheus"), AppSpec, {"url": "http://a.example", "query": "a", "target": 1}),
    "`[metrics]` (apps)": (("metrics",), AppSpec, {}),
    "`[worker]` (apps)": (("worker",), AppSpec, {}),
    "`[[worker.services]]` (at most 64)": (("worker", "[services]"), AppSpec, {"binding": "A", "app": "a"}),
    "`[[worker.durable_objects]]` (at most 64)": (("worker", "[durable_objects]"), AppSpec, {"binding": "C", "class_name": "C"}),
    "`[[worker.kv]]` (at most 64)": (("worker", "[kv]"), AppSpec, {"binding": "KV"}),
    "`[worker.assets]`": (("worker", "assets"), AppSpec, {"directory": "public"}),
    "`[[worker.queues]]` (at most 64)": (("worker", "[queues]"), AppSpec, {"queue": "q"}),
    "`[restart]` (apps)": (("restart",), AppSpec, {}),
    "`[rollout]` (apps)": (("rollout",), AppSpec, {}),
    "`[[rollout.steps]]` (at most 20)": (("rollout", "[steps]"), AppSpec, {"weight": 50}),
    "`[rollout.analysis]`": (("rollout", "analysis"), AppSpec, {"error_rate_max": 0.5}),
    "`[disruption]` (apps)": (("disruption",), AppSpec, {}),
    "`[stop]`": (("stop",), AppSpec, {}),
    "`[lost]`": (("lost",), AppSpec, {}),
    "`[placement]`": (("placement",), AppSpec, {}),
    "`[[placement.constraints]]`": (("placement", "[constraints]"), AppSpec, {"label": "disk", "operator": "in", "value": ["ssd"]}),
    "`[[placement.affinity]]`, `[[placement.anti_affinity]]`": (("placement", "[anti_affinity]"), AppSpec, {"app": "db"}),
    "`[network]`": (("network",), AppSpec, {}),
    "`[[network.ingress]]`, `[[network.egress]]` (at most 32 each)": (("network", "[egress]"), AppSpec, {}),
    "`[[volumes]]` (at most 32)": (("[volumes]",), AppSpec, {"name": "data", "path": "/data"}),
}
