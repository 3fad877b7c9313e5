"""How the scheduler looks at a project's repository: by git, with its source's credentials, as a worker would."""

import threading
from collections.abc import Mapping
from typing import Final

from buildenv.git import Credential
from buildenv.source import heads
from millrace.contract import SecretReference
from millrace.project import ProjectSource
from millrace.secrets import SecretProvider, values_of
from millrace.settings import Settings
from scheduler.missed import Look

_PATIENCE_S: Final = 20.0


def by_git(settings: Settings, secrets: SecretProvider, stop: threading.Event) -> Look:
    """Reads the branches of a repository, until `stop`."""

    def look(project: str, source: ProjectSource) -> Mapping[str, str]:
        credential = None
        if source.auth is not None and source.auth.type == "SECRETS_MANAGER" and source.auth.resource:
            reference = SecretReference(name="auth", type="SECRETS_MANAGER", value=source.auth.resource)
            values = values_of(secrets, project, [reference], allowed=settings.secrets_names)
            credential = Credential.read(values["auth"], source)
        return heads(
            source,
            git_roots=settings.git_roots,
            ca_bundle=settings.ca_bundle,
            stop=stop,
            patience_s=_PATIENCE_S,
            credential=credential,
        )

    return look
