"""What a study's results say of its recipes: which to try next, which to run on, which is best.

The thin layer between trials and the model (:mod:`hpsched.surrogate`). Complete cycles of every
length, confirmations too, become observations in search coordinates, each relative to a first
guess (the standard recipe at the proposed rate) and in units of how far from it one would look.
Everything follows from what is stored, so all workers see the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpsched import lr_curve, records, surrogate
from hpsched.coordinates import STANDARD_RECIPE, Coordinates, Snapshot, centred, located, spaces
from hpsched.errors import RecordError
from hpsched.records import RecipeSpace
from hpsched.surrogate import Belief

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["Search", "expected", "learn", "of_study"]

#: Field → width, relevance, certainty: how far from the first guess one would look (octaves,
#: decades, plain), how much that is expected to matter, and how much worse it is expected to be (on
#: the scale of scores), since the guess is good (docs/design/search.md).
WIDTHS: Mapping[str, tuple[float, float, float]] = {
    "max_lr": (1.2, 2.0, 0.6),
    "weight_decay": (0.7, 0.5, 0.05),
    "base_momentum": (0.05, 0.3, 0.03),
    "max_momentum": (0.03, 0.05, 0.015),
    "pct_start": (0.12, 0.05, 0.015),
    "div_factor": (1.0, 0.02, 0.005),
}
BASE = {"max_lr": 2.0, "weight_decay": 10.0, "div_factor": 2.0}  # of the logarithm it is seen in
DECAY_WIDTH = 1.0  # decades, of weight decay that is not searched as κ
PLAIN = 4.0  # widths of a range that is searched on a linear scale
LOST = 5.0  # without a reliable range test the window is this many widths
OWN, OWN_RELEVANCE = 3.0, 1.0  # widths that the range of a user's own parameter spans
#: Where the first guess moves when a study's cycles get worse with length, which is overfitting:
#: decades of weight decay up, at the same rate; where that is not searched, octaves of rate down.
OVERFITTING = {"weight_decay": 1.2, "max_lr": -1.0}
REACH = 2.0  # factor beyond the window that rates are still tried in
CANDIDATES, UNIFORM, NEAR, BEST = 300, 75, 0.4, 5
CLIMBS = 0.35  # probability of being better than the best, from which a trial runs on
IN_A_ROW = 3  # trials ended early, after which one runs in full: else nobody would notice a mistake
AGREES, PAIRS = 0.5, 5  # correlation below which short cycles are left out; trials that show it
MOST = 90  # trials that the model is given: the best half and the latest
INDISTINCT = 0.2  # of the noise: expected scores this close count as equal


class Seen(NamedTuple):
    """One complete cycle: whose, where, its level (0 is full, 1 the next shorter …), its score."""

    number: int
    z: tuple[float, ...]
    level: int
    score: float


@dataclass(frozen=True)
class Axes:
    """The coordinates of a search: the recipe's searched fields, then the user's own parameters.

    Attributes:
        where: Coordinates of the recipe's context.
        own: Name → distribution of the user's own parameters; a categorical one has an axis for
            each choice.
    """

    where: Coordinates
    own: Mapping[str, BaseDistribution]

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The recipe's fields that are searched."""
        return tuple(
            field
            for field in records.FIELDS
            if field in self.where.recipe.space
            and not self.where.space()[self.where.recipe.name(field)].single()
        )

    @cached_property
    def bounds(self) -> tuple[Array, Array]:
        """Lowest and highest value of each field that may be tried; of rates, as multiples."""
        low, high = zip(*(self.where.space_of(field)[:2] for field in self.fields), strict=True)
        bottom, top = np.array(low, dtype=float), np.array(high, dtype=float)
        found = self.where.evidence
        if "max_lr" in self.fields and found is not None:
            at = self.fields.index("max_lr")
            limits = [edge / self.where.centre for edge in self.where.recipe.space["max_lr"][:2]]
            edge = lr_curve.EDGE * (found.edge or math.inf) / self.where.centre
            bottom[at] = max(bottom[at] / REACH, limits[0])
            top[at] = max(min(top[at] * REACH, limits[1], edge), top[at])
        return bottom, top

    @cached_property
    def guess(self) -> Array:
        """The first guess, on each field's scale."""
        params = {self.where.recipe.name(k): v for k, v in self.where.standard().items()}
        moved = self.where.to_search(params)
        assert moved is not None
        values = np.array([[moved[self.where.recipe.name(field)] for field in self.fields]])
        return np.asarray(self._scaled(values)[0])

    @cached_property
    def bases(self) -> tuple[float | None, ...]:
        """Base of the logarithm that each field is seen in; None where it is seen as it is."""
        logs = (self.where.space_of(field)[2] for field in self.fields)
        return tuple(BASE.get(f) if log else None for f, log in zip(self.fields, logs, strict=True))

    @cached_property
    def width(self) -> Array:
        """A prior width of each field, on its scale."""
        found = dict(zip(self.fields, (WIDTHS[field][0] for field in self.fields), strict=True))
        evidence = self.where.evidence
        if "weight_decay" in found and not self.where.uses_kappa:
            found["weight_decay"] = DECAY_WIDTH
        for field, base in zip(self.fields, self.bases, strict=True):
            if field in BASE and base is None:  # a linear range, as from 0 on
                low, high, _ = self.where.space_of(field)
                found[field] = (high - low) / PLAIN
        if "max_lr" in found and not (evidence and evidence.proposal.reliable):
            low, high, _ = self.where.recipe.space["max_lr"]
            if evidence:  # not the window, which of other contexts' coordinates is the whole range
                low, high = max(low, evidence.proposal.low), min(high, evidence.proposal.high)
            found["max_lr"] = max(found["max_lr"], math.log2(high / low) / LOST)
        return np.array(list(found.values()))

    @cached_property
    def relevance(self) -> tuple[float, ...]:
        """Of each axis."""
        own = len(self.place_own({}))
        return tuple(WIDTHS[field][1] for field in self.fields) + own * (OWN_RELEVANCE,)

    @cached_property
    def certainty(self) -> tuple[float, ...]:
        """Of the first guess, in each axis; none in the user's own."""
        own = len(self.place_own({}))
        return tuple(WIDTHS[field][2] for field in self.fields) + own * (0.0,)

    def shift(self) -> Array:
        """Where the first guess moves to when the study overfits, in widths."""
        free = [f for f, base in zip(self.fields, self.bases, strict=True) if base]
        moved = next((field for field in OVERFITTING if field in free), None)
        moves = np.array([OVERFITTING[f] if f == moved else 0.0 for f in self.fields])
        return np.concatenate([moves / self.width, np.zeros(len(self.place_own({})))])

    def places(self, params: Sequence[Mapping[str, Any]]) -> list[tuple[float, ...]]:
        """Widths from the first guess, of trials' parameters in search coordinates."""
        if not params:
            return []
        names = [self.where.recipe.name(field) for field in self.fields]
        z = self.back(np.array([[one[name] for name in names] for one in params]))
        own = map(self.place_own, params)
        return [(*row, *theirs) for row, theirs in zip(z.tolist(), own, strict=True)]

    def place_own(self, params: Mapping[str, Any]) -> tuple[float, ...]:
        """The user's own parameters; 0 for those the trial does not have."""
        found: list[float] = []
        for name, dist in self.own.items():
            value = params.get(name)
            if isinstance(dist, CategoricalDistribution):
                found += [float(value == choice and name in params) for choice in dist.choices]
            else:
                found.append(_within(value, cast(FloatDistribution, dist)))
        return tuple(found)

    def values(self, z: Array) -> Array:
        """Search coordinates (m, fields) of such places, moved into the bounds."""
        scaled = self.guess + self.width * z
        columns = [
            scaled[:, i] if base is None else base ** scaled[:, i]
            for i, base in enumerate(self.bases)
        ]
        values = np.stack(columns, axis=1)
        free = [i for i, field in enumerate(self.fields) if field != "max_lr"]
        low, high = self.bounds
        values[:, free] = np.clip(values[:, free], low[free], high[free])
        if "max_lr" in self.fields:
            at = self.fields.index("max_lr")
            values[:, at] = np.clip(values[:, at] / self._effective(values), low[at], high[at])
        return values

    def back(self, values: Array) -> Array:
        """The places of such values."""
        return np.asarray((self._scaled(values) - self.guess) / self.width)

    def _scaled(self, values: Array) -> Array:
        columns = []
        for i, (field, base) in enumerate(zip(self.fields, self.bases, strict=True)):
            column = values[:, i] * self._effective(values) if field == "max_lr" else values[:, i]
            columns.append(column if base is None else np.log(column) / math.log(base))
        return np.stack(columns, axis=1)

    def _effective(self, values: Array) -> Array:
        """What a rate is worth with its momentum, as a multiple of what it is with the standard."""
        if self.where.momentum_name != "momentum" or "base_momentum" not in self.fields:
            return np.ones(len(values))
        momentum = values[:, self.fields.index("base_momentum")]
        return np.asarray((1 - STANDARD_RECIPE["base_momentum"]) / (1 - momentum))


