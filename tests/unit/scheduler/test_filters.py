"""Filter groups: who gets in, who does not, and that no pattern costs more than its text is long."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import InvalidInput
from millrace.webhook import EventKind, SourceEvent, WebhookSettings
from scheduler import filters


def settings(*groups: list[dict[str, Any]], **more: Any) -> WebhookSettings:
    return WebhookSettings.model_validate({"filterGroups": groups, **more})


def event(**changes: Any) -> SourceEvent:
    values: dict[str, Any] = {"kind": EventKind.PUSH, "ref": "refs/heads/main", "actor_id": "123456", "repository": "team/app"}
    return SourceEvent(**(values | changes))


def one(
    kind: str, pattern: str, *, exclude: bool = False, events: str = "PUSH, PULL_REQUEST_CREATED, RELEASED"
) -> WebhookSettings:
    return settings(
        [{"type": "EVENT", "pattern": events}, {"type": kind, "pattern": pattern, "excludeMatchedPattern": exclude}],
    )


PULL = {"kind": EventKind.PULL_REQUEST_CREATED, "ref": "refs/heads/topic", "base_ref": "refs/heads/main", "pull_request": 7}
RELEASE = {"kind": EventKind.RELEASED, "ref": "refs/tags/v1.2", "tag": "v1.2", "release": "One two"}


@pytest.mark.parametrize(
    ("kind", "pattern", "changes", "matches"),
    [
        ("HEAD_REF", "^refs/heads/main$", {}, True),
        ("HEAD_REF", "main", {"ref": "refs/heads/not-the-main-one"}, True),
        ("HEAD_REF", "^refs/heads/main$", {"ref": "refs/heads/main\nx"}, False),
        ("HEAD_REF", "^refs/tags/.*", {"ref": "refs/tags/v1"}, True),
        ("HEAD_REF", "^refs/heads/topic$", PULL, True),
        ("BASE_REF", "^refs/heads/main$", PULL, True),
        ("BASE_REF", "^refs/heads/main$", PULL | {"base_ref": "refs/heads/other"}, False),
        ("FILE_PATH", "^src/", {"paths": ("docs/a", "src/b")}, True),
        ("FILE_PATH", "^src/", {"paths": ("docs/src/b",)}, False),
        ("FILE_PATH", "^src/", {"paths": ()}, False),
        ("COMMIT_MESSAGE", r"\[build\]", {"message": "now [build] it\n\nplease"}, True),
        ("COMMIT_MESSAGE", r"\[build\]", {"message": "no"}, False),
        ("TAG_NAME", r"^v\d", RELEASE, True),
        ("RELEASE_NAME", "^One", RELEASE, True),
        ("REPOSITORY_NAME", "^app$", {}, True),
        ("REPOSITORY_NAME", "^team$", {}, False),
        ("ORGANIZATION_NAME", "^team$", {}, True),
        ("WORKFLOW_NAME", "^ci$", {"workflow": "ci"}, True),
        ("ACTOR_ACCOUNT_ID", "^(1|123456)$", {}, True),
    ],
)
def test_a_filter_passes_what_it_names_and_excluding_turns_it_round(
    kind: str, pattern: str, changes: dict[str, Any], matches: bool
) -> None:
    assert filters.decide(one(kind, pattern), event(**changes)).matched is matches
    assert filters.decide(one(kind, pattern, exclude=True), event(**changes)).matched is not matches


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("BASE_REF", {}),
        ("FILE_PATH", {"paths": None}),
        ("COMMIT_MESSAGE", {"message": None}),
        ("ACTOR_ACCOUNT_ID", {"actor_id": None}),
        ("TAG_NAME", {}),
        ("RELEASE_NAME", {}),
        ("WORKFLOW_NAME", {}),
        ("HEAD_REF", RELEASE),
        ("REPOSITORY_NAME", {"repository": ""}),
    ],
)
@pytest.mark.parametrize("exclude", [False, True])
def test_what_is_not_known_passes_no_filter(kind: str, changes: dict[str, Any], exclude: bool) -> None:
    decision = filters.decide(one(kind, ".*", exclude=exclude), event(**changes))
    assert not decision.matched
    assert "is not known" in decision.says


@pytest.mark.parametrize("pattern", ["123456", "^123456$", "(123456)", "123456|7", "^123456|^7", "(?i)123456"])
@pytest.mark.parametrize(
    "actor", ["9123456", "1234567", "91234567", "123456\n", "\n123456", "12345", "123456 ", "0123456", "١٢٣٤٥٦"]
)
def test_an_id_that_holds_a_trusted_one_is_a_stranger(pattern: str, actor: str) -> None:
    assert filters.decide(one("ACTOR_ACCOUNT_ID", pattern), event()).matched
    assert not filters.decide(one("ACTOR_ACCOUNT_ID", pattern), event(actor_id=actor)).matched


@given(st.integers(1, 10**9), st.integers(1, 10**12))
def test_an_id_passes_if_and_only_if_it_is_the_one(trusted: int, actor: int) -> None:
    for pattern in (f"{trusted}", f"^{trusted}$"):
        decision = filters.decide(one("ACTOR_ACCOUNT_ID", pattern), event(actor_id=str(actor)))
        assert decision.matched is (actor == trusted)
        assert filters.decide(one("ACTOR_ACCOUNT_ID", pattern), event(actor_id=str(trusted))).matched
        assert not filters.decide(one("ACTOR_ACCOUNT_ID", pattern), event(actor_id=f"{actor}{trusted}")).matched


def test_ids_that_are_no_numbers_are_taken_as_they_stand() -> None:
    ident = "{d301aafa-d676-4ee0-88be-962be7417567}"
    assert filters.decide(one("ACTOR_ACCOUNT_ID", ident), event(actor_id=ident)).matched
    assert not filters.decide(one("ACTOR_ACCOUNT_ID", ident), event(actor_id=f"x{ident}")).matched


def test_filters_of_a_group_are_anded_and_groups_are_ored() -> None:
    wanted = settings(
        [{"type": "EVENT", "pattern": "PUSH"}, {"type": "HEAD_REF", "pattern": "^refs/heads/main$"}],
        [{"type": "EVENT", "pattern": "PULL_REQUEST_CREATED,PULL_REQUEST_UPDATED"}, {"type": "BASE_REF", "pattern": "main"}],
    )
    assert filters.decide(wanted, event()).group == 1
    assert filters.decide(wanted, event(**PULL)).group == 2
    neither = filters.decide(wanted, event(ref="refs/heads/x"))
    assert not neither.matched
    assert neither.says == (
        "no filter group matches: group 1: HEAD_REF '^refs/heads/main$' does not match 'refs/heads/x'; "
        "group 2: EVENT 'PULL_REQUEST_CREATED,PULL_REQUEST_UPDATED' does not match 'PUSH'"
    )
    assert [[result.passed for result in group] for group in neither.groups] == [[True, False], [False, False]]


def test_without_groups_pushes_build_and_the_branch_filter_is_for_bare_names_of_branches() -> None:
    assert filters.decide(settings(), event()).matched
    assert filters.decide(settings(), event(ref="refs/tags/v1")).matched
    assert not filters.decide(settings(), event(**PULL)).matched
    only = settings(branchFilter="^main$")
    assert filters.decide(only, event()).matched
    assert not filters.decide(only, event(ref="refs/heads/other")).matched
    assert not filters.decide(only, event(ref="refs/tags/main")).matched


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*)*x", "^(([a-z])+.)+[A-Z]([a-z])+$"])
def test_a_pattern_made_to_hang_does_not(pattern: str) -> None:
    assert not filters.decide(one("COMMIT_MESSAGE", pattern), event(message="a" * 10_000 + "!")).matched


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([[{"type": "HEAD_REF", "pattern": "^x$"}]], "filterGroups.0: has no filter of type EVENT"),
        ([[{"type": "EVENT", "pattern": "PUSH,PULL_REQUEST_CREATE"}]], "did you mean PULL_REQUEST_CREATED?"),
        ([[{"type": "EVENT", "pattern": ""}]], "at least 1"),
        (
            [[{"type": "EVENT", "pattern": "PUSH"}, {"type": "HEAD_REF", "pattern": "("}]],
            "filterGroups.0.1.pattern: '(' is no regular",
        ),
        ([[{"type": "EVENT", "pattern": "PUSH"}, {"type": "HEAD_REF", "pattern": "(?!main)"}]], "invalid perl operator"),
        ([[{"type": "EVENT", "pattern": "PUSH"}, {"type": "HEAD_REF", "pattern": "x" * 257}]], "at most 256"),
        ([[{"type": "EVENT", "pattern": "PUSH"}, {"type": "HEAD_REF", "pattern": "((x{999}){999}){9}"}]], "is no regular"),
        ([[]], "at least 1"),
    ],
)
def test_wrong_filters_are_refused_with_their_place(groups: list[Any], words: str) -> None:
    with pytest.raises((InvalidInput, ValueError)) as caught:
        filters.check(settings(*groups))
    assert words in str(caught.value)


def test_patterns_that_let_in_more_than_they_say_are_pointed_out() -> None:
    assert filters.check(one("HEAD_REF", "^refs/heads/main$")) == []
    assert filters.check(one("HEAD_REF", "^(refs/heads/main|refs/heads/x)$")) == []
    assert filters.check(one("ACTOR_ACCOUNT_ID", "^(1|2)$")) == []
    assert filters.check(one("COMMIT_MESSAGE", "build")) == []
    assert "found within longer names" in filters.check(one("HEAD_REF", "main"))[0]
    assert "outer parts alone" in filters.check(one("HEAD_REF", "^a$|^b$"))[0]
    assert "more ids than it names" in filters.check(one("ACTOR_ACCOUNT_ID", "12.*"))[0]
    assert "within longer names" in filters.check(settings(branchFilter="main"))[0]


@given(st.text(max_size=40), st.text(max_size=60))
def test_any_pattern_is_taken_or_refused_and_never_breaks(pattern: str, ref: str) -> None:
    try:
        wanted = one("HEAD_REF", pattern)
        filters.check(wanted)
    except ValueError:
        return
    except InvalidInput:
        return
    filters.decide(wanted, event(ref=ref))
