"""The user data of EC2 instances, booted for real: systemd, Docker and iptables are real; AWS's own addresses are stand-ins."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.farm import need_engine
from tests.support.instance import REGION, REGISTRY, Instance, running

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(900)]
ROLE_KEYS = {
    "Code": "Success",
    "AccessKeyId": "ASIATEST",
    "SecretAccessKey": "a/secret+key",
    "Token": "a/long+token==",
    "Expiration": "2099-01-01T00:00:00Z",
}
METADATA = {
    "instance-id": "i-0123456789abcdef0",
    "iam/security-credentials/": "millrace-default-WorkerRole-X",
    "iam/security-credentials/millrace-default-WorkerRole-X": json.dumps(ROLE_KEYS),
    "tags/instance/millrace:generation": "7",
}
TOKEN, BROKER = "wrk-very-secret", "rediss://:pass-word@redis.example:6379/0?ssl_cert_reqs=required"


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    need_engine()
    with running(METADATA) as one:
        yield one


def a_secret(instance: Instance, name: str, value: Any) -> str:
    arn: str = instance.client("secretsmanager").create_secret(Name=name, SecretString=json.dumps(value))["ARN"]
    return arn


def head(secret: str, image: str = f"{REGISTRY}/millrace-worker:1", reach: str = "internet") -> str:
    """What the launch template puts before the script."""
    return f"""#!/bin/bash
export AWS_REGION='{REGION}' AWS_URL_SUFFIX='amazonaws.com'
export WORKER_SECRET='{secret}' WORKER_IMAGE='{image}' LOG_GROUP=''
export BUILDS_REACH='{reach}'
export MILLRACE_FLEET='default' MILLRACE_API_URL='https://millrace.example.org'
export MILLRACE_SLOTS='2' MILLRACE_DRAIN_S='60'
"""


@pytest.fixture(scope="module")
def booted(instance: Instance) -> Instance:
    secret = a_secret(instance, "worker", {"MILLRACE_WORKER_TOKEN": TOKEN, "MILLRACE_BROKER_URL": BROKER})
    for _ in range(2):  # cloud-init runs it once; whoever mends an instance may run it again
        done = instance.boot(head(secret), AWS_ENDPOINT_URL_SECRETS_MANAGER=instance.aws)
        assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
        for hidden in (TOKEN, "pass-word", ROLE_KEYS["SecretAccessKey"]):
            assert hidden.encode() not in done.stdout + done.stderr
    return instance


def worker(instance: Instance) -> dict[str, Any]:
    """The worker's container, as the instance's engine shows it, once it runs."""
    until = time.monotonic() + 30
    while instance.run("docker", "inspect", "millrace-worker").returncode != 0:
        assert time.monotonic() < until, instance.run("journalctl", "-u", "millrace-worker", "-n", "30").stdout
        time.sleep(0.2)
    shown: dict[str, Any] = json.loads(instance.says("docker", "inspect", "millrace-worker"))[0]
    return shown


def state(instance: Instance) -> str:
    """How the worker's service is."""
    return instance.run("systemctl", "is-active", "millrace-worker").stdout.decode().strip()


def becomes(instance: Instance, wanted: str, within_s: float = 30) -> None:
    """Wait until the worker's service is so."""
    until = time.monotonic() + within_s
    while state(instance) != wanted:
        assert time.monotonic() < until, instance.run("journalctl", "-u", "millrace-worker", "-n", "30").stdout
        time.sleep(0.2)


def test_the_worker_runs_with_the_settings_of_template_metadata_and_secret(booted: Instance) -> None:
    becomes(booted, "active")
    shown = worker(booted)
    settings = dict(line.split("=", 1) for line in shown["Config"]["Env"])
    assert (
        settings.items()
        >= {
            "MILLRACE_WORKER_ID": "i-0123456789abcdef0",
            "MILLRACE_FLEET": "default",
            "MILLRACE_GENERATION": "7",
            "MILLRACE_NOTICES": "ec2",
            "MILLRACE_API_URL": "https://millrace.example.org",
            "MILLRACE_BROKER_URL": BROKER,
            "MILLRACE_WORKER_TOKEN": TOKEN,
            "MILLRACE_SLOTS": "2",
            "MILLRACE_DRAIN_S": "60",
            "MILLRACE_WORK_DIR": "/var/lib/millrace/work",
        }.items()
    )
    assert shown["HostConfig"]["NetworkMode"] == "host"
    assert {one["Destination"] for one in shown["Mounts"]} == {"/var/run/docker.sock", "/var/lib/millrace"}


