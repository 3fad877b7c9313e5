"""What the build images are called, which names stand for them, and which runtimes can be had."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildenv import images
from buildenv.images import LABEL_RUNTIMES, resolve_alias, resolve_runtimes, runtimes_from_labels, tag_of

STANDARD = "millrace/standard:latest"
DECLARED = {
    "python": ("3.9.18", "3.11.2", "3.10.13"),
    "nodejs": ("18.20.4",),
    "java": ("17.0.21.1",),
    "golang": ("1.19.8",),
    "ruby": ("3.1.7",),
}


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the recipes, to be changed."""
    for name in images.NAMES:
        shutil.copytree(Path(images.__file__).parent / name, tmp_path / name)
    monkeypatch.setattr(images, "_HERE", tmp_path)
    tag_of.cache_clear()
    yield tmp_path
    tag_of.cache_clear()


def test_a_tag_is_a_hash_of_twelve_digits() -> None:
    assert [re.fullmatch(rf"millrace/{name}:[0-9a-f]{{12}}", tag_of(name)) is not None for name in images.NAMES] == [True, True]


def test_a_recipe_that_did_not_change_keeps_its_tag(recipes: Path) -> None:
    assert (recipes / "standard").is_dir()
    copied = [tag_of(name) for name in images.NAMES]
    tag_of.cache_clear()
    assert [tag_of(name) for name in images.NAMES] == copied


@pytest.mark.parametrize("change", ["content", "name", "one more", "one less"])
def test_any_change_of_a_recipe_makes_a_new_tag(recipes: Path, change: str) -> None:
    before = tag_of("base")
    file = recipes / "base" / "packages.txt"
    match change:
        case "content":
            file.write_text(file.read_text() + "\nnano\n")
        case "name":
            file.rename(file.with_name("list.txt"))
        case "one more":
            file.with_name("more.sh").write_text("")
        case _:
            file.unlink()
    tag_of.cache_clear()
    assert tag_of("base") != before


def test_a_change_of_the_base_makes_the_standard_image_anew_but_not_the_other_way(recipes: Path) -> None:
    base, standard = tag_of("base"), tag_of("standard")
    (recipes / "standard" / "more.sh").write_text("")
    tag_of.cache_clear()
    assert tag_of("base") == base
    changed = tag_of("standard")
    assert changed != standard
    (recipes / "base" / "more.sh").write_text("")
    tag_of.cache_clear()
    assert tag_of("standard") not in (standard, changed)


@pytest.mark.parametrize(
    "image",
    [
        "aws/codebuild/standard:1.0",
        "aws/codebuild/standard:5.0-21.04.23",
        "aws/codebuild/standard:7.0",
        "aws/codebuild/standard:8.0",
        "aws/codebuild/standard",
        f"aws/codebuild/standard@sha256:{'0' * 64}",
        "aws/codebuild/amazonlinux-x86_64-standard:6.0",
        "aws/codebuild/amazonlinux2-x86_64-standard:5.0",
        "aws/codebuild/amazonlinux2-aarch64-standard:3.0",
        "public.ecr.aws/codebuild/amazonlinux2-x86_64-standard:5.0",
    ],
)
def test_codebuilds_own_names_stand_for_our_image(image: str) -> None:
    assert resolve_alias(image) == STANDARD


@pytest.mark.parametrize(
    "image",
    [
        "",
        "python:3.12",
        "millrace/standard:latest",
        "localhost:5000/aws/codebuild/standard:7.0",
        "aws/codebuild/standard-x:1.0",
        "aws/codebuild/windows-base:2019-1.0",
        "aws/codebuild/amazonlinux-x86_64-lambda-standard:python3.12",
        f"python@sha256:{'0' * 64}",
    ],
)
def test_any_other_name_stays_as_it_is(image: str) -> None:
    assert resolve_alias(image) == image


@given(st.text(max_size=60))
def test_resolving_a_name_twice_changes_nothing_more(image: str) -> None:
    once = resolve_alias(image)
    assert resolve_alias(once) == once


@pytest.mark.parametrize(
    ("runtime", "asked", "chosen"),
    [
        ("python", "3.11.2", "3.11.2"),
        ("python", "3.11", "3.11.2"),
        ("python", " 3.10 ", "3.10.13"),
        ("python", "3.10.x", "3.10.13"),
        ("python", "3", "3.11.2"),
        ("python", "3.x", "3.11.2"),
        ("python", "latest", "3.11.2"),
        ("nodejs", "18", "18.20.4"),
        ("nodejs", "18.x", "18.20.4"),
        ("nodejs", "v18.20.4", "18.20.4"),
        ("java", "corretto17", "17.0.21.1"),
        ("java", "openjdk17", "17.0.21.1"),
        ("java", "17", "17.0.21.1"),
        ("golang", "1.x", "1.19.8"),
        ("ruby", "Latest", "3.1.7"),
    ],
)
def test_a_version_can_be_asked_for_in_many_ways(runtime: str, asked: str, chosen: str) -> None:
    assert resolve_runtimes(DECLARED, {runtime: asked}, image="x") == ({runtime: chosen}, [])


