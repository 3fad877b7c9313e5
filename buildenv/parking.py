"""Containers that wait for their build: made, started and attached to before it comes, used once, then destroyed.

Nothing of a build is known to a container that waits: its environment, source and commands reach it later, as files of its
workspace. So a parked container is as fresh as one that is made for its build, and a build cannot tell the two apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from buildenv import variables, workspace
from buildenv.engine import Console, ContainerSpec, Engine, Image, Mount
from buildenv.shell import RUNNER_COMMAND
from buildenv.workspace import Workspace
from millrace.project import Shape


class Mould(Shape):
    """What containers have in common that can stand for one another. `image` is the reference, with aliases resolved."""

    image: str
    cpus: float
    memory_bytes: int
    pids: int
    network: str
    ca_bundle: Path | None = None
    privileged: bool = False


@dataclass(frozen=True, kw_only=True)
class Parked:
    """A container that waits, in a workspace that is laid out but for the sources."""

    mould: Mould
    image: Image
    container_id: str
    console: Console

    def fits(self, image: Image, engine: Engine) -> bool:
        """Whether it waits, and was made from what `image` is by now. Raises InfraProblem(ENGINE_LOST)."""
        return self.image.digest == image.digest and engine.state(self.container_id).running

    def drop(self, engine: Engine) -> None:
        """Remove the container unused. Raises InfraProblem(ENGINE_LOST)."""
        self.console.close()
        engine.remove(self.container_id)


def make(
    engine: Engine, mould: Mould, place: Workspace, *, name: str, labels: Mapping[str, str], more: Sequence[Mount] = ()
) -> str:
    """A container from `mould` over the workspace, which is laid out, with `more` mounts; it does not run yet. Its id."""
    mounts = [Mount(source=place.output, target=workspace.OUTPUT_INSIDE)]
    mounts.append(Mount(source=place.readonly, target=workspace.READONLY_INSIDE, read_only=True))
    if mould.ca_bundle is not None:
        mounts.append(Mount(source=mould.ca_bundle, target=variables.CA_INSIDE, read_only=True))
    return engine.create(
        ContainerSpec(
            name=name,
            image=mould.image,
            command=RUNNER_COMMAND,
            mounts=(*mounts, *more),
            labels=labels,
            cpus=mould.cpus,
            memory_bytes=mould.memory_bytes,
            pids=mould.pids,
            network=mould.network,
            privileged=mould.privileged,
        )
    )


def park(engine: Engine, mould: Mould, root: Path, *, name: str, labels: Mapping[str, str]) -> Parked:
    """A container that waits in the workspace `root`. Raises BuildProblem or InfraProblem; then nothing of it is left."""
    image = engine.ensure_image(mould.image)
    place = Workspace(root)
    place.make()
    container_id = make(engine, mould, place, name=name, labels=labels)
    try:
        console = engine.attach(container_id)
        engine.start(container_id)
    except BaseException:
        engine.remove(container_id)
        raise
    return Parked(mould=mould, image=image, container_id=container_id, console=console)
