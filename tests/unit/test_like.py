"""A study that begins where another one of the same model ended (``study create --like``)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from fake_training import FakeTraining

import hpsched
from hpsched import evidence, records, report_content
from hpsched.coordinates import STANDARD_KAPPA, Coordinates, coordinates
from hpsched.errors import RecordError, UsageError
from hpsched.present import guess_text
from hpsched.study import create_study, first_guess, proposed, read_settings
from hpsched.summary import summarise

SHORT, LONG = 300, 900


def storage(folder: Path) -> str:
    return f"sqlite:///{folder / 'studies.db'}"


def new(folder: Path, name: str, like: optuna.Study | None = None, **options: Any) -> optuna.Study:
    told = {"objective": "train:objective", "seed": 1, "cycles": 40, **options}
    return create_study(name, storage=storage(folder), like=like, **told)


def search(
    study: optuna.Study, trials: int, steps: int = SHORT, train: Any = None, **options: Any
) -> optuna.Study:
    run = train or FakeTraining(horizon=steps)
    study.optimize(
        lambda trial: hpsched.suggest_onecycle(trial, total_steps=steps, **options).run(run),
        n_trials=trials,
    )
    return study


def located(study: optuna.Study) -> Coordinates:
    recipe = next(records.recipe_spaces(study.trials[0]))
    return coordinates(study.trials, recipe, study.directions)


UNUSUAL = {
    "max_lr": 0.6,
    "weight_decay": 2e-3,
    "div_factor": 8.0,
    "pct_start": 0.15,
    "base_momentum": 0.8,
    "max_momentum": 0.97,
}


def ended_at(folder: Path, recipe: dict[str, float]) -> optuna.Study:
    """A study whose best trial has this recipe."""
    study = search(new(folder, "short"), 3)
    study.enqueue_trial(recipe)
    return search(study, 1)


def test_the_first_guess_is_the_best_recipe_in_units_that_carry_over(tmp_path: Path) -> None:
    short = ended_at(tmp_path, UNUSUAL)
    assert hpsched.best(short).recipe.items() >= UNUSUAL.items()
    guess = first_guess(short)
    found = evidence.pool(evidence.sweeps(short.trials), SHORT)
    assert found is not None
    assert guess.pop("max_lr") == pytest.approx(0.6 / found.prior.centre, rel=1e-5)
    assert guess.pop("kappa") == pytest.approx(2e-3 * 0.6 / 0.2 * SHORT, rel=1e-5)
    assert guess == {field: UNUSUAL[field] for field in guess} and len(guess) == 4


def test_a_study_like_another_begins_with_its_recipe(tmp_path: Path) -> None:
    """At another horizon: the same shape and κ, the same distance from the range tests' rate."""
    short = ended_at(tmp_path, UNUSUAL)
    long = new(tmp_path, "long", short)
    settings = read_settings(long)
    assert settings and settings.like == "short" and settings.first_guess == first_guess(short)
    search(long, 1, LONG)
    first = long.trials[0].params
    swept = evidence.pool(evidence.sweeps(long.trials), LONG)
    assert swept is not None
    assert first["max_lr"] == pytest.approx(
        swept.prior.moved(settings.first_guess["max_lr"]).centre
    )
    assert {f: first[f] for f in UNUSUAL if f not in ("max_lr", "weight_decay")} == pytest.approx(
        {f: v for f, v in UNUSUAL.items() if f not in ("max_lr", "weight_decay")}
    )
    kappa = first["weight_decay"] * first["max_lr"] / (1 - first["base_momentum"]) * LONG
    assert kappa == pytest.approx(settings.first_guess["kappa"], rel=1e-3)
    assert (proposed(long) or {})["pct_start"] == UNUSUAL["pct_start"]


def test_without_another_study_nothing_is_different(tmp_path: Path) -> None:
    plain = search(new(tmp_path, "plain"), 6)
    recipe = next(records.recipe_spaces(plain.trials[0]))
    assert recipe.guess == {}
    where = located(plain)
    found = where.evidence
    assert found is not None and found.start == found.prior
    assert where.standard() == where.standard(STANDARD_KAPPA)


def test_it_moves_on_from_a_wrong_start(tmp_path: Path) -> None:
    """Of another model, two octaves off: the search leaves it as it leaves any first guess."""
    short = ended_at(tmp_path, UNUSUAL)
    long = search(new(tmp_path, "long", short), 24, train=FakeTraining(best_lr=0.1, horizon=SHORT))
    assert abs(math.log2(hpsched.best(long).recipe["max_lr"] / 0.1)) < 1.5


def test_narrower_ranges_and_fixed_values_come_first(tmp_path: Path) -> None:
    short = ended_at(tmp_path, UNUSUAL)
    long = search(
        new(tmp_path, "long", short), 1, pct_start=(0.25, 0.4), weight_decay=1e-4, max_momentum=0.9
    )
    assert long.trials[0].params["pct_start"] == 0.25
    assert not {"weight_decay", "max_momentum"} & set(long.trials[0].params)


def test_weight_decay_that_the_optimizer_normalises_away_carries_over_as_it_is(
    tmp_path: Path,
) -> None:
    short = ended_at(tmp_path, UNUSUAL)
    adam = replace(located(short), optimizer="Adam", momentum_name="beta1")
    guess = adam.guess_of(UNUSUAL)
    assert guess["weight_decay"] == UNUSUAL["weight_decay"] and "kappa" not in guess
    there = replace(adam, recipe=replace(adam.recipe, guess=guess))
    assert there.standard()["weight_decay"] == UNUSUAL["weight_decay"]


def test_without_range_tests_the_rate_stays_where_it_would_be(tmp_path: Path) -> None:
    short = search(new(tmp_path, "short", range_tests=0), 1)
    assert "max_lr" not in first_guess(short)
    search(long := new(tmp_path, "long", short), 1)
    found = located(long).evidence
    assert found is not None and found.start == found.prior


@pytest.mark.parametrize("trials", [0, 2])
def test_a_study_without_a_full_run_cannot_be_begun_like(tmp_path: Path, trials: int) -> None:
    short = new(tmp_path, "short")
    if trials:
        search(short, trials)
    with pytest.raises(UsageError, match="'short' has no finished full cycle"):
        new(tmp_path, "long", short)
    assert optuna.get_all_study_names(storage(tmp_path)) == ["short"]  # nothing half made


def test_a_study_of_another_schedule_cannot_be_begun_like(tmp_path: Path) -> None:
    short = search(new(tmp_path, "short", policy="schedule:cosine"), 5)
    with pytest.raises(UsageError, match="follows 'schedule:cosine'"):
        first_guess(short)


@pytest.mark.parametrize("guess", [{"speed": 1.0}, {"max_lr": -1.0}, {"kappa": "low"}, [1.0]])
def test_a_corrupt_guess_is_named(tmp_path: Path, guess: Any) -> None:
    study = new(tmp_path, "short")
    told = {**study.user_attrs[records.SETTINGS], "first_guess": guess}
    study.set_user_attr(records.SETTINGS, told)
    with pytest.raises(RecordError, match="study 'short'"):
        read_settings(study)


def test_what_people_read(tmp_path: Path) -> None:
    long = new(tmp_path, "long", ended_at(tmp_path, UNUSUAL))
    shown = report_content.settings(summarise(search(long, 1)))
    assert shown["like"] == "short"
    assert shown["first_guess"].startswith("max_lr × ")
    assert "κ 1.8, div_factor 8, pct_start 0.15" in shown["first_guess"]
    assert guess_text({"weight_decay": 1e-4, "max_lr": 2.0}) == "max_lr × 2, weight_decay 0.0001"
