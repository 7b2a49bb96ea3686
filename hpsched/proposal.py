"""From range tests to a window for max_lr: what replicates say together, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from hpsched import lr_curve
from hpsched.errors import UsageError
from hpsched.lr_curve import Curve, RangeTest, Reading

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["Proposal", "pool"]

DRAWS = 200  # bootstrap replicates
INTERVAL = (0.05, 0.95)  # quantiles of the interval
BETWEEN = 0.04  # decades, spread of the centre between seeds that few replicates do not show
HORIZON_SPREAD = 0.2  # octaves per doubling: how much the horizon's slope differs between tasks
BELOW_EDGE = 2.0**8  # without a descent the window begins this factor below the edge
TELLING = 0.25  # a draw that gains less than this share of the whole says nothing of the centre
USELESS = 4.0  # octaves: a centre less certain than this is no proposal


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What the evidence says about max_lr: low < centre < high, all rates.

    Attributes:
        centre: Proposed max_lr.
        low, high: Window to search.
        interval: 90 % bootstrap interval of the centre over other seeds.
        lr_diverged: The lowest divergence edge among the replicates (None: none diverged).
        reliable: Whether the evidence is good enough; if not, the window is everything that was
            swept below divergence, and ``reason`` says why.
        reason: In words, with the remedy.
        missed: The side on which the sweeps' range missed the action; None: neither.
        replicates: Range tests that were pooled.
    """

    centre: float
    low: float
    high: float
    interval: tuple[float, float]
    lr_diverged: float | None
    reliable: bool
    reason: str
    missed: Literal["low", "high"] | None = None
    replicates: int = 1

    def moved(self, factor: float) -> Proposal:
        """All rates times ``factor``, but none past the divergence edge, which stays."""
        low, high = self.interval
        bottom = lr_curve.room(self.low * factor, self.lr_diverged)
        centre = lr_curve.below(self.centre * factor, bottom, self.lr_diverged)
        return replace(
            self,
            centre=centre,
            low=bottom,
            high=lr_curve.below(self.high * factor, centre, self.lr_diverged),
            interval=(low * factor, high * factor),
        )


def pool(tests: Sequence[RangeTest], total_steps: int | None = None) -> Proposal:
    """One window from replicates of a range test, which may differ in seed and weight decay.

    The replicates' gains are averaged over log rate and read as one curve: noise that no single
    sweep rises above averages out. The centre is what that curve suggests; it and the window do not
    pass the lowest divergence edge. Without a significant descent, with a range that missed it, or
    when the bootstrap interval of the centre spans more than four octaves, the result is not
    reliable and its window is everything that was swept below divergence.

    Args:
        tests: The replicates.
        total_steps: Optimizer steps of the training that max_lr is for. Default: the tests' own,
            or the sweep's.

    Raises:
        UsageError: no tests.
    """
    if not tests:
        raise UsageError("no range tests to pool: run one first")
    edge = min((t.lr_diverged for t in tests if t.lr_diverged is not None), default=None)
    reading = tests[0]._reading if len(tests) == 1 else lr_curve.read(tests)
    edge = edge if edge is not None else reading.diverged
    if not reading.reliable or reading.suggestion is None:
        return _fallback(tests, edge, reading.reason, reading.missed)
    interval = _bootstrap(reading)
    octaves = math.log2(interval[1] / interval[0])
    if octaves > USELESS:
        return _fallback(tests, edge, f"the replicates disagree by {octaves:.1f} octaves", None)
    steps = sum(len(test.lrs) for test in tests) / len(tests)
    horizon = total_steps or tests[0].total_steps
    moved = lr_curve.horizon(steps, horizon)
    centre = lr_curve.below(reading.suggestion, interval[0], edge) * moved
    longer = abs(math.log2((horizon or steps) / steps))
    wider = math.sqrt(interval[1] / interval[0]) * 2 ** (HORIZON_SPREAD * longer)
    low, high = lr_curve.window(centre, edge, wider)
    good = sum(test.reliable for test in tests)
    return Proposal(
        centre=centre,
        low=low,
        high=high,
        interval=(interval[0] * moved, interval[1] * moved),
        lr_diverged=edge,
        reliable=True,
        reason=f"{good} of {len(tests)} range tests reliable alone; other seeds would move the "
        f"centre within {octaves:.1f} octaves",
        replicates=len(tests),
    )


def _count(tests: Sequence[RangeTest]) -> str:
    return "1 range test gives" if len(tests) == 1 else f"{len(tests)} range tests give"


def _bootstrap(reading: Reading) -> tuple[float, float]:
    """Interval of the centroid: replicates drawn anew, each with new noise about its curve."""
    assert reading.curve is not None
    x, rng = reading.curve.x, np.random.default_rng(0)
    noisy = np.stack([_noisy(x, part, rng) for part in reading.parts])
    drawn = rng.integers(0, len(noisy), (len(noisy), DRAWS))
    gains = noisy[drawn, np.arange(DRAWS)].mean(axis=0)
    gains = gains[gains.max(axis=1) > TELLING * reading.curve.gain.max()]
    if len(gains) < DRAWS / 2:  # the replicates cancel each other out
        return float(10 ** x[0]), float(10 ** x[-1])
    centres = lr_curve.centroid(x, gains, (0, len(x) - 1))
    low, high = np.quantile(centres + BETWEEN * rng.standard_normal(len(centres)), INTERVAL)
    return float(10**low) * 2**-lr_curve.ABOVE, float(10**high) * 2**-lr_curve.ABOVE


def _noisy(x: Array, part: Curve, rng: np.random.Generator) -> Array:
    assert part.spread is not None
    noise = rng.standard_normal((DRAWS, len(part.x))) @ part.spread.T
    return np.stack([lr_curve.onto(x, part, part.gain + one) for one in noise])


def _fallback(
    tests: Sequence[RangeTest],
    edge: float | None,
    reason: str,
    missed: Literal["low", "high"] | None,
) -> Proposal:
    low = min(t.lrs[0] for t in tests)
    high = max(t.lrs[-1] for t in tests)
    if edge is not None:
        # Good rates were found up to 8 octaves below the edge, never further (docs/calibration.md).
        low, high = edge / BELOW_EDGE, min(high, lr_curve.EDGE * edge)
    if low >= high:
        low, high = low / lr_curve.WINDOW, low * lr_curve.WINDOW
    centre = math.sqrt(low * high) if edge is None else edge / 8
    where = "the sweep" if edge is None else "eight octaves below divergence"
    return Proposal(
        centre=centre,
        low=low,
        high=high,
        interval=(low, high),
        lr_diverged=edge,
        reliable=False,
        reason=f"{_count(tests)} no proposal, so the window is {where}: {reason}",
        missed=missed,
        replicates=len(tests),
    )
