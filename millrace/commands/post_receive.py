#!/usr/bin/env python3
"""Tell Millrace of the branches and tags that were pushed: the hook `post-receive` of a bare repository. Needs Python 3.7.

    git -C REPOSITORY config millrace.url ADDRESS         the payloadUrl of the project's webhook
    REPOSITORY/millrace.secret                            its secret, in a file that only the git server's user may read
    REPOSITORY/hooks/post-receive --ping                  tries both

A push is never refused for what happens here; what does is told to who pushes.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

TRIES = 3
PATIENCE_S = 60.0
MAX_PATHS = 20_000
ACTORS = ("GL_USERNAME", "GL_USER", "REMOTE_USER", "LOGNAME", "USER")
"""Where those who serve git say who pushes: GitLab's shell, gitolite, git over http, ssh."""


def git(*arguments: str) -> str | None:
    """What git prints; None where it fails."""
    done = subprocess.run(["git", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def say(text: str) -> None:
    """Tell who pushes."""
    sys.stderr.write(f"millrace: {text}\n")


def event(before: str, after: str, ref: str) -> dict[str, object]:
    """What became of one branch or tag."""
    found: dict[str, object] = {"ref": ref, "before": before, "after": after, "at": str(time.time_ns())}
    found["actor"] = next((os.environ[name] for name in ACTORS if os.environ.get(name)), None)
    if not after.strip("0"):
        return found
    commit = git("rev-parse", "--verify", "--quiet", f"{after}^{{commit}}")
    if commit is None:
        return found
    found["after"] = commit.strip()
    found["message"] = git("log", "-1", "--format=%B", commit.strip())
    if before.strip("0"):
        listed = git("diff", "--name-only", "--no-renames", "-z", before, commit.strip(), "--")
        paths = None if listed is None else [path for path in listed.split("\0") if path]
        found["paths"] = paths if paths is not None and len(paths) <= MAX_PATHS else None
    return found


def tell(url: str, secret: str, payload: dict[str, object], until: float) -> str:
    """Send one event, again where the farm does not answer; what became of it, in words."""
    body, ident = json.dumps(payload).encode(), str(uuid.uuid4())
    key = base64.b64decode(secret[len("whsec_") :]) if secret.startswith("whsec_") else secret.encode()
    bundle = git("config", "--get-urlmatch", "http.sslCAInfo", url)
    context = ssl.create_default_context(cafile=bundle.strip() if bundle else None)
    why = "the time was over before it was tried"
    for attempt in range(TRIES):
        if time.monotonic() > until:
            break
        stamp = str(int(time.time()))
        signature = base64.b64encode(hmac.new(key, f"{ident}.{stamp}.".encode() + body, hashlib.sha256).digest()).decode()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "millrace-post-receive",
            "webhook-id": ident,
            "webhook-timestamp": stamp,
            "webhook-signature": f"v1,{signature}",
        }
        request = urllib.request.Request(url, data=body, headers=headers, method="POST")  # noqa: S310  # the repository's own word
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as answer:  # noqa: S310
                return outcome(answer.headers.get("Millrace-Outcome", ""), answer.read(1_000_000))
        except urllib.error.HTTPError as error:
            why = detail(error)
            if error.code < 500:
                break
        except (OSError, ValueError) as error:
            why = str(getattr(error, "reason", error))
        if attempt + 1 < TRIES:
            time.sleep(1 + attempt)
    return f"NOT TOLD: {why}"


def outcome(header: str, body: bytes) -> str:
    """An answer in words."""
    try:
        builds = [one["buildId"] for one in json.loads(body)["events"] if one.get("buildId")]
    except (ValueError, KeyError, TypeError):
        builds = []
    return ", ".join([header, *builds])


def detail(error: urllib.error.HTTPError) -> str:
    """What the farm says is wrong."""
    try:
        said = json.loads(error.read(100_000))
        return f"{said['detail']} ({error.code})"
    except (ValueError, KeyError, TypeError, OSError):
        return f"the farm answered {error.code}"


def main() -> int:
    """Read what git tells of the push, and tell it on."""
    home = (git("rev-parse", "--absolute-git-dir") or ".").strip()
    url = (git("config", "--get", "millrace.url") or "").strip()
    kept = Path(home, "millrace.secret")
    try:
        secret = kept.read_text(encoding="utf-8").strip()
        if kept.stat().st_mode & 0o077:
            say(f"others than its owner may use {kept}, and with it start builds: chmod 600 {kept}")
    except (OSError, ValueError) as error:
        say(f"nothing is told: {kept} cannot be read: {error}")
        return 1
    if not url.startswith(("http://", "https://")) or not secret:
        say(f"nothing is told: set millrace.url (git -C {home} config millrace.url ADDRESS), put the secret into millrace.secret")
        return 1
    until = time.monotonic() + PATIENCE_S
    if "--ping" in sys.argv[1:]:
        told = tell(url, secret, {"ping": True}, until)
        say(told)
        return int(told.startswith("NOT TOLD"))
    for line in sys.stdin:
        before, after, ref = line.rstrip("\n").split(" ", 2)
        say(f"{ref}: {tell(url, secret, event(before, after, ref), until)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
