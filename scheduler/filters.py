"""Which events start builds (CodeBuild: filter groups). Pure: groups are or-ed, the filters of one are and-ed.

The patterns are searched for, as CodeBuild documents it, but for ACTOR_ACCOUNT_ID, which compares whole ids: a search for `123`
finds the stranger `91234`, too. They are RE2's, whose time is linear in the text, whatever the pattern. What is not known passes
no filter, whichever way round: that somebody did not change a file is not to be taken from a list that is cut off.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import re2

from millrace.errors import FieldProblem, InvalidInput
from millrace.webhook import EventKind, FilterType, SourceEvent, WebhookFilter, WebhookSettings

_SHOWN_CHARS: Final = 200
_KIND_OF_VALUE: Final[Mapping[FilterType, str]] = {
    FilterType.BASE_REF: "the base branch of a pull request",
    FilterType.HEAD_REF: "the branch or tag",
    FilterType.ACTOR_ACCOUNT_ID: "who did it",
    FilterType.FILE_PATH: "the list of changed files",
    FilterType.COMMIT_MESSAGE: "the message of the head commit",
    FilterType.WORKFLOW_NAME: "the workflow's name",
    FilterType.TAG_NAME: "the tag of a release",
    FilterType.RELEASE_NAME: "the name of a release",
    FilterType.REPOSITORY_NAME: "the repository's name",
    FilterType.ORGANIZATION_NAME: "the organization's name",
}


@dataclass(frozen=True, kw_only=True)
class FilterResult:
    """What became of one filter. `says` is for people."""

    filter: WebhookFilter
    passed: bool
    says: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What became of all of them. `group` counts the matching group from 1; None where none matches, or there are none."""

    matched: bool
    group: int | None
    groups: tuple[tuple[FilterResult, ...], ...]
    says: str


def decide(settings: WebhookSettings, event: SourceEvent) -> Decision:
    """Whether `event` starts a build."""
    if not settings.filter_groups:
        return _without_groups(settings, event)
    groups = tuple(tuple(_apply(one, event) for one in group) for group in settings.filter_groups)
    for number, group in enumerate(groups, 1):
        if all(result.passed for result in group):
            return Decision(matched=True, group=number, groups=groups, says=f"filter group {number} matches")
    first = [next(result.says for result in group if not result.passed) for group in groups]
    says = "no filter group matches: " + "; ".join(f"group {number}: {why}" for number, why in enumerate(first, 1))
    return Decision(matched=False, group=None, groups=groups, says=says)


def check(settings: WebhookSettings) -> list[str]:
    """What is odd about the filters, for people. Raises InvalidInput that names everything that is wrong with them."""
    problems, warnings = [], []
    if settings.branch_filter is not None:
        if settings.filter_groups:
            problems.append(FieldProblem(field="branchFilter", what="stands beside filterGroups; give one of them"))
        problems += _wrong_pattern("branchFilter", settings.branch_filter)
        warnings += _warnings("branchFilter", settings.branch_filter)
    for g, group in enumerate(settings.filter_groups):
        if not any(one.type is FilterType.EVENT for one in group):
            problems.append(FieldProblem(field=f"filterGroups.{g}", what="has no filter of type EVENT, which each group needs"))
        for f, one in enumerate(group):
            where = f"filterGroups.{g}.{f}.pattern"
            if one.type is FilterType.EVENT:
                problems += _wrong_events(where, one)
                continue
            problems += _wrong_pattern(where, one.pattern)
            if one.type is not FilterType.COMMIT_MESSAGE:
                warnings += _warnings(where, one.pattern, ids=one.type is FilterType.ACTOR_ACCOUNT_ID)
    if problems:
        raise InvalidInput(
            "; ".join(f"{one.field}: {one.what}" for one in problems[:5]), hint="docs/webhooks.md has examples.", fields=problems
        )
    return warnings


def _without_groups(settings: WebhookSettings, event: SourceEvent) -> Decision:
    if event.kind is not EventKind.PUSH:
        return _plain(False, f"without filter groups, only pushes start builds, and this is {event.kind}")
    if settings.branch_filter is None:
        return _plain(True, "there are no filters, and so every push starts a build")
    if event.branch is None:
        return _plain(False, f"the branchFilter is for branches, and this is {_shown(event.ref or 'no ref')}")
    found = _compiled(settings.branch_filter).search(event.branch) is not None
    verb = "matches" if found else "does not match"
    return _plain(found, f"the branchFilter {_shown(settings.branch_filter)} {verb} {_shown(event.branch)}")


