"""A worker asks its database for little, however long the study, and sees what it has to see."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy
from fake_training import FakeTraining
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import Trial, TrialState
from statements import counted

import hpsched
from hpsched import frugal, worker
from hpsched.errors import TrialLostError
from hpsched.frugal import FrugalStorage
from hpsched.storage import backend_of, exclusive, open_storage
from hpsched.study import create_study, delete_study
from hpsched.summary import summarise
from hpsched.worker import Worker

X = FloatDistribution(0.0, 1.0)
A_TRIAL = 72  # statements at most: claim, draw, three rungs, tell; plain Optuna takes 144
AN_END = 13  # finding that nothing is left to do
STATUS = 20


def fill(url: str, trials: int) -> None:
    """A study with finished trials; their values let none but the best climb."""
    create_study("s", objective="train.py:objective", storage=url, trials=trials + 3, confirm_top=0)
    study = hpsched.open_study("s", url)
    study.add_trials(
        optuna.create_trial(params={"x": 0.5}, distributions={"x": X}, value=float(number))
        for number in range(trials)
    )


def objective(trial: Trial) -> float:
    """Three rungs, before each of which so much time passes that nothing is fresh any more."""
    storage = trial.study._storage

    def train(cycle: hpsched.Cycle) -> float:
        if isinstance(storage, FrugalStorage):
            storage.refresh()
        return FakeTraining()(cycle)

    return hpsched.suggest_onecycle(trial, total_steps=900, range_test=False).run(train)


class Climbing(hpsched.CyclePruner):
    """Reads what it needs to decide, and lets every trial run in full."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        super().prune(study, trial)
        return False


def worker_statements(url: str) -> tuple[list[int], int]:
    """Statements of each but the first trial of a worker, and of finding that nothing is left."""
    study = hpsched.open_study("s", url, heartbeat=True)
    study.pruner = Climbing()
    marks: list[int] = []

    class Marking(Worker):
        def _claim(self) -> Trial | None:
            marks.append(sent.total)
            return super()._claim()

    with counted() as sent:
        Marking(study, objective).run()
        marks.append(sent.total)
    _, *trials, end = np.diff(marks).tolist()  # the first asks what it then remembers
    return trials, end


def optuna_statements(url: str) -> list[int]:
    """The same of plain Optuna."""
    study = optuna.load_study(
        study_name="s",
        storage=RDBStorage(url),
        sampler=hpsched.OneCycleSampler(),
        pruner=Climbing(),
    )
    marks = [0]
    with counted() as sent:
        study.optimize(objective, n_trials=3, callbacks=[lambda *_: marks.append(sent.total)])
    return np.diff(marks).tolist()[1:]


