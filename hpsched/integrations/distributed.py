"""Several processes that train one model: torch.distributed, DDP, ``torchrun``.

One process, rank 0, has the trial and with it the study, its storage and all decisions. The others
know no trial: they take part in each run of ``train`` that rank 0 begins, with the same cycle.

=================================  =============================================================
what happens                       what follows
=================================  =============================================================
a sweep ends, a run diverges       on all ranks at the same step: they look at averaged losses
a trial is pruned, or climbs on    rank 0 begins the next run, or none
``train`` fails on all ranks       the trial fails (or is pruned: out of memory), the study goes on
it fails on some, and all finish   the same; if not on rank 0, a TrainingError names the rank
a rank is killed, or hangs, or     RanksLostError on every other one, within ``grace`` and the
fails while others wait for it     timeout of the process group
=================================  =============================================================

The ranks talk about this in a group of their own (gloo, whatever the gradients travel through).
optuna-integration's ``TorchDistributedTrial`` was no base for it: it is a proxy of a trial on every
rank, without the study that range tests, rungs and confirmations need; it rounds values to
float32; and all ranks must know how many trials there will be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hpsched import ranks
from hpsched.cycle import Cycle, StopTraining, free_memory
from hpsched.errors import RanksLostError, TrainingError, UsageError
from hpsched.objective import describe
from hpsched.schedules import OneCycleSchedules, Schedule

T = TypeVar("T")
#: What makes a cycle, beside its schedules.
_FIELDS = (
    "values",
    "total_steps",
    "seed",
    "kind",
    "name",
    "rung",
    "policy",
    "explicit_momentum",
    "drives_momentum",
)


def on_all_ranks(train: Callable[..., Any]) -> OnAllRanks:
    """Decorator of ``train(cycle)``: rank 0 calls it, and it runs on all ranks.

    ::

        @on_all_ranks
        def train(cycle: hpsched.Cycle) -> float: ...

        dist.init_process_group()
        study = train.lead(search)

    In a process that trains alone it changes nothing.
    """
    return OnAllRanks(train)


class OnAllRanks:
    """A ``train(cycle)`` that runs on all ranks; made by :func:`on_all_ranks`."""

    def __init__(self, train: Callable[..., Any]) -> None:
        functools.update_wrapper(self, train)
        self._train = train
        self._group: Any = None
        self._patience = self._grace = timedelta(0)
        self._busy = False

    def lead(
        self, search: Callable[[], T], *, patience: float = 1800.0, grace: float = 30.0
    ) -> T | None:
        """Call it on all ranks: ``search()`` runs on rank 0, the others train when it does.

        Args:
            search: Whatever calls ``train``: ``study.optimize``, a worker, ``hpsched.confirm`` …
            patience: Seconds that ranks wait for each other between two runs, and at the end of
                one. A rank that is killed is noticed at once, one that hangs after this.
            grace: Seconds that a rank whose ``train`` failed waits for the others to fail, too.

        Returns:
            What ``search`` returned; None on the other ranks, once it has ended.

        Raises:
            RanksLostError: Another rank is gone. Start all of them again.
            UsageError: A time that is not positive; called while it is at work.
        """
        if not (patience > 0 and grace > 0):
            raise UsageError(
                f"patience={patience!r}, grace={grace!r}: seconds to wait for other ranks, above 0."
            )
        if self._group is not None:
            raise UsageError(f"{self._name}.lead was called while it is at work: call it once.")
        if ranks.size() == 1:
            return search()
        self._patience, self._grace = timedelta(seconds=patience), timedelta(seconds=grace)
        self._group = dist.new_group(backend="gloo", timeout=self._patience)
        try:
            if dist.get_rank() == 0:
                return self._search(search)
            self._follow()
            return None
        finally:
            self._group, self._busy = None, False

    def __call__(self, cycle: Cycle, *args: Any, **kwargs: Any) -> Any:
        """Train on all ranks, with the same cycle and arguments (which must be picklable).

        Returns:
            What ``train`` returned on rank 0.

        Raises:
            TrainingError: It failed on another rank, or the ranks took different steps.
            RanksLostError: Another rank is gone.
            UsageError: Called outside of :meth:`lead`, or twice at a time.
        """
        if ranks.size() == 1:
            return self._train(cycle, *args, **kwargs)
        if self._group is None or dist.get_rank() != 0:
            raise UsageError(
                f"{self._name} was called in one of {ranks.size()} processes, but runs in all: "
                f"call {self._name}.lead(search) in each, and let search, on rank 0, call it."
            )
        if self._busy:
            raise UsageError(
                f"{self._name} was called while a run of it is going on, or after one was "
                "interrupted: one trial at a time, n_jobs=1."
            )
        self._busy = True  # and stays so if the others are lost, or this is interrupted
        self._send((_parts(cycle), args, kwargs))
        value, failure, words = self._run(cycle, args, kwargs)
        self._busy = False
        if failure is not None:
            raise failure
        _check(words)
        if cycle.stopped is not None:
            raise StopTraining(cycle.stopped)
        return value

    @property
    def _name(self) -> str:
        return str(getattr(self._train, "__name__", type(self._train).__name__))

    def _search(self, search: Callable[[], T]) -> T:
        try:
            return search()
        finally:
            if not self._busy:  # else they are not listening
                with suppress(RanksLostError):  # all is done
                    self._send(None)

    def _follow(self) -> None:
        while (order := self._receive()) is not None:
            parts, args, kwargs = order
            cycle = _assembled(parts)
            try:
                self._run(cycle, args, kwargs)  # what fails here, rank 0 is told
            finally:
                cycle.close()
            free_memory()

    def _run(
        self, cycle: Cycle, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Exception | None, list[_Word]]:
        """What ``train`` returned or raised here, and how it ended on each rank."""
        value, failure = None, None
        try:
            value = self._train(cycle, *args, **kwargs)
        except StopTraining:
            pass
        except Exception as error:
            failure = None if cycle.should_stop else error  # frameworks wrap what stopped them
        return value, failure, self._meet(cycle, failure)

    # -- what the ranks say to each other --------------------------------------------------------

    def _meet(self, cycle: Cycle, failure: Exception | None) -> list[_Word]:
        """Each rank's word, by rank; who has failed waits for the others less long."""
        word = _Word(
            steps=cycle.steps,
            stopped=cycle.stopped,
            failure=None if failure is None else describe(failure),
        )
        words: list[Any] = [None] * ranks.size(self._group)
        try:
            self._arrive(self._patience if failure is None else self._grace)
            dist.all_gather_object(words, word, group=self._group)
            if any(one.failure for one in words):
                _check_in_step(cycle.process_group)
        except RuntimeError as lost:
            raise self._lost(lost, word.failure) from failure or lost
        return words

    def _arrive(self, wait: timedelta) -> None:
        """Return when all ranks have come here.

        (``monitored_barrier`` would do, but that only rank 0 has a timeout in it.)
        """
        token, others = torch.zeros(1), range(1, ranks.size(self._group))
        if dist.get_rank() == 0:
            for arrival in [_work(dist.irecv(token, rank, self._group)) for rank in others]:
                arrival.wait(wait)
            for answer in [_work(dist.isend(token, rank, self._group)) for rank in others]:
                answer.wait(wait)
        else:
            _work(dist.isend(token, 0, self._group)).wait(wait)
            _work(dist.irecv(token, 0, self._group)).wait(wait)

    def _send(self, order: tuple[Any, ...] | None) -> None:
        try:
            dist.broadcast_object_list([order], src=0, group=self._group)
        except RuntimeError as lost:
            raise self._lost(lost) from lost

    def _receive(self) -> Any:
        order: list[Any] = [None]
        try:
            dist.broadcast_object_list(order, src=0, group=self._group)
        except RuntimeError as lost:
            raise self._lost(lost) from lost
        return order[0]

    def _lost(self, lost: RuntimeError, failure: str | None = None) -> RanksLostError:
        reason = failure or " ".join(str(lost).split())[:300]
        return RanksLostError(
            f"Rank {dist.get_rank()} of {ranks.size()} has lost the others ({reason}). A rank was "
            "killed, hangs, or failed alone: look at what each said last, and start all of them "
            "again (torchrun --max-restarts does)."
        )


