"""The Gaussian process: its scale, against a textbook, what it learns of lengths, no NaN."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from hpsched import surrogate
from hpsched.surrogate import Belief, believe, expected_improvement, scaled

RELEVANCE = np.array([2.0, 0.5, 0.05])
CERTAINTY = np.array([0.6, 0.05, 0.0])
D = len(RELEVANCE)


def draw(seed: int, n: int, levels: int = 3) -> tuple[Any, Any, Any]:
    """Places, levels and scores of a made-up study: a bowl, a wave, noise."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.standard_normal((n, D))
    level = rng.integers(0, levels, n).astype(float)
    score = 0.3 * z[:, 0] ** 2 + np.sin(z[:, 1]) + level + 0.3 * rng.standard_normal(n)
    return z, level, score


def told(z: Any, level: Any, score: Any) -> Belief:
    return believe(
        np.array(z, dtype=float),
        np.array(level, dtype=float),
        np.array(score, dtype=float),
        RELEVANCE,
        CERTAINTY,
    )


def full(z: Any, score: Any) -> Belief:
    return told(z, np.zeros(len(z)), score)


def with_settings(
    monkeypatch: pytest.MonkeyPatch,
    lengths: tuple[float, ...],
    agreements: tuple[float, ...],
    noises: tuple[float, ...],
) -> None:
    monkeypatch.setattr(surrogate, "LENGTHS", lengths)
    monkeypatch.setattr(surrogate, "AGREEMENTS", agreements)
    monkeypatch.setattr(surrogate, "NOISES", noises)
    monkeypatch.setattr(surrogate, "NEGLIGIBLE", 0.0)


# ------------------------------------------------------------------ the scale


numbers = st.floats(-100, 100).map(lambda value: round(value, 3))
runs = st.lists(st.tuples(numbers | st.just(math.inf), st.integers(0, 2)), min_size=1, max_size=30)


def columns(pairs: list[tuple[float, int]]) -> tuple[Any, Any]:
    return np.array([s for s, _ in pairs]), np.array([float(level) for _, level in pairs])


def test_scaled_values() -> None:
    """The unit is the 40 % quantile of what lies above the best: 2 of 0, 1, 2, 3, 4, 40 …"""
    score = np.array([5.0, 6.0, 7.0, 8.0, 9.0, 45.0])
    expected = [math.asinh(above / 2) for above in (0, 1, 2, 3, 4, 40)]
    assert scaled(score, np.zeros(6)) == pytest.approx(expected)


def test_the_unit_is_no_less_than_a_share_of_the_range() -> None:
    """Most scores are the same: the smallest difference must not become the whole scale."""
    score = np.array([1.0, 1.0, 1.0, 1.0, 1.001, 2.0])
    assert scaled(score, np.zeros(6)) == pytest.approx(
        [0, 0, 0, 0, math.asinh(0.001 / 0.02), math.asinh(1 / 0.02)]
    )


@given(runs, numbers, st.floats(0.01, 100), st.integers(0, 2))
def test_scaled_ignores_shift_and_scale_of_each_level(
    pairs: list[tuple[float, int]], shift: float, scale: float, which: int
) -> None:
    score, level = columns(pairs)
    moved = np.where(level == which, shift + scale * score, score)
    assert scaled(moved, level) == pytest.approx(scaled(score, level), abs=1e-6)


@given(runs)
@example([(math.inf, 0)])
@example([(math.inf, 0), (math.inf, 0), (1.0, 1)])
@example([(3.0, 0)])
@example([(3.0, 0), (3.0, 0), (math.inf, 0)])
def test_scaled_is_monotone_from_zero_up_and_finite(pairs: list[tuple[float, int]]) -> None:
    score, level = columns(pairs)
    found = scaled(score, level)
    assert np.isfinite(found).all() and (found >= 0).all()
    for one in set(level):
        mine, theirs = found[level == one], score[level == one]
        order = np.argsort(theirs, kind="stable")
        assert (np.diff(mine[order]) >= 0).all()
        finite = np.isfinite(theirs)
        if finite.any():
            assert mine.min() == 0
            assert (mine[~finite] == mine[finite].max() + surrogate.WORST).all()
        else:
            assert (mine == surrogate.WORST).all()


