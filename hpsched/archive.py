"""A study as one JSON document and back, exactly: for backups, and moves between databases.

The document holds all that Optuna keeps of a study: directions, attributes, and of each trial its
number, state, values, parameters, distributions, intermediate values, attributes and times (UTC, to
the microsecond). It is strict JSON: ``{"$float": "nan"}``, and the same with ``inf`` and ``-inf``,
stands for a number that JSON does not have.

What an import changes: a trial that was running waits to be run again, with all that it has, since
the worker that ran it is not a worker of the new database; and such workers count as stopped.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from hpsched import ledger, records
from hpsched.errors import StorageError, StudyExistsError, UsageError
from hpsched.storage import backend_of, open_storage, plain
from hpsched.study import open_study

T = TypeVar("T")

FORMAT = "hpsched-study"
VERSION = 1
_NOT_FINITE = "$float"
_NAME_LENGTH = 512  # of a study, in Optuna's tables
_DATABASE = (SQLAlchemyError, optuna.exceptions.StorageInternalError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Archive:
    """A study as read from a document, ready to be imported.

    Attributes:
        name: The study's name where it was exported.
        directions: One of each objective.
        user_attrs, system_attrs: The study's attributes.
        trials: In the order of their numbers, which are 0, 1, 2, …
        requeued: Numbers of the trials that were running and wait here.
    """

    name: str
    directions: tuple[StudyDirection, ...]
    user_attrs: dict[str, Any]
    system_attrs: dict[str, Any]
    trials: tuple[FrozenTrial, ...]
    requeued: tuple[int, ...]


# -- export ----------------------------------------------------------------------------------------


def export_study(study: Study) -> dict[str, Any]:
    """The whole study as values that strict JSON can hold."""
    storage, study_id = study._storage, study._study_id
    return {
        "format": FORMAT,
        "version": VERSION,
        "hpsched": metadata.version("hpsched"),
        "optuna": optuna.__version__,
        "name": study.study_name,
        "directions": [direction.name.lower() for direction in study.directions],
        "user_attrs": _attrs(storage.get_study_user_attrs(study_id)),
        "system_attrs": _attrs(storage.get_study_system_attrs(study_id)),
        "trials": [_export_trial(trial) for trial in study.get_trials(deepcopy=False)],
    }


def export_json(study: Study) -> str:
    """The document as text, which :func:`read_archive` reads."""
    return json.dumps(export_study(study), indent=1, allow_nan=False) + "\n"


def export_csv(study: Study) -> str:
    """One line a trial: number, state, what it confirms, values, parameters, cost."""
    runs = ledger.read_runs(study.get_trials(deepcopy=False))
    params = sorted({name for run in runs for name in run.trial.params})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", "state", "confirms", "value", *params, "steps", "cycles", "seconds"])
    for run in runs:
        cost = ledger.total_cost([run])
        values = run.trial.values
        writer.writerow(
            [
                run.trial.number,
                run.trial.state.name.lower(),
                run.confirms,
                values[0] if values else None,
                *(run.trial.params.get(name) for name in params),
                cost.steps,
                round(cost.cycles, 4),
                round(cost.seconds, 3),
            ]
        )
    return text.getvalue()


def _export_trial(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "values": _to_json(trial.values),
        "params": _to_json(trial.params),
        "distributions": {
            name: distribution_to_json(space) for name, space in trial.distributions.items()
        },
        "intermediate_values": {
            str(step): _to_json(value) for step, value in sorted(trial.intermediate_values.items())
        },
        "user_attrs": _attrs(trial.user_attrs),
        "system_attrs": _attrs(trial.system_attrs),
        "start": _to_utc(trial.datetime_start),
        "end": _to_utc(trial.datetime_complete),
    }


def _attrs(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Sorted: a database may return them in any order, and equal studies give equal documents."""
    return {key: _to_json(attrs[key]) for key in sorted(attrs)}


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_NOT_FINITE: repr(float(value))}
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    if isinstance(value, Mapping):
        if set(value) == {_NOT_FINITE}:  # the user's own: in a list, to tell it from ours
            return {_NOT_FINITE: [_to_json(value[_NOT_FINITE])]}
        return {key: _to_json(each) for key, each in value.items()}
    return value


def _to_utc(time: datetime | None) -> str | None:
    """Optuna hands out local time without saying so."""
    return None if time is None else time.astimezone(UTC).isoformat(timespec="microseconds")


# -- read ------------------------------------------------------------------------------------------


