"""The closed lists that every part agrees on. Names are persisted, numbers never.

`BuildState` is ours; `PhaseType` and `StatusType` are CodeBuild's own lists (CodeBuild API reference, data types).
"""

from enum import StrEnum
from typing import Final


class BuildState(StrEnum):
    """Where a build is on its road. What may follow what is written in `scheduler.states`."""

    QUEUED = "QUEUED"
    CLAIMED = "CLAIMED"
    RUNNING = "RUNNING"
    FINALIZING = "FINALIZING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    TIMED_OUT = "TIMED_OUT"
    STOPPED = "STOPPED"
    FAULT = "FAULT"


class StatusType(StrEnum):
    """CodeBuild: StatusType, the status of a build or of one of its phases."""

    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    FAULT = "FAULT"
    TIMED_OUT = "TIMED_OUT"
    IN_PROGRESS = "IN_PROGRESS"
    STOPPED = "STOPPED"


class PhaseType(StrEnum):
    """CodeBuild: BuildPhaseType, in the order in which phases happen."""

    SUBMITTED = "SUBMITTED"
    QUEUED = "QUEUED"
    PROVISIONING = "PROVISIONING"
    DOWNLOAD_SOURCE = "DOWNLOAD_SOURCE"
    INSTALL = "INSTALL"
    PRE_BUILD = "PRE_BUILD"
    BUILD = "BUILD"
    POST_BUILD = "POST_BUILD"
    UPLOAD_ARTIFACTS = "UPLOAD_ARTIFACTS"
    FINALIZING = "FINALIZING"
    COMPLETED = "COMPLETED"


COMMAND_PHASES: Final = (PhaseType.INSTALL, PhaseType.PRE_BUILD, PhaseType.BUILD, PhaseType.POST_BUILD)


class Reason(StrEnum):
    """Why a build ended. Each terminal build has exactly one; adding one needs an ADR.

    `user.*` is the build's own fault (state FAILED, TIMED_OUT or STOPPED), `infra.*` and `internal.*` are ours (FAULT).
    """

    SUCCEEDED = "succeeded"
    EXIT_CODE = "user.exit_code"
    OOM = "user.oom"
    KILLED = "user.killed"
    TIMEOUT = "user.timeout"
    DISK_LIMIT = "user.disk_limit"
    CANCELLED = "user.cancelled"
    BAD_BUILDSPEC = "user.bad_buildspec"
    SOURCE_NOT_FOUND = "user.source_not_found"
    BAD_SOURCE = "user.bad_source"
    IMAGE_NOT_FOUND = "user.image_not_found"
    BAD_IMAGE = "user.bad_image"
    ARTIFACTS_NOT_FOUND = "user.artifacts_not_found"
    ARTIFACT_TOO_LARGE = "user.artifact_too_large"
    SECRET_UNAVAILABLE = "user.secret_unavailable"  # noqa: S105  # a reason, not a secret
    PHASE_RETRY = "user.phase_retry"
    QUEUE_TIMEOUT = "queue_timeout"
    WORKER_LOST = "infra.worker_lost"
    WORKER_SHUTDOWN = "infra.worker_shutdown"
    ENGINE_LOST = "infra.engine_lost"
    IMAGE_PULL = "infra.image_pull"
    SOURCE_UNREACHABLE = "infra.source_unreachable"
    STORAGE = "infra.storage"
    SECRETS_AWAY = "infra.secrets_away"
    NO_MATCHING_WORKER = "infra.no_matching_worker"
    BUG = "internal.bug"


