"""wrangler's files are read as they are; what cannot be had here is refused by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.cli import spec_file, wrangler
from atoll.model.errors import Invalid
from atoll.model.spec import AppSpec

EXAMPLES = Path(__file__).parents[2] / "examples" / "worker"
FULL = """
name = "shop"
main = "./src/index.js"
compatibility_date = "2026-10-01"
compatibility_flags = ["nodejs_compat"]
account_id = "abc"
workers_dev = true
routes = ["shop.example.com/*", { pattern = "example.com/api/*", zone_name = "example.com" }]
vars = { TEXT = "a", DEEP = { list = [1, true] } }
secrets = { required = ["API_KEY"] }
kv_namespaces = [{ binding = "CACHE", id = "0123abc", preview_id = "x" }]
services = [{ binding = "AUTH", service = "auth" }]

[durable_objects]
bindings = [{ name = "ROOMS", class_name = "Room" }, { name = "OLD", class_name = "Old" }]

[[migrations]]
tag = "v1"
new_sqlite_classes = ["Chat"]
new_classes = ["Old"]

[[migrations]]
tag = "v2"
renamed_classes = [{ from = "Chat", to = "Room" }]

[observability]
enabled = true

[env.production]
name = "shop-production"
"""


def read(directory: Path, text: str, name: str = "wrangler.toml") -> AppSpec:
    (directory / name).write_text(text)
    path = spec_file.find(directory)
    assert path.name == name
    return spec_file.parse(spec_file.read(path), AppSpec, path)


def test_a_whole_wrangler_toml_becomes_a_worker(tmp_path: Path) -> None:
    spec = read(tmp_path, FULL)
    assert spec.name == "shop"
    assert [(route.host, route.path) for route in spec.routes] == [("shop.example.com", "/"), ("example.com", "/api/")]
    assert spec.secrets == {"API_KEY": "api-key"}
    worker = spec.worker
    assert worker is not None
    assert (worker.main, worker.files, worker.compatibility_flags) == ("src/index.js", ("src",), ("nodejs_compat",))
    assert worker.vars == {"TEXT": "a", "DEEP": {"list": [1, True]}}
    assert [(each.binding, each.app) for each in worker.services] == [("AUTH", "auth")]
    assert [(each.binding, each.id) for each in worker.kv] == [("CACHE", "0123abc")]
    objects = [(each.binding, each.class_name, each.key, each.sql) for each in worker.durable_objects]
    assert objects == [("ROOMS", "Room", "Chat", True), ("OLD", "Old", "Old", False)]


def test_assets_become_the_worker_s_files_which_are_in_its_image(tmp_path: Path) -> None:
    text = 'name = "site"\nmain = "src/index.js"\ncompatibility_date = "2026-11-01"\n'
    text += '[assets]\ndirectory = "./public/"\nbinding = "ASSETS"\n'
    spec = read(tmp_path, text + 'not_found_handling = "single-page-application"\nrun_worker_first = true\n')
    assert spec.worker is not None
    assert spec.worker.files == ("src", "public")
    assets = spec.worker.assets
    assert assets is not None
    assert (assets.directory, assets.binding, assets.not_found, assets.worker_first) == (
        "public",
        "ASSETS",
        "single-page-application",
        ("/*",),
    )


EVENTS = """
name = "mailer"
main = "index.js"
compatibility_date = "2026-11-01"
[triggers]
crons = ["*/5 * * * *", "0 0 * * MON-FRI"]
[[queues.producers]]
binding = "MAILS"
queue = "mails"
[[queues.consumers]]
queue = "mails"
max_batch_size = 50
max_batch_timeout = 2
max_retries = 5
dead_letter_queue = "lost-mails"
[[queues.consumers]]
queue = "lost-mails"
"""


def test_cron_triggers_and_queues_become_the_worker_s_which_then_runs_once(tmp_path: Path) -> None:
    spec = read(tmp_path, EVENTS)
    assert spec.worker is not None
    assert spec.worker.crons == ("*/5 * * * *", "0 0 * * MON-FRI")
    mails, lost = spec.worker.queues
    assert (mails.queue, mails.binding, mails.batch_size, mails.batch_wait, mails.retries, mails.dead_letter) == (
        "mails",
        "MAILS",
        50,
        2,
        5,
        "lost-mails",
    )
    assert (lost.queue, lost.binding, lost.batch_size) == ("lost-mails", None, 10)
    assert [volume.path for volume in spec.volumes] == ["/state"]
    assert spec.rollout.max_surge == 0


def test_json_with_comments_is_read_and_text_in_it_is_left_alone(tmp_path: Path) -> None:
    text = '{ // a comment\n "name": "w", /* another */ "main": "index.js", "compatibility_date": "2026-11-01",\n'
    spec = read(tmp_path, text + ' "vars": { "URL": "http://a/*b*/,]", "QUOTE": "\\",}", }, }', "wrangler.jsonc")
    assert spec.worker is not None
    assert spec.worker.vars == {"URL": "http://a/*b*/,]", "QUOTE": '",}'}
    assert spec.worker.files == (".",)


@pytest.mark.parametrize(
    "key",
    ["r2_buckets", "d1_databases", "site", "build", "rules", "limits", "workflows", "ai", "tpyo"],
)
def test_what_cannot_be_had_is_refused_by_its_name(key: str) -> None:
    with pytest.raises(Invalid, match=f"^{key}: not supported") as raised:
        wrangler.spec_data({"name": "w", "main": "index.js", "compatibility_date": "2026-11-01", key: []})
    assert raised.value.field == key
    assert raised.value.mend


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"services": [{"binding": "A", "service": "b", "entrypoint": "Admin"}]}, "services[0].entrypoint"),
        ({"services": [{"binding": "A"}]}, "services[0].service"),
        ({"services": {}}, "services"),
        (
            {"durable_objects": {"bindings": [{"name": "A", "class_name": "B", "script_name": "c"}]}},
            "durable_objects.bindings[0].script_name",
        ),
        ({"migrations": [{"tag": "v1", "transferred_classes": []}]}, "migrations[0].transferred_classes"),
        ({"kv_namespaces": [{"id": "x"}]}, "kv_namespaces[0].binding"),
        ({"routes": ["example.com/exactly"]}, "routes[0]"),
        ({"queues": {"producers": [{"binding": "Q", "queue": "of-another"}]}}, "queues.producers[0].queue"),
        ({"queues": {"consumers": [{"queue": "q", "visibility_timeout_ms": 1}]}}, "queues.consumers[0].visibility_timeout_ms"),
        ({"queues": {"consumers": [{"queue": "q", "max_batch_size": "ten"}]}}, "queues.consumers[0].max_batch_size"),
        ({"triggers": {"crons": "* * * * *"}}, "triggers.crons"),
        ({"assets": {"binding": "A"}}, "assets.directory"),
        ({"assets": {"directory": "p", "experimental": 1}}, "assets.experimental"),
        ({"route": "example.com/a*b/*"}, "route"),
        ({"main": 3}, "main"),
    ],
)
def test_a_part_that_cannot_be_had_is_named_with_its_place(given: dict[str, object], field: str) -> None:
    with pytest.raises(Invalid) as raised:
        wrangler.spec_data({"name": "w", "main": "index.js", "compatibility_date": "2026-11-01", **given})
    assert raised.value.field == field


def test_broken_json_and_a_missing_main_say_so(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"wrangler\.jsonc: not valid JSON with comments"):
        read(tmp_path, '{ "name": "w" /* open', "wrangler.jsonc")
    with pytest.raises(Invalid, match="main: missing"):
        wrangler.spec_data({"name": "w"})


def test_an_atoll_toml_goes_before_a_wrangler_toml(tmp_path: Path) -> None:
    (tmp_path / "wrangler.toml").write_text("")
    (tmp_path / "atoll.toml").write_text("")
    assert spec_file.find(tmp_path).name == "atoll.toml"


@pytest.mark.parametrize("directory", ["", "front"])
def test_the_examples_are_specs_that_are_taken(directory: str) -> None:
    path = spec_file.find(EXAMPLES / directory)
    assert spec_file.parse(spec_file.read(path), AppSpec, path).worker is not None