@dataclass(frozen=True, kw_only=True)
class _Word:
    """How a run ended on one rank."""

    steps: int
    stopped: str | None
    failure: str | None


def _check(words: Sequence[_Word]) -> None:
    """Whether the run ended in the same way on all ranks."""
    for rank, word in enumerate(words):
        if word.failure is not None:
            raise TrainingError(
                f"train failed on rank {rank} of {len(words)}, and not on rank 0: {word.failure}."
            )
    if len({(word.steps, word.stopped) for word in words}) > 1:
        steps = ", ".join(str(word.steps) for word in words)
        raise TrainingError(
            f"The ranks came apart: rank 0 and those after it took {steps} optimizer steps. All "
            "have to call schedule.step(loss) cycle.total_steps times, e.g. in a loop over "
            "cycle.batches(loader)."
        )


def _check_in_step(group: Any) -> None:
    """Whether a failure has left the group that trains usable.

    It has not if a reduction timed out, or one is under way on some ranks only.
    """
    if (size := ranks.size(group)) > 1:
        found = ranks.mean([1.0], group, ranks.device_of([], group))
        if found != [1.0]:
            raise RuntimeError(f"a sum over {size} ranks was that of another reduction")


def _work(started: Any) -> Any:
    if started is None:  # torch's word for a process outside the group
        raise RuntimeError("this process is not one of the group")
    return started


def _parts(cycle: Cycle) -> dict[str, Any]:
    """What another rank needs to have the same cycle; schedules as their values."""
    steps = range(cycle.total_steps)
    return {
        **{name: getattr(cycle, name) for name in _FIELDS},
        "validate_every": cycle._validate_every,
        "stop_diverged": cycle._stop_diverged,
        "schedules": [[schedule(step) for step in steps] for schedule in cycle.schedules],
    }


def _assembled(parts: dict[str, Any]) -> Cycle:
    lr, momentum = map(_table, parts.pop("schedules"))
    return Cycle(**parts, schedules=OneCycleSchedules(lr, momentum), progress=False)


def _table(values: Sequence[float]) -> Schedule:
    last = len(values) - 1
    return lambda step: values[min(max(step, 0), last)]
