"""The report in a headless Chromium without a network: every figure drawn, nothing in the console.

Chromium's own complaints (no D-Bus, no GPU) go to stderr as well; only lines of its console count.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import plotly.graph_objects as go
import pytest
import report_studies
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from hpsched.figure_files import write_figure
from hpsched.figure_style import BLUE, DARK, add_marks, mark, styled
from hpsched.lr_curve import RangeTest
from hpsched.report import write_report
from hpsched.summary import Summary
from tests.browsing import FLAGS, browser_path

DUMP = (
    "--headless",
    "--proxy-server=127.0.0.1:9",  # nobody listens: whatever asks a host fails, and says so
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=20000",
)


def dump(path: Path, profile: Path, *more: str) -> tuple[str, list[str]]:
    """The page after its scripts ran, and the lines of its console."""
    command = [str(browser_path()), *FLAGS, *DUMP, f"--user-data-dir={profile}", *more]
    command += ["--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@dataclass
class Opened:
    """A page in the browser, and what went wrong there: errors, console lines, requests."""

    page: Page
    wrong: list[str]

    def axe(self) -> list[str]:
        """Rules of axe-core that the page breaks, with the first place of each."""
        found = Axe().run(self.page).response["violations"]
        return [f"{v['id']} ({v['impact']}): {v['nodes'][0]['html'][:120]}" for v in found]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as started:
        found = started.chromium.launch(executable_path=browser_path(), args=list(FLAGS))
        yield found
        found.close()


Open = Callable[..., Opened]


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens a file without a network, and waits until its figures, if any, are drawn."""
    contexts: list[BrowserContext] = []

    def open_file(
        path: Path, width: int = 1200, scheme: Literal["light", "dark"] = "light", script: str = ""
    ) -> Opened:
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        wrong: list[str] = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda asked: None if asked.url.startswith(("file:", "data:", "blob:"))
            else wrong.append(f"asks {asked.url}"),
        )  # fmt: skip
        if script:
            page.add_init_script(script)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-figures], body:not(:has(#plotly-gz))", timeout=120_000)
        return Opened(page, wrong)

    yield open_file
    for context in contexts:
        context.close()


def drawn(page: Page) -> tuple[int, int]:
    """How many figures the page has, and how many of them are drawn."""
    return (
        page.locator(".plotly-graph-div").count(),
        page.locator(".plotly-graph-div:has(.main-svg)").count(),
    )


def until(page: Page, condition: str) -> None:
    """Wait for it; playwright's own waiting evaluates strings, which the pages' policy forbids."""
    limit = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < limit, condition
        page.wait_for_timeout(50)


def paper(page: Page) -> set[str]:
    """The colours behind the figures."""
    return set(page.evaluate(
        "[...document.querySelectorAll('.plotly-graph-div')].map(p => p._fullLayout.paper_bgcolor)"
    ))  # fmt: skip


COMPARED = [report_studies.confirmed, report_studies.mixed, report_studies.empty]
PAGES = [[one] for one in COMPARED] + [COMPARED]


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
@pytest.mark.parametrize("made", PAGES, ids=["confirmed", "mixed", "empty", "comparison"])
def test_every_figure_is_drawn_and_everybody_can_read_it(
    made: list[Callable[[], Summary]],
    width: int,
    scheme: Literal["light", "dark"],
    opened: Open,
    tmp_path: Path,
) -> None:
    path = write_report([one() for one in made], tmp_path / "report.html")
    found = opened(path, width, scheme)
    figures, done = drawn(found.page)
    least = 0 if made == [report_studies.empty] else 1 if len(made) > 1 else 6
    assert figures == done >= least
    assert paper(found.page) == ({"white" if scheme == "light" else "#1B2128"} if done else set())
    assert found.page.evaluate("document.documentElement.scrollWidth") == width  # no sideways
    assert found.axe() == []
    assert found.wrong == []


@pytest.mark.browser
def test_figures_follow_the_theme_and_print_in_light_colours(opened: Open, tmp_path: Path) -> None:
    found = opened(write_report(report_studies.confirmed(), tmp_path / "r.html"), scheme="light")
    found.page.emulate_media(color_scheme="dark")
    dark = "document.querySelector('.plotly-graph-div')._fullLayout.paper_bgcolor == '#1B2128'"
    until(found.page, dark)
    found.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert paper(found.page) == {"white"}
    widths = "[...document.querySelectorAll('.plotly-graph-div')].map(p => p._fullLayout.width)"
    assert set(found.page.evaluate(widths)) == {660}
    found.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert paper(found.page) == {"#1B2128"}
    assert found.wrong == []


@pytest.mark.browser
def test_keys_scroll_what_is_too_wide(opened: Open, tmp_path: Path) -> None:
    found = opened(write_report(report_studies.confirmed(), tmp_path / "r.html"), 390)
    table = found.page.locator("[aria-label='The best recipes']")
    table.focus()
    found.page.keyboard.press("ArrowRight")
    until(found.page, "document.activeElement.scrollLeft > 0")


@pytest.mark.browser
def test_the_best_recipes_fit_a_desktop(opened: Open, tmp_path: Path) -> None:
    page = opened(write_report(report_studies.confirmed(), tmp_path / "r.html")).page
    table = page.locator("[aria-label='The best recipes']")
    assert table.locator("th", has_text="weight_decay").is_visible()
    assert table.evaluate("element => element.scrollWidth - element.clientWidth") == 0


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 1200])
@pytest.mark.parametrize("made", PAGES[::3], ids=["report", "comparison"])
def test_no_number_is_broken(
    made: list[Callable[[], Summary]], width: int, opened: Open, tmp_path: Path
) -> None:
    page = opened(write_report([one() for one in made], tmp_path / "r.html"), width).page
    assert page.locator("td.number").count() > 20
    assert page.evaluate(BROKEN) == []


