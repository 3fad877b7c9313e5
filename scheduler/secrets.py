"""The farm's own store of secrets: sealed values in the records, whose key lies elsewhere; and which store a farm uses.

A secret is the whole farm's, or one project's. A build finds its project's own first, then the farm's.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from millrace.errors import Conflict, InvalidInput, NotFound, TooLarge, Unavailable
from millrace.log import get_logger
from millrace.secrets import Refusal, SecretProvider, keyring
from millrace.secrets.keyring import Keyring, WrongKey
from millrace.secrets.reference import CURRENT, Wanted, canonical
from millrace.settings import Settings
from scheduler.db import Database, now_ms
from scheduler.models import Project, Secret

log = get_logger(__name__)
MAX_VALUE_BYTES: Final = 64 * 1024
_ARN_SUFFIX_CHARS: Final = 7
_FARM: Final = ""
Keys = Callable[[bool], Keyring]
"""The keys; True where a first one may be made."""


@dataclass(frozen=True, kw_only=True)
class SecretRecord:
    """A secret as it may be shown: everything but its value. `project` None: the whole farm's."""

    name: str
    project: str | None
    version: int
    description: str
    created_ms: int
    modified_ms: int


def keys_of(settings: Settings) -> Keys:
    """Where the farm's keys are found. A file is read each time, so that a new key needs no restart. Raises InvalidInput."""
    given = keyring.from_settings(settings)
    return (lambda _make: given) if given else (lambda make: keyring.load(keyring.key_file(settings), make=make))


def open_provider(settings: Settings, db: Database) -> SecretProvider:
    """The store that the settings name. Raises InvalidInput where they do not make one."""
    if settings.secrets_provider == "aws":
        from millrace.secrets.aws import AwsSecrets

        return AwsSecrets(settings.region)
    if settings.secrets_provider == "vault":
        from millrace.secrets.vault import VaultSecrets

        if settings.vault_address is None or (settings.vault_token is None) == (settings.vault_token_file is None):
            raise InvalidInput("Vault needs MILLRACE_VAULT_ADDRESS, and MILLRACE_VAULT_TOKEN or MILLRACE_VAULT_TOKEN_FILE")
        return VaultSecrets(
            settings.vault_address,
            token=settings.vault_token.get_secret_value() if settings.vault_token else None,
            token_file=settings.vault_token_file,
            mount=settings.vault_mount,
            namespace=settings.vault_namespace,
        )
    return FarmSecrets(db, keys_of(settings))


class FarmSecrets:
    """A SecretProvider over the records. There is only the newest version of a secret."""

    def __init__(self, db: Database, keys: Keys) -> None:
        self._db, self._keys = db, keys

    def fetch(self, project: str, wanted: Collection[Wanted]) -> Mapping[Wanted, str | Refusal]:
        """As the protocol has it. Raises Unavailable, naming the secret, where the key that sealed it is not there."""
        names = {one: _names(one) for one in wanted}
        with self._db.reading() as session:
            rows = session.scalars(
                sa.select(Secret).where(
                    Secret.project_name.in_((_FARM, project)), Secret.name.in_({name for some in names.values() for name in some})
                )
            ).all()
        keys = cache(self._keys)  # one reading of a file for all
        known = {(row.name, row.project_name): row for row in rows}
        found: dict[Wanted, str | Refusal] = {}
        for one, some in names.items():
            row = next((known[key] for key in [(n, p) for n in some for p in (project, _FARM)] if key in known), None)
            if row is None:
                found[one] = Refusal(f"{one.noun} does not exist")
            elif one.stage not in ("", CURRENT) or one.version not in ("", str(row.version)):
                found[one] = Refusal(f"{one.noun} does not exist in this version; the farm keeps only the newest")
            else:
                found[one] = _unsealed(row, keys)
        return found


def put(
    db: Database, keys: Keys, name: str, value: str, *, project: str | None = None, description: str = ""
) -> tuple[SecretRecord, bool]:
    """Set a secret; True where it is new. Raises InvalidInput, TooLarge, NotFound for the project, Unavailable for the keys."""
    name = canonical(name)
    size = len(value.encode())
    if not value or "\0" in value:
        raise InvalidInput("a secret's value is not empty, and has no NUL, which no variable can hold")
    if size > MAX_VALUE_BYTES:
        raise TooLarge(f"a secret has at most {MAX_VALUE_BYTES} bytes, this one has {size}")
    if "\0" in description:
        raise InvalidInput("a description has no NUL")
    owner = project or _FARM
    if project is not None:
        _require_project(db, project)
    sealed = keys(True).seal(value, _context(owner, name))

    def work(session: Session) -> tuple[SecretRecord, bool]:
        now: int = session.execute(sa.select(now_ms())).scalar_one()
        row = session.get(Secret, (owner, name), with_for_update=True)
        if row is None:
            row = Secret(project_name=owner, name=name, version=1, sealed=sealed, description=description)
            row.created_ms = row.modified_ms = now
            session.add(row)
            try:
                session.flush()
            except sa.exc.IntegrityError as error:
                raise Conflict(f"{_shown(name)} was set twice at one moment", hint="Send it again.") from error
            return _record(row), True
        row.version, row.sealed, row.description, row.modified_ms = row.version + 1, sealed, description, now
        return _record(row), False

    record, new = db.run(work)
    log.info("secret.set", name=record.name, project=project, version=record.version)
    return record, new


