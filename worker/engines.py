"""Which engine the settings name."""

from collections.abc import Mapping
from functools import partial

from buildenv.docker_engine import DockerEngine
from buildenv.engine import Engine
from buildenv.fake_engine import FakeEngine
from millrace.errors import InfraProblem, InvalidInput
from millrace.failpoints import guard
from millrace.vocabulary import Reason


def make_engine(name: str, docker_host: str | None, environ: Mapping[str, str]) -> Engine:
    """The engine called `name`. The fake one obeys the `FAKE_*` variables of `environ`. Raises InvalidInput for `own`."""
    if name == "own":
        raise InvalidInput(
            "MILLRACE_ENGINE is 'own': builds in the worker's own container, which is for one build only",
            hint="Run 'millrace worker --once', or set MILLRACE_ENGINE to docker.",
        )
    return guarded(FakeEngine(environ) if name == "fake" else DockerEngine(docker_host))


def guarded(engine: Engine) -> Engine:
    """The engine, with failpoints around its calls."""
    return guard(engine, "engine", partial(InfraProblem, reason=Reason.ENGINE_LOST))
