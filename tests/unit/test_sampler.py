"""The two-stage draw, search coordinates, contexts, widening; Optuna's own sampler suites."""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from fake_training import FakeTraining, Optimizer
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from optuna.trial import TrialState

import hpsched
from hpsched import evidence, records
from hpsched.coordinates import (
    KAPPA_RANGE,
    ORDER,
    SETTLES,
    Coordinates,
    coordinates,
    full_scale_values,
)
from hpsched.errors import UsageError
from hpsched.proposal import pool
from hpsched.records import Settings
from hpsched.study import make_sampler
from hpsched.suggest import suggest_onecycle

STEPS = 900


class TestOfficialSuites(
    BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase
):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        # Optuna runs the relative suite on TPE with these settings: the sampler must be past its
        # random start-up trials after one trial.
        def make() -> BaseSampler:
            base = optuna.samplers.TPESampler(n_startup_trials=0, multivariate=True)
            return hpsched.OneCycleSampler(base)

        return make


def optimize(
    n_trials: int,
    base: BaseSampler | None = None,
    training: Any = None,
    seed: int = 0,
    objective: Any = None,
    direction: str = "minimize",
    reduction_factor: int | None = None,
    **kwargs: Any,
) -> optuna.Study:
    training = training or FakeTraining()
    study = optuna.create_study(
        direction=direction,
        sampler=hpsched.OneCycleSampler(base, seed=seed),
        pruner=hpsched.CyclePruner(reduction_factor),
    )
    study.optimize(
        objective or (lambda t: suggest_onecycle(t, total_steps=STEPS).run(training)),
        n_trials=n_trials,
        **kwargs,
    )
    return study


def bases() -> dict[str, Callable[[], BaseSampler]]:
    return {
        "tpe": lambda: optuna.samplers.TPESampler(seed=0),
        "gp": lambda: optuna.samplers.GPSampler(seed=0),
        "qmc": lambda: optuna.samplers.QMCSampler(seed=0, warn_independent_sampling=False),
        "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=0, warn_independent_sampling=False),
        "random": lambda: optuna.samplers.RandomSampler(seed=0),
    }


@pytest.mark.parametrize("name", bases())
def test_every_base_sampler_searches_inside_the_window(name: str) -> None:
    study = optimize(16, bases()[name]())
    recipe = next(records.recipe_spaces(study.trials[0]))
    window = coordinates(study.trials, recipe, study.directions).window
    rates = [t.params["max_lr"] for t in study.trials[4:]]
    assert all(window[0] / 2 <= rate <= window[1] * 2 for rate in rates)
    assert max(rates) / min(rates) > 1.5
    assert all(set(t.params) == set(records.FIELDS) for t in study.trials)


def test_gp_uses_its_model_although_most_trials_are_pruned(monkeypatch: Any) -> None:
    fitted_on: list[int] = []
    original = optuna.samplers.GPSampler._sample_relative_impl

    def spy(self: Any, study: Any, completed: Any, running: Any, space: Any) -> Any:
        fitted_on.append(len(completed))
        return original(self, study, completed, running, space)

    monkeypatch.setattr(optuna.samplers.GPSampler, "_sample_relative_impl", spy)
    study = optimize(16, optuna.samplers.GPSampler(seed=0), reduction_factor=3)
    complete = sum(t.state == TrialState.COMPLETE for t in study.trials)
    assert complete < 10  # what GP alone would have waited for
    assert len(fitted_on) >= 4
    assert max(fitted_on) > complete


def test_the_first_trial_uses_the_standard_recipe_at_the_proposed_rate() -> None:
    study = optimize(7)
    first = study.trials[0]
    test = hpsched.RangeTest(
        lrs=first.user_attrs[records.RANGE_TEST]["lrs"],
        losses=[
            math.nan if loss is None else loss
            for loss in first.user_attrs[records.RANGE_TEST]["losses"]
        ],
    )
    proposed = pool([test], STEPS).centre  # lower than the sweep says: the cycle is longer
    assert test.suggestion and proposed < 0.8 * test.suggestion
    assert first.params["max_lr"] == pytest.approx(proposed, rel=1e-3)
    assert first.params["div_factor"] == 25
    assert first.params["pct_start"] == 0.3
    assert first.params["base_momentum"] == 0.85
    assert first.params["max_momentum"] == 0.95
    assert [t.user_attrs.get(records.REFINES) for t in study.trials] == [
        0,
        1,
        2,
        SETTLES,
        None,
        None,
        None,
    ]


