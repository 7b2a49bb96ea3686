"""Is the range test right? Best max_lr by grid on many tasks, against what every finder says.

    python -m studies.bench.calibration run                  # about an hour of two cores, resumable
    python -m studies.bench.calibration score --split tuning
    python -m studies.bench.calibration run --only-studies   # after a change of the rules …
    python -m studies.bench.calibration refresh docs/data/calibration-reporting.json

``run`` measures, and saves each measurement as it comes:

grid    The score of the standard recipe (div 25, pct_start 0.3, momentum 0.95/0.85, weight decay
        1e-4) at rates half an octave apart, ten seeds each. The *best set* of a task is the rates
        whose mean score is within one seed's standard deviation of the best mean.
sweeps  Twenty pre-stages of three range tests each (seeds and weight decays as in a study), all
        their raw losses to the end. Every rule, ours and the peers', reads these same sweeps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FixedTrial
from rich.console import Console
from rich.table import Table

import hpsched
from hpsched import evidence, records
from hpsched.coordinates import SETTLES, STANDARD_RECIPE
from hpsched.cycle import BLOCK
from hpsched.divergence import should_stop
from hpsched.errors import TrainingError, UsageError
from hpsched.lr_curve import RangeTest
from hpsched.proposal import pool
from hpsched.suggest import find_lr
from studies.bench.peers import peers, versions
from studies.bench.tasks import CALIBRATED, TASKS, Task

RESULTS = Path(__file__).parent / "results" / "calibration"
SCORINGS = Path(__file__).parent / "scorings.jsonl"
WEIGHT_DECAY = 1e-4
COARSE = range(-30, 8, 2)  # half-octaves: 3e-5 … 8
COARSE_SEEDS = range(2)
FINE_SEEDS = range(10)
REACH = 5  # half-octaves measured on either side of the best
PRE_STAGES = 20
_RULES = (
    "lr_curve",
    "proposal",
    "refine",
    "evidence",
    "coordinates",
    "sampler",
    "pruner",
    "prestage",
    "suggest",
)
SHARES = (9, 3)  # short cycles take total_steps / share
REPLICATES = 3

_NAMES = [task.name for task in CALIBRATED]

Row = dict[str, Any]


def _fingerprint() -> str:
    """Of the code that decides what a study believes: its results hold for this code alone."""
    folder = Path(hpsched.__file__).parent
    source = "".join((folder / f"{name}.py").read_text() for name in _RULES)
    return hashlib.blake2b(source.encode(), digest_size=6).hexdigest()


RULES = _fingerprint()


def rate(index: int) -> float:
    """The grid's rate with this index: half an octave apart, 1 at 0."""
    return float(2 ** (index / 2))


# ------------------------------------------------------------------ measuring


def complete_run(task: Task, max_lr: float, seed: int, steps: int) -> float:
    """Score of the standard recipe, a cycle of ``steps``; inf where it diverged."""
    values = {**STANDARD_RECIPE, "max_lr": max_lr, "weight_decay": WEIGHT_DECAY}
    recipe = hpsched.suggest_onecycle(FixedTrial(values), total_steps=steps, rungs=1)
    try:
        return recipe.train(task.train, steps, seed)
    except TrainingError:
        return math.inf


def _measure(job: Row) -> Row:
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task = TASKS[job["task"]]
    if job["kind"] == "grid":
        steps = round(task.total_steps / job.get("share", 1))
        return {**job, "value": complete_run(task, rate(job["rate"]), job["seed"], steps)}
    if job["kind"] == "study":
        return {**job, **_study(task, job["seed"])}
    tests = find_lr(task.train, stop_diverged=False, replicates=REPLICATES, seed=job["seed"])
    keep = ("losses", "weight_decay", "momentum", "seed", "optimizer")
    found = [{name: getattr(test, name) for name in keep} for test in tests]
    for row in found:
        row["losses"] = [float(f"{loss:.6g}") for loss in row["losses"]]
    return {**job, "lrs": [float(f"{lr:.6g}") for lr in tests[0].lrs], "sweeps": found}


