"""The list of invariants: number, promise, how it is checked, and what mends it. docs/fsck.md is made from it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from millrace.errors import InfraProblem, MillraceError
from scheduler import dispatch, guard, leases
from scheduler.fsck import deliveries, objects, outside, queue, records
from scheduler.fsck.terms import SHOWN, Check, Finding, NotHere, Scope, Standing


@dataclass(frozen=True, kw_only=True)
class Invariant:
    """One promise. `check` is None where the data of a farm cannot tell; `how` then says who does."""

    number: int
    name: str
    how: str
    check: Check | None = None
    not_built: bool = False


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What `--repair` may do: nothing that a well farm would not do by itself."""

    what: str
    do: Callable[[Scope], str]


def _end_overdue(scope: Scope) -> str:
    ended = [*leases.expire(scope.db), *leases.enforce_deadlines(scope.db)]
    return f"moved {len(ended)} builds" + "".join(f" {build_id}" for build_id in ended[:SHOWN])


def _ring(scope: Scope) -> str:
    if scope.bell is None:
        raise NotHere("no broker was given")
    return f"sent {dispatch.relay(scope.db, scope.bell)} messages"


def _make_guard(scope: Scope) -> str:
    scope.db.run(guard.make)
    return f"made the trigger {guard.NAME}"


def _clean_host(scope: Scope) -> str:
    if scope.host is None:
        raise NotHere("it takes a worker's host (--host)")
    return f"removed {scope.host.clean()} things"


REPAIRS: Final[Mapping[str, Repair]] = {
    records.END_OVERDUE: Repair(what="take back leases that ran out, end what is past its time", do=_end_overdue),
    records.MAKE_GUARD: Repair(what="make the trigger that refuses changes of ended builds", do=_make_guard),
    objects.DROP_LOSERS: Repair(
        what="remove objects that nobody may see, of attempts that ended a day ago", do=objects.drop_losers
    ),
    outside.RING: Repair(what="send what the outbox holds, and ring for builds that wait", do=_ring),
    outside.CLEAN_HOST: Repair(what="one round of the worker's janitor", do=_clean_host),
}

