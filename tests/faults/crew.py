"""Workers whose fate is noted, the study they leave, and the account of both."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from tests.faults import account
from tests.fleet import Fleet

PACE = {"range_test0": 0.5, "rung0": 0.5, "rung1": 1.0, "rung2": 2.0, "confirm2": 2.0}


@dataclass
class Result:
    """What was done to a study, and what was left of it.

    Attributes:
        scenario, injected: What was done, in words.
        states: Trials by state.
        differences: What is not as it would be without faults; empty when all is exact.
        figures: What else was measured.
        seconds: Wall time.
    """

    scenario: str
    injected: str
    states: dict[str, int]
    differences: list[str]
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return not self.differences

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "exact": self.exact})


class Crew(Fleet):
    """A fleet that keeps its workers' output in files, and knows what happened to whom.

    Args:
        folder, url: As of a fleet.
        heartbeat, grace: The workers', in seconds.
        pace: Kind and rung of a run → seconds it takes.
        seed: For the moments at which things happen.
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        *,
        grace: int,
        seed: int,
        heartbeat: int = 1,
        pace: dict[str, float] = PACE,
    ) -> None:
        folder.mkdir(exist_ok=True)
        super().__init__(folder, url)
        self.grace = grace
        self.seed = seed
        self.random = random.Random(seed)
        self.victims: set[int] = set()
        self.differences: list[str] = []
        self.figures: dict[str, Any] = {}
        self._codes: dict[int, set[int]] = {}
        self._began = time.monotonic()
        self._settings: dict[str, Any] = {}
        self._env = {"HPSCHED_HEARTBEAT": str(heartbeat), "HPSCHED_GRACE": str(grace)}
        self._env["PACE"] = json.dumps(pace)

    # -- workers -------------------------------------------------------------------------------

    def create(self, name: str = "fake", **settings: Any) -> None:
        self._settings = {"seed": self.seed, **settings}
        super().create(name, **self._settings)
        self._settings.pop("objective", None)

    def start(
        self, name: str = "fake", *, url: str = "", within: tuple[str, ...] = (), **env: str
    ) -> subprocess.Popen[str]:
        """Start a worker, which reaches the database at ``url``, as an argument of ``within``."""
        command = [*within, *self.command(name, url)]
        with self._log(len(self.processes)).open("w") as log:
            worker = self._start(command, log, {**self._env, **env})
        self._codes[worker.pid] = {0}
        return worker

    def team(self, workers: int, **how: Any) -> list[subprocess.Popen[str]]:
        return [self.start(**how) for _ in range(workers)]

    def output(self, worker: subprocess.Popen[str]) -> str:
        return self._log(self.processes.index(worker)).read_text()

    def _log(self, index: int) -> Path:
        return self.folder / f"worker{index}.log"

    def strike(self, worker: subprocess.Popen[str], number: int, *codes: int) -> None:
        """Send a signal to a worker, which may end with ``codes`` besides 0 from then on."""
        self.victims.add(worker.pid)
        self._codes[worker.pid] |= set(codes)
        os.kill(worker.pid, number)

    def until(self, what: Callable[[], Any], seconds: float = 180) -> Any:
        return super().until(what, seconds)

    def until_busy(self, worker: subprocess.Popen[str]) -> None:
        """Wait until a worker has begun a run, or ended."""
        self.until(lambda: worker.poll() is not None or worker.pid in {c[0] for c in self.calls()})

    def alive(self) -> list[subprocess.Popen[str]]:
        return [worker for worker in self.processes if worker.poll() is None]

    def pause(self, low: float, high: float) -> None:
        time.sleep(self.random.uniform(low, high))

    # -- the account ---------------------------------------------------------------------------

    def expect(self, what: object, otherwise: str) -> None:
        if not what:
            self.differences.append(otherwise)

    def account(self, scenario: str, injected: str, *, alone: bool, seconds: float) -> Result:
        """Wait until all workers have ended, and see what they left.

        Args:
            scenario, injected: What was done.
            alone: Whether there was one worker at any time: its study equals the one without
                faults, trial by trial.
            seconds: Time they have.
        """
        limit = time.monotonic() + seconds
        for worker in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(max(limit - time.monotonic(), 0.01))
            output = self.output(worker)
            if worker.returncode not in self._codes[worker.pid] or "Traceback" in output:
                tail = "\n    ".join(output.splitlines()[-12:])
                ended = "is still at work" if worker.returncode is None else worker.returncode
                self.differences.append(f"worker {worker.pid} ended with {ended}:\n    {tail}")
        study = self.study()
        self.differences += account.differences(study)
        self.differences += account.repeated(self.calls(), self.victims)
        if alone:
            calm = faultless(json.dumps(self._settings))
            self.differences += account.unlike(study.get_trials(), calm)
        states = Counter(trial.state.name for trial in study.get_trials(deepcopy=False))
        took = round(time.monotonic() - self._began, 1)
        return Result(scenario, injected, dict(states), self.differences, took, self.figures)


@functools.cache
def faultless(settings: str) -> list[FrozenTrial]:
    """The trials of a study with these settings (JSON) to which nothing happens."""
    with tempfile.TemporaryDirectory() as folder:
        twin = Fleet(Path(folder), f"sqlite:///{folder}/studies.db")
        twin.create(**json.loads(settings))
        twin.run()
        return list(twin.study().get_trials())


@contextlib.contextmanager
def crew(url: str, folder: Path | None = None, **options: Any) -> Iterator[Crew]:
    """A crew that is gone afterwards."""
    with contextlib.ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        held = Crew(place, url, **options)
        stack.callback(held.end)
        yield held
