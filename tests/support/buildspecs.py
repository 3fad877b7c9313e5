"""Buildspecs made up by Hypothesis from the parser's own table of keys: right ones, and ones with something odd in them."""

from typing import Any

from hypothesis import strategies as st

from buildenv.speckeys import SECTIONS, Key

ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
"""Whatever JSON can hold."""

_TEXT = st.sampled_from(["a", "make", "dist/**/*", "echo $A", "3.10"])
_NAME = st.sampled_from(["A", "B_1", "_c"])
_KNOWN: dict[str, st.SearchStrategy[Any]] = {
    "version": st.sampled_from([0.2, 0.1, "0.2", "0.1"]),
    "on-failure": st.sampled_from(["ABORT", "continue", "Retry", "RETRY-2", "RETRY-2-time.*out"]),
    "run-as": st.sampled_from(["root", "builder"]),
    "parallelism": st.integers(1, 100),
    "key": st.just("deps-$(codebuild-hash-files lock)"),
    "fallback-keys": st.lists(st.just("deps-"), max_size=5),
    "base-directory": st.just("dist"),
    "depend-on": st.just([]),
    "secrets-manager": st.dictionaries(st.sampled_from("ST"), st.sampled_from(["id", "id:key"]), max_size=2),
    "parameter-store": st.dictionaries(st.sampled_from("PQ"), st.just("/name"), max_size=2),
    "exported-variables": st.lists(_NAME, max_size=3),
}


def _value(name: str, key: Key) -> st.SearchStrategy[Any]:
    if name in _KNOWN:
        return _KNOWN[name]
    if key.values:
        return st.sampled_from(key.values)
    if key.kind == "flag":
        return st.booleans() | st.sampled_from(["yes", "No", "on"])
    if key.kind in ("list", "globs", "commands"):
        return _TEXT | st.lists(_TEXT, min_size=1, max_size=3)
    if key.kind == "texts by name":
        return st.dictionaries(_NAME, _TEXT, min_size=1, max_size=3)
    if key.kind == "lists by name":
        return st.dictionaries(_NAME, st.lists(_TEXT, min_size=1, max_size=2), min_size=1, max_size=2)
    if key.kind == "sections by name":
        return st.dictionaries(_NAME, section(key.section), max_size=3)
    if key.kind == "list of sections":
        identifiers = st.lists(st.sampled_from(["one", "two", "three"]), min_size=1, max_size=3, unique=True)
        return identifiers.flatmap(
            lambda names: st.tuples(*(section(key.section).map(lambda task, n=n: {**task, "identifier": n}) for n in names)).map(
                list
            )
        )
    return section(key.section) if key.kind == "section" else _TEXT


_ALWAYS = {
    "phase": ["commands"],
    "artifacts": ["files"],
    "secondary artifact": ["files"],
    "build-matrix": ["dynamic"],
    "dynamic": ["buildspec"],
}
_ONE_OF = {"batch": ["build-list", "build-graph", "build-matrix", "build-fanout"]}


def section(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Right contents of a section (`speckeys.SECTIONS`)."""
    keys = {name: _value(name, key) for name, key in SECTIONS[kind].items()}
    always = [name for name, key in SECTIONS[kind].items() if key.needed] + _ALWAYS.get(kind, [])
    if kind == "phase":
        keys.pop("runtime-versions")  # in install only
    if kind == "the buildspec":
        keys.pop("environment_variables")  # in 0.1 only
        always = ["version", "phases"]
    one_of = [keys.pop(name) if name not in always else keys[name] for name in _ONE_OF.get(kind, [])]
    required = {name: keys.pop(name) for name in always}
    made = st.fixed_dictionaries(required, optional=keys)
    if not one_of:
        return made
    ones = [st.fixed_dictionaries({name: value}) for name, value in zip(_ONE_OF[kind], one_of, strict=True)]
    return st.tuples(made, st.one_of(ones)).map(lambda both: {**both[0], **both[1]})


@st.composite
def buildspecs(draw: st.DrawFn) -> dict[str, Any]:
    """Right buildspecs."""
    spec = draw(section("the buildspec"))
    spec["phases"]["build"] = draw(section("phase"))
    return spec


@st.composite
def odd_buildspecs(draw: st.DrawFn) -> dict[str, Any]:
    """Buildspecs in which one to three places hold, or are called, something odd."""
    spec = draw(buildspecs())
    for _ in range(draw(st.integers(1, 3))):
        at: Any = spec
        while True:
            places = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not places:
                break
            place = draw(st.sampled_from(places))
            if isinstance(at[place], dict | list) and at[place] and draw(st.integers(0, 3)):
                at = at[place]
                continue
            if isinstance(at, dict) and draw(st.booleans()):
                at[draw(st.sampled_from([f"{place}s", "x", "<<", ""]) | st.text(max_size=8))] = at.pop(place)
            else:
                at[place] = draw(ODD)
            break
    return spec
