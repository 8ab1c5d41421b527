"""What every command gets: which API, which project, how to print."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, update_wrapper
from typing import TYPE_CHECKING, Any

import click

from atoll.cli.flags import Fields, name_flags
from atoll.model.errors import AtollError

if TYPE_CHECKING:
    from atoll.cli.output import Output
    from atoll.sdk.client import Client
    from atoll.sdk.context import Context
    from atoll.sdk.transport import Transport

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_NOT_FOUND = 4
EXIT_FORBIDDEN = 5
EXIT_CONFLICT = 6
EXIT_INTERRUPTED = 130

_EXIT_BY_STATUS = {
    400: EXIT_USAGE,
    401: EXIT_FORBIDDEN,
    403: EXIT_FORBIDDEN,
    404: EXIT_NOT_FOUND,
    409: EXIT_CONFLICT,
    413: EXIT_USAGE,
    503: EXIT_UNREACHABLE,
    504: EXIT_UNREACHABLE,
}


def _dial(context: Context) -> Transport:
    from atoll.sdk.failover import transport_to

    return transport_to(context.address, context.token, agent="atoll-cli", ca=context.ca)


@dataclass
class Session:
    """One invocation. `dial` is where a test passes an API in memory."""

    dial: Callable[[Context], Transport] = _dial
    json: bool = False
    project_given: str | None = None
    api_given: str | None = None
    ca_given: str | None = None
    stdin: Any = field(default_factory=lambda: sys.stdin)

    @cached_property
    def context(self) -> Context:
        from atoll.sdk import context

        return context.resolve(self.api_given, project=self.project_given, ca=self.ca_given)

    @property
    def project(self) -> str:
        return self.context.project

    def use_project(self, name: str) -> None:
        """Go on in the project that a spec names."""
        from msgspec.structs import replace

        self.context = replace(self.context, project=name)

    @cached_property
    def output(self) -> Output:
        from atoll.cli.output import Output

        return Output(as_json=self.json)

    def client(self) -> Client:
        """Return a client for this session's API; use it as an async context."""
        from atoll.sdk.client import Client

        return Client(self.dial(self.context))


def exit_code(error: AtollError) -> int:
    """Return the exit status that stands for `error`; the help of `atoll` lists them."""
    return _EXIT_BY_STATUS.get(error.status, EXIT_FAILED)


def report(error: AtollError) -> None:
    """Say on stderr what went wrong and what would help, one line each."""
    click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(error.message, err=True)
    if error.mend:
        click.secho("mend: ", fg="cyan", bold=True, err=True, nl=False)
        click.echo(error.mend, err=True)


def first_error(error: BaseException) -> AtollError | None:
    """Return the first of our errors in a group of them, or in one alone."""
    if isinstance(error, AtollError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := first_error(inner))), None)
    return None


def debugging() -> bool:
    return os.environ.get("ATOLL_DEBUG", "") not in ("", "0")


def command(
    *, example: str, name: str | None = None, asks_api: bool = True, fields: Fields | None = None, **options: Any
) -> Callable[[Callable[..., Any]], click.Command]:
    """A command whose function gets the Session first, and may be a coroutine. `example` ends its help.

    Every command takes --json, --project, --api and --ca, as `atoll` itself does; --json alone where not `asks_api`. Errors name
    what was typed; `fields` says which options fill fields of other names.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        def run(as_json: bool, project: str | None = None, api: str | None = None, ca: str | None = None, **values: Any) -> None:
            session = click.get_current_context().find_object(Session) or Session()
            session.json = session.json or as_json
            session.project_given = project or session.project_given
            session.api_given = api or session.api_given
            session.ca_given = ca or session.ca_given
            try:
                result = function(session, **values)
                if inspect.iscoroutine(result):
                    import asyncio  # takes 30 ms, and not every command waits for something

                    asyncio.run(result)
            except (AtollError, BaseExceptionGroup) as error:
                if (ours := first_error(error)) is not None:
                    name_flags(ours, click.get_current_context(), fields or {})
                raise

        epilog = "\b\nExample:\n" + "\n".join(f"  {line}" for line in example.splitlines())
        wrapped: Callable[..., Any] = update_wrapper(run, function)
        made = click.command(name=name or function.__name__, epilog=epilog, cls=click.Command, **options)(wrapped)
        made.params.extend(option for option in common_options() if asks_api or option.name == "as_json")
        return made

    return decorate


def common_options() -> list[click.Option]:
    """Return the options of `atoll` itself and of every command; they stand last in the help."""
    return [
        click.Option(["--json", "as_json"], is_flag=True, help="Print JSON on stdout, for programs."),
        click.Option(["--project", "-p"], metavar="NAME", help="The project; else ATOLL_PROJECT, else 'default'."),
        click.Option(["--api"], metavar="URL", help="Where the API answers; else ATOLL_API, else that of the Atoll in ATOLL_DATA."),
        click.Option(["--ca"], metavar="FILE|PIN", help="The cell's authority: PEM, or its sha256 fingerprint; else ATOLL_CA."),
    ]


class Group(click.Group):
    """A family of commands; without one, `list` is meant."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


def group(*, example: str) -> Callable[[Callable[[], None]], click.Group]:
    """A family of commands, with help that shows `example`."""

    def decorate(function: Callable[[], None]) -> click.Group:
        epilog = "\b\nExample:\n" + "\n".join(f"  {line}" for line in example.splitlines())
        settings = {"help_option_names": ["-h", "--help"]}
        return click.group(cls=Group, epilog=epilog, context_settings=settings)(function)

    return decorate
