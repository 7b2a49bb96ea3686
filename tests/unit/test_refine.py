"""The belief about the best max_lr from complete cycles: values, invariances, calibration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpsched.coordinates import FURTHER, ORDER, REFINING
from hpsched.proposal import Proposal
from hpsched.refine import Run, best_rate, beyond, edge_of, refined


def prior(centre: float = 0.1, reliable: bool = True) -> Proposal:
    return Proposal(
        centre=centre,
        low=centre / 4,
        high=centre * 4,
        interval=(centre / 1.3, centre * 1.3),
        lr_diverged=centre * 20,
        reliable=reliable,
        reason="",
        replicates=3,
    )


def cycle(
    max_lr: float, best: float, share: float, rng: np.random.Generator, gain: float = 0.3
) -> Run:
    """A task with another shape than the model's: V-shaped on the log scale, steeper above."""
    octaves = math.log2(max_lr / best)
    if octaves > 3:
        return Run(max_lr, share, math.inf)
    worse = 1.2 * abs(octaves) ** 1.5 * (2.0 if octaves > 0 else 1.0)
    return Run(max_lr, share, 0.3 + gain * (1 - share) + 0.02 * (worse + rng.normal()))


def study(
    best: float, centre: float = 0.1, seed: int = 0, slope: float = -0.15, gain: float = 0.3
) -> list[Run]:
    """Refining trials: all on the short rung, the best three on the next, the last in full."""
    rng, runs, believed = np.random.default_rng(seed), list[Run](), prior(centre)
    for role in ORDER:
        further = beyond(runs) if role in FURTHER else None
        if further is None and role == FURTHER[-1]:
            continue
        rate = further or best_rate(believed, runs).quantile(REFINING[role])
        runs.append(cycle(rate, best * (1 / 9) ** slope, 1 / 9, rng, gain))
    first = list(runs)
    for share, keep in ((1 / 3, 3), (1.0, 1)):
        top = sorted(first, key=lambda run: run.score)[:keep]
        runs += [cycle(run.max_lr, best * share**slope, share, rng, gain) for run in top]
    return runs


def octaves(runs: Sequence[Run], best: float, centre: float = 0.1) -> float:
    return math.log2(best_rate(prior(centre), runs).quantile(0.5) / best)


@pytest.mark.parametrize("off", range(-4, 5))
def test_it_finds_the_best_rate_from_a_prior_that_is_octaves_off(off: int) -> None:
    best = 0.1 * 2.0**off
    errors = [octaves(study(best, seed=seed), best) for seed in range(20)]
    assert np.median(np.abs(errors)) < (0.5 if abs(off) <= 1 else 0.8)
    assert np.quantile(np.abs(errors), 0.9) < 1.2 + 0.3 * max(abs(off) - 1, 0)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({0.1: 0.5}, None),
        ({0.1: 0.5, 0.4: 0.4}, 1.6),
        ({0.1: 0.4, 0.4: 0.5}, 0.025),
        ({0.1: 0.5, 0.2: 0.3, 0.4: 0.4}, None),
        ({0.1: 0.5, 0.2: 0.3, 0.4: 0.3}, 1.6),
        ({0.1: 0.5, 0.4: 0.5}, None),
        ({0.1: 0.5, 0.4: math.inf}, 0.025),
        ({0.1: math.inf, 0.4: math.inf}, 0.025),
        ({0.1: 0.5, 0.4: 0.4, 1.6: math.inf}, None),
    ],
)
def test_where_the_best_lies_at_an_end_the_next_lies_two_octaves_past_it(
    scores: dict[float, float], expected: float | None
) -> None:
    runs = [Run(rate, 1 / 3, score) for rate, score in scores.items()]
    found = beyond(runs)
    assert found is None if expected is None else found == pytest.approx(expected)
    # Shorter cycles like higher rates: what they say does not count where there are longer ones.
    shorter = [Run(rate, 1 / 9, -rate) for rate in scores]
    assert len(scores) < 2 or beyond([*shorter, *runs, Run(0.2, 1.0, 0.1)]) == found


