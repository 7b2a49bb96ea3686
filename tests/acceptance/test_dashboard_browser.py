"""The study page of the real Optuna Dashboard, in a headless Chromium: the range test is on it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import optuna
import pytest
import report_studies
from test_report_browser import BROWSERS, FLAGS

from hpsched.storage import open_storage


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    """Address of the page of a study that plain ``study.optimize`` has run."""
    url = f"sqlite:///{tmp_path}/studies.db"
    made = report_studies.mixed()
    study = optuna.create_study(study_name=made.name, storage=open_storage(url, create=True))
    study.add_trials([run.trial for run in made.runs if run.trial.state.is_finished()])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "hpsched", "dashboard", "--storage", url, "--port", port]
    with (tmp_path / "said.txt").open("w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            _wait_for_figures(f"http://127.0.0.1:{port}/api/studies/1?after=0")
            yield f"http://127.0.0.1:{port}/dashboard/studies/1"
        finally:
            server.kill()
            server.wait()


def _wait_for_figures(address: str) -> None:
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        with suppress(OSError), urllib.request.urlopen(address, timeout=10) as answer:
            if b"hpsched-range-test-1" in answer.read():
                return
        time.sleep(0.2)
    raise AssertionError(f"no figures at {address} within a minute")


@pytest.mark.browser
def test_the_studys_page_shows_a_range_test_for_each_context(page: str, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path}/profile", "--window-size=1200,1900"]
    done = subprocess.run(
        [*command, "--dump-dom", page], capture_output=True, text=True, timeout=180, check=True
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    plots = done.stdout.split('id="user-defined-plot:hpsched-range-test-')[1:]
    assert len(plots) == 2
    for plot in plots:
        assert 'class="main-svg"' in plot and 'height="450"' in plot
        assert "Search max_lr from" in plot and "learning rate (log scale)" in plot
    assert any("norm='batch'" in plot for plot in plots)
