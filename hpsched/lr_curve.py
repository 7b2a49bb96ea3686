"""Reading a learning-rate range test: where the loss falls fastest, is lowest, and blows up.

The range test (L. N. Smith, "Cyclical Learning Rates for Training Neural Networks",
arXiv:1506.01186, section 3.3; "A disciplined approach ...", arXiv:1803.09820, section 4.1) raises
the rate from far too small to far too large in one short run and reads a good rate off the loss.
The rules here differ from fastai's, Lightning's and torch-lr-finder's on purpose: their
exponential averages lag by 1.5 to 2.7 decades, their slopes are per step rather than per log rate,
and their ratio stop rules fail for losses near zero or below. Nothing here depends on the loss's
zero or unit: adding a constant to every loss, or scaling them all, changes no rate.

One sweep and several replicates are read alike: the curves are averaged, then read once.

=============  ==========  =================================================================
symbol         shape       meaning (unit)
=============  ==========  =================================================================
``n``          ()          losses before the first non-finite one
``lrs``        (n,)        learning rates of the sweep, increasing
``x``          (n,)        log10 of the rates (decades)
``y``          (n,)        losses, single outliers and the explosion taken off (loss)
``s``          (n,)        smoothed loss (loss)
``start``      ()          level of the loss before it falls (loss)
``gain``       (n,)        start - s, what the sweep has gained at each rate (loss)
``noise``      (n,)        standard deviation of one loss about ``s`` (loss)
``error``      (n,)        standard error of the gain (loss)
``slope``      (n,)        d s / d x (loss per decade)
``h``          (n,)        width of the smoothing kernel, one sigma (decades)
``d``          (n, n)      distance x[j] - x[i] (decades)
``w``          (n, n)      kernel weight of loss j for the curve at i (1)
=============  ==========  =================================================================
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from hpsched.divergence import (
    LOST,
    MAD,
    MIN_POINTS,
    ROUNDING,
    finite,
    jitter,
    median,
    running_median,
    should_stop,
)
from hpsched.errors import UsageError

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["RangeTest", "read"]

# decades, kernels for the level: the first moves a sharp minimum by at most 0.1 decade
LEVEL_BANDWIDTHS = (0.1, 0.2, 0.4)
#: Where people set it: an option of the finder, and of a study's recipes.
MORE_STEPS = "more steps (num_iter; in a study, suggest_onecycle's range_test={'num_iter': …})"
NOISE_BANDWIDTH = 0.4  # decades, kernel for the noise
SLOPE_BANDWIDTH = 0.2  # decades, kernel for the slope: a derivative needs more averaging
#: The best max_lr falls by this many octaves as training gets twice as long (docs/calibration.md).
HORIZON = -0.15
ABOVE = 0.6  # octaves: the centroid lies this far above the best max_lr of whole cycles
UPPER = 0.5  # the centroid weighs what was gained beyond this share of the best
WINDOW = 4.0  # the window is centre / WINDOW .. centre * WINDOW
EDGE = 0.8  # the window ends at this share of the divergence edge at most
SIGNIFICANT = 6.0  # standard errors that a descent must have
EVEN = 0.1  # slopes this close, in drops per decade, count as equal (slide rule)
ONSET = 0.3  # decades of plateau that a sweep must show before the loss falls
_MEDIAN_SE = 1.2533  # standard error of a median over that of a mean, sqrt(pi / 2)


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
        total_steps: optimizer steps of the training that max_lr is for; the suggestion is moved
            from the sweep's length to it. Default: the sweep's.
        validation: metric → (step, value) pairs, for sweeps that validated; step counts from 1,
            so ``lrs[step - 1]`` is the rate of the update before it. ``loss`` is to be minimised.

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
    total_steps: int | None = None
    validation: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Take lists (JSON) and arrays too; the record holds tuples of floats, and hashes."""
        object.__setattr__(self, "lrs", tuple(float(lr) for lr in self.lrs))
        object.__setattr__(self, "losses", tuple(float(loss) for loss in self.losses))
        _check_rates(self.lrs, len(self.losses))

    @cached_property
    def _reading(self) -> Reading:
        return read([self])

    @property
    def smoothed(self) -> Array:
        """Zero-lag smoothed loss at each rate before the first non-finite loss.

        It levels off one drop above the start, where the raw loss may go on to 1e30.
        """
        curve = self._reading.curve
        return finite(self.losses) if curve is None else curve.start - curve.gain

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
    def missed(self) -> Literal["low", "high"] | None:
        """The side on which the sweep's range missed the action: extend it there. None: neither."""
        return self._reading.missed

    @property
    def suggestion(self) -> float | None:
        """Proposed max_lr: a little below the centroid of the gain in log rate; None if unreliable.

        The centroid is the mean of all rates at which the sweep gained more than half of its best,
        each weighted by what it gained beyond that half. A sweep likes rates 0.6 octaves higher
        than whole cycles do, and longer training lower ones (docs/calibration.md).
        """
        centre = self._reading.suggestion if self.reliable else None
        return None if centre is None else centre * horizon(len(self.lrs), self.total_steps)

    @property
    def window(self) -> tuple[float, float] | None:
        """Range for max_lr around the suggestion, below lr_diverged; None when unreliable."""
        if (centre := self.suggestion) is None:
            return None
        return window(centre, self.lr_diverged)

    @property
    def rules(self) -> dict[str, float | None]:
        """What each common rule would choose on the smoothed curve; None where it finds nothing.

        =================== ==============================================================
        rule                rate
        =================== ==============================================================
        ``suggestion``      ours: 0.6 octaves below the centroid of the gain
        ``geometric_mean``  of the next two
        ``steepest``        steepest fall per log rate (torch-lr-finder's and Lightning's idea)
        ``minimum``         lowest loss before divergence
        ``minimum_tenth``   a tenth of that (fastai's ``minimum``)
        ``valley``          middle of the descent in log rate (fastai's ``valley``)
        ``slide``           first below divergence from which the slope over an interval of a
                            decade is even (fastai's ``slide``)
        ``max_stable``      highest at which half of what was gained is kept (Smith's maximum
                            rate, arXiv:1506.01186 section 3.3)
        =================== ==============================================================
        """
        steepest, minimum = self.lr_steepest, self.lr_minimum
        return {
            "suggestion": self.suggestion,
            "geometric_mean": math.sqrt(steepest * minimum) if steepest and minimum else None,
            "steepest": steepest,
            "minimum": minimum,
            "minimum_tenth": None if minimum is None else minimum / 10,
            "valley": self._reading.valley,
            "slide": self._reading.slide,
            "max_stable": self._reading.stable,
        }

    @property
    def validated(self) -> RangeTest | None:
        """The same sweep read on its validation loss; None when that was not measured."""
        points = self.validation.get("loss", ())
        if not points:
            return None
        return replace(
            self,
            lrs=tuple(self.lrs[step - 1] for step, _ in points),
            losses=tuple(value for _, value in points),
            validation={},
        )

    def __repr__(self) -> str:
        at = "nothing" if self.suggestion is None else f"{self.suggestion:.3g}"
        return f"<RangeTest of {len(self.losses)} steps suggests {at}: {self.reason}>"

    def figure(self) -> go.Figure:
        """Draw the raw and smoothed curve with the rules' rates (needs plotly)."""
        from hpsched.range_test_figure import range_test_figure

        return range_test_figure([self], None)

    def _repr_html_(self) -> str:
        """In a notebook: a table and the curve; :meth:`figure` is the interactive one."""
        from hpsched.notebook import range_test_html

        return range_test_html(self)


