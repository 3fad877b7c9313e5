"""Webhooks in CodeBuild's shapes (CodeBuild: CreateWebhook, WebhookFilter), and what a git server's event comes down to."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints, field_validator

from millrace.project import Shape
from millrace.vocabulary import SourceType


class EventKind(StrEnum):
    """The events that a filter may name (CodeBuild: WebhookFilter, EVENT)."""

    PUSH = "PUSH"
    PULL_REQUEST_CREATED = "PULL_REQUEST_CREATED"
    PULL_REQUEST_UPDATED = "PULL_REQUEST_UPDATED"
    PULL_REQUEST_REOPENED = "PULL_REQUEST_REOPENED"
    PULL_REQUEST_MERGED = "PULL_REQUEST_MERGED"
    PULL_REQUEST_CLOSED = "PULL_REQUEST_CLOSED"
    RELEASED = "RELEASED"
    PRERELEASED = "PRERELEASED"
    WORKFLOW_JOB_QUEUED = "WORKFLOW_JOB_QUEUED"


class FilterType(StrEnum):
    """CodeBuild: WebhookFilter, type."""

    EVENT = "EVENT"
    BASE_REF = "BASE_REF"
    HEAD_REF = "HEAD_REF"
    ACTOR_ACCOUNT_ID = "ACTOR_ACCOUNT_ID"
    FILE_PATH = "FILE_PATH"
    COMMIT_MESSAGE = "COMMIT_MESSAGE"
    WORKFLOW_NAME = "WORKFLOW_NAME"
    TAG_NAME = "TAG_NAME"
    RELEASE_NAME = "RELEASE_NAME"
    REPOSITORY_NAME = "REPOSITORY_NAME"
    ORGANIZATION_NAME = "ORGANIZATION_NAME"


class Provider(StrEnum):
    """Whose webhooks we read. GIT is any server that has our `post-receive` script."""

    GITHUB = "github"
    BITBUCKET = "bitbucket"
    GITLAB = "gitlab"
    GIT = "git"


PROVIDERS: Final = {
    SourceType.GITHUB: Provider.GITHUB,
    SourceType.GITHUB_ENTERPRISE: Provider.GITHUB,
    SourceType.BITBUCKET: Provider.BITBUCKET,
    SourceType.GITLAB: Provider.GITLAB,
    SourceType.GITLAB_SELF_MANAGED: Provider.GITLAB,
    SourceType.CODECOMMIT: Provider.GIT,
    SourceType.GIT: Provider.GIT,
}
"""Who sends the webhooks of a source of this type."""

MAX_PATTERN_CHARS: Final = 256
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PATTERN_CHARS)]


class WebhookFilter(Shape):
    """CodeBuild: WebhookFilter. `pattern` of EVENT is a list, of others a regular expression that is searched for."""

    type: FilterType
    pattern: Pattern
    exclude_matched_pattern: bool = False

    @field_validator("pattern")
    @classmethod
    def _pattern_is_plain(cls, pattern: str) -> str:
        if "\x00" in pattern or any(0xD800 <= ord(char) <= 0xDFFF for char in pattern):
            raise ValueError("has a NUL or a lone surrogate, which no name has")
        return pattern


class PullRequestBuildPolicy(Shape):
    """CodeBuild: PullRequestBuildPolicy. Which pull requests wait until somebody approves them."""

    requires_comment_approval: Literal["DISABLED", "ALL_PULL_REQUESTS", "FORK_PULL_REQUESTS"]
    approver_roles: tuple[str, ...] = ()


FilterGroups = Annotated[
    tuple[Annotated[tuple[WebhookFilter, ...], Field(min_length=1, max_length=20)], ...], Field(max_length=50)
]


class WebhookFarm(Shape):
    """What CodeBuild does not have. How pull requests from forks are built, once they may be: with the buildspec of the branch
    that they shall go into (`base`) or with their own (`head`); and in which fleet, where it is not the project's.
    """

    fork_buildspec: Literal["base", "head"] = "base"
    fork_fleet: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = None


class WebhookSettings(Shape):
    """What starts builds. Without filters every push does; `branch_filter` is the older form, on bare names of branches."""

    branch_filter: Annotated[str, StringConstraints(max_length=MAX_PATTERN_CHARS)] | None = None
    filter_groups: FilterGroups = ()
    build_type: Literal["BUILD"] = "BUILD"
    manual_creation: bool = True
    pull_request_build_policy: PullRequestBuildPolicy = PullRequestBuildPolicy(requires_comment_approval="FORK_PULL_REQUESTS")
    millrace: WebhookFarm = WebhookFarm()

    @field_validator("branch_filter")
    @classmethod
    def _none_is_empty(cls, value: str | None) -> str | None:
        return value or None


@dataclass(frozen=True, kw_only=True)
class SourceEvent:
    """One thing that happened in a repository, whoever told it. None: not known.

    `ref` is `refs/heads/...` or `refs/tags/...`, of a pull request that of its head. `paths` are those that changed. `stamp`
    tells it from a later event that is the same in all else. `fork_gone`: the repository of the head is no more. `author` made
    the pull request, `page` is its address for people.
    """

    kind: EventKind
    repository_id: str | None = None
    repository: str = ""
    clone_urls: tuple[str, ...] = ()
    ref: str | None = None
    base_ref: str | None = None
    commit: str | None = None
    before: str | None = None
    merge_commit: str | None = None
    actor_id: str | None = None
    message: str | None = None
    title: str | None = None
    paths: tuple[str, ...] | None = None
    pull_request: int | None = None
    from_fork: bool = False
    fork_gone: bool = False
    author: str | None = None
    page: str | None = None
    tag: str | None = None
    release: str | None = None
    workflow: str | None = None
    stamp: str = ""

    @property
    def branch(self) -> str | None:
        """The bare name of the branch, where it is one."""
        return self.ref.removeprefix("refs/heads/") if self.ref and self.ref.startswith("refs/heads/") else None

    @property
    def trigger(self) -> str:
        """CODEBUILD_WEBHOOK_TRIGGER: `pr/N`, `branch/NAME` or `tag/NAME`."""
        if self.pull_request is not None:
            return f"pr/{self.pull_request}"
        if self.branch is not None:
            return f"branch/{self.branch}"
        return f"tag/{(self.ref or '').removeprefix('refs/tags/')}"

    @property
    def place(self) -> str | None:
        """What deliveries are listed by: the pull request, or the branch or tag in full."""
        return f"pr/{self.pull_request}" if self.pull_request is not None else self.ref

    @property
    def line(self) -> str | None:
        """What newer builds supersede older ones of: the branch or the pull request."""
        return f"pr/{self.pull_request}" if self.pull_request is not None else self.branch


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A comment below a pull request that approves a commit, by `person`, of whom nobody has looked up yet whether they may.

    `commit` is whole. `person_id` is the git server's number of them, `person` the name that it is asked for.
    """

    pull_request: int
    commit: str
    person_id: str
    person: str
    comment_id: str


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a delivery says: events, or, where there are none, why it starts nothing. `repository_id` is set where it is told.

    `looked_up`: nobody told us, we looked at the project's own repository. `wish`: it is a comment that approves.
    """

    what: str
    events: tuple[SourceEvent, ...] = ()
    why: str = ""
    ping: bool = False
    repository_id: str | None = None
    repository: str = ""
    clone_urls: tuple[str, ...] = ()
    looked_up: bool = False
    wish: Wish | None = None
