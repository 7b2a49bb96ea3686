"""Range tests with a planted truth, for the tests of curves, pools and stop rules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hpsched.lr_curve import RangeTest

Array = NDArray[np.float64]
Curve = Callable[[Array], Array]
X = np.linspace(-6, 1, 100)


def planted(steepest: float, width: float, gap: float, wall: float, drop: float = 1.5) -> Curve:
    """A logistic fall at 10**steepest and an exponential wall ``gap`` decades after it."""

    def loss(x: Array) -> Array:
        fall = 1 / (1 + np.exp(-(x - steepest) / width))
        return 2.3 - drop * fall + drop * np.exp(np.minimum((x - steepest - gap) / wall, 60))

    return loss


def truth(loss: Curve) -> tuple[float, float, float]:
    """log10 of the steepest, minimum and divergence rates, on a grid of 1e-5 decades."""
    x = np.linspace(-6, 1, 700_001)
    y = loss(x)
    low = int(np.argmin(y))
    steepest = int(np.argmin(np.gradient(y[: low + 1], x[: low + 1])))
    return x[steepest], x[low], x[low + int(np.argmax(y[low:] > y[0]))]


def centre(loss: Curve) -> float:
    """log10 of the centre of mass of the upper half of the gain, on the same grid."""
    x = np.linspace(-6, 1, 700_001)
    gain = loss(np.array([-6.0])) - loss(x)
    weight = np.maximum(gain - 0.5 * gain.max(), 0)
    return float((weight * x).sum() / weight.sum())


def noise(size: int, seed: int, sigma: float) -> Array:
    return sigma * np.random.default_rng(seed).normal(size=size)


def sweep(loss: Curve, sigma: float = 0.0, seed: int = 0, x: Array = X) -> RangeTest:
    return of(loss(x) + noise(len(x), seed, sigma), x)


def of(losses: Array, x: Array = X) -> RangeTest:
    return RangeTest(lrs=tuple(10**x), losses=tuple(losses))


CURVES = [
    planted(-1.0, 0.25, 1.2, 0.1),
    planted(-1.0, 0.15, 0.8, 0.05),
    planted(-1.5, 0.3, 1.0, 0.25),
    planted(-2.0, 0.2, 1.0, 0.1),
    planted(-3.0, 0.4, 1.5, 0.15),
]
GOOD = CURVES[0]
