"""suggest_onecycle and OneCycle.run: ranges, one trial start to end, confirmation, resumption."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import optuna
import pytest
import torch
from fake_training import FakeTraining, Optimizer
from optuna.trial import FixedTrial, TrialState

import hpsched
from hpsched import evidence, records
from hpsched.errors import TrainingError, UsageError
from hpsched.suggest import rung_ladder, suggest_onecycle

STEPS = 900
RECIPE = {
    "max_lr": 0.3,
    "div_factor": 20.0,
    "pct_start": 0.25,
    "base_momentum": 0.85,
    "max_momentum": 0.95,
    "weight_decay": 1e-4,
}


def new_study(**kwargs: Any) -> optuna.Study:
    return optuna.create_study(
        sampler=hpsched.OneCycleSampler(seed=0), pruner=hpsched.CyclePruner(), **kwargs
    )


def objective(training: Callable[..., float]) -> Callable[[optuna.Trial], float]:
    return lambda trial: suggest_onecycle(trial, total_steps=STEPS).run(training)


# -- one trial -------------------------------------------------------------------------------


def test_a_trial_runs_its_range_test_then_climbs_the_rungs() -> None:
    training, study = FakeTraining(), new_study()
    study.pruner = hpsched.CyclePruner(3)  # the first trial climbs
    study.optimize(objective(training), n_trials=1)
    assert [(kind, steps) for kind, steps, _ in training.calls] == [
        ("range_test", 100),
        ("rung", 100),
        ("rung", 300),
        ("rung", 900),
    ]
    (trial,) = study.trials
    assert list(trial.intermediate_values) == [0, 1, 2]
    assert trial.value == trial.intermediate_values[2]
    rungs = records.cycles(trial)
    assert [(r.rung, r.steps, r.total_steps) for r in rungs] == [
        (0, 100, 900),
        (1, 300, 900),
        (2, 900, 900),
    ]
    assert [r.value for r in rungs] == list(trial.intermediate_values.values())
    assert all(1 <= len(r.curves["loss"]) <= 64 for r in rungs)
    assert len({r.seed for r in rungs}) == 3
    sweep = records.sweep(trial)
    assert sweep is not None
    assert sweep.momentum == 0.85
    assert sweep.weight_decay == 1e-4
    assert (sweep.lrs[0], sweep.lrs[-1]) == (1e-6, 10.0)
    assert sweep.steps <= 100


def test_refining_trials_end_with_short_cycles_and_the_last_runs_in_full() -> None:
    study = new_study()
    study.optimize(objective(FakeTraining()), n_trials=3)
    assert [list(t.intermediate_values) for t in study.trials] == [[0, 1]] * 3
    assert {t.state for t in study.trials} == {TrialState.PRUNED}
    with pytest.raises(UsageError, match="no finished full cycle") as error:
        hpsched.best(study)
    study.optimize(objective(FakeTraining()), n_trials=1)
    assert list(study.trials[3].intermediate_values) == [0, 1, 2]
    assert hpsched.best(study).number == 3
    assert f"max_lr {study.trials[3].params['max_lr']:.3g}" in str(error.value)


@pytest.mark.parametrize(
    ("budget", "runs_in_full"),
    [({"trials": 1}, True), ({"trials": 7}, True), ({"trials": 8}, False), ({"cycles": 7.5}, True),
     ({"cycles": 8}, False), ({"timeout": 60}, False)],
)  # fmt: skip
def test_with_a_small_budget_the_first_trial_runs_in_full_too(
    budget: dict[str, float], runs_in_full: bool
) -> None:
    study = new_study()
    study.set_user_attr(records.SETTINGS, {"objective": "x:y", "seed": 0, **budget})
    study.optimize(objective(FakeTraining()), n_trials=2)
    states = [t.state for t in study.trials]
    first = TrialState.COMPLETE if runs_in_full else TrialState.PRUNED
    assert states == [first, TrialState.PRUNED]


#: Noise of losses with which two range tests leave the centre open by more than an octave.
UNSURE = 0.7


def test_what_a_sweep_hands_to_train() -> None:
    seen: list[hpsched.Cycle] = []

    def train(cycle: hpsched.Cycle) -> float:
        seen.append(cycle)
        return FakeTraining(loss_noise=UNSURE)(cycle)

    new_study().optimize(objective(train), n_trials=3)
    sweeps = [cycle for cycle in seen if cycle.is_range_test]
    assert [cycle.max_lr for cycle in sweeps] == [10.0, 10.0, 10.0]
    assert {cycle.base_momentum for cycle in sweeps} == {0.85}
    assert {cycle.max_momentum for cycle in sweeps} == {0.85}
    # Typical, the largest that the search may use at the proposed rate, typical.
    decays = [cycle.weight_decay for cycle in sweeps]
    assert decays[0] == 1e-4
    assert decays[1] > 3 * decays[2] > 0
    assert len({cycle.seed for cycle in sweeps}) == 3
    assert len({cycle.name for cycle in seen}) == len(seen)


@pytest.mark.parametrize("base_momentum", [0, (0, 0.0), (0, 0.9)])
@pytest.mark.parametrize("max_momentum", [0.9, (0.9, 0.98)])
def test_momentum_may_fall_to_zero(
    base_momentum: float | tuple[float, float], max_momentum: float | tuple[float, float]
) -> None:
    def objective(trial: optuna.Trial) -> float:
        bounds = {"base_momentum": base_momentum, "max_momentum": max_momentum}
        return suggest_onecycle(trial, total_steps=STEPS, **bounds).run(FakeTraining())

    study = new_study()
    study.optimize(objective, n_trials=1)
    (sweep,) = evidence.sweeps(study.trials)
    assert sweep.momentum == min(0.85, base_momentum[1] if isinstance(base_momentum, tuple) else 0)


@pytest.mark.parametrize(
    ("bounds", "side"), [((1e-6, 0.01), "high"), ((0.02, 10.0), "low"), ((1e-6, 10.0), None)]
)
def test_a_sweep_that_missed_the_action_is_extended(
    bounds: tuple[float, float], side: str | None
) -> None:
    training, study = FakeTraining(best_lr=0.05), new_study()
    study.optimize(
        lambda t: suggest_onecycle(t, total_steps=900, range_test={
            "start_lr": bounds[0], "end_lr": bounds[1], "extend": True}).run(training),
        n_trials=6,
    )  # fmt: skip
    sweeps = [sweep for trial in study.trials if (sweep := records.sweep(trial))]
    missed = [evidence.range_test(sweep).missed for sweep in sweeps]
    if side is None:
        assert missed == [None] * 2
        return
    assert missed == [side, None, None]  # the useless one does not count
    first, second = (sweeps[0].lrs, sweeps[1].lrs)
    assert (second[-1] > 50 * first[-1]) == (side == "high")
    assert (second[0] < first[0] / 50) == (side == "low")
    per_decade = [len(lrs) / math.log10(lrs[-1] / lrs[0]) for lrs in (first, second)]
    assert per_decade[1] == pytest.approx(per_decade[0], rel=0.1)
    centre = evidence.pool(sweeps, 900).proposal.centre  # type: ignore[union-attr]
    assert 0.01 < centre < 0.2


@pytest.mark.parametrize(
    "options", [{"start_lr": 0.02}, {"mode": "linear", "end_lr": 1e-3}, {"extend": False}]
)
def test_a_sweep_that_the_user_chose_is_not_extended(options: dict[str, Any]) -> None:
    training, study = FakeTraining(best_lr=0.05), new_study()
    study.optimize(
        lambda t: suggest_onecycle(t, total_steps=900, range_test=options).run(training),
        n_trials=5,
    )
    sweeps = [sweep for trial in study.trials if (sweep := records.sweep(trial))]
    assert len({sweep.lrs for sweep in sweeps}) == 1


@pytest.mark.parametrize(
    ("loss_noise", "steps", "clear"),
    [
        (0.02, [100, 100], [True, True]),
        (1.0, [100, 200, 100], [False, True, True]),
        (20.0, [100, 200, 200], [False, False, False]),  # not without end
    ],
)
def test_sweeps_that_say_nothing_are_followed_by_longer_ones(
    loss_noise: float, steps: list[int], clear: list[bool]
) -> None:
    study = new_study()
    study.optimize(objective(FakeTraining(loss_noise=loss_noise)), n_trials=5)
    sweeps = [sweep for trial in study.trials if (sweep := records.sweep(trial))]
    assert [len(sweep.lrs) for sweep in sweeps] == steps
    assert [evidence.doubt(sweeps[: n + 1]) is None for n in range(len(sweeps))] == clear


def test_longer_sweeps_stay_within_the_budget() -> None:
    study = new_study()
    study.set_user_attr(records.SETTINGS, {"objective": "x:y", "seed": 0, "cycles": 8})
    study.optimize(objective(FakeTraining(loss_noise=20.0)), n_trials=5)
    sweeps = [sweep for trial in study.trials if (sweep := records.sweep(trial))]
    assert [len(sweep.lrs) for sweep in sweeps] == [100, 200]  # of 360


def test_a_narrow_range_does_not_make_long_sweeps() -> None:
    study = new_study()
    study.optimize(
        lambda t: suggest_onecycle(t, total_steps=900, max_lr=(1e-3, 2e-3)).run(FakeTraining()),
        n_trials=6,
    )
    sweeps = [sweep for trial in study.trials if (sweep := records.sweep(trial))]
    assert max(len(sweep.lrs) for sweep in sweeps) <= 200
    assert all(1e-3 <= trial.params["max_lr"] <= 2e-3 for trial in study.trials)


def test_a_fixed_max_lr_as_a_pair_needs_no_range_test() -> None:
    study = new_study()
    study.optimize(
        lambda t: suggest_onecycle(t, total_steps=900, max_lr=(0.01, 0.01)).run(FakeTraining()),
        n_trials=1,
    )
    assert records.RANGE_TEST not in study.trials[0].user_attrs


def test_extending_ends_somewhere() -> None:
    flat, study = FakeTraining(best_lr=1e9), new_study()
    study.optimize(objective(flat), n_trials=8)
    sweeps = [sweep for trial in study.trials if (sweep := records.sweep(trial))]
    assert 3 <= len(sweeps) <= 5


@pytest.mark.parametrize(("cycles", "wanted"), [(4, 1), (8, 3), (100, 3)])
def test_range_tests_take_a_twentieth_of_the_budget_but_one_is_always_run(
    cycles: int, wanted: int
) -> None:
    study = new_study()
    study.set_user_attr(records.SETTINGS, {"objective": "x:y", "seed": 0, "cycles": cycles})
    study.optimize(objective(FakeTraining(loss_noise=UNSURE)), n_trials=6)
    steps = [sweep.steps for trial in study.trials if (sweep := records.sweep(trial))]
    assert len(steps) == wanted
    assert len(steps) == 1 or sum(steps) <= 0.05 * cycles * 900


@pytest.mark.parametrize(("cycles", "affordable"), [(7, 3), (9, 4)])
def test_range_tests_that_others_run_count_as_spent(cycles: int, affordable: int) -> None:
    study = new_study()
    study.set_user_attr(records.SETTINGS, {"objective": "x:y", "seed": 0, "cycles": cycles})
    whole = {"stop_diverged": False}

    def run(train: Callable[[hpsched.Cycle], float]) -> None:
        with suppress(optuna.TrialPruned):
            suggest_onecycle(study.ask(), total_steps=STEPS, range_test=whole).run(train)

    def run_while_another_sweeps() -> None:
        def train(cycle: hpsched.Cycle) -> float:
            if cycle.is_range_test:
                run(FakeTraining(loss_noise=UNSURE))
            return FakeTraining(loss_noise=UNSURE)(cycle)

        run(train)

    def swept() -> int:
        return sum(sweep.steps for sweep in evidence.sweeps(study.trials))

    run_while_another_sweeps()  # none has ended: neither is drawn without
    assert swept() == 200
    run_while_another_sweeps()  # one or both of them are left
    assert swept() == 100 * affordable


@pytest.mark.parametrize(("loss_noise", "wanted"), [(0.02, 2), (UNSURE, 3)])
def test_range_tests_end_with_two_that_agree_or_the_third(loss_noise: float, wanted: int) -> None:
    training, study = FakeTraining(loss_noise=loss_noise), new_study()
    study.optimize(objective(training), n_trials=5)
    assert [kind for kind, *_ in training.calls].count("range_test") == wanted
    swept = [records.RANGE_TEST in t.user_attrs for t in study.trials]
    assert swept == [n < wanted for n in range(5)]
    assert evidence.pool(evidence.sweeps(study.trials), STEPS).prior.reliable  # type: ignore[union-attr]


def test_the_same_seed_gives_the_same_study() -> None:
    studies = [new_study(), new_study()]
    for study in studies:
        study.optimize(objective(FakeTraining()), n_trials=8)
    one, two = ([(t.params, t.value, t.intermediate_values) for t in s.trials] for s in studies)
    assert one == two


def test_a_failing_train_fails_the_trial_and_keeps_its_range_test() -> None:
    training = FakeTraining(fail_on=lambda cycle: cycle.total_steps == 300)
    study = new_study()
    study.optimize(objective(training), n_trials=1, catch=(RuntimeError,))
    (trial,) = study.trials
    assert trial.state == TrialState.FAIL
    assert records.RANGE_TEST in trial.user_attrs
    assert set(trial.params) == set(records.FIELDS)
    assert [r.rung for r in records.cycles(trial)] == [0]


def test_a_trial_put_back_in_the_queue_goes_on_after_its_rungs() -> None:
    reference = new_study(study_name="same")
    reference.pruner = hpsched.CyclePruner(3)  # the first trial climbs
    reference.optimize(objective(FakeTraining()), n_trials=1)

    def interrupted(cycle: hpsched.Cycle) -> bool:
        return cycle.total_steps == 300

    study = new_study(study_name="same")
    study.pruner = hpsched.CyclePruner(3)
    trial = study.ask()
    with pytest.raises(RuntimeError):
        objective(FakeTraining(fail_on=interrupted))(trial)
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    training = FakeTraining()
    study.optimize(objective(training), n_trials=1)
    assert [steps for _, steps, _ in training.calls] == [300, 900]
    (again,), (expected,) = study.trials, reference.trials
    assert again.params == expected.params
    assert again.value == expected.value
    assert again.intermediate_values == expected.intermediate_values


def test_a_trial_put_back_after_its_full_cycle_alone_runs_nothing_again() -> None:
    """Short cycles had been switched off; its result was stored, and not told."""
    study = new_study(study_name="told-late")
    trial = study.ask()
    recipe = suggest_onecycle(trial, total_steps=STEPS, range_test=False)
    recipe.to_dict()
    recipe._run_cycle(FakeTraining(), "rung", 2, STEPS, f"{records.RUNG}2")
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    training = FakeTraining()
    study.optimize(
        lambda again: suggest_onecycle(again, total_steps=STEPS, range_test=False).run(training),
        n_trials=1,
    )
    assert training.calls == []
    assert study.trials[0].state == TrialState.COMPLETE


def test_optunas_retry_keeps_seeds_and_counts_evidence_once() -> None:
    study = new_study()
    study.pruner = hpsched.CyclePruner(3)  # the first trial climbs
    training = FakeTraining(fail_on=lambda cycle: cycle.total_steps == 300)
    study.optimize(objective(training), n_trials=1, catch=(RuntimeError,))
    callback = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=1)
    callback(study, study.trials[0])
    study.optimize(objective(FakeTraining()), n_trials=1)
    first, retried = study.trials
    assert retried.state == TrialState.COMPLETE
    assert retried.params == first.params
    assert records.sweep(first) == records.sweep(retried)
    assert len(hpsched.suggest.evidence.sweeps(study.trials)) == 1  # type: ignore[attr-defined]
    assert records.cycles(retried)[0].name == records.cycles(first)[0].name


def test_a_confirmation_is_one_full_cycle_with_a_fresh_seed() -> None:
    training, study = FakeTraining(), new_study()
    study.optimize(objective(training), n_trials=4)
    assert hpsched.confirm(study, top=1, seeds=2) == 2
    training.calls.clear()
    study.optimize(objective(training), n_trials=2)
    assert [(kind, steps) for kind, steps, _ in training.calls] == [("confirm", 900)] * 2
    confirmed = study.trials[study.trials[4].user_attrs[records.CONFIRMS]]
    for trial in study.trials[4:]:
        assert trial.params == confirmed.params
        assert trial.intermediate_values == {}
        assert trial.state == TrialState.COMPLETE
    assert len({t.value for t in study.trials[4:]}) == 2
    best = hpsched.best(study)
    assert best.number == confirmed.number
    assert best.seeds == 2
    assert best.confirmed


def test_several_objectives_switch_rungs_off() -> None:
    study = optuna.create_study(
        directions=["minimize", "maximize"], sampler=hpsched.OneCycleSampler(seed=0)
    )
    steps: list[int] = []

    def train(cycle: hpsched.Cycle) -> Any:
        steps.append(cycle.total_steps)
        error = FakeTraining()(cycle)
        return error, cycle.max_lr

    study.optimize(lambda t: suggest_onecycle(t, total_steps=STEPS).run(train), n_trials=4)
    assert steps == [100, 900, 100, 900, 900, 900]
    assert all(len(t.values) == 2 for t in study.trials)


def test_without_our_sampler_it_is_a_plain_search_space_and_says_so() -> None:
    evidence.warn_once.cache_clear()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    training = FakeTraining()
    with pytest.warns(UserWarning, match="does not use hpsched.OneCycleSampler"):
        study.optimize(objective(training), n_trials=2)
    assert "range_test" not in {kind for kind, *_ in training.calls}
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        study.optimize(objective(training), n_trials=1)


def test_reading_a_value_before_run_skips_the_range_test_with_a_warning() -> None:
    evidence.warn_once.cache_clear()
    training, study = FakeTraining(), new_study()

    def early(trial: optuna.Trial) -> float:
        recipe = suggest_onecycle(trial, total_steps=STEPS)
        assert recipe.max_lr > 0
        return recipe.run(training)

    with pytest.warns(UserWarning, match="max_lr was read before run"):
        study.optimize(early, n_trials=1)
    assert training.calls[0][0] == "rung"


def test_no_sweep_for_a_fixed_rate() -> None:
    training, study = FakeTraining(), new_study()
    study.optimize(
        lambda t: suggest_onecycle(t, total_steps=STEPS, max_lr=0.2).run(training), n_trials=2
    )
    assert {kind for kind, *_ in training.calls} == {"rung"}
    assert {rate for *_, rate in training.calls} == {0.2}
    assert "max_lr" not in study.trials[0].params
    assert hpsched.best(study).recipe["max_lr"] == 0.2


# -- the recipe ------------------------------------------------------------------------------


def test_a_fixed_trial_gives_the_recipe_back() -> None:
    recipe = suggest_onecycle(FixedTrial(RECIPE), total_steps=100)
    assert recipe.to_dict() == {**RECIPE, "final_div_factor": 1e4, "policy": "cosine"}
    assert suggest_onecycle(FixedTrial(RECIPE), total_steps=STEPS).run(FakeTraining()) > 0


@pytest.mark.parametrize("policy", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [3, 10, 97])
def test_torch_kwargs_give_the_same_schedule(policy: str, steps: int) -> None:
    recipe = suggest_onecycle(FixedTrial(RECIPE), total_steps=steps, policy=policy, rungs=1)
    optimizers = [
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.9)
        for _ in range(2)
    ]
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizers[0], **recipe.torch_kwargs(steps))
    ours = recipe.schedule(optimizers[1], total_steps=steps)
    for step in range(steps):
        groups = [optimizer.param_groups[0] for optimizer in optimizers]
        assert groups[1]["lr"] == pytest.approx(groups[0]["lr"], rel=1e-12)
        assert groups[1]["momentum"] == pytest.approx(groups[0]["momentum"], rel=1e-12)
        for optimizer in optimizers:
            optimizer.step()
        if step < steps - 1:
            theirs.step()
            ours.step()


def test_train_runs_the_recipe_once() -> None:
    training = FakeTraining()
    recipe = suggest_onecycle(FixedTrial(RECIPE))
    value = recipe.train(training, total_steps=500, seed=7)
    assert training.calls == [("final", 500, 0.3)]
    assert value == recipe.train(FakeTraining(), total_steps=500, seed=7)


def test_a_diverged_final_run_is_an_error() -> None:
    recipe = suggest_onecycle(FixedTrial({**RECIPE, "max_lr": 9.9}))
    with pytest.raises(TrainingError, match="diverged"):
        recipe.train(FakeTraining(best_lr=0.01), total_steps=500)


def test_nothing_is_suggested_before_it_is_read() -> None:
    study = new_study()
    trial = study.ask()
    recipe = suggest_onecycle(trial, range_test=False)
    assert trial.params == {}
    assert recipe.pct_start == trial.params["pct_start"]
    assert set(trial.params) == {"pct_start"}


# -- rungs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "kwargs", "expected"),
    [
        (900, {}, ((0, 100), (1, 300), (2, 900))),
        (3000, {}, ((0, 333), (1, 1000), (2, 3000))),
        (160, {}, ((1, 53), (2, 160))),
        (40, {}, ((2, 40),)),
        (1, {}, ((2, 1),)),
        (900, {"rungs": 1}, ((0, 900),)),
        (900, {"rungs": 2, "reduction_factor": 4}, ((0, 225), (1, 900))),
        (None, {}, ()),
    ],
)
def test_rung_ladder(steps: int, kwargs: dict[str, int], expected: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert rung_ladder(steps, **kwargs) == expected


def test_too_few_steps_for_rungs_is_said_once() -> None:
    evidence.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="total_steps=41 is too small for rungs"):
        rung_ladder(41)


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"max_lr": (1.0, 0.1)}, r"max_lr=\(1.0, 0.1\): low must not be above high"),
        ({"max_lr": (0.0, 1.0)}, r"max_lr=.*must lie in \(0, inf\)"),
        ({"max_lr": -0.1}, "max_lr=-0.1"),
        ({"max_lr": (math.nan, 1.0)}, "max_lr"),
        ({"max_lr": "big"}, "max_lr='big': a pair"),
        ({"max_lr": (1, 2, 3)}, "a pair"),
        ({"pct_start": 1.5}, r"pct_start=1.5: must lie in \[0, 1\]"),
        ({"pct_start": (-0.1, 0.5)}, "pct_start"),
        ({"base_momentum": 1.0}, r"base_momentum=1.0: must lie in \[0, 1\)"),
        ({"max_momentum": (0.9, 1.2)}, "max_momentum"),
        ({"base_momentum": (0.8, 0.95)}, "reaches above max_momentum"),
        ({"div_factor": 0.5}, r"div_factor=0.5: must lie in \[1, inf\)"),
        ({"weight_decay": -1e-4}, "weight_decay=-0.0001"),
        ({"final_div_factor": 0.1}, "final_div_factor=0.1"),
        ({"policy": "cosin"}, "policy='cosin': 'cosine' or 'linear'"),
        ({"context": "width=64"}, "context='width=64': a dict"),
        ({"rungs": 0}, "rungs=0"),
        ({"reduction_factor": 1}, "reduction_factor=1"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"total_steps": 10.5}, "total_steps=10.5"),
        ({"range_test": "yes"}, "range_test='yes'"),
        ({"range_test": {"steps": 5}}, r"unknown keys \['steps'\]"),
        ({"range_test": {"start_lr": 1.0, "end_lr": 0.1}}, "start_lr"),
    ],
)
def test_bad_ranges_name_the_value_and_the_remedy(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        suggest_onecycle(FixedTrial(RECIPE), **{"total_steps": 100, **kwargs})


def test_run_without_total_steps() -> None:
    with pytest.raises(UsageError, match="total_steps=3_000"):
        suggest_onecycle(FixedTrial(RECIPE)).run(FakeTraining())


def test_run_twice_in_one_trial() -> None:
    recipe = suggest_onecycle(FixedTrial(RECIPE), total_steps=STEPS)
    recipe.run(FakeTraining())
    with pytest.raises(UsageError, match="twice"):
        recipe.run(FakeTraining())


def test_a_parameter_of_the_users_with_our_name() -> None:
    trial = new_study().ask()
    trial.suggest_float("weight_decay", 0, 1)
    with pytest.raises(UsageError, match="prefix='onecycle_'"):
        suggest_onecycle(trial)


def test_a_loss_that_is_nan_from_the_first_step_is_no_matter_of_rate() -> None:
    def train(cycle: hpsched.Cycle) -> float:
        schedule = cycle.schedule(Optimizer(cycle.max_lr))
        for _ in range(cycle.total_steps):
            schedule.step(math.nan)
        return 0.0

    study = new_study()
    with pytest.raises(TrainingError, match="at the very first step"):
        study.optimize(objective(train), n_trials=1)
    assert study.trials[0].state == TrialState.FAIL


def test_a_train_that_never_steps() -> None:
    study = new_study()
    with pytest.raises(TrainingError, match="took 0 of the cycle's 100 steps"):
        study.optimize(objective(lambda c: c.schedule(Optimizer(c.max_lr)) and 0.0), n_trials=1)
