"""How fast the live page answers, and how large its answers are, for a study with many trials.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_live_page --trials 10000 --seconds 60

The study is written into a private PostgreSQL (as bench_service does), ``hpsched dashboard`` is
started on it without a log-in, and this process asks, one request after the other, as a browser
does: the page, its state and all its figures. "first" is asked before the study was read once;
"reading" while a reading of the study is under way in the background (a trial is added whenever
one has ended, so that figures are drawn anew too); "at rest" when nothing is being read. Shown are
the median, the 95th percentile and the slowest in milliseconds, how long the first reading took,
and the sizes in kB, as they are and zipped.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from hpsched.storage import open_storage
from tests.benchmarks.bench_sampler import CONTEXTS, finished, space
from tests.benchmarks.bench_service import STUDY, Server
from tests.fleet import environment


@contextmanager
def dashboard(url: str, folder: Path) -> Iterator[str]:
    """Address of a server on that storage."""
    command = [sys.executable, "-m", "hpsched", "dashboard", "--port", "0", "--storage", url]
    said = folder / "dashboard.txt"
    with said.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment())
    try:
        while not (found := re.search(r"http://[\d.]+:\d+/", said.read_text())):
            if server.poll() is not None:
                raise RuntimeError(said.read_text())
            time.sleep(0.1)
        yield found[0]
    finally:
        server.terminate()
        server.wait()


class Asked:
    """Answers' times in milliseconds, by what was asked."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def ask(self, kind: str, url: str, zipped: bool = False) -> tuple[bytes, Any]:
        request = urllib.request.Request(url, headers={"Accept-Encoding": "gzip"} if zipped else {})
        began = time.perf_counter()
        with urllib.request.urlopen(request, timeout=120) as answer:
            body = answer.read()
        self.times.setdefault(kind, []).append(1000 * (time.perf_counter() - began))
        return body, answer.headers

    def show(self, kind: str) -> None:
        times = self.times.get(kind, [])
        if times:
            tail = float(np.quantile(times, 0.95))
            row = f"{statistics.median(times):8.1f} {tail:8.1f} {max(times):8.1f}"
            print(f"  {kind:28} {len(times):6} {row}")


def age(headers: Any) -> float:
    return float(headers.get("Hpsched-Age", "inf"))


def until(what: Callable[[], Any], seconds: float = 300) -> Any:
    limit = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > limit:
            raise RuntimeError(f"nothing within {seconds} s")
        time.sleep(0.2)
    return found


def measure(base: str, add: Callable[[], None], seconds: float) -> None:
    import json

    asked, page = Asked(), f"{base}hpsched/studies/1"

    def state(kind: str) -> tuple[dict[str, Any], Any]:
        body, headers = asked.ask(kind, f"{page}/state.json")
        return json.loads(body), headers

    until(lambda: asked.ask("warm-up", f"{base}hpsched/state.json"))
    began = time.monotonic()
    asked.ask("first page", page)
    # All answers until then come while the whole study is being read.
    until(lambda: not state("state, first reading")[0]["reading"])
    print(f"first reading, with all figures: {time.monotonic() - began:.1f} s")
    sizes(asked, page, state("other")[0]["figures"])
    end, ages, last = time.monotonic() + seconds, [], float("inf")
    while time.monotonic() < end:
        found, headers = state("state, readings under way")
        asked.ask("page, readings under way", page)
        for figure in found["figures"]:
            url = f"{page}/figures/{figure['id']}.json"
            asked.ask("figure, readings under way", url, zipped=True)
        if age(headers) < last:
            add()  # a reading has ended: the next one finds something new
        last = age(headers)
        ages.append(last)
        time.sleep(0.1)
    print(f"age of what is shown: median {statistics.median(ages):.1f} s, most {max(ages):.1f} s")
    print(f"  {'milliseconds':28} {'n':>6} {'median':>8} {'95 %':>8} {'most':>8}")
    for kind in asked.times:
        if kind not in ("warm-up", "other"):
            asked.show(kind)


def sizes(asked: Asked, page: str, figures: Sequence[dict[str, Any]]) -> None:
    rows = {"page": page, "state": f"{page}/state.json"}
    rows |= {f"figure {one['id']}": f"{page}/figures/{one['id']}.json" for one in figures}
    total = np.zeros(2)
    for name, url in rows.items():
        both = [len(asked.ask("other", url, zipped)[0]) / 1000 for zipped in (False, True)]
        total += both
        print(f"  {name:28} {both[0]:8.1f} kB {both[1]:8.1f} kB zipped")
    print(f"  {'all':28} {total[0]:8.1f} kB {total[1]:8.1f} kB zipped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(f"{given.trials} trials, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    rng, spaces = np.random.default_rng(1), {context: space(context) for context in CONTEXTS}
    with tempfile.TemporaryDirectory() as folder:
        server = Server.started(Path(folder) / "server", 50)
        with server.database(given.trials) as url:
            study = optuna.load_study(study_name=STUDY, storage=open_storage(url))
            number = iter(range(given.trials, 10**9))
            with dashboard(url, Path(folder)) as base:
                measure(
                    base,
                    lambda: study.add_trial(finished(next(number), rng, spaces)),
                    given.seconds,
                )


if __name__ == "__main__":
    main()
