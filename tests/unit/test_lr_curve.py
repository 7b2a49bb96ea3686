"""lr_curve against planted curves whose features are known, and against every way to fail."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import CURVES, GOOD, Array, Curve, X, centre, noise, of, planted, sweep, truth

from hpsched.divergence import exploded, should_stop
from hpsched.errors import UsageError
from hpsched.lr_curve import ABOVE, RangeTest
from hpsched.proposal import pool


def features(test: RangeTest) -> tuple[float, float, float]:
    assert test.lr_steepest and test.lr_minimum and test.lr_diverged
    return math.log10(test.lr_steepest), math.log10(test.lr_minimum), math.log10(test.lr_diverged)


# ------------------------------------------------------------------ planted curves


@pytest.mark.parametrize("loss", CURVES)
def test_smoothing_has_no_lag(loss: Curve) -> None:
    assert features(sweep(loss)) == pytest.approx(truth(loss), abs=0.1)


@pytest.mark.parametrize("loss", CURVES)
def test_features_survive_noise(loss: Curve) -> None:
    found = np.array([features(sweep(loss, 0.05, seed)) for seed in range(30)])
    assert np.median(found, axis=0) == pytest.approx(truth(loss), abs=0.1)
    assert (found.std(axis=0) < [0.25, 0.15, 0.03]).all()


@pytest.mark.parametrize("loss", CURVES)
@pytest.mark.parametrize("x", [np.linspace(-6, 1, 40), np.linspace(-5, 1, 300)])
def test_features_do_not_depend_on_the_number_of_steps(loss: Curve, x: Array) -> None:
    step = x[1] - x[0]
    assert features(sweep(loss, x=x)) == pytest.approx(truth(loss), abs=max(0.1, step))


@pytest.mark.parametrize("end", [0.7, 1.0])
def test_a_linear_sweep_reads_the_same(end: float) -> None:
    loss = planted(-1.0, 0.25, 0.8, 0.1)
    x = np.log10(np.linspace(1e-6, end, 300))
    for seed in range(5):
        test = sweep(loss, 0.03, seed, x)
        assert test.reliable, test.reason
        assert features(test)[1:] == pytest.approx(truth(loss)[1:], abs=0.15)
        assert test.suggestion
        below = ABOVE * math.log10(2)
        assert math.log10(test.suggestion) == pytest.approx(centre(loss) - below, abs=0.15)
        calm = x < -0.5
        assert np.abs(test.smoothed - loss(x))[calm[: len(test.smoothed)]].max() < 0.1


def test_the_smoothed_curve_is_between_the_noise() -> None:
    test, clean = sweep(GOOD, 0.1), GOOD(X)
    calm = X < 0  # before the wall
    error = test.smoothed[calm] - clean[calm]
    assert error.std() < 0.06 < np.std(np.array(test.losses)[calm] - clean[calm])
    assert abs(error.mean()) < 0.03


def test_a_straight_line_in_log_rate_stays_itself() -> None:
    assert of(2.0 - 0.1 * X).smoothed == pytest.approx(2.0 - 0.1 * X, abs=0.02)


def test_smoothing_is_symmetric() -> None:
    bump = np.exp(-(np.linspace(-3.5, 3.5, 100) ** 2))
    assert of(-bump).smoothed == pytest.approx(of(-bump[::-1]).smoothed[::-1])


@pytest.mark.parametrize("spike", [50.0, -50.0])
def test_single_outliers_change_nothing(spike: float) -> None:
    losses = GOOD(X)
    losses[[5, 20, 60, 70]] += spike
    assert features(of(losses)) == pytest.approx(truth(GOOD), abs=0.1)
    assert of(losses).reliable


def test_a_noisy_early_part_does_not_fool_it() -> None:
    loud = np.where(X < -3, 0.3, 0.03)
    for seed in range(20):
        test = of(GOOD(X) + loud * noise(100, seed, 1.0))
        assert test.reliable
        assert features(test) == pytest.approx(truth(GOOD), abs=0.3)


@pytest.mark.parametrize("loss", CURVES)
def test_suggestion_lies_below_the_centroid_of_the_gain(loss: Curve) -> None:
    found = [sweep(loss, 0.05, seed).suggestion or math.nan for seed in range(20)]
    below = ABOVE * math.log10(2)
    assert np.median(np.log10(found)) == pytest.approx(centre(loss) - below, abs=0.1)
    assert np.std(np.log10(found)) < 0.08


def test_the_rules_side_by_side() -> None:
    steepest, minimum, _ = truth(CURVES[3])
    rules = sweep(CURVES[3]).rules
    decades = {name: math.log10(rate) for name, rate in rules.items() if rate is not None}
    assert set(decades) == set(rules)
    assert decades["steepest"] == pytest.approx(steepest, abs=0.1)
    assert decades["minimum"] == pytest.approx(minimum, abs=0.1)
    assert decades["minimum_tenth"] == pytest.approx(decades["minimum"] - 1)
    assert decades["geometric_mean"] == pytest.approx((steepest + minimum) / 2, abs=0.1)
    onset = -2.0 + 0.2 * math.log(0.1 / 0.9)  # where a tenth of the fall has happened
    assert decades["valley"] == pytest.approx((onset + minimum) / 2, abs=0.1)
    half = -2.0 + 1.0 + 0.1 * math.log(0.5)  # the wall has taken half the fall back
    assert decades["max_stable"] == pytest.approx(half, abs=0.1)
    below = ABOVE * math.log10(2)
    assert decades["suggestion"] == pytest.approx(centre(CURVES[3]) - below, abs=0.1)
    assert -4 < decades["slide"] < minimum  # a decade below the onset


def test_rules_of_a_curve_without_descent_are_none() -> None:
    assert set(of(np.full(100, 2.3)).rules.values()) == {None}


def test_window_is_a_factor_four_either_side() -> None:
    test = sweep(planted(-3.0, 0.2, 1.8, 0.1))
    assert test.suggestion and test.window and test.lr_diverged
    assert test.lr_diverged > 5 * test.suggestion
    assert test.window == pytest.approx((test.suggestion / 4, test.suggestion * 4))


def test_window_is_cut_below_the_edge() -> None:
    test = sweep(planted(-2.0, 0.1, 0.4, 0.03))
    assert test.suggestion and test.window and test.lr_diverged
    assert test.lr_diverged < 4 * test.suggestion
    assert test.suggestion < test.window[1] < test.lr_diverged


def test_a_network_that_dies_has_diverged() -> None:
    """After the blow-up the loss returns to the start level, ln 10, and stays there."""
    losses = np.where(X > 0, 2.3, np.minimum(GOOD(X), 2.3)) + noise(100, 1, 0.02)
    test = of(losses)
    assert test.lr_diverged == pytest.approx(1.0, rel=0.3)
    assert test.reliable


def test_a_lower_loss_after_divergence_is_not_the_minimum() -> None:
    losses = GOOD(X)
    losses[X > 0.6] = 0.5
    assert features(of(losses)) == pytest.approx(truth(GOOD), abs=0.1)


# ------------------------------------------------------------------ properties

CURVE = st.builds(
    planted,
    steepest=st.floats(-3.5, -1.5),
    width=st.floats(0.15, 0.4),
    gap=st.floats(1.0, 1.6),
    wall=st.floats(0.05, 0.25),
)
SIGMA = st.floats(0.005, 0.1)
SEED = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(CURVE, SIGMA, SEED, st.floats(-100, 100), st.floats(1e-3, 1e3))
def test_offset_and_scale_change_no_rate(
    loss: Curve, sigma: float, seed: int, offset: float, scale: float
) -> None:
    losses = loss(X) + noise(100, seed, sigma)
    plain, moved = of(losses), of(scale * losses + offset)
    assert features(moved) == pytest.approx(features(plain), abs=1e-6)
    assert moved.reliable == plain.reliable
    assert moved.smoothed == pytest.approx(scale * plain.smoothed + offset, rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(CURVE, SIGMA, SEED, st.floats(-100, 100), st.floats(1e-3, 1e3))
def test_online_rules_need_no_zero(
    loss: Curve, sigma: float, seed: int, offset: float, scale: float
) -> None:
    losses = loss(X) + noise(100, seed, sigma)
    for k in (20, 40, 60, 80, 90, 100):
        assert should_stop(scale * losses[:k] + offset) == should_stop(losses[:k])


@settings(max_examples=60, deadline=None)
@given(CURVE, SIGMA, SEED, st.integers(12, 200))
def test_window_holds_the_suggestion_below_the_edge(
    loss: Curve, sigma: float, seed: int, n: int
) -> None:
    test = sweep(loss, sigma, seed, np.linspace(-6, 1, n))
    assert (test.suggestion is None) == (test.window is None) == (not test.reliable)
    if test.window is not None and test.suggestion is not None:
        low, high = test.window
        assert 0 < low < test.suggestion < high < (test.lr_diverged or math.inf)


FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=32)


@settings(max_examples=150, deadline=None)
@given(st.lists(FLOATS, min_size=0, max_size=60), st.booleans())
def test_any_losses_give_a_usable_proposal(losses: list[float], long: bool) -> None:
    lrs = tuple(10 ** np.linspace(-6, 1, max(len(losses), 1) + (5 if long else 0)))
    test = RangeTest(lrs=lrs, losses=tuple(losses))
    proposal = pool([test])
    assert 0 < proposal.low < proposal.centre < proposal.high < math.inf
    assert proposal.high < (proposal.lr_diverged or math.inf)
    assert proposal.reliable == test.reliable
    assert test.reason and proposal.reason
    assert isinstance(should_stop(losses), bool)
    exploded(losses)


# ------------------------------------------------------------------ abstaining


def abstains(test: RangeTest, *words: str) -> None:
    assert not test.reliable
    assert test.suggestion is None
    assert test.window is None
    for word in words:
        assert word in test.reason


def test_a_good_curve_is_reliable_and_says_so() -> None:
    assert sweep(GOOD, 0.05).reliable
    assert "falls from a plateau" in sweep(GOOD, 0.05).reason


@pytest.mark.parametrize("level", [2.302585, 0.0, -7.0, 1e6])
def test_a_constant_loss_abstains(level: float) -> None:
    test = of(np.full(100, level))
    abstains(test, "never falls", "raise end_lr")
    assert test.lr_steepest is test.lr_minimum is test.lr_diverged is None


def test_float32_rounding_is_not_a_descent() -> None:
    losses = np.full(100, 2.3)
    losses[50:80] -= 1e-7
    abstains(of(losses), "never falls")


@pytest.mark.parametrize("n", [12, 30, 100])
def test_pure_noise_abstains(n: int) -> None:
    x = np.linspace(-6, 1, n)
    tests = [of(2.3 + noise(n, seed, 0.1), x) for seed in range(200)]
    assert sum(t.lr_minimum is not None for t in tests) <= 4
    assert sum(t.reliable for t in tests) <= 2


def test_a_descent_in_the_noise_abstains_and_out_of_it_does_not() -> None:
    small = planted(-1.0, 0.25, 1.2, 0.1, drop=0.1)
    abstains(sweep(small, 0.1), "significantly")
    assert sweep(small, 0.01).reliable


@pytest.mark.parametrize("n", [0, 1, 3, 9])
def test_too_few_points_abstain(n: int) -> None:
    test = RangeTest(lrs=tuple(10**X), losses=tuple(GOOD(X)[:n]))
    abstains(test, f"only {n} losses", "more steps")
    assert len(test.smoothed) == n


def test_a_dozen_points_are_good_to_a_step() -> None:
    loss, x = planted(-2.5, 0.5, 2.5, 0.3), np.linspace(-6, 1, 12)
    test = sweep(loss, x=x)
    assert test.reliable and test.suggestion
    assert math.log10(test.suggestion) == pytest.approx(sum(truth(loss)[:2]) / 2, abs=x[1] - x[0])


def test_starting_too_high_abstains() -> None:
    abstains(sweep(GOOD, 0.02, x=np.linspace(-1.2, 1, 100)), "starts too high", "lower start_lr")
    assert sweep(GOOD, 0.02, x=np.linspace(-3, 1, 100)).reliable


def test_ending_too_low_abstains() -> None:
    abstains(sweep(GOOD, 0.02, x=np.linspace(-6, -0.8, 100)), "ends too low", "raise end_lr")


def test_a_fall_to_a_second_plateau_has_not_ended() -> None:
    flat = planted(-2.0, 0.15, 50.0, 0.1)
    test = sweep(flat, 0.02)
    abstains(test, "ends too low")
    assert test.lr_diverged is None


def test_diverging_without_descent_abstains_and_reports_the_edge() -> None:
    losses = 2.3 + noise(100, 0, 0.02) + np.exp(np.minimum((X + 1) / 0.1, 60))
    test = of(losses)
    abstains(test, "before it diverges")
    assert test.lr_diverged == pytest.approx(10**-1.1, rel=0.5)


# ------------------------------------------------------------------ non-finite and negative losses


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_ends_the_curve(bad: float) -> None:
    _, minimum, _ = truth(GOOD)
    cut = int(np.searchsorted(X, minimum + 0.15))
    losses = GOOD(X)
    losses[cut] = bad
    test = of(losses)
    assert test.lr_diverged == pytest.approx(10 ** X[cut])
    assert len(test.smoothed) == cut
    assert np.isfinite(test.smoothed).all()
    assert test.reliable


def test_what_follows_a_non_finite_loss_does_not_matter() -> None:
    one, two = GOOD(X), GOOD(X)
    one[80], two[80] = math.nan, math.nan
    two[81:] = -1e9
    assert of(one).suggestion == of(two).suggestion


def test_non_finite_from_the_first_step_is_no_matter_of_the_rate() -> None:
    test = of(np.full(100, math.nan))
    abstains(test, "first loss is not finite", "data")
    assert test.lr_diverged is None


def test_non_finite_after_a_few_steps_says_lower_start_lr() -> None:
    test = RangeTest(lrs=tuple(10 ** X[:5]), losses=(2.3, 2.3, 2.3, 2.3, math.nan))
    abstains(test, "only 4 losses", "lower start_lr")
    assert test.lr_diverged == pytest.approx(10 ** X[4])


def test_an_explosion_to_1e300_does_not_move_the_curve() -> None:
    losses = GOOD(X)
    wild = np.where(losses > 10, 1e300, losses)
    assert features(of(wild)) == pytest.approx(features(of(losses)), abs=0.05)


def test_negative_losses_work() -> None:
    assert features(of(GOOD(X) - 50)) == pytest.approx(truth(GOOD), abs=0.1)


# ------------------------------------------------------------------ the record


def test_record_is_frozen_pickles_and_hashes() -> None:
    test = sweep(GOOD, 0.05)
    assert test.reliable  # fills the cache, which must pickle too
    again = pickle.loads(pickle.dumps(test))
    assert again == test
    assert hash(again) == hash(test)
    assert again.suggestion == test.suggestion
    with pytest.raises(dataclasses.FrozenInstanceError):
        test.lrs = ()  # type: ignore[misc]


def test_record_takes_lists_and_metadata() -> None:
    test = RangeTest(lrs=[0.1, 1], losses=[2, 1], weight_decay=1e-4, seed=3)  # type: ignore[arg-type]
    assert test.lrs == (0.1, 1.0)
    assert (test.weight_decay, test.seed, test.momentum, test.optimizer, test.seconds) == (
        1e-4,
        3,
        None,
        None,
        None,
    )


def test_planned_rates_may_go_past_the_losses() -> None:
    cut = RangeTest(lrs=tuple(10**X), losses=tuple(GOOD(X)[:95]))
    assert cut.suggestion == of(GOOD(X)[:95], X[:95]).suggestion


@pytest.mark.parametrize(
    ("lrs", "losses"),
    [
        ((), ()),
        ((0.1,), (1.0, 2.0)),
        ((0.0, 0.1), (1.0, 2.0)),
        ((-0.1, 0.1), (1.0, 2.0)),
        ((0.1, math.inf), (1.0, 2.0)),
        ((0.1, math.nan), (1.0, 2.0)),
        ((0.1, 0.1), (1.0, 2.0)),
        ((0.2, 0.1), (1.0, 2.0)),
    ],
)
def test_impossible_rates_are_refused(lrs: tuple[float, ...], losses: tuple[float, ...]) -> None:
    with pytest.raises(UsageError):
        RangeTest(lrs=lrs, losses=losses)