def horizon(steps: float, total_steps: int | None) -> float:
    """Factor from the best rate for ``steps`` optimizer steps to that for ``total_steps``."""
    return 1.0 if total_steps is None else float((total_steps / steps) ** HORIZON)


def window(centre: float, edge: float | None, wider: float = 1.0) -> tuple[float, float]:
    """Two octaves to either side of the centre, ``wider`` at both ends, cut below the edge."""
    return centre / WINDOW / wider, below(centre * WINDOW * wider, centre, edge)


def room(low: float, edge: float | None) -> float:
    """Cut the lower end of a window to leave at least an octave below the edge."""
    return low if edge is None else min(low, EDGE * edge / 2)


def below(lr: float, floor: float, edge: float | None) -> float:
    """Cut ``lr`` to stay below the divergence edge and above ``floor`` (which is below it)."""
    if edge is None:
        return lr
    return min(lr, max(EDGE * edge, math.sqrt(floor * edge)))


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


class Curve(NamedTuple):
    """A sweep, smoothed, or several of them averaged; arrays of one length.

    ``x``, ``gain``, ``error`` and ``slope`` are as in the module's table. ``extent`` is log10 of
    the first and last planned rate, ``broke`` the rate of the first non-finite loss. White noise
    (n,) times ``spread.T`` is the noise of the gain; averages have none.
    """

    x: Array
    gain: Array
    error: Array
    slope: Array
    start: float
    extent: tuple[float, float]
    broke: float | None
    spread: Array | None = None


