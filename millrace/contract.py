"""What worker and API say to each other: six verbs, claim renew phase log grant finish. Frozen, versioned, JSON.

Routes (`api/attempts.py`), all below `/worker/v1`:
  POST /claim                                    ClaimRequest  -> Claim, or 204 where nothing is to be done   (worker token)
  POST /attempts/{build_id}/{attempt_no}/renew   RenewRequest  -> RenewReply                                  (attempt token)
  POST /attempts/{build_id}/{attempt_no}/phase   PhaseReport   -> {}
  POST /attempts/{build_id}/{attempt_no}/phases  PhaseReports  -> {}; what is not told yet when the attempt ends, `finish` tells
  PUT  /attempts/{build_id}/{attempt_no}/log/{seq}   raw bytes, with the headers `LOG_OFFSET_HEADER`, `LOG_SHA256_HEADER` -> {};
                                                 `Content-Encoding: zstd` where they are packed (`millrace.packing`)
  POST /attempts/{build_id}/{attempt_no}/grant   GrantRequest  -> Grant
  POST /attempts/{build_id}/{attempt_no}/grant/secrets   SecretsRequest -> SecretsReply
  POST /attempts/{build_id}/{attempt_no}/grant/cache     CacheQuery -> CacheHit, or 204 where no cache answers
  POST /attempts/{build_id}/{attempt_no}/finish  FinishReport  -> {}
Every verb may be sent twice: the second does nothing and answers as the first. An attempt that no longer holds its build
gets 409 with the code `attempt_fenced`.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from millrace.need import Label
from millrace.project import BuildSettings, Shape
from millrace.vocabulary import PhaseType, Reason, StatusType, Verdict

PROTOCOL: Final = 1
"""Raised when a message changes in a way that the last release's worker cannot read."""
OLDEST_PROTOCOL: Final = 1
"""The oldest that the API still speaks: the one of the last release, as workers are upgraded after the API."""

LOG_OFFSET_HEADER: Final = "X-Millrace-Offset"
LOG_SHA256_HEADER: Final = "X-Millrace-Sha256"
SOURCE_AUTH: Final = "MILLRACE_SOURCE_AUTH"
"""How the names begin by which a worker asks for the credentials of sources; no variable of a build can have such a name."""
LEAVE_HEADER: Final = "X-Millrace-Leave"
"""Of a 204 to a claim: the worker is to finish what it has and leave; the value says why, percent-encoded. It is given no more
builds."""
MAX_LOG_CHUNK_BYTES: Final = 2 * 1024 * 1024


class ClaimRequest(Shape):
    """A worker with a free slot asks for the best build of its fleet, or, with none free, says how it is.

    `token` is what the attempt's is to be: 256 random bits of the worker's own. Where a request with it was granted before and
    its answer was lost, the answer is the same again. Without it the farm makes one.
    """

    protocol: int = PROTOCOL
    worker_id: str = Field(min_length=1, max_length=100)
    fleet: str = Field(min_length=1, max_length=100)
    slots: int = Field(ge=1, le=1000)
    free_slots: int = Field(ge=0, le=1000)
    version: str
    token: str | None = Field(default=None, pattern=r"^mr_att_[A-Za-z0-9_-]{43,64}$")
    state: Literal["up", "draining", "gone"] = "up"
    not_claiming: str = Field(default="", max_length=500)
    """What keeps it from claiming, for people; `free_slots` is 0 then, and so it is where it drains or goes."""
    generation: int | None = Field(default=None, ge=1)
    """The generation of its fleet that it was started in; None where no fleet's provider started it."""
    cpus: float | None = Field(default=None, gt=0, le=100_000)
    memory_bytes: int | None = Field(default=None, ge=0, le=2**60)
    """What it has for builds; None: its slots alone bound them."""
    labels: tuple[Label, ...] = Field(default=(), max_length=50)
    only: str | None = Field(default=None, max_length=200)
    """The id of the only build that it may have: a worker that was started for one claims that one and no other."""


