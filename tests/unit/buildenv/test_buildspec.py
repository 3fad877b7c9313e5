"""The buildspec language: what is read, what is warned of, and that everything that is wrong is said, with its place."""

import pytest

from buildenv.buildspec import OnFailure, looks_inline, parse
from millrace.errors import BadBuildspec
from millrace.vocabulary import PhaseType, Reason

MINIMAL = "version: 0.2\nphases:\n  build:\n    commands:\n      - echo hello\n"


def problems(text: str | bytes) -> list[str]:
    with pytest.raises(BadBuildspec) as caught:
        parse(text)
    assert caught.value.reason is Reason.BAD_BUILDSPEC
    assert caught.value.status_code == "YAML_FILE_ERROR"
    return [str(problem) for problem in caught.value.problems]


def warnings(text: str) -> list[str]:
    return [str(warning) for warning in parse(text).warnings]


def test_the_smallest_buildspec() -> None:
    spec = parse(MINIMAL)
    assert [command.text for command in spec.phases[PhaseType.BUILD].commands] == ["echo hello"]
    assert spec.phases[PhaseType.BUILD].commands[0].line == 5
    assert spec.warnings == ()


def test_a_full_buildspec_is_understood_to_the_last_key() -> None:
    spec = parse(
        """\
version: 0.2
run-as: builder
env:
  shell: bash
  variables: {A: 3.10, B: true, C: 007, D: "$PATH:/x", E: }
  parameter-store: {P: /path/name}
  secrets-manager: {S: "secret:key:stage:id"}
  exported-variables: [A, B]
  git-credential-helper: yes
proxy: {upload-artifacts: no, logs: no}
phases:
  install:
    run-as: root
    on-failure: ABORT
    runtime-versions: {python: 3.10, nodejs: 18.x}
    commands: [one, two]
    finally: [three]
  post_build:
    on-failure: Retry-3-.*timed out.*
    commands: [four]
reports:
  unit: {files: ['*.xml'], file-format: JunitXml, base-directory: r, discard-paths: yes}
artifacts:
  files: ['**/*']
  name: out-$A
  discard-paths: no
  base-directory: dist
  exclude-paths: ['**/.*']
  enable-symlinks: yes
  s3-prefix: pre
  secondary-artifacts:
    docs: {files: [a]}
cache:
  key: k-$(x)
  fallback-keys: [k-]
  action: restore
  paths: ['/root/.m2/**/*']
"""
    )
    assert spec.env.variables == {"A": "3.10", "B": "true", "C": "007", "D": "$PATH:/x", "E": ""}
    assert (spec.env.shell, spec.env.git_credential_helper, spec.env.exported_variables) == ("bash", True, ("A", "B"))
    assert spec.env.parameter_store == {"P": "/path/name"}
    install = spec.phases[PhaseType.INSTALL]
    assert install.runtime_versions == {"python": "3.10", "nodejs": "18.x"}
    assert install.on_failure == OnFailure(action="ABORT")
    assert spec.phases[PhaseType.POST_BUILD].on_failure == OnFailure(action="RETRY", count=3, pattern=".*timed out.*")
    assert spec.artifacts is not None
    assert spec.artifacts.secondary["docs"].files == ("a",)
    assert spec.cache is not None
    assert (spec.cache.key, spec.cache.fallback_keys, spec.cache.action) == ("k-$(x)", ("k-",), "restore")
    assert spec.reports["unit"].file_format == "JUNITXML"


def test_json_crlf_a_byte_order_mark_and_anchors_are_fine() -> None:
    json_text = '{"version": "0.2", "phases": {"build": {"commands": ["echo hello"]}}}'
    expected = [c.text for c in parse(MINIMAL).phases[PhaseType.BUILD].commands]
    for text in (json_text, MINIMAL.replace("\n", "\r\n"), b"\xef\xbb\xbf" + MINIMAL.encode(), MINIMAL.rstrip("\n")):
        assert [c.text for c in parse(text).phases[PhaseType.BUILD].commands] == expected
    merged = parse(
        "version: 0.2\nphases:\n  install: &x\n    commands: [a]\n    finally: [b]\n  build:\n    <<: *x\n    commands: [c]\n"
    )
    build = merged.phases[PhaseType.BUILD]
    assert ([c.text for c in build.commands], [c.text for c in build.finally_]) == (["c"], ["b"])


