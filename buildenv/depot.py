"""What a build needs of the farm beside its claim: the object store, secrets and caches. `worker.control` has it over HTTP."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from millrace.contract import CacheHit, CacheQuery, Grant, GrantRequest, SecretReference


class Depot(Protocol):
    """How bytes reach and leave the object store.

    Both ways raise InfraProblem(STORAGE) where the store stays away for more than five minutes, or, where `brief` says that a
    build can do without, for half a minute; and BuildStopped where the build is to end meanwhile.
    """

    def grant(self, request: GrantRequest) -> Grant:
        """An address for one object. Raises NotFound, AttemptFenced or InfraProblem(STORAGE)."""

    def upload(self, grant: Grant, path: Path, sha256: str, *, brief: bool = False) -> None:
        """Send a file there."""

    def download(self, grant: Grant, path: Path, *, brief: bool = False) -> None:
        """Fetch an object into a file."""

    def secrets(self, references: Sequence[SecretReference]) -> Mapping[str, str]:
        """The values of secrets by variable name, all of them. Raises BuildProblem(SECRET_UNAVAILABLE) or InfraProblem."""

    def find_cache(self, query: CacheQuery) -> CacheHit | None:
        """The cache that answers, or None. Raises InfraProblem(STORAGE)."""
