"""Verbs about webhooks: make, show, change, try out; and what came."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import click
from rich.table import Table

from millrace.commands import post_receive
from millrace.commands.session import Session, connect
from millrace.commands.terminal import console, harmless
from millrace.errors import InvalidInput

PLACES = {
    "github": """At GitHub, Settings > Webhooks > Add webhook: this address and secret, content type application/json;
choose pushes, pull requests, issue comments and releases.""",
    "bitbucket": """At Bitbucket, Repository settings > Webhooks: this address and secret;
choose push, and pull request created, updated, merged, declined and comment created (on Data Center: added).""",
    "gitlab": """At GitLab, Settings > Webhooks: this address, the secret as signing token (or as secret token);
choose push, tag push, merge request, comment and release events.""",
    "git": """In the bare repository:
  millrace webhook script > hooks/post-receive && chmod +x hooks/post-receive
  git config millrace.url ADDRESS
  put the secret into the file millrace.secret there, and let only the git server's user read it (chmod 600)
  hooks/post-receive --ping""",
}


@click.group()
def webhook() -> None:
    """Webhooks: pushes and pull requests that start builds."""


@webhook.command("create")
@click.argument("project")
@click.option(
    "-f", "--file", "file", type=click.File("r"), help="JSON in CodeBuild's shape: filterGroups, ...; - for standard input."
)
@click.option("--branches", help="Instead of a file: a pattern for the branches whose pushes build, such as ^main$.")
@click.pass_obj
def webhook_create(session: Session, project: str, file: IO[str] | None, branches: str | None) -> int:
    """Make the webhook of PROJECT, and say what is to be set at the git server. The secret is shown this once."""
    client = connect(session)
    made = client.post(_path(project), _wanted(file, branches))
    client.close()
    _say_secret(made)
    click.echo(PLACES[made["millrace"]["provider"]])
    return _warn(made)


@webhook.command("show")
@click.argument("project")
@click.pass_obj
def webhook_show(session: Session, project: str) -> int:
    """Print the webhook of PROJECT as JSON; its secret is not shown."""
    client = connect(session)
    console.print_json(json.dumps(client.get(_path(project))))
    client.close()
    return 0


@webhook.command("update")
@click.argument("project")
@click.option("-f", "--file", "file", type=click.File("r"), help="JSON with what is to change; - for standard input.")
@click.option("--branches", help="Instead of a file: a pattern for the branches whose pushes build.")
@click.pass_obj
def webhook_update(session: Session, project: str, file: IO[str] | None, branches: str | None) -> int:
    """Change what starts builds of PROJECT. What the file does not name stays."""
    wanted = _wanted(file, branches)
    if not wanted:
        raise click.UsageError("give --file or --branches")
    client = connect(session)
    made = client.put(_path(project), wanted)
    client.close()
    console.print(f"The webhook of {project} is changed", markup=False)
    return _warn(made)


@webhook.command("rotate")
@click.argument("project")
@click.option(
    "--overlap-minutes", type=click.IntRange(0), default=24 * 60, show_default=True, help="How long the old secret holds."
)
@click.pass_obj
def webhook_rotate(session: Session, project: str, overlap_minutes: int) -> int:
    """Make a new secret for PROJECT's webhook, and print it, for the only time."""
    client = connect(session)
    made = client.put(_path(project), {"rotateSecret": True, "overlapMinutes": overlap_minutes})
    client.close()
    _say_secret(made)
    return 0


def say_left(hook: dict[str, Any]) -> None:
    """Say what is still at the git server of a webhook that is no more here."""
    named = hook["millrace"].get("providerHookId")
    which = f"webhook {named}, which calls" if named else "what calls"
    console.print(f"At the git server, remove {which} {hook['payloadUrl']}: it is answered with 404 from now on.", markup=False)


@webhook.command("delete")
@click.argument("project")
@click.pass_obj
def webhook_delete(session: Session, project: str) -> int:
    """Remove the webhook of PROJECT: its address is gone, what came stays listed."""
    client = connect(session)
    try:
        found = client.get(_path(project))
        client.delete(_path(project))
    finally:
        client.close()
    console.print(f"The webhook of {project} is deleted", markup=False)
    say_left(found)
    return 0


