"""What a runtime's tool says of a command that did not start, told apart."""

from __future__ import annotations

import pytest

from atoll.model.errors import CommandNotFound, RuntimeFailed
from atoll.runtimes.oci_container import cannot_run


@pytest.mark.parametrize(
    "words",
    [
        'exec failed: unable to start container process: exec: "nope": executable file not found in $PATH',
        "executable file `nope` not found in $PATH: No such file or directory",
        "cannot be executed: No such file or directory",
    ],
)
def test_a_command_that_is_not_there_is_told_from_all_else(words: str) -> None:
    error = cannot_run("nope", words)
    assert type(error) is CommandNotFound
    assert error.mend == "is 'nope' in the image, and its interpreter too?"


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        ('chdir to cwd ("/gone") set in config.json failed: no such file or directory', "is the working directory in the image?"),
        ("cannot enter the working directory: No such file or directory", "is the working directory in the image?"),
        ("container init was OOM-killed (memory limit too low?)", "raise the memory limit"),
        ("cannot be executed: Permission denied", None),
    ],
)
def test_a_command_that_may_be_there_is_not_said_to_be_missing(words: str, mend: str | None) -> None:
    error = cannot_run("ls", words)
    assert type(error) is RuntimeFailed
    assert error.mend == mend
