"""What a worker hands to an attempt's process: where it waits and with what, then its build."""

from pathlib import Path
from typing import Final, Literal

from buildenv import images
from buildenv.engine import EngineInfo
from buildenv.parking import Mould
from millrace.contract import Claim
from millrace.log import LogFormat
from millrace.project import Shape
from millrace.settings import Settings


class ParkOrder(Shape):
    """What an attempt's process is told when it starts: where it is, and the container to have ready, if any."""

    worker_id: str
    workspaces: Path
    place: str
    mould: Mould | None
    engine: Literal["docker", "own", "fake"]
    docker_host: str | None
    failpoint: str | None
    home: Path
    log_format: LogFormat
    log_level: str


class Order(Shape):
    """The build that it is for. It holds the attempt's token, so it goes through a connection, never argv or environ."""

    claim: Claim
    claimed_at_s: float
    """When the claim was answered, by the host's monotonic clock."""
    api_url: str
    mould: Mould
    git_roots: tuple[Path, ...]
    max_artifact_bytes: int
    part_bytes: int
    mirrors: Path | None
    layers: Path | None = None


_BUNDLE: Final = Path("/etc/ssl/certs/ca-certificates.crt")
_OWN_CERTIFICATES: Final = Path("/usr/local/share/ca-certificates")


def host_bundle() -> Path | None:
    """The host's CA bundle where its operator has added certificates to it; None where it is as Debian ships it."""
    return _BUNDLE if _BUNDLE.is_file() and any(_OWN_CERTIFICATES.rglob("*.crt")) else None


def make_park_order(place: str, mould: Mould | None, worker_id: str, settings: Settings) -> ParkOrder:
    """The order to wait at `place` on this worker."""
    return ParkOrder(
        worker_id=worker_id,
        workspaces=settings.workspaces,
        place=place,
        mould=mould,
        engine=settings.engine,
        docker_host=settings.docker_host,
        failpoint=settings.failpoint,
        home=settings.home,
        log_format=settings.log_format,
        log_level=settings.log_level,
    )


def mould_of(claim: Claim, host: EngineInfo, settings: Settings) -> Mould:
    """What the container of `claim` is like on this worker."""
    environment = claim.settings.environment
    need = environment.need
    return Mould(
        image=images.resolve_alias(environment.image),
        cpus=min(need.cpu_millis / 1000, host.cpus),
        memory_bytes=min(settings.memory_bytes or need.memory_bytes, host.memory_bytes),
        pids=settings.pids_limit,
        network=settings.network,
        ca_bundle=settings.ca_bundle or host_bundle(),
        privileged=environment.privileged_mode and settings.privileged,
    )


def make_order(claim: Claim, claimed_at_s: float, mould: Mould, settings: Settings) -> Order:
    """The order for `claim` on this worker."""
    return Order(
        claim=claim,
        claimed_at_s=claimed_at_s,
        api_url=settings.api,
        mould=mould,
        git_roots=settings.git_roots,
        max_artifact_bytes=settings.max_upload_bytes,
        part_bytes=settings.part_bytes,
        mirrors=settings.mirrors if settings.mirrors_bytes else None,
        layers=settings.layers if settings.cache_bytes else None,
    )
