"""Where the values of `PARAMETER_STORE` and `SECRETS_MANAGER` variables come from: one small interface, three stores behind it.

The farm's own store is `scheduler.secrets`, since it lies in the records; AWS and Vault are here. Values leave a store for the
attempt that asks, and for nobody else.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Protocol

from millrace.contract import SecretReference
from millrace.errors import SecretUnavailable
from millrace.secrets.reference import BadReference, Wanted, read

_AT_ONCE: Final = 8
_SHOWN_CHARS: Final = 120


@dataclass(frozen=True)
class Refusal:
    """A store's no: `why` is said of the name that was asked for, and holds nothing of a value."""

    why: str


class SecretProvider(Protocol):
    """A store of secrets. Safe from several threads."""

    def fetch(self, project: str, wanted: Collection[Wanted]) -> Mapping[Wanted, str | Refusal]:
        """An answer to each that is wanted by a build of `project`. Raises Unavailable where the store is away."""


def values_of(
    provider: SecretProvider, project: str, references: Sequence[SecretReference], *, allowed: Iterable[str] = ("*",)
) -> dict[str, str]:
    """The values by variable name, of all or none.

    `allowed` are patterns of the names that may be asked for, in which `{project}` stands for the project's name. Raises
    SecretUnavailable that names all that cannot be had, and Unavailable.
    """
    patterns = [pattern.replace("{project}", project) for pattern in allowed]
    asked: dict[str, tuple[Wanted, str, str]] = {}
    refused: dict[str, list[str]] = {}

    def refuse(why: str, name: str) -> None:
        shown = name if len(name) <= _SHOWN_CHARS else f"{name[:_SHOWN_CHARS]}..."
        if shown not in refused.setdefault(why, []):
            refused[why].append(shown)

    for one in references:
        try:
            wanted, key = read(one)
        except BadReference as error:
            refuse(str(error), one.value)
            continue
        if any(fnmatchcase(wanted.plain_name, pattern) for pattern in patterns):
            asked[one.name] = wanted, key, one.value
        else:
            refuse(f"project {project} may not ask for the {wanted.noun}", one.value)
    answers = provider.fetch(project, {wanted for wanted, _, _ in asked.values()}) if asked else {}
    values: dict[str, str] = {}
    for name, (wanted, key, text) in asked.items():
        answer = answers[wanted]
        picked = _pick(answer, key) if isinstance(answer, str) else answer
        if isinstance(picked, Refusal):
            refuse(picked.why, text)
        else:
            values[name] = picked
    if refused:
        raise SecretUnavailable("; ".join(f"{why}: {', '.join(names)}" for why, names in refused.items()))
    return values


def each(wanted: Collection[Wanted], ask: Callable[[Wanted], str | Refusal]) -> dict[Wanted, str | Refusal]:
    """An answer to each, asked for a few at once: a worker that waits for two hundred must not give up."""
    if not wanted:
        return {}
    with ThreadPoolExecutor(min(_AT_ONCE, len(wanted))) as pool:
        return dict(zip(wanted, pool.map(ask, wanted), strict=True))


def _pick(text: str, key: str) -> str | Refusal:
    """What a variable is given: the whole secret, or the value of one key of its JSON."""
    if key:
        try:
            members = json.loads(text)
        except (ValueError, RecursionError):
            return Refusal("secret is not JSON, and so has no key")
        if not isinstance(members, dict):
            return Refusal("secret is JSON, but no object, and so has no key")
        if key not in members:
            return Refusal("secret has no key")
        value = members[key]
        text = value if isinstance(value, str) else json.dumps(value)
    if "\0" in text:
        return Refusal("value has a NUL, which no variable can hold")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Refusal("value is no text")
    return text
