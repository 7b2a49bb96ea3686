"""find_lr: sweeps of a train(cycle) alone, with weight decays of the caller's choice."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from fake_training import FakeTraining
from optuna.trial import FixedTrial

import hpsched
from hpsched.errors import UsageError
from hpsched.suggest import find_lr, suggest_onecycle


def test_each_weight_decay_is_swept_as_often_as_there_are_replicates() -> None:
    tests = find_lr(FakeTraining(), weight_decays=[0.05, 0, 3.0], replicates=2, seed=1)
    assert sorted(test.weight_decay for test in tests) == [0, 0, 0.05, 0.05, 3, 3]  # type: ignore[type-var]
    assert len({test.seed for test in tests}) == 6


def test_without_weight_decays_there_are_as_many_sweeps_as_replicates() -> None:
    tests = find_lr(FakeTraining(), replicates=4, seed=1)
    assert [test.weight_decay for test in tests] == [1e-4, 1e-3, 1e-5, 1e-4]


def test_the_stop_and_validation_are_passed_on() -> None:
    def train(cycle: hpsched.Cycle) -> float:
        cycle.validate(lambda: {"loss": 1.0, "accuracy": 0.5})
        return FakeTraining(best_lr=0.03)(cycle)  # diverges well before the last rate

    (stopped,) = find_lr(train, replicates=1, seed=1)
    (whole,) = find_lr(
        train, replicates=1, seed=1, stop_diverged=False, validate_every=20, num_iter=100
    )
    assert len(stopped.losses) < len(whole.losses) == 100
    assert not stopped.validation
    assert [step for step, _ in whole.validation["accuracy"]] == [20, 40, 60, 80, 100]


def test_a_studys_range_tests_take_weight_decays_in_turn_and_to_the_letter() -> None:
    seen = []

    def objective(trial: Any) -> float:
        def train(cycle: hpsched.Cycle) -> float:
            if cycle.is_range_test:
                seen.append(cycle.weight_decay)
            return FakeTraining()(cycle)

        wanted = {"weight_decays": [0, 2.0]}  # beyond the bounds of the search
        return suggest_onecycle(trial, total_steps=900, range_test=wanted).run(train)

    study = optuna.create_study(sampler=hpsched.OneCycleSampler(seed=0))
    study.optimize(objective, n_trials=3)
    assert seen == [0, 2, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decays": []}, r"weight_decays=\[\]: numbers of 0 or more"),
        ({"weight_decays": [1e-3, -1e-4]}, "-0.0001.*0 or more"),
        ({"weight_decays": [float("nan")]}, "nan.*0 or more"),
        ({"weight_decays": "1e-3"}, "'1e-3'.*0 or more"),
        ({"weight_decays": 1e-3}, "0.001.*0 or more"),
        ({"validate_every": 0}, "validate_every=0.*at least 1"),
        ({"validate_every": 2.5}, "validate_every=2.5"),
        ({"start_lr": 0.0, "mode": "linear"}, "start_lr=0.0: a positive rate"),
    ],
)
def test_options_that_cannot_be_right_are_refused_before_the_first_step(
    options: dict[str, Any], message: str
) -> None:
    training = FakeTraining()
    with pytest.raises(UsageError, match=message):
        find_lr(training, **options)
    with pytest.raises(UsageError, match=message):
        suggest_onecycle(FixedTrial({}), total_steps=900, range_test=options)
    assert training.calls == []


def test_replicates_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="replicates=0: at least 1"):
        find_lr(FakeTraining(), replicates=0)
