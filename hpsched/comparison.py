"""Several studies against each other: whose recipe is better, at what cost, and is that certain?

A study's own value was chosen among many and is too good on average, so only fresh seeds count as
evidence (:mod:`hpsched.ledger`). Where two studies ran on the same ones, as those of ``hpsched
compare`` do, they are compared seed by seed, as it does; else by Welch's t-test. The more pairs of
studies there are, the more certain each has to be: p is corrected for their number (Holm 1979).
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from optuna.study import StudyDirection

from hpsched import ledger, records
from hpsched.compare import Arm, Difference, differences, holm
from hpsched.errors import UsageError
from hpsched.figure_data import cell_text
from hpsched.ledger import SIGNIFICANCE, Best, Run
from hpsched.present import duration, mean_and_spread, number
from hpsched.report_content import several_objectives
from hpsched.summary import Summary


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two studies' best recipes on fresh seeds.

    Attributes:
        better, worse: The studies, by the mean over fresh seeds; where a run on the same seeds
            diverged, by the number of seeds on which each is ahead.
        difference: Of the means, as good as positive.
        p: Of Welch's t-test, two-sided; where the seeds are the same, that of
            :func:`hpsched.compare.differences`. Of a :class:`Comparison`, corrected for the number
            of its pairs (Holm). None with fewer than two on either side.
        low, high: 95 % interval of the difference; None where the seeds differ, or without one.
        paired: Whether both ran on the same seeds.
        equal: Whether neither is better: their means are the same.
    """

    better: str
    worse: str
    difference: float
    p: float | None
    low: float | None = None
    high: float | None = None
    paired: bool = False
    equal: bool = False

    @property
    def verdict(self) -> str:
        """What p says, in words."""
        if self.p is None:
            return "not known: fewer than two fresh seeds, or no spread"
        return "significant" if self.p < SIGNIFICANCE else "not significant: either will do"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a page about several studies says.

    Attributes:
        studies: In the order asked for.
        headline: The answer in a sentence.
        warnings: What makes the comparison doubtful.
        results: A row for each study (:data:`RESULTS` names the columns).
        pairs: Every two studies whose values compare.
        recipes: A row for each parameter: its name, and its value in each study.
    """

    studies: tuple[Summary, ...]
    headline: str
    warnings: list[str]
    results: list[list[str]]
    pairs: list[Pair]
    recipes: list[list[str]]


RESULTS = (
    "study", "best value", "fresh seeds", "trial", "total steps", "cycles spent",
    "steps spent", "device time", "trials",
)  # fmt: skip


def compare(summaries: Sequence[Summary]) -> Comparison:
    """What several studies say against each other; unfinished and empty ones too.

    Raises:
        UsageError: Fewer than two studies, or one named twice.
    """
    names = [summary.name for summary in summaries]
    if len(names) < 2:
        raise UsageError("A comparison needs two studies or more: name another one.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"{twice[0]!r} is named twice: name each study once.")
    summaries = [_as_counted(summary) for summary in summaries]
    found = list(_pairs(summaries))
    corrected = holm([pair.p for pair in found])
    pairs = [replace(pair, p=p) for pair, p in zip(found, corrected, strict=True)]
    return Comparison(
        studies=tuple(summaries),
        headline=_headline(summaries, pairs),
        warnings=list(_warnings(summaries)),
        results=[_result(summary) for summary in summaries],
        pairs=pairs,
        recipes=_recipes(summaries),
    )


def comparable(summaries: Sequence[Summary]) -> bool:
    """Whether the studies' values may be set against each other: one direction, one objective."""
    return len({s.direction for s in summaries}) == 1 and not any(
        map(several_objectives, summaries)
    )


# -- who is better ---------------------------------------------------------------------------------


