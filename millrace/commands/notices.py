"""The verb that shows what git servers were told of builds."""

from datetime import UTC, datetime
from urllib.parse import quote

import click
from rich.table import Table

from millrace.client import build_path
from millrace.commands.farm import Session, connect
from millrace.commands.terminal import console, harmless


@click.command()
@click.argument("what", metavar="PROJECT|BUILD")
@click.pass_obj
def notices(session: Session, what: str) -> int:
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
