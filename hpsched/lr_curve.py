"""Reading a learning-rate range test: where the loss falls fastest, is lowest, and blows up.

The range test (L. N. Smith, "Cyclical Learning Rates for Training Neural Networks",
arXiv:1506.01186, section 3.3; "A disciplined approach ...", arXiv:1803.09820, section 4.1) raises
the rate from far too small to far too large in one short run and reads a good rate off the loss.
The rules here differ from fastai's, Lightning's and torch-lr-finder's on purpose: their
exponential averages lag by 1.5 to 2.7 decades, their slopes are per step rather than per log rate,
and their ratio stop rules fail for losses near zero or below. Nothing here depends on the loss's
zero or unit: adding a constant to every loss, or scaling them all, changes no rate.

=============  ==========  =================================================================
symbol         shape       meaning (unit)
=============  ==========  =================================================================
``n``          ()          losses before the first non-finite one
``lrs``        (n,)        learning rates of the sweep, increasing
``x``          (n,)        log10 of the rates (decades)
``y``          (n,)        losses, single outliers and the explosion taken off (loss)
``s``          (n,)        smoothed loss (loss)
``slope``      (n,)        d s / d x (loss per decade)
``gain``       (n,)        standard error of ``s`` over that of one loss (1)
``free``       (n,)        standard deviation of a residual over that of one loss (1)
``start``      ()          level of the loss before it falls (loss)
``drop``       ()          start - min s, what the sweep gained at best (loss)
``noise``      ()          standard deviation of one loss about ``s`` (loss)
``h``          (n,)        width of the smoothing kernel, one sigma (decades)
``d``          (n, n)      distance x[j] - x[i] (decades)
``w``          (n, n)      kernel weight of loss j for the curve at i (1)
=============  ==========  =================================================================
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from hpsched.errors import UsageError

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["Proposal", "RangeTest", "collapsed", "exploded", "pool", "should_stop"]

MIN_POINTS = 10  # fewer losses than this show no curve
LEVEL_BANDWIDTH = 0.1  # decades, kernel for the level: moves a sharp minimum by <= 0.1 decade
SLOPE_BANDWIDTH = 0.2  # decades, kernel for the slope: a derivative needs more averaging
LOST = 0.1  # the gain counts as lost when less than this share of the drop is left
WINDOW = 4.0  # the window is centre / WINDOW .. centre * WINDOW
EDGE = 0.8  # the window ends at this share of the divergence edge at most
SIGNIFICANT = 6.0  # standard errors that a descent must have
ONSET = 0.3  # decades of plateau that a sweep must show before the loss falls
_MAD = 1.4826  # median absolute deviation -> standard deviation, for a normal distribution
_MEDIAN_SE = 1.2533  # standard error of a median over that of a mean, sqrt(pi / 2)
_ROUNDING = 1e-7  # differences below this share of the loss are float32 rounding, not signal


# ------------------------------------------------------------------ records


@dataclass(frozen=True, kw_only=True, repr=False)
class RangeTest:
    """One learning-rate sweep: the raw curve, and what it says.

    Args:
        lrs: learning rates, positive and increasing; may go on past the losses when the sweep
            was stopped early (the planned rates).
        losses: raw losses, one per step that was run; a non-finite one ends the curve.
        weight_decay: of this replicate.
        momentum: of this replicate (beta1 for the Adam family).
        seed: of this replicate.
        optimizer: name of its class.
        seconds: wall-clock time of the sweep.

    Raises:
        UsageError: rates that are not positive and increasing, or fewer rates than losses.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    weight_decay: float | None = None
    momentum: float | None = None
    seed: int | None = None
    optimizer: str | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Take lists (JSON) and arrays too; the record holds tuples of floats, and hashes."""
        object.__setattr__(self, "lrs", tuple(float(lr) for lr in self.lrs))
        object.__setattr__(self, "losses", tuple(float(loss) for loss in self.losses))
        _check_rates(self.lrs, len(self.losses))

    @cached_property
    def _reading(self) -> _Reading:
        return _read(self.lrs, self.losses)

    @property
    def smoothed(self) -> Array:
        """Zero-lag smoothed loss at each rate before the first non-finite loss.

        It levels off one drop above the start, where the raw loss may go on to 1e30.
        """
        return self._reading.smoothed

    @property
    def lr_steepest(self) -> float | None:
        """Rate at which the loss falls fastest per log rate, before its minimum; None: no fall."""
        return self._reading.steepest

    @property
    def lr_minimum(self) -> float | None:
        """Rate of the lowest smoothed loss before divergence; None: the loss never fell."""
        return self._reading.minimum

    @property
    def lr_diverged(self) -> float | None:
        """Lowest rate at which all gain was lost again or the loss was non-finite; None: never."""
        return self._reading.diverged

    @property
    def reliable(self) -> bool:
        """Whether the curve shows a plateau, a significant fall, and an end of the fall."""
        return self._reading.reliable

    @property
    def reason(self) -> str:
        """Why the curve is reliable or not, with the remedy."""
        return self._reading.reason

    @property
    def suggestion(self) -> float | None:
        """Proposed max_lr: geometric mean of lr_steepest and lr_minimum; None when unreliable."""
        steepest, minimum = self.lr_steepest, self.lr_minimum
        if not self.reliable or steepest is None or minimum is None:
            return None
        return math.sqrt(steepest * minimum)

    @property
    def window(self) -> tuple[float, float] | None:
        """Range for max_lr: suggestion / 4 to x 4, below lr_diverged; None when unreliable.

        Where steepest and minimum lie more than 16-fold apart, it reaches from one to the other.
        """
        if (centre := self.suggestion) is None:
            return None
        return centre / self._reach, _below(centre * self._reach, centre, self.lr_diverged)

    @property
    def _reach(self) -> float:
        """Factor from the suggestion to either end of the window, before the cut."""
        return max(WINDOW, math.sqrt((self.lr_minimum or 1.0) / (self.lr_steepest or 1.0)))

    def __repr__(self) -> str:
        at = "nothing" if self.suggestion is None else f"{self.suggestion:.3g}"
        return f"<RangeTest of {len(self.losses)} steps suggests {at}: {self.reason}>"

    def figure(self) -> go.Figure:
        """Draw the raw and smoothed curve with the rules' rates (needs plotly)."""
        from hpsched.range_test_figure import range_test_figure

        return range_test_figure([self], None)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What replicates of a range test say together: low < centre < high, all rates.

    ``lr_diverged`` is the lowest edge among the replicates (None: none diverged). When ``reliable``
    is False the window is everything that was swept below divergence, and ``reason`` says why.
    """

    centre: float
    low: float
    high: float
    lr_diverged: float | None
    reliable: bool
    reason: str
    replicates: int


def _check_rates(lrs: tuple[float, ...], losses: int) -> None:
    if not lrs or len(lrs) < losses:
        raise UsageError(
            f"a range test of {len(lrs)} rates and {losses} losses: pass the rate of every loss"
        )
    if not all(0 < lr < math.inf for lr in lrs):
        raise UsageError(
            f"range-test rates must be positive and finite, not {min(lrs)}..{max(lrs)}"
        )
    if any(b <= a for a, b in itertools.pairwise(lrs)):
        raise UsageError("range-test rates must increase from step to step: sweep low to high")


# ------------------------------------------------------------------ one curve


class _Reading(NamedTuple):
    """What one curve says; the rates are None where the curve does not show them."""

    smoothed: Array
    reliable: bool
    reason: str
    steepest: float | None = None
    minimum: float | None = None
    diverged: float | None = None


class _Smooth(NamedTuple):
    """A smoothed curve: level, slope, and the noise that is left in the level and in raw - s."""

    s: Array
    slope: Array
    gain: Array
    free: Array


class _Descent(NamedTuple):
    """Indices into the curve: onset of the fall, lowest point, last one with any gain left."""

    onset: int
    minimum: int
    last: int


def _read(lrs: tuple[float, ...], losses: tuple[float, ...]) -> _Reading:
    raw = _finite(losses)
    n = len(raw)
    broke = lrs[n] if 0 < n < len(losses) else None  # the rate of the first non-finite loss
    if n < MIN_POINTS:
        return _Reading(raw.copy(), False, _too_short(n, len(losses)), diverged=broke)
    x = np.log10(np.asarray(lrs[:n]))
    start, curve = _levelled(x, raw)
    descent = _descent(curve.s, start)
    noise = _noise(raw, curve, start, descent.onset)
    if not _significant(curve, descent, start, noise):
        diverged = _rise(x, raw, start, noise) or broke
        return _Reading(curve.s, False, _no_descent(diverged), diverged=diverged)
    steepest = _steepest(x, raw, descent, start)
    diverged = _crossing(x, curve.s, descent, start) or broke
    reason = _doubt(x, curve, descent, start, noise, diverged)
    return _Reading(
        curve.s,
        not reason,
        reason or "the loss falls from a plateau to a minimum and rises again",
        steepest=float(lrs[steepest]),
        minimum=float(lrs[descent.minimum]),
        diverged=diverged,
    )


def _finite(losses: Sequence[float]) -> Array:
    """Return the losses before the first non-finite one."""
    y = np.asarray(losses, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(y))
    return y[: bad[0]] if len(bad) else y


def _levelled(x: Array, raw: Array) -> tuple[float, _Smooth]:
    """Start level and smooth curve; the level is refined by the plateau that the curve shows."""
    y = _running_median(raw, 3)
    weights = _kernel(x, LEVEL_BANDWIDTH)
    start = float(np.median(raw[: max(3, len(raw) // 20)]))
    for _ in range(2):
        curve = _apply(weights, np.minimum(y, _cap(y, start)))
        onset = _descent(curve.s, start).onset
        start = float(np.median(raw[: max(3, len(raw) // 20, onset)]))
    return start, curve


def _cap(y: Array, start: float) -> float:
    """Level at which an explosion is cut, so that it does not leak into the curve before it.

    As far above the start as the minimum is below: a jump from the minimum then crosses the start
    level, after symmetric smoothing, where it happened.
    """
    return start + max(start - float(y.min()), 10 * _jitter(y))


def _running_median(y: Array, width: int) -> Array:
    """Median of each loss and its neighbours, which rids the curve of single outliers.

    Within width // 2 of an end it is that of the first or last ``width`` losses.
    """
    inner = np.median(sliding_window_view(y, width), axis=1)
    return np.pad(inner, width // 2, mode="edge")


def _kernel(x: Array, bandwidth: float) -> tuple[Array, Array]:
    """Weights (n, n) of level and slope of a local straight line, Gaussian kernel in log rate.

    Local-linear regression has no lag, and no first-order bias at the ends either (Fan & Gijbels,
    "Local Polynomial Modelling and Its Applications", 1996, section 3.2).
    """
    d = x[None, :] - x[:, None]
    # A coarse or linear sweep has few rates per decade: let the kernel reach two neighbours.
    h = np.maximum(bandwidth, np.sort(np.abs(d), axis=1)[:, 2])[:, None]
    w = np.exp(-0.5 * (d / h) ** 2)
    s0, s1, s2 = ((w * d**k).sum(axis=1, keepdims=True) for k in range(3))
    det = s0 * s2 - s1**2
    return w * (s2 - s1 * d) / det, w * (s0 * d - s1) / det


def _apply(weights: tuple[Array, Array], y: Array) -> _Smooth:
    level, slope = weights
    # Weights sum to one (level) and zero (slope): taking y[0] off loses no digits to a big offset.
    z = y - y[0]
    own, square = np.diagonal(level), (level**2).sum(axis=1)
    # The variance of a residual about a linear smoother, over that of one loss.
    free = np.sqrt(np.maximum(1 - 2 * own + square, 0.05))
    return _Smooth(y[0] + level @ z, slope @ z, np.sqrt(square), free)


def _jitter(y: Array) -> float:
    """Noise of one loss from differences of neighbours; holds when half the curve explodes."""
    return float(_MAD * np.median(np.abs(np.diff(y)))) / math.sqrt(2) if len(y) > 1 else 0.0


def _noise(raw: Array, curve: _Smooth, start: float, onset: int) -> float:
    """Noise of one loss about the curve, over the part where the gain is not lost."""
    part = np.abs(raw - curve.s) / curve.free
    calm = part[raw <= _cap(raw, start)]
    plateau = part[: max(5, onset)]  # where the start level comes from, and may be noisier
    return _MAD * max(float(np.median(calm)), float(np.median(plateau)))


def _descent(s: Array, start: float) -> _Descent:
    """Find the first stretch below the start that is at least half as deep as the deepest."""
    depth = start - s
    below = depth > LOST * max(float(depth.max()), 0.0)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], below, [False]]).astype(int)))
    stretches = [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    for a, b in stretches:
        if depth[a:b].max() >= 0.5 * depth.max():
            return _Descent(a, a + int(np.argmax(depth[a:b])), b - 1)
    return _Descent(0, int(np.argmin(s)), len(s) - 1)


def _significant(curve: _Smooth, descent: _Descent, start: float, noise: float) -> bool:
    """Whether the drop is beyond what noise makes of the lowest of n smoothed losses."""
    drop = start - float(curve.s[descent.minimum])
    plateau = max(3, descent.onset)
    error = noise * math.hypot(float(curve.gain[descent.minimum]), _MEDIAN_SE / math.sqrt(plateau))
    return drop > max(SIGNIFICANT * error, _ROUNDING * abs(start))


def _steepest(x: Array, raw: Array, descent: _Descent, start: float) -> int:
    """Index of the steepest fall per decade between the fall's onset and its minimum."""
    y = np.minimum(_running_median(raw, 3), start)  # whatever rises above the start is no descent
    slope = _apply(_kernel(x, SLOPE_BANDWIDTH), y).slope
    return descent.onset + int(np.argmin(slope[descent.onset : descent.minimum + 1]))


