"""A worker's part of a spec: what it is completed to, what is refused by name, and what workerd is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atoll.ingress.bootstrap import Listener, bootstrap
from atoll.model import codec
from atoll.model.errors import Invalid
from atoll.model.ports.images import Image, ImageConfig
from atoll.model.ports.runtime import WorkerCode
from atoll.model.records import Assignment, Instance, OwnerKind
from atoll.model.spec import AppSpec, HealthKind, Isolation, JobSpec, PortProtocol, check_app, check_job
from atoll.model.worker import SERVICE_HEADER, SERVICES, SERVICES_SOCKET, Worker
from atoll.node.compose import compose
from atoll.runtimes.workerd_config import Module, configuration, experimental, quoted, variables

MINIMAL: dict[str, Any] = {"main": "index.js", "compatibility_date": "2026-11-01"}


def spec(worker: dict[str, Any] | None = None, **fields: Any) -> AppSpec:
    return codec.convert({"name": "w", "worker": {**MINIMAL, **(worker or {})}, **fields}, AppSpec)


def test_a_worker_s_spec_says_all_that_follows_from_it() -> None:
    made = spec()
    check_app(made)
    assert made.isolation is Isolation.ISOLATE
    assert made.build is not None
    assert (made.build.base, made.build.workdir, made.build.files) == ("scratch", "/worker", (".",))
    assert [(port.name, port.port, port.protocol) for port in made.ports] == [
        ("http", 8080, PortProtocol.HTTP),
        ("alive", 8081, PortProtocol.TCP),
    ]
    assert made.health is not None
    assert (made.health.kind, made.health.port) == (HealthKind.HTTP, "alive")
    assert made.volumes == ()
    assert made.rollout.max_surge == 1
    assert codec.decode(codec.encode(made), AppSpec) == made


def test_a_worker_with_state_runs_once_beside_its_volume() -> None:
    for state in ({"kv": [{"binding": "KV"}]}, {"durable_objects": [{"binding": "C", "class_name": "C"}]}):
        made = spec(state)
        check_app(made)
        assert [(volume.name, volume.path) for volume in made.volumes] == [("worker-state", "/state")]
        assert (made.rollout.max_surge, made.rollout.max_unavailable) == (0, 1)


def test_what_the_spec_says_itself_is_kept() -> None:
    given = {"ports": [{"port": 8081}], "health": {"path": "/healthz"}, "stop": {"grace": "9s"}}
    made = spec(**given)
    check_app(made)
    assert [port.port for port in made.ports] == [8081]
    assert made.health is not None
    assert made.health.path == "/healthz"
    assert made.stop.grace == 9
    assert [port.port for port in spec(ports=[{"port": 8081}]).ports] == [8081, 8082]


@pytest.mark.parametrize(
    ("worker", "fields", "field"),
    [
        ({"main": "../index.js"}, {}, "worker.main"),
        ({"main": "src/index.ts"}, {}, "worker.main"),
        ({"main": "index.wasm"}, {}, "worker.main"),
        ({"vars": {"A": 1}}, {"env": {"A": "b"}}, "worker.vars.A"),
        ({"vars": {"A": 1}, "kv": [{"binding": "A"}]}, {}, "worker.kv[0].binding"),
        ({"services": [{"binding": "ATOLL_APP", "app": "x"}]}, {}, "worker.services[0].binding"),
        ({"vars": {"BIG": "x" * 200_000}}, {}, "worker.vars"),
        ({"egress": ["example.com"]}, {}, "worker.egress[0]"),
        ({"egress": ["public", "unix"]}, {}, "worker.egress[1]"),
        (
            {"kv": [{"binding": "A", "id": "n"}, {"binding": "B", "id": "n"}], "durable_objects": []},
            {"scale": {"replicas": 2}},
            "scale.replicas",
        ),
        (
            {"durable_objects": [{"binding": "A", "class_name": "C"}, {"binding": "B", "class_name": "D", "key": "C"}]},
            {},
            "worker.durable_objects[1].key",
        ),
        ({"durable_objects": [{"binding": "A", "class_name": "C"}]}, {"rollout": {"max_surge": 1}}, None),
        ({"durable_objects": [{"binding": "A", "class_name": "C"}]}, {"rollout": {"max_surge": 2}}, "rollout.max_surge"),
        ({"kv": [{"binding": "A"}]}, {"scale": {"replicas": 2}}, "scale.replicas"),
        ({"assets": {"directory": "../public"}}, {}, "worker.assets.directory"),
        ({"assets": {"directory": "."}}, {}, "worker.assets.directory"),
        ({"main": "dist/index.js", "assets": {"directory": "dist"}}, {}, "worker.assets.directory"),
        ({"assets": {"directory": "p", "binding": "A"}, "vars": {"A": 1}}, {}, "worker.assets.binding"),
        ({"crons": ["* * * * *"]}, {"scale": {"replicas": 2}}, "scale.replicas"),
        ({"crons": ["* * * * *", "61 * * * *"]}, {}, "worker.crons[1]"),
        ({"queues": [{"queue": "a"}, {"queue": "a"}]}, {}, "worker.queues[1].queue"),
        ({"queues": [{"queue": "a", "dead_letter": "a"}]}, {}, "worker.queues[0].dead_letter"),
        ({"queues": [{"queue": "a", "dead_letter": "b"}]}, {}, "worker.queues[0].dead_letter"),
        ({"queues": [{"queue": "a", "batch_wait": "2m"}]}, {}, "worker.queues[0].batch_wait"),
        ({"queues": [{"queue": "a", "retry_delay": "13h"}]}, {}, "worker.queues[0].retry_delay"),
        ({"queues": [{"queue": "a", "binding": "A"}], "vars": {"A": 1}}, {}, "worker.queues[0].binding"),
        ({}, {"command": ["node"]}, "command"),
        ({}, {"user": "root"}, "user"),
        ({}, {"build": {"apt": ["nodejs"]}}, "build"),
        ({}, {"volumes": [{"name": "data", "path": "/data"}]}, "volumes[0].path"),
        ({}, {"resources": {"memory": "32MiB"}}, "resources.memory"),
        ({}, {"resources": {"gpu": {}}}, "resources.gpu"),
        ({}, {"health": {"kind": "exec", "command": ["true"]}}, "health.kind"),
        ({}, {"ports": [{"name": "a", "port": 1}, {"name": "b", "port": 2}]}, "ports"),
        ({}, {"ports": [{"port": 1, "http2": True}]}, "ports[0].http2"),
        ({}, {"isolation": "vm"}, "isolation"),
    ],
)
def test_what_a_worker_cannot_have_is_refused_by_its_field(
    worker: dict[str, Any], fields: dict[str, Any], field: str | None
) -> None:
    if field is None:
        check_app(spec(worker, **fields))
        return
    with pytest.raises(Invalid) as raised:
        check_app(spec(worker, **fields))
    assert raised.value.field == field
    assert raised.value.mend


@pytest.mark.parametrize(
    "expression",
    [
        "* * * * *",
        "*/5 0-23/2 1,15,20-22 JAN-mar MON-FRI",
        "5/10 0 L * *",
        "0 0 LW 2 *",
        "0 0 L-28 2 *",
        "0 0 L-3W * *",
        "0 0 29 2 *",
        "0 0 15W * *",
        "0 0 31 6 7",
        "0 0 * * L",
        "0 0 * * 6L",
        "0 0 * * FRI#5",
        "*/59,30 * * * *",
    ],
)
def test_a_cron_expression_that_workerd_reads_is_taken(expression: str) -> None:
    check_app(spec({"crons": [expression]}))


@pytest.mark.parametrize(
    ("expression", "word"),
    [
        ("60 * * * *", "minute is '60'"),
        ("* 24 * * *", "hour"),
        ("* * 0 * *", "day is '0'"),
        ("* * * 13 *", "month"),
        ("* * * * 0", "weekday is '0'"),
        ("* * * * 8", "weekday"),
        ("0 0 * * FRI-MON", "goes down"),
        ("*,5 * * * *", "'\\*' in a list"),
        ("*/0 * * * *", "bad step"),
        ("*/60 * * * *", "bad step"),
        ("1/2/3 * * * *", "bad step"),
        ("1-2-3 * * * *", "minute is '2-3'"),
        ("1- * * * *", "minute is ''"),
        ("0 0 30 2 *", "never comes"),
        ("0 0 L-29 FEB *", "never comes"),
        ("0 0 31W 4,6 *", "never comes"),
        ("0 0 L-31 * *", "goes back 1 to 30"),
        ("0 0 * * 2#6", "1 to 5"),
        ("L * * * *", "minute is 'L'"),
    ],
)
def test_a_cron_expression_that_workerd_would_end_over_is_refused_with_what_is_wrong(expression: str, word: str) -> None:
    with pytest.raises(Invalid, match=word) as raised:
        check_app(spec({"crons": [expression]}))
    assert raised.value.field == "worker.crons[0]"


def test_an_isolate_without_modules_and_a_job_in_one_are_refused() -> None:
    with pytest.raises(Invalid, match="worker: missing"):
        check_app(AppSpec(name="a", image="x", isolation=Isolation.ISOLATE))
    with pytest.raises(Invalid, match="a job cannot be a worker"):
        check_job(JobSpec(name="j", image="x", isolation=Isolation.ISOLATE))


def code(worker: dict[str, Any] | None = None, **fields: Any) -> WorkerCode:
    return WorkerCode(
        **{
            "worker": codec.convert({**MINIMAL, **(worker or {})}, Worker),
            "project": "p",
            "port": 8080,
            "alive_port": 8081,
            **fields,
        }
    )


INDEX = Module("index.js", 10)


def test_modules_are_told_by_their_names_and_the_main_one_comes_first() -> None:
    others = [Module(name) for name in ("a.js", "b.mjs", "c.cjs", "d.wasm", "e.json", "f.txt", "g.bin", "README", "h.py")]
    text = configuration(code(), [*others, INDEX], memory_bytes=128 << 20)
    found = [line.strip(" ,") for line in text.splitlines() if " embed " in line]
    assert found[0] == '(name = "index.js", esModule = embed "worker/index.js")'
    assert [line.partition("name = ")[2].partition(" =")[0] for line in found[1:]] == [
        '"a.js", esModule',
        '"b.mjs", esModule',
        '"c.cjs", commonJsModule',
        '"d.wasm", wasm',
        '"e.json", json',
        '"f.txt", text',
        '"g.bin", data',
    ]


def test_too_many_modules_and_a_missing_one_are_refused() -> None:
    with pytest.raises(Invalid, match="more than"):
        configuration(code(), [INDEX, Module("big.wasm", 1 << 30)], memory_bytes=1)
    with pytest.raises(Invalid, match="more than"):
        configuration(code(), [INDEX, *(Module(f"{at}.js") for at in range(3_000))], memory_bytes=1)
    with pytest.raises(Invalid, match=r"no /worker/index\.js"):
        configuration(code(), [Module("src/index.js")], memory_bytes=1)


def test_nothing_that_a_tenant_writes_ends_a_literal() -> None:
    assert quoted('a"b\\c\nd\x00é') == '"a\\"b\\\\c\\x0ad\\x00é"'
    evil = 'x"), (name = "evil", service = "state'
    text = configuration(code({"vars": {"A": evil, "B": [evil]}}), [INDEX, Module('q".txt')], memory_bytes=1)
    assert 'service = "state"' not in text.replace('\\"', "")
    assert r'"q\".txt"' in text


def test_secrets_are_variables_of_the_process_and_not_in_its_configuration() -> None:
    worker = code(bindings=("TOKEN", "GONE"))
    assert variables(worker, (("TOKEN", "s3cret"), ("PATH", "/bin"))) == (("ATOLL_B_TOKEN", "s3cret"),)
    text = configuration(worker, [INDEX], memory_bytes=1)
    assert '(name = "TOKEN", fromEnvironment = "ATOLL_B_TOKEN")' in text
    assert "s3cret" not in text


def test_a_binding_is_to_an_app_of_the_worker_s_own_project() -> None:
    text = configuration(code({"services": [{"binding": "B", "app": "other", "port": 80}]}), [INDEX], memory_bytes=1)
    assert f'(name = "{SERVICE_HEADER}", value = "p/other/80")' in text


def test_the_heap_is_bounded_by_the_instance_s_memory() -> None:
    assert '"--max-heap-size=88"' in configuration(code(), [INDEX], memory_bytes=128 << 20)
    assert '"--max-heap-size=16"' in configuration(code(), [INDEX], memory_bytes=16 << 20)


def test_only_kv_queues_and_crons_need_what_workerd_calls_experimental() -> None:
    assert not experimental(code())
    for store in ({"kv": [{"binding": "KV"}]}, {"queues": [{"queue": "q"}]}, {"crons": ["* * * * *"]}):
        assert experimental(code(store))


def test_the_box_of_a_worker_has_its_code_and_needs_no_command_of_an_image(tmp_path: Path) -> None:
    workload = spec(env={"GREETING": "hi"}, secrets={"TOKEN": "token"}, image="x")
    instance = Instance(
        id="w-1", project="default", owner_kind=OwnerKind.APP, owner="w", release=1, created_at=0.0, node="n", placed_at=0.0
    )
    image = Image(reference="x", digest="sha256:0", config=ImageConfig(env=("FROM_IMAGE=1",)), layers=())
    box = compose(
        Assignment(instance=instance, workload=workload, revision=1),
        node="n",
        directory=tmp_path,
        image=image,
        link=None,
        secrets={"TOKEN": "s"},
        mounts=(),
        stdout=tmp_path / "out",
        stderr=tmp_path / "err",
    )
    assert box.argv == ()
    assert box.worker is not None
    assert (box.worker.project, box.worker.port, box.worker.alive_port) == ("default", 8080, 8081)
    assert box.worker.bindings == ("ATOLL_APP", "ATOLL_INSTANCE", "ATOLL_NODE", "ATOLL_PROJECT", "GREETING", "TOKEN")


def test_the_ingress_s_socket_for_workers_goes_by_the_header_alone() -> None:
    listeners = bootstrap(Listener(address="127.0.0.1", port=80, connections_max=9), name="n")["static_resources"]["listeners"]
    (services,) = [each for each in listeners if each["name"] == "services"]
    assert services["address"]["pipe"]["path"] == f"{SERVICES}/{SERVICES_SOCKET}"
    manager = services["filter_chains"][0]["filters"][0]["typed_config"]
    assert "rds" not in manager
    (route,) = manager["route_config"]["virtual_hosts"][0]["routes"]
    assert route["route"]["cluster_header"] == SERVICE_HEADER
    assert route["request_headers_to_remove"] == [SERVICE_HEADER]
