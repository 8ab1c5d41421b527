"""Reading `wrangler.toml`, `wrangler.json` and `wrangler.jsonc` as they are: what they say becomes an app's spec with a worker.

What cannot be had here is refused by its name, so that nothing that a worker counts on is left out in silence. What is about
another's platform alone (accounts, previews) says nothing here. As with wrangler, `env.NAME` counts only where it is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from atoll.model.errors import Invalid

NAMES = ("wrangler.toml", "wrangler.jsonc", "wrangler.json")
_IGNORED = frozenset(
    {"$schema", "account_id", "zone_id", "workers_dev", "preview_urls", "send_metrics", "observability", "dev", "logpush", "env"}
    | {"keep_vars", "upload_source_maps", "preserve_file_names", "no_bundle", "tsconfig", "find_additional_modules", "minify"}
    | {"keep_names", "placement"}
)
_ELSEWHERE = {
    "r2_buckets": "call an S3 store from the worker",
    "d1_databases": "use a durable object: its ctx.storage.sql is SQLite",
    "site": "use assets",
    "build": "run the command first, and let main name its result",
    "rules": "wasm, txt, html, css, sql, json and bin files are modules by their names; rename the others",
    "limits": "workerd bounds no request's time; set resources.cpu in an atoll.toml, which bounds the whole worker",
    "workflows": "use a durable object with alarms",
    "containers": "deploy the container as an app, and bind to it with services",
    "python_modules": "only JavaScript and WebAssembly run here",
}
_CONSUMER: dict[str, tuple[str, type[Any]]] = {
    "max_batch_size": ("batch_size", int),
    "max_batch_timeout": ("batch_wait", int),
    "max_retries": ("retries", int),
    "retry_delay": ("retry_delay", int),
    "dead_letter_queue": ("dead_letter", str),
    "max_concurrency": ("concurrency", int),
}
"""A consumer's settings, and what the spec calls them."""
_MEND = "leave it out, or write an atoll.toml with a [worker] table beside this file"
_ROUTE = re.compile(r"(?:https?://)?(?P<host>[^/]+?)(?P<path>/.*)?")


def spec_data(config: dict[str, Any]) -> dict[str, Any]:
    """Return the plain data of an app's spec. Raises Invalid, naming the key."""
    known = _Reader(dict(config))
    for key in sorted(_IGNORED & config.keys()):
        known.take(key, object)
    main = known.take("main", str)
    if main is None:
        raise Invalid("main: missing", field="main", mend="name the worker's main module")
    base = known.take("base_dir", str) or str(PurePosixPath(main).parent)
    worker: dict[str, Any] = {"main": main.removeprefix("./"), "files": [base]}
    for key, kind in (("compatibility_date", str), ("compatibility_flags", list), ("vars", dict)):
        if (value := known.take(key, kind)) is not None:
            worker[key] = value
    worker["services"] = known.each("services", _service)
    worker["kv"] = known.each("kv_namespaces", _kv)
    worker["queues"] = _queues(known.take("queues", dict) or {})
    triggers = _Reader(known.take("triggers", dict) or {}, "triggers.")
    worker["crons"] = triggers.take("crons", list) or []
    triggers.finish()
    if (assets := known.take("assets", dict)) is not None:
        worker["assets"] = _assets(assets)
        worker["files"].append(worker["assets"]["directory"])
    objects = known.take("durable_objects", dict) or {}
    inner = _Reader(objects, "durable_objects.")
    declared = inner.each("bindings", _durable_object)
    inner.finish()
    worker["durable_objects"] = _with_migrations(declared, known.take("migrations", list) or [])
    data: dict[str, Any] = {"worker": worker}
    if (name := known.take("name", str)) is not None:
        data["name"] = name
    routes = known.each("routes", _route)
    if (single := known.take("route", object)) is not None:
        routes.append(_route(single, "route"))
    if routes:
        data["routes"] = routes
    secrets = _Reader(known.take("secrets", dict) or {}, "secrets.")
    required = secrets.take("required", list) or []
    secrets.finish()
    if required:
        data["secrets"] = {str(name): secret_name(str(name)) for name in required}
    known.finish()
    return data


def secret_name(variable: str) -> str:
    """Return the name of the project's secret that stands for one of wrangler's: `API_KEY` is `api-key`."""
    return variable.lower().replace("_", "-")


