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


@pytest.mark.parametrize(
    ("text", "message", "mend"),
    [
        (b'name = "web"\nisolation = "vmm"', "isolation: no such value: 'vmm'", "use one of container, sandbox, vm, isolate"),
        (
            b'name = "web"\n[[placement.constraints]]\nlabel = "x"\noperator = "~"',
            "placement.constraints[0].operator: no such value: '~'",
            "use one of =, !=, in, not in, exists",
        ),
        (
            b'name = "web"\n[resources.gpu]\ncapabilities = ["sound"]',
            "resources.gpu.capabilities[0]: no such value: 'sound'",
            "use one of compute, utility, graphics, video",
        ),
    ],
)
def test_a_value_that_is_none_of_a_few_is_refused_with_those(text: bytes, message: str, mend: str) -> None:
    with pytest.raises(Invalid) as caught:
        codec.convert(codec.parse_text(text, ".toml"), AppSpec)
    assert str(caught.value) == message
    assert (caught.value.mend or "").startswith(mend)
