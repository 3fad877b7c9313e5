"""How many workers a fleet is to have: from what is known of its load to a number and a sentence of why. Pure.

The size is made anew from the load each time, never from what is missing: a booting worker stands for what it was started
for, and is not started twice. In this order:

1. Slots. Each build that runs has its slot. Those that wait may wait `target_wait_s` for slots that are there or come: so
   much work as these end in that time need not be started for (`_slots_to_start`). With no target, or none that is known to
   be kept, each that waits wants a slot of its own.
2. Beside them `headroom_slots` are kept free, or as many that `utilization_percent` are used, whichever is more.
3. Workers: slots by slots per worker, at least `minimum` and what is to be warm at this time, at most `maximum`.
4. More is wanted at once. There are never fewer than were wanted at some moment of the last `shrink_after_s`: each worker
   stays for so long after it was wanted last. None leaves for want of builds that still run on some that are leaving: where
   these end, others follow.
5. Where what is known is older than `stale_after_s`, nothing is changed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from millrace.fleet import Scaling, Warm, Weekday, zone_of

_DAYS: Final = tuple(Weekday)
_NEARLY: Final = 1e-9


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is known of a fleet at `known_ms`.

    Builds: `queued` that a free slot would start, where a large one counts as the slots that it takes; `waiting` how many builds
    that is, None: as many. `oldest_wait_s` how long the one that waits longest does, `running` all that hold a slot,
    `on_draining` those of them whose worker is leaving.

    Workers: `idle` and `busy` take builds, `booting` were started and have not joined yet, `draining` take no more.
    `starts_ms`: when workers were started of late; those after `known_ms` are booting, too. `build_s` and `boot_s`: medians,
    None where not known.
    """

    now_ms: int
    known_ms: int
    queued: int = 0
    waiting: int | None = None
    oldest_wait_s: float = 0
    running: int = 0
    on_draining: int = 0
    idle: int = 0
    busy: int = 0
    booting: int = 0
    draining: int = 0
    build_s: float | None = None
    boot_s: float | None = None
    starts_ms: Sequence[int] = ()

    @property
    def coming(self) -> int:
        """Workers that were started and have not joined."""
        return self.booting + sum(1 for at_ms in self.starts_ms if at_ms > self.known_ms)

    @property
    def present(self) -> int:
        """Workers that are there or come, and stay."""
        return self.idle + self.busy + self.coming


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is remembered from one decision to the next; JSON can hold it.

    `recent`: moments (ms) and how many were wanted last then, by time, each fewer than the one before. `wanted`: what was
    decided last, None where nothing was yet.
    """

    recent: Sequence[Sequence[int]] = ()
    wanted: int | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`wanted`: workers that are to be there, leaving ones not counted. `why` is for people, and names the rule that bound
    it."""

    wanted: int
    why: str
    memory: Memory = field(default_factory=Memory)


@dataclass(frozen=True, kw_only=True)
class _Size:
    """Workers, and what bound their number."""

    workers: int
    why: str


def decide(scaling: Scaling, slots: int, load: Load, memory: Memory) -> Decision:
    """How many workers of `slots` each there are to be now."""
    age_s = (load.now_ms - load.known_ms) / 1000
    if age_s > scaling.stale_after_s:
        why = f"held at {load.present}: what is known is {age_s:.0f} s old, more than {scaling.stale_after_s:g} s"
        return Decision(wanted=load.present, why=why, memory=memory)
    here = load.running - load.on_draining
    size = _limited(scaling, load, _of_load(scaling, slots, load, here))
    if memory.wanted is None:
        memory = Memory(recent=((load.now_ms, load.present),), wanted=load.present)
    held = min(load.present, memory.wanted or 0)
    if size.workers < held and load.on_draining:
        kept = _limited(scaling, load, _of_load(scaling, slots, load, load.running))
        if kept.workers >= held:
            leaving = _count(load.on_draining, "build runs on a worker that leaves", "builds run on workers that leave")
            size = _Size(workers=held, why=f"held: {leaving}; {kept.why}")
        else:
            size = kept
    recent = [
        *((at_ms, many) for at_ms, many in memory.recent if many > size.workers and not _is_over(scaling, load, at_ms)),
        (load.now_ms, size.workers),
    ]
    if size.workers >= held:
        return Decision(wanted=size.workers, why=size.why, memory=Memory(recent=recent, wanted=size.workers))
    at_ms, many = recent[0]
    wanted = min(held, many, scaling.maximum)
    why = size.why
    if wanted > size.workers:
        ago_s = max(0, load.now_ms - at_ms) / 1000
        why = f"held: {wanted} wanted fewer since {ago_s:.0f} s, it shrinks after {scaling.shrink_after_s:g} s; now: {size.why}"
    return Decision(wanted=wanted, why=why, memory=Memory(recent=recent, wanted=wanted))


