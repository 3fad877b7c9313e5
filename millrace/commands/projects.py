"""`millrace project`."""

import json
from typing import IO
from urllib.parse import quote

import click
from rich.table import Table

from millrace.commands.lazy import Verbs
from millrace.commands.session import Session, connect
from millrace.commands.terminal import console
from millrace.commands.webhooks import say_left
from millrace.errors import InvalidInput, NotFound


@click.group(cls=Verbs, verbs={"connect": "connect:project_connect"})
def project() -> None:
    """Projects."""


@project.command("ls")
@click.pass_obj
def project_ls(session: Session) -> int:
    """List projects."""
    table = Table(box=None, pad_edge=False)
    for column in ("project", "source", "image"):
        table.add_column(column)
    for found in connect(session).get("/v1/projects")["projects"]:
        source = found["source"]
        table.add_row(found["name"], f"{source['type']} {source.get('location', '')}".strip(), found["environment"]["image"])
    console.print(table)
    return 0


@project.command("show")
@click.argument("name")
@click.pass_obj
def project_show(session: Session, name: str) -> int:
    """Print a project as JSON."""
    console.print_json(json.dumps(connect(session).get(f"/v1/projects/{name}")))
    return 0


@project.command("create")
@click.option(
    "-f", "--file", "file", type=click.File("r"), required=True, help="JSON in CodeBuild's shape; - for standard input."
)
@click.pass_obj
def project_create(session: Session, file: IO[str]) -> int:
    """Make a project from a file."""
    try:
        body = json.load(file)
    except ValueError as error:
        raise InvalidInput(f"the file is not JSON: {error}") from error
    made = connect(session).post("/v1/projects", body)
    console.print(f"Project {made['name']} is made")
    return 0


@project.command("delete")
@click.argument("name")
@click.pass_obj
def project_delete(session: Session, name: str) -> int:
    """Delete a project; its builds stay."""
    client, path = connect(session), f"/v1/projects/{quote(name, safe='')}"
    try:
        hook = client.get(f"{path}/webhook")
    except NotFound:
        hook = None
    client.delete(path)
    console.print(f"Project {name} is deleted", markup=False)
    if hook is not None:
        say_left(hook)
    return 0