class Reading(NamedTuple):
    """What a curve says; a rate is None where the curve does not show it.

    ``missed`` says to which side the sweep must be extended: ``low``, ``high`` or None. ``curve``
    is what was read, ``parts`` the curves that it is the average of.
    """

    reliable: bool
    reason: str
    missed: Literal["low", "high"] | None = None
    centroid: float | None = None
    steepest: float | None = None
    minimum: float | None = None
    diverged: float | None = None
    valley: float | None = None
    slide: float | None = None
    stable: float | None = None
    curve: Curve | None = None
    parts: tuple[Curve, ...] = ()

    @property
    def suggestion(self) -> float | None:
        """The centroid, moved to where whole cycles are best."""
        return None if self.centroid is None else self.centroid * 2**-ABOVE


class _Descent(NamedTuple):
    """Indices into the curve: onset of the fall, lowest point, last one with any gain left."""

    onset: int
    minimum: int
    last: int


def read(tests: Sequence[RangeTest]) -> Reading:
    """Average the tests' curves and read the result; no curve where none has enough losses.

    The least smoothing that shows a significant descent is used: a clear curve keeps its features
    where they are, and a noisy one is not given up before it has been averaged more.
    """
    losses = [finite(test.losses) for test in tests]
    long = [(t, raw) for t, raw in zip(tests, losses, strict=True) if len(raw) >= MIN_POINTS]
    if not long:
        shortest = min(range(len(tests)), key=lambda i: len(losses[i]))
        n, run = len(losses[shortest]), len(tests[shortest].losses)
        return Reading(False, _too_short(n, run), diverged=_broke(tests[shortest], n))
    for bandwidth in LEVEL_BANDWIDTHS:
        parts = tuple(_smooth(test, raw, bandwidth) for test, raw in long)
        curve = average(parts)
        descent = _descent(curve.gain)
        if _significant(curve, descent):
            return _read_descent(curve, parts, descent)
    diverged = min(filter(None, (_rise(test, raw) for test, raw in long)), default=None)
    missed, reason = _no_descent(long[0][0].lrs, diverged)
    return Reading(False, reason, missed, diverged=diverged, curve=curve, parts=parts)


def _read_descent(curve: Curve, parts: tuple[Curve, ...], descent: _Descent) -> Reading:
    x, gain = curve.x, curve.gain
    steepest = descent.onset + int(np.argmin(curve.slope[descent.onset : descent.minimum + 1]))
    diverged = _crossing(x, gain, descent, LOST) or curve.broke
    missed, reason = _doubt(curve, descent, diverged)
    return Reading(
        reliable=missed is None,
        reason=reason,
        missed=missed,
        centroid=float(10 ** centroid(x, gain, (descent.onset, descent.last))),
        steepest=float(10 ** x[steepest]),
        minimum=float(10 ** x[descent.minimum]),
        diverged=diverged,
        valley=float(10 ** (0.5 * (x[descent.onset] + x[descent.minimum]))),
        slide=_slide(curve, descent),
        stable=_crossing(x, gain, descent, 0.5) or curve.broke,
        curve=curve,
        parts=parts,
    )


