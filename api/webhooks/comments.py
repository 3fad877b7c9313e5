"""Comments below pull requests: whether one approves a commit (CodeBuild: pull request comment approval)."""

import re
from typing import Final

from millrace.webhook import Heard, Wish

_APPROVES: Final = re.compile(
    r"^ {0,3}/(?:codebuild_run\([ \t]*(?P<theirs>[^()\s]{1,100})[ \t]*\)"
    r"|millrace[ \t]+approve[ \t]+(?P<ours>\S{1,100}))[ \t]*\r?$",
    re.MULTILINE,
)
_WHOLE: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
MAX_CHARS: Final = 64 * 1024
NOT_NEW: Final = "a comment approves when it is made, and not when it is edited"


def heard(
    what: str,
    body: str | None,
    *,
    pull_request: int | None,
    person_id: str | None,
    person: str | None,
    comment_id: str | None,
    repository: dict[str, object],
) -> Heard:
    """What a new comment comes down to: a wish, or why it is none.

    The commit must be whole: of two that begin alike, a stranger may show the one and push the other.
    """

    def nothing(why: str) -> Heard:
        return Heard(what=what, why=why, **repository)  # type: ignore[arg-type]  # the reader's own members

    asked = {(found["theirs"] or found["ours"]).lower() for found in _APPROVES.finditer(body or "")}
    if not asked:
        return nothing("the comment approves nothing")
    if pull_request is None:
        return nothing("the comment is not below a pull request")
    if len(asked) > 1:
        return nothing("the comment approves several commits; name one")
    (commit,) = asked
    if not _WHOLE.fullmatch(commit):
        return nothing(f"the comment approves {commit[:70]!r}; name the whole commit, 40 digits")
    if person_id is None or person is None or comment_id is None:
        return nothing("the comment does not say whose it is")
    wish = Wish(pull_request=pull_request, commit=commit, person_id=person_id, person=person, comment_id=comment_id)
    return Heard(what=what, why="", wish=wish, **repository)  # type: ignore[arg-type]  # the same