def test_refining_trials_differ_in_the_rate_alone_and_find_the_best_one() -> None:
    study = optimize(6, training=FakeTraining(best_lr=0.05, noise=0.005))
    trials = study.trials[:4]
    for field in ("div_factor", "pct_start", "base_momentum", "max_momentum"):
        assert {t.params[field] for t in trials} == {trials[0].params[field]}
    rates = [t.params["max_lr"] for t in trials]
    assert len(set(rates)) == 4 and rates[1] < rates[0]
    assert records.cycles(trials[3])[-1].is_full  # what was found is tried at full length
    recipe = next(records.recipe_spaces(trials[0]))
    found = evidence.of(study.trials, recipe, study.directions)
    assert found and len(found.runs) > 5  # short cycles, and those that climbed
    assert {run.share for run in found.runs} >= {1 / 9, 1 / 3}
    assert abs(math.log2(found.proposal.centre / 0.05)) < 0.6
    width = math.log2(found.proposal.high / found.proposal.low)
    assert width < math.log2(found.prior.high / found.prior.low)
    assert coordinates(study.trials, recipe, study.directions).centre == found.proposal.centre


def test_the_last_refining_trial_runs_in_full_in_a_database_too(tmp_path: Path) -> None:
    """There, what the sampler stores with a trial is not what the trial has in its cache."""
    study = optuna.create_study(
        storage=f"sqlite:///{tmp_path}/study.db",
        sampler=hpsched.OneCycleSampler(seed=0),
        pruner=hpsched.CyclePruner(),
    )
    study.optimize(
        lambda t: suggest_onecycle(t, total_steps=STEPS).run(FakeTraining(best_lr=0.3, noise=0.05)),
        n_trials=5,
    )
    assert [t.user_attrs.get(records.REFINES) for t in study.trials] == [0, 1, 2, SETTLES, None]
    assert records.cycles(study.trials[3])[-1].is_full