@pytest.mark.parametrize(
    ("runtime", "asked"),
    [
        ("python", "3.1"),  # What YAML makes of an unquoted 3.10, and a prefix of 3.11 in letters only.
        ("python", "3.12"),
        ("python", "2.x"),
        ("python", "3.11.2.1"),
        ("python", "corretto3"),
        ("python", ""),
        ("python", ".x"),
        ("python", "x"),
        ("python", "$PYTHON"),
        ("java", "corretto8"),
        ("java", "corretto"),
        ("java", "corretto1"),
    ],
)
def test_a_version_that_is_not_there_is_named_along_with_those_that_are(runtime: str, asked: str) -> None:
    chosen, problems = resolve_runtimes(DECLARED, {runtime: asked}, image="the/image:1")
    assert chosen == {}
    [problem] = problems
    assert f"'{asked}' of {runtime}" in problem
    assert "the/image:1" in problem
    assert all(version in problem for version in DECLARED[runtime])


@pytest.mark.parametrize(
    ("asked", "meant"), [("pyton", "python"), ("node", "nodejs"), ("go", "golang"), ("corretto", "java"), ("openjdk", "java")]
)
def test_a_runtime_that_is_not_known_gets_the_list_and_the_nearest_name(asked: str, meant: str) -> None:
    chosen, problems = resolve_runtimes(DECLARED, {asked: "1"}, image="the/image:1")
    assert chosen == {}
    assert problems == [
        f"Unknown runtime named '{asked}'. Image the/image:1 has golang, java, nodejs, python, ruby; did you mean {meant}?"
    ]


def test_a_runtime_like_no_other_gets_the_list_only() -> None:
    _, problems = resolve_runtimes(DECLARED, {"android": "28"}, image="the/image:1")
    assert problems == ["Unknown runtime named 'android'. Image the/image:1 has golang, java, nodejs, python, ruby"]


def test_a_hint_never_names_what_the_image_lacks() -> None:
    _, problems = resolve_runtimes({"python": ("3.11.2",)}, {"node": "18"}, image="x")
    assert problems == ["Unknown runtime named 'node'. Image x has python"]


def test_all_problems_come_at_once_with_what_could_be_chosen() -> None:
    chosen, problems = resolve_runtimes(DECLARED, {"python": "2.7", "ruby": "3.x", "rust": "1"}, image="x")
    assert chosen == {"ruby": "3.1.7"}
    assert len(problems) == 2


_versions = st.lists(st.integers(0, 30), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))


@given(st.lists(_versions, min_size=1, max_size=6), st.data())
def test_each_declared_version_and_each_of_its_prefixes_can_be_asked_for(versions: list[str], data: st.DataObject) -> None:
    parts = data.draw(st.sampled_from(versions)).split(".")
    wanted = parts[: data.draw(st.integers(1, len(parts)))]
    chosen, problems = resolve_runtimes(
        {"python": versions}, {"python": ".".join(wanted) + data.draw(st.sampled_from(("", ".x")))}, image="x"
    )
    assert problems == []
    assert chosen["python"] in versions
    assert chosen["python"].split(".")[: len(wanted)] == wanted


@given(st.lists(_versions, min_size=1, max_size=6))
def test_latest_is_the_highest_number_and_not_the_last_in_letters(versions: list[str]) -> None:
    chosen, _ = resolve_runtimes({"python": versions}, {"python": "latest"}, image="x")
    assert [int(part) for part in chosen["python"].split(".")] == max([int(part) for part in v.split(".")] for v in versions)


def test_a_version_of_absurd_length_is_one_like_any_other() -> None:
    absurd = "9" * 5000
    assert resolve_runtimes({"python": ("3.11", absurd)}, {"python": "latest"}, image="x") == ({"python": absurd}, [])


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=12), max_size=4))
def test_whatever_is_asked_gets_a_version_or_a_problem(asked: dict[str, str]) -> None:
    chosen, problems = resolve_runtimes(DECLARED, asked, image="x")
    assert len(chosen) + len(problems) == len(asked)


def test_an_image_says_in_its_label_what_it_has() -> None:
    assert runtimes_from_labels({LABEL_RUNTIMES: '{"python": ["3.11.2", "3.9"], "ruby": []}'}) == {
        "python": ("3.11.2", "3.9"),
        "ruby": (),
    }


@pytest.mark.parametrize(
    "label", ["", "python", "[]", "3", "null", '{"python": 3}', '{"python": null}', '{"python": "3.11"}', '{"python": [[]]}', "{"]
)
def test_a_label_that_cannot_be_read_declares_nothing(label: str) -> None:
    assert runtimes_from_labels({LABEL_RUNTIMES: label}) is None


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)))
def test_no_label_of_a_foreign_image_breaks_anything(value: object) -> None:
    runtimes_from_labels({LABEL_RUNTIMES: json.dumps(value)})


def test_an_image_without_the_label_declares_nothing() -> None:
    assert runtimes_from_labels({}) is None
    assert runtimes_from_labels({"other": "{}"}) is None
