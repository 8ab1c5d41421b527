"""References parse as the distribution specification has them, or say what is wrong."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.images.reference import CELL_HOST, Reference, parse
from atoll.model.errors import ImageError

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reg.example/a/b:1.2", Reference("reg.example", "a/b", "1.2")),
        ("reg.example:5000/a", Reference("reg.example:5000", "a", "latest")),
        ("localhost/a", Reference("localhost", "a", "latest")),
        ("127.0.0.1:80/a/b_c/d-e:x", Reference("127.0.0.1:80", "a/b_c/d-e", "x")),
        ("[::1]:5000/a:1", Reference("[::1]:5000", "a", "1")),
        (f"reg.example/a@{DIGEST}", Reference("reg.example", "a", None, DIGEST)),
        (f"reg.example/a:1@{DIGEST}", Reference("reg.example", "a", "1", DIGEST)),
        (f"{CELL_HOST}/default/hello:7", Reference(CELL_HOST, "default/hello", "7")),
    ],
)
def test_a_reference_parses(text: str, expected: Reference) -> None:
    assert parse(text) == expected


def test_a_name_without_a_host_needs_a_default_registry() -> None:
    assert parse("a:1", default_registry="reg.example") == Reference("reg.example", "a", "1")
    assert parse("a:1", default_registry="reg.example/library") == Reference("reg.example", "library/a", "1")
    assert parse("me/a", default_registry="reg.example/library") == Reference("reg.example", "me/a", "latest")
    with pytest.raises(ImageError) as caught:
        parse("a:1")
    assert caught.value.mend is not None
    assert "--default-registry" in caught.value.mend


@pytest.mark.parametrize(
    "text",
    [
        "",
        "reg.example/",
        "reg.example/A",
        "reg.example/a:",
        "reg.example/a:.x",
        "reg.example/a@",
        "reg.example/a@sha256:12",
        "reg.example/a@md5:" + "a" * 32,
        "reg.example/../a",
        "reg.example/a//b",
        "reg.example/a b",
        "http://reg.example/a",
        "reg.example:999999/a",
        "user@reg.example/a",
        "reg.example/a\n",
        "x" * 600,
    ],
)
def test_what_is_no_reference_is_refused_with_a_mend(text: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse(text, default_registry="reg.example")
    assert caught.value.mend
    assert caught.value.field == "image"


@given(st.text(alphabet=string.ascii_letters + string.digits + "./:@-_[]%?#\\\n é", max_size=60))
def test_any_text_parses_to_itself_or_is_refused(text: str) -> None:
    try:
        reference = parse(text, default_registry="reg.example")
    except ImageError:
        return
    assert parse(str(reference)) == reference
    assert not set(str(reference)) & set("?#%\\\n ")