def _crossing(x: Array, s: Array, descent: _Descent, start: float) -> float | None:
    """Rate at which the smoothed loss comes back to the start level after the minimum."""
    if descent.last + 1 >= len(s):
        return None
    level = start - LOST * (start - float(s[descent.minimum]))
    a, b = descent.last, descent.last + 1
    t = min(max((level - s[a]) / (s[b] - s[a]), 0.0), 1.0)
    return float(10 ** (x[a] + t * (x[b] - x[a])))


def _rise(x: Array, raw: Array, start: float, noise: float) -> float | None:
    """Rate at which a loss that never fell rises (by medians of five, which do not leak ahead)."""
    bound = start + max(SIGNIFICANT * noise, _ROUNDING * abs(start))
    above = np.flatnonzero(_running_median(raw, 5) > bound)
    return float(10 ** x[above[0]]) if len(above) else None


# ------------------------------------------------------------------ reasons


def _too_short(n: int, run: int) -> str:
    if n == 0 and run:
        return (
            "the first loss is not finite, before any rate was applied: check the data, the "
            "initialisation and the precision"
        )
    cause = (
        "before the loss became non-finite: lower start_lr"
        if n < run
        else ": use more steps (num_iter)"
    )
    return f"only {n} losses (a curve needs {MIN_POINTS}) {cause}".replace(" :", ":")


