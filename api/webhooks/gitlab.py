"""GitLab, of gitlab.com and self-managed (GitLab: webhook events)."""

from typing import Any, Final

from werkzeug.datastructures import Headers

from api.webhooks import comments
from api.webhooks.payload import Payload, at, changed_paths, commit, ident, items, number, text
from millrace.webhook import EventKind, Heard, SourceEvent

EVENT_HEADER: Final = "X-Gitlab-Event"
_REQUEST: Final = {
    "open": EventKind.PULL_REQUEST_CREATED,
    "update": EventKind.PULL_REQUEST_UPDATED,
    "reopen": EventKind.PULL_REQUEST_REOPENED,
    "merge": EventKind.PULL_REQUEST_MERGED,
    "close": EventKind.PULL_REQUEST_CLOSED,
}


def delivery_id(headers: Headers) -> str | None:
    """The delivery's own id; the first two stay the same when it is sent again, older servers have the last one only."""
    return headers.get("webhook-id") or headers.get("Idempotency-Key") or headers.get("X-Gitlab-Event-UUID")


def guess(payload: Payload) -> str:
    """The event of a payload: it says so itself, and the body is what is signed."""
    return text(payload, "object_kind", most=50) or text(payload, "event_name", most=50) or "unknown"


def heard(_event: str, payload: Payload) -> Heard:
    """What a payload comes down to."""
    event = guess(payload)
    repository = _repository(payload)
    readers = {"push": _push, "tag_push": _push, "merge_request": _merge_request, "release": _release, "build": _job}
    action = text(payload, "object_attributes", "action", most=50) or text(payload, "action", most=50) or ""
    name = f"{event} {action}".strip()
    if event == "note":
        return _note(name, payload, repository)
    if event not in readers:
        return Heard(what=name, why=f"{event} events start no builds", **repository)
    actor = ident(payload, "user_id") or ident(payload, "user", "id")
    found = readers[event](payload, {**repository, "actor_id": actor})
    if isinstance(found, str):
        return Heard(what=name, why=found, **repository)
    return Heard(what=found.kind.value, events=(found,), **repository)


def _repository(payload: Payload) -> dict[str, Any]:
    project = at(payload, "project")
    urls = (text(project, member, most=500) for member in ("git_http_url", "git_ssh_url", "web_url"))
    return {
        "repository_id": ident(project, "id") or ident(payload, "project_id"),
        "repository": text(project, "path_with_namespace") or "",
        "clone_urls": tuple(url for url in urls if url),
    }


def _note(name: str, payload: Payload, repository: dict[str, Any]) -> Heard:
    note = at(payload, "object_attributes")
    action = text(note, "action", most=50)
    made, changed = text(note, "created_at"), text(note, "updated_at")
    if action not in ("create", None) or (action is None and made != changed):  # older servers name no action
        return Heard(what=name, why=comments.NOT_NEW, **repository)
    by, author = ident(payload, "user", "id"), ident(note, "author_id")
    return comments.heard(
        name,
        text(note, "note", most=comments.MAX_CHARS),
        pull_request=number(payload, "merge_request", "iid") if text(note, "noteable_type") == "MergeRequest" else None,
        person_id=by if by == author else None,
        person=text(payload, "user", "username"),
        comment_id=ident(note, "id"),
        repository=repository,
    )


def _push(payload: Payload, common: dict[str, Any]) -> SourceEvent | str:
    ref, before, after = text(payload, "ref"), commit(payload, "before"), commit(payload, "after")
    if ref is None or not ref.startswith("refs/"):
        return "it names no branch and no tag"
    if after is None:
        return f"{ref} was deleted"
    sha = commit(payload, "checkout_sha") or after  # `after` may be the tag's own object
    commits = items(payload, "commits")
    head = next((one for one in commits if commit(one, "id") == sha), None)
    return SourceEvent(
        kind=EventKind.PUSH,
        ref=ref,
        commit=sha,
        before=before,
        message=text(head, "message", most=10_000),
        paths=changed_paths(commits) if at(payload, "total_commits_count") == len(commits) else None,  # at most 20 are told
        stamp=str(before),
        **common,
    )


def _merge_request(payload: Payload, common: dict[str, Any]) -> SourceEvent | str:
    request = at(payload, "object_attributes")
    action = text(request, "action", most=50)
    kind = _REQUEST.get(action or "")
    if kind is None:
        return f"the action {action} starts no builds"
    if kind is EventKind.PULL_REQUEST_UPDATED and commit(request, "oldrev") is None:
        return "the merge request was edited, and has no new commit"
    head, base, ordinal = text(request, "source_branch"), text(request, "target_branch"), number(request, "iid")
    sha = commit(request, "last_commit", "id")
    if head is None or base is None or sha is None or ordinal is None:
        return "it names no head, no base or no number"
    source = ident(request, "source_project_id")
    merged = kind is EventKind.PULL_REQUEST_MERGED
    return SourceEvent(
        kind=kind,
        ref=f"refs/heads/{head}",
        base_ref=f"refs/heads/{base}",
        commit=sha,
        before=commit(request, "oldrev"),
        merge_commit=(commit(request, "merge_commit_sha") or commit(request, "squash_commit_sha")) if merged else None,
        message=text(request, "last_commit", "message", most=10_000),
        title=text(request, "title"),
        pull_request=ordinal,
        from_fork=source is None or source != ident(request, "target_project_id"),
        fork_gone=source is None,
        author=_author(payload, request),
        page=text(request, "url", most=500),
        stamp=text(request, "updated_at") or "",
        **common,
    )


def _author(payload: Payload, request: Any) -> str | None:
    """Who made the merge request; of others than who sends the event, only the number is told."""
    author = ident(request, "author_id")
    return text(payload, "user", "username") if author == ident(payload, "user", "id") else author and f"user {author}"


def _release(payload: Payload, common: dict[str, Any]) -> SourceEvent | str:
    action, tag = text(payload, "action", most=50), text(payload, "tag")
    if action not in ("create", "update"):
        return f"the action {action} starts no builds"
    if tag is None:
        return "it names no tag"
    return SourceEvent(
        kind=EventKind.RELEASED,
        ref=f"refs/tags/{tag}",
        commit=commit(payload, "commit", "id"),
        message=text(payload, "commit", "message", most=10_000),
        tag=tag,
        release=text(payload, "name") or tag,
        stamp=f"{ident(payload, 'id')} {text(payload, 'released_at')}",
        **common,
    )


def _job(payload: Payload, common: dict[str, Any]) -> SourceEvent | str:
    status = text(payload, "build_status", most=50)
    if status not in ("created", "pending"):
        return f"a job that is {status} starts no builds"
    ref = text(payload, "ref")
    folder = "tags" if at(payload, "tag") is True else "heads"
    return SourceEvent(
        kind=EventKind.WORKFLOW_JOB_QUEUED,
        ref=f"refs/{folder}/{ref}" if ref else None,
        commit=commit(payload, "sha"),
        workflow=text(payload, "build_name"),
        stamp=ident(payload, "build_id") or "",
        **common,
    )
