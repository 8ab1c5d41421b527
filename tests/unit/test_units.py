"""Quantities as people write them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.model.units import BYTES_MAX, SECONDS_MAX, Bytes, Cores, Seconds, format_bytes, format_count, format_seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        (5, 5),
        ("1k", 1000),
        ("1KiB", 1024),
        ("256MiB", 256 << 20),
        ("1.5GB", 1_500_000_000),
        ("1 TiB", 1 << 40),
        ("7B", 7),
    ],
)
def test_sizes_are_what_people_write(text: object, size: int) -> None:
    assert Bytes.parse(text) == size


@pytest.mark.parametrize(
    ("text", "span"), [(30, 30), ("500ms", 0.5), ("1m30s", 90), ("2h", 7200), ("1d12h", 129_600), ("0.25s", 0.25), ("5m", 300)]
)
def test_durations_are_what_people_write(text: object, span: float) -> None:
    assert Seconds.parse(text) == span


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *((Bytes, value) for value in (-1, "-5MiB", "1XB", "", "many", True, 1.5, None, BYTES_MAX + 1, "2000TiB")),
        *(
            (Seconds, value)
            for value in (-1, "-1s", "soon", "", "1y", True, None, math.nan, math.inf, SECONDS_MAX + 1, "9" * 400 + "d")
        ),
        *((Cores, value) for value in (0, -1, 0.001, 4097, "2", True, None, math.nan, math.inf)),
    ],
)
def test_absurd_quantities_are_refused(kind: type[Bytes] | type[Seconds] | type[Cores], value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        kind.parse(value)


def test_a_number_beyond_all_floats_is_refused() -> None:
    with pytest.raises(ValueError, match=r"."):
        Bytes.parse("9" * 400)


def test_cores_are_exact_to_a_thousandth() -> None:
    assert (Cores.parse(0.1).milli, Cores.parse(1).milli, Cores.parse(0.0149).milli) == (100, 1000, 15)


@given(st.text(max_size=40))
def test_any_text_is_a_quantity_or_a_value_error(text: str) -> None:
    for kind in (Bytes, Seconds):
        try:
            value = kind.parse(text)
        except ValueError:
            continue
        assert 0 <= value <= max(BYTES_MAX, SECONDS_MAX)


def test_quantities_read_as_people_read_them() -> None:
    assert (format_bytes(268435456), format_bytes(12), format_seconds(0.5), format_seconds(190), format_seconds(187_200)) == (
        "256.0MiB",
        "12B",
        "0.5s",
        "3m10s",
        "2d4h",
    )


def test_one_of_something_is_not_many() -> None:
    assert [format_count(number, "file") for number in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
