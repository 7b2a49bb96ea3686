"""``OneCycleSampler``: any Optuna sampler, searching where the range tests point.

A trial is drawn in two stages, because Optuna draws a trial's whole relative space at its first
``suggest_*``, when the user's own parameters and the context are not yet known:

1. the user's parameters, by the base sampler as usual (ours are left out of its space);
2. the recipe's six values, jointly, when the first of them is read.

In stage 2 the base sampler sees the study in *search coordinates*:

=============  ===================================================================
coordinate     meaning
=============  ===================================================================
rate           max_lr / centre of the trial's own context (so contexts compare)
κ              weight_decay × effective rate × total_steps, where the effective
               rate is max_lr / (1 − momentum) for SGD-like and max_lr for
               Adam-like optimizers (docs/design.md)
value          the result of the longest rung, moved to the scale of full cycles
=============  ===================================================================

What is stored are always the plain values under wide distributions that are the same in every
trial.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpsched import evidence, lr_curve, records, refine
from hpsched.errors import RecordError, UsageError
from hpsched.evidence import Evidence
from hpsched.records import RecipeSpace
from hpsched.storage import exclusive

#: The recipe that fast.ai made popular; the first real trial uses it at the proposed rate.
STANDARD_RECIPE = {
    "div_factor": 25.0,
    "pct_start": 0.3,
    "base_momentum": 0.85,
    "max_momentum": 0.95,
}
#: κ ≤ 1 costs nothing on unlike tasks and helps a little; κ = 10 ruins.
STANDARD_KAPPA = 0.3
KAPPA_RANGE = (0.01, 5.0)
#: Optimizers that add weight decay to the gradient they normalise: κ has no meaning for them.
COUPLED = frozenset({"Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop"})
COUPLED_DECAYS = (1e-6, 1e-2)
COUPLED_DECAY = 1e-4
#: Where in the belief about the best max_lr each refining trial lies: the centre, both flanks, and
#: what is the centre by then, which is run in full (docs/calibration.md).
REFINING = (0.5, 0.15, 0.85, 0.5)
#: Those of them that each context after the first plays: first and last.
LATER = (0, len(REFINING) - 1)
#: Horizon assumed for κ when ``suggest_onecycle`` was not told total_steps.
ASSUMED_STEPS = 1000
#: Trials of a context before its window may widen towards a best one at its edge.
TRIALS_BEFORE_WIDENING = 4
#: Trials that samplers which fit a model to them are shown at most, and how many of these are the
#: best ever; the others are the latest. More would cost time and teach little: TPE takes 25 at most
#: for good ones and weighs the others the less the older they are, GP's cost is cubic. With 300, a
#: proposal in a long study costs less than TPE's alone (tests/benchmarks/bench_sampler.py). Other
#: samplers see all trials: CMA-ES, for one, counts generations.
SHOWN, SHOWN_BEST = 300, 100
MODELS = (optuna.samplers.TPESampler, optuna.samplers.GPSampler)


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """The map between a recipe's plain values and the base sampler's coordinates.

    Attributes:
        recipe: The space of the trial at hand.
        centre: The context's proposed max_lr; 1 when there is no evidence.
        window: (low, high) for max_lr.
        momentum_name: ``momentum``, ``beta1`` or ``none``.
        optimizer: Class name of the user's optimizer.
        evidence: What centre and window follow from; None when there is none.
    """

    recipe: RecipeSpace
    centre: float
    window: tuple[float, float]
    momentum_name: str
    optimizer: str = ""
    evidence: Evidence | None = None

    @cached_property
    def uses_kappa(self) -> bool:
        """Whether weight decay is searched as κ: its range was left to us, and κ has a meaning."""
        return self._free_decay and self.optimizer not in COUPLED

    @property
    def _free_decay(self) -> bool:
        low, high, log = self.recipe.space.get("weight_decay", (1.0, 1.0, False))
        return log and (low, high) == WEIGHT_DECAY_BOUNDS

    def space(self) -> dict[str, BaseDistribution]:
        """Parameter name → distribution in search coordinates."""
        found: dict[str, BaseDistribution] = {}
        for field in records.FIELDS:
            if field in self.recipe.space:
                low, high, log = self.recipe.space[field]
                if field == "max_lr":
                    low, high = (edge / self.centre for edge in self.window)
                elif field == "weight_decay" and self._free_decay:
                    low, high = KAPPA_RANGE if self.uses_kappa else COUPLED_DECAYS
                found[self.recipe.name(field)] = FloatDistribution(low, high, log=log)
        return found

    def to_search(self, params: Mapping[str, Any]) -> dict[str, Any] | None:
        """``params`` with the recipe's in search coordinates; None unless all are there."""
        values = self.recipe.values(params)
        if values is None:
            return None
        moved = dict(params)
        if "max_lr" in self.recipe.space:
            moved[self.recipe.name("max_lr")] = values["max_lr"] / self.centre
        if self.uses_kappa:
            moved[self.recipe.name("weight_decay")] = values["weight_decay"] * self._unit(values)
        return moved

    def from_search(self, params: Mapping[str, Any]) -> dict[str, float]:
        """Field → plain value, within the stored bounds."""
        values = {field: float(params[self.recipe.name(field)]) for field in self.recipe.space}
        if "max_lr" in values:
            values["max_lr"] *= self.centre
        if self.uses_kappa:
            values["weight_decay"] /= self._unit({**self.recipe.fixed, **values})
        if "weight_decay" in values and self.evidence is not None:
            rate = {**self.recipe.fixed, **values}["max_lr"]
            values["weight_decay"] = min(values["weight_decay"], self.evidence.decay_limit / rate)
        return {field: self._clip(field, value) for field, value in values.items()}

    def standard(
        self, kappa: float = STANDARD_KAPPA, max_lr: float | None = None
    ) -> dict[str, float]:
        """Field → value of the standard recipe, at the proposed rate unless told otherwise."""
        wanted = {**STANDARD_RECIPE, "max_lr": max_lr or self.centre, **self.recipe.fixed}
        values = {**wanted, "weight_decay": self.recipe.fixed.get("weight_decay", 0.0)}
        if "weight_decay" in self.recipe.space:
            values["weight_decay"] = (
                COUPLED_DECAY if self.optimizer in COUPLED else kappa / self._unit(wanted)
            )
        return {field: self._clip(field, values[field]) for field in self.recipe.space}

    def space_of(self, field: str) -> tuple[float, float, bool]:
        """(low, high, log) of a field as it is searched."""
        dist = cast(FloatDistribution, self.space()[self.recipe.name(field)])
        return dist.low, dist.high, dist.log

    def refining(self, k: int) -> float:
        """max_lr of the k-th refining trial: a quantile of what is believed by then."""
        assert self.evidence is not None
        belief = refine.best_rate(self.evidence.start, self.evidence.runs)
        edge = self.evidence.prior.lr_diverged or math.inf
        rate = self.centre if k == 0 else belief.quantile(REFINING[k])
        return self._clip("max_lr", min(rate, lr_curve.EDGE * edge))

    def _unit(self, values: Mapping[str, float]) -> float:
        """κ per weight decay: effective rate × total_steps."""
        rate = values["max_lr"]
        if self.momentum_name == "momentum":
            rate /= 1 - values["base_momentum"]
        return rate * (self.recipe.total_steps or ASSUMED_STEPS)

    def _clip(self, field: str, value: float) -> float:
        low, high, _ = self.recipe.space[field]
        return min(max(value, low), high)


