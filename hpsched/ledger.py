"""The ledger of a study: what was run and spent, what comes next, which recipe is best.

Everything here is a pure function of the study's settings and trials; :mod:`hpsched.study` reads
the study and calls them.
"""

from __future__ import annotations

import math
import shlex
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpsched import records, search
from hpsched.errors import RecordError
from hpsched.records import CycleRecord, RecipeSpace, Settings, SweepRecord

FAILURES_IN_A_ROW = 3  # after which a worker gives up
#: What to do about a study that is :func:`fruitless`.
FRUITLESS = "look at what train returns, or lower the range of max_lr; then create a new study"
CONFIRM_SHARE = 0.3  # of the budget, at most, goes to confirmations
SIGNIFICANCE = 0.05


# -- what was run and spent ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a study, or a part of it, has spent.

    ``cycles`` is in full-cycle equivalents; ``seconds`` are those spent inside ``train``.
    """

    steps: int = 0
    seconds: float = 0.0
    cycles: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            steps=self.steps + other.steps,
            seconds=self.seconds + other.seconds,
            cycles=self.cycles + other.cycles,
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trial as hpsched sees it: Optuna's record, with ours read once.

    ``broken`` names records that could not be read and were left out.
    """

    trial: FrozenTrial
    recipe: RecipeSpace | None
    sweep: SweepRecord | None
    cycles: tuple[CycleRecord, ...]
    broken: tuple[str, ...] = ()

    @property
    def confirms(self) -> int | None:
        """Number of the trial this one repeats with a fresh seed."""
        number = self.trial.user_attrs.get(records.CONFIRMS)
        return None if number is None else int(number)

    @property
    def full(self) -> CycleRecord | None:
        """The trial's full cycle, if it finished one."""
        return next((cycle for cycle in self.cycles if cycle.is_full), None)

    @property
    def _by_itself(self) -> bool:
        """Whether the trial came to its end without any run of ours."""
        ours = {records.DIVERGED, records.OUT_OF_MEMORY} & set(self.trial.user_attrs)
        ended = self.trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        return ended and not (self.cycles or self.sweep or self.broken or ours)

    @property
    def values(self) -> dict[str, float] | None:
        """Field → value of the recipe; None until all are suggested."""
        return self.recipe.values(self.trial.params) if self.recipe else None

    @property
    def diverged(self) -> str | None:
        """Why the trial was ended as diverged."""
        return self.trial.user_attrs.get(records.DIVERGED)

    def parts(self) -> dict[str, Cost]:
        """Name of each run of ``train`` → what it cost.

        A trial that trained without us counts as one full run: nobody counted its steps, and a
        budget must end.
        """
        total = (self.recipe.total_steps if self.recipe else None) or 0
        if self._by_itself:
            took = self.trial.duration.total_seconds() if self.trial.duration else 0.0
            return {f"trial {self.trial.number}": Cost(steps=total, seconds=took, cycles=1.0)}
        found = {
            c.name: Cost(steps=c.steps, seconds=c.seconds, cycles=c.steps / c.total_steps)
            for c in self.cycles
        }
        if self.sweep:
            steps = self.sweep.steps
            cycles = steps / total if total else 0.0
            found[self.sweep.name] = Cost(steps=steps, seconds=self.sweep.seconds, cycles=cycles)
        return found


def read_runs(trials: Iterable[FrozenTrial]) -> list[Run]:
    """The trials with their records; what cannot be read is left out and named."""
    return [_read_run(trial) for trial in trials]


def _read_run(trial: FrozenTrial) -> Run:
    broken: list[str] = []

    def read(what: Callable[[], Any], default: Any) -> Any:
        try:
            return what()
        except RecordError as error:
            broken.append(str(error))
            return default

    return Run(
        trial=trial,
        recipe=read(lambda: next(records.recipe_spaces(trial), None), None),
        sweep=read(lambda: records.sweep(trial), None),
        cycles=tuple(read(lambda: records.cycles(trial), ())),
        broken=tuple(broken),
    )


def fruitless(runs: Iterable[Run]) -> bool:
    """Whether complete cycles were run, and not one of them gave a finite result."""
    values = [cycle.value for run in runs for cycle in run.cycles]
    return bool(values) and all(value is None for value in values)


