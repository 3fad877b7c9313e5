"""`python -m scheduler.fsck` prints docs/fsck.md."""

from scheduler.fsck import page

print(page(), end="")  # noqa: T201  # this is the command that makes the page
