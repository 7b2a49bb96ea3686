"""Makes the pictures of the docs: `python docs/screenshots.py [report terminal figures live …]`.

Runs a real study (scikit-learn's digits, seed 0, one worker: a few minutes) and looks at what it
left, with the programs that users look at it with. `--folder` keeps the study, so that another run
begins where this one ended. Needs Chromium, and the extras demo, dashboard and dev.
"""

from __future__ import annotations

import argparse
import inspect
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from playwright.sync_api import Browser, Locator, Page, sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI

from hpsched import figures, schedules
from hpsched.cli.screen import status_screen
from hpsched.figure_files import write_figure
from hpsched.study import open_study
from hpsched.summary import Summary, summarise

IMAGES = Path(__file__).parent / "images"
STUDY = "digits"
LARGEST = 300_000  # bytes of a picture in this repository
CHROMIUM = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
]  # fmt: skip


# -- a study to look at ----------------------------------------------------------------------------


def hpsched(folder: Path, *arguments: str) -> None:
    """Give a command, as its user would, in the study's folder."""
    subprocess.run([sys.executable, "-m", "hpsched", *arguments], cwd=folder, check=True)


def make_study(folder: Path) -> Summary:
    """The demo's study, if it is not there yet."""
    if not (folder / "report.html").exists():
        folder.mkdir(parents=True, exist_ok=True)
        hpsched(folder.parent, "demo", "--folder", folder.name, "--workers", "1", "--seed", "0")
    return summarise(open_study(STUDY, url(folder)))


def url(folder: Path) -> str:
    """Where the demo's study is."""
    return f"sqlite:///{folder.resolve() / 'hpsched.db'}"


# -- what is shot ----------------------------------------------------------------------------------


def shoot_report(browser: Browser, folder: Path, summary: Summary) -> None:
    """The report's first screen, on a desk and on a phone."""
    hpsched(folder, "study", "report", STUDY, "--storage", url(folder), "--output", "report.html")
    address = (folder / "report.html").resolve().as_uri()
    with opened(browser, address, 1200, 1000) as page:
        save(page, "report")
    with opened(browser, address, 390, 844) as page:
        save(page, "report-phone")


def shoot_terminal(browser: Browser, folder: Path, summary: Summary) -> None:
    """`hpsched study status`, as Rich draws it on a terminal."""
    console = Console(record=True, width=92, file=io.StringIO(), force_terminal=True)
    console.print(f"[bold]$[/] hpsched study status {STUDY}\n", highlight=False)
    console.print(status_screen(summary))
    # Rich's own template loads its font from elsewhere.
    form = re.sub(r"@font-face \{\{.*?\}\}\s*(?=[.@])", "", console_svg_format(), flags=re.DOTALL)
    text = console.export_svg(title="hpsched", theme=MONOKAI, code_format=form)
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0])
    wide, high = 1000, round(1000 * height / width)
    with opened(browser, "about:blank", wide, high) as page:
        page.set_content(f'<body style="margin:0">{text}</body>')
        page.evaluate("document.querySelector('svg').style.width = '100%'")
        save(page, "status")


def console_svg_format() -> str:
    """Rich's template of a terminal window."""
    from rich._export_format import CONSOLE_SVG_FORMAT

    return CONSOLE_SVG_FORMAT


def shoot_figures(browser: Browser, folder: Path, summary: Summary) -> None:
    """Every figure that is drawn from a study, the gallery of schedules, and a range test."""
    drawn = {}
    for name in figures.__all__:
        draw: Callable[..., Any] = getattr(figures, name)
        parameters = inspect.signature(draw).parameters.values()
        wanted = [each.annotation for each in parameters if each.default is each.empty]
        if wanted == ["Summary"]:
            drawn[f"figure-{name.removesuffix('_figure')}"] = draw(summary)
    drawn["figure-schedules"] = figures.schedule_gallery(
        list(schedules.GALLERY), total_steps=1000, max_lr=1.0
    )
    for name, figure in drawn.items():
        write_figure(figure, folder / f"{name}.html")
    hpsched(folder, *f"lr-find {STUDY}:train --total-steps 300 --output range-test.html".split())
    for name in (*drawn, "range-test"):
        with opened(browser, (folder / f"{name}.html").resolve().as_uri(), 940, 1200) as page:
            save(page.locator("main"), name)


def shoot_live(browser: Browser, folder: Path, summary: Summary) -> None:
    """The study's page in `hpsched dashboard`: in both themes, and on a phone."""
    with dashboard(folder) as address:
        index = f"{address}/hpsched/"
        with opened(browser, index, 1200, 800) as page:
            page.get_by_text("Reading the study").wait_for(state="detached", timeout=60_000)
            link = page.get_by_role("link", name=STUDY, exact=True).first.get_attribute("href")
        study = urljoin(index, link)
        for name, dark in (("live-study", False), ("live-study-dark", True)):
            with opened(browser, study, 1200, 1000, dark) as page:
                save(page, name)
        with opened(browser, study, 390, 844) as page:
            save(page, "live-study-phone")


SHOTS = {
    "report": shoot_report,
    "terminal": shoot_terminal,
    "figures": shoot_figures,
    "live": shoot_live,
}


# -- with what -------------------------------------------------------------------------------------


@contextmanager
def dashboard(folder: Path) -> Iterator[str]:
    """`hpsched dashboard` on the study's database; yields the address that it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hpsched", "dashboard", "--port", str(port)]
    environment = {**os.environ, "HPSCHED_STORAGE": url(folder), "COLUMNS": "200"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield first_address(server)
        finally:
            server.terminate()
            server.communicate(timeout=30)


def first_address(server: subprocess.Popen[str]) -> str:
    """The first URL that the server prints, once something answers there."""
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"http://[\w.:]+", line):
            return found[0]
    sys.exit("hpsched dashboard ended without printing its address")


@contextmanager
def opened(
    browser: Browser, address: str, width: int, height: int, dark: bool = False
) -> Iterator[Page]:
    """A page at ``address``, loaded and at rest; console errors end the script."""
    size: Any = {"width": width, "height": height}
    context = browser.new_context(viewport=size, color_scheme="dark" if dark else "light")
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    for _ in range(50):  # a server may need a moment
        try:
            page.goto(address, wait_until="load")
            break
        except Exception:
            page.wait_for_timeout(200)
    page.wait_for_timeout(2500)  # figures draw themselves; a picture may wait
    yield page
    context.close()
    if wrong:
        sys.exit(f"{address}: {wrong}")


def save(shown: Page | Locator, name: str) -> None:
    """Shoot what is on the screen, or a part of a page."""
    path = IMAGES / f"{name}.png"
    shown.screenshot(path=path)
    check_size(path)


def check_size(path: Path) -> None:
    """Say what was made; refuse what is too large to keep in a repository."""
    size = path.stat().st_size
    print(f"{path.name}: {size // 1000} kB")
    if size > LARGEST:
        sys.exit(f"{path} has {size} bytes: crop it, or make it smaller than {LARGEST}")


def main() -> None:
    """Make the pictures that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shots", nargs="*", help=f"some of {', '.join(SHOTS)}; all by default")
    parser.add_argument("--folder", type=Path, help="keep the study here")
    wanted = parser.parse_args()
    unknown = set(wanted.shots) - set(SHOTS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(SHOTS)}")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium: install it (Debian: chromium)")
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        folder = wanted.folder or Path(scratch) / "study"
        summary = make_study(folder)
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        for name in wanted.shots or SHOTS:
            SHOTS[name](browser, folder, summary)
        browser.close()


if __name__ == "__main__":
    main()