def test_version_0_1_has_its_own_variables() -> None:
    spec = parse("version: 0.1\nenvironment_variables:\n  plaintext:\n    A: b\nphases:\n  build:\n    commands: [x]\n")
    assert (spec.version, spec.env.variables) == ("0.1", {"A": "b"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("phases:\n  build:\n    commands: echo one\n", "one command"),
        ("phases:\n  build:\n    commands:\n      - a\n      -\n      - b\n", "commands[1] is empty"),
        ("phases:\n  install:\n  build:\n    commands: [a]\n", "phase install is empty"),
        ("phases:\n  build:\n    commands: [a]\nartifacts:\n  files: '**/*'\n", "files is one text"),
        ("phases:\n  build:\n    commands: [a]\nartifacts:\n  type: zip\n  files: [a]\n", "'type' in artifacts has no effect"),
        ("phases:\n  build:\n    commands: [a]\nenv:\n", "env is empty"),
    ],
)
def test_what_is_assumed_is_warned_of(text: str, expected: str) -> None:
    assert any(expected in warning for warning in warnings("version: 0.2\n" + text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["line 1, column 1: the buildspec is empty"]),
        ("# only a remark\n", ["is empty"]),
        ("- a\n- b\n", ["is not a mapping"]),
        ("just words", ["is not a mapping"]),
        ("phases:\n  build:\n    commands: [a]\n", ["'version' is missing"]),
        (MINIMAL.replace("0.2", "0.20"), ["version 0.20 is not known (write 'version: 0.2')"]),
        (
            "version: 0.2\nphase:\n  build: {}\n",
            ["line 2, column 1: 'phase' is not known", "did you mean phases?"],
        ),
        ("version: 0.2\nphases:\n  deploy:\n    commands: [a]\n", ["'deploy' is not known in phases"]),
        ("version: 0.2\nphases:\n  build:\n    comands: [a]\n", ["line 4, column 5: 'comands'", "did you mean commands?"]),
        (
            "version: 0.2\nphases:\n  build:\n    runtime_versions: {a: 1}\n    commands: [a]\n",
            ["did you mean runtime-versions?"],
        ),
        ("version: 0.2\nphases:\n  build: [a]\n", ["phase build is a list"]),
        ("version: 0.2\nphases:\n  build: {finally: [a]}\n", ["phase build has no 'commands'"]),
        ("version: 0.2\nphases: {}\n", ["no phase has anything to do"]),
        (MINIMAL + "      - echo foo: bar\n", ["Expected Commands[1] to be of string type", "quote the whole command"]),
        (MINIMAL + "      - [a, b]\n", ["commands[1] is a list"]),
        (MINIMAL + "    on-failure: MAYBE\n", ["on-failure 'MAYBE' is not known", "ABORT, CONTINUE"]),
        (MINIMAL + "    on-failure: RETRY-101\n", ["retries 101 times"]),
        (MINIMAL + "    on-failure: RETRY-(\n", ["regular expression"]),
        (MINIMAL + "    commands: [again]\n", ["'commands' stands twice in phase build; the first is on line 4"]),
        (MINIMAL + "env:\n  variables: [A]\n", ["variables is a list, not a mapping"]),
        (
            MINIMAL + "env:\n  variables: {1A: x, A-B: y, CODEBUILD_X: z, MILLRACE_Y: z}\n",
            ["'1A'", "'A-B'", "CODEBUILD_X is reserved", "MILLRACE_Y"],
        ),
        (MINIMAL + "env:\n  variables: {A: {b: c}}\n", ["A is not a single value"]),
        (MINIMAL + "env:\n  shell: zsh\n", ["shell 'zsh' is not known"]),
        (MINIMAL + "artifacts:\n  base-directory: x\n", ["artifacts has no 'files'"]),
        (MINIMAL + "artifacts:\n  files: ['../../**', 'a[b']\n", ["leaves the source folder", "bracket that is not closed"]),
        (MINIMAL + "artifacts:\n  files: [a]\n  discard-paths: maybe\n", ["discard-paths is 'maybe'", "yes or no"]),
        (MINIMAL + "cache:\n  key: k\n", ["cache has no 'paths'"]),
        (
            MINIMAL + "cache:\n  paths: [a]\n  action: both\n  fallback-keys: [1, 2, 3, 4, 5, 6]\n",
            ["6 fallback-keys", "action 'both'"],
        ),
        (MINIMAL + "reports:\n  r: {file-format: JUNIT}\n", ["report group r has no 'files'", "did you mean JUNITXML?"]),
        (MINIMAL + "---\nversion: 0.2\n", ["a second document begins here"]),
        (MINIMAL + "x: !!python/object:os.system {}\n", ["tag"]),
        ("version: 0.2\nphases:\n\tbuild: x\n", ["line 3", "tab"]),
        ("version: 0.2\nphases: {build: {commands: [a\n", ["line"]),
        ("version: 0.2\nphases:\n  build:\n    commands:\n      - a\x00b\n", ["control character U+0000"]),
        ("[" * 1000, ["nested deeper than 32"]),
        ("a: &a [x]\nb: [" + "*a," * 100 + "]\n", ["more than 64 aliases"]),
        ("version: 0.2\nx: " + "y" * 300_000, ["more than 256 KiB"]),
    ],
)
def test_what_is_wrong_is_said(text: str, expected: list[str]) -> None:
    said = "\n".join(problems(text))
    for words in expected:
        assert words in said, said