def latest_failed(runs: Iterable[Run]) -> int:
    """How many of the latest trials failed, where all of them did, as of a broken objective.

    The latest are as many as a worker bears, or all that have ended when these are fewer.
    """
    ended = sorted((run for run in runs if run.trial.datetime_complete), key=when_ended)
    latest = ended[-FAILURES_IN_A_ROW:]
    return len(latest) if all(run.trial.state == TrialState.FAIL for run in latest) else 0


def optimizer_name(runs: Iterable[Run]) -> str:
    """Class name of the optimizer that most range tests saw; ``SGD`` when there were none."""
    seen = Counter(run.sweep.optimizer for run in runs if run.sweep)
    return seen.most_common(1)[0][0] if seen else "SGD"


def total_cost(runs: Iterable[Run]) -> Cost:
    """Cost of these trials; a record that a retried trial carries over counts once."""
    parts: dict[str, Cost] = {}
    for run in runs:
        parts |= run.parts()
    return sum(parts.values(), Cost())


def as_they_ended(runs: Iterable[Run]) -> Iterator[tuple[Run, float]]:
    """The trials in the order in which they ended, each with the full cycles spent by then."""
    counted: set[str] = set()
    spent = 0.0
    for run in sorted(runs, key=when_ended):
        parts = run.parts()  # of a retried trial some were another's before
        spent += sum(cost.cycles for name, cost in parts.items() if name not in counted)
        counted.update(parts)
        yield run, spent


def best_so_far(runs: Iterable[Run], minimise: bool) -> list[tuple[float, float]]:
    """(full cycles spent, value) of each single run that was the best when it ended."""
    found: list[tuple[float, float]] = []
    for run, spent in as_they_ended(runs):
        value = run.trial.values[0] if _finished(run) and run.trial.values else math.nan
        better = value < found[-1][1] if found and minimise else found and value > found[-1][1]
        if math.isfinite(value) and (better or not found):
            found.append((spent, value))
    return found


def when_ended(run: Run) -> tuple[float, int]:
    """Sorts runs by when they ended, those that have not last."""
    when = run.trial.datetime_complete
    return (when.timestamp() if when else math.inf, run.trial.number)


# -- what comes next -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Next:
    """What the next free worker does: a search trial, a confirmation of trial ``confirms``, or

    nothing, because the budget is spent (``done``).
    """

    what: Literal["search", "confirm", "done"]
    confirms: int | None = None


