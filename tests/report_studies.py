"""Studies that the tests of figures and report share; each is made once."""

from __future__ import annotations

from functools import cache
from typing import Any

import optuna
from fake_training import FakeTraining

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
        return recipe.run(FakeTraining(best_lr=0.01 if norm == "batch" else 0.3, horizon=STEPS))

    for rate in (8.0, 10.0):
        study.enqueue_trial({"max_lr": rate, "norm<b>": HOSTILE})
    study.optimize(own, n_trials=14, catch=(RuntimeError,))
    return summarise(study)
