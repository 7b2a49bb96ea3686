"""One worker: ask the study what comes next, run the objective, tell; until the budget is spent.

Nothing is lost and nothing counted twice:

- What comes next is decided, a trial claimed, and a result told under a lock that all workers
  share.
- A trial beats from before it runs until it is told. One that has stopped beating is put back in
  the queue by the next worker that asks, with the rungs it has; its number, parameters and seeds
  stay. A worker that finds nothing to do leaves once the workers of all running trials have given
  a sign of life, so that the trial of one that has just died is not left behind.
- A worker that was suspended for too long notices that its trial was given away, and drops it.
- Ctrl-C and SIGTERM interrupt the objective, put the trial back, and end the worker; a second one
  ends it at once. They never interrupt a call to the database.
- When the database is away, everything waits for it (:mod:`hpsched.storage`).

HPSCHED_HEARTBEAT and HPSCHED_GRACE (whole seconds; 10 and 60) set how often a trial beats, and how
long a silent one is left alone.
"""

from __future__ import annotations

import logging
import math
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
from typing import TYPE_CHECKING, Any

import optuna
from optuna.study import Study
from optuna.trial import Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from hpsched import dashboard_figures, records
from hpsched import objective as objectives
from hpsched.errors import (
    HpschedError,
    StorageError,
    StudyNotFoundError,
    TrainingError,
    UsageError,
)
from hpsched.ledger import next_move, read_runs
from hpsched.records import WorkerRecord
from hpsched.storage import backend_of, exclusive, patiently, redact
from hpsched.study import enqueue_confirmation, make_sampler, read_settings, read_workers

if TYPE_CHECKING:
    from hpsched.cycle import Progress

logger = logging.getLogger("hpsched.worker")

PROGRESS_SECONDS = 2.0
FAILURES_IN_A_ROW = 3
# The database is away, or the study was deleted: the main thread sees to it, signs of life wait.
_NO_ANSWER = (SQLAlchemyError, optuna.exceptions.StorageInternalError, KeyError)


Outcome = float | Exception | SystemExit | None  # of a trial; None: interrupted


