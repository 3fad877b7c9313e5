"""Real git servers for tests, on loopback: HTTP and HTTPS by `git http-backend`, ssh by sshd; and a repository to serve."""

import base64
import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

from tests.support.need import missing

_ENVIRONMENT = {
    "PATH": os.defpath,
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "Test",
    "GIT_AUTHOR_EMAIL": "test@example.com",
    "GIT_COMMITTER_NAME": "Test",
    "GIT_COMMITTER_EMAIL": "test@example.com",
    "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z",
    "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z",
}


def git(folder: Path, *arguments: str) -> str:
    """Run git in `folder`, as a person would; what it printed."""
    options = ["-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always", "-c", "safe.directory=*"]
    done = subprocess.run(["git", *options, *arguments], cwd=folder, env=_ENVIRONMENT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@dataclass(frozen=True)
class Repository:
    """A bare repository with three commits on main, and what else a source version can name."""

    path: Path
    first: str
    second: str
    third: str
    branch: str
    hidden: str

    def commit(self, branch: str, files: dict[str, str | None], *, links: dict[str, str] | None = None) -> str:
        """Add a commit to a branch; a file of None is deleted. Its id."""
        return _commit(self.path, branch, files, links or {})


def make_repository(path: Path) -> Repository:
    """main: first, second, third; feature/x: one more; v1 (light) on first, v2 (annotated) on second; refs of pull requests
    7 (GitHub), 9 (GitLab) and 5 (Bitbucket) on a commit that is on no branch; README says which commit it is.
    """
    path.mkdir(parents=True)
    git(path, "init", "--quiet", "--bare", ".")
    first = _commit(path, "main", {"README": "first\n", "src/a.py": "print(1)\n"}, {})
    second = _commit(path, "main", {"README": "second\n"}, {})
    third = _commit(path, "main", {"README": "third\n"}, {})
    git(path, "branch", "feature/x", second)
    branch = _commit(path, "feature/x", {"README": "branch\n"}, {})
    git(path, "branch", "scratch", first)
    hidden = _commit(path, "scratch", {"README": "hidden\n"}, {})
    git(path, "branch", "-D", "scratch")
    for ref in ("refs/pull/7/head", "refs/merge-requests/9/head", "refs/pull-requests/5/from"):
        git(path, "update-ref", ref, hidden)
    git(path, "tag", "v1", first)
    git(path, "tag", "-a", "-m", "second", "v2", second)
    return Repository(path, first, second, third, branch, hidden)


def _commit(path: Path, branch: str, files: dict[str, str | None], links: dict[str, str]) -> str:
    tree = path.parent / f"{path.name}.tree"
    known = subprocess.run(
        ["git", "-c", "safe.directory=*", "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}"],
        cwd=path,
        env=_ENVIRONMENT,
        check=False,
        capture_output=True,
    )
    tree.mkdir()
    try:
        where = [f"--git-dir={path}", f"--work-tree={tree}"]
        git(path, *where, "symbolic-ref", "HEAD", f"refs/heads/{branch}")
        if known.returncode == 0:
            git(path, *where, "reset", "--quiet", "--hard")
        for name, content in files.items():
            file = tree / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                file.unlink()
            else:
                file.write_text(content)
        for name, target in links.items():
            (tree / name).symlink_to(target)
        git(path, *where, "add", "-A", "-f", str(tree))
        git(path, *where, "commit", "--quiet", "-m", "A change")
        return git(path, "rev-parse", f"refs/heads/{branch}")
    finally:
        git(path, "symbolic-ref", "HEAD", "refs/heads/main")
        (path / "index").unlink(missing_ok=True)
        shutil.rmtree(tree)


@dataclass
class GitServer:
    """A smart HTTP server of the repositories below `root`. Change its fields to make it misbehave."""

    root: Path
    url: str = ""
    wants_password: bool = False
    password: str = ""
    """`name:password` that opens it, where it wants one."""
    given: list[str] = field(default_factory=list)
    """What it was told, decoded."""
    failures: list[int] = field(default_factory=list)
    """Statuses to answer with, one for each of the next requests."""
    redirect: str = ""
    old_protocol: bool = False
    """Speak version 0, in which a server gives only the commits that it advertises."""
    hold: threading.Event = field(default_factory=threading.Event)
    """While it is cleared, packs are held back."""
    holding: threading.Event = field(default_factory=threading.Event)
    seen: list[str] = field(default_factory=list)
    sent: int = 0
    """Bytes of all its answers."""


@contextlib.contextmanager
def http_server(root: Path, *, tls: tuple[Path, Path] | None = None) -> Iterator[GitServer]:
    """Serve `root`; `tls` is a certificate and its key."""
    state = GitServer(root)
    state.hold.set()
    server = _Server(("127.0.0.1", 0), _Handler)
    server.state = state
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    state.url = f"{'https' if tls else 'http'}://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.hold.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    state: GitServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away, or does not trust us, is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self._body())

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""

    def _serve(self, body: bytes) -> None:
        state = cast(_Server, self.server).state
        state.seen.append(f"{self.command} {self.path}")
        if state.failures:
            self._answer(state.failures.pop(0), {}, b"")
            return
        if state.redirect:
            self._answer(302, {"Location": state.redirect + self.path}, b"")
            return
        said = self.headers.get("Authorization", "")
        if said:
            state.given.append(base64.b64decode(said.partition(" ")[2]).decode())
        if state.wants_password and (not state.password or state.given[-1:] != [state.password] or not said):
            self._answer(401, {"WWW-Authenticate": 'Basic realm="git"'}, b"")
            return
        if self.command == "POST" and b"fetch" in body and not state.hold.is_set():
            state.holding.set()
            state.hold.wait(60)
        path, _, query = self.path.partition("?")
        environment = _ENVIRONMENT | {
            "GIT_PROJECT_ROOT": str(state.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "REMOTE_ADDR": "127.0.0.1",
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": "" if state.old_protocol else self.headers.get("Git-Protocol", ""),
        }
        done = subprocess.run(["git", "http-backend"], input=body, env=environment, capture_output=True, check=False)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
        status = int(headers.pop("Status", "200").split()[0])
        state.sent += len(content)
        self._answer(status, headers, content)

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


def make_certificate(folder: Path, name: str = "localhost") -> tuple[Path, Path]:
    """A certificate for `name`, signed by itself, and its key."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    whose = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run(
        ["openssl", "req", *kind, *whose, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    return certificate, key


@dataclass(frozen=True)
class SshServer:
    """An sshd that lets the bearer of `key` in as this user; `known_hosts` names its host key."""

    port: int
    key: Path
    known_hosts: Path


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[SshServer]:
    """Run sshd with all its files in `folder`. Skips where there is none, or where this user may not start it."""
    program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.defpath)
    if program is None or os.geteuid() != 0:
        missing("sshd, started as root", "apt-get install openssh-server")
    host_key, key = folder / "host_key", folder / "user_key"
    for path in (host_key, key):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    (folder / "authorized").write_text(key.with_suffix(".pub").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    (folder / "known_hosts").write_text(f"[localhost]:{port} {host_key.with_suffix('.pub').read_text()}")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {host_key}\nAuthorizedKeysFile {folder / 'authorized'}\n"
        f"PidFile {folder / 'pid'}\nStrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
    )
    separation = Path("/run/sshd")
    made = not separation.exists()
    separation.mkdir(mode=0o755, exist_ok=True)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([program, "-D", "-e", "-f", folder / "sshd_config"], stdin=subprocess.DEVNULL, stderr=log)
    try:
        _wait_for(port, process, folder / "log")
        yield SshServer(port, key, folder / "known_hosts")
    finally:
        process.terminate()
        process.wait(10)
        if made:
            separation.rmdir()


def _wait_for(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"sshd did not start: {log.read_text()}") from error
            time.sleep(0.02)