def test_what_the_worker_knows_only_root_reads(booted: Instance) -> None:
    assert booted.says("stat", "-c", "%a %U", "/etc/millrace/worker.env", "/etc/millrace") == "600 root\n700 root"
    assert TOKEN not in booted.says(
        "sh", "-c", "cat /etc/systemd/system/millrace-worker.service /proc/*/cmdline 2>/dev/null | tr '\\0' ' '"
    )


@pytest.fixture
def build(booted: Instance) -> Iterator[str]:
    """A container on the instance, as one of a build is; the id of its first process there."""
    name = booted.says("docker", "run", "--detach", f"{REGISTRY}/millrace-worker:1", "worker")
    yield booted.says("docker", "inspect", "--format", "{{.State.Pid}}", name)
    booted.says("docker", "rm", "--force", name)


def reaches(instance: Instance, pid: str, address: str) -> bool:
    """Whether a process gets an answer from there, be it a refusal, by the network of its container."""
    done = instance.run("nsenter", "--target", pid, "--net", "curl", "-s", "-m", "5", "-o", "/dev/null", address)
    assert done.returncode in (0, 7), done  # 7: nobody took the call
    return done.returncode == 0


def test_builds_reach_neither_metadata_nor_private_addresses(booted: Instance, build: str) -> None:
    metadata, private = "http://169.254.169.254/latest/meta-data/", f"{booted.aws}/moto-api/"
    assert booted.run("curl", "-s", "-m", "5", "-o", "/dev/null", metadata).returncode == 0, "the instance itself does"
    assert not reaches(booted, build, metadata)
    assert not reaches(booted, build, private)
    booted.says("iptables", "-D", "DOCKER-USER", "-j", "MILLRACE")
    assert reaches(booted, build, metadata), "it is the fence that keeps it"
    assert reaches(booted, build, private)
    booted.says("/usr/local/sbin/millrace-fence", "network")
    assert not reaches(booted, build, metadata)
    assert reaches(booted, build, private)
    booted.says("/usr/local/sbin/millrace-fence", "internet")
    booted.says("/usr/local/sbin/millrace-fence", "internet")
    assert booted.says("iptables", "-S", "DOCKER-USER").count("MILLRACE") == 1


def test_a_worker_that_dies_is_started_again_and_one_that_left_is_not(booted: Instance) -> None:
    becomes(booted, "active")
    before = worker(booted)["Id"]
    booted.says("docker", "kill", "--signal", "KILL", "millrace-worker")
    until = time.monotonic() + 60
    while worker(booted)["Id"] == before:
        assert time.monotonic() < until
        time.sleep(0.3)
    until = time.monotonic() + 30
    while "told to be a worker" not in booted.says("docker", "logs", "millrace-worker"):  # from then on it hears signals
        assert time.monotonic() < until
        time.sleep(0.2)
    booted.says("docker", "kill", "--signal", "TERM", "millrace-worker")
    becomes(booted, "inactive")
    time.sleep(7)  # longer than RestartSec
    assert state(booted) == "inactive"
    booted.says("systemctl", "start", "millrace-worker")
    becomes(booted, "active")


def test_a_secret_without_a_token_starts_no_worker(booted: Instance) -> None:
    booted.says("systemctl", "stop", "millrace-worker")
    becomes(booted, "inactive")
    secret = a_secret(booted, "empty", {"MILLRACE_BROKER_URL": BROKER})
    done = booted.boot(head(secret), AWS_ENDPOINT_URL_SECRETS_MANAGER=booted.aws)
    assert done.returncode != 0
    assert b"the secret has no MILLRACE_WORKER_TOKEN" in done.stdout + done.stderr
    assert state(booted) == "inactive"
    booted.says("systemctl", "start", "millrace-worker")
    becomes(booted, "active")
    assert f"MILLRACE_WORKER_TOKEN={TOKEN}" in worker(booted)["Config"]["Env"], "what was there stays in force"