def _pairs(summaries: Sequence[Summary]) -> Iterator[Pair]:
    if not comparable(summaries):
        return
    confirmed = [s for s in summaries if s.best and s.best.fresh]
    for one, other in itertools.combinations(confirmed, 2):
        assert one.best is not None and other.best is not None
        sign = 1 if one.direction == "minimize" else -1
        first, second = sorted((one, other), key=lambda s: sign * s.best.mean if s.best else 0.0)
        assert first.best is not None and second.best is not None
        if _same_seeds(first, second):
            yield _paired(first, second)
            continue
        yield Pair(
            better=first.name,
            worse=second.name,
            difference=abs(first.best.mean - second.best.mean),
            p=welch(first.best.fresh, second.best.fresh),
            equal=first.best.mean == second.best.mean,
        )


def _paired(first: Summary, second: Summary) -> Pair:
    """Two studies on the same fresh seeds, as ``hpsched compare`` sets them against each other."""
    assert first.best is not None and second.best is not None
    arms = [Arm(schedule=s.name, study=s.name, scores=_scores(s)) for s in (first, second)]
    (found,) = differences(arms, StudyDirection[first.direction.upper()])
    if _behind(found):
        return _paired(second, first)
    apart = abs(first.best.mean - second.best.mean)
    level = found.gain is not None or found.wins == found.losses  # else one diverged more often
    equal = level and first.best.mean == second.best.mean
    return Pair(
        better=first.name,
        worse=second.name,
        difference=0.0 if equal else apart if found.gain is None else found.gain,
        p=found.p,
        low=found.low,
        high=found.high,
        paired=True,
        equal=equal,
    )


def _behind(found: Difference) -> bool:
    return (found.wins - found.losses if found.gain is None else found.gain) < 0


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """:func:`hpsched.ledger.welch`; None, too, without any spread."""
    spread = max(len(set(first)), len(set(second))) > 1
    p = ledger.welch(first, second) if spread else None
    return None if p is None or not math.isfinite(p) else p


def _headline(summaries: Sequence[Summary], pairs: Sequence[Pair]) -> str:
    if not comparable(summaries):
        return "These studies do not compare: their values mean different things (see below)."
    known = [s for s in summaries if s.best]
    if not known:
        return "No study has finished a full cycle yet."
    confirmed = [s for s in known if s.best and s.best.fresh]
    if len(confirmed) < 2:
        missing = ", ".join(s.name for s in summaries if s not in confirmed)
        return f"Nothing is certain yet: {missing} ran no recipe on fresh seeds."
    sign = 1 if summaries[0].direction == "minimize" else -1
    first = min(confirmed, key=lambda s: sign * s.best.mean if s.best else math.inf)
    assert first.best is not None
    equal = [p for p in pairs if p.equal and first.name in (p.better, p.worse)]
    pairs = [p for p in pairs if not p.equal]
    beaten = [p.worse for p in pairs if p.better == first.name and p.p is not None]
    sure = [p.worse for p in pairs if p.better == first.name and (p.p or 1.0) < SIGNIFICANCE]
    rest = f"significantly better than {', '.join(sure)}" if sure else ""
    if unsure := [name for name in beaten if name not in sure]:
        rest += f"{'; ' if rest else ''}not significantly better than {', '.join(unsure)}"
    if ahead := [p.better for p in pairs if p.worse == first.name]:  # but diverged on a seed
        rest += f"{'; ' if rest else ''}on most seeds {', '.join(ahead)} is better"
    if equal:
        others = [p.worse if p.better == first.name else p.better for p in equal]
        names = f"{', '.join([first.name, *others[:-1]])} and {others[-1]}"
        mean = number(first.best.mean)
        return f"{names} are equal: the same best mean, {mean}{f'; {rest}' if rest else ''}."
    said = f"{first.name} has the best mean: {mean_and_spread(first.best)}"
    cost = f"at a cost of {number(first.cost.cycles)} full cycles"
    return f"{said} over {first.best.seeds} fresh seeds, {cost}; {rest or 'too few seeds to tell'}."


