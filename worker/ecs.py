"""What ECS tells a container of the task that it belongs to (Amazon ECS: task metadata endpoint version 4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx

from millrace.errors import Unavailable

_ADDRESS: Final = "ECS_CONTAINER_METADATA_URI_V4"
_TASK_LABEL: Final = "com.amazonaws.ecs.task-arn"
_TRIES: Final = 4
_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """The task of this container: its id, and the digest of the image that the container was made from, if that is told."""

    id: str
    image_digest: str | None


def read(environ: Mapping[str, str]) -> Task | None:
    """The task; None outside of ECS. Raises Unavailable: under another name nobody would know this worker for its task's."""
    address = environ.get(_ADDRESS)
    if not address:
        return None
    with httpx.Client(transport=httpx.HTTPTransport(retries=_TRIES), timeout=_TIMEOUT_S, trust_env=False) as client:
        why = ""
        for _ in range(_TRIES):
            try:
                answer = client.get(address)
                answer.raise_for_status()
                return _task(answer.json())
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                why = f"{type(error).__name__}: {error}"
    raise Unavailable(f"ECS does not tell which task this is ({_ADDRESS}={address}): {why}", hint="Set MILLRACE_WORKER_ID.")


def _task(said: Mapping[str, Any]) -> Task:
    arn: str = said["Labels"][_TASK_LABEL]
    task_id = arn.rpartition("/")[2]
    if not task_id:
        raise ValueError(f"{arn!r} names no task")
    digest = said.get("ImageID")
    return Task(id=task_id, image_digest=digest if isinstance(digest, str) and digest else None)
