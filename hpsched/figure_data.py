"""What the figures show, collected from a study's summary; :mod:`hpsched.figures` draws it."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from hpsched.coordinates import full_scale_values
from hpsched.errors import UsageError
from hpsched.figure_style import TICKS, shortened
from hpsched.ledger import Candidate, Run, as_they_ended, rank
from hpsched.present import number
from hpsched.records import once
from hpsched.summary import Summary

ENDINGS = ("went on", "finished", "pruned", "diverged", "running or failed")
Curves = dict[str, list[tuple[int, float | None]]]
MOST = 300  # results of a kind that a figure draws, of any number there are
_FAR = 3.0  # interquartile ranges beyond a quartile from where a value may lie off the axis


@dataclass(frozen=True, kw_only=True)
class Point:
    """One result.

    Attributes:
        number: The trial.
        spent: Full cycles that the study had spent by then.
        value: How good it was; of a pruned trial, as expected after a full cycle.
        params: The trial's parameters.
        text: What hovering tells, as plotly's HTML.
        head: The lines of it that say which trial, and how good.
    """

    number: int
    spent: float
    value: float
    params: Mapping[str, Any]
    text: str
    head: str = ""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Results in the order in which they came: full cycles, pruned trials, fresh seeds."""

    full: list[Point]
    short: list[Point]
    again: list[Point]


@once(lambda _: True)
def results(summary: Summary) -> Results:
    """Every finite result of the study, with what had been spent when it came."""
    moved = full_scale_values([run.trial for run in summary.runs if run.confirms is None])
    found = Results(full=[], short=[], again=[])
    for run, spent in as_they_ended(summary.runs):
        kind, value = _outcome(run, moved)
        if kind and value is not None and math.isfinite(value):
            getattr(found, kind).append(_point(run, spent, value))
    return found


@once(lambda _: True)
def shown(summary: Summary) -> Results:
    """Those of :func:`results` that are drawn: of each kind :data:`MOST` at most."""
    found, maximise = results(summary), not minimises(summary)
    return Results(
        **{kind: _sample(getattr(found, kind), maximise) for kind in ("full", "short", "again")}
    )


