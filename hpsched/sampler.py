"""``OneCycleSampler``: searches one-cycle recipes from where the range tests point.

A trial is drawn in two stages, because Optuna draws a trial's whole relative space at its first
``suggest_*``, when the user's own parameters and the context are not yet known:

1. the user's parameters, by the base sampler as usual (ours are left out of its space);
2. the recipe's six values, jointly, when the first of them is read: by our own model
   (:mod:`hpsched.search`), or by the base sampler if one was given.

Both work in search coordinates (:mod:`hpsched.coordinates`): our own model directly, a base sampler
on a view of the study. What is stored are always the plain values under wide distributions that
are the same in every trial.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hpsched import records, search
from hpsched.coordinates import (
    FURTHER,
    LATER,
    ORDER,
    SETTLES,
    Coordinates,
    Snapshot,
    centred,
    located,
    spaces,
)
from hpsched.errors import UsageError
from hpsched.records import RecipeSpace
from hpsched.storage import exclusive, patiently

#: Trials that samplers which fit a model to them are shown at most, and how many of these are the
#: best ever; the others are the latest. More would cost time and teach little: TPE takes 25 at most
#: for good ones and weighs the others the less the older they are, GP's cost is cubic. With 300, a
#: proposal in a long study costs less than TPE's alone (tests/benchmarks/bench_sampler.py). Other
#: samplers see all trials: CMA-ES, for one, counts generations.
SHOWN, SHOWN_BEST = 300, 100
MODELS = (optuna.samplers.TPESampler, optuna.samplers.GPSampler)


class OneCycleSampler(BaseSampler):
    """Samples one-cycle recipes from where the range tests point.

    Everything that workers share is read from the study; nothing but the draw of a trial in
    progress is kept here.

    Args:
        base_sampler: An Optuna sampler to draw the recipes instead of hpsched's own model; TPE, GP,
            QMC, CMA-ES and random sampling are tested. By default the model draws them, and TPE
            the user's own parameters, and everything in studies with several objectives.
        range_tests: Replicates of the range test per context, at most: two that agree are enough.
            0 switches them off.
        seed: Seeds the draws and, in studies without stored settings, the runs.
        draw_seed: Seeds the TPE made here instead, for a sampler that draws a single trial.

    Raises:
        UsageError: ``range_tests`` is negative; a seed that random generators do not take.
    """

    def __init__(
        self,
        base_sampler: BaseSampler | None = None,
        *,
        range_tests: int = 3,
        seed: int | None = None,
        draw_seed: int | None = None,
    ) -> None:
        check_seed(seed)
        if range_tests < 0:
            raise UsageError(f"range_tests={range_tests!r}: a number of replicates, 0 or more.")
        tpe_seed = seed if draw_seed is None else draw_seed
        self._base_sampler = base_sampler or optuna.samplers.TPESampler(seed=tpe_seed)
        self.searches = base_sampler is None  # by our own model
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
            for name in (name for r in spaces(other) for name in r.names):
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
        for recipe in spaces(trial):
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

    def _snapshot(self, study: Study) -> Snapshot:
        most = SHOWN if isinstance(self._base_sampler, MODELS) else None
        return Snapshot(_trials(study), study.directions, most)

    def _draw(self, study: Study, trial: FrozenTrial, recipe: RecipeSpace) -> dict[str, float]:
        key = (trial._trial_id, recipe.prefix)
        if key not in self._draws:
            now = self._snapshot(study)
            where = located(now, recipe)
            k, where = _refines(study, now.trials, trial, recipe, where)
            held = where.holding(_given(study, trial, recipe))
            if k is not None:
                values = held.standard(max_lr=where.refining(k) if where.evidence else None)
            elif any(
                t.number == trial.number and records.REFINES in t.user_attrs for t in now.telling
            ):  # with another recipe, whose result this would blur
                values = held.standard()
            else:
                values = held.from_search(self._propose(study, now, trial, where))
            self._draws[key] = {recipe.name(field): v for field, v in values.items()}
        return self._draws[key]

    def _propose(
        self, study: Study, now: Snapshot, trial: FrozenTrial, where: Coordinates
    ) -> dict[str, Any]:
        known = search.learn(now, where, trial) if self.searches else None
        if known is None:
            return self._sample(study, now, trial, where)
        parts = [part for part in ("search", where.recipe.prefix) if part]
        seed = None if self.seed is None else records.derive_seed(self.seed, trial.number, *parts)
        return dict(known.propose(np.random.default_rng(seed)))

    def _sample(
        self, study: Study, now: Snapshot, trial: FrozenTrial, where: Coordinates
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


def check_seed(seed: Any) -> None:
    """Refuse what NumPy's and torch's random generators do not take.

    Raises:
        UsageError: Neither None nor a whole number from 0 to 2³² - 1.
    """
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    if seed is not None and not (whole and 0 <= seed < 2**32):
        raise UsageError(f"seed={seed!r}: a whole number from 0 to {2**32 - 1}.")


def find_sampler(study: Study) -> OneCycleSampler | None:
    """The study's :class:`OneCycleSampler`, also inside a wrapper such as PartialFixedSampler."""
    sampler: Any = study.sampler
    while sampler is not None and not isinstance(sampler, OneCycleSampler):
        sampler = getattr(sampler, "_base_sampler", None)
    return sampler


def _given(study: Study, trial: FrozenTrial, recipe: RecipeSpace) -> dict[str, float]:
    """Field → value of what is not drawn here: enqueued, held by a PartialFixedSampler, stored."""
    known = {
        **getattr(study.sampler, "_fixed_params", {}),
        **trial.system_attrs.get("fixed_params", {}),
        **trial.params,
    }
    return {f: known[recipe.name(f)] for f in recipe.space if recipe.name(f) in known}


