"""Tasks on Fargate beyond what every provider keeps: against moto, as docs/fargate.md has the cluster and the template."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from millrace.errors import InvalidInput, ProviderTrouble
from millrace.fleet import FargateProvider, FleetSettings
from millrace.settings import Settings
from millrace.vocabulary import GIB, Trouble
from scheduler import leases, lifecycle
from scheduler.db import Database
from scheduler.fleets import records
from scheduler.fleets.fargate import Fargate
from scheduler.fleets.provider import InstanceState, Order, WaitingBuild
from scheduler.fleets.scaler import Scaler
from scheduler.fleets.waiting import waiting_builds
from scheduler.leases import hash_token
from scheduler.models import Build
from tests.support import aws as clouds
from tests.support.aws import Aws
from tests.support.cluster import TEMPLATE, a_cluster, shape_of, template
from tests.support.fleets import Silent
from tests.support.records import a_build, a_claim, a_claim_request, a_project, a_report

ORDER = Order(fleet="tasks", generation=2, environment={"MILLRACE_FLEET": "tasks", "MILLRACE_BROKER_URL": "redis://:secret@x"})


@pytest.fixture(scope="module")
def aws() -> Iterator[Aws]:
    with clouds.running() as server:
        yield server


@pytest.fixture
def cluster(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in clouds.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    aws.ecs.asked.clear()
    with a_cluster(aws) as name:
        yield name
        aws.heal()


@pytest.fixture
def shape(aws: Aws, cluster: str) -> FargateProvider:
    return shape_of(aws, cluster)


def made(shape: FargateProvider, *, fleet: str = "tasks", **changes: object) -> Fargate:
    farm = Settings(data_dir=Path("/none"), api_url="https://farm.example.com/")
    return Fargate(fleet, shape.model_copy(update=changes), farm)


def build(number: int = 0, **changes: object) -> WaitingBuild:
    values: dict[str, object] = {
        "build_id": f"demo:{number:032x}",
        "attempt_no": 1,
        "image": "millrace/standard:latest",
        "cpus": 2,
        "memory_bytes": 4 * GIB,
        **changes,
    }
    return WaitingBuild(**values)  # type: ignore[arg-type]


def told(asked: dict[str, Any]) -> dict[str, str]:
    (override,) = asked["overrides"]["containerOverrides"]
    assert override["name"] == "build"
    return {one["name"]: one["value"] for one in override["environment"]}


def definition(aws: Aws, asked: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = aws.client("ecs").describe_task_definition(taskDefinition=asked["taskDefinition"])["taskDefinition"]
    return found


def definitions(aws: Aws) -> Sequence[str]:
    listed: list[str] = aws.client("ecs").list_task_definitions(status="ACTIVE")["taskDefinitionArns"]
    return sorted(arn for arn in listed if "-mr-" in arn)


def test_a_task_is_told_its_build_and_never_a_secret(aws: Aws, shape: FargateProvider) -> None:
    made(shape).grow_to(5, ORDER, [build()])
    (asked,) = aws.ecs.asked
    assert told(asked) == {
        "MILLRACE_API_URL": "https://farm.example.com",
        "MILLRACE_BUILD": build().build_id,
        "MILLRACE_ENGINE": "own",
        "MILLRACE_FLEET": "tasks",
        "MILLRACE_OWN_IMAGE": "millrace/standard:latest",
        "MILLRACE_SLOTS": "1",
    }
    assert "secret" not in json.dumps(asked)
    assert asked["launchType"] == "FARGATE"
    assert asked["networkConfiguration"]["awsvpcConfiguration"]["assignPublicIp"] == "DISABLED"
    (one,) = made(shape).find()
    assert (one.build_id, one.generation, one.state) == (build().build_id, 2, InstanceState.RUNNING)


def test_the_definition_is_the_template_with_the_builds_image_and_size(aws: Aws, shape: FargateProvider) -> None:
    provider = made(shape, images={"aws/codebuild/standard:7.0": "123456789012.dkr.ecr.us-east-1.amazonaws.com/standard:7"})
    provider.grow_to(9, ORDER, [build(1, image="aws/codebuild/standard:7.0"), build(2, cpus=4, memory_bytes=8 * GIB)])
    first, second = (definition(aws, asked) for asked in aws.ecs.asked)
    assert (first["cpu"], first["memory"], second["cpu"], second["memory"]) == ("2048", "4096", "4096", "8192")
    bundle, ours = first["containerDefinitions"]
    assert bundle == {**bundle, **TEMPLATE["containerDefinitions"][0]}
    assert ours["image"] == "123456789012.dkr.ecr.us-east-1.amazonaws.com/standard:7"
    assert (ours["memory"], ours["stopTimeout"], ours["linuxParameters"]["initProcessEnabled"]) == (4096 - 256, 120, False)
    assert ours["secrets"] == TEMPLATE["containerDefinitions"][1]["secrets"]
    assert first["executionRoleArn"] == TEMPLATE["executionRoleArn"]
    assert told(aws.ecs.asked[0])["MILLRACE_OWN_IMAGE"] == "aws/codebuild/standard:7.0"
    assert second["containerDefinitions"][1]["image"] == "millrace/standard:latest"


def test_a_definition_is_made_once_and_old_ones_go_when_the_template_is_new(aws: Aws, shape: FargateProvider) -> None:
    made(shape).grow_to(9, ORDER, [build(1), build(2)])
    (old,) = definitions(aws)
    made(shape).grow_to(9, ORDER, [build(3)])
    assert definitions(aws) == [old]
    aws.client("ecs").register_task_definition(**template(user="0"))
    made(shape).grow_to(9, ORDER, [build(4)])
    assert len(definitions(aws)) == 2, "tasks of the old one are there still"
    made(shape).release([one.id for one in made(shape).find()])
    made(shape).grow_to(9, ORDER, [build(5)])
    (new,) = definitions(aws)
    assert new != old


def test_never_more_than_the_total_and_none_for_a_build_that_has_one(aws: Aws, shape: FargateProvider) -> None:
    provider = made(shape)
    provider.grow_to(2, ORDER, [build(1), build(2), build(3)])
    assert {one.build_id for one in provider.find()} == {build(1).build_id, build(2).build_id}
    provider.grow_to(4, ORDER, [build(1), build(2), build(3)])
    assert len(provider.find()) == 3
    provider.grow_to(9, ORDER, [build(1, attempt_no=2)])
    assert len(provider.find()) == 4, "another attempt is another task"
    provider.grow_to(9, ORDER)
    assert len(provider.find()) == 4


def test_an_answer_that_was_lost_starts_no_second_task(aws: Aws, shape: FargateProvider) -> None:
    aws.spoil("RunTask", lambda _: b"{half an ans", times=1)
    with pytest.raises(ProviderTrouble):
        made(shape).grow_to(1, ORDER, [build()])
    first = aws.ecs.asked[-1]["clientToken"]
    aws.spoil("DescribeTasks", lambda _: b'{"tasks": [], "failures": []}', times=1)  # ECS's lists come after its deeds
    made(shape).grow_to(1, ORDER, [build()])
    assert aws.ecs.asked[-1]["clientToken"] == first
    assert len(made(shape).find()) == 1


def test_a_build_whose_tasks_end_before_they_claim_it_is_given_up_for_now(aws: Aws, shape: FargateProvider) -> None:
    provider = made(shape)
    for _ in range(3):
        provider.grow_to(5, ORDER, [build(1)])
        (one,) = provider.find()
        aws.client("ecs").stop_task(cluster=shape.cluster, task=one.id, reason="CannotPullContainerError: no such image")
    assert len({asked["clientToken"] for asked in aws.ecs.asked}) == 3
    with pytest.raises(ProviderTrouble, match="CannotPullContainerError: no such image") as caught:
        provider.grow_to(5, ORDER, [build(1), build(2)])
    assert caught.value.trouble is Trouble.MISSING
    assert [one.build_id for one in provider.find()] == [build(2).build_id], "others start all the same"


def test_a_build_that_fits_no_task_is_named_and_others_start(aws: Aws, shape: FargateProvider) -> None:
    with pytest.raises(ProviderTrouble, match="needs 36 vCPUs") as caught:
        made(shape).grow_to(5, ORDER, [build(1, cpus=36, memory_bytes=72 * GIB), build(2)])
    assert "smaller compute type" in caught.value.hint
    assert len(made(shape).find()) == 1


@pytest.mark.parametrize(
    ("reason", "kind"), [("RESOURCE:ENI", Trouble.CAPACITY), ("Capacity is unavailable at this time.", Trouble.CAPACITY)]
)
def test_a_task_that_was_not_placed_is_a_lack_of_room(aws: Aws, shape: FargateProvider, reason: str, kind: Trouble) -> None:
    aws.spoil("RunTask", lambda _: json.dumps({"tasks": [], "failures": [{"reason": reason}]}).encode(), times=1)
    with pytest.raises(ProviderTrouble, match=reason) as caught:
        made(shape).grow_to(5, ORDER, [build()])
    assert caught.value.trouble is kind


@pytest.mark.parametrize(
    ("action", "code", "status", "kind"),
    [
        ("RunTask", "ThrottlingException", 400, Trouble.THROTTLED),
        ("RunTask", "AccessDeniedException", 400, Trouble.CREDENTIALS),
        ("ListTasks", "ClusterNotFoundException", 400, Trouble.MISSING),
        ("DescribeTasks", "ServerException", 500, Trouble.AWAY),
        ("RegisterTaskDefinition", "ThrottlingException", 400, Trouble.THROTTLED),
    ],
)
def test_what_ecs_refuses_is_named(aws: Aws, shape: FargateProvider, action: str, code: str, status: int, kind: Trouble) -> None:
    if action == "DescribeTasks":
        made(shape).grow_to(1, ORDER, [build(9)])
    aws.fail(action, code, status=status)
    with pytest.raises(ProviderTrouble) as caught:
        made(shape).grow_to(5, ORDER, [build()])
    assert caught.value.trouble is kind
    assert caught.value.hint


def test_many_tasks_are_all_found(aws: Aws, shape: FargateProvider) -> None:
    made(shape).grow_to(130, ORDER, [build(number) for number in range(130)])
    aws.calls.clear()
    assert len(made(shape).find()) == 130
    assert aws.calls.count("DescribeTasks") == 2


def test_one_that_ends_is_stopping_and_counts(aws: Aws, shape: FargateProvider) -> None:
    made(shape).grow_to(1, ORDER, [build(1)])

    def ending(body: bytes) -> bytes:
        said = json.loads(body)
        for task in said["tasks"]:
            task |= {"lastStatus": "DEPROVISIONING", "desiredStatus": "STOPPED"}
        return json.dumps(said).encode()

    aws.spoil("DescribeTasks", ending)
    assert [one.state for one in made(shape).find()] == [InstanceState.STOPPING]
    made(shape).grow_to(1, ORDER, [build(2)])
    assert len(aws.ecs.asked) == 1


def test_spot_is_asked_for_by_its_capacity_provider(aws: Aws, shape: FargateProvider) -> None:
    made(shape, spot=True).check()
    made(shape, spot=True).grow_to(1, ORDER, [build()])
    (asked,) = aws.ecs.asked
    assert asked["capacityProviderStrategy"] == [{"capacityProvider": "FARGATE_SPOT", "weight": 1}]
    assert "launchType" not in asked


BUILD = TEMPLATE["containerDefinitions"][1]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (template(name="other"), ["no container 'build', it has bundle, other"]),
        (template(entryPoint=["/bin/sh"]), ['the entryPoint ["/millrace/millrace", "worker", "--once"]']),
        (template(secrets=None), ["must get MILLRACE_WORKER_TOKEN by its secrets"]),
        (
            template(environment=[{"name": "MILLRACE_WORKER_TOKEN", "value": "mr_wrk_x"}]),
            ["MILLRACE_WORKER_TOKEN in plain text"],
        ),
        (template(mountPoints=None), ["must mount the bundle's volume at /millrace"]),
        (template(dependsOn=None), ["must depend on 'bundle' with condition SUCCESS"]),
        (template(secrets=None, mountPoints=None), ["by its secrets", "must mount the bundle's volume"]),
        ({**template(), "networkMode": "host", "requiresCompatibilities": ["EC2"]}, ["must be awsvpc", "must have FARGATE"]),
        (
            {**template(), "containerDefinitions": [{**TEMPLATE["containerDefinitions"][0], "essential": True}, BUILD]},
            ["must not be essential"],
        ),
    ],
)
def test_a_template_that_does_not_fit_says_all_that_is_wrong(
    aws: Aws, shape: FargateProvider, wrong: dict[str, Any], words: list[str]
) -> None:
    aws.client("ecs").register_task_definition(**wrong)
    with pytest.raises(InvalidInput) as caught:
        made(shape).check()
    assert len(caught.value.fields) == len(words)
    for some in words:
        assert some in caught.value.message
    assert "docs/fargate.md" in caught.value.hint


def test_what_is_not_there_is_said(aws: Aws, shape: FargateProvider) -> None:
    with pytest.raises(InvalidInput, match="there is no cluster 'nowhere' in us-east-1"):
        made(shape, cluster="nowhere").check()
    with pytest.raises(ProviderTrouble) as caught:
        made(shape, task_definition="no-such").check()
    assert caught.value.trouble is Trouble.MISSING
    with pytest.raises(InvalidInput, match=r"tasks cannot reach the API at http://127\.0\.0\.1:8420"):
        made(shape, api_url="http://127.0.0.1:8420").check()
    with a_cluster(aws, spot=False) as name, pytest.raises(InvalidInput, match="has not the capacity provider FARGATE_SPOT"):
        made(shape, cluster=name, spot=True).check()
    made(shape).check()


def test_without_credentials_it_says_so(shape: FargateProvider, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ProviderTrouble) as caught:
        made(shape).check()
    assert caught.value.trouble is Trouble.CREDENTIALS


def test_waiting_builds_are_told_of_in_their_order_and_within_limits(database: Database, settings: Settings) -> None:
    a_project(database, "small")
    a_project(database, "large", concurrentBuildLimit=1)
    first = a_build(database, settings, "large", computeTypeOverride="BUILD_GENERAL1_LARGE")
    a_build(database, settings, "large")
    last = a_build(database, settings, "small")
    with database.reading() as session:
        told = waiting_builds(session, "default")
    sizes = {one.build_id: (one.attempt_no, one.cpus, one.memory_bytes) for one in told}
    assert sizes == {first: (1, 8, 16 * GIB), last: (1, 2, 4 * GIB)}
    assert {one.image for one in told} == {"millrace/base:latest"}
    claimed = a_claim(database, settings)
    with database.reading() as session:
        (left,) = waiting_builds(session, "default")
        assert waiting_builds(session, "other") == []
    assert {left.build_id, claimed.build_id} == {first, last}, "the project with a limit has one that runs or waits, never two"


def test_projects_take_turns_by_their_weight_after_what_runs(database: Database, settings: Settings) -> None:
    a_project(database, "busy")
    for _ in range(6):
        a_build(database, settings, "busy")
    a_claim(database, settings)
    a_project(database, "calm", millrace={"weight": 2})
    a_project(database, "late")
    for name in ("calm", "calm", "calm", "late", "late"):
        a_build(database, settings, name)
    with database.reading() as session:
        told = [one.build_id.partition(":")[0] for one in waiting_builds(session, "default")]
    assert told == ["calm", "calm", "late", "calm", "busy", "late", "busy", "busy", "busy", "busy"]


def test_a_project_at_its_limit_hides_no_builds_of_others(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler.fleets.waiting.MOST", 2)
    a_project(database, "large", concurrentBuildLimit=1)
    a_project(database, "larger", concurrentBuildLimit=1)
    a_project(database, "small")
    for name in ("large", "larger"):
        for _ in range(4):
            a_build(database, settings, name)
    others = [a_build(database, settings, "small") for _ in range(2)]
    with database.transaction() as session:  # they were built often before, which puts them behind nobody
        session.execute(sa.update(Build).where(Build.id.in_(others)).values(number=Build.number + 900))
    a_project(database, "young")
    later = a_build(database, settings, "young")
    with database.transaction() as session:
        session.execute(sa.update(Build).where(Build.id == later).values(queued_ms=Build.queued_ms + 1000))
    a_claim(database, settings)
    with database.reading() as session:
        told = [one.build_id for one in waiting_builds(session, "default")]
    assert len(told) == 2
    assert told[0].startswith("larger:")
    assert told[1] == others[0]


def test_the_scaler_starts_a_task_for_each_build_and_none_that_is_not_needed(
    aws: Aws, shape: FargateProvider, database: Database, settings: Settings
) -> None:
    a_project(database)
    provider = shape.model_dump(mode="json", by_alias=True, exclude_none=True)
    wanted = {"provider": provider, "scaling": {"maximum": 2, "shrinkAfterS": 0}, "worker": {"slots": 1}}
    records.put(database, "default", FleetSettings.model_validate(wanted))
    bell: Any = Silent()
    scaler = Scaler(database, bell, settings)
    scaler.round()
    assert aws.ecs.asked == []
    builds = [a_build(database, settings) for _ in range(3)]
    for _ in range(4):
        scaler.round()
    tasks = made(shape, fleet="default").find()
    assert len(tasks) == 2
    assert {one.build_id for one in tasks} < set(builds)
    assert {told(asked)["MILLRACE_GENERATION"] for asked in aws.ecs.asked} == {str(one.generation) for one in tasks}
    first = tasks[0]
    claim = leases.claim(
        database, a_claim_request(first.id, slots=1, free_slots=1, only=first.build_id, generation=first.generation), settings
    )
    assert claim is not None
    assert claim.build_id == first.build_id
    lifecycle.finish(database, claim.build_id, claim.attempt_no, hash_token(claim.token), a_report())
    leases.claim(database, a_claim_request(first.id, slots=1, free_slots=0, state="gone", generation=first.generation), settings)
    aws.client("ecs").stop_task(cluster=shape.cluster, task=first.id, reason="Essential container in task exited")
    again = Scaler(database, bell, settings)  # one that knows only what is written and listed
    for _ in range(4):
        again.round()
    assert {one.build_id for one in made(shape, fleet="default").find()} == set(builds) - {first.build_id}
    assert len(aws.ecs.asked) == 3
