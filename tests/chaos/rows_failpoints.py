"""Every failpoint there is: the process that comes to it first is killed there. Run and told with the rows of the matrix."""

from contextlib import suppress

from millrace.failpoints import POINTS
from tests.chaos.harness import Chaos, row
from tests.support.farm import new_farm
from tests.support.killing import WATCHED, Stage, pass_all, strike_all

FARMS = 4


@row(
    "failpoints",
    done=f"the process that first comes there is killed at each of {len(POINTS)} places: before and after each commit, bell, call"
    " to the object store, the engine and the API",
    holds="what was asked for ends as it must, with one visible result; a run without kills passes each place, and no other",
    target="0 lost, 0 doubled, 0 leftovers at every place",
)
def failpoints(chaos: Chaos) -> None:
    parked = [point for point in POINTS if point.startswith("engine.")]
    with new_farm(**WATCHED | {"MILLRACE_PARKED": "1"}) as farm:
        farm.start()
        stage = Stage(farm)
        stage.prepare()
        pass_all(stage)
        assert stage.passed() == set(POINTS), sorted(stage.passed() ^ set(POINTS))
    builds = len(stage.expected)
    groups = [(0, POINTS[start::FARMS]) for start in range(FARMS)] + [(1, tuple(parked))]
    wrong: list[str] = []
    for waiting, points in groups:
        if not waiting:
            points = tuple(point for point in points if not point.startswith("engine.rename"))  # of parked containers alone
        with new_farm(**WATCHED | {"MILLRACE_PARKED": str(waiting)}) as farm:
            farm.start()
            stage = Stage(farm)
            stage.prepare()
            try:
                strike_all(stage, points)
            except AssertionError as error:
                wrong.append(str(error))
                for part in ("worker", "scheduler", "api"):
                    with suppress(FileNotFoundError):
                        chaos.logs += "".join(f"{part}: {line}\n" for line in farm.part_log(part).splitlines()[-30:])
            builds += len(stage.expected)
    chaos.measure("kills", sum(len(points) for _waiting, points in groups) - 2)
    chaos.measure("builds", builds)
    assert not wrong, "\n".join(wrong)
