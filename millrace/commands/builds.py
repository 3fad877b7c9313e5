"""Verbs about builds: run, builds, logs, stop, artifacts."""

import codecs
import re
import signal
import sys
import tempfile
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import click
from rich.table import Table
from rich.text import Text

from buildenv.folder import pack
from millrace.client import Client, build_path
from millrace.commands import proof, terminal
from millrace.commands.session import Session, connect
from millrace.commands.terminal import LogPrinter, console, errors
from millrace.errors import InvalidInput, NotFound, Unavailable

EXIT_STATUS: Final = {"SUCCEEDED": 0, "FAILED": 1, "FAULT": 3, "TIMED_OUT": 4, "STOPPED": 5}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--buildspec", help="Path of the buildspec in the folder, or of a file elsewhere; by default buildspec.yml.")
@click.option("--image", help="Image to build in; by default MILLRACE_DEFAULT_IMAGE.")
@click.option("-e", "--env", "variables", multiple=True, metavar="NAME=VALUE", help="A variable for the build; may be repeated.")
@click.option("--compute-type", default="BUILD_GENERAL1_SMALL", show_default=True, help="CPU and memory of the build.")
@click.option("--timeout", type=click.IntRange(1, 2160), default=60, show_default=True, help="Minutes that the build may take.")
@click.option(
    "--packaging", type=click.Choice(["zip", "none"]), default="zip", show_default=True, help="One zip, or file by file."
)
@click.option(
    "--artifacts", "keep_in", type=click.Path(path_type=Path, file_okay=False), help="Fetch the artifacts into this folder."
)
@click.option("--project", help="Project to run it under; by default named after the folder.")
@click.pass_obj
def run(
    session: Session,
    folder: Path,
    buildspec: str | None,
    image: str | None,
    variables: tuple[str, ...],
    compute_type: str,
    timeout: int,
    packaging: str,
    keep_in: Path | None,
    project: str | None,
) -> int:
    """Build a local FOLDER on the farm, and show its log live.

    Starts the farm of this box if none runs; it goes on afterwards ('millrace down' stops it). Files that .gitignore leaves out
    are not sent. Exit status: 0 SUCCEEDED, 1 FAILED, 3 FAULT, 4 TIMED_OUT, 5 STOPPED; 2 for a wrong command.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is no folder", hint="Name a folder that holds a buildspec.yml.")
    overrides = [_variable(text) for text in variables]
    spec = _buildspec(folder, buildspec)
    client = connect(session, start=True)
    _need_engine(session)
    name = project or _project_name(folder)
    with tempfile.TemporaryFile() as body:
        packed = pack(folder, cast(BinaryIO, body))
        body.seek(0)
        console.print(f"Sending {packed.file_count} files ({terminal.size(packed.size_bytes)}) from {folder}")
        for left in packed.left_out[:20]:
            errors.print(f"[yellow]not sent:[/] {terminal.harmless(left, colours=False)}")
        location = client.upload(cast(BinaryIO, body), packed.size_bytes, packed.sha256)
    settings = {
        "name": name,
        "description": f"millrace run {folder.resolve().name}"[:255],
        "source": {"type": "S3", "location": location, **({"buildspec": spec} if spec else {})},
        "artifacts": {"type": "S3", "packaging": packaging.upper(), "name": f"{name}.zip"},
        "cache": {"type": "S3"},
        "environment": {
            "type": "LINUX_CONTAINER",
            "image": image or session.settings.default_image,
            "computeType": compute_type,
        },
        "timeoutInMinutes": timeout,
    }
    _upsert(client, settings)
    key = {"Idempotency-Key": str(uuid.uuid4())}
    build = client.post("/v1/builds", {"projectName": name, "environmentVariablesOverride": overrides}, **key)
    console.print(f"Build {build['id']} (number {build['buildNumber']})")
    stop_on_interrupt(client, build["id"])
    return follow_build(session, client, build["id"], keep_in)


@click.command()
@click.argument("build_id", required=False)
@click.option("--project", help="Only builds of this project.")
@click.option("--state", "states", multiple=True, help="Only builds in this state; may be repeated.")
@click.option("-n", "--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@click.pass_obj
def builds(session: Session, build_id: str | None, project: str | None, states: tuple[str, ...], limit: int) -> int:
    """List builds, newest first; or show one with its phases."""
    client = connect(session)
    if build_id:
        _show(session, client.get(build_path(build_id)))
        return 0
    params: dict[str, str | int | list[str]] = {"limit": limit, "state": list(states)}
    if project:
        params["project"] = project
    found = client.get("/v1/builds", **params)["builds"]
    table = Table(box=None, pad_edge=False)
    for column in ("build", "number", "state", "reason", "started", "took"):
        table.add_column(column, no_wrap=column == "build")
    for build in found:
        ours = build["millrace"]
        took = int((build["endTime"] - build["startTime"]) * 1000) if "endTime" in build else None
        began = datetime.fromtimestamp(build["startTime"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(
            build["id"],
            str(build["buildNumber"]),
            terminal.styled(ours["state"]),
            ours["reason"] or "",
            began,
            terminal.duration(took),
        )
    console.print(table if found else "No builds yet; 'millrace run DIR' makes one.")
    return 0


@click.command()
@click.argument("build_id")
@click.option("-f", "--follow", is_flag=True, help="Go on until the build has ended; the exit status is then its verdict.")
@click.option("--attempt", type=click.IntRange(min=1), help="The log of this attempt; by default the newest.")
@click.option("--verify", is_flag=True, help="Fetch the log and its list of chunks, and check both against the worker's footer.")
@click.pass_obj
def logs(session: Session, build_id: str, follow: bool, attempt: int | None, verify: bool) -> int:
    """Print a build's log, or check that it is whole.

    Where some of it is missing, one line that begins with [Millrace] says what. Exit status of --verify: 0 whole, 1 not.
    """
    if follow and verify:
        raise InvalidInput("--follow and --verify exclude each other", hint="Only the log of an ended attempt can be verified.")
    client = connect(session)
    if verify:
        is_whole, says = proof.verify(client, build_id, attempt)
        console.print(terminal.harmless(says, colours=False), markup=False)
        return 0 if is_whole else 1
    if follow:
        return follow_build(session, client, build_id, None, summary=False, attempt=attempt)
    printer = LogPrinter()
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    for data in client.log_text(build_id, attempt):
        printer.feed(decode(data))
    printer.feed(decode(b"", True))
    printer.end()
    return 0


@click.command()
@click.argument("build_id")
@click.pass_obj
def stop(session: Session, build_id: str) -> int:
    """Stop a build. One that has ended already stays as it is."""
    build = connect(session).post(f"{build_path(build_id)}/stop")
    ours = build["millrace"]
    if build["buildComplete"]:
        console.print(f"{build_id} is {terminal.styled(ours['state'])}")
    else:
        console.print(f"{build_id} is asked to stop; it is {ours['state']} now")
    return 0


@click.command()
@click.argument("build_id")
@click.option("-f", "--follow", is_flag=True, help="Show the new build's log until it has ended; the exit status is its verdict.")
@click.pass_obj
def retry(session: Session, build_id: str, follow: bool) -> int:
    """Queue a build like one that has ended: its settings, and of git the very commit."""
    client = connect(session)
    build = client.post(f"{build_path(build_id)}/retry", {}, **{"Idempotency-Key": str(uuid.uuid4())})
    console.print(f"Build {build['id']} (number {build['buildNumber']}) retries {build_id}")
    if not follow:
        return 0
    stop_on_interrupt(client, build["id"])
    return follow_build(session, client, build["id"], None)


@click.command()
@click.argument("build_id")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Fetch them into this folder.")
@click.pass_obj
def artifacts(session: Session, build_id: str, out: Path | None) -> int:
    """List a build's artifacts, or fetch them."""
    client = connect(session)
    found = client.get(f"{build_path(build_id)}/artifacts")["artifacts"]
    if not found:
        console.print(f"{build_id} has no artifacts")
        return 0
    _show_artifacts(session, found)
    if out is not None:
        _fetch(client, build_id, found, out)
    return 0