def test_scaled_leaves_the_order_strict() -> None:
    score = np.random.default_rng(0).standard_normal(50)
    found = scaled(score, np.zeros(50))
    assert list(np.argsort(found)) == list(np.argsort(score))


def test_equal_scores_and_a_single_one_are_all_the_best() -> None:
    assert list(scaled(np.full(4, 0.7), np.zeros(4))) == [0, 0, 0, 0]
    assert list(scaled(np.array([0.7]), np.zeros(1))) == [0]
    assert list(scaled(np.array([0.7, 3.0]), np.array([0.0, 1.0]))) == [0, 0]


# ------------------------------------------------------------------ against a textbook


def covariance(a: Any, la: float, b: Any, lb: float, length: float, rho: float) -> float:
    """Of two scores, written out."""
    apart = sum(r * (p - q) ** 2 / length**2 for p, q, r in zip(a, b, RELEVANCE, strict=True))
    steep = sum(
        c**2 * min(p**2, 9.0) * min(q**2, 9.0) for p, q, c in zip(a, b, CERTAINTY, strict=True)
    )
    tilt = sum(
        (2 * 0.8 * c) ** 2 * np.clip(p, -3, 3) * np.clip(q, -3, 3)
        for p, q, c in zip(a, b, CERTAINTY, strict=True)
    )
    same = (1.3**2 * math.exp(-apart / 2) + 0.3**2 * steep + tilt) * rho ** abs(la - lb)
    return same + (2.0**2 if la == lb else 0.0)


def bowl(a: Any) -> float:
    return sum(c * min(p**2, 9.0) for p, c in zip(a, CERTAINTY, strict=True))


class Textbook:
    """Rasmussen and Williams, equations 2.25, 2.26 and 2.30, with one setting."""

    def __init__(self, z: Any, level: Any, y: Any, length: float, rho: float, noise: float) -> None:
        self.z, self.level, self.length, self.rho = z, level, length, rho
        self.prior_mean = np.array([bowl(a) for a in z])
        rows = list(zip(z, level, strict=True))
        gram = [[covariance(a, la, b, lb, length, rho) for b, lb in rows] for a, la in rows]
        self.gram = np.array(gram) + noise**2 * np.eye(len(z))
        self.y = y

    @property
    def evidence(self) -> float:
        normal = stats.multivariate_normal(self.prior_mean, self.gram)
        return float(normal.logpdf(self.y))

    def __call__(self, places: Any) -> tuple[Any, Any]:
        means, variances = [], []
        for place in places:
            cross = np.array(
                [
                    covariance(place, 0.0, b, lb, self.length, self.rho)
                    for b, lb in zip(self.z, self.level, strict=True)
                ]
            )
            prior = covariance(place, 0.0, place, 0.0, self.length, self.rho)
            gain = np.linalg.solve(self.gram, cross)
            means.append(bowl(place) + gain @ (self.y - self.prior_mean))
            variances.append(prior - gain @ cross)
        return np.array(means), np.array(variances)


