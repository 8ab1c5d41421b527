"""What workerd brings along that keeps its state in durable objects of its own: KV, queues, cron triggers. Pure.

Each is a worker whose code is in workerd (`bundled`), in the form that the head of that code asks for. They are workerd's
experimental features; their state is on the worker's volume, beside that of its durable objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from atoll.model.worker import CRON_KEY, KV_KEY, QUEUES_KEY, Queue, Worker
from atoll.runtimes.workerd_text import listed, quoted, service

_DATE = "2026-11-01"
_CONSUMER = "CONSUMER"
"""What they call the worker whose handlers `queue` and `scheduled` they call."""


def stores(worker: Worker) -> list[str]:
    """Return the services of those that the worker asks for."""
    found = []
    if worker.kv:
        blobs = '(name = "BLOBS", service = "state")'
        found.append(_store("kv", "SHARD", "KVNamespace", KV_KEY, [blobs]))
    if worker.queues:
        consumers = {queue.queue: _settings(queue) for queue in worker.queues}
        found.append(_store("queues", "SHARD", "QueueShard", QUEUES_KEY, _calling("CONSUMERS", consumers)))
    if worker.crons:
        found.append(_store("cron", "SCHEDULE", "Schedule", CRON_KEY, _calling("CRONS", {_CONSUMER: list(worker.crons)})))
    return found


def _settings(queue: Queue) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "consumer": _CONSUMER,
        "maxBatchSize": queue.batch_size,
        "maxBatchTimeout": float(queue.batch_wait),
        "maxRetries": queue.retries,
        "retryDelay": float(queue.retry_delay),
        "maxConcurrency": queue.concurrency,
    }
    return settings | ({"deadLetterQueue": queue.dead_letter} if queue.dead_letter is not None else {})


def _calling(name: str, value: Mapping[str, Any]) -> list[str]:
    return [f"(name = {quoted(name)}, json = {quoted(json.dumps(value))})", f'(name = "{_CONSUMER}", service = "main")']


def _store(name: str, binding: str, class_name: str, key: str, bindings: Sequence[str]) -> str:
    lines = [
        f'  modules = [(name = "{name}.js", bundled = "/workerd/{name}.js")],',
        f"  compatibilityDate = {quoted(_DATE)},",
        '  compatibilityFlags = ["service_binding_extra_handlers"],',
        listed("bindings", [f'(name = "{binding}", durableObjectNamespace = "{class_name}")', *bindings]),
        f'  durableObjectNamespaces = [(className = "{class_name}", uniqueKey = {quoted(key)}, enableSql = true)],',
        '  durableObjectStorage = (localDisk = "state"),',
    ]
    return service(name, "worker = (\n" + "\n".join(lines) + "\n)")
