"""Who runs which trial: claims, heartbeats, and trials whose worker is gone.

A trial that runs names its worker (``hpsched:worker``) and beats every HPSCHED_HEARTBEAT seconds.
Its worker is gone when its process, on this very host, has ended; or when the last beat is older
than HPSCHED_GRACE seconds by the database's own clock *and* none came while somebody watched for
two beats with the database answering. After an outage of the database everybody's beats are old,
and nobody is gone; nor does a clock that was set, on whichever host, make a healthy trial a lost
one.

A trial put back in the queue keeps its number, parameters, seeds and finished runs. One that has
killed eight or more workers in a row without finishing a run is failed instead.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from hpsched import checkpoint, records
from hpsched.storage import backend_of

logger = logging.getLogger("hpsched.worker")

#: Workers that must have died at the same run of a trial for it to count as deadly: this many, or
#: where workers die at other trials too (on machines that are taken away, say) as many as there …
DEATHS = 8
MOST_DEATHS = 20  # … but no more than this.


def new_worker_id() -> str:
    """An id that no other worker has, and that says which process it is, on which kernel."""
    return f"{uuid.uuid4().hex[:8]}-{_kernel()}-{os.getpid()}-{_birth(os.getpid())}"


def is_gone(worker: str) -> bool:
    """Whether the worker's process has ended; False where this host cannot know."""
    _, kernel, pid, birth = [*worker.split("-"), "", "", ""][:4]
    if not kernel or kernel != _kernel() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    now = _birth(int(pid))
    return now is not None and now != birth


@functools.cache
def _kernel() -> str:
    """Of this boot and this space of process numbers; empty where there is no such thing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.blake2b((boot + os.readlink("/proc/self/ns/pid")).encode()).hexdigest()[:8]
    except OSError:
        return ""


def _birth(pid: int) -> str | None:
    """When a process began, in ticks since the boot; ``dead`` if only its parent has not noticed.

    Process numbers are used again, and in containers they are all the same.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "dead" if fields[0] in "ZX" else fields[19]


def beating_storage(study: Study) -> RDBStorage | None:
    """The study's database, if its trials beat (opened with ``heartbeat=True``)."""
    storage = backend_of(study._storage)
    if isinstance(storage, RDBStorage) and storage.heartbeat_interval:
        return storage
    return None


def claim(study: Study, trial: FrozenTrial | Trial, worker: str) -> None:
    """Make the trial this worker's, and let it beat."""
    if trial.user_attrs.get(records.OWNER) != worker:
        study._storage.set_trial_user_attr(trial._trial_id, records.OWNER, worker)
    beat(study, trial._trial_id)


def beat(study: Study, trial_id: int) -> None:
    """A sign of life of the trial."""
    storage = beating_storage(study)
    if storage is not None:
        storage.record_heartbeat(trial_id)


def holder(study: Study, trial_id: int) -> tuple[TrialState, str | None]:
    """The trial's state, and the id of its worker, as the database says now."""
    storage = backend_of(study._storage)
    if not isinstance(storage, RDBStorage):
        stored = storage.get_trial(trial_id)
        return stored.state, stored.user_attrs.get(records.OWNER)
    trial, attribute = models.TrialModel, models.TrialUserAttributeModel
    named = (attribute.trial_id == trial.trial_id) & (attribute.key == records.OWNER)
    query = (
        sqlalchemy.select(trial.state, attribute.value_json)
        .outerjoin(attribute, named)
        .where(trial.trial_id == trial_id)
    )
    with storage.engine.connect() as connection:
        row = connection.execute(query).first()
    if row is None:
        raise KeyError(trial_id)
    return row.state, None if row.value_json is None else json.loads(row.value_json)


def is_held(study: Study, trial_id: int, worker: str) -> bool:
    """Whether the trial still runs here, as the database says now."""
    return holder(study, trial_id) == (TrialState.RUNNING, worker)


def put_back(study: Study, trial_id: int) -> None:
    """Queue a running trial again, as it is: parameters, finished runs, seeds and number stay."""
    with suppress(optuna.exceptions.UpdateFinishedTrialError):
        study._storage.set_trial_state_values(trial_id, TrialState.WAITING)


