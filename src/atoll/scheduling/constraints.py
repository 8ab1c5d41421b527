"""What a constraint means for one value of a label."""

from __future__ import annotations

import re
from functools import lru_cache

from msgspec import Struct

from atoll.model.spec import COUNTING, Constraint, Operator

PATTERN_CHARS_MAX = 200
VALUE_CHARS_MAX = 128
"""Of a label's value, what a regular expression is searched in."""
REPEATS_MAX = 2
OPTIONS_MAX = 4
"""Repeats (`*`, `+`, `{}`) and options (`?`) in a regular expression. None may hold another repeat or an alternative, so that
matching one value cannot take more than some 50 ms: a pattern comes from a tenant, and the planner serves all."""

_TERM = re.compile(r"\s*(>=|<=|!=|=|>|<|~>)?\s*v?([0-9]+(?:\.[0-9]+)*)([-+][0-9A-Za-z.+-]*)?\s*")
_VERSION = re.compile(r"v?([0-9]+(?:\.[0-9]+)*)([-+][0-9A-Za-z.+-]*)?")


class Problem(Struct, frozen=True):
    message: str
    mend: str = ""


def values_of(constraint: Constraint) -> tuple[str, ...]:
    return (constraint.value,) if isinstance(constraint.value, str) else constraint.value


def in_words(constraint: Constraint) -> str:
    """Return the constraint as people write it: `disk in ssd, nvme`."""
    if constraint.operator in (Operator.EXISTS, Operator.NOT_EXISTS):
        return f"{constraint.label} {constraint.operator}"
    return f"{constraint.label} {constraint.operator} {', '.join(values_of(constraint))}".rstrip()


def holds(constraint: Constraint, value: str | None) -> bool:
    """Return whether a node whose label has `value` (None: no such label) may be used.

    A node without the label satisfies `!=`, `not in` and `not exists` only. `regexp` searches anywhere in the value. `version`
    takes terms such as `>= 1.2, < 2`, of which all must hold; `~> 1.2` means at least 1.2 and below 2. A constraint with
    a problem holds nowhere. `LIKE` and `UNLIKE` take an expression for the whole value. Operators that count instances need
    the label to be there (and `CLUSTER` its value); what they count is `rules`' matter.
    """
    wanted = values_of(constraint)
    match constraint.operator:
        case Operator.EXISTS:
            return value is not None
        case Operator.NOT_EXISTS:
            return value is None
        case Operator.CLUSTER if any(wanted):
            return value in wanted
        case _ if constraint.operator in COUNTING:
            return value is not None
        case Operator.EQUAL | Operator.IN | Operator.IS:
            return value is not None and value in wanted
        case Operator.NOT_EQUAL | Operator.NOT_IN:
            return value is None or value not in wanted
        case Operator.REGEXP:
            if value is None or problem(constraint) is not None:
                return False
            return any(_compiled(pattern).search(value[:VALUE_CHARS_MAX]) is not None for pattern in wanted)
        case Operator.LIKE | Operator.UNLIKE:
            if problem(constraint) is not None:
                return False
            like = value is not None and any(_compiled(pattern).fullmatch(value[:VALUE_CHARS_MAX]) for pattern in wanted)
            return like is (constraint.operator is Operator.LIKE)
        case Operator.VERSION:
            if value is None or problem(constraint) is not None:
                return False
            return any(_version_holds(terms, value) for terms in wanted)
    raise AssertionError(f"no meaning for {constraint.operator}")


@lru_cache(maxsize=1024)
def problem(constraint: Constraint) -> Problem | None:
    """Return what is wrong with the constraint itself, whatever the nodes are."""
    match constraint.operator:
        case Operator.REGEXP | Operator.LIKE | Operator.UNLIKE:
            return next(filter(None, map(_pattern_problem, values_of(constraint))), None)
        case Operator.VERSION:
            for terms in values_of(constraint):
                if not all(_TERM.fullmatch(term) for term in terms.split(",")):
                    return Problem(f"{terms!r} is not a version rule", "write for example '>= 1.2, < 2'")
            return None
        case _:
            return None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _pattern_problem(pattern: str) -> Problem | None:
    if len(pattern) > PATTERN_CHARS_MAX:
        return Problem(f"the expression has over {PATTERN_CHARS_MAX} characters")
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return Problem(f"not a regular expression: {error}")
    if _repeats(pattern) is None:
        return Problem(
            f"may take too long to match: at most {REPEATS_MAX} repeats, none around another repeat or an alternative, and no "
            "reference to a group",
            "write several constraints, or use 'in'",
        )
    return None


def _repeats(pattern: str) -> int | None:
    """Return how many repeats the pattern has; None where its matching could take long (see `REPEATS_MAX`).

    It reads the text: a class in `[]` and an escaped character are one character each. A group that is repeated must hold
    neither a repeat nor `|`; back references and conditional groups are refused.
    """
    text = re.sub(r"\\[0-9]|\(\?P=|\(\?\(", "\0", pattern)
    if "\0" in text:
        return None
    text = re.sub(r"\\.", "e", text, flags=re.DOTALL)
    text = re.sub(r"\[\^?\]?[^\]]*\]", "c", text)
    text = re.sub(r"\(\?P<[^>]*>|\(\?[a-zA-Z-]*:|\(\?<?[=!]", "(", text)
    text = re.sub(r"([*+?}])[?+]", r"\1", text)
    stack: list[bool] = []
    total, options, closed_busy = 0, 0, False
    for index, char in enumerate(text):
        repeats = char in "*+" or (char == "{" and re.match(r"\{[0-9]*,?[0-9]*\}", text[index:]) is not None)
        if char == "(":
            stack.append(False)
            closed_busy = False
            continue
        if char == ")":
            closed_busy = stack.pop() if stack else False
            if closed_busy and stack:
                stack[-1] = True
            continue
        if repeats or (char == "?" and index):
            if closed_busy and repeats:
                return None
            total += repeats
            options += not repeats
        if (repeats or char in "?|") and stack:
            stack[-1] = True
        closed_busy = False
    return total if total <= REPEATS_MAX and options <= OPTIONS_MAX else None


_Parsed = tuple[tuple[int, ...], bool]


def _parse(text: str) -> _Parsed | None:
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        return None
    numbers = [int(part[:18]) for part in match[1].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    # A pre-release ("-rc1") is older than its release; a build ("+7") is not.
    return tuple(numbers), not (match[2] or "").startswith("-")


def _version_holds(terms: str, value: str) -> bool:
    have = _parse(value)
    if have is None:
        return False
    for term in terms.split(","):
        match = _TERM.fullmatch(term)
        want = _parse(match[2] + (match[3] or "")) if match else None
        if match is None or want is None:
            return False
        match match[1] or "=":
            case "=":
                fits = have == want
            case "!=":
                fits = have != want
            case ">=":
                fits = have >= want
            case "<=":
                fits = have <= want
            case ">":
                fits = have > want
            case "<":
                fits = have < want
            case _:
                parts = [int(part[:18]) for part in match[2].split(".")]
                above = (*parts[:-2], parts[-2] + 1) if len(parts) > 1 else (parts[0] + 1,)
                fits = want <= have and have[0] < tuple(above)
        if not fits:
            return False
    return True
