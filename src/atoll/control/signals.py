"""What the instances of an app, and those who watch it, say of how much there is to do. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from atoll.control.autoscale import Signal
from atoll.model.records import Usage
from atoll.model.spec import AppSpec, PrometheusQuery, Scale

ANSWER_FRESH_S = 60.0
"""An answer older than this is none: four times the pause between two questions."""


def signals_of(spec: AppSpec, scale: Scale, ready: int, usages: Sequence[Usage]) -> Iterable[Signal]:
    """Yield a signal for each of `scale`'s sources that instances give; `usages` are those of `ready` ones that are heard."""
    if scale.metric is not None and scale.target is not None:
        given = [usage.metrics[scale.metric] for usage in usages if scale.metric in usage.metrics]
        yield Signal(name=scale.metric, target=scale.target, ready=ready, readings=tuple(given))
    # An instance that runs has memory: without any, its use could not be read.
    read = [usage for usage in usages if usage.memory_bytes > 0]
    if scale.cpu is not None:
        given = [usage.cpu_milli / (1000 * float(spec.resources.cpu)) for usage in read]
        yield Signal(name="cpu", target=scale.cpu, ready=ready, readings=tuple(given))
    if scale.memory is not None:
        given = [usage.memory_bytes / int(spec.resources.memory) for usage in read]
        yield Signal(name="memory", target=scale.memory, ready=ready, readings=tuple(given))
    if scale.gpu is not None and spec.resources.gpu is not None:
        given = [usage.gpu_milli / (1000 * spec.resources.gpu.count) for usage in read if not usage.gpu_silent]
        yield Signal(name="gpu", target=scale.gpu, ready=ready, readings=tuple(given))


def prometheus_signal(query: PrometheusQuery, answer: tuple[float, float] | None, now: float) -> Signal:
    """Return the signal of a query's last answer, which is one reading for all instances together; an old one is none."""
    fresh = answer is not None and now - answer[1] <= ANSWER_FRESH_S
    return Signal(
        name="the query's answer", target=query.target, ready=1, readings=(answer[0],) if answer is not None and fresh else ()
    )
