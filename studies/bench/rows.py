"""Races as rows of JSON lines: run what is missing, several at once, and keep each as it comes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import torch

import hpsched
from studies.bench.methods import METHODS
from studies.bench.race import Race, scorer
from studies.bench.search_peers import PACKAGES, PEERS
from studies.bench.tasks import TASKS

ALL = {**METHODS, **PEERS}
RESULTS = Path(__file__).parent / "results" / "search"
#: Modules of hpsched that a search follows from.
RULES = (
    *("cycle", "schedules", "divergence", "lr_curve", "proposal", "refine", "evidence", "records"),
    *("coordinates", "surrogate", "search", "sampler", "pruner", "prestage", "suggest"),
    *("ledger", "study"),
)
#: Seeds that each recipe a race named is run again with; the same for all methods.
FRESH_SEEDS = range(1_000_000, 1_000_005)

Row = dict[str, Any]


class Job(NamedTuple):
    """One race: what it is, and the key of its row."""

    task: str
    method: str
    seed: int
    workers: int
    budget: float


@cache  # of the code that this process runs, whatever becomes of the files meanwhile
def fingerprint() -> str:
    """Of hpsched's search code: its rows hold for this code alone."""
    folder = Path(hpsched.__file__).parent
    source = b"".join((folder / f"{name}.py").read_bytes() for name in RULES)
    return hashlib.blake2b(source, digest_size=6).hexdigest()


fingerprint()


def run_job(job: Job) -> Row:
    """Run the race, and each recipe it named again on fresh seeds and unseen data."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    task = TASKS[job.task]
    race = Race(task, job.seed, job.budget, job.workers)
    begun = time.perf_counter()
    ALL[job.method](race)
    wall = time.perf_counter() - begun
    tested = scorer(race.task, FRESH_SEEDS)
    named = []
    for cost, when, recipe in race.named:
        named.append(
            {
                "cost": round(cost, 4),
                "time": round(when, 4),
                "recipe": {field: float(f"{value:.6g}") for field, value in recipe.items()},
                "scores": [float(f"{s:.6g}") if math.isfinite(s) else None for s in tested(recipe)],
            }
        )
    package = [PACKAGES[job.method]] if job.method in PACKAGES else []
    return {
        **job._asdict(),
        "rules": fingerprint() if job.method.startswith("hpsched") else None,
        "cost": round(race.cost, 4),
        "runs": race.runs,
        "wall": round(wall, 3),
        "training": round(race.seconds, 3),
        "named": named,
        "versions": {name: version(name) for name in ("hpsched", "optuna", "torch", *package)},
    }


@dataclass(frozen=True)
class Results:
    """Rows in a folder, a file for each task."""

    folder: Path = RESULTS

    def __iter__(self) -> Iterator[Row]:
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    yield json.loads(line)
                except ValueError:  # cut short by an interruption: the race runs again
                    continue

    def current(self, rules: Sequence[str] = ()) -> list[Row]:
        """The rows that hold for the code as it is, or as it was with these fingerprints.

        Of a race that has rows of several, that of the first one named.
        """
        found: dict[Job, Row] = {}
        every = list(self)
        for one in (*reversed(rules or (fingerprint(),)), None):
            found |= {key(row): row for row in every if row["rules"] == one}
        return list(found.values())

    def run(self, jobs: Sequence[Job], processes: int, done: Callable[[Row], None]) -> int:
        """Run the jobs that have no row yet; ``done`` is called with each new row.

        Returns how many had one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        there = {key(row) for row in self.current()}
        missing = [job for job in jobs if job not in there]
        with ProcessPoolExecutor(processes, initializer=prepare) as pool:
            futures = [pool.submit(run_job, job) for job in missing]
            try:
                for future in as_completed(futures):
                    row = future.result()
                    path = self.folder / f"{row['task']}.jsonl"
                    append(path, json.dumps(row))
                    done(row)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return len(jobs) - len(missing)


def prepare() -> None:
    """Of a process that trains: a large weight decay makes denormal weights, and they are slow."""
    torch.set_flush_denormal(True)


def append(path: Path, line: str) -> None:
    """Add a line, after one that an interruption may have cut short."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write((line + "\n").encode())


def key(row: Row) -> Job:
    """The job whose row this is."""
    return Job(**{name: row[name] for name in Job._fields})