def read_archive(text: str, source: str = "the document") -> Archive:
    """The study in ``text``, checked as a whole before anything is stored.

    Args:
        text: What :func:`export_json` wrote.
        source: What errors call it, e.g. the file's name.

    Raises:
        UsageError: It is no export, cut short, of another version, or holds something that cannot
            be right; the message says where.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{source} is no export of a study, or only a part of one: it is not JSON ({error}). "
            "Make one with `hpsched study export NAME -o FILE`."
        ) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UsageError(
            f"{source} is no export of a study: it has no format={FORMAT!r}. "
            "Make one with `hpsched study export NAME -o FILE`."
        )
    if data.get("version") != VERSION:
        raise UsageError(
            f"{source} is of version {data.get('version')!r}; this hpsched reads version "
            f"{VERSION}. Import it with the hpsched that wrote it ({data.get('hpsched')!r}), or a "
            "newer one."
        )
    trials = _read(data, "trials", list, source)
    read = tuple(_read_trial(trial, at, source) for at, trial in enumerate(trials))
    found = Archive(
        name=_read(data, "name", _name, source),
        directions=_read(data, "directions", _directions, source),
        user_attrs=_read(data, "user_attrs", _read_study_attrs, source),
        system_attrs=_read(data, "system_attrs", _from_mapping, source),
        trials=read,
        requeued=tuple(at for at, one in enumerate(trials) if one["state"].lower() == "running"),
    )
    for trial in found.trials:
        if trial.values is not None and len(trial.values) != len(found.directions):
            raise _damaged(
                f"{source}: trial {trial.number}: values",
                f"there are {len(trial.values)}, but {len(found.directions)} directions",
            )
    return found


def _read(data: Any, field: str, read: Callable[[Any], T], where: str) -> T:
    try:
        return read(data[field])
    except KeyError as error:
        missing = error.args[0] == field
        raise _damaged(
            f"{where}: {field}", "it is missing" if missing else f"unknown: {error}"
        ) from None
    except (TypeError, ValueError, AttributeError, OverflowError, IndexError) as error:
        raise _damaged(f"{where}: {field}", error) from None


def _damaged(where: str, what: object) -> UsageError:
    return UsageError(
        f"{where}: {what}. The export was damaged or changed: export the study again."
    )


def _read_trial(data: Any, at: int, source: str) -> FrozenTrial:
    where = f"{source}: trial {at}"

    def field(name: str, read: Callable[[Any], T]) -> T:
        return _read(data, name, read, where)

    if field("number", int) != at:
        raise _damaged(f"{where}: number", f"{data['number']!r} stands at place {at}")
    state = field("state", lambda name: TrialState[name.upper()])
    trial = FrozenTrial(
        number=at,
        state=TrialState.WAITING if state == TrialState.RUNNING else state,
        value=None,
        values=field("values", _values),
        datetime_start=field("start", _from_utc),
        datetime_complete=field("end", _from_utc),
        params=field("params", _from_mapping),
        distributions=field("distributions", _distributions),
        intermediate_values=field("intermediate_values", _intermediate_values),
        user_attrs=field("user_attrs", _from_mapping),
        system_attrs=field("system_attrs", _from_mapping),
        trial_id=-1,  # the database gives it
    )
    try:
        trial._validate()
    except (TypeError, ValueError) as error:
        raise _damaged(where, str(error).rstrip(".")) from None
    return trial


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"it is {value!r:.40}, not a name")
    return value


def _directions(value: Any) -> tuple[StudyDirection, ...]:
    known = {"minimize": StudyDirection.MINIMIZE, "maximize": StudyDirection.MAXIMIZE}
    if not value:
        raise ValueError("there is none")
    return tuple(known[name] for name in value)


def _read_study_attrs(value: Any) -> dict[str, Any]:
    """A worker of another database is no worker here."""
    attrs = _from_mapping(value)
    for key, record in attrs.items():
        if key.startswith(records.WORKER) and isinstance(record, dict) and "state" in record:
            attrs[key] = {**record, "state": "stopped"}
    return attrs


def _from_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"it is {value!r:.40}, not a mapping")
    return {key: _from_json(each) for key, each in value.items()}


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_NOT_FINITE}:
        inner = value[_NOT_FINITE]
        return {_NOT_FINITE: _from_json(inner[0])} if isinstance(inner, list) else float(inner)
    return {key: _from_json(each) for key, each in value.items()}


def _number(value: Any) -> float:
    found = _from_json(value)
    if isinstance(found, bool) or not isinstance(found, float | int):
        raise TypeError(f"{found!r:.40} is not a number")
    return float(found)


def _values(value: Any) -> list[float] | None:
    return None if value is None else [_number(each) for each in value]


def _intermediate_values(value: Any) -> dict[int, float]:
    return {int(step): _number(each) for step, each in value.items()}


def _distributions(value: Any) -> dict[str, optuna.distributions.BaseDistribution]:
    return {name: json_to_distribution(text) for name, text in value.items()}


def _from_utc(text: Any) -> datetime | None:
    if text is None:
        return None
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return time.astimezone().replace(tzinfo=None)  # as Optuna hands it out


# -- import ----------------------------------------------------------------------------------------


def import_study(
    archive: Archive,
    *,
    name: str | None = None,
    storage: str | None = None,
    on_progress: Callable[[int], None] = lambda stored: None,
) -> Study:
    """Store the study: all of it under its name, or nothing.

    It is built under a passing name, ``NAME (importing 1f2e3d4c)``, and gets its own when it is
    whole. Whatever fails meanwhile, Ctrl-C included, the unfinished one is removed; a process
    that was killed leaves it behind under the passing name.

    Args:
        archive: From :func:`read_archive`.
        name: Another name than where it was exported.
        storage: URL; see :func:`hpsched.storage.resolve_url`.
        on_progress: Called with the number of trials stored so far.

    Raises:
        StudyExistsError: The name is taken.
        StorageError: The database cannot be used, or cannot hold a trial or an attribute as it is.
    """
    name = archive.name if name is None else _checked(name)
    held = open_storage(storage, create=True)
    if name in optuna.get_all_study_names(held):
        raise _taken(name)
    draft = optuna.create_study(
        study_name=f"{name[:400]} (importing {secrets.token_hex(4)})",
        storage=held,
        directions=list(archive.directions),
    )
    try:
        _fill(draft, archive, on_progress)
        _check_stored(draft, archive.trials)
        _rename(held, draft._study_id, name)
    except BaseException:
        with suppress(*_DATABASE):  # it is away: the draft's name tells what it is
            held.delete_study(draft._study_id)
        raise
    return open_study(name, storage)


def _checked(name: str) -> str:
    if not name.strip() or len(name) > _NAME_LENGTH:
        raise UsageError(f"--name {name!r:.60}: 1 to {_NAME_LENGTH} characters.")
    return name


def _taken(name: str) -> StudyExistsError:
    return StudyExistsError(
        f"A study named {name!r} exists there: import this one under another name with --name."
    )


def _fill(study: Study, archive: Archive, on_progress: Callable[[int], None]) -> None:
    storage, study_id = study._storage, study._study_id
    for key, value in archive.user_attrs.items():
        with _named(f"the study's attribute {key!r}"):
            storage.set_study_user_attr(study_id, key, value)
    for key, value in archive.system_attrs.items():
        with _named(f"the study's system attribute {key!r}"):
            storage.set_study_system_attr(study_id, key, value)
    for trial in archive.trials:
        with _named(f"trial {trial.number}"):
            study.add_trial(trial)
        on_progress(trial.number + 1)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Tells what it was that the database would not take."""
    try:
        yield
    except _DATABASE as error:
        raise StorageError(
            f"Cannot store {what}: {plain(error)}. Nothing was imported. MySQL takes attributes of "
            "up to 65,535 bytes; use another database for longer ones."
        ) from None
    except ValueError as error:  # Optuna's: it does not go with the trials before it
        raise _damaged(what, error) from None


def _check_stored(study: Study, trials: Sequence[FrozenTrial]) -> None:
    """What was stored must read back as it was, but for times: MySQL keeps whole seconds."""
    stored = backend_of(study._storage).get_all_trials(study._study_id, deepcopy=False)
    for there, trial in zip(stored, trials, strict=True):
        found = _export_trial(there)
        for field, value in _export_trial(trial).items():
            if found[field] != value and field not in ("start", "end"):
                raise StorageError(
                    f"This database does not keep {field} of trial {trial.number} as they are "
                    "(MySQL takes names for one that differ in case only). Nothing was imported: "
                    "use SQLite or PostgreSQL."
                )


def _rename(storage: BaseStorage, study_id: int, name: str) -> None:
    backend = backend_of(storage)
    assert isinstance(backend, RDBStorage)  # open_storage makes no other
    rename = sqlalchemy.text("UPDATE studies SET study_name = :name WHERE study_id = :id")
    try:
        with backend.engine.begin() as connection:
            connection.execute(rename, {"name": name, "id": study_id})
    except IntegrityError:  # somebody was faster
        raise _taken(name) from None
