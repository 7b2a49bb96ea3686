"""Going round a data loader, and where in it a run is, so that it can be taken up again there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

from hpsched import random_state
from hpsched.errors import TrainingError


def rounds(
    loader: Iterable[Any], first: int = 0, begin: Callable[[int], object] = lambda round_: None
) -> Any:
    """The loader's batches without end; a DistributedSampler is told the round.

    Close it to end the loader's worker processes.

    Args:
        loader: What to go round.
        first: Number of the first round.
        begin: Called with each round's number, before anything else is done for it.

    Raises:
        TrainingError: The loader yields nothing.
    """
    round_ = first
    while True:
        begin(round_)
        for part in ("sampler", "batch_sampler", None):
            set_epoch = getattr(getattr(loader, part, None) if part else loader, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(round_)
        empty = True
        iterator = iter(loader)
        try:
            for batch in iterator:
                empty = False
                yield batch
        finally:
            _shut_down(iterator)
            del iterator
        if empty:
            raise no_batches(loader)
        round_ += 1


def _shut_down(iterator: Any) -> None:
    # A DataLoader's worker processes live until its iterator is collected; persistent ones are
    # the loader's own and stay.
    if not getattr(iterator, "_persistent_workers", True):
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


def is_empty(loader: Any) -> bool:
    """Whether the loader says that it has no batches."""
    try:
        return len(loader) == 0
    except (TypeError, NotImplementedError):  # no length, as a DataLoader of an IterableDataset
        return False


def no_batches(loader: Any) -> TrainingError:
    """The error to raise for an empty loader."""
    return TrainingError(
        f"The loader {type(loader).__name__} yields no batches: check the data set's length and "
        "drop_last with a batch size larger than it, or a generator that was used up "
        "(cycle.batches goes round the loader, so it must be iterable again)."
    )


class Place:
    """Where a run is in a loader that it goes round.

    A loader cannot be told to begin in the middle. But with the random states that a round began
    with, it yields the same batches again: those that were taken are skipped.

    Args:
        loader: What to go round.
        accumulate: Batches of each optimizer step.
        step: Optimizer steps that were taken before its first batch.
    """

    def __init__(self, loader: Iterable[Any], accumulate: int, step: int) -> None:
        self._loader = loader
        self._accumulate = accumulate
        self._first_step = step
        self._taken = 0
        self._round = 0
        self._of_round = 0  # batches taken of this round
        self._process: dict[str, Any] = {}  # random states that it began with
        self._held: dict[str, Any] = {}

    def batches(self, state: Mapping[str, Any] | None = None) -> Iterator[Any]:
        """The loader's batches without end, from where ``state`` was taken; close it after use.

        Raises:
            TrainingError: The loader yields nothing, or has become shorter.
        """
        with closing(rounds(self._loader, state["round"] if state else 0, self._begin)) as source:
            if state:
                self._go_to(source, state)
            for batch in source:
                self._of_round += 1
                self._taken += 1
                yield batch

    def ahead(self, step: int) -> int:
        """Batches taken beyond those of the optimizer steps before ``step``."""
        return self._taken - (step - self._first_step) * self._accumulate

    @property
    def accumulate(self) -> int:
        """Batches of each optimizer step."""
        return self._accumulate

    def state(self) -> dict[str, Any]:
        """What :meth:`batches` needs to go on after the last batch."""
        return {
            "round": self._round,
            "of_round": self._of_round,
            "process": self._process,
            "held": self._held,
            "held_now": random_state.read(random_state.of_loader(self._loader)),
        }

    def _begin(self, round_: int) -> None:
        self._round, self._of_round = round_, 0
        self._process = random_state.read(random_state.of_process())
        self._held = random_state.read(random_state.of_loader(self._loader))

    def _go_to(self, source: Iterator[Any], state: Mapping[str, Any]) -> None:
        process = random_state.of_process(also=state["process"])
        held = random_state.of_loader(self._loader)
        now = random_state.read(process)
        random_state.write(process, state["process"])
        random_state.write(held, state["held"])
        for _ in range(state["of_round"]):
            next(source)
            self._of_round += 1
        if self._round != state["round"]:
            raise TrainingError(
                f"the run was interrupted after {state['of_round']} batches of round "
                f"{state['round']}, but the loader has fewer now: run the trial anew, or give it "
                "the data that it had."
            )
        random_state.write(process, now)
        random_state.write(held, state["held_now"])
