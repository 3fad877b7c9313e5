"""What ECS does and moto does not: one token starts one task, tasks say when they were made, and unknown ones are refused."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from werkzeug.wrappers import Response

JSON = "application/x-amz-json-1.1"


@dataclass
class Ecs:
    """`answered`: what was said to each `clientToken` (Amazon ECS: ensuring idempotency); `asked`: the bodies of RunTask, all."""

    answered: dict[str, bytes] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    made: dict[str, float] = field(default_factory=dict)
    """When each task was made, by its ARN."""

    def answer(self, action: str, body: bytes, moto: Callable[[], Response]) -> Response:
        """What ECS would answer; any other action is moto's."""
        if action == "RunTask":
            return self._run(json.loads(body), moto)
        if action == "StopTask":
            task = json.loads(body)["task"].rpartition("/")[2]
            if not any(arn.endswith(f"/{task}") for arn in self.made):
                said = {"__type": "InvalidParameterException", "message": "The referenced task was not found."}
                return Response(json.dumps(said), 400, content_type=JSON)
        answer = moto()
        if action == "DescribeTasks" and answer.status_code == 200:
            said = json.loads(answer.get_data())
            for task in said["tasks"]:
                task["createdAt"] = self.made[task["taskArn"]]
            answer.set_data(json.dumps(said).encode())
        return answer

    def _run(self, asked: dict[str, Any], moto: Callable[[], Response]) -> Response:
        self.asked.append(asked)
        token = asked.get("clientToken", "")
        if token in self.answered:
            return Response(self.answered[token], content_type=JSON)
        answer = moto()
        if answer.status_code == 200:
            said = json.loads(answer.get_data())
            self.made |= {task["taskArn"]: time.time() for task in said["tasks"]}
            if token:
                self.answered[token] = answer.get_data()
        return answer