def test_a_second_recipe_stands_still_in_a_database_too(tmp_path: Path) -> None:
    def objective(trial: optuna.Trial) -> float:
        first = suggest_onecycle(trial, total_steps=STEPS, prefix="a_")
        second = suggest_onecycle(trial, total_steps=STEPS, prefix="b_", context={"net": "b"})
        first.to_dict()
        return second.pct_start

    study = optuna.create_study(
        storage=f"sqlite:///{tmp_path}/study.db", sampler=hpsched.OneCycleSampler(seed=0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study.optimize(objective, n_trials=2)
    assert study.trials[0].params["b_pct_start"] == 0.3


def test_refining_maximizes_too_and_takes_a_diverged_run_for_bad() -> None:
    class Fragile(FakeTraining):
        def __call__(self, cycle: hpsched.Cycle) -> float:
            value = -super().__call__(cycle)
            lost = not cycle.is_range_test and cycle.max_lr > 0.2
            return math.nan if lost else value

    training = Fragile(best_lr=0.15, noise=0.002)
    study = optimize(5, training=training, direction="maximize")
    recipe = next(records.recipe_spaces(study.trials[0]))
    found = evidence.of(study.trials, recipe, study.directions)
    assert found and any(math.isinf(run.score) for run in found.runs)
    assert found.proposal.centre < 0.2


def test_later_contexts_start_from_what_the_first_one_learned() -> None:
    def objective(trial: optuna.Trial) -> float:
        wide = trial.number >= 6
        training = FakeTraining(best_lr=0.05 if wide else 0.4, noise=0.002)

        def train(cycle: hpsched.Cycle) -> float:
            octave = 1.0 if cycle.is_range_test else 0.25  # the sweep is two octaves too high
            training.best_lr = (0.05 if wide else 0.4) * octave
            return training(cycle)

        return suggest_onecycle(trial, total_steps=STEPS, context={"wide": wide}).run(train)

    study = optimize(10, objective=objective)
    roles = [t.user_attrs.get(records.REFINES) for t in study.trials]
    assert roles == [*ORDER, None, 0, SETTLES, None, None]
    first = study.trials[6]
    alone = evidence.pool(evidence.of_context([first], "wide=True"), STEPS)
    assert alone and first.params["max_lr"] < 0.75 * alone.proposal.centre


def test_several_objectives_play_the_standard_recipe_once() -> None:
    study = optuna.create_study(
        directions=["minimize", "maximize"], sampler=hpsched.OneCycleSampler(seed=0)
    )

    def train(cycle: hpsched.Cycle) -> Any:
        value = FakeTraining()(cycle)
        return value if cycle.is_range_test else [value, -value]

    study.optimize(lambda t: suggest_onecycle(t, total_steps=STEPS).run(train), n_trials=4)
    assert [t.user_attrs.get(records.REFINES) for t in study.trials] == [0, None, None, None]


def test_a_second_recipe_stands_still_while_the_first_is_refined() -> None:
    def objective(trial: optuna.Trial) -> float:
        first = suggest_onecycle(trial, total_steps=STEPS, prefix="a_", context={"net": "a"})
        second = suggest_onecycle(trial, total_steps=STEPS, prefix="b_", context={"net": "b"})
        second.to_dict()
        value = first.run(FakeTraining())
        return value + abs(math.log(second.max_lr / 0.3))

    study = optimize(8, objective=objective)
    roles = [t.user_attrs.get(records.REFINES) for t in study.trials]
    assert [role for role in roles if role is not None] == [0, 1, 2, SETTLES]
    pct_starts = [t.params["b_pct_start"] for t in study.trials if "b_pct_start" in t.params]
    assert len(set(pct_starts)) > 1


def test_an_enqueued_rate_is_no_refining_trial() -> None:
    study = optuna.create_study(
        sampler=hpsched.OneCycleSampler(seed=0), pruner=hpsched.CyclePruner()
    )
    study.enqueue_trial({"max_lr": 1e-3})
    study.optimize(lambda t: suggest_onecycle(t, total_steps=STEPS).run(FakeTraining()), n_trials=2)
    assert [t.user_attrs.get(records.REFINES) for t in study.trials] == [None, 0]


def test_scatter_between_seeds_is_no_matter_of_weight_decay() -> None:
    trials = optimize(3).trials
    sweeps = [records.sweep(t) for t in trials]
    same = [dataclasses.replace(s, weight_decay=1e-4) for s in sweeps if s]
    for order in (same, same[::-1]):
        found = evidence.pool(order, STEPS)
        assert found and math.isinf(found.decay_limit)
        assert "of 2 range tests" in found.prior.reason


def test_an_unreliable_context_borrows_the_range_tests_of_the_others() -> None:
    def objective(trial: optuna.Trial) -> float:
        blind = trial.number >= 3
        training = FakeTraining(best_lr=0.2)

        def train(cycle: hpsched.Cycle) -> float:
            if blind and cycle.is_range_test:
                schedule = cycle.schedule(Optimizer(cycle.max_lr))
                for _ in range(cycle.total_steps):
                    schedule.step(2.3)
            return training(cycle)

        return suggest_onecycle(trial, total_steps=STEPS, context={"blind": blind}).run(train)

    study = optimize(4, objective=objective)
    recipe = next(records.recipe_spaces(study.trials[3]))
    found = evidence.of(study.trials, recipe, study.directions)
    assert found and found.prior.reliable
    assert not evidence.pool(evidence.of_context(study.trials, "blind=True")).prior.reliable  # type: ignore[union-attr]


def test_adam_with_coupled_weight_decay_is_searched_without_kappa() -> None:
    recipe = next(records.recipe_spaces(optimize(1).trials[0]))
    where = Coordinates(
        recipe=recipe, centre=0.01, window=(0.0025, 0.04), momentum_name="beta1", optimizer="Adam"
    )
    space: Any = where.space()
    assert (space["weight_decay"].low, space["weight_decay"].high) == (1e-6, 1e-2)
    assert where.standard()["weight_decay"] == 1e-4
    params = {**where.standard(), "weight_decay": 1e-3}
    assert where.to_search(params)["weight_decay"] == 1e-3  # type: ignore[index]


def test_weight_decay_stays_below_what_made_a_range_test_diverge() -> None:
    """Large weight decay with a large rate blows this task up; its range tests show it."""

    class Brittle(FakeTraining):
        def __call__(self, cycle: hpsched.Cycle) -> float:
            self.edge = 0.05 / max(cycle.weight_decay, 1e-9)
            return super().__call__(cycle)

    training = Brittle(best_lr=0.1)
    study = optimize(
        12,
        training=training,
        objective=lambda t: suggest_onecycle(t, total_steps=STEPS, weight_decay=(1e-4, 1.0)).run(
            training
        ),
    )
    sweeps = [records.sweep(t) for t in study.trials[:3]]
    assert [sweep.weight_decay for sweep in sweeps if sweep] == [1e-4, 1.0, 1e-4]
    recipe = next(records.recipe_spaces(study.trials[0]))
    found = evidence.of(study.trials, recipe, study.directions)
    assert found and 0.01 < found.decay_limit < 0.06
    products = [t.params["max_lr"] * t.params["weight_decay"] for t in study.trials[5:]]
    assert max(products) <= found.decay_limit * 1.001


def test_a_failed_first_trial_passes_the_role_on() -> None:
    training = FakeTraining(fail_on=lambda cycle: len(training.calls) == 2)  # after the sweep
    study = optimize(3, training=training, catch=(RuntimeError,))
    assert study.trials[0].state == TrialState.FAIL
    assert [t.user_attrs[records.REFINES] for t in study.trials] == [0, 0, 1]
    assert study.trials[1].params["div_factor"] == 25


def test_the_users_own_parameters_and_ours_are_both_searched_jointly() -> None:
    spaces: list[set[str]] = []
    base = optuna.samplers.TPESampler(seed=0, n_startup_trials=3)
    original = base.sample_relative

    def spy(study: Any, trial: Any, space: Any) -> Any:
        spaces.append(set(space))
        return original(study, trial, space)

    base.sample_relative = spy  # type: ignore[method-assign]

    def objective(trial: optuna.Trial) -> float:
        dropout = trial.suggest_float("dropout", 0.0, 0.5)
        kind = trial.suggest_categorical("kind", ["a", "b"])
        value = suggest_onecycle(trial, total_steps=STEPS).run(FakeTraining())
        return value + 0.1 * abs(dropout - 0.1) + 0.05 * (kind == "b")

    study = optimize(14, base, objective=objective)
    assert {"dropout", "kind"} in spaces
    assert set(records.FIELDS) in spaces
    assert not any({"dropout", "max_lr"} <= space for space in spaces)
    assert all({"dropout", "kind", *records.FIELDS} == set(t.params) for t in study.trials)


def test_contexts_have_their_own_windows_and_share_what_they_learn() -> None:
    def objective(trial: optuna.Trial) -> float:
        width = trial.suggest_categorical("width", [64, 1024])
        training = FakeTraining(best_lr=0.4 if width == 64 else 0.02)
        cycle = suggest_onecycle(trial, total_steps=STEPS, context={"width": width})
        return cycle.run(training)

    study = optimize(24, objective=objective)
    recipes = {r.context_key: r for t in study.trials for r in records.recipe_spaces(t)}
    maps = {
        key: coordinates(study.trials, recipe, study.directions) for key, recipe in recipes.items()
    }
    assert set(maps) == {"width=64", "width=1024"}
    ratio = maps["width=64"].centre / maps["width=1024"].centre
    assert abs(math.log2(ratio / 20)) < 1
    for trial in study.trials[8:]:
        where = maps[f"width={trial.params['width']}"]
        assert where.window[0] / 2 <= trial.params["max_lr"] <= where.window[1] * 2
    sweeps = [t.user_attrs[records.RANGE_TEST]["context_key"] for t in study.trials
              if records.RANGE_TEST in t.user_attrs]  # fmt: skip
    assert sweeps.count("width=64") == 2
    assert sweeps.count("width=1024") == 2


def test_a_wrong_window_is_left() -> None:
    """The sweep of this task points 32 times too low; the search must still get there."""

    class Misleading(FakeTraining):
        def __call__(self, cycle: hpsched.Cycle) -> float:
            self.best_lr = 0.005 if cycle.is_range_test else 0.16
            return super().__call__(cycle)

    study = optimize(60, training=Misleading(noise=0.001))
    late = [t.params["max_lr"] for t in study.trials[40:]]
    assert max(late) > 0.06
    assert study.best_params["max_lr"] > 0.05


def test_maximize_is_the_mirror_image_of_minimize() -> None:
    training = FakeTraining()

    def negated(trial: optuna.Trial) -> float:
        return suggest_onecycle(trial, total_steps=STEPS).run(lambda cycle: -training(cycle))

    down = optimize(12)
    up = optimize(12, objective=negated, direction="maximize")
    # Seeds follow from the study's, so only the sign differs.
    assert [t.params for t in up.trials[:8]] == [t.params for t in down.trials[:8]]
    assert [t.state for t in up.trials] == [t.state for t in down.trials]


def test_n_jobs_threads_lose_nothing() -> None:
    lock, seen = threading.Lock(), []

    def objective(trial: optuna.Trial) -> float:
        value = suggest_onecycle(trial, total_steps=STEPS).run(FakeTraining())
        with lock:
            seen.append(trial.number)
        return value

    study = optimize(12, objective=objective, n_jobs=3)
    assert len(study.trials) == 12
    assert all(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in study.trials)
    assert all(set(t.params) == set(records.FIELDS) for t in study.trials)
    complete = [t.number for t in study.trials if t.state == TrialState.COMPLETE]
    assert sorted(seen) == complete


def test_an_enqueued_trial_keeps_its_values_and_the_rest_is_drawn() -> None:
    study = optimize(2)
    study.enqueue_trial({"max_lr": 0.05, "pct_start": 0.2})
    study.optimize(lambda t: suggest_onecycle(t, total_steps=STEPS).run(FakeTraining()), n_trials=1)
    trial = study.trials[-1]
    assert trial.params["max_lr"] == 0.05
    assert trial.params["pct_start"] == 0.2
    assert set(trial.params) == set(records.FIELDS)


@pytest.mark.parametrize("after", [0, 2, 6])  # no evidence yet, refining, searching
@pytest.mark.parametrize(
    "given", [{"max_lr": 0.002}, {"base_momentum": 0.75}, {"max_lr": 0.9, "base_momentum": 0.9}]
)
@pytest.mark.parametrize("how", ["enqueued", "partial"])
def test_weight_decay_goes_with_the_rate_and_momentum_that_were_given(
    after: int, given: dict[str, float], how: str
) -> None:
    study = optimize(after)
    if how == "enqueued":
        study.enqueue_trial(given)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.sampler = optuna.samplers.PartialFixedSampler(given, study.sampler)
    study.optimize(lambda t: suggest_onecycle(t, total_steps=STEPS).run(FakeTraining()), n_trials=1)
    trial = study.trials[-1]
    assert given.items() <= trial.params.items()
    recipe = next(records.recipe_spaces(trial))
    found = evidence.of(study.trials[: after + 1], recipe, study.directions)
    assert found is not None
    rate, decay = trial.params["max_lr"], trial.params["weight_decay"]
    kappa = decay * rate / (1 - trial.params["base_momentum"]) * STEPS
    limited = decay * rate >= 0.999 * found.decay_limit  # what diverged in range tests
    assert 0.01 <= kappa <= 5.001 or limited or decay in recipe.space["weight_decay"]
    role = trial.user_attrs.get(records.REFINES)
    assert role is None or kappa == pytest.approx(0.3)


def test_partial_fixed_sampler_around_ours() -> None:
    inner = hpsched.OneCycleSampler(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.PartialFixedSampler({"pct_start": 0.25}, inner)
    study = optuna.create_study(sampler=sampler, pruner=hpsched.CyclePruner())
    study.optimize(lambda t: suggest_onecycle(t, total_steps=STEPS).run(FakeTraining()), n_trials=5)
    assert {t.params["pct_start"] for t in study.trials} == {0.25}
    assert sum(records.RANGE_TEST in t.user_attrs for t in study.trials) == 2


def test_two_recipes_with_prefixes_do_not_collide() -> None:
    def objective(trial: optuna.Trial) -> float:
        one = suggest_onecycle(trial, prefix="gen_", range_test=False)
        two = suggest_onecycle(trial, prefix="disc_", range_test=False, max_lr=(1e-4, 1e-2))
        return abs(math.log(one.max_lr / 0.3)) + abs(math.log(two.max_lr / 1e-3))

    study = optimize(6, objective=objective)
    for trial in study.trials:
        assert 1e-4 <= trial.params["disc_max_lr"] <= 1e-2
        assert set(trial.params) == {"gen_max_lr", "disc_max_lr"}


@pytest.mark.parametrize("kind", ["momentum", "beta1"])
def test_search_coordinates_go_there_and_back(kind: str) -> None:
    study = optimize(1)
    recipe = next(records.recipe_spaces(study.trials[0]))
    where = Coordinates(recipe=recipe, centre=0.2, window=(0.05, 0.8), momentum_name=kind)
    params = dict(study.trials[0].params)
    moved = where.to_search(params)
    assert moved is not None
    assert moved["max_lr"] == pytest.approx(params["max_lr"] / 0.2)
    effective = params["max_lr"] / (0.15 if kind == "momentum" else 1.0)
    assert moved["weight_decay"] == pytest.approx(params["weight_decay"] * effective * STEPS)
    assert where.from_search(moved) == pytest.approx(params)
    space: Any = where.space()
    assert (space["max_lr"].low, space["max_lr"].high) == pytest.approx((0.25, 4.0))
    assert (space["weight_decay"].low, space["weight_decay"].high) == KAPPA_RANGE


def test_a_weight_decay_range_of_the_users_is_searched_as_it_is() -> None:
    training = FakeTraining()
    study = optimize(
        12,
        objective=lambda t: suggest_onecycle(t, total_steps=STEPS, weight_decay=(1e-6, 1e-5)).run(
            training
        ),
    )
    assert all(1e-6 <= t.params["weight_decay"] <= 1e-5 for t in study.trials)


def test_values_of_short_rungs_are_moved_to_the_full_scale() -> None:
    def trial(number: int, values: dict[int, float]) -> optuna.trial.FrozenTrial:
        made = optuna.create_trial(
            state=TrialState.PRUNED, intermediate_values=values, params={}, distributions={}
        )
        made.number = number
        return made

    trials = [
        trial(0, {0: 5.0, 1: 3.0, 2: 2.0}),
        trial(1, {0: 6.0, 1: 4.0}),
        trial(2, {0: 9.0}),
        trial(3, {0: math.nan}),
        trial(4, {}),
    ]
    assert full_scale_values(trials) == {0: 2.0, 1: 3.0, 2: 6.0}


def test_corrupt_evidence_is_left_out_with_one_warning_that_names_the_trial() -> None:
    trials = optimize(3).trials
    trials[1].user_attrs[records.RANGE_TEST] = {"losses": "gone"}
    study = optuna.create_study(
        sampler=hpsched.OneCycleSampler(seed=0), pruner=hpsched.CyclePruner()
    )
    study.add_trials(trials)
    with pytest.warns(UserWarning, match="trial 1: attribute hpsched:range_test"):
        study.optimize(
            lambda t: suggest_onecycle(t, total_steps=STEPS).run(FakeTraining()), n_trials=1
        )
    assert study.trials[3].state in (TrialState.COMPLETE, TrialState.PRUNED)
    assert records.RANGE_TEST in study.trials[3].user_attrs  # the missing replicate is made up


def propose(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    suggest_onecycle(trial, total_steps=STEPS, range_test=False).to_dict()
    return trial


def test_corrupt_evidence_warns_once_however_many_trials_are_proposed() -> None:
    evidence.warn_once.cache_clear()
    trials = optimize(5).trials
    trials[1].user_attrs[records.RANGE_TEST] = {"losses": "gone"}
    trials[2].user_attrs[records.RECIPE] = "gone"
    study = optuna.create_study(sampler=hpsched.OneCycleSampler(seed=0))
    study.add_trials(trials)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            propose(study)
    said = [str(w.message) for w in caught if "does not hold" in str(w.message)]
    assert sorted(text.split(" does")[0] for text in said) == [
        "trial 1: attribute hpsched:range_test",
        "trial 2: hpsched:recipe",
    ]


def test_a_second_proposal_reads_no_finished_trial_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = records._Record.from_json.__func__  # type: ignore[attr-defined]

    def spy(cls: Any, data: Any, where: str) -> Any:
        read.append(where.split(":")[0])
        return original(cls, data, where)

    study = optuna.create_study(sampler=hpsched.OneCycleSampler(seed=0))
    study.add_trials(optimize(8).trials)  # copies: nothing is known of these objects
    monkeypatch.setattr(records._Record, "from_json", classmethod(spy))
    study.tell(propose(study), 1.0)
    assert {f"trial {number}" for number in range(8)} < set(read)
    read.clear()
    study.tell(propose(study), 1.0)
    assert set(read) == {"trial 8", "trial 9"}  # the one finished since, and the one proposed


def test_a_running_trial_is_read_anew_until_it_has_finished() -> None:
    study = optimize(1)
    stored = copy.deepcopy(study.trials[0].user_attrs[records.RANGE_TEST])
    trial = study.ask()

    def own() -> list[str]:
        return [sweep.name for sweep in evidence.sweeps(study.get_trials(deepcopy=False)[1:])]

    assert own() == []
    trial.set_user_attr(records.RANGE_TEST, {**stored, "name": "first"})
    assert own() == ["first"]
    trial.set_user_attr(records.RANGE_TEST, {**stored, "name": "second"})
    assert own() == ["second"]
    trial.set_user_attr(records.RANGE_TEST, {**stored, "name": "third"})
    study.tell(trial, 1.0)
    assert own() == ["third"]

    made = optuna.create_trial(state=TrialState.RUNNING)  # one object, changed in place
    assert evidence.sweeps([made]) == []
    made.user_attrs[records.RANGE_TEST] = stored
    made.state = TrialState.PRUNED
    assert evidence.sweeps([made])[0].name == stored["name"]


def test_trials_of_two_studies_and_copies_do_not_mix() -> None:
    def of(lr: float) -> optuna.Study:
        study = optuna.create_study(sampler=hpsched.OneCycleSampler(seed=0))
        study.optimize(
            lambda t: suggest_onecycle(t, total_steps=STEPS, context={"lr": lr}).run(
                FakeTraining(best_lr=lr)
            ),
            n_trials=5,
        )
        return study

    studies = {lr: of(lr) for lr in (0.02, 0.4)}
    for _ in range(2):  # once read, and once known
        for lr, study in studies.items():
            for trial in study.get_trials(deepcopy=False):
                assert next(records.recipe_spaces(trial)).context == {"lr": lr}
            recipe = next(records.recipe_spaces(study.trials[0]))
            centre = coordinates(study.trials, recipe, study.directions).centre
            assert abs(math.log2(centre / lr)) < 1.5
    trial = studies[0.4].get_trials(deepcopy=False)[0]
    changed = copy.copy(trial)
    changed.user_attrs = {k: v for k, v in trial.user_attrs.items() if k != records.RANGE_TEST}
    assert records.sweep(trial) and not records.sweep(changed)


def test_what_is_known_of_an_object_goes_with_it() -> None:
    class Thing:
        def __init__(self, value: int) -> None:
            self.value = value

    calls: list[int] = []

    @records.once(lambda thing: thing.value != 3)
    def read(thing: Thing) -> int:
        calls.append(thing.value)
        return thing.value

    for value in range(5):  # each at the address of the one before
        thing = Thing(value)
        assert [read(thing), read(thing)] == [value, value]
        del thing
    assert calls == [0, 1, 2, 3, 3, 4]


@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_a_model_is_fitted_to_the_best_and_the_latest_of_many_trials(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hpsched.sampler, "SHOWN", 12)
    monkeypatch.setattr(hpsched.sampler, "SHOWN_BEST", 4)
    base, seen = bases()[name](), []
    study = optimize(40, base)

    def spy(view: Any, trial: Any, space: Any) -> dict[str, Any]:
        if space:
            seen.append(view.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        return {}

    monkeypatch.setattr(base, "sample_relative", spy)
    failed = propose(study)
    study.tell(failed, state=TrialState.FAIL)
    propose(study)
    shown = [trial.number for trial in seen[-1]]
    assert shown == sorted(shown)
    if name == "cmaes":
        assert len(shown) > 30  # it counts generations
        return
    values = full_scale_values(study.trials)
    assert len(shown) == 12
    assert len(set(shown) & set(range(30, 40))) >= 6
    best = sorted(seen[-1], key=lambda trial: trial.value or math.inf)[:4]
    assert max(values[t.number] for t in best) <= sorted(values.values())[8]


def test_negative_range_tests_are_refused() -> None:
    with pytest.raises(UsageError, match=r"range_tests=-1"):
        hpsched.OneCycleSampler(range_tests=-1)


def test_optunas_own_tools_see_only_ordinary_trials() -> None:
    study = optimize(12)
    frame = study.trials_dataframe()
    assert len(frame) == 12
    assert not frame[[f"params_{field}" for field in records.FIELDS]].isna().any().any()
    importances = optuna.importance.get_param_importances(study, params=list(records.FIELDS))
    assert set(importances) == set(records.FIELDS)
    figure = optuna.visualization.plot_slice(study)
    assert len(figure.data) == 6


@pytest.mark.parametrize("name", ["hpsched", "tpe"])
def test_a_users_own_parameters_vary_from_trial_to_trial(name: str) -> None:
    """Workers make a sampler for each trial: none may start from the same random state."""
    settings = Settings(objective="o:o", seed=1, cycles=20.0, base_sampler=name)
    study = optuna.create_study()
    seen = []
    for number in range(4):
        study.sampler = make_sampler(settings, number)
        trial = study.ask()
        seen.append(trial.suggest_float("dropout", 0.0, 0.5))
        study.tell(trial, seen[-1])
    assert len(set(seen)) == 4


def test_a_trial_that_ran_out_of_memory_passes_its_role_on_and_teaches_tpe() -> None:
    """It says nothing of the recipe, and all of the width that did not fit."""
    widths = []

    def objective(trial: optuna.Trial) -> float:
        width = trial.suggest_int("width", 1, 100)
        widths.append(width)

        def train(cycle: hpsched.Cycle) -> float:
            if width > 50:
                raise MemoryError("no room")
            return FakeTraining()(cycle)

        return suggest_onecycle(trial, total_steps=STEPS).run(train)

    sampler, pruner = hpsched.OneCycleSampler(seed=0), hpsched.CyclePruner()
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=40)
    lost = [trial for trial in study.trials if records.OUT_OF_MEMORY in trial.user_attrs]
    assert len(lost) == sum(width > 50 for width in widths)
    assert sum(width > 50 for width in widths[20:]) < 10  # by chance: 10 ± 2
    roles = [t.user_attrs.get(records.REFINES) for t in study.trials if t not in lost]
    assert {0, 1, 2, SETTLES} <= set(roles)


def test_gp_takes_diverged_trials_beside_the_users_own_parameters() -> None:
    """It refuses studies in which some trials have constraints and others have none."""

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("own", 0, 1)

        def train(cycle: hpsched.Cycle) -> float:
            value = FakeTraining()(cycle)
            return math.nan if trial.number in (5, 6) else value

        return suggest_onecycle(trial, total_steps=STEPS).run(train)

    sampler = hpsched.OneCycleSampler(optuna.samplers.GPSampler(seed=0, n_startup_trials=4))
    study = optuna.create_study(sampler=sampler, pruner=hpsched.CyclePruner())
    study.optimize(objective, n_trials=12)
    assert records.DIVERGED in study.trials[5].user_attrs
