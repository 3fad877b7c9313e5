"""The verbs that are the farm's parts, and what makes its records ready for them."""

import signal
import threading
from pathlib import Path
from types import FrameType

import click

from millrace.commands.session import Session
from millrace.commands.terminal import console
from millrace.errors import InvalidInput
from millrace.storage import open_store
from millrace.vocabulary import TokenScope


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
    from scheduler.db import Database
    from scheduler.dispatch import Bell
    from scheduler.fleets.scaler import Scaler
    from scheduler.secrets import open_provider
    from scheduler.sweeper import Sweeper

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
    from scheduler.db import Database

    database = Database(session.settings.database)
    database.migrate()
    database.dispose()
    console.print("The schema is up to date")
    return 0


@click.command()
@click.pass_obj
def bootstrap(session: Session) -> int:
    """Migrate, and make the tokens in MILLRACE_TOKEN (admin) and MILLRACE_WORKER_TOKEN known to the farm."""
    from scheduler import tokens
    from scheduler.db import Database

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
