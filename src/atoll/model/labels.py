"""Labels and taints of nodes: how they are written, what a toleration tolerates, and what a node has after its operators' words.

    label        KEY=VALUE           rack=a7, topology.example/zone=b
    taint        KEY[=VALUE][:EFFECT]     spot, gpu=only, disk=slow:prefer-no-schedule
    toleration   *, or as a taint: KEY for every value, without an effect for each

An agent says what it was started with (`--label`, `--taint`); operators add to that and overrule it through the API, which is kept
beside it (`NodePolicy`), so that neither is lost when the other is said again.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from atoll.model.errors import Invalid
from atoll.model.records import Node, NodePolicy

LABELS_MAX = 256
"""Labels, and taints, of one node from either side."""
CHARACTERS_MAX = 253
"""Of a key, and of a value."""
OWN_LABELS = ("node", "site", "region", "arch")
"""Labels that every node has, whatever is said of it."""
NVLINK_DOMAIN = "nvlink-domain"
"""Label of a node whose GPUs are all of one NVLink domain of several machines: its agent says it, unless it was told another."""
ALL = "*"
"""Tolerates every taint."""

_KEY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,251}[A-Za-z0-9])?")
_VALUE = re.compile(r"[^\s,\x00-\x1f\x7f](?:[^,\x00-\x1f\x7f]{0,251}[^\s,\x00-\x1f\x7f])?")


class Effect(enum.StrEnum):
    NO_SCHEDULE = "no-schedule"
    """Nothing is placed there that does not tolerate it; what runs stays."""
    PREFER_NO_SCHEDULE = "prefer-no-schedule"
    """The same as a wish: only where nothing else fits."""


_EFFECTS = {effect.value.replace("-", ""): effect for effect in Effect}
"""As Kubernetes writes them, too."""


class Taint(Struct, frozen=True):
    key: str
    value: str = ""
    effect: Effect = Effect.NO_SCHEDULE

    def __str__(self) -> str:
        """Return it as it is kept: without the effect that goes without saying."""
        text = f"{self.key}={self.value}" if self.value else self.key
        return text if self.effect is Effect.NO_SCHEDULE else f"{text}:{self.effect}"


def read_label(text: str, field: str = "labels") -> tuple[str, str]:
    """Return key and value of `KEY=VALUE`. Raises Invalid."""
    key, equal, value = text.partition("=")
    if not equal:
        raise Invalid(f"{field}: {text[:60]!r} is not KEY=VALUE", field=field, mend="write for example rack=a7")
    check_labels({key: value}, field)
    return key, value


def check_labels(labels: Mapping[str, str], field: str = "labels") -> None:
    """Raise Invalid for too many, or for one that cannot be a label."""
    if len(labels) > LABELS_MAX:
        raise Invalid(f"{field}: more than {LABELS_MAX}", field=field)
    for key, value in labels.items():
        _check_key(key, field)
        if key in OWN_LABELS:
            mend = "use another key; site and region are said with --site and --region"
            raise Invalid(
                f"{field}: every node has '{key}' already, and its value is not for others to say", field=field, mend=mend
            )
        if value and _VALUE.fullmatch(value) is None:
            text = f"{field}: the value {value[:60]!r} of '{key}'"
            mend = f"use at most {CHARACTERS_MAX} characters, with no comma, no line break, and no blank at either end"
            raise Invalid(f"{text} cannot be one", field=field, mend=mend)


def read_taint(text: str, field: str = "taints") -> Taint:
    """Return what `KEY[=VALUE][:EFFECT]` says. Raises Invalid."""
    rest, colon, word = text.rpartition(":") if ":" in text else (text, "", "")
    effect: Effect | None = Effect.NO_SCHEDULE
    if colon:
        plain = word.replace("-", "").lower()
        if plain == "noexecute":
            mend = "taint it no-schedule, and have what runs there leave: atoll nodes drain NODE"
            raise Invalid(f"{field}: {text[:60]!r}: a taint ends nothing that runs", field=field, mend=mend)
        effect = _EFFECTS.get(plain)
    key, _, value = rest.partition("=")
    if effect is None:
        there = " or ".join(Effect)
        raise Invalid(f"{field}: {text[:60]!r}: '{word[:40]}' is no effect", field=field, mend=f"use {there}, or leave it out")
    _check_key(key, field)
    if value and (_VALUE.fullmatch(value) is None or ":" in value):
        raise Invalid(
            f"{field}: the value {value[:60]!r} of '{key}' cannot be one", field=field, mend="use no comma, colon or blank"
        )
    return Taint(key, value, effect)


def check_taints(taints: Iterable[str], field: str = "taints") -> tuple[str, ...]:
    """Return taints as they are kept, each once. Raises Invalid."""
    found = tuple(dict.fromkeys(str(read_taint(text, field)) for text in taints))
    if len(found) > LABELS_MAX:
        raise Invalid(f"{field}: more than {LABELS_MAX}", field=field)
    return found


def tolerated(taint: str, tolerations: Iterable[str]) -> bool:
    """Return whether any of a spec's tolerations lets it onto a node with `taint`. What cannot be read tolerates only its like."""
    return any(_tolerates(toleration, taint) for toleration in tolerations)


