"""What a variable's reference to a secret says (CodeBuild: buildspec, env/parameter-store and env/secrets-manager)."""

import re
from dataclasses import dataclass
from typing import Final, Literal

from millrace.contract import SecretReference
from millrace.errors import InvalidInput

MAX_NAME_CHARS: Final = 512
_NAME: Final = re.compile(r"/?[A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+)*")
_AWS_NAME: Final = re.compile(r"[A-Za-z0-9_.+=@/-]+")
_VERSION: Final = re.compile(r"[A-Za-z0-9_./+=@-]*")
_ARN_PARTS: Final = {"PARAMETER_STORE": 6, "SECRETS_MANAGER": 7}
CURRENT: Final = "AWSCURRENT"


class BadReference(Exception):
    """A reference that can mean nothing; says why."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A parameter or a secret, by its name or ARN as it was written, in one version; "" is the newest.

    `version` is a number or label of a parameter, the version id of a secret. `stage` is a secret's only.
    """

    type: Literal["PARAMETER_STORE", "SECRETS_MANAGER"]
    name: str
    version: str = ""
    stage: str = ""

    @property
    def noun(self) -> str:
        """What people call it."""
        return "parameter" if self.type == "PARAMETER_STORE" else "secret"

    @property
    def region(self) -> str:
        """The region that an ARN names; "" for a name."""
        return self.name.split(":")[3] if self.name.startswith("arn:") else ""

    @property
    def plain_name(self) -> str:
        """The name, also where it was written as an ARN."""
        if not self.name.startswith("arn:"):
            return self.name
        last = self.name.split(":", _ARN_PARTS[self.type] - 1)[-1]
        return last.removeprefix("parameter") if self.type == "PARAMETER_STORE" else last


def read(reference: SecretReference) -> tuple[Wanted, str]:
    """What is wanted, and the key of its JSON or "". Raises BadReference."""
    text = reference.value
    least = _ARN_PARTS[reference.type] if text.startswith("arn:") else 1
    parts = text.split(":")
    if len(parts) < least:
        raise BadReference(f"this is no ARN of a {'parameter' if least == 6 else 'secret'}")
    name, rest = ":".join(parts[:least]), parts[least:]
    if reference.type == "PARAMETER_STORE":
        if len(rest) > 1:
            raise BadReference("a parameter is NAME or NAME:VERSION")
        wanted, key = Wanted(type=reference.type, name=name, version=(*rest, "")[0]), ""
    else:
        if len(rest) > 3:
            raise BadReference("a secret is ID:JSON-KEY:VERSION-STAGE:VERSION-ID, and this has more parts")
        key, stage, version = (*rest, "", "", "")[:3]
        if stage and version:
            raise BadReference("a secret is given a version stage or a version id, not both")
        wanted = Wanted(type=reference.type, name=name, version=version, stage=stage)
    service = "ssm" if reference.type == "PARAMETER_STORE" else "secretsmanager"
    if least > 1 and (parts[2] != service or not re.fullmatch(r"[a-z0-9-]+", parts[3])):
        raise BadReference(f"this is no ARN of a {wanted.noun}")
    if least > 1 and not (parts[5] == "secret" if least == 7 else parts[5].startswith("parameter/")):
        raise BadReference(f"this is no ARN of a {wanted.noun}")
    plain = wanted.plain_name
    if not _AWS_NAME.fullmatch(plain) or {".", ".."} & set(plain.split("/")):
        raise BadReference(f"this is no name of a {wanted.noun}")
    if not (_VERSION.fullmatch(wanted.version) and _VERSION.fullmatch(wanted.stage)):
        raise BadReference(f"this is no version of a {wanted.noun}")
    return wanted, key


def canonical(name: str) -> str:
    """A name as the farm's own store and Vault know it: without the `/` in front. Raises InvalidInput for what is no name."""
    if len(name) > MAX_NAME_CHARS or not _NAME.fullmatch(name) or {".", ".."} & set(name.split("/")):
        raise InvalidInput(
            f"{name[:120]!r} is no name of a secret",
            hint=f"Use letters, digits and _ . - in parts between /, {MAX_NAME_CHARS} characters at most: /team/db-password.",
        )
    return name.removeprefix("/")
