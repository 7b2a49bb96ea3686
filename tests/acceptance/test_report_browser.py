"""The report in a headless Chromium without a network: every figure drawn, nothing in the console.

Chromium's own complaints (no D-Bus, no GPU) go to stderr as well; only lines of its console count.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import report_studies

from hpsched.report import write_report
from hpsched.summary import Summary

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--proxy-server=127.0.0.1:9",  # nobody listens: whatever asks a host fails, and says so
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=20000",
)


def dump(path: Path, profile: Path, *more: str) -> tuple[str, list[str]]:
    """The page after its scripts ran, and the lines of its console."""
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *more, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize(
    "summary", [report_studies.confirmed, report_studies.mixed, report_studies.empty]
)
def test_every_figure_is_drawn(summary: Callable[[], Summary], width: int, tmp_path: Path) -> None:
    path = write_report(summary(), tmp_path / "report.html")
    page, console = dump(path, tmp_path / "profile", f"--window-size={width},900")
    assert console == []
    refined = [known for w in summary().windows.values() if (known := w.evidence) and known.runs]
    assert page.count('id="figure-refining-') == 3 * len(refined)  # caption, plot and data
    plots = re.split(r'<div class="plotly-graph-div', page)[1:]
    assert len(plots) == page.count('-data">')
    for plot in plots:
        assert 'class="main-svg"' in plot.split("</figure>")[0]


@pytest.mark.browser
def test_the_check_sees_a_script_that_fails_and_a_page_that_asks_a_host(tmp_path: Path) -> None:
    path = write_report(report_studies.empty(), tmp_path / "report.html")
    broken = '<img src="https://example.org/x.png"><script>missing()</script></body>'
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", broken), encoding="utf-8")
    _, console = dump(path, tmp_path / "profile")
    assert any("missing is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)
