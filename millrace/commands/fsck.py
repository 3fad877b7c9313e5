"""`millrace fsck`: what the farm promises, checked on the farm itself."""

import json
import secrets
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final

import click
import docker
import requests
from docker.errors import DockerException
from pydantic import SecretStr

from buildenv.engine import LABEL_ATTEMPT, LABEL_BUILD, LABEL_PLACE, LABEL_WORKSPACES
from millrace.commands.records import records
from millrace.commands.session import Session
from millrace.commands.terminal import console, harmless
from millrace.errors import InfraProblem, InvalidInput, MillraceError
from millrace.ids import is_build_id, uuid_of
from millrace.locks import is_held
from millrace.settings import Settings, for_children
from millrace.storage import open_store
from millrace.vocabulary import Reason
from scheduler import fsck as checks
from scheduler.dispatch import Bell
from scheduler.fsck import Fault, Finding, Scope, Standing, Thing
from worker.engines import make_engine
from worker.janitor import Janitor

_STYLES: Final = {Standing.OK: "green", Standing.VIOLATED: "red"}
_ENGINE_S: Final = 20


@click.command()
@click.option("--host", "with_host", is_flag=True, help="Look at this machine's Docker engine and workspaces, too.")
@click.option("--repair", is_flag=True, help="Carry out the repairs that are safe, say which, and check again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--journal", type=click.File("r"), help="A client's requests and answers, one JSON object a line.")
@click.option("--canaries", type=click.File("r"), help="Strings that must stand nowhere, one a line.")
@click.option("--since", type=click.FloatRange(min=0), metavar="DAYS", help="Of what has ended, only what is younger.")
@click.option("--objects", type=click.IntRange(min=0), default=200, show_default=True, help="So many are read back; 0: all.")
@click.option("--only", type=click.IntRange(1, 24), multiple=True, metavar="NUMBER", help="This invariant; may be repeated.")
@click.option(
    "--patience",
    type=click.FloatRange(0, 3600),
    default=90,
    show_default=True,
    metavar="SECONDS",
    help="With --host: so long may take to go what no process holds.",
)
@click.option("--at-rest", is_flag=True, help="Nothing is meant to run: a build that has not ended is a fault.")
@click.pass_obj
def fsck(
    session: Session,
    with_host: bool,
    repair: bool,
    as_json: bool,
    journal: IO[str] | None,
    canaries: IO[str] | None,
    since: float | None,
    objects: int,
    only: tuple[int, ...],
    patience: float,
    at_rest: bool,
) -> int:
    """Check the promises of the farm on its records, objects and hosts. It only reads, and the farm may be at work.

    Exit status: 0 nothing is wrong, 1 something is, 2 it could not be looked at.
    """
    try:
        database = records(session)
        try:
            scope = Scope(
                db=database,
                settings=session.settings,
                store=open_store(_with_key(session.settings)),
                bell=Bell(session.settings.broker),
                host=ThisHost(session) if with_host else None,
                journal=None if journal is None else _read_journal(journal),
                canaries=() if canaries is None else [line for line in canaries.read().splitlines() if line],
                since_ms=None if since is None else int((time.time() - since * 86_400) * 1000),
                objects=objects or None,
                at_rest=at_rest,
                host_patience_s=patience,
            )
            findings = checks.check(scope, only)
            done: Sequence[str] = ()
            if repair:
                done, findings = checks.mend(scope, findings)
        finally:
            database.dispose()
    except MillraceError as error:
        if as_json:
            click.echo(json.dumps({"status": "away", "problem": error.message, "hint": error.hint}))
        else:
            console.print(f"[red]error:[/] {harmless(error.message, colours=False)}")
            console.print(harmless(error.hint, colours=False), markup=False)
        return 2
    status = _status(findings)
    if as_json:
        click.echo(json.dumps({"status": ("ok", "violated", "away")[status], "repairs": done, "invariants": _json(findings)}))
    else:
        _show(findings, done)
    return status


def _status(findings: Sequence[Finding]) -> int:
    if any(finding.standing is Standing.VIOLATED for finding in findings):
        return 1
    return 2 if any(finding.away for finding in findings) else 0


def _json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [
        {
            "number": one.number,
            "name": one.name,
            "standing": one.standing.value,
            "note": one.note,
            "faults": [
                {"what": fault.what, "ids": list(fault.ids), "repair": fault.repair, "hint": fault.hint} for fault in one.faults
            ],
        }
        for one in findings
    ]


