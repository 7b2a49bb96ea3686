"""What a study is said to be up to: time left, warnings, the next command, names and seeds."""

from __future__ import annotations

import datetime
import html
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from fake_training import FakeTraining
from optuna.trial import TrialState

import hpsched
from hpsched import records
from hpsched import report_content as content
from hpsched.errors import UsageError
from hpsched.records import WorkerRecord
from hpsched.study import best, create_study, open_study
from hpsched.summary import Summary, summarise
from hpsched.web.content import sections

STEPS = 300


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'studies.db'}"


def new(folder: Path, name: str = "s", **options: Any) -> optuna.Study:
    return create_study(name, objective="train:objective", storage=url(folder), seed=1, **options)


def run(study: optuna.Study, trials: int, train: Any = None) -> optuna.Study:
    work = train or FakeTraining(horizon=STEPS)
    study.optimize(
        lambda trial: hpsched.suggest_onecycle(trial, total_steps=STEPS).run(work), n_trials=trials
    )
    return study


def at_work(study: optuna.Study, count: int, now: float) -> None:
    """So many workers that have just been seen."""
    for pid in range(count):
        record = WorkerRecord(
            host="h", pid=pid, device="cpu", started=now, seen=now, state="running"
        )
        study.set_user_attr(f"{records.WORKER}{pid}", record.to_json())


def later(study: optuna.Study, hours: float) -> float:
    last = max(t.datetime_complete or datetime.datetime.min for t in study.trials)
    return last.timestamp() + 3600 * hours


# ------------------------------------------------------------------ time left


@pytest.mark.parametrize("budget", [{"cycles": 20}, {"trials": 20}])
def test_time_left_counts_work_and_not_the_time_between(
    tmp_path: Path, budget: dict[str, Any]
) -> None:
    study = run(new(tmp_path, **budget), 5)
    now = later(study, hours=9)
    assert summarise(study, now).eta is None  # nobody is at work
    at_work(study, 1, now)
    one = summarise(study, now).eta
    assert one is not None and 0 < one < 600  # the five took seconds, though hours have passed
    at_work(study, 4, now)
    assert summarise(study, now).eta == pytest.approx(one / 4)


def test_time_left_of_a_timeout_is_what_is_left_of_it(tmp_path: Path) -> None:
    study = run(new(tmp_path, timeout=3600), 1)
    began = study.trials[0].datetime_start
    assert began is not None
    assert summarise(study, began.timestamp() + 600).eta == pytest.approx(3000, abs=1)


def test_queued_confirmations_take_time_too(tmp_path: Path) -> None:
    study = run(new(tmp_path, cycles=5, confirm_top=0), 5)
    assert hpsched.best(study)
    hpsched.confirm(study, top=1, seeds=8)
    now = later(study, hours=0)
    at_work(study, 1, now)
    known = summarise(study, now)
    assert known.eta == pytest.approx(8 * known.cost.seconds / known.cost.cycles)


# ------------------------------------------------------------------ what is wrong


def nan(cycle: hpsched.Cycle) -> float:
    value = FakeTraining(horizon=STEPS)(cycle)
    return value if cycle.is_range_test else float("nan")


def said(summary: Summary, words: str) -> bool:
    return any(words in warning for warning in summary.warnings)


def test_a_study_in_which_nothing_is_finite_says_so_and_names_no_recipe(tmp_path: Path) -> None:
    study = run(new(tmp_path), 4, nan)
    known = summarise(study)
    assert said(known, "no run has given a finite result yet: look at what train returns, or lower")
    assert said(known, "then create a new study")
    assert known.saved_cycles == 0  # by ending what could not have gone on
    assert known.next_command == "hpsched doctor --study s"
    with pytest.raises(UsageError, match="hpsched doctor --study s") as error:
        best(study)
    assert "max_lr" not in str(error.value)
    run(study, 4)
    assert not said(summarise(study), "finite") and best(study)
    assert summarise(study).saved_cycles > 0


def test_a_spent_study_says_where_more_search_goes(tmp_path: Path) -> None:
    study = run(new(tmp_path, cycles=3), 1)  # too little to confirm anything

    def outlook() -> str:
        (line,) = [found for found in summarise(study).findings if "more search" in found]
        return line

    assert "new study" not in outlook()
    run(study, 6)
    assert outlook().endswith(
        ("hardly pays", "may pay, in a new study that begins --like this one")
    )


def test_nobody_is_told_to_search_on_where_nothing_is_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "STEPS", 90)  # too few for short cycles
    study = run(new(tmp_path), 6, nan)
    assert not any("more search" in finding for finding in summarise(study).findings)


def test_a_trial_that_may_yet_be_finite_makes_nobody_give_up_the_study(tmp_path: Path) -> None:
    study = run(new(tmp_path), 1, nan)
    now = later(study, hours=0)
    at_work(study, 1, now)
    known = summarise(study, now)
    assert said(known, "look at what train returns") and not said(known, "new study")
    assert content.trouble(known) is None


