"""What a worker hands to an attempt's process, on its stdin: the claim, and how this worker builds."""

from pathlib import Path
from typing import Final, Literal

from millrace.contract import Claim
from millrace.log import LogFormat
from millrace.project import Shape
from millrace.settings import Settings


class Order(Shape):
    """Everything an attempt's process needs. It holds the attempt's token, so it goes through a pipe, never argv or environ."""

    claim: Claim
    api_url: str
    worker_id: str
    workspaces: Path
    engine: Literal["docker", "fake"]
    docker_host: str | None
    network: str
    ca_bundle: Path | None
    git_roots: tuple[Path, ...]
    memory_bytes: int | None
    pids_limit: int
    max_artifact_bytes: int
    log_format: LogFormat
    log_level: str


_BUNDLE: Final = Path("/etc/ssl/certs/ca-certificates.crt")
_OWN_CERTIFICATES: Final = Path("/usr/local/share/ca-certificates")


def host_bundle() -> Path | None:
    """The host's CA bundle where its operator has added certificates to it; None where it is as Debian ships it."""
    return _BUNDLE if _BUNDLE.is_file() and any(_OWN_CERTIFICATES.rglob("*.crt")) else None


def make_order(claim: Claim, worker_id: str, settings: Settings) -> Order:
    """The order for `claim` on this worker."""
    return Order(
        claim=claim,
        api_url=settings.api,
        worker_id=worker_id,
        workspaces=settings.workspaces,
        engine=settings.engine,
        docker_host=settings.docker_host,
        network=settings.network,
        ca_bundle=settings.ca_bundle or host_bundle(),
        git_roots=settings.git_roots,
        memory_bytes=settings.memory_bytes,
        pids_limit=settings.pids_limit,
        max_artifact_bytes=settings.max_upload_bytes,
        log_format=settings.log_format,
        log_level=settings.log_level,
    )
