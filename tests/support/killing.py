"""Kills a farm's processes at failpoints: for each place a story that passes it, told until the farm has borne the kill.

A story arms the place, has the farm do something, and says how that must end; whoever was killed is started again by the
supervisor, or, where it is a command, by the operator who calls it anew.
"""

import hashlib
import io
import json
import os
import secrets
import signal
import tarfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeVar

import httpx
import sqlalchemy as sa

from millrace.client import ApiRefused
from millrace.contract import LEAST_PART_BYTES
from millrace.errors import MillraceError, NotFound, Unavailable
from millrace.failpoints import MARK, ORDER, PASSED, POINTS
from millrace.webhook import EventKind, Heard, SourceEvent
from scheduler import inbox
from scheduler.db import Database, now_ms
from scheduler.inbox import Arrival
from scheduler.models import IS_HELD, Attempt, Build, CacheEntry, Delivery, Notice, Token, Webhook
from tests.support import killing_fleets
from tests.support.farm import SHORT_LEASES, Farm, wait_until
from tests.support.forge import Forge
from tests.support.killing_fleets import upgraded
from tests.support.providers import standing_in
from tests.support.records import a_project_json
from tests.support.webhooks import SHA, github_pull_request, sent

T = TypeVar("T")
WATCHED: Final = {
    **SHORT_LEASES,
    "MILLRACE_TESTING": "1",
    "MILLRACE_FAILPOINT": "watch",
    "MILLRACE_SLOTS": "2",
    "MILLRACE_PART_BYTES": str(LEAST_PART_BYTES),
}
"""Settings of a farm that is killed at places."""
_RICH: Final = """version: 0.2
env:
  parameter-store:
    WORD: word
phases:
  build:
    commands:
      - test -n "$WORD"
      - cat in.txt > out.txt
      - mkdir -p kept /opt/kept && date > kept/here && date > /opt/kept/there
artifacts:
  files: [out.txt, /opt/kept/there]
cache:
  paths: [kept/**/*, /opt/kept/**/*]
"""
_COPIED: Final = _RICH.replace("/opt/kept/**/*", "/opt/kept/t*")
"""A glob that is no folder: this cache is copied, not mounted."""
_BORNE_S: Final = 100.0
_GONE_S: Final = 90.0
"""By then the janitor has removed what was left."""


