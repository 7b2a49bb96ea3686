"""Costs, decisions, rankings: pure functions over trials made by hand."""

from __future__ import annotations

import datetime
import math
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from typer.testing import CliRunner

import hpsched
from hpsched import records
from hpsched.cli import app
from hpsched.ledger import (
    Cost,
    Next,
    best_of,
    confirmations_planned,
    next_move,
    next_to_confirm,
    rank,
    read_runs,
    total_cost,
)
from hpsched.records import CycleRecord, RecipeSpace, Settings, SweepRecord
from hpsched.study import create_study

MIN, MAX = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
SPACE = RecipeSpace(
    prefix="",
    total_steps=900,
    policy="cosine",
    fixed={
        "final_div_factor": 1e4,
        "div_factor": 25.0,
        "pct_start": 0.3,
        "base_momentum": 0.85,
        "max_momentum": 0.95,
        "weight_decay": 0.0,
    },
    space={"max_lr": (1e-6, 10.0, True)},
    context={},
    rungs=((0, 100), (1, 300), (2, 900)),
)
START = datetime.datetime(2026, 1, 1)


def cycle(number: int, rung: int, value: float | None, steps: int | None = None) -> CycleRecord:
    return CycleRecord(
        name=f"trial{number}-{rung}",
        rung=rung,
        steps=steps or dict(SPACE.rungs)[rung],
        total_steps=900,
        seconds=1.0,
        seed=number,
        value=value,
    )


def trial(
    number: int,
    state: str = "COMPLETE",
    values: dict[int, float | None] | None = None,
    confirms: int | None = None,
    sweep: bool = False,
    **attrs: Any,
) -> FrozenTrial:
    """A trial with the given rung values; ``value`` is that of the last rung."""
    values = values or {}
    user: dict[str, Any] = {records.RECIPE: SPACE.to_json(), **attrs}
    for rung, value in values.items():
        key = records.CONFIRM if confirms is not None else f"{records.RUNG}{rung}"
        user[key] = cycle(number, rung, value).to_json()
    if confirms is not None:
        user[records.CONFIRMS] = confirms
    if sweep:
        user[records.RANGE_TEST] = SweepRecord(
            name=f"sweep{number}", context_key="",
            lrs=tuple(1e-6 * 1.2**k for k in range(90)), losses=(1.0,) * 90,
            momentum=0.85, weight_decay=0.0, seed=1, optimizer="SGD", momentum_name="momentum",
            steps=90, seconds=0.5,
        ).to_json()  # fmt: skip
    params = {} if state == "WAITING" else {"max_lr": 0.1 + number / 100}
    made = optuna.create_trial(
        state=TrialState[state],
        value=list(values.values())[-1] if state == "COMPLETE" else None,
        params=params,
        distributions={name: SPACE.distribution("max_lr") for name in params},
        user_attrs=user,
    )
    made.number = number
    made.datetime_start = None if state == "WAITING" else START
    return made


FULL = {0: 0.5, 1: 0.4, 2: 0.3}


def settings(**kwargs: Any) -> Settings:
    return Settings(objective="train:objective", seed=0, **kwargs)


def test_cost_counts_range_tests_pruned_rungs_and_confirmations() -> None:
    runs = read_runs(
        [
            trial(0, values=FULL, sweep=True),
            trial(1, "PRUNED", {0: 0.9}),
            trial(2, values={2: 0.31}, confirms=0),
        ]
    )
    assert total_cost(runs) == Cost(
        steps=90 + 1300 + 100 + 900,
        seconds=5.5,
        cycles=pytest.approx((90 + 1300 + 100 + 900) / 900),
    )


def test_a_record_carried_to_a_retried_trial_is_paid_once() -> None:
    first = trial(0, "FAIL", {0: 0.5}, sweep=True)
    retried = trial(1, values=FULL, sweep=True)
    for key in (records.RANGE_TEST, f"{records.RUNG}0"):
        retried.user_attrs[key] = first.user_attrs[key]
    assert total_cost(read_runs([first, retried])).steps == 90 + 1300


def test_corrupt_records_are_left_out_and_named() -> None:
    broken = trial(3, values=FULL)
    broken.user_attrs[f"{records.RUNG}1"] = {"steps": "many"}
    broken.user_attrs[records.RANGE_TEST] = {"name": "x", "losses": [1]}
    (run,) = read_runs([broken])
    assert run.cycles == ()
    assert run.sweep is None
    assert [text.split(":")[0] for text in run.broken] == ["trial 3", "trial 3"]