@pytest.mark.parametrize("name", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_a_trial_takes_half_of_what_optuna_takes_however_long_the_study(
    name: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frugal, "FRESH_SECONDS", math.inf)  # time passes where we say so
    monkeypatch.setattr(worker, "LOOK_SECONDS", math.inf)
    url = request.getfixturevalue(f"{name}_url")
    counts = {}
    for trials in (20, 200):
        fill(url, trials)
        counts[trials] = worker_statements(url)
        delete_study("s", url)
    assert counts[20] == counts[200]
    trials, end = counts[20]
    assert max(trials) <= A_TRIAL, trials
    assert end <= AN_END
    fill(url, 20)
    assert max(trials) <= 0.5 * min(optuna_statements(url))


def test_status_reads_a_study_in_a_few_statements(storage_url: str) -> None:
    counts = {}
    for trials in (20, 200):
        fill(storage_url, trials)
        with counted() as sent:
            study = hpsched.open_study("s", storage_url)
            sent.clear()
            summarise(study)
            first = sent.total
            summarise(study)
            counts[trials] = first, sent.total - first
        delete_study("s", storage_url)
    assert counts[20] == counts[200]
    assert max(counts[20]) <= STATUS


# -- what is remembered is right -------------------------------------------------------------------


@pytest.fixture
def study(storage_url: str) -> optuna.Study:
    storage = open_storage(storage_url, create=True, heartbeat=True)
    return optuna.create_study(study_name="s", storage=storage)


def other(url: str) -> optuna.Study:
    """The study as another process sees it."""
    return optuna.load_study(study_name="s", storage=RDBStorage(url))


def stored(study: optuna.Study, trial: Trial) -> optuna.trial.FrozenTrial:
    return backend_of(study._storage).get_trial(trial._trial_id)


def write_all(trial: Trial) -> None:
    trial.suggest_float("x", 0.0, 1.0)
    trial.suggest_float("y", 1e-5, 1e5, log=True)
    trial.suggest_categorical("z", ["a", 2, None])
    trial.set_user_attr("note", (1, 2.5, None))
    trial.set_constraint("c", 1.0)
    trial.report(math.inf, 1)
    trial.report(0.5, 2)


def test_a_running_trial_is_what_is_stored(study: optuna.Study) -> None:
    for _ in range(2):  # the first asks what other trials have, the second knows
        trial = study.ask()
        write_all(trial)
        kept, there = study._storage.get_trial(trial._trial_id), stored(study, trial)
        kept.datetime_start = there.datetime_start
        assert kept == there
        assert study.get_trials()[-1] == kept
        study.tell(trial, 0.25)
        assert study._storage.get_trial(trial._trial_id).value == 0.25
        assert study.get_trials() == backend_of(study._storage).get_all_trials(study._study_id)


def test_parameters_are_stored_before_anything_else(study: optuna.Study, storage_url: str) -> None:
    study.tell(_both(study.ask()), 1.0)
    calls: list[Callable[[Trial], Any]] = [
        lambda trial: trial.set_user_attr("note", 1),
        lambda trial: trial.report(0.5, 1),
        lambda trial: study.user_attrs,
        lambda trial: study.get_trials(),
        lambda trial: study._storage.get_trial(trial._trial_id),
        lambda trial: study.tell(trial, 0.5),
    ]
    for call in calls:
        trial = _both(study.ask())
        call(trial)
        assert other(storage_url).trials[-1].params == trial.params


def _both(trial: Trial) -> Trial:
    trial.suggest_float("x", 0.0, 1.0)
    trial.suggest_float("y", 0.0, 1.0)
    return trial


def test_parameters_whose_answer_was_lost_are_not_stored_twice(
    study: optuna.Study, storage_url: str
) -> None:
    study.tell(_both(study.ask()), 1.0)
    trial = _both(study.ask())
    storage = study._storage
    assert isinstance(storage, FrugalStorage)
    rows = list(storage._params)
    storage.flush()
    storage._params = rows  # as if the commit had got through, but not its answer
    study.tell(trial, 0.5)
    assert other(storage_url).trials[-1].params == trial.params


def test_parameters_of_a_trial_that_others_finished_are_refused_once(
    study: optuna.Study, storage_url: str
) -> None:
    study.tell(_both(study.ask()), 1.0)
    trial = _both(study.ask())
    other(storage_url).tell(trial.number, state=TrialState.FAIL)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        trial.set_user_attr("note", 1)
    study.tell(study.ask(), 0.5)


def test_incompatible_parameters_are_refused_at_once(study: optuna.Study) -> None:
    study.tell(_both(study.ask()), 1.0)
    with pytest.raises(ValueError, match="Cannot set different distribution kind"):
        study.ask().suggest_int("x", 0, 1)


def test_what_others_store_is_seen_under_the_lock(study: optuna.Study, storage_url: str) -> None:
    assert study.get_trials() == []
    other(storage_url).enqueue_trial({"x": 0.5})
    other(storage_url).set_user_attr("order", "pause")
    with exclusive(study._storage, "s"):
        assert len(study.get_trials()) == 1
        assert study.user_attrs == {"order": "pause"}


def test_what_others_store_is_seen_within_a_second(
    study: optuna.Study, storage_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1e6
    monkeypatch.setattr(frugal.time, "monotonic", lambda: now)
    assert (study.get_trials(), study.user_attrs) == ([], {})
    other(storage_url).enqueue_trial({"x": 0.5})
    other(storage_url).set_user_attr("order", "pause")
    now += 0.9
    assert (study.get_trials(), study.user_attrs) == ([], {})
    now += 0.1
    assert len(study.get_trials()) == 1
    assert study.user_attrs == {"order": "pause"}


def test_two_studies_of_a_storage_are_told_apart(study: optuna.Study) -> None:
    second = optuna.create_study(study_name="t", storage=study._storage)
    study.set_user_attr("name", "s")
    second.set_user_attr("name", "t")
    study.ask()
    assert (len(study.trials), len(second.trials)) == (1, 0)
    assert (study.user_attrs["name"], second.user_attrs["name"]) == ("s", "t")


def test_a_recipe_that_another_worker_stored_meanwhile_is_not_trained(storage_url: str) -> None:
    """A worker suspended between drawing and storing: its trial was given to another."""
    create_study("s", objective="train.py:objective", storage=storage_url)
    ours, theirs = (hpsched.open_study("s", storage_url, heartbeat=True) for _ in "ab")
    ours.tell(ours.ask({"x": X}), 0.0)  # so that the parameter is known
    trial = ours.ask()
    trial.suggest_float("x", 0.0, 1.0)  # not stored yet
    storage = theirs._storage
    storage.get_all_trials(theirs._study_id)
    storage.set_trial_param(trial._trial_id, "x", 0.123, X)
    storage.get_all_trials(theirs._study_id)  # stores it
    with pytest.raises(TrialLostError, match="given to another"):
        trial.set_user_attr("rung", 0)
    stored = hpsched.open_study("s", storage_url).get_trials()[-1]
    assert (stored.params, stored.user_attrs) == ({"x": 0.123}, {})


def test_the_first_recipe_of_a_process_is_checked_as_well(storage_url: str) -> None:
    create_study("s", objective="train.py:objective", storage=storage_url)
    ours, theirs = (hpsched.open_study("s", storage_url, heartbeat=True) for _ in "ab")
    trial = ours.ask()
    theirs.get_trials()
    theirs._storage.set_trial_param(trial._trial_id, "x", 0.123, X)
    with pytest.raises(TrialLostError, match="given to another"):
        trial.suggest_float("x", 0.0, 1.0)


@pytest.mark.parametrize("value", [0.5, 0.123])
@pytest.mark.parametrize(
    "server",
    [
        pytest.param("postgres", marks=pytest.mark.postgres),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ],
)
def test_a_recipe_that_another_worker_stores_at_this_moment_is_stored_once(
    server: str, value: float, request: pytest.FixtureRequest
) -> None:
    """Two store it, neither having seen the other's: a worker that was suspended in between."""
    url = request.getfixturevalue(f"{server}_url")
    create_study("s", objective="train.py:objective", storage=url)
    ours = hpsched.open_study("s", url, heartbeat=True)
    ours.tell(ours.ask({"x": X}), 0.0)  # so that the parameter is known
    trial = ours.ask()
    ours._storage.set_trial_param(trial._trial_id, "x", 0.5, X)  # not stored yet
    engine = backend_of(ours._storage).engine

    @sqlalchemy.event.listens_for(engine, "before_cursor_execute")
    def stores_it(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("INSERT INTO trial_params") and not stored:
            stored.append(value)
            RDBStorage(url).set_trial_param(trial._trial_id, "x", value, X)

    stored: list[float] = []
    expected = nullcontext() if value == 0.5 else pytest.raises(TrialLostError, match="given to")
    with expected:
        trial.set_user_attr("rung", 0)
    assert stored == [value]
    assert other(url).trials[-1].params == {"x": value}
