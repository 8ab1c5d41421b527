"""What is wrong with a file that a person wrote is said in their words."""

from __future__ import annotations

import pytest

from atoll.model import codec
from atoll.model.errors import Invalid
from atoll.model.spec import AppSpec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'name = "web"\nports = "8080"', "ports: expected a list, got text"),
        (b"name = 5", "name: expected text, got a whole number"),
        (b'name = "web"\nhealth = 1', "health: expected a table"),
        (b'name = "web"\nimagee = "x"', "unknown field `imagee`"),
        (b'name = "web"\nobject = "x"', "unknown field `object`"),
        (b'name = "x', "not valid TOML"),
        (b"\xff\xfe", "not text in UTF-8 (byte 0)"),
    ],
)
def test_a_bad_file_is_refused_in_plain_words(text: bytes, message: str) -> None:
    with pytest.raises(Invalid) as caught:
        codec.convert(codec.parse_text(text, ".toml"), AppSpec)
    assert message in str(caught.value)
