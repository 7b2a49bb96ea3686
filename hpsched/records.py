"""What hpsched writes into a study: attribute names, frozen records, JSON.

Records, not imports, cross between the Optuna side (sampler, pruner, study) and the torch side
(cycle, range test). Everything lives in *user* attributes, so that any Optuna tool can read it;
floats keep six significant digits, non-finite ones become ``null`` (JSON has no NaN, and the
Optuna Dashboard parses these attributes in a browser).

=====================  ======  ==========================================================
attribute              of      holds
=====================  ======  ==========================================================
``hpsched:settings``   study   :class:`Settings`: what every worker must agree on
``hpsched:recipe``     trial   :class:`RecipeSpace` (``hpsched:recipe:<prefix>`` with one)
``hpsched:range_test`` trial   :class:`SweepRecord` of the trial's range test
``hpsched:sweeps``     trial   steps of the range test that it has begun
``hpsched:rung:<k>``   trial   :class:`CycleRecord` of the trial's rung k
``hpsched:confirm``    trial   :class:`CycleRecord` of a confirmation
``hpsched:confirms``   trial   number of the trial that this one repeats with a fresh seed
``hpsched:seed``       trial   the seed of a confirmation that other studies run with the same seed
``hpsched:refines``    trial   its part in finding the best rate with the standard recipe: 0 is at
                               the proposed one, 3 runs in full (:data:`coordinates.REFINING`)
``hpsched:diverged``   trial   why the run was ended as diverged
``hpsched:out_of_memory`` trial which run of the trial ran out of memory, and in what words
``hpsched:error``      trial   why the trial failed
``hpsched:worker``     trial   id of the worker that runs it
``hpsched:deaths``     trial   [workers that died in a row, finished runs by then, all deaths]
``hpsched:origin``     trial   number of the trial whose seeds it has (its own, unless retried)
``hpsched:worker:<id>`` study  :class:`WorkerRecord`: who is at work, and on what
``hpsched:order:<id>`` study   what that worker was told: ``pause``, ``resume``, ``drain``, ``stop``
=====================  ======  ==========================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, wraps
from typing import Any, Self, TypeVar

import optuna
from optuna.trial import FrozenTrial

from hpsched.errors import RecordError

SETTINGS = "hpsched:settings"
RECIPE = "hpsched:recipe"
RANGE_TEST = "hpsched:range_test"
SWEEPS = "hpsched:sweeps"
RUNG = "hpsched:rung:"
CONFIRM = "hpsched:confirm"
CONFIRMS = "hpsched:confirms"
SEED = "hpsched:seed"
REFINES = "hpsched:refines"
DIVERGED = "hpsched:diverged"
OUT_OF_MEMORY = "hpsched:out_of_memory"
ERROR = "hpsched:error"
OWNER = "hpsched:worker"
ORIGIN = "hpsched:origin"
DEATHS = "hpsched:deaths"
WORKER = "hpsched:worker:"
ORDER = "hpsched:order:"
CONSTRAINT = "hpsched_diverged"
MEMORY_CONSTRAINT = "hpsched_out_of_memory"

#: The six values a recipe is made of, in the order in which they are suggested.
FIELDS = (
    "max_lr",
    "div_factor",
    "pct_start",
    "base_momentum",
    "max_momentum",
    "weight_decay",
)


def significant(value: float | None, digits: int = 6) -> float | None:
    """``value`` rounded to ``digits`` significant digits; None when it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def derive_seed(seed: int | str, *parts: int | str) -> int:
    """A 31-bit seed that follows from the study's seed and the run's place in the study."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) & 0x7FFFFFFF


_K = TypeVar("_K")
_T = TypeVar("_T")


def once(settled: Callable[[_K], bool]) -> Callable[[Callable[[_K], _T]], Callable[[_K], _T]]:
    """Decorator: a function of one object is computed once for each that ``settled`` says is final.

    Objects are told apart by identity, which is right whatever studies and storages there are in
    the process: a trial has equals in others, and cannot be hashed. An object's entry goes with
    the object, before its id can mean another one.
    """

    def decorate(function: Callable[[_K], _T]) -> Callable[[_K], _T]:
        known: dict[int, tuple[weakref.ref[_K], _T]] = {}

        @wraps(function)
        def kept(of: _K) -> _T:
            key = id(of)
            entry = known.get(key)
            if entry is not None and entry[0]() is of:
                return entry[1]
            result = function(of)
            if settled(of):
                known[key] = weakref.ref(of, lambda _: known.pop(key, None)), result
            return result

        return kept

    return decorate


def _finished(trial: FrozenTrial) -> bool:
    return trial.state.is_finished()


#: For what is read from a trial: Optuna never changes a finished one, and storages hand out the
#: same object each time (unless asked for copies).
once_finished = once(_finished)


class _Record:
    """JSON form of a frozen dataclass: its fields, no more; unknown or missing ones refuse."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_json(cls, data: Any, where: str) -> Self:
        """The record in ``data``.

        Raises:
            RecordError: ``data`` is not such a record; ``where`` names the attribute.
        """
        try:
            if not isinstance(data, Mapping):
                raise TypeError(f"it is {data!r:.40}")
            record = cls(**data)
            record.check()
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise RecordError(
                f"{where} does not hold a readable {cls.__name__} ({error}). It is left out; "
                "delete the attribute or the trial if another program wrote it."
            ) from None
        return record

    def check(self) -> None:
        """Raise ValueError when a field cannot be right."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Record):
    """What every worker of a study must agree on; Optuna stores neither sampler nor pruner.

    Attributes:
        objective: ``module:function`` or ``file.py:function``; code itself is never stored.
        trials, cycles, timeout: The budget (one of them): search trials, full-cycle equivalents,
            or seconds since the first trial began.
        seed: The study's; every run's seed follows from it.
        range_tests: Most replicates per context.
        reduction_factor: η of successive halving; None: trials climb by the search's own model.
        base_sampler: ``hpsched`` (its own model), ``tpe``, ``gp``, ``qmc``, ``cmaes``, ``random``.
        confirm_top, confirm_seeds: When the search ends, this many recipes are run again with
            this many fresh seeds each, as far as 30 % of the budget goes.
        policy: What every recipe follows, whatever the objective asks for: ``schedule:NAME`` in a
            study that ``hpsched compare`` made; None: what the objective asks for.
        like: The study that this one begins like; None: like the standard recipe.
        first_guess: Where that one ended, max_lr as a multiple of what its range
            tests proposed, weight decay as κ (``kappa``) where it is searched so.
    """

    objective: str
    seed: int
    trials: int | None = None
    cycles: float | None = None
    timeout: float | None = None
    range_tests: int = 3
    reduction_factor: int | None = None
    base_sampler: str = "hpsched"
    confirm_top: int = 2
    confirm_seeds: int = 3
    policy: str | None = None
    like: str | None = None
    first_guess: dict[str, float] | None = None

    def check(self) -> None:  # noqa: D102
        if sum(limit is not None for limit in (self.trials, self.cycles, self.timeout)) != 1:
            raise ValueError("exactly one of trials, cycles and timeout must be set")
        _check_guess(self.first_guess or {})


def _check_guess(guess: Mapping[str, float]) -> None:
    for field, value in guess.items():
        if field not in (*FIELDS, "kappa") or not 0 <= value < math.inf:
            raise ValueError(f"first guess of {field!r} is {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeSpace(_Record):
    """The search space of one ``suggest_onecycle`` call, and its horizon.

    Attributes:
        prefix: Put before each field's name in ``trial.params``.
        total_steps: Optimizer steps of a full cycle; None when the caller did not say.
        policy: ``cosine`` or ``linear``, or ``schedule:NAME`` (:func:`hpsched.schedules.follow`).
        fixed: Field → value, for the fields that are not searched; holds final_div_factor.
        space: Field → (low, high, log), for those that are.
        context: What the right max_lr depends on, as the user named it.
        rungs: (index, steps) of each rung, rising; the last is a full cycle. Empty when
            total_steps is not known.
        explicit_momentum: The caller gave momentum bounds, so an optimizer without momentum
            is an error.
        guess: What the first guess has other than the standard recipe: fields of it, but max_lr
            as a multiple of what range tests propose, and weight decay as ``kappa`` where it is
            searched so.
    """

    prefix: str
    total_steps: int | None
    policy: str
    fixed: dict[str, float]
    space: dict[str, tuple[float, float, bool]]
    context: dict[str, Any]
    rungs: tuple[tuple[int, int], ...]
    explicit_momentum: bool = False
    guess: dict[str, float] = dataclasses.field(default_factory=dict)

    def check(self) -> None:  # noqa: D102
        for field, (low, high, _log) in self.space.items():
            if field not in FIELDS or not low <= high:
                raise ValueError(f"space of {field!r} is {low!r} to {high!r}")
        _check_guess(self.guess)

    def name(self, field: str) -> str:
        """The parameter's name in ``trial.params``."""
        return self.prefix + field

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the searched parameters, in suggestion order."""
        return tuple(self.name(field) for field in FIELDS if field in self.space)

    def distribution(self, field: str) -> optuna.distributions.FloatDistribution:
        """The stored distribution: wide, and the same in every trial of the study."""
        low, high, log = self.space[field]
        return optuna.distributions.FloatDistribution(low, high, log=log)

    def values(self, params: Mapping[str, float]) -> dict[str, float] | None:
        """Field → value of a trial with these ``params``; None unless all are there."""
        try:
            return {**self.fixed, **{field: params[self.prefix + field] for field in self.space}}
        except KeyError:
            return None

    @cached_property
    def context_key(self) -> str:
        """The context as a stable string; evidence is pooled by it."""
        return ",".join(f"{key}={self.context[key]!r}" for key in sorted(self.context))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRecord(_Record):
    """One range-test replicate as stored with its trial.

    Attributes:
        name: Unique name of the run; a record copied to a retried trial keeps it.
        context_key: :attr:`RecipeSpace.context_key` of the trial.
        lrs: Learning rate of each planned step.
        losses: Raw training loss of each step; None where it was not finite.
        momentum, weight_decay, seed: The replicate's.
        optimizer: Class name, e.g. ``SGD``.
        momentum_name: ``momentum``, ``beta1`` or ``none``.
        steps, seconds: What it cost.
        validation: Metric → (step, value) pairs, when ``cycle.validate`` was used; value None where
            it was not finite.
    """

    name: str
    context_key: str
    lrs: tuple[float, ...]
    losses: tuple[float | None, ...]
    momentum: float
    weight_decay: float
    seed: int
    optimizer: str
    momentum_name: str
    steps: int
    seconds: float
    validation: dict[str, list[tuple[int, float | None]]] = dataclasses.field(default_factory=dict)

    def check(self) -> None:  # noqa: D102
        if len(self.lrs) < len(self.losses):
            raise ValueError(f"{len(self.lrs)} rates but {len(self.losses)} losses")
        if not self.lrs or not all(isinstance(lr, float | int) for lr in self.lrs):
            raise ValueError("a learning rate that is not a number")
        if not all(0 < a < b < math.inf for a, b in zip(self.lrs, self.lrs[1:], strict=False)):
            raise ValueError("learning rates that are not positive, finite and increasing")
        if not all(loss is None or isinstance(loss, float | int) for loss in self.losses):
            raise ValueError("a loss that is not a number")
        for metric, points in self.validation.items():
            if not all(1 <= step <= len(self.lrs) for step, _ in points):
                raise ValueError(f"validation: {metric!r} at a step that the sweep does not have")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CycleRecord(_Record):
    """One complete cycle (a rung or a confirmation) as stored with its trial.

    Attributes:
        name: Unique name of the run.
        rung: Index of the rung; the last rung is the full cycle.
        steps, seconds: Optimizer steps taken and wall time.
        total_steps: Steps that a full cycle has (cost in full cycles = steps / total_steps).
        seed: What ``cycle.seed`` was.
        value: What ``train`` returned; None when it diverged.
        diverged: Why it was ended, or None.
        curves: Metric → (step, value) pairs, thinned.
    """

    name: str
    rung: int
    steps: int
    total_steps: int
    seconds: float
    seed: int
    value: float | None
    diverged: str | None = None
    curves: dict[str, list[tuple[int, float | None]]] = dataclasses.field(default_factory=dict)

    def check(self) -> None:  # noqa: D102
        if self.steps < 0 or self.total_steps < 1:
            raise ValueError(f"steps={self.steps!r} of {self.total_steps!r}")

    @property
    def is_full(self) -> bool:
        """Whether this was a full cycle that ended with a value."""
        return self.steps >= self.total_steps and self.value is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerRecord(_Record):
    """A worker as others see it; written every few seconds while it runs.

    Attributes:
        host, pid, device: Where it runs.
        started, seen: Unix time of its start and of the last sign of life, by the worker's clock.
        state: ``starting`` (the objective is being imported), ``running``, ``idle``, ``paused``,
            ``waiting`` (the database is away; only the worker's own node sees that) or
            ``stopped``.
        trial, kind, rung, step, total_steps, lr, loss: What it is doing now.
        done, failed: Trials it has finished and failed.
        note: Why it waits.
    """

    host: str
    pid: int
    device: str
    started: float
    seen: float
    state: str
    trial: int | None = None
    kind: str | None = None
    rung: int | None = None
    step: int | None = None
    total_steps: int | None = None
    lr: float | None = None
    loss: float | None = None
    done: int = 0
    failed: int = 0
    note: str = ""


def recipe_attr(prefix: str) -> str:
    """Name of the trial attribute that holds the recipe space with this prefix."""
    return f"{RECIPE}:{prefix}" if prefix else RECIPE


def recipe_spaces(trial: FrozenTrial) -> Iterator[RecipeSpace]:
    """The recipe spaces of a trial (one, unless prefixes are used).

    Raises:
        RecordError: A record cannot be read.
    """
    return iter(_recipe_spaces(trial))


@once_finished
def _recipe_spaces(trial: FrozenTrial) -> tuple[RecipeSpace, ...]:
    return tuple(
        RecipeSpace.from_json(data, f"trial {trial.number}: {key}")
        for key, data in trial.user_attrs.items()
        if key == RECIPE or key.startswith(RECIPE + ":")
    )


@once_finished
def sweep(trial: FrozenTrial) -> SweepRecord | None:
    """The trial's range test, if it ran one.

    Raises:
        RecordError: The record cannot be read.
    """
    data = trial.user_attrs.get(RANGE_TEST)
    return None if data is None else SweepRecord.from_json(data, _where(trial, RANGE_TEST))


@once_finished
def cycles(trial: FrozenTrial) -> tuple[CycleRecord, ...]:
    """The trial's complete or diverged cycles, shortest first.

    Raises:
        RecordError: A record cannot be read.
    """
    keys = [key for key in trial.user_attrs if key.startswith(RUNG) or key == CONFIRM]
    found = [CycleRecord.from_json(trial.user_attrs[key], _where(trial, key)) for key in keys]
    return tuple(sorted(found, key=lambda cycle: cycle.rung))


def is_confirmation(trial: FrozenTrial) -> bool:
    """Whether the trial repeats another one's recipe with a fresh seed."""
    return CONFIRMS in trial.user_attrs


def _where(trial: FrozenTrial, key: str) -> str:
    return f"trial {trial.number}: attribute {key}"
