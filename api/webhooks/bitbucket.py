"""Bitbucket Cloud and Bitbucket Data Center, whose payloads have little in common (Atlassian: event payloads)."""

from typing import Any, Final

from werkzeug.datastructures import Headers

from api.webhooks import comments
from api.webhooks.payload import Payload, at, commit, ident, items, number, text
from millrace.webhook import EventKind, Heard, SourceEvent

EVENT_HEADER: Final = "X-Event-Key"
_MOST_CHANGES: Final = 100
_REQUEST: Final = {
    "pullrequest:created": EventKind.PULL_REQUEST_CREATED,
    "pullrequest:updated": EventKind.PULL_REQUEST_UPDATED,
    "pullrequest:fulfilled": EventKind.PULL_REQUEST_MERGED,
    "pullrequest:rejected": EventKind.PULL_REQUEST_CLOSED,
    "pr:opened": EventKind.PULL_REQUEST_CREATED,
    "pr:from_ref_updated": EventKind.PULL_REQUEST_UPDATED,
    "pr:merged": EventKind.PULL_REQUEST_MERGED,
    "pr:declined": EventKind.PULL_REQUEST_CLOSED,
}


def delivery_id(headers: Headers) -> str | None:
    """The delivery's own id; further attempts keep it. The first is of Cloud, the other of Data Center."""
    return headers.get("X-Request-UUID") or headers.get("X-Request-Id")


def guess(payload: Payload) -> str:
    """The event of a payload whose header is not at hand: only Data Center says it in the body."""
    if "push" in payload:
        return "repo:push"
    if "pullrequest" in payload and "comment" in payload:
        return "pullrequest:comment_created"
    if "pullrequest" in payload:
        states = {"MERGED": "pullrequest:fulfilled", "DECLINED": "pullrequest:rejected"}
        return states.get(text(payload, "pullrequest", "state") or "", "pullrequest:updated")
    return text(payload, "eventKey", most=50) or "unknown"


def heard(event: str, payload: Payload) -> Heard:
    """What a payload comes down to. One push may move several branches."""
    if event == "diagnostics:ping":
        return Heard(what="ping", ping=True)
    cloud = not event.startswith("pr:") and event != "repo:refs_changed"
    place = at(payload, "repository") if cloud else _place(event, payload)
    repository = _cloud_repository(place) if cloud else _center_repository(place)
    actor = ident(payload, "actor", "account_id") or ident(payload, "actor", "uuid") if cloud else ident(payload, "actor", "id")
    common = {**repository, "actor_id": actor}
    if event in ("repo:push", "repo:refs_changed"):
        changes = items(payload, "push", "changes") if cloud else items(payload, "changes")
        read = [(_cloud_change if cloud else _center_change)(one, payload, common) for one in changes[:_MOST_CHANGES]]
        pushes = tuple(one for one in read if isinstance(one, SourceEvent))
        why = "; ".join(one for one in read if isinstance(one, str)) or "it changes nothing"
        return Heard(what=EventKind.PUSH.value if pushes else event, events=pushes, why=why[:1000], **repository)
    if event in _COMMENT:
        return _COMMENT[event](event, payload, repository)
    if event in _EDITED:
        return Heard(what=event, why=comments.NOT_NEW, **repository)
    kind = _REQUEST.get(event)
    if kind is None:
        return Heard(what=event[:50], why=f"{event[:50]} events start no builds", **repository)
    found = (_cloud_request if cloud else _center_request)(kind, payload, common)
    if isinstance(found, str):
        return Heard(what=event, why=found, **repository)
    return Heard(what=kind.value, events=(found,), **repository)


def _place(event: str, payload: Payload) -> Any:
    return at(payload, "repository") if event == "repo:refs_changed" else at(payload, "pullRequest", "toRef", "repository")


def _cloud_repository(repository: Any) -> dict[str, Any]:
    name = text(repository, "full_name")
    return {
        "repository_id": ident(repository, "uuid"),
        "repository": name or "",
        "clone_urls": (f"https://bitbucket.org/{name}",) if name else (),
    }


def _center_repository(repository: Any) -> dict[str, Any]:
    urls = (text(one, "href", most=500) for one in items(repository, "links", "clone"))
    project, slug = text(repository, "project", "key"), text(repository, "slug")
    return {
        "repository_id": ident(repository, "id"),
        "repository": f"{project}/{slug}" if project and slug else slug or "",
        "clone_urls": tuple(url for url in urls if url),
    }


def _cloud_change(change: Any, _payload: Payload, common: dict[str, Any]) -> SourceEvent | str:
    kind, name = text(change, "new", "type", most=50), text(change, "new", "name")
    folder = "tags" if kind in ("tag", "annotated_tag") else "heads"
    sha = commit(change, "new", "target", "hash")
    if name is None or sha is None:
        old = text(change, "old", "name")
        return f"{old} was deleted" if old else "a change names no branch and no tag"
    return SourceEvent(
        kind=EventKind.PUSH,
        ref=f"refs/{folder}/{name}",
        commit=sha,
        before=commit(change, "old", "target", "hash"),
        message=text(change, "new", "target", "message", most=10_000),
        stamp=str(commit(change, "old", "target", "hash")),
        **common,
    )