def _plain(matched: bool, says: str) -> Decision:
    return Decision(matched=matched, group=None, groups=(), says=says)


def _apply(one: WebhookFilter, event: SourceEvent) -> FilterResult:
    if one.type is FilterType.EVENT:
        found = event.kind.value in _events(one)
        return _result(one, found, event.kind.value)
    values = _values(one.type, event)
    if values is None:
        return FilterResult(filter=one, passed=False, says=f"{one.type}: {_KIND_OF_VALUE[one.type]} is not known")
    pattern = _compiled(one.pattern)
    if one.type is FilterType.ACTOR_ACCOUNT_ID:
        matching = [value for value in values if value == one.pattern or pattern.fullmatch(value)]
    else:
        matching = [value for value in values if pattern.search(value)]
    shown = matching[0] if matching else values[0] if len(values) == 1 else f"any of {len(values)} files"
    return _result(one, bool(matching), shown)


def _result(one: WebhookFilter, found: bool, value: str) -> FilterResult:
    verb = "matches" if found else "does not match"
    excluding = ", which excludes it" if one.exclude_matched_pattern and found else ""
    says = f"{one.type} {_shown(one.pattern)} {verb} {_shown(value)}{excluding}"
    return FilterResult(filter=one, passed=found is not one.exclude_matched_pattern, says=says)


def _values(kind: FilterType, event: SourceEvent) -> Sequence[str] | None:
    """What the pattern is searched for in; None where it is not known, or the event has no such thing."""
    if kind is FilterType.FILE_PATH:
        return event.paths
    owner, _, name = event.repository.rpartition("/")
    value = {
        FilterType.BASE_REF: event.base_ref,
        FilterType.HEAD_REF: event.ref if event.tag is None else None,
        FilterType.ACTOR_ACCOUNT_ID: event.actor_id,
        FilterType.COMMIT_MESSAGE: event.message,
        FilterType.WORKFLOW_NAME: event.workflow,
        FilterType.TAG_NAME: event.tag,
        FilterType.RELEASE_NAME: event.release,
        FilterType.REPOSITORY_NAME: name,
        FilterType.ORGANIZATION_NAME: owner,
    }[kind]
    return [value] if value else None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    return re2.compile(pattern, options)


def _wrong_pattern(where: str, pattern: str) -> list[FieldProblem]:
    try:
        _compiled(pattern)
    except re2.error as error:
        why = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
        return [FieldProblem(field=where, what=f"{_shown(pattern)} is no regular expression of RE2: {why}")]
    return []


def _warnings(where: str, pattern: str, *, ids: bool = False) -> list[str]:
    if ids:
        odd = any(char in pattern for char in "*+.?[\\")
        return [f"{where}: {_shown(pattern)} matches more ids than it names; list them: ^(123|456)$"] if odd else []
    begins, ends = pattern.startswith(("^", "\\A")), pattern.endswith(("$", "\\z"))
    if "|" in pattern and not pattern.startswith("^(") and begins and ends:
        return [f"{where}: in {_shown(pattern)} the ^ and $ hold for the outer parts alone; write ^(a|b)$"]
    if begins and ends:
        return []
    return [f"{where}: {_shown(pattern)} is searched for, and so found within longer names, too; ^ and $ hold it to whole ones"]


def _wrong_events(where: str, one: WebhookFilter) -> list[FieldProblem]:
    wrong = []
    for name in _events(one):
        if name in EventKind.__members__:
            continue
        close = difflib.get_close_matches(name, list(EventKind), n=1)
        guess = f"did you mean {close[0]}?" if close else f"known: {', '.join(EventKind)}"
        wrong.append(FieldProblem(field=where, what=f"{_shown(name)} is no event; {guess}"))
    return wrong


def _events(one: WebhookFilter) -> list[str]:
    """The events of an EVENT filter: a list with commas, blanks allowed."""
    return [name.strip() for name in one.pattern.split(",")]


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")
