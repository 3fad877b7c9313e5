"""A real browser for tests: Debian's Chromium, driven by Playwright. It speaks to this host alone."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

from tests.support.need import missing

_QUIET = (
    "--no-sandbox",  # tests run as root
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost",
)


@contextmanager
def a_browser() -> Iterator[Browser]:
    """One that has no profile. Skips or fails where there is none."""
    program = shutil.which("chromium")
    if program is None:
        missing("chromium", "apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(_QUIET))
        try:
            yield browser
        finally:
            browser.close()
