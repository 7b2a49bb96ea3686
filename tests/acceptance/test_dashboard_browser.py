"""The Optuna Dashboard behind hpsched's log-in, in a headless Chromium, also under a prefix."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import pytest
import report_studies
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from hpsched.storage import open_storage
from hpsched.web.access import Role, Users
from tests.browsing import FLAGS, browser_path
from tests.fleet import environment

pytestmark = pytest.mark.browser

PASSWORD, WRONG = "correct horse battery", "wrong horse battery"
PATIENCE = 60_000  # milliseconds: the machine may be busy
PARTS = ("", "/analytics", "/trials", "/smartSelection", "/note")


@dataclass
class Site:
    """The dashboard that runs, and what went wrong on its pages."""

    url: str
    browser: Browser
    wrong: list[str] = field(default_factory=list)

    def page(self, width: int = 1200, scheme: str = "light") -> Page:
        made = self.browser.new_page(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if scheme == "dark" else "light",
        )
        made.set_default_timeout(PATIENCE)
        made.on("console", lambda m: self._note(m.text) if m.type == "error" else None)
        made.on("pageerror", lambda error: self._note(str(error)))
        made.on("request", lambda r: self._note(r.url) if self._is_elsewhere(r.url) else None)
        return made

    def log_in(self, page: Page, path: str) -> None:
        page.goto(self.url + path)
        page.get_by_label("User name").fill("anna")
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(self.url + path)

    def _is_elsewhere(self, url: str) -> bool:
        return not url.startswith((self.url, "data:", "blob:"))

    def _note(self, text: str) -> None:
        self.wrong.append(text)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study that plain ``study.optimize`` has run."""
    url = f"sqlite:///{tmp_path_factory.mktemp('data')}/studies.db"
    made = report_studies.mixed()
    study = optuna.create_study(study_name=made.name, storage=open_storage(url, create=True))
    study.add_trials([run.trial for run in made.runs if run.trial.state.is_finished()])
    return url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as started:
        yield started.chromium.launch(executable_path=browser_path(), args=list(FLAGS))


@contextmanager
def dashboard(folder: Path, storage: str, *arguments: str) -> Iterator[str]:
    """Its address, without the slash at the end."""
    users = Users(folder / "users")
    users.add("anna", PASSWORD, Role.EDITOR)
    command = [sys.executable, "-m", "hpsched", "dashboard", "--storage", storage, "--port", "0",
               "--users", str(users.path), *arguments]  # fmt: skip
    log = folder / "said.txt"
    with log.open("w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, env=environment())
        try:
            while not (found := re.search(r"Dashboard on (\S+)/ ", log.read_text())):
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            yield found[1]
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def plain(
    storage: str, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    with dashboard(tmp_path_factory.mktemp("plain"), storage) as url:
        yield Site(url, browser)


@pytest.fixture(scope="module", params=["", "/search"], ids=["plain", "prefix"])
def site(
    request: pytest.FixtureRequest, storage: str, browser: Browser,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:  # fmt: skip
    if not request.param:
        yield request.getfixturevalue("plain")
        return
    with dashboard(tmp_path_factory.mktemp("prefix"), storage, "--prefix", request.param) as url:
        assert url.endswith(request.param)
        yield Site(url, browser)


def test_the_studys_page_shows_a_range_test_for_each_context(site: Site) -> None:
    page = site.page()
    site.log_in(page, "/dashboard/studies/1")
    plots = page.locator('[id^="user-defined-plot:hpsched-range-test-"]')
    for attempt in range(30):  # they are stored in the background when the server starts
        if plots.count() == 2:
            break
        page.wait_for_timeout(2_000)
        page.reload()
        page.get_by_role("heading", name="Hyperparameter Importance").wait_for()
        assert attempt < 29, "no figures within a minute"
    for place in range(2):
        plot = plots.nth(place)
        expect(plot.locator("svg.main-svg").first).to_have_attribute("height", "450")
        expect(plot).to_contain_text("Search max_lr from", timeout=PATIENCE)
        expect(plot).to_contain_text("learning rate (log scale)")
    assert "norm='batch'" in "".join(plots.all_text_contents())
    page.get_by_role("link", name="hpsched live page").click()
    page.wait_for_url(f"{site.url}/hpsched/studies/1")
    page.get_by_role("link", name="Optuna Dashboard").click()
    page.wait_for_url(f"{site.url}/dashboard/studies/1")
    page.close()
    assert site.wrong == []


def test_all_its_pages_draw_without_an_error_and_ask_no_other_host(site: Site) -> None:
    for width, scheme in ((1200, "light"), (390, "dark")):
        page = site.page(width, scheme)
        site.log_in(page, "/dashboard/")
        page.get_by_text("mixed").first.click()
        page.wait_for_url(f"{site.url}/dashboard/studies/1**")
        for part in PARTS:
            page.goto(f"{site.url}/dashboard/studies/1{part}")
            page.wait_for_load_state("networkidle")
            expect(page.get_by_role("link", name="hpsched live page")).to_be_visible()
            if part in ("", "/analytics"):
                expect(page.locator("svg.main-svg").first).to_be_visible(timeout=PATIENCE)
        page.close()
    assert site.wrong == []


def test_an_editor_writes_a_note(site: Site) -> None:
    page = site.page()
    site.log_in(page, "/dashboard/studies/1/note")
    page.wait_for_load_state("networkidle")
    said = page.evaluate(
        """async (root) => {
            const study = await (await fetch(`${root}/api/studies/1?after=0`)).json();
            const version = study.note.version + 1, body = "written in a browser";
            const answer = await fetch(`${root}/api/studies/1/note`, {method: "PUT", body:
                JSON.stringify({version, body}), headers: {"Content-Type": "application/json"}});
            return answer.status;
        }""",
        site.url,
    )
    assert said == 204
    page.reload()
    expect(page.get_by_text("written in a browser").first).to_be_visible(timeout=PATIENCE)
    page.close()
    assert site.wrong == []


# -- the log-in page -------------------------------------------------------------------------------


def test_logging_in_with_the_keyboard_and_out_again(plain: Site) -> None:
    page = plain.page()
    page.goto(f"{plain.url}/hpsched/studies/1")
    expect(page.get_by_label("User name")).to_be_focused()
    page.keyboard.type("anna")
    page.keyboard.press("Tab")
    page.keyboard.type(WRONG)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("User name or password is wrong.")
    assert plain.wrong == ["Failed to load resource: the server responded with a status of 401 "
                           "(UNAUTHORIZED)"]  # fmt: skip
    plain.wrong.clear()
    expect(page.get_by_label("Password")).to_be_focused()
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_url(f"{plain.url}/hpsched/studies/1")
    expect(page.get_by_text("anna · editor")).to_be_visible()
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url(f"{plain.url}/hpsched/login")
    page.goto(f"{plain.url}/dashboard/")
    expect(page.get_by_role("heading", name="Log in")).to_be_visible()
    page.close()
    assert plain.wrong == []


def test_logging_in_without_javascript(plain: Site) -> None:
    context = plain.browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    plain.log_in(page, "/hpsched/")
    expect(page.get_by_text("anna · editor")).to_be_visible()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_log_in_page_is_accessible(plain: Site, width: int, scheme: str) -> None:
    page = plain.page(width, scheme)
    page.goto(f"{plain.url}/hpsched/login")
    found = Axe().run(page).response["violations"]
    assert [(each["id"], each["impact"]) for each in found] == []
    widest = page.evaluate("document.documentElement.scrollWidth")
    assert widest <= width
    page.close()
    assert plain.wrong == []
