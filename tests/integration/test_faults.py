"""Faults in real workers and databases leave no trace; in full: ``python -m tests.faults``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from hpsched import records
from tests.faults import account, scenarios
from tests.faults.crew import Result
from tests.faults.servers import Postgres, private_postgres
from tests.fleet import Fleet

slow = pytest.mark.slow
postgres_only = pytest.mark.postgres


def exact(result: Result) -> Result:
    assert result.exact, "\n".join(result.differences)
    return result


# -- workers ---------------------------------------------------------------------------------------


@slow
@postgres_only
def test_killed_workers_lose_nothing(postgres: Postgres) -> None:
    exact(scenarios.kill(postgres, kills=4, workers=2, seed=1))


@slow
@postgres_only
def test_suspended_workers_drop_what_they_lost(postgres: Postgres) -> None:
    exact(scenarios.suspend(postgres, times=2, workers=2, seed=1))


@slow
@postgres_only
def test_one_suspended_worker_goes_on_as_if_nothing_had_happened(postgres: Postgres) -> None:
    exact(scenarios.suspend(postgres, times=1, workers=1, seed=1))


@slow
@postgres_only
@pytest.mark.parametrize("phase", scenarios.PHASES)
def test_sigterm_in_every_phase(phase: str, postgres: Postgres) -> None:
    result = exact(scenarios.terminate(postgres, phase=phase, seed=1))
    assert result.states == {"COMPLETE": 2}


# -- the database ----------------------------------------------------------------------------------


@slow
@postgres_only
def test_restarts_in_the_middle_of_a_tell(postgres: Postgres) -> None:
    exact(
        scenarios.restart(
            postgres, times=3, workers=1, seed=1, trials=5, moments=scenarios.MOMENTS[1:]
        )
    )


@slow
@postgres_only
def test_an_outage_longer_than_the_grace_period(postgres: Postgres) -> None:
    exact(scenarios.outage(postgres, seconds=8, workers=2, seed=1))


@slow
@postgres_only
@pytest.mark.parametrize(
    ("seconds", "grace", "everyone"), [(5, 60, False), (15, 3, False), (12, 3, True)]
)
def test_a_network_cut(seconds: float, grace: int, everyone: bool, postgres: Postgres) -> None:
    exact(scenarios.cut(postgres, seconds=seconds, grace=grace, everyone=everyone, seed=1))


@slow
@pytest.mark.root
def test_a_full_disk_under_sqlite() -> None:
    exact(scenarios.disk_full(times=1, workers=2, seed=1))


@slow
@postgres_only
def test_more_workers_than_connections() -> None:
    with private_postgres(connections=12) as server:
        exact(scenarios.crowd(server, workers=24, seed=1, trials=3))


@slow
def test_four_workers_on_each_database(storage_url: str) -> None:
    exact(scenarios.backend(storage_url, workers=4, seed=1, trials=10))


# -- the account itself ----------------------------------------------------------------------------


def test_a_run_begun_again_needs_a_reason() -> None:
    calls = [(1, "a", "starts"), (1, "a", "ends"), (2, "b", "starts"), (3, "b", "starts")]
    assert account.repeated(calls, victims={2}) == account.repeated(calls, victims={3}) == []
    (found,) = account.repeated(calls, victims={1})
    assert found == "b was begun by [2, 3]; nothing had happened to [2, 3]"
    assert account.repeated([*calls, (1, "a", "starts")], victims={1, 2})


def test_whatever_is_not_as_it_should_be_is_found(sqlite_fleet: Fleet) -> None:
    sqlite_fleet.create(trials=2, seed=1, confirm_top=0)
    sqlite_fleet.work()
    study = sqlite_fleet.study()
    assert account.differences(study) == []

    def found(index: int, **changed: Any) -> str:
        trials = study.get_trials()
        for name, value in changed.items():
            setattr(trials[index], name, value)
        return "; ".join(account.wrong(trials, 2))

    rung = study.trials[0].user_attrs[f"{records.RUNG}0"]
    other = study.trials[0].user_attrs | {f"{records.RUNG}0": rung | {"seed": rung["seed"] + 1}}
    assert "when run again" in found(0, user_attrs=other)
    assert "is RUNNING" in found(1, state=TrialState.RUNNING)
    assert "numbered [0, 5]" in found(1, number=5)
    assert "its last cycle" in found(0, values=[0.5])
    assert "reported" in found(0, intermediate_values={0: 0.5})
    assert "1 search trials instead of 2" in "; ".join(account.wrong(study.trials[:1], 2))


def test_a_study_that_went_another_way_is_found(tmp_path: Path) -> None:
    def trials(folder: str, seed: int) -> list[FrozenTrial]:
        (tmp_path / folder).mkdir()
        fleet = Fleet(tmp_path / folder, f"sqlite:///{tmp_path / folder / 'studies.db'}")
        fleet.create(trials=1, seed=seed, confirm_top=0)
        fleet.work()
        return list(fleet.study().trials)

    one, same, other = trials("one", 1), trials("same", 1), trials("other", 2)
    assert account.unlike(one, same) == []
    assert "trial 0: other" in account.unlike(one, other)[0]