def _no_descent(diverged: float | None) -> str:
    if diverged is not None:
        return (
            f"the loss never falls significantly before it diverges at {diverged:.3g}: "
            "lower start_lr, or use more steps (num_iter) or a larger batch"
        )
    return (
        "the loss never falls significantly (flat, or only noise): check that the optimizer "
        "steps the model, raise end_lr, or use more steps (num_iter) or a larger batch"
    )


def _doubt(
    x: Array, curve: _Smooth, descent: _Descent, start: float, noise: float, diverged: float | None
) -> str:
    """Return why a significant descent is no evidence yet, or an empty string."""
    if x[descent.onset] - x[0] < ONSET:
        return (
            "the loss falls from the first rate on (starts too high): "
            f"lower start_lr from {10 ** x[0]:.3g}"
        )
    s, low = curve.s, descent.minimum
    error = 3 * noise * float(curve.gain[low])
    if diverged is None and s[low:].max() - s[low] <= max(error, LOST * (start - s[low])):
        return (
            "the loss still falls at the last rate (ends too low): "
            f"raise end_lr from {10 ** x[-1]:.3g}"
        )
    return ""


# ------------------------------------------------------------------ replicates


def pool(tests: Sequence[RangeTest]) -> Proposal:
    """Make one window of replicates: median centre, widened by disagreement, cut at the edge.

    The centre is the median of the reliable replicates' suggestions in log rate. The window spans
    centre / 4 to centre * 4 (or as far as their own windows reach, in the median) and, where the
    replicates disagree, a factor 2 past the 10 % and 90 % quantiles of their suggestions. Without
    a reliable replicate the window is everything that was swept below the lowest divergence edge.

    Raises:
        UsageError: no tests.
    """
    if not tests:
        raise UsageError("no range tests to pool: run one first")
    edge = min((t.lr_diverged for t in tests if t.lr_diverged is not None), default=None)
    reliable = [t for t in tests if t.reliable]
    centres = [t.suggestion for t in reliable if t.suggestion is not None]
    if not centres:
        return _fallback(tests, edge)
    logs = np.log(centres)
    centre = _below(float(np.exp(np.median(logs))), min(centres), edge)
    reach = float(np.exp(np.median(np.log([t._reach for t in reliable]))))
    q10, q90 = (float(q) for q in np.exp(np.quantile(logs, [0.1, 0.9])))
    return Proposal(
        centre=centre,
        low=min(centre / reach, q10 / 2),
        high=_below(max(centre * reach, q90 * 2), centre, edge),
        lr_diverged=edge,
        reliable=True,
        reason=f"{len(centres)} of {len(tests)} replicates reliable, {_spread(centres)}",
        replicates=len(tests),
    )