def _study(task: Task, seed: int) -> Row:
    """What the first trials of a real study believe: range tests, then the refining cycles."""
    study = optuna.create_study(
        sampler=hpsched.OneCycleSampler(seed=seed), pruner=hpsched.CyclePruner(), study_name="bench"
    )
    while not any(trial.user_attrs.get(records.REFINES) == SETTLES for trial in study.trials):
        study.optimize(
            lambda trial: hpsched.suggest_onecycle(trial, task.total_steps).run(task.train),
            n_trials=1,
        )
    recipe = next(records.recipe_spaces(study.trials[0]))
    found = evidence.of(study.trials, recipe, study.directions)
    assert found is not None
    sweeps = sum(sweep.steps for sweep in evidence.sweeps(study.trials))
    cycles = sum(cycle.steps for trial in study.trials for cycle in records.cycles(trial))
    row: Row = {
        "rules": RULES,
        "sweep_cost": sweeps / task.total_steps,
        "cycle_cost": cycles / task.total_steps,
    }
    for name, proposal in (("prior", found.prior), ("refined", found.proposal)):
        low, high = proposal.interval
        row[name] = {
            "centre": proposal.centre,
            "window": (proposal.low, proposal.high),
            "interval": (low, high),
            "reliable": proposal.reliable,
            "reason": proposal.reason,
        }
    return row


def _key(row: Row) -> tuple[Any, ...]:
    return row["kind"], row.get("rate"), row.get("share"), row["seed"], row.get("rules")


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

    def grid(self, share: int | None = None) -> dict[int, list[float]]:
        """Rate's index → scores by seed, of full cycles or of this share of their steps."""
        found: dict[int, list[float]] = {}
        rows = [r for r in self.rows if r["kind"] == "grid" and r.get("share") == share]
        for row in sorted(rows, key=lambda r: r["seed"]):
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
    near = results.missing(_grid_jobs(task, range(min(good) - 2, max(good) + 3), FINE_SEEDS))
    if near or task.split == "reporting":
        return near
    around = range(min(good) - REACH, max(good) + REACH + 1)
    short = [
        {**job, "share": share} for job in _grid_jobs(task, around, FINE_SEEDS) for share in SHARES
    ]
    return results.missing(short)


def _grid_jobs(task: Task, indices: Iterable[int], seeds: Iterable[int]) -> list[Row]:
    return [
        {"task": task.name, "kind": "grid", "rate": index, "seed": seed}
        for index in indices
        for seed in seeds
    ]


def run(names: Sequence[str], processes: int, studies: bool = True, rest: bool = True) -> None:
    """Measure all that is missing; interrupt and start again at will.

    Args:
        names: Of the tasks.
        processes: To measure in.
        studies: Also what depends on the rules.
        rest: Also what does not.
    """
    with ProcessPoolExecutor(processes) as pool:
        for name in names:
            task, results = TASKS[name], Results(name)
            while rest and (jobs := _wanted(task, results)):
                _measure_all(pool, jobs, results)
            if studies:
                jobs = [
                    {"task": name, "kind": "study", "seed": seed, "rules": RULES}
                    for seed in range(PRE_STAGES)
                ]
                _measure_all(pool, results.missing(jobs), results)
            print(f"{name}: {best_set(results.grid()) if rest else 'studies done'}", flush=True)


def _measure_all(pool: ProcessPoolExecutor, jobs: Sequence[Row], results: Results) -> None:
    for done in as_completed([pool.submit(_measure, job) for job in jobs]):
        results.add(done.result())


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


# ------------------------------------------------------------------ scoring


def stopped(losses: Sequence[float]) -> Sequence[float]:
    """The losses that our own sweep would have seen: it looks at each block of ten."""
    for seen in (1, *range(BLOCK, len(losses), BLOCK)):
        if should_stop(losses[:seen]):
            return losses[:seen]
    return losses


def pre_stages(row: Row) -> list[RangeTest]:
    """The range tests of one pre-stage, as hpsched would have them."""
    return [
        RangeTest(lrs=row["lrs"], **{**sweep, "losses": stopped(sweep["losses"])})
        for sweep in row["sweeps"]
    ]


def _middle(rates: Iterable[float | None]) -> float | None:
    """Median of what was suggested, in log rate; None when fewer than half suggest anything."""
    every = list(rates)
    given = [math.log(rate) for rate in every if rate is not None and 0 < rate < math.inf]
    return math.exp(statistics.median(given)) if 2 * len(given) > len(every) else None


def suggestions(task: Task, row: Row) -> dict[str, float | None]:
    """Rule → max_lr for one pre-stage: ours pooled, every other rule the median of its three."""
    tests = pre_stages(row)
    ours = pool(tests, task.total_steps)
    found: dict[str, float | None] = {"hpsched": ours.centre if ours.reliable else None}
    for rule in tests[0].rules:
        name = "hpsched, one sweep" if rule == "suggestion" else f"our {rule}"
        found[name] = _middle(
            test.rules[rule] for test in tests[: 1 if rule == "suggestion" else 3]
        )
    for name, peer in peers().items():
        found[name] = _middle(
            peer(row["lrs"][: len(sweep["losses"])], sweep["losses"]) for sweep in row["sweeps"]
        )
    return found