@pytest.mark.parametrize(("length", "rho", "noise"), [(2.0, 0.6, 0.3), (1.0, 0.95, 0.1)])
def test_with_one_setting_it_is_a_plain_gaussian_process(
    length: float, rho: float, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_settings(monkeypatch, (length,), (rho,), (noise,))
    z, level, score = draw(0, 14)
    z[0] = [5.0, -4.0, 0.0]  # on the rim
    belief = told(z, level, score)
    textbook = Textbook(z, level, scaled(score, level), length, rho, noise)
    places = np.concatenate([2.5 * np.random.default_rng(1).standard_normal((9, D)), z[:3]])
    mean, sd = belief(places)
    expected, variance = textbook(places)
    assert mean == pytest.approx(expected, abs=1e-8)
    assert sd**2 == pytest.approx(variance, abs=1e-8)
    assert belief.agreement == pytest.approx(rho) and belief.noise == pytest.approx(noise)


def test_several_settings_are_averaged_by_their_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ((1.0, 3.0), (0.2, 0.9), (0.1, 0.6))
    with_settings(monkeypatch, *grid)
    z, level, score = draw(2, 10)
    belief = told(z, level, score)
    books = [Textbook(z, level, scaled(score, level), *each) for each in itertools.product(*grid)]
    evidence = np.array([book.evidence for book in books])
    weight = np.exp(evidence - evidence.max())
    weight /= weight.sum()
    assert 0.05 < weight.max() < 0.95  # more than one has a say
    places = np.random.default_rng(3).standard_normal((6, D))
    means, variances = map(np.array, zip(*(book(places) for book in books), strict=True))
    mean, sd = belief(places)
    assert mean == pytest.approx(weight @ means, abs=1e-8)
    within, between = weight @ variances, weight @ (means - weight @ means) ** 2
    assert sd**2 == pytest.approx(within + between, abs=1e-8)
    noises = [noise for _, _, noise in itertools.product(*grid)]
    assert belief.noise == pytest.approx(weight @ noises)


def test_what_explains_the_scores_badly_is_left_out_and_hardly_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    z, level, score = draw(4, 30)
    pruned = told(z, level, score)
    monkeypatch.setattr(surrogate, "NEGLIGIBLE", 0.0)
    whole = told(z, level, score)
    assert len(pruned.parts) < len(whole.parts) == 24
    assert sum(part.weight for part in pruned.parts) == pytest.approx(1)
    mean, sd = pruned(z)
    expected, spread = whole(z)
    assert mean == pytest.approx(expected, abs=0.05) and sd == pytest.approx(spread, abs=0.05)


@given(st.permutations(range(9)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_results_does_not_matter(order: list[int]) -> None:
    z, level, score = draw(5, 9)
    places = np.eye(D)
    mean, sd = told(z[order], level[order], score[order])(places)
    expected, spread = told(z, level, score)(places)
    assert mean == pytest.approx(expected, abs=1e-8) and sd == pytest.approx(spread, abs=1e-8)


# ------------------------------------------------------------------ what it makes of results


def test_the_mean_of_many_repeats_becomes_the_expected_score() -> None:
    rng = np.random.default_rng(0)
    others = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0]])

    def error(repeats: int) -> tuple[float, float]:
        scores = np.concatenate([[1.0, 2.0, 3.0], 0.5 + 0.3 * rng.standard_normal(repeats)])
        belief = full(np.concatenate([others, np.zeros((repeats, D))]), scores)
        mean, sd = belief(np.zeros((1, D)))
        return abs(float(mean[0]) - float(belief.score[3:].mean())), float(sd[0])

    few, many = error(3), error(100)
    assert many[0] < 0.01 and many[1] < 0.05
    assert few[1] > 3 * many[1]