def test_other_encodings_are_named() -> None:
    assert "UTF-16" in problems(MINIMAL.encode("utf-16"))[0]
    assert "not UTF-8" in problems(MINIMAL.encode() + b"# \xff\n")[0]


def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    said = problems("version: 0.3\nenv:\n  vars: {}\nphases:\n  build:\n    command: [a]\n  bild: {}\nartifact: {}\n")
    assert [line.split(":")[0] for line in said] == [
        "line 1, column 10",
        "line 3, column 3",
        "line 6, column 5",
        "line 7, column 3",
        "line 8, column 1",
    ]


def test_merged_mappings_may_merge_others() -> None:
    spec = parse(
        "version: 0.2\nphases:\n  install: &a {commands: [x]}\n"
        "  pre_build: &b\n    <<: *a\n    finally: [y]\n  build:\n    <<: *b\n"
    )
    build = spec.phases[PhaseType.BUILD]
    assert ([c.text for c in build.commands], [c.text for c in build.finally_]) == (["x"], ["y"])


def test_words_that_are_compared_are_given_in_lower_case() -> None:
    spec = parse(MINIMAL + "env: {shell: BASH}\ncache: {action: Save, paths: [a]}\n")
    assert spec.cache is not None
    assert (spec.env.shell, spec.cache.action) == ("bash", "save")


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("a:b:c:d:e", "has 5 parts"),
        ("arn:aws:secretsmanager:eu-west-1:123456789012:secret:x-AbCdEf:b:c:d:e", "has 5 parts"),
        (":key", "names no secret before its ':'"),
    ],
)
def test_a_wrong_reference_is_said(reference: str, expected: str) -> None:
    assert expected in problems(MINIMAL + f"env: {{secrets-manager: {{S: '{reference}'}}}}\n")[0]


@pytest.mark.parametrize(
    "reference", ["a", "a:b", "a:::id", "a::stage", "arn:aws:secretsmanager:eu-west-1:1:secret:x-AbCdEf:b::id"]
)
def test_a_right_reference_is_taken(reference: str) -> None:
    assert warnings(MINIMAL + f"env: {{secrets-manager: {{S: '{reference}'}}}}\n") == []


def test_no_more_is_told_than_can_be_read() -> None:
    with pytest.raises(BadBuildspec) as caught:
        parse(MINIMAL + "".join(f"key{number}: 1\n" for number in range(9000)))
    assert len(caught.value.problems) == 100
    assert len(parse(MINIMAL + "      -\n" * 9000).warnings) == 100


def test_an_alias_bomb_is_refused_quickly() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for above, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{name}: &{name} [" + ", ".join([f"*{above}"] * 9) + "]\n"
    assert "aliases" in problems("version: 0.2\n" + bomb)[0]


