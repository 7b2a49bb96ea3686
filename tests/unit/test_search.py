"""The search on real studies: what it may propose, what it learns, what it survives."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import pytest
from fake_training import FakeTraining, Optimizer
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

import hpsched
from hpsched import lr_curve, records, search
from hpsched.coordinates import FURTHER, ORDER, SETTLES, Snapshot, located
from hpsched.search import MOST, REACH, Search, Seen, learn

STEPS, RUNGS = 270, (30, 90, 270)
Objective = Callable[[optuna.Trial], Any]
#: Refining trials of a study whose best rate lies between the first three; the last runs in full.
REFINING = 4


@dataclass
class Planted(FakeTraining):
    """The optimum lies ``octaves`` beside where the sweeps point, at weight decay ``kappa``.

    ``steep`` is what an octave off costs, ``gain`` how much better a full cycle scores than none.
    """

    octaves: float = 0.0
    kappa: float = 0.3
    steep: float = 0.02
    gain: float = 0.3
    horizon: int = STEPS

    def __call__(self, cycle: hpsched.Cycle) -> float:
        super().__call__(cycle)  # the course of its loss
        short = self.gain * (1 - cycle.total_steps / STEPS)
        noise = np.random.default_rng(cycle.seed).standard_normal()
        return self.error(cycle) + short + self.noise * float(noise)

    def error(self, cycle: Any) -> float:
        off, decay = self.distance(cycle)
        return 0.1 + self.steep * (off**2 + 1.5 * decay**2)

    def distance(self, recipe: Any) -> tuple[float, float]:
        """Octaves of effective rate, and decades of weight decay, from the optimum."""
        worth = recipe.max_lr / (1 - recipe.base_momentum)
        off = math.log2(worth * 0.15 / self.best_lr) - self.octaves
        return off, math.log10(max(recipe.weight_decay * worth * STEPS, 1e-9) / self.kappa)


def suggest(trial: Any, **options: Any) -> hpsched.OneCycle:
    return hpsched.suggest_onecycle(trial, STEPS, **{"min_steps": RUNGS[0], **options})


def create(seed: int = 0, direction: str = "minimize") -> optuna.Study:
    return optuna.create_study(
        study_name=f"test-{seed}",
        direction=direction,
        sampler=hpsched.OneCycleSampler(seed=seed),
        pruner=hpsched.CyclePruner(),
    )


def run(
    train: Any = None,
    n_trials: int = 10,
    seed: int = 0,
    objective: Objective | None = None,
    direction: str = "minimize",
    **options: Any,
) -> optuna.Study:
    study = create(seed, direction)
    train = train or Planted()
    study.optimize(
        objective or (lambda trial: suggest(trial, **options).run(train)), n_trials=n_trials
    )
    return study


def known(study: optuna.Study, of: int = 0, trial: Any = None) -> Search:
    """The state of the search for the recipe of trial ``of``."""
    now = Snapshot(study.get_trials(deepcopy=False), study.directions)
    found = learn(now, located(now, next(records.recipe_spaces(now.trials[of]))), trial)
    assert found is not None
    return found


def proposals(state: Search, n: int = 20) -> list[dict[str, float]]:
    """Field → plain value, of the next recipe by ``n`` draws of the candidates."""
    where = state.axes.where
    return [where.from_search(state.propose(np.random.default_rng(seed))) for seed in range(n)]


def ran(trial: Any) -> list[int]:
    """Steps of the trial's complete cycles."""
    return [cycle.steps for cycle in records.cycles(trial)]


@functools.cache
def small() -> optuna.Study:
    """Eight trials."""
    return run(n_trials=8)


def place(state: Search, params: Any) -> tuple[float, ...]:
    """Of parameters in search coordinates."""
    return state.axes.places([params])[0]


ORIGIN = (0.0,) * 6


# ------------------------------------------------------------------ within the user's ranges


SHAPE = {"div_factor": 25, "pct_start": 0.3, "base_momentum": 0.85, "max_momentum": 0.95}
SPACES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear policy": {"policy": "linear"},
    "only max_lr": {**SHAPE, "weight_decay": 1e-4},
    "only weight decay": {**SHAPE, "max_lr": 0.2},
    "only momentum": {**SHAPE, "max_lr": 0.2, "weight_decay": 0.0, "base_momentum": (0.7, 0.8)},
    "max_lr fixed": {"max_lr": 0.2},
    "narrow": {"max_lr": (0.2, 0.25), "weight_decay": (1e-6, 1e-5), "div_factor": (2, 3)},
    "beside the window": {"max_lr": (1e-5, 1e-4)},
    "wide shape": {"pct_start": (0, 1), "base_momentum": (0.1, 0.5), "max_momentum": (0.5, 0.99)},
    "a range of one point": {"weight_decay": (1e-4, 1e-4), "div_factor": (25, 25)},
    "no range test": {"range_test": False},
}


