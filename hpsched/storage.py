"""URL → Optuna storage, with the engine settings each database needs; the one place for them.

===========  =============================================================================
database     settings, and why
===========  =============================================================================
SQLite       WAL and ``BEGIN IMMEDIATE``: a transaction that reads before it writes would
             otherwise fail as "database is locked", and four processes claimed 74 times
             60 trials; 60 s busy timeout
PostgreSQL   psycopg 3; pre-ping (a restart between two calls goes unnoticed); small pool,
             since a server allows 100 connections by default; 10 s connect timeout
MySQL        PyMySQL; pre-ping and recycling; small pool; 10 s connect timeout
===========  =============================================================================
"""

from __future__ import annotations

import os
import re
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from hpsched.errors import StorageError, UsageError

DEFAULT_URL = "sqlite:///hpsched.db"
HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60
LOCK_SECONDS = 120
_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_DRIVERS |= {"mysql": "mysql+pymysql", "mariadb": "mysql+pymysql"}
_EXTRAS = {"postgresql": "postgres", "mysql": "mysql"}
_thread_locks: dict[str, threading.RLock] = {}


def resolve_url(url: str | None = None) -> str:
    """The storage URL: the one given, else HPSCHED_STORAGE, else OPTUNA_STORAGE, else SQLite here.

    A bare ``postgresql://`` or ``mysql://`` gets the driver hpsched installs.

    Raises:
        UsageError: Not a database URL.
    """
    text = url or os.environ.get("HPSCHED_STORAGE") or os.environ.get("OPTUNA_STORAGE")
    text = text or DEFAULT_URL
    try:
        parsed = make_url(text)
    except (ArgumentError, ValueError):
        raise UsageError(
            f"{redact(text)!r} is not a storage URL. Use sqlite:///file.db, "
            "postgresql+psycopg://user@host/database or mysql+pymysql://user@host/database."
        ) from None
    if parsed.drivername in _DRIVERS:
        parsed = parsed.set(drivername=_DRIVERS[parsed.drivername])
    if parsed.get_backend_name() not in ("sqlite", "postgresql", "mysql"):
        raise UsageError(
            f"{redact(text)!r}: hpsched stores studies in SQLite, PostgreSQL or MySQL/MariaDB."
        )
    return parsed.render_as_string(hide_password=False)


def redact(text: str) -> str:
    """``text`` with the password of every URL in it replaced by ``***``."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


def open_storage(
    url: str | None = None, *, create: bool = False, heartbeat: bool = False
) -> BaseStorage:
    """The Optuna storage at ``url`` (see :func:`resolve_url`).

    Args:
        url: Database URL.
        create: Make the SQLite file if there is none; otherwise that is an error.
        heartbeat: Trials that stop beating for 60 s count as stale (workers use it).

    Raises:
        UsageError: Not a URL; no such SQLite file; the driver is not installed.
        StorageError: The database cannot be reached or holds another schema.
    """
    parsed = make_url(resolve_url(url))
    if parsed.get_backend_name() == "sqlite":
        _check_file(parsed, create)
    try:
        return _connect(parsed, heartbeat)
    except ImportError:
        extra = _EXTRAS.get(parsed.get_backend_name(), "postgres")
        raise UsageError(
            f"The driver for {_shown(parsed)} is not installed: pip install 'hpsched[{extra}]'."
        ) from None
    except SQLAlchemyError as error:
        raise unreachable(parsed, error) from None
    except RuntimeError as error:  # Optuna: the schema is of another version
        raise StorageError(
            f"{_shown(parsed)} holds a schema that Optuna {optuna.__version__} does not know: "
            f"{_first_line(error)} Upgrade it with `optuna storage upgrade`, or use another "
            "database."
        ) from None


def unreachable(url: URL | str, error: Exception) -> StorageError:
    """The error for a database that does not answer as it should."""
    parsed = make_url(url)
    reason = redact(_first_line(getattr(error, "orig", None) or error))
    if parsed.get_backend_name() == "sqlite":
        remedy = "Check that the path is a SQLite file you may write to, and that the disk is free."
    else:
        remedy = "Check host, port, user and database name, and that the server is running."
    return StorageError(f"Cannot use the database {_shown(parsed)}: {reason}. {remedy}")


def url_of(storage: BaseStorage) -> str | None:
    """The storage's URL with its password hidden; None if it is not a database."""
    backend = _backend(storage)
    return redact(str(backend.url)) if isinstance(backend, RDBStorage) else None


