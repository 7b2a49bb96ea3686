"""What people can search a one-cycle recipe with, each as they would use it.

A method is a function of a :class:`~studies.bench.race.Race`; :data:`METHODS` has them all by
name. All search the same six values. Ranges differ:

wide    One range for every optimizer: what someone writes who does not want to think.
expert  Per optimizer, what someone with experience writes; fixed before any search was run.
ours    Whatever ``hpsched.suggest_onecycle`` does by itself (nothing is told to it).
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import Trial, TrialState

import hpsched
import hpsched.suggest
from hpsched import evidence, records
from hpsched.coordinates import STANDARD_RECIPE
from hpsched.errors import UsageError
from hpsched.ledger import next_move, read_runs
from hpsched.proposal import Proposal
from hpsched.records import Settings
from hpsched.study import enqueue_confirmation, make_sampler, proposed
from studies.bench import peers
from studies.bench.race import CHECKPOINTS, Race, scored

Method = Callable[[Race], Any]
Space = Mapping[str, tuple[float, float, bool]]

_SHAPE = {
    "div_factor": (5.0, 50.0, True),
    "pct_start": (0.1, 0.5, False),
    "base_momentum": (0.75, 0.9, False),
    "max_momentum": (0.9, 0.98, False),
}
WIDE: Space = {"max_lr": (1e-5, 10.0, True), "weight_decay": (1e-7, 1e-1, True), **_SHAPE}
_SGD: Space = {"max_lr": (1e-2, 2.0, True), "weight_decay": (1e-6, 1e-2, True), **_SHAPE}
_ADAM: Space = {"max_lr": (3e-4, 3e-2, True), "weight_decay": (1e-7, 1e-3, True), **_SHAPE}
_ADAMW: Space = {"max_lr": (3e-4, 3e-2, True), "weight_decay": (1e-3, 1.0, True), **_SHAPE}
EXPERT: Mapping[str, Space] = {"sgd": _SGD, "nesterov": _SGD, "adam": _ADAM, "adamw": _ADAMW}
#: What people leave weight decay at; torch's default for AdamW, fast.ai's old one for the others.
DECAY = {"sgd": 1e-4, "nesterov": 1e-4, "adam": 1e-4, "adamw": 1e-2}
DECADE = 3.32  # octaves
NO_VALLEY = 1e-3  # fastai's own default rate


def wide(race: Race) -> Space:
    """One range for every optimizer."""
    return WIDE


def expert(race: Race) -> Space:
    """An expert's, for the task's optimizer."""
    return EXPERT[race.task.optimizer]


# ------------------------------------------------------------------ Optuna


def optuna_search(
    race: Race,
    space_of: Callable[[Race], Space],
    sampler: Callable[[int], BaseSampler],
    pruner: Callable[[], BasePruner] = optuna.pruners.NopPruner,
    times: float = 1.0,
) -> None:
    """A plain Optuna study; the best trial is named. ``times`` enlarges the budget."""
    study = optuna.create_study(sampler=sampler(race.seed), pruner=pruner())
    space, race.times = space_of(race), times

    def objective(trial: Trial) -> float:
        recipe = suggest(trial, space)
        if isinstance(study.pruner, optuna.pruners.NopPruner):
            return race.train(recipe)

        def watch(step: int, score: float) -> None:
            trial.report(score, step * CHECKPOINTS // race.task.total_steps)
            if trial.should_prune():
                raise optuna.TrialPruned

        return race.train(recipe, watch=watch)

    def work() -> None:
        while not race.over:
            trial = study.ask()
            tell(study, trial, objective)
            done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            best = min(done, key=lambda t: t.value, default=None)  # type: ignore[arg-type, return-value]
            if best is not None:
                race.name(best.params)

    race.work(work)


def suggest(trial: Trial, space: Space) -> dict[str, float]:
    """Field → value, each suggested within its range."""
    return {
        field: trial.suggest_float(field, low, high, log=log)
        for field, (low, high, log) in space.items()
    }


def tell(study: Study, trial: Trial, objective: Callable[[Trial], float]) -> None:
    """Run the objective and tell the study what came of it."""
    try:
        study.tell(trial, objective(trial))
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)


def tpe(seed: int) -> BaseSampler:
    """Optuna's default."""
    return optuna.samplers.TPESampler(seed=seed)


