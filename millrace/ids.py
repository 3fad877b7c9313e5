"""How builds, attempts and tokens are named. Opaque everywhere else."""

import re
import secrets
import uuid
from typing import Final, NewType

BuildId = NewType("BuildId", str)
"""`project:uuid4`, as in CodeBuild."""

PROJECT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9\-_]{1,149}")
"""CodeBuild: ProjectName."""

_BUILD_ID: Final = re.compile(rf"({PROJECT_NAME.pattern}):([0-9a-f]{{8}}(?:-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}})")


def new_build_id(project_name: str) -> BuildId:
    """A fresh build id of `project_name`."""
    return BuildId(f"{project_name}:{uuid.uuid4()}")


def is_build_id(text: str) -> bool:
    """True where `text` has the form of a build id; says nothing on whether the build exists."""
    return _BUILD_ID.fullmatch(text) is not None


def project_of(build_id: str) -> str:
    """The project's name in a build id."""
    return build_id.rpartition(":")[0]


def uuid_of(build_id: str) -> str:
    """The UUID part of a build id: safe as a file, container and object name."""
    return build_id.rpartition(":")[2]


def container_name(build_id: str, attempt_no: int) -> str:
    """The one name that the container of an attempt may have, so that a retried create finds it again."""
    return f"millrace-{uuid_of(build_id)}-{attempt_no}"


def new_secret(prefix: str) -> str:
    """A bearer secret of 256 random bits: `mr_pat_...` (API), `mr_wrk_...` (worker), `mr_att_...` (attempt)."""
    return f"mr_{prefix}_{secrets.token_urlsafe(32)}"


def new_worker_id(hostname: str) -> str:
    """A worker's name for one boot; never used again."""
    return f"{re.sub(r'[^A-Za-z0-9.-]', '-', hostname)[:40]}-{secrets.token_hex(4)}"


def staging_prefix(build_id: str, attempt_no: int) -> str:
    """Where the objects of one attempt lie in the farm's bucket; ends with a slash."""
    return f"artifacts/{uuid_of(build_id)}/{attempt_no}/"


def cache_prefix(build_id: str, attempt_no: int) -> str:
    """Where the caches that one attempt offers lie in the farm's bucket; ends with a slash."""
    return f"caches/{uuid_of(build_id)}/{attempt_no}/"


def log_key(build_id: str, attempt_no: int) -> str:
    """The object that holds the whole log of an ended attempt."""
    return f"logs/{uuid_of(build_id)}/{attempt_no}.log"


def log_list_key(build_id: str, attempt_no: int) -> str:
    """The object beside it that lists the log's chunks."""
    return f"logs/{uuid_of(build_id)}/{attempt_no}.chunks"
