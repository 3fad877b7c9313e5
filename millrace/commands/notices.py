"""Verbs about what git servers are told of builds: show it, and have it told again."""

from datetime import UTC, datetime
from urllib.parse import quote

import click
from rich.table import Table

from millrace.client import build_path
from millrace.commands.session import Session, connect
from millrace.commands.terminal import console, harmless


class _Notices(click.Group):
    """What is no verb is what `show` is about: `millrace notices BUILD`."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["show", *args])


@click.group(cls=_Notices)
def notices() -> None:
    """What git servers are told of builds: `notices PROJECT|BUILD` shows it, `notices resend BUILD` has it told again."""


@notices.command("resend")
@click.argument("build_id", metavar="BUILD")
@click.pass_obj
def notices_resend(session: Session, build_id: str) -> int:
    """Tell the git server again what it refused of BUILD, once its token or its commit is mended."""
    client = connect(session)
    again = client.post(f"{build_path(build_id)}/notices/resend")["notices"]
    client.close()
    for one in again:
        console.print(f"{one['state']} of {one['buildId']} is told again", markup=False)
    return 0


@notices.command("show")
@click.argument("what", metavar="PROJECT|BUILD")
@click.pass_obj
def notices_show(session: Session, what: str) -> int:
    """Show what a git server was told of a project's builds or of one build, what waits, and why."""
    client = connect(session)
    path = build_path(what) if ":" in what else f"/v1/projects/{quote(what, safe='')}"
    found = client.get(f"{path}/notices")["notices"]
    client.close()
    table = Table(box=None, pad_edge=False)
    for column in ("when", "build", "commit", "state", "outcome", "tries", "why"):
        table.add_column(column)
    for one in found:
        table.add_row(
            datetime.fromtimestamp(one.get("settled", one["created"]), UTC).strftime("%Y-%m-%d %H:%M:%S"),
            one["buildId"],
            one["commit"][:12],
            one["state"],
            one["outcome"],
            str(one["tries"]),
            harmless(one["why"], colours=False),
        )
    if not found:
        console.print("Nothing: no build of a known commit whose project reports its status. docs/statuses.md says more.")
        return 0
    console.print(table)
    return 0
