"""Tables on narrow terminals: names stay whole, what may be cut is cut, and what may be left out goes last."""

from __future__ import annotations

from rich.console import Console

from atoll.cli.output import table

IMAGE = "cell.internal/default/tools:20261127-1@sha256:" + "4f" * 32


def drawn(columns: tuple[str, ...], *rows: tuple[object, ...], width: int | None) -> list[str]:
    console = Console(width=width or 1_000)
    with console.capture() as captured:
        console.print(table(columns, rows, width=width))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_name_and_a_state_stay_whole_where_an_image_is_cut() -> None:
    shown = drawn(("SANDBOX", "STATE", "IMAGE~", "NOTE"), ("a-sandbox-of-mine", "running", IMAGE, "x" * 60), width=80)
    assert shown[0].split() == ["SANDBOX", "STATE", "IMAGE", "NOTE"]
    name, phase, image, note = shown[1].split()
    assert (name, phase) == ("a-sandbox-of-mine", "running")
    assert image.startswith("cell.internal/default/")
    assert image.endswith("…")
    assert note == "x" * 24, "the last column has room of its own, and wraps"
    assert max(map(len, shown)) <= 80


def test_what_may_be_cut_is_whole_where_there_is_room_and_in_a_pipe() -> None:
    for width in (160, None):
        assert IMAGE in drawn(("SANDBOX", "IMAGE~"), ("try", IMAGE), width=width)[1]


def test_what_may_be_cut_keeps_its_beginning_however_narrow_it_is() -> None:
    shown = drawn(("SANDBOX", "IMAGE~", "NOTE"), ("try", IMAGE, ""), width=31)
    assert shown[1].startswith("try")
    assert "cell.internal/d…" in shown[1]


def test_a_column_that_may_be_left_out_goes_before_the_last_one_is_too_narrow() -> None:
    columns = ("HOST", "SOURCE", "STATE", "ENDS?", "RENEWAL?", "NOTE")
    row = (
        "shop.example.com",
        "acme",
        "valid",
        "2026-11-27 04:00 UTC",
        "2026-11-20 04:00 UTC",
        "the authority did not answer at all",
    )
    shown = drawn(columns, row, width=80)
    assert "RENEWAL" not in shown[0]
    assert "NOTE" in shown[0]
    assert "the authority did not" in shown[1]