def test_when_things_get_better_towards_an_edge_the_search_goes_on_beyond_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wrong first guess is left; if the bowl could not move, the search would stay about it."""
    tried = np.array([[-1.0, 0, 0], [0, 0, 0], [1, 0, 0], [1.5, 0, 0]])
    line = np.arange(-3, 3.5, 0.5)
    places = np.array([[x, 0, 0] for x in line])

    def next_place() -> float:
        belief = full(tried, [0.9, 0.7, 0.5, 0.4])
        gain = expected_improvement(*belief(places), float(belief(tried)[0].min()))
        return float(line[gain.argmax()])

    assert next_place() >= 2.0
    monkeypatch.setattr(surrogate, "CENTRE", 0.0)
    assert next_place() == 1.5


def test_before_it_knows_better_the_first_guess_is_the_best() -> None:
    """One result at the guess: the bowl says that all others are worse, the surer the field."""
    mean, sd = full(np.zeros((1, D)), [0.3])(
        np.array([[0, 0, 0], [1.0, 0, 0], [2.0, 0, 0], [0, 1.0, 0], [-1.0, 0, 0]])
    )
    assert mean[0] == pytest.approx(0, abs=0.05)
    assert mean[0] < mean[3] < mean[1] < mean[2]
    assert mean[1] == pytest.approx(mean[4])
    assert sd[0] < sd[3] < sd[1] < sd[2]


def test_a_slope_is_followed() -> None:
    z = np.zeros((6, D))
    z[:, 0] = np.linspace(-1.5, 1, 6)
    mean, _ = full(z, -z[:, 0])(np.array([[-2.0, 0, 0], [0, 0, 0], [2.0, 0, 0]]))
    assert mean[2] < mean[1] < mean[0]


def paired(seed: int, short: str, n: int = 20) -> tuple[float, float]:
    """Agreement, and rank correlation with the truth where only the short cycles were run."""
    rng = np.random.default_rng(seed)
    z = rng.uniform(-2, 2, (n, D))
    truth = np.sin(2 * z[:, 0]) + np.sin(2 * z[:, 1])
    known = n // 2
    scores = truth[:known] + 0.1 * rng.standard_normal(known)
    if short == "none":
        belief = full(z[:known], scores)
    else:
        seen = {"agrees": truth, "disagrees": -truth, "random": rng.permutation(truth)}[short]
        belief = told(
            np.concatenate([z[:known], z]),
            np.repeat([0.0, 1.0], [known, n]),
            np.concatenate([scores, 5 + seen + 0.1 * rng.standard_normal(n)]),
        )
    mean, _ = belief(z[known:])
    return belief.agreement, float(stats.spearmanr(mean, truth[known:]).statistic)


def test_short_cycles_inform_where_they_agree_and_are_ignored_where_not() -> None:
    kinds = ("none", "agrees", "disagrees", "random")
    found = {kind: np.array([paired(seed, kind) for seed in range(12)]) for kind in kinds}
    agreement, rank = (
        {kind: float(np.median(found[kind][:, i])) for kind in kinds} for i in (0, 1)
    )
    assert agreement["disagrees"] < 0.45 < 0.6 < agreement["none"] < 0.7 < 0.9 < agreement["agrees"]
    assert rank["agrees"] > 0.85 > rank["none"] + 0.2
    assert rank["disagrees"] > rank["none"] - 0.25  # they would say -1
    assert rank["random"] > rank["none"] - 0.25


def test_agreement_is_unknown_before_there_is_a_pair() -> None:
    z = np.random.default_rng(0).standard_normal((5, D))
    alone = full(z, z[:, 1])
    assert alone.agreement == pytest.approx(np.mean(surrogate.AGREEMENTS))
    assert told(z, np.ones(5), z[:, 1]).agreement == pytest.approx(np.mean(surrogate.AGREEMENTS))


def test_the_shorter_a_cycle_the_less_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with_settings(monkeypatch, (1.5,), (0.7,), (0.1,))
    z = np.array([[0.0, 0, 0], [0, 0, 0], [0, 2.0, 0]])  # the first in full

    def sd(level: float) -> float:
        return float(told(z, [0.0, level, level], [0.4, 0.4, 0.5])(z[2:])[1][0])

    assert sd(0.0) < sd(1.0) < sd(2.0) < float(full(z[:1], [0.4])(z[2:])[1][0])


# ------------------------------------------------------------------ trials that are running


studies = st.tuples(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 3))


@given(studies, st.lists(st.tuples(*[st.floats(-3, 3)] * D), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_an_expected_result_raises_no_doubt(
    study: tuple[int, int, int], pending: list[tuple[float, ...]]
) -> None:
    """With each setting for sure; over all of them, hardly: their weights change a little."""
    belief = told(*draw(*study))
    later = belief.with_expected(np.array(pending))
    places = np.concatenate([1.5 * np.random.default_rng(0).standard_normal((30, D)), pending])
    assert (later(places)[1] <= 1.15 * belief(places)[1]).all()

    with pytest.MonkeyPatch.context() as patch:
        with_settings(patch, (1.5,), (0.7,), (0.25,))
        belief = told(*draw(*study))
        later = belief.with_expected(np.array(pending))
        mean, sd = belief(places)
        after, less = later(places)
        assert (less <= sd + 1e-9).all()
        assert (less[-len(pending) :] < sd[-len(pending) :]).all()
        assert after == pytest.approx(mean, abs=1e-6)  # nothing new was learned


def test_what_is_running_is_not_proposed_again() -> None:
    belief = told(*draw(7, 10))
    places = 1.5 * np.random.default_rng(0).standard_normal((200, D))
    best = float(belief(belief.z)[0].min())
    gain = expected_improvement(*belief(places), best)
    first = int(gain.argmax())
    later = expected_improvement(*belief.with_expected(places[[first]])(places), best)
    assert later[first] < 0.7 * gain[first]
    assert later.argmax() != first


# ------------------------------------------------------------------ expected improvement


@given(st.floats(-4, 4), st.floats(0.05, 3), st.floats(-4, 4))
@settings(deadline=None)
def test_expected_improvement_is_the_integral(mean: float, sd: float, best: float) -> None:
    def below(score: float) -> float:
        return (best - score) * float(stats.norm.pdf(score, mean, sd))

    reach = mean - 12 * sd
    expected = integrate.quad(below, reach, best, points=[mean])[0] if best > reach else 0.0
    (found,) = expected_improvement(np.array([mean]), np.array([sd]), best)
    assert found == pytest.approx(expected, abs=1e-7)


def test_expected_improvement_grows_with_promise_and_doubt() -> None:
    mean, sd = np.array([0.0, 0.5, 1.0]), np.full(3, 0.5)
    assert (np.diff(expected_improvement(mean, sd, 0.2)) < 0).all()
    assert (np.diff(expected_improvement(np.full(3, 1.0), np.array([0.1, 0.5, 2]), 0.2)) > 0).all()
    sure = expected_improvement(np.array([-1.0, 1.0]), np.array([1e-6, 1e-6]), 0.0)
    assert sure == pytest.approx([1.0, 0.0])


# ------------------------------------------------------------------ nothing breaks it


CASES = {
    "one": (np.zeros((1, D)), [0.0], [0.3]),
    "one short": (np.ones((1, D)), [2.0], [0.3]),
    "one diverged": (np.zeros((1, D)), [0.0], [math.inf]),
    "all diverged": (draw(0, 9)[0], np.arange(9) % 3, np.full(9, math.inf)),
    "equal": (draw(0, 9)[0], np.zeros(9), np.full(9, 0.25)),
    "duplicates": (np.ones((20, D)), np.zeros(20), np.random.default_rng(0).standard_normal(20)),
    "duplicates that agree": (np.ones((20, D)), np.zeros(20), np.full(20, 2.0)),
    "far off": (1e6 * draw(0, 9)[0], np.zeros(9), draw(0, 9)[2]),
    "hardly apart": (1e-9 * draw(0, 40)[0], np.zeros(40), draw(0, 40)[2]),
    "huge scores": (draw(0, 9)[0], np.zeros(9), 1e30 * draw(0, 9)[2]),
    "many": draw(0, 120),
    "many full": draw(0, 120, levels=1),
}


@pytest.mark.parametrize("case", CASES)
def test_degenerate_results_give_finite_beliefs(case: str) -> None:
    belief = told(*CASES[case])
    places = np.concatenate([np.zeros((1, D)), 2 * np.eye(D), 50 * np.eye(D), belief.z[:5]])
    for now in (belief, belief.with_expected(places[:3])):
        mean, sd = now(places)
        assert np.isfinite(mean).all() and np.isfinite(sd).all() and (sd > 0).all()
        assert np.isfinite(expected_improvement(mean, sd, float(mean.min()))).all()
        assert sum(part.weight for part in now.parts) == pytest.approx(1)
        assert 0 < now.agreement < 1 and 0 < now.noise <= 1


@given(runs, st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_any_results_give_finite_beliefs(pairs: list[tuple[float, int]], seed: int) -> None:
    score, level = columns(pairs)
    z = np.random.default_rng(seed).integers(-2, 3, (len(score), D))  # many of them equal
    mean, sd = told(z, level, score)(np.vstack([z, np.eye(D)]))
    assert np.isfinite(mean).all() and np.isfinite(sd).all() and (sd > 0).all()
