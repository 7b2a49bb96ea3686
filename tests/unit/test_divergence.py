"""The rules on runs in progress: when a sweep has seen enough, and when a run is beyond hope."""

from __future__ import annotations

import math

import numpy as np
import pytest
from planted import CURVES, GOOD, Array, Curve, X, noise, of, truth

from hpsched.divergence import (
    MIN_POINTS,
    ROUNDING,
    collapsed,
    exploded,
    jitter,
    median,
    running_median,
    should_stop,
)
from hpsched.lr_curve import RangeTest


def features(test: RangeTest) -> tuple[float, float, float]:
    assert test.lr_steepest and test.lr_minimum and test.lr_diverged
    return math.log10(test.lr_steepest), math.log10(test.lr_minimum), math.log10(test.lr_diverged)


# ------------------------------------------------------------------ should_stop


def stops_at(losses: Array, block: int = 10) -> int | None:
    blocks = range(block, len(losses) + block, block)
    return next((k for k in blocks if should_stop(losses[:k])), None)


def plainly_stops(y: Array) -> bool:
    """The rule without its shortcuts."""
    start = np.median(y[:MIN_POINTS])
    smooth = np.array([np.median(y[min(max(i - 2, 0), len(y) - 5) :][:5]) for i in range(len(y))])
    gain = np.maximum(start - np.minimum.accumulate(smooth), 0)
    margin = np.maximum(gain, max(8 * jitter(y), ROUNDING * abs(start)))
    return bool((smooth > start + margin).any())


@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.3, 2.0])
@pytest.mark.parametrize("loss", CURVES)
def test_shortcuts_change_no_decision(loss: Curve, sigma: float) -> None:
    losses = np.round(loss(X) + noise(100, 0, sigma), 3)  # ties, too
    for k in range(MIN_POINTS, 101):
        assert should_stop(losses[:k]) == plainly_stops(losses[:k])
        assert median(losses[:k]) == np.median(losses[:k])


def test_a_running_median_is_that_of_the_window() -> None:
    y = noise(11, 0, 1.0)
    inner = [float(np.median(y[i - 2 : i + 3])) for i in range(2, 9)]
    assert running_median(y, 5).tolist() == [*[inner[0]] * 2, *inner, *[inner[-1]] * 2]


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