def gp(seed: int) -> BaseSampler:
    """Optuna's Gaussian process."""
    return optuna.samplers.GPSampler(seed=seed, deterministic_objective=False)


def sobol(seed: int) -> BaseSampler:
    """A scrambled Sobol sequence."""
    return optuna.samplers.QMCSampler(seed=seed, warn_independent_sampling=False)


def hyperband() -> BasePruner:
    """From one checkpoint to all of them."""
    return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=CHECKPOINTS)


# ------------------------------------------------------------------ short runs first


def short_then_full(race: Race, space_of: Callable[[Race], Space], share: float = 1 / 9) -> None:
    """Many short complete cycles, then the best few in full (2307.15422): half the budget each."""
    space = space_of(race)
    draws = optuna.create_study(sampler=sobol(race.seed))
    short: list[tuple[float, dict[str, float]]] = []
    full: list[tuple[float, dict[str, float]]] = []

    def try_short() -> None:
        while race.cost < race.budget / 2:
            recipe = suggest(draws.ask(), space)
            short.append((race.train(recipe, share=share), recipe))

    def try_full() -> None:
        while short and not race.over:
            _, recipe = short.pop(0)
            full.append((race.train(recipe), recipe))
            race.name(min(full, key=lambda pair: pair[0])[1])

    race.work(try_short)
    short.sort(key=lambda pair: pair[0])
    race.work(try_full)


# ------------------------------------------------------------------ by hand, with a range test


def by_hand(race: Race, then: Callable[[Race, Space], None] | None = None) -> None:
    """A sweep as fastai's ``lr_find`` does it, its valley, and the standard recipe there.

    ``then`` searches on, in a decade around that rate.
    """
    (test,) = hpsched.suggest.find_lr(
        race.cycle,
        num_iter=100,
        start_lr=1e-7,
        replicates=1,
        seed=race.seed,
        weight_decays=(DECAY[race.task.optimizer],),
    )
    finite = [loss for loss in test.losses if math.isfinite(loss)]
    rate = peers.fastai("valley", test.lrs[: len(finite)], finite) or NO_VALLEY
    race.name({**STANDARD_RECIPE, "max_lr": rate, "weight_decay": DECAY[race.task.optimizer]})
    if then is not None:
        window = rate / math.sqrt(10), rate * math.sqrt(10)
        then(race, {**expert(race), "max_lr": (*window, True)})


# ------------------------------------------------------------------ what nobody can know

#: Of the grid's runs: neither a race's own seeds nor those that its recipes are scored with.
ORACLE_SEEDS = range(3_000_000, 3_000_005)
RATES = tuple(2.0 ** (half / 2) for half in range(-20, 5))  # 1e-3 … 4, half an octave apart
#: Times what people leave weight decay at.
DECAYS = (0.1, 1.0, 10.0, 100.0)


def oracle(race: Race, decays: Sequence[float] = (1.0,)) -> None:
    """The standard recipe at the best rate, and weight decay, of a grid on the test data.

    It costs nothing and is no method: it bounds what knowing these values beforehand is worth.
    """
    usual = DECAY[race.task.optimizer]
    race.name(
        min(
            (
                {**STANDARD_RECIPE, "max_lr": rate, "weight_decay": usual * times}
                for times in decays
                for rate in RATES
            ),
            key=lambda recipe: statistics.fmean(scored(race.task, recipe, ORACLE_SEEDS)),
        )
    )


# ------------------------------------------------------------------ hpsched


