"""What says how many instances of an app are needed, beside a metric of its own."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from atoll.model.cron import EXPRESSION_CHARS_MAX, ZONE_CHARS_MAX, check_cron, tick_after
from atoll.model.errors import Invalid
from atoll.model.names import SpecRecord
from atoll.model.spec.values import REPLICAS_MAX
from atoll.model.urls import Url, url_of

if TYPE_CHECKING:
    from atoll.model.spec.app import AppSpec
    from atoll.model.spec.scale import Scale

WINDOWS_MAX = 16
STABLE_MIN_S, STABLE_MAX_S = 6.0, 3_600.0
"""Knative's bounds of its stable window (knative.dev/docs/serving/autoscaling/kpa-specific)."""
URL_CHARS_MAX = 2_048
QUERY_CHARS_MAX = 4_096


class Idle(enum.StrEnum):
    """When an app that sleeps is put to sleep and woken."""

    FIXED = "fixed"
    """Asleep after `idle_after` without a request, awake with the next."""
    PREDICT = "predict"
    """By the app's own history: awake while one more cold start would cost more than waiting, woken before a request that is
    expected. `idle_after` says how long an idle instance is worth one cold start."""


class ScaleWindow(SpecRecord, frozen=True, kw_only=True):
    """A time that comes again, in which there are at least so many instances."""

    start: Annotated[str, Meta(max_length=EXPRESSION_CHARS_MAX)]
    end: Annotated[str, Meta(max_length=EXPRESSION_CHARS_MAX)]
    timezone: Annotated[str, Meta(max_length=ZONE_CHARS_MAX)] = "UTC"
    replicas: Annotated[int, Meta(ge=1, le=REPLICAS_MAX)]


class PrometheusQuery(SpecRecord, frozen=True, kw_only=True):
    """A query whose answer is one number: how much there is to do in all."""

    url: Annotated[str, Meta(max_length=URL_CHARS_MAX)]
    """Of the server, without `/api/v1/query`."""
    query: Annotated[str, Meta(min_length=1, max_length=QUERY_CHARS_MAX)]
    target: Annotated[float, Meta(gt=0)]
    """As many instances are wanted as make the answer, divided by them, at most this."""


def prometheus_url(query: PrometheusQuery) -> Url:
    """Return where `query` goes. Raises Invalid."""
    return url_of(
        query.url,
        what="scale.prometheus.url",
        field="scale.prometheus.url",
        mend="write http://HOST:PORT or https://HOST:PORT, with a path where it needs one, without user and query",
    )


def sources_of(scale: Scale) -> tuple[str, ...]:
    """Return the keys of `scale` that say how many instances are needed."""
    given = ("metric", "concurrency", "rps", "cpu", "memory", "gpu", "windows", "prometheus")
    return tuple(key for key in given if getattr(scale, key) not in (None, ()))


def check_sources(spec: AppSpec, scale: Scale) -> None:
    """Raise Invalid for a source that says nothing of this app, or contradicts itself."""
    if (scale.concurrency is not None or scale.rps is not None) and spec.port_named(None) is None:
        field = "scale.concurrency" if scale.concurrency is not None else "scale.rps"
        raise Invalid(
            f"{field}: the app has no http port, and only requests through an ingress are counted",
            field=field,
            mend="add an http port, or scale by cpu or by a metric of the app",
        )
    if scale.gpu is not None and spec.resources.gpu is None:
        raise Invalid("scale.gpu: the app has no GPU", field="scale.gpu", mend="ask for one in [resources.gpu], or leave it out")
    if not STABLE_MIN_S <= scale.stable <= STABLE_MAX_S:
        raise Invalid(
            f"scale.stable: {scale.stable:g} s; from {STABLE_MIN_S:g} s to {STABLE_MAX_S:g} s",
            field="scale.stable",
            mend="leave it out for 60 s",
        )
    for index, window in enumerate(scale.windows):
        _check_window(window, scale, f"scale.windows[{index}]")
    if scale.prometheus is not None:
        prometheus_url(scale.prometheus)
    if scale.idle is Idle.PREDICT and not scale.sleeps:
        raise Invalid(
            "scale.idle: 'predict' is for apps that sleep, and this one always has an instance",
            field="scale.idle",
            mend="set replicas = 0 and max, or leave idle out",
        )


def _check_window(window: ScaleWindow, scale: Scale, field: str) -> None:
    for key, expression in (("start", window.start), ("end", window.end)):
        check_cron(expression, window.timezone, field=f"{field}.{key}", zone_field=f"{field}.timezone")
    if tick_after(window.start, window.timezone, 0.0) == tick_after(window.end, window.timezone, 0.0):
        raise Invalid(f"{field}.end: it ends when it starts", field=f"{field}.end", mend="write the time at which it ends")
    if scale.max is not None and window.replicas > scale.max:
        raise Invalid(
            f"{field}.replicas: {window.replicas} is above scale.max, {scale.max}",
            field=f"{field}.replicas",
            mend="raise scale.max, or ask for fewer",
        )
