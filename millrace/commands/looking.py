"""What the scheduler does with a source's credential: look at the repository, as a worker would, and answer its git server."""

import threading
from collections.abc import Mapping
from typing import Final

from buildenv.git import Credential
from buildenv.source import heads
from millrace.contract import SecretReference
from millrace.project import ProjectSource
from millrace.secrets import SecretProvider, values_of
from millrace.settings import Settings
from scheduler.door import Credentials
from scheduler.missed import Look
from scheduler.providers import Access

_PATIENCE_S: Final = 20.0


def by_git(settings: Settings, secrets: SecretProvider, stop: threading.Event) -> Look:
    """Reads the branches of a repository, until `stop`."""

    def look(project: str, source: ProjectSource) -> Mapping[str, str]:
        return heads(
            source,
            git_roots=settings.git_roots,
            ca_bundle=settings.ca_bundle,
            stop=stop,
            patience_s=_PATIENCE_S,
            credential=_credential(settings, secrets, project, source),
        )

    return look


def credentials(settings: Settings, secrets: SecretProvider) -> Credentials:
    """Opens the API of a source's git server with what git itself is given."""

    def find(project: str, source: ProjectSource) -> Access | None:
        found = _credential(settings, secrets, project, source)
        return Access(username=found.username, token=found.password) if found is not None else None

    return find


def _credential(settings: Settings, secrets: SecretProvider, project: str, source: ProjectSource) -> Credential | None:
    if source.auth is None or source.auth.type != "SECRETS_MANAGER" or not source.auth.resource:
        return None
    reference = SecretReference(name="auth", type="SECRETS_MANAGER", value=source.auth.resource)
    values = values_of(secrets, project, [reference], allowed=settings.secrets_names)
    return Credential.read(values["auth"], source)