class Claim(Shape):
    """The right to run one attempt of a build. `token` dies with the lease; seconds are counted from this answer."""

    build_id: str
    build_arn: str
    build_number: int
    attempt_no: int
    token: str
    lease_ttl_s: float
    renew_every_s: float
    self_fence_s: float
    deadline_in_s: float
    submitted_at_ms: int
    initiator: str
    region: str
    build_url: str = ""
    now_ms: int | None = None
    """What the farm's clock showed when it answered, in milliseconds since 1970; the last release does not know it."""
    retries: int = 0
    """How many attempts of this build have ended by `on-failure: RETRY`."""
    settings: BuildSettings


class RenewRequest(Shape):
    """The attempt is alive. `worker_draining` is for people who look; it changes nothing."""

    worker_draining: bool = False


class RenewReply(Shape):
    """The lease is good for another `lease_ttl_s`; `cancel_requested` asks the attempt to stop and report STOPPED."""

    lease_ttl_s: float
    cancel_requested: bool
    deadline_in_s: float


class PhaseContext(Shape):
    """CodeBuild: PhaseContext."""

    status_code: str = ""
    message: str = ""


class PhaseReport(Shape):
    """One phase began (`status` is None) or ended. Times are milliseconds since 1970 by the worker's clock."""

    phase_type: PhaseType
    status: StatusType | None = None
    started_at_ms: int
    ended_at_ms: int | None = None
    duration_ms: int | None = None
    contexts: tuple[PhaseContext, ...] = ()
    resolved_source_version: str | None = None


class PhaseReports(Shape):
    """What became of several phases since the last word."""

    reports: tuple[PhaseReport, ...] = Field(min_length=1, max_length=100)


LEAST_PART_BYTES: Final = 5 * 1024 * 1024
MAX_PARTS: Final = 10_000
"""Amazon S3 user guide, multipart upload limits: parts of 5 MiB to 5 GiB, the last may be shorter, at most so many."""


class GrantRequest(Shape):
    """Ask for an address to move bytes to or from the object store.

    `artifact`: put one file of this attempt, named `name` inside the attempt's staging prefix.
    `cache`: put one archive, named `name` among the caches that this attempt offers.
    `source`: get the object at `name` (`bucket/key`), which must be one of this build's own sources.

    An artifact or a cache may be sent in parts of `part_bytes`, the last one shorter, whose MD5s are `parts` (Amazon S3:
    multipart upload).
    """

    kind: Literal["artifact", "cache", "source"]
    name: str = Field(min_length=1, max_length=1024)
    size_bytes: int | None = Field(default=None, ge=0)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    part_bytes: int | None = Field(default=None, ge=LEAST_PART_BYTES, le=5 * 1024**3)
    parts: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")], ...] | None = Field(
        default=None, min_length=2, max_length=MAX_PARTS
    )


class PartGrant(Shape):
    """Where to put one part of an object."""

    url: str
    headers: dict[str, str] = Field(default_factory=dict)


class PartsDone(Shape):
    """All parts of `upload` are where they were granted; `tags` are the ETags that were answered, in order."""

    key: str = Field(max_length=1200)
    upload: str = Field(max_length=1024)
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tags: tuple[Annotated[str, Field(max_length=200)], ...] = Field(max_length=MAX_PARTS)


