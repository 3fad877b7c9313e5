"""The command line imports what a verb needs, and no more."""

import subprocess
import sys

import click
import pytest

from millrace.cli import cli
from millrace.commands.lazy import Verbs

_HEAVY = ("sqlalchemy", "alembic", "celery", "docker", "flask", "scheduler", "worker")
_LIGHT = ("session", "farm", "fleets", "fleetset", "fleetshow", "notices", "webhooks", "lint", "builds", "projects")


def _all(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    context = click.Context(group)
    for name in group.list_commands(context):
        verb = group.get_command(context, name)
        assert verb is not None, (*path, name)
        assert verb.name == name, (*path, name)
        found.append((*path, name))
        if isinstance(verb, click.Group):
            found += _all(verb, (*path, name))
    return found


def test_every_verb_is_found_under_its_own_name() -> None:
    verbs = _all(cli)
    assert len(verbs) == len(set(verbs))
    assert {("run",), ("project", "connect"), ("project", "ls"), ("fleet", "set"), ("fleet", "simulate"), ("api",)} <= set(verbs)


def test_a_verb_that_is_not_there_is_none() -> None:
    assert Verbs(name="x", verbs={}).get_command(click.Context(cli), "nothing") is None
    assert cli.get_command(click.Context(cli), "nothing") is None


@pytest.mark.parametrize("module", _LIGHT)
def test_a_verb_that_asks_the_api_loads_no_database_engine_or_queue(module: str) -> None:
    code = f"import sys, millrace.cli, millrace.commands.{module}; print([name for name in {_HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