def _tolerates(toleration: str, taint: str) -> bool:
    if toleration in (ALL, taint):
        return True
    key, value, effect = _parts(taint)
    wished, worth, only = _parts(toleration)
    return wished == key and worth in ("", value) and only in (None, effect or Effect.NO_SCHEDULE)


def _parts(text: str) -> tuple[str, str, str | None]:
    """Return key, value and effect as they are written; None for no effect."""
    rest, colon, word = text.rpartition(":") if ":" in text else (text, "", "")
    key, _, value = rest.partition("=")
    effect = _EFFECTS.get(word.replace("-", "").lower()) if colon else None
    return key, value, effect.value if effect is not None else None


def is_wish(taint: str) -> bool:
    """Return whether nodes with `taint` are only shunned, not closed."""
    return _parts(taint)[2] == Effect.PREFER_NO_SCHEDULE


def described(node: Node, policy: NodePolicy | None) -> Node:
    """Return the node with the labels and taints that it has after its operators' words, which go before its agent's."""
    if policy is None or not (policy.labels or policy.taints or policy.untaints):
        return node
    labels = {key: value for key, value in {**node.labels, **policy.labels}.items() if value is not None}
    taints = dict.fromkeys((*(taint for taint in node.taints if taint not in policy.untaints), *policy.taints))
    return replace(node, labels=labels, taints=tuple(taints))


def labelled(node: Node, policy: NodePolicy, labels: Mapping[str, str | None], *, reset: bool = False) -> NodePolicy:
    """Return the policy with `labels` said, None to take one away; with `reset`, with nothing said before. Raises Invalid."""
    said = {**({} if reset else policy.labels), **labels}
    # What hides nothing need not be kept.
    said = {key: value for key, value in sorted(said.items()) if value is not None or key in node.labels}
    check_labels({key: value or "" for key, value in {**labels, **said}.items()})
    return replace(policy, labels=said)


def tainted(node: Node, policy: NodePolicy, add: Iterable[str], remove: Iterable[str], *, reset: bool = False) -> NodePolicy:
    """Return the policy with taints added and taken away, by themselves or by their keys; with `reset`, with nothing said before.

    Of a key there is one value for each effect, as in Kubernetes: a new one replaces it. Raises Invalid, also for one to take away
    that is not there.
    """
    before = replace(policy, taints=(), untaints=()) if reset else policy
    there, added = described(node, before).taints, check_taints(add)
    gone: set[str] = set()
    for text in check_taints(remove):
        found = {taint for taint in there if taint == text or _parts(taint)[0] == text}
        if not found:
            mend = f"it has: {', '.join(there)}" if there else "it has none"
            raise Invalid(f"node '{node.name}' has no taint '{text}'", field="remove", mend=mend)
        gone |= found
    for taint in added:
        key, _, effect = _parts(taint)
        gone |= {text for text in there if _parts(text)[0] == key and _parts(text)[2] == effect}
    gone -= set(added)
    kept = dict.fromkeys((*(taint for taint in before.taints if taint not in gone), *added))
    hidden = dict.fromkeys((*before.untaints, *(taint for taint in node.taints if taint in gone)))
    return replace(
        before,
        taints=check_taints(kept),
        untaints=tuple(taint for taint in hidden if taint not in added),
    )


def _check_key(key: str, field: str) -> None:
    if _KEY.fullmatch(key) is None:
        mend = f"use letters, digits and . _ / -, at most {CHARACTERS_MAX}, with a letter or digit at either end"
        raise Invalid(f"{field}: {key[:60]!r} is no key", field=field, mend=mend)