# -- what comes next ---------------------------------------------------------------------------


def move(chosen: Settings | None, trials: list[FrozenTrial], now: float | None = None) -> Next:
    return next_move(chosen, read_runs(trials), MIN, now)


def test_without_settings_the_search_never_ends() -> None:
    assert move(None, [trial(i, values=FULL) for i in range(50)]).what == "search"


def test_a_budget_in_trials_counts_running_ones_but_not_failed_ones() -> None:
    chosen = settings(trials=3)
    counted = [trial(0, values=FULL), trial(1, "PRUNED", {0: 1.0}), trial(2, "FAIL")]
    assert move(chosen, counted).what == "search"
    assert move(chosen, [*counted, trial(3, "RUNNING")]) == Next(what="confirm", confirms=0)


def test_confirmations_stop_at_the_seeds_that_were_asked_for() -> None:
    chosen = settings(trials=1, confirm_top=2, confirm_seeds=2)
    trials = [trial(0, values=FULL)]
    for number in (1, 2):
        assert move(chosen, trials) == Next(what="confirm", confirms=0)
        trials.append(trial(number, values={2: 0.3}, confirms=0))
    assert move(chosen, trials).what == "done"


def test_a_budget_in_cycles_keeps_back_what_confirmations_cost() -> None:
    chosen = settings(cycles=10)
    assert confirmations_planned(chosen) == 3
    one = 1300 / 900
    trials = [trial(i, values=FULL) for i in range(4)]
    assert 4 * one < 7
    assert move(chosen, trials).what == "search"
    trials.append(trial(4, values=FULL))
    assert move(chosen, trials).what == "confirm"


def test_a_search_without_a_finished_recipe_gets_the_whole_budget() -> None:
    trials = [trial(i, "PRUNED", {0: 0.5, 1: 0.4}) for i in range(20)]  # 8.9 cycles
    assert move(settings(cycles=10), trials).what == "search"
    trials += [trial(20 + i, "PRUNED", {0: 0.5, 1: 0.4}) for i in range(4)]
    assert move(settings(cycles=10), trials).what == "done"


def test_a_budget_in_time() -> None:
    chosen, now = settings(timeout=100.0), START.timestamp()
    trials = [trial(0, values=FULL)]
    assert move(chosen, trials, now + 60).what == "search"
    assert move(chosen, trials, now + 75).what == "confirm"
    assert move(chosen, trials, now + 101).what == "done"


def test_what_waits_is_handed_out_even_on_a_spent_budget() -> None:
    chosen = settings(trials=1, confirm_seeds=0)
    done = [trial(0, values=FULL)]
    assert move(chosen, done).what == "done"
    assert move(chosen, [*done, trial(1, "WAITING", confirms=0)]).what == "search"
    put_back = trial(1, "WAITING", **{records.OWNER: "abc"})
    assert move(chosen, [*done, put_back]).what == "search"
    assert move(chosen, [*done, trial(1, "WAITING")]).what == "done"


def test_an_odd_seed_goes_to_the_leader() -> None:
    trials = [trial(0, values=FULL), trial(1, values={2: 0.2}), trial(2, values={2: 0.9})]
    order = []
    for number, value in ((3, 0.5), (4, 0.1), (5, 0.1)):
        chosen = next_to_confirm(read_runs(trials), MIN, 2, 3)
        order.append(chosen)
        trials.append(trial(number, values={2: value}, confirms=chosen))
    assert order == [1, 0, 0]  # 1 looked best; its fresh seed says otherwise


# -- the best ----------------------------------------------------------------------------------


def test_confirmed_recipes_rank_first_and_by_fresh_seeds_alone() -> None:
    trials = [
        trial(0, values={2: 0.30}),
        trial(1, values={2: 0.25}),
        trial(2, values={2: 0.01}),  # luck, never confirmed
        trial(3, values={2: 0.31}, confirms=0),
        trial(4, values={2: 0.33}, confirms=0),
        trial(5, values={2: 0.40}, confirms=1),
        trial(6, values={2: 0.42}, confirms=1),
    ]
    best = best_of(read_runs(trials), MIN, "s")
    assert best is not None
    assert best.number == 0
    assert best.mean == pytest.approx(0.32)
    assert best.spread == pytest.approx(math.sqrt(2) / 100)
    assert best.seeds == 2
    assert best.runner_up is not None
    assert best.runner_up.number == 1
    assert best.significant is True
    assert best.params["max_lr"] == pytest.approx(0.1)
    assert best.params["div_factor"] == 25


