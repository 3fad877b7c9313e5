"""Templates of CloudFormation as tests look at them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cfnlint.decode import cfn_yaml

ROOT: Final = Path(__file__).resolve().parents[2]
TEMPLATES: Final = sorted((ROOT / "deploy" / "cloudformation").glob("*.yaml"))


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One statement of a policy, and where it stands."""

    where: str
    effect: str
    actions: tuple[str, ...]
    resources: tuple[Any, ...]
    said: Mapping[str, Any]


def load(path: Path) -> dict[str, Any]:
    """A template, with `!Ref X` as `{"Ref": "X"}` and so on."""
    loaded: dict[str, Any] = cfn_yaml.load(str(path))
    return loaded


def of_type(template: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """The properties of all resources of a type, by name."""
    return {name: one["Properties"] for name, one in template["Resources"].items() if one["Type"] == kind}


def statements(template: Mapping[str, Any]) -> Iterator[Statement]:
    """All statements of all policies that say what somebody may do; not who may take a role."""
    for name, one in template["Resources"].items():
        for where, found in _policies(one.get("Properties", {}), name):
            for said in found["Statement"]:
                yield Statement(
                    where=f"{where}.{said.get('Sid', '?')}",
                    effect=said["Effect"],
                    actions=tuple(_each(said["Action"])),
                    resources=tuple(_each(said["Resource"])),
                    said=said,
                )


def _policies(said: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(said, Mapping):
        for name, value in said.items():
            if name == "PolicyDocument":
                yield where, value
            elif name != "AssumeRolePolicyDocument":
                yield from _policies(value, f"{where}.{name}")
    elif isinstance(said, list):
        for value in said:
            yield from _policies(value, where)


def _each(said: Any) -> list[Any]:
    return said if isinstance(said, list) else [said]