@pytest.mark.parametrize(
    ("value", "inline"),
    [
        ("buildspec.yml", False),
        ("ci/spec.yaml", False),
        ("arn:aws:s3:::bucket/key.yml", False),
        ("s3://bucket/key.yml", False),
        ("version: 0.2", True),
        ("version: 0.2\nphases: {}", True),
        ('{"version": 0.2}', True),
    ],
)
def test_inline_text_is_told_from_a_path(value: str, inline: bool) -> None:
    assert looks_inline(value) is inline


BATCH = "version: 0.2\nbatch:\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  fast-fail: yes\n", "batch says no kind of batch (write just one of"),
        ("  build-fanout: {parallelism: 2}\n  build-list: [{identifier: a}]\n", "batch has build-list and build-fanout"),
        ("  build-fanout: {parallelism: 0}\n", "parallelism is '0' (write a number from 1 to 100)"),
        ("  build-fanout: {}\n", "build-fanout has no 'parallelism'"),
        ("  build-list: [{buildspec: x}]\n", "build-list[0] has no 'identifier'"),
        ("  build-list: {identifier: a}\n", "build-list is no list of tasks"),
        ("  build-list: [{identifier: a b}]\n", "'a b' is no task identifier"),
        (
            "  build-list:\n    - identifier: a\n    - identifier: a\n",
            "a stands twice in build-list; the first is on line 4",
        ),
        ("  build-list: [{identifier: a, depend-on: [a]}]\n", "'depend-on' is not known in build-list[0]"),
        ("  build-graph: [{identifier: a, depend-on: [b]}]\n", "task a depends on b, which is no task (known: a)"),
        (
            "  build-graph:\n    - {identifier: a, depend-on: [c]}\n    - {identifier: b, depend-on: [a]}\n"
            "    - {identifier: c, depend-on: [b]}\n",
            "tasks wait for each other: ",
        ),
        ("  build-graph: [{identifier: a, depend-on: [a]}]\n", "tasks wait for each other: a -> a"),
        ("  build-matrix: {static: {ignore-failure: yes}}\n", "build-matrix has nothing that differs"),
        ("  build-list: [{identifier: a, env: {computetype: x}}]\n", "did you mean compute-type?"),
        ("  build-list: [{identifier: a, env: {variables: {CODEBUILD_X: 1}}}]\n", "CODEBUILD_X is reserved"),
        ("  build-matrix: {dynamic: {env: {variables: {1A: [x]}}}}\n", "'1A' is no variable name"),
    ],
)
def test_a_wrong_batch_is_said(text: str, expected: str) -> None:
    assert any(expected in problem for problem in problems(BATCH + text)), problems(BATCH + text)


def test_a_matrix_is_counted_and_bounded() -> None:
    lists = "{" + ", ".join(f"V{n}: [{', '.join('abcde')}]" for n in range(3)) + "}"
    text = BATCH + f"  build-matrix:\n    dynamic:\n      buildspec: [x.yml]\n      env: {{image: [i, j], variables: {lists}}}\n"
    assert problems(text) == ["line 4, column 5: build-matrix has 250 combinations (at most 100)"]
    batch = parse(text.replace("V2: [a, b, c, d, e]", "V2: []")).batch
    assert batch is not None and batch.matrix is not None
    assert (batch.kind, batch.matrix.size, batch.matrix.images) == ("build-matrix", 50, ("i", "j"))


