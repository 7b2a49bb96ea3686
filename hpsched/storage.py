"""URL → Optuna storage, with the engine settings each database needs; the one place for them.

A worker's storage is patient: a call that finds the database away (restarted, unreachable, locked)
waits for it, so that an outage costs time and no results. HPSCHED_HEARTBEAT and HPSCHED_GRACE set,
in whole seconds, how often a running trial beats (10) and after how long a silent one is put back
in the queue (60); give all workers of a study the same.

===========  =============================================================================
database     settings, and why
===========  =============================================================================
SQLite       WAL and ``BEGIN IMMEDIATE``: a transaction that reads before it writes would
             otherwise fail as "database is locked", and four processes claimed 74 times
             60 trials; 60 s busy timeout
PostgreSQL   psycopg 3; pre-ping (a restart between two calls goes unnoticed); small pool,
             since a server allows 100 connections by default; 10 s connect timeout; a
             connection whose other end is gone without a word fails within a minute
MySQL        PyMySQL; pre-ping and recycling; small pool; 10 s connect timeout; a
             statement fails after 150 s without an answer
both         the server ends a transaction that is idle for HPSCHED_GRACE seconds: the locks of
             a suspended process would hold up all others
===========  =============================================================================
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage, _CachedStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from hpsched.errors import StorageError, UsageError

logger = logging.getLogger("hpsched.storage")
T = TypeVar("T")

DEFAULT_URL = "sqlite:///hpsched.db"
HEARTBEAT_SECONDS = 10
GRACE_SECONDS = 60
LOCK_SECONDS = 120
PATIENCE_SECONDS = 600.0
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
    if "@" in (parsed.host or ""):
        raise UsageError(
            f"{redact(text)!r} has two @: write one in the user name or password as %40."
        )
    if parsed.drivername in _DRIVERS:
        parsed = parsed.set(drivername=_DRIVERS[parsed.drivername])
    if parsed.get_backend_name() not in ("sqlite", "postgresql", "mysql"):
        raise UsageError(
            f"{redact(text)!r}: hpsched stores studies in SQLite, PostgreSQL or MySQL/MariaDB."
        )
    return parsed.render_as_string(hide_password=False)


def redact(text: str) -> str:
    """``text`` with the password of every URL in it replaced by ``***``."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)  # a password may hold an @
    return re.sub(r"(?i)\b(password|passwd)=[^&\s'\"]+", r"\1=***", text)


def open_storage(
    url: str | None = None, *, create: bool = False, heartbeat: bool = False
) -> BaseStorage:
    """The Optuna storage at ``url`` (see :func:`resolve_url`).

    Args:
        url: Database URL.
        create: Make the SQLite file if there is none; otherwise that is an error.
        heartbeat: For workers: trials that stop beating count as stale, and the storage is
            patient (see above).

    Raises:
        UsageError: Not a URL; no such SQLite file; the driver is not installed; HPSCHED_HEARTBEAT
            or HPSCHED_GRACE is not a positive whole number.
        StorageError: The database cannot be reached or holds another schema.
    """
    parsed = make_url(resolve_url(url))
    if parsed.get_backend_name() == "sqlite":
        _check_file(parsed, create)
        # An objective may change the working directory.
        parsed = parsed.set(database=str(Path(parsed.database or "").absolute()))
    try:
        return _connect(parsed, heartbeat)
    except ImportError:
        extra = _EXTRAS.get(parsed.get_backend_name(), "postgres")
        raise UsageError(
            f"The driver for {_shown(parsed)} is not installed: pip install 'hpsched[{extra}]'."
        ) from None
    except SQLAlchemyError as error:
        raise unreachable(parsed, error) from None
    except optuna.exceptions.StorageInternalError as error:
        raise unreachable(parsed, error.__cause__ or error) from None
    except RuntimeError as error:  # Optuna: the schema is of another version
        raise StorageError(
            f"{_shown(parsed)} holds a schema that Optuna {optuna.__version__} does not know: "
            f"{_first_line(error)} Upgrade it with `optuna storage upgrade`, or use another "
            "database."
        ) from None