def next_move(
    settings: Settings | None,
    runs: Sequence[Run],
    direction: StudyDirection,
    now: float | None = None,
) -> Next:
    """What the next free worker does, from the settings and what is in the study."""
    waiting = [run for run in runs if run.trial.state == TrialState.WAITING]
    if any(run.confirms is not None or records.OWNER in run.trial.user_attrs for run in waiting):
        return Next(what="search")  # asking the study hands out what was queued or put back
    if settings is None or not _search_is_over(settings, runs, now):
        return Next(what="search")
    if _out_of_time(settings, runs, 1.0, now):
        return Next(what="done")
    planned = [r for r in runs if r.confirms is not None and r.trial.state != TrialState.FAIL]
    if len(planned) < confirmations_planned(settings):
        # A small budget confirms one recipe well rather than two badly.
        top = max(1, confirmations_planned(settings) // settings.confirm_seeds)
        candidate = next_to_confirm(runs, direction, top, settings.confirm_seeds)
        if candidate is not None:
            return Next(what="confirm", confirms=candidate)
    return Next(what="done")


def is_over(
    settings: Settings | None,
    runs: Sequence[Run],
    direction: StudyDirection,
    now: float | None = None,
) -> bool:
    """Whether a free worker finds nothing to do, and none is busy."""
    busy = any(run.trial.state == TrialState.RUNNING for run in runs)
    return not busy and next_move(settings, runs, direction, now).what == "done"


def confirmations_planned(settings: Settings) -> int:
    """Confirmation runs that the budget leaves room for."""
    wanted = settings.confirm_top * settings.confirm_seeds
    if settings.cycles is None:
        return wanted
    return min(wanted, int(CONFIRM_SHARE * settings.cycles))


def next_to_confirm(
    runs: Sequence[Run], direction: StudyDirection, top: int, seeds: int
) -> int | None:
    """The trial to repeat next: of the best ``top``, the one with the fewest fresh seeds.

    A tie goes to the better mean so far, so that an odd number of seeds favours the leader. None
    when each of them has ``seeds``.
    """
    pending = Counter(
        r.confirms for r in runs if r.confirms is not None and r.trial.state != TrialState.FAIL
    )
    ranked = rank(runs, direction, unconfirmed=True)
    # Those begun stay chosen, whatever their first fresh seeds do to the ranking.
    best_ones = sorted(ranked, key=lambda c: pending[c.number] == 0)[:top]
    chosen = [c for c in best_ones if pending[c.number] < seeds]
    if not chosen:
        return None
    sign = _sign(direction)
    return min(chosen, key=lambda c: (pending[c.number], sign * c.mean)).number


def _search_is_over(settings: Settings, runs: Sequence[Run], now: float | None) -> bool:
    search = [run for run in runs if run.confirms is None]
    if settings.trials is not None:
        counted = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return sum(run.trial.state in counted for run in search) >= settings.trials
    if settings.timeout is not None:
        return _out_of_time(settings, runs, 1 - CONFIRM_SHARE, now)
    assert settings.cycles is not None
    found = sum(_finished(run) for run in search)  # recipes there are to confirm
    reserve = min(confirmations_planned(settings), found * settings.confirm_seeds)
    return total_cost(search).cycles >= settings.cycles - reserve


def _out_of_time(settings: Settings, runs: Sequence[Run], share: float, now: float | None) -> bool:
    starts = [run.trial.datetime_start.timestamp() for run in runs if run.trial.datetime_start]
    if settings.timeout is None or not starts:
        return False
    return (time.time() if now is None else now) - min(starts) >= share * settings.timeout


# -- the best recipe -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe that finished a full cycle, with its results on fresh seeds.

    Attributes:
        number: Trial that found it.
        params: ``trial.params`` and the recipe's fixed values.
        recipe: Field → value, with final_div_factor.
        policy: ``cosine`` or ``linear``, or ``schedule:NAME``.
        total_steps: Of a full cycle; None when the trial did not say.
        found: The value it was found with: selected, so biased; left out of the mean once there
            are fresh ones.
        fresh: Values on fresh seeds.
        own: Those of ``params`` that the user's objective suggested beside the recipe.
    """

    number: int
    params: dict[str, Any]
    recipe: dict[str, float]
    policy: str
    total_steps: int | None
    found: float
    fresh: tuple[float, ...] = ()
    own: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> tuple[float, ...]:
        """What the mean is over: the fresh values, else the one it was found with."""
        return self.fresh or (self.found,)

    @property
    def mean(self) -> float:
        """Mean value over :attr:`values`."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n − 1); None with fewer than two, or a diverged one."""
        known = len(self.values) > 1 and all(map(math.isfinite, self.values))
        return statistics.stdev(self.values) if known else None

    @property
    def seeds(self) -> int:
        """Number of seeds in the mean."""
        return len(self.values)


@dataclass(frozen=True, kw_only=True)
class Best(Candidate):
    """The recipe a study names as best.

    Attributes:
        runner_up: The next one, by the same ranking.
        significant: Whether the best's mean is better than the runner-up's at the 5 % level
            (Welch's t-test, two-sided); None when either has fewer than two seeds.
        confirmed: Whether the mean is over fresh seeds.
        hint: What to do to know more, or an empty string.
    """

    runner_up: Candidate | None = None
    significant: bool | None = None
    confirmed: bool = False
    hint: str = ""

    def _repr_html_(self) -> str:
        """In a notebook: a table and the schedule."""
        from hpsched.notebook import best_html

        return best_html(self)


def best_of(runs: Sequence[Run], direction: StudyDirection, study: str) -> Best | None:
    """:func:`best` of the study of this name, from what was read; None without a full cycle."""
    ranked = rank(runs, direction)
    if not ranked:
        return None
    first = ranked[0]
    runner_up = ranked[1] if len(ranked) > 1 else None
    hint = ""
    if not first.fresh:
        command = f"hpsched study confirm {shlex.quote(study)}"
        hint = f"one seed only: hpsched.confirm(study), or `{command}`, runs it again"
    return Best(
        **{name: getattr(first, name) for name in first.__dataclass_fields__},
        runner_up=runner_up,
        significant=_significant(first, runner_up),
        confirmed=bool(first.fresh),
        hint=hint,
    )


def rank(
    runs: Sequence[Run], direction: StudyDirection, *, unconfirmed: bool = False
) -> list[Candidate]:
    """Recipes with a finished full cycle, best first.

    Those with two fresh seeds or more come before those with one, and these before the others;
    those that diverged on a fresh seed come last.

    Args:
        runs: All trials of the study.
        direction: The study's.
        unconfirmed: Rank by what the search's model expects of each recipe, as when choosing what
            to confirm, and not by the mean over fresh seeds.
    """
    sign = _sign(direction)
    expected = search.expected([run.trial for run in runs], direction)
    again: dict[int, list[float]] = {}
    for run in runs:
        if run.confirms is not None and run.trial.state.is_finished():
            value = run.full.value if run.full else None
            if value is not None:
                again.setdefault(run.confirms, []).append(value)
            elif run.diverged:  # a recipe that diverges on a fresh seed is no winner
                again.setdefault(run.confirms, []).append(sign * math.inf)
    found = [_candidate(run, again.get(run.trial.number, [])) for run in runs if _finished(run)]
    shown = [c for c in found if c.number in expected]
    # The model leaves out what is too much for it, or of another kind (prefixes, other fields).
    comparable = bool(shown) and (len(shown) == len(found) or len(runs) > search.MOST)

    def guess(candidate: Candidate) -> tuple[float, float]:
        # By what is expected of it after all that was seen: the best single value is mostly luck.
        if not comparable:
            return 0.0, sign * candidate.found
        near = min(shown, key=lambda c: (c is not candidate, abs(c.found - candidate.found)))
        return expected[near.number], sign * candidate.found

    if unconfirmed:
        return sorted(found, key=guess)
    return sorted(
        found,
        key=lambda c: (
            math.isinf(c.mean),
            -min(len(c.fresh), 2),
            sign * c.mean if c.fresh else 0.0,
            guess(c),
        ),
    )


def _finished(run: Run) -> bool:
    return (
        run.confirms is None
        and run.trial.state == TrialState.COMPLETE
        and run.values is not None
        and run.trial.values is not None
    )


def _candidate(run: Run, fresh: Sequence[float]) -> Candidate:
    assert run.recipe is not None and run.values is not None and run.trial.values is not None
    return Candidate(
        number=run.trial.number,
        params={**run.values, **run.trial.params},
        recipe=run.values,
        policy=run.recipe.policy,
        total_steps=run.recipe.total_steps,
        found=run.trial.values[0],
        fresh=tuple(fresh),
        own={k: v for k, v in run.trial.params.items() if k not in run.recipe.names},
    )


def _significant(first: Candidate, second: Candidate | None) -> bool | None:
    p = welch(first.fresh, second.fresh) if second else None
    return None if p is None else p < SIGNIFICANCE


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Two-sided p of Welch's t-test; None with fewer than two values each, or an infinite one."""
    if min(len(first), len(second)) < 2 or not all(map(math.isfinite, (*first, *second))):
        return None
    from scipy import stats

    with warnings.catch_warnings():  # of equal values, as an error counted in steps often has
        warnings.filterwarnings("ignore", "Precision loss")
        return float(stats.ttest_ind(first, second, equal_var=False).pvalue)


def _sign(direction: StudyDirection) -> int:
    return 1 if direction == StudyDirection.MINIMIZE else -1


def best_json(named: Best) -> dict[str, Any]:
    """The best recipe as plain values."""
    up = named.runner_up
    return {
        "trial": named.number,
        **named.recipe,
        "policy": named.policy,
        "params": named.params,
        "total_steps": named.total_steps,
        "mean": named.mean,
        "spread": named.spread,
        "seeds": named.seeds,
        "values": list(named.values),
        "confirmed": named.confirmed,
        "significant": named.significant,
        "runner_up": None
        if up is None
        else {"trial": up.number, "mean": up.mean, "spread": up.spread, "seeds": up.seeds},
    }
