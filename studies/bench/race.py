"""One search: a method on a task, what it cost, and which recipe it would have named when.

A method only sees a :class:`Race`: it trains recipes, each run takes its time, and it says which
recipe it would name after each. Time is virtual, in optimizer steps, so that any number of workers
can be simulated on one core: they take turns, and a result arrives when its training would have
ended. Nothing but the time is simulated: each run is a real training run.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from optuna.trial import FixedTrial

import hpsched
from hpsched.errors import TrainingError
from studies.bench.tasks import Task

#: Times in a run at which methods that stop runs midway see the validation score.
CHECKPOINTS = 9
Recipe = Mapping[str, float]


class Clock:
    """Virtual time of several workers; only the one whose turn it is runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self._changed = threading.Condition()
        self._due: list[tuple[float, int]] = []  # (time, ticket) of those who wait
        self._tickets = itertools.count()
        self._turn: int | None = None
        self._error: BaseException | None = None

    def spend(self, steps: float) -> None:
        """Return when ``steps`` later it is the caller's turn again."""
        with self._changed:
            ticket = self._wait_from(self.now + steps)
            self._next()
            self._changed.wait_for(lambda: self._turn == ticket)

    def run(self, workers: int, work: Callable[[], None]) -> None:
        """``work`` in that many threads at once, until all have returned.

        Raises:
            Exception: The first that ``work`` raised.
        """

        def begin(ticket: int) -> None:
            with self._changed:
                self._changed.wait_for(lambda: self._turn == ticket)
            try:
                work()
            except BaseException as error:
                self._error = self._error or error
            finally:
                with self._changed:
                    self._next()

        tickets = [self._wait_from(self.now) for _ in range(workers)]
        threads = [threading.Thread(target=begin, args=(ticket,)) for ticket in tickets]
        for thread in threads:
            thread.start()
        with self._changed:
            self._next()
        for thread in threads:
            thread.join()
        if self._error:
            raise self._error

    def _wait_from(self, due: float) -> int:
        ticket = next(self._tickets)
        heapq.heappush(self._due, (due, ticket))
        return ticket

    def _next(self) -> None:
        self.now, self._turn = heapq.heappop(self._due) if self._due else (self.now, None)
        self._changed.notify_all()


@dataclass
class Race:
    """A task to search on, and the record of the search.

    Attributes:
        budget: In full runs; range tests, stopped and repeated runs count with their steps.
        workers: Simulated ones.
        spent: Steps of all runs so far.
        times: What a step is counted less than it is: 2 for a method with double budget.
        named: (spent, virtual time, recipe) whenever the recipe to be named changed; costs and
            times in full runs.
        seconds: Wall time inside training; the rest of a race's is the method's own.
    """

    task: Task
    seed: int
    budget: float
    workers: int = 1
    spent: int = 0
    times: float = 1.0
    runs: int = 0
    named: list[tuple[float, float, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0
    clock: Clock = field(default_factory=Clock)

    @property
    def cost(self) -> float:
        """What was spent so far, in full runs."""
        return self.spent / self.task.total_steps / self.times

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return self.cost >= self.budget

    def next_seed(self) -> int:
        """A seed for the next run: no two runs of a race have the same."""
        return 100_000 * (self.seed + 1) + self.runs

    def cycle(
        self, cycle: hpsched.Cycle, watch: Callable[[int, float], None] | None = None
    ) -> float:
        """Train as ``cycle`` says; the validation score, when its time has come.

        Args:
            cycle: Any run, a range test too.
            watch: Called with (step, validation score) at each checkpoint but the last, when its
                time has come; what it raises ends the run.
        """
        self.runs += 1
        begun, paid = time.perf_counter(), 0
        every = cycle.total_steps / CHECKPOINTS

        def pay() -> None:
            nonlocal begun, paid
            self.seconds += time.perf_counter() - begun
            steps, paid = cycle.steps - paid, cycle.steps
            self.spent += steps
            self.clock.spend(steps)
            begun = time.perf_counter()

        def look(step: int, score: Callable[[], float]) -> None:
            if watch and step < cycle.total_steps and step // every > (step - 1) // every:
                value = score()
                pay()
                watch(step, value)

        try:
            return self.task.validated(cycle, look if watch else None)
        finally:
            pay()

    def train(
        self,
        recipe: Recipe,
        *,
        share: float = 1.0,
        seed: int | None = None,
        watch: Callable[[int, float], None] | None = None,
    ) -> float:
        """Validation score of one run of a recipe; inf where it diverged.

        Args:
            recipe: Field → value.
            share: Length of the complete cycle, of a full run's.
            seed: Of the run; by default one that no other run of the race has.
            watch: As in :meth:`cycle`.
        """
        steps = max(1, round(self.task.total_steps * share))
        planned = hpsched.suggest_onecycle(FixedTrial(dict(recipe)), total_steps=steps, rungs=1)
        try:
            return planned.train(
                lambda cycle: self.cycle(cycle, watch),
                steps,
                self.next_seed() if seed is None else seed,
            )
        except TrainingError:
            return math.inf

    def name(self, recipe: Recipe | None) -> None:
        """Say which recipe would be named now."""
        if recipe is not None and (not self.named or self.named[-1][2] != recipe):
            now = self.clock.now / self.task.total_steps
            self.named.append((self.cost, now, dict(recipe)))

    def work(self, work: Callable[[], None]) -> None:
        """``work`` by all workers until it returns."""
        self.clock.run(self.workers, work)


def scorer(task: Task, seeds: range) -> Callable[[Recipe], list[float]]:
    """:func:`scored`, which runs each recipe once however often it is asked for."""
    known: dict[str, list[float]] = {}

    def score(recipe: Recipe) -> list[float]:
        key = json.dumps(recipe, sort_keys=True)
        if key not in known:
            known[key] = scored(task, recipe, seeds)
        return known[key]

    return score


def scored(task: Task, recipe: Recipe, seeds: range) -> list[float]:
    """Test scores of a recipe on fresh seeds; inf where a run diverged."""
    found = []
    for seed in seeds:
        planned = hpsched.suggest_onecycle(FixedTrial(dict(recipe)), task.total_steps, rungs=1)
        try:
            found.append(planned.train(task.tested, task.total_steps, seed))
        except TrainingError:
            found.append(math.inf)
    return found
