"""What the races say: cost to a target, quality at a budget, and how sure that is.

The *target* of a task is the level of TPE + Hyperband's incumbents (wide range) after
:data:`TARGET_RUNS` full runs: the median over its seeds of the mean test score. A recipe is there
when its own mean, on the same fresh seeds, is no worse than that by more than the standard
deviation between seeds, the line that docs/calibration.md draws around its best rates. A race has
reached it at the cost from which on every recipe it names is there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

TARGET_METHOD = "hyperband-wide"
TARGET_RUNS = 40.0
OURS = "hpsched"
BUDGETS = (5.0, 10.0, 20.0, 40.0)
RESAMPLES = 2000

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What counts as good on a task: a mean test score of ``level``, or ``tolerance`` worse."""

    level: float
    tolerance: float

    def met(self, mean: float) -> bool:
        """Whether a recipe with this mean test score is there."""
        return mean <= self.level + self.tolerance


def mean(scores: Sequence[float | None]) -> float:
    """Mean test score; inf when a run diverged."""
    return statistics.fmean(math.inf if score is None else score for score in scores)


def at(row: Row, budget: float) -> list[float | None] | None:
    """Test scores of the recipe that the race would have named after ``budget`` full runs."""
    found = [named["scores"] for named in row["named"] if named["cost"] <= budget]
    return found[-1] if found else None


def target(rows: Iterable[Row]) -> Target:
    """The target of a task, from the rows of :data:`TARGET_METHOD` on it."""
    found = [
        scores
        for row in rows
        if row["method"] == TARGET_METHOD and (scores := at(row, TARGET_RUNS)) is not None
    ]
    finite = [s for s in found if None not in s]
    noise = statistics.median(statistics.stdev(s) for s in finite)  # type: ignore[type-var]
    level = statistics.median(mean(scores) for scores in found)
    return Target(level, noise)