def _spread(centres: list[float]) -> str:
    octaves = math.log2(max(centres) / min(centres))
    return f"their suggestions within {octaves:.1f} octaves" if len(centres) > 1 else "no spread"


def _fallback(tests: Sequence[RangeTest], edge: float | None) -> Proposal:
    low = min(t.lrs[0] for t in tests)
    high = max(t.lrs[-1] for t in tests)
    if edge is not None:
        low, high = min(low, edge / WINDOW**2), min(high, EDGE * edge)
    if low >= high:
        low, high = low / WINDOW, low * WINDOW
    # Three octaves below divergence rather than the middle of a sweep of decades.
    centre = math.sqrt(low * high) if edge is None else max(edge / 8, math.sqrt(low * edge / 8))
    reasons = "; ".join(dict.fromkeys(t.reason for t in tests))
    return Proposal(
        centre=centre,
        low=low,
        high=high,
        lr_diverged=edge,
        reliable=False,
        reason=f"none of {len(tests)} replicates reliable, so the window is the sweep: {reasons}",
        replicates=len(tests),
    )


def _below(lr: float, floor: float, edge: float | None) -> float:
    """Cut ``lr`` to stay below the divergence edge and above ``floor`` (which is below it)."""
    if edge is None:
        return lr
    return min(lr, max(EDGE * edge, math.sqrt(floor * edge)))


