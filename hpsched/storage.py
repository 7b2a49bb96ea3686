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
import gc
import hashlib
import json
import logging
import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol, TypeVar

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage, _CachedStorage
from optuna.storages._rdb import models
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from hpsched.errors import DatabaseAwayError, StorageError, UsageError
from hpsched.frugal import FrugalStorage
from hpsched.redaction import redact

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
_REMEDIES = {
    ("certificate", "ssl"): "Check the TLS options of the URL: sslmode, sslrootcert and the host's "
    "name for PostgreSQL, ssl_ca for MySQL (docs/database.md).",
    ("password", "access denied"): "Check user and password: in HPSCHED_STORAGE, the file of "
    "HPSCHED_STORAGE_FILE, or ~/.pgpass.",
    ("permission denied", "command denied", "read-only", "readonly"): "This account may not do "
    "that: use one that may, or let the owner create the tables and grant it what docs/database.md "
    "names.",
}
#: What PyMySQL and sqlite3 call operational, as an outage, though waiting does not help.
_DENIED = ("access denied", "command denied", "permission denied", "readonly database")
_STANDBY = "25006"  # a PostgreSQL that takes no writes yet, in the middle of a failover
_thread_locks: dict[str, threading.RLock] = {}


def resolve_url(url: str | None = None) -> str:
    """The storage URL: the one given or from the environment, else SQLite here.

    In this order: HPSCHED_STORAGE; the file that HPSCHED_STORAGE_FILE names, such as a mounted
    secret; OPTUNA_STORAGE. A bare ``postgresql://`` or ``mysql://`` gets the driver hpsched
    installs.

    Raises:
        UsageError: Not a database URL; the one given is empty; the file cannot be read or is empty.
    """
    if url is not None and not url.strip():  # not the default, which may hold other studies
        raise UsageError(
            f"The storage given is empty ({url!r}): perhaps a variable in --storage is not set. "
            "Give a URL such as sqlite:///file.db, or leave --storage out for the default."
        )
    text = url or os.environ.get("HPSCHED_STORAGE") or _url_in_file()
    text = text or os.environ.get("OPTUNA_STORAGE") or DEFAULT_URL
    try:
        parsed = make_url(text)
    except (ArgumentError, ValueError):
        shown = redact(text) if "://" in text else redact(f"://{text}")[3:]
        raise UsageError(
            f"{shown!r} is not a storage URL. Use sqlite:///file.db, "
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
    whole = parsed.render_as_string(hide_password=False)
    if parsed.password:  # SQLAlchemy leaves spaces in it as they are
        account, at, rest = whole.partition("@")
        whole = account.replace(" ", "%20") + at + rest
    return whole


def _url_in_file() -> str | None:
    path = os.environ.get("HPSCHED_STORAGE_FILE")
    if not path:
        return None
    remedy = "It has to hold a database URL; or unset the variable."
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"Cannot read HPSCHED_STORAGE_FILE={path}: {reason}. {remedy}") from None
    if not text:
        raise UsageError(f"HPSCHED_STORAGE_FILE={path} is empty. {remedy}")
    return text


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

    def connect() -> BaseStorage:
        try:
            return _connect(parsed, heartbeat, expected=not create)
        except Exception:
            gc.collect()  # the storage that was half made holds a connection
            raise

    with _explained(parsed):
        return patiently(connect, "opening the study", _is_busy) if heartbeat else connect()


def is_new(url: str | None = None) -> bool:
    """Whether nothing was ever stored at ``url``: no file, or no tables in the database.

    Nothing is changed, where :func:`open_storage` would make the tables.

    Raises:
        UsageError: Not a URL, or of no file; the driver is not installed.
        StorageError: The database cannot be reached, or is another program's.
    """
    parsed = make_url(resolve_url(url))
    if parsed.get_backend_name() == "sqlite":
        _check_file(parsed, create=True)
        if not Path(parsed.database or "").exists():
            return True
    with _explained(parsed):
        return not _has_tables(_engine(parsed))