def hpsched_search(race: Race, rungs: int = 3, **settings: Any) -> Study:
    """A study as ``hpsched study create --cycles`` makes it, and workers as ``worker attach``."""
    told = Settings(objective="bench:task", seed=race.seed, cycles=race.budget, **settings)
    study = optuna.create_study(
        sampler=make_sampler(told),
        pruner=hpsched.CyclePruner(told.reduction_factor),
        study_name=f"bench-{race.seed}",
    )
    study.set_user_attr(records.SETTINGS, told.to_json())
    lock = threading.Lock()

    def named() -> None:
        try:
            race.name(hpsched.best(study).recipe)
        except UsageError:  # no full run yet
            race.name(proposed(study))

    def train(cycle: hpsched.Cycle) -> float:
        named()
        return race.cycle(cycle)

    def objective(trial: Trial) -> float:
        return hpsched.suggest_onecycle(trial, race.task.total_steps, rungs=rungs).run(train)

    def work() -> None:
        while True:
            with lock:
                runs = read_runs(study.get_trials(deepcopy=False))
                move = next_move(told, runs, study.direction)
                if move.what == "done":
                    return
                if move.confirms is not None:
                    enqueue_confirmation(study, move.confirms)
                study.sampler = make_sampler(told, len(runs))
                trial = study.ask()
            tell(study, trial, objective)
            named()

    race.work(work)
    return study


def shifted(race: Race, octaves: float) -> None:
    """hpsched with every proposal of its range tests moved: a wrong start must be left."""
    pool = evidence._pool

    def moved(tests: Any, total_steps: int | None) -> Proposal:
        return _moved(pool(tests, total_steps), 2.0**octaves)

    evidence._pool = moved  # type: ignore[assignment]  # a race has its process to itself
    try:
        hpsched_search(race)
    finally:
        evidence._pool = pool


def _moved(proposal: Proposal, factor: float) -> Proposal:
    """All of it, the divergence edge too: ``Proposal.moved`` would stop at the edge."""
    low, high = (rate * factor for rate in proposal.interval)
    return replace(
        proposal,
        centre=proposal.centre * factor,
        low=proposal.low * factor,
        high=proposal.high * factor,
        interval=(low, high),
        lr_diverged=proposal.lr_diverged and proposal.lr_diverged * factor,
    )


def every_trial_in_full(race: Race) -> None:
    """hpsched without short cycles."""
    hpsched_search(race, rungs=1)


METHODS: dict[str, Method] = {
    "hpsched": hpsched_search,
    "hpsched-no-range-test": partial(hpsched_search, range_tests=0),
    "hpsched-no-rungs": every_trial_in_full,
    "hpsched-no-confirmation": partial(hpsched_search, confirm_top=0),
    "hpsched-tpe": partial(hpsched_search, base_sampler="tpe"),
    **{
        f"hpsched-shift{octaves:+g}": partial(shifted, octaves=octaves)
        for octaves in (-DECADE, -2, -1, 1, 2, DECADE)
    },
    "tpe-wide": partial(optuna_search, space_of=wide, sampler=tpe),
    "tpe-expert": partial(optuna_search, space_of=expert, sampler=tpe),
    "hyperband-wide": partial(optuna_search, space_of=wide, sampler=tpe, pruner=hyperband),
    "hyperband-expert": partial(optuna_search, space_of=expert, sampler=tpe, pruner=hyperband),
    "median-wide": partial(
        optuna_search, space_of=wide, sampler=tpe, pruner=optuna.pruners.MedianPruner
    ),
    "median-expert": partial(
        optuna_search, space_of=expert, sampler=tpe, pruner=optuna.pruners.MedianPruner
    ),
    "gp-wide": partial(optuna_search, space_of=wide, sampler=gp),
    "gp-expert": partial(optuna_search, space_of=expert, sampler=gp),
    "sobol-expert-double": partial(optuna_search, space_of=expert, sampler=sobol, times=2.0),
    "short-then-full-expert": partial(short_then_full, space_of=expert),
    "by-hand": by_hand,
    "by-hand-then-tpe": partial(
        by_hand,
        then=lambda race, space: optuna_search(race, lambda _: space, tpe),
    ),
    "oracle-rate": oracle,
    "oracle-rate-and-decay": partial(oracle, decays=DECAYS),
}
