"""What the results so far say of recipes that were, or might be, tried: a small Gaussian process.

Few runs, much noise, and a good first guess: the model is built for that. The scores of each length
of cycle are put on a scale of their own, on which the good ones differ about linearly and the bad
ones hardly. The expected score is a gentle bowl about the first guess, which may be somewhat off,
plus a smooth function; short cycles see the same function up to a correlation that is learned, so
that a study does not listen to short cycles that mislead. Nothing is optimised: the answer is
averaged over a grid of settings, weighted by how well each explains the scores (Rasmussen and
Williams, "Gaussian processes for machine learning", 2006, sections 2.7 and 5.2).

=============  =======  =================================================================
symbol         shape    meaning (unit)
=============  =======  =================================================================
``z``          (n, d)   places, relative to the first guess (prior widths)
``level``      (n,)     length of the cycle: 0 is full, 1, 2, … are shorter ones
``score``      (n,)     results, lower is better; inf where the run diverged
``relevance``  (d,)     how much a width of each coordinate is expected to matter
``certainty``  (d,)     how much worse a width from the first guess is expected to be
=============  =======  =================================================================
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["Belief", "believe", "expected_improvement", "scaled"]

LENGTHS = (1.5, 3.0)  # widths over which the smooth part changes
AGREEMENTS = (0.3, 0.7, 0.95)  # correlation of one length of cycle with the next
NOISES = (0.1, 0.25, 0.5, 1.0)  # between seeds
AMPLITUDE = 1.3  # of the smooth part
STEEPNESS = 0.3  # how far the bowl's rise may be off, as a share of it
CENTRE = 0.8  # widths: how far the bowl's centre may be off
RIM = 3.0  # widths from which on the bowl is flat
OFFSET = 2.0  # spread of each length's mean
GOOD = 0.4  # the scale's unit is how far this quantile of the scores lies from the best
LEAST = 0.02  # and at least this share of their range
WORST = 0.5  # how much worse than the worst a diverged run counts, on the scale
NEGLIGIBLE = 0.02  # settings that explain the scores this much worse than the best are left out


class _Settings(NamedTuple):
    length: float
    agreement: float


class _Part(NamedTuple):
    """A setting's share of the answer."""

    weight: float
    settings: _Settings
    noise: float
    root: Array  # its square is the inverse of the scores' covariance
    alpha: Array


def scaled(score: Array, level: Array) -> Array:
    """Scores on a scale of each level's own: 0 is the best; linear near it, logarithmic far off."""
    out = np.zeros(len(score))
    for one in np.unique(level):
        here = level == one
        finite = here & np.isfinite(score)
        if not finite.any():
            out[here] = WORST
            continue
        above = score[finite] - score[finite].min()
        unit = max(float(np.quantile(above, GOOD)), LEAST * float(above.max()), 1e-12)
        out[finite] = np.arcsinh(above / unit)
        out[here & ~finite] = out[finite].max() + WORST
    return out


@dataclass(frozen=True)
class Belief:
    """The posterior: call it with places for mean and standard deviation of their full scores."""

    z: Array
    level: Array
    score: Array  # on the common scale
    relevance: Array
    certainty: Array
    parts: tuple[_Part, ...]

    def __call__(self, places: Array) -> tuple[Array, Array]:
        """Mean and standard deviation, (m,) each, of the noise-free full score on the scale."""
        prior = _Prior(places, self.z, self.relevance, self.certainty)
        bowl = _squares(places, self.certainty).sum(axis=1)
        before = AMPLITUDE**2 + OFFSET**2 + (_bowls(places, self.certainty) ** 2).sum(axis=1)
        means, squares = np.zeros(len(places)), np.zeros(len(places))
        for part in self.parts:
            cross = prior.covariance(part.settings, self.level[None, :])
            mean = bowl + cross @ part.alpha
            told = ((cross @ part.root) ** 2).sum(axis=1)
            means += part.weight * mean
            squares += part.weight * (np.maximum(before - told, 1e-9) + mean**2)
        return means, np.sqrt(np.maximum(squares - means**2, 1e-12))

    @property
    def agreement(self) -> float:
        """Correlation of one length of cycle with the next, as far as is known."""
        return sum(part.weight * part.settings.agreement for part in self.parts)

    @property
    def noise(self) -> float:
        """Standard deviation between seeds, on the scale."""
        return sum(part.weight * part.noise for part in self.parts)

    def with_expected(self, places: Array) -> Belief:
        """The belief if full runs at these places came out as expected (Ginsbourger et al.)."""
        mean, _ = self(places)
        return _fit(
            np.concatenate([self.z, places]),
            np.concatenate([self.level, np.zeros(len(places))]),
            np.concatenate([self.score, mean]),
            self.relevance,
            self.certainty,
        )