def centroid(x: Array, gain: Array, basin: tuple[int, int]) -> Array:
    """Centre of mass, in log10 rate, of the upper part of the gain: shape (…) for gain (…, n).

    The weight of a rate is what it gained beyond the share ``UPPER`` of the best: all good rates
    vote, so that the answer hangs neither on one lowest point nor on one steepest.
    """
    inside = np.zeros(len(x))
    inside[basin[0] : basin[1] + 1] = np.gradient(x)[basin[0] : basin[1] + 1]
    top = np.where(inside > 0, gain, -np.inf).max(axis=-1, keepdims=True)
    weight = np.maximum(gain - UPPER * top, 0) * inside
    return np.asarray((weight * x).sum(axis=-1) / weight.sum(axis=-1))


def average(curves: Sequence[Curve]) -> Curve:
    """The mean of the curves, on all their rates.

    A curve that ended early has diverged there: what it gained counts as lost beyond its end.
    """
    if len(curves) == 1:
        return curves[0]
    x = np.unique(np.concatenate([curve.x for curve in curves]).round(9))
    covers = [(curve.extent[0] - 1e-9 <= x) & (x <= curve.extent[1] + 1e-9) for curve in curves]
    weight = np.stack(covers) / np.maximum(np.sum(covers, axis=0), 1)
    gain = [onto(x, curve, curve.gain) for curve in curves]
    error = [np.interp(x, curve.x, curve.error) for curve in curves]
    slope = [np.interp(x, curve.x, curve.slope) for curve in curves]
    return Curve(
        x=x,
        gain=(weight * gain).sum(axis=0),
        error=np.sqrt(((weight * error) ** 2).sum(axis=0)),
        slope=(weight * slope).sum(axis=0),
        start=float(np.mean([curve.start for curve in curves])),
        extent=(min(c.extent[0] for c in curves), max(c.extent[1] for c in curves)),
        broke=min((c.broke for c in curves if c.broke is not None), default=None),
    )


def onto(x: Array, curve: Curve, gain: Array) -> Array:
    """``gain``, along the curve's rates, at the rates ``x``; all is lost beyond an early end."""
    return np.interp(x, curve.x, gain, right=-float(curve.gain.max()))


def _smooth(test: RangeTest, raw: Array, bandwidth: float) -> Curve:
    """Smooth one sweep; its start level is refined by the plateau that the curve shows."""
    x = np.log10(np.asarray(test.lrs[: len(raw)]))
    y = running_median(raw, 3)
    level, tilt = _kernel(x, bandwidth)
    head = max(3, int((x <= x[0] + 0.1 * (x[-1] - x[0])).sum()))
    start = median(raw[:head])
    for _ in range(2):
        calm = np.minimum(y, _cap(y, start))
        # A line through an explosion must not run below everything that was measured.
        s = np.clip(_apply(level, calm), calm.min(), calm.max())
        onset = _descent(start - s).onset
        plateau = max(3, onset) if onset < head else onset
        start = median(raw[:plateau])
    own, square = np.diagonal(level), (level**2).sum(axis=1)
    # The standard deviation of a residual about a linear smoother, over that of one loss.
    free = np.sqrt(np.maximum(1 - 2 * own + square, 0.05))
    noise = _noise(x, raw, s, free, start, onset)
    if bandwidth < SLOPE_BANDWIDTH:
        tilt = _kernel(x, SLOPE_BANDWIDTH)[1]
    return Curve(
        x=x,
        gain=start - s,
        error=np.hypot(
            noise * np.sqrt(square), float(noise[0]) * _MEDIAN_SE / math.sqrt(max(3, onset))
        ),
        slope=_apply(tilt, np.minimum(y, start)),  # what rises above the start is no descent
        start=start,
        extent=(float(x[0]), math.log10(test.lrs[-1])),
        broke=_broke(test, len(raw)),
        spread=level * noise,
    )