def unreachable(url: URL | str, error: BaseException) -> StorageError:
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
    backend = backend_of(storage)
    return redact(str(backend.url)) if isinstance(backend, RDBStorage) else None


@contextmanager
def exclusive(storage: BaseStorage, name: str) -> Iterator[None]:
    """Hold the study-wide lock ``name`` over all processes; released even if the process dies.

    SQLite: a lock file beside the database. PostgreSQL and MySQL: an advisory lock of a
    connection held meanwhile, which the server ends when its process is suspended. Other
    storages: threads of this process only.

    Raises:
        StorageError: Not obtained within two minutes.
    """
    backend = backend_of(storage)
    if not isinstance(backend, RDBStorage):
        with _thread_locks.setdefault(name, threading.RLock()):
            yield
    else:
        with _lock(backend.engine, name):
            yield


def backend_of(storage: BaseStorage) -> BaseStorage:
    """The storage itself, without the cache (and the patience) around it."""
    return getattr(storage, "_backend", storage)


def is_away(error: BaseException) -> bool:
    """Whether the error says that the database is away or busy: the same call may succeed later."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    if isinstance(cause, DBAPIError) and cause.connection_invalidated:
        return True
    return isinstance(cause, OperationalError | InterfaceError | PoolTimeoutError)


def patiently(do: Callable[[], T], what: str) -> T:
    """``do()``, again with growing pauses while the database is away.

    Raises:
        StorageError: It stayed away for ten minutes.
    """
    pause, until = 0.5, time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return do()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if not is_away(error):
                raise
            reason = plain(error)
            if time.monotonic() > until:
                raise StorageError(
                    f"The database stayed away for {PATIENCE_SECONDS / 60:.0f} minutes while "
                    f"{what}: {reason}. Attach again when it is back: nothing is lost."
                ) from error
        logger.warning("the database is away (%s); trying again in %.0f s", reason, pause)
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


def plain(error: BaseException) -> str:
    """What the database said, in one line and without passwords."""
    cause = error.__cause__ or error
    return redact(" ".join(str(getattr(cause, "orig", None) or cause).split())[:200])


class _PatientStorage(_CachedStorage):
    """Optuna's storage, each call of which waits for a database that is away."""


def _patient(name: str) -> Callable[..., Any]:
    method = getattr(_CachedStorage, name)

    @functools.wraps(method)
    def call(self: _PatientStorage, *args: Any, **kwargs: Any) -> Any:
        return patiently(lambda: method(self, *args, **kwargs), name.replace("_", " ").strip())

    return call


for _name in BaseStorage.__abstractmethods__:
    setattr(_PatientStorage, _name, _patient(_name))


def _shown(url: URL) -> str:
    return redact(url.render_as_string(hide_password=True))


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
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, **_connect_args(url))
    if _has_tables(engine):
        backend = _make_backend(url, heartbeat)
    else:
        with _lock(engine, "tables"):  # workers that start together would all make them
            backend = _make_backend(url, heartbeat)
    if url.get_backend_name() == "sqlite":
        _configure_sqlite(backend.engine)
    else:
        _configure_server(backend.engine)
    backend.get_all_studies()  # what is wrong with the tables shows here
    return _PatientStorage(backend) if heartbeat else _CachedStorage(backend)


def _has_tables(engine: sqlalchemy.Engine) -> bool:
    """Whether Optuna's tables are there; another program's database is refused unchanged."""
    with engine.connect() as connection:
        known = sqlalchemy.inspect(connection)
        names = set(known.get_table_names())
        columns = {c["name"] for c in known.get_columns("studies")} if "studies" in names else None
        if columns is not None and not {"study_id", "study_name"} <= columns:
            found = ", ".join(sorted(columns))
            raise StorageError(
                f"{_shown(engine.url)} has a table `studies` ({found}) that is not Optuna's: "
                "another program uses this database. Nothing was changed; name another one with "
                "--storage."
            )
        if columns is None or "alembic_version" not in names:
            return False
        version = sqlalchemy.text("SELECT version_num FROM alembic_version")  # written last
        return connection.execute(version).first() is not None


