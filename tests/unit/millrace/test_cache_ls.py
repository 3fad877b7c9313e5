"""`millrace cache ls --docker` on the worker itself; all else of `millrace cache` is in tests/integration/test_api.py."""

import json
from pathlib import Path

from click.testing import CliRunner

from buildenv import daemonstore
from buildenv.daemonstore import DaemonStore
from millrace.cli import cli


def test_what_docker_daemons_keep_is_listed_where_it_lies(tmp_path: Path) -> None:
    folder = tmp_path / "layers" / daemonstore.FOLDER
    empty = CliRunner().invoke(cli, ["cache", "ls", "--docker"], env={"MILLRACE_DATA_DIR": str(tmp_path)})
    assert empty.exit_code == 0 and "No Docker layer caches" in empty.output
    done, held = DaemonStore(folder), DaemonStore(folder)
    done.take("demo")
    done.close()
    held.take("other")
    shown = CliRunner().invoke(cli, ["cache", "ls", "--docker"], env={"MILLRACE_DATA_DIR": str(tmp_path)})
    assert "demo" in shown.output and "a build has it" in shown.output
    as_json = CliRunner().invoke(cli, ["cache", "ls", "other", "--docker", "--json"], env={"MILLRACE_DATA_DIR": str(tmp_path)})
    (one,) = json.loads(as_json.output)
    assert (one["project"], one["sizeBytes"]) == ("other", None)
    held.close()
