"""What a server of the next version writes is read by this one, as long as nothing in it uses what is new."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import structs

from atoll.model import codec, keys, stored
from atoll.model.errors import Invalid
from atoll.model.records import App, Job, NodePolicy, Project
from atoll.model.spec import AppSpec, Health, HealthKind, JobSpec, Port, Quota
from atoll.model.units import Seconds
from atoll.store.cache import State
from atoll.store.memory import MemoryStore


def app(**spec: Any) -> App:
    made = AppSpec(name="web", image="registry.test/web:1", ports=(Port(port=80), Port(name="more", port=81)), **spec)
    return App(project="default", name="web", spec=made, release=1, replicas=1, created_at=1.0, updated_at=1.0)


def newer(record: App | Project, path: str, value: object, *, used: bool) -> bytes:
    """Return the record as a version to come writes it, which has a field more at `path`."""
    body = json.loads(stored.encode(record))
    if used:
        body["used"].append(path)
    *places, field = path.split(".")
    inner: list[Any] = [body]
    for place in places:
        inner = [one for each in inner for one in (each[place] if isinstance(each[place], list) else [each[place]])]
    for one in inner:
        one[field] = value
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    "record",
    [
        app(),
        app(health=Health(kind=HealthKind.HTTP, interval=Seconds(2)), env={"A": "b"}),
        Job(project="default", name="sum", spec=JobSpec(name="sum", image="x", parallelism=3), created_at=1.0),
        Project(name="default", created_at=1.0),
    ],
)
def test_a_record_is_read_as_it_was_written(record: App | Job | Project) -> None:
    data = stored.encode(record)
    assert stored.decode(data, type(record)) == record
    assert codec.decode(data, type(record)) == record, "and by who knows nothing of this"
    # Every value is named, so that it keeps its meaning.
    plain = json.loads(codec.encode(record))
    assert {name: json.loads(data)[name] for name in plain} == plain


def test_what_is_used_is_what_differs_from_its_default() -> None:
    used = json.loads(stored.encode(app(health=Health(kind=HealthKind.HTTP, interval=Seconds(2)))))["used"]
    assert {
        "spec.name",
        "spec.image",
        "spec.ports",
        "spec.ports.port",
        "spec.ports.name",
        "spec.health",
        "spec.health.interval",
    } <= set(used)
    assert not {"spec.restart", "spec.stop", "spec.rollout", "spec.ports.protocol", "spec.health.timeout"} & set(used)


@pytest.mark.parametrize("path", ["spec.to_come", "spec.ports.to_come", "spec.restart.to_come"])
@pytest.mark.parametrize("value", [None, 3, {"deep": [1, {"er": True}]}, []])
def test_a_new_field_that_is_not_used_is_left_out(path: str, value: object) -> None:
    assert stored.decode(newer(app(), path, value, used=False), App) == app()


@pytest.mark.parametrize("path", ["spec.to_come", "spec.ports.to_come", "spec.restart.to_come"])
def test_a_new_field_that_is_used_is_refused_by_its_name(path: str) -> None:
    with pytest.raises(Invalid, match=path):
        stored.decode(newer(app(), path, 3, used=True), App)


def test_a_new_field_of_the_record_itself_is_left_out_as_ever() -> None:
    assert stored.decode(newer(app(), "to_come", 3, used=False), App) == app()


def test_a_quota_is_a_spec_too() -> None:
    project = Project(name="default", created_at=1.0, quota=Quota(instances=3))
    assert stored.decode(newer(project, "quota.to_come", 0, used=False), Project) == project
    with pytest.raises(Invalid, match=r"quota\.to_come"):
        stored.decode(newer(project, "quota.to_come", 1, used=True), Project)


@pytest.mark.parametrize("used", [None, "spec.name", {"spec": 1}, 3])
def test_an_unknown_field_of_which_nothing_is_said_is_refused(used: object) -> None:
    body = json.loads(newer(app(), "spec.to_come", 3, used=False))
    body["used"] = used
    with pytest.raises(Invalid, match="unknown field"):
        stored.decode(json.dumps(body).encode(), App)


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b'{"used":[]}', b'{"spec":[],"used":["spec"]}'])
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(Invalid):
        stored.decode(data, App)


async def test_a_server_holds_what_a_newer_one_wrote_and_leaves_alone_what_uses_more() -> None:
    store = MemoryStore()
    await store.put(keys.app("default", "web"), newer(app(), "spec.to_come", None, used=False))
    await store.put(keys.app("default", "new"), newer(app(), "spec.to_come", 3, used=True))
    async with State(store, {keys.APPS: App}) as state:
        assert set(state.records(App)) == {"default/web"}
        assert state.broken(App) == {"default/new"}


def test_what_stands_beside_a_record_is_kept_when_it_is_written_over() -> None:
    data = b'{"name":"n1","later":{"a":1},"cordoned":true}'
    record, beside = codec.decode(data, NodePolicy), stored.beside(data, NodePolicy)
    assert beside == {"later": {"a": 1}}
    after = json.loads(stored.encode_over(structs.replace(record, cordoned=False, note="x"), beside))
    assert after == {"name": "n1", "note": "x", "later": {"a": 1}}
    assert stored.beside(stored.encode_over(record, None), NodePolicy) is None
    with pytest.raises(Invalid):
        stored.beside(b"[1]", NodePolicy)