class Grant(Shape):
    """Where to send or fetch the bytes: `method` on `url` with `headers`, within `expires_in_s` seconds.

    A relative `url` is below the API's own address. `key` is the object's key, to be named in the FinishReport. Where there are
    `parts`, the bytes go there instead, and then a PartsDone with `upload` to the API.
    """

    method: Literal["PUT", "GET"]
    url: str
    headers: dict[str, str] = Field(default_factory=dict)
    key: str
    expires_in_s: int
    upload: str | None = None
    part_bytes: int | None = None
    parts: tuple[PartGrant, ...] = ()

    @model_serializer(mode="wrap")
    def _as_asked(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Nothing of parts unless there are some: the last release's workers know no such fields."""
        data: dict[str, Any] = handler(self)
        if not self.parts:
            for name in ("upload", "part_bytes", "partBytes", "parts"):
                data.pop(name, None)
        return data


MAX_SECRETS: Final = 200
MAX_SECRETS_BYTES: Final = 256 * 1024
"""How long the values of a build's secrets may be together: each is looked for in the log in many spellings."""


class SecretReference(Shape):
    """A variable whose value is a secret: `value` is the reference, never the secret (CodeBuild: EnvironmentVariable)."""

    name: str = Field(min_length=1, max_length=262_144)
    type: Literal["PARAMETER_STORE", "SECRETS_MANAGER"]
    value: str = Field(max_length=262_144)


class SecretsRequest(Shape):
    """Ask for the values of secrets, all or none."""

    references: tuple[SecretReference, ...] = Field(min_length=1, max_length=MAX_SECRETS)


class SecretsReply(Shape):
    """The values by variable name."""

    values: dict[str, str]

    def __repr__(self) -> str:
        return f"SecretsReply({', '.join(self.values)})"

    __str__ = __repr__


class CacheQuery(Shape):
    """Ask for a cache of this project (or of its cacheNamespace) that was made of the same paths.

    `version` names the paths; `keys` are tried in order: the first as it stands, those behind it as prefixes, of which the newest
    cache counts. An empty first key is the cache without a key. `layered` is said by a worker that can lay several layers over
    one another; the last release's cannot.
    """

    version: str = Field(pattern=r"^[0-9a-f]{64}$")
    keys: tuple[str, ...] = Field(min_length=1, max_length=6)
    layered: bool = False


class CacheLayer(Shape):
    """One layer of a cache: a zstd tar, called by the hash of its bytes."""

    size_bytes: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    grant: Grant


class CacheHit(Shape):
    """The cache that answers: `exact` where it is that of the first key. The layers that its own lies on come lowest first."""

    key: str
    exact: bool
    size_bytes: int
    sha256: str
    build_id: str
    grant: Grant
    below: tuple[CacheLayer, ...] = ()


class CacheReport(Shape):
    """One cache that the attempt uploaded: `object_key` is the grant's key; `base` that of the cache which it lies on, if any."""

    key: str = Field(max_length=512)
    version: str = Field(pattern=r"^[0-9a-f]{64}$")
    object_key: str = Field(min_length=1, max_length=1200)
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    base: str | None = Field(default=None, max_length=1200)


class CacheUse(Shape):
    """What became of the cache that answered a query: whether the build had it, and `says` how, or why not."""

    used: bool
    says: str = Field(max_length=1000)


class ArtifactReport(Shape):
    """One object that the attempt uploaded. `name` is what the user sees; `identifier` None means the primary artifact.

    `set_name` is what the buildspec calls the whole artifact, where `overrideArtifactName` lets it, as the shell made it out;
    `s3_prefix` is the buildspec's own. Both only say where the object is published.
    """

    name: str = Field(min_length=1, max_length=1024)
    key: str = Field(min_length=1, max_length=1200)
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    md5: str = Field(pattern=r"^[0-9a-f]{32}$")
    packaging: Literal["NONE", "ZIP"]
    file_count: int = Field(ge=1)
    identifier: str | None = None
    set_name: str | None = Field(default=None, max_length=1024)
    s3_prefix: str | None = Field(default=None, max_length=1024)


class LogFooter(Shape):
    """What the worker says it wrote, so that a gap shows. `sha256` is over all bytes in order, `root` over the list of chunks.

    Without a root: the last release's worker does not know it, and what was dropped was never cut into chunks.
    """

    chunks: int = Field(ge=0)
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    root: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class ExportedVariable(Shape):
    """CodeBuild: ExportedEnvironmentVariable."""

    name: str
    value: str


class FinishReport(Shape):
    """How the attempt ended; accepted once. `marks` are the ledger: name of a moment -> milliseconds since 1970."""

    verdict: Verdict
    reason: Reason
    message: str = ""
    exit_code: int | None = None
    artifacts: tuple[ArtifactReport, ...] = ()
    caches: tuple[CacheReport, ...] = ()
    cache_uses: tuple[CacheUse, ...] = Field(default=(), max_length=10)
    """One for each query that was answered with a cache, in their order."""
    log: LogFooter | None = None
    """None where the attempt's process is gone, and nobody knows what it wrote."""
    resolved_source_version: str | None = None
    exported_variables: tuple[ExportedVariable, ...] = ()
    marks: dict[str, int] = Field(default_factory=dict)
    phases: tuple[PhaseReport, ...] = Field(default=(), max_length=100)
    """Those that were not told before."""
