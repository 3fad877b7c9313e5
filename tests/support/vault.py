"""A server that speaks what we use of Vault's KV engine, version 2, as its API documentation has it; kept in memory.

https://developer.hashicorp.com/vault/api-docs/secret/kv/kv-v2. Where MILLRACE_TEST_VAULT is "ADDRESS TOKEN", all is tested on
that Vault instead; it needs an engine of version 2 on `secret`.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import hvac

ROOT_TOKEN = "hvs.root"


@dataclass
class Vault:
    """A Vault to be tested with. `sealed` and `forbidden` are of the server in memory only."""

    address: str
    token: str
    real: bool
    sealed: bool = False
    forbidden: set[str] = field(default_factory=set)
    namespaces: set[str | None] = field(default_factory=set)

    def write(self, path: str, **fields: Any) -> None:
        with self._client() as client:
            client.secrets.kv.v2.create_or_update_secret(path, fields)

    def delete(self, path: str) -> None:
        with self._client() as client:
            client.secrets.kv.v2.delete_latest_version_of_secret(path)

    @contextlib.contextmanager
    def _client(self) -> Iterator[hvac.Client]:
        client = hvac.Client(url=self.address, token=self.token)
        try:
            yield client
        finally:
            client.adapter.close()


@contextlib.contextmanager
def running() -> Iterator[Vault]:
    """A Vault, empty but for what other tests wrote into a real one."""
    given = os.environ.get("MILLRACE_TEST_VAULT")
    if given:
        address, token = given.split()
        yield Vault(address, token, real=True)
        return
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = False
    vault = Vault(f"http://127.0.0.1:{server.server_port}", ROOT_TOKEN, real=False)
    server.vault, server.kept = vault, {}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield vault
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One request; `kept` is path -> versions, of which None is a deleted one."""

    def do_GET(self) -> None:
        versions, query = self._admitted()
        if versions is None:
            return
        wanted = int(query.get("version", ["0"])[0]) or len(versions)
        if not 0 < wanted <= len(versions):
            return self._say(404, {"errors": []})
        data = versions[wanted - 1]
        metadata = {"version": wanted, "deletion_time": "" if data is not None else "2026-11-23T00:00:00Z", "destroyed": False}
        self._say(404 if data is None else 200, {"data": {"data": data, "metadata": metadata}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        versions, _query = self._admitted()
        if versions is not None:
            versions.append(body["data"])
            self._say(200, {"data": {"version": len(versions)}})

    def do_DELETE(self) -> None:
        versions, _query = self._admitted()
        if versions is not None:
            versions[-1] = None
            self._say(204, {})

    def _admitted(self) -> tuple[list[Any] | None, dict[str, list[str]]]:
        vault: Vault = self.server.vault  # type: ignore[attr-defined]
        address = urlsplit(self.path)
        vault.namespaces.add(self.headers.get("X-Vault-Namespace"))
        if vault.sealed:
            self._say(503, {"errors": ["Vault is sealed"]})
        elif self.headers.get("X-Vault-Token") != ROOT_TOKEN or address.path in vault.forbidden:
            self._say(403, {"errors": ["permission denied"]})
        elif not address.path.startswith("/v1/secret/data/"):
            self._say(404, {"errors": ["no handler for route"]})
        else:
            return self.server.kept.setdefault(address.path, []), parse_qs(address.query)  # type: ignore[attr-defined]
        return None, {}

    def _say(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode() if status != 204 else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: Any) -> None:
        pass
