"""The build images: what they are called, which names stand for them, which runtimes they have. Pure; `make` makes them."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final

LABEL_RUNTIMES: Final = "millrace.runtimes"
"""An image's own word on its runtimes: JSON, runtime -> list of versions. Any image may carry it."""
LABEL_RECIPE: Final = "millrace.recipe"
NAMES: Final = ("base", "standard")
"""In the order in which they are made: each is the parent of the next."""
_HERE: Final = Path(__file__).parent


@cache
def tag_of(name: str) -> str:
    """The tag of an image, by a hash of its recipe and of its parent's: an unchanged recipe keeps its tag."""
    position = NAMES.index(name)
    recipe = hashlib.sha256()
    if position:
        recipe.update(tag_of(NAMES[position - 1]).encode())
    for file in sorted((_HERE / name).iterdir()):
        if file.is_file():
            recipe.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return f"millrace/{name}:{recipe.hexdigest()[:12]}"


@cache
def _aliases() -> Mapping[str, str]:
    aliases: dict[str, str] = json.loads((_HERE / "aliases.json").read_text())
    return aliases


def resolve_alias(image: str) -> str:
    """Our image for one of CodeBuild's curated names (`aws/codebuild/standard:7.0`); any other name as it is."""
    name = image.partition("@")[0]
    repository = name.rpartition(":")[0] if ":" in name.rpartition("/")[2] else name
    return _aliases().get(repository, image)


def runtimes_from_labels(labels: Mapping[str, str]) -> Mapping[str, tuple[str, ...]] | None:
    """What an image declares: runtime -> versions; None where it declares nothing, or nothing that can be read."""
    try:
        declared = json.loads(labels[LABEL_RUNTIMES])
    except (KeyError, ValueError, RecursionError):
        return None
    if not isinstance(declared, dict) or not all(_is_versions(versions) for versions in declared.values()):
        return None
    return {runtime: tuple(versions) for runtime, versions in declared.items()}


def _is_versions(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(version, str) for version in value)


_SPELLINGS: Final = {"node": "nodejs", "go": "golang", "corretto": "java", "openjdk": "java"}
_PREFIXES: Final = {"java": ("corretto", "openjdk"), "nodejs": ("v",)}


def resolve_runtimes(
    declared: Mapping[str, Sequence[str]], asked: Mapping[str, str], *, image: str
) -> tuple[dict[str, str], list[str]]:
    """The version of each runtime that was asked for, and what cannot be had, in sentences.

    Asked may be exact to any depth (`3`, `3.11`, `3.11.2`), `3.x`, `latest`, or `corretto17` (CodeBuild: runtime versions).
    """
    chosen: dict[str, str] = {}
    problems: list[str] = []
    for runtime, version in asked.items():
        versions = declared.get(runtime)
        if versions is None:
            meant = {other: real for other, real in _SPELLINGS.items() if real in declared} | {name: name for name in declared}
            close = difflib.get_close_matches(runtime, meant, n=1)
            hint = f"; did you mean {meant[close[0]]}?" if close else ""
            problems.append(f"Unknown runtime named '{runtime}'. Image {image} has {', '.join(sorted(declared))}{hint}")
            continue
        match = next((v for v in sorted(versions, key=_order, reverse=True) if _fits(runtime, v, version)), None)
        if match is None:
            problems.append(
                f"Unknown runtime version named '{version}' of {runtime}. Image {image} has {runtime} {', '.join(versions)}"
            )
        else:
            chosen[runtime] = match
    return chosen, problems


def _order(version: str) -> list[tuple[int, str]]:
    """For sorting by number. Digits stay text: a foreign label may hold more of them than `int` takes."""
    parts = [part.lstrip("0") for part in re.findall(r"[0-9]+", version)]
    return [(len(part), part) for part in parts]


def _fits(runtime: str, version: str, asked: str) -> bool:
    plain = asked.strip().lower()
    for prefix in _PREFIXES.get(runtime, ()):
        plain = plain.removeprefix(prefix)
    if plain == "latest":
        return True
    wanted = plain.removesuffix(".x")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", wanted):
        return False
    return f"{version}.".startswith(f"{wanted}.")
