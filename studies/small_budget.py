"""Does a range test point the right way, and does a search of ten full runs pay? On MNIST-1D.

What      Three questions about one of the objectives of studies/mnist1d.py:
          1. Where is the best max_lr? A grid of the standard recipe (div 25, pct 0.3, momentum
             0.95/0.85, weight decay 1e-4), half an octave apart, four seeds each.
          2. Where does the range test point? The pooled proposal of three replicates, ten times.
          3. What does a study with a budget of ten full cycles find? Each study's named recipe is
             run again on five seeds that no study has seen, and scored on the half of the test
             data that no choice has seen; so are the default recipes at max_lr 0.1 and 0.01.
Data      MNIST-1D, generated (see studies/mnist1d.py).
Cost      About six minutes of one core for mlp_sgd with ten studies.

    python -m studies.small_budget mlp_sgd --studies 10 --output small_budget.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FixedTrial

import hpsched
from hpsched import proposal
from hpsched.coordinates import STANDARD_RECIPE
from hpsched.errors import TrainingError
from hpsched.suggest import find_lr
from hpsched.worker import Worker
from studies import mnist1d

GRID = [0.01 * 2 ** (i / 2) for i in range(17)]  # 0.01 … 2.56
GRID_SEEDS = range(4)
FRESH_SEEDS = range(9_000, 9_005)
DEFAULT_RATES = (0.1, 0.01)
CYCLES = 10

Train = Callable[[hpsched.Cycle], float]


def standard(max_lr: float) -> dict[str, float]:
    """The recipe people use without a search."""
    return {**STANDARD_RECIPE, "max_lr": max_lr, "weight_decay": 1e-4}


def scores(train: Train, recipe: dict[str, float], steps: int, seeds: Sequence[int]) -> list[float]:
    """Error of each seed; 1.0 where the run diverged."""
    found = []
    for seed in seeds:
        cycle = hpsched.suggest_onecycle(FixedTrial(recipe), total_steps=steps, rungs=1)
        try:
            found.append(cycle.train(train, steps, seed))
        except TrainingError:
            found.append(1.0)
    return found


def best_rate(train: Train, steps: int) -> dict[str, Any]:
    """The grid, its best rate, and the rates within the best's standard error of it."""
    rows = [(lr, scores(train, standard(lr), steps, GRID_SEEDS)) for lr in GRID]
    mean = {lr: statistics.fmean(values) for lr, values in rows}
    best = min(mean, key=lambda lr: mean[lr])
    error = statistics.stdev(dict(rows)[best]) / math.sqrt(len(GRID_SEEDS))
    good = [lr for lr in GRID if mean[lr] <= mean[best] + error]
    return {"grid": mean, "best": best, "good": [min(good), max(good)]}


def proposals(train: Train, times: int, steps: int) -> list[dict[str, float]]:
    """Centre and window of the pooled range tests, for several seeds."""
    pooled = [proposal.pool(find_lr(train, seed=seed), steps) for seed in range(times)]
    return [{"centre": p.centre, "low": p.low, "high": p.high} for p in pooled]


def search(name: str, seed: int) -> hpsched.Best:
    """One study of ten full cycles with one worker, as `hpsched worker attach` runs it."""
    with tempfile.TemporaryDirectory() as folder:
        storage = f"sqlite:///{folder}/study.db"
        hpsched.create_study(
            "study", objective=f"studies.mnist1d:{name}", storage=storage, cycles=CYCLES, seed=seed
        )
        study = hpsched.open_study("study", storage, heartbeat=True)
        Worker(study, getattr(mnist1d, name)).run()
        return hpsched.best(study)


def one_study(name: str, seed: int, steps: int) -> dict[str, Any]:
    """What a study named, and how it does on fresh seeds and unseen data."""
    best = search(name, seed)
    test = partial(mnist1d.TRAIN[name], score=mnist1d.test_error)
    return {
        "seed": seed,
        "recipe": best.recipe,
        "said": best.mean,
        "test": scores(test, best.recipe, steps, FRESH_SEEDS),
    }


def run(name: str, studies: int) -> dict[str, Any]:
    """Everything, as one record."""
    steps = mnist1d.TOTAL_STEPS[name.partition("_")[0]]
    train, test = mnist1d.TRAIN[name], partial(mnist1d.TRAIN[name], score=mnist1d.test_error)
    grid = best_rate(train, steps)
    print(f"best max_lr {grid['best']:.3g}, as good within its error: {grid['good']}", flush=True)
    pointed = proposals(train, 10, steps)
    print("proposals", ", ".join(f"{p['centre']:.3g}" for p in pointed), flush=True)
    defaults = {lr: scores(test, standard(lr), steps, FRESH_SEEDS) for lr in DEFAULT_RATES}
    found = []
    for seed in range(studies):
        found.append(one_study(name, seed, steps))
        rate = found[-1]["recipe"]["max_lr"]
        print(f"study {seed}: test {text(found[-1]['test'])}, max_lr {rate:.3g}", flush=True)
    versions = {"hpsched": hpsched.__version__, "optuna": optuna.__version__}
    versions["torch"] = torch.__version__
    answers = {**grid, "proposals": pointed, "defaults": defaults, "studies": found}
    return {"task": name, "versions": versions, **answers}


def text(values: Sequence[float]) -> str:
    """mean ± standard deviation."""
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def report(found: dict[str, Any]) -> None:
    """The three answers."""
    best, pointed = found["best"], found["proposals"]
    factors = [max(p["centre"], best) / min(p["centre"], best) for p in pointed]
    inside = sum(p["low"] <= best <= p["high"] for p in pointed)
    print(
        f"\nbest max_lr on the grid {best:.3g}\n"
        f"proposal off by a factor of {statistics.median(factors):.2f} in the median, "
        f"{max(factors):.2f} at worst; best inside the window in {inside} of {len(factors)}"
    )
    means = [statistics.fmean(study["test"]) for study in found["studies"]]
    print(
        f"test error of the {len(means)} recipes that studies of {CYCLES} full cycles named: "
        f"median {statistics.median(means):.3f}, best {min(means):.3f}, worst {max(means):.3f}"
    )
    for lr, values in found["defaults"].items():
        wins = sum(mean < statistics.fmean(values) for mean in means)
        print(f"default recipe at max_lr {lr}: {text(values)}; beaten by {wins} of {len(means)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=sorted(mnist1d.TRAIN))
    parser.add_argument("--studies", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = run(options.task, options.studies)
    report(found)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
