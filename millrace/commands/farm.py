"""Verbs about the farm itself: up, down, its parts, doctor, config, tokens, projects."""

import json
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, Final

import click
from pydantic import SecretStr
from rich.table import Table
from rich.text import Text

from millrace import doctor as physician
from millrace import embedded
from millrace.client import Client
from millrace.commands.terminal import console, harmless
from millrace.errors import InvalidInput, MillraceError, NotFound, Unavailable
from millrace.settings import Settings
from millrace.storage import open_store
from millrace.vocabulary import TokenScope
from scheduler import tokens
from scheduler.db import Database
from scheduler.dispatch import Bell
from scheduler.fleets.scaler import Scaler
from scheduler.secrets import open_provider
from scheduler.sweeper import Sweeper

_HEALTH_STYLES: Final = {"ok": "green", "degraded": "yellow", "down": "red"}


@dataclass(frozen=True, kw_only=True)
class Session:
    """One call of the command line: its settings, and the environment that its children see."""

    settings: Settings
    environ: Mapping[str, str]

    def local_object(self, key: str) -> Path | None:
        """Where an object of the farm's bucket lies on this box; None where it lies elsewhere."""
        if not self.settings.store.startswith("file://"):
            return None
        path = Path(self.settings.store.removeprefix("file://")) / self.settings.bucket / key
        return path if path.is_file() else None


def connect(session: Session, *, start: bool = False) -> Client:
    """The API that the settings name, or the farm of this box, which is started where `start` says so."""
    settings = session.settings
    if settings.api_url is not None:
        if settings.token is None:
            raise InvalidInput("MILLRACE_API_URL is set, but MILLRACE_TOKEN is not", hint="'millrace token create' makes one.")
        return Client(settings.api, settings.token.get_secret_value())
    farm = embedded.running(settings)
    if farm is None and start:
        farm = embedded.start_detached(settings, session.environ, console.print)
    if farm is None:
        raise Unavailable(
            f"no farm runs in {settings.home}", hint="'millrace up' starts one; MILLRACE_API_URL and MILLRACE_TOKEN name another."
        )
    return Client(farm.api_url, settings.token.get_secret_value() if settings.token else farm.token)


@click.command()
@click.option("--detach", is_flag=True, help="Start it in the background, and return when it is up.")
@click.pass_obj
def up(session: Session, detach: bool) -> int:
    """Run the farm on this box: API, scheduler, worker and a private Redis, all in one data folder."""
    if not detach:
        return embedded.up(session.settings, session.environ, console.print)
    farm = embedded.start_detached(session.settings, session.environ, console.print)
    console.print(f"The farm is up at {farm.api_url}; its data lies in {session.settings.home}")
    return 0


@click.command()
@click.pass_obj
def down(session: Session) -> int:
    """Stop the farm of this box. Builds that run go back to its queue, and run again when it is up again."""
    stopped = embedded.stop_detached(session.settings)
    console.print("The farm has stopped" if stopped else f"No farm runs in {session.settings.home}")
    return 0


@click.command()
@click.option("--ready-file", type=click.Path(path_type=Path), help="Write the address here when it is up.")
@click.pass_obj
def api(session: Session, ready_file: Path | None) -> int:
    """Be the API."""
    from api.serve import serve

    return serve(session.settings, ready_file=ready_file)


@click.command()
@click.pass_obj
def scheduler(session: Session) -> int:
    """Be the scheduler: leases, deadlines, unsent messages. Several may run; one acts."""
    from millrace.commands.looking import by_git, credentials

    settings = session.settings
    stop = threading.Event()

    def leave(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    database = Database(settings.database)
    database.require_schema()
    secrets = open_provider(settings, database)
    bell = Bell(settings.broker)
    Sweeper(
        database,
        bell,
        open_store(settings),
        settings,
        look=by_git(settings, secrets, stop),
        credentials=credentials(settings, secrets),
        scaler=Scaler(database, bell, settings),
    ).run_forever(stop)
    database.dispose()
    return 0


@click.command()
@click.option("--once", is_flag=True, help="Claim one build, carry it, and end.")
@click.option("--build", "build_id", metavar="ID", help="With --once: the only build that may be claimed; as MILLRACE_BUILD.")
@click.option(
    "--within",
    "within_s",
    type=click.FloatRange(0, 3600),
    default=60,
    show_default=True,
    help="With --once: seconds after which there is nothing to claim.",
)
@click.pass_obj
def worker(session: Session, once: bool, build_id: str | None, within_s: float) -> int:
    """Be a worker: claim builds, and run them with this host's engine.

    Exit status with --once: 0 where a build was carried, whatever its verdict; 75 where there was none to claim.
    """
    if once:
        from worker import once as one_shot

        return one_shot.main(session.settings, session.environ, build=build_id, within_s=within_s)
    if build_id is not None:
        raise InvalidInput("--build names the one build of a worker that carries one", hint="Add --once.")
    from worker.app import main

    return main(session.settings, session.environ)


@click.command()
@click.pass_obj
def migrate(session: Session) -> int:
    """Bring the database's schema up to this release."""
    database = Database(session.settings.database)
    database.migrate()
    database.dispose()
    console.print("The schema is up to date")
    return 0


@click.command()
@click.pass_obj
def bootstrap(session: Session) -> int:
    """Migrate, and make the tokens in MILLRACE_TOKEN (admin) and MILLRACE_WORKER_TOKEN known to the farm."""
    settings = session.settings
    database = Database(settings.database)
    database.migrate()
    for name, scope, secret in (
        ("admin", TokenScope.ADMIN, settings.token),
        ("worker", TokenScope.WORKER, settings.worker_token),
    ):
        if secret is not None:
            tokens.create(database, name, scope, secret=secret.get_secret_value())
    database.dispose()
    console.print("The schema is up to date, and the tokens are known")
    return 0


@click.command()
@click.option("--install", is_flag=True, help="Install and start what is missing (as root on Debian or Ubuntu).")
@click.option("--for", "purpose", type=click.Choice(["run", "demo", "test", "compose"]), default="run", show_default=True)
@click.pass_obj
def doctor(session: Session, install: bool, purpose: str) -> int:
    """Say what this machine lacks, and how to mend it."""
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


@click.group()
def token() -> None:
    """API and worker tokens."""


def records(session: Session) -> Database:
    """The database, spoken to directly: who may read its file or has its password may make tokens."""
    database = Database(session.settings.database)
    if database.is_sqlite and not (session.settings.home / "millrace.db").exists() and session.settings.database_url is None:
        raise NotFound(f"there is no farm in {session.settings.home} yet", hint="'millrace up' makes one.")
    database.require_schema()
    return database


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


def day(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d")


@click.group()
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
    connect(session).delete(f"/v1/projects/{name}")
    console.print(f"Project {name} is deleted")
    return 0