def parse_jsonc(text: str) -> Any:
    """Return the data of JSON with comments and trailing commas. Raises Invalid."""
    pieces = re.findall(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/|[^"/]+|.', text, re.DOTALL)
    kept = [" " if piece.startswith(("//", "/*")) else piece for piece in pieces]
    # A comma before a bracket, outside of text: pieces of text begin with a quotation mark.
    plain = "".join(kept)
    plain = re.sub(
        r'("(?:\\.|[^"\\])*")|,(\s*[}\]])', lambda found: found[1] if found[1] is not None else found[2], plain, flags=re.DOTALL
    )
    try:
        return json.loads(plain)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"not valid JSON with comments: {error}") from None


class _Reader:
    """Takes keys from a table; those that are left at the end are refused."""

    def __init__(self, table: Mapping[str, Any], where: str = "") -> None:
        self._table = dict(table)
        self._where = where

    def take(self, key: str, kind: type[Any]) -> Any:
        value = self._table.pop(key, None)
        if value is not None and not isinstance(value, kind):
            wanted = {str: "text", list: "a list", int: "a number"}.get(kind, "a table")
            raise Invalid(f"{self._where}{key}: must be {wanted}", field=f"{self._where}{key}")
        return value

    def each(self, key: str, convert: Callable[[Any, str], dict[str, Any]]) -> list[dict[str, Any]]:
        return [convert(value, f"{self._where}{key}[{index}]") for index, value in enumerate(self.take(key, list) or ())]

    def finish(self) -> None:
        for key in self._table:
            field = f"{self._where}{key}"
            raise Invalid(f"{field}: not supported for workers here", field=field, mend=_ELSEWHERE.get(key, _MEND))


def _table(value: Any, where: str) -> _Reader:
    if not isinstance(value, dict):
        raise Invalid(f"{where}: must be a table", field=where)
    return _Reader(value, f"{where}.")


def _service(value: Any, where: str) -> dict[str, Any]:
    table = _table(value, where)
    found = {"binding": table.take("binding", str), "app": table.take("service", str)}
    table.finish()
    return _complete(found, where, {"app": "service"})


def _kv(value: Any, where: str) -> dict[str, Any]:
    table = _table(value, where)
    found = {"binding": table.take("binding", str), "id": table.take("id", str)}
    table.take("preview_id", str)
    table.finish()
    return _complete(found, where, optional=("id",))


def _assets(value: dict[str, Any]) -> dict[str, Any]:
    table = _Reader(value, "assets.")
    found = {"directory": table.take("directory", str), "binding": table.take("binding", str)}
    found |= {"html": table.take("html_handling", str), "not_found": table.take("not_found_handling", str)}
    first = table.take("run_worker_first", object)
    table.finish()
    if isinstance(first, bool):
        first = ["/*"] if first else []
    if isinstance(found["directory"], str):
        found["directory"] = found["directory"].removeprefix("./").rstrip("/")
    return _complete(found | {"worker_first": first}, "assets", optional=("binding", "html", "not_found", "worker_first"))


def _queues(value: dict[str, Any]) -> list[dict[str, Any]]:
    """A queue's messages are on its worker's disk, so that who sends is who receives."""
    table = _Reader(value, "queues.")
    found = {each["queue"]: each for each in table.each("consumers", _consumer)}
    for index, producer in enumerate(table.each("producers", _producer)):
        queue = found.get(producer["queue"])
        if queue is None or "binding" in queue:
            field = f"queues.producers[{index}].queue"
            why = "has two bindings" if queue else "is received by another worker, or none"
            raise Invalid(
                f"{field}: {producer['queue']} {why}",
                field=field,
                mend="add it to queues.consumers; to reach another worker, bind to it with services, and have it send",
            )
        queue["binding"] = producer["binding"]
    table.finish()
    return list(found.values())


def _producer(value: Any, where: str) -> dict[str, Any]:
    table = _table(value, where)
    found = {"binding": table.take("binding", str), "queue": table.take("queue", str)}
    table.finish()
    return _complete(found, where)


def _consumer(value: Any, where: str) -> dict[str, Any]:
    table = _table(value, where)
    found = {"queue": table.take("queue", str)} | {name: table.take(key, kind) for key, (name, kind) in _CONSUMER.items()}
    table.finish()
    return _complete(found, where, optional=tuple(name for name, _ in _CONSUMER.values()))


def _durable_object(value: Any, where: str) -> dict[str, Any]:
    table = _table(value, where)
    found = {"binding": table.take("name", str), "class_name": table.take("class_name", str)}
    table.finish()
    return _complete(found, where, {"binding": "name"})


def _complete(
    found: dict[str, Any], where: str, names: Mapping[str, str] | None = None, optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    for key, value in found.items():
        if value is None and key not in optional:
            field = f"{where}.{(names or {}).get(key, key)}"
            raise Invalid(f"{field}: missing", field=field)
    return {key: value for key, value in found.items() if value is not None}


def _with_migrations(objects: list[dict[str, Any]], migrations: list[Any]) -> list[dict[str, Any]]:
    """Give each class what the migrations say of it: whether it has SQL, and under which name its state began."""
    sql: set[str] = set()
    keys: dict[str, str] = {}
    for index, entry in enumerate(migrations):
        where = f"migrations[{index}]"
        table = _table(entry, where)
        table.take("tag", str)
        table.take("new_classes", list)
        table.take("deleted_classes", list)  # their state stays where it is, and nothing leads to it
        sql |= set(map(str, table.take("new_sqlite_classes", list) or ()))
        for number, renamed in enumerate(table.take("renamed_classes", list) or ()):
            step = _table(renamed, f"{where}.renamed_classes[{number}]")
            old, new = step.take("from", str), step.take("to", str)
            step.finish()
            keys[str(new)] = keys.pop(str(old), str(old))
            if old in sql:
                sql.add(str(new))
        table.finish()
    return [{**each, "sql": each["class_name"] in sql, "key": keys.get(each["class_name"], each["class_name"])} for each in objects]


def _route(value: Any, where: str) -> dict[str, Any]:
    pattern = value
    if isinstance(value, dict):
        table = _table(value, where)
        pattern = table.take("pattern", str)
        for key in ("zone_name", "zone_id", "custom_domain"):
            table.take(key, object)
        table.finish()
    found = _ROUTE.fullmatch(pattern) if isinstance(pattern, str) else None
    path = (found["path"] or "/*") if found else ""
    if found is None or not path.endswith("/*") or "*" in path[:-1]:
        raise Invalid(
            f"{where}: {pattern!r} is not a hostname and a path that ends with /*",
            field=where,
            mend="write e.g. example.com/api/*",
        )
    return {"host": found["host"], "path": path[:-1]}
