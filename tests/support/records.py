"""Builders: projects, builds and attempts in the records, made as the farm makes them."""

import hashlib
from typing import Any

from millrace.contract import ClaimRequest, FinishReport, LogFooter
from millrace.project import BuildOverrides, ProjectSettings
from millrace.settings import Settings
from millrace.vocabulary import Reason, Verdict
from scheduler import intake, leases, projects
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


def a_report(verdict: Verdict = Verdict.SUCCEEDED, reason: Reason = Reason.SUCCEEDED, **changes: Any) -> FinishReport:
    """An attempt's last word."""
    return FinishReport(verdict=verdict, reason=reason, **{"log": EMPTY_LOG, **changes})
