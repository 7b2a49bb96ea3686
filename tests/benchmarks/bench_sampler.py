"""What proposing a trial costs: OneCycleSampler against Optuna's TPE, in the same study.

    python tests/benchmarks/bench_sampler.py [--sqlite] [--repeats 25] [--profile] [trials ...]

A proposal is ``study.ask()`` and all six values: through ``suggest_onecycle`` with our sampler, by
six ``suggest_float`` with TPE. Per study (default: of 1,000 and of 10,000 trials) the samplers take
turns, so that a change of the machine's pace meets all of them, each order as often as the other.
Shown are the medians in milliseconds and the median of the paired ratios ours/TPE with its
quartiles. "first" is our first proposal in a process, which reads every record of the study.

The studies look like those that ``OneCycle.run`` leaves: two contexts, range tests and refining
trials in each, rungs with their curves, two of three trials pruned at each rung, a few diverged.
``--profile`` shows where the time of our proposals goes instead.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import math
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

import hpsched
from hpsched import records
from hpsched.records import CycleRecord, SweepRecord
from hpsched.suggest import suggest_onecycle

STEPS = 900
BEST_LR = 0.3
CONTEXTS = (64, 256)
SWEEPS = 3
SURVIVE = 1 / 3
DIVERGE = 0.03
Rng = np.random.Generator


def space(context: int) -> tuple[dict[str, Any], dict[str, optuna.distributions.FloatDistribution]]:
    """The recipe record of a trial, and its parameters' distributions."""
    trial = optuna.trial.FixedTrial({})
    recipe = suggest_onecycle(trial, STEPS, context={"batch_size": context})._recipe
    return recipe.to_json(), {field: recipe.distribution(field) for field in records.FIELDS}


def sweep(name: str, context: int, rng: Rng) -> dict[str, Any]:
    """A range test whose loss falls about BEST_LR and explodes an octave or two above."""
    rates = np.geomspace(1e-6, 10.0, 100)
    octaves = np.log2(rates / BEST_LR)
    losses = 2.3 - 1.5 / (1 + np.exp(-(octaves + 2))) + np.exp(np.minimum(3 * octaves - 5, 20))
    losses += 0.02 * rng.standard_normal(100)
    return SweepRecord(
        name=name,
        context_key=f"batch_size={context}",
        lrs=tuple(float(f"{rate:.6g}") for rate in rates),
        losses=tuple(records.significant(loss) for loss in losses),
        momentum=0.85,
        weight_decay=1e-4,
        seed=0,
        optimizer="SGD",
        momentum_name="momentum",
        steps=100,
        seconds=1.0,
    ).to_json()


def cycle(name: str, rung: int, steps: int, value: float | None) -> dict[str, Any]:
    curve = [(step, 1.0 - step / 1e4) for step in np.linspace(1, steps, 64).astype(int).tolist()]
    return CycleRecord(
        name=name,
        rung=rung,
        steps=steps,
        total_steps=STEPS,
        seconds=1.0,
        seed=0,
        value=value,
        diverged="the loss exploded" if value is None else None,
        curves={"train_loss": curve},  # type: ignore[dict-item]
    ).to_json()


def recipe_values(rng: Rng, role: int | None) -> dict[str, float]:
    max_lr = BEST_LR * 2 ** rng.normal(0, 0.6)
    if role is not None:
        kappa, shape = 0.3, {"div_factor": 25.0, "pct_start": 0.3}
        momenta = {"base_momentum": 0.85, "max_momentum": 0.95}
    else:
        kappa = math.exp(rng.uniform(math.log(0.01), math.log(5)))
        shape = {"div_factor": rng.uniform(5, 50), "pct_start": rng.uniform(0.1, 0.5)}
        momenta = {"base_momentum": rng.uniform(0.75, 0.9), "max_momentum": rng.uniform(0.9, 0.98)}
    decay = kappa / (max_lr / (1 - momenta["base_momentum"]) * STEPS)
    return {"max_lr": max_lr, **shape, **momenta, "weight_decay": decay}


def score(params: dict[str, float], steps: int, rng: Rng) -> float:
    bowl = 0.02 * math.log2(params["max_lr"] / BEST_LR) ** 2
    return 0.1 + bowl + 0.3 * (1 - steps / STEPS) + 0.01 * float(rng.standard_normal())


