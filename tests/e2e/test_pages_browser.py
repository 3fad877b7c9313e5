"""The page of approvals in a real browser: signing in, approving one commit of a stranger's, hostile words that do nothing."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from millrace.settings import Settings
from millrace.webhook import WebhookSettings
from scheduler import hooks, queries
from scheduler.db import Database
from scheduler.secrets import keys_of
from tests.support.apiserver import ApiServer, serving
from tests.support.browser import a_browser
from tests.support.records import a_project
from tests.support.webhooks import OTHER_SHA, SHA, SOURCES, github_pull_request, sent

HOSTILE = """<img src=x onerror="document.title='taken'"><script>document.title='taken'</script>"""
GROUPS = [[{"type": "EVENT", "pattern": "PULL_REQUEST_CREATED, PULL_REQUEST_UPDATED"}]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with a_browser() as found:
        yield found


@pytest.fixture
def api(sqlite_database: Database, settings: Settings) -> Iterator[ApiServer]:
    """The API as its own process, with a project whose webhook was called from a fork."""
    a_project(sqlite_database, "demo", source=SOURCES["github"])
    chosen = WebhookSettings.model_validate({"filterGroups": GROUPS})
    record, secret = hooks.create(sqlite_database, keys_of(settings), "demo", chosen)
    with serving(sqlite_database, settings) as server:
        for number, title in ((2, "Mend the parser of dates"), (3, HOSTILE)):
            user = {"login": "stranger" if number == 2 else HOSTILE}
            head = {"ref": f"topic-{number}", "sha": SHA if number == 2 else OTHER_SHA, "repo": {"id": 99}}
            page = f"https://github.com/Codertocat/Hello-World/pull/{number}"
            payload = github_pull_request(number=number, title=title, user=user, head=head, html_url=page)
            answer = httpx.post(
                f"{server.url}/webhooks/github/{record.id}",
                content=(delivery := sent("github", secret, payload, event="pull_request"))["data"],
                headers=delivery["headers"],
            )
            assert answer.status_code == 202, answer.text
        yield server


def signed_in(page: Page, api: ApiServer, path: str = "/approvals/demo") -> None:
    page.goto(api.url + path)
    page.get_by_label("API token").fill(api.token)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(f"**{path}")


def builds(api: ApiServer) -> list[tuple[str | None, str]]:
    found = queries.find_builds(api.db, project="demo", states=[], limit=10, cursor=None)[0]
    return [(one.settings.source_commit, one.initiator) for one in found]


def test_somebody_signs_in_reads_what_waits_and_approves_one_commit(browser: Browser, api: ApiServer, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text))
    page.goto(f"{api.url}/approvals/demo")
    page.get_by_label("API token").fill("mr_pat_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("not known")
    page.screenshot(path=str(tmp_path / "signin.png"))
    troubles.clear()  # the browser notes the 401
    signed_in(page, api)
    cards = page.locator("article")
    expect(cards).to_have_count(2)
    page.screenshot(path=str(tmp_path / "approvals.png"), full_page=True)
    hostile = cards.filter(has_text="#3")
    expect(hostile.locator("h2 bdi")).to_have_text(HOSTILE)
    assert page.locator("article img, article script").count() == 0 and "taken" not in page.title()
    card = cards.filter(has_text="#2")
    expect(card.get_by_text(SHA, exact=True)).to_be_visible()
    link = card.get_by_role("link", name="Look at the changes")
    assert link.get_attribute("href") == f"https://github.com/Codertocat/Hello-World/pull/2/files/{SHA}"
    card.get_by_role("button", name=f"Approve {SHA[:12]}").click()
    expect(page.locator("article")).to_have_count(1)
    expect(page.get_by_role("row", name="approved by admin (page)")).to_be_visible()
    assert builds(api) == [(SHA, "admin (page)")]
    page.screenshot(path=str(tmp_path / "approved.png"), full_page=True)
    assert troubles == []  # nothing was kept from loading by the page's own policy
    assert page.evaluate("document.cookie") == ""
    (cookie,) = context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API token")).to_be_visible()
    page.goto(f"{api.url}/approvals")
    expect(page.get_by_label("API token")).to_be_visible()
    context.close()


def test_another_site_can_link_to_the_page_and_do_nothing_with_it(browser: Browser, api: ApiServer) -> None:
    with another_site(api) as elsewhere:
        context = browser.new_context()
        page = context.new_page()
        signed_in(page, api)
        page.goto(elsewhere)
        page.get_by_role("link", name="the farm").click()
        expect(page.locator("article")).to_have_count(2)  # though the link brought no cookie along
        page.goto(elsewhere)
        page.get_by_role("button", name="win").click()
        page.wait_for_load_state()
        assert builds(api) == []
        page.goto(elsewhere)
        assert page.frame_locator("iframe").locator("article").count() == 0
        context.close()


class another_site:
    """A site on another host name, whose page links to the farm, frames it, and has a form that would approve."""

    def __init__(self, api: ApiServer) -> None:
        body = f"""<!doctype html><a href="{api.url}/approvals/demo">the farm</a>
<iframe src="{api.url}/approvals/demo"></iframe>
<form method="post" action="{api.url}/approvals/demo"><input name="commit" value="{SHA}"><button>win</button></form>""".encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=lambda: self._server.serve_forever(0.05))

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://localhost:{self._server.server_port}/"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