def _broke(test: RangeTest, n: int) -> float | None:
    """The rate of the first non-finite loss."""
    return test.lrs[n] if 0 < n < len(test.losses) else None


def _cap(y: Array, start: float) -> float:
    """Level at which an explosion is cut, so that it does not leak into the curve before it.

    As far above the start as the minimum is below: a jump from the minimum then crosses the start
    level, after symmetric smoothing, where it happened.
    """
    return start + max(start - float(y.min()), 10 * jitter(y))


def _kernel(x: Array, bandwidth: float) -> tuple[Array, Array]:
    """Weights (n, n) of level and slope of a local straight line, Gaussian kernel in log rate.

    Local-linear regression has no lag, and no first-order bias at the ends either (Fan & Gijbels,
    "Local Polynomial Modelling and Its Applications", 1996, section 3.2).
    """
    d = x[None, :] - x[:, None]
    # A coarse sweep has few rates per decade: let the kernel reach two neighbours, but not those
    # across the decades between the first rates of a linear sweep.
    coarse = min(2 * median(np.diff(x)), 2.0)
    h = np.maximum(bandwidth, np.minimum(np.partition(np.abs(d), 2)[:, 2], coarse))[:, None]
    w = np.exp(-0.5 * (d / h) ** 2)
    s0, s1, s2 = (part.sum(axis=1, keepdims=True) for part in (w, w * d, w * d**2))
    det = s0 * s2 - s1**2
    alone = det < 1e-3 * (s0 * h) ** 2  # next to no neighbours: no line through them
    det = np.where(alone, 1.0, det)
    return np.where(alone, w / s0, w * (s2 - s1 * d) / det), np.where(
        alone, 0.0, w * (s0 * d - s1) / det
    )


def _apply(weights: Array, y: Array) -> Array:
    """Level or slope of ``y``: weights sum to one or zero, so y[0] off loses no digits."""
    level = y[0] if abs(float(weights[0].sum()) - 1) < 0.5 else 0.0
    return np.asarray(level + weights @ (y - y[0]))


def _noise(x: Array, raw: Array, s: Array, free: Array, start: float, onset: int) -> Array:
    """Noise of one loss about the curve at each rate: that of the whole, or more where it is more.

    The part where the gain is lost does not count. Noise grows with the rate where a model that
    can learn nothing is shaken: against the noise of its plateau that would look like a descent.
    """
    part = np.abs(raw - s) / free
    calm = raw <= _cap(raw, start)
    alone = np.convolve(~calm, np.ones(3), mode="same") == 0  # nor is a neighbour exploding
    plateau = part[: max(5, onset)]  # where the start level comes from, and may be noisier
    whole = MAD * max(median(part[calm]), median(plateau))
    near = np.exp(-0.5 * ((x[None, :] - x[:, None]) / NOISE_BANDWIDTH) ** 2) * alone
    # Of second differences, which a fall does not change, however steep; medians of them, which
    # an explosion does not reach.
    jumps = np.pad(np.abs(np.diff(raw, n=2)), 1, mode="edge") / math.sqrt(6)
    jumps = MAD * running_median(np.where(alone, jumps, whole / MAD), 9)
    local = (near @ jumps) / np.maximum(near.sum(axis=1), 1e-9)
    return np.asarray(np.maximum(whole, local))


