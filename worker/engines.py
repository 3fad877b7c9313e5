"""Which engine the settings name."""

from collections.abc import Mapping

from buildenv.docker_engine import DockerEngine
from buildenv.engine import Engine
from buildenv.fake_engine import FakeEngine


def make_engine(name: str, docker_host: str | None, environ: Mapping[str, str]) -> Engine:
    """The engine called `name`. The fake one obeys the `FAKE_*` variables of `environ`."""
    return FakeEngine(environ) if name == "fake" else DockerEngine(docker_host)
