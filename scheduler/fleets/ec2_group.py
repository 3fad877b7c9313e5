"""What an Auto Scaling group must be like to serve a fleet, asked before the fleet is set to it."""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from millrace.errors import FieldProblem
from millrace.fleet import Scaling

_FLEET: Final = re.compile(r"MILLRACE_FLEET[=:]\s*[\"']?([A-Za-z0-9][A-Za-z0-9._-]*)")
_NEEDED: Final = ("Launch", "Terminate")
"""The group's processes without which it neither grows nor shrinks."""


def problems_of(group: Mapping[str, Any], machines: Any, fleet: str, scaling: Scaling) -> list[FieldProblem]:
    """All that is wrong with the group, as DescribeAutoScalingGroups shows it; `machines` is a client of EC2."""
    found = [*_limits(group, scaling), *_protection(group)]
    templates = list(_templates(group))
    if not templates:
        found.append("it has no launch template (launch configurations do not do): give it one")
    for template in templates:
        found += _of_template(_data(machines, template), fleet)
    return [FieldProblem(field="provider.group", what=what) for what in dict.fromkeys(found)]


def _limits(group: Mapping[str, Any], scaling: Scaling) -> Iterator[str]:
    maximum, minimum = group.get("MaxSize") or 0, group.get("MinSize") or 0
    if maximum < scaling.maximum:
        yield f"its MaxSize is {maximum}, under scaling.maximum, which is {scaling.maximum}: raise the one or lower the other"
    if minimum > scaling.minimum:
        yield f"its MinSize is {minimum}, over scaling.minimum, which is {scaling.minimum}: it would never shrink to that"


def _protection(group: Mapping[str, Any]) -> Iterator[str]:
    if not group.get("NewInstancesProtectedFromScaleIn"):
        yield "NewInstancesProtectedFromScaleIn is off: the group could end instances whose builds run; turn it on"
    for process in group.get("SuspendedProcesses") or ():
        if process.get("ProcessName") in _NEEDED:
            yield f"its process {process['ProcessName']} is suspended: resume it"


def _templates(group: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All that instances may be started from."""
    if template := group.get("LaunchTemplate"):
        yield template
    mixed = (group.get("MixedInstancesPolicy") or {}).get("LaunchTemplate") or {}
    if template := mixed.get("LaunchTemplateSpecification"):
        yield template
    for override in mixed.get("Overrides") or ():
        if template := override.get("LaunchTemplateSpecification"):
            yield template


def _data(machines: Any, template: Mapping[str, Any]) -> Mapping[str, Any]:
    by = "LaunchTemplateId" if template.get("LaunchTemplateId") else "LaunchTemplateName"
    answer = machines.describe_launch_template_versions(
        **{by: template.get(by) or "", "Versions": [template.get("Version") or "$Default"]}
    )
    for version in answer.get("LaunchTemplateVersions") or ():
        data: Mapping[str, Any] = version.get("LaunchTemplateData") or {}
        return data
    return {}


def _of_template(data: Mapping[str, Any], fleet: str) -> Iterator[str]:
    metadata = data.get("MetadataOptions") or {}
    if metadata.get("HttpTokens") != "required":
        yield "its launch template lets the metadata be read without a token (IMDSv1): set MetadataOptions.HttpTokens to required"
    if metadata.get("HttpPutResponseHopLimit") != 1:
        yield (
            "its launch template does not set MetadataOptions.HttpPutResponseHopLimit to 1: "
            "builds in containers could have the credentials of the machine"
        )
    text = _user_data(data)
    if "MILLRACE_" not in text:
        yield "its launch template's user data starts no worker: it has no setting of Millrace (MILLRACE_...)"
    named = {match for match in _FLEET.findall(text)}
    if named and fleet not in named:
        yield f"its launch template's user data is for fleet {', '.join(sorted(named))}, not {fleet}: mend MILLRACE_FLEET there"


def _user_data(data: Mapping[str, Any]) -> str:
    try:
        return base64.b64decode(str(data.get("UserData") or ""), validate=True).decode(errors="replace")
    except binascii.Error:
        return ""
