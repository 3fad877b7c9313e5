"""`python -m tests.support.linklocal`, in a network namespace of its own: what an EC2 instance finds around it.

The metadata service at its own address, and moto for the rest, in front of which the signature of each call is checked, as moto
takes any. On the first line of stdin it is told, as JSON, what stands in the metadata, and the keys that sign.
"""

import io
import json
import sys
import threading
from collections.abc import Callable, Iterable
from http.server import ThreadingHTTPServer
from typing import Any, Final

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

from tests.support.metadata import Metadata, _Handler

METADATA: Final = "169.254.169.254"
PORT: Final = 5000


def main() -> None:
    """Serve until stdin ends."""
    told = json.loads(sys.stdin.readline())
    metadata = ThreadingHTTPServer((METADATA, 80), _Handler)
    metadata.service = Metadata(paths=told["metadata"])  # type: ignore[attr-defined]
    moto = DomainDispatcherApplication(create_backend_app)
    keys = Credentials(told["access_key"], told["secret_key"], told["token"])
    aws = make_server("0.0.0.0", PORT, _checked(moto, keys), threaded=True)  # noqa: S104  # of a namespace of its own
    for server in (metadata, aws):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()


def _checked(moto: Any, keys: Credentials) -> Callable[..., Iterable[bytes]]:
    def serve(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        body = request.get_data()
        environ["wsgi.input"] = io.BytesIO(body)
        if "/secretsmanager/" in request.headers.get("Authorization", "") and (wrong := _wrong(request, body, keys)):
            said = json.dumps({"__type": "InvalidSignatureException", "message": wrong})
            return Response(said, 400, content_type="application/x-amz-json-1.1")(environ, start)
        return Response.from_app(moto, environ)(environ, start)

    return serve


def _wrong(request: Request, body: bytes, keys: Credentials) -> str:
    """What is wrong with a call's signature; it must also sign the token, as AWS demands it of keys of a role."""
    _, _, given = request.headers["Authorization"].partition("AWS4-HMAC-SHA256 ")
    parts = dict(part.strip().split("=", 1) for part in given.split(","))
    signed = parts["SignedHeaders"].split(";")
    if request.headers.get("X-Amz-Security-Token") != keys.token or "x-amz-security-token" not in signed:
        return "the token is not signed"
    access_key, _day, region, service, _ = parts["Credential"].split("/")
    if access_key != keys.access_key:
        return "the key is another"
    headers = {name: request.headers[name] for name in signed}
    again = AWSRequest(method=request.method, url=request.url, data=body, headers=headers)
    again.context["timestamp"] = request.headers["X-Amz-Date"]
    auth = SigV4Auth(keys, service, region)
    text = auth.string_to_sign(again, auth.canonical_request(again))
    return "" if auth.signature(text, again) == parts["Signature"] else "the signature is wrong"


if __name__ == "__main__":
    main()
