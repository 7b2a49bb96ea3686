"""Storage on real databases: opening, racing for the tables, refusing, the study-wide lock."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy

import hpsched
from hpsched import storage
from hpsched.doctor import Finding, examine
from hpsched.errors import StorageError, UsageError
from hpsched.storage import exclusive, open_storage, redact, resolve_url, url_of
from tests.fleet import environment

# -- opening ---------------------------------------------------------------------------------------


def python(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def ended_well(*processes: subprocess.Popen[str]) -> list[str]:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def go(*processes: subprocess.Popen[str]) -> list[str]:
    """Let them all begin at once: each says when it is ready, and reads a line."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return ended_well(*processes)


def test_what_one_process_stores_another_reads(storage_url: str) -> None:
    study = optuna.create_study(study_name="s", storage=open_storage(storage_url, create=True))
    study.set_user_attr("text", "ünïcode " * 2000)
    study.enqueue_trial({"x": 1.5}, user_attrs={"note": [1, 2.5, None]})
    again = optuna.load_study(study_name="s", storage=open_storage(storage_url))
    assert again.user_attrs == study.user_attrs
    assert [trial.user_attrs for trial in again.trials] == [{"note": [1, 2.5, None]}]


CREATE = """
import sys
import optuna
from hpsched.storage import open_storage
optuna.logging.set_verbosity(optuna.logging.WARNING)
print("ready", flush=True)
sys.stdin.readline()
held = open_storage(sys.argv[1], create=True)
optuna.create_study(study_name="s", storage=held, load_if_exists=True)
"""


def test_eight_processes_make_the_tables_at_once(storage_url: str) -> None:
    go(*(python(CREATE, storage_url, stdin=subprocess.PIPE) for _ in range(8)))
    engine = sqlalchemy.create_engine(storage_url)
    with engine.connect() as connection:
        for table in ("alembic_version", "version_info", "studies"):
            rows = connection.execute(sqlalchemy.text(f"SELECT * FROM {table}")).fetchall()
            assert len(rows) == 1, (table, rows)
    engine.dispose()


@pytest.mark.postgres
def test_a_bare_postgresql_url_gets_our_driver(postgres_url: str) -> None:
    bare = postgres_url.replace("postgresql+psycopg", "postgresql")
    assert resolve_url(bare) == postgres_url
    assert open_storage(bare).get_all_studies() == []


@pytest.mark.mariadb
@pytest.mark.parametrize("scheme", ["mysql", "mariadb"])
def test_a_bare_mysql_url_gets_our_driver(mariadb_url: str, scheme: str) -> None:
    bare = mariadb_url.replace("mysql+pymysql", scheme)
    assert resolve_url(bare) == mariadb_url
    assert open_storage(bare).get_all_studies() == []


