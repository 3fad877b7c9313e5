"""Builders: projects, builds and attempts in the records, made as the farm makes them."""

import hashlib
from typing import Any

from millrace.chunks import Tally
from millrace.contract import ClaimRequest, FinishReport, LogFooter
from millrace.project import BuildOverrides, ProjectSettings
from millrace.settings import Settings
from millrace.vocabulary import Reason, Verdict
from scheduler import attempts, intake, leases, projects
from scheduler.db import Database

EMPTY_LOG = LogFooter(chunks=0, size_bytes=0, sha256=hashlib.sha256(b"").hexdigest())
SPEC = "version: 0.2\nphases:\n  build:\n    commands:\n      - echo hello\n"


def a_project_json(name: str = "demo", **changes: Any) -> dict[str, Any]:
    """A project as a user would send it."""
    return {
        "name": name,
        "source": {"type": "NO_SOURCE", "buildspec": SPEC},
        "artifacts": {"type": "S3", "packaging": "ZIP"},
        "environment": {"type": "LINUX_CONTAINER", "image": "millrace/base:latest", "computeType": "BUILD_GENERAL1_SMALL"},
        **changes,
    }


def a_project(db: Database, name: str = "demo", **changes: Any) -> ProjectSettings:
    """A project in the records."""
    settings = ProjectSettings.model_validate(a_project_json(name, **changes))
    projects.create(db, settings)
    return settings


def a_build(db: Database, settings: Settings, project: str = "demo", **overrides: Any) -> str:
    """A queued build; its id."""
    wanted = BuildOverrides.model_validate({"projectName": project, **overrides})
    return intake.submit(db, intake.BuildRequest(overrides=wanted, initiator="tests", by_admin=True), settings).build_id


def a_claim_request(worker: str = "w1", **changes: Any) -> ClaimRequest:
    """A worker with free slots."""
    values: dict[str, Any] = {"worker_id": worker, "fleet": "default", "slots": 4, "free_slots": 4, "version": "0.1.0", **changes}
    return ClaimRequest(**values)


def a_claim(db: Database, settings: Settings, worker: str = "w1") -> "leases.Claim":
    """The next build, claimed; there must be one."""
    claim = leases.claim(db, a_claim_request(worker), settings)
    assert claim is not None
    return claim


def store_log(db: Database, claim: "leases.Claim", *pieces: bytes) -> None:
    """All of an attempt's log, in these chunks."""
    offset = 0
    for seq, data in enumerate(pieces):
        sha256 = hashlib.sha256(data).hexdigest()
        token = leases.hash_token(claim.token)
        attempts.store_log(db, claim.build_id, claim.attempt_no, token, seq=seq, offset=offset, data=data, sha256=sha256)
        offset += len(data)


def log_footer(*pieces: bytes) -> LogFooter:
    """What a worker says that wrote these chunks."""
    tally, whole = Tally(), b"".join(pieces)
    for data in pieces:
        tally.take(data)
    return LogFooter(chunks=len(pieces), size_bytes=len(whole), sha256=hashlib.sha256(whole).hexdigest(), root=tally.root)


def a_report(verdict: Verdict = Verdict.SUCCEEDED, reason: Reason = Reason.SUCCEEDED, **changes: Any) -> FinishReport:
    """An attempt's last word."""
    return FinishReport(verdict=verdict, reason=reason, **{"log": EMPTY_LOG, **changes})
