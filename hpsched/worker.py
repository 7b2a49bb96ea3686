"""One worker: ask the study what comes next, run the objective, tell; until the budget is spent.

Nothing is lost and nothing counted twice:

- What comes next is decided and a trial claimed under a lock that all workers share.
- A trial beats from before it runs until it is told. One whose worker is gone is put back in the
  queue by the others, with the runs it has (:mod:`hpsched.claims`). A worker that finds nothing to
  do leaves once all running trials have beaten, so that the trial of one that has just died is
  not left behind.
- A worker that was suspended for too long notices that its trial was given away, and drops it.
- Ctrl-C and SIGTERM interrupt the objective, put the trial back, and end the worker, within
  seconds even when the database is away; a second one ends it at once. With a grace period the
  trial in hand may reach its next checkpoint first.
- When the database is away, everything waits for it (:mod:`hpsched.storage`).
- Orders (pause, resume, drain, stop) come through the study (:mod:`hpsched.orders`).

The objective, and with it torch, is imported when the worker has claimed a trial: one that finds
nothing to do stays small. Between two calls no connection to a server is held for long.

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
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import optuna
from optuna.study import Study
from optuna.trial import Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from hpsched import checkpoint, claims, dashboard_figures, orders, records
from hpsched import objective as objectives
from hpsched.errors import (
    DatabaseAwayError,
    HpschedError,
    ObjectiveError,
    RanksLostError,
    StorageError,
    StudyNotFoundError,
    TrainingError,
    TrialLostError,
    UsageError,
)
from hpsched.ledger import FAILURES_IN_A_ROW, FRUITLESS, Next, fruitless, next_move, read_runs
from hpsched.present import capitalised
from hpsched.records import WorkerRecord
from hpsched.redaction import redact
from hpsched.storage import (
    clock,
    exclusive,
    frugal_of,
    patiently,
    release,
    set_study_attr,
    waiting,
)
from hpsched.study import enqueue_confirmation, make_sampler, read_settings
from hpsched.suggest import Diverged, OutOfMemory

if TYPE_CHECKING:
    from hpsched.cycle import Progress

logger = logging.getLogger("hpsched.worker")

PROGRESS_SECONDS = 5.0  # between two records in the study of what a worker does
LOOK_SECONDS = 1.0  # between two looks at what others do and want, and records of ours, at least
ENDING_SECONDS = 10.0  # a worker that was told to end waits no longer for a database …
LAST_SECONDS = 5.0  # … and has this long for all else, before it ends at once
SAME_SECONDS = 1.0  # schedulers signal a whole process group, and its leader passes it on
REPEAT_SECONDS = 0.5  # between two repetitions of a signal that was not heard
#: Trials that diverge in a row, none of the study having given a finite result, before we give up:
#: the first rates may all be too high, but not the sixth.
DIVERGED_IN_A_ROW = 6
# The database is away, or the study was deleted: the main thread sees to it, signs of life wait.
_NO_ANSWER = (SQLAlchemyError, optuna.exceptions.StorageInternalError, KeyError)


# A trial that ends with these goes back in the queue, and the worker ends.
_NOT_ITS_FAULT = ObjectiveError | RanksLostError

Outcome = float | Exception | SystemExit | None  # of a trial; None: interrupted


class Interrupted(BaseException):
    """The trial in hand must end now. Not an Exception, so that no user code swallows it."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a worker ended.

    Attributes:
        done, pruned, failed, confirmed: Trials it finished, by outcome.
        signal: Number of the signal that ended it, if one did; its trial is back in the queue.
        order: ``drain`` or ``stop``, if that ended it.
    """

    done: int = 0
    pruned: int = 0
    failed: int = 0
    confirmed: int = 0
    signal: int | None = None
    order: str | None = None

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended it."""
        return self.signal is not None


