"""Logs by the command line on a whole farm: proved whole, or cut by a killed attempt and marked, before and after they move."""

import os
import signal
from pathlib import Path

import pytest

from millrace.ids import log_key
from tests.support.farm import Farm, children_of, wait_until

pytestmark = pytest.mark.docker


def test_a_log_is_proved_and_that_of_a_killed_attempt_is_a_prefix_with_one_line_behind_it(farm: Farm) -> None:
    command = "for n in $(seq 1 2000); do echo line-$n; done; test $MILLRACE_ATTEMPT -gt 1 || sleep 300"
    build = farm.build([command], project="logs", artifacts={"type": "NO_ARTIFACTS"})
    farm.await_log(build, "\nline-2000\n")
    os.kill(farm.attempt_pid(build), signal.SIGKILL)
    followed = farm.cli("logs", build, "--follow", "--attempt", "1")
    assert followed.returncode == 0, followed.stderr
    assert farm.ended(build)["buildStatus"] == "SUCCEEDED"
    first = farm.cli("logs", build, "--attempt", "1").stdout
    written, marker = first[: first.index("[Millrace] ")], first[first.index("[Millrace] ") :]
    assert written.endswith("\nline-2000\n")
    says = f"the log ends here: the worker was lost, and what it wrote after byte {len(written.encode())} never came"
    assert marker == f"[Millrace] {says}\n"
    second = farm.cli("logs", build).stdout
    assert "\nline-2000\n" in second
    assert "[Millrace]" not in second
    assert followed.stdout == first + second

    def proofs() -> tuple[str, str]:
        whole, cut = farm.cli("logs", build, "--verify"), farm.cli("logs", build, "--verify", "--attempt", "1")
        assert (whole.returncode, cut.returncode) == (0, 1), (whole, cut)
        return whole.stdout, cut.stdout

    in_database = proofs()
    assert in_database[0].startswith(f"whole: {len(second.encode())} bytes, ")
    assert in_database[1].startswith(f"not whole: {says}; before that: {len(written.encode())} bytes, ")
    objects = farm.home / "data" / "objects"
    wait_until(lambda: all(any(objects.rglob(log_key(build, number))) for number in (1, 2)))
    assert proofs() == in_database
    assert farm.cli("logs", build, "--attempt", "1").stdout == first
    assert farm.cli("logs", build, "--attempt", "3").stderr.startswith("error: build")
    assert farm.cli("logs", build, "--verify", "--follow").returncode == 1


def test_a_build_that_prints_a_lot_takes_little_memory_and_every_byte_is_there(farm: Farm) -> None:
    """A hundred million bytes that hardly get smaller, and one line of as many again."""
    command = "head -c 75000000 /dev/urandom | base64; head -c 100000000 /dev/zero | tr '\\0' x; sleep 300"
    build = farm.build([command], project="logs", artifacts={"type": "NO_ARTIFACTS"})
    wait_until(lambda: farm.client.log_footer(build)["stored"]["bytes"] > 201_000_000, 60)
    for pid in (farm.attempt_pid(build), *children_of(farm.pid_of("millrace.cli api"))):
        status = Path(f"/proc/{pid}/status").read_text()
        assert int(status.partition("VmHWM:")[2].split()[0]) < 200 * 1024, status
    farm.client.post(f"/v1/builds/{build}/stop")
    assert farm.ended(build)["buildStatus"] == "STOPPED"
    proof = farm.cli("logs", build, "--verify")
    assert (proof.returncode, proof.stdout.startswith("whole: 201")) == (0, True), proof
