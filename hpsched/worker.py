"""One worker: ask the study what comes next, run the objective, tell; until the budget is spent.

Nothing is lost and nothing counted twice:

- What comes next is decided, and the trial claimed, under a lock that all workers share.
- A trial beats while it runs. One that has stopped beating is put back in the queue by the next
  worker that asks, with the rungs it has; its number, parameters and seeds stay.
- Ctrl-C and SIGTERM interrupt the objective, put the trial back, and end the worker; a second one
  ends it at once.
- A result is delivered when the database is back, if it was away.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
from optuna.study import Study
from optuna.trial import Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from hpsched import objective as objectives
from hpsched import records
from hpsched.errors import HpschedError, StorageError, TrainingError, UsageError
from hpsched.ledger import next_move, read_runs
from hpsched.records import WorkerRecord
from hpsched.storage import HEARTBEAT_SECONDS, exclusive, redact
from hpsched.study import enqueue_confirmation, read_settings

if TYPE_CHECKING:
    from hpsched.cycle import Progress

logger = logging.getLogger("hpsched.worker")
T = TypeVar("T")

PROGRESS_SECONDS = 2.0
FAILURES_IN_A_ROW = 3
RETRY_SECONDS = 600.0
_DATABASE_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError)


class Interrupted(BaseException):
    """A signal asked the worker to end. Not an Exception, so that no user code swallows it."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a worker ended.

    Attributes:
        done, pruned, failed, confirmed: Trials it finished, by outcome.
        interrupted: A signal ended it; its trial is back in the queue.
    """

    done: int = 0
    pruned: int = 0
    failed: int = 0
    confirmed: int = 0
    interrupted: bool = False


class Worker:
    """Runs a study's trials in this process, one after another.

    Args:
        study: From ``open_study(name, storage, heartbeat=True)``.
        objective: ``objective(trial)``; by default imported as the study's settings say.
        on_progress: Called about once a second with a :class:`~hpsched.cycle.Progress` and the
            trial's number, from the training loop.

    Raises:
        UsageError: The study has no settings and no objective was given.
        ObjectiveError: The objective cannot be imported.
    """

    def __init__(
        self,
        study: Study,
        objective: Callable[[Trial], Any] | None = None,
        on_progress: Callable[[int, Progress], None] | None = None,
    ) -> None:
        self._study = study
        self._settings = read_settings(study)
        self._objective = objective or objectives.load(self._spec())
        self._on_progress = on_progress
        self._id = uuid.uuid4().hex[:12]
        self._record = WorkerRecord(
            host=socket.gethostname(),
            pid=os.getpid(),
            device=_device(),
            started=time.time(),
            seen=time.time(),
            state="idle",
        )
        self._ended = Ended()
        self._failures = 0
        self._stop = False
        self._interruptible = False

    def run(self) -> Ended:
        """Work until the study's budget is spent or a signal arrives.

        Raises:
            TrainingError: The objective broke its contract, or failed three times in a row.
            StorageError: The database stayed away for ten minutes.
        """
        with self._signals(), warnings.catch_warnings():
            # We beat ourselves: Study.optimize's thread dies at its first database error.
            warnings.filterwarnings("ignore", message="Heartbeat of storage")
            try:
                while not self._stop:
                    trial = _retrying(self._claim, "asking for a trial")
                    if trial is None:
                        break
                    self._work_on(trial)
            finally:
                self._show(state="stopped", trial=None)
        return replace(self._ended, interrupted=self._stop)

    def _spec(self) -> str:
        if self._settings is None:
            raise UsageError(
                f"Study {self._study.study_name!r} was not created by hpsched, so it does not say "
                "which objective to run: use study.optimize, or `hpsched study create`."
            )
        return self._settings.objective

    # -- claim ---------------------------------------------------------------------------------

    def _claim(self) -> Trial | None:
        study = self._study
        with exclusive(study._storage, study.study_name):
            self._put_back_stale()
            runs = read_runs(study.get_trials(deepcopy=False))
            move = next_move(self._settings, runs, study.direction)
            if move.what == "done":
                return None
            if move.confirms is not None:
                enqueue_confirmation(study, move.confirms)
            trial = study.ask()
            trial.set_user_attr(records.OWNER, self._id)
            self._beat(trial._trial_id)
        return trial

    def _put_back_stale(self) -> None:
        storage = _database(self._study)
        if storage is None:
            return
        for trial_id in storage._get_stale_trial_ids(self._study._study_id):
            number = self._study._storage.get_trial(trial_id).number
            logger.warning("trial %d: its worker is gone; back in the queue", number)
            put_back(self._study, trial_id)

    # -- one trial -----------------------------------------------------------------------------

    def _work_on(self, trial: Trial) -> None:
        confirms = trial.user_attrs.get(records.CONFIRMS)
        what = "" if confirms is None else f", confirming trial {confirms}"
        logger.info("trial %d: start%s", trial.number, what)
        self._show(state="running", trial=trial.number)
        with self._beating(trial):
            try:
                outcome = self._run_objective(trial)
            except Interrupted:
                if self._is_ours(trial):
                    put_back(self._study, trial._trial_id)
                    logger.warning("trial %d: interrupted; back in the queue", trial.number)
                return
            except _DATABASE_ERRORS as error:
                logger.warning("trial %d: %s; back in the queue", trial.number, _plain(error))
                _retrying(lambda: put_back(self._study, trial._trial_id), "putting the trial back")
                return
        self._finish(trial, outcome, confirms is not None)

    def _run_objective(self, trial: Trial) -> float | Exception:
        """The trial's value, or why it has none."""
        from hpsched import cycle

        def listen(progress: Progress) -> None:
            self._progress = progress
            if self._on_progress:
                self._on_progress(trial.number, progress)

        token = cycle.observer.set(listen)
        self._interruptible = True
        try:
            if self._stop:
                raise Interrupted
            return _as_value(self._objective(trial))
        except _DATABASE_ERRORS:
            raise
        except Exception as error:
            return error
        finally:
            self._interruptible = False
            self._progress = None
            cycle.observer.reset(token)

    def _finish(self, trial: Trial, outcome: float | Exception, confirms: bool) -> None:
        if not _retrying(lambda: self._is_ours(trial), "delivering a result"):
            logger.warning("trial %d: was given to another worker; dropped here", trial.number)
            return
        if isinstance(outcome, optuna.TrialPruned):
            _retrying(lambda: self._tell(trial, None, TrialState.PRUNED), "delivering a result")
            logger.info("trial %d: pruned: %s", trial.number, outcome)
            self._count(pruned=1)
        elif isinstance(outcome, Exception):
            self._fail(trial, outcome)
        else:
            _retrying(lambda: self._tell(trial, outcome, None), "delivering a result")
            logger.info("trial %d: value %.6g", trial.number, outcome)
            self._count(confirmed=1) if confirms else self._count(done=1)

    def _fail(self, trial: Trial, error: Exception) -> None:
        reason = redact(objectives.describe(error))

        def tell() -> None:
            trial.set_user_attr(records.ERROR, reason[:2000])
            self._tell(trial, None, TrialState.FAIL)

        _retrying(tell, "delivering a failure")
        logger.error("trial %d: failed: %s", trial.number, reason)
        self._count(failed=1)
        self._failures += 1
        if isinstance(error, HpschedError):
            raise error  # the contract is broken: every trial would fail the same way
        if self._failures >= FAILURES_IN_A_ROW:
            raise TrainingError(
                f"{self._failures} trials failed in a row, the last with {reason}. They do not "
                "count towards the budget; mend the objective and attach again."
            ) from error

    def _tell(self, trial: Trial, value: float | None, state: TrialState | None) -> None:
        self._study.tell(trial, value, state=state, skip_if_finished=True)

    def _is_ours(self, trial: Trial) -> bool:
        stored = self._study._storage.get_trial(trial._trial_id)
        running = stored.state == TrialState.RUNNING
        return running and stored.user_attrs.get(records.OWNER) == self._id

    def _count(self, **more: int) -> None:
        if "failed" not in more:
            self._failures = 0
        self._ended = replace(
            self._ended, **{key: getattr(self._ended, key) + n for key, n in more.items()}
        )

    # -- signs of life ---------------------------------------------------------------------------

    _progress: Progress | None = None

    def _beat(self, trial_id: int) -> None:
        storage = _database(self._study)
        if storage is not None:
            storage.record_heartbeat(trial_id)

    @contextmanager
    def _beating(self, trial: Trial) -> Iterator[None]:
        """Beat for the trial, and show its progress, from a thread of its own."""
        over = threading.Event()

        def live() -> None:
            beaten = time.monotonic()
            while not over.wait(PROGRESS_SECONDS):
                # The database may be away for minutes: the next beat tries again.
                with suppress(*_DATABASE_ERRORS):
                    if time.monotonic() - beaten >= HEARTBEAT_SECONDS:
                        self._beat(trial._trial_id)
                        beaten = time.monotonic()
                    self._show(state="running", trial=trial.number)

        thread = threading.Thread(target=live, name="hpsched-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _show(self, *, state: str, trial: int | None) -> None:
        progress = self._progress
        self._record = replace(
            self._record,
            seen=time.time(),
            state=state,
            trial=trial,
            kind=progress.kind if progress else None,
            rung=progress.rung if progress else None,
            step=progress.step if progress else None,
            total_steps=progress.total_steps if progress else None,
            lr=records.significant(progress.lr) if progress else None,
            loss=records.significant(progress.loss) if progress else None,
            done=self._ended.done + self._ended.pruned + self._ended.confirmed,
            failed=self._ended.failed,
        )
        with suppress(*_DATABASE_ERRORS):
            self._study.set_user_attr(records.WORKER + self._id, self._record.to_json())

    # -- signals -------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the worker cleanly; only the main thread can be told."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._stop:
            os._exit(128 + number)
        self._stop = True
        logger.warning("%s: ending; again to end at once", signal.Signals(number).name)
        if self._interruptible:  # otherwise between two trials, where the loop looks at _stop
            raise Interrupted


def put_back(study: Study, trial_id: int) -> None:
    """Queue a running trial again, as it is: parameters, finished rungs, seeds and number stay."""
    with suppress(optuna.exceptions.UpdateFinishedTrialError):
        study._storage.set_trial_state_values(trial_id, TrialState.WAITING)


def _database(study: Study) -> optuna.storages.RDBStorage | None:
    storage = getattr(study._storage, "_backend", study._storage)
    if isinstance(storage, optuna.storages.RDBStorage) and storage.heartbeat_interval:
        return storage
    return None


def _retrying(do: Callable[[], T], what: str) -> T:
    """``do()``, again with growing pauses while the database is away."""
    pause, until = 1.0, time.monotonic() + RETRY_SECONDS
    while True:
        try:
            return do()
        except _DATABASE_ERRORS as error:
            if time.monotonic() > until:
                raise StorageError(
                    f"The database stayed away for {RETRY_SECONDS / 60:.0f} minutes while "
                    f"{what}: {_plain(error)}"
                ) from error
            logger.warning("%s: %s; trying again in %.0f s", what, _plain(error), pause)
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def _plain(error: BaseException) -> str:
    cause = getattr(error, "orig", None) or error.__cause__ or error
    return redact(" ".join(str(cause).split())[:200])


def _as_value(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TrainingError(
            f"The objective returned {value!r}: return a number, e.g. "
            "`return hpsched.suggest_onecycle(trial, total_steps=…).run(train)`."
        ) from None


def _device() -> str:
    torch = sys.modules.get("torch")  # not imported for its name alone
    if torch is None or not torch.cuda.is_available():
        return "cpu"
    return f"cuda: {torch.cuda.get_device_name(0)}"