BROKEN = """
[...document.querySelectorAll("td.number:not(.own)")].filter(cell => {
  const range = document.createRange();
  range.selectNodeContents(cell);
  return range.getClientRects().length > 1;
}).map(cell => cell.textContent)
"""


@pytest.mark.browser
def test_a_browser_that_cannot_unpack_says_so(opened: Open, tmp_path: Path) -> None:
    path = write_report(report_studies.confirmed(), tmp_path / "report.html")
    found = opened(path, script="delete window.DecompressionStream")
    assert found.page.locator("#no-figures").is_visible()
    assert "need a browser that can unpack them" in found.page.locator("#no-figures").inner_text()
    assert found.page.locator("#answer").is_visible()
    assert drawn(found.page)[1] == 0


@pytest.mark.browser
def test_a_figures_own_page_is_drawn_in_both_themes(opened: Open, tmp_path: Path) -> None:
    figure = report_studies.confirmed().figure("range_test")
    write_figure(figure, tmp_path / "lr.html")
    for scheme, colour in (("light", "white"), ("dark", "#1B2128")):
        found = opened(tmp_path / "lr.html", 390, scheme)  # type: ignore[arg-type]
        assert drawn(found.page) == (1, 1) and paper(found.page) == {colour}
        assert found.axe() == [] and found.wrong == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 1200])
def test_a_figures_title_and_verdict_are_not_cut_off(
    width: int, opened: Open, tmp_path: Path
) -> None:
    lrs = tuple(10 ** (-6 + 7 * i / 99) for i in range(100))
    figure = RangeTest(lrs=lrs, losses=(2.3,) * 100).figure()
    write_figure(figure, tmp_path / "lr.html")
    page = opened(tmp_path / "lr.html", width).page
    said = page.locator("h1, header p")
    title, why = said.all_inner_texts()
    assert title.startswith("Not reliable: ") and "the loss never falls significantly" in why
    boxes = [one.bounding_box() for one in said.all()]
    assert all(box and box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    plot = page.locator(".plotly-graph-div")
    assert plot.locator(".gtitle").count() == 0  # said once
    assert "guess" in plot.inner_text()


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 1200])
@pytest.mark.parametrize("made", COMPARED[:2])
def test_labels_of_rates_do_not_touch(
    made: Callable[[], Summary], width: int, opened: Open, tmp_path: Path
) -> None:
    page = opened(write_report(made(), tmp_path / "report.html"), width).page
    for figure in ("range-test-0", "refining-0"):
        labels = page.locator(f"#figure-{figure} .xtick text", has_text=re.compile(r"\d"))
        boxes = [box for label in labels.all() if (box := label.bounding_box())]
        assert len(boxes) > 2
        for left, right in itertools.pairwise(boxes):
            assert left["x"] + left["width"] + 3 < right["x"], figure


@pytest.mark.browser
@pytest.mark.parametrize("width", [700, 1000, 1400])
def test_labels_of_lines_stand_below_the_toolbar(width: int, opened: Open, tmp_path: Path) -> None:
    study = report_studies.confirmed()
    write_figure(study.figure("range_test"), tmp_path / "lr.html")
    for path in (write_report(study, tmp_path / "report.html"), tmp_path / "lr.html"):
        page = opened(path, width).page
        plots = page.locator(".plotly-graph-div:has(.annotation-text)").all()
        assert plots
        for plot in plots:
            buttons = plot.locator(".modebar").bounding_box()
            labels = [one.bounding_box() for one in plot.locator(".annotation-text").all()]
            assert buttons and all(
                box and box["y"] >= buttons["y"] + buttons["height"] for box in labels
            )


@pytest.mark.browser
def test_a_dark_page_changes_colours_and_no_words(opened: Open, tmp_path: Path) -> None:
    figure = styled(go.Figure(), "white")
    add_marks(figure, ["white", BLUE], [1, 2], "white", mark("circle", BLUE, 9), text=[BLUE, "y"])
    write_figure(figure, tmp_path / "words.html")
    found = opened(tmp_path / "words.html", scheme="dark")
    trace = found.page.evaluate("document.querySelector('.plotly-graph-div').data[0]")
    assert (trace["x"], trace["name"], trace["text"]) == (["white", BLUE], "white", [BLUE, "y"])
    assert trace["marker"]["color"] == DARK[BLUE]
    assert found.page.get_by_role("heading").inner_text() == "white"


@pytest.mark.browser
@pytest.mark.slow
def test_the_report_of_ten_thousand_trials_opens_smoothly(opened: Open, tmp_path: Path) -> None:
    path = write_report(report_studies.large(), tmp_path / "report.html")
    found = opened(path, script=LONGEST)
    figures, done = drawn(found.page)
    assert figures == done >= 8
    assert found.wrong == [] and found.axe() == []
    marks = found.page.locator(".plotly-graph-div .point").count()
    assert 1_000 < marks < 12_000  # what a browser can scroll, whatever the number of trials
    # The page answered between two figures: as many stretches of work as figures, not one.
    assert found.page.evaluate("window.stretches.length") >= figures / 2


LONGEST = """
window.stretches = [];
new PerformanceObserver(list => window.stretches.push(...list.getEntries().map(e => e.duration)))
  .observe({ type: "longtask", buffered: true });
"""


@pytest.mark.browser
def test_the_check_sees_a_script_that_fails_and_a_page_that_asks_a_host(tmp_path: Path) -> None:
    path = write_report(report_studies.empty(), tmp_path / "report.html")
    broken = '<img src="https://example.org/x.png"><script>missing()</script></body>'
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", broken), encoding="utf-8")
    _, console = dump(path, tmp_path / "profile")
    assert any("missing is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
