"""The way into the API of a project's git server: with the credential of its source, asked for each time."""

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from millrace.errors import InfraProblem, MillraceError, Unavailable
from millrace.project import ProjectSource
from millrace.settings import Settings
from scheduler.providers import Access, Later, Refused, Rest
from scheduler.providers.rest import trust_of

Credentials = Callable[[str, ProjectSource], Access | None]
"""What opens the API of a project's git server; None where the source has no credential. Raises MillraceError."""


class Door:
    """Opens it. For one thread."""

    def __init__(self, settings: Settings, credentials: Credentials) -> None:
        self._settings, self._credentials = settings, credentials
        self._trust: ssl.SSLContext | None = None

    def access(self, project: str, source: ProjectSource) -> Access:
        """The credential. Raises Refused where there is none, Later where its store is away."""
        try:
            access = self._credentials(project, source)
        except (Unavailable, InfraProblem) as problem:
            raise Later(problem.message) from problem
        except MillraceError as problem:
            raise Refused(problem.message) from problem
        if access is None:
            raise Refused("the source has no credential: its 'auth' names a secret with the token")
        return access

    def ask(self, access: Access) -> Rest:
        """Who asks with it. Close it."""
        self._trust = self._trust or trust_of(self._settings)
        return Rest(access, self._trust)

    @contextmanager
    def opened(self, project: str, source: ProjectSource) -> Iterator[Rest]:
        """Both, and closed at the end."""
        rest = self.ask(self.access(project, source))
        try:
            yield rest
        finally:
            rest.close()
