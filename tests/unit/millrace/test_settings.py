"""Settings: read once, all problems together, and documented by their own table."""

from pathlib import Path

import pytest

from millrace.errors import InvalidInput
from millrace.settings import Settings, for_children, load, page, table

ROOT = Path(__file__).parents[3]


def test_defaults_are_the_embedded_farms(tmp_path: Path) -> None:
    settings = load({"MILLRACE_DATA_DIR": str(tmp_path)})
    assert settings.database == f"sqlite:///{tmp_path}/millrace.db"
    assert settings.broker == f"redis+socket://{tmp_path}/redis/redis.sock"
    assert settings.store == f"file://{tmp_path}/objects"
    assert settings.api == "http://127.0.0.1:8420"
    assert settings.workspaces == tmp_path / "work"


def test_all_problems_are_told_together_by_name() -> None:
    with pytest.raises(InvalidInput) as caught:
        load({"MILLRACE_SLOTS": "many", "MILLRACE_ENGINE": "podman", "MILLRACE_NONSENSE": "1", "OTHER": "x"})
    assert {field.field for field in caught.value.fields} == {"MILLRACE_SLOTS", "MILLRACE_ENGINE", "MILLRACE_NONSENSE"}


def test_an_empty_variable_means_the_default() -> None:
    assert load({"MILLRACE_SLOTS": ""}).slots == Settings.model_fields["slots"].default


def test_paths_are_split_and_secrets_are_not_shown() -> None:
    settings = load({"MILLRACE_GIT_ROOTS": "/a:/b", "MILLRACE_TOKEN": "mr_pat_secret"})
    assert settings.git_roots == (Path("/a"), Path("/b"))
    assert "mr_pat_secret" not in repr(settings)


def test_children_see_none_of_our_settings() -> None:
    assert for_children({"PATH": "/bin", "MILLRACE_WORKER_TOKEN": "x"}) == {"PATH": "/bin"}


def test_the_docs_and_the_readme_show_this_table() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == page()
    assert table() in (ROOT / "README.md").read_text()


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
