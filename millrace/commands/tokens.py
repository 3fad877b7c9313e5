"""`millrace token`: API and worker tokens."""

import click
from rich.table import Table

from millrace.commands.records import records
from millrace.commands.session import Session, day
from millrace.commands.terminal import console
from millrace.vocabulary import TokenScope
from scheduler import tokens


@click.group()
def token() -> None:
    """API and worker tokens."""


@token.command("create")
@click.argument("name")
@click.option("--scope", type=click.Choice([scope.value for scope in TokenScope]), default="admin", show_default=True)
@click.option("--project", help="The project of a token of scope 'project'.")
@click.option("--days", type=click.IntRange(1, 3650), help="Days until it ends; by default it does not.")
@click.pass_obj
def token_create(session: Session, name: str, scope: str, project: str | None, days: int | None) -> int:
    """Make a token called NAME and print it, for the only time."""
    database = records(session)
    click.echo(tokens.create(database, name, TokenScope(scope), project=project, days=days))
    database.dispose()
    return 0


@token.command("ls")
@click.pass_obj
def token_ls(session: Session) -> int:
    """List tokens; what they are is not kept, only their hashes."""
    database = records(session)
    table = Table(box=None, pad_edge=False)
    for column in ("id", "name", "scope", "project", "made", "ends"):
        table.add_column(column)
    for record in tokens.find(database):
        who = record.principal
        ends = "revoked" if record.revoked_ms else day(record.expires_ms) if record.expires_ms else ""
        table.add_row(who.token_id, who.name, who.scope.value, who.project or "", day(record.created_ms), ends)
    console.print(table)
    database.dispose()
    return 0


@token.command("revoke")
@click.argument("token_id")
@click.pass_obj
def token_revoke(session: Session, token_id: str) -> int:
    """End a token now."""
    database = records(session)
    tokens.revoke(database, token_id)
    database.dispose()
    console.print(f"Token {token_id} is revoked")
    return 0
