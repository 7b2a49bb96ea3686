"""From a handful of complete cycles to the best max_lr: where the range test only points.

A range test reads the training loss of a short sweep; what counts is the result of a whole cycle,
scored by validation, and the best rate moves with the cycle's length. Both are learned here from
results that the study has anyway: the first rungs of its first trials.

The model, in octaves of max_lr, was read off the tuning tasks of ``studies/bench``
(docs/calibration.md). About its optimum the score of a cycle is a bowl, and the noise between
seeds is about as large as the bowl's rise one octave below the optimum, on all of them. The
unknown height and scale of each length's scores are averaged over, so that any metric will do.

==========  ======  ======================================================================
symbol      shape   meaning (unit)
==========  ======  ======================================================================
``mu``      (M,)    candidates for the best max_lr of a full cycle (log2 rate)
``slope``   (S,)    change of the best rate with the cycle's length (octaves per octave)
``x``       (n,)    max_lr of the runs of one length (log2 rate)
``score``   (n,)    their results, lower is better; inf where the run diverged
``unit``    (B,)    candidates for one noise's worth of score (share of median - best)
==========  ======  ======================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpsched.lr_curve import HORIZON, below, room
from hpsched.proposal import USELESS, Proposal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["Run", "best_rate", "beyond", "edge_of", "refined"]

CAP, RIM = 10.0, 0.25  # the bowl's rim, in noise; beyond it rises by RIM × CAP a factor of e
HEAVY = 0.3  # noise grows by this share of the distance from the best score
SPREAD = 1.2  # octaves: how far a reliable range test is off (docs/calibration.md)
WIDE = 2.5  # octaves: and an unreliable one, unless its window is wider still
FAR, LEASH = 3.0, 0.5  # octaves outside the tried rates from which, and how fast, optima count less
TEMPER = 0.5  # a small unit explains scores by the bowl, not by noise: half of what it would earn
TAILS = 2.0  # degrees of freedom of the prior: the range test is sometimes far off
SLOPE_SPREAD = 0.3  # octaves per doubling: how much the horizon's slope differs between tasks …
SLOPE_TAILS = 2.0  # … of which some are far off: a model that overfits wants far lower rates
BRINK, STEEP = 1.5, 2.5  # runs diverge from about this many octaves above the optimum on
OVERFITS = 1.2  # and from here on longer training may score worse than shorter
CHANCE = 0.01  # either may happen at any rate
ABOVE_BEST = 4.0  # factor from the best run within which a divergence edge is not believed
STRIDE = 2.0  # octaves from the best run to the next one, where it is the lowest or the highest
ENOUGH = 3  # scores of a length that show their spread
LITTLE = 2.0  # times the spread of the shorter cycles: what counts as worse, and not as noise
MARGIN = 1.0  # octaves that the window reaches past the 90 % interval
UNITS = np.geomspace(0.03, 3.0, 16)
SLOPES = HORIZON + np.arange(-12, 11) / 10


class Run(NamedTuple):
    """One complete cycle: its length relative to a full one, and its result (inf: diverged)."""

    max_lr: float
    share: float
    score: float


@dataclass(frozen=True)
class Belief:
    """Probabilities ``p`` of candidates ``mu`` for the best max_lr, in log2."""

    mu: Array
    p: Array

    def quantile(self, share: float) -> float:
        """The rate below which the best one lies with this probability."""
        return float(2 ** np.interp(share, np.cumsum(self.p) - 0.5 * self.p, self.mu))


def best_rate(prior: Proposal, runs: Sequence[Run]) -> Belief:
    """Where the best max_lr of a full cycle lies, after these runs.

    The prior is a heavy-tailed t distribution about the proposal's centre, as wide as range tests
    were found to be off; the horizon's slope has another, about what was found on average.
    The scores of a length tell something from two on. That the optimum is lower tells a diverged
    run, and one that scored worse than a shorter cycle at the same rate: it overfits.
    """
    centre, low, high = (math.log2(rate) for rate in (prior.centre, prior.low, prior.high))
    mu = np.arange(min(centre - 6, low - 1), max(centre + 6, high + 1), 0.1)
    spread = SPREAD if prior.reliable else max(WIDE, (high - low) / 4)
    at = _log_t((mu - centre) / spread, TAILS)
    along = _log_t((SLOPES - HORIZON) / SLOPE_SPREAD, SLOPE_TAILS)
    log_p = at[:, None] + along[None, :]
    shorter: list[Run] = []  # of the lengths before, from the shortest on
    for share in sorted({run.share for run in runs}):
        optimum = mu[:, None] + SLOPES * math.log2(share)
        same = [run for run in runs if run.share == share]
        scored = [run for run in same if math.isfinite(run.score)]
        for run in same:
            if run not in scored:
                log_p = log_p + _log_too_high(math.log2(run.max_lr) - optimum, BRINK)
            elif _worse_for_longer(run, shorter):
                log_p = log_p + _log_too_high(math.log2(run.max_lr) - optimum, OVERFITS)
        if len(scored) > 1:
            log_p = log_p + _log_likelihood(optimum, scored) + _log_near(optimum, scored)
        shorter += scored
    p = np.exp(log_p - log_p.max()).sum(axis=1)
    return Belief(mu, p / p.sum())


def beyond(runs: Sequence[Run]) -> float | None:
    """The rate to try next: two octaves past the best run, if that is the lowest or the highest.

    Of runs of the longest length that has two or more, and of diverged ones of any length, which
    are the worst; where all diverged, the lowest is the best. None where the best lies between
    others, or among equals at both ends.
    """
    same = _longest(runs)
    if not same:
        return None
    rates = [run.max_lr for run in [*same, *_diverged(runs)]]
    best = _best(same) or [min(rates)]
    low, high = min(best) == min(rates), max(best) == max(rates)
    if low == high:
        return None
    return max(rates) * 2**STRIDE if high else min(rates) / 2**STRIDE


def edge_of(prior: Proposal, runs: Sequence[Run]) -> float | None:
    """Where training diverges: where the sweeps did, unless complete cycles say that it is higher.

    Sweeps diverge some two octaves above the highest good rate (docs/calibration.md). So if the
    best run is nearer than that, the edge moves up, as far as the lowest run that diverged above.
    """
    best = _best(_longest(runs))
    if prior.lr_diverged is None or not best:
        return prior.lr_diverged
    lost = min((run.max_lr for run in _diverged(runs) if run.max_lr > min(best)), default=math.inf)
    return max(prior.lr_diverged, min(ABOVE_BEST * min(best), lost))


def _longest(runs: Sequence[Run]) -> list[Run]:
    """The runs of the longest length that has two or more."""
    shares = [run.share for run in runs]
    longest = max((share for share in shares if shares.count(share) > 1), default=None)
    return [run for run in runs if run.share == longest]


def _best(same: Sequence[Run]) -> list[float]:
    """Rates of those runs of one length that have the best score; none if all diverged."""
    score = min((run.score for run in same), default=math.inf)
    return [run.max_lr for run in same if run.score == score < math.inf]


def _diverged(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if math.isinf(run.score)]


def _log_t(z: Array, freedom: float) -> Array:
    """Log density of Student's t, up to a constant."""
    return np.asarray(-0.5 * (freedom + 1) * np.log1p(z**2 / freedom))


