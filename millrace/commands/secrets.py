"""Verbs about secrets: set, list, rm, reseal. A value comes from a file, standard input or the keyboard, never from argv."""

import sys
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import click
from rich.table import Table

from millrace.commands.records import records
from millrace.commands.session import Session, connect, day
from millrace.commands.terminal import console, harmless
from millrace.errors import InvalidInput, Unavailable
from millrace.secrets.reference import canonical
from scheduler import hooks, secrets

_MAX_BYTES: Final = secrets.MAX_VALUE_BYTES


@click.group()
def secret() -> None:
    """Secrets that builds may ask for; `env: parameter-store` and `secrets-manager` of a buildspec name them."""


@secret.command("set", context_settings={"allow_extra_args": True})
@click.argument("name")
@click.option("--project", help="The project whose builds alone may have it; by default all may.")
@click.option("--description", default="", help="What it is for.")
@click.option(
    "--value-file", type=click.Path(path_type=Path, dir_okay=False), help="The file that holds the value, every byte of it."
)
@click.pass_context
def secret_set(context: click.Context, name: str, project: str | None, description: str, value_file: Path | None) -> int:
    """Set the secret NAME. The value is asked for, or comes from standard input (less one line end) or a file."""
    session: Session = context.obj
    if context.args:
        raise InvalidInput(
            "a value is never given on the command line, where others can read it",
            hint=f"millrace secret set {name} --value-file FILE; or pipe it in; or type it when asked.",
        )
    path = _path(name)
    value = _value(name, value_file)
    client = connect(session)
    made = client.put(path, {"value": value, "description": description, **({"project": project} if project else {})})
    client.close()
    console.print(f"Secret {made['name']} is set (version {made['version']})", markup=False)
    return 0


@secret.command("list")
@click.option("--project", help="Only this project's.")
@click.pass_obj
def secret_list(session: Session, project: str | None) -> int:
    """List secrets. Their values cannot be read back."""
    table = Table(box=None, pad_edge=False)
    for column in ("secret", "project", "version", "set", "description"):
        table.add_column(column)
    client = connect(session)
    params: dict[str, Any] = {"project": project} if project else {}
    while True:
        page = client.get("/v1/secrets", **params)
        for item in page["secrets"]:
            described = harmless(item.get("description", ""), colours=False).replace("[", r"\[")
            set_at = day(int(item["lastModified"] * 1000))
            table.add_row(item["name"], item.get("project", ""), str(item["version"]), set_at, described)
        if "nextCursor" not in page:
            break
        params["cursor"] = page["nextCursor"]
    client.close()
    console.print(table)
    return 0


@secret.command("rm")
@click.argument("name")
@click.option("--project", help="The project that it belongs to; by default the whole farm's is removed.")
@click.pass_obj
def secret_rm(session: Session, name: str, project: str | None) -> int:
    """Remove the secret NAME."""
    client = connect(session)
    client.delete(_path(name) + (f"?project={quote(project, safe='')}" if project else ""))
    client.close()
    console.print(f"Secret {name} is removed", markup=False)
    return 0


@secret.command("reseal")
@click.pass_obj
def secret_reseal(session: Session) -> int:
    """Seal all secrets with the first of the farm's keys, so that the others may be thrown away."""
    database = records(session)
    try:
        keys = secrets.keys_of(session.settings)
        done, failed = secrets.reseal(database, keys)
        hooked, unread = hooks.reseal(database, keys)
    finally:
        database.dispose()
    failed += unread
    console.print(f"{done} secrets and those of {hooked} webhooks are sealed with the first key now")
    if failed:
        raise Unavailable("\n".join(failed), hint="Keep the other keys until these can be read, or are set anew.")
    return 0


def _path(name: str) -> str:
    return f"/v1/secrets/{quote(canonical(name))}"


def _value(name: str, file: Path | None) -> str:
    try:
        if file is not None:
            with open(file, "rb") as body:
                raw = body.read(_MAX_BYTES + 1)
        elif sys.stdin.isatty():
            raw = str(click.prompt(f"Value of {name}", hide_input=True, confirmation_prompt="Once more")).encode()
        else:
            raw = sys.stdin.buffer.read(_MAX_BYTES + 2)
            raw = raw.removesuffix(b"\r\n") if raw.endswith(b"\r\n") else raw.removesuffix(b"\n")
        value = raw.decode()
    except OSError as error:
        raise InvalidInput(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise InvalidInput(
            "the value is no text in UTF-8, and a variable holds nothing else", hint="Encode it, and let the build decode it."
        ) from None  # the error holds the value
    if not value or "\0" in value:
        raise InvalidInput("the value is empty" if not value else "the value has a NUL, which no variable can hold")
    if len(raw) > _MAX_BYTES:
        raise InvalidInput(f"the value is longer than {_MAX_BYTES} bytes")
    return value
