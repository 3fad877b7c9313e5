"""GitHub and GitHub Enterprise (GitHub: webhook events and payloads)."""

from typing import Any, Final

from werkzeug.datastructures import Headers

from api.webhooks import comments
from api.webhooks.payload import Payload, at, changed_paths, commit, ident, items, number, text
from millrace.webhook import EventKind, Heard, SourceEvent

EVENT_HEADER: Final = "X-GitHub-Event"
_COMMITS_TOLD: Final = 2048
"""GitHub tells of so many commits of a push, and says nothing of the rest."""
_PULL_REQUEST: Final = {
    "opened": EventKind.PULL_REQUEST_CREATED,
    "synchronize": EventKind.PULL_REQUEST_UPDATED,
    "reopened": EventKind.PULL_REQUEST_REOPENED,
}
_RELEASE: Final = {"released": EventKind.RELEASED, "prereleased": EventKind.PRERELEASED}


def delivery_id(headers: Headers) -> str | None:
    """The delivery's own id; a delivery that is sent again keeps it."""
    return headers.get("X-GitHub-Delivery")


def guess(payload: Payload) -> str:
    """The event of a payload whose header is not at hand."""
    for member, name in (
        ("workflow_job", "workflow_job"),
        ("release", "release"),
        ("comment", "issue_comment"),
        ("pull_request", "pull_request"),
        ("zen", "ping"),
    ):
        if member in payload:
            return name
    return "push" if "after" in payload else "unknown"


def heard(event: str, payload: Payload) -> Heard:
    """What a payload comes down to."""
    repository = _repository(payload)
    name = f"{event} {text(payload, 'action', most=50) or ''}".strip()
    if event == "ping":
        return Heard(what="ping", ping=True, **repository)
    if event == "issue_comment":
        return _comment(name, payload, repository)
    reader = {"push": _push, "pull_request": _pull_request, "release": _release, "workflow_job": _workflow_job}.get(event)
    if reader is None:
        return Heard(what=name, why=f"{event} events start no builds", **repository)
    found = reader(payload, {**repository, "actor_id": ident(payload, "sender", "id")})
    if isinstance(found, str):
        return Heard(what=name, why=found, **repository)
    return Heard(what=found.kind.value, events=(found,), **repository)


def _repository(payload: Payload) -> dict[str, Any]:
    urls = (text(payload, "repository", member, most=500) for member in ("clone_url", "ssh_url", "html_url"))
    return {
        "repository_id": ident(payload, "repository", "id"),
        "repository": text(payload, "repository", "full_name") or "",
        "clone_urls": tuple(url for url in urls if url),
    }


def _comment(name: str, payload: Payload, repository: dict[str, Any]) -> Heard:
    action, comment = text(payload, "action", most=50), at(payload, "comment")
    if action != "created":
        return Heard(
            what=name, why=comments.NOT_NEW if action == "edited" else f"the action {action} approves nothing", **repository
        )
    by, sender = ident(comment, "user", "id"), ident(payload, "sender", "id")
    return comments.heard(
        name,
        text(comment, "body", most=comments.MAX_CHARS),
        pull_request=number(payload, "issue", "number") if at(payload, "issue", "pull_request") else None,
        person_id=by if by == sender else None,
        person=text(comment, "user", "login"),
        comment_id=ident(comment, "id"),
        repository=repository,
    )


def _push(payload: Payload, common: dict[str, Any]) -> SourceEvent | str:
    ref = text(payload, "ref")
    if ref is None or not ref.startswith("refs/"):
        return "it names no branch and no tag"
    after = commit(payload, "after")
    if at(payload, "deleted") is True or after is None:
        return f"{ref} was deleted"
    head = commit(payload, "head_commit", "id") if ref.startswith("refs/tags/") else None  # `after` may be the tag's own object
    commits = items(payload, "commits")
    return SourceEvent(
        kind=EventKind.PUSH,
        ref=ref,
        commit=head or after,
        before=commit(payload, "before"),
        message=text(payload, "head_commit", "message", most=10_000),
        paths=changed_paths(commits) if len(commits) < _COMMITS_TOLD else None,
        stamp=f"{commit(payload, 'before')} {ident(payload, 'repository', 'pushed_at')}",
        **common,
    )


def _pull_request(payload: Payload, common: dict[str, Any]) -> SourceEvent | str:
    action, request = text(payload, "action", most=50), at(payload, "pull_request")
    kind = _PULL_REQUEST.get(action or "")
    if action == "closed":
        kind = EventKind.PULL_REQUEST_MERGED if at(request, "merged") is True else EventKind.PULL_REQUEST_CLOSED
    if kind is None:
        return f"the action {action} starts no builds"
    head, base, ordinal = text(request, "head", "ref"), text(request, "base", "ref"), number(request, "number")
    sha = commit(request, "head", "sha")
    if head is None or base is None or sha is None or ordinal is None:
        return "it names no head, no base or no number"
    source = ident(request, "head", "repo", "id")
    return SourceEvent(
        kind=kind,
        ref=f"refs/heads/{head}",
        base_ref=f"refs/heads/{base}",
        commit=sha,
        merge_commit=commit(request, "merge_commit_sha") if kind is EventKind.PULL_REQUEST_MERGED else None,
        title=text(request, "title"),
        pull_request=ordinal,
        from_fork=source is None or source != ident(request, "base", "repo", "id"),
        fork_gone=source is None,
        author=text(request, "user", "login"),
        page=text(request, "html_url", most=500),
        stamp=text(request, "updated_at") or "",
        **common,
    )


def _release(payload: Payload, common: dict[str, Any]) -> SourceEvent | str:
    action, release = text(payload, "action", most=50), at(payload, "release")
    kind, tag = _RELEASE.get(action or ""), text(release, "tag_name")
    if kind is None:
        return f"the action {action} starts no builds"
    if tag is None:
        return "it names no tag"
    return SourceEvent(
        kind=kind,
        ref=f"refs/tags/{tag}",
        tag=tag,
        release=text(release, "name") or tag,
        stamp=f"{ident(release, 'id')} {text(release, 'published_at')}",
        **common,
    )


def _workflow_job(payload: Payload, common: dict[str, Any]) -> SourceEvent | str:
    action, job = text(payload, "action", most=50), at(payload, "workflow_job")
    if action != "queued":
        return f"the action {action} starts no builds"
    branch = text(job, "head_branch")
    return SourceEvent(
        kind=EventKind.WORKFLOW_JOB_QUEUED,
        ref=f"refs/heads/{branch}" if branch else None,
        commit=commit(job, "head_sha"),
        workflow=text(job, "workflow_name"),
        stamp=ident(job, "id") or "",
        **common,
    )