def _covers(best: BestSet, window: Sequence[float]) -> bool:
    return window[0] <= rate(best.indices[-1]) and rate(best.indices[0]) <= window[1]


def _holds(best: BestSet, window: Sequence[float]) -> bool:
    return window[0] <= rate(best.indices[0]) and rate(best.indices[-1]) <= window[1]


def _octaves(window: Sequence[float]) -> float:
    return math.log2(window[1] / window[0])


def _summary(best: BestSet, centres: Sequence[float | None]) -> Row:
    """Distance from the best set over pre-stages; None where a rule suggested nothing at all."""
    given = [centre for centre in centres if centre is not None]
    errors = [best.error(centre) for centre in given]
    return {
        "given": len(given) / len(centres),
        "right": sum(error == 0 for error in errors) / len(centres),
        "median": statistics.median(map(abs, errors)) if errors else None,
        "worst": max(map(abs, errors)) if errors else None,
        "bias": statistics.fmean(errors) if errors else None,
        "spread": statistics.pstdev(math.log2(c) for c in given) if given else None,
    }


def _windows(best: BestSet, proposals: Sequence[Row]) -> Row:
    """How often the window touches the best set and how often it holds all of it; its width."""
    return {
        "covers": statistics.fmean(_covers(best, p["window"]) for p in proposals),
        "holds": statistics.fmean(_holds(best, p["window"]) for p in proposals),
        "width": statistics.median(_octaves(p["window"]) for p in proposals),
    }


def _interval_covers(proposals: Sequence[Row]) -> float | None:
    """How often the 90 % interval of one pre-stage holds the mean centre of all reliable ones."""
    sure = [p for p in proposals if p["reliable"]]
    if not sure:
        return None
    centre = statistics.fmean(math.log2(p["centre"]) for p in sure)
    inside = [math.log2(p["interval"][0]) <= centre <= math.log2(p["interval"][1]) for p in sure]
    return statistics.fmean(inside)


def score_task(task: Task) -> Row:
    """All rules on one task."""
    results = Results(task.name)
    best = best_set(results.grid())
    by_rule: dict[str, list[float | None]] = {}
    for row in (row for row in results.rows if row["kind"] == "sweep"):
        for name, centre in suggestions(task, row).items():
            by_rule.setdefault(name, []).append(centre)
    found = {
        "task": task.name,
        "best": [rate(best.indices[0]), rate(best.indices[-1])],
        "noise": best.noise,
        "rules": {name: _summary(best, centres) for name, centres in by_rule.items()},
    }
    return _with_studies(found, best)


def _with_studies(found: Row, best: BestSet) -> Row:
    """The scores of a task with those of the studies that were run with these rules."""
    studies = [row for row in Results(found["task"]).rows if row.get("rules") == RULES]
    if len(studies) < PRE_STAGES:
        raise UsageError(f"{found['task']} was not run with these rules: calibration run --tasks …")
    swept, refined = ([row[part] for row in studies] for part in ("prior", "refined"))
    theirs = {
        "hpsched, in a study": [p["centre"] if p["reliable"] else None for p in swept],
        "hpsched, refined": [p["centre"] for p in refined],
    }
    ours = {name: _summary(best, centres) for name, centres in theirs.items()}
    return {
        **found,
        "rules": {**found["rules"], **ours},
        "sweeps": {**_windows(best, swept), "interval covers": _interval_covers(swept)},
        "refined": {
            **_windows(best, refined),
            "sweep cost": statistics.fmean(row["sweep_cost"] for row in studies),
            "cycle cost": statistics.fmean(row["cycle_cost"] for row in studies),
        },
    }


def score(split: str) -> Row:
    """Score all tasks of a split, and log it: reporting tasks only rarely."""
    return _scored(split, [score_task(task) for task in CALIBRATED if task.split == split])


def refresh(earlier: Row) -> Row:
    """Earlier scores with studies of these rules: grid and sweeps do not depend on rules."""
    found = []
    for row in earlier["tasks"]:
        low, high = (round(2 * math.log2(edge)) for edge in row["best"])
        best = BestSet(tuple(range(low, high + 1)), math.nan, row["noise"])
        found.append(_with_studies(row, best))
    return _scored(earlier["split"], found)


