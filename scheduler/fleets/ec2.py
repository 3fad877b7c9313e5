"""Workers on EC2, in an Auto Scaling group: more by a higher desired capacity; one that has left is ended with its place.

The group itself is the only memory: AWS keeps how many are wanted, and starts them. Who is ended, we alone say: instances are
protected from the group's own scaling in from their first moment on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Final

from millrace.errors import InvalidInput, ProviderTrouble
from millrace.fleet import Ec2Provider, Scaling
from millrace.log import get_logger
from millrace.vocabulary import Trouble
from scheduler.fleets.aws import client, part_of, translated, trouble
from scheduler.fleets.ec2_group import problems_of
from scheduler.fleets.provider import Instance, InstanceState, Order, WaitingBuild

log = get_logger(__name__)
TAG_GENERATION: Final = "millrace:generation"
"""Of the group, from which its instances have it: in which generation they were started."""
TAG_GROUP: Final = "aws:autoscaling:groupName"
PROTECT_AT_ONCE: Final = 50
"""Amazon EC2 Auto Scaling API reference, SetInstanceProtection: so many instances a call."""
_ON_THE_WAY: Final = ("Pending", "Pending:Wait", "Pending:Proceed")
_AT_WORK: Final = ("InService", "EnteringStandby", "Standby", "Quarantined")
_OF_THE_POOL: Final = "Warmed:"
_GONE: Final = ("Terminated", "Detached")
_ENDING: Final = ("shutting-down", "terminated", "stopping", "stopped")
"""States of EC2's own: its word is newer than the group's where a machine was taken away."""
_WAITS_TO_END: Final = "Terminating:Wait"


@dataclass(frozen=True, kw_only=True)
class _Member:
    """One instance of the group, as the group has it."""

    id: str
    lifecycle: str
    protected: bool

    @property
    def state(self) -> InstanceState:
        if self.lifecycle in _ON_THE_WAY:
            return InstanceState.BOOTING
        return InstanceState.RUNNING if self.lifecycle in _AT_WORK else InstanceState.STOPPING


@dataclass(frozen=True, kw_only=True)
class _Group:
    desired: int
    maximum: int
    members: tuple[_Member, ...]
    generation: str | None
    said: Mapping[str, Any]

    @property
    def stopping(self) -> int:
        return sum(one.state is InstanceState.STOPPING for one in self.members)


class Ec2:
    """See `provider.Provider`."""

    def __init__(self, fleet: str, shape: Ec2Provider, scaling: Scaling) -> None:
        self._fleet, self._shape, self._scaling = fleet, shape, scaling
        self._what = f"Auto Scaling group {shape.group} in {shape.region}"

    def close(self) -> None:
        """Hang up."""
        for service in (self._groups, self._machines):
            service.close()

    @cached_property
    def _groups(self) -> Any:
        return client("autoscaling", self._shape.region, self._shape.endpoint_url)

    @cached_property
    def _machines(self) -> Any:
        return client("ec2", self._shape.region, self._shape.endpoint_url)

    def check(self) -> None:
        group = self._group()
        with translated(f"the launch template of {self._what}"):
            problems = problems_of(group.said, self._machines, self._fleet, self._scaling)
        if problems:
            lines = "".join(f"\n  {problem.what}" for problem in problems)
            raise InvalidInput(
                f"{self._what} does not fit the fleet:{lines}",
                hint="docs/fleets.md says what a group must be like; deploy/ holds templates of such ones.",
                fields=problems,
            )

    def find(self) -> Sequence[Instance]:
        group = self._group()
        known = self._described() if group.members else {}
        return [_instance(one, known.get(one.id)) for one in group.members]

    def grow_to(self, total: int, order: Order, waiting: Sequence[WaitingBuild] = ()) -> None:
        group = self._group()
        wanted = total - group.stopping  # those have given up their places already, or AWS fills them again by itself
        if wanted <= group.desired:
            if len(group.members) - group.stopping < group.desired:
                self._say_what_fails()
            return
        if group.generation != str(order.generation):
            self._mark(order.generation)
        if group.desired < group.maximum:
            with translated(self._what):
                self._groups.set_desired_capacity(
                    AutoScalingGroupName=self._shape.group, DesiredCapacity=min(wanted, group.maximum), HonorCooldown=False
                )
            log.info("instances.ordered", fleet=self._fleet, before=group.desired, now=min(wanted, group.maximum))
        if wanted > group.maximum:
            raise ProviderTrouble(
                Trouble.CAPACITY,
                f"{self._what} may have {group.maximum} instances (its MaxSize), and {wanted} are wanted",
                hint="Raise MaxSize of the group, or lower the fleet's scaling.maximum.",
            )

    def release(self, ids: Sequence[str]) -> None:
        group = self._group()
        failed: ProviderTrouble | None = None
        for one in group.members:
            if one.id not in ids:
                continue
            try:
                if one.lifecycle == _WAITS_TO_END:
                    self._let_go(one.id)
                elif one.state is not InstanceState.STOPPING:
                    self._end(one.id)
            except ProviderTrouble as error:  # the others are ended all the same
                failed = failed or error
        if failed is not None:
            raise failed

    def protect(self, ids: Sequence[str]) -> None:
        wanted = [one.id for one in self._group().members if one.id in ids and one.lifecycle == "InService" and not one.protected]
        for some in _in_batches(wanted, PROTECT_AT_ONCE):
            with translated(self._what):
                self._groups.set_instance_protection(
                    AutoScalingGroupName=self._shape.group, InstanceIds=some, ProtectedFromScaleIn=True
                )

    def _group(self) -> _Group:
        with translated(self._what):
            pages = self._groups.get_paginator("describe_auto_scaling_groups").paginate(AutoScalingGroupNames=[self._shape.group])
            found = [group for page in pages for group in part_of(page, "AutoScalingGroups", list)]
        for said in found:
            if part_of(said, "AutoScalingGroupName", str) == self._shape.group:
                return _read(said)
        raise ProviderTrouble(
            Trouble.MISSING, f"there is no {self._what}", hint="Make it as docs/deploy.md says, or name another in the fleet."
        )

    def _described(self) -> dict[str, Mapping[str, Any]]:
        """What EC2 itself says of the group's machines, by id."""
        with translated(f"the instances of {self._what}"):
            named = [{"Name": f"tag:{TAG_GROUP}", "Values": [self._shape.group]}]
            pages = self._machines.get_paginator("describe_instances").paginate(Filters=named)
            reservations = [one for page in pages for one in part_of(page, "Reservations", list)]
        machines = [machine for one in reservations for machine in part_of(one, "Instances", list)]
        return {part_of(machine, "InstanceId", str): machine for machine in machines}

    def _mark(self, generation: int) -> None:
        """Have those that start from here on know their generation."""
        tag = {
            "ResourceId": self._shape.group,
            "ResourceType": "auto-scaling-group",
            "Key": TAG_GENERATION,
            "Value": str(generation),
            "PropagateAtLaunch": True,
        }
        with translated(self._what):
            self._groups.create_or_update_tags(Tags=[tag])

    def _end(self, instance: str) -> None:
        with translated(f"instance {instance} of {self._what}"):
            try:
                self._groups.terminate_instance_in_auto_scaling_group(InstanceId=instance, ShouldDecrementDesiredCapacity=True)
            except self._groups.exceptions.ClientError as error:
                said = error.response.get("Error", {})
                if said.get("Code") != "ValidationError":
                    raise
                words = str(said.get("Message", ""))
                if "not found" in words or "No managed instance" in words:
                    return
                if "min size" in words or "minSize" in words:
                    raise ProviderTrouble(
                        Trouble.CAPACITY, f"{self._what} may not have fewer: {words}", hint="Lower MinSize of the group."
                    ) from error
                raise
        log.info("instance.released", fleet=self._fleet, instance=instance)

    def _let_go(self, instance: str) -> None:
        """Its worker is done: nothing of the group's lifecycle has to wait for it any longer."""
        with translated(f"instance {instance} of {self._what}"):
            answer = self._groups.describe_lifecycle_hooks(AutoScalingGroupName=self._shape.group)
            for hook in part_of(answer, "LifecycleHooks", list):
                if part_of(hook, "LifecycleTransition", str) == "autoscaling:EC2_INSTANCE_TERMINATING":
                    self._groups.complete_lifecycle_action(
                        AutoScalingGroupName=self._shape.group,
                        LifecycleHookName=part_of(hook, "LifecycleHookName", str),
                        InstanceId=instance,
                        LifecycleActionResult="CONTINUE",
                    )

    def _say_what_fails(self) -> None:
        """Raise what kept AWS from starting the last one that it tried to; nothing where it is still at it."""
        with translated(self._what):
            answer = self._groups.describe_scaling_activities(AutoScalingGroupName=self._shape.group, MaxRecords=20)
        for activity in part_of(answer, "Activities", list):  # newest first
            if not str(activity.get("Description", "")).startswith("Launching"):
                continue
            if activity.get("StatusCode") == "Failed":
                raise trouble(f"{self._what} starts no instance", str(activity.get("StatusMessage") or "it does not say why"))
            return