def test_urls_that_are_none() -> None:
    for text in ("nonsense", "mongodb://host/db", "sqlite://"):
        with pytest.raises(UsageError):
            open_storage(text, create=True)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:s3cret@host/db", "postgresql://me:***@host/db"),
        ("mysql+pymysql://me:p:w@host:3306/db?x=1", "mysql+pymysql://me:***@host:3306/db?x=1"),
        (
            "at postgresql://a:b@h/d and mysql://c:d@h/e",
            "at postgresql://a:***@h/d and mysql://c:***@h/e",
        ),
        ("sqlite:///file.db", "sqlite:///file.db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize("scheme", ["postgresql", pytest.param("mysql")])
def test_an_unreachable_server_is_named_without_its_password(scheme: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(StorageError) as caught:
        open_storage(f"{scheme}://me:s3cret@127.0.0.1:{port}/db")
    message = str(caught.value)
    assert f"127.0.0.1:{port}" in message
    assert "server is running" in message
    assert "s3cret" not in message


@pytest.mark.postgres
def test_a_database_that_does_not_exist(postgres_url: str) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        open_storage(sqlalchemy.make_url(postgres_url).set(database="nowhere").render_as_string())


def test_a_schema_of_another_version_is_refused(storage_url: str) -> None:
    open_storage(storage_url, create=True)
    engine = sqlalchemy.create_engine(storage_url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = 'v9.9.9'"))
    engine.dispose()
    with pytest.raises(StorageError, match="schema"):
        open_storage(storage_url)


def test_another_programs_tables_are_refused(storage_url: str) -> None:
    if storage_url.startswith("sqlite"):
        Path(sqlalchemy.make_url(storage_url).database or "").touch()
    engine = sqlalchemy.create_engine(storage_url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE studies (title VARCHAR(20))"))
    engine.dispose()
    with pytest.raises(StorageError, match="another program"):
        open_storage(storage_url)


def test_the_doctor_makes_no_tables(storage_url: str) -> None:
    def look() -> Finding:
        (finding,) = [found for found in examine(storage_url) if found.what == "storage"]
        return finding

    for _ in range(2):  # the first look has not made it anything else
        assert look().ok and "nothing there yet" in look().detail
        assert storage.is_new(storage_url)
    study = hpsched.create_study("s", objective="toy:objective", storage=storage_url, trials=1)
    assert look().ok and "studies: 1" in look().detail
    assert not storage.is_new(storage_url)
    storage.release(study._storage)


def test_tables_made_where_they_were_expected_are_told_of(
    storage_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    if storage_url.startswith("sqlite"):
        Path(sqlalchemy.make_url(storage_url).database or "").touch()
    open_storage(storage_url)
    assert "was empty: Optuna's tables were made" in caplog.text
    caplog.clear()
    open_storage(storage_url)
    assert not caplog.text


def test_sqlite_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no database"):
        open_storage(f"sqlite:///{tmp_path}/missing.db")
    assert not (tmp_path / "missing.db").exists()
    with pytest.raises(UsageError, match="folder"):
        open_storage(f"sqlite:///{tmp_path}/no/such.db", create=True)
    (tmp_path / "text.db").write_text("this is no database " * 100)
    with pytest.raises(StorageError, match="SQLite file"):
        open_storage(f"sqlite:///{tmp_path}/text.db")


def test_wal_is_on_and_readers_see_it(sqlite_url: str) -> None:
    open_storage(sqlite_url, create=True)
    with sqlite3.connect(str(sqlalchemy.make_url(sqlite_url).database)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_url_of_hides_the_password(sqlite_url: str) -> None:
    assert url_of(open_storage(sqlite_url, create=True)) == sqlite_url
    assert url_of(optuna.storages.InMemoryStorage()) is None


# -- the study-wide lock ---------------------------------------------------------------------------

COUNT = """
import sys
import threading
from pathlib import Path
from hpsched.storage import exclusive, open_storage
held, counter = open_storage(sys.argv[1]), Path(sys.argv[2])
for _ in range(25):
    with exclusive(held, "study"):
        counter.write_text(str(int(counter.read_text()) + 1))
"""

HOLD = """
import sys, time
from hpsched.storage import exclusive, open_storage
with exclusive(open_storage(sys.argv[1]), "study"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_four_processes_count_to_a_hundred(storage_url: str, tmp_path: Path) -> None:
    open_storage(storage_url, create=True)
    counter = tmp_path / "counter"
    counter.write_text("0")
    ended_well(*(python(COUNT, storage_url, str(counter)) for _ in range(4)))
    assert counter.read_text() == "100"


def test_the_lock_is_free_when_its_holder_was_killed(storage_url: str) -> None:
    held = open_storage(storage_url, create=True)
    holder = python(HOLD, storage_url)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    began = time.monotonic()
    with exclusive(held, "study"):
        assert time.monotonic() - began < 10


def test_waiting_for_the_lock_ends(storage_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = open_storage(storage_url, create=True)
    monkeypatch.setattr(storage, "LOCK_SECONDS", 1)
    holder = python(HOLD, storage_url)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="hangs"), exclusive(held, "study"):
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_studies_of_long_alike_names_do_not_share_a_lock(storage_url: str) -> None:
    held = open_storage(storage_url, create=True)
    if storage_url.startswith("sqlite"):
        return  # one lock per file: it has one writer anyway
    with exclusive(held, "x" * 100 + "1"), exclusive(held, "x" * 100 + "2"):
        pass


def test_the_lock_is_the_same_after_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    held = open_storage("sqlite:///here.db", create=True)
    monkeypatch.chdir(tmp_path / "elsewhere")  # as an objective may do
    with exclusive(held, "study"):
        pass
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.postgres
def test_a_dead_connection_does_not_undo_what_was_done_under_the_lock(postgres_url: str) -> None:
    held = open_storage(postgres_url)
    engine = sqlalchemy.create_engine(postgres_url)
    with exclusive(held, "study"), engine.begin() as connection:
        connection.execute(
            sqlalchemy.text(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
            )
        )
    engine.dispose()
    with exclusive(held, "study"):
        pass


# -- claims ----------------------------------------------------------------------------------------

CLAIM = """
import sys
import threading
import optuna
from hpsched.storage import open_storage
optuna.logging.set_verbosity(optuna.logging.WARNING)
study = optuna.load_study(study_name="s", storage=open_storage(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(15):
    print(study.ask().number)
"""


def test_four_processes_claim_sixty_different_trials(storage_url: str) -> None:
    study = optuna.create_study(study_name="s", storage=open_storage(storage_url, create=True))
    for x in range(60):
        study.enqueue_trial({"x": x})
    outputs = go(*(python(CLAIM, storage_url, stdin=subprocess.PIPE) for _ in range(4)))
    assert sorted(int(n) for output in outputs for n in output.split()) == list(range(60))


def test_opening_a_study_takes_few_connections(storage_url: str) -> None:
    hpsched.create_study("s", objective="train.py:objective", storage=storage_url)
    study = hpsched.open_study("s", storage_url)
    study.get_trials()
    pool = study._storage._backend.engine.pool
    assert pool.checkedout() == 0


# -- patience --------------------------------------------------------------------------------------


@pytest.mark.postgres
def test_a_workers_storage_waits_for_the_server(
    postgres: Any, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    study = optuna.create_study(
        study_name="s", storage=open_storage(postgres_url, create=True, heartbeat=True)
    )
    trial = study.ask()
    postgres.stop()
    timer = threading.Timer(1.0, postgres.start)
    timer.start()
    trial.set_user_attr("after", "the restart")
    timer.join()
    study.tell(trial, 1.0)
    assert study.trials[0].user_attrs == {"after": "the restart"}
    assert "the database is away" in caplog.text


@pytest.mark.postgres
def test_a_workers_turn_waits_for_the_server(
    postgres: Any, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    held = open_storage(postgres_url, create=True, heartbeat=True)
    postgres.stop()
    timer = threading.Timer(1.0, postgres.start)
    timer.start()
    with exclusive(held, "s"):
        pass
    timer.join()
    assert "the database is away" in caplog.text


def test_what_can_never_succeed_is_not_tried_again(storage_url: str) -> None:
    held = open_storage(storage_url, create=True, heartbeat=True)
    study = optuna.create_study(study_name="s", storage=held)
    began = time.monotonic()
    with pytest.raises(KeyError):
        held.get_trial(12345)
    if storage_url.startswith("mysql"):  # the only one with a limit
        with pytest.raises(optuna.exceptions.StorageInternalError):
            study.set_user_attr("key", "x" * 70_000)
    assert time.monotonic() - began < 5


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.0)

    def away() -> None:
        raise sqlalchemy.exc.OperationalError("SELECT", {}, Exception("down, p=://me:pw@host"))

    with pytest.raises(StorageError, match="stayed away") as caught:
        storage.patiently(away, "testing")
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("value", ["0", "-1", "soon", "1.5"])
def test_heartbeats_that_cannot_be(
    value: str, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_storage(sqlite_url, create=True)
    monkeypatch.setenv("HPSCHED_GRACE", value)
    with pytest.raises(UsageError, match="HPSCHED_GRACE"):
        open_storage(sqlite_url, heartbeat=True)


HOLD_ROW = """
import sys, time
import sqlalchemy
from hpsched.storage import backend_of, open_storage
with backend_of(open_storage(sys.argv[1])).engine.begin() as connection:
    connection.execute(sqlalchemy.text("UPDATE studies SET study_name = 'mine'"))
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("code", [HOLD, HOLD_ROW], ids=["the lock", "a row"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("postgres", marks=pytest.mark.postgres),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ],
)
def test_what_a_suspended_process_holds_is_taken_from_it(
    kind: str, code: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = request.getfixturevalue(f"{kind}_url")
    monkeypatch.setenv("HPSCHED_GRACE", "2")
    held = open_storage(url)
    optuna.create_study(study_name="s", storage=held)
    holder = python(code, url)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with exclusive(held, "study"):
            optuna.delete_study(study_name="s", storage=held)
        assert time.monotonic() - began < 10
    finally:
        holder.kill()
        holder.communicate()