@dataclass(frozen=True)
class Search:
    """The state of a search, at one moment and for one recipe.

    Attributes:
        axes: Its coordinates.
        seen: Complete cycles.
        ended: Numbers of the trials that were pruned after a short cycle.
        pending: Places of the trials that are running.
        own: The user's own parameters of the trial at hand, as coordinates.
    """

    axes: Axes
    seen: tuple[Seen, ...]
    ended: tuple[int, ...] = ()
    pending: tuple[tuple[float, ...], ...] = ()
    own: tuple[float, ...] = ()

    @cached_property
    def overfits(self) -> bool:
        """Whether most recipes got worse when they ran in full."""
        worse = [longer > shorter for shorter, longer in self._pairs]
        return 2 * sum(worse) > len(worse)

    @cached_property
    def trusts_rungs(self) -> bool:
        """Whether short cycles still tell something of full ones."""
        if self.overfits:
            return False
        return len(self._pairs) < PAIRS or self._believe(self.seen).agreement >= AGREES

    @cached_property
    def belief(self) -> Belief | None:
        """What is known of full scores; None before the first result."""
        seen = tuple(s for s in self.seen if self.trusts_rungs or s.level == 0)
        return self._believe(seen) if seen else None

    @cached_property
    def expected(self) -> dict[int, float]:
        """Trial number → expected score, on the model's scale, of those that ran in full.

        Those that cannot be told from the best have its score, or a name once given would be taken
        back for nothing.
        """
        full = {s.number: s.z for s in self.seen if s.level == 0}
        if not full or self.belief is None:
            return {}
        mean, _ = self.belief(self._relative(list(full.values())))
        best = float(mean.min()) + INDISTINCT * self.belief.noise
        return {number: max(float(m), best) for number, m in zip(full, mean, strict=True)}

    def promises(self, number: int) -> bool:
        """Whether a trial is likely enough to be the best for it to run on."""
        own = [s.z for s in self.seen if s.number == number]
        full = [s.z for s in self.seen if s.level == 0 and s.number != number]
        if not own or not full or self.belief is None or self._ended_early >= IN_A_ROW:
            return True
        mean, sd = self.belief(self._relative([own[-1], *full]))
        gap = (float(mean[1:].min()) - float(mean[0])) / float(sd[0])
        return 0.5 * (1 + math.erf(gap / math.sqrt(2))) >= CLIMBS

    def propose(self, rng: np.random.Generator) -> dict[str, float]:
        """Search coordinates of the recipe to try next: the largest expected improvement."""
        values, gains = self._gains(rng)
        pick = int(gains.argmax())
        recipe = self.axes.where.recipe
        found = {recipe.name(f): float(values[pick, i]) for i, f in enumerate(self.axes.fields)}
        fixed = {name: d.low for name, d in self.axes.where.space().items() if name not in found}  # type: ignore[attr-defined]
        return {**fixed, **found}

    def outlook(self, rng: np.random.Generator) -> float | None:
        """What the next recipe is expected to gain over the best, in noise between seeds.

        The user's own parameters stay those of the best. None before the first full run.
        """
        full = [s.z for s in self.seen if s.level == 0]
        if self.belief is None or not full:
            return None
        best = full[int(self.belief(self._relative(full))[0].argmin())]
        there = replace(self, own=best[len(self.axes.fields) :])
        return float(there._gains(rng)[1].max()) / self.belief.noise

    def _gains(self, rng: np.random.Generator) -> tuple[Array, Array]:
        """Candidates (m, fields), and what each is expected to gain over the best place seen."""
        values = self._candidates(rng)
        if self.belief is None:
            return values, -np.arange(len(values), dtype=float)
        places = self.axes.back(values)
        own = np.tile(self.own, (len(places), 1))
        mean, sd = self._with_pending()(np.hstack([places, own]) - self._offset)
        return values, surrogate.expected_improvement(mean, sd, float(self._tried.min()))

    def _candidates(self, rng: np.random.Generator) -> Array:
        """Values to choose from: about the first guess, anywhere, and near the best so far."""
        axes, n = self.axes, len(self.axes.fields)
        low, high = axes.back(axes.bounds[0][None])[0], axes.back(axes.bounds[1][None])[0]
        drawn = [
            self._offset[:n] + rng.standard_normal((CANDIDATES, n)),
            rng.uniform(np.minimum(low, high), np.maximum(low, high), (UNIFORM, n)),
        ]
        if self.belief is not None:
            tried = np.array([s.z for s in self.seen])
            best = tried[np.argsort(self._tried, kind="stable")[:BEST], :n]
            near = best[rng.integers(0, len(best), CANDIDATES)]
            drawn.append(near + NEAR * rng.standard_normal(near.shape))
        return axes.values(np.concatenate(drawn))

    @property
    def _ended_early(self) -> int:
        """How many trials in a row, up to the latest, ended with a short cycle."""
        last = max((s.number for s in self.seen if s.level == 0), default=-1)
        return sum(number > last for number in self.ended)

    @cached_property
    def _pairs(self) -> list[tuple[float, float]]:
        """Score of the longest short cycle and of the full one, of the trials that have both."""
        short = {s.number: s.score for s in self.seen if s.level == 1}
        full: dict[int, float] = {}
        for s in self.seen:
            if s.level == 0 and s.number in short and math.isfinite(s.score):
                full.setdefault(s.number, s.score)  # its own, which comes before fresh seeds
        return [(short[number], score) for number, score in full.items()]

    @cached_property
    def _tried(self) -> Array:
        """Expected full score at every place that was seen."""
        assert self.belief is not None
        return self.belief(self._relative([s.z for s in self.seen]))[0]

    @cached_property
    def _offset(self) -> Array:
        return self.axes.shift() if self.overfits else np.zeros(len(self.axes.relevance))

    def _relative(self, z: Sequence[tuple[float, ...]]) -> Array:
        return np.asarray(np.array(z) - self._offset)

    def _believe(self, seen: tuple[Seen, ...]) -> Belief:
        axes, offset = self.axes, tuple(map(float, self._offset))
        return _believed(seen, axes.relevance, axes.certainty, offset)

    def _with_pending(self) -> Belief:
        """The belief, as if what is running had come out as expected."""
        assert self.belief is not None
        if not self.pending:
            return self.belief
        return self.belief.with_expected(self._relative(self.pending))