#: The stored range of weight decay when the caller leaves it to us.
WEIGHT_DECAY_BOUNDS = (1e-8, 1.0)


class OneCycleSampler(BaseSampler):
    """Samples one-cycle recipes inside the window that the range tests give.

    Everything that workers share is read from the study; nothing but the draw of a trial in
    progress is kept here.

    Args:
        base_sampler: Does the sampling; Optuna's TPE unless told otherwise. TPE, GP, QMC, CMA-ES
            and random sampling are tested.
        range_tests: Replicates of the range test wanted per context; 0 switches them off.
        seed: Seeds the base sampler made here and, in studies without stored settings, the runs.

    Raises:
        UsageError: ``range_tests`` is negative.
    """

    def __init__(
        self,
        base_sampler: BaseSampler | None = None,
        *,
        range_tests: int = 3,
        seed: int | None = None,
    ) -> None:
        if range_tests < 0:
            raise UsageError(f"range_tests={range_tests!r}: a number of replicates, 0 or more.")
        self._base_sampler = base_sampler or optuna.samplers.TPESampler(seed=seed)
        self.range_tests = range_tests
        self.seed = seed
        self._draws: dict[tuple[int, str], dict[str, float]] = {}

    def reseed_rng(self) -> None:
        """Reseed the base sampler (Optuna calls this under ``n_jobs > 1``)."""
        self._base_sampler.reseed_rng()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The base sampler's space without the recipe's names (stage 1)."""
        trials = _trials(study)
        view = _view(study, lambda: [t for t in map(_for_space, trials) if t is not None])
        space = self._base_sampler.infer_relative_search_space(view, trial)
        free = dict(space)
        for other in reversed(trials):  # hardly ever more than one of them has something to say
            for name in (name for r in _spaces(other) for name in r.names):
                free.pop(name, None)
            if not free:
                break
        return free

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Stage 1: the user's own parameters, by the base sampler."""
        view = _view(study, lambda: _whole(self._snapshot(study)))
        return self._base_sampler.sample_relative(view, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Stage 2 when the name belongs to the trial's recipe; else the base sampler's."""
        for recipe in _spaces(trial):
            if param_name in recipe.names:
                return self._draw(study, trial, recipe)[param_name]
        return self._base_sampler.sample_independent(
            _view(study, lambda: _whole(self._snapshot(study))),
            trial,
            param_name,
            param_distribution,
        )

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Delegates."""
        self._base_sampler.before_trial(study, trial)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Delegates, and forgets the trial's draw."""
        for key in [key for key in self._draws if key[0] == trial._trial_id]:
            self._draws.pop(key, None)
        self._base_sampler.after_trial(study, trial, state, values)

    def _snapshot(self, study: Study) -> _Snapshot:
        most = SHOWN if isinstance(self._base_sampler, MODELS) else None
        return _Snapshot(_trials(study), study.directions, most)

    def _draw(self, study: Study, trial: FrozenTrial, recipe: RecipeSpace) -> dict[str, float]:
        key = (trial._trial_id, recipe.prefix)
        if key not in self._draws:
            now = self._snapshot(study)
            where = _coordinates(now, recipe)
            k = _refines(study, now.trials, trial, recipe, where)
            if k is not None:
                values = where.standard(max_lr=where.refining(k) if where.evidence else None)
            elif any(
                t.number == trial.number and records.REFINES in t.user_attrs for t in now.telling
            ):  # with another recipe, whose result this would blur
                values = where.standard()
            else:
                values = where.from_search(self._sample(study, now, trial, where))
            self._draws[key] = {recipe.name(field): v for field, v in values.items()}
        return self._draws[key]

    def _sample(
        self, study: Study, now: _Snapshot, trial: FrozenTrial, where: Coordinates
    ) -> dict[str, Any]:
        space = where.space()
        view = _view(study, lambda: _in_coordinates(now, where, space))
        free = {name: dist for name, dist in space.items() if not dist.single()}
        params = self._base_sampler.sample_relative(view, trial, free) if free else {}
        for name, dist in space.items():
            if name not in params:
                params[name] = (
                    cast(FloatDistribution, dist).low
                    if dist.single()
                    else self._base_sampler.sample_independent(view, trial, name, dist)
                )
        return params


def find_sampler(study: Study) -> OneCycleSampler | None:
    """The study's :class:`OneCycleSampler`, also inside a wrapper such as PartialFixedSampler."""
    sampler: Any = study.sampler
    while sampler is not None and not isinstance(sampler, OneCycleSampler):
        sampler = getattr(sampler, "_base_sampler", None)
    return sampler


def coordinates(
    trials: Sequence[FrozenTrial],
    recipe: RecipeSpace,
    directions: Sequence[StudyDirection],
) -> Coordinates:
    """Where to search for this recipe, from the evidence of its context (or of all contexts).

    The window widens by an octave at a time towards a best trial within half an octave of its
    edge, so that a wrong window is left.
    """
    return _coordinates(_Snapshot(tuple(trials), tuple(directions)), recipe)


def _coordinates(now: _Snapshot, recipe: RecipeSpace) -> Coordinates:
    where = _centred(now, recipe)
    if where.evidence is None:
        return where
    proposal = where.evidence.proposal
    low, high, _ = recipe.space["max_lr"]
    window = _widened((proposal.low, proposal.high), _best_lr(now, recipe))
    window = (max(window[0], low), min(window[1], high))
    if not window[0] < window[1]:  # the user's range lies beside the window: search the range
        window = (low, high)
    return replace(where, window=window)


def _centred(now: _Snapshot, recipe: RecipeSpace) -> Coordinates:
    """The coordinates, but with the whole range of max_lr as window."""
    found = evidence.of(now.telling, recipe, now.directions)
    low, high, _ = recipe.space.get("max_lr", (recipe.fixed.get("max_lr", 1.0),) * 2 + (True,))
    if found is None or "max_lr" not in recipe.space:
        centre = math.sqrt(low * high)
        name = found.momentum_name if found else "momentum"
        return Coordinates(
            recipe=recipe,
            centre=centre,
            window=(low, high),
            momentum_name=name,
            optimizer=found.optimizer if found else "",
        )
    return Coordinates(
        recipe=recipe,
        centre=min(max(found.proposal.centre, low), high),
        window=(low, high),
        momentum_name=found.momentum_name,
        optimizer=found.optimizer,
        evidence=found,
    )


def full_scale_values(trials: Sequence[FrozenTrial]) -> dict[int, float]:
    """Trial number → its longest rung's value, moved to the scale of the last rung.

    Short cycles score worse than full ones for want of steps. What a rung adds is taken as the
    median change over the trials that ran both it and the next one.
    """
    ladders = {t.number: ladder for t in trials if (ladder := t.intermediate_values)}
    steps = sorted(set().union(*ladders.values()))
    gain = {step: 0.0 for step in steps}
    for lower, upper in zip(reversed(steps[:-1]), reversed(steps[1:]), strict=True):
        changes = [
            change
            for ladder in ladders.values()
            if lower in ladder
            and upper in ladder
            and math.isfinite(change := ladder[upper] - ladder[lower])
        ]
        gain[lower] = gain[upper] + (statistics.median(changes) if changes else 0.0)
    return {
        number: value
        for number, ladder in ladders.items()
        if math.isfinite(value := ladder[top := max(ladder)] + gain[top])
    }


def _trials(study: Study) -> list[FrozenTrial]:
    return study._get_trials(deepcopy=False, use_cache=False)


@records.once_finished
def _spaces(trial: FrozenTrial) -> tuple[RecipeSpace, ...]:
    try:
        return tuple(records.recipe_spaces(trial))
    except RecordError as error:
        evidence.warn_once(str(error))
        return ()


def _refines(
    study: Study,
    trials: Sequence[FrozenTrial],
    trial: FrozenTrial,
    recipe: RecipeSpace,
    where: Coordinates,
) -> int | None:
    """Which refining trial of its context this is, or None; workers that draw at once agree."""
    main = next(iter(_spaces(trial)), recipe)
    many = len(study.directions) > 1
    if recipe.prefix != main.prefix or _free_role(trials, trial, recipe, where, many) is None:
        return None
    if set(recipe.names) & set(trial.system_attrs.get("fixed_params", {})):  # read when asked for
        return None
    with exclusive(study._storage, study.study_name):
        k = _free_role(_trials(study), trial, recipe, where, many)
        if k is not None:
            study._storage.set_trial_user_attr(trial._trial_id, records.REFINES, k)
    return k


def role_of(study: Study, trial_id: int) -> int | None:
    """Which refining trial this is, or None; as stored, since a trial's own cache may be older."""
    role: int | None = study._storage.get_trial(trial_id).user_attrs.get(records.REFINES)
    return role


def _free_role(
    trials: Sequence[FrozenTrial],
    trial: FrozenTrial,
    recipe: RecipeSpace,
    where: Coordinates,
    many: bool,
) -> int | None:
    """The first role that nobody holds, or has played without failing.

    The first context gets all of them, each further one starts from what the first has learned.
    Without range tests, or with several objectives (``many``), there is only the standard recipe.
    """
    held: dict[str, set[int]] = {}
    for other in trials:
        k = other.user_attrs.get(records.REFINES)
        if k is not None and other.state != TrialState.FAIL and other.number != trial.number:
            held.setdefault(next(iter(_spaces(other)), recipe).context_key, set()).add(k)
    first = not held or recipe.context_key == next(iter(held))
    roles: Sequence[int] = range(len(REFINING)) if first else LATER
    if many or where.evidence is None or not recipe.rungs:
        roles = () if held else (0,)
    taken = held.get(recipe.context_key, set())
    return next((k for k in roles if k not in taken), None)


def _best_lr(now: _Snapshot, recipe: RecipeSpace) -> float | None:
    """max_lr of the context's best trial so far; None while there are too few."""
    name = recipe.name("max_lr")
    ours = (
        t.params[name]
        for t in now.ranked
        if name in t.params
        and records.DIVERGED not in t.user_attrs
        and any(r.context_key == recipe.context_key for r in _spaces(t))
    )
    best = list(itertools.islice(ours, TRIALS_BEFORE_WIDENING))
    return float(best[0]) if len(best) == TRIALS_BEFORE_WIDENING else None


def _widened(window: tuple[float, float], best_lr: float | None) -> tuple[float, float]:
    low, high = window
    if best_lr is not None:
        while best_lr < low * math.sqrt(2):
            low /= 2
        while best_lr > high / math.sqrt(2):
            high *= 2
    return low, high


@dataclass(frozen=True)
class _Snapshot:
    """A study's trials at one moment, and what follows from all of them: worked out once a draw."""

    trials: Sequence[FrozenTrial]
    directions: Sequence[StudyDirection]
    most: int | None = None  # trials that the base sampler is shown; None: all

    @cached_property
    def telling(self) -> list[FrozenTrial]:
        """Those that carry evidence: a handful per context."""
        return [t for t in self.trials if evidence.bears(t)]

    @cached_property
    def ordinary(self) -> list[FrozenTrial]:
        return [t for t in self.trials if not records.is_confirmation(t)]

    @cached_property
    def values(self) -> dict[int, float]:
        """Trial number → value at full scale; none with several objectives."""
        return full_scale_values(self.ordinary) if len(self.directions) == 1 else {}

    @cached_property
    def ranked(self) -> list[FrozenTrial]:
        """The trials that have such a value, best first."""
        maximize = self.directions[0] == StudyDirection.MAXIMIZE
        known = [t for t in self.ordinary if t.number in self.values]
        return sorted(known, key=lambda t: self.values[t.number], reverse=maximize)


def _whole(now: _Snapshot) -> list[FrozenTrial]:
    """Trials that a base sampler may learn the user's own parameters from."""
    return _on_one_scale(now, lambda trial: trial.params if _has_all(trial) else None)


def _in_coordinates(
    now: _Snapshot, where: Coordinates, space: Mapping[str, BaseDistribution]
) -> list[FrozenTrial]:
    """Trials with this recipe's parameters, in search coordinates, inside the space.

    A trial outside the window is hidden: samplers would pin proposals to the edge next to it.
    """
    maps: dict[str, Coordinates] = {where.recipe.context_key: where}
    slack = 1 + 1e-9
    bounds = [
        (name, dist.low / slack, dist.high * slack)
        for name, dist in cast(Mapping[str, FloatDistribution], space).items()
    ]

    def params_of(trial: FrozenTrial) -> Mapping[str, Any] | None:
        recipe = where.recipe
        for other in _spaces(trial):
            if other.prefix == recipe.prefix:
                recipe = other
                break
        if recipe.context_key not in maps:
            maps[recipe.context_key] = _centred(now, recipe)
        params = maps[recipe.context_key].to_search(trial.params)
        if params is None:
            return None
        for name, low, high in bounds:
            if not low <= params[name] <= high:
                return None
        return params

    return _on_one_scale(now, params_of)


@records.once_finished
def _for_space(trial: FrozenTrial) -> FrozenTrial | None:
    """The trial as a search space is inferred from it: what counts are distributions and state."""
    if records.is_confirmation(trial) or not _has_all(trial):
        return None
    state = TrialState.COMPLETE if trial.state == TrialState.PRUNED else trial.state
    return _changed(trial, state=state)


def _has_all(trial: FrozenTrial) -> bool:
    return all(r.values(trial.params) is not None for r in _spaces(trial))


def _on_one_scale(
    now: _Snapshot, params_of: Callable[[FrozenTrial], Mapping[str, Any] | None]
) -> list[FrozenTrial]:
    """Copies of the trials with other params, and pruned ones as complete on the full scale.

    Samplers that ignore pruned trials (GP) would otherwise learn nothing from short rungs.
    """
    single = len(now.directions) == 1

    def shown(trial: FrozenTrial) -> FrozenTrial | None:
        params = params_of(trial)
        if params is None:
            return None
        if trial.state != TrialState.PRUNED or not single:
            return _changed(trial, _params=params)
        diverged = records.DIVERGED in trial.user_attrs
        value = _worst(now) if diverged else now.values.get(trial.number)
        if value is None:
            return None if _spaces(trial) else _changed(trial, _params=params)
        return _changed(trial, _params=params, state=TrialState.COMPLETE, _values=[value])

    if single and now.most and len(now.ordinary) > now.most:
        return _best_and_latest(now, now.most, shown)
    return [moved for trial in now.ordinary if (moved := shown(trial))]


def _best_and_latest(
    now: _Snapshot, most: int, shown: Callable[[FrozenTrial], FrozenTrial | None]
) -> list[FrozenTrial]:
    """``most`` of those to be shown, in the study's order."""
    found: dict[int, FrozenTrial] = {}
    for trials, limit in ((now.ranked, SHOWN_BEST), (reversed(now.ordinary), most)):
        for trial in trials:
            if len(found) == limit:
                break
            seen = trial.number in found or trial.state in (TrialState.FAIL, TrialState.WAITING)
            if not seen and (moved := shown(trial)):
                found[trial.number] = moved
    return [found[number] for number in sorted(found)]


def _changed(trial: FrozenTrial, **attributes: Any) -> FrozenTrial:
    """A shallow copy with other attributes, several times as fast as ``copy.copy``."""
    moved = object.__new__(FrozenTrial)
    moved.__dict__.update(trial.__dict__, **attributes)
    return moved


def _worst(now: _Snapshot) -> float | None:
    return now.values[now.ranked[-1].number] if now.ranked else None


class _StudyView:
    """A study whose trials are those of ``read``; everything else is the study's own."""

    def __init__(self, study: Study, read: Callable[[], list[FrozenTrial]]) -> None:
        self._study = study
        self._read = read
        self._shown: list[FrozenTrial] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.get_trials()

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return self._get_trials(deepcopy=deepcopy, states=states)

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        if self._shown is None:  # a view lives for one call of the base sampler
            self._shown = self._read()
        found = [t for t in self._shown if states is None or t.state in states]
        return copy.deepcopy(found) if deepcopy else found


def _view(study: Study, read: Callable[[], list[FrozenTrial]]) -> Study:
    return cast(Study, _StudyView(study, read))
