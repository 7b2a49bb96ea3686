"""One-cycle against other schedules: what an arm's optimizer follows, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.study import StudyDirection
from optuna.trial import FixedTrial
from scipy import stats

import hpsched
from hpsched import compare, records, schedules
from hpsched.cli.compare import sentence
from hpsched.compare import Arm, differences
from hpsched.errors import UsageError
from hpsched.present import torch_snippet
from hpsched.records import Settings

MINIMIZE, MAXIMIZE = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
STEPS = 60

# -- the schedule of an arm ------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules.classics())
def test_a_classic_policy_is_the_gallery_s_schedule_at_constant_momentum(name: str) -> None:
    made = schedules.follow(STEPS, policy=f"schedule:{name}", max_lr=0.3, max_momentum=0.9)
    pure = schedules.GALLERY[name][1](STEPS, 0.3)
    assert [made.lr(t) for t in range(-1, STEPS + 2)] == [pure(t) for t in range(-1, STEPS + 2)]  # type: ignore[operator]
    assert {made.momentum(t) for t in range(STEPS)} == {0.9}


@pytest.mark.parametrize("policy", ["cosine", "linear"])
def test_other_policies_are_one_cycle(policy: str) -> None:
    recipe = {"max_lr": 0.3, "div_factor": 10.0, "pct_start": 0.2}
    made = schedules.follow(STEPS, policy=policy, **recipe)
    pure = schedules.one_cycle(STEPS, policy=policy, **recipe)
    assert [(made.lr(t), made.momentum(t)) for t in range(STEPS)] == [
        (pure.lr(t), pure.momentum(t)) for t in range(STEPS)
    ]


def test_classics_are_whole_schedules_of_the_rate_alone() -> None:
    assert {"constant", "square_root", "factor", "multi_factor", "cosine", "warmup_squeeze"} <= set(
        schedules.classics()
    )
    assert not [n for n in schedules.classics() if "cycle" in n and not n.startswith("cyclical")]
    assert not [n for n in schedules.classics() if n.startswith("range_test")]


def _study(policy: str | None) -> optuna.Study:
    sampler = hpsched.OneCycleSampler(range_tests=1, seed=0)
    study = optuna.create_study(sampler=sampler)
    settings = Settings(objective="o:o", seed=0, cycles=5.0, policy=policy)
    study.set_user_attr(records.SETTINGS, settings.to_json())
    return study


@pytest.mark.parametrize("name", ["cosine", "multi_factor", "constant", "warmup_squeeze"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_optimizer_follows_the_study_s_schedule(name: str, kind: str) -> None:
    """The objective asks for nothing: every complete cycle of the trial is the study's schedule."""
    taken: list[list[tuple[float, float]]] = []
    cycles = []

    def train(cycle: hpsched.Cycle) -> float:
        weight = torch.nn.Parameter(torch.ones(2))
        rate, momentum = cycle.max_lr, cycle.max_momentum
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD([weight], lr=rate, momentum=momentum)
            if kind == "sgd"
            else torch.optim.AdamW([weight], lr=rate, betas=(momentum, 0.999))
        )
        schedule = cycle.schedule(optimizer)
        rows = []
        for _ in range(cycle.total_steps):
            group = optimizer.param_groups[0]
            beta1 = group["momentum"] if kind == "sgd" else group["betas"][0]
            rows.append((group["lr"], beta1))
            loss = (weight**2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step(loss)
        if not cycle.is_range_test:
            cycles.append(cycle)
            taken.append(rows)
        return 1.0

    study = _study(f"schedule:{name}")
    study.optimize(
        lambda trial: hpsched.suggest_onecycle(trial, STEPS, rungs=2, min_steps=10).run(train),
        n_trials=1,
    )
    assert [len(rows) for rows in taken] == [20, 60]
    for cycle, rows in zip(cycles, taken, strict=True):
        pure = schedules.GALLERY[name][1](cycle.total_steps, cycle.max_lr)
        expected = [(pure(t), 0.9) for t in range(cycle.total_steps)]  # type: ignore[operator]
        np.testing.assert_allclose(rows, expected, rtol=1e-12)


def test_an_arm_searches_rate_and_weight_decay() -> None:
    trial = _study("schedule:cosine").ask()
    recipe = hpsched.suggest_onecycle(trial, STEPS, rungs=1, range_test=False)
    assert recipe.policy == "schedule:cosine"
    assert (recipe.base_momentum, recipe.max_momentum) == (0.9, 0.9)
    recipe.to_dict()
    assert set(trial.params) == {"max_lr", "weight_decay"}
    with pytest.raises(UsageError, match="schedule:cosine"):
        recipe.torch_kwargs(STEPS)


@pytest.mark.parametrize(("bounds", "momentum"), [((0.0, 0.0), 0.0), ((0.95, 0.97), 0.95)])
def test_an_arm_s_momentum_stays_within_the_objective_s(
    bounds: tuple[float, float], momentum: float
) -> None:
    low, high = bounds
    recipe = hpsched.suggest_onecycle(
        FixedTrial({"max_lr": 0.1, "weight_decay": 0.0}), STEPS, rungs=1,
        base_momentum=low, max_momentum=high, policy="schedule:constant",
    )  # fmt: skip
    assert recipe.max_momentum == recipe.base_momentum == momentum
    assert "schedule:constant" in recipe._repr_html_()  # in a notebook, with its drawing


def test_a_policy_that_is_not_there_is_refused() -> None:
    fixed = FixedTrial({"max_lr": 0.1, "weight_decay": 0.0})
    with pytest.raises(UsageError, match=r"'zigzag' is unknown: give one of constant"):
        hpsched.suggest_onecycle(fixed, STEPS, rungs=1, policy="schedule:zigzag")


def test_without_a_policy_in_the_settings_the_objective_decides() -> None:
    trial = _study(None).ask()
    assert hpsched.suggest_onecycle(trial, STEPS, rungs=1, policy="linear").policy == "linear"


def test_code_to_paste_follows_the_schedule() -> None:
    best = hpsched.Best(
        number=3, params={}, policy="schedule:multi_factor", total_steps=8, found=0.1,
        recipe={"max_lr": 0.4, "max_momentum": 0.9, "weight_decay": 0.0},
    )  # fmt: skip
    space: dict[str, object] = {
        "torch": torch, "hpsched": hpsched, "model": torch.nn.Linear(1, 1)
    }  # fmt: skip
    exec(torch_snippet(best), space)
    optimizer, scheduler = space["optimizer"], space["scheduler"]
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])  # type: ignore[attr-defined]
        optimizer.step()  # type: ignore[attr-defined]
        scheduler.step()  # type: ignore[attr-defined]
    assert rates == pytest.approx([0.4] * 4 + [0.04] * 2 + [0.004] * 2)


