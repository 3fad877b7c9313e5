"""Verbs about caches: ls, explain, rm."""

import json
from typing import Any
from urllib.parse import urlencode

import click
from rich.table import Table

from buildenv import daemonstore
from millrace.client import build_path
from millrace.commands.session import Session, connect, day
from millrace.commands.terminal import console, harmless, size
from millrace.errors import InvalidInput

_PROJECT = click.argument("project", required=False)
_NAMESPACE = click.option("--namespace", help="Caches that projects share, by their cacheNamespace.")


@click.group()
def cache() -> None:
    """What builds keep for the next ones."""


@cache.command("ls")
@_PROJECT
@_NAMESPACE
@click.option("--docker", "is_docker", is_flag=True, help="What Docker daemons of builds keep on this very worker.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON document.")
@click.pass_obj
def cache_ls(session: Session, project: str | None, namespace: str | None, is_docker: bool, as_json: bool) -> int:
    """List the caches of PROJECT, or all, newest first."""
    if is_docker:
        return _docker_ls(session, project, as_json)
    client, found = connect(session), []
    params = _whose(project, namespace)
    while True:
        page = client.get("/v1/caches", **params)
        found += page["caches"]
        if "nextCursor" not in page:
            break
        params["cursor"] = page["nextCursor"]
    client.close()
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("of", "key", "paths", "layers", "size", "own", "by build", "saved", "last used"):
        table.add_column(column)
    for item in found:
        table.add_row(
            _text(_of(item)),
            _text(item["key"] or "(none)"),
            item["version"][:8],
            str(item["layers"]),
            size(item["sizeBytes"]),
            size(item["ownBytes"]),
            item["buildId"],
            *(day(int(item[name] * 1000)) for name in ("created", "lastUsed")),
        )
    console.print(table if found else "No caches yet: a build that succeeds saves what its buildspec names.")
    return 0


def _docker_ls(session: Session, project: str | None, as_json: bool) -> int:
    folder = session.settings.layers / daemonstore.FOLDER
    found = [one for one in daemonstore.kept(folder) if project in (None, one.project)]
    if as_json:
        shown = [{"project": one.project, "sizeBytes": one.size_bytes, "lastUsed": one.used_s} for one in found]
        click.echo(json.dumps(shown, indent=1))
        return 0
    table = Table(box=None, pad_edge=False)
    for column in ("of", "size", "last used"):
        table.add_column(column)
    for one in found:
        held = "a build has it" if one.size_bytes is None else size(one.size_bytes)
        table.add_row(_text(one.project), held, day(int(one.used_s * 1000)))
    console.print(table if found else f"No Docker layer caches in {folder}")
    return 0


@cache.command("explain")
@click.argument("build_id")
@click.option("--json", "as_json", is_flag=True, help="As one JSON document.")
@click.pass_obj
def cache_explain(session: Session, build_id: str, as_json: bool) -> int:
    """Say which keys a build asked for, which cache answered or why none did, and what it saved."""
    client = connect(session)
    found = client.get(f"{build_path(build_id)}/caches")
    client.close()
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return 0
    for one in found["lookups"]:
        keys = ", ".join(repr(key) for key in one["keys"] if key) or "the last one, without a key"
        console.print(_text(f"attempt {one['attempt']} asked for {keys}; paths {one['version'][:8]}"))
        hit = one.get("found")
        if hit is None:
            console.print(f"  [bold]none[/]: {_text(one['why'])}")
        else:
            named = repr(hit["key"]) if hit["key"] else "the one without a key"
            what = f"{named} by {hit['build']}: {hit['layers']} layer(s), {size(hit['sizeBytes'])}"
            console.print(_text(f"  found {what} ({one['why']})"))
            if "became" in one:
                console.print(_text(f"  {'used' if one['used'] else 'NOT used'}: {one['became']}"))
            else:
                console.print("  nobody has said what became of it: the attempt has not ended, or was lost")
    for item in found["saved"]:
        named = repr(item["key"]) if item["key"] else "one without a key"
        console.print(_text(f"saved {named}: {size(item['ownBytes'])} of its own, {item['layers']} layer(s)"))
    if not found["lookups"]:
        console.print("This build has asked for no cache: its project has none, or its buildspec names no paths.")
    elif not found["saved"]:
        console.print("It saved none. Its log says why: a key that was there, nothing changed, or it did not succeed.")
    return 0


@cache.command("rm")
@_PROJECT
@_NAMESPACE
@click.option("--key", help="Only the cache of this key.")
@click.option("--all", "everything", is_flag=True, help="Every cache.")
@click.pass_obj
def cache_rm(session: Session, project: str | None, namespace: str | None, key: str | None, everything: bool) -> int:
    """Take away caches of PROJECT. Builds find them no more from now on; their bytes go an hour later."""
    if (key is None) == (not everything):
        raise InvalidInput("say which: --key KEY, or --all", hint="'millrace cache ls' lists them.")
    client = connect(session)
    params = _whose(project, namespace) | ({} if key is None else {"key": key})
    gone = client.delete(f"/v1/caches?{urlencode(params)}")["removed"]
    client.close()
    console.print(f"{gone} cache{'' if gone == 1 else 's'} taken away" if gone else "There is no such cache")
    return 0


def _whose(project: str | None, namespace: str | None) -> dict[str, Any]:
    return {name: value for name, value in (("project", project), ("namespace", namespace)) if value}


def _of(item: dict[str, Any]) -> str:
    home = item.get("project") or f"all of {item.get('namespace')}"
    return f"{home}, fork {item['fork']}" if "fork" in item else str(home)


def _text(text: str) -> str:
    """Without markup, and what moves the cursor."""
    return harmless(text, colours=False).replace("[", r"\[")
