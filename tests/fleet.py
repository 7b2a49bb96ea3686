"""Workers of one study as real processes, on the databases there are to share it."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy

import hpsched
from hpsched.study import create_study
from hpsched.worker import Ended, Worker

TESTS = Path(__file__).resolve().parent
MARIADB_SERVER = "mysql+pymysql://root@127.0.0.1:3306/"
QUICK = {"HPSCHED_HEARTBEAT": "1", "HPSCHED_GRACE": "3"}

OBJECTIVE = '''\
"""FakeTraining, which notes its runs in calls.txt and takes PACE seconds for some of them."""
import json
import os
import time
from pathlib import Path

from fake_training import FakeTraining
import hpsched

PACE = json.loads(os.environ.get("PACE", "{}"))


def note(cycle, word):
    with Path(__file__).with_name("calls.txt").open("a") as file:
        file.write(f"{os.getpid()} {cycle.name} {word}\\n")


def pace(cycle):
    note(cycle, "starts")
    time.sleep(PACE.get(f"{cycle.kind}{cycle.rung}", 0))
    return False


def train(cycle):
    value = FakeTraining(fail_on=pace)(cycle)
    note(cycle, "ends")
    return value


def objective(trial):
    return hpsched.suggest_onecycle(trial, total_steps=900).run(train)
'''

#: What no exception ends; it says in the file ``here`` that it runs.
STUBBORN = """\
import time
from pathlib import Path
def objective(trial):
    Path("here").touch()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""


@contextmanager
def database(server: str, *, drop: str = "DROP DATABASE {}") -> Iterator[str]:
    """URL of a fresh database on ``server``, which is dropped afterwards."""
    name = f"hpsched_test_{uuid.uuid4().hex[:12]}"
    engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
    try:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
        yield sqlalchemy.make_url(server).set(database=name).render_as_string(hide_password=False)
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text(drop.format(name)))
    finally:
        engine.dispose()


def environment(**more: str) -> dict[str, str]:
    """For subprocesses: they find the tests' helpers, and no storage but the one they are given."""
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_STORAGE")}
    return {**kept, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1", **more}


class Fleet:
    """Workers of one study as real processes, and what they ran."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        self.processes: list[subprocess.Popen[str]] = []
        (folder / "train.py").write_text(OBJECTIVE)

    def create(
        self, name: str = "fake", *, objective: str = "train.py:objective", **settings: Any
    ) -> None:
        create_study(name, objective=objective, storage=self.url, **settings)

    def study(self, name: str = "fake") -> Any:
        return hpsched.open_study(name, self.url)

    def start(self, name: str = "fake", **env: str) -> subprocess.Popen[str]:
        return self._start(self.command(name), subprocess.PIPE, env)

    def command(self, name: str = "fake", url: str = "") -> list[str]:
        attach = ["-m", "hpsched", "worker", "attach", name, "--storage", url or self.url]
        return [sys.executable, *attach]

    def _start(self, command: list[str], stdout: Any, env: dict[str, str]) -> Any:
        worker = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment(**env),
            text=True,
            stdout=stdout,
            stderr=subprocess.STDOUT,
        )
        self.processes.append(worker)
        return worker

    def run(self, workers: int = 1, name: str = "fake", **env: str) -> None:
        """Start workers and wait until all have ended well."""
        for worker in [self.start(name, **env) for _ in range(workers)]:
            self.wait(worker)

    def work(self, name: str = "fake") -> Ended:
        """Be a worker, in this process: cheaper than :meth:`run`."""
        objective = runpy.run_path(str(self.folder / "train.py"))["objective"]
        return Worker(hpsched.open_study(name, self.url, heartbeat=True), objective).run()

    def wait(self, worker: subprocess.Popen[str], code: int = 0, seconds: float = 120) -> str:
        output, _ = worker.communicate(timeout=seconds)
        assert worker.returncode == code, f"exit {worker.returncode}, not {code}:\n{output}"
        assert "Traceback" not in output, output
        return output

    def calls(self) -> list[tuple[int, str, str]]:
        """(pid, name of the run, starts or ends), in order."""
        path = self.folder / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(pid), name, word) for pid, name, word in map(str.split, lines)]

    def until(self, what: Callable[[], Any], seconds: float = 60) -> Any:
        """The first true value of ``what()``."""
        limit = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < limit, f"nothing within {seconds} s; calls: {self.calls()}"
            time.sleep(0.02)
        return found

    def until_starts(self, part: str, pid: int | None = None) -> str:
        """Name of the first run that has ``part`` in its name and has started (in ``pid``)."""
        return str(
            self.until(
                lambda: next(
                    (
                        name
                        for who, name, word in self.calls()
                        if word == "starts" and part in name and pid in (None, who)
                    ),
                    None,
                )
            )
        )

    def end(self) -> None:
        for worker in self.processes:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
            if worker.stdout:
                worker.stdout.close()