def _log_likelihood(mu: Array, runs: Sequence[Run]) -> Array:
    """Of scores of one length, for optima ``mu`` of any shape; height and unit averaged over."""
    x = np.log2([run.max_lr for run in runs])
    score = np.array([run.score for run in runs])
    best = float(score.min())
    reach = _reach(score)
    expected = _bowl(x - mu[..., None])
    weight = 1 / (1 + (HEAVY * expected) ** 2)
    total = weight.sum(axis=-1)
    found = []
    for unit in UNITS:
        worse = (score - best) / (reach * unit)
        rest = _capped(worse) - expected
        height = (weight * rest).sum(axis=-1) / total
        square = (weight * (rest - height[..., None]) ** 2).sum(axis=-1)
        told = -0.5 * square + 0.5 * np.log(weight).sum(axis=-1) - 0.5 * np.log(total)
        found.append(told - TEMPER * (int((worse < CAP).sum()) - 1) * math.log(unit))
    return np.asarray(np.logaddexp.reduce(found) - math.log(len(found)))


def _log_near(mu: Array, runs: Sequence[Run]) -> Array:
    """Discounts optima more than FAR octaves outside what was tried.

    There the bowl's rim is nearly flat, and would explain many scores as noise.
    """
    x = np.log2([run.max_lr for run in runs])
    beyond = np.maximum(np.maximum(x.min() - mu, mu - x.max()) - FAR, 0.0)
    return np.asarray(-0.5 * (beyond / LEASH) ** 2)


