"""`atoll`: the table of commands. Each is imported only when it is called."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

import atoll
from atoll.cli.session import EXIT_FAILED, EXIT_INTERRUPTED, Session, common_options, debugging, exit_code, first_error, report

SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Start": {
        "up": ("up:up", "Run everything on this machine: server, agent, ingress."),
        "down": ("up:down", "End an `atoll up` that was started with --detach."),
        "doctor": ("doctor:doctor", "Say what this machine can run, and how to mend what it cannot."),
    },
    "Apps": {
        "deploy": ("deploy:deploy", "Build and run an app, and follow it until it serves."),
        "plan": ("planning:plan", "Say where an app's or job's instances would go, without deploying it."),
        "build": ("images:build", "Build an app's image without running it."),
        "apps": ("apps:apps", "List the apps."),
        "status": ("apps:status", "Show one app: its state, instances and last events."),
        "scale": ("apps:scale", "Change how many instances an app has."),
        "restart": ("apps:restart", "Replace every instance of an app while it serves."),
        "releases": ("apps:releases", "List what was deployed, newest first."),
        "rollback": ("apps:rollback", "Go back to an earlier release."),
        "rollout": ("rollouts:rollout", "Steer how a new release replaces the old one."),
        "delete": ("apps:delete", "Delete an app and all its instances."),
    },
    "Instances": {
        "ps": ("instances:ps", "List the instances."),
        "explain": ("planning:explain", "Say why an instance is where it is, or has no node."),
        "logs": ("logs:logs", "Print what an app, a job or an instance wrote."),
        "exec": ("execute:execute", "Run a command inside a running instance."),
        "cp": ("copy:copy", "Copy files into and out of an instance."),
        "top": ("top:top", "Show what the instances use now."),
        "events": ("events:events", "Show what happened."),
    },
    "Jobs": {
        "jobs": ("jobs:jobs", "Run work that ends: run, list, show, logs, cancel, delete."),
    },
    "Sandboxes": {
        "sandbox": ("sandboxes:sandbox", "Work in an instance of your own: create, exec, pause, snapshot, fork, rm."),
        "template": ("templates:template", "Keep sandboxes ready, to be taken at once."),
    },
    "Cell": {
        "nodes": ("nodes:nodes", "Show the machines; take one out of use with cordon or drain."),
        "reserve": ("reservations:reserve", "Keep machines, or room on them, for one project for a time."),
        "maintenance": ("maintenance:maintenance", "Plan when machines are taken out of use."),
        "net": ("net:net", "Say what reaches what; show the fabric between nodes."),
        "sites": ("sites:sites", "Say where sites are, and how far from each other."),
        "defrag": ("planning:defrag", "Say which instances could be moved, and what that would free."),
        "runtimes": ("runtimes:runtimes", "Show what each runtime can do, and which nodes offer it."),
        "secrets": ("secrets:secrets", "Keep values that specs name but never hold."),
        "certificates": (
            "certificates:certificates",
            "Serve hostnames over TLS: certificates from files, the cell's own, or ACME.",
        ),
        "image": ("images:image", "Import and list images of the cell's own registry."),
        "projects": ("projects:projects", "List and make projects."),
        "store": ("store:store", "Move the cell's state to another store; back it up, restore and check it."),
        "token": ("tokens:token", "Make and withdraw access tokens."),
        "join-token": ("members:join_token", "Let new machines join: make and withdraw join tokens."),
        "ingresses": ("ingresses:ingresses", "List the ingresses; forget one that is gone for good."),
        "servers": ("members:servers", "Show the servers that run, and which of them leads."),
        "authority": ("members:authority", "Show and rotate the cell's certificate authority."),
    },
    "More": {
        "sim": ("sim:sim", "Replay a trace through a whole simulated cell, several policies side by side."),
        "schema": ("meta:schema", "Print the JSON Schema of a spec."),
        "completion": ("meta:completion", "Print a script that completes `atoll` in your shell."),
        "version": ("meta:version", "Print the versions of this command and of the server."),
        "server": ("up:server", "Run the server alone."),
        "agent": ("up:agent", "Run the agent alone."),
        "ingress": ("up:ingress", "Run the ingress alone."),
    },
}
COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}
ALIASES = {"node": "nodes", "job": "jobs"}
"""What people type as well; not shown."""

EPILOG = """\b
First steps:
  atoll doctor                 what can this machine run?
  atoll up --detach            start everything
  atoll deploy examples/hello  build, run and follow an app

\b
Exit status: 0 done · 1 failed · 2 wrong usage or input · 3 the API does not answer
  4 not found · 5 not allowed · 6 conflict · 130 interrupted
Environment: ATOLL_API, ATOLL_TOKEN, ATOLL_PROJECT, ATOLL_CA, NO_COLOR, ATOLL_DEBUG=1 (show tracebacks)
"""


class Root(click.Group):
    """Finds commands by `COMMANDS`, and turns errors into two lines and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        name = ALIASES.get(name, name)
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        found: click.Command = getattr(importlib.import_module(f"atoll.cli.{module}"), attribute)
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            close = get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else " `atoll --help` lists them."
            raise click.UsageError(f"{error.message.rstrip('.')}.{hint}", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, entries in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name, text) for name, (_, text) in entries.items()], col_max=12)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.ClickException, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)
        except Exception as error:
            if isinstance(error, BaseExceptionGroup) and error.subgroup(BrokenPipeError):
                ctx.exit(EXIT_FAILED)  # whoever read the output has left
            ours = first_error(error)
            if debugging():
                raise
            if ours is None:
                report_unexpected(error)
                ctx.exit(EXIT_FAILED)
            report(ours)
            ctx.exit(exit_code(ours))


def report_unexpected(error: BaseException) -> None:
    """Say that this is our mistake, not the user's."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(f"unexpected {type(error).__name__}: {error}", err=True)
    click.secho("mend: ", fg="cyan", bold=True, err=True, nl=False)
    click.echo("this is a mistake in atoll; ATOLL_DEBUG=1 shows where", err=True)


@click.group(cls=Root, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(atoll.__version__, message="%(version)s")
def cli(as_json: bool, project: str | None, api: str | None, ca: str | None) -> None:
    """Atoll makes many machines one computer: hand it an image, and it finds a place, runs it and keeps it alive."""
    session = click.get_current_context().ensure_object(Session)
    session.json = session.json or as_json
    session.project_given = project or session.project_given
    session.api_given = api or session.api_given
    session.ca_given = ca or session.ca_given


cli.params.extend(common_options())


def main() -> None:
    """The console script."""
    try:
        cli(prog_name="atoll")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
