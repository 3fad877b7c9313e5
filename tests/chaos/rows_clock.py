"""Clocks that are wrong or are set, and answers that never come: F-38, F-41."""

import subprocess
import tempfile
import time
from pathlib import Path

from tests.chaos.harness import Chaos, row
from tests.chaos.proxy import Proxy, Rule
from tests.chaos.rows_worker import AS_SHIPPED, FAR, ONCE_MORE, begun, end_host, far_worker, port_of
from tests.support.farm import Farm, wait_until


class WallClock:
    """The wall clock of the processes that have `environment`: it may be set, and starts right. Needs a C compiler."""

    def __init__(self, folder: Path) -> None:
        library = folder / "setclock.so"
        subprocess.run(
            ["cc", "-O1", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("setclock.c"), "-ldl"], check=True
        )
        self._file = folder / "ahead"
        self._file.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "SETCLOCK": str(self._file)}

    def set_ahead(self, by_s: int) -> None:
        """It shows so many seconds more than the true time."""
        with open(self._file, "r+b") as file:
            file.write(by_s.to_bytes(8, "little", signed=True))


def check_times(farm: Farm, build: str) -> None:
    """No phase ends before it begins, none lies outside its build."""
    shown = farm.show(build)
    for phase in shown["phases"]:
        assert phase.get("durationInSeconds", 0) >= 0, phase
        assert shown["startTime"] - 1 <= phase["startTime"] <= shown["endTime"] + 1, (phase, shown["startTime"], shown["endTime"])
        assert phase.get("endTime", phase["startTime"]) >= phase["startTime"], phase


@row(
    "F-41",
    done="the clock of a farm is set 1 h forward, then 1 h back, while one build runs and one waits; then its worker dies. "
    "Another worker's clock is 1 h ahead, of which the farm knows nothing",
    holds="no lease and no time-out ends early, no duration is negative, and the dead worker is still found in time",
    target="0 false expiries; re-queued <= 40 s",
)
def clocks_set(chaos: Chaos) -> None:
    with tempfile.TemporaryDirectory() as folder:
        clock = WallClock(Path(folder))
        with chaos.farm(MILLRACE_SLOTS="1", **AS_SHIPPED, **clock.environment) as farm:
            for ahead_s in (3600, 0):
                running = begun(chaos, farm, ["sleep 25"], timeoutInMinutes=5, queuedTimeoutInMinutes=5)
                chaos.submit(farm)
                waiting = chaos.accepted[-1]
                clock.set_ahead(ahead_s)
                for build in (running, waiting):
                    ended = farm.ended(build, 120)
                    assert ended["buildStatus"] == "SUCCEEDED", ended["millrace"]["message"]
            chaos.measure("attempts of 4 builds", chaos.attempts(farm))
            assert chaos.attempts(farm) == 4
            build = begun(chaos, farm, [ONCE_MORE])
            end_host(farm)
            began = time.monotonic()
            wait_until(lambda: farm.show(build)["millrace"]["attempts"][0]["ended"], 90)
            chaos.measure("queued again after the clock went back, s", time.monotonic() - began)
            assert time.monotonic() - began <= 40
            assert farm.ended(build)["buildStatus"] == "SUCCEEDED"
        clock.set_ahead(3600)
        with (
            chaos.farm(**AS_SHIPPED) as farm,
            far_worker(farm, farm.api_url, MILLRACE_ENGINE="docker", **clock.environment),
        ):
            build = farm.build(["sleep 3"], **FAR)
            chaos.accepted.append(build)
            assert farm.ended(build)["buildStatus"] == "SUCCEEDED"
            check_times(farm, build)


@row(
    "F-38",
    done="requests of a worker reach the API, but 3 answers of 10 never come back; 12 builds with logs and artifacts",
    holds="every call may be made again: no line of a log and no artifact is there twice or missing",
    target="0 duplicate chunks or artifacts, 0 attempts more",
)
def answers_lost(chaos: Chaos) -> None:
    with (
        chaos.farm(**AS_SHIPPED) as farm,
        Proxy(("127.0.0.1", port_of(farm)), http=True, seed=chaos.seed) as link,
        far_worker(farm, f"http://127.0.0.1:{link.port}", MILLRACE_ENGINE="docker", MILLRACE_SLOTS="3"),
    ):
        lost = Rule(match="/worker/v1/", share=0.3, unanswered=True)
        link.rules = [lost]
        commands = [
            "for n in $(seq 400); do echo line $n.; test $((n % 40)) != 0 || sleep 0.2; done",
            "echo $CODEBUILD_BUILD_ID > out.txt",
        ]
        chaos.accepted.append(farm.build(commands, more="artifacts:\n  files: [out.txt]\n", **FAR))
        chaos.submit_many(farm, 11)
        took = chaos.settled(farm, 280)
        link.rules = []
        chaos.measure("answers lost", lost.hits)
        chaos.measure("all 12 ended, s", took)
        assert lost.hits > 20
        assert chaos.states(farm) == {"SUCCEEDED": 12}
        for build in chaos.accepted:
            lines = [line for line in farm.log_of(build).splitlines() if line.startswith("line ")]
            assert lines == [f"line {n}." for n in range(1, 401)], build
            assert len(farm.show(build)["millrace"]["artifacts"]) == 1
        chaos.measure("attempts", chaos.attempts(farm))
        assert chaos.attempts(farm) == 12
