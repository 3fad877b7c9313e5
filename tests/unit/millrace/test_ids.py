"""How builds and secrets are named."""

import pytest

from millrace import ids


def test_a_build_id_names_its_project_and_is_new_each_time() -> None:
    first, second = ids.new_build_id("a-project"), ids.new_build_id("a-project")
    assert first != second
    assert ids.is_build_id(first)
    assert ids.project_of(first) == "a-project"
    assert first == f"a-project:{ids.uuid_of(first)}"


@pytest.mark.parametrize(
    "text", ["", "x", "a-project:", "a-project:123", ":00000000-0000-0000-0000-000000000000", "a:b:c", "../x:0"]
)
def test_what_is_no_build_id_is_seen(text: str) -> None:
    assert not ids.is_build_id(text)


def test_a_container_is_named_by_build_and_attempt() -> None:
    build = ids.new_build_id("ab")
    assert ids.container_name(build, 2) == f"millrace-{ids.uuid_of(build)}-2"


def test_a_secret_says_its_kind_and_holds_256_bits() -> None:
    secret = ids.new_secret("pat")
    assert secret.startswith("mr_pat_")
    assert len(secret) >= len("mr_pat_") + 43
    assert ids.new_secret("pat") != secret


def test_a_worker_id_is_safe_in_labels_and_new_at_each_boot() -> None:
    assert ids.new_worker_id("höst name") != ids.new_worker_id("höst name")
    assert set(ids.new_worker_id("höst name")) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")
