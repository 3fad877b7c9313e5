"""Records to JSON, in CodeBuild's shapes; what CodeBuild does not have stands below `millrace`."""

from collections.abc import Mapping, Sequence
from typing import Any

from millrace.ids import container_name, uuid_of
from millrace.project import ProjectArtifacts
from millrace.settings import Settings
from millrace.vocabulary import ArtifactsType, BuildState, StatusType
from scheduler.foresight import Like
from scheduler.leases import build_arn
from scheduler.projects import ProjectRecord
from scheduler.queries import ArtifactRecord, BuildRecord, PhaseRecord
from scheduler.waiting import Waiting


def seconds(ms: int) -> float:
    """CodeBuild's times: seconds since 1970, with milliseconds."""
    return ms / 1000


def project(record: ProjectRecord, settings: Settings) -> dict[str, Any]:
    """CodeBuild: Project."""
    shape = record.settings.model_dump(mode="json", by_alias=True, exclude_none=True)
    badge: dict[str, Any] = {"badgeEnabled": shape.pop("badgeEnabled", False)}
    if badge["badgeEnabled"]:
        badge["badgeRequestUrl"] = f"{settings.public}/badges?uuid={record.uuid}&branch=main"
    return {
        **shape,
        "arn": f"arn:aws:codebuild:{settings.region}:{settings.account_id}:project/{record.settings.name}",
        "created": seconds(record.created_ms),
        "lastModified": seconds(record.modified_ms),
        "badge": badge,
    }


def build_status(state: BuildState) -> StatusType:
    """CodeBuild's buildStatus: what is not terminal is IN_PROGRESS."""
    return StatusType(state.value) if state.value in StatusType.__members__ else StatusType.IN_PROGRESS


def build(record: BuildRecord, settings: Settings, *, brief: bool = False) -> dict[str, Any]:
    """CodeBuild: Build, with our own facts below `millrace`. `brief` leaves the list of artifacts out, which may be long."""
    wanted = record.settings.model_dump(mode="json", by_alias=True, exclude_none=True)
    webhook = wanted.pop("webhook", None)
    for member in ("artifacts", "secondaryArtifacts", "sourceCommit"):
        wanted.pop(member, None)
    if not wanted.pop("debugSessionEnabled", False):
        debug = {}
    else:
        debug = {"debugSession": {"sessionEnabled": True, "sessionTarget": _debug_target(record)}}
    answer: dict[str, Any] = {
        "id": record.id,
        "arn": build_arn(settings, record.id),
        "buildNumber": record.number,
        "startTime": seconds(record.submitted_ms),
        "currentPhase": record.phases[-1].phase_type.value,
        "buildStatus": build_status(record.state).value,
        "buildComplete": record.ended,
        "initiator": record.initiator,
        **wanted,
        **debug,
        "phases": [phase(item) for item in record.phases],
        "artifacts": _artifacts(record, settings, record.settings.artifacts),
        "secondaryArtifacts": [_artifacts(record, settings, one) for one in record.settings.secondary_artifacts],
        "logs": _logs(record, settings),
        "exportedEnvironmentVariables": [dict(item) for item in record.exported],
        "millrace": {
            "state": record.state.value,
            "reason": record.reason.value if record.reason else None,
            "message": record.message,
            "exitCode": record.exit_code,
            "attempt": record.attempt_no,
            "attempts": [
                {
                    "attempt": item.attempt_no,
                    "workerId": item.worker_id,
                    "claimed": seconds(item.claimed_ms),
                    "ended": seconds(item.ended_ms) if item.ended_ms is not None else None,
                    "verdict": item.verdict,
                    "reason": item.reason,
                    "message": item.message,
                }
                for item in record.attempts
            ],
            "workerId": record.attempts[-1].worker_id if record.attempts else None,
            "fleet": record.fleet,
            "priority": record.priority,
            "stopRequested": record.cancel_requested,
            "retryOf": record.retry_of,
            **({"webhook": webhook} if webhook else {}),
            "marks": dict(record.marks),
            "phaseMs": {item.phase_type.value: item.duration_ms for item in record.phases if item.duration_ms is not None},
            "artifacts": artifacts(record.artifacts),
        },
    }
    if brief:
        del answer["millrace"]["artifacts"]
    if record.finished_ms is not None:
        answer["endTime"] = seconds(record.finished_ms)
    if wanted.get("autoRetryLimit") is not None:
        answer["autoRetryConfig"] = _auto_retry(record, settings)
    if record.resolved_source_version:
        answer["resolvedSourceVersion"] = record.resolved_source_version
    return answer


def _debug_target(record: BuildRecord) -> str:
    """The container in which `codebuild-breakpoint` waits, and its worker."""
    return f"{container_name(record.id, record.attempt_no)}@{record.attempts[-1].worker_id}" if record.attempts else ""


