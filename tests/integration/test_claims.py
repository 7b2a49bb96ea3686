"""Which running trials have lost their worker, and what becomes of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from hpsched import claims, records
from hpsched.storage import backend_of, clock
from hpsched.study import create_study, open_study
from hpsched.worker import Worker

INTERVAL, GRACE = 1, 3


@pytest.fixture
def study(storage_url: str, monkeypatch: pytest.MonkeyPatch) -> optuna.Study:
    monkeypatch.setenv("HPSCHED_HEARTBEAT", str(INTERVAL))
    monkeypatch.setenv("HPSCHED_GRACE", str(GRACE))
    create_study("fake", objective="train.py:objective", storage=storage_url, trials=3)
    return open_study("fake", storage_url, heartbeat=True)


@pytest.fixture
def trial(study: optuna.Study) -> int:
    """A running trial that has just beaten."""
    trial = study.ask()
    claims.claim(study, trial, "another")
    return trial._trial_id


class Ticks:
    """A clock that goes when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def beat_at(study: optuna.Study, trial_id: int, seconds_ago: float) -> None:
    """Set the trial's last beat, by the database's clock."""
    engine = backend_of(study._storage).engine
    text = {
        "sqlite": "datetime('now', '{} seconds')",
        "postgresql": "now() + interval '{} seconds'",
        "mysql": "now() + interval {} second",
    }[engine.dialect.name].format(-seconds_ago)
    with engine.begin() as connection:
        update = f"UPDATE trial_heartbeats SET heartbeat = {text} WHERE trial_id = {trial_id}"
        assert connection.execute(sqlalchemy.text(update)).rowcount == 1


def looks(watch: claims.Watch, ticks: Ticks, seconds: float) -> list[set[int]]:
    """What is seen in looks at every beat, for so long."""
    found = [watch.look()]
    for _ in range(round(seconds / INTERVAL)):
        ticks.now += INTERVAL
        found.append(watch.look())
    return found


@pytest.mark.parametrize("age", [100, -100])  # -100: the database's clock was set back
def test_a_silent_trial_is_lost_after_two_beats_of_watching(
    age: int, study: optuna.Study, trial: int
) -> None:
    watch = claims.Watch(study, ticks := Ticks())
    beat_at(study, trial, age)
    assert looks(watch, ticks, 3 * INTERVAL) == [set(), set(), {trial}, {trial}]
    assert watch.suspects


def test_a_trial_that_beats_is_not_lost_however_old_its_last_beat_was(
    study: optuna.Study, trial: int
) -> None:
    watch = claims.Watch(study, ticks := Ticks())
    beat_at(study, trial, 100)  # as after an outage of the database
    assert looks(watch, ticks, INTERVAL) == [set(), set()]
    claims.beat(study, trial)
    assert looks(watch, ticks, 3 * INTERVAL) == [set()] * 4
    assert not watch.suspects
    beat_at(study, trial, 200)  # another clock: beats, but always old
    assert looks(watch, ticks, INTERVAL) == [set()] * 2
    beat_at(study, trial, 199)
    assert looks(watch, ticks, INTERVAL) == [set()] * 2


def test_nobody_is_lost_while_nobody_watches(study: optuna.Study, trial: int) -> None:
    watch = claims.Watch(study, ticks := Ticks())
    beat_at(study, trial, 100)
    for _ in range(3):  # the database was away, or the watcher busy, in between
        assert watch.look() == set()
        ticks.now += 100
    assert looks(watch, ticks, 2 * INTERVAL)[-1] == {trial}


def test_trials_that_never_beat_are_not_ours_to_judge(study: optuna.Study) -> None:
    study.ask()  # by plain Optuna
    watch = claims.Watch(study, ticks := Ticks())
    assert looks(watch, ticks, 3 * INTERVAL) == [set()] * 4
    assert not watch.beats


def test_other_studies_trials_are_not_seen(
    study: optuna.Study, trial: int, storage_url: str
) -> None:
    create_study("other", objective="train.py:objective", storage=storage_url)
    watch = claims.Watch(open_study("other", storage_url, heartbeat=True), Ticks())
    watch.look()
    assert not watch.beats


def test_a_trial_that_kills_its_workers_fails_in_the_end(study: optuna.Study, trial: int) -> None:
    storage: Any = study._storage

    def dies() -> TrialState:
        claims.take_from_the_dead(study, storage.get_trial(trial))
        state: TrialState = storage.get_trial(trial).state
        if state == TrialState.WAITING:
            assert storage.set_trial_state_values(trial, TrialState.RUNNING)
        return state

    assert [dies() for _ in range(claims.DEATHS - 1)] == [TrialState.WAITING] * (claims.DEATHS - 1)
    storage.set_trial_user_attr(trial, f"{records.RUNG}0", {})  # it finished a run: counted anew
    assert [dies() for _ in range(claims.DEATHS - 1)] == [TrialState.WAITING] * (claims.DEATHS - 1)
    assert dies() == TrialState.FAIL
    assert (
        f"died {claims.DEATHS} times in a row" in storage.get_trial(trial).user_attrs[records.ERROR]
    )


def test_where_workers_die_everywhere_it_takes_more(study: optuna.Study, trial: int) -> None:
    storage: Any = study._storage
    other = study.ask()
    for _ in range(claims.DEATHS + 2):
        claims.take_from_the_dead(study, storage.get_trial(other._trial_id))
        storage.set_trial_state_values(other._trial_id, TrialState.RUNNING)
        storage.set_trial_user_attr(other._trial_id, f"{records.RUNG}{_}", {})
    for _ in range(claims.DEATHS + 1):
        claims.take_from_the_dead(study, storage.get_trial(trial))
        assert storage.set_trial_state_values(trial, TrialState.RUNNING)
    claims.take_from_the_dead(study, storage.get_trial(trial))
    assert storage.get_trial(trial).state == TrialState.FAIL


def test_a_process_that_has_ended_on_this_host_is_known_at_once(
    study: optuna.Study, trial: int
) -> None:
    code = "from hpsched import claims; print(claims.new_worker_id(), flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout
        worker = child.stdout.readline().strip()
        study._storage.set_trial_user_attr(trial, records.OWNER, worker)
        watch = claims.Watch(study, Ticks())
        assert watch.look() == set()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert claims.is_gone(worker)  # its parent has not noticed yet
        child.wait()
        assert watch.look() == {trial}
    name, kernel, pid, birth = worker.split("-")
    assert not claims.is_gone(f"{name}-{kernel[::-1]}-{pid}-{birth}")  # another host's
    own = claims.new_worker_id()
    assert not claims.is_gone(own)
    assert claims.is_gone(f"{own[:-1]}{9 - int(own[-1])}")  # the number was given out again
    assert not claims.is_gone("another")


def test_the_time_is_the_databases(
    study: optuna.Study, storage_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = clock(study._storage)()
    assert abs(before - time.time()) < 5  # the servers are on this host
    if storage_url.startswith("sqlite"):
        return
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)  # a host whose clock is ahead
    ahead = Worker(study, lambda trial: 0.0)
    assert 0 <= ahead._record.seen - before < 60