@contextmanager
def _explained(url: URL) -> Iterator[None]:
    """Say what is wrong with the database, and the remedy."""
    try:
        yield
    except ImportError:
        extra = _EXTRAS.get(url.get_backend_name(), "postgres")
        raise UsageError(
            f"The driver for {_shown(url)} is not installed: pip install 'hpsched[{extra}]'."
        ) from None
    except SQLAlchemyError as error:
        raise unreachable(url, error) from None
    except optuna.exceptions.StorageInternalError as error:
        raise unreachable(url, error.__cause__ or error) from None
    except RuntimeError as error:  # Optuna: the schema is of another version
        raise StorageError(
            f"{_shown(url)} holds a schema that Optuna {optuna.__version__} does not know: "
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
        other = "Check host, port, user and database name, and that the server is running."
        remedy = remedy_for(reason) or other
    return StorageError(f"Cannot use the database {_shown(parsed)}: {reason}. {remedy}")


def remedy_for(reason: str) -> str | None:
    """What helps against a server's refusal, by its words: drivers give no code for most."""
    text = reason.lower()
    return next((what for words, what in _REMEDIES.items() if any(w in text for w in words)), None)


def url_of(storage: BaseStorage) -> str | None:
    """The storage's URL with its password hidden; None if it is not a database."""
    backend = backend_of(storage)
    return redact(str(backend.url)) if isinstance(backend, RDBStorage) else None


@contextmanager
def exclusive(storage: BaseStorage, name: str) -> Iterator[Callable[[], object]]:
    """Hold the study-wide lock ``name`` over all processes; released even if the process dies.

    SQLite: a lock file beside the database. PostgreSQL and MySQL: an advisory lock of a
    connection held meanwhile, which the server ends when its process is suspended. Other
    storages: threads of this process only.

    A worker waits for it as for a database that is away. Under it nothing waits: an outage ends the
    lock, so that all that was done and decided under it is to be done again.

    Yields:
        What raises the database's error if the lock is held no longer.

    Raises:
        StorageError: Not obtained within two minutes.
        DatabaseAwayError: A worker did not obtain it within ten.
    """
    backend = backend_of(storage)
    if not isinstance(backend, RDBStorage):
        with _thread_locks.setdefault(name, threading.RLock()):
            yield lambda: None
        return
    workers = frugal_of(storage)
    with _lock(backend.engine, name, patient=workers is not None) as still:
        token = _locked.set(True)
        try:
            if workers:
                workers.refresh()
            yield still
        finally:
            _locked.reset(token)


_locked: ContextVar[bool] = ContextVar("locked", default=False)


def study_attr(storage: BaseStorage, study_id: int, key: str) -> Any:
    """One user attribute of a study, or None; the others, of which there may be many, stay."""
    backend = backend_of(storage)
    if not isinstance(backend, RDBStorage):
        return backend.get_study_user_attrs(study_id).get(key)
    attribute = models.StudyUserAttributeModel
    query = sqlalchemy.select(attribute.value_json).where(
        attribute.study_id == study_id, attribute.key == key
    )
    with backend.engine.connect() as connection:
        found = connection.execute(query).scalar()
    return None if found is None else json.loads(found)


def set_study_attr(storage: BaseStorage, study_id: int, key: str, value: Any) -> None:
    """Set one that is set again and again, in one statement; Optuna looks for it first."""
    backend = backend_of(storage)
    if isinstance(backend, RDBStorage):
        attribute = models.StudyUserAttributeModel
        change = (
            sqlalchemy.update(attribute)
            .where(attribute.study_id == study_id, attribute.key == key)
            .values(value_json=json.dumps(value))
        )
        with backend.engine.begin() as connection:
            if connection.execute(change).rowcount:
                return
    backend.set_study_user_attr(study_id, key, value)


def clock(storage: BaseStorage) -> Callable[[], float]:
    """The database's clock, read once, as a function that gives its Unix time in seconds.

    What workers on several hosts note, and what is made of it elsewhere, must be of one clock.
    """
    backend, started = backend_of(storage), time.time()  # a file, or memory: of this host
    if isinstance(backend, RDBStorage) and backend.engine.dialect.name in _CLOCKS:
        engine = backend.engine

        def read() -> float:
            with engine.connect() as connection:
                query = sqlalchemy.text(_CLOCKS[engine.dialect.name])
                return float(connection.execute(query).scalar_one())

        started = patiently(read, "reading the clock") if frugal_of(storage) else read()
    ticked = _ticks()
    return lambda: started + _ticks() - ticked


_CLOCKS = {
    "postgresql": "SELECT EXTRACT(EPOCH FROM clock_timestamp())",
    "mysql": "SELECT UNIX_TIMESTAMP(NOW(6))",
}


def _ticks() -> float:
    """Seconds of a clock that nobody sets; on Linux it goes on while the host is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def frugal_of(storage: BaseStorage) -> FrugalStorage | None:
    """The storage, if it is a worker's."""
    return storage if isinstance(storage, FrugalStorage) else None


def release(storage: BaseStorage) -> None:
    """Close idle connections to a server: it has few, and a training run may last for hours."""
    backend = backend_of(storage)
    if isinstance(backend, RDBStorage):
        _release(backend.engine)


def _release(engine: sqlalchemy.Engine) -> None:
    if engine.dialect.name != "sqlite":
        engine.dispose()


def backend_of(storage: BaseStorage) -> BaseStorage:
    """The storage itself, without the cache (and the patience) around it."""
    return storage._backend if isinstance(storage, _CachedStorage) else storage


def _is_busy(error: BaseException) -> bool:
    """Whether the server is there, but has no connection to give at the moment.

    At the first call all else is more likely a mistake in the URL than an outage. Drivers give no
    code for an error while connecting.
    """
    busy = ("too many", "connection slots", "is starting up", "is shutting down", "recovery mode")
    return is_away(error) and any(words in plain(error).lower() for words in busy)


class Waiting(Protocol):
    """Who waits for the database: a worker, which shows that it does, and may have to end."""

    def on_outage(self, reason: str | None) -> None:
        """The database is away, and why; None: it is back."""

    def gives_up(self) -> bool:
        """Whether to wait no longer."""


waiting: ContextVar[Waiting | None] = ContextVar("waiting", default=None)


def is_away(error: BaseException) -> bool:
    """Whether the error says that the database is away or busy: the same call may succeed later."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    if isinstance(cause, DBAPIError) and cause.connection_invalidated:
        return True
    if any(words in plain(error).lower() for words in _DENIED):
        return False
    if getattr(getattr(cause, "orig", None), "sqlstate", None) == _STANDBY:
        return True
    return isinstance(cause, OperationalError | InterfaceError | PoolTimeoutError)


def patiently(
    do: Callable[[], T], what: str, waits: Callable[[BaseException], bool] = is_away
) -> T:
    """``do()``, again with growing pauses while the database is away.

    Args:
        do: What to do.
        what: The same in words, for the log.
        waits: Whether an error is one to wait for.

    Raises:
        DatabaseAwayError: It stayed away for ten minutes, or whoever waits gave up.
    """
    pause, began = 0.5, time.monotonic()
    who, waited = waiting.get(), False
    while True:
        try:
            result = do()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if not waits(error):
                raise
            reason = plain(error)
            spent = time.monotonic() - began
            if spent > PATIENCE_SECONDS or (who and who.gives_up()):
                raise DatabaseAwayError(
                    f"The database stayed away for {spent:.0f} s while {what}: {reason}. Attach "
                    "again when it is back: nothing is lost."
                ) from error
        else:
            if waited and who:
                who.on_outage(None)
            return result
        seconds = pause * random.uniform(0.5, 1.0)  # a crowd must not come back all at once
        logger.warning("the database is away (%s); trying again in %.1f s", reason, seconds)
        waited = True
        if who:
            who.on_outage(reason)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not (who and who.gives_up()):
            time.sleep(min(left, 0.5))
        pause = min(2 * pause, 30.0)


def plain(error: BaseException) -> str:
    """What the database said, in one line and without passwords."""
    cause = error.__cause__ or error
    return redact(" ".join(str(getattr(cause, "orig", None) or cause).split())[:200])


class _PatientStorage(FrugalStorage):
    """A worker's storage, each call of which waits for a database that is away."""


def _patient(name: str) -> Callable[..., Any]:
    method = getattr(FrugalStorage, name)

    @functools.wraps(method)
    def call(self: _PatientStorage, *args: Any, **kwargs: Any) -> Any:
        def once() -> Any:
            try:
                if name != "set_trial_param":
                    self.flush()
                return method(self, *args, **kwargs)
            except Exception:
                release(self)  # a connection kept while waiting is one that others lack
                raise

        return once() if _locked.get() else patiently(once, name.replace("_", " ").strip())

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


def _connect(url: URL, heartbeat: bool, expected: bool) -> BaseStorage:
    engine = _engine(url)
    if _has_tables(engine):
        backend = _make_backend(url, heartbeat)
    else:
        with _lock(engine, "tables"):  # workers that start together would all make them
            backend = _make_backend(url, heartbeat)
        if expected:  # perhaps the name of another database was meant
            logger.warning("%s was empty: Optuna's tables were made in it", _shown(url))
    if url.get_backend_name() == "sqlite":
        _configure_sqlite(backend.engine)
    else:
        _configure_server(backend.engine)
    backend.get_all_studies()  # what is wrong with the tables shows here
    return _PatientStorage(backend) if heartbeat else _CachedStorage(backend)


def _engine(url: URL) -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, **_connect_args(url))


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