class Interrupted(BaseException):
    """The trial in hand must end now. Not an Exception, so that no user code swallows it."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a worker ended.

    Attributes:
        done, pruned, failed, confirmed: Trials it finished, by outcome.
        signal: Number of the signal that ended it, if one did; its trial is back in the queue.
    """

    done: int = 0
    pruned: int = 0
    failed: int = 0
    confirmed: int = 0
    signal: int | None = None

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended it."""
        return self.signal is not None


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
        self._objective = objective or objectives.load_objective(self._spec())
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
        self._stop: int | None = None  # number of the signal that asked for it
        self._interruptible = False
        self._deferred: threading.Timer | None = None  # repeats a signal that came too early
        self._lost = False  # the trial in hand was given to another worker
        self._handlers: dict[int, Any] = {}

    def run(self) -> Ended:
        """Work until the study's budget is spent or a signal arrives.

        Raises:
            TrainingError: The objective broke its contract, or failed three times in a row.
            StorageError: The database stayed away for ten minutes.
            StudyNotFoundError: The study was deleted meanwhile.
        """
        with self._signals(), warnings.catch_warnings():
            # We beat ourselves: Study.optimize's thread dies at its first database error.
            warnings.filterwarnings("ignore", message="Heartbeat of storage")
            try:
                while self._stop is None:
                    trial = patiently(self._claim, "asking for a trial")
                    if trial is not None:
                        self._work_on(trial)
                        dashboard_figures.publish_after(self._study, trial.number)
                    elif patiently(self._others_live, "looking for other workers"):
                        break
            except KeyError:  # Optuna's word for what is not there; the objective's end elsewhere
                raise StudyNotFoundError(
                    f"Study {self._study.study_name!r} was deleted while this worker was at work."
                ) from None
            finally:
                self._show(state="stopped", trial=None)
        return replace(self._ended, signal=self._stop)

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
            self._put_back_abandoned()
            runs = read_runs(study.get_trials(deepcopy=False))
            move = next_move(self._settings, runs, study.direction)
            if move.what == "done":
                return None
            if move.confirms is not None:
                enqueue_confirmation(study, move.confirms)
            return self._take()

    def _take(self) -> Trial:
        """The first trial in the queue, or a new one; marked as ours and beating before it runs.

        A running trial that never beat would never count as stale.
        """
        study = self._study
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting:
            new = optuna.trial.create_trial(
                state=TrialState.WAITING, user_attrs={records.OWNER: self._id}
            )
            study.add_trial(new)
            waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        self._mark(waiting[0]._trial_id)
        if self._settings is not None:
            study.sampler = make_sampler(self._settings, waiting[0].number)
        trial = study.ask()
        if trial._trial_id != waiting[0]._trial_id:  # a plain Optuna worker was faster
            self._mark(trial._trial_id)
        return trial

    def _mark(self, trial_id: int) -> None:
        self._study._storage.set_trial_user_attr(trial_id, records.OWNER, self._id)
        self._beat(trial_id)

    def _put_back_abandoned(self) -> None:
        """Queue again the trials whose worker is gone, and those we claimed without knowing."""
        storage = _database(self._study)
        if storage is None:
            return
        stale = set(storage._get_stale_trial_ids(self._study._study_id))
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial._trial_id in stale or trial.user_attrs.get(records.OWNER) == self._id:
                logger.warning("trial %d: its worker is gone; back in the queue", trial.number)
                put_back(self._study, trial._trial_id)

    def _others_live(self) -> bool:
        """Wait until each running trial's worker has given a sign of life.

        False as soon as one of the trials counts as stale: there is something to do after all.
        """
        storage = _database(self._study)
        first: dict[str, float] = {}
        speak_at = time.monotonic() + 2 * PROGRESS_SECONDS
        while storage is not None and self._stop is None:
            running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            workers = read_workers(self._study.user_attrs)
            owners = {str(trial.user_attrs.get(records.OWNER)) for trial in running} & set(workers)
            first = {owner: workers[owner].seen for owner in owners} | first
            if all(workers[owner].seen != first[owner] for owner in owners):
                break
            if storage._get_stale_trial_ids(self._study._study_id):
                return False
            if time.monotonic() >= speak_at:
                numbers = ", ".join(str(trial.number) for trial in running)
                logger.info("waiting for a sign of life from the worker of trial %s", numbers)
                speak_at = math.inf
            time.sleep(PROGRESS_SECONDS / 4)
        return True

    # -- one trial -----------------------------------------------------------------------------

    def _work_on(self, trial: Trial) -> None:
        confirms = trial.user_attrs.get(records.CONFIRMS)
        what = "" if confirms is None else f", confirming trial {confirms}"
        logger.info("trial %d: start%s", trial.number, what)
        self._show(state="running", trial=trial.number)
        with self._beating(trial):
            outcome = self._run_objective(trial)
            ours = patiently(lambda: self._settle(trial, outcome), "delivering a result")
        if not ours:
            logger.warning("trial %d: was given to another worker; dropped here", trial.number)
        elif outcome is None:
            logger.warning("trial %d: interrupted; back in the queue", trial.number)
        elif isinstance(outcome, optuna.TrialPruned):
            logger.info("trial %d: pruned: %s", trial.number, outcome)
            self._count(pruned=1)
        elif isinstance(outcome, Exception | SystemExit):
            self._fail(trial, outcome)
        else:
            logger.info("trial %d: value %.6g", trial.number, outcome)
            self._count(confirmed=1) if confirms is not None else self._count(done=1)

    def _run_objective(self, trial: Trial) -> Outcome:
        """The trial's value, or why it has none; None if it was interrupted."""
        from hpsched import cycle

        def listen(progress: Progress) -> None:
            if self._stop is not None or self._lost:
                raise Interrupted
            self._progress = progress
            if self._on_progress:
                self._on_progress(trial.number, progress)

        token = cycle.observer.set(listen)
        self._lost = False
        try:
            self._interruptible = True
            if self._stop is not None:
                raise Interrupted
            return _as_value(self._objective(trial))
        except Interrupted:
            return None
        except KeyboardInterrupt:  # from code that handles Ctrl-C itself
            self._stop = self._stop or signal.SIGINT
            return None
        except StorageError:
            raise
        except (Exception, SystemExit) as error:
            return error
        finally:
            self._interruptible = False
            self._progress = None
            cycle.observer.reset(token)
            if self._deferred:  # it must not outlive our handler
                self._deferred.cancel()
                self._deferred.join()

    def _settle(self, trial: Trial, outcome: Outcome) -> bool:
        """Tell the outcome, or put the trial back; False if it is no longer ours."""
        study = self._study
        with exclusive(study._storage, study.study_name):
            stored = backend_of(study._storage).get_trial(trial._trial_id)
            if stored.user_attrs.get(records.OWNER) != self._id:
                return False
            if stored.state != TrialState.RUNNING:
                # Finished: an earlier attempt got through, though its answer was lost. Waiting:
                # put back, by us in an earlier attempt or by another worker.
                return stored.state.is_finished() or outcome is None
            if outcome is None:
                put_back(study, trial._trial_id)
            elif isinstance(outcome, optuna.TrialPruned):
                self._tell(trial, None, TrialState.PRUNED)
            elif isinstance(outcome, Exception | SystemExit):
                reason = redact(objectives.describe(outcome))
                trial.set_user_attr(records.ERROR, reason[:2000])
                self._tell(trial, None, TrialState.FAIL)
            else:
                self._tell(trial, outcome, None)
        return True

    def _tell(self, trial: Trial, value: float | None, state: TrialState | None) -> None:
        # Finished: the storage's first attempt got through, though its answer was lost.
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._study.tell(trial, value, state=state)

    def _fail(self, trial: Trial, error: Exception | SystemExit) -> None:
        reason = redact(objectives.describe(error))
        self._count(failed=1)
        self._failures += 1
        if isinstance(error, HpschedError):  # every trial would fail the same way
            error.add_note(
                f"Trial {trial.number} failed; it does not count as a trial, though its steps do: "
                "mend the objective and attach again."
            )
            raise error
        logger.error("trial %d: failed: %s", trial.number, reason)
        if self._failures >= FAILURES_IN_A_ROW:
            raise TrainingError(
                f"{self._failures} trials failed in a row, the last with {reason}. They do not "
                "count as trials, though their steps do: mend the objective and attach again."
            ) from error

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

    def _is_ours(self, trial: Trial) -> bool:
        stored = backend_of(self._study._storage).get_trial(trial._trial_id)
        return stored.user_attrs.get(records.OWNER) == self._id

    @contextmanager
    def _beating(self, trial: Trial) -> Iterator[None]:
        """Beat for the trial, and show its progress, from a thread of its own."""
        over = threading.Event()

        storage = _database(self._study)
        interval = (storage.heartbeat_interval if storage else None) or math.inf

        def live() -> None:
            beaten = time.monotonic()
            while not over.wait(min(PROGRESS_SECONDS, interval)):
                # The database may be away for minutes: the next beat tries again.
                with suppress(*_NO_ANSWER):
                    if time.monotonic() - beaten >= interval:
                        if not self._is_ours(trial):
                            self._lost = True
                            return
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
        with suppress(*_NO_ANSWER):
            backend_of(self._study._storage).set_study_user_attr(
                self._study._study_id, records.WORKER + self._id, self._record.to_json()
            )

    # -- signals -------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the worker cleanly; only the main thread can be told."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for each, handler in self._handlers.items():
                signal.signal(each, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._record.pid:
            self._as_without_us(number, frame)
            return
        if self._stop is None:
            self._stop = number
            logger.warning("%s: ending; again to end at once", signal.Signals(number).name)
        elif self._deferred is None:
            os._exit(128 + number)
        self._deferred = None
        if not self._interruptible:
            return  # between two trials, where the loop looks at _stop
        if _in_database(frame):
            # A connection torn out of a statement is of no use any more: try again in a moment.
            main = threading.main_thread().ident
            self._deferred = threading.Timer(0.05, signal.pthread_kill, (main, number))
            self._deferred.daemon = True
            self._deferred.start()
            return
        self._interruptible = False
        raise Interrupted

    def _as_without_us(self, number: int, frame: FrameType | None) -> None:
        """A process that the objective forked (a data loader's, a pool's) has inherited us."""
        before = self._handlers[number]
        if callable(before):
            before(number, frame)
        elif before != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _in_database(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(("sqlalchemy.", "optuna.storages.")):
            return True
        frame = frame.f_back
    return False


def put_back(study: Study, trial_id: int) -> None:
    """Queue a running trial again, as it is: parameters, finished rungs, seeds and number stay."""
    with suppress(optuna.exceptions.UpdateFinishedTrialError):
        study._storage.set_trial_state_values(trial_id, TrialState.WAITING)


def _database(study: Study) -> optuna.storages.RDBStorage | None:
    storage = backend_of(study._storage)
    if isinstance(storage, optuna.storages.RDBStorage) and storage.heartbeat_interval:
        return storage
    return None


def _as_value(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TrainingError(
            f"The objective returned {value!r}: return a number, e.g. "
            "`return hpsched.suggest_onecycle(trial, total_steps=…).run(train)`."
        ) from None
    if math.isnan(number):  # Optuna fails such a trial in silence
        raise ValueError("the objective returned nan")
    return number


def _device() -> str:
    torch = sys.modules.get("torch")  # not imported for its name alone
    if torch is None or not torch.cuda.is_available():
        return "cpu"
    return f"cuda: {torch.cuda.get_device_name(0)}"