@dataclass
class Stage:
    """A farm with the place at which it is killed next, unless it `spares`. `expected`: how each build must end."""

    farm: Farm
    point: str = ""
    spares: bool = False
    expected: dict[str, str] = field(default_factory=dict)
    _count: int = 0

    def prepare(self) -> None:
        """The projects and what they need."""
        client = self.farm.client
        client.put("/v1/secrets/word", {"value": "hidden"})
        for name, spec in (("rich", _RICH), ("copied", _COPIED)):
            body = _packed({"buildspec.yml": spec, "in.txt": "in\n"})
            location = client.upload(io.BytesIO(body), len(body), hashlib.sha256(body).hexdigest())
            project = a_project_json(
                name,
                source={"type": "S3", "location": location},
                artifacts={"type": "S3", "packaging": "NONE", "location": "releases", "namespaceType": "BUILD_ID"},
                cache={"type": "S3"},
            )
            client.post("/v1/projects", project)
        client.post(
            "/v1/projects", a_project_json("hooked", source={"type": "GIT", "location": "https://127.0.0.1:1/nothing.git"})
        )
        client.post("/v1/projects/hooked/webhook")
        spare = a_project_json(killing_fleets.SPARE)
        spare["environment"] |= {"fleet": {"fleetArn": killing_fleets.SPARE}}
        client.post("/v1/projects", spare)
        told = {"type": "GITHUB_ENTERPRISE", "location": "https://127.0.0.1:1/o/r.git", "reportBuildStatus": True}
        told |= {"auth": {"type": "SECRETS_MANAGER", "resource": "word"}}
        client.post("/v1/projects", a_project_json("told", source=told))
        large = f"head -c {LEAST_PART_BYTES + 1} /dev/urandom > large.bin"
        for name, command in (("slow", "sleep 60"), ("short", "sleep 4"), ("large", large)):
            spec = f"version: 0.2\nphases:\n  build:\n    commands:\n      - {command}\n"
            if name == "large":
                spec += "artifacts:\n  files: [large.bin]\n"
            client.post("/v1/projects", a_project_json(name, source={"type": "NO_SOURCE", "buildspec": spec}))

    def arm(self) -> None:
        """From now on the process that comes to the place first is killed there."""
        if self.spares:
            return
        home = self.farm.home / "data"
        (home / f"{ORDER}.new").write_text(self.point)
        os.rename(home / f"{ORDER}.new", home / ORDER)

    def struck(self) -> bool:
        """Whether that has happened."""
        return not (self.farm.home / "data" / ORDER).exists()

    def ask(self, project: str, ends: str = "SUCCEEDED") -> str:
        """A build, asked for until there is an answer, as a client does that keeps its key."""
        self._count += 1
        key = f"{project}-{self._count}"
        build = str(
            again(lambda: self.farm.client.post("/v1/builds", {"projectName": project}, **{"Idempotency-Key": key}))["id"]
        )
        assert build not in self.expected
        self.expected[build] = ends
        return build

    def held(self, build: str) -> None:
        """Wait until its commands run."""
        wait_until(lambda: again(lambda: self.farm.show(build))["millrace"]["state"] == "RUNNING", 60)

    def ended(self, build: str) -> dict[str, Any]:
        """The build, once it has ended as it must."""
        return wait_until(lambda: self._ended(build), _BORNE_S) or {}

    def _ended(self, build: str) -> dict[str, Any] | None:
        shown = again(lambda: self.farm.show(build))
        if not shown["buildComplete"]:
            return None
        assert shown["buildStatus"] == self.expected[build], (self.point, build, shown["millrace"])
        return shown

    def change(self, statement: sa.Update | sa.Insert) -> int:
        """Change the farm's records behind its back, as the time that passes would; how many rows."""
        database = Database(f"sqlite:///{self.farm.home / 'data' / 'millrace.db'}")
        try:
            with database.transaction() as session:
                return int(session.execute(statement).rowcount)  # type: ignore[attr-defined]  # an update's result is a cursor's
        finally:
            database.dispose()

    def look(self, query: sa.Select[tuple[Any]]) -> list[Any]:
        """Read the farm's records."""
        database = Database(f"sqlite:///{self.farm.home / 'data' / 'millrace.db'}")
        try:
            with database.reading() as session:
                return list(session.scalars(query))
        finally:
            database.dispose()

    def strike(self, point: str) -> None:
        """Tell the story of `point`, and wait until the kill has happened and been borne."""
        self.point = point
        known = set(self.expected)
        try:
            _story_of(point)(self)
            wait_until(self.struck, _BORNE_S)
        except AssertionError as error:
            raise AssertionError(f"{point}: {error}") from error
        assert (self.farm.home / "data" / MARK).read_text() == point
        wait_until(self.farm.client.alive, 60)
        for build in set(self.expected) - known:
            shown = self.ended(build)
            attempts = {item["key"].split("/")[2] for item in shown["millrace"]["artifacts"]}
            assert len(attempts) <= 1, (point, shown)
            if shown["projectName"] in ("rich", "copied"):
                assert len(shown["millrace"]["artifacts"]) == 2, (point, shown)

    def passed(self) -> set[str]:
        """The places that the farm's processes have passed."""
        return set((self.farm.home / "data" / PASSED).read_text().split())

    def check(self, within_s: float = 150) -> None:
        """At rest all that was accepted is there, once, and nothing is left over: `millrace fsck` and the engine say so."""
        journal = self.farm.home / "journal"
        lines = [{"op": "start", "key": build, "status": 201, "build": build} for build in self.expected]
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
        until = time.monotonic() + within_s
        while True:
            asked = self.farm.cli("fsck", "--json", "--journal", str(journal), "--at-rest", "--host", "--objects", "0")
            if asked.returncode == 0:
                break
            assert time.monotonic() < until, asked.stdout + asked.stderr
            time.sleep(3)
        unasked = set(self.look(sa.select(Build.id))) ^ set(self.expected)
        assert not unasked, f"builds that nobody asked for, or that are gone: {unasked}"
        if self.farm.environment["MILLRACE_PARKED"] == "0":
            wait_until(lambda: self.farm.containers() == [], _GONE_S)  # fsck lets what is young be


