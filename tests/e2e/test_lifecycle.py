"""What happens to a build from outside while it runs: stops in every phase, and a debug session."""

import docker
import pytest

from millrace.client import build_path
from tests.support.farm import Farm

pytestmark = pytest.mark.docker


@pytest.mark.parametrize("phase", ["install", "pre_build", "build", "post_build"])
@pytest.mark.parametrize("where", ["commands", "finally"])
def test_a_stop_ends_any_phase_at_once(farm: Farm, phase: str, where: str) -> None:
    rest = "" if where == "commands" else "    commands: ['exit 1']\n"
    waits = f"    {where}:\n      - echo waiting in $CODEBUILD_BUILD_ID\n      - sleep 300\n"
    spec = f"version: 0.2\nphases:\n  {phase}:\n{rest}{waits}"
    build_id = farm.build([], project=f"stop-{phase}-{where}", source={"type": "NO_SOURCE", "buildspec": spec})
    farm.await_log(build_id, f"\nwaiting in {build_id}")
    farm.client.post(f"{build_path(build_id)}/stop")
    build = farm.ended(build_id)
    assert (build["buildStatus"], build["millrace"]["reason"]) == ("STOPPED", "user.cancelled")
    *_, stopped, completed = build["phases"]
    assert (stopped["phaseType"], stopped["phaseStatus"]) == (phase.upper(), "STOPPED")
    assert (completed["phaseType"], set(completed)) == ("COMPLETED", {"phaseType", "startTime"})


def test_a_breakpoint_waits_in_a_debug_session_until_it_is_resumed(farm: Farm) -> None:
    farm.build(["true"], project="debugged")
    spec = "version: 0.2\nphases:\n  build:\n    commands: [echo first, codebuild-breakpoint, echo went on]\n"
    wanted = {"projectName": "debugged", "buildspecOverride": spec, "debugSessionEnabled": True}
    build_id = farm.client.post("/v1/builds", wanted)["id"]
    farm.await_log(build_id, "codebuild-breakpoint: to go on: ")
    session = farm.show(build_id)["debugSession"]
    assert session["sessionEnabled"] is True
    container, _, worker = session["sessionTarget"].partition("@")
    assert worker == farm.show(build_id)["millrace"]["workerId"]
    client = docker.from_env(timeout=20)
    try:
        status, said = client.containers.get(container).exec_run(["/codebuild/readonly/bin/codebuild-resume"])
    finally:
        client.close()
    assert status == 0, said
    build = farm.ended(build_id)
    assert build["buildStatus"] == "SUCCEEDED"
    assert "codebuild-breakpoint: resumed\n" in farm.log_of(build_id)
