"""How many requests a second each app and project may have: one filter with a bucket for each that has a limit. Pure.

It is a resource of its own, so that a new hostname fills nobody's bucket again; only a limit that changes does.
"""

from __future__ import annotations

from collections.abc import Mapping

from envoy.config.core.v3 import base_pb2, extension_pb2
from envoy.extensions.common.ratelimit.v3 import ratelimit_pb2
from envoy.extensions.filters.http.local_ratelimit.v3 import local_rate_limit_pb2
from envoy.type.v3 import token_bucket_pb2
from google.protobuf import any_pb2, wrappers_pb2

from atoll.ingress.hosts import RATE_FILTER
from atoll.ingress.resources import Kind, Resource, resource

_ALL = 4_000_000_000
"""A bucket that nobody empties: of requests that have no limit."""

Subject = tuple[str, str]
"""(`app`, `PROJECT/APP`) or (`project`, PROJECT)."""
Limit = tuple[int, int]
"""Requests a second, and at once."""


def rate_filter(limits: Mapping[Subject, Limit]) -> Resource:
    """Return the filter that holds every limit; a request counts against each that its route names."""
    whole = base_pb2.RuntimeFractionalPercent()
    whole.default_value.numerator = 100
    message = local_rate_limit_pb2.LocalRateLimit(
        stat_prefix="rate",
        token_bucket=_bucket(_ALL, _ALL),
        filter_enabled=whole,
        filter_enforced=whole,
        always_consume_default_token_bucket=wrappers_pb2.BoolValue(value=False),
    )
    for (key, value), (per_s, burst) in sorted(limits.items()):
        entry = ratelimit_pb2.RateLimitDescriptor.Entry(key=key, value=value)
        message.descriptors.append(ratelimit_pb2.LocalRateLimitDescriptor(entries=[entry], token_bucket=_bucket(per_s, burst)))
    packed = any_pb2.Any()
    packed.Pack(message)
    return resource(Kind.FILTER, RATE_FILTER, extension_pb2.TypedExtensionConfig(name=RATE_FILTER, typed_config=packed))


def _bucket(per_s: int, burst: int) -> token_bucket_pb2.TokenBucket:
    bucket = token_bucket_pb2.TokenBucket(max_tokens=burst, tokens_per_fill=wrappers_pb2.UInt32Value(value=per_s))
    bucket.fill_interval.FromSeconds(1)
    return bucket
