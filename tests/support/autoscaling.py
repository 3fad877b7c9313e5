"""Auto Scaling groups as docs/fleets.md wants them, for tests, on a `tests.support.aws`."""

import base64
import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from tests.support.aws import IMAGE, REGION, Aws

USER_DATA = "#!/bin/sh\necho MILLRACE_FLEET={fleet} >>/etc/millrace/worker.env\nsystemctl start millrace-worker\n"
TIGHT = {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
_numbers = itertools.count(1)


def new_template(ec2: Any, fleet: str, **changes: Any) -> str:
    """A launch template; its id."""
    data = {
        "ImageId": IMAGE,
        "InstanceType": "m7i.large",
        "UserData": base64.b64encode(USER_DATA.format(fleet=fleet).encode()).decode(),
        "MetadataOptions": TIGHT,
        **changes,
    }
    made = ec2.create_launch_template(LaunchTemplateName=f"workers-{next(_numbers)}", LaunchTemplateData=data)
    return str(made["LaunchTemplate"]["LaunchTemplateId"])


@contextlib.contextmanager
def a_group(aws: Aws, fleet: str, *, template: dict[str, Any] | None = None, **changes: Any) -> Iterator[str]:
    """A group without instances; its name. `template` are changes of its launch template, `changes` those of itself."""
    ec2, groups = aws.client("ec2"), aws.client("autoscaling")
    name = f"millrace-{fleet}-{next(_numbers)}"
    settings = {
        "MinSize": 0,
        "MaxSize": 10,
        "DesiredCapacity": 0,
        "AvailabilityZones": [f"{REGION}a"],
        "NewInstancesProtectedFromScaleIn": True,
        "LaunchTemplate": {"LaunchTemplateId": new_template(ec2, fleet, **(template or {})), "Version": "$Latest"},
        **changes,
    }
    try:
        groups.create_auto_scaling_group(AutoScalingGroupName=name, **settings)
        yield name
    finally:
        aws.heal()
        groups.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)