def test_a_batch_is_understood_to_the_last_key() -> None:
    batch = parse(
        BATCH
        + """\
  fast-fail: yes
  build-graph:
    - identifier: one
      buildspec: ci/one.yml
      debug-session: true
      ignore-failure: true
      env: {compute-type: BUILD_GENERAL1_S, fleet: f, image: i, privileged-mode: true, type: ARM_CONTAINER, variables: {A: 01}}
    - identifier: two
      depend-on: [one]
"""
    ).batch
    assert batch is not None
    one, two = batch.tasks
    assert (batch.fast_fail, one.buildspec, one.debug_session, one.ignore_failure) == (True, "ci/one.yml", True, True)
    assert (one.env.privileged_mode, one.env.variables, two.depend_on) == (True, {"A": "01"}, ("one",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("phases:\n  env:\n    variables: {A: b}\n  build:\n    commands: [a]\n", "env belongs to the top level: move it left"),
        ("build:\n  commands: [a]\n", "phase build belongs below 'phases:'"),
        ("commands: [a]\n", "commands belongs into a phase"),
        ("phases:\n  build:\n    run-as: a b\n    commands: [a]\n", "run-as 'a b' is no user name"),
        ("phases:\n  build:\n    on-failure: RETRY-1-(?=x)\n    commands: [a]\n", "which cannot be used: "),
        ("phases:\n  build:\n    on-failure: RETRY-101\n    commands: [a]\n", "on-failure retries 101 times"),
        ("phases:\n  build:\n    commands: [a]\nenvironment_variables:\n  plaintext: {A: b}\n", "belongs to version 0.1"),
        ("phases:\n  build:\n    commands: [a]\nenv:\n  parameter-store: {A: }\n", "A in parameter-store names no secret"),
        ("phases:\n  build:\n    commands: [a]\nenv:\n  exported-variables: [1A]\n", "'1A' is no variable name"),
        ("phases:\n  build:\n    commands: [a]\nenv:\n  shell: powershell.exe\n", "shell 'powershell.exe' is not known"),
        ("phases:\n  build:\n    commands: [a]\nproxy:\n  log: yes\n", "did you mean logs?"),
        ("phases:\n  build:\n    commands: [a]\ncache:\n  key: ''\n  paths: [a]\n", "'' is no cache key"),
        ("phases:\n  build:\n    commands: [a]\ncache:\n  key: ../x\n  paths: [a]\n", "'../x' is no cache key"),
        ("phases:\n  build:\n    commands: [a]\ncache:\n  paths: ['/**/*']\n", "no cache can hold /**/*"),
        ("phases:\n  build:\n    commands: [a]\ncache:\n  paths: [/proc/self]\n", "no cache can hold /proc/self"),
        ("phases:\n  build:\n    commands: [a]\nartifacts:\n  files: [a]\n  base-directory: ../x\n", "leaves the source folder"),
        (
            "phases:\n  build:\n    commands: [a]\nreports: {" + ", ".join(f"g{n}: {{files: x}}" for n in range(6)) + "}\n",
            "there are 6 report groups (at most 5)",
        ),
    ],
)
def test_more_that_is_wrong_is_said(text: str, expected: str) -> None:
    assert any(expected in problem for problem in problems("version: 0.2\n" + text)), problems("version: 0.2\n" + text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'phases:\n  build:\n    commands: ["echo a\u202eb"]\n',
            "and may not be what it looks like: echo a\\u202eb",
        ),
        (
            "phases:\n  build:\n    commands: [a]\nartifacts:\n  secondary-artifacts: {x: {files: [a]}}\n",
            "CodeBuild asks for it even where there are secondary artifacts only",
        ),
        (
            "phases:\n  build:\n    commands: [a]\nenv:\n  variables: {A: 1}\n  parameter-store: {A: x}\n",
            "A is set twice; that of",
        ),
    ],
)
def test_more_that_is_assumed_is_warned_of(text: str, expected: str) -> None:
    assert any(expected in warning for warning in warnings("version: 0.2\n" + text))


def test_keys_of_0_2_in_0_1_are_warned_of_and_obeyed() -> None:
    spec = parse("version: 0.1\nenv:\n  variables: {A: b}\nphases:\n  build:\n    commands: [x]\n    finally: [y]\n")
    assert spec.env.variables == {"A": "b"}
    assert len(spec.phases[PhaseType.BUILD].finally_) == 1
    assert [warning.rule for warning in spec.warnings] == ["version", "version"]


def test_a_retry_pattern_takes_linear_time() -> None:
    wanted = OnFailure(action="RETRY", count=1, pattern="(a+)+$")
    assert not wanted.matches("a" * 60_000 + "!")
    assert OnFailure(action="RETRY", count=1, pattern="timed out$").matches("first\nit timed out\nlast")