class Worker:
    """Runs a study's trials in this process, one after another.

    Args:
        study: From ``open_study(name, storage, heartbeat=True)``.
        objective: ``objective(trial)``; by default imported as the study's settings say, when
            there is a trial to run.
        watch: Called with the :class:`~hpsched.records.WorkerRecord` when it changes, from the
            training loop about once a second.
        device: What others are told it runs on; default: the device that torch uses.
        grace: Seconds that the trial in hand may go on after SIGTERM, to reach its next
            ``cycle.checkpoint``.
        ends_process: The process is the worker's own: a second signal, or an end that takes longer
            than it may, ends the process. Otherwise a second signal raises KeyboardInterrupt.

    Raises:
        UsageError: The study has no settings and no objective was given.
    """

    def __init__(
        self,
        study: Study,
        objective: Callable[[Trial], Any] | None = None,
        watch: Callable[[WorkerRecord], None] | None = None,
        *,
        device: str | None = None,
        grace: float = 0.0,
        ends_process: bool = False,
    ) -> None:
        self._study = study
        self._settings = read_settings(study)
        if self._settings is None and objective is None:
            raise UsageError(
                f"Study {study.study_name!r} was not created by hpsched, so it does not say which "
                "objective to run: use study.optimize, or `hpsched study create`."
            )
        self._objective = objective
        self._watch = watch
        self._device = device
        self._grace = grace
        self._ends_process = ends_process
        self._id = claims.new_worker_id()
        self._frugal = frugal_of(study._storage)
        self._clock = clock(study._storage)
        self._record = WorkerRecord(
            host=socket.gethostname(),
            pid=os.getpid(),
            device=device or _device(),
            started=self._clock(),
            seen=self._clock(),
            state="idle",
        )
        self._trials = claims.Watch(study)
        self._keeper = replace(checkpoint.Keeper.from_environment())  # ours alone
        self._ended = Ended()
        self._failures = self._divergences = 0
        self._stop: int | None = None  # number of the signal that asked for it
        self._stop_at = math.inf  # when the signal came, and its grace was over
        self._order: str | None = None
        self._heard = self._shown = -math.inf  # when it last looked for orders, wrote its record
        self._interruptible = False
        self._signalled = 0.0  # when the first signal came
        self._is_repeat = False  # the signal is one of ours
        # What repeats a signal that came too early, and what ends it.
        self._deferred: tuple[threading.Thread, threading.Event] | None = None
        self._watchdog: threading.Timer | None = None  # ends a process that hangs while it ends
        self._lost = False  # the trial in hand was given to another worker
        self._handlers: dict[int, Any] = {}

    def run(self) -> Ended:
        """Work until the study's budget is spent or a signal arrives.

        Raises:
            ObjectiveError: The objective cannot be imported; the trial is back in the queue.
            TrainingError: The objective broke its contract, or failed three times in a row.
            DatabaseAwayError: The database stayed away for ten minutes.
            StudyNotFoundError: The study was deleted meanwhile.
        """
        if os.getpid() != self._record.pid:  # forked since: another worker
            self._id = claims.new_worker_id()
            self._record = replace(self._record, pid=os.getpid(), started=self._clock())
        with self._signals(), warnings.catch_warnings():
            # We beat ourselves: Study.optimize's thread dies at its first database error.
            warnings.filterwarnings("ignore", message="Heartbeat of storage")
            token = waiting.set(self)
            try:
                self._loop()
            except KeyError:  # Optuna's word for what is not there; the objective's end elsewhere
                raise StudyNotFoundError(
                    f"Study {self._study.study_name!r} was deleted while this worker was at work."
                ) from None
            except DatabaseAwayError:
                if self._stop is None:
                    raise
                logger.warning("ended without the database: others will put its trial back")
            finally:
                self._show(state="stopped", trial=None)
                waiting.reset(token)
        stopped_by = None if self._order == "stop" else self._stop
        return replace(self._ended, signal=stopped_by, order=self._order)

    def _loop(self) -> None:
        # The first reading of a long study takes seconds: not under the lock others wait for. Nor
        # is a turn needed to see that a study is over: a crowd would wait for it.
        lost = patiently(self._trials.look, "looking for other workers")
        over = self._next().what == "done" and not lost
        while self._goes_on():
            trial = None if over else patiently(self._claim, "asking for a trial")
            over = False
            if trial is not None:
                self._work_on(trial)
                if self._stop is None:
                    dashboard_figures.publish_after(self._study, trial.number)
            elif patiently(self._others_live, "looking for other workers"):
                break

    def _goes_on(self) -> bool:
        """Follow an order that came meanwhile; whether to ask for another trial."""
        patiently(self._hear, "looking for orders")
        if self._order == "pause":
            logger.info("paused; `hpsched worker resume` lets it go on")
            while self._stop is None and self._order == "pause":
                self._show(state="paused", trial=None)
                release(self._study._storage)
                self._rest(PROGRESS_SECONDS)
                patiently(self._hear, "looking for orders")
            logger.info("no longer paused")
        return self._stop is None and self._order != "drain"

    def _hear(self) -> None:
        if time.monotonic() < self._heard + LOOK_SECONDS:
            return
        order = orders.read(self._study, self._id)
        self._heard = time.monotonic()
        if order == self._order:
            return
        logger.info("told to %s", order or "resume")
        self._order = order
        if order == "stop" and self._handlers:
            signal.pthread_kill(_main_thread(), signal.SIGTERM)
        elif order == "stop":
            self._stop, self._stop_at = signal.SIGTERM, time.monotonic()
            self._keeper.stopping = True

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._stop is None and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    # -- what a storage that waits asks of us ----------------------------------------------------

    def on_outage(self, reason: str | None) -> None:
        """Show that the database is away; there is nowhere to write that but here."""
        back = "running" if self._record.trial is not None else "idle"
        self._record = replace(
            self._record, state=back if reason is None else "waiting", note=reason or ""
        )
        if self._watch:
            self._watch(self._record)

    def gives_up(self) -> bool:
        """A worker that was told to end does not wait until the database is back."""
        return time.monotonic() > self._stop_at + ENDING_SECONDS

    # -- claim ---------------------------------------------------------------------------------

    def _claim(self) -> Trial | None:
        study = self._study
        with exclusive(study._storage, study.study_name) as still:
            self._take_from_the_dead()
            move = self._next()
            if move.what == "done":
                return None
            if move.confirms is not None:
                enqueue_confirmation(study, move.confirms)
            still()  # or another worker decides the same at this moment
            return self._take()

    def _next(self) -> Next:
        runs = read_runs(self._study.get_trials(deepcopy=False))
        return next_move(self._settings, runs, self._study.direction)

    def _take(self) -> Trial:
        """The first trial in the queue, or a new one; marked as ours and beating before it runs.

        A running trial that never beat would never count as stale.
        """
        study = self._study
        queue = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not queue:
            new = optuna.trial.create_trial(
                state=TrialState.WAITING, user_attrs={records.OWNER: self._id}
            )
            study.add_trial(new)
            queue = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        try:
            claims.claim(study, queue[0], self._id)
        except optuna.exceptions.UpdateFinishedTrialError:  # its worker was alive after all
            if self._frugal:
                self._frugal.refresh()
            return self._take()
        if self._settings is not None:
            study.sampler = make_sampler(self._settings, queue[0].number)
        trial = study.ask()
        if trial._trial_id != queue[0]._trial_id:  # a plain Optuna worker was faster
            claims.claim(study, trial, self._id)
        return trial

    def _take_from_the_dead(self) -> None:
        """Queue again the trials whose worker is gone, and those we claimed without knowing."""
        if claims.beating_storage(self._study) is None:
            return
        silent = self._trials.look()
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial._trial_id in silent:
                claims.take_from_the_dead(self._study, trial)
            elif trial.user_attrs.get(records.OWNER) == self._id:
                claims.put_back(self._study, trial._trial_id)

    def _others_live(self) -> bool:
        """Wait until each running trial has given a sign of life.

        False as soon as one has lost its worker: there is something to do after all.
        """
        silent, first = self._trials.look(), self._trials.beats
        speak_at = time.monotonic() + 10 * LOOK_SECONDS
        while not silent and self._stop is None:
            if not any(first.get(each) == at for each, at in self._trials.beats.items()):
                return True
            if time.monotonic() >= speak_at:
                logger.info("waiting for a sign of life of %d running trials", len(first))
                speak_at = math.inf
            release(self._study._storage)
            self._rest(LOOK_SECONDS)
            silent = self._trials.look()
        return not silent

    # -- one trial -----------------------------------------------------------------------------

    def _work_on(self, trial: Trial) -> None:
        confirms = trial.user_attrs.get(records.CONFIRMS)
        what = "" if confirms is None else f", confirming trial {confirms}"
        logger.info("trial %d: start%s", trial.number, what)
        self._show(state="running" if self._objective else "starting", trial=trial.number)
        with self._beating(trial):
            outcome = self._run_objective(trial)
            ours = patiently(lambda: self._settle(trial, outcome), "delivering a result")
        if isinstance(outcome, _NOT_ITS_FAULT):
            raise outcome
        if not ours:
            logger.warning("trial %d: was given to another worker; dropped here", trial.number)
        elif outcome is None:
            logger.warning("trial %d: interrupted; back in the queue", trial.number)
        elif isinstance(outcome, optuna.TrialPruned):
            logger.info("trial %d: pruned: %s", trial.number, outcome)
            self._count(pruned=1)
            if isinstance(outcome, OutOfMemory):
                self._bear(outcome, str(outcome), "use a smaller batch, or fewer workers a device")
            elif isinstance(outcome, Diverged):
                self._bear_divergence(outcome)
            else:
                self._failures = self._divergences = 0
        elif isinstance(outcome, Exception | SystemExit):
            self._fail(trial, outcome)
        else:
            logger.info("trial %d: value %.6g", trial.number, outcome)
            self._count(confirmed=1) if confirms is not None else self._count(done=1)
            self._failures = self._divergences = 0

    def _run_objective(self, trial: Trial) -> Outcome:
        """The trial's value, or why it has none; None if it was interrupted."""
        from hpsched import cycle

        def listen(progress: Progress) -> None:
            if self._lost or (self._stop is not None and self._keeper.ending is None):
                raise Interrupted
            self._progress = progress
            if self._watch:
                self._watch(self._now(state="running", trial=trial.number))

        token = cycle.observer.set(listen)
        self._keeper.is_ours = lambda: self._holds(trial)
        keeper = checkpoint.keeper.set(self._keeper)
        self._lost = False
        try:
            self._interruptible = True
            if self._stop is not None:
                raise Interrupted
            if self._objective is None:
                assert self._settings is not None
                self._objective = objectives.load_objective(self._settings.objective)
            return _as_value(self._objective(trial))
        except Interrupted:
            return None
        except KeyboardInterrupt:  # from code that handles Ctrl-C itself
            self._stop = self._stop or signal.SIGINT
            return None
        except StorageError:
            raise
        except TrialLostError as error:
            logger.warning("trial %d: %s", trial.number, error)
            return None
        except (Exception, SystemExit) as error:
            # The signal that ends us ended data loaders and other processes of the trial too.
            lame = self._stop is not None and not isinstance(error, optuna.TrialPruned)
            return None if lame else error
        finally:
            self._interruptible = False
            self._progress = None
            cycle.observer.reset(token)
            checkpoint.keeper.reset(keeper)
            if self._deferred:  # it must not outlive our handler
                thread, heard = self._deferred
                heard.set()
                thread.join()

    def _holds(self, trial: Trial) -> bool:
        """Whether the trial is ours still, as far as is known: the database may be away."""
        with suppress(*_NO_ANSWER):
            self._lost = self._lost or not claims.is_held(self._study, trial._trial_id, self._id)
        return not self._lost

    def _settle(self, trial: Trial, outcome: Outcome) -> bool:
        """Tell the outcome, or put the trial back; False if it is no longer ours.

        Telling takes no lock. Were the trial given away between the question and the telling,
        the other worker would find it finished, with the value that it would have come to itself.
        To put it back then would take it from the other one.
        """
        study = self._study
        goes_back = outcome is None or isinstance(outcome, _NOT_ITS_FAULT)
        with exclusive(study._storage, study.study_name) if goes_back else nullcontext():
            state, owner = claims.holder(study, trial._trial_id)
            if (owner, state) != (self._id, TrialState.RUNNING) and self._frugal:
                self._frugal.drop()
            if owner != self._id:
                return False
            if state != TrialState.RUNNING:
                # Finished: an earlier attempt got through, though its answer was lost; or another
                # worker had it meanwhile. Waiting: put back, by us earlier or by another worker.
                if _is_failure(outcome):
                    return state == TrialState.FAIL
                return goes_back or state.is_finished()
            if goes_back:
                claims.put_back(study, trial._trial_id)
            elif isinstance(outcome, optuna.TrialPruned):
                self._tell(trial, None, TrialState.PRUNED)
            elif isinstance(outcome, Exception | SystemExit):
                reason = redact(objectives.describe(outcome))
                trial.set_user_attr(records.ERROR, reason[:2000])
                self._tell(trial, None, TrialState.FAIL)
                stored = study._storage.get_trial(trial._trial_id)
                checkpoint.forget_trial(study.study_name, stored)
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
        remedy = (
            "they do not count as trials, though the range tests and cycles that they finished "
            "count as spent: mend the objective"
        )
        if isinstance(error, HpschedError):  # every trial would fail the same way
            error.add_note(
                f"Trial {trial.number} failed; it does not count as a trial, though the range "
                "tests and cycles that it finished count as spent: mend the objective and attach "
                "again."
            )
            raise error
        logger.error("trial %d: failed: %s", trial.number, reason)
        self._bear(error, reason, remedy)

    def _bear(self, error: BaseException, reason: str, remedy: str) -> None:
        """Go on after a failure, unless it was one too many."""
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            raise TrainingError(
                f"{self._failures} trials failed in a row, the last with {reason}; {remedy} and "
                "attach again."
            ) from error

    def _bear_divergence(self, error: Diverged) -> None:
        """Go on, unless nothing that was tried in this study gave a finite result."""
        self._failures = 0
        self._divergences += 1
        if self._divergences < DIVERGED_IN_A_ROW:
            return
        if not fruitless(read_runs(self._study.get_trials(deepcopy=False))):
            self._divergences = 0
            return
        raise TrainingError(
            f"{self._divergences} trials in a row gave no finite result, nor did any other of this "
            f"study; the last {error}. {capitalised(FRUITLESS)}."
        ) from error

    def _count(self, **more: int) -> None:
        self._ended = replace(
            self._ended, **{key: getattr(self._ended, key) + n for key, n in more.items()}
        )

    # -- signs of life ---------------------------------------------------------------------------

    _progress: Progress | None = None

    @contextmanager
    def _beating(self, trial: Trial) -> Iterator[None]:
        """Beat for the trial, and show its progress, from a thread of its own."""
        over = threading.Event()

        storage = claims.beating_storage(self._study)
        interval = (storage.heartbeat_interval if storage else None) or math.inf

        def live() -> None:
            beaten = time.monotonic()
            while not over.wait(min(PROGRESS_SECONDS, interval)):
                # The database may be away for minutes: the next beat tries again.
                with suppress(Exception):  # whatever it is, the next beat tries again
                    if time.monotonic() - beaten >= interval:
                        if not self._holds(trial):
                            return
                        claims.beat(self._study, trial._trial_id)
                        beaten = time.monotonic()
                        if self._trials.suspects:
                            self._trials.look()
                    if self._frugal:
                        self._frugal.flush()
                    state = "running" if self._objective else "starting"
                    self._show(state=state, trial=trial.number)
                    self._hear()
                release(self._study._storage)

        thread = threading.Thread(target=live, name="hpsched-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _now(self, *, state: str, trial: int | None) -> WorkerRecord:
        progress = self._progress
        self._record = replace(
            self._record,
            device=self._device or _device(),
            seen=self._clock(),
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
            note="",
        )
        return self._record

    def _show(self, *, state: str, trial: int | None) -> None:
        before, record = self._record.state, self._now(state=state, trial=trial)
        if self._watch:
            self._watch(record)
        if state == before and time.monotonic() < self._shown + LOOK_SECONDS:
            return
        self._shown = time.monotonic()
        with suppress(*_NO_ANSWER):
            key = records.WORKER + self._id
            set_study_attr(self._study._storage, self._study._study_id, key, record.to_json())

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
                ends = self._stop is not None and self._ends_process
                signal.signal(each, signal.SIG_IGN if ends else handler)  # the same one again
            if self._watchdog:
                self._watchdog.cancel()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._record.pid:
            self._as_without_us(number, frame)
            return
        if self._stop is None:
            grace = self._grace if self._keeper.used else 0.0
            self._signalled = time.monotonic()  # first: the same signal may come while we log
            self._stop, self._stop_at = number, self._signalled + grace
            if self._order != "stop":  # or the signal may be our own, and that was told already
                logger.warning("%s: ending; again to end at once", signal.Signals(number).name)
            self._keeper.stopping = True
            if self._ends_process:
                longest = grace + ENDING_SECONDS + LAST_SECONDS
                self._watchdog = threading.Timer(longest, self._end_process, [number])
                self._watchdog.daemon = True
                self._watchdog.start()
            if grace:
                self._keeper.ending = Interrupted
                self._again_in(grace, number)
                return
        elif not self._is_repeat:
            same = time.monotonic() - self._signalled < SAME_SECONDS
            if same and number == signal.SIGTERM:  # people press Ctrl-C twice on purpose
                return
            if self._keeper.ending is None:
                if self._ends_process:
                    self._end_process(number)
                raise KeyboardInterrupt
            self._keeper.ending = None  # no longer until the next checkpoint
        self._is_repeat = False
        if self._deferred:
            self._deferred[1].set()
        if not self._interruptible:
            return  # between two trials, where the loop looks at _stop
        if _undisturbed(frame):
            # A connection torn out of a statement is of no use any more: try again in a moment.
            self._again_in(0.05, number)
            return
        self._interruptible = False
        raise Interrupted

    def _end_process(self, number: int) -> None:
        os._exit(0 if self._order == "stop" else 128 + number)

    def _again_in(self, seconds: float, number: int) -> None:
        """Repeat the signal after ``seconds``, and on until it is heard.

        One that comes at the moment at which the main thread enters a system call is noticed by
        Python when the call is over, which may be long after.
        """

        def repeat() -> None:
            wait = seconds
            while not heard.wait(wait):
                wait = REPEAT_SECONDS
                self._is_repeat = True
                signal.pthread_kill(_main_thread(), number)

        heard = threading.Event()
        thread = threading.Thread(target=repeat, daemon=True)
        self._deferred = thread, heard
        thread.start()

    def _as_without_us(self, number: int, frame: FrameType | None) -> None:
        """A process that the objective forked (a data loader's, a pool's) has inherited us."""
        before = self._handlers[number]
        if callable(before):
            before(number, frame)
        elif before != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _is_failure(outcome: Outcome) -> bool:
    failed = isinstance(outcome, Exception | SystemExit)
    return failed and not isinstance(outcome, optuna.TrialPruned | _NOT_ITS_FAULT)


#: A connection torn out of a statement, or half a checkpoint, is of no use.
_WHOLE = ("sqlalchemy.", "optuna.storages.", "hpsched.checkpoint")


def _undisturbed(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_WHOLE):
            return True
        frame = frame.f_back
    return False


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
    torch = sys.modules.get("torch")  # not imported for its name alone, nor CUDA started
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return "cpu"
    return f"cuda: {torch.cuda.get_device_name(0)}"


def _main_thread() -> int:
    ident = threading.main_thread().ident
    assert ident is not None
    return ident