def _trials(study: Study) -> list[FrozenTrial]:
    return study._get_trials(deepcopy=False, use_cache=False)


def _refines(
    study: Study,
    trials: Sequence[FrozenTrial],
    trial: FrozenTrial,
    recipe: RecipeSpace,
    where: Coordinates,
) -> tuple[int | None, Coordinates]:
    """Which refining trial of its context this is, if any, and the coordinates by then.

    Workers that draw at once agree.
    """
    main = next(iter(spaces(trial)), recipe)
    if recipe.prefix != main.prefix or _free_role(study, trials, trial, recipe, where) is None:
        return None, where
    if set(recipe.names) & set(trial.system_attrs.get("fixed_params", {})):  # read when asked for
        return None, where

    def choose() -> tuple[int | None, Coordinates]:
        with exclusive(study._storage, study.study_name):
            now = Snapshot(_trials(study), study.directions)
            there = located(now, recipe)
            k = _free_role(study, now.trials, trial, recipe, there)
            if k is not None:
                study._storage.set_trial_user_attr(trial._trial_id, records.REFINES, k)
            return k, there

    return patiently(choose, "choosing what to refine")


def role_of(study: Study, trial_id: int) -> int | None:
    """Which refining trial this is, or None; as stored, since a trial's own cache may be older."""
    role: int | None = study._storage.get_trial(trial_id).user_attrs.get(records.REFINES)
    return role


def _free_role(
    study: Study,
    trials: Sequence[FrozenTrial],
    trial: FrozenTrial,
    recipe: RecipeSpace,
    where: Coordinates,
) -> int | None:
    """The first role that nobody holds, or has played without failing.

    The first context gets all of them, each further one starts from what the first has learned.
    Without range tests, or with several objectives, there is only the standard recipe. The second
    past an end is for short cycles alone, where the budget is not small, and the best lies at an
    end when all before it are through.
    """
    held: dict[str, set[int]] = {}
    unfinished = set()
    for other in trials:
        k = other.user_attrs.get(records.REFINES)
        if k is None or other.number == trial.number:
            continue
        if other.state == TrialState.FAIL or _ran_out(other):
            continue
        key = next(iter(spaces(other)), recipe).context_key
        held.setdefault(key, set()).add(k)
        if not other.state.is_finished():
            unfinished.add(key)
    if len(study.directions) > 1 or where.evidence is None or not recipe.rungs:
        return None if held else 0
    first = not held or recipe.context_key == next(iter(held))
    taken = held.get(recipe.context_key, set())
    again = (
        len(recipe.rungs) > 1
        and recipe.context_key not in unfinished
        and SETTLES not in taken
        and not is_small(study)
        and where.further is not None
    )
    roles = ORDER if first else LATER
    return next((k for k in roles if k not in taken and (again or k != FURTHER[-1])), None)


#: Search trials, or full cycles, below which a budget is small: refining leaves little of it.
SMALL = 8


def is_small(study: Study) -> bool:
    """Whether the study's budget is small."""
    attrs = study._storage.get_study_user_attrs(study._study_id)  # Hyperband's study has only this
    settings = attrs.get(records.SETTINGS, {})
    return bool((settings.get("trials") or settings.get("cycles") or math.inf) < SMALL)


def _whole(now: Snapshot) -> list[FrozenTrial]:
    """Trials that a base sampler may learn the user's own parameters from."""
    return _on_one_scale(
        now, lambda trial: trial.params if _has_all(trial) or _ran_out(trial) else None
    )


def _in_coordinates(
    now: Snapshot, where: Coordinates, space: Mapping[str, BaseDistribution]
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
        if _ran_out(trial):  # which says nothing of the recipe
            return None
        recipe = where.recipe
        for other in spaces(trial):
            if other.prefix == recipe.prefix:
                recipe = other
                break
        if recipe.context_key not in maps:
            maps[recipe.context_key] = centred(now, recipe)
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


#: As Optuna keeps them.
OUR_CONSTRAINTS = {
    f"constraints:{name}" for name in (records.CONSTRAINT, records.MEMORY_CONSTRAINT)
}


def _ran_out(trial: FrozenTrial) -> bool:
    return records.OUT_OF_MEMORY in trial.user_attrs


def _has_all(trial: FrozenTrial) -> bool:
    return all(r.values(trial.params) is not None for r in spaces(trial))


def _on_one_scale(
    now: Snapshot, params_of: Callable[[FrozenTrial], Mapping[str, Any] | None]
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
        lost = records.DIVERGED in trial.user_attrs or _ran_out(trial)
        value = _worst(now) if lost else now.values.get(trial.number)
        if value is None:
            return None if spaces(trial) else _changed(trial, _params=params)
        # The value says it; GP refuses studies in which only some trials have constraints.
        attrs = trial.system_attrs
        if lost:
            attrs = {key: attrs[key] for key in attrs if key not in OUR_CONSTRAINTS}
        state = TrialState.COMPLETE
        return _changed(trial, _params=params, _system_attrs=attrs, state=state, _values=[value])

    if single and now.most and len(now.ordinary) > now.most:
        return _best_and_latest(now, now.most, shown)
    return [moved for trial in now.ordinary if (moved := shown(trial))]


def _best_and_latest(
    now: Snapshot, most: int, shown: Callable[[FrozenTrial], FrozenTrial | None]
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


def _worst(now: Snapshot) -> float | None:
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