def believe(z: Array, level: Array, score: Array, relevance: Array, certainty: Array) -> Belief:
    """The posterior after these results."""
    return _fit(z, level, scaled(score, level), relevance, certainty)


def _fit(z: Array, level: Array, score: Array, relevance: Array, certainty: Array) -> Belief:
    rest = score - _squares(z, certainty).sum(axis=1)
    prior, apart = _Prior(z, z, relevance, certainty), np.abs(level[:, None] - level)
    told: list[tuple[float, _Settings, float, Array]] = []
    for settings in itertools.starmap(_Settings, itertools.product(LENGTHS, AGREEMENTS)):
        gram = prior.covariance(settings, apart)
        for noise in NOISES:
            root = np.linalg.inv(np.linalg.cholesky(gram + noise**2 * np.eye(len(z)))).T
            half = rest @ root
            evidence = -0.5 * half @ half + np.log(np.diag(root)).sum()
            told.append((float(evidence), settings, noise, root))
    top = max(each[0] for each in told)
    kept = [each for each in told if math.exp(each[0] - top) > NEGLIGIBLE]
    total = sum(math.exp(each[0] - top) for each in kept)
    parts = [
        _Part(math.exp(evidence - top) / total, settings, noise, root, root @ (rest @ root))
        for evidence, settings, noise, root in kept
    ]
    return Belief(z, level, score, relevance, certainty, tuple(parts))


def expected_improvement(mean: Array, sd: Array, best: float) -> Array:
    """Expected amount by which each falls below ``best`` (Jones et al. 1998, equation 15)."""
    gap = (best - mean) / sd
    density = np.exp(-0.5 * gap**2) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + np.vectorize(math.erf)(gap / math.sqrt(2)))
    return np.asarray((best - mean) * below + sd * density)


def _squares(z: Array, certainty: Array) -> Array:
    """The bowl's rise (m, d) along each coordinate."""
    return np.asarray(np.minimum(z**2, RIM**2) * certainty)


def _bowls(z: Array, certainty: Array) -> Array:
    """What the bowl (m, 2d) gains when it is steeper, or when its centre moves by CENTRE.

    The latter is a slope, up to the rim. Without it the search stays about a wrong guess, however
    well things go at its edge.
    """
    tilt = 2 * CENTRE * certainty * np.clip(z, -RIM, RIM)
    return np.hstack([STEEPNESS * _squares(z, certainty), tilt])


class _Prior:
    """Prior covariance of scores at places ``a`` with those at ``b``, for any setting."""

    def __init__(self, a: Array, b: Array, relevance: Array, certainty: Array) -> None:
        left, right = a * np.sqrt(relevance), b * np.sqrt(relevance)
        squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)
        self._apart = np.maximum(squares - 2 * left @ right.T, 0.0)
        self._bowl = _bowls(a, certainty) @ _bowls(b, certainty).T
        self._alike: dict[float, Array] = {}

    def covariance(self, settings: _Settings, levels: Array) -> Array:
        """For runs whose levels lie ``levels`` apart (of a shape that fits)."""
        if settings.length not in self._alike:
            smooth = AMPLITUDE**2 * np.exp(-0.5 / settings.length**2 * self._apart)
            self._alike[settings.length] = smooth + self._bowl
        alike = self._alike[settings.length]
        return np.asarray(alike * settings.agreement**levels + OFFSET**2 * (levels == 0))