def _show(findings: Sequence[Finding], done: Sequence[str]) -> None:
    for one in findings:
        style = _STYLES.get(one.standing, "yellow" if one.away else "dim")
        console.print(f"{one.number:2} [{style}]{one.standing.value}[/] {one.name}", end=" ")
        console.print(f"({harmless(one.note, colours=False)})", style="dim", markup=False)
        for fault in one.faults:
            console.print(f"     {harmless(fault.what, colours=False)}", markup=False)
            console.print(f"       {_advice(fault)}", style="dim", markup=False)
    for line in done:
        console.print(f"repaired by {harmless(line, colours=False)}", markup=False)


def _advice(fault: Fault) -> str:
    repair = f"'--repair' carries out {fault.repair}: {checks.REPAIRS[fault.repair].what}." if fault.repair else "No safe repair."
    return f"{repair} {fault.hint}".strip()


def _with_key(settings: Settings) -> Settings:
    """Nothing is signed here, so any key opens a directory store."""
    return settings if settings.signing_key else settings.model_copy(update={"signing_key": SecretStr(secrets.token_hex(32))})


def _read_journal(file: IO[str]) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise InvalidInput(f"line {number} of the journal is not JSON: {error}") from error
        if not isinstance(line, dict):
            raise InvalidInput(f"line {number} of the journal is no JSON object")
        lines.append(line)
    return lines


class ThisHost:
    """This machine: its engine, and the workspaces that the settings name."""

    def __init__(self, session: Session) -> None:
        self._settings, self._environ = session.settings, session.environ

    def things(self) -> Sequence[Thing]:
        now = time.time()
        return [*self._in_engine(now), *self._workspaces(now)]

    def clean(self) -> int:
        engine = make_engine(self._settings.engine, self._settings.docker_host, for_children(self._environ))
        return Janitor(engine, self._settings.workspaces).clean(young_s=90)

    def _in_engine(self, now: float) -> list[Thing]:
        if self._settings.engine != "docker":
            return []
        wanted = {"label": f"{LABEL_WORKSPACES}={self._settings.workspaces}"}
        try:
            client = docker.APIClient(base_url=self._settings.docker_host, version="auto", timeout=_ENGINE_S)
            try:
                found = [("container", one["Names"][0].strip("/"), one) for one in client.containers(all=True, filters=wanted)]
                found += [("volume", one["Name"], one) for one in client.volumes(filters=wanted)["Volumes"] or ()]
                found += [("network", one["Name"], one) for one in client.networks(filters=wanted)]
            finally:
                client.close()
        except (DockerException, requests.RequestException) as error:
            raise InfraProblem(f"the Docker engine does not answer: {error}", reason=Reason.ENGINE_LOST) from error
        return [self._thing(kind, name, said, now) for kind, name, said in found]

    def _thing(self, kind: str, name: str, said: dict[str, Any], now: float) -> Thing:
        labels = said.get("Labels") or {}
        build, number = labels.get(LABEL_BUILD, ""), labels.get(LABEL_ATTEMPT, "")
        attempt = (uuid_of(build), int(number)) if is_build_id(build) and number.isdigit() else None
        made = said.get("Created") or said.get("CreatedAt") or 0  # seconds of containers, RFC 3339 of all else
        age_s = now - (datetime.fromisoformat(made).timestamp() if isinstance(made, str) else float(made))
        place = labels.get(LABEL_PLACE) or f"{uuid_of(build)}-{number}"
        return Thing(kind=kind, name=name, attempt=attempt, age_s=age_s, lives=self._is_held(place))

    def _is_held(self, place: str) -> bool:
        return "/" not in place and is_held(self._settings.workspaces / f"{place}.lock")

    def _workspaces(self, now: float) -> list[Thing]:
        folder = self._settings.workspaces
        if not folder.is_dir():
            return []
        things = []
        for entry in sorted(folder.iterdir()):
            try:
                if entry.suffix == ".lock":
                    continue
                build, _, number = entry.name.rpartition("-")
                attempt = (build, int(number)) if number.isdigit() else None
                age_s = now - entry.stat().st_mtime
                things.append(
                    Thing(
                        kind="workspace",
                        name=entry.name,
                        attempt=attempt,
                        age_s=age_s,
                        lives=self._is_held(entry.name),
                        size_bytes=_size(entry),
                    )
                )
            except FileNotFoundError:
                continue  # its build ended meanwhile
        return things


def _size(folder: Path) -> int:
    if not folder.is_dir() or folder.is_symlink():
        return folder.lstat().st_size
    total = 0
    for entry in folder.rglob("*"):
        try:
            total += entry.lstat().st_size
        except FileNotFoundError:
            continue
    return total
