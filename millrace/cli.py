"""The `millrace` command: reads the settings once, and hands them to the verb."""

import os
import sys

import click

from millrace import __version__, failpoints
from millrace import log as logging
from millrace.commands import (
    backup,
    builds,
    caches,
    connect,
    farm,
    fleets,
    fleetset,
    fleetshow,
    fleetupgrade,
    fsck,
    lint,
    notices,
    secrets,
    webhooks,
)
from millrace.commands.terminal import errors, harmless
from millrace.errors import MillraceError
from millrace.settings import load


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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
    context.obj = farm.Session(settings=settings, environ=environ)


for verb in (
    builds.run,
    builds.builds,
    builds.logs,
    builds.stop,
    builds.retry,
    builds.artifacts,
    fleets.why,
    fleets.fleet,
    lint.lint,
    farm.up,
    farm.down,
    farm.doctor,
    farm.status,
    fsck.fsck,
    farm.config,
    farm.project,
    farm.token,
    caches.cache,
    secrets.secret,
    webhooks.webhook,
    notices.notices,
    farm.migrate,
    backup.backup,
    backup.restore,
    backup.restored,
    farm.bootstrap,
    farm.api,
    farm.scheduler,
    farm.worker,
):
    cli.add_command(verb)

for verb in (fleetset.fleet_set, fleetshow.fleet_show, fleetupgrade.fleet_upgrade):
    fleets.fleet.add_command(verb)


farm.project.add_command(connect.project_connect)


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