def _center_change(change: Any, payload: Payload, common: dict[str, Any]) -> SourceEvent | str:
    ref = text(change, "ref", "id") or text(change, "refId")
    sha, before = commit(change, "toHash"), commit(change, "fromHash")
    if ref is None or not ref.startswith("refs/"):
        return "a change names no branch and no tag"
    if sha is None or text(change, "type", most=20) == "DELETE":
        return f"{ref} was deleted"
    told = next((one for one in (at(payload, "toCommit"), *items(payload, "commits")) if commit(one, "id") == sha), None)
    return SourceEvent(
        kind=EventKind.PUSH,
        ref=ref,
        commit=sha,
        before=before,
        message=text(told, "message", most=10_000),
        stamp=f"{before} {text(payload, 'date')}",
        **common,
    )


def _cloud_request(kind: EventKind, payload: Payload, common: dict[str, Any]) -> SourceEvent | str:
    request = at(payload, "pullrequest")
    head, base = text(request, "source", "branch", "name"), text(request, "destination", "branch", "name")
    sha, ordinal = commit(request, "source", "commit", "hash"), number(request, "id")
    merged = commit(request, "merge_commit", "hash") if kind is EventKind.PULL_REQUEST_MERGED else None
    if head is None or base is None or sha is None or ordinal is None:
        return "it names no head, no base or no number"
    source = ident(request, "source", "repository", "uuid") or text(request, "source", "repository", "full_name")
    target = ident(request, "destination", "repository", "uuid") or text(request, "destination", "repository", "full_name")
    return SourceEvent(
        kind=kind,
        ref=f"refs/heads/{head}",
        base_ref=f"refs/heads/{base}",
        commit=merged if merged and at(request, "close_source_branch") is True else sha,
        merge_commit=merged,
        title=text(request, "title"),
        pull_request=ordinal,
        from_fork=source is None or source != target,
        fork_gone=source is None,
        author=text(request, "author", "nickname") or text(request, "author", "display_name"),
        page=text(request, "links", "html", "href", most=500),
        stamp=text(request, "updated_on") or "",
        **common,
    )


def _center_request(kind: EventKind, payload: Payload, common: dict[str, Any]) -> SourceEvent | str:
    request = at(payload, "pullRequest")
    head, base = text(request, "fromRef", "id"), text(request, "toRef", "id")
    sha, ordinal = commit(request, "fromRef", "latestCommit"), number(request, "id")
    if head is None or base is None or sha is None or ordinal is None:
        return "it names no head, no base or no number"
    source = ident(request, "fromRef", "repository", "id")
    return SourceEvent(
        kind=kind,
        ref=head if head.startswith("refs/") else f"refs/heads/{head}",
        base_ref=base if base.startswith("refs/") else f"refs/heads/{base}",
        commit=sha,
        merge_commit=commit(request, "properties", "mergeCommit", "id") if kind is EventKind.PULL_REQUEST_MERGED else None,
        title=text(request, "title"),
        pull_request=ordinal,
        from_fork=source is None or source != ident(request, "toRef", "repository", "id"),
        fork_gone=source is None,
        author=text(request, "author", "user", "name"),
        page=text(request, "links", "self", 0, "href", most=500),
        stamp=ident(request, "updatedDate") or "",
        **common,
    )


def _cloud_comment(event: str, payload: Payload, repository: dict[str, Any]) -> Heard:
    comment = at(payload, "comment")
    by, actor = ident(comment, "user", "uuid"), ident(payload, "actor", "uuid")
    return comments.heard(
        event,
        text(comment, "content", "raw", most=comments.MAX_CHARS),
        pull_request=number(payload, "pullrequest", "id"),
        person_id=by if by == actor else None,
        person=text(payload, "actor", "nickname") or text(payload, "actor", "display_name"),
        comment_id=ident(comment, "id"),
        repository=repository,
    )


def _center_comment(event: str, payload: Payload, repository: dict[str, Any]) -> Heard:
    comment = at(payload, "comment")
    by, actor = ident(comment, "author", "id"), ident(payload, "actor", "id")
    return comments.heard(
        event,
        text(comment, "text", most=comments.MAX_CHARS),
        pull_request=number(payload, "pullRequest", "id"),
        person_id=by if by == actor else None,
        person=text(payload, "actor", "name"),
        comment_id=ident(comment, "id"),
        repository=repository,
    )


_COMMENT: Final = {"pullrequest:comment_created": _cloud_comment, "pr:comment:added": _center_comment}
_EDITED: Final = ("pullrequest:comment_updated", "pr:comment:edited")