@pytest.mark.parametrize("name", SPACES)
def test_proposals_stay_in_the_users_ranges(name: str) -> None:
    options = SPACES[name]
    study = run(n_trials=9, **options)
    recipe = next(records.recipe_spaces(study.trials[0]))
    assert all(set(trial.params) == set(recipe.names) for trial in study.trials)
    assert all(set(found) == set(recipe.space) for found in proposals(known(study)))
    tried = [trial.params for trial in study.trials] + proposals(known(study))
    for field, (low, high, _) in recipe.space.items():
        assert all(low <= params[field] <= high for params in tried), field
    assert len({tuple(params.values()) for params in tried[REFINING:]}) > 1
    for field, value in options.items():
        if field in records.FIELDS and isinstance(value, int | float):
            assert recipe.fixed[field] == value


def test_a_linear_range_of_weight_decay_from_zero() -> None:
    study = run(n_trials=9, weight_decay=(0, 0.01))
    assert all(0 <= trial.params["weight_decay"] <= 0.01 for trial in study.trials)


def test_rates_stay_about_the_window() -> None:
    """The optimum is planted six octaves up, where the loss diverges."""
    state = known(run(Planted(octaves=6.0, noise=0.002), 12))
    found = state.axes.where.evidence
    assert found and found.prior.lr_diverged
    low, high = state.axes.where.window
    rates = [each["max_lr"] for each in proposals(state)]
    assert low / REACH <= min(rates)
    assert max(rates) <= max(high, min(REACH * high, found.prior.lr_diverged))
    assert max(rates) > 0.5 * found.prior.lr_diverged  # it would go on


@pytest.mark.parametrize("limits", [(1e-6, 10.0), (0.1, 1.0)])
def test_rates_may_lie_an_octave_beyond_the_window(limits: tuple[float, float]) -> None:
    axes = known(run(n_trials=5, max_lr=limits)).axes
    at, centre, window = axes.fields.index("max_lr"), axes.where.centre, axes.where.window
    found = axes.where.evidence
    assert found
    edge = lr_curve.EDGE * (found.prior.lr_diverged or math.inf)
    low, high = (float(bound[at]) * centre for bound in axes.bounds)
    assert low == pytest.approx(max(window[0] / 2, limits[0]))
    assert high == pytest.approx(max(min(window[1] * 2, limits[1], edge), window[1]))


coordinate = st.floats(-1.5, 1.5)


