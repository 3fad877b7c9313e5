"""Groups of verbs whose modules are imported only when they are called: most need neither the database nor the engine."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click


class Verbs(click.Group):
    """A group whose `verbs` maps names to `module:attribute`, both below `millrace.commands`."""

    def __init__(self, *arguments: Any, verbs: Mapping[str, str], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all verbs, sorted."""
        return sorted({*super().list_commands(ctx), *self._verbs})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb of that name, imported now; None where there is none."""
        if cmd_name not in self._verbs:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self._verbs[cmd_name].partition(":")
        found: click.Command = getattr(import_module(f"millrace.commands.{module}"), attribute)
        return found