def find(
    db: Database, *, project: str | None = None, limit: int = 100, after: str | None = None
) -> tuple[Sequence[SecretRecord], str | None]:
    """Secrets by project and name, the farm's first, at most `limit`, from behind `after`; and where to go on, or None.

    `project` restricts to its own.
    """
    place = sa.tuple_(Secret.project_name, Secret.name)
    query = sa.select(Secret).order_by(Secret.project_name, Secret.name).limit(limit + 1)
    if project is not None:
        query = query.where(Secret.project_name == project)
    if after is not None:
        owner, blank, name = after.partition(" ")
        if not blank or "\0" in after:
            raise InvalidInput("the cursor is none of ours", hint="Use nextCursor of the page before, unchanged.")
        query = query.where(place > sa.tuple_(sa.literal(owner), sa.literal(name)))
    with db.reading() as session:
        rows = session.scalars(query).all()
    last = rows[limit - 1] if len(rows) > limit else None
    return [_record(row) for row in rows[:limit]], f"{last.project_name} {last.name}" if last else None


def delete(db: Database, name: str, *, project: str | None = None) -> None:
    """Remove a secret. Raises NotFound."""
    name = canonical(name)

    def work(session: Session) -> None:
        row = session.get(Secret, (project or _FARM, name), with_for_update=True)
        if row is None:
            whose = f"project {project}" if project else "the farm"
            raise NotFound(f"{whose} has no secret {_shown(name)}", hint="'millrace secret list' lists them.")
        session.delete(row)

    db.run(work)
    log.info("secret.deleted", name=_shown(name), project=project)


def reseal(db: Database, keys: Keys) -> tuple[int, list[str]]:
    """Seal with the first key what another one sealed: how many there were, and why others could not be read."""
    with db.reading() as session:
        rows = session.scalars(sa.select(Secret)).all()
    if not rows:
        return 0, []
    done, failed = 0, []
    ring = keys(False)
    for row in rows:
        if ring.is_of_first(row.sealed):
            continue
        try:
            sealed = ring.seal(_unsealed(row, lambda _make: ring), _context(row.project_name, row.name))
        except Unavailable as error:
            failed.append(error.message)
            continue

        def work(session: Session, row: Secret = row, sealed: bytes = sealed) -> None:
            session.execute(
                sa.update(Secret)
                .where(Secret.project_name == row.project_name, Secret.name == row.name, Secret.sealed == row.sealed)
                .values(sealed=sealed)
            )

        db.run(work)
        done += 1
    return done, failed


def _names(wanted: Wanted) -> list[str]:
    """The names that a reference may mean; Secrets Manager puts six characters behind the name in an ARN."""
    plain = wanted.plain_name
    names = [plain]
    if wanted.type == "SECRETS_MANAGER" and plain != wanted.name and plain[-_ARN_SUFFIX_CHARS:-6] == "-":
        names.append(plain[:-_ARN_SUFFIX_CHARS])
    found = []
    for name in names:
        try:
            found.append(canonical(name))
        except InvalidInput:
            continue
    return found


def _unsealed(row: Secret, keys: Keys) -> str:
    try:
        return keys(False).unseal(row.sealed, _context(row.project_name, row.name))
    except WrongKey as error:
        raise Unavailable(
            f"the secret {_shown(row.name)} cannot be read: {error}",
            hint=f"Add that key to the farm's keys, or set it anew: millrace secret set {_shown(row.name)}",
        ) from error
    except Unavailable as error:
        raise Unavailable(f"the secret {_shown(row.name)} cannot be read: {error.message}", hint=error.hint) from error


def _require_project(db: Database, name: str) -> None:
    with db.reading() as session:
        row = None if "\0" in name else session.get(Project, name)
        if row is None or row.deleted_ms is not None:
            raise NotFound(f"there is no project {name!r}")


def _context(owner: str, name: str) -> str:
    return f"{owner}\n{name}"


def _shown(name: str) -> str:
    return f"/{name}" if "/" in name else name


def _record(row: Secret) -> SecretRecord:
    return SecretRecord(
        name=_shown(row.name),
        project=row.project_name or None,
        version=row.version,
        description=row.description,
        created_ms=row.created_ms,
        modified_ms=row.modified_ms,
    )
