"""Checks a CDI spec against the specification's own JSON schema (`data/cdi-schema.json`), read strictly.

A field that the schema does not name is refused: what nobody reads would otherwise look as if it had been done. `data/SOURCE.md`
says where the schema is from, and how it is read differently from how it is written.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from typing import Any

from atoll.model.errors import Invalid

_DATA = resources.files("atoll.devices") / "data"
_ADDED: dict[str, dict[str, Any]] = {
    "DeviceNode": {"fileMode": {"$ref": "#/definitions/uint32"}},
    "intelRdt": {"enableCMT": {"type": "boolean"}, "enableMBM": {"type": "boolean"}},
}
"""Fields of the specification's text that its schema does not name."""
_KINDS: dict[str, tuple[type, ...]] = {"string": (str,), "integer": (int,), "boolean": (bool,), "array": (list,), "object": (dict,)}
_SHOWN_MAX = 60


@functools.cache
def schema() -> dict[str, Any]:
    """Return the schema of a spec with what `SOURCE.md` says changed; `#/definitions/…` holds the parts."""
    whole: dict[str, Any] = json.loads((_DATA / "cdi-schema.json").read_text())
    parts: dict[str, Any] = json.loads((_DATA / "cdi-defs.json").read_text())["definitions"]
    edits = parts["containerEdits"]["properties"]
    edits["env"]["items"] = {"type": "string"}
    parts["DeviceNode"]["properties"] |= _ADDED["DeviceNode"]
    edits["intelRdt"]["properties"] |= _ADDED["intelRdt"]
    return {**whole, "definitions": parts}


def check(spec: object, source: str) -> dict[str, Any]:
    """Return `spec` if it has the form of a CDI spec. Raises Invalid, naming `source` (a file) and the field."""
    _check(spec, schema(), "", source)
    assert isinstance(spec, dict)  # noqa: S101 - the schema says so
    return spec


def wrong(source: str, field: str, what: str, mend: str | None = None) -> Invalid:
    """Return the error that a spec gets: one form for all of them."""
    return Invalid(f"{source}: {field or 'the spec'}: {what}", field=field or None, mend=mend)


def _check(value: object, rule: dict[str, Any], at: str, source: str) -> None:
    if "$ref" in rule:
        rule = schema()["definitions"][rule["$ref"].rpartition("/")[2]]
    kind = rule.get("type")
    # A boolean is an integer to Python, and not to JSON.
    if kind and (not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "boolean")):
        raise wrong(source, at, f"{_shown(value)} is not of type {kind}")
    if isinstance(value, int) and not isinstance(value, bool):
        low, high = rule.get("minimum", value), rule.get("maximum", value)
        if not low <= value <= high:
            raise wrong(source, at, f"{value} is not between {low} and {high}")
    if isinstance(value, list):
        for index, entry in enumerate(value):
            _check(entry, rule.get("items", {}), f"{at}[{index}]", source)
    if isinstance(value, dict):
        _check_object(value, rule, at, source)


def _check_object(value: dict[Any, Any], rule: dict[str, Any], at: str, source: str) -> None:
    named: dict[str, Any] = rule.get("properties", {})
    patterns: dict[str, Any] = rule.get("patternProperties", {})
    for name in rule.get("required", ()):
        if name not in value:
            raise wrong(source, _join(at, name), "is missing")
    for name, entry in value.items():
        if not isinstance(name, str):
            raise wrong(source, _join(at, str(name)), "the name of a field must be a string")
        rules = [named[name]] if name in named else [part for pattern, part in patterns.items() if re.search(pattern, name)]
        if not rules:
            known = f"known are {', '.join(sorted(named))}" if named else None
            raise wrong(source, _join(at, name), "there is no such field in CDI 1.1.0", known)
        for each in rules:
            _check(entry, each, _join(at, name), source)


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "…"
