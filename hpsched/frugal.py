"""A worker's storage: Optuna's, but what cannot have changed is not asked for again.

- The trial that runs here is kept as it is written. Nobody else writes it, unless its worker was
  taken for dead, and whether it was is asked of the database itself (:mod:`hpsched.claims`).
- Other trials and the study's attributes are at most a second old. They are read anew under the
  study's lock (:func:`hpsched.storage.exclusive`), and once a trial of ours has changed its state.
- Parameters are written in one transaction, before the next call of any other kind: those of a
  recipe before its training begins.
"""

from __future__ import annotations

import copy
import json
import math
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy
from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
)
from optuna.storages import RDBStorage, _CachedStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError

from hpsched.errors import TrialLostError

FRESH_SECONDS = 1.0


class FrugalStorage(_CachedStorage):
    """Optuna's storage, for a process that runs one trial at a time."""

    # ruff: noqa: D102 (the methods are Optuna's, and say there what they do)

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._held: int | None = None  # the trial that runs here
        self._params: list[dict[str, Any]] = []  # rows of its parameters, not yet written
        self._writing = threading.Lock()  # of these; a heartbeat's thread may flush them too
        self._trials_read: dict[int, float] = {}  # study → when
        self._attrs_read: dict[int, tuple[float, dict[str, Any]]] = {}  # study → when, what

    def refresh(self) -> None:
        """What is asked for from now on is read anew."""
        self._trials_read.clear()
        self._attrs_read.clear()

    def flush(self) -> None:
        """Write the parameters that wait for it."""
        with self._writing:
            try:
                if self._params:
                    self._write_once(self._params[0]["trial_id"], self._params)
            except (KeyError, RuntimeError, TrialLostError):  # not to be tried again
                self._params = []
                raise
            self._params = []

    def drop(self) -> None:
        """Forget the trial that runs here, and what waits to be written: it is another's now."""
        with self._writing:
            self._params, self._held = [], None
        self.refresh()

    # -- read --------------------------------------------------------------------------------------

    def get_trial(self, trial_id: int) -> FrozenTrial:
        if trial_id == self._held:
            with self._lock:
                study_id, number = self._trial_id_to_study_id_and_number[trial_id]
                return self._studies[study_id].trials[number]
        return super().get_trial(trial_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        now = time.monotonic()
        when, attrs = self._attrs_read.get(study_id, (-FRESH_SECONDS, {}))
        if now - when >= FRESH_SECONDS:
            attrs = self._study_attrs(study_id)
            self._attrs_read[study_id] = now, attrs
        return dict(attrs)

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        now = time.monotonic()
        if now - self._trials_read.get(study_id, -FRESH_SECONDS) >= FRESH_SECONDS:
            super()._read_trials_from_remote_storage(study_id)
            self._trials_read[study_id] = now

    # -- write -------------------------------------------------------------------------------------

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        super().set_study_user_attr(study_id, key, value)
        self._attrs_read.clear()

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        if template_trial is None:  # it runs
            self._held = trial_id
        return trial_id

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        done = super().set_trial_state_values(trial_id, state, values)
        self._trials_read.clear()
        if trial_id == self._held:
            self._held = None
        if done and state == TrialState.RUNNING:
            self._note(trial_id, state=state, datetime_start=datetime.now())
            self._held = trial_id if trial_id in self._trial_id_to_study_id_and_number else None
        elif done and state.is_finished():
            given = {} if values is None else {"values": list(values)}
            self._note(trial_id, state=state, datetime_complete=datetime.now(), **given)
        return done

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        known = None
        if trial_id == self._held:
            study_id, _ = self._trial_id_to_study_id_and_number[trial_id]
            known = self._studies[study_id].param_distribution.get(param_name)
        if known is None:  # what other trials have is asked for once
            super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
            # It lets one that is there stay, without a word.
            _check_same(self._backend.get_trial_param(trial_id, param_name), param_value_internal)
        else:
            check_distribution_compatibility(known, distribution)
            row = {"trial_id": trial_id, "param_name": param_name}
            row |= {"param_value": param_value_internal}
            with self._writing:
                self._params.append(
                    {**row, "distribution_json": distribution_to_json(distribution)}
                )
        value = distribution.to_external_repr(param_value_internal)
        self._note(trial_id, params={param_name: value}, distributions={param_name: distribution})

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_user_attr(trial_id, key, value)
        self._note(trial_id, user_attrs={key: _as_stored(value)})

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_system_attr(trial_id, key, value)
        self._note(trial_id, system_attrs={key: _as_stored(value)})

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        self._note(trial_id, intermediate_values={step: intermediate_value})

    def _note(self, trial_id: int, **changes: Any) -> None:
        """The same in what is kept here, as a new object: readers may still hold the one before."""
        with self._lock:
            if trial_id not in self._trial_id_to_study_id_and_number:
                return
            study_id, number = self._trial_id_to_study_id_and_number[trial_id]
            trials = self._studies[study_id].trials
            changed = copy.copy(trials[number])
            for name, change in changes.items():
                merged = (
                    {**getattr(changed, name), **change} if isinstance(change, dict) else change
                )
                setattr(changed, name, merged)
            trials[number] = changed

    def _study_attrs(self, study_id: int) -> dict[str, Any]:
        """A study's user attributes, in one statement: Optuna looks for the study first."""
        study, attribute = models.StudyModel, models.StudyUserAttributeModel
        query = (
            sqlalchemy.select(attribute.key, attribute.value_json)
            .select_from(study)
            .outerjoin(attribute, attribute.study_id == study.study_id)
            .where(study.study_id == study_id)
        )
        with self._backend.engine.connect() as connection:
            rows = connection.execute(query).all()
        if not rows:
            raise KeyError(models.NOT_FOUND_MSG)
        return {key: json.loads(value) for key, value in rows if key is not None}

    def _write_once(self, trial_id: int, rows: Sequence[dict[str, Any]]) -> None:
        """Store parameters, though another may store the same ones at this very moment.

        A worker that was suspended while it stored them goes on, and its trial is ours by now.
        """
        try:
            self._write(trial_id, rows)
        except IntegrityError:
            self._write(trial_id, rows)  # now they are there to be seen

    def _write(self, trial_id: int, rows: Sequence[dict[str, Any]]) -> None:
        """Store parameters; those that are there were stored by a call whose answer was lost."""
        trial, param = models.TrialModel, models.TrialParamModel
        query = (
            sqlalchemy.select(trial.state, param.param_name, param.param_value)
            .outerjoin(param, param.trial_id == trial.trial_id)
            .where(trial.trial_id == trial_id)
        )
        with self._backend.engine.begin() as connection:
            found = connection.execute(query).all()
            if not found:
                raise KeyError(models.NOT_FOUND_MSG)
            there = {row.param_name: row.param_value for row in found}
            new = [row for row in rows if row["param_name"] not in there]
            for row in rows:
                name, value = row["param_name"], row["param_value"]
                _check_same(there.get(name, value), value)
            state = found[0].state
            if new and not state.is_finished():
                connection.execute(sqlalchemy.insert(param), new)
        self._backend.check_trial_is_updatable(trial_id, state)


def _check_same(stored: float, ours: float) -> None:
    if not math.isclose(stored, ours, rel_tol=1e-12):
        raise TrialLostError(
            f"the trial has {stored!r} where this worker drew {ours!r}: it was given to another."
        )


def _as_stored(value: Any) -> Any:
    return json.loads(json.dumps(value))