def _sample(points: list[Point], maximise: bool) -> list[Point]:
    """The best, the latest, those at the ends of each parameter, and every so many of the rest."""
    count, quarter = len(points), MOST // 4
    if count <= MOST:
        return points
    good = sorted(range(count), key=lambda i: points[i].value, reverse=maximise)
    kept = {*good[:quarter], good[-1], *range(count - quarter, count), *_ends(points)[:quarter]}
    rest, room = [i for i in range(count) if i not in kept], MOST - len(kept)
    kept.update(rest[place * len(rest) // room] for place in range(room))
    return [points[i] for i in sorted(kept)]


def _ends(points: Sequence[Point]) -> list[int]:
    """Index of a point with the lowest, and one with the highest value of each parameter."""
    ends: dict[str, tuple[int, int]] = {}
    for at, point in enumerate(points):
        for name, value in point.params.items():
            if isinstance(value, int | float):
                low, high = ends.get(name, (at, at))
                low = at if value < points[low].params[name] else low
                high = at if value > points[high].params[name] else high
                ends[name] = (low, high)
    return [at for pair in ends.values() for at in pair]


def sample_text(summary: Summary, kinds: Sequence[str] = ("full", "short", "again")) -> str:
    """How many of the results are drawn, in words; empty when all are."""
    names = {"full": "full cycles", "short": "pruned trials", "again": "fresh seeds"}
    found, drawn = results(summary), shown(summary)
    counts = {kind: (len(getattr(drawn, kind)), len(getattr(found, kind))) for kind in kinds}
    parts = [f"{n:,} of {all_:,} {names[kind]}" for kind, (n, all_) in counts.items() if n < all_]
    if not parts:
        return ""
    return f"Shown: {', '.join(parts)} (the best, the latest, the extremes and an even sample)."


def _outcome(run: Run, moved: Mapping[int, float]) -> tuple[str, float | None]:
    """Which of :class:`Results` a trial belongs to, and its value there."""
    if run.diverged:
        return "", None
    if run.confirms is not None:
        return "again", run.full.value if run.full else None
    if run.trial.state == TrialState.COMPLETE and run.values and run.trial.values:
        return "full", run.trial.values[0]
    if run.trial.state == TrialState.PRUNED and run.cycles:
        return "short", moved.get(run.trial.number)
    return "", None


def _point(run: Run, spent: float, value: float) -> Point:
    trial = run.trial
    head, shown = _head(run, value), {**(run.values or {}), **trial.params}
    shown.pop("final_div_factor", None)
    text = "<br>".join([head, *(f"{value_text(k)} = {value_text(v)}" for k, v in shown.items())])
    return Point(
        number=trial.number, spent=spent, value=value, params=trial.params, text=text, head=head
    )


def _head(run: Run, value: float) -> str:
    lines = [f"<b>trial {run.trial.number}</b>: {number(value, 4)}"]
    last = run.cycles[-1] if run.cycles else None
    if last and last.steps < last.total_steps and last.value is not None:
        lines = [
            f"<b>trial {run.trial.number}</b>: {number(last.value, 4)} "
            f"after a cycle of {last.steps:,} steps",
            f"about {number(value, 4)} after a full one",
        ]
    if run.confirms is not None:
        lines.append(f"recipe of trial {run.confirms}, fresh seed")
    return "<br>".join(lines)


def value_text(value: Any) -> str:
    """A parameter's value or name, as plotly's HTML."""
    return html.escape(cell_text(value))


def cell_text(value: Any) -> str:
    """A parameter's value as text."""
    return number(value) if isinstance(value, float) else str(value)


def rung_outcomes(summary: Summary) -> dict[int, dict[str, int]]:
    """Rung → how many trials went on from it, or ended there and how (:data:`ENDINGS`)."""
    counts = {rung.rung: dict.fromkeys(ENDINGS, 0) for rung in summary.rungs}
    for run in summary.runs:
        if run.confirms is None and run.cycles:
            for cycle in run.cycles[:-1]:
                counts[cycle.rung]["went on"] += 1
            counts[run.cycles[-1].rung][_ending(run)] += 1
    return counts


def _ending(run: Run) -> str:
    if run.diverged:
        return "diverged"
    states = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned"}
    return states.get(run.trial.state, "running or failed")


@once(lambda _: True)
def ranked(summary: Summary) -> list[Candidate]:
    """The recipes that finished a full cycle, best first; none with several objectives."""
    if any(run.trial.values and len(run.trial.values) > 1 for run in summary.runs):
        return []
    return rank(summary.runs, StudyDirection[summary.direction.upper()])


def minimises(summary: Summary) -> bool:
    """Whether lower values are better."""
    return summary.direction == "minimize"


def best_point(summary: Summary) -> list[Point]:
    """The best recipe at its mean, as a list of one; empty while there is none."""
    named = summary.best
    run = next((r for r in summary.runs if named and r.trial.number == named.number), None)
    if named is None or run is None or not math.isfinite(named.mean):
        return []
    return [_point(run, summary.cost.cycles, named.mean)]


def curves(summary: Summary, top: int) -> list[tuple[int, Curves]]:
    """(trial, metric → points) of the full cycles of the best ``top`` recipes, best first."""
    full = {run.trial.number: run.full for run in summary.runs if run.full}
    chosen = [candidate.number for candidate in ranked(summary)[:top]]
    return [(n, cycle.curves) for n in chosen if (cycle := full.get(n)) and cycle.curves]


# -- methods against each other --------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to train in a comparison, run with several seeds.

    Attributes:
        name: E.g. ``one-cycle`` or ``cosine``.
        steps: Optimizer steps at which the model was validated, rising.
        values: The validation metric, a row for each seed and a value for each of ``steps``; NaN
            where a run had diverged or ended.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn.

        Raises:
            UsageError: Steps that do not rise, no seed, or a seed with more or fewer values.
        """
        steps = list(self.steps)
        if not steps or steps != sorted(set(steps)):
            raise UsageError(f"arm {self.name!r}: its steps must rise, and there must be some.")
        lengths = {len(row) for row in self.values}
        if lengths != {len(steps)}:
            raise UsageError(
                f"arm {self.name!r} has {len(steps)} steps, and seeds of {sorted(lengths)} values: "
                "give each seed a value for each step, NaN where there is none."
            )


def median_curve(arm: Arm) -> list[float]:
    """The median over seeds at each step; NaN where half of the seeds or more have no value."""
    values = np.array(arm.values, dtype=float)
    known = np.isfinite(values).sum(axis=0) * 2 > len(values)
    medians = np.full(values.shape[1], math.nan)
    if known.any():
        medians[known] = np.nanmedian(values[:, known], axis=0)
    return [float(value) for value in medians]


def reached(arm: Arm, target: float, maximise: bool = False) -> float:
    """Step at which half of an arm's seeds have reached ``target``; infinite when they do not.

    A seed has reached it where its metric is as good for the first time.
    """
    values = np.array(arm.values, dtype=float)
    with np.errstate(invalid="ignore"):
        good = values >= target if maximise else values <= target
    steps = np.array(arm.steps, dtype=float)
    firsts = [float(steps[row.argmax()]) if row.any() else math.inf for row in good]
    return sorted(firsts)[len(firsts) // 2]


# -- axes ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One searched parameter.

    Attributes:
        name: In ``trial.params``.
        log: Whether it is searched on a log scale.
        values: Those that trials have, lowest first; choices that are no numbers as they came.
        categorical: Whether ``values`` are choices.
    """

    name: str
    log: bool
    values: tuple[Any, ...]
    categorical: bool

    @property
    def label(self) -> str:
        """The name, safe for plotly."""
        return shortened(self.name, 28)

    def height(self, value: Any) -> float:
        """Where ``value`` stands between the lowest (0) and the highest (1)."""
        if self.categorical:
            return self.values.index(value) / max(len(self.values) - 1, 1)
        low, high, at = (self._scaled(v) for v in (self.values[0], self.values[-1], value))
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """(height, label): the choices, a few whole numbers, or five values from low to high."""
        whole = all(isinstance(value, int) for value in self.values)
        if self.categorical or (whole and len(self.values) <= TICKS):
            return [(self.height(value), shortened(cell_text(value))) for value in self.values]
        low, high = self._scaled(self.values[0]), self._scaled(self.values[-1])
        if not low < high:
            return [(0.5, number(self.values[0], 2))]
        places = [i / 4 for i in range(5)]
        steps = [low + place * (high - low) for place in places]
        labels = [number(10**step if self.log else step, 2) for step in steps]
        return list(zip(places, labels, strict=True))

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else float(value)


@once(lambda _: True)
def axes(summary: Summary) -> list[Axis]:
    """The parameters that the study's trials search, the recipe's before the user's own."""
    found: dict[str, list[tuple[BaseDistribution, Any]]] = {}
    recipe: dict[str, None] = {}
    for run in summary.runs:
        if run.recipe and run.confirms is None:
            recipe |= dict.fromkeys(run.recipe.names)
            for name, value in run.trial.params.items():
                found.setdefault(name, []).append((run.trial.distributions[name], value))
    order = [name for name in recipe if name in found]
    return [_axis(name, found[name]) for name in dict.fromkeys([*order, *found])]


def _axis(name: str, seen: Sequence[tuple[BaseDistribution, Any]]) -> Axis:
    kind = seen[-1][0]
    used = [value for _, value in seen]
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in used)
    if isinstance(kind, CategoricalDistribution) or not numeric:
        choices = sorted(set(used)) if numeric else dict.fromkeys(used)
        return Axis(name=name, log=False, values=tuple(choices), categorical=True)
    log = bool(getattr(kind, "log", False)) and min(used) > 0
    return Axis(name=name, log=log, values=tuple(sorted(set(used))), categorical=False)


def value_range(found: Results, summary: Summary, must: Iterable[float] = ()) -> list[float] | None:
    """Range of a value axis: all but results far on the bad side; always the best and ``must``."""
    ran = [point.value for point in (*found.full, *found.again)]
    expected = [point.value for point in found.short]
    values = [*ran, *expected]
    if not values:
        return None
    # Most of the pruned trials, but not those that would squash what ran in full.
    middle = np.quantile(expected, [0.25, 0.75]).tolist() if expected and ran else []
    low, high = robust_range(ran or expected, middle) or [min(values), max(values)]
    margin = 0.06 * (high - low)
    if minimises(summary):
        low = min(values) - margin
    else:
        high = max(values) + margin
    return [min([low, *(m - margin for m in must)]), max([high, *(m + margin for m in must)])]


def robust_range(values: Sequence[float], must: Iterable[float | None] = ()) -> list[float] | None:
    """A range that leaves out what lies far beyond the quartiles, but nothing of ``must``."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    q1, q3 = np.quantile(finite, [0.25, 0.75])
    reach = _FAR * (q3 - q1) or (max(finite) - min(finite))
    kept = [value for value in must if value is not None and math.isfinite(value)]
    low = min([max(min(finite), q1 - reach), *kept])
    high = max([min(max(finite), q3 + reach), *kept])
    margin = 0.06 * (high - low) or 0.05 * (abs(high) or 1.0)
    return [float(low - margin), float(high + margin)]