def _packed(files: dict[str, str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return packed.getvalue()


def again(call: Callable[[], T]) -> T:
    """The call's answer, asked for until the farm gives one."""
    until = time.monotonic() + 60
    while True:
        try:
            return call()
        except Unavailable:
            assert time.monotonic() < until
            time.sleep(0.2)


def settle(call: Callable[[], object], there: Callable[[], bool]) -> None:
    """Make a call that is not made twice: where its answer is lost, look whether it was carried out."""
    until = time.monotonic() + 60
    while True:
        try:
            call()
            return
        except (ApiRefused, NotFound, Unavailable) as error:
            if not isinstance(error, Unavailable):
                assert there(), error
                return
            assert time.monotonic() < until
            time.sleep(0.2)


def _is_there(stage: Stage, path: str) -> bool:
    try:
        again(lambda: stage.farm.client.get(path))
    except MillraceError:
        return False
    return True


def _rich(stage: Stage) -> None:
    stage.arm()
    stage.ended(stage.ask("rich"))


def _renewed(stage: Stage) -> None:
    stage.arm()
    stage.ended(stage.ask("short"))


def _copied(stage: Stage) -> None:
    """The second has a cache to restore."""
    stage.ended(stage.ask("copied"))
    stage.arm()
    stage.ended(stage.ask("copied"))


def _large(stage: Stage) -> None:
    stage.arm()
    stage.ended(stage.ask("large"))


def _stopped(stage: Stage) -> None:
    build = stage.ask("slow", "STOPPED")
    stage.held(build)
    stage.arm()
    again(lambda: stage.farm.client.post(f"/v1/builds/{build}/stop"))


def _lost(stage: Stage) -> None:
    build = stage.ask("short")
    stage.held(build)
    stage.arm()

    def lose() -> bool:
        """Renewals come meanwhile, so it is tried until there is a second attempt, or a process was killed for it."""
        stage.change(sa.update(Build).where(Build.id == build, Build.attempt_no == 1, IS_HELD).values(lease_expires_ms=1))
        killed = not stage.spares and stage.struck()
        return killed or stage.look(sa.select(Build.attempt_no).where(Build.id == build)) != [1]

    wait_until(lose, 30)
    stage.ended(build)


def _project(stage: Stage) -> None:
    client, verb, path = stage.farm.client, stage.point.split(".")[2], f"/v1/projects/{stage.point.replace('.', '-')}"
    wanted = a_project_json(path.rpartition("/")[2])
    if verb == "create":
        stage.arm()
    settle(lambda: client.post("/v1/projects", wanted), lambda: _is_there(stage, path))
    if verb == "update":
        stage.arm()
        again(lambda: client.put(path, {**wanted, "description": "changed"}))
        assert again(lambda: client.get(path))["description"] == "changed"
    if verb == "delete":
        stage.arm()
        settle(lambda: client.delete(path), lambda: not _is_there(stage, path))
        assert not _is_there(stage, path)


def _fleet(stage: Stage) -> None:
    stage.arm()
    again(lambda: stage.farm.client.post("/v1/fleets/default/pause", {"why": "a test"}))
    assert again(lambda: stage.farm.client.get("/v1/fleets/default"))["paused"]
    again(lambda: stage.farm.client.post("/v1/fleets/default/resume"))
    stage.ended(stage.ask("rich"))


def _secret(stage: Stage) -> None:
    client, path = stage.farm.client, "/v1/secrets/other"
    if ".put." in stage.point:
        stage.arm()
    again(lambda: client.put(path, {"value": "v"}))
    if ".delete." in stage.point:
        stage.arm()
        settle(lambda: client.delete(path), lambda: True)
        assert "other" not in [one["name"] for one in again(lambda: client.get("/v1/secrets"))["secrets"]]


def _hook(stage: Stage) -> None:
    """A webhook's life. The build that it starts could not fetch its source, and is stopped."""
    client, verb, name = stage.farm.client, stage.point.split(".")[2], stage.point.replace(".", "-")
    path = f"/v1/projects/{name}/webhook"
    wanted = a_project_json(name, source={"type": "GIT", "location": "https://127.0.0.1:1/nothing.git"})
    again(lambda: client.post("/v1/projects", wanted))
    if verb == "create":
        stage.arm()
    settle(lambda: client.post(path, {}), lambda: _is_there(stage, path))
    if verb in ("rotate", "set_provider_hook", "update"):
        stage.arm()
    made = again(lambda: client.put(path, {"branchFilter": "^main$", "rotateSecret": True, "providerHookId": "7"}))
    assert made["branchFilter"] == "^main$"
    if verb == "receive":
        stage.arm()
        push = {"ref": "refs/heads/main", "after": secrets.token_hex(20)}
        place = f"{stage.farm.api_url}/webhooks/git/{made['payloadUrl'].rpartition('/')[2]}"
        answer = again(lambda: _delivered(place, **sent("git", made["secret"], push, delivery=name)))
        (event,) = answer["events"]
        stage.expected[event["buildId"]] = "STOPPED"
        again(lambda: client.post(f"/v1/builds/{event['buildId']}/stop"))
        (noted,) = again(lambda: client.get(f"{path}/deliveries"))["deliveries"]
        assert noted["buildId"] == event["buildId"]
    if verb == "delete":
        stage.arm()
        settle(lambda: client.delete(path), lambda: not _is_there(stage, path))


def _waiting(stage: Stage) -> None:
    """A delivery that was only noted, and left to the scheduler; for `_give_up`, at a webhook whose record is damaged."""
    client, name = stage.farm.client, stage.point.replace(".", "-")
    source = {"type": "GIT", "location": "https://127.0.0.1:1/nothing.git"}
    again(lambda: client.post("/v1/projects", a_project_json(name, source=source)))
    again(lambda: client.post(f"/v1/projects/{name}/webhook", {}))
    (ident,) = stage.look(sa.select(Webhook.id).where(Webhook.project_name == name))
    event = SourceEvent(kind=EventKind.PUSH, ref="refs/heads/main", commit=secrets.token_hex(20))
    heard = Heard(what="PUSH", events=(event,))
    row = inbox.row(Arrival(webhook_id=ident, project=name, heard=heard, delivery_id=name, initiator="tests"), 0)
    gives_up = "_give_up" in stage.point
    hook = sa.update(Webhook).where(Webhook.id == ident)
    stage.arm()
    if gives_up:
        stage.change(hook.values(settings={"buildType": "?"}))
    stage.change(sa.insert(Delivery).values(row))
    mine = sa.select(Delivery.outcome).where(Delivery.webhook_id == ident)
    (outcome,) = wait_until(lambda: [one for one in stage.look(mine) if one != inbox.ACCEPTED], 90)
    if gives_up:
        stage.change(hook.values(settings={}))
        assert outcome == "refused"
        return
    (build,) = stage.look(sa.select(Delivery.build_id).where(Delivery.webhook_id == ident))
    stage.expected[build] = "STOPPED"
    again(lambda: client.post(f"/v1/builds/{build}/stop"))


def _rushed(stage: Stage) -> None:
    """More deliveries at once than are acted on at once. None of them starts a build."""
    client, name = stage.farm.client, stage.point.replace(".", "-")
    source = {"type": "GIT", "location": "https://127.0.0.1:1/nothing.git"}
    again(lambda: client.post("/v1/projects", a_project_json(name, source=source)))
    made = again(lambda: client.post(f"/v1/projects/{name}/webhook", {"branchFilter": "^none$"}))
    place = f"{stage.farm.api_url}/webhooks/git/{made['payloadUrl'].rpartition('/')[2]}"
    stage.arm()

    def push(number: int) -> bool:
        payload = {"ref": f"refs/heads/b{number}", "after": secrets.token_hex(20)}
        answer = again(lambda: _answered(place, **sent("git", made["secret"], payload, delivery=f"{name}-{number}")))
        return answer.headers.get("Millrace-Outcome", "").startswith(inbox.ACCEPTED)

    rounds = 0
    with ThreadPoolExecutor(40) as pool:
        while not any(list(pool.map(push, range(rounds * 40, rounds * 40 + 40)))):
            rounds += 1
            assert rounds < 20, "they were all acted on at once"
    wanted = [f"{name}-{number}" for number in range(rounds * 40 + 40)]
    mine = sa.select(Delivery.delivery_id).where(Delivery.project_name == name, Delivery.outcome == "ignored")
    wait_until(lambda: sorted(stage.look(mine)) == sorted(wanted), 90)


def _approved(stage: Stage) -> None:
    """A pull request from a fork. Its build could not fetch its source, and is stopped."""
    client, name = stage.farm.client, stage.point.replace(".", "-")
    source = {"type": "GITHUB", "location": "https://127.0.0.1:1/a/b.git"}
    again(lambda: client.post("/v1/projects", a_project_json(name, source=source)))
    groups = [[{"type": "EVENT", "pattern": "PULL_REQUEST_CREATED"}]]
    made = again(lambda: client.post(f"/v1/projects/{name}/webhook", {"filterGroups": groups}))
    place = f"{stage.farm.api_url}/webhooks/github/{made['payloadUrl'].rpartition('/')[2]}"
    payload = {
        **github_pull_request(head_repo=99),
        "repository": {"id": 186853002, "full_name": "a/b", "clone_url": source["location"]},
    }
    _delivered(place, **sent("github", made["secret"], payload, event="pull_request", delivery=name))
    stage.arm()
    path = f"/v1/projects/{name}/webhook"
    settle(lambda: client.post(f"{path}/approve", {"commit": SHA}), lambda: _noted(stage, path).get("buildId") is not None)
    build = _noted(stage, path)["buildId"]
    stage.expected[build] = "STOPPED"
    again(lambda: client.post(f"/v1/builds/{build}/stop"))


def _noted(stage: Stage, path: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = again(lambda: stage.farm.client.get(f"{path}/deliveries"))["deliveries"]
    return found[0]


def _looked(stage: Stage) -> None:
    """The next look at the repositories with webhooks, of which there is one that never answers."""
    stage.arm()
    stage.change(sa.update(Webhook).values(looked_ms=0))
    wait_until(lambda: 0 not in stage.look(sa.select(Webhook.looked_ms)), 60)


def _asked_for(stage: Stage) -> None:
    """GitHub's list of what it could not deliver is read, of a project whose server stands in."""
    name = stage.point.replace(".", "-").replace("_", "")
    path = f"/v1/projects/{name}/webhook"
    with standing_in() as server:
        Forge(server, "github")
        source = {"type": "GITHUB_ENTERPRISE", "location": f"{server.url}/o/r.git"}
        source |= {"auth": {"type": "SECRETS_MANAGER", "resource": "word"}}
        again(lambda: stage.farm.client.post("/v1/projects", a_project_json(name, source=source)))
        again(lambda: stage.farm.client.post(path, {}))
        stage.arm()
        again(lambda: stage.farm.client.put(path, {"providerHookId": "101"}))
        wait_until(lambda: stage.look(sa.select(Webhook.id).where(Webhook.project_name == name, Webhook.listed_ms > 0)), 60)
        again(lambda: stage.farm.client.delete(path))
        assert server.wrong == []


def _wished(stage: Stage) -> None:
    """Comments that approve: the server of one is away, the webhook of the other is gone. Nor can it be told that one waits."""
    path, commit = "/v1/projects/told/webhook", secrets.token_hex(20)
    settle(lambda: stage.farm.client.post(path, {}), lambda: _is_there(stage, path))
    (hook,) = stage.look(sa.select(Webhook.id).where(Webhook.project_name == "told"))
    event = SourceEvent(kind=EventKind.PULL_REQUEST_CREATED, commit=commit, pull_request=2, from_fork=True)
    wish = {"pull_request": 2, "commit": commit, "person_id": "7", "person": "mona", "comment_id": "1"}
    asked = {"wish": wish, "due_ms": 0, "tries": 0, "since_ms": int(time.time() * 1000)}
    common = {"project_name": "told", "received_ms": now_ms(), "what": "x", "why": "", "ref": "pr/2"}
    stage.arm()
    for place, outcome, of, kept in (
        (hook, "approval", commit, asdict(event)),
        (hook, "checking", None, asked),
        ("gone", "checking", None, asked),
    ):
        row = {"webhook_id": place, "delivery_id": f"{outcome}-{commit}", "outcome": outcome, "commit_id": of, "event": kept}
        stage.change(sa.insert(Delivery).values({**common, **row}))
    mine = Delivery.delivery_id == f"checking-{commit}"

    def is_done() -> bool:
        rows = stage.look(sa.select(Delivery.why).where(mine, Delivery.webhook_id.in_((hook, "gone"))))
        told = stage.look(sa.select(Delivery.event).where(Delivery.delivery_id == f"approval-{commit}"))
        return len(rows) == 2 and all(rows) and all("tries" in (one or {}) for one in told)

    wait_until(is_done, 60)
    stage.change(sa.delete(Delivery).where(Delivery.delivery_id.like(f"%-{commit}")))


def _resent(stage: Stage) -> None:
    """A notice that was refused, of a build that nobody tells of any more."""
    build = stage.ask("short")
    stage.ended(build)
    common = {"project_name": "short", "build_id": build, "commit_id": "0" * 40, "context": "", "state": "SUCCEEDED"}
    times = {"asked_ms": 1, "created_ms": now_ms(), "due_ms": 0, "settled_ms": now_ms()}
    stage.change(sa.insert(Notice).values({**common, **times, "topic": f"r-{build}"[:64], "outcome": "REFUSED"}))
    stage.arm()
    path = f"/v1/builds/{build}/notices/resend"
    count = sa.select(Notice.id).where(Notice.build_id == build)
    settle(lambda: stage.farm.client.post(path), lambda: len(stage.look(count)) == 2)
    stage.change(sa.update(Notice).where(Notice.settled_ms.is_(None)).values(settled_ms=1))


def _delivered(place: str, data: bytes, headers: dict[str, str]) -> Any:
    answer = _answered(place, data, headers)
    assert answer.status_code in (200, 201, 202), answer.text
    return answer.json()


def _answered(place: str, data: bytes, headers: dict[str, str]) -> httpx.Response:
    try:
        answer = httpx.post(place, content=data, headers=headers, timeout=20)
    except httpx.TransportError as error:
        raise Unavailable(str(error)) from error
    if answer.status_code >= 500:
        raise Unavailable(answer.text)
    return answer


def _command(*words: str) -> Callable[[Stage], None]:
    def story(stage: Stage) -> None:
        said = [*words]
        if words[1] == "revoke":
            assert stage.farm.cli("token", "create", "spare").returncode == 0
            said += stage.look(sa.select(Token.id).where(Token.name == "spare", Token.revoked_ms.is_(None)))[:1]
        if words[1] == "reseal":  # a new first key, so that there is something to seal anew
            keys = stage.farm.home / "data" / "secrets.key"
            keys.write_text(f"{secrets.token_hex(32)}\n{keys.read_text()}")
        stage.arm()
        killed = stage.farm.cli(*said)
        if not stage.spares:
            assert killed.returncode == -signal.SIGKILL, killed.stderr
            assert stage.farm.cli(*said).returncode == 0

    return story


def _scheduler(stage: Stage) -> int:
    """Its process, once it heeds signals; 0 while it starts, or waits to be started."""
    with suppress(AssertionError):
        pid = stage.farm.pid_of("millrace.cli scheduler")
        time.sleep(3)
        return pid if stage.farm.pid_of("millrace.cli scheduler") == pid else 0
    return 0


def _resigned(stage: Stage) -> None:
    stage.arm()
    os.kill(wait_until(lambda: _scheduler(stage), 60), signal.SIGTERM)
    stage.ended(stage.ask("rich"))


def _noticed(stage: Stage) -> None:
    """Of these topics one is of no git server, four are of a server that is away, and of one a newer build has told."""
    plain, away = stage.ask("short"), stage.ask("told", "STOPPED")
    again(lambda: stage.farm.client.post(f"/v1/builds/{away}/stop"))
    stage.ended(plain)
    stage.ended(away)
    stage.arm()
    rows = [("a", plain, 1, False), ("c", away, 1, False), ("c", away, 2, True), *((f"b{n}", away, 1, False) for n in range(4))]
    common = {
        "project_name": "told",
        "commit_id": "0" * 40,
        "context": "",
        "state": "STOPPED",
        "created_ms": now_ms(),
        "due_ms": 0,
    }
    wanted = [
        {
            "topic": f"{name}-{away}"[:64],
            "build_id": build,
            "asked_ms": asked_ms,
            "settled_ms": now_ms() if told else None,
            **common,
        }
        for name, build, asked_ms, told in rows
    ]
    stage.change(sa.insert(Notice).values(wanted))
    mine = sa.and_(Notice.topic.like(f"%-{away}"[:64]), Notice.settled_ms.is_(None), Notice.due_ms == 0)
    wait_until(lambda: stage.look(sa.select(Notice.id).where(mine)) == [], 60)
    stage.change(sa.update(Notice).where(Notice.settled_ms.is_(None)).values(settled_ms=1))


def _replaced(stage: Stage) -> None:
    for _ in range(2):
        stage.ended(stage.ask("copied"))
    stage.arm()
    assert stage.change(
        sa.update(CacheEntry).where(CacheEntry.replaced_ms > 0).values(replaced_ms=CacheEntry.replaced_ms - 7_200_000)
    )
    wait_until(lambda: stage.look(sa.select(CacheEntry.id).where(CacheEntry.replaced_ms > 0)) == [], 60)


def _crowded(stage: Stage) -> None:
    stage.ended(stage.ask("copied"))
    stage.arm()
    assert stage.change(sa.update(CacheEntry).where(CacheEntry.replaced_ms == 0).values(size_bytes=2**40))
    wait_until(lambda: stage.look(sa.select(CacheEntry.id).where(CacheEntry.replaced_ms == 0)) == [], 60)


def _cache_lost(stage: Stage) -> None:
    stage.ended(stage.ask("copied"))
    for key in stage.look(sa.select(CacheEntry.object_key).where(CacheEntry.replaced_ms == 0)):
        for path in (stage.farm.home / "data" / "objects").glob(f"*/{key}"):
            path.unlink()
    stage.arm()
    stage.ended(stage.ask("copied"))


def _taken(stage: Stage) -> None:
    stage.ended(stage.ask("copied"))
    stage.arm()
    again(lambda: stage.farm.client.delete("/v1/caches?project=copied"))
    assert again(lambda: stage.farm.client.get("/v1/caches", project="copied"))["caches"] == []


def _losers(stage: Stage, project: str = "short") -> None:
    build = stage.ask(project)
    stage.ended(build)
    mine = sa.and_(Attempt.build_id == build, Attempt.attempt_no == 1)
    wait_until(lambda: stage.look(sa.select(Attempt.log_key).where(mine)) != [None], 60)
    ended_ms = stage.look(sa.select(Attempt.ended_ms).where(mine))[0]
    stage.arm()
    stage.change(sa.update(Attempt).where(mine).values(ended_ms=now_ms() - 90_000_000))
    wait_until(lambda: stage.look(sa.select(Attempt.swept).where(mine)) == [True], 60)
    stage.change(sa.update(Attempt).where(mine).values(ended_ms=ended_ms))


def _large_losers(stage: Stage) -> None:
    _losers(stage, "large")


STORIES: Final[dict[str, Callable[[Stage], None]]] = {
    "commit.attempts.has_parts": _large,
    "commit.attempts.note_parts": _large,
    "commit.caches.drop": _replaced,
    "commit.caches.lose": _cache_lost,
    "commit.caches.make_room": _crowded,
    "commit.caches.remove": _taken,
    "commit.dispatch._note": _lost,
    "commit.drain.Clerk._give_up": _waiting,
    "commit.drain.Clerk._take": _waiting,
    "commit.fleets.records._write": _fleet,
    "commit.held.Held._note": _wished,
    "commit.hooks.approve": _approved,
    "commit.hooks.create": _hook,
    "commit.hooks.delete": _hook,
    "commit.hooks.receive": _hook,
    "commit.hooks.reseal": _command("secret", "reseal"),
    "commit.hooks.rotate": _hook,
    "commit.hooks.set_provider_hook": _hook,
    "commit.hooks.update": _hook,
    "commit.inbox.Inbox._commit": _rushed,
    "commit.leases._end_each": _lost,
    "commit.messenger.Messenger._hold": _noticed,
    "commit.messenger.Messenger._note": _noticed,
    "commit.messenger.Messenger._postpone": _noticed,
    "commit.messenger.Messenger._settle_older": _noticed,
    "notice.send": _noticed,
    "commit.missed.CatchUp._moved": _looked,
    "commit.notices.resend": _resent,
    "commit.redelivery.Redelivery._note": _asked_for,
    "commit.wishes.Wishes._postpone": _wished,
    "commit.wishes.Wishes._settle": _wished,
    "commit.leases.renew": _renewed,
    "commit.lifecycle.request_stop": _stopped,
    "commit.projects.create": _project,
    "commit.projects.delete": _project,
    "commit.projects.update": _project,
    "commit.secrets.delete": _secret,
    "commit.secrets.put": _secret,
    "commit.secrets.reseal": _command("secret", "reseal"),
    "commit.sweeper.Sweeper._drop_loser": _losers,
    "commit.sweeper.Sweeper._resign": _resigned,
    "commit.tokens.create": _command("token", "create", "name"),
    "commit.tokens.revoke": _command("token", "revoke"),
    "engine.copy_in": _copied,
    "engine.copy_out": _copied,
    "store.abort_parts": _large_losers,
    "store.begin_parts": _large,
    "store.complete_parts": _large,
    "store.delete": _replaced,
    "store.delete_prefix": _losers,
    "store.presign_part": _large,
    "verb.renew": _renewed,
    **killing_fleets.STORIES,
}
"""Of the places that a build with a source, a secret, a cache and published artifacts does not pass by itself."""


def _story_of(point: str) -> Callable[[Stage], None]:
    return STORIES.get(point.rpartition(".")[0], _rich)


def pass_all(stage: Stage) -> None:
    """Tell each story once, with nobody killed; what was passed is in `stage.passed()`."""
    stage.spares = True
    told = set()
    for point in POINTS:
        story = _story_of(point)
        key = (story, point if story in (_project, _secret, _hook, _approved, _waiting, upgraded) else "")
        if point.endswith(".before") and key not in told:
            told.add(key)
            stage.point = point
            story(stage)
    for build in stage.expected:
        stage.ended(build)
    stage.spares = False


def strike_all(stage: Stage, points: Iterable[str]) -> None:
    """Kill at each of these places, one after another, and look that nothing is lost, doubled or left."""
    wrong = []
    for point in points:
        try:
            stage.strike(point)
        except AssertionError as error:  # the others are worth knowing, too
            wrong.append(str(error))
            (stage.farm.home / "data" / ORDER).unlink(missing_ok=True)
    try:
        stage.check()
    except AssertionError as error:
        wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