# ------------------------------------------------------------------ online rules


def should_stop(losses: Sequence[float]) -> bool:
    """Whether a sweep in progress has seen enough: call it with all losses so far.

    True on a non-finite loss, and when the median of five successive losses lies as far above the
    start as the best lay below it (at least eight times the noise). Only differences
    count, not the loss's zero, unlike in fastai's and Lightning's "loss > 4 x best". O(n).
    """
    y = _finite(losses)
    if len(y) < len(losses):
        return True
    if len(y) < MIN_POINTS:
        return False
    start = float(np.median(y[:MIN_POINTS]))
    smooth = _running_median(y, 5)
    gain = np.maximum(start - np.minimum.accumulate(smooth), 0.0)
    margin = np.maximum(gain, max(8 * _jitter(y), _ROUNDING * abs(start)))
    return bool((smooth > start + margin).any())


def exploded(losses: Sequence[float], every: int = 1) -> str | None:
    """Why an ordinary training run is beyond hope, or None: call it with all losses so far.

    ``every`` is the number of steps between two losses, for the step that the reason names.

    A non-finite loss is the end. Otherwise the medians of the last ten losses and of the ten before
    must both lie above the start by more than 5 x the best gain so far, 50 x the noise and 3 x
    the start's own size: a false alarm costs a run, a missed one only time. O(n).
    """
    y = _finite(losses)
    if len(y) < len(losses):
        step = len(y) * every
        return f"the loss became {float(losses[len(y)])} at step {step}: lower max_lr"
    if len(y) < 3 * MIN_POINTS:
        return None
    start = min(float(y[0]), float(np.median(y[:5])))  # it may explode within five steps
    before, last = (float(np.median(part)) for part in (y[-20:-10], y[-10:]))
    gain = start - float(_running_median(y, 3).min())
    calm = max(_jitter(y), _jitter(y[:MIN_POINTS]))
    if min(before, last) - start <= max(5 * gain, 50 * calm, 3 * abs(start)):
        return None
    return (
        f"the loss exploded: it is {last:.4g} at step {(len(y) - 1) * every}, in the beginning "
        f"{start:.4g}: lower max_lr"
    )


def collapsed(losses: Sequence[float]) -> str | None:
    """Why a finished run has learned nothing, or None: call it with all losses.

    It fell significantly (by eight times the noise) and ended with 90 % of the gain lost again,
    after the rate had annealed: a network that died at a high rate sits at the loss of chance,
    finite and flat, where :func:`exploded` sees nothing. O(n).
    """
    y = _finite(losses)
    if len(y) < 3 * MIN_POINTS:
        return None
    start = float(np.median(y[:5]))
    end = float(np.median(y[-max(MIN_POINTS, len(y) // 10) :]))
    gain = start - float(_running_median(y, 5).min())
    if gain <= max(8 * _jitter(y), _ROUNDING * abs(start)) or end < start - LOST * gain:
        return None
    return (
        f"the loss fell from {start:.4g} to {start - gain:.4g} and ended at {end:.4g}: the model "
        "died on the way, lower max_lr"
    )