@webhook.command("test")
@click.argument("project")
@click.argument("payload", type=click.File("r"))
@click.option("--event", help="The event's name, as its header says it (X-GitHub-Event, X-Event-Key); by default it is guessed.")
@click.pass_obj
def webhook_test(session: Session, project: str, payload: IO[str], event: str | None) -> int:
    """Say what the PAYLOAD (a JSON file, - for standard input) would do: which group matches, or which filter does not.

    Exit status: 0 where it would start a build or wait for approval, 1 where it would not.
    """
    client = connect(session)
    found = client.post(f"{_path(project)}/test", {"payload": _json(payload), **({"event": event} if event else {})})
    client.close()
    if not found["events"]:
        _line(f"{found['event']}: {found['why']}")
    for one in found["events"]:
        _line(f"{one['event']} of {one.get('ref', 'no ref')}: {one['outcome']}: {one['why']}")
        for number, group in enumerate(one["groups"], 1):
            _line(f"  group {number} {'matches' if number == one['group'] else 'does not match'}")
            for each in group:
                _line(f"    {'ok' if each['passed'] else 'NO'}  {each['says']}")
    return 0 if any(one["outcome"] in ("build", "approval") for one in found["events"]) else 1


@webhook.command("deliveries")
@click.argument("project")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@click.pass_obj
def webhook_deliveries(session: Session, project: str, limit: int) -> int:
    """List what came for PROJECT, newest first, and what became of it."""
    client = connect(session)
    found = client.get(f"{_path(project)}/deliveries", limit=limit)["deliveries"]
    client.close()
    table = Table(box=None, pad_edge=False)
    for column in ("received", "event", "ref", "commit", "outcome", "build, or why not"):
        table.add_column(column)
    for one in found:
        at = datetime.fromtimestamp(one["received"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        commit = one.get("commit", "") if one["outcome"] == "approval" else one.get("commit", "")[:12]
        words = [one["event"], one.get("ref", ""), commit, one["outcome"], one.get("buildId") or one["why"]]
        table.add_row(at, *(harmless(word, colours=False).replace("[", r"\[") for word in words))
    console.print(table if found else f"Nothing came for {project} yet")
    return 0


@webhook.command("approve")
@click.argument("project")
@click.argument("commit")
@click.pass_obj
def webhook_approve(session: Session, project: str, commit: str) -> int:
    """Start the build of a pull request that waits for approval, at this very COMMIT. Look at it first."""
    client = connect(session)
    made = client.post(f"{_path(project)}/approve", {"commit": commit})
    client.close()
    console.print(f"Build {made['buildId']} of {made['ref']} is queued", markup=False)
    return 0


@webhook.command("script")
def webhook_script() -> int:
    """Print the hook `post-receive`, for a git server that has no webhooks of its own."""
    click.echo(Path(post_receive.__file__).read_text(encoding="utf-8"), nl=False)
    return 0


def _path(project: str) -> str:
    return f"/v1/projects/{quote(project, safe='')}/webhook"


def _wanted(file: IO[str] | None, branches: str | None) -> dict[str, Any]:
    if file is not None and branches is not None:
        raise click.UsageError("give --file or --branches, not both")
    if file is not None:
        return _json(file)
    return {} if branches is None else {"branchFilter": branches}


def _json(file: IO[str]) -> dict[str, Any]:
    try:
        body = json.load(file)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{file.name} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidInput(f"{file.name} holds a JSON {type(body).__name__}, not an object")
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{file.name} has a lone surrogate, which is no character") from error
    return body


def _say_secret(made: dict[str, Any]) -> None:
    click.echo(f"address: {made['payloadUrl']}")
    click.echo(f"secret:  {made['secret']}")


def _warn(made: dict[str, Any]) -> int:
    for warning in made["millrace"]["warnings"]:
        _line(f"warning: {warning}")
    return 0


def _line(text: str) -> None:
    console.print(harmless(text, colours=False), markup=False, soft_wrap=True)
