"""Workers do as they are told through the study: pause, resume, drain, stop."""

from __future__ import annotations

import json
import time

import forked
import pytest
from fleet import QUICK, Fleet, environment
from optuna.trial import TrialState

from hpsched import orders
from hpsched.errors import UsageError
from hpsched.study import at_work

SLOW = {"PACE": '{"rung0": 0.3, "rung1": 0.3, "rung2": 0.3}', **QUICK}


def told(fleet: Fleet, order: str, *who: str) -> str:
    """What ``hpsched worker ORDER`` says."""
    command = ["worker", order, "fake", *who, "--storage", fleet.url]
    done = forked.call(command, cwd=fleet.folder, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def until_state(fleet: Fleet, state: str) -> None:
    fleet.until(lambda: [w.state for w in at_work(fleet.study()).values()] == [state])


@pytest.mark.postgres
def test_a_worker_pauses_and_resumes(postgres_fleet: Fleet) -> None:
    fleet = postgres_fleet
    fleet.create(trials=4, seed=1, confirm_top=0)
    worker = fleet.start(**SLOW)
    fleet.until_starts("rung0", worker.pid)
    assert f":{worker.pid} pause" in told(fleet, "pause")
    until_state(fleet, "paused")
    states = [trial.state for trial in fleet.study().trials]
    assert states
    assert all(state.is_finished() for state in states)
    calls = fleet.calls()
    time.sleep(2)
    assert fleet.calls() == calls
    assert worker.poll() is None
    (listed,) = json.loads(told(fleet, "list", "--format", "json"))
    assert (listed["pid"], listed["state"], listed["done"]) == (worker.pid, "paused", len(states))
    assert "paused" in told(fleet, "list")
    told(fleet, "resume")
    fleet.wait(worker)
    assert len(fleet.study().trials) == 4
    assert not at_work(fleet.study())


def test_a_drained_worker_finishes_its_trial_and_ends(sqlite_fleet: Fleet) -> None:
    fleet = sqlite_fleet
    fleet.create(trials=20, seed=1)
    worker = fleet.start(**SLOW)
    fleet.until_starts("rung0", worker.pid)
    told(fleet, "drain")
    fleet.wait(worker)
    trials = fleet.study().trials
    assert 1 <= len(trials) < 20
    assert all(trial.state.is_finished() for trial in trials)


def test_a_stopped_worker_puts_its_trial_back_and_ends(sqlite_fleet: Fleet) -> None:
    fleet = sqlite_fleet
    fleet.create(trials=2, seed=1, confirm_top=0)
    worker = fleet.start(PACE='{"rung1": 60}', **QUICK)
    name = fleet.until_starts("rung1", worker.pid)
    told(fleet, "stop")
    said = fleet.wait(worker, 0, seconds=50)
    assert "told to stop" in said
    assert "SIGTERM" not in said  # nobody sent one
    unfinished = [trial for trial in fleet.study().trials if not trial.state.is_finished()]
    assert [trial.state for trial in unfinished] == [TrialState.WAITING]
    fleet.run()
    assert sum(n == name and word == "ends" for _, n, word in fleet.calls()) == 1
    assert all(trial.state.is_finished() for trial in fleet.study().trials)


def test_orders_reach_those_they_are_for(sqlite_fleet: Fleet) -> None:
    fleet = sqlite_fleet
    fleet.create(trials=20, seed=1)
    with pytest.raises(UsageError, match="No worker is at work on 'fake': nothing to drain"):
        orders.give(fleet.study(), "drain")
    first, second = (fleet.start(PACE='{"rung0": 60, "range_test0": 60}', **QUICK) for _ in "ab")
    fleet.until(lambda: len(at_work(fleet.study())) == 2)
    ids = {worker.pid: id_ for id_, worker in at_work(fleet.study()).items()}
    with pytest.raises(UsageError, match=r"No worker 'nobody'; at work are: .*:.* all of them"):
        orders.give(fleet.study(), "stop", ["nobody"])
    with pytest.raises(UsageError, match="order='dance': one of pause"):
        orders.give(fleet.study(), "dance")
    told(fleet, "pause", ids[second.pid])
    listed = {w["pid"]: w["order"] for w in json.loads(told(fleet, "list", "--format", "json"))}
    assert listed == {first.pid: None, second.pid: "pause"}
    assert told(fleet, "list").count("pauses after it") == 1
    screen = ["study", "status", "fake", "--storage", fleet.url]
    shown = forked.call(screen, cwd=fleet.folder, env=environment(COLUMNS="200"))
    assert "pauses after it" in " ".join(shown.stdout.split())
    assert list(orders.give(fleet.study(), "stop", [ids[first.pid][:6]])) == [ids[first.pid]]
    fleet.wait(first, seconds=50)
    assert second.poll() is None
    host = at_work(fleet.study())[ids[second.pid]].host
    told(fleet, "stop", f"{host}:{second.pid}")
    fleet.wait(second, seconds=50)