def test_not_significant_when_the_spread_covers_the_difference() -> None:
    trials = [trial(0, values={2: 0.3}), trial(1, values={2: 0.3})]
    values = ((0, 0.30), (0, 0.40), (1, 0.31), (1, 0.41))
    trials += [trial(2 + i, values={2: v}, confirms=c) for i, (c, v) in enumerate(values)]
    best = best_of(read_runs(trials), MIN, "s")
    assert best is not None
    assert best.significant is False


def test_equal_values_are_compared_without_a_warning() -> None:
    trials = [trial(0, values={2: 0.3}), trial(1, values={2: 0.3})]
    values = ((0, 0.3), (0, 0.3), (1, 0.39), (1, 0.41))
    trials += [trial(2 + i, values={2: v}, confirms=c) for i, (c, v) in enumerate(values)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best = best_of(read_runs(trials), MIN, "s")
    assert best is not None and best.number == 0
    assert best.significant is False  # p = 0.063


def test_one_seed_has_no_spread_and_says_how_to_get_one() -> None:
    best = best_of(read_runs([trial(0, values=FULL)]), MIN, "my [b]study")
    assert best is not None
    assert (best.seeds, best.spread, best.significant, best.confirmed) == (1, None, None, False)
    assert "`hpsched study confirm 'my [b]study'`" in best.hint


def test_maximize_picks_the_largest() -> None:
    trials = [trial(0, values={2: 0.3}), trial(1, values={2: 0.7})]
    assert [c.number for c in rank(read_runs(trials), MAX)] == [1, 0]


def test_a_recipe_that_diverges_on_a_fresh_seed_is_no_winner() -> None:
    trials = [
        trial(0, values={2: 0.1}),
        trial(1, values={2: 0.5}),
        trial(2, "PRUNED", {2: None}, confirms=0, **{records.DIVERGED: "nan"}),
        trial(3, values={2: 0.5}, confirms=1),
    ]
    best = best_of(read_runs(trials), MIN, "s")
    assert best is not None
    assert best.number == 1
    assert best.runner_up is not None
    assert best.runner_up.spread is None
    unconfirmed = best_of(read_runs(trials[:3]), MIN, "s")
    assert unconfirmed is not None
    assert unconfirmed.number == 1


def test_no_full_cycle_no_best() -> None:
    assert best_of(read_runs([trial(0, "PRUNED", {0: 0.5})]), MIN, "s") is None


def test_confirm_says_what_it_queued_and_why_the_named_one_is_not_among_them(
    tmp_path: Path,
) -> None:
    storage = f"sqlite:///{tmp_path}/studies.db"
    study = create_study("my own", objective="a:b", storage=storage, trials=3)
    study.add_trials(
        [
            trial(0, values={2: 0.30}),
            trial(1, values={2: 0.25}),
            trial(2, values={2: 0.01}),
            trial(3, values={2: 0.31}, confirms=0),
            trial(4, values={2: 0.33}, confirms=0),
        ]
    )
    assert hpsched.best(study).number == 0
    command = ["study", "confirm", "my own", "--storage", storage, "--seeds", "2", "--top"]
    done = CliRunner().invoke(app, [*command, "1"])
    assert done.stdout == "2\n"
    assert "Queued, each with 2 fresh seeds: trial 2.\n" in done.stderr
    assert "Not queued: trial 0 (has 2 already), which `hpsched study best` names" in done.stderr
    assert "hpsched study confirm 'my own' --top 3 --seeds 2" in done.stderr
    done = CliRunner().invoke(app, [*command, "3"])
    assert "trial 0 (has 2 already)" in done.stderr and "Not queued" not in done.stderr


@pytest.mark.parametrize("format", ["table", "torch", "json"])
def test_best_gives_its_advice_once(tmp_path: Path, format: str) -> None:
    storage = f"sqlite:///{tmp_path}/studies.db"
    study = create_study("s", objective="a:b", storage=storage, trials=3)
    study.add_trial(trial(0, values={2: 0.30}))
    env = {"COLUMNS": "200"}
    command = ["study", "best", "s", "--storage", storage, "-f", format]
    done = CliRunner().invoke(app, command, env=env)
    assert done.exit_code == 0
    assert (done.stdout + done.stderr).count("one seed only") == 1
