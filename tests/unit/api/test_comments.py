"""Which comments approve a commit, as each git server tells of them."""

from typing import Any

import pytest

from api.webhooks.routes import read
from millrace.webhook import Provider, Wish
from tests.support.webhooks import SHA, a_comment, examples

PROVIDERS = {"github": Provider.GITHUB, "gitlab": Provider.GITLAB, "cloud": Provider.BITBUCKET, "center": Provider.BITBUCKET}
WHO: dict[str, tuple[Any, str]] = {name: ("{7}" if name == "cloud" else 7, "mona") for name in PROVIDERS}


def wish(provider: str, body: str, **changes: Any) -> Wish | str:
    """What a comment comes down to: a wish, or why it is none."""
    event, payload = a_comment(provider, body, by=WHO[provider], **changes)
    heard = read(PROVIDERS[provider], payload, event)
    assert heard.events == ()
    return heard.wish or heard.why


@pytest.mark.parametrize("provider", PROVIDERS)
def test_both_forms_approve_a_whole_commit_below_a_pull_request(provider: str) -> None:
    person = str(WHO[provider][0])
    expected = Wish(pull_request=2, commit=SHA, person_id=person, person="mona", comment_id="501")
    for body in (
        f"/codebuild_run({SHA})",
        f"/millrace approve {SHA}",
        f"Looks good.\r\n\r\n/millrace approve  {SHA.upper()} \r\n",
    ):
        assert wish(provider, body) == expected, body


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("", "approves nothing"),
        ("Nice work!", "approves nothing"),
        (f"> /millrace approve {SHA}", "approves nothing"),
        (f"please say /codebuild_run({SHA})", "approves nothing"),
        (f"/codebuild_run({SHA}) now", "approves nothing"),
        (f"     /codebuild_run({SHA})", "approves nothing"),
        ("/millrace approve", "approves nothing"),
        ("/codebuild_run()", "approves nothing"),
        (f"/millrace approve {SHA[:12]}", "name the whole commit"),
        ("/millrace approve main", "name the whole commit"),
        (f"/millrace approve {SHA}0", "name the whole commit"),
        (f"/millrace approve {SHA}\n/millrace approve {'a' * 40}", "several commits"),
    ],
)
def test_anything_else_approves_nothing_and_says_why(body: str, why: str) -> None:
    for provider in PROVIDERS:
        assert why in str(wish(provider, body)), provider


def test_a_comment_counts_when_it_is_made_and_not_when_it_is_edited() -> None:
    body = f"/millrace approve {SHA}"
    assert "not when it is edited" in str(wish("github", body, action="edited"))
    assert "approves nothing" in str(wish("github", body, action="deleted"))
    _event, payload = a_comment("gitlab", body)
    for change in ({"action": "update"}, {"action": None, "updated_at": "2026-07-02 10:00:00 UTC"}):
        assert "not when it is edited" in str(wish("gitlab", body, object_attributes={**payload["object_attributes"], **change}))
    older = {**payload["object_attributes"], "action": None}
    assert isinstance(wish("gitlab", body, object_attributes=older), Wish)
    for provider, event in (("cloud", "pullrequest:comment_updated"), ("center", "pr:comment:edited")):
        _name, payload = a_comment(provider, body, by=WHO[provider])
        assert "not when it is edited" in read(PROVIDERS[provider], payload, event).why


def test_a_comment_that_is_not_below_a_pull_request_or_not_the_senders_approves_nothing() -> None:
    body = f"/millrace approve {SHA}"
    assert "not below a pull request" in str(wish("github", body, issue={"number": 2}))
    _event, payload = a_comment("gitlab", body)
    commit = {**payload["object_attributes"], "noteable_type": "Commit"}
    assert "not below a pull request" in str(wish("gitlab", body, object_attributes=commit))
    assert "does not say whose" in str(wish("github", body, sender={"id": 8}))
    assert "does not say whose" in str(wish("gitlab", body, user={"id": 8, "username": "other"}))
    assert "does not say whose" in str(wish("cloud", body, actor={"uuid": "{8}", "nickname": "other"}))
    assert "does not say whose" in str(wish("center", body, actor={"id": 8, "name": "other"}))


def test_githubs_own_example_of_a_comment_approves_once_it_is_below_a_pull_request_and_says_so() -> None:
    payload = next(one["payload"] for one in examples() if one["event"] == "issue_comment")
    comment = {**payload["comment"], "body": f"/codebuild_run({SHA})"}
    heard = read(Provider.GITHUB, {**payload, "comment": comment, "issue": {**payload["issue"], "pull_request": {}}}, None)
    assert heard.why == "the comment is not below a pull request"  # an empty object is none
    request = {"url": "https://api.github.com/repos/Codertocat/Hello-World/pulls/1"}
    heard = read(Provider.GITHUB, {**payload, "comment": comment, "issue": {**payload["issue"], "pull_request": request}}, None)
    assert heard.wish is not None
    assert (heard.wish.commit, heard.wish.person, heard.repository_id) == (SHA, comment["user"]["login"], "186853002")