REASON_MEANS: Final[dict[Reason, str]] = {
    Reason.SUCCEEDED: "all went well",
    Reason.EXIT_CODE: "a command failed; `millrace.exitCode` has its status",
    Reason.OOM: "the build used more memory than its compute type has",
    Reason.KILLED: "the build's container ended while a command ran, and nothing proves why",
    Reason.TIMEOUT: "the build ran longer than its time-out",
    Reason.DISK_LIMIT: "the build filled its disk",
    Reason.CANCELLED: "somebody stopped it",
    Reason.BAD_BUILDSPEC: "the buildspec is missing or wrong; the message says where",
    Reason.SOURCE_NOT_FOUND: "the repository, version or object does not exist, or may not be read",
    Reason.BAD_SOURCE: "the source's address or archive cannot be used",
    Reason.IMAGE_NOT_FOUND: "the image does not exist, or may not be pulled",
    Reason.BAD_IMAGE: "the image cannot run builds",
    Reason.ARTIFACTS_NOT_FOUND: "no file matches the artifacts section, or one cannot be kept",
    Reason.ARTIFACT_TOO_LARGE: "an artifact is over the farm's limit",
    Reason.SECRET_UNAVAILABLE: "a secret that the build asks for cannot be had",
    Reason.PHASE_RETRY: "a phase failed whose on-failure is RETRY; seen on attempts only, since the build is tried again",
    Reason.QUEUE_TIMEOUT: "the build waited longer than its queued time-out",
    Reason.WORKER_LOST: "the worker went silent, or its process died, as often as attempts are allowed",
    Reason.WORKER_SHUTDOWN: "the worker left; the build is tried again, unless its project forbids that",
    Reason.ENGINE_LOST: "the container engine went away",
    Reason.IMAGE_PULL: "the registry could not be asked for the image",
    Reason.SOURCE_UNREACHABLE: "the git server could not be reached",
    Reason.STORAGE: "the object store failed",
    Reason.SECRETS_AWAY: "the store of secrets could not be asked, or a key of its own is missing",
    Reason.NO_MATCHING_WORKER: "no fleet can ever run this build",
    Reason.BUG: "a fault of the farm's own; please report it",
}
"""What each Reason says to people; docs/states.md shows it."""


class Verdict(StrEnum):
    """How one attempt ended, as its worker reports it. `HANDED_BACK`: not run to its end, may be tried again."""

    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    TIMED_OUT = "TIMED_OUT"
    STOPPED = "STOPPED"
    FAULT = "FAULT"
    HANDED_BACK = "HANDED_BACK"


class SourceType(StrEnum):
    """CodeBuild: SourceType, and `GIT` of our own for any other git server or an allow-listed local path."""

    CODECOMMIT = "CODECOMMIT"
    CODEPIPELINE = "CODEPIPELINE"
    GITHUB = "GITHUB"
    GITHUB_ENTERPRISE = "GITHUB_ENTERPRISE"
    GITLAB = "GITLAB"
    GITLAB_SELF_MANAGED = "GITLAB_SELF_MANAGED"
    BITBUCKET = "BITBUCKET"
    S3 = "S3"
    NO_SOURCE = "NO_SOURCE"
    GIT = "GIT"


GIT_SOURCES: Final = frozenset(
    {
        SourceType.CODECOMMIT,
        SourceType.GITHUB,
        SourceType.GITHUB_ENTERPRISE,
        SourceType.GITLAB,
        SourceType.GITLAB_SELF_MANAGED,
        SourceType.BITBUCKET,
        SourceType.GIT,
    }
)


class ArtifactsType(StrEnum):
    """CodeBuild: ArtifactsType."""

    CODEPIPELINE = "CODEPIPELINE"
    S3 = "S3"
    NO_ARTIFACTS = "NO_ARTIFACTS"


class ArtifactPackaging(StrEnum):
    """CodeBuild: ArtifactPackaging. `NONE` stores each file by itself."""

    NONE = "NONE"
    ZIP = "ZIP"


class Trouble(StrEnum):
    """Why a fleet's provider did not do what it was asked to."""

    THROTTLED = "throttled"
    CAPACITY = "capacity"
    CREDENTIALS = "credentials"
    MISSING = "missing"
    AWAY = "away"


class TokenScope(StrEnum):
    """What an API token may do. A `PROJECT` token names its project; a `WORKER` token only claims builds."""

    ADMIN = "admin"
    PROJECT = "project"
    WORKER = "worker"


GIB: Final = 1024**3

COMPUTE_TYPES: Final[dict[str, tuple[float, int]]] = {
    "BUILD_GENERAL1_SMALL": (2, 4 * GIB),
    "BUILD_GENERAL1_MEDIUM": (4, 8 * GIB),
    "BUILD_GENERAL1_LARGE": (8, 16 * GIB),
    "BUILD_GENERAL1_XLARGE": (36, 72 * GIB),
    "BUILD_GENERAL1_2XLARGE": (72, 144 * GIB),
}
"""vCPU and memory in bytes of each compute type (CodeBuild: build environment compute types). A worker caps them to its host."""

ATTRIBUTE_BASED: Final = "ATTRIBUTE_BASED_COMPUTE"
CUSTOM_INSTANCE: Final = "CUSTOM_INSTANCE_TYPE"
"""The compute types whose size stands in `computeConfiguration`."""
