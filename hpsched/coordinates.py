"""Where a recipe lies: the map between its plain values and the coordinates it is searched in.

=============  ===================================================================
coordinate     meaning
=============  ===================================================================
rate           max_lr / centre of the trial's own context (so contexts compare)
κ              weight_decay × effective rate × total_steps, where the effective
               rate is max_lr / (1 − momentum) for SGD-like and max_lr for
               Adam-like optimizers (docs/design.md)
value          the result of the longest rung, moved to the scale of full cycles (for base
               samplers; our own model sees every rung as it is)
=============  ===================================================================
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from hpsched import evidence, lr_curve, records, refine
from hpsched.errors import RecordError
from hpsched.evidence import Evidence
from hpsched.records import RecipeSpace

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
#: Role of a refining trial → where in the belief about the best max_lr it lies: the centre, the
#: lower flank, the upper one, and what is the centre by then (docs/calibration.md).
REFINING = {0: 0.5, 1: 0.15, 2: 0.85, 3: 0.5}
#: The one that runs in full.
SETTLES = 3
#: Those that rather lie past what was tried, if the best is at an end of it; the second is played
#: only then, before all is settled.
FURTHER = (2, 4)
ORDER = (0, 1, *FURTHER, SETTLES)
#: Those that each context after the first plays.
LATER = (0, SETTLES)
#: Horizon assumed for κ when ``suggest_onecycle`` was not told total_steps.
ASSUMED_STEPS = 1000
#: Trials of a context before its window may widen towards a best one at its edge.
TRIALS_BEFORE_WIDENING = 4


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """The map between a recipe's plain values and the coordinates it is searched in.

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

    def holding(self, given: Mapping[str, float]) -> Coordinates:
        """The same map, of a trial that is to have these values: field → plain value."""
        if not given:
            return self
        space = {field: s for field, s in self.recipe.space.items() if field not in given}
        recipe = replace(self.recipe, fixed={**self.recipe.fixed, **given}, space=space)
        return replace(self, recipe=recipe)

    def standard(self, kappa: float | None = None, max_lr: float | None = None) -> dict[str, float]:
        """Field → value of the standard recipe, at the proposed rate unless told otherwise.

        In a study that begins like another, of the recipe that was best there.
        """
        guess = self.recipe.guess
        shape = {field: guess.get(field, value) for field, value in STANDARD_RECIPE.items()}
        wanted = {**shape, "max_lr": max_lr or self.centre, **self.recipe.fixed}
        values = {**wanted, "weight_decay": self.recipe.fixed.get("weight_decay", 0.0)}
        if "weight_decay" in self.recipe.space:
            if self.optimizer in COUPLED:
                values["weight_decay"] = guess.get("weight_decay", COUPLED_DECAY)
            else:
                kappa = guess.get("kappa", STANDARD_KAPPA) if kappa is None else kappa
                values["weight_decay"] = kappa / self._unit(wanted)
        return {field: self._clip(field, values[field]) for field in self.recipe.space}

    def space_of(self, field: str) -> tuple[float, float, bool]:
        """(low, high, log) of a field as it is searched."""
        dist = cast(FloatDistribution, self.space()[self.recipe.name(field)])
        return dist.low, dist.high, dist.log

    def guess_of(self, values: Mapping[str, float]) -> dict[str, float]:
        """A recipe (field → value) as the first guess of another study of the same model.

        In units that carry over to another horizon or batch size: see :attr:`RecipeSpace.guess`.
        """
        guess = {field: values[field] for field in STANDARD_RECIPE}
        if self.evidence is not None and self.evidence.prior.reliable:
            guess["max_lr"] = values["max_lr"] / self.evidence.prior.centre
        if self.optimizer in COUPLED:
            guess["weight_decay"] = values["weight_decay"]
        else:
            guess["kappa"] = values["weight_decay"] * self._unit(values)
        return guess

    def refining(self, k: int) -> float:
        """max_lr of a refining trial: past an end, or a quantile of what is believed."""
        assert self.evidence is not None
        if k in FURTHER and (further := self.further):
            return further
        belief = refine.best_rate(self.evidence.start, self.evidence.runs)
        return self._tried(self.centre if k == 0 else belief.quantile(REFINING[k]))

    @cached_property
    def further(self) -> float | None:
        """max_lr past what refining trials have tried, if the best of them lies at an end.

        None also where the user's range leaves less than an octave of room.
        """
        assert self.evidence is not None
        wanted = refine.beyond(self.evidence.runs)
        if wanted is None:
            return None
        rate = self._tried(wanted)
        return rate if 0.5 <= rate / wanted <= 2 else None

    def _tried(self, rate: float) -> float:
        """The rate, within the user's range and below where training diverges."""
        assert self.evidence is not None
        edge = self.evidence.edge or math.inf
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


def coordinates(
    trials: Sequence[FrozenTrial],
    recipe: RecipeSpace,
    directions: Sequence[StudyDirection],
) -> Coordinates:
    """Where to search for this recipe, from the evidence of its context (or of all contexts).

    The window widens by an octave at a time towards a best trial within half an octave of its
    edge, so that a wrong window is left.
    """
    return located(Snapshot(tuple(trials), tuple(directions)), recipe)


def located(now: Snapshot, recipe: RecipeSpace) -> Coordinates:
    """:func:`coordinates`, of a study at one moment."""
    where = centred(now, recipe)
    if where.evidence is None:
        return where
    proposal = where.evidence.proposal
    low, high, _ = recipe.space["max_lr"]
    window = _widened((proposal.low, proposal.high), _best_lr(now, recipe))
    window = (max(window[0], low), min(window[1], high))
    if not window[0] < window[1]:  # the user's range lies beside the window: search the range
        window = (low, high)
    return replace(where, window=window)


def centred(now: Snapshot, recipe: RecipeSpace) -> Coordinates:
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


@records.once_finished
def spaces(trial: FrozenTrial) -> tuple[RecipeSpace, ...]:
    """The trial's recipe spaces; none, with one warning, if they cannot be read."""
    try:
        return tuple(records.recipe_spaces(trial))
    except RecordError as error:
        evidence.warn_once(str(error))
        return ()


def _best_lr(now: Snapshot, recipe: RecipeSpace) -> float | None:
    """max_lr of the context's best trial so far; None while there are too few."""
    name = recipe.name("max_lr")
    ours = (
        t.params[name]
        for t in now.ranked
        if name in t.params
        and records.DIVERGED not in t.user_attrs
        and any(r.context_key == recipe.context_key for r in spaces(t))
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
class Snapshot:
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
        """All but confirmations."""
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
