"""What the parts of the farm on one box are told."""

from pathlib import Path

from millrace.embedded import _parts
from millrace.settings import Settings


def test_the_worker_is_not_told_what_opens_secrets_or_signs(tmp_path: Path) -> None:
    trusted = ("MILLRACE_SIGNING_KEY", "MILLRACE_SECRETS_KEY", "MILLRACE_SECRETS_KEY_FILE", "MILLRACE_VAULT_TOKEN")
    environ = {"PATH": "/bin", "MILLRACE_SLOTS": "3", **dict.fromkeys(trusted, "hush")}
    secret = {"worker_token": "w", "signing_key": "s", "admin_token": "a"}
    parts = {part.name: part.environment for part in _parts(Settings(data_dir=tmp_path), secret, environ)}
    assert not set(trusted) & set(parts["worker"])
    assert parts["worker"]["MILLRACE_SLOTS"] == "3"
    assert set(trusted) <= set(parts["api"])
    assert set(parts["redis"]) == {"PATH"}