INVARIANTS: Final[Sequence[Invariant]] = (
    Invariant(
        number=1,
        name="Every accepted request has its build",
        how="each request of `--journal FILE` that was answered by 2xx is in the records",
        check=outside.nothing_lost,
    ),
    Invariant(
        number=2,
        name="Every build ends in time",
        how="no build is 60 s past its deadline, nor past its lease or queued time-out, with half a minute for the scheduler; "
        "with `--at-rest`: every build has ended",
        check=records.none_overdue,
    ),
    Invariant(
        number=3,
        name="Every build ends once",
        how="one terminal event for each ended build; every event follows the one before by the table of states; the last one is "
        "the build's state and reason; the trigger that refuses changes of ended builds is there",
        check=records.one_end,
    ),
    Invariant(
        number=4,
        name="Every ended build has one reason",
        how="a reason of the closed list that fits the state; none is `internal.bug`",
        check=records.one_reason,
    ),
    Invariant(
        number=5,
        name="Attempts are numbered without a gap",
        how="as many attempts as the build's number says, from 1; each CLAIMED event adds one, no other does",
        check=records.attempts_in_a_row,
    ),
    Invariant(
        number=6,
        name="One attempt at a time, and only the last one's results",
        how="an attempt ends before the next one begins; artifacts and caches are of the build's last attempt",
        check=records.one_writer,
    ),
    Invariant(
        number=7,
        name="What lost attempts uploaded is removed",
        how="25 h after an attempt's end its folders were cleared up, and hold nothing but what may be seen",
        check=objects.losers_are_gone,
    ),
    Invariant(
        number=8,
        name="Artifacts read back as they were stored",
        how="size and SHA-256 of each object, as many as `--objects` says",
        check=objects.artifacts_read_back,
    ),
    Invariant(
        number=9,
        name="Logs are whole",
        how="chunks join up without a gap, each has its SHA-256, and their list the root that it had when the attempt ended; the "
        "whole has the SHA-256 that its worker gave, unless it is marked as incomplete",
        check=objects.logs_are_whole,
    ),
    Invariant(
        number=10,
        name="A build that was told to stop stops",
        how="it is STOPPED, or had ended before; it does not run three and a half minutes later",
        check=records.stops_are_heeded,
    ),
    Invariant(
        number=11,
        name="One idempotency key, one build",
        how="in `--journal FILE`, accepted requests of one key name one build and, where the lines say it, one `body`",
        check=outside.one_key_one_build,
    ),
    Invariant(
        number=12,
        name="One webhook delivery, one build",
        how="a delivery that started a build names one that is there, and no other delivery of an event names it; none is acted "
        "on five minutes late",
        check=deliveries.one_delivery_one_build,
    ),
    Invariant(
        number=13,
        name="Workers, projects and fleets keep to their limits",
        how="builds with a fresh lease per worker against its slots; builds per project and fleet against its limit, where the "
        "newest was claimed after the limit was set",
        check=records.within_limits,
    ),
    Invariant(
        number=14,
        name="No container, volume or network is left",
        how="with `--host`: everything with this farm's label is held by a worker's living process, with a build or waiting for "
        "one, or is gone within 90 s",
        check=outside.nothing_in_the_engine,
    ),
    Invariant(
        number=15,
        name="No workspace is left",
        how="with `--host`: the same of the folders in the workspaces",
        check=outside.nothing_in_the_workspaces,
    ),
    Invariant(
        number=16,
        name="What is to be told is told",
        how="while the broker answers, no message is older than five minutes and due for one; no notice of a git server is older "
        "than five minutes and due for five",
        check=outside.outbox_is_sent,
    ),
    Invariant(
        number=17,
        name="Secrets stand nowhere",
        how="the strings of `--canaries FILE`, one a line, are not in records, logs or broker: raw, base64 once and twice, "
        "url-encoded, in hex, reversed",
        check=outside.canaries_sing_nowhere,
    ),
    Invariant(
        number=18,
        name="Untrusted builds write no trusted cache",
        how="no cache that trusted builds find was saved by a build from a fork, nor lies on a layer that one made",
        check=records.no_fork_in_a_trusted_cache,
    ),
    Invariant(number=19, name="Provenance is true", how="provenance is not built yet", not_built=True),
    Invariant(
        number=20,
        name="Nothing is held in memory only",
        how="a farm's data cannot tell; the tests compare the API's answers before and after a restart",
    ),
    Invariant(
        number=21,
        name="Disk is given back",
        how="with `--host`: no byte in the workspaces stays for 90 s without a living process",
        check=outside.disk_is_given_back,
    ),
    Invariant(
        number=22,
        name="Time goes forward",
        how="submitted, queued, claimed, ended in that order by the database's clock; no phase takes negative time",
        check=records.in_order_of_time,
    ),
    Invariant(
        number=23,
        name="An emptied Redis changes no result",
        how="no build has waited for two minutes that a worker with a free slot asked for and could have had; that an emptied "
        "Redis changes no result is proved by the tests",
        check=queue.nothing_forgotten,
    ),
    Invariant(
        number=24,
        name="No project waits more than twice its share",
        how="no project that holds nothing has seen more claims go by, within the last hour and since its settings were changed, "
        "than [queue.md](queue.md) allows",
        check=queue.none_passed_over,
    ),
    Invariant(
        number=25,
        name="Workers hold no more than they offer",
        how="what builds with a fresh lease need, per worker, against its cpus, memory and labels",
        check=records.within_offers,
    ),
)


def check(scope: Scope, only: Collection[int] = ()) -> list[Finding]:
    """How each invariant stands, or each of `only`. Raises Unavailable where the database does not answer."""
    scope.db.require_schema()
    return [_find(scope, one) for one in INVARIANTS if not only or one.number in only]


