"""Range-test evidence in a study: read it, pool it by context.

Each replicate is stored with the trial that ran it, whatever became of the trial: no lock, no
leader, nobody waits. Pooling is a pure function of what is stored, so all workers see the same
window as soon as they see the same records.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from hpsched import lr_curve, proposal, records, refine
from hpsched.errors import RecordError
from hpsched.proposal import Proposal
from hpsched.records import RecipeSpace, SweepRecord

#: A sweep whose edge lies this much below those at smaller weight decay diverges because of the
#: decay: edges scatter by half an octave between seeds, and two are beyond chance.
DISTURBED = 4.0
#: Share of the largest stable product of rate and weight decay that the search may use.
DECAY_MARGIN = 0.5


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a study knows about max_lr in one context.

    Attributes:
        proposal: Centre and window for max_lr: range tests, and complete cycles where there are.
        prior: What the range tests alone say.
        start: The prior, moved by what complete cycles taught in other contexts and, where the
            study begins like another, by what they taught there.
        runs: The complete cycles of the refining trials that went in.
        momentum_name: ``momentum``, ``beta1`` or ``none``: what the user's optimizer has.
        optimizer: Its class name.
        decay_limit: Product of rate and weight decay beyond which sweeps diverged; inf: none seen.
    """

    proposal: Proposal
    prior: Proposal
    start: Proposal
    momentum_name: str
    optimizer: str
    runs: tuple[refine.Run, ...] = ()
    decay_limit: float = math.inf

    @property
    def edge(self) -> float | None:
        """Where training diverges, for all that range tests and complete cycles say."""
        return refine.edge_of(self.start, self.runs)


def of(
    trials: Sequence[FrozenTrial], recipe: RecipeSpace, directions: Sequence[StudyDirection]
) -> Evidence | None:
    """Everything the study knows about this recipe's max_lr; None without any range test.

    A context whose own range tests are missing or unreliable borrows those of all others, and its
    centre is moved by what the cycles of other contexts have moved theirs.
    """
    every = sweeps(trials)
    own = [record for record in every if record.context_key == recipe.context_key]
    found = pool(own, recipe.total_steps)
    if found is None or not found.prior.reliable:
        found = pool(every, recipe.total_steps)
    if found is None or len(directions) != 1:
        return found
    cycles = _cycles(trials, directions[0])
    runs = _runs(cycles, recipe)
    moves = [
        _refined(first := _guessed(other.prior, space), theirs).centre / first.centre
        for key, space in {r.context_key: r for _, r, _ in cycles}.items()
        if key != recipe.context_key
        and len(theirs := _runs(cycles, space)) > 1
        and (other := pool([s for s in every if s.context_key == key], space.total_steps))
    ]
    # One more than there are, for the context's own part.
    start = _guessed(found.prior, recipe)
    if moves:
        start = start.moved(math.prod(moves) ** (1 / (len(moves) + 1)))
    return replace(found, proposal=_refined(start, runs), start=start, runs=runs)


def _guessed(prior: Proposal, recipe: RecipeSpace) -> Proposal:
    """The proposal, moved to where the study that this one begins like ended."""
    known = prior.reliable and "max_lr" in recipe.guess
    return prior.moved(recipe.guess["max_lr"]) if known else prior


def bears(trial: FrozenTrial) -> bool:
    """Whether :func:`of` learns anything from this trial."""
    return records.RANGE_TEST in trial.user_attrs or records.REFINES in trial.user_attrs


def _cycles(
    trials: Sequence[FrozenTrial], direction: StudyDirection
) -> list[tuple[FrozenTrial, RecipeSpace, tuple[tuple[int, float], ...]]]:
    """The refining trials, each with its recipe and (steps, score) of every complete cycle."""
    sign = 1.0 if direction == StudyDirection.MINIMIZE else -1.0
    found = []
    seen: set[str] = set()  # a retried trial carries copies of its first's cycles
    for trial in trials:
        if records.REFINES not in trial.user_attrs:
            continue
        try:
            space = next(records.recipe_spaces(trial))
            done = records.cycles(trial)
        except (RecordError, StopIteration) as error:
            warn_once(str(error) or f"trial {trial.number} has no recipe")
            continue
        steps = dict(space.rungs)
        scores = tuple(
            (steps[cycle.rung], math.inf if cycle.value is None else sign * cycle.value)
            for cycle in done
            if cycle.rung in steps and cycle.name not in seen
        )
        seen.update(cycle.name for cycle in done)
        found.append((trial, space, scores))
    return found