def cost_to(row: Row, wanted: Target, key: str = "cost") -> float:
    """Full runs spent (or, by ``key="time"``, elapsed) until the target is reached for good."""
    reached = math.inf
    for named in row["named"]:
        if named["cost"] > row["budget"] * 1.02:
            break
        if not wanted.met(mean(named["scores"])):
            reached = math.inf
        elif math.isinf(reached):
            reached = named[key]
    return float(reached)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median."""
    data = np.asarray(values)
    drawn = np.random.default_rng(seed).integers(0, len(data), (RESAMPLES, len(data)))
    medians = np.median(data[drawn], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975], method="nearest")
    return float(low), float(high)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """All that the documentation says, from the rows of one worker, task by task and over tasks.

    Costs are in full runs, misses infinite (``null``); ``quality`` is the distance of the named
    recipe's mean test score from the target's level, in tolerances, at each of :data:`BUDGETS`.
    ``pairs`` compares a method with ours over all races of the same task and seed.
    """
    alone = [row for row in rows if row["workers"] == 1]
    tasks = sorted({row["task"] for row in alone})
    targets = {task: target([r for r in alone if r["task"] == task]) for task in tasks}
    found: dict[str, Any] = {
        "seeds": len({row["seed"] for row in alone}),
        "targets": {task: asdict(wanted) for task, wanted in targets.items()},
        "methods": {},
        "pairs": {},
        "parallel": {},
    }
    for method in sorted({row["method"] for row in alone}):
        run = [t for t in tasks if any(r["task"] == t and r["method"] == method for r in alone)]
        by_task = {task: [r for r in alone if r["task"] == task] for task in run}
        found["methods"][method] = {
            task: _on_task(there, method, targets[task]) for task, there in by_task.items()
        }
        if method != OURS:
            each = [_costs(there, method, targets[task])[1] for task, there in by_task.items()]
            found["pairs"][method] = _times_ours([pair for pairs in each for pair in pairs])
    for workers in sorted({row["workers"] for row in rows} - {1}):
        several = [r for r in rows if r["workers"] == workers and r["method"] == OURS]
        found["parallel"][workers] = {
            task: finite(float(np.median(times)))
            for task in tasks
            if (times := [cost_to(r, targets[task], "time") for r in several if r["task"] == task])
        }
    return found


Pairs = list[tuple[float, float]]  # (a method's cost, ours) of races of the same task and seed


def _on_task(rows: Sequence[Row], method: str, wanted: Target) -> dict[str, Any]:
    costs, pairs = _costs(rows, method, wanted)
    low, high = interval(costs)
    seconds = [row["wall"] - row["training"] for row in _longest(rows, method, method)]
    return {
        "seeds": len(costs),
        "cost": finite(float(np.median(costs))),
        "interval": [finite(low), finite(high)],
        "solved": sum(map(math.isfinite, costs)) / len(costs),
        **_won(pairs),
        "quality": {f"{b:g}": _quality(rows, method, wanted, b) for b in BUDGETS},
        "seconds": float(np.median(seconds)),
    }


def _costs(rows: Sequence[Row], method: str, wanted: Target) -> tuple[list[float], Pairs]:
    """Costs to the target on a task, and beside ours."""
    mine = {row["seed"]: cost_to(row, wanted) for row in _longest(rows, method, method)}
    ours = {row["seed"]: cost_to(row, wanted) for row in _longest(rows, method, OURS)}
    return list(mine.values()), [(mine[seed], ours[seed]) for seed in mine if seed in ours]


def _longest(rows: Sequence[Row], method: str, of: str) -> list[Row]:
    """The rows ``of`` a method with the largest budget that ``method`` was run with."""
    budget = max(row["budget"] for row in rows if row["method"] == method)
    return [row for row in rows if row["method"] == of and row["budget"] == budget]


def _times_ours(pairs: Pairs) -> dict[str, Any]:
    """How many times ours the cost is, race by race; one where both miss the target."""
    times = sorted(1.0 if c == o else c / o if o > 0 else math.inf for c, o in pairs)
    low, high = interval(times) if times else (math.nan, math.nan)
    return {
        "races": len(times),
        "times": finite(float(np.median(times))) if times else None,
        "interval": [finite(low), finite(high)],
        **_won(pairs),
    }


def _won(pairs: Pairs) -> dict[str, Any]:
    """How often ours was the cheaper one, and a sign test."""
    cheaper, dearer = sum(c > o for c, o in pairs), sum(c < o for c, o in pairs)
    test = stats.binomtest(cheaper, cheaper + dearer).pvalue if cheaper + dearer else 1.0
    return {"ours_cheaper": cheaper, "ours_dearer": dearer, "p": float(test)}


def _quality(rows: Sequence[Row], method: str, wanted: Target, budget: float) -> dict[str, Any]:
    """Of those rows that were run with this budget, or with the smallest beyond it; and in pairs.

    ``ours_better`` and ``ours_worse`` count the races of the same seed in which what we name is the
    better and the worse one; ``p`` is of the sign test.
    """
    gaps = _gaps(rows, method, wanted, budget)
    if not gaps:
        return {"median": None, "interval": [None, None]}
    low, high = interval(list(gaps.values()))
    ours = _gaps(rows, OURS, wanted, budget)
    won = _won([(gaps[seed], ours[seed]) for seed in gaps if seed in ours])
    return {
        "median": finite(float(np.median(list(gaps.values())))),
        "interval": [finite(low), finite(high)],
        "ours_better": won["ours_cheaper"],
        "ours_worse": won["ours_dearer"],
        "p": won["p"],
    }


def _gaps(rows: Sequence[Row], method: str, wanted: Target, budget: float) -> dict[int, float]:
    """Seed → distance from the target's level, in tolerances."""
    enough = [r for r in rows if r["method"] == method and r["budget"] >= budget]
    smallest = min((row["budget"] for row in enough), default=budget)
    scores = {row["seed"]: at(row, budget * 1.02) for row in enough if row["budget"] == smallest}
    return {
        seed: (math.inf if s is None else mean(s) - wanted.level) / wanted.tolerance
        for seed, s in scores.items()
    }


def finite(value: float) -> float | None:
    """The value, for JSON; None if it is infinite."""
    return round(value, 4) if math.isfinite(value) else None


def ratio(found: dict[str, Any], method: str) -> tuple[float, list[float]]:
    """Median over tasks, and by task, of a method's median cost as a multiple of ours.

    Inf where only the method misses the target, 0 where only we do, left out where both do.
    """
    each = []
    for task, row in found["methods"][method].items():
        theirs, ours = row["cost"], found["methods"][OURS][task]["cost"]
        if theirs is not None or ours is not None:
            each.append(
                math.inf if theirs is None else 0.0 if ours is None else theirs / max(ours, 1e-9)
            )
    return (float(np.median(each)) if each else math.nan), each
