"""The Docker engine killed, frozen, slow and cut off; registries; memory, disks and hostile builds: F-23 to F-32, F-40.

What is done to an engine is done to a dockerd of the row's own. Its bridge leads nowhere, its images are small ones of ours.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chaos.harness import Chaos, row
from tests.chaos.proxy import Faults, Proxy, Rule
from tests.chaos.rows_database import OURS
from tests.support import dockerd, resolver
from tests.support.disks import tmpfs
from tests.support.engine_images import BASH
from tests.support.farm import Farm, wait_until
from tests.support.gitserver import http_server, make_certificate, make_repository
from tests.support.records import SPEC

_KEPT = "artifacts:\n  files:\n    - '**/*'\n"


@contextmanager
def farm_on_engine(chaos: Chaos, *, live_restore: bool = False, **settings: str) -> Iterator[tuple[Farm, dockerd.Dockerd]]:
    """A farm on an engine of its own."""
    with dockerd.running(live_restore=live_restore) as engine:
        where = {"MILLRACE_DOCKER_HOST": engine.url, "MILLRACE_NETWORK": "none"}
        with chaos.farm(**{**where, **settings}) as farm:
            yield farm, engine


@contextmanager
def farm_behind_proxy(chaos: Chaos, **settings: str) -> Iterator[tuple[Farm, dockerd.Dockerd, Proxy]]:
    """A farm whose worker speaks to an engine of its own through a proxy."""
    with (
        dockerd.running() as engine,
        tempfile.TemporaryDirectory(prefix="mr-") as folder,
        Proxy(engine.socket, Path(folder) / "d.sock", http=True, seed=chaos.seed) as link,
        chaos.farm(MILLRACE_DOCKER_HOST=f"unix://{folder}/d.sock", MILLRACE_NETWORK="none", **settings) as farm,
    ):
        yield farm, engine, link


def build(chaos: Chaos, farm: Farm, *commands: str, image: str = BASH, more: str = "", **changes: Any) -> str:
    """A build on one of the small images."""
    environment = {"type": "LINUX_CONTAINER", "image": image, "computeType": "BUILD_GENERAL1_SMALL"}
    chaos.accepted.append(farm.build(list(commands), environment=environment, more=more, **changes))
    return chaos.accepted[-1]


def lines(count: int) -> str:
    """A command that prints so many numbered lines of a hundred bytes."""
    return f'i=0; while [ $i -lt {count} ]; do i=$((i+1)); printf "%09d %090d\\n" $i 0; done'


def numbers(farm: Farm, build_id: str) -> list[int]:
    """The numbers of the lines that `lines` printed, as the log has them."""
    return [int(line[:9]) for line in farm.log_of(build_id).splitlines() if len(line) == 100 and line[:9].isdigit()]


@row(
    "F-23",
    done="dockerd is killed while 2 builds run, and started again after 5 s; no live-restore",
    holds="the attempts end as infra.engine_lost and are tried again; nothing is left of them",
    target="all run again <= 60 s after dockerd is up",
)
def killed(chaos: Chaos) -> None:
    with farm_on_engine(chaos) as (farm, engine):
        for _ in range(2):
            build(chaos, farm, "echo began", "sleep 10")
        for one in chaos.accepted:
            farm.await_log(one, "began")
        engine.kill()
        time.sleep(5)
        engine.start()
        began = time.monotonic()
        wait_until(lambda: all(farm.show(one)["millrace"]["attempt"] == 2 for one in chaos.accepted), 120)
        for one in chaos.accepted:
            farm.await_log(one, "began", 60)
        chaos.measure("second attempts run, s after dockerd is up", time.monotonic() - began)
        chaos.settled(farm, 120)
        told = [attempt["reason"] for one in chaos.accepted for attempt in farm.show(one)["millrace"]["attempts"]]
        chaos.measure("reasons of attempts", ", ".join(sorted(map(str, told))))
        assert set(chaos.states(farm)) == {"SUCCEEDED"}
        assert told.count("infra.engine_lost") == 2


@row(
    "F-24",
    done="dockerd with live-restore is killed and started again while a build prints",
    holds="the log of the attempt that counts is whole. The build does not go on: its console goes through dockerd, so that "
    "its end is the attempt's, which is tried again",
    target="0 lost log bytes",
)
def live_restore(chaos: Chaos) -> None:
    with farm_on_engine(chaos, live_restore=True) as (farm, engine):
        build(chaos, farm, "echo began", f"for n in 1 2 3 4 5 6 7 8; do {lines(500)}; sleep 1; done")
        farm.await_log(chaos.accepted[0], "000000500")
        engine.kill()
        time.sleep(2)
        engine.start()
        chaos.measure("ended, s after dockerd is up", chaos.settled(farm, 180))
        shown = farm.show(chaos.accepted[0])
        assert shown["buildStatus"] == "SUCCEEDED"
        chaos.measure("attempts", shown["millrace"]["attempt"])
        chaos.measure("lines in the log", len(numbers(farm, chaos.accepted[0])))
        assert numbers(farm, chaos.accepted[0]) == list(range(1, 501)) * 8


@row(
    "F-25",
    done="dockerd is frozen (SIGSTOP) for 90 s while 2 builds run a command of 100 s and a third one begins; lease as shipped",
    holds="heartbeats go on, as they do not depend on the engine",
    target="0 failures, no other attempt",
)
def frozen(chaos: Chaos) -> None:
    with farm_on_engine(chaos, **OURS, MILLRACE_SLOTS="3") as (farm, engine):
        for _ in range(2):
            build(chaos, farm, "echo began", "sleep 100", "echo ended")
        for one in chaos.accepted:
            farm.await_log(one, "began")
        assert engine.process is not None
        third = build(chaos, farm, "echo third")
        wait_until(lambda: farm.show(third)["millrace"]["state"] != "QUEUED", 30)
        os.kill(engine.process.pid, signal.SIGSTOP)
        time.sleep(90)
        os.kill(engine.process.pid, signal.SIGCONT)
        chaos.measure("ended, s after", chaos.settled(farm, 120))
        assert set(chaos.states(farm)) == {"SUCCEEDED"}
        chaos.measure("attempts more than builds", chaos.attempts(farm) - len(chaos.accepted))
        assert chaos.attempts(farm) == len(chaos.accepted)


@row(
    "F-26",
    done="the engine makes a container and answers 310 s late; the worker waits 300 s for that",
    holds="the attempt ends as infra.engine_lost and is tried again; the container that came late is removed",
    target="0 orphans 90 s after",
)
def created_late(chaos: Chaos) -> None:
    with farm_behind_proxy(chaos, MILLRACE_PARKED="0") as (farm, engine, link):  # so that a build waits for it
        link.rules = [Rule(match="^POST .*/containers/create", times=1, late_s=310)]
        one = build(chaos, farm, "echo began")
        wait_until(lambda: farm.show(one)["buildComplete"], 420)
        shown = farm.show(one)
        chaos.measure("attempts", shown["millrace"]["attempt"])
        chaos.measure("reason of the first", shown["millrace"]["attempts"][0]["reason"])
        assert (shown["buildStatus"], shown["millrace"]["attempt"]) == ("SUCCEEDED", 2)
        began = time.monotonic()
        client = engine.client()
        try:
            wait_until(lambda: not client.containers(all=True), 90)
        finally:
            client.close()
        chaos.measure("late container gone, s after the end", time.monotonic() - began)


@row(
    "F-27",
    done="the stream of a container's output is cut after 20,011 bytes, in the middle of a frame, twice",
    holds="the attempt ends as infra.engine_lost and is tried again; the log that counts is whole",
    target="0 silent truncations",
)
def stream_cut(chaos: Chaos) -> None:
    with farm_behind_proxy(chaos) as (farm, _engine, link):
        link.rules = [Rule(match="^POST .*/attach", times=2, cut_after=20_011)]
        one = build(chaos, farm, lines(3000))
        chaos.measure("ended, s", chaos.settled(farm, 120))
        shown = farm.show(one)
        told = [attempt["reason"] for attempt in shown["millrace"]["attempts"]]
        chaos.measure("reasons of attempts", ", ".join(map(str, told)))
        assert shown["buildStatus"] == "SUCCEEDED"
        assert told.count("infra.engine_lost") == 2
        assert numbers(farm, one) == list(range(1, 3001))
        chaos.measure("lines in the log, of 3000", len(numbers(farm, one)))


@row(
    "F-28",
    done="a registry answers 404, 401, 429, 500 and 503 to manifests, resets connections, or takes them and is silent",
    holds="404 and 401 end the build as the user's fault at once; the others are asked three times, and are the farm's",
    target="the right class in all cases",
)
def registry(chaos: Chaos) -> None:
    with (
        farm_on_engine(chaos, MILLRACE_MAX_ATTEMPTS="1", MILLRACE_SLOTS="8") as (farm, _engine),
        Proxy(("127.0.0.1", 9), http=True, seed=chaos.seed) as site,
        Proxy(("127.0.0.1", 9)) as mute,
    ):
        errors = {
            404: b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}',
            401: b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}',
            429: b'{"errors":[{"code":"TOOMANYREQUESTS","message":"too many requests"}]}',
            500: b'{"errors":[{"code":"UNKNOWN","message":"unknown error"}]}',
            503: b'{"errors":[{"code":"UNAVAILABLE","message":"service unavailable"}]}',
        }
        json = {"Content-Type": "application/json", "Docker-Distribution-Api-Version": "registry/2.0"}
        site.rules = [
            *(Rule(match=f"/v2/x{code}/", status=code, body=body, headers=json) for code, body in errors.items()),
            Rule(match="/v2/$", status=200, body=b"{}", headers=json),
        ]
        wanted = {code: "user.image_not_found" if code < 429 else "infra.image_pull" for code in errors}
        builds = {code: build(chaos, farm, "true", image=f"127.0.0.1:{site.port}/x{code}:1") for code in errors}
        mute.faults = Faults(reset=True)
        builds[0] = build(chaos, farm, "true", image=f"127.0.0.1:{mute.port}/reset:1")
        wanted[0] = "infra.image_pull"
        chaos.settled(farm, 200)
        mute.faults = Faults(silent_up=True)
        builds[1] = build(chaos, farm, "true", image=f"127.0.0.1:{mute.port}/silent:1")
        wanted[1] = "infra.image_pull"
        chaos.measure("a silent registry, s until the verdict", chaos.settled(farm, 500))
        for code, one in builds.items():
            reason = farm.show(one)["millrace"]["reason"]
            asked = sum(f"/v2/x{code}/" in request for request in site.requests)
            name = {0: "reset", 1: "silent"}.get(code, str(code))
            chaos.measure(name, f"{reason}{f', asked {asked} times' if asked else ''}")
        assert {code: farm.show(one)["millrace"]["reason"] for code, one in builds.items()} == wanted


@row(
    "F-29",
    done="a limit of 64 MiB; a command that wants more, a child that does and whose end is ignored, a command that just fits",
    holds="user.oom only where it is proven; a child's end is in the log",
    target="right in all cases",
)
def out_of_memory(chaos: Chaos) -> None:
    with farm_on_engine(chaos, MILLRACE_MEMORY_BYTES=str(64 * 1024**2), MILLRACE_SLOTS="1") as (farm, _engine):
        much = "x=$(head -c {} /dev/zero | tr '\\000' x); echo got ${{#x}}"
        main = [build(chaos, farm, "bash -c '" + much.format(200_000_000).replace("'", "'\\''") + "'") for _ in range(5)]
        child = build(chaos, farm, "bash -c '" + much.format(200_000_000).replace("'", "'\\''") + "' || true", "echo went on")
        fits = build(chaos, farm, "bash -c '" + much.format(10_000_000).replace("'", "'\\''") + "'")
        other = build(chaos, farm, "sh -c 'kill -9 $$'")
        chaos.settled(farm, 200)
        told = [farm.show(one)["millrace"]["reason"] for one in main]
        chaos.measure("main process, 5 times", ", ".join(sorted(told)))
        chaos.measure("child", farm.show(child)["millrace"]["reason"])
        chaos.measure("just fits", farm.show(fits)["millrace"]["reason"])
        chaos.measure("SIGKILL by itself", farm.show(other)["millrace"]["reason"])
        assert set(told) == {"user.oom"}
        assert farm.show(child)["millrace"]["reason"] == "succeeded"
        assert "ended a process of this build for want of memory" in farm.log_of(child)
        assert farm.show(fits)["millrace"]["reason"] == "succeeded"
        assert "for want of memory" not in farm.log_of(fits)
        assert farm.show(other)["millrace"]["reason"] == "user.exit_code"


@row(
    "F-30",
    done="a fork bomb, 100,000 files, open files without end, one line of 64 MiB, 100 MB of output as fast as it goes, "
    "each beside a build that does a fixed piece of work",
    holds="limits are hit, the host and the worker stay well, the build beside goes on",
    target="worker RSS <= 512 MiB; neighbour <= 25 % slower (told, as other work runs on this machine, too)",
)
def hostile(chaos: Chaos) -> None:
    with farm_on_engine(chaos, MILLRACE_PIDS_LIMIT="256", MILLRACE_SLOTS="2") as (farm, _engine):
        work = "i=0; while [ $i -lt 400000 ]; do i=$((i+1)); done"
        small = {"timeoutInMinutes": 5}

        def neighbour() -> float:
            one = build(chaos, farm, work, project="neighbour", **small)
            phases = farm.ended(one, 120)["millrace"]["phaseMs"]
            return float(phases["BUILD"])

        alone = min(neighbour() for _ in range(3))
        bombs = {
            "fork bomb": "timeout 20 bash -c ':(){ :|:& };:; sleep 15'; true",
            "files": "mkdir f; cd f; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); : > $i; done",
            "open files": "timeout 20 bash -c 'while true; do exec {fd}</dev/null || break; done'; true",
            "one line": "head -c 67108864 /dev/zero | tr '\\000' x",
            "output": "timeout 20 cat /dev/zero | tr '\\000' '\\n' | head -c 100000000; true",
        }
        for name, command in bombs.items():
            bomb = build(chaos, farm, command, project="bomb", **small)
            wait_until(lambda one=bomb: farm.show(one)["millrace"]["state"] in ("RUNNING", "FINALIZING", "SUCCEEDED"), 60)
            took = neighbour()
            ended = farm.ended(bomb, 300)["millrace"]["reason"]
            chaos.measure(name, f"{ended}; beside it {100 * (took / alone - 1):+.0f} %")
        peak = _peak_mib(farm)
        chaos.measure("worker's peak of memory, MiB", peak)
        assert peak <= 512


def _peak_mib(farm: Farm) -> int:
    """The most memory that a worker process of the farm had."""
    most = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            if b"worker" in command and str(farm.home).encode() in (process / "environ").read_bytes():
                status = (process / "status").read_text()
                most = max(most, int(status.partition("VmHWM:")[2].split()[0]) // 1024)
        except (OSError, IndexError, ValueError):
            continue
    return most


@row(
    "F-31",
    done="workspaces on a tmpfs of 64 MiB: a build fills it; another packs an artifact for which there is no room",
    holds="user.disk_limit; the worker goes on; below its reserve it claims nothing",
    target="0 crashes",
)
def disk_full(chaos: Chaos) -> None:
    _on_small_disk(chaos, "head -c 100000000 /dev/urandom > big", "head -c 45000000 /dev/urandom > big")


@row(
    "F-32",
    done="workspaces on a tmpfs of 2,000 inodes: a build uses them up; another leaves none for its artifact",
    holds="the same",
    target="0 crashes",
)
def no_inodes(chaos: Chaos) -> None:
    fill = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); : > f$i || exit 1; done"
    _on_small_disk(chaos, fill, f"({fill}) || true", nr_inodes="2k")


def _on_small_disk(chaos: Chaos, fills: str, leaves_none: str, **options: str) -> None:
    with tmpfs("64m", **options) as disk:
        settings = {"MILLRACE_WORK_DIR": str(disk / "work"), "MILLRACE_MIN_FREE_BYTES": str(8 * 1024**2)}
        with farm_on_engine(chaos, **settings, MILLRACE_SLOTS="1", MILLRACE_MAX_ATTEMPTS="2") as (farm, _engine):
            full = build(chaos, farm, fills)
            packs = build(chaos, farm, leaves_none, more=_KEPT)
            well = build(chaos, farm, "echo well > f", more=_KEPT)
            chaos.settled(farm, 200)
            for name, one in (("fills it", full), ("leaves no room to pack", packs), ("the next one", well)):
                chaos.measure(name, farm.show(one)["millrace"]["reason"])
            assert farm.show(full)["millrace"]["reason"] == "user.disk_limit"
            assert farm.show(packs)["millrace"]["reason"] in ("user.disk_limit", "infra.storage")
            assert farm.show(well)["millrace"]["reason"] == "succeeded"
            filler = disk / "filler"
            filler.write_bytes(b"x" * (60 * 1024**2))
            waits = build(chaos, farm, "true")
            time.sleep(15)
            assert farm.show(waits)["millrace"]["attempt"] == 0, "claimed below the reserve"
            assert "worker.not_claiming" in farm.part_log("worker")
            filler.unlink()
            chaos.measure("claims again, s after there is room", chaos.settled(farm, 60))
            assert farm.part_log("worker").count('"worker.started"') == 1


@row(
    "F-40",
    done="the name server fails for every query, is silent, or fails twice and then answers",
    holds="git is tried three times; the fault is the farm's, not the user's; a name server that is back is enough",
    target="the right class in all cases",
)
def no_name(chaos: Chaos) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="mr-git-") as folder,
        resolver.running() as names,
        http_server(Path(folder) / "git", tls=make_certificate(Path(folder), "git.test")) as server,
        chaos.farm(prefix=names.prefix, MILLRACE_CA_BUNDLE=f"{folder}/cert.pem", MILLRACE_MAX_ATTEMPTS="1") as farm,
    ):
        make_repository(Path(folder) / "git" / "a.git").commit("main", {"buildspec.yml": SPEC})
        address = server.url.replace("localhost", "git.test").replace("127.0.0.1", "git.test")
        source = {"type": "GIT", "location": f"{address}/a.git", "buildspec": "buildspec.yml"}
        cases = (("fails", 10**6, False), ("silent", 0, True), ("fails twice", 2, False))
        for name, names.failing, names.silent in cases:
            names.asked = 0
            began = time.monotonic()
            chaos.accepted.append(farm.build([], source=source))
            told = farm.ended(chaos.accepted[-1], 120)["millrace"]["reason"]
            chaos.measure(name, f"{told} after {time.monotonic() - began:.0f} s and {names.asked} queries")
            assert told == ("succeeded" if name == "fails twice" else "infra.source_unreachable"), farm.log_of(chaos.accepted[-1])
