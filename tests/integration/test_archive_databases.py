"""Studies moved between real databases, by the commands that a user gives."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from generated_trials import facts, plain, studies
from hypothesis import HealthCheck, Phase, given, settings
from optuna.trial import FrozenTrial

import hpsched
from hpsched.archive import export_json, import_study, read_archive
from hpsched.errors import StorageError
from hpsched.storage import open_storage
from hpsched.worker import Worker
from tests.fleet import Fleet, environment

HPSCHED = [sys.executable, "-m", "hpsched"]


def run(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HPSCHED, *arguments],
        cwd=cwd, env=environment(), input=stdin, capture_output=True, text=True,
    )  # fmt: skip


def read(study: optuna.Study) -> Any:
    return read_archive(export_json(study))


def whole(study: optuna.Study, *, seconds: bool = False) -> dict[str, Any]:
    """All there is to know of a study, but for ids; ``seconds``: times to the second."""

    def cut(trial: dict[str, Any]) -> dict[str, Any]:
        times = tuple(t and t.replace(microsecond=0) for t in trial["times"])
        return {**trial, "times": times if seconds else trial["times"]}

    return {
        "directions": study.directions,
        "user_attrs": plain(study.user_attrs),
        "system_attrs": plain(study._storage.get_study_system_attrs(study._study_id)),
        "trials": [cut(facts(trial)) for trial in study.trials],
    }


# -- round trip ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.mariadb
@given(held=studies())
@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_through_all_databases_and_back(
    sqlite_url: str, postgres_url: str, mariadb_url: str, held: dict[str, Any]
) -> None:
    start = optuna.create_study(
        storage=open_storage(sqlite_url, create=True), directions=held["directions"]
    )
    start.add_trials(held["trials"])
    for key, value in held["user_attrs"].items():
        start.set_user_attr(key, value)
    for key, value in held["system_attrs"].items():
        start._storage.set_study_system_attr(start._study_id, key, value)
    first = import_study(read(start), name=f"{start.study_name}-1", storage=sqlite_url)
    there = import_study(read(first), storage=postgres_url)
    assert whole(there) == whole(first)
    home = import_study(read(there), name=f"{start.study_name}-2", storage=sqlite_url)
    assert whole(home) == whole(first)
    there = import_study(read(home), storage=mariadb_url)  # it keeps whole seconds
    home = import_study(read(there), name=f"{start.study_name}-3", storage=sqlite_url)
    assert whole(home, seconds=True) == whole(there) == whole(first, seconds=True)
    assert json.loads(export_json(home))["trials"] == json.loads(export_json(there))["trials"]


@pytest.mark.slow
def test_a_study_moves_through_a_pipe(fleet: Fleet, tmp_path: Path) -> None:
    fleet.create(trials=4, seed=3)
    fleet.work()
    url = shlex.quote(f"sqlite:///{tmp_path}/copy.db")
    python = shlex.quote(sys.executable)
    line = (
        f"{python} -m hpsched study export fake --storage {shlex.quote(fleet.url)} | "
        f"{python} -m hpsched study import - --storage {url}"
    )
    done = subprocess.run(line, shell=True, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "fake\n"), done.stderr
    assert "trials imported" in done.stderr and "study status fake" in done.stderr
    there = hpsched.open_study("fake", f"sqlite:///{tmp_path}/copy.db")
    assert whole(there) == whole(fleet.study())
    assert hpsched.best(there) == hpsched.best(fleet.study())


def outcome(trial: FrozenTrial) -> tuple[Any, ...]:
    return trial.number, trial.state, trial.params, trial.values, trial.intermediate_values


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 6])
def test_a_study_exported_midway_and_finished_elsewhere(
    sqlite_fleet: Fleet, storage_url: str, tmp_path: Path, cut: int
) -> None:
    sqlite_fleet.create("whole", trials=10, seed=5)
    sqlite_fleet.work("whole")
    sqlite_fleet.create("cut", trials=10, seed=5)
    objective = runpy.run_path(str(tmp_path / "train.py"))["objective"]
    exported: list[str] = []

    def stop_midway(trial: optuna.Trial) -> float:
        def report(value: float, step: int) -> None:
            kept(value, step)
            if trial.number >= cut and not exported:  # a rung is done, others are not
                exported.append(export_json(hpsched.open_study("cut", sqlite_fleet.url)))
                raise KeyboardInterrupt

        kept, trial.report = trial.report, report  # type: ignore[method-assign]
        return float(objective(trial))

    Worker(hpsched.open_study("cut", sqlite_fleet.url, heartbeat=True), stop_midway).run()
    archive = read_archive(exported[0])
    assert len(archive.requeued) == 1
    import_study(archive, name="moved", storage=storage_url)
    moved = Fleet(tmp_path, storage_url)
    moved.work("moved")
    expected = [outcome(trial) for trial in sqlite_fleet.study("whole").trials]
    assert [outcome(trial) for trial in moved.study("moved").trials] == expected


# -- what a database cannot hold -------------------------------------------------------------------


@pytest.mark.mariadb
@pytest.mark.parametrize(
    ("attrs", "said"),
    [({"a": 1, "A": 2}, "user_attrs of trial 0"), ({"a": "x" * 70_000}, "trial 0.*65,535")],
    ids=["names that differ in case", "too long"],
)
def test_what_mysql_cannot_hold_is_refused(
    sqlite_url: str, mariadb_url: str, attrs: dict[str, Any], said: str
) -> None:
    study = optuna.create_study(storage=open_storage(sqlite_url, create=True))
    study.enqueue_trial({}, user_attrs=attrs)
    with pytest.raises(StorageError, match=said) as caught:
        import_study(read(study), storage=mariadb_url)
    assert len(str(caught.value)) < 500
    assert optuna.get_all_study_names(open_storage(mariadb_url)) == []


# -- the command -----------------------------------------------------------------------------------


def many(path: Path, count: int) -> None:
    """An export of a study with ``count`` trials."""
    study = optuna.create_study(study_name="many")
    for number in range(count):
        study.add_trial(optuna.trial.create_trial(value=number))
    path.write_text(export_json(study))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_an_import_that_ends_early_looks_like_none(
    storage_url: str, tmp_path: Path, number: signal.Signals
) -> None:
    held = open_storage(storage_url, create=True)
    many(tmp_path / "many.json", 6000)  # long enough to be caught in the middle
    process = subprocess.Popen(
        [*HPSCHED, "study", "import", "many.json", "--storage", storage_url],
        cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    limit = time.monotonic() + 60
    while not any(s.n_trials > 5 for s in optuna.get_all_study_summaries(held)):
        assert time.monotonic() < limit and process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    names = optuna.get_all_study_names(held)
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert (process.returncode, names) == (130, [])
        return
    assert len(names) == 1 and names[0].startswith("many (importing ")
    many(tmp_path / "many.json", 20)
    done = run("study", "import", "many.json", "--storage", storage_url, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "many\n"), done.stderr
    deleted = run("study", "delete", names[0], "--yes", "--storage", storage_url, cwd=tmp_path)
    assert deleted.returncode == 0, deleted.stderr
    assert optuna.get_all_study_names(held) == ["many"]


def test_what_the_command_refuses(tmp_path: Path) -> None:
    many(tmp_path / "many.json", 1)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "part.json").write_text((tmp_path / "many.json").read_text()[:200])
    assert run("study", "import", "many.json", cwd=tmp_path).stdout == "many\n"
    before = export_json(hpsched.open_study("many", f"sqlite:///{tmp_path}/hpsched.db"))
    for arguments, said in {
        ("no.json",): "Cannot read no.json: No such file",
        (".",): "Cannot read .: Is a directory",
        ("binary",): "binary is no export",
        ("part.json",): "only a part of one",
        ("-",): "Nothing came on standard input",
        ("many.json",): "--name",
        ("many.json", "--name", " "): "--name",
    }.items():
        done = run("study", "import", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert export_json(hpsched.open_study("many", f"sqlite:///{tmp_path}/hpsched.db")) == before
    assert os.listdir(tmp_path).count("hpsched.db") == 1


def test_running_trials_are_told_of(tmp_path: Path) -> None:
    study = optuna.create_study(study_name="s")
    study.ask()
    text = export_json(study)
    done = run("study", "import", "-", "--name", "t", cwd=tmp_path, stdin=text)
    assert done.stdout == "t\n" and "back in the queue with what they have: 0" in done.stderr