def _lock(
    engine: sqlalchemy.Engine, name: str, *, patient: bool = False
) -> AbstractContextManager[Callable[[], object]]:
    turn = _Turn(PATIENCE_SECONDS if patient else LOCK_SECONDS, patient)
    if engine.dialect.name == "sqlite":
        return _file_lock(f"{engine.url.database}.lock", turn)
    return _server_lock(engine, name, turn)


class _Turn:
    """Waiting for a lock: for how long, and whether it goes on."""

    def __init__(self, seconds: float, patient: bool) -> None:
        self.patient = patient
        self._seconds = seconds
        self._until = time.monotonic() + seconds

    def wait(self, seconds: float) -> None:
        """Sleep, unless it has been long enough."""
        who = waiting.get()
        if time.monotonic() > self._until or (who and who.gives_up()):
            error = DatabaseAwayError if self.patient else StorageError
            raise error(
                f"No turn at the study within {self._seconds:.0f} s: another worker hangs while it "
                "holds the lock. Find it (hpsched worker list), end it, and attach again."
            )
        time.sleep(seconds)


@contextmanager
def _file_lock(path: str, turn: _Turn) -> Iterator[Callable[[], object]]:
    import filelock

    lock = filelock.FileLock(path, timeout=0)
    try:
        while True:
            try:
                lock.acquire()
                break
            except filelock.Timeout:
                turn.wait(random.uniform(0.02, 0.08))
    except OSError as error:
        raise StorageError(
            f"Cannot use the lock file {path}: {error.strerror or error}. Workers need to write "
            "to the folder of the SQLite file."
        ) from None
    try:
        yield lambda: None
    finally:
        lock.release()