def test_an_optimum_far_off_does_not_explain_scores_that_fall_towards_the_other_end() -> None:
    """Every rate tried lies on the rim of an optimum far below: with a flat one all would do."""
    tried = {-9.5: 0.356, -8: 0.278, -6: 0.27, -4: 0.225, -2: 0.096}  # friedman-mlp-nesterov@300
    belief = best_rate(prior(2**-7.8), [Run(2.0**x, 1 / 3, y) for x, y in tried.items()])
    assert -4 < math.log2(belief.quantile(0.5)) < -1


def test_noise_alone_is_not_taken_for_overfitting() -> None:
    """Here longer cycles are no better than short ones, and so half of them score worse."""
    errors = [octaves(study(0.1, seed=seed, gain=0.0), 0.1) for seed in range(40)]
    assert abs(np.median(errors)) < 0.4
    assert np.quantile(np.abs(errors), 0.9) < 1.2


def test_a_longer_cycle_that_scores_worse_was_too_high() -> None:
    lone = [Run(0.1, 1 / 9, 0.5), Run(0.1, 1 / 3, 0.5 + 1e-9)]
    assert best_rate(prior(), lone).quantile(0.5) == pytest.approx(0.1, rel=0.02)
    rates = [0.05, 0.1, 0.2]
    runs = [Run(rate, 1 / 3, 0.5 - 0.01 * k) for k, rate in enumerate(rates)]
    fine = best_rate(prior(), [*runs, Run(0.1, 1.0, 0.45)]).quantile(0.5)
    overfitted = best_rate(prior(), [*runs, Run(0.1, 1.0, 0.9)]).quantile(0.5)
    assert overfitted < 0.6 * fine


def test_the_interval_covers_the_best_rate() -> None:
    """Optima drawn from the prior that the model assumes: t with two degrees, 1.2 octaves."""
    rng, covered = np.random.default_rng(0), []
    for seed in range(150):
        best = 0.1 * 2 ** (1.2 * rng.standard_t(2))
        found = refined(prior(), study(best, seed=seed))
        covered.append(found.interval[0] <= best <= found.interval[1])
        assert found.low < found.interval[0] < found.centre < found.interval[1] <= found.high
    assert 0.8 <= np.mean(covered) <= 0.99  # 0.90 claimed


def test_the_interval_ends_below_divergence() -> None:
    rates = (0.2, 0.45, 1.6)  # of which the highest, just below the edge at 2, is hardly worse
    scores = (0.5, 0.4, 0.41)
    runs = [Run(*run) for run in zip(rates, [1 / 3] * 3, scores, strict=True)]
    found = refined(prior(), runs)
    assert edge_of(prior(), runs) == 2
    assert found.centre <= found.interval[1] <= found.high < 2


@pytest.mark.parametrize(
    ("scores", "edge"),
    [
        ({0.4: 0.5, 1.6: 0.2}, 6.4),
        ({0.4: 0.5, 1.6: 0.2, 6.0: math.inf}, 6.0),
        ({0.4: 0.5, 0.9: 0.2, 1.6: math.inf}, 2.0),
        ({0.4: 0.2, 1.6: 0.5}, 2.0),
        ({0.4: math.inf, 1.6: math.inf}, 2.0),
    ],
)
def test_a_best_run_just_below_the_divergence_edge_moves_the_edge(
    scores: dict[float, float], edge: float
) -> None:
    """Sweeps diverge some two octaves above good rates: nearer, it is the edge that is doubted."""
    runs = [Run(rate, 1 / 3, score) for rate, score in scores.items()]
    assert edge_of(prior(), runs) == pytest.approx(edge)
    assert refined(prior(), runs).high < edge
    assert refined(prior(), runs).lr_diverged == 2  # which says what sweeps did


def test_little_is_not_taken_for_certainty() -> None:
    """Two runs about a centre that nothing supports, in a window of 23 octaves."""
    blind = Proposal(
        centre=3e-3,
        low=1e-6,
        high=10.0,
        interval=(1e-6, 10.0),
        lr_diverged=None,
        reliable=False,
        reason="",
    )
    found = refined(blind, [Run(3e-3, 1 / 9, 0.5), Run(0.03, 1 / 9, 0.4)])
    assert not found.reliable
    assert found.low <= 1e-6 and found.high >= 10.0
    assert found.centre > 3e-3