@contextmanager
def exclusive(storage: BaseStorage, name: str) -> Iterator[None]:
    """Hold the study-wide lock ``name`` over all processes; released even if the process dies.

    SQLite: a lock file beside the database. PostgreSQL and MySQL: an advisory lock of a
    connection held meanwhile. Other storages: threads of this process only.

    Raises:
        StorageError: Not obtained within two minutes.
    """
    backend = _backend(storage)
    if not isinstance(backend, RDBStorage):
        with _thread_locks.setdefault(name, threading.RLock()):
            yield
    elif backend.engine.dialect.name == "sqlite":
        with _file_lock(backend.engine.url.database):
            yield
    else:
        with backend.engine.connect() as connection, _advisory_lock(connection, name):
            yield


def _backend(storage: BaseStorage) -> Any:
    return getattr(storage, "_backend", storage)


def _shown(url: URL) -> str:
    return url.render_as_string(hide_password=True)


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _check_file(url: URL, create: bool) -> None:
    if not url.database or url.database == ":memory:":
        raise UsageError(f"{_shown(url)}: a study needs a file that outlives the process.")
    path = Path(url.database)
    if not path.exists() and not create:
        raise UsageError(
            f"There is no database at {path}. Run this where the study was created, name it with "
            "--storage, or create a study first: hpsched study create NAME --objective FILE:FUNC."
        )
    if not path.absolute().parent.is_dir():
        raise UsageError(f"The folder of {path} does not exist: create it, or use another path.")


def _connect(url: URL, heartbeat: bool) -> BaseStorage:
    backend = _make_backend(url, heartbeat)
    if url.get_backend_name() == "sqlite":
        _configure_sqlite(backend.engine)
    storage = optuna.storages.get_storage(backend)
    storage.get_all_studies()  # another program's tables of the same name show here
    return storage


def _make_backend(url: URL, heartbeat: bool) -> RDBStorage:
    options: dict[str, Any] = {"engine_kwargs": _engine_kwargs(url)}
    if heartbeat:
        options |= {"heartbeat_interval": HEARTBEAT_SECONDS, "grace_period": GRACE_SECONDS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for attempt in range(3):
            try:
                return RDBStorage(url.render_as_string(hide_password=False), **options)
            except SQLAlchemyError:
                # Workers that start together all create the tables; the losers find them made.
                if attempt == 2:
                    raise
                time.sleep(0.5 * (attempt + 1))
    raise AssertionError("unreachable")


def _engine_kwargs(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": 60}}
    common = {"pool_pre_ping": True, "pool_size": 2, "max_overflow": 3, "pool_recycle": 1800}
    return {**common, "connect_args": {"connect_timeout": 10}}


def _configure_sqlite(engine: sqlalchemy.Engine) -> None:
    @sqlalchemy.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours to emit
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    @sqlalchemy.event.listens_for(engine, "begin")
    def _on_begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made before the listeners


def _file_lock(database: str | None) -> Any:
    import filelock

    return filelock.FileLock(f"{database}.lock", timeout=LOCK_SECONDS)


@contextmanager
def _advisory_lock(connection: sqlalchemy.Connection, name: str) -> Iterator[None]:
    key = f"hpsched:{name}"[:64]
    if connection.dialect.name == "postgresql":
        take, give = (
            "SELECT pg_advisory_lock(hashtext(:k))",
            "SELECT pg_advisory_unlock(hashtext(:k))",
        )
        connection.execute(sqlalchemy.text("SET LOCAL lock_timeout = '120s'"))
    else:
        take, give = f"SELECT GET_LOCK(:k, {LOCK_SECONDS})", "SELECT RELEASE_LOCK(:k)"
    if connection.execute(sqlalchemy.text(take), {"k": key}).scalar() == 0:
        raise StorageError(f"No turn at the study within {LOCK_SECONDS} s: another worker hangs.")
    try:
        yield
    finally:
        connection.execute(sqlalchemy.text(give), {"k": key})
