"""What ECS gives a task for its role: keys for a while, over HTTP. Here they are a MinIO server's own temporary ones."""

import contextlib
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from minio.credentials import AssumeRoleProvider, Credentials

from tests.support.minio import MinioServer


def temporary_keys(server: MinioServer) -> Credentials:
    """Keys of a quarter of an hour, with a session token, as STS gives them out."""
    return AssumeRoleProvider(
        sts_endpoint=server.url, access_key=server.access_key, secret_key=server.secret_key, duration_seconds=900
    ).retrieve()


@contextlib.contextmanager
def task_role(keys: Credentials, *, lasts_s: float = 900) -> Iterator[str]:
    """Serve `keys` as the container credentials endpoint does; its address, for AWS_CONTAINER_CREDENTIALS_FULL_URI."""

    class Endpoint(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """The keys, to whoever asks."""
            expires = datetime.now(UTC) + timedelta(seconds=lasts_s)
            said = {
                "AccessKeyId": keys.access_key,
                "SecretAccessKey": keys.secret_key,
                "Token": keys.session_token,
                "Expiration": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
            body = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:  # as its base has it
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/role"
        finally:
            server.shutdown()
