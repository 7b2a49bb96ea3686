"""Studies that the tests of figures and report share; each is made once."""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any

import numpy as np
import optuna
from fake_training import FakeTraining
from optuna.trial import FrozenTrial

import hpsched
from hpsched import records
from hpsched.summary import Summary, summarise

STEPS = 900
HOSTILE = '</title><script>alert("name")</script><img src=http://example.org/x onerror=alert(1)>'


def new_study(name: str = "digits", **more: Any) -> optuna.Study:
    sampler, pruner = hpsched.OneCycleSampler(seed=0), hpsched.CyclePruner()
    return optuna.create_study(study_name=name, sampler=sampler, pruner=pruner, **more)


def objective(trial: optuna.Trial) -> float:
    train = FakeTraining(horizon=STEPS)

    def logging(cycle: hpsched.Cycle) -> float:
        cycle.log(**{"val<error>": 0.9})
        value = train(cycle)
        cycle.log(**{"val<error>": value})
        return value if trial.study.direction == optuna.study.StudyDirection.MINIMIZE else 1 - value

    return hpsched.suggest_onecycle(trial, total_steps=STEPS).run(logging)


@cache
def confirmed() -> Summary:
    """Twelve trials, then four confirmations."""
    study = new_study()
    study.optimize(objective, n_trials=12)
    study.optimize(objective, n_trials=hpsched.confirm(study, top=2, seeds=2))
    return summarise(study)


@cache
def maximised() -> Summary:
    """Eight trials of a study to maximise, nothing confirmed."""
    study = new_study(direction="maximize")
    study.optimize(objective, n_trials=8)
    return summarise(study)


@cache
def empty() -> Summary:
    """No trial, and a name that would be code if it were not escaped."""
    return summarise(new_study(HOSTILE))


@cache
def mixed() -> Summary:
    """Contexts, parameters of the user's own, diverged and failed trials; not finished."""
    study = new_study("mixed")

    def own(trial: optuna.Trial) -> float:
        norm = trial.suggest_categorical("norm<b>", ["batch", HOSTILE])
        trial.suggest_int("layers", 1, 4)
        if trial.number == 9:
            trial.set_user_attr(records.ERROR, HOSTILE)
            raise RuntimeError(HOSTILE)
        recipe = hpsched.suggest_onecycle(
            trial, total_steps=STEPS, context={"norm": norm}, range_test=trial.number % 4 > 0
        )
        return recipe.run(FakeTraining(best_lr=0.01 if norm == "batch" else 0.4, horizon=STEPS))

    for rate in (8.0, 10.0):
        study.enqueue_trial({"max_lr": rate, "norm<b>": HOSTILE})
    study.optimize(own, n_trials=14, catch=(RuntimeError,))
    return summarise(study)


@cache
def large(trials: int = 10_000) -> Summary:
    """As many trials: those of :func:`mixed` over and over, each moved a little at random."""
    source = [run.trial for run in mixed().runs if run.trial.state.is_finished() and run.cycles]
    rng = np.random.default_rng(0)
    study = new_study("large")
    study.add_trials([_moved(source[n % len(source)], n, rng) for n in range(trials)])
    return summarise(study)


def _moved(trial: FrozenTrial, number: int, rng: np.random.Generator) -> FrozenTrial:
    """The trial as another of this number: other values, runs and times, near its own."""
    noise = 0.02 * float(rng.standard_normal())
    attrs = dict(trial.user_attrs)
    for key in [key for key in attrs if key.startswith(records.RUNG)]:
        value = attrs[key]["value"]
        moved = None if value is None else value + noise
        curves = attrs[key]["curves"] if number % 10 == 0 else {}  # they cost this test time only
        name = f"{number}-{key}"
        attrs[key] = {**attrs[key], "name": name, "value": moved, "curves": curves}
    if number > 40:  # a study has a handful of range tests and refining trials per context
        attrs.pop(records.RANGE_TEST, None)
        attrs.pop(records.REFINES, None)
    params = dict(trial.params)
    for name, space in trial.distributions.items():
        if isinstance(space, optuna.distributions.FloatDistribution):
            near = params[name] * float(np.exp(0.5 * rng.standard_normal()))
            params[name] = min(max(near, space.low), space.high)
    start = trial.datetime_start
    assert start is not None
    return FrozenTrial(
        number=number,
        state=trial.state,
        value=None,
        values=None if trial.values is None else [value + noise for value in trial.values],
        datetime_start=start + timedelta(minutes=number),
        datetime_complete=start + timedelta(minutes=number + 1),
        params=params,
        distributions=trial.distributions,
        user_attrs=attrs,
        system_attrs=trial.system_attrs,
        intermediate_values={k: v + noise for k, v in trial.intermediate_values.items()},
        trial_id=number,
    )