def take_from_the_dead(study: Study, trial: FrozenTrial) -> None:
    """Queue again a trial whose worker is gone; fail it if it was the death of too many."""
    with suppress(optuna.exceptions.UpdateFinishedTrialError):  # it was alive after all
        _take(study, trial)


def _take(study: Study, trial: FrozenTrial) -> None:
    kept = (records.RANGE_TEST, records.CONFIRM)
    runs = sum(key in kept or key.startswith(records.RUNG) for key in trial.user_attrs)
    before, then, total = trial.user_attrs.get(records.DEATHS, (0, runs, 0))
    deaths = before + 1 if then == runs else 1
    storage, trial_id = study._storage, trial._trial_id
    storage.set_trial_user_attr(trial_id, records.DEATHS, [deaths, runs, total + 1])
    others = sum(
        other.user_attrs.get(records.DEATHS, (0, 0, 0))[2]
        for other in study.get_trials(deepcopy=False)
        if other.number != trial.number
    )
    if deaths < min(max(DEATHS, others), MOST_DEATHS):
        logger.warning("trial %d: its worker is gone; back in the queue", trial.number)
        storage.set_trial_state_values(trial_id, TrialState.WAITING)
        return
    reason = (
        f"its worker died {deaths} times in a row at the same run: a crash in native code, or the "
        "host's memory ran out (see the workers' logs and `dmesg`)"
    )
    logger.error("trial %d: failed: %s", trial.number, reason)
    storage.set_trial_user_attr(trial_id, records.ERROR, reason)
    storage.set_trial_state_values(trial_id, TrialState.FAIL)
    checkpoint.forget_trial(study.study_name, trial)


class Watch:
    """Tells which running trials have lost their worker.

    Args:
        study: The study, opened with ``heartbeat=True``; of others, no trial counts as lost.
        ticks: A clock that nobody sets, in seconds.
    """

    def __init__(self, study: Study, ticks: Callable[[], float] = time.monotonic) -> None:
        self._study = study
        self._ticks = ticks
        self._looked = 0.0  # when last, by our own clock
        self._beats: dict[int, tuple[datetime.datetime, float]] = {}  # last beat, seen first when
        self._old: set[int] = set()

    @property
    def suspects(self) -> bool:
        """Whether a trial may have lost its worker: look again within two beats."""
        return bool(self._old)

    @property
    def beats(self) -> dict[int, datetime.datetime]:
        """Trial id → last beat, as of the last look."""
        return {trial_id: at for trial_id, (at, _) in self._beats.items()}

    def look(self) -> set[int]:
        """Ids of the running trials whose worker is gone, as far as is known by now."""
        storage = beating_storage(self._study)
        if storage is None:
            return set()
        interval, grace = storage.heartbeat_interval or 0, storage.grace_period or 0
        read = self._read(storage)
        now = self._ticks()
        known = self._beats if now - self._looked <= 3 * interval else {}
        dead = {trial_id for trial_id, (_, _, owner) in read.items() if is_gone(owner)}
        self._looked = now
        self._beats = {
            trial_id: known[trial_id]
            if trial_id in known and known[trial_id][0] == at
            else (at, now)
            for trial_id, (at, _, _) in read.items()
        }
        self._old = {trial_id for trial_id, (_, age, _) in read.items() if abs(age) > grace}
        return dead | {each for each in self._old if now - self._beats[each][1] >= 2 * interval}

    def _read(self, storage: RDBStorage) -> dict[int, tuple[datetime.datetime, float, str]]:
        """Trial id → last beat, its age in seconds, and whose: of the running trials that beat."""
        trial, beat, attribute = (
            models.TrialModel,
            models.TrialHeartbeatModel,
            models.TrialUserAttributeModel,
        )
        named = (attribute.trial_id == beat.trial_id) & (attribute.key == records.OWNER)
        query = (
            sqlalchemy.select(
                beat.trial_id, beat.heartbeat, sqlalchemy.func.now(), attribute.value_json
            )
            .join(trial, trial.trial_id == beat.trial_id)
            .outerjoin(attribute, named)
            .where(trial.study_id == self._study._study_id, trial.state == TrialState.RUNNING)
        )
        with storage.engine.connect() as connection:
            rows = connection.execute(query).all()
        return {
            trial_id: (
                at,
                (now.replace(tzinfo=None) - at).total_seconds(),
                json.loads(owner or '""'),
            )
            for trial_id, at, now, owner in rows
        }