def _is_over(scaling: Scaling, load: Load, at_ms: int) -> bool:
    """Whether what was wanted then keeps nobody any more."""
    return load.now_ms - at_ms >= scaling.shrink_after_s * 1000


def _of_load(scaling: Scaling, slots: int, load: Load, running: int) -> _Size:
    """What the load alone wants, where `running` of its builds hold slots that stay."""
    free = max(0, load.present * slots - (load.running - load.on_draining))
    said = [_waits(load)] if load.queued else []
    if running:
        said.append(_count(running, "runs", "run") if said else _count(running, "build runs", "builds run"))
    if load.queued and free:
        said.append(f"{_count(free, 'slot is', 'slots are')} free or booting")
    now, rule = _slots_to_start(scaling, slots, load, running)
    total = now
    if rule:
        said.append(rule)
    if scaling.headroom_slots:
        total = max(total, now + scaling.headroom_slots)
    if scaling.utilization_percent is not None:
        total = max(total, _up(now * 100 / scaling.utilization_percent))
    if total > now:
        if total == now + scaling.headroom_slots:
            said.append(f"{_count(scaling.headroom_slots, 'slot is', 'slots are')} to be free")
        else:
            said.append(f"{scaling.utilization_percent:g} % of the slots are to be used")
    workers = -(-total // slots)
    what = f"{_count(workers, 'worker', 'workers')} of {_count(slots, 'slot', 'slots')}" if workers else "no worker"
    return _Size(workers=workers, why=f"{_listed(said) or 'nothing waits or runs'}: {what}")


def _waits(load: Load) -> str:
    builds = load.queued if load.waiting is None else load.waiting
    takes = f" for {_count(load.queued, 'slot', 'slots')}" if builds != load.queued else ""
    return _count(builds, "build waits", "builds wait") + takes


def _slots_to_start(scaling: Scaling, slots: int, load: Load, running: int) -> tuple[int, str]:
    """Slots for what runs and what waits, and which rule made them fewer than one for each.

    In `left` seconds, which those that wait have left of their target, a slot that is there ends `left / build_s` builds, and
    one that has yet to boot as many fewer as fit in its boot time; each then begins one more. So it is linear in both, and
    never less than what runs. All that wait count as if they had waited as long as the one that waits longest: late is worse
    than one worker more.
    """
    each = load.queued + running
    left_s = scaling.target_wait_s - load.oldest_wait_s
    if not load.queued or left_s <= 0 or not load.build_s:
        return each, ""
    there = (load.idle + load.busy) * slots
    by_one = 1 + left_s / load.build_s
    by_new = 1 + max(0.0, left_s - (load.boot_s or 0)) / load.build_s
    wanted = _up(each / by_one)
    if wanted > there:
        wanted = there + _up(max(0.0, each - there * by_one) / by_new)
    wanted = min(each, max(running, wanted))
    return wanted, f"they may wait {left_s:.0f} s more at {load.build_s:.0f} s each" if wanted < each else ""


def _limited(scaling: Scaling, load: Load, size: _Size) -> _Size:
    """The same within minimum, what is to be warm now, and maximum."""
    least, rule = scaling.minimum, f"the minimum is {scaling.minimum}"
    for warm in scaling.warm:
        if warm.minimum > least and _is_warm(warm, load):
            least = warm.minimum
            rule = f"{warm.minimum} are to be warm from {warm.start} to {warm.end} ({warm.timezone})"
    if size.workers < least:
        return _Size(workers=least, why=f"{rule}; {size.why}")
    if size.workers > scaling.maximum:
        return _Size(workers=scaling.maximum, why=f"the maximum is {scaling.maximum}; {size.why}")
    return size


def _is_warm(warm: Warm, load: Load) -> bool:
    """Whether its hours are now, or will be when a worker that is started now has booted."""
    moments = {load.now_ms, load.now_ms + int((load.boot_s or 0) * 1000)}
    return any(_is_within(warm, datetime.fromtimestamp(at_ms / 1000, UTC)) for at_ms in moments)


def _is_within(warm: Warm, moment: datetime) -> bool:
    local = moment.astimezone(zone_of(warm.timezone))
    clock = f"{local:%H:%M}"
    today, yesterday = _DAYS[local.weekday()], _DAYS[(local - timedelta(days=1)).weekday()]
    if warm.start < warm.end:
        return today in warm.days and warm.start <= clock < warm.end
    return (today in warm.days and warm.start <= clock) or (yesterday in warm.days and clock < warm.end)


def _up(number: float) -> int:
    return math.ceil(number - _NEARLY)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else ""
