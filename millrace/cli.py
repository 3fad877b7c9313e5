"""The `millrace` command: reads the settings once, and hands them to the verb."""

import os
import sys
from typing import Final

import click

from millrace import __version__, failpoints
from millrace import log as logging
from millrace.commands.lazy import Verbs
from millrace.commands.session import Session
from millrace.commands.terminal import errors, harmless
from millrace.errors import MillraceError
from millrace.settings import load

_VERBS: Final = {
    "run": "builds:run",
    "builds": "builds:builds",
    "logs": "builds:logs",
    "stop": "builds:stop",
    "retry": "builds:retry",
    "artifacts": "builds:artifacts",
    "why": "fleets:why",
    "fleet": "fleets:fleet",
    "lint": "lint:lint",
    "up": "farm:up",
    "down": "farm:down",
    "doctor": "farm:doctor",
    "status": "farm:status",
    "config": "farm:config",
    "fsck": "fsck:fsck",
    "project": "projects:project",
    "token": "tokens:token",
    "cache": "caches:cache",
    "secret": "secrets:secret",
    "webhook": "webhooks:webhook",
    "notices": "notices:notices",
    "backup": "backup:backup",
    "restore": "backup:restore",
    "restored": "backup:restored",
    "migrate": "parts:migrate",
    "bootstrap": "parts:bootstrap",
    "api": "parts:api",
    "scheduler": "parts:scheduler",
    "worker": "parts:worker",
}


@click.group(cls=Verbs, verbs=_VERBS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data-dir", type=click.Path(file_okay=False), help="The farm's data folder; as MILLRACE_DATA_DIR.")
@click.version_option(__version__, prog_name="millrace")
@click.pass_context
def cli(context: click.Context, data_dir: str | None) -> None:
    """Millrace, a build farm that a team runs itself."""
    environ = dict(os.environ)
    if data_dir is not None:
        environ["MILLRACE_DATA_DIR"] = data_dir
    settings = load(environ)
    logging.configure(settings.log_format, settings.log_level, service=context.invoked_subcommand or "")
    if context.invoked_subcommand != "up":  # who starts the parts is what restarts them
        failpoints.arm(settings.failpoint, settings.home)
    context.obj = Session(settings=settings, environ=environ)


def main() -> int:
    """The program's entry; its exit status. What we foresaw is said in a sentence, never as a traceback."""
    try:
        status = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    except MillraceError as error:
        errors.print("error:", style="red", end=" ")
        errors.print(harmless(error.message, colours=False), markup=False)
        if error.hint:
            errors.print("hint:", harmless(error.hint, colours=False), markup=False)
        return 1
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
