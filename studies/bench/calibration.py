"""Is the range test right? Best max_lr by grid on many tasks, against what every finder says.

    python -m studies.bench.calibration run                  # about an hour of two cores, resumable
    python -m studies.bench.calibration score --split tuning

``run`` measures, and saves each measurement as it comes:

grid    The score of the standard recipe (div 25, pct_start 0.3, momentum 0.95/0.85, weight decay
        1e-4) at rates half an octave apart, ten seeds each. The *best set* of a task is the rates
        whose mean score is within one seed's standard deviation of the best mean.
sweeps  Twenty pre-stages of three range tests each (seeds and weight decays as in a study), all
        their raw losses to the end. Every rule, ours and the peers', reads these same sweeps.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FixedTrial

import hpsched
from hpsched.errors import TrainingError
from hpsched.sampler import STANDARD_RECIPE
from hpsched.suggest import find_lr
from studies.bench.tasks import TASKS, Task

RESULTS = Path(__file__).parent / "results" / "calibration"
WEIGHT_DECAY = 1e-4
COARSE = range(-30, 8, 2)  # half-octaves: 3e-5 … 8
COARSE_SEEDS = range(2)
FINE_SEEDS = range(10)
REACH = 5  # half-octaves measured on either side of the best
PRE_STAGES = 20
REPLICATES = 3

Row = dict[str, Any]


def rate(index: int) -> float:
    """The grid's rate with this index: half an octave apart, 1 at 0."""
    return float(2 ** (index / 2))


# ------------------------------------------------------------------ measuring


def full_run(task: Task, max_lr: float, seed: int, steps: int | None = None) -> float:
    """Score of the standard recipe; inf where it diverged."""
    values = {**STANDARD_RECIPE, "max_lr": max_lr, "weight_decay": WEIGHT_DECAY}
    total_steps = steps or task.total_steps
    recipe = hpsched.suggest_onecycle(FixedTrial(values), total_steps=total_steps, rungs=1)
    try:
        return recipe.train(task.train, total_steps, seed)
    except TrainingError:
        return math.inf


def _measure(job: Row) -> Row:
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task = TASKS[job["task"]]
    if job["kind"] == "grid":
        return {**job, "value": full_run(task, rate(job["rate"]), job["seed"])}
    tests = find_lr(task.train, stop_diverged=False, replicates=REPLICATES, seed=job["seed"])
    keep = ("losses", "weight_decay", "momentum", "seed", "optimizer")
    found = [{name: getattr(test, name) for name in keep} for test in tests]
    for row in found:
        row["losses"] = [float(f"{loss:.6g}") for loss in row["losses"]]
    return {**job, "lrs": [float(f"{lr:.6g}") for lr in tests[0].lrs], "sweeps": found}


def _key(row: Row) -> tuple[Any, ...]:
    return row["kind"], row.get("rate"), row["seed"]


class Results:
    """The measurements of one task, a JSON line each; what is there is not measured again."""

    def __init__(self, task: str, folder: Path = RESULTS) -> None:
        self.path = folder / f"{task}.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def add(self, row: Row) -> None:
        """Append and save."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def missing(self, jobs: Iterable[Row]) -> list[Row]:
        """The jobs that have not been done."""
        done = {_key(row) for row in self.rows}
        return [job for job in jobs if _key(job) not in done]

    def grid(self) -> dict[int, list[float]]:
        """Rate's index → scores by seed."""
        found: dict[int, list[float]] = {}
        for row in sorted((r for r in self.rows if r["kind"] == "grid"), key=lambda r: r["seed"]):
            found.setdefault(row["rate"], []).append(row["value"])
        return found


def _wanted(task: Task, results: Results) -> list[Row]:
    """The next measurements: sweeps, a coarse grid, then a fine one around what looks best."""
    sweeps = [{"task": task.name, "kind": "sweep", "seed": seed} for seed in range(PRE_STAGES)]
    coarse = _grid_jobs(task, COARSE, COARSE_SEEDS)
    missing = results.missing([*coarse, *sweeps])
    if missing:
        return missing
    mean = {index: statistics.fmean(values) for index, values in results.grid().items()}
    best = min(mean, key=lambda index: mean[index])
    fine = results.missing(_grid_jobs(task, range(best - REACH, best + REACH + 1), FINE_SEEDS))
    if fine:
        return fine
    good = best_set(results.grid()).indices
    return results.missing(_grid_jobs(task, range(min(good) - 2, max(good) + 3), FINE_SEEDS))


def _grid_jobs(task: Task, indices: Iterable[int], seeds: Iterable[int]) -> list[Row]:
    return [
        {"task": task.name, "kind": "grid", "rate": index, "seed": seed}
        for index in indices
        for seed in seeds
    ]


def run(names: Sequence[str], processes: int) -> None:
    """Measure all that is missing; interrupt and start again at will."""
    with ProcessPoolExecutor(processes) as pool:
        for name in names:
            task, results = TASKS[name], Results(name)
            while jobs := _wanted(task, results):
                for done in as_completed([pool.submit(_measure, job) for job in jobs]):
                    results.add(done.result())
            print(f"{name}: {best_set(results.grid())}", flush=True)


# ------------------------------------------------------------------ what is best


@dataclass(frozen=True)
class BestSet:
    """The rates that are as good as the best, as indices of the grid."""

    indices: tuple[int, ...]
    value: float
    noise: float

    def error(self, max_lr: float) -> float:
        """Octaves from ``max_lr`` to the set, negative below it; 0 between two of its members."""
        x, members = 2 * math.log2(max_lr), self.indices
        if members[0] <= x <= members[-1]:
            return 0.0
        return (x - (members[0] if x < members[0] else members[-1])) / 2

    def __str__(self) -> str:
        low, high = rate(self.indices[0]), rate(self.indices[-1])
        return f"best {self.value:.4g} ± {self.noise:.2g} for max_lr {low:.3g} … {high:.3g}"


def best_set(grid: Mapping[int, Sequence[float]]) -> BestSet:
    """The connected rates around the best whose mean is within a seed's noise of it.

    Noise is the standard deviation of single runs at the best rate and its neighbours, pooled.
    """
    full = {i: v for i, v in grid.items() if len(v) >= len(FINE_SEEDS)}
    mean = {index: statistics.fmean(values) for index, values in full.items()}
    best = min(mean, key=lambda index: mean[index])
    near = [full[i] for i in (best - 1, best, best + 1) if math.isfinite(mean.get(i, math.inf))]
    noise = math.sqrt(statistics.fmean(statistics.variance(values) for values in near))
    good = [best]
    for step in (-1, 1):
        index = best + step
        while mean.get(index, math.inf) <= mean[best] + noise:
            good.append(index)
            index += step
    return BestSet(tuple(sorted(good)), mean[best], noise)


def main() -> None:
    """Run or score, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="measure what is missing")
    measure.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    measure.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    run(args.tasks, args.processes)


if __name__ == "__main__":
    main()