def _runs(
    cycles: Iterable[tuple[FrozenTrial, RecipeSpace, tuple[tuple[int, float], ...]]],
    recipe: RecipeSpace,
) -> tuple[refine.Run, ...]:
    name, total = recipe.name("max_lr"), recipe.total_steps
    return tuple(
        refine.Run(trial.params[name], steps / total, score)
        for trial, space, scores in cycles
        if total and space.context_key == recipe.context_key and name in trial.params
        for steps, score in scores
    )


@functools.lru_cache(maxsize=256)
def _refined(prior: Proposal, runs: tuple[refine.Run, ...]) -> Proposal:
    return refine.refined(prior, runs)


def sweeps(trials: Iterable[FrozenTrial]) -> list[SweepRecord]:
    """All readable range tests, once each (a retried trial carries a copy of its first's).

    A record that cannot be read is left out with one warning that names the trial.
    """
    found: dict[str, SweepRecord] = {}
    for trial in trials:
        if records.RANGE_TEST not in trial.user_attrs:
            continue
        try:
            record = records.sweep(trial)
        except RecordError as error:
            warn_once(str(error))
            continue
        if record is not None:
            found.setdefault(record.name, record)
    return list(found.values())


def of_context(trials: Iterable[FrozenTrial], context_key: str) -> list[SweepRecord]:
    """The range tests run in this context."""
    return [record for record in sweeps(trials) if record.context_key == context_key]


def pool(found: Sequence[SweepRecord], total_steps: int | None = None) -> Evidence | None:
    """Replicates → evidence; None when there are none.

    Replicates that diverged early because of their weight decay say how much of it is stable, and
    nothing else.
    """
    if not found:
        return None
    calm, limit = _undisturbed([range_test(record) for record in found])
    kinds = [record.momentum_name for record in found]
    prior = _pool(tuple(calm), total_steps)
    return Evidence(
        proposal=prior,
        prior=prior,
        start=prior,
        momentum_name=max(set(kinds), key=kinds.count),
        optimizer=found[0].optimizer,
        decay_limit=limit,
    )


def _undisturbed(tests: list[lr_curve.RangeTest]) -> tuple[list[lr_curve.RangeTest], float]:
    """The tests whose weight decay does not lower their edge, and the stable rate × decay."""
    calm, limit = [], math.inf
    for test in tests:
        decay, edge = test.weight_decay or 0.0, test.lr_diverged
        milder = [t.lr_diverged for t in tests if (t.weight_decay or 0.0) < decay and t.lr_diverged]
        if edge is not None and milder and edge * DISTURBED < min(milder):
            limit = min(limit, DECAY_MARGIN * edge * decay)
        else:
            calm.append(test)
    return calm, limit


def doubt(found: Sequence[SweepRecord]) -> str | None:
    """Why these range tests deserve less than full trust; None when they say enough together."""
    pooled = pool(found)
    return None if pooled is None or pooled.prior.reliable else pooled.prior.reason


@functools.lru_cache(maxsize=256)
def _pool(tests: tuple[lr_curve.RangeTest, ...], total_steps: int | None) -> Proposal:
    # Each proposal of a trial asks again; the replicates hardly ever change.
    return proposal.pool(tests, total_steps)


@records.once(lambda record: True)
def range_test(record: SweepRecord) -> lr_curve.RangeTest:
    """The stored replicate as a :class:`~hpsched.RangeTest`, which is read once per process."""
    key = repr(record)  # a trial still running, and copies of trials, give a new record each time
    if key not in _read:
        if len(_read) >= READ:
            _read.clear()
        _read[key] = _range_test(record)
    return _read[key]


#: Range tests that were read lately, by content.
_read: dict[str, lr_curve.RangeTest] = {}
READ = 64


def _range_test(record: SweepRecord) -> lr_curve.RangeTest:
    return lr_curve.RangeTest(
        lrs=tuple(record.lrs),
        losses=tuple(_value(loss) for loss in record.losses),
        weight_decay=record.weight_decay,
        momentum=record.momentum,
        seed=record.seed,
        optimizer=record.optimizer,
        seconds=record.seconds,
        validation={
            metric: [(step, _value(value)) for step, value in points]
            for metric, points in record.validation.items()
        },
    )


def _value(stored: float | None) -> float:
    return math.nan if stored is None else stored


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Warn, but only the first time in this process: trials come by the hundred."""
    warnings.warn(message, stacklevel=3)