def _bowl(distance: Array) -> Array:
    """Expected rise of the score, in noise: gentle below the optimum, steep above it."""
    return _capped(distance**2 * np.where(distance > 0, 1 + distance, 1.0))


def _capped(rise: Array) -> Array:
    """Nearly flat from the rim on: but were it flat, an optimum far off would explain any order."""
    return np.where(rise < CAP, rise, CAP * (1 + RIM * np.log(np.maximum(rise, CAP) / CAP)))


def _reach(score: Array) -> float:
    """How far the scores spread, with little regard to the worst of them."""
    best = float(score.min())
    return max(float(np.median(score)) - best, 0.1 * float(np.ptp(score)), 1e-12)


def _worse_for_longer(run: Run, shorter: Sequence[Run]) -> bool:
    """Whether a shorter cycle at the same rate did better, by more than a little."""
    for same in (other for other in shorter if other.max_lr == run.max_lr):
        others = np.array([other.score for other in shorter if other.share == same.share])
        if len(others) >= ENOUGH and run.score > same.score + LITTLE * _reach(others):
            return True
    return False


def _log_too_high(distance: Array, brink: float) -> Array:
    """Log probability of going wrong this many octaves above the optimum, up to a factor."""
    return np.asarray(np.log(CHANCE + (1 - CHANCE) / (1 + np.exp(-STEEP * (distance - brink)))))


def refined(prior: Proposal, runs: Sequence[Run]) -> Proposal:
    """The proposal after these runs: median, 90 % interval, and a window an octave wider.

    Without two scores of one length, or a diverged run, it is the prior itself. When four octaves
    or more remain, the window holds the prior's too, and the proposal is reliable only if it agrees
    with reliable range tests: their window holds its centre.
    """
    lengths = [run.share for run in runs if math.isfinite(run.score)]
    if len(lengths) == len(runs) and len(set(lengths)) == len(lengths):
        return prior
    belief = best_rate(prior, runs)
    low, centre, high = (belief.quantile(share) for share in (0.05, 0.5, 0.95))
    octaves = math.log2(high / low)
    reliable, window = True, (low / 2**MARGIN, high * 2**MARGIN)
    if octaves >= USELESS:
        reliable = prior.reliable and prior.low <= centre <= prior.high
        window = min(window[0], prior.low), max(window[1], prior.high)
    edge = edge_of(prior, runs)
    bottom = room(window[0], edge)
    centre = below(centre, bottom, edge)
    return Proposal(
        centre=centre,
        low=bottom,
        high=below(window[1], centre, edge),
        interval=(low, below(high, centre, edge)),
        lr_diverged=prior.lr_diverged,
        reliable=reliable,
        missed=prior.missed,
        reason=f"range tests and {len(runs)} complete cycles: the best max_lr is known within "
        f"{octaves:.1f} octaves",
        replicates=prior.replicates,
    )
