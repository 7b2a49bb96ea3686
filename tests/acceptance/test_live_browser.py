"""The live page in a headless Chromium: the real server, PostgreSQL, and a study that is running.

The server is ``hpsched dashboard`` with a log-in, the worker a real ``hpsched worker attach`` on
studies/digits.py. Nothing is faked: what changes on the page is what the worker reported.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
import report_studies
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from hpsched.storage import open_storage
from hpsched.study import create_study
from tests.browsing import FLAGS, browser_path
from tests.faults.servers import Postgres, private_postgres
from tests.fleet import environment

pytestmark = [pytest.mark.browser, pytest.mark.postgres]

TOKEN = "a-long-text-that-only-the-tests-know-2718281828"
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60_000.0  # milliseconds of patience: the machine may be busy
THEMES = ("light", "dark")
HOVER = """() => {
  const plot = document.querySelector("#figure-history .plot");
  const curve = plot.data.findIndex((trace) => trace.name === "full cycle");
  Plotly.Fx.hover(plot, [{ curveNumber: curve, pointNumber: 0 }]);
}"""

WIDER = """[...document.querySelectorAll("figure")]
  .filter(figure => figure.lastChild.scrollWidth > figure.lastChild.clientWidth)
  .map(figure => figure.id)"""


@dataclass(frozen=True)
class Site:
    """The dashboard that runs, and what is in it."""

    url: str
    postgres: Postgres
    storage: str
    ids: dict[str, int]

    def study(self, name: str) -> str:
        return f"{self.url}hpsched/studies/{self.ids[name]}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with private_postgres() as postgres, postgres.database() as url:
        digits = f"{ROOT / 'studies' / 'digits.py'}:objective"
        create_study("running", objective=digits, storage=url, cycles=2_000)
        storage = open_storage(url)
        made = report_studies.mixed()
        mixed = optuna.create_study(study_name="mixed / é", storage=storage)
        mixed.add_trials([run.trial for run in made.runs if run.trial.state.is_finished()])
        optuna.create_study(study_name=report_studies.HOSTILE, storage=storage)
        ids = {study.study_name: study._study_id for study in storage.get_all_studies()}
        worker = ["worker", "attach", "running", "--devices", "cpu", "--storage", url]
        server = ["dashboard", "--port", "0", "--storage", url]
        running = [
            _hpsched(folder, "worker", *worker),
            _hpsched(folder, "server", *server, HPSCHED_TOKEN=TOKEN),
        ]
        try:
            yield Site(_address(folder / "server.txt"), postgres, url, ids)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _hpsched(folder: Path, name: str, *words: str, **env: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.txt").open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "hpsched", *words],
            cwd=folder,
            env=environment(**env),
            stdout=said,
            stderr=said,
        )


def _address(said: Path) -> str:
    limit = time.monotonic() + 60
    while not (found := re.search(r"http://[\d.]+:\d+/", said.read_text())):
        assert time.monotonic() < limit, said.read_text()
        time.sleep(0.1)
    return found[0]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def session(site: Site, chromium: Browser) -> Any:
    """The cookies of somebody who has logged in."""
    context = chromium.new_context()
    page = context.new_page()
    page.goto(site.url)
    log_in(page, TOKEN)
    expect(page.get_by_role("heading", name="Studies")).to_be_visible()
    state = context.storage_state()
    context.close()
    return state


@dataclass
class Reader:
    """A page, and everything that went wrong on it."""

    page: Page
    wrong: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


Open = Callable[..., Reader]


@pytest.fixture
def reader(site: Site, chromium: Browser, session: Any) -> Iterator[Open]:
    """Opens a page as somebody who is logged in; fails the test if the page complains."""
    contexts: list[BrowserContext] = []
    opened: list[Reader] = []

    def open_page(url: str, *, width: int = 1200, theme: str = "light") -> Reader:
        context = chromium.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=theme,
            storage_state=session,
            permissions=["clipboard-read", "clipboard-write"],
        )
        contexts.append(context)
        made = Reader(context.new_page())
        made.page.set_default_timeout(SECONDS)
        made.page.on("console", lambda m: made.wrong.append(m.text) if m.type == "error" else None)
        made.page.on("pageerror", lambda error: made.wrong.append(str(error)))
        made.page.on("request", lambda request: made.asked.append(request.url))
        opened.append(made)
        made.page.goto(url)
        return made

    yield open_page
    for context in contexts:
        context.close()
    for one in opened:
        assert one.wrong == []
        assert one.asked
        assert [url for url in one.asked if not url.startswith((site.url, "data:", "blob:"))] == []


def log_in(page: Page, secret: str) -> None:
    page.get_by_label("Token").fill(secret)
    page.get_by_role("button", name="Log in").click()


def live(page: Page) -> None:
    expect(page.locator("#connection-text")).to_have_text("Live", timeout=SECONDS)


def figures_drawn(page: Page, least: int) -> None:
    """Wait until there are so many figures, and each is drawn."""
    expect(page.locator("figure").nth(least - 1)).to_be_attached(timeout=SECONDS)
    live(page)
    for figure in page.locator("figure").all():
        expect(figure.locator(".main-svg").first).to_be_attached(timeout=SECONDS)


# -- log-in ----------------------------------------------------------------------------------------


def test_nothing_shows_before_one_has_logged_in(site: Site, chromium: Browser) -> None:
    context = chromium.new_context()
    page = context.new_page()
    page.goto(site.study("running"))
    expect(page).to_have_url(re.compile(r"/hpsched/login\?next="))
    expect(page.get_by_text("running")).to_have_count(0)
    log_in(page, "a wrong one")
    expect(page.get_by_role("alert")).to_contain_text("wrong")
    expect(page.get_by_label("Token")).to_be_focused()
    log_in(page, TOKEN)
    expect(page).to_have_url(site.study("running"))  # where one had wanted to go
    live(page)
    other = context.new_page()
    other.goto(site.url)
    other.get_by_role("button", name="Log out").click()
    expect(other.get_by_role("heading", name="Log in")).to_be_visible()
    expect(page.locator("#connection-text")).to_contain_text("Logged out", timeout=SECONDS)
    context.close()


# -- live ------------------------------------------------------------------------------------------


def test_the_list_names_all_studies_and_leads_to_them(site: Site, reader: Open) -> None:
    page = reader(site.url).page
    expect(page.locator(".study")).to_have_count(3, timeout=SECONDS)
    expect(page.get_by_role("link", name=report_studies.HOSTILE)).to_be_visible()
    expect(page.locator(".study", has_text="running").locator(".pill")).to_have_text(
        "searching", timeout=SECONDS
    )
    page.get_by_role("link", name="mixed / é").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("mixed / é")
    figures_drawn(page, 6)


def test_numbers_change_without_reloading_while_a_worker_reports(site: Site, reader: Open) -> None:
    page = reader(site.study("running")).page
    live(page)
    expect(page.locator("[data-section=workers] .pill").first).to_have_text(
        "running", timeout=SECONDS
    )
    page.evaluate("window.isTheSamePage = true")
    for place in (".facts", "[data-section=workers] tbody"):
        said = page.locator(place).inner_text()
        expect(page.locator(place)).not_to_have_text(said, timeout=SECONDS, use_inner_text=True)
    expect(page.locator("[data-section=answer]")).to_contain_text("full cycle", timeout=SECONDS)
    expect(page.locator("[data-section=recipe]")).to_contain_text("OneCycleLR", timeout=2 * SECONDS)
    assert page.evaluate("window.isTheSamePage") is True


def test_a_cut_line_is_said_and_mended(site: Site, reader: Open) -> None:
    made = reader(site.study("running"))
    live(made.page)
    made.page.context.set_offline(True)
    text = made.page.locator("#connection-text")
    expect(text).to_have_text(re.compile("Lost connection|Offline"), timeout=SECONDS)
    made.page.context.set_offline(False)
    live(made.page)
    made.wrong[:] = [text for text in made.wrong if "ERR_INTERNET_DISCONNECTED" not in text]


def test_between_the_live_page_and_the_optuna_dashboard(site: Site, reader: Open) -> None:
    made = reader(site.study("mixed / é"))
    live(made.page)
    made.page.get_by_role("link", name="Optuna Dashboard").click()
    expect(made.page).to_have_url(re.compile(rf"/dashboard/studies/{site.ids['mixed / é']}$"))
    made.page.get_by_role("link", name="hpsched live page").click()
    expect(made.page).to_have_url(site.study("mixed / é"))
    live(made.page)
    made.wrong.clear()  # the Optuna Dashboard's own


# -- figures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", ["running", "mixed / é"])
def test_every_figure_is_drawn(site: Site, reader: Open, name: str, theme: str, width: int) -> None:
    page = reader(site.study(name), width=width, theme=theme).page
    figures_drawn(page, 6)
    ids = {figure.get_attribute("id") for figure in page.locator("figure").all()}
    assert {"figure-range-test-0", "figure-history", "figure-rungs", "figure-slice"} <= ids
    for plot in page.locator(".plot").all():
        assert len(plot.get_attribute("aria-label") or "") > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(WIDER) == (["figure-slice"] if width < 640 else [])  # as in the report
    page.evaluate(HOVER)
    expect(page.locator("#figure-history .hoverlayer .hovertext").first).to_be_attached()


def test_zoom_stays_when_the_theme_or_the_data_change(site: Site, reader: Open) -> None:
    page = reader(site.study("mixed / é")).page
    figures_drawn(page, 6)
    zoomed = "document.querySelector('#figure-history .plot').layout.xaxis.range"
    page.locator("#figure-history").scroll_into_view_if_needed()
    box = page.locator("#figure-history .nsewdrag").first.bounding_box()
    assert box
    before = page.evaluate(zoomed)
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.8 * box["height"], steps=8)
    page.mouse.up()
    page.wait_for_timeout(300)
    chosen = page.evaluate(zoomed)
    assert chosen != before
    page.get_by_role("button", name="Dark theme").click()
    page.wait_for_timeout(1500)
    assert page.evaluate(zoomed) == pytest.approx(chosen)


# -- keyboard, telephones, themes, accessibility ---------------------------------------------------


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.textContent.trim()"))


def test_everything_by_keyboard(site: Site, reader: Open) -> None:
    page = reader(site.study("mixed / é")).page
    figures_drawn(page, 6)
    order = []
    for _ in range(5):
        page.keyboard.press("Tab")
        order.append(focused(page))
    assert order == ["Skip to content", "Studies", "Optuna Dashboard", "Log out", "Dark"]
    page.keyboard.press("Space")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert focused(page) == "Light"  # what it does next
    page.reload()
    live(page)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"  # it is remembered
    expect(page.get_by_role("button", name="Light theme")).to_be_visible()
    copy = page.get_by_role("button", name="Copy command")
    for _ in range(30):
        page.keyboard.press("Tab")
        if copy.evaluate("element => element === document.activeElement"):
            break
    page.keyboard.press("Enter")
    expect(copy).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "hpsched study report 'mixed / é'"
    page.get_by_role("button", name="Copy PyTorch code").press("Enter")
    assert "OneCycleLR(" in page.evaluate("navigator.clipboard.readText()")


def test_the_skip_link_leads_past_the_bar(site: Site, reader: Open) -> None:
    page = reader(site.url).page
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"


def test_the_focus_stays_when_its_section_is_renewed(site: Site, reader: Open) -> None:
    page = reader(site.study("running")).page
    live(page)
    page.locator("[data-section=workers] .scroll").focus()
    said = page.locator("[data-section=workers] tbody").inner_text()
    expect(page.locator("[data-section=workers] tbody")).not_to_have_text(
        said, timeout=SECONDS, use_inner_text=True
    )
    assert page.evaluate("document.activeElement.className") == "scroll"


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [1200, 390])
def test_axe_finds_nothing_serious(
    site: Site, reader: Open, chromium: Browser, theme: str, width: int
) -> None:
    stranger = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    page = stranger.new_page()
    page.goto(site.url)
    assert serious(page) == []
    stranger.close()
    page = reader(site.url, width=width, theme=theme).page
    live(page)
    assert serious(page) == []
    for name in ("running", "mixed / é", report_studies.HOSTILE):
        page = reader(site.study(name), width=width, theme=theme).page
        live(page)
        page.wait_for_timeout(800)
        assert serious(page) == [], name


def serious(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['nodes'][0]['html'][:200]} ({one['nodes'][0]['failureSummary'][:200]})"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def test_axe_would_find_something(site: Site, chromium: Browser) -> None:
    context = chromium.new_context()
    page = context.new_page()
    page.goto(site.url)
    page.evaluate("document.querySelector('label[for=secret]').remove()")
    assert any(text.startswith("label:") for text in serious(page))
    context.close()


# -- what goes wrong -------------------------------------------------------------------------------


def test_a_database_that_is_away_is_said_and_its_return_is_noticed(
    site: Site, reader: Open
) -> None:
    page = reader(site.study("running")).page
    live(page)
    expect(page.locator("[data-section=answer]")).to_contain_text("Best value", timeout=SECONDS)
    site.postgres.stop()
    try:
        expect(page.get_by_role("alert")).to_contain_text("database is away", timeout=SECONDS)
        expect(page.locator("#connection-text")).to_have_text("Not up to date")
        expect(page.locator("[data-section=answer]")).to_contain_text("Best value")
    finally:
        site.postgres.start()
    live(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_deleted_study_says_so(site: Site, reader: Open) -> None:
    made = reader(site.study(report_studies.HOSTILE))
    live(made.page)
    optuna.delete_study(study_name=report_studies.HOSTILE, storage=open_storage(site.storage))
    expect(made.page.get_by_role("alert")).to_contain_text("has been deleted", timeout=SECONDS)
    made.wrong[:] = [text for text in made.wrong if "404" not in text]