def _scored(split: str, found: Sequence[Row]) -> Row:
    """Over all tasks, and logged."""
    over_tasks = {}
    for name in found[0]["rules"]:
        rows = [row["rules"][name] for row in found if row["rules"][name]["median"] is not None]
        over_tasks[name] = {
            "median": statistics.median(row["median"] for row in rows),
            "mean": statistics.fmean(row["median"] for row in rows),
            "worst": max(row["worst"] for row in rows),
            "given": statistics.fmean(row["rules"][name]["given"] for row in found),
            "right": statistics.fmean(row["rules"][name]["right"] for row in found),
            "spread": statistics.median(row["spread"] for row in rows),
        }
    whole = {"split": split, "rules": over_tasks, "tasks": found, "versions": versions()}
    _log(whole)
    return whole


def _log(whole: Row) -> None:
    """One line per scoring, so that nobody can score the reporting tasks unseen."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    names = ("hpsched", "hpsched, in a study", "hpsched, refined")
    ours = {name: whole["rules"][name] for name in names}
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "hpsched"], check=False)
    commit += "-dirty" if changed.returncode else ""
    line = {"date": f"{datetime.now():%Y-%m-%d %H:%M}", "commit": commit, "split": whole["split"]}
    with SCORINGS.open("a") as file:
        file.write(json.dumps({**line, "rules": ours}) + "\n")


def rules_table(whole: Row) -> list[list[str]]:
    """Head and a row per rule, the best first."""
    rows = [["rule", "median error", "mean", "worst run", "right", "gave one", "sd over seeds"]]
    for name, row in sorted(whole["rules"].items(), key=lambda item: item[1]["mean"]):
        numbers = [f"{row[key]:.2f}" for key in ("median", "mean", "worst")]
        shares = [f"{row[key]:.0%}" for key in ("right", "given")]
        rows.append([name, *numbers, *shares, f"{row['spread']:.2f}"])
    return rows


def tasks_table(whole: Row) -> list[list[str]]:
    """Head and a row per task: what hpsched's sweeps say, and what the refined study says."""
    half = ["error", "worst", "in window", "width"]
    rows = [["task", "best max_lr", *half, "interval", *half, "cost"]]
    for row in whole["tasks"]:
        cells: list[str] = []
        for name, part in (("hpsched, in a study", "sweeps"), ("hpsched, refined", "refined")):
            errors, windows = row["rules"][name], row[part]
            given = errors["median"] is not None
            cells += [f"{errors['median']:.2f}", f"{errors['worst']:.2f}"] if given else ["–", "–"]
            cells += [f"{windows['covers']:.0%}", f"{windows['width']:.1f}"]
            if part == "sweeps":
                sure = windows["interval covers"]
                cells.append("–" if sure is None else f"{sure:.0%}")
        cost = f"{row['refined']['sweep cost']:.1f} + {row['refined']['cycle cost']:.1f}"
        best = " … ".join(dict.fromkeys(f"{rate:.2g}" for rate in row["best"]))
        rows.append([row["task"], best, *cells, cost])
    return rows


def _show(whole: Row, markdown: bool) -> None:
    for head, *rows in (rules_table(whole), tasks_table(whole)):
        if markdown:
            lines = [head, ["---"] * len(head), *rows]
            print("\n".join(f"| {' | '.join(line)} |" for line in lines), end="\n\n")
            continue
        table = Table(*head)
        for row in rows:
            table.add_row(*row)
        Console(width=150).print(table)


def main() -> None:
    """Run or score, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="measure what is missing")
    measure.add_argument("--tasks", nargs="*", choices=_NAMES, default=_NAMES, metavar="TASK")
    measure.add_argument("--processes", type=int, default=2)
    measure.add_argument(
        "--no-studies", action="store_true", help="only what does not depend on the rules"
    )
    measure.add_argument("--only-studies", action="store_true", help="only what does")
    judge = commands.add_parser("score", help="errors of all rules, in octaves")
    judge.add_argument("--split", choices=["tuning", "reporting"], required=True)
    judge.add_argument("--output", type=Path, help="write the scores as JSON")
    judge.add_argument("--markdown", action="store_true", help="print tables for the docs")
    again = commands.add_parser("refresh", help="scores with studies of the rules as they are")
    again.add_argument("scores", type=Path, help="JSON that score wrote; it is written anew")
    again.add_argument("--markdown", action="store_true", help="print tables for the docs")
    args = parser.parse_args()
    if args.command == "run":
        run(args.tasks, args.processes, not args.no_studies, not args.only_studies)
        return
    if args.command == "refresh":
        found, output = refresh(json.loads(args.scores.read_text())), args.scores
    else:
        found, output = score(args.split), args.output
    _show(found, args.markdown)
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