@lru_cache(maxsize=16)
def _believed(
    seen: tuple[Seen, ...],
    relevance: tuple[float, ...],
    certainty: tuple[float, ...],
    offset: tuple[float, ...],
) -> Belief:
    # Sampler, pruner and naming ask for the same belief in turn.
    return surrogate.believe(
        np.array([s.z for s in seen]) - np.array(offset),
        np.array([s.level for s in seen], dtype=float),
        np.array([s.score for s in seen]),
        np.array(relevance),
        np.array(certainty),
    )


def learn(now: Snapshot, where: Coordinates, trial: FrozenTrial | None = None) -> Search | None:
    """What the study knows for this recipe, and ``trial``.

    None with several objectives, or where nothing is searched.
    """
    if len(now.directions) != 1:
        return None
    recipe = where.recipe
    trials = _telling(now)
    ours = {name for t in trials for space in spaces(t) for name in space.names}
    own: dict[str, BaseDistribution] = {}
    for other in (*trials, *([trial] if trial else [])):
        for name, dist in other.distributions.items():
            if name not in ours and name not in recipe.names and not dist.single():
                own.setdefault(name, dist)
    axes = Axes(where, own)
    if not axes.fields:
        return None
    sign = 1.0 if now.directions[0] == StudyDirection.MINIMIZE else -1.0
    contexts = {recipe.context_key: axes}  # each has a first guess of its own
    told: dict[str, list[tuple[FrozenTrial, RecipeSpace, dict[str, Any]]]] = {}
    for other in trials:
        space = next((s for s in spaces(other) if s.prefix == recipe.prefix), recipe)
        key = space.context_key
        if key not in contexts:
            contexts[key] = Axes(centred(now, space), own)
        params = contexts[key].where.to_search(other.params)
        if params is not None and contexts[key].fields == axes.fields:
            told.setdefault(key, []).append((other, space, {**other.params, **params}))
    places = {
        one.number: (one, space, z)
        for key, group in told.items()
        for (one, space, _), z in zip(
            group, contexts[key].places([params for *_, params in group]), strict=True
        )
    }
    seen: list[Seen] = []
    pending, mine = [], trial.number if trial else None
    for number in sorted(places):
        other, space, z = places[number]
        whose = int(other.user_attrs.get(records.CONFIRMS, number))
        scores = [(level, sign * score) for level, score in _scores(other, space)]
        seen += [Seen(whose, z, level, abs(s) if math.isinf(s) else s) for level, s in scores]
        running = other.state == TrialState.RUNNING and other.number != mine
        if running and not any(level == 0 for level, _ in scores):
            pending.append(z)
    own_place = axes.place_own(trial.params if trial else {})
    ended = tuple(
        number
        for number, (other, *_) in sorted(places.items())
        if other.state == TrialState.PRUNED
        and not {records.DIVERGED, records.OUT_OF_MEMORY} & set(other.user_attrs)
    )
    return Search(axes, tuple(seen), ended, tuple(pending), own_place)