def _auto_retry(record: BuildRecord, settings: Settings) -> dict[str, Any]:
    """CodeBuild: AutoRetryConfig."""
    previous = record.retry_of if record.auto_retry_number else None
    return {
        "autoRetryLimit": record.settings.auto_retry_limit,
        "autoRetryNumber": record.auto_retry_number,
        "nextAutoRetry": build_arn(settings, record.next_auto_retry) if record.next_auto_retry else None,
        "previousAutoRetry": build_arn(settings, previous) if previous else None,
    }


def phase(record: PhaseRecord) -> dict[str, Any]:
    """CodeBuild: BuildPhase. Durations are whole seconds, cut off."""
    shape: dict[str, Any] = {"phaseType": record.phase_type.value, "startTime": seconds(record.started_ms)}
    if record.status is not None:
        shape["phaseStatus"] = record.status.value
    if record.ended_ms is not None:
        shape["endTime"] = seconds(record.ended_ms)
    if record.duration_ms is not None:
        shape["durationInSeconds"] = record.duration_ms // 1000
    if record.contexts is not None:
        shape["contexts"] = [dict(item) for item in record.contexts] or [{"statusCode": "", "message": ""}]
    return shape


def artifacts(records: Sequence[ArtifactRecord]) -> list[Mapping[str, object]]:
    """The visible artifacts of a build, as they are listed and downloaded."""
    return [
        {
            "name": item.name,
            "identifier": item.identifier or None,
            "sizeBytes": item.size_bytes,
            "sha256": item.sha256,
            "md5": item.md5,
            "packaging": item.packaging,
            "fileCount": item.file_count,
            "key": item.key,
            "published": f"s3://{item.public_bucket}/{item.public_key}" if _is_public(item) else None,
            **({"publicationProblem": item.public_problem} if item.public_problem else {}),
        }
        for item in records
    ]


def _is_public(item: ArtifactRecord) -> bool:
    return item.public_key is not None and item.published and item.public_problem is None


def _artifacts(record: BuildRecord, settings: Settings, wanted: ProjectArtifacts) -> dict[str, Any]:
    """CodeBuild: BuildArtifacts, of the primary artifact or of a secondary one."""
    identifier = (wanted.artifact_identifier or "") if wanted is not record.settings.artifacts else ""
    named = {"artifactIdentifier": identifier} if identifier else {}
    if wanted.type is ArtifactsType.NO_ARTIFACTS:
        return {"location": "", **named}
    shape: dict[str, Any] = {
        **named,
        "encryptionDisabled": bool(wanted.encryption_disabled),
        "overrideArtifactName": bool(wanted.override_artifact_name),
    }
    if wanted.bucket_owner_access is not None:
        shape["bucketOwnerAccess"] = wanted.bucket_owner_access
    found = next((item for item in record.artifacts if item.identifier == identifier), None)
    if found is not None:
        bucket, key = found.public_bucket or settings.bucket, found.public_key or found.key
        whole = found.packaging == "ZIP"
        shape["location"] = f"arn:aws:s3:::{bucket}/{key if whole else key.removesuffix(found.name).rstrip('/')}".rstrip("/")
        if whole:
            shape |= {"sha256sum": found.sha256, "md5sum": found.md5}
    return shape


def _logs(record: BuildRecord, settings: Settings) -> dict[str, Any]:
    return {
        "groupName": f"/aws/codebuild/{record.project_name}",
        "streamName": uuid_of(record.id),
        "deepLink": f"{settings.api}/v1/builds/{record.id}/logs",
        "cloudWatchLogs": {"status": "ENABLED"},
        "s3Logs": {"status": "DISABLED", "encryptionDisabled": False},
    }


def _like(like: Like) -> dict[str, Any]:
    """What a worker is like; None of a number: it does not matter, or bounds nothing."""
    cpu_millis = like.offer.cpu_millis
    return {
        "cpus": None if cpu_millis is None else cpu_millis / 1000,
        "memoryBytes": like.offer.memory_bytes,
        "labels": sorted(like.offer.labels),
        "slots": like.slots,
    }


def waiting(found: Waiting, *, only_project: str | None) -> dict[str, Any]:
    """Why a build waits. Builds of other projects than `only_project` are counted, and not named."""
    limits = [
        {
            "limit": bound.limit.value,
            "says": bound.says,
            "lift": bound.lift,
            "needs": bound.needs,
            "moreWorkers": None if bound.like is None else {"count": bound.more, **_like(bound.like)},
        }
        for bound in found.limits
    ]
    return {
        "buildId": found.build_id,
        "state": found.state.value,
        "fleet": found.fleet,
        "position": found.position,
        "aheadCount": found.ahead_count,
        "ahead": [
            {"id": one.build_id, "projectName": one.project} if only_project in (None, one.project) else {} for one in found.ahead
        ],
        "binding": limits[0] if limits else None,
        "limits": limits,
        "says": found.says,
    }
