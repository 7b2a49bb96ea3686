"""CyclePruner: same rung, complete cycles, nothing else."""

from __future__ import annotations

import math
from typing import Any

import optuna
import pytest
from fake_training import FakeTraining
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

import hpsched
from hpsched import records
from hpsched.errors import UsageError
from hpsched.pruner import climbs


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (1.0, [], True),  # the first always climbs
        (1.0, [2.0], True),
        (2.0, [1.0], False),
        (2.0, [1.0, 3.0, 3.0, 3.0, 3.0], True),  # 2 of 6 places
        (3.0, [1.0, 2.0, 4.0, 4.0, 4.0], False),
        (math.inf, [], False),
        (1.0, [math.inf, math.inf], True),
        (1.0, [1.0, 1.0, 1.0], True),  # a tie does not lose
    ],
)
def test_climbs(own: float, others: list[float], expected: bool) -> None:
    assert climbs(own, others, 3) is expected


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40, unique=True), st.integers(2, 5))
def test_about_one_in_eta_climbs(values: list[float], eta: int) -> None:
    climbing = [v for i, v in enumerate(values) if climbs(v, values[:i] + values[i + 1 :], eta)]
    assert len(climbing) == max(1, len(values) // eta)
    assert min(values) in climbing


def run(values: dict[tuple[int, int], float], direction: str = "minimize") -> optuna.Study:
    """Trials that report ``values[trial, steps]``."""
    study = optuna.create_study(
        direction=direction,
        sampler=hpsched.OneCycleSampler(optuna.samplers.TPESampler(seed=0)),
        pruner=hpsched.CyclePruner(3),
    )

    def objective(trial: optuna.Trial) -> float:
        def train(cycle: hpsched.Cycle) -> float:
            FakeTraining()(cycle)
            return values[trial.number, cycle.total_steps]

        return hpsched.suggest_onecycle(trial, total_steps=900, range_test=False).run(train)

    study.optimize(objective, n_trials=len({number for number, _ in values}))
    return study


VALUES = {
    (0, 100): 0.5, (0, 300): 0.4, (0, 900): 0.30,
    (1, 100): 0.6, (1, 300): 0.1, (1, 900): 0.10,  # better later, but pruned at the first rung
    (2, 100): 0.4, (2, 300): 0.5, (2, 900): 0.20,  # loses at the second
    (3, 100): 0.3, (3, 300): 0.3, (3, 900): 0.25,
}  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
def test_trials_are_compared_at_the_same_rung(sign: int) -> None:
    study = run(
        {key: sign * value for key, value in VALUES.items()},
        "minimize" if sign == 1 else "maximize",
    )
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "PRUNED", "COMPLETE"]
    assert [t.last_step for t in study.trials] == [2, 0, 1, 2]
    assert study.best_value == pytest.approx(sign * 0.25)


def test_trials_that_report_by_themselves_are_never_pruned() -> None:
    study = optuna.create_study(pruner=hpsched.CyclePruner())

    def objective(trial: optuna.Trial) -> float:
        for step in range(5):
            trial.report(trial.number, step)
            assert not trial.should_prune()
        return trial.number

    study.optimize(objective, n_trials=6)
    assert all(t.state == TrialState.COMPLETE for t in study.trials)


def test_diverged_counts_as_worst_and_is_no_good_trial_for_tpe() -> None:
    def objective(trial: optuna.Trial) -> float:
        def train(cycle: hpsched.Cycle) -> float:
            value = FakeTraining()(cycle)
            return math.nan if trial.number == 1 and cycle.total_steps == 300 else value

        if trial.number == 1:
            return hpsched.suggest_onecycle(trial, total_steps=900, range_test=False).run(
                lambda cycle: train(cycle) if cycle.total_steps > 100 else -1 + 0 * train(cycle)
            )
        return hpsched.suggest_onecycle(trial, total_steps=900, range_test=False).run(train)

    study = optuna.create_study(
        sampler=hpsched.OneCycleSampler(optuna.samplers.TPESampler(seed=0)),
        pruner=hpsched.CyclePruner(3),
    )
    study.optimize(objective, n_trials=3)
    diverged = study.trials[1]
    assert diverged.state == TrialState.PRUNED
    assert "nan" in diverged.user_attrs[records.DIVERGED]
    assert diverged.constraints == {records.CONSTRAINT: 1.0}
    assert set(diverged.params) == set(records.FIELDS)
    assert diverged.user_attrs["hpsched:rung:1"]["value"] is None
    assert study.best_trial.number != 1


def test_a_loss_that_explodes_ends_the_trial_at_once() -> None:
    training = FakeTraining(best_lr=0.01)
    study = optuna.create_study(
        sampler=hpsched.OneCycleSampler(seed=0), pruner=hpsched.CyclePruner()
    )
    study.optimize(
        lambda t: hpsched.suggest_onecycle(t, total_steps=900, max_lr=5.0).run(training), n_trials=1
    )
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["hpsched:rung:0"]["steps"] < 100
    assert trial.user_attrs["hpsched:rung:0"]["diverged"]


def test_eta_below_two_is_refused() -> None:
    with pytest.raises(UsageError, match="reduction_factor=1"):
        hpsched.CyclePruner(1)


@pytest.mark.parametrize(
    "pruner",
    [
        optuna.pruners.MedianPruner(),
        optuna.pruners.SuccessiveHalvingPruner(min_resource=1),
        optuna.pruners.NopPruner(),
        optuna.pruners.HyperbandPruner(min_resource=1, max_resource=3),
    ],
)
def test_optunas_pruners_work_on_rungs_too(pruner: Any) -> None:
    study = optuna.create_study(sampler=hpsched.OneCycleSampler(seed=0), pruner=pruner)
    study.optimize(
        lambda t: hpsched.suggest_onecycle(t, total_steps=900).run(FakeTraining()), n_trials=9
    )
    assert all(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in study.trials)
    assert all(set(t.params) == set(records.FIELDS) for t in study.trials)