@given(st.lists(st.tuples(*[coordinate] * 6), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_places_and_values_are_one_another(z: list[tuple[float, ...]]) -> None:
    state = known(small())
    axes, places = state.axes, np.array(z)
    values = axes.values(places)
    low, high = axes.bounds
    assert (values >= low).all() and (values <= high).all()
    inside = ((values > low) & (values < high)).all(axis=1)
    assert axes.back(values)[inside] == pytest.approx(places[inside], abs=1e-9)
    assert axes.values(axes.back(values)) == pytest.approx(values)
    rows = [dict(zip(axes.fields, row, strict=True)) for row in values.tolist()]
    assert np.array(axes.places(rows)) == pytest.approx(axes.back(values))
    assert place(state, rows[-1]) == axes.places(rows)[-1]


def test_the_standard_recipe_at_the_proposed_rate_is_the_origin() -> None:
    state = known(small())
    params = state.axes.where.to_search(state.axes.where.standard())
    assert params and place(state, params) == pytest.approx(ORIGIN)


def test_a_rate_counts_with_its_momentum() -> None:
    state = known(small())
    at = state.axes.fields.index("max_lr")
    params = state.axes.where.to_search(state.axes.where.standard())
    assert params
    higher = {**params, "base_momentum": 0.9, "max_lr": params["max_lr"] / 1.5}
    assert place(state, higher)[at] == pytest.approx(0)
    faster = {**params, "max_lr": 2 * params["max_lr"]}
    assert place(state, faster)[at] == pytest.approx(1 / search.WIDTHS["max_lr"][0])


# ------------------------------------------------------------------ the user's own parameters


def with_own(trial: optuna.Trial) -> float:
    width = trial.suggest_int("width", 16, 512, log=True)
    depth = trial.suggest_int("depth", 1, 9, step=2)
    drop = trial.suggest_float("drop", 0.0, 0.5)
    kind = trial.suggest_categorical("kind", ["relu", "gelu", None])
    slope = trial.suggest_float("slope", 0.01, 0.3, log=True) if kind == "relu" else 0.0
    trial.suggest_float("one", 1.0, 1.0)
    value = suggest(trial).run(Planted(noise=0.005))
    return value + 0.02 * abs(math.log2(width / 64)) + 0.1 * drop + slope + 0.01 * abs(depth - 5)


def test_the_users_own_parameters_have_axes() -> None:
    state = known(run(n_trials=14, objective=with_own))
    assert set(state.axes.own) == {"width", "depth", "drop", "kind", "slope"}  # "one" is no choice
    n = len(state.axes.fields)
    assert {len(seen.z) for seen in state.seen} == {n + 4 + 3}
    assert all(abs(place) <= 1.5 for seen in state.seen for place in seen.z[n:])
    place = dict(
        zip(
            state.axes.own,
            np.split(
                np.array(
                    state.axes.place_own({"width": 16, "depth": 9, "drop": 0.25, "kind": None})
                ),
                np.cumsum([3 if name == "kind" else 1 for name in state.axes.own])[:-1],
            ),
            strict=True,
        )
    )
    assert place["width"] == pytest.approx(-1.5) and place["depth"] == pytest.approx(1.5)
    assert place["drop"] == pytest.approx(0) and place["slope"] == 0  # it has none
    assert list(place["kind"]) == [0, 0, 1]
    assert len(state.axes.relevance) == len(state.axes.certainty) == n + 7
    assert list(state.axes.shift()[n:]) == [0] * 7


def test_a_rate_is_chosen_for_the_users_choice() -> None:
    """Half the trials are of a kind whose best rate is four octaves higher."""
    kinds = {"low": -2.0, "high": 2.0}

    def objective(trial: optuna.Trial) -> float:
        kind = trial.suggest_categorical("kind", list(kinds))
        trial.suggest_float("noise", 0, 1)  # and something that has no say
        return suggest(trial, **SHAPE).run(Planted(octaves=kinds[kind], noise=0.005))

    apart = []
    for seed in range(3):
        study = create(seed)
        for number in range(26):
            study.enqueue_trial({"kind": list(kinds)[number % 2]})
        study.optimize(objective, n_trials=26)
        state = known(study)
        rates = {
            kind: statistics.median(
                math.log2(found["max_lr"])
                for found in proposals(
                    dataclasses.replace(state, own=state.axes.place_own({"kind": kind}))
                )
            )
            for kind in kinds
        }
        apart.append(rates["high"] - rates["low"])
    assert statistics.median(apart) > 2


# ------------------------------------------------------------------ what it finds


@pytest.mark.parametrize(
    ("octaves", "kappa"), [(-3.0, 3.0), (-2.0, 0.03), (1.5, 3.0), (0.0, 0.3)]
)  # the sweeps point an octave above 0
def test_an_optimum_away_from_the_first_guess_is_found(octaves: float, kappa: float) -> None:
    found, first = [], []
    for seed in range(5):
        training = Planted(octaves=octaves, kappa=kappa, steep=0.03)
        study = run(training, 15, seed)
        best = study.trials[hpsched.best(study).number]
        off, decay = training.distance(_Recipe(**best.params))
        found.append((abs(off), abs(decay)))
        first.append(training.distance(_Recipe(**study.trials[0].params)))
    good = [off < 1 and decay < 0.9 for off, decay in found]
    assert sum(good) >= 4, found
    if octaves:
        assert not any(abs(off) < 1 and abs(decay) < 0.9 for off, decay in first)


@dataclass
class _Recipe:
    max_lr: float
    div_factor: float
    pct_start: float
    base_momentum: float
    max_momentum: float
    weight_decay: float


def test_proposals_move_to_where_results_are_better() -> None:
    """Against a study that was told the opposite slope, from the same trials."""
    state = known(small())
    at = state.axes.fields.index("max_lr")
    rates = {}
    for sign in (-1.0, 1.0):
        seen = tuple(s._replace(score=sign * s.z[at], level=0) for s in state.seen)
        told = dataclasses.replace(state, seen=seen)
        rates[sign] = statistics.median(found["max_lr"] for found in proposals(told))
    assert rates[-1.0] > 2 * rates[1.0]


@pytest.mark.parametrize("value", [0.5, 0.0, -1e12])
def test_a_constant_objective_is_survived(value: float) -> None:
    def train(cycle: hpsched.Cycle) -> float:
        Planted()(cycle)
        return value

    study = run(train, 12)
    assert all(math.isfinite(v) for t in study.trials for v in t.params.values())
    assert len({t.params["max_lr"] for t in study.trials}) == 12
    state = known(study)
    assert not state.overfits
    assert len(set(state.expected.values())) >= 1 and hpsched.best(study).mean == value


def test_runs_that_all_diverge_are_survived() -> None:
    def train(cycle: hpsched.Cycle) -> float:
        return Planted()(cycle) if cycle.is_range_test else Planted()(cycle) * math.nan

    study = run(train, 10)
    assert {t.state for t in study.trials} == {TrialState.PRUNED}
    state = known(study)
    assert all(s.score == math.inf for s in state.seen)
    assert state.expected == {}
    assert study.trials[-1].params["max_lr"] < study.trials[0].params["max_lr"]


def roles(study: optuna.Study) -> list[int | None]:
    return [trial.user_attrs.get(records.REFINES) for trial in study.trials]


@pytest.mark.parametrize(("octaves", "direction"), [(-4.0, "minimize"), (2.5, "maximize")])
def test_refining_goes_on_past_the_end_until_the_best_lies_between_others(
    octaves: float, direction: str
) -> None:
    training = Planted(octaves=octaves, noise=0.002)
    sign = -1 if direction == "maximize" else 1
    study = run(lambda cycle: sign * training(cycle), 5, direction=direction)
    assert roles(study) == list(ORDER)
    rates = [t.params["max_lr"] for t in study.trials]
    assert rates[1] < rates[0]
    end = rates[1] / 4 if octaves < 0 else rates[0] * 4
    assert rates[2] == pytest.approx(end)
    # The sweeps' divergence edge gives way, and leaves a little less than two octaves.
    assert rates[3] == pytest.approx(end / 4 if octaves < 0 else 3.2 * end)
    assert [len(ran(t)) for t in study.trials] == [2, 2, 2, 2, 3]
    centre = known(study).axes.where.centre
    assert abs(math.log2(centre / rates[0]) - octaves) < 1.2


def test_a_trial_that_fails_past_the_end_is_followed_by_another_there() -> None:
    training = Planted(octaves=-4.0, noise=0.002)

    def objective(trial: optuna.Trial) -> float:
        def train(cycle: hpsched.Cycle) -> float:
            if trial.number == 2 and cycle.total_steps == RUNGS[1] and not cycle.is_range_test:
                raise OSError("no space left on device")
            return training(cycle)

        return suggest(trial).run(train)

    study = create()
    study.optimize(objective, n_trials=5, catch=OSError)
    assert roles(study) == [0, 1, FURTHER[0], FURTHER[0], FURTHER[1]]
    assert study.trials[3].params["max_lr"] == pytest.approx(study.trials[2].params["max_lr"])


@pytest.mark.parametrize("why", ["small budget", "no short cycles", "no room"])
def test_what_keeps_refining_from_a_second_trial_past_the_end(why: str) -> None:
    training = Planted(octaves=-4.0, noise=0.002)
    options: dict[str, Any] = {}
    study = create()
    if why == "small budget":
        settings = records.Settings(objective="", seed=0, cycles=5).to_json()
        study.set_user_attr(records.SETTINGS, settings)
    elif why == "no short cycles":
        options = {"rungs": 1}
    else:
        options = {"max_lr": (0.04, 10.0)}
    study.optimize(lambda trial: suggest(trial, **options).run(training), n_trials=4)
    assert roles(study) == [0, 1, 2, SETTLES]


def test_while_the_third_is_under_way_the_next_one_settles() -> None:
    study = run(Planted(octaves=-4.0, noise=0.002), 2)
    for role in (FURTHER[0], SETTLES):
        trial = study.ask()
        suggest(trial).to_dict()
        assert study.trials[trial.number].user_attrs[records.REFINES] == role


# ------------------------------------------------------------------ short cycles


def test_a_study_that_overfits_runs_in_full_and_moves_its_guess() -> None:
    def train(cycle: hpsched.Cycle) -> float:
        return Planted(gain=-0.3, steep=0.002, noise=0.001)(cycle)

    study = run(train, 16)
    state = known(study)
    assert state.overfits and not state.trusts_rungs
    assert [ran(t) for t in study.trials[REFINING:]] == [[STEPS]] * 12
    shift = dict(zip(state.axes.fields, state.axes.shift() * state.axes.width, strict=True))
    assert shift.pop("weight_decay") == pytest.approx(1.2)
    assert set(shift.values()) == {0.0}  # less training would mend it, too, but not as well

    # The same trials, with the full scores so much better that nothing overfits.
    better = [s._replace(score=s.score - (s.level == 0)) for s in state.seen]
    calm = dataclasses.replace(state, seen=tuple(better))
    assert not calm.overfits and calm.trusts_rungs

    def first(found: Search) -> dict[str, float]:
        """Median proposal after a single result."""
        seen = tuple(s for s in found.seen if s.number == 3)  # a full one
        drawn = proposals(dataclasses.replace(found, seen=seen), 60)
        return {field: statistics.median(each[field] for each in drawn) for field in drawn[0]}

    moved, stayed = first(state), first(calm)
    assert 0.7 < moved["max_lr"] / stayed["max_lr"] < 1.4
    kappas = [found["max_lr"] * found["weight_decay"] for found in (moved, stayed)]
    assert kappas[0] > 5 * kappas[1]


@pytest.mark.parametrize("weight_decay", [1e-4, (0.0, 0.1)], ids=["fixed", "linear"])
def test_a_study_that_overfits_slows_down_where_weight_decay_cannot_mend_it(
    weight_decay: Any,
) -> None:
    axes = known(run(n_trials=1, weight_decay=weight_decay)).axes
    shift = dict(zip(axes.fields, axes.shift() * axes.width, strict=True))
    assert shift.pop("max_lr") == pytest.approx(-1)
    assert set(shift.values()) == {0.0}


def test_overfitting_is_a_matter_of_most_pairs() -> None:
    z = ORIGIN
    pairs = [(0.5, 0.6), (0.5, 0.4), (0.5, 0.7)]  # of the short and the full score

    def of(pairs: list[tuple[float, float]]) -> Search:
        seen = [
            Seen(number, z, level, score)
            for number, pair in enumerate(pairs)
            for level, score in zip((1, 0), pair, strict=True)
        ]
        return dataclasses.replace(known(small()), seen=tuple(seen))

    assert of(pairs).overfits
    assert not of([*pairs, (0.5, 0.3)]).overfits  # half of them
    assert of([*pairs, (0.5, math.inf)]).overfits  # diverged only at full length
    assert not of([]).overfits
    lone = Seen(9, z, 0, 9.0)  # no short cycle to compare with
    assert not dataclasses.replace(of(pairs[1:2]), seen=(*of(pairs[1:2]).seen, lone)).overfits


def told(truth: Callable[[Any], Any], short: Callable[[Any], Any], n: int = 14) -> Search:
    """A search whose full and shorter cycles scored so, in one coordinate."""
    at = np.random.default_rng(0).permutation(np.linspace(-2, 2, n))
    z = [(place, 0.0, 0.0, 0.0, 0.0, 0.0) for place in at.tolist()]
    seen = [Seen(i, z[i], 0, float(truth(at)[i])) for i in range(n)]
    seen += [Seen(i, z[i], 1, 9 + float(short(at)[i])) for i in range(n)]
    return dataclasses.replace(known(small()), seen=tuple(seen))


def test_short_cycles_that_contradict_are_left_out() -> None:
    contrary = told(np.sin, lambda at: -np.sin(at))
    assert not contrary.overfits
    assert not contrary.trusts_rungs
    assert contrary.belief and set(contrary.belief.level) == {0}
    agreeing = told(np.sin, np.sin)
    assert agreeing.trusts_rungs
    assert agreeing.belief and set(agreeing.belief.level) == {0, 1}
    early = told(np.sin, lambda at: -np.sin(at), n=4)
    assert early.trusts_rungs  # too few to say


@pytest.mark.xfail(strict=True, reason="noise explains them too, so agreement stays high")
def test_short_cycles_that_say_nothing_are_switched_off() -> None:
    off = []
    for seed in range(4):

        def train(cycle: hpsched.Cycle) -> float:
            value = Planted(steep=0.03)(cycle)
            scatter = 0.05 * np.random.default_rng(cycle.seed + 1).standard_normal()
            return value if cycle.total_steps == STEPS else 0.6 + float(scatter)

        study = run(train, 25, seed)
        off.append(ran(study.trials[-1]) == [STEPS])
    assert sum(off) >= 3


def test_no_more_than_three_in_a_row_end_early() -> None:
    """Nothing comes near what trial 3 found."""

    def train(cycle: hpsched.Cycle) -> float:
        value = Planted(noise=0.001)(cycle)
        return value - 0.09 if abs(cycle.max_lr - lucky[0]) < 1e-9 else value + 0.5

    lucky = [0.0]

    def objective(trial: optuna.Trial) -> float:
        recipe = suggest(trial)
        if trial.number == REFINING - 1:
            return recipe.run(lambda cycle: lucky.__setitem__(0, cycle.max_lr) or train(cycle))
        return recipe.run(train)

    study = run(objective=objective, n_trials=21)
    full = [len(ran(t)) == len(RUNGS) for t in study.trials]
    assert full[:REFINING] == [False] * 3 + [True]
    later = "".join("F" if one else "s" for one in full[REFINING:])
    assert max(map(len, later.split("F"))) == 3
    assert "sssF" in later


def test_three_that_ended_early_let_the_fourth_run_on() -> None:
    best = [Seen(0, ORIGIN, level, 0.1 + level) for level in (2, 1, 0)]
    far = (2.5, 0.0, 0.0, 0.0, 0.0, 0.0)

    def runs_on(early: int, diverged: int = 0) -> bool:
        seen = best + [Seen(1 + i, far, 2, 9.0) for i in range(early + 1)]
        seen += [Seen(50 + i, far, 2, math.inf) for i in range(diverged)]
        ended = tuple(range(1, 1 + early))
        state = dataclasses.replace(known(small()), seen=tuple(seen), ended=ended)
        return state.promises(1 + early)

    assert [runs_on(early) for early in range(5)] == [False, False, False, True, True]
    assert not runs_on(1, diverged=5)  # those do not count


def test_a_trial_runs_on_while_it_may_be_the_best() -> None:
    """The others lie on a slope, and short cycles see the same one."""
    state = known(small())

    def cycles(number: int, at: float, *levels: int, worse: float = 0.0) -> list[Seen]:
        z = (at, 0.0, 0.0, 0.0, 0.0, 0.0)
        return [Seen(number, z, level, level - 0.2 * at + worse) for level in levels]

    others = [c for i, at in enumerate((-2.0, -1, 0, 0.5, 1)) for c in cycles(i, at, 2, 1, 0)]

    def promises(own: list[Seen]) -> bool:
        return dataclasses.replace(state, seen=(*others, *own)).promises(9)

    assert promises(cycles(9, 1.5, 2)) and promises(cycles(9, 1.5, 2, 1))
    assert not promises(cycles(9, 1.5, 2, 1, worse=0.5))
    assert not promises(cycles(9, -1.5, 2)) and not promises(cycles(9, -1.5, 2, 1))
    others = [seen for seen in others if seen.level]  # no full one to compare with
    assert promises(cycles(9, -1.5, 2))
    assert promises([])  # nothing known of it


# ------------------------------------------------------------------ several workers


def test_workers_that_ask_at_once_get_different_recipes() -> None:
    study = run(n_trials=8)
    asked = []
    for _ in range(4):
        trial = study.ask()
        asked.append(suggest(trial, range_test=False).to_dict())
    assert len(known(study, trial=trial._cached_frozen_trial).pending) == 3
    assert len({recipe["max_lr"] for recipe in asked}) == 4


def test_what_is_running_moves_the_proposal() -> None:
    study = run(n_trials=8)
    state = known(study)
    (alone,) = proposals(state, 1)
    params = state.axes.where.to_search(alone)
    assert params is not None
    busy = dataclasses.replace(state, pending=(place(state, params),))
    (moved,) = proposals(busy, 1)  # by the same draw
    assert moved != alone
    far = dataclasses.replace(state, pending=((9.0, 9.0, 9.0, 9.0, 9.0, 9.0),))
    assert proposals(far, 1)[0]["max_lr"] == pytest.approx(alone["max_lr"], rel=1.0)


def test_pending_are_those_that_run_without_a_full_result() -> None:
    study = run(n_trials=6)
    assert known(study).pending == ()
    trial = study.ask()
    suggest(trial, range_test=False).to_dict()
    frozen = study.trials[-1]
    assert len(known(study).pending) == 1
    assert known(study, trial=frozen).pending == ()  # itself
    study.tell(trial, state=TrialState.FAIL)
    assert known(study).pending == ()


def test_a_draw_follows_from_seed_and_trial_number() -> None:
    def rates(study: optuna.Study) -> list[dict[str, Any]]:
        return [trial.params for trial in study.trials]

    whole = rates(run(n_trials=9, seed=1))
    assert whole == rates(run(n_trials=9, seed=1))
    assert whole != rates(run(n_trials=9, seed=2))
    study = create(1)
    for _ in range(9):  # each trial by a worker of its own
        study.sampler = hpsched.OneCycleSampler(seed=1)
        study.optimize(lambda trial: suggest(trial).run(Planted()), n_trials=1)
    assert rates(study) == whole


@pytest.mark.parametrize("seed", [0, None])
def test_another_trial_is_another_draw(seed: int | None) -> None:
    """Nothing was learned in between."""
    study = optuna.create_study(sampler=hpsched.OneCycleSampler(seed=seed))
    study.add_trials(small().trials)
    drawn = []
    for _ in range(2):
        trial = study.ask()
        drawn.append(suggest(trial, range_test=False).max_lr)
        study.tell(trial, state=TrialState.FAIL)
    assert drawn[0] != drawn[1]


# ------------------------------------------------------------------ the study's other shapes


def test_maximizing_mirrors_minimizing() -> None:
    def train(cycle: hpsched.Cycle) -> float:
        value = Planted()(cycle)
        return value if cycle.is_range_test or cycle.max_lr < 0.4 else math.nan

    def mirrored(cycle: hpsched.Cycle) -> float:
        return -train(cycle)

    one, other = run(train, 14, 3), run(mirrored, 14, 3, direction="maximize")
    assert [t.params for t in one.trials] == [t.params for t in other.trials]
    assert [ran(t) for t in one.trials] == [ran(t) for t in other.trials]
    assert any(records.DIVERGED in t.user_attrs for t in one.trials)
    assert hpsched.best(one).number == hpsched.best(other).number
    assert known(one).seen == known(other).seen


class Adam(Optimizer):
    def __init__(self, lr: float) -> None:
        self.param_groups = [{"lr": lr, "betas": (0.9, 0.999)}]


class AdamW(Adam):
    pass


def in_contexts(
    n: int, train: Callable[[int], Any], options: Callable[[int], dict[str, Any]], first: int = 6
) -> optuna.Study:
    """``first`` trials in context 0, then turn by turn."""

    def objective(trial: optuna.Trial) -> float:
        which = 0 if trial.number < first else trial.number % 2
        return suggest(trial, context={"which": which}, **options(which)).run(train(which))

    return run(objective=objective, n_trials=n)


def test_contexts_pool() -> None:
    """Each relative to its own centre: what one has learned of the rate is tried in the other."""
    lrs = {0: 0.4, 1: 0.05}
    study = in_contexts(
        16, lambda which: Planted(best_lr=lrs[which], octaves=-2.0, noise=0.005), lambda _: {}
    )
    states = {which: known(study, of=number) for which, number in ((0, 0), (1, 7))}
    for which, state in states.items():
        assert {seen.number for seen in state.seen} == set(range(16))
        assert abs(math.log2(state.axes.where.centre / lrs[which])) < 3
        rate = statistics.median(
            found["max_lr"] * 0.15 / (1 - found["base_momentum"]) for found in proposals(state)
        )
        assert math.log2(rate / lrs[which]) == pytest.approx(-2, abs=1)
    for one, other in zip(states[0].seen, states[1].seen, strict=True):
        assert one.z == pytest.approx(other.z) and one[2:] == other[2:]


def test_contexts_may_fix_different_fields() -> None:
    study = in_contexts(
        12, lambda _: Planted(), lambda which: {"weight_decay": 1e-4} if which else {}
    )
    assert len(study.trials) == 12


def test_contexts_may_differ_in_what_weight_decay_means() -> None:
    """AdamW's is searched as κ, Adam's as it is; the first guess is the origin of both."""

    def train(which: int) -> Any:
        def trained(cycle: hpsched.Cycle) -> float:
            schedule = cycle.schedule((AdamW, Adam)[which](cycle.max_lr))
            sweep, low = FakeTraining(best_lr=0.01), 2.3
            for step in range(cycle.total_steps):
                lr = schedule.last_lr
                low -= 0.15 * (low - 0.3) * min(lr / sweep.best_lr, 1)
                schedule.step(low + 5 * (lr / 0.08) ** 2 * (lr > 0.08) + 1e-3 * (step % 2))
            return low

        return trained

    study = in_contexts(9, train, lambda _: {}, first=5)
    state = known(study)
    at = state.axes.fields.index("weight_decay")
    guesses = {
        seen.number: seen.z[at]
        for seen in state.seen
        if records.REFINES in study.trials[seen.number].user_attrs
    }
    assert set(guesses) >= {0, 5}
    assert list(guesses.values()) == pytest.approx([0.0] * len(guesses), abs=0.5)


def test_confirmations_are_repeats_of_their_recipe() -> None:
    """Trial 3 was lucky: three fresh seeds say so, and it is no longer expected to be the best."""

    def objective(trial: optuna.Trial) -> float:
        def train(cycle: hpsched.Cycle) -> float:
            lucky = trial.number == 3 and cycle.total_steps == STEPS
            luck = 0.1 * (cycle.kind == "confirm") - 0.1 * lucky
            return Planted(noise=0.003)(cycle) + luck

        return suggest(trial).run(train)

    study = run(objective=objective, n_trials=10)
    before = known(study)
    for _ in range(3):
        study.enqueue_trial(study.trials[3].params, user_attrs={records.CONFIRMS: 3})
    study.optimize(objective, n_trials=3)
    after = known(study)
    fresh = after.seen[len(before.seen) :]
    assert [(seen.number, seen.level) for seen in fresh] == [(3, 0)] * 3
    assert len({seen.z for seen in after.seen if seen.number == 3}) == 1
    assert [seen.score for seen in fresh] == [trial.value for trial in study.trials[10:]]
    assert set(after.expected) == set(before.expected)  # they are no trials of their own

    def better(state: Search) -> int:
        return sum(other < state.expected[3] for other in state.expected.values())

    assert better(before) == 0 and better(after) > 0


def test_one_lucky_value_does_not_make_a_recipe_the_expected_best() -> None:
    z = [(place, 0.0, 0.0, 0.0, 0.0, 0.0) for place in (2.0, -0.2, 0.0, 0.2, -0.1, 0.1)]
    scores = [0.19, 0.21, 0.20, 0.22, 0.20, 0.21]
    seen = [Seen(i, z[i], 0, scores[i]) for i in range(6)]
    seen += [Seen(0, z[0], 0, score) for score in (0.5, 0.55, 0.45)]
    state = dataclasses.replace(known(small()), seen=tuple(seen))
    assert min(state.expected, key=lambda number: state.expected[number]) != 0


def test_who_cannot_be_told_from_the_best_has_its_score() -> None:
    z = [(0.001 * i, 0.0, 0.0, 0.0, 0.0, 0.0) for i in range(5)] + [(2.5, 0, 0, 0, 0, 0.0)]
    seen = [Seen(i, z[i], 0, score) for i, score in enumerate((0.2, 0.21, 0.2, 0.22, 0.21, 0.9))]
    expected = dataclasses.replace(known(small()), seen=tuple(seen)).expected
    assert len({expected[i] for i in range(5)}) == 1
    assert expected[5] > expected[0]


def test_values_reported_without_run_are_full_results() -> None:
    def objective(trial: optuna.Trial) -> float:
        recipe = suggest(trial, range_test=False, max_lr=(1e-3, 1.0))
        recipe.to_dict()
        return Planted(octaves=-2.0, steep=0.05).error(recipe) - 0.1

    study = run(objective=objective, n_trials=25)
    state = known(study)
    assert [(seen.number, seen.level) for seen in state.seen] == [(n, 0) for n in range(25)]
    assert [seen.score for seen in state.seen] == [trial.value for trial in study.trials]
    early = statistics.median(t.value or 0.0 for t in study.trials[:5])
    late = statistics.median(t.value or 0.0 for t in study.trials[-10:])
    assert late < 0.5 * early


def test_failed_and_waiting_trials_say_nothing() -> None:
    study = run(n_trials=6)
    before = known(study)
    trial = study.ask()
    suggest(trial, range_test=False).to_dict()
    study.tell(trial, state=TrialState.FAIL)
    study.enqueue_trial({"max_lr": 0.1})
    assert known(study).seen == before.seen


def test_several_objectives_fall_back_to_tpe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Search, "propose")
    drawn = []
    base = optuna.samplers.TPESampler.sample_independent

    def spy(self: Any, study: Any, trial: Any, name: str, dist: Any) -> Any:
        drawn.append(name)
        return base(self, study, trial, name, dist)

    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_independent", spy)
    study = optuna.create_study(
        directions=["minimize", "maximize"], sampler=hpsched.OneCycleSampler(seed=0)
    )

    def train(cycle: hpsched.Cycle) -> Any:
        value = Planted()(cycle)
        return value if cycle.is_range_test else [value, -value]

    study.optimize(lambda trial: suggest(trial).run(train), n_trials=5)
    now = Snapshot(study.trials, study.directions)
    assert learn(now, located(now, next(records.recipe_spaces(study.trials[0])))) is None
    assert set(drawn) == set(records.FIELDS)


# ------------------------------------------------------------------ long studies


def long_study(n: int, scored: Callable[[int], float], rungs: bool) -> Snapshot:
    """``n`` trials: the refining ones, then made-up ones of their recipe at other rates."""
    source = small().trials[REFINING - 1]
    octaves = np.random.default_rng(0).normal(0, 1, n).tolist()

    def made(number: int) -> FrozenTrial:
        attrs = {records.RECIPE: source.user_attrs[records.RECIPE]}
        for rung, loss in enumerate((0.4, 0.2, 0.0) if rungs else ()):
            cycle = source.user_attrs[f"{records.RUNG}{rung}"]
            value = scored(number) + loss
            attrs[f"{records.RUNG}{rung}"] = {**cycle, "name": f"{number}-{rung}", "value": value}
        return FrozenTrial(
            number=number,
            trial_id=number,
            state=TrialState.COMPLETE,
            value=scored(number),
            params={**source.params, "max_lr": source.params["max_lr"] * 2 ** octaves[number]},
            distributions=source.distributions,
            user_attrs=attrs,
            system_attrs={},
            intermediate_values={2: scored(number)} if rungs else {},
            datetime_start=source.datetime_start,
            datetime_complete=source.datetime_complete,
        )

    refining = small().trials[:REFINING]
    trials = [*refining, *(made(number) for number in range(REFINING, n))]
    return Snapshot(trials, (StudyDirection.MINIMIZE,))


def learned(now: Snapshot) -> Search:
    found = learn(now, located(now, next(records.recipe_spaces(now.trials[0]))))
    assert found is not None
    return found


def test_ten_thousand_trials_give_a_model_of_bounded_size() -> None:
    now = long_study(10_000, lambda number: 1 + (number * 7919 % 10_000) / 10_000, rungs=True)
    state = learned(now)
    assert len(state.propose(np.random.default_rng(0))) == 6
    assert state.belief and len(state.belief.score) <= 3 * MOST  # cycles of as many trials
    seen = {s.number for s in state.seen}
    assert len(seen) == MOST
    assert set(range(10_000 - MOST // 2, 10_000)) < seen
    best = sorted(now.trials, key=lambda t: now.values.get(t.number, math.inf))
    assert {t.number for t in best[: MOST // 2]} < seen


@pytest.mark.parametrize("n", [MOST - 1, MOST, MOST + 1])
def test_up_to_the_bound_all_are_given(n: int) -> None:
    state = learned(long_study(n, lambda number: 1.0 + 0.001 * number, rungs=True))
    assert len({s.number for s in state.seen}) == min(n, MOST)


def test_the_best_of_many_values_reported_without_run_is_not_forgotten() -> None:
    def scored(number: int) -> float:
        return 0.1 if number < 10 else 1.0 + (number * 7 % 100) / 100

    now = long_study(MOST + 50, scored, rungs=False)
    expected = search.expected(now.trials, StudyDirection.MINIMIZE)
    assert set(range(REFINING, 10)) <= set(expected)


def test_overfitting_is_judged_by_each_trials_own_finite_full_run() -> None:
    state = known(small())
    two = [Seen(n, ORIGIN, level, score) for n in (0, 1) for level, score in ((1, 2.0), (0, 1.0))]
    fresh = [Seen(1, ORIGIN, 0, 9.0)] * 3
    diverged = [Seen(n, ORIGIN, level, s) for n in (2, 3) for level, s in ((1, 2.0), (0, math.inf))]
    worse = [Seen(n, ORIGIN, level, s) for n in (4, 5, 6) for level, s in ((1, 1.0), (0, 2.0))]

    def overfits(*seen: Seen) -> bool:
        return dataclasses.replace(state, seen=seen).overfits

    assert not overfits(*two, *fresh) and not overfits(*two, *diverged)
    assert overfits(*two, *worse)


def test_without_range_tests_the_standard_recipe_runs_in_full() -> None:
    study = run(n_trials=1, range_test=False)
    assert study.trials[0].state == TrialState.COMPLETE


def test_two_recipes_in_one_trial_are_drawn_apart() -> None:
    study = optuna.create_study(sampler=hpsched.OneCycleSampler(seed=0))

    def objective(trial: optuna.Trial) -> float:
        drawn = [hpsched.suggest_onecycle(trial, STEPS, prefix=p, range_test=False) for p in "ab"]
        return sum(recipe.to_dict()["pct_start"] for recipe in drawn)

    study.optimize(objective, n_trials=4)
    last = study.trials[-1].params
    assert last["apct_start"] != last["bpct_start"]


def test_recipes_of_two_kinds_are_ranked_by_their_results() -> None:
    """The model compares recipes of one kind; the other kind's must not come last for it."""
    study = optuna.create_study(sampler=hpsched.OneCycleSampler(seed=0))

    def objective(trial: optuna.Trial) -> float:
        kind = trial.suggest_categorical("kind", ["a", "b"])
        hpsched.suggest_onecycle(trial, STEPS, prefix=kind, range_test=False).to_dict()
        return (1.0 if kind == "a" else 0.1) + trial.number / 1000

    for kind in "abab":
        study.enqueue_trial({"kind": kind})
    study.optimize(objective, n_trials=4)
    assert hpsched.best(study).own["kind"] == "b"