def _find(scope: Scope, one: Invariant) -> Finding:
    if one.check is None:
        standing = Standing.NOT_BUILT if one.not_built else Standing.UNCHECKED
        return Finding(number=one.number, name=one.name, standing=standing, note=one.how)
    try:
        note, faults = one.check(scope)
    except NotHere as missing:
        return Finding(number=one.number, name=one.name, standing=Standing.UNCHECKED, note=missing.message)
    except InfraProblem as problem:
        return Finding(number=one.number, name=one.name, standing=Standing.UNCHECKED, note=problem.message, away=True)
    standing = Standing.VIOLATED if faults else Standing.OK
    if len(faults) > SHOWN:
        note = f"{note}; only the first {SHOWN} faults are told"
    return Finding(number=one.number, name=one.name, standing=standing, note=note, faults=tuple(faults[:SHOWN]))


def mend(scope: Scope, findings: Sequence[Finding]) -> tuple[list[str], list[Finding]]:
    """Carry out the repairs that the findings name, each once; what was done, and the findings as they are now."""
    wanted = dict.fromkeys(fault.repair for finding in findings for fault in finding.faults if fault.repair)
    done = []
    for name in wanted:
        try:
            done.append(f"{name}: {REPAIRS[name].do(scope)}")
        except (MillraceError, SQLAlchemyError) as error:
            done.append(f"{name}: failed, {error}")
    touched = {finding.number for finding in findings if any(fault.repair for fault in finding.faults)}
    again = {finding.number: finding for finding in check(replace(scope, memo={}), touched)} if touched else {}
    return done, [again.get(finding.number, finding) for finding in findings]


def page() -> str:
    """The text of docs/fsck.md."""
    rows = "".join(f"| {one.number} | {one.name} | {one.how} |\n" for one in INVARIANTS)
    repairs = "".join(f"| `{name}` | {repair.what} |\n" for name, repair in REPAIRS.items())
    return _PAGE.format(rows=rows, repairs=repairs)


_PAGE: Final = """# Check a farm: `millrace fsck`

Made from `scheduler/fsck/` by `python -m scheduler.fsck > docs/fsck.md`; a test compares the two.

`millrace fsck` checks that what Millrace promises holds in a farm's records, objects and hosts. It needs the settings of the
API (database, object store, Redis), and may be run while the farm works: it only reads, each check sees one moment of the
records, and what is merely on its way is not blamed. The records of 100,000 builds take three seconds, on SQLite and on
PostgreSQL (two cores, commit 1a8d090); `--since 7` halves that. Objects take as long as it takes to read them.

```sh
millrace fsck                      # records, object store, Redis
millrace fsck --host               # on a worker's machine: its Docker engine and workspaces; what is to go has 90 s
millrace fsck --repair             # carry out what is safe, and check again
millrace fsck --json               # for programs
millrace fsck --journal FILE       # against what a client was told
millrace fsck --since 7            # of what has ended, only builds of the last seven days
millrace fsck --only 3 --only 8    # some invariants
millrace fsck --objects 0          # read every artifact and log back, not only the newest 200 of each
millrace fsck --at-rest            # nothing is meant to run: a build that has not ended is a fault
```

Exit status: 0, nothing is wrong; 1, something is; 2, it could not be looked at: the database or the object store does not answer,
or an option is wrong. What is not checked for want of an option, or not built yet, is listed and changes no exit status.

## Invariants

| number | promise | how it is checked |
|---|---|---|
{rows}
A journal is a file of JSON objects, one a line, one for each request and its answer:
`{{"op": "start", "key": "k-1", "status": 201, "build": "demo:..."}}`. `op` is `start` or `retry`; other lines are passed over.
`body`, where it is there, tells one request from another (say, a hash of it).

## Repairs

`--repair` does nothing that a well farm would not do by itself in time, and says what it did. All else takes a person, and the
fault says what.

| repair | what it does |
|---|---|
{repairs}"""
