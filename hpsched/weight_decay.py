"""Several range tests of one model: weight decay and learning rate chosen together.

Weight decay and learning rate both regularise, and where there is much of one, less of the other is
tolerated (L. N. Smith, arXiv:1803.09820, section 4.4: sweep once per weight decay and take "the
largest weight decay that will still let us train at a high learning rate").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpsched.divergence import MAD
from hpsched.errors import UsageError
from hpsched.lr_curve import RangeTest
from hpsched.proposal import Proposal, pool

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["RangeTests", "Tolerance", "choose", "tolerance"]

NEAR = math.sqrt(2)  # rates within half an octave count as equally high


class Tolerance(NamedTuple):
    """What the sweeps at one weight decay came to, over their reliable replicates.

    ``stable`` is the highest rate at which they kept what they had gained, ``lowest`` their lowest
    smoothed loss, and ``noise`` the standard deviation of one loss about the curve, or between
    replicates where that is more (losses).
    """

    weight_decay: float
    stable: float
    lowest: float
    noise: float


@dataclass(frozen=True, kw_only=True, repr=False)
class RangeTests:
    """Sweeps of one model at several weight decays, and what they say together.

    Args:
        tests: One per weight decay and replicate.
        total_steps: Optimizer steps of the training that max_lr is for. Default: the tests' own.

    Raises:
        UsageError: No tests.
    """

    tests: tuple[RangeTest, ...]
    total_steps: int | None = None

    def __post_init__(self) -> None:
        """Take a list too."""
        object.__setattr__(self, "tests", tuple(self.tests))
        if not self.tests:
            raise UsageError("no range tests: run one first")

    @property
    def weight_decay(self) -> float | None:
        """The largest that tolerates the highest rate; None: no sweep is reliable."""
        return self._choice[0]

    @property
    def reason(self) -> str:
        """Why this weight decay, with the numbers."""
        return self._choice[1]

    @cached_property
    def proposal(self) -> Proposal:
        """Pooled window for max_lr at the chosen weight decay, or of all sweeps without one."""
        return pool(self.chosen, self.total_steps)

    @property
    def chosen(self) -> tuple[RangeTest, ...]:
        """The sweeps at the chosen weight decay, or all of them without one."""
        return self.by_weight_decay.get(self.weight_decay, self.tests)

    @cached_property
    def by_weight_decay(self) -> dict[float | None, tuple[RangeTest, ...]]:
        """Weight decay → its replicates, in the order in which they were run."""
        decays = dict.fromkeys(test.weight_decay for test in self.tests)
        return {d: tuple(t for t in self.tests if t.weight_decay == d) for d in decays}

    @cached_property
    def _choice(self) -> tuple[float | None, str]:
        validated = all(test.validated and len(test.validated.smoothed) for test in self.tests)
        found = [
            tolerance(decay, reliable, validated)
            for decay, tests in self.by_weight_decay.items()
            if decay is not None and (reliable := [test for test in tests if test.reliable])
        ]
        if not found:
            reasons = "; ".join(dict.fromkeys(test.reason for test in self.tests))
            return None, f"none of {len(self.tests)} sweeps shows what it tolerates: {reasons}"
        return choose(found, "validation loss" if validated else "loss")

    def figure(self) -> go.Figure:
        """Draw all curves, training and validation, with the proposal (needs plotly)."""
        from hpsched.present import rate_text
        from hpsched.range_test_figure import range_test_figure

        title, found = None, self.proposal
        if len(self.by_weight_decay) > 1 and self.weight_decay is not None and found.reliable:
            decay, centre = rate_text(self.weight_decay), rate_text(found.centre)
            title = f"Weight decay {decay}, max_lr around {centre}"
        return range_test_figure(self.tests, found, title)

    def _repr_html_(self) -> str:
        """In a notebook: tables and the curves; :meth:`figure` is the interactive one."""
        from hpsched.notebook import range_tests_html

        return range_tests_html(self)

    def __repr__(self) -> str:
        return f"<RangeTests of {len(self.tests)} sweeps: {self.reason}>"


def tolerance(weight_decay: float, tests: Sequence[RangeTest], validated: bool) -> Tolerance:
    """Read the sweeps at one weight decay; on their validation losses where ``validated``."""
    curves = [(validated and test.validated) or test for test in tests]
    lowest = [float(np.min(curve.smoothed)) for curve in curves]
    return Tolerance(
        weight_decay=weight_decay,
        stable=float(np.exp(np.mean(np.log([_stable(test) for test in tests])))),
        lowest=float(np.mean(lowest)),
        noise=max(float(np.std(lowest)), max(_noise(curve) for curve in curves)),
    )


def choose(found: Sequence[Tolerance], what: str = "loss") -> tuple[float, str]:
    """Choose the largest weight decay that tolerates the highest rate, with the reason.

    Among those whose highest stable rate is within half an octave of the highest and whose lowest
    loss is not worse than the best of these by more than noise.
    """
    highest = max(found, key=lambda one: one.stable)
    fast = [one for one in found if one.stable * NEAR >= highest.stable]
    best = min(fast, key=lambda one: one.lowest)
    good = [one for one in fast if one.lowest - best.lowest <= max(one.noise, best.noise)]
    chosen = max(good, key=lambda one: one.weight_decay)
    return chosen.weight_decay, _because(chosen, highest, best, what)


def _because(chosen: Tolerance, highest: Tolerance, best: Tolerance, what: str) -> str:
    rate = f"{chosen.stable:.2g}"
    if chosen is not highest:
        rate += f", half an octave or less below the {highest.stable:.2g} of "
        rate += f"{highest.weight_decay:g}"
    loss = f"{chosen.lowest:.4g}"
    if chosen is not best:
        noise = max(chosen.noise, best.noise)
        loss += f", within noise ({noise:.2g}) of the {best.lowest:.4g} of {best.weight_decay:g}"
    return (
        f"weight decay {chosen.weight_decay:g} is the largest that tolerates the highest rate "
        f"({rate}) and reaches as low a {what} ({loss})"
    )


def _stable(test: RangeTest) -> float:
    """Highest rate that a sweep tolerated: its last one where it never lost what it had gained."""
    return test.rules["max_stable"] or test.lr_diverged or test.lrs[len(test.losses) - 1]


def _noise(test: RangeTest) -> float:
    """Standard deviation of one loss about the curve, up to its lowest point."""
    smooth = np.asarray(test.smoothed)
    part = np.asarray(test.losses[: int(np.argmin(smooth)) + 1]) - smooth[: np.argmin(smooth) + 1]
    return float(MAD * np.median(np.abs(part)))