def _read(said: Mapping[str, Any]) -> _Group:
    members = [
        _Member(
            id=part_of(one, "InstanceId", str),
            lifecycle=part_of(one, "LifecycleState", str),
            protected=part_of(one, "ProtectedFromScaleIn", bool),
        )
        for one in part_of(said, "Instances", list)
    ]
    return _Group(
        desired=part_of(said, "DesiredCapacity", int),
        maximum=part_of(said, "MaxSize", int),
        members=tuple(one for one in members if one.lifecycle not in _GONE and not one.lifecycle.startswith(_OF_THE_POOL)),
        generation=_tag(said, TAG_GENERATION),
        said=said,
    )


def _instance(member: _Member, machine: Mapping[str, Any] | None) -> Instance:
    if machine is None:  # EC2 does not know it yet
        return Instance(id=member.id, state=member.state)
    ending = part_of(part_of(machine, "State", dict), "Name", str) in _ENDING
    generation = _tag(machine, TAG_GENERATION) or ""
    return Instance(
        id=member.id,
        state=InstanceState.STOPPING if ending else member.state,
        launched_ms=int(part_of(machine, "LaunchTime", datetime).timestamp() * 1000),
        generation=int(generation) if generation.isdecimal() else None,
    )


def _tag(said: Mapping[str, Any], key: str) -> str | None:
    for tag in said.get("Tags") or ():
        if tag.get("Key") == key:
            return str(tag.get("Value"))
    return None


def _in_batches(ids: Sequence[str], size: int) -> Iterator[list[str]]:
    return (list(ids[at : at + size]) for at in range(0, len(ids), size))
