"""lr_curve against planted curves whose features are known, and against every way to fail."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpsched.errors import UsageError
from hpsched.lr_curve import Proposal, RangeTest, collapsed, exploded, pool, should_stop

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


def noise(size: int, seed: int, sigma: float) -> Array:
    return sigma * np.random.default_rng(seed).normal(size=size)


def sweep(loss: Curve, sigma: float = 0.0, seed: int = 0, x: Array = X) -> RangeTest:
    return of(loss(x) + noise(len(x), seed, sigma), x)


def of(losses: Array, x: Array = X) -> RangeTest:
    return RangeTest(lrs=tuple(10**x), losses=tuple(losses))


def features(test: RangeTest) -> tuple[float, float, float]:
    assert test.lr_steepest and test.lr_minimum and test.lr_diverged
    return math.log10(test.lr_steepest), math.log10(test.lr_minimum), math.log10(test.lr_diverged)


CURVES = [
    planted(-1.0, 0.25, 1.2, 0.1),
    planted(-1.0, 0.15, 0.8, 0.05),
    planted(-1.5, 0.3, 1.0, 0.25),
    planted(-2.0, 0.2, 1.0, 0.1),
    planted(-3.0, 0.4, 1.5, 0.15),
]
GOOD = CURVES[0]


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


def test_suggestion_is_the_geometric_mean_of_the_two_rules() -> None:
    test = sweep(CURVES[3], 0.05)
    assert test.lr_steepest and test.lr_minimum
    assert test.suggestion == pytest.approx(math.sqrt(test.lr_steepest * test.lr_minimum))


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


def test_rules_that_disagree_widen_the_window() -> None:
    """A steep fall first and a long slow one after: the rules lie three decades apart."""
    losses = planted(-4.0, 0.2, 3.5, 0.1)(X) - 0.2 * (X + 4) * (X > -4)
    test = of(losses)
    assert test.lr_steepest and test.lr_minimum and test.window
    assert test.lr_minimum > 100 * test.lr_steepest
    assert test.window == pytest.approx((test.lr_steepest, test.lr_minimum))
    pooled = pool([test, test])
    assert (pooled.low, pooled.high) == pytest.approx((test.lr_steepest, test.lr_minimum))


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


# ------------------------------------------------------------------ pooling


def at(shift: float, seed: int = 0, sigma: float = 0.03) -> RangeTest:
    return sweep(planted(-2.0 + shift, 0.2, 1.5, 0.1), sigma, seed)


def test_one_replicate_pools_to_its_own_window() -> None:
    test = at(0.0)
    proposal = pool([test])
    assert test.window and test.suggestion
    assert (proposal.centre, proposal.reliable, proposal.replicates) == (
        pytest.approx(test.suggestion),
        True,
        1,
    )
    assert (proposal.low, proposal.high) == pytest.approx(test.window)


def test_agreeing_replicates_keep_the_window() -> None:
    tests = [at(0.0, seed) for seed in range(5)]
    proposal = pool(tests)
    assert proposal.centre == pytest.approx(np.median([t.suggestion for t in tests]))
    assert proposal.low == pytest.approx(proposal.centre / 4)
    assert proposal.high == pytest.approx(proposal.centre * 4)
    assert "5 of 5" in proposal.reason


def test_disagreeing_replicates_widen_the_window() -> None:
    tests = [at(-0.7), at(0.0), at(0.7)]
    proposal = pool(tests)
    centres = [t.suggestion for t in tests]
    assert proposal.centre == pytest.approx(centres[1])
    assert centres[0] and proposal.low < centres[0]
    assert proposal.low < proposal.centre / 4
    assert "octaves" in proposal.reason


def undiverged(steepest: float) -> RangeTest:
    """A fall and a rise that gives back half the gain: reliable, and no edge to cut anything."""
    fall, rise = (1 / (1 + np.exp(-(X - at) / 0.15)) for at in (steepest, steepest + 1))
    return of(2.3 - fall + 0.5 * rise)


def test_disagreement_alone_widens_both_ends() -> None:
    low, high = undiverged(-3.5), undiverged(-2.0)
    proposal = pool([low, low, high, high])
    assert low.suggestion and high.suggestion and proposal.lr_diverged is None
    assert proposal.centre == pytest.approx(math.sqrt(low.suggestion * high.suggestion))
    assert (proposal.low, proposal.high) == pytest.approx((low.suggestion / 2, 2 * high.suggestion))


def test_the_lowest_edge_cuts() -> None:
    tests = [at(0.0), at(-1.6)]
    edges = [t.lr_diverged for t in tests if t.lr_diverged]
    proposal = pool(tests)
    assert proposal.lr_diverged == min(edges)
    assert proposal.low < proposal.centre < proposal.high < min(edges)


def test_the_lowest_edge_wins_over_the_median() -> None:
    tests = [at(1.0), at(1.1), at(-1.5)]
    proposal = pool(tests)
    assert proposal.lr_diverged == tests[2].lr_diverged
    assert proposal.centre < proposal.high < (proposal.lr_diverged or 0)


def test_unreliable_replicates_count_for_nothing_but_the_edge() -> None:
    flat = of(np.full(100, 2.3))
    proposal = pool([flat, at(0.0), flat])
    assert proposal.centre == pytest.approx(at(0.0).suggestion)
    assert "1 of 3" in proposal.reason
    early = of(np.where(X > -1.9, 1e6, 2.3))
    assert pool([early, at(0.0)]).lr_diverged == early.lr_diverged


def test_no_reliable_replicate_falls_back_on_the_sweep() -> None:
    proposal = pool([of(np.full(100, 2.3)), of(np.full(100, 2.3))])
    assert not proposal.reliable
    assert (proposal.low, proposal.high) == pytest.approx((1e-6, 10.0))
    assert proposal.centre == pytest.approx(math.sqrt(1e-5))
    assert proposal.reason.count("never falls") == 1


def test_the_fallback_stays_below_divergence() -> None:
    proposal = pool([of(np.where(X > -1, 1e6, 2.3))])
    assert not proposal.reliable
    assert proposal.lr_diverged == pytest.approx(0.1, rel=0.3)
    assert proposal.low < proposal.centre < proposal.high < 0.1


def test_pool_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="no range tests"):
        pool([])


def test_proposal_is_plain_data() -> None:
    proposal = pool([at(0.0)])
    assert Proposal(**dataclasses.asdict(proposal)) == proposal


# ------------------------------------------------------------------ should_stop


def stops_at(losses: Array, block: int = 10) -> int | None:
    blocks = range(block, len(losses) + block, block)
    return next((k for k in blocks if should_stop(losses[:k])), None)


@pytest.mark.parametrize("offset", [0.0, -2.3, -50.0])
@pytest.mark.parametrize("loss", CURVES)
def test_a_sweep_stops_after_divergence_and_reads_the_same(loss: Curve, offset: float) -> None:
    losses = loss(X) + offset + noise(100, 1, 0.05)
    _, _, edge = truth(loss)
    end = stops_at(losses)
    assert end is not None
    assert X[min(end, 100) - 1] > edge
    assert X[end - 11] < edge + 0.5
    cut, whole = of(losses[:end], X[:end]), of(losses)
    assert features(cut) == pytest.approx(features(whole), abs=0.05)


def test_noise_never_stops_a_sweep() -> None:
    assert [s for s in range(200) if stops_at(2.3 + noise(100, s, 0.1)) is not None] == []


def test_single_outliers_never_stop_a_sweep() -> None:
    losses = 2.3 + noise(100, 0, 0.05)
    losses[::12] = 1e5
    assert stops_at(losses) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_stops_a_sweep(bad: float) -> None:
    assert should_stop([2.3, bad])
    assert should_stop([bad])
    assert not should_stop([2.3, 2.2])


def test_no_losses_or_a_constant_stop_nothing() -> None:
    assert not should_stop([])
    assert not should_stop([0.0] * 100)
    assert not should_stop([2.3] * 50 + [2.3 + 1e-7] * 50)


def test_an_explosion_that_came_back_still_stops() -> None:
    losses = GOOD(X[:97])
    assert should_stop(np.concatenate([losses, np.full(60, 2.3)]))


# ------------------------------------------------------------------ exploded


def training(seed: int, n: int = 300, sigma: float = 0.3) -> Array:
    """An ordinary run: exponential decay with multiplicative and additive noise."""
    g = np.random.default_rng(seed)
    clean = 0.05 + 2.25 * np.exp(-np.arange(n) / 80)
    return clean * np.exp(sigma * g.normal(size=n)) + 0.02 * g.normal(size=n)


def fires_at(losses: Array, block: int = 10) -> int | None:
    blocks = range(block, len(losses) + block, block)
    return next((k for k in blocks if exploded(losses[:k])), None)


@pytest.mark.parametrize("offset", [0.0, -2.0, 40.0])
def test_ordinary_training_never_fires(offset: float) -> None:
    assert [s for s in range(40) if fires_at(training(s) + offset) is not None] == []


def test_rising_from_a_very_low_loss_by_fluctuation_does_not_fire() -> None:
    """A converged model: losses of 1e-4 with bursts to 0.05, log-normal."""
    for seed in range(40):
        losses = 1e-3 * np.exp(1.5 * np.random.default_rng(seed).normal(size=300))
        assert fires_at(losses) is None


def test_overfitting_or_forgetting_does_not_fire() -> None:
    back_to_chance = np.concatenate([training(0, 200), 2.3 + noise(100, 0, 0.1)])
    assert fires_at(back_to_chance) is None


def test_a_short_spike_does_not_fire() -> None:
    losses = training(0)
    losses[100:110] = 500.0
    assert fires_at(losses) is None


@pytest.mark.parametrize("offset", [0.0, -2.3, -40.0])
def test_an_explosion_fires_within_forty_losses(offset: float) -> None:
    losses = training(1) + offset
    losses[150:] = 1e4 * (1 + 0.3 * np.random.default_rng(0).normal(size=150))
    end = fires_at(losses)
    assert end is not None and 160 < end <= 190
    assert "lower max_lr" in (exploded(losses[:end]) or "")


def test_a_run_that_never_learned_and_exploded_fires() -> None:
    losses = np.concatenate([2.3 + noise(40, 0, 0.05), np.geomspace(3, 1e6, 60)])
    assert fires_at(losses) is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_fires_at_once_and_names_its_step(bad: float) -> None:
    reason = exploded([2.3, 2.2, bad, 2.0])
    assert reason is not None
    assert f"{bad} at step 2" in reason
    assert exploded([bad]) is not None


def test_short_or_constant_runs_do_not_fire() -> None:
    assert exploded([]) is None
    assert exploded([1.0, 100.0, 1e6]) is None
    assert exploded([0.0] * 100) is None


def test_each_margin_of_the_explosion_rule_counts() -> None:
    """Noiseless runs: a start of 1 may grow to 4, a gain of 10 may be lost five times over."""
    flat = np.ones(40)
    assert exploded(np.concatenate([flat, np.full(30, 3.9)])) is None
    assert exploded(np.concatenate([flat, np.full(30, 4.1)])) is not None
    fallen = np.concatenate([np.zeros(20), np.full(20, -10.0)])
    assert exploded(np.concatenate([fallen, np.full(30, 49.0)])) is None
    assert exploded(np.concatenate([fallen, np.full(30, 51.0)])) is not None


# ------------------------------------------------------------------ a finished run


@pytest.mark.parametrize("offset", [0.0, -40.0])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_run_that_died_at_chance_has_collapsed(offset: float, scale: float) -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(300)
    trained = 2.3 * np.exp(-steps / 60) + 0.05 * rng.standard_normal(300)
    died = np.where(steps < 100, trained, 2.3 + 0.01 * rng.standard_normal(300))
    flat = 2.3 + 0.05 * rng.standard_normal(300)
    recovered = np.where((steps > 100) & (steps < 180), 2.4, trained)
    assert "died" in str(collapsed(scale * died + offset))
    for curve in (trained, flat, recovered):
        assert collapsed(scale * curve + offset) is None
    assert collapsed([2.3, 0.1, 2.3]) is None  # too short to tell


def test_a_run_that_explodes_at_its_second_step() -> None:
    assert "exploded" in str(exploded([2.3] + [1e30] * 40))