def _make_backend(url: URL, heartbeat: bool) -> RDBStorage:
    options: dict[str, Any] = {"engine_kwargs": _engine_kwargs(url)}
    if heartbeat:
        interval = _seconds("HPSCHED_HEARTBEAT", HEARTBEAT_SECONDS)
        grace = _seconds("HPSCHED_GRACE", GRACE_SECONDS)
        options |= {"heartbeat_interval": interval, "grace_period": grace}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return RDBStorage(url.render_as_string(hide_password=False), **options)


def _seconds(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if text and not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"{variable}={text!r}: a positive whole number of seconds.")
    return int(text or default)


def _engine_kwargs(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return _connect_args(url)
    common = {"pool_pre_ping": True, "pool_size": 2, "max_overflow": 3, "pool_recycle": 1800}
    return {**common, **_connect_args(url)}


def _connect_args(url: URL) -> dict[str, Any]:
    kind = url.get_backend_name()
    if kind == "sqlite":
        return {"connect_args": {"timeout": 60}}
    if kind == "mysql":
        patience = {"read_timeout": LOCK_SECONDS + 30, "write_timeout": 60}
    else:
        patience = {"keepalives_idle": 20, "keepalives_interval": 10, "keepalives_count": 3}
        patience |= {"tcp_user_timeout": 50_000}
    return {"connect_args": {"connect_timeout": 10, **patience}}


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


def _configure_server(engine: sqlalchemy.Engine) -> None:
    seconds = _seconds("HPSCHED_GRACE", GRACE_SECONDS)
    if engine.dialect.name == "postgresql":
        limit = f"SET idle_in_transaction_session_timeout = {seconds * 1000}"
    else:
        limit = f"SET SESSION wait_timeout = {seconds}"

    @sqlalchemy.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(limit)
        connection.commit()

    engine.dispose()  # connections made before the listener


# -- the lock --------------------------------------------------------------------------------------


def _lock(engine: sqlalchemy.Engine, name: str) -> AbstractContextManager[None]:
    if engine.dialect.name == "sqlite":
        return _file_lock(f"{engine.url.database}.lock")
    return _server_lock(engine, name)


@contextmanager
def _file_lock(path: str) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(path, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise _no_turn() from None
    except OSError as error:
        raise StorageError(
            f"Cannot use the lock file {path}: {error.strerror or error}. Workers need to write "
            "to the folder of the SQLite file."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _server_lock(engine: sqlalchemy.Engine, name: str) -> Iterator[None]:
    key = hashlib.blake2b(f"hpsched/{engine.url.database}/{name}".encode(), digest_size=8).digest()
    with engine.connect() as connection:
        try:
            if engine.dialect.name == "postgresql":
                _take_on_postgresql(connection, int.from_bytes(key, signed=True))
            else:
                _take_on_mysql(connection, key.hex())
            yield
        finally:
            # A connection that was lost meanwhile has taken the lock with it; what was done under
            # the lock stays done.
            with suppress(SQLAlchemyError):
                if engine.dialect.name == "mysql":
                    give = sqlalchemy.text("SELECT RELEASE_LOCK(:key)")
                    connection.execute(give, {"key": key.hex()})
                connection.rollback()


def _take_on_postgresql(connection: sqlalchemy.Connection, key: int) -> None:
    """Take the lock until the end of the transaction that this begins."""
    connection.execute(sqlalchemy.text(f"SET LOCAL lock_timeout = {LOCK_SECONDS * 1000}"))
    try:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) == "55P03":  # lock_not_available
            raise _no_turn() from None
        raise


def _take_on_mysql(connection: sqlalchemy.Connection, key: str) -> None:
    """Take the lock until it is released or the connection ends."""
    take = sqlalchemy.text("SELECT GET_LOCK(:key, :seconds)")
    taken = connection.execute(take, {"key": key, "seconds": LOCK_SECONDS}).scalar()
    if taken != 1:  # 0: in time out; NULL: the server gave up
        raise _no_turn()


def _no_turn() -> StorageError:
    return StorageError(
        f"No turn at the study within {LOCK_SECONDS} s: another worker hangs while it holds the "
        "lock. Find it (hpsched study status), end it, and attach again."
    )
