"""What a verb of the command line is given: the settings, and the way to the farm."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from millrace import local
from millrace.client import Client
from millrace.commands.terminal import console
from millrace.errors import InvalidInput, Unavailable
from millrace.settings import Settings


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
    farm = local.running(settings)
    if farm is None and start:
        farm = local.start_detached(settings, session.environ, console.print)
    if farm is None:
        raise Unavailable(
            f"no farm runs in {settings.home}", hint="'millrace up' starts one; MILLRACE_API_URL and MILLRACE_TOKEN name another."
        )
    return Client(farm.api_url, settings.token.get_secret_value() if settings.token else farm.token)


def day(ms: int) -> str:
    """A day of the calendar, UTC, from Unix milliseconds."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d")