def finished(number: int, rng: Rng, spaces: dict[int, Any]) -> FrozenTrial:
    """One trial as ``OneCycle.run`` leaves it."""
    context, turn = CONTEXTS[number % len(CONTEXTS)], number // len(CONTEXTS)
    recipe, distributions = spaces[context]
    roles = 4 if context == CONTEXTS[0] else 2
    role = (turn if roles == 4 else 3 * turn) if turn < roles else None
    params = recipe_values(rng, role)
    attrs: dict[str, Any] = {records.RECIPE: recipe, records.ORIGIN: number}
    if role is not None:
        attrs[records.REFINES] = role
    if turn < SWEEPS:
        attrs[records.RANGE_TEST] = sweep(f"{number}-sweep", context, rng)
    values: dict[int, float] = {}
    state = TrialState.COMPLETE
    for rung, steps in recipe["rungs"]:
        lost = role is None and rng.random() < DIVERGE
        value = None if lost else score(params, steps, rng)
        attrs[f"{records.RUNG}{rung}"] = cycle(f"{number}-rung{rung}", rung, steps, value)
        if value is None:
            attrs[records.DIVERGED] = "the loss exploded"
            state = TrialState.PRUNED
            break
        values[rung] = value
        if steps < STEPS and role is None and rng.random() > SURVIVE:
            state = TrialState.PRUNED
            break
    return optuna.create_trial(
        state=state,
        value=values[max(values)] if state == TrialState.COMPLETE else None,
        params=params,
        distributions=distributions,
        user_attrs=attrs,
        intermediate_values=values,
        constraints={records.CONSTRAINT: 1.0} if records.DIVERGED in attrs else None,
    )


@contextmanager
def filled(trials: int, sqlite: bool) -> Iterator[optuna.Study]:
    """A study of that many trials."""
    rng, spaces = np.random.default_rng(0), {context: space(context) for context in CONTEXTS}
    with tempfile.TemporaryDirectory() as folder:
        storage = f"sqlite:///{Path(folder) / 'study.db'}" if sqlite else None
        study = optuna.create_study(storage=storage)
        study.add_trials(finished(number, rng, spaces) for number in range(trials))
        yield study


def ours(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    context = {"batch_size": CONTEXTS[trial.number % len(CONTEXTS)]}
    suggest_onecycle(trial, STEPS, context=context).to_dict()
    return trial


def theirs(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    for name, dist in DISTRIBUTIONS.items():
        trial.suggest_float(name, dist.low, dist.high, log=dist.log)
    return trial


DISTRIBUTIONS = space(CONTEXTS[0])[1]
Propose = Callable[[optuna.Study], optuna.Trial]
SAMPLERS: dict[str, tuple[Callable[[], Any], Propose]] = {
    "ours": (lambda: hpsched.OneCycleSampler(seed=0), ours),
    "TPE": (lambda: optuna.samplers.TPESampler(seed=0), theirs),
    "ours, univariate": (
        lambda: hpsched.OneCycleSampler(optuna.samplers.TPESampler(multivariate=False, seed=0)),
        ours,
    ),
    "TPE, univariate": (lambda: optuna.samplers.TPESampler(multivariate=False, seed=0), theirs),
}


def milliseconds(study: optuna.Study, sampler: Any, propose: Propose) -> float:
    study.sampler = sampler
    started = time.perf_counter()
    trial = propose(study)
    elapsed = (time.perf_counter() - started) * 1e3
    study.tell(trial, state=TrialState.FAIL)  # outside the clock; samplers leave it out
    return elapsed


def ratio(ours: list[float], theirs: list[float]) -> str:
    paired = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(paired, n=4)
    return f"{middle:5.2f} [{low:.2f}, {high:.2f}]"


def measure(study: optuna.Study, repeats: int) -> tuple[float, dict[str, list[float]]]:
    """Our first proposal, and every sampler's times once all of them are warm."""
    made = {name: (build(), propose) for name, (build, propose) in SAMPLERS.items()}
    first = milliseconds(study, *made["ours"])
    times: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(repeats + 2):
        order = list(made) if repeat % 2 else list(reversed(made))
        for name in order:
            elapsed = milliseconds(study, *made[name])
            if repeat >= 2:
                times[name].append(elapsed)
    return first, times


def profile(study: optuna.Study, repeats: int) -> None:
    sampler = hpsched.OneCycleSampler(seed=0)
    milliseconds(study, sampler, ours)  # reads the records
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(repeats):
            milliseconds(study, sampler, ours)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("trials", nargs="*", type=int, default=[1_000, 10_000])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--sqlite", action="store_true", help="in a SQLite file, not in memory")
    parser.add_argument("--profile", action="store_true", help="where our time goes")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = "SQLite" if options.sqlite else "in memory"
    print(f"optuna {optuna.__version__}, {storage}, ms per proposal, median of {options.repeats}")
    print(f"{'trials':>7}  {'base':<13}{'ours':>8}{'TPE':>8}{'ratio':>20}{'first':>9}")
    for trials in options.trials:
        with filled(trials, options.sqlite) as study:
            if options.profile:
                profile(study, options.repeats)
                continue
            gc.collect()
            first, times = measure(study, options.repeats)
            for base, suffix in (("default", ""), ("univariate", ", univariate")):
                mine, tpe = times["ours" + suffix], times["TPE" + suffix]
                middles = f"{statistics.median(mine):>8.2f}{statistics.median(tpe):>8.2f}"
                shown = f"{first:>9.1f}" if not suffix else ""
                print(f"{trials:>7}  {base:<13}{middles}{ratio(mine, tpe):>20}{shown}", flush=True)


if __name__ == "__main__":
    main()
