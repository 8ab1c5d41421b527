"""Holds requests and answers against an OpenAPI document, of version 2 or 3: the monitors' own (tests/unit/data/openapi)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft4Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT4

DIRECTORY = Path(__file__).parents[1] / "unit/data/openapi"
_URI = "urn:document"


def strict(schema: Any) -> Any:
    """Return a schema that takes no property which it does not name, as both monitors' parsers are meant to be fed."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and "additionalProperties" not in found and found.get("type") == "object":
        found["additionalProperties"] = False
    return found


class Document:
    """`operations` are (method, path template)."""

    def __init__(self, name: str, *, base: str = "", beside: frozenset[int] = frozenset()) -> None:
        """`beside` are the statuses of refusals that the monitor gives everywhere, whatever its document says of a request."""
        self.beside = beside
        with (DIRECTORY / name).open() as file:
            # YAML reads `200:` as a number; JSON has none for a key.
            self.content: dict[str, Any] = _text_keys(yaml.load(file, yaml.CSafeLoader))
        self.base = base
        self._registry = Registry().with_resource(_URI, Resource.from_contents(strict(self.content), DRAFT4))
        self.operations = {
            (method.upper(), template): f"#/paths/{template.replace('~', '~0').replace('/', '~1')}/{method}"
            for template, item in self.content["paths"].items()
            for method in item
            if method in {"get", "put", "patch", "post", "delete"}
        }

    def operation(self, method: str, path: str) -> tuple[str, str] | None:
        """Return (method, template) of a request; None for one that the document does not know."""
        for known, template in self.operations:
            pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template))
            if known == method and re.fullmatch(re.escape(self.base) + pattern, path):
                return known, template
        return None

    def request_problem(self, method: str, path: str, body: Any) -> str:
        """Return what is wrong with a request, or nothing. `body` is None where there is none."""
        found = self.operation(method, path)
        if found is None:
            return f"{method} {path} is not in the document"
        item = self._item(found)
        at = self.operations[found]
        where = None
        for index, parameter in enumerate(item.get("parameters", ())):
            if parameter["in"] == "body":
                where = f"{at}/parameters/{index}/schema"
        if "requestBody" in item:
            where = f"{at}/requestBody/content/application~1json/schema"
        if where is None:
            return "" if body is None else f"{method} {path} takes no body"
        return f"{method} {path} needs a body" if body is None else self._problem(where, body)

    def answer_problem(self, method: str, path: str, status: int, body: Any) -> str:
        """Return what is wrong with an answer, or nothing."""
        found = self.operation(method, path)
        if found is None:
            return f"{method} {path} is not in the document"
        answers, at = self._item(found)["responses"], self.operations[found]
        key = str(status) if str(status) in answers else "default"
        if key not in answers and status in self.beside:
            return ""
        if key not in answers:
            return f"{method} {path} has no answer {status}"
        answer = answers[key]
        if "schema" in answer:
            return self._problem(f"{at}/responses/{key}/schema", body)
        if "content" in answer:
            return self._problem(f"{at}/responses/{key}/content/application~1json/schema", body)
        return "" if body is None or status >= 400 else f"an answer {status} has no body"

    def _item(self, operation: tuple[str, str]) -> dict[str, Any]:
        method, template = operation
        found: dict[str, Any] = self.content["paths"][template][method.lower()]
        return found

    def _problem(self, where: str, value: Any) -> str:
        validator = Draft4Validator({"$ref": f"{_URI}{where}"}, registry=self._registry)
        return "; ".join(f"{error.json_path}: {error.message}" for error in list(validator.iter_errors(value))[:3])


def _text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _text_keys(inner) for key, inner in value.items()}
    return [_text_keys(inner) for inner in value] if isinstance(value, list) else value


def firecracker() -> Document:
    return Document("firecracker.yaml")


def cloud_hypervisor() -> Document:
    """Its document lists few refusals; `vmm/src/api/http` answers 400 to what it cannot read and 500 to what it has no name for."""
    return Document("cloud-hypervisor.yaml", base="/api/v1", beside=frozenset({400, 500}))
