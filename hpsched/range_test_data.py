"""What the range-test figure shows: sweeps by weight decay, their levels, and the rules' rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpsched.lr_curve import RangeTest
from hpsched.present import rate_text
from hpsched.proposal import Proposal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

#: Rules of ``RangeTest.rules`` that are drawn → (label, what it is).
RULES = {
    "steepest": ("steepest", "where the loss falls fastest per log rate"),
    "minimum": ("minimum", "where the loss is lowest"),
    "geometric_mean": ("geom. mean", "the geometric mean of steepest and minimum"),
    "minimum_tenth": ("minimum / 10", "a tenth of where the loss is lowest"),
    "valley": ("valley", "the middle of the fall"),
    "slide": ("slide", "the lower end of the last even slope"),
    "max_stable": ("max stable", "the highest rate that keeps half of the gain"),
}
PAST = 2.0  # times the divergence edge: how far smooth curves are drawn
MOST_RATES = 300  # at which sweeps of unlike length are compared


class Curve(NamedTuple):
    """Values over increasing rates, both of shape (n,)."""

    rates: Array
    values: Array


class Group(NamedTuple):
    """The sweeps of one weight decay; the name is empty when there is no other group."""

    name: str
    tests: list[RangeTest]

    def named(self, what: str) -> str:
        """``what``, and of which group it is."""
        return f"{self.name}, {what}" if self.name else what


class Row(NamedTuple):
    """What one rule says: its rate, and all that is marked in its row."""

    label: str
    hover: str
    rate: float  # the median over the sweeps, in log rate
    ends: tuple[float, float]  # the lowest and the highest rate in the row
    ticks: list[tuple[float, int]]  # (rate, index of the group) of each sweep


def groups(tests: Sequence[RangeTest]) -> list[Group]:
    """The sweeps by weight decay, the largest first, those without one last."""
    known = {test.weight_decay for test in tests if test.weight_decay is not None}
    decays = [*sorted(known, reverse=True), None]
    found = [(decay, [t for t in tests if t.weight_decay == decay]) for decay in decays]
    found = [(decay, some) for decay, some in found if some]
    if len(found) == 1:
        return [Group("", found[0][1])]
    return [
        Group(f"weight decay {'not known' if decay is None else rate_text(decay)}", some)
        for decay, some in found
    ]


def metrics(tests: Sequence[RangeTest]) -> list[str]:
    """Validation metrics, the loss first."""
    found = {metric: None for test in tests for metric in test.validation}
    return sorted(found, key=lambda metric: metric != "loss")


def smoothed(tests: Sequence[RangeTest]) -> list[Curve]:
    """The smooth training losses, a little past divergence: further on they are cut off anyway."""
    found = []
    for test in tests:
        rates = np.array(test.lrs[: len(test.smoothed)])
        shown = rates <= PAST * (test.lr_diverged or math.inf)
        if shown.any():
            found.append(Curve(rates[shown], test.smoothed[shown]))
    return found


def validated(tests: Sequence[RangeTest], metric: str) -> list[Curve]:
    """The sweeps' finite validation results, where there are any."""
    found = []
    for test in tests:
        points = [
            (test.lrs[step - 1], value)
            for step, value in test.validation.get(metric, ())
            if value is not None and math.isfinite(value)
        ]
        if points:
            found.append(Curve(*np.array(points, dtype=np.float64).T))
    return found


def levels(curves: Sequence[Curve]) -> tuple[Array, Array]:
    """Common rates, and each curve's level there of shape (curves, rates), straight in log rate.

    A curve that has ended keeps its last level: what came after was no better. The rates end where
    half of the curves have.
    """
    low = max(curve.rates[0] for curve in curves)
    high = float(np.median([curve.rates[-1] for curve in curves]))
    rates = np.unique(np.concatenate([curve.rates for curve in curves]))
    rates = rates[(low <= rates) & (rates <= high)]
    if len(rates) > MOST_RATES:
        rates = np.geomspace(low, high, MOST_RATES)
    found = [np.interp(np.log(rates), np.log(curve.rates), curve.values) for curve in curves]
    return rates, np.array(found)


def rows(grouped: Sequence[Group], shown: Proposal) -> list[Row]:
    """The proposal, then the rules that found a rate in any sweep; nothing when none did."""
    tests = [(test, index) for index, group in enumerate(grouped) for test in group.tests]
    made = []
    for rule, (label, meaning) in RULES.items():
        found = [(test.rules.get(rule), index) for test, index in tests]
        ticks = [(rate, index) for rate, index in found if rate is not None]
        if ticks:
            made.append(_rule_row(label, meaning, ticks, len(tests)))
    return [_proposal_row(shown), *made] if made else []


def _proposal_row(shown: Proposal) -> Row:
    hover = f"<b>max_lr {rate_text(shown.centre)}</b><br>search {span(shown.low, shown.high)}"
    return Row("<b>max_lr</b>", hover, shown.centre, (shown.low, shown.high), [])


def _rule_row(label: str, meaning: str, ticks: list[tuple[float, int]], sweeps: int) -> Row:
    rates = [rate for rate, _ in ticks]
    middle = math.exp(float(np.median(np.log(rates))))
    hover = f"<b>{label} {rate_text(middle)}</b><br>{meaning}"
    if sweeps > 1:
        hover += f"<br>{span(min(rates), max(rates))} in {len(rates)} of {sweeps} sweeps"
    return Row(label, hover, middle, (min(rates), max(rates)), ticks if sweeps > 1 else [])


def span(low: float, high: float) -> str:
    """A range in words."""
    return f"{rate_text(low)} to {rate_text(high)}"


def interval(shown: Proposal) -> tuple[float, float] | None:
    """Where the proposal's centre is known to lie, if it says so."""
    return shown.interval if shown.reliable else None


def rate_range(tests: Sequence[RangeTest], shown: Proposal) -> tuple[float, float]:
    """Where anything was measured or is proposed, and a little more.

    A linear sweep's first rate, decades below its second, is left out.
    """
    firsts = [t.lrs[1] / 2 if t.lrs[1:] and t.lrs[1] > 5 * t.lrs[0] else t.lrs[0] for t in tests]
    lasts = [test.lrs[max(len(test.losses), 1) - 1] for test in tests]
    low, high = min(firsts), max([*lasts, shown.high, shown.lr_diverged or 0.0])
    room = (high / low) ** 0.02
    return low / room, high * room


def loss_range(tests: Sequence[RangeTest]) -> list[float] | None:
    """From the lowest loss to a little above the start: an explosion must not squash the curve."""
    trained = [np.array(test.losses[: len(test.smoothed)]) for test in tests]
    curves = [*trained, *(curve.values for curve in validated(tests, "loss"))]
    curves = [curve for curve in curves if len(curve)]
    if not curves:
        return None
    low = min(float(curve.min()) for curve in curves)
    starts = [[curve[0], np.median(curve[: max(3, len(curve) // 10)])] for curve in curves]
    top = float(np.max(starts))
    height = (top - low) or abs(top) or 1.0
    return [low - 0.08 * height, top + 0.45 * height]


def metric_range(tests: Sequence[RangeTest], metric: str) -> list[float] | None:
    """That of the values before divergence; beyond it, anything may come."""
    values: list[float] = []
    for test in tests:
        for curve in validated([test], metric):
            values += curve.values[curve.rates < (test.lr_diverged or math.inf)].tolist()
    if not values:
        return None
    margin = 0.1 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
    return [min(values) - margin, max(values) + margin]