def follow_build(
    session: Session, client: Client, build_id: str, keep_in: Path | None, *, summary: bool = True, attempt: int | None = None
) -> int:
    """Show a build's log until it has ended; its exit status."""
    printer = LogPrinter()
    for event in client.follow(build_id, attempt):
        if event.kind == "log":
            printer.feed(str(event.data["text"]))
        elif event.kind == "gap":
            printer.end()
            printer.feed(f"[Millrace] {event.data['says']}\n")
        elif event.kind == "full":
            printer.end()
            errors.print(f"[yellow]{event.data['says']}[/]")
        elif event.kind == "attempt":
            printer.end()
            errors.print(
                f"[yellow]attempt {event.data['attempt']} begins: the one before was lost, handed back, or is retried[/]"
            )
    printer.end()
    build = client.get(build_path(build_id))
    if summary:
        _show(session, build)
        if keep_in is not None and build["millrace"]["artifacts"]:
            _fetch(client, build_id, build["millrace"]["artifacts"], keep_in)
    return EXIT_STATUS.get(build["millrace"]["state"], 3)


def _show(session: Session, build: dict[str, Any]) -> None:
    ours = build["millrace"]
    console.print()
    console.print(terminal.phases(build))
    console.print()
    message = f": {terminal.harmless(ours['message'], colours=False)}" if ours["message"] else ""
    line = Text.from_markup(f"{build['id']} {terminal.styled(ours['state'])}")
    line.append(f" ({ours['reason']}){message}" if ours["reason"] and ours["state"] != "SUCCEEDED" else "")
    console.print(line)
    if where := terminal.ledger(ours["marks"]):
        console.print(f"time: {where}")
    if len(ours["attempts"]) > 1:
        console.print(f"after {len(ours['attempts'])} attempts")
    if ours["artifacts"]:
        _show_artifacts(session, ours["artifacts"])


