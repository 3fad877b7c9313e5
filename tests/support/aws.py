"""AWS for tests: moto behind a server of ours on loopback, which may answer instead of it, or spoil what it answers.

Errors come in the shape that each protocol has them in (AWS: query and EC2 protocols in XML, JSON 1.1). What moto does not have
of Auto Scaling is here: a group's activities, and the end of lifecycle actions; what it does not have of ECS is in `ecs.py`.
"""

import contextlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

import boto3
from moto.autoscaling.models import autoscaling_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

from tests.support.ecs import Ecs

ACCOUNT = "123456789012"
REGION = "us-east-1"
IMAGE = "ami-12c6146b"
"""One of those that moto knows."""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_EC2_METADATA_DISABLED": "true"}
_SERVICE = re.compile(r"Credential=[^/]+/[^/]+/[^/]+/([^/]+)/")


@dataclass
class Rule:
    """What happens to the next `times` calls of an action."""

    action: str
    times: int
    answer: Callable[[str], Response] | None = None
    change: Callable[[bytes], bytes] | None = None


@dataclass
class Aws:
    """The server. `calls` are the names of all actions that were asked for; `activities` those of each group, newest first."""

    url: str = ""
    calls: list[str] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    activities: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    completed: list[tuple[str, str]] = field(default_factory=list)
    ecs: Ecs = field(default_factory=Ecs)
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)
    _clients: dict[str, Any] = field(default_factory=dict)

    def fail(self, action: str, code: str, message: str = "it is so", *, status: int = 400, times: int = 100) -> None:
        """The next calls of the action are refused."""
        self.rules.append(Rule(action, times, answer=lambda service: refusal(service, code, message, status)))

    def spoil(self, action: str, change: Callable[[bytes], bytes], *, times: int = 100) -> None:
        """What moto answers to the next calls is changed on its way."""
        self.rules.append(Rule(action, times, change=change))

    def heal(self) -> None:
        """From here on all is well."""
        self.rules.clear()

    def client(self, service: str) -> Any:
        """A client of the test's own, which is closed with the server."""
        if service not in self._clients:
            self._clients[service] = _session().client(service, region_name=REGION, endpoint_url=self.url)
        return self._clients[service]

    def group(self, name: str) -> Any:
        """The group as moto keeps it."""
        return autoscaling_backends[ACCOUNT][REGION].autoscaling_groups[name]

    def lifecycle(self, group: str, instance: str, state: str) -> None:
        """Have an instance of a group be in a state that moto does not come to by itself."""
        (one,) = [one for one in self.group(group).instance_states if one.instance.id == instance]
        one.lifecycle_state = state

    def _rule(self, action: str) -> Rule | None:
        for rule in self.rules:
            if rule.action == action and rule.times > 0:
                rule.times -= 1
                return rule
        return None

    def serve(self, moto: Any, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """One request (WSGI)."""
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        said = parse_qs(body.decode(errors="replace"))
        action = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2] or said.get("Action", [""])[0]
        found = _SERVICE.search(environ.get("HTTP_AUTHORIZATION", ""))
        service = found.group(1) if found else ""
        self.calls.append(action)
        rule = self._rule(action)
        if rule is not None and rule.answer is not None:
            return rule.answer(service)(environ, start)
        if action == "CompleteLifecycleAction":
            return self._complete(said)(environ, start)
        if action == "DescribeScalingActivities":
            return self._activities(said)(environ, start)
        with self._one_at_a_time:  # what AWS does in one step, moto does not
            answer = self.ecs.answer(action, body, lambda: Response.from_app(moto, environ))
        if rule is not None and rule.change is not None:
            answer.set_data(rule.change(answer.get_data()))
        return answer(environ, start)

    def _complete(self, said: dict[str, list[str]]) -> Response:
        group, instance = said["AutoScalingGroupName"][0], said["InstanceId"][0]
        self.completed.append((said["LifecycleHookName"][0], instance))
        kept = self.group(group)
        kept.instance_states = [one for one in kept.instance_states if one.instance.id != instance]
        return _result("CompleteLifecycleAction", "")

    def _activities(self, said: dict[str, list[str]]) -> Response:
        listed = self.activities.get(said["AutoScalingGroupName"][0], [])
        items = "".join(
            "<member>" + "".join(f"<{name}>{escape(value)}</{name}>" for name, value in one.items()) + "</member>"
            for one in listed
        )
        return _result("DescribeScalingActivities", f"<Activities>{items}</Activities>")


def _result(action: str, inner: str) -> Response:
    namespace = "http://autoscaling.amazonaws.com/doc/2011-01-01/"
    text = f'<{action}Response xmlns="{namespace}"><{action}Result>{inner}</{action}Result></{action}Response>'
    return Response(text, content_type="text/xml")


def refusal(service: str, code: str, message: str, status: int = 400) -> Response:
    """An error as this service says it."""
    if service in ("ecs", "ssm", "secretsmanager"):
        return Response(json.dumps({"__type": code, "message": message}), status, content_type="application/x-amz-json-1.1")
    error = f"<Error><Code>{escape(code)}</Code><Message>{escape(message)}</Message></Error>"
    if service == "ec2":
        text = f"<Response><Errors>{error}</Errors><RequestID>r</RequestID></Response>"
    else:
        text = f"<ErrorResponse>{error}<RequestId>r</RequestId></ErrorResponse>"
    return Response(text, status, content_type="text/xml")


@cache
def _session() -> Any:
    return boto3.session.Session(aws_access_key_id="x", aws_secret_access_key="x")


@contextlib.contextmanager
def running() -> Iterator[Aws]:
    """The server, on a port of its own."""
    moto = DomainDispatcherApplication(create_backend_app)
    aws = Aws()
    server = make_server("127.0.0.1", 0, lambda environ, start: aws.serve(moto, environ, start), threaded=True)
    aws.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, name="aws", daemon=True)
    thread.start()
    try:
        yield aws
    finally:
        for client in aws._clients.values():
            client.close()
        server.shutdown()
        thread.join()
        server.server_close()