@pytest.mark.parametrize("rate", [0.1, 0.002])
def test_what_little_there_is_does_not_take_reliability_from_range_tests(rate: float) -> None:
    """Two runs at one rate, as in each further context; unless they are far from the prior's."""
    near = prior(rate)
    found = refined(near, [Run(0.1, 1 / 9, 0.5), Run(0.1, 1 / 9, 0.51)])
    assert math.log2(found.interval[1] / found.interval[0]) > 4
    assert found.low <= near.low and found.high >= near.high
    assert found.reliable == (near.low <= found.centre <= near.high)
    assert found.reliable or rate < 0.1


def test_nothing_passes_the_divergence_edge() -> None:
    edge = dataclasses.replace(prior(), lr_diverged=0.2)
    runs = [Run(rate, 1 / 9, score) for rate, score in ((0.02, 0.9), (0.05, 0.1), (0.18, 0.11))]
    found = refined(edge, runs)
    assert found.centre < found.high < 0.2
    assert edge.moved(4.0).high < 0.2


def test_without_two_runs_of_a_length_it_is_the_prior() -> None:
    assert refined(prior(), []) == prior()
    assert refined(prior(), [Run(0.1, 1 / 9, 0.5), Run(0.1, 1 / 3, 0.4)]) == prior()


def test_two_runs_already_lean_to_the_better() -> None:
    runs = [Run(0.05, 1.0, 0.1), Run(0.2, 1.0, 0.9)]
    assert refined(prior(), runs).centre < 0.1
    assert refined(prior(), [Run(0.05, 1.0, 0.9), Run(0.2, 1.0, 0.1)]).centre > 0.1


def test_what_diverged_pushes_down() -> None:
    one = best_rate(prior(), [Run(0.1, 1.0, math.inf)]).quantile(0.5)
    two = best_rate(prior(), [Run(0.1, 1.0, math.inf), Run(0.05, 1.0, math.inf)]).quantile(0.5)
    assert two < 0.6 * one < 0.06 * 0.6
    mixed = [Run(0.05, 1.0, 0.3), Run(0.1, 1.0, 0.31), Run(0.2, 1.0, math.inf)]
    assert best_rate(prior(), mixed).quantile(0.5) < 0.08
    assert best_rate(prior(), mixed).quantile(0.95) < 0.2


def test_a_slope_between_lengths_carries_on() -> None:
    """The best rate halves with every factor three in length: beyond what is usual."""

    def found(*best: float) -> float:
        rates = [0.4 / 2**k for k in range(6)]
        runs = [
            Run(rate, share, 0.6 - share + 0.02 * math.log2(rate / here) ** 2)
            for share, here in zip((1 / 9, 1 / 3), best, strict=True)
            for rate in rates
        ]
        return math.log2(best_rate(prior(), runs).quantile(0.5))

    assert found(0.2, 0.1) < found(0.1, 0.1) - 0.1
    assert found(0.1, 0.2) > found(0.2, 0.2) + 0.1 > found(0.1, 0.1) + 0.4


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(-3, 2),
    st.floats(1e-3, 1e3),
    st.floats(-100, 100),
    st.floats(1e-4, 10),
)
def test_unit_and_zero_of_score_and_rate_do_not_matter(
    seed: int, off: float, scale: float, offset: float, rate: float
) -> None:
    runs = study(0.1 * 2**off, seed=seed)
    moved = [
        Run(run.max_lr * rate, run.share, run.score * scale + offset)
        if math.isfinite(run.score)
        else run._replace(max_lr=run.max_lr * rate)
        for run in runs
    ]
    plain, other = best_rate(prior(), runs), best_rate(prior(0.1 * rate), moved)
    for share in (0.05, 0.5, 0.95):
        assert other.quantile(share) / rate == pytest.approx(plain.quantile(share), rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            Run,
            st.floats(1e-8, 1e3),
            st.sampled_from([1 / 9, 1 / 3, 1.0]),
            st.one_of(st.just(math.inf), st.floats(-1e12, 1e12)),
        ),
        max_size=12,
    ),
    st.booleans(),
)
def test_any_runs_give_a_usable_proposal(runs: list[Run], reliable: bool) -> None:
    found = refined(prior(reliable=reliable), runs)
    assert 0 < found.low < found.centre < found.high < math.inf
