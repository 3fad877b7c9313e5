"""The verbs of the farm of this box: start it, stop it, look after it."""

import json
from typing import Final

import click
from pydantic import SecretStr
from rich.table import Table
from rich.text import Text

from millrace import local
from millrace.commands.session import Session, connect
from millrace.commands.terminal import console, harmless
from millrace.errors import MillraceError
from millrace.settings import Settings

_HEALTH_STYLES: Final = {"ok": "green", "degraded": "yellow", "down": "red"}


@click.command()
@click.option("--detach", is_flag=True, help="Start it in the background, and return when it is up.")
@click.pass_obj
def up(session: Session, detach: bool) -> int:
    """Run the farm on this box: API, scheduler, worker and a private Redis, all in one data folder."""
    if not detach:
        from millrace import embedded

        return embedded.up(session.settings, session.environ, console.print)
    farm = local.start_detached(session.settings, session.environ, console.print)
    console.print(f"The farm is up at {farm.api_url}; its data lies in {session.settings.home}")
    return 0


@click.command()
@click.pass_obj
def down(session: Session) -> int:
    """Stop the farm of this box. Builds that run go back to its queue, and run again when it is up again."""
    stopped = local.stop_detached(session.settings)
    console.print("The farm has stopped" if stopped else f"No farm runs in {session.settings.home}")
    return 0


@click.command()
@click.option("--install", is_flag=True, help="Install and start what is missing (as root on Debian or Ubuntu).")
@click.option("--for", "purpose", type=click.Choice(["run", "demo", "test", "compose"]), default="run", show_default=True)
@click.pass_obj
def doctor(session: Session, install: bool, purpose: str) -> int:
    """Say what this machine lacks, and how to mend it."""
    from millrace import doctor as physician

    findings = physician.diagnose(session.settings, purpose)
    if install and not all(finding.ok for finding in findings):
        physician.treat(findings, session.settings, console.print)
        findings = physician.diagnose(session.settings, purpose)
    return 0 if physician.show(findings, console) else 1


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print what /readyz says, for programs.")
@click.pass_obj
def status(session: Session, as_json: bool) -> int:
    """Say how the farm is, part by part.

    Exit status: 0 ok, 1 degraded (builds are accepted and kept), 2 down or not to be reached.
    """
    try:
        client = connect(session)
        try:
            said = client.ready()
        finally:
            client.close()
    except MillraceError as error:
        said = {"status": "down", "parts": {"api": {"status": "down", "detail": error.message}}}
    if as_json:
        click.echo(json.dumps(said))
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("part", "status", "what is wrong"):
            table.add_column(column)
        for name, part in said["parts"].items():
            table.add_row(
                name, f"[{_HEALTH_STYLES[part['status']]}]{part['status']}[/]", Text(harmless(part["detail"], colours=False))
            )
        console.print(f"The farm is {said['status']}")
        console.print(table)
    return ("ok", "degraded", "down").index(said["status"])


@click.command()
@click.pass_obj
def config(session: Session) -> int:
    """Print the settings in force; secrets are not shown."""
    table = Table(box=None, pad_edge=False)
    table.add_column("variable")
    table.add_column("value")
    for name in Settings.model_fields:
        value = getattr(session.settings, name)
        shown = "********" if isinstance(value, SecretStr) else "" if value is None else str(value)
        table.add_row(f"MILLRACE_{name.upper()}", shown)
    console.print(table)
    return 0