def expected(trials: Sequence[FrozenTrial], direction: StudyDirection) -> dict[int, float]:
    """Trial number → expected score (lower is better), of the trials that ran in full."""
    search = of_study(trials, (direction,))
    return search.expected if search else {}


def of_study(
    trials: Sequence[FrozenTrial],
    directions: Sequence[StudyDirection],
    recipe: RecipeSpace | None = None,
) -> Search | None:
    """The search of a recipe, by default the study's first; None before one was asked for."""
    now = Snapshot(trials, directions)
    recipe = recipe or next((space for trial in trials for space in spaces(trial)), None)
    return learn(now, located(now, recipe)) if recipe is not None else None


def _telling(now: Snapshot) -> list[FrozenTrial]:
    """The trials that the model is given, in the study's order."""
    trials = [t for t in now.trials if t.state not in (TrialState.WAITING, TrialState.FAIL)]
    if len(trials) <= MOST:
        return trials
    sign = 1.0 if now.directions[0] == StudyDirection.MINIMIZE else -1.0
    values = {number: sign * value for number, value in now.values.items()}
    for one in trials:  # of users who report a value without complete cycles
        if one.state == TrialState.COMPLETE and one.number not in values:
            values[one.number] = sign * cast(float, one.value)
    chosen = set(sorted(values, key=lambda number: values[number])[: MOST // 2])
    for one in reversed(trials):
        if len(chosen) == MOST:
            break
        chosen.add(one.number)
    return [t for t in trials if t.number in chosen]


def _scores(trial: FrozenTrial, space: RecipeSpace) -> list[tuple[int, float]]:
    """(level, value) of the trial's complete cycles; its value, if it ran none through us."""
    try:
        cycles = records.cycles(trial)
    except RecordError:
        return []
    if not cycles:
        known = trial.state == TrialState.COMPLETE and trial.value is not None
        return [(0, cast(float, trial.value))] if known else []
    top = max((index for index, _ in space.rungs), default=0)
    return [(top - c.rung, math.inf if c.value is None else c.value) for c in cycles]


def _within(value: Any, dist: FloatDistribution) -> float:
    """Place of a value in its range, -1.5 … 1.5; 0 if there is none."""
    if value is None:
        return 0.0
    low, high, at = float(dist.low), float(dist.high), float(value)
    if dist.log:
        low, high, at = math.log(low), math.log(high), math.log(at)
    return OWN * ((at - low) / (high - low) - 0.5)
