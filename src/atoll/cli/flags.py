"""Errors name the field of a record; here they come to name the option that it was typed as."""

from __future__ import annotations

import re
from collections.abc import Mapping

import click
from click.core import ParameterSource

from atoll.model.errors import AtollError

Fields = Mapping[str, str | tuple[str, ...]]
"""Field → the parameter that fills it, or several of which it is the first that was given."""


def name_flags(error: AtollError, context: click.Context, fields: Fields) -> None:
    """Where what is wrong was given as an option, have the message begin with that option in place of the field.

    A parameter fills the field of its own name; `fields` says it of others. What stands before the field, such as the file that the
    option goes before, is left out.
    """
    if error.field is None:
        return
    first, rest = re.split(r"(?=[.\[])", f"{error.field}", maxsplit=1) if re.search(r"[.\[]", error.field) else (error.field, "")
    option = _given(context, fields.get(error.field)) or _given(context, fields.get(first, first))
    found = re.match(rf"(?:.*?: )??{re.escape(error.field)}: ", error.message)
    if option is None or found is None:
        return
    inner = rest.strip(".[]") if option.name == first else ""
    error.args = (f"{_flag(option)}{' ' if inner else ''}{inner}: {error.message[found.end() :]}", *error.args[1:])
    error.mend = error.mend or f"`{context.command_path} --help` says what it takes"


def _given(context: click.Context, names: str | tuple[str, ...] | None) -> click.Option | None:
    """Return the first option of these that stands on the command line."""
    for name in (names,) if isinstance(names, str) else names or ():
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            return next((each for each in context.command.params if isinstance(each, click.Option) and each.name == name), None)
    return None


def _flag(option: click.Option) -> str:
    return next((each for each in option.opts if each.startswith("--")), option.opts[0])