@contextmanager
def _server_lock(
    engine: sqlalchemy.Engine, name: str, turn: _Turn
) -> Iterator[Callable[[], object]]:
    key = hashlib.blake2b(f"hpsched/{engine.url.database}/{name}".encode(), digest_size=8).digest()
    take = functools.partial(_taken, engine, key, turn)
    with patiently(take, "waiting for a turn") if turn.patient else take() as connection:
        began = time.monotonic()

        def still() -> None:
            # In less than that no server comes back from a restart.
            if time.monotonic() - began > 0.2:
                connection.execute(sqlalchemy.text("SELECT 1"))

        try:
            yield still
        finally:
            # A connection that was lost meanwhile has taken the lock with it; what was done under
            # the lock stays done.
            with suppress(SQLAlchemyError):
                if engine.dialect.name == "mysql":
                    give = sqlalchemy.text("SELECT RELEASE_LOCK(:key)")
                    connection.execute(give, {"key": key.hex()})
                connection.rollback()


def _taken(engine: sqlalchemy.Engine, key: bytes, turn: _Turn) -> sqlalchemy.Connection:
    """A connection that holds the lock.

    On PostgreSQL until its transaction ends, on MySQL until it is given back or the connection
    ends. Asked for again and again: a connection that waits is one that the holder may lack, and
    hundreds of workers may begin at once.
    """
    if engine.dialect.name == "postgresql":
        take = sqlalchemy.text("SELECT pg_try_advisory_xact_lock(:key)")
        values: dict[str, Any] = {"key": int.from_bytes(key, signed=True)}
    else:
        take, values = sqlalchemy.text("SELECT GET_LOCK(:key, 0)"), {"key": key.hex()}
    pause = 0.01
    while True:
        connection = engine.connect()
        try:
            if connection.execute(take, values).scalar():
                return connection
        except BaseException:
            connection.close()
            raise
        connection.close()
        if pause > 0.1:
            _release(engine)
        turn.wait(pause * random.uniform(0.5, 1.0))
        pause = min(1.5 * pause, 1.0)
