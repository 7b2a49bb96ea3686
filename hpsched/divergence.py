"""Rules on a run in progress or just over: has this loss gone beyond hope?

Only differences of losses count, never the loss's zero or unit, unlike in fastai's and Lightning's
"loss > 4 × best", which fails for losses near zero or below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

MIN_POINTS = 10  # fewer losses than this show no curve
LOST = 0.1  # the gain counts as lost when less than this share of the drop is left
MAD = 1.4826  # median absolute deviation -> standard deviation, for a normal distribution
ROUNDING = 1e-7  # differences below this share of the loss are float32 rounding, not signal


def finite(losses: Sequence[float]) -> Array:
    """Return the losses before the first non-finite one."""
    y = np.asarray(losses, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(y))
    return y[: bad[0]] if len(bad) else y


def running_median(y: Array, width: int) -> Array:
    """Median of each loss and its neighbours, which rids the curve of single outliers.

    Within width // 2 of an end it is that of the first or last ``width`` losses.
    """
    inner = np.sort(sliding_window_view(y, width), axis=1)[:, width // 2]
    middle = np.clip(np.arange(len(y)) - width // 2, 0, len(inner) - 1)
    return np.asarray(inner[middle])


def median(y: Array) -> float:
    """``np.median`` of finite numbers, to the bit, without the checks that take most of its time.

    A sweep calls it at every look; beside a small model's training those checks would show.
    """
    ordered, half = np.sort(y), len(y) // 2
    return float(ordered[half] if len(y) % 2 else (ordered[half - 1] + ordered[half]) / 2)


def jitter(y: Array) -> float:
    """Noise of one loss from differences of neighbours; holds when half the curve explodes."""
    return MAD * median(np.abs(np.diff(y))) / math.sqrt(2) if len(y) > 1 else 0.0


def should_stop(losses: Sequence[float]) -> bool:
    """Whether a sweep in progress has seen enough: call it with all losses so far.

    True on a non-finite loss, and when the median of five successive losses lies as far above the
    start as the best lay below it (at least eight times the noise). Only differences
    count, not the loss's zero, unlike in fastai's and Lightning's "loss > 4 x best". O(n).
    """
    y = finite(losses)
    if len(y) < len(losses):
        return True
    if len(y) < MIN_POINTS:
        return False
    start = median(y[:MIN_POINTS])
    least = max(8 * jitter(y), ROUNDING * abs(start))
    if np.count_nonzero(y > start + least) < 3:  # too few for the median of any five: most looks
        return False
    smooth = running_median(y, 5)
    gain = np.maximum(start - np.minimum.accumulate(smooth), 0.0)
    return bool((smooth > start + np.maximum(gain, least)).any())


def exploded(losses: Sequence[float], every: int = 1) -> str | None:
    """Why an ordinary training run is beyond hope, or None: call it with all losses so far.

    ``every`` is the number of steps between two losses, for the step that the reason names.

    A non-finite loss is the end. Otherwise the medians of the last ten losses and of the ten before
    must both lie above the start by more than 5 x the best gain so far, 50 x the noise and 3 x
    the start's own size: a false alarm costs a run, a missed one only time. O(n).
    """
    y = finite(losses)
    if len(y) < len(losses):
        step = len(y) * every
        return f"the loss became {float(losses[len(y)])} at step {step}: lower max_lr"
    if len(y) < 3 * MIN_POINTS:
        return None
    start = min(float(y[0]), median(y[:5]))  # it may explode within five steps
    before, last = (median(part) for part in (y[-20:-10], y[-10:]))
    gain = start - float(running_median(y, 3).min())
    calm = max(jitter(y), jitter(y[:MIN_POINTS]))
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
    y = finite(losses)
    if len(y) < 3 * MIN_POINTS:
        return None
    start = median(y[:5])
    end = median(y[-max(MIN_POINTS, len(y) // 10) :])
    gain = start - float(running_median(y, 5).min())
    if gain <= max(8 * jitter(y), ROUNDING * abs(start)) or end < start - LOST * gain:
        return None
    return (
        f"the loss fell from {start:.4g} to {start - gain:.4g} and ended at {end:.4g}: the model "
        "died on the way, lower max_lr"
    )