def _warnings(summaries: Sequence[Summary]) -> Iterator[str]:
    if len({s.direction for s in summaries}) > 1:
        each = ", ".join(f"{s.name} {s.direction}s" for s in summaries)
        yield f"The directions differ ({each}): no value is set against another."
    for summary in summaries:
        yield from _own_warnings(summary)
    steps = {s.name: s.best.total_steps for s in summaries if s.best and s.best.total_steps}
    if len(set(steps.values())) > 1:
        each = ", ".join(f"{name} {count:,}" for name, count in steps.items())
        yield f"A full cycle has different lengths ({each} optimizer steps): so do their costs."
    for one, other in itertools.combinations(summaries, 2):
        shared = _scores(one).keys() & _scores(other).keys()
        if shared and not _same_seeds(one, other):
            yield (
                f"{one.name} and {other.name} confirmed with {len(shared)} of the same seeds: the "
                "two are not independent, as the test assumes; give the studies different seeds."
            )


def _own_warnings(summary: Summary) -> Iterator[str]:
    """Why a study says less than it could."""
    if several_objectives(summary):
        yield f"{summary.name} has several objectives: see study.best_trials for its Pareto front."
    elif summary.best is None:
        yield f"{summary.name} has not finished a full cycle yet."
    elif not summary.best.fresh:
        yield (
            f"{summary.name} has one seed only, of the recipe it was chosen by, which is too good "
            "on average: run it on fresh seeds first "
            f"(hpsched study confirm {shlex.quote(summary.name)}, or hpsched.confirm)."
        )
    if summary.progress is not None and summary.progress < 1:
        yield f"{summary.name} has spent {100 * summary.progress:.0f} % of its budget so far."


# -- seeds -----------------------------------------------------------------------------------------


def _same_seeds(one: Summary, other: Summary) -> bool:
    """Whether both best recipes ran on the same fresh seeds, two or more."""
    seeds = _scores(one).keys()
    return len(seeds) > 1 and seeds == _scores(other).keys()


def _scores(summary: Summary) -> dict[int, float | None]:
    """Fresh seed → value of the best recipe's run with it; None where it diverged."""
    return {
        run.cycles[-1].seed: run.full.value if run.full else None
        for run in _counted_runs(summary)
        if run.cycles and (run.full or run.diverged)
    }


def _counted_runs(summary: Summary) -> list[Run]:
    """The best recipe's runs on fresh seeds; only those that ``hpsched compare`` queued, if any."""
    best = summary.best
    ours = [
        run
        for run in summary.runs
        if best and run.confirms == best.number and run.trial.state.is_finished()
    ]
    return [run for run in ours if records.SEED in run.trial.user_attrs] or ours


def _as_counted(summary: Summary) -> Summary:
    """The study, its best recipe with the fresh seeds that count (see :func:`_counted_runs`)."""
    counted = _counted_runs(summary)
    if summary.best is None or not any(records.SEED in run.trial.user_attrs for run in counted):
        return summary
    worst = math.inf if summary.direction == "minimize" else -math.inf
    fresh = [worst if value is None else value for value in _scores(summary).values()]
    return replace(summary, best=replace(summary.best, fresh=tuple(fresh)))


# -- tables ----------------------------------------------------------------------------------------


def _result(summary: Summary) -> list[str]:
    best, cost = summary.best, summary.cost
    steps = best.total_steps if best else None
    return [
        summary.name,
        mean_and_spread(best) if best else "–",
        _fresh(best),
        str(best.number) if best else "–",
        f"{steps:,}" if steps else "–",
        number(cost.cycles),
        f"{cost.steps:,}",
        duration(cost.seconds),
        f"{sum(summary.states.values()):,}",
    ]


def _fresh(best: Best | None) -> str:
    if best is None:
        return "–"
    return str(len(best.fresh)) if best.fresh else "none: one run's value"


def _recipes(summaries: Sequence[Summary]) -> list[list[str]]:
    bests = [summary.best for summary in summaries]
    own = dict.fromkeys(name for best in bests if best for name in best.own)
    rows = {field: [_field(best, field) for best in bests] for field in records.FIELDS}
    rows["final_div_factor"] = [_field(best, "final_div_factor") for best in bests]
    rows["policy"] = [best.policy if best else "–" for best in bests]
    for name in own:
        rows[name] = [cell_text(best.own.get(name, "–")) if best else "–" for best in bests]
    return [[name, *values] for name, values in rows.items()]


def _field(best: Best | None, field: str) -> str:
    return number(best.recipe.get(field)) if best else "–"