@pytest.mark.parametrize(
    ("failing", "good", "why"),
    [
        ("nan", 0, "No run has given a finite result: look at what train returns, or lower"),
        ("raises", 0, "Every trial has failed so far: mend the objective first"),
        ("raises", 4, "The last 3 trials failed: mend the objective first"),
    ],
)
def test_page_report_and_command_say_the_same_of_a_study_that_cannot_go_on(
    tmp_path: Path, failing: str, good: int, why: str
) -> None:
    def broken(cycle: hpsched.Cycle) -> float:
        if failing == "raises":
            raise RuntimeError("no data")
        return nan(cycle)

    study = run(new(tmp_path), good)
    for _ in range(3):
        with suppress(RuntimeError):
            run(study, 1, broken)
    known = summarise(study)
    step = content.next_step(known)
    shown = sections(known, 0.0)["next_step"]
    assert step is not None and step.why.startswith(why)
    assert step.why in html.unescape(shown)
    assert step.code == known.next_command == "hpsched doctor --study s"
    assert step.code in shown


@pytest.mark.parametrize("kind", ["cycles", "trials"])
def test_a_budget_too_small_for_another_range_test_is_named_with_one_that_is_not(
    kind: str, tmp_path: Path
) -> None:
    noise = FakeTraining(horizon=STEPS, loss_noise=50.0)  # no descent rises above it
    small = run(new(tmp_path, "small", **{kind: 19}), 3, noise)
    assert said(summarise(small), "has no room for another range test (5 % of it at most)")
    assert said(summarise(small), f"a new study with --{kind} 20 has")
    large = run(new(tmp_path, "large", **{kind: 20}), 3, noise)
    counts = [sum(records.RANGE_TEST in t.user_attrs for t in s.trials) for s in (small, large)]
    assert counts == [1, 2]
    run(unlimited := new(tmp_path, "time", timeout=60.0), 4, noise)
    known = summarise(unlimited)
    assert said(known, "3 range tests give no proposal") and not said(known, "no room")


def test_after_three_failures_the_doctor_comes_next(tmp_path: Path) -> None:
    def broken(cycle: hpsched.Cycle) -> float:
        raise ValueError("no data")

    study = run(new(tmp_path), 2)
    for _ in range(3):
        with pytest.raises(ValueError, match="no data"):
            run(study, 1, broken)
    assert [t.state for t in study.trials[-3:]] == [TrialState.FAIL] * 3
    assert summarise(study).next_command == "hpsched doctor --study s"
    run(study, 1)
    assert summarise(study).next_command == "hpsched worker attach s"


def test_trials_without_a_recipe_spend_the_budget_and_are_told_of(tmp_path: Path) -> None:
    study = new(tmp_path, cycles=4, confirm_top=0)
    study.optimize(lambda trial: trial.suggest_float("a", 0, 1), n_trials=4)
    known = summarise(study)
    assert known.cost.cycles == 4 and known.progress == 1.0
    assert said(known, "4 trials, the last of them trial 3, never called")


def test_a_loop_of_ones_own_spends_a_full_run_for_each_trial(tmp_path: Path) -> None:
    study = new(tmp_path, cycles=4)
    study.optimize(
        lambda trial: hpsched.suggest_onecycle(trial, total_steps=STEPS).max_lr, n_trials=2
    )
    known = summarise(study)
    assert (known.cost.cycles, known.cost.steps) == (2, 2 * STEPS)
    assert not said(known, "suggest_onecycle")


# ------------------------------------------------------------------ names and seeds


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "one"])
def test_a_seed_that_generators_refuse_is_refused_before_anything_is_stored(
    tmp_path: Path, seed: Any
) -> None:
    with pytest.raises(UsageError, match=r"seed=.*0 to 4294967295"):
        create_study("s", objective="a:b", storage=url(tmp_path), seed=seed)
    with pytest.raises(UsageError, match="seed="):
        hpsched.OneCycleSampler(seed=seed)
    assert not (tmp_path / "studies.db").exists()


def test_seeds_of_numpy_and_at_the_ends_will_do() -> None:
    for seed in (0, 2**32 - 1, np.int64(7), None):
        hpsched.OneCycleSampler(seed=seed)


@pytest.mark.parametrize("name", ["x" * 251, " s", "s ", "a\x01b", "a\nb"])
def test_a_name_that_a_database_or_a_screen_cannot_hold_is_refused(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match="at most 250 printable"):
        new(tmp_path, name)


@pytest.mark.parametrize(
    "budget", [{"cycles": -3}, {"cycles": 0}, {"cycles": float("inf")}, {"cycles": float("nan")},
               {"trials": 0}, {"trials": 10**20}, {"timeout": 0}]
)  # fmt: skip
def test_budgets_have_one_rule(tmp_path: Path, budget: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"a budget must be above 0 and below 1e\+09"):
        new(tmp_path, **budget)


def test_a_study_with_unreadable_settings_can_be_removed(tmp_path: Path) -> None:
    study = new(tmp_path)
    study.set_user_attr(records.SETTINGS, {"objective": 1})
    with pytest.raises(hpsched.errors.RecordError):
        open_study("s", url(tmp_path))
    hpsched.study.delete_study("s", url(tmp_path))
    assert optuna.get_all_study_names(url(tmp_path)) == []
