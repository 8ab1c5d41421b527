"""What is wrong with a file that a person wrote is said in their words."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import msgspec
import pytest

from atoll.model import codec
from atoll.model.errors import Invalid
from atoll.model.ports.control_plane import AssignmentBatch
from atoll.model.records import Assignment, Instance, OwnerKind
from atoll.model.spec import AppSpec, Gpu, JobSpec, Port, Resources
from atoll.model.views import InstanceView, Page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'name = "web"\nports = "8080"', "ports: expected a list, got text"),
        (b"name = 5", "name: expected text, got a whole number"),
        (b'name = "web"\nhealth = 1', "health: expected a table"),
        (b'name = "web"\nimagee = "x"', "unknown field `imagee`"),
        (b'name = "web"\nobject = "x"', "unknown field `object`"),
        (b'name = "x', "not valid TOML"),
        (b"\xff\xfe", "not text in UTF-8 (byte 0)"),
    ],
)
def test_a_bad_file_is_refused_in_plain_words(text: bytes, message: str) -> None:
    with pytest.raises(Invalid) as caught:
        codec.convert(codec.parse_text(text, ".toml"), AppSpec)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message", "mend"),
    [
        (b'name = "web"\nisolation = "vmm"', "isolation: no such value: 'vmm'", "use one of container, sandbox, vm, isolate"),
        (
            b'name = "web"\n[[placement.constraints]]\nlabel = "x"\noperator = "~"',
            "placement.constraints[0].operator: no such value: '~'",
            "use one of =, !=, in, not in, exists",
        ),
        (
            b'name = "web"\n[resources.gpu]\ncapabilities = ["sound"]',
            "resources.gpu.capabilities[0]: no such value: 'sound'",
            "use one of compute, utility, graphics, video",
        ),
    ],
)
def test_a_value_that_is_none_of_a_few_is_refused_with_those(text: bytes, message: str, mend: str) -> None:
    with pytest.raises(Invalid) as caught:
        codec.convert(codec.parse_text(text, ".toml"), AppSpec)
    assert str(caught.value) == message
    assert (caught.value.mend or "").startswith(mend)


def enumerations(
    kind: Any, path: tuple[Any, ...] = (), within: frozenset[Any] = frozenset()
) -> Iterator[tuple[tuple[Any, ...], type]]:
    """Yield every place in a record type where one of a few values stands: its path of names and, for a list, 0."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        yield path, kind
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if kind not in within:
            for field in msgspec.structs.fields(kind):
                yield from enumerations(field.type, (*path, field.encode_name), within | {kind})
    else:
        step = (0,) if get_origin(kind) in (tuple, list) else ()
        for argument in get_args(kind):
            yield from enumerations(argument, (*path, *step), within)


def built(path: tuple[Any, ...], value: object) -> Any:
    if not path:
        return value
    return [built(path[1:], value)] if path[0] == 0 else {path[0]: built(path[1:], value)}


@pytest.mark.parametrize("spec", [AppSpec, JobSpec])
def test_wherever_one_of_a_few_values_stands_another_is_refused_with_all_of_them(spec: type) -> None:
    places = list(enumerations(spec))
    assert len(places) >= 10
    for path, kind in places:
        for wrong in ("nonsense", 3):
            with pytest.raises(Invalid) as caught:
                codec.decode(codec.encode({"name": "web", **built(path, wrong)}), spec)
            assert caught.value.mend == "use one of " + ", ".join(str(member.value) for member in kind), path


def patterns(kind: Any, within: set[Any]) -> Iterator[msgspec.Meta]:
    """Yield what is said of every text in a record type that must match a pattern."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if kind not in within:
            within.add(kind)
            for field in msgspec.structs.fields(kind):
                yield from patterns(field.type, within)
        return
    yield from (meta for meta in getattr(kind, "__metadata__", ()) if isinstance(meta, msgspec.Meta) and meta.pattern)
    for argument in get_args(kind):
        yield from patterns(argument, within)


@pytest.mark.parametrize("spec", [AppSpec, JobSpec])
def test_every_pattern_of_a_spec_is_described_in_words(spec: type) -> None:
    found = list(patterns(spec, set()))
    assert len(found) >= 10
    assert [meta.pattern for meta in found if not meta.description] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "Z_3"}, "name: expected lower-case letters, digits and '-', at most 40, a letter first and no '-' last"),
        (
            {"name": "web", "routes": [{"host": "HELLO.localhost"}]},
            "routes[0].host: expected a hostname of lower-case letters, digits, '-' and '.', as www.example.com or *.example.com",
        ),
        ({"name": "web", "env": {"1": "x"}}, "env: a key of it: expected letters, digits and '_', at most 128, no digit first"),
        ({"name": "web", "stop": {"signal": "TERM"}}, "stop.signal: expected a signal's name, such as 'SIGTERM'"),
    ],
)
def test_a_text_that_may_not_be_is_refused_with_what_is_allowed(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Invalid) as caught:
        codec.convert(given, AppSpec)
    assert str(caught.value) == message
    assert caught.value.field == message.partition(":")[0]
    with pytest.raises(Invalid) as caught:
        codec.decode(codec.encode(given), AppSpec)
    assert str(caught.value) == message


def test_a_kind_that_is_none_is_refused_with_what_it_may_be() -> None:
    with pytest.raises(Invalid) as caught:
        codec.convert({"name": "web", "kind": "service"}, AppSpec)
    assert (str(caught.value), caught.value.mend) == ("kind: no such value here: 'service'", "write 'app', or leave it out")


def test_what_a_peer_of_the_next_version_says_is_read_without_what_is_not_known_yet() -> None:
    instance = Instance(id="web-1", project="p", owner_kind=OwnerKind.APP, owner="web", created_at=1.0)
    ports = (Port(port=80),)
    app = AppSpec(name="web", image="x", env={"A": "1"}, ports=ports, resources=Resources(gpu=Gpu(count=2)))
    for spec in (app, JobSpec(name="sum", image="x", completions=3)):
        batch = AssignmentBatch(3, True, put=(Assignment(instance=instance, workload=spec, revision=2),))
        plain = codec.to_plain(batch)
        workload = plain["put"][0]["workload"]
        for table in (plain, plain["put"][0], workload, workload["resources"], *workload.get("ports", ())):
            table["tomorrow"] = {"a": [1, {"b": None}]}
        data = codec.encode(plain)
        with pytest.raises(Invalid, match="unknown field `tomorrow`"):
            codec.decode(data, AssignmentBatch)
        assert codec.decode_known(data, AssignmentBatch) == batch
        assert codec.convert_known(plain, AssignmentBatch) == batch
    view = Page(items=(InstanceView(instance=instance, revision=1),), revision=1)
    assert codec.decode_known(codec.encode(view), Page[InstanceView]) == view
    plain = codec.to_plain(view)
    for table in (plain, plain["items"][0], plain["items"][0]["instance"]):
        table["tomorrow"] = 1
    assert codec.decode_known(codec.encode(plain), Page[InstanceView]) == view
    with pytest.raises(Invalid, match="expected text"):
        codec.decode_known(b'{"name": 5, "tomorrow": 1}', AppSpec)