def _show_artifacts(session: Session, found: list[dict[str, Any]]) -> None:
    for item in found[:20]:
        local = session.local_object(str(item["key"]))
        where = f"  {local}" if local is not None else ""
        console.print(f"artifact {item['name']} ({terminal.size(item['sizeBytes'])}){where}", markup=False)
        console.print(f"  sha256 {item['sha256']}")
    if len(found) > 20:
        console.print(f"and {len(found) - 20} more")


def _fetch(client: Client, build_id: str, found: list[dict[str, Any]], out: Path) -> None:
    for item in found:
        folder = out / item["identifier"] if item["identifier"] else out
        target = folder / str(item["name"])
        if not target.resolve().is_relative_to(out.resolve()):
            raise InvalidInput(f"the artifact {item['name']!r} would land outside {out}")
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download(build_id, str(item["name"]), item["identifier"], target)
        console.print(f"fetched {target}", markup=False)


def _need_engine(session: Session) -> None:
    """Where the farm is this box, its engine must answer: a build would only wait for it, and nobody would know why."""
    if session.settings.api_url is None and session.settings.engine == "docker":
        from millrace import doctor

        found = doctor.engine(session.settings)
        if not found.ok:
            raise Unavailable(f"the Docker engine of this machine is {found.says}", hint="'millrace doctor --install' mends it.")


def stop_on_interrupt(client: Client, build_id: str) -> None:
    """The first Ctrl-C stops the build and waits for its end; the second leaves at once."""

    def interrupted(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, lambda _n, _f: sys.exit(130))
        errors.print("\n[yellow]stopping the build; Ctrl-C again leaves it to stop by itself[/]")
        client.post(f"{build_path(build_id)}/stop")

    signal.signal(signal.SIGINT, interrupted)


def _variable(text: str) -> dict[str, str]:
    name, mark, value = text.partition("=")
    if not mark:
        raise InvalidInput(f"-e {text!r} has no '='", hint="Write -e NAME=VALUE.")
    return {"name": name, "value": value, "type": "PLAINTEXT"}


def _buildspec(folder: Path, wanted: str | None) -> str | None:
    """What the project's `buildspec` is to be: a path in the folder, or the text of a file elsewhere."""
    path = folder / (wanted or "buildspec.yml")
    if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
        return wanted
    if wanted is not None and Path(wanted).is_file():
        text = Path(wanted).read_text(encoding="utf-8", errors="surrogateescape")
        return text if "\n" in text else text + "\n"
    raise NotFound(f"{path} does not exist", hint="Add a buildspec.yml to the folder, or name one with --buildspec.")


def _project_name(folder: Path) -> str:
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-_")
    return (plain if len(plain) > 1 else f"run-{plain or 'folder'}")[:150]


def _upsert(client: Client, settings: dict[str, Any]) -> None:
    try:
        client.put(f"/v1/projects/{settings['name']}", settings)
    except NotFound:
        client.post("/v1/projects", settings)