def _descent(gain: Array) -> _Descent:
    """Find the first stretch with a gain that is at least half as deep as the deepest."""
    most = float(gain.max())
    below = gain > LOST * max(most, 0.0)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], below, [False]]).astype(int)))
    stretches = [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    for a, b in stretches:
        if gain[a:b].max() >= 0.5 * most:
            return _Descent(a, a + int(np.argmax(gain[a:b])), b - 1)
    return _Descent(0, int(np.argmax(gain)), len(gain) - 1)


def _significant(curve: Curve, descent: _Descent) -> bool:
    """Whether the drop is beyond what noise makes of the lowest of n smoothed losses."""
    low = descent.minimum
    return bool(curve.gain[low] > max(SIGNIFICANT * curve.error[low], ROUNDING * abs(curve.start)))


def _crossing(x: Array, gain: Array, descent: _Descent, left: float) -> float | None:
    """Rate after the minimum at which only the share ``left`` of the gain is left."""
    low = descent.minimum
    level = left * float(gain[low])
    below = np.flatnonzero(gain[low:] < level)
    if not len(below):
        return None
    b = low + int(below[0])
    t = min(max((gain[b - 1] - level) / (gain[b - 1] - gain[b]), 0.0), 1.0)
    return float(10 ** (x[b - 1] + t * (x[b] - x[b - 1])))


def _slide(curve: Curve, descent: _Descent) -> float | None:
    """Lower end of the first interval of a decade, from the top, whose slopes agree."""
    x, drop = curve.x, float(curve.gain[descent.minimum])
    for high in range(descent.last, 0, -1):
        low = int(np.searchsorted(x, x[high] - 1.0))
        if x[high] - x[0] < 1.0:
            return None
        if abs(curve.slope[high] - curve.slope[low]) <= EVEN * drop:
            return float(10 ** x[low])
    return None


def _rise(test: RangeTest, raw: Array) -> float | None:
    """Rate at which a loss that never fell rises (by medians of five, which do not leak ahead)."""
    start = median(raw[: max(3, len(raw) // 20)])
    noise = max(jitter(raw), jitter(raw[: max(MIN_POINTS, len(raw) // 2)]))
    bound = start + max(SIGNIFICANT * noise, ROUNDING * abs(start))
    above = np.flatnonzero(running_median(raw, 5) > bound)
    if not len(above) and should_stop(raw.tolist()) and len(raw) < len(test.lrs):
        above = np.flatnonzero(raw > 0.5 * (raw[0] + raw.max()))  # it blew up before it began
    return test.lrs[int(above[0])] if len(above) else _broke(test, len(raw))


# ------------------------------------------------------------------ reasons


def _too_short(n: int, run: int) -> str:
    if n == 0 and run:
        return (
            "the first loss is not finite, before any rate was applied: check the data, the "
            "initialisation and the precision"
        )
    cause = (
        "before the loss became non-finite: lower start_lr" if n < run else f": use {MORE_STEPS}"
    )
    return f"only {n} losses (a curve needs {MIN_POINTS}) {cause}".replace(" :", ":")


def _no_descent(
    lrs: Sequence[float], diverged: float | None
) -> tuple[Literal["low", "high"] | None, str]:
    """To which side the sweep missed the action, if that is plain, and the reason in words."""
    if diverged is None:
        return None, (
            "the loss never falls significantly (flat, or only noise): check that the optimizer "
            f"steps the model, raise end_lr, or use {MORE_STEPS} or a larger batch"
        )
    what = f"the loss never falls significantly before it diverges at {diverged:.3g}"
    if diverged < 10 * lrs[0]:
        return "low", f"{what} (starts too high): lower start_lr from {lrs[0]:.3g}"
    if sum(lr <= diverged for lr in lrs) < MIN_POINTS:
        return None, f"{what}, after a few steps: lower end_lr from {lrs[-1]:.3g}"
    return None, (
        f"{what}: use {MORE_STEPS} or a larger batch; a model that is trained already, or labels "
        "that say nothing, look like this too"
    )


def _doubt(
    curve: Curve, descent: _Descent, diverged: float | None
) -> tuple[Literal["low", "high"] | None, str]:
    """To which side the sweep missed the action, and the reason in words."""
    x, gain, low = curve.x, curve.gain, descent.minimum
    if x[descent.onset] - x[0] < ONSET:
        return "low", (
            "the loss falls from the first rate on (starts too high): "
            f"lower start_lr from {10 ** x[0]:.3g}"
        )
    margin = max(3 * float(curve.error[low]), LOST * float(gain[low]))
    if diverged is None and gain[low] - gain[low:].min() <= margin:
        return "high", (
            "the loss still falls at the last rate (ends too low): "
            f"raise end_lr from {10 ** curve.extent[1]:.3g}"
        )
    return None, "the loss falls from a plateau to a minimum and rises again"
