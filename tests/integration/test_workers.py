"""Workers as real processes: exact budgets, exact repeats, and nothing lost however they end."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import optuna
import pytest
from fake_training import FakeTraining
from optuna.trial import TrialState

import hpsched
from hpsched import ledger, records
from hpsched.worker import Worker
from tests.faults.account import FINISHED, check, confirmations, search
from tests.faults.servers import Postgres
from tests.fleet import QUICK, Fleet


def check_runs(fleet: Fleet, *, repeated: int = 0) -> None:
    """No run was trained twice, except those that were cut short."""
    started = Counter(name for _, name, word in fleet.calls() if word == "starts")
    ended = Counter(name for _, name, word in fleet.calls() if word == "ends")
    assert sum(started.values()) - len(started) == repeated, started.most_common(3)
    rungs = {name: n for name, n in ended.items() if "range_test" not in name}
    assert set(rungs.values()) == {1}, rungs


# -- budgets ---------------------------------------------------------------------------------------


def test_three_workers_share_a_budget_of_trials(fleet: Fleet) -> None:
    fleet.create(trials=15, seed=1)
    fleet.run(3)
    trials = fleet.study().trials
    check(trials, 15)
    check_runs(fleet)
    confirmed = confirmations(trials)
    assert sum(confirmed.values()) == 6
    assert max(confirmed.values()) <= 3
    assert len({pid for pid, _, _ in fleet.calls()}) == 3
    assert len({tuple(sorted(trial.params.items())) for trial in search(trials)}) == 15
    roles = [trial.user_attrs.get(records.REFINES) for trial in trials]
    assert sorted(role for role in roles if role is not None) == [0, 1, 2, 3]
    numbers = [trial.number for trial in trials]
    assert numbers == list(range(len(trials)))


def test_three_workers_share_a_budget_of_cycles(sqlite_fleet: Fleet) -> None:
    sqlite_fleet.create(cycles=12, seed=1)
    sqlite_fleet.run(3)
    study = sqlite_fleet.study()
    check(study.trials, len(search(study.trials)))
    check_runs(sqlite_fleet)
    cost = ledger.total_cost(ledger.read_runs(study.trials))
    a_trial = 1 + 1 / 3 + 1 / 9 + 100 / 900  # begun while there was budget left
    assert 12 - 1 <= cost.cycles <= 12 + 3 * a_trial
    assert sum(confirmations(study.trials).values()) == 3


def test_one_worker_confirms_as_planned(sqlite_fleet: Fleet) -> None:
    sqlite_fleet.create(trials=6, seed=1)
    ended = sqlite_fleet.work()
    trials = sqlite_fleet.study().trials
    check(trials, 6)
    assert (ended.done + ended.pruned, ended.confirmed, ended.failed) == (6, 6, 0)
    runs = ledger.read_runs(search(trials))  # what was known when the search ended
    best = ledger.rank(runs, sqlite_fleet.study().direction, unconfirmed=True)[:2]
    assert confirmations(trials) == {candidate.number: 3 for candidate in best}


def test_confirmations_run_on_a_spent_budget(sqlite_fleet: Fleet) -> None:
    sqlite_fleet.create(trials=4, seed=1, confirm_top=0)
    sqlite_fleet.work()
    assert not confirmations(sqlite_fleet.study().trials)
    assert hpsched.confirm(sqlite_fleet.study(), top=1, seeds=4) == 4
    sqlite_fleet.work()
    trials = sqlite_fleet.study().trials
    check(trials, 4)
    assert list(confirmations(trials).values()) == [4]
    seeds = {trial.user_attrs[records.CONFIRM]["seed"] for trial in trials[4:]}
    assert len(seeds) == 4


def test_a_trial_enqueued_by_hand_is_run_within_the_budget(sqlite_fleet: Fleet) -> None:
    sqlite_fleet.create(trials=3, seed=1, confirm_top=0)
    sqlite_fleet.study().enqueue_trial({"max_lr": 0.123})
    sqlite_fleet.work()
    trials = sqlite_fleet.study().trials
    check(trials, 3)
    assert trials[0].params["max_lr"] == 0.123


# -- seeds -----------------------------------------------------------------------------------------


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "sampler", ["hpsched", "tpe", "qmc", *map(slow, ("cmaes", "gp", "random"))]
)
def test_one_worker_repeats_exactly(sampler: str, sqlite_fleet: Fleet) -> None:
    def run(name: str, seed: int) -> list[Any]:
        sqlite_fleet.create(name, trials=13, seed=seed, sampler=sampler, confirm_top=0)
        sqlite_fleet.work(name)
        return [(t.state, t.params, t.values) for t in sqlite_fleet.study(name).trials]

    first = run("first", 7)
    assert run("second", 7) == first
    assert run("other", 8) != first


def test_another_process_repeats_exactly(sqlite_fleet: Fleet) -> None:
    seen = []
    for name, run in (("a", sqlite_fleet.work), ("b", lambda name: sqlite_fleet.run(name=name))):
        sqlite_fleet.create(name, trials=5, seed=3, confirm_top=1, confirm_seeds=1)
        run(name)
        seen.append([(t.state, t.params, t.values) for t in sqlite_fleet.study(name).trials])
    assert seen[0] == seen[1]


def objective(trial: optuna.Trial) -> float:
    return hpsched.suggest_onecycle(trial, total_steps=900).run(FakeTraining())


# -- killed, suspended, interrupted ----------------------------------------------------------------


def test_a_killed_workers_trial_goes_on_elsewhere(fleet: Fleet) -> None:
    fleet.create(trials=1, seed=1, confirm_top=1, confirm_seeds=2)
    victim = fleet.start(PACE='{"rung2": 60}', **QUICK)
    name = fleet.until_starts("rung2", victim.pid)
    heir = fleet.start(**QUICK)  # finds nothing to do, but waits for a sign of life
    victim.kill()
    victim.wait()
    output = fleet.wait(heir)
    assert "its worker is gone; back in the queue" in output
    trials = fleet.study().trials
    check(trials, 1)
    check_runs(fleet, repeated=1)
    assert Counter(n for _, n, word in fleet.calls() if word == "starts")[name] == 2
    assert sum(confirmations(trials).values()) == 2


def test_a_worker_leaves_while_another_one_is_alive_and_busy(sqlite_fleet: Fleet) -> None:
    sqlite_fleet.create(trials=1, seed=1, confirm_top=0)
    busy = sqlite_fleet.start(PACE='{"rung0": 60}', **QUICK)
    sqlite_fleet.until_starts("rung0", busy.pid)
    sqlite_fleet.wait(sqlite_fleet.start(**QUICK), seconds=15)
    assert busy.poll() is None


def test_a_suspended_worker_drops_the_trial_it_lost(fleet: Fleet) -> None:
    fleet.create(trials=1, seed=1, confirm_top=0)
    paused = fleet.start(PACE='{"rung2": 3}', **QUICK)
    name = fleet.until_starts("rung2", paused.pid)
    os.kill(paused.pid, signal.SIGSTOP)
    heir = fleet.start(**QUICK)
    fleet.until(lambda: sum(n == name and w == "ends" for _, n, w in fleet.calls()))
    os.kill(paused.pid, signal.SIGCONT)
    fleet.wait(heir)
    assert "given to another worker; dropped here" in fleet.wait(paused)
    check(fleet.study().trials, 1)


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("range_test0", signal.SIGTERM),
        ("rung1", signal.SIGTERM),
        ("rung2", signal.SIGINT),
        ("confirm2", signal.SIGTERM),
    ],
)
def test_an_interrupted_worker_puts_its_trial_back(
    where: str, number: signal.Signals, sqlite_fleet: Fleet
) -> None:
    fleet = sqlite_fleet
    fleet.create(trials=3, seed=1, confirm_top=1, confirm_seeds=1)
    worker = fleet.start(PACE=f'{{"{where}": 60}}')
    fleet.until_starts(where)
    worker.send_signal(number)
    assert "back in the queue" in fleet.wait(worker, 128 + number, seconds=50)
    trials = fleet.study().trials
    assert [t.state for t in trials if not t.state.is_finished()] == [TrialState.WAITING]
    fleet.work()
    check(fleet.study().trials, 3)
    check_runs(fleet, repeated=1)


def test_a_signal_that_comes_twice_is_one(sqlite_fleet: Fleet) -> None:
    """Schedulers signal all processes of a job, and one of these passes it on to the others."""
    fleet = sqlite_fleet
    fleet.create(trials=1, seed=1, confirm_top=0)
    worker = fleet.start(PACE='{"rung1": 60}')
    fleet.until_starts("rung1")
    for _ in range(3):
        worker.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert "back in the queue" in fleet.wait(worker, 143)
    assert [trial.state for trial in fleet.study().trials] == [TrialState.WAITING]


def test_signals_at_any_moment(sqlite_fleet: Fleet) -> None:
    end_again_and_again(sqlite_fleet, times=3)


@pytest.mark.slow
def test_signals_at_many_moments(fleet: Fleet) -> None:
    end_again_and_again(fleet, times=12)


def end_again_and_again(fleet: Fleet, times: int) -> None:
    """In claims, in writes, anywhere: the totals stay exact."""
    fleet.create(trials=6, seed=1, confirm_top=1, confirm_seeds=2)
    pause = 0.0
    for _ in range(times):
        calls = len(fleet.calls())
        worker = fleet.start()
        fleet.until(lambda held=worker, n=calls: held.poll() is not None or len(fleet.calls()) > n)
        time.sleep(pause)
        pause += 0.037
        if worker.poll() is None:
            worker.send_signal(signal.SIGTERM)
        output, _ = worker.communicate(timeout=60)
        # Killed: it had ended its work, and was about to exit.
        assert worker.returncode in (0, 128 + signal.SIGTERM, -signal.SIGTERM), output
        assert "Traceback" not in output
        running = fleet.study().get_trials(states=(TrialState.RUNNING,))
        assert not running
        if worker.returncode == 0:
            break
    fleet.work()
    trials = fleet.study().trials
    check(trials, 6)
    assert sum(confirmations(trials).values()) == 2


@pytest.mark.slow
def test_killed_at_any_moment(fleet: Fleet) -> None:
    """SIGKILL leaves nothing that the next workers cannot mend."""
    fleet.create(trials=6, seed=1, confirm_top=1, confirm_seeds=2)
    for turn in range(10):
        calls = len(fleet.calls())
        worker = fleet.start(**QUICK)
        fleet.until(lambda held=worker, n=calls: held.poll() is not None or len(fleet.calls()) > n)
        time.sleep(0.041 * turn)
        worker.kill()
        worker.communicate()
    fleet.run(2, **QUICK)
    trials = fleet.study().trials
    check(trials, 6)
    assert sum(confirmations(trials).values()) == 2


# -- inside one process ----------------------------------------------------------------------------


@pytest.fixture
def study(sqlite_url: str) -> optuna.Study:
    hpsched.create_study(
        "s", objective="train.py:objective", storage=sqlite_url, trials=2, seed=1, confirm_top=0
    )
    return hpsched.open_study("s", sqlite_url, heartbeat=True)


@pytest.fixture
def quiet_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("quiet_signals")
@pytest.mark.parametrize("where", ["ask", "set_user_attr", "record_heartbeat", "get_trials"])
def test_a_signal_in_a_claim(
    where: str, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, name = {
        "ask": (study, "ask"),
        "get_trials": (study, "get_trials"),
        "set_user_attr": (study._storage, "set_trial_user_attr"),
        "record_heartbeat": (study._storage._backend, "record_heartbeat"),  # type: ignore[attr-defined]
    }[where]
    original = getattr(target, name)

    def then_signal(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        monkeypatch.setattr(target, name, original)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(target, name, then_signal)
    ended = Worker(study, objective).run()
    assert ended.interrupted
    states = [trial.state for trial in study.get_trials()]
    assert states in ([], [TrialState.WAITING])
    assert not Worker(study, objective).run().interrupted
    assert len(study.get_trials(states=FINISHED)) == 2


def test_the_same_signal_while_the_first_is_being_told(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedulers signal a whole group: the second may come at any moment, in the handler too."""

    class Twice(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "again to end at once" in record.getMessage():
                os.kill(os.getpid(), signal.SIGTERM)

    def signalled(trial: optuna.Trial) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return objective(trial)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ended: list[int] = []
    monkeypatch.setattr(Worker, "_end_process", lambda worker, number: ended.append(number))
    log, twice = logging.getLogger("hpsched.worker"), Twice()
    log.addHandler(twice)
    try:
        assert Worker(study, signalled, ends_process=True).run().interrupted
    finally:
        log.removeHandler(twice)
        for number, handler in before.items():  # a process that ends leaves them ignored
            signal.signal(number, handler)
    assert [trial.state for trial in study.get_trials()] == [TrialState.WAITING]
    assert not ended


class Killed(BaseException):
    """Stands in for a process that dies: nothing of ours runs after it."""


@pytest.mark.parametrize("method", ["set_trial_user_attr", "record_heartbeat", "create_new_trial"])
def test_a_claim_cut_off_anywhere_leaves_no_silent_running_trial(
    method: str, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = study._storage._backend  # type: ignore[attr-defined]
    if method == "set_trial_user_attr":  # a trial of ours has its mark from the beginning
        study.enqueue_trial({})
    name = "_create_new_trial" if method == "create_new_trial" else method
    original = getattr(backend, name)

    def die(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(backend, name, die)
    with pytest.raises(Killed):
        Worker(study, objective).run()
    monkeypatch.setattr(backend, name, original)
    assert not study.get_trials(states=(TrialState.RUNNING,))
    Worker(study, objective).run()
    assert [trial.state.is_finished() for trial in study.get_trials()] == [True, True]


def test_a_claim_whose_answer_was_lost_is_found_again(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = study.ask

    def ask(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(study, "ask", original)
        original(*args, **kwargs)
        raise lost()

    monkeypatch.setattr(study, "ask", ask)
    Worker(study, objective).run()
    assert [trial.state.is_finished() for trial in study.get_trials()] == [True, True]


def test_a_result_whose_answer_was_lost_is_told_once(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = study._storage._backend  # type: ignore[attr-defined]
    original = backend.set_trial_state_values
    losses = []

    def set_state(trial_id: int, state: TrialState, values: Any = None) -> Any:
        found = original(trial_id, state=state, values=values)
        if state.is_finished() and trial_id not in losses:
            losses.append(trial_id)
            raise lost()
        return found

    monkeypatch.setattr(backend, "set_trial_state_values", set_state)
    ended = Worker(study, objective).run()
    assert len(losses) == 2
    assert ended.done + ended.pruned == 2
    assert [trial.state.is_finished() for trial in study.get_trials()] == [True, True]


def lost() -> Exception:
    import sqlalchemy.exc

    return sqlalchemy.exc.OperationalError("COMMIT", {}, Exception("server closed the connection"))


@pytest.mark.parametrize("unheard", [0, 1])
def test_a_signal_inside_a_database_call_waits_until_it_is_over(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch, unheard: int
) -> None:
    import sqlalchemy

    # The repetition after the call may come as the main thread enters a system call, where Python
    # does not notice it: seen once in thousands of runs.
    deliver, unnoticed = signal.pthread_kill, []

    def lossy(thread: int, number: int) -> None:
        if torn[-1:] == [False] and len(unnoticed) < unheard:
            unnoticed.append(number)
        else:
            deliver(thread, number)

    monkeypatch.setattr(signal, "pthread_kill", lossy)

    torn = []

    @sqlalchemy.event.listens_for(study._storage._backend.engine, "before_cursor_execute")  # type: ignore[attr-defined]
    def _on_execute(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "INSERT INTO trial_params" in statement and not torn:
            torn.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            torn.append(False)

    def suggest_only(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        time.sleep(30)
        return 1.0

    began = time.monotonic()
    assert Worker(study, suggest_only).run().interrupted
    assert torn == [True, False] and len(unnoticed) == unheard
    assert time.monotonic() - began < 25  # of the 30 that the objective would take
    (trial,) = study.get_trials()
    assert trial.state == TrialState.WAITING
    assert "x" in trial.params


def test_processes_that_the_objective_forks_die_as_without_us(study: optuna.Study) -> None:
    def forking(trial: optuna.Trial) -> float:
        context = multiprocessing.get_context("fork")
        child = context.Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.3)
        child.terminate()
        child.join(10)
        return float(child.exitcode or 0)

    ended = Worker(study, forking).run()
    assert not ended.interrupted
    assert [trial.value for trial in study.get_trials()] == [-signal.SIGTERM] * 2


def test_a_keyboard_interrupt_of_another_handler_puts_the_trial_back(study: optuna.Study) -> None:
    def framework(trial: optuna.Trial) -> float:
        raise KeyboardInterrupt

    assert Worker(study, framework).run().signal == signal.SIGINT
    assert [trial.state for trial in study.get_trials()] == [TrialState.WAITING]


def test_an_objective_that_returns_nan_fails(study: optuna.Study) -> None:
    with pytest.raises(hpsched.errors.TrainingError, match="returned nan"):
        Worker(study, lambda trial: float("nan")).run()
    assert [trial.state for trial in study.get_trials()] == [TrialState.FAIL] * 3


@pytest.fixture
def longer(sqlite_url: str) -> optuna.Study:
    hpsched.create_study(
        "s", objective="train.py:objective", storage=sqlite_url, trials=10, seed=1, confirm_top=0
    )
    return hpsched.open_study("s", sqlite_url, heartbeat=True)


def test_a_training_that_only_gives_nan_is_given_up(longer: optuna.Study) -> None:
    def train(cycle: hpsched.Cycle) -> float:
        value = FakeTraining()(cycle)
        return value if cycle.is_range_test else float("nan")

    def objective(trial: optuna.Trial) -> float:
        return hpsched.suggest_onecycle(trial, total_steps=900).run(train)

    with pytest.raises(hpsched.errors.TrainingError, match="6 trials in a row gave no finite"):
        Worker(longer, objective).run()
    assert [trial.state for trial in longer.get_trials()] == [TrialState.PRUNED] * 6


def test_divergence_is_borne_once_anything_was_finite(longer: optuna.Study) -> None:
    def objective(trial: optuna.Trial) -> float:
        blind = trial.number > 0

        def train(cycle: hpsched.Cycle) -> float:
            value = FakeTraining()(cycle)
            return float("nan") if blind and not cycle.is_range_test else value

        return hpsched.suggest_onecycle(trial, total_steps=900).run(train)

    assert Worker(longer, objective).run().pruned >= 9


def test_a_study_deleted_under_a_worker(study: optuna.Study) -> None:
    def delete(trial: optuna.Trial) -> float:
        optuna.delete_study(study_name="s", storage=study._storage)
        return 1.0

    with pytest.raises(hpsched.errors.StudyNotFoundError, match="deleted"):
        Worker(study, delete).run()


def test_an_objective_with_a_broken_database_of_its_own_fails(study: optuna.Study) -> None:
    def reads_a_table(trial: optuna.Trial) -> float:
        raise lost()

    with pytest.raises(hpsched.errors.TrainingError, match="3 trials failed in a row"):
        Worker(study, reads_a_table).run()
    assert [trial.state for trial in study.get_trials()] == [TrialState.FAIL] * 3


# -- the server goes away --------------------------------------------------------------------------


@pytest.mark.postgres
def test_postgresql_restarts_under_two_workers(postgres: Postgres, postgres_fleet: Fleet) -> None:
    fleet = postgres_fleet
    fleet.create(trials=8, seed=1, confirm_top=1, confirm_seeds=2)
    pace = '{"rung0": 0.2, "rung1": 0.2, "rung2": 0.5}'
    workers = [fleet.start(PACE=pace) for _ in range(2)]
    for part in ("rung0", "rung2"):
        fleet.until_starts(part)
        postgres.stop()
        time.sleep(1.5)
        postgres.start()
    for worker in workers:
        fleet.wait(worker)
    trials = fleet.study().trials
    check(trials, 8)
    check_runs(fleet)  # no training was lost to the restarts
    assert sum(confirmations(trials).values()) == 2
