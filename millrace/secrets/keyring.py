"""The keys of the farm's own store of secrets. They lie apart from the records: whoever has one of the two has nothing.

A value is sealed with AES-256-GCM together with what it is the value of, so that no sealed value can be put in another's place.
"""

import base64
import binascii
import hashlib
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from millrace.errors import InvalidInput, Unavailable
from millrace.log import get_logger
from millrace.settings import Settings

log = get_logger(__name__)
KEY_BYTES: Final = 32
_FORM: Final = b"\x01"
_ID_BYTES: Final = 4
_NONCE_BYTES: Final = 12
_HEX: Final = re.compile(r"[0-9a-fA-F]{64}")


class WrongKey(Exception):
    """None of the keys opens this; says which one would, as far as is known."""


class Keyring:
    """Keys, of which the first seals and all open."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = {_id(key): AESGCM(key) for key in reversed(keys)}
        self._first = _id(keys[0])

    def seal(self, text: str, context: str) -> bytes:
        """`text`, for nobody without the key, and for no other `context`."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _FORM + self._first + nonce + self._keys[self._first].encrypt(nonce, text.encode(), context.encode())

    def unseal(self, sealed: bytes, context: str) -> str:
        """What was sealed in this context. Raises WrongKey."""
        ident, nonce, body = (
            sealed[1 : 1 + _ID_BYTES],
            sealed[1 + _ID_BYTES :][:_NONCE_BYTES],
            sealed[1 + _ID_BYTES + _NONCE_BYTES :],
        )
        key = self._keys.get(ident)
        if sealed[:1] != _FORM or key is None:
            raise WrongKey(f"it was sealed with the key {ident.hex()}, and the farm has {', '.join(i.hex() for i in self._keys)}")
        try:
            return key.decrypt(nonce, body, context.encode()).decode()
        except (InvalidTag, ValueError) as error:
            raise WrongKey(f"what is kept of it was changed since it was sealed with the key {ident.hex()}") from error

    def is_of_first(self, sealed: bytes) -> bool:
        """True for what the first key sealed."""
        return sealed[: 1 + _ID_BYTES] == _FORM + self._first


def from_settings(settings: Settings) -> Keyring | None:
    """The keys of MILLRACE_SECRETS_KEY; None where a file has them. Raises InvalidInput."""
    if settings.secrets_key is None:
        return None
    keys, wrong = _read(settings.secrets_key.get_secret_value().replace(",", "\n"))
    if wrong or not keys:
        raise InvalidInput(
            f"MILLRACE_SECRETS_KEY is no list of keys{wrong and f': the key on place {wrong} is wrong'}", hint=_HINT
        )
    return Keyring(keys)


def key_file(settings: Settings) -> Path:
    """The file with the keys."""
    return (settings.secrets_key_file or settings.home / "secrets.key").expanduser()


def load(path: Path, *, make: bool) -> Keyring:
    """The keys in a file, which is made with a new one where `make` says so and there is none. Raises Unavailable."""
    try:
        if make and not path.exists():
            _make(path)
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            keys, wrong = _read(file.read(64 * 1024))
    except FileNotFoundError as error:
        raise Unavailable(f"the file with the keys of the secrets is not there: {path}", hint=_LOST) from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise Unavailable(f"the file with the keys of the secrets cannot be read: {path}: {why}", hint=_LOST) from error
    if wrong or not keys:
        raise Unavailable(
            f"the file with the keys of the secrets has none{wrong and f' in its line {wrong}'}: {path}", hint=f"{_LOST} {_HINT}"
        )
    if mode & 0o077:
        log.warning("secrets.key_exposed", path=str(path), mode=f"{mode:04o}", hint=f"Others may read it: chmod 600 {path}")
    return Keyring(keys)


_HINT: Final = "A key is 32 random bytes in hex or base64: 'openssl rand -hex 32' makes one."
_LOST: Final = "Put the file back from where it was saved; without it, the secrets must be set anew."


def _read(text: str) -> tuple[list[bytes], int]:
    """The keys, one a line; and the number of the first line that is wrong, or 0."""
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        try:
            key = (
                bytes.fromhex(line)
                if _HEX.fullmatch(line)
                else base64.b64decode(line, altchars="-_" if set("-_") & set(line) else None, validate=True)
            )
        except (binascii.Error, ValueError):
            return [], number
        if len(key) != KEY_BYTES:
            return [], number
        keys.append(key)
    return keys, 0


def _make(path: Path) -> None:
    """A new key, for its owner only. Of several that make one at once, the first one's stands."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(new, path)
        log.warning("secrets.key_made", path=str(path), hint="Save it apart from the database: without it no secret can be read.")
    except FileExistsError:
        pass
    finally:
        new.unlink()


def _id(key: bytes) -> bytes:
    return hashlib.sha256(b"millrace secrets key" + key).digest()[:_ID_BYTES]