# -- which arms ------------------------------------------------------------------------------------


def test_arms_go_by_the_gallery_s_names() -> None:
    wanted = ["cosine", "step", "one_cycle", "multi_factor"]
    assert compare.arm_names(wanted) == ["one_cycle", "cosine", "multi_factor"]


@pytest.mark.parametrize(
    ("others", "message"),
    [(["cosin"], "'cosin' is unknown: choose from step,"), ([], "name one"), (["one_cycle"], "no")],
)
def test_arms_that_are_not_there_are_refused(others: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare.arm_names(others)


# -- verdict ---------------------------------------------------------------------------------------


def _arm(schedule: str, scores: Sequence[float | None]) -> Arm:
    return Arm(schedule=schedule, study=schedule, scores=dict(enumerate(scores)))


def _against(ours: Sequence[float | None], theirs: Sequence[float | None]) -> compare.Difference:
    (found,) = differences([_arm("one_cycle", ours), _arm("cosine", theirs)], MINIMIZE)
    return found


OURS, THEIRS = [0.30, 0.33, 0.31, 0.32], [0.34, 0.35, 0.36, 0.37]


def test_the_difference_is_the_paired_t_test_s() -> None:
    found = _against(OURS, THEIRS)
    test = stats.ttest_rel(THEIRS, OURS)
    interval = test.confidence_interval(0.95)
    assert found.gain == pytest.approx(0.04)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(test.pvalue)
    assert (found.verdict, found.wins, found.losses, found.seeds) == ("better", 4, 0, 4)
    assert found.seeds_needed is None
    assert sentence(found).startswith("one-cycle is better than cosine, by 0.04 [")


def test_the_other_way_round_it_is_worse() -> None:
    there, back = _against(OURS, THEIRS), _against(THEIRS, OURS)
    assert back.verdict == "worse"
    assert (back.gain, back.low, back.high) == pytest.approx(
        (-0.04, -float(there.high or 0), -float(there.low or 0))
    )
    assert back.p == pytest.approx(there.p)


def test_where_higher_is_better_the_gain_turns() -> None:
    (found,) = differences([_arm("one_cycle", THEIRS), _arm("cosine", OURS)], MAXIMIZE)
    assert (found.verdict, found.gain) == ("better", pytest.approx(0.04))


scores = st.lists(st.floats(-1e3, 1e3).map(lambda v: round(v, 3)), min_size=3, max_size=8)


@given(scores, st.floats(-100, 100).map(lambda v: round(v, 2)), st.sampled_from([0.5, 2.0, 8.0]))
def test_a_shift_changes_nothing_and_a_unit_only_the_gain(
    ours: list[float], shift: float, unit: float
) -> None:
    theirs = [value + (i % 3) for i, value in enumerate(ours)]
    found = _against(ours, theirs)
    moved = _against([unit * (v + shift) for v in ours], [unit * (v + shift) for v in theirs])
    assert moved.gain == pytest.approx(unit * (found.gain or 0), abs=1e-6)
    assert moved.p == pytest.approx(found.p, abs=1e-6)


def test_runs_are_paired_by_their_seed() -> None:
    ours = Arm(schedule="one_cycle", study="a", scores={1: 0.30, 2: 0.50, 3: 0.1, 9: 0.9})
    theirs = Arm(schedule="cosine", study="b", scores={3: 0.2, 2: 0.59, 1: 0.41, 7: 0.0})
    (found,) = differences([ours, theirs], MINIMIZE)
    assert (found.seeds, found.gain) == (3, pytest.approx(0.1))
    assert found.verdict == "better"


def test_equal_runs_decide_nothing() -> None:
    found = _against(OURS, OURS)
    assert (found.gain, found.p, found.verdict) == (0.0, 1.0, "not decided")
    assert found.seeds_needed is None
    assert "not decided" in sentence(found)


@pytest.mark.parametrize("scores", [[], [0.3]])
def test_too_few_seeds_decide_nothing(scores: list[float]) -> None:
    found = _against(scores, [0.9, 0.9])
    assert (found.p, found.verdict) == (None, "not decided")
    assert "too few seeds" in sentence(found)


def test_a_diverged_run_is_the_worst_and_the_signs_decide() -> None:
    found = _against([0.3] * 8, [None] * 7 + [0.2])
    assert (found.gain, found.low, found.diverged) == (None, None, (0, 7))
    assert (found.wins, found.losses) == (7, 1)
    assert found.p == pytest.approx(stats.binomtest(7, 8).pvalue)
    assert "diverged on 0 and 7 of 8 seeds" in sentence(found)
    all_ours = _against([None] * 8, [0.2] * 8)
    assert (all_ours.verdict, all_ours.losses) == ("worse", 8)
    both = _against([None, None, 0.1], [None, None, 0.2])
    assert (both.wins, both.losses, both.verdict) == (1, 0, "not decided")


def test_p_values_are_corrected_for_their_number() -> None:
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert compare.holm([0.5, None, 0.01]) == [0.5, None, 0.02]
    assert compare.holm([]) == []


def test_several_comparisons_of_nothing_seldom_decide() -> None:
    """Of 300 comparisons with three equal rivals at most one in twenty finds a difference."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(300):
        arms = [_arm(name, rng.normal(size=8).tolist()) for name in ("one_cycle", "a", "b", "c")]
        wrong += any(d.verdict != "not decided" for d in differences(arms, MINIMIZE))
    assert wrong <= 0.05 * 300 + 2 * math.sqrt(300 * 0.05 * 0.95)


def test_the_seeds_it_asks_for_mostly_decide() -> None:
    """As many runs with the same difference and spread: decided four times in five."""
    rng = np.random.default_rng(1)
    gains = np.array([0.0, 2.0, -1.0, 1.0, 0.5])
    found = _against([0.0] * 5, gains.tolist())
    needed = found.seeds_needed
    assert found.verdict == "not decided"
    assert needed is not None and needed > 5
    draws = rng.normal(gains.mean(), gains.std(ddof=1), (200, needed))
    decided = [_against([0.0] * needed, row.tolist()).verdict == "better" for row in draws]
    assert 0.65 < np.mean(decided) < 0.95
