"""``suggest_onecycle`` and ``OneCycle``: a recipe in a trial, and the trial's whole course.

``OneCycle.run`` is "one trial, start to end": range test if the study still wants one, then the
six values, then rungs of complete cycles with pruning between them, each result stored before
the next begins, so that a trial put back in the queue continues after what it has.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import optuna
from optuna.trial import BaseTrial

from hpsched import checkpoint, evidence, lr_curve, prestage, records, schedules, search
from hpsched.coordinates import SETTLES, WEIGHT_DECAY_BOUNDS
from hpsched.errors import StorageError, TrainingError, UsageError
from hpsched.observers import tell, until_end
from hpsched.prestage import LONE_WEIGHT_DECAYS, SWEEP_STEPS, PreStage, checked_decays
from hpsched.records import CycleRecord, RecipeSpace
from hpsched.sampler import OneCycleSampler, find_sampler, role_of

if TYPE_CHECKING:
    from hpsched.cycle import Cycle, Outcome, ScheduleDriver
    from hpsched.observers import Observer

Range = tuple[float, float] | float
Train = Callable[["Cycle"], Any]

logger = logging.getLogger("hpsched")

MAX_LR = (1e-6, 10.0)
BASE_MOMENTUM = (0.75, 0.9)
MAX_MOMENTUM = (0.9, 0.98)
CLASSIC_MOMENTUM = 0.9  # of schedules that hold it
MIN_RUNG_STEPS = 50
_LIMITS = {  # field: (lowest, highest, highest is allowed, log)
    "max_lr": (0.0, math.inf, False, True),
    "div_factor": (1.0, math.inf, False, True),
    "pct_start": (0.0, 1.0, True, False),
    "base_momentum": (0.0, 1.0, False, False),
    "max_momentum": (0.0, 1.0, False, False),
    "weight_decay": (0.0, math.inf, False, True),
}


class Diverged(optuna.TrialPruned):
    """A search trial gave no finite result: pruned, with the reason in its attributes."""


class OutOfMemory(optuna.TrialPruned):
    """A search trial ran out of memory: pruned, with the reason in its attributes."""


def suggest_onecycle(
    trial: BaseTrial,
    total_steps: int | None = None,
    *,
    max_lr: Range = MAX_LR,
    div_factor: Range = (5, 50),
    pct_start: Range = (0.1, 0.5),
    base_momentum: Range = BASE_MOMENTUM,
    max_momentum: Range = MAX_MOMENTUM,
    weight_decay: Range = WEIGHT_DECAY_BOUNDS,
    final_div_factor: float = 1e4,
    policy: str = "cosine",
    context: Mapping[str, Any] | None = None,
    prefix: str = "",
    rungs: int = 3,
    reduction_factor: int = 3,
    min_steps: int = MIN_RUNG_STEPS,
    range_test: bool | Mapping[str, Any] = True,
) -> OneCycle:
    """A one-cycle recipe whose values this trial searches.

    A pair is a range to search, a number fixes the value. Nothing is suggested before it is read.

    Args:
        trial: The Optuna trial (also a ``FixedTrial`` or ``FrozenTrial``).
        total_steps: Optimizer steps of a full training run. Needed by :meth:`OneCycle.run`.
        max_lr: Peak learning rate; searched on a log scale inside the range tests' window.
        div_factor: Initial rate = max_lr / div_factor; log scale.
        pct_start: Share of the steps in which the rate rises.
        base_momentum: Momentum (or beta1) at the peak of the rate.
        max_momentum: Momentum (or beta1) at both ends.
        weight_decay: By default searched in its natural unit κ = weight_decay × effective rate ×
            total_steps between 0.01 and 5, within stored bounds of 1e-8 and 1.
        final_div_factor: Final rate = initial rate / final_div_factor.
        policy: ``cosine`` (two phases) or ``linear`` (Smith's three phases). Or another schedule
            to compare with, ``schedule:NAME`` (:func:`hpsched.schedules.classics` names them), of
            which max_lr and weight decay are searched, at a constant momentum of 0.9 or the
            nearest that the bounds allow. A study of ``hpsched compare`` decides by itself.
        context: What the right max_lr depends on, e.g. ``{"batch_size": 128}``: range tests are
            pooled per context.
        prefix: Put before each parameter's name, so that two recipes, or a ``weight_decay`` of
            your own, do not collide.
        rungs: Complete cycles a trial climbs, of total_steps/η², total_steps/η, total_steps.
        reduction_factor: η, the ratio of successive rungs.
        min_steps: Rungs shorter than this are left out.
        range_test: False for none; or a dict with ``num_iter`` (default: at most 100, a third of
            total_steps), ``start_lr`` and ``end_lr`` (default: the ends of max_lr), ``mode``
            (``exp`` or ``linear``), ``validate_every`` (steps between ``cycle.validate`` calls),
            ``stop_diverged`` (False: sweep on after the loss has diverged, while it is finite) and
            ``weight_decays`` (of successive range tests; default: typical, the largest that the
            search may use there, typical, …) and ``extend`` (False: never sweep further out when
            the range missed the action; default: unless start_lr, end_lr or ``linear`` was given).

    Raises:
        UsageError: A range that is reversed or outside its meaning; a parameter of that name was
            already suggested by other code.
    """
    given = {
        "max_lr": max_lr,
        "div_factor": div_factor,
        "pct_start": pct_start,
        "base_momentum": base_momentum,
        "max_momentum": max_momentum,
        "weight_decay": weight_decay,
    }
    _check_momenta(given)
    told = _study_settings(trial)
    policy = told.get("policy") or policy
    if policy.startswith(schedules.CLASSIC):
        given |= _held(given)
        schedules.follow(1, policy=policy, max_lr=1.0, max_momentum=0.0)  # refuses unknown names
    elif policy not in ("cosine", "linear"):
        raise UsageError(f"policy={policy!r}: 'cosine' or 'linear'.")
    space, fixed = _space(given, final_div_factor)
    if context is not None and not isinstance(context, Mapping):
        raise UsageError(f"context={context!r}: a dict such as {{'batch_size': 128}}.")
    recipe = RecipeSpace(
        prefix=prefix,
        total_steps=total_steps,
        policy=policy,
        fixed=fixed,
        space=space,
        context=dict(context or {}),
        rungs=rung_ladder(total_steps, rungs, reduction_factor, min_steps),
        explicit_momentum=base_momentum is not BASE_MOMENTUM or max_momentum is not MAX_MOMENTUM,
        guess=told.get("first_guess") or {},
    )
    _check_collision(trial, recipe)
    trial.set_user_attr(records.recipe_attr(prefix), recipe.to_json())
    return OneCycle(trial, recipe, prestage.of(trial, recipe, range_test))


def rung_ladder(
    total_steps: int | None,
    rungs: int = 3,
    reduction_factor: int = 3,
    min_steps: int = MIN_RUNG_STEPS,
) -> tuple[tuple[int, int], ...]:
    """(index, steps) of each rung: steps = total_steps/η^k, rounded, k falling to 0.

    Rungs shorter than ``min_steps`` are left out, all but the full cycle; the others keep their
    index, so that trials with other horizons compare at the same rung.

    Raises:
        UsageError: total_steps or rungs below 1, reduction_factor below 2.
    """
    if rungs < 1 or int(rungs) != rungs:
        raise UsageError(f"rungs={rungs!r}: a whole number, at least 1 (1 switches rungs off).")
    if reduction_factor < 2:
        raise UsageError(f"reduction_factor={reduction_factor!r}: at least 2.")
    if total_steps is None:
        return ()
    if isinstance(total_steps, bool) or int(total_steps) != total_steps or total_steps < 1:
        raise UsageError(f"total_steps={total_steps!r}: a whole number of optimizer steps, ≥ 1.")
    top = rungs - 1
    steps = [round(total_steps / reduction_factor ** (top - rung)) for rung in range(top)]
    kept = tuple((rung, n) for rung, n in enumerate(steps) if n >= min_steps)
    if top and not kept:
        evidence.warn_once(
            f"total_steps={total_steps} is too small for rungs: the longest short cycle would have "
            f"{steps[-1]} steps, and min_steps is {min_steps}. Every trial runs in full; pass "
            "rungs=1 to say so, or a smaller min_steps."
        )
    return (*kept, (top, int(total_steps)))


class OneCycle:
    """The recipe of one trial; made by :func:`suggest_onecycle`.

    The values are attributes, suggested when first read: ``max_lr``, ``div_factor``,
    ``pct_start``, ``base_momentum``, ``max_momentum``, ``weight_decay``; and
    ``final_div_factor``, ``policy``.
    """

    def __init__(self, trial: BaseTrial, recipe: RecipeSpace, pre_stage: PreStage | None) -> None:
        self._trial = trial
        self._recipe = recipe
        self._pre_stage = pre_stage
        self._values: dict[str, float] = {}
        self._ran = False
        self._observers: Sequence[Observer] = ()

    @property
    def max_lr(self) -> float:
        """Peak learning rate."""
        return self._value("max_lr")

    @property
    def div_factor(self) -> float:
        """Initial rate = max_lr / div_factor."""
        return self._value("div_factor")

    @property
    def pct_start(self) -> float:
        """Share of the steps in which the rate rises."""
        return self._value("pct_start")

    @property
    def base_momentum(self) -> float:
        """Momentum (or beta1) at the peak of the rate."""
        return self._value("base_momentum")

    @property
    def max_momentum(self) -> float:
        """Momentum (or beta1) at both ends of the cycle."""
        return self._value("max_momentum")

    @property
    def weight_decay(self) -> float:
        """Weight decay, for the optimizer."""
        return self._value("weight_decay")

    @property
    def final_div_factor(self) -> float:
        """Final rate = initial rate / final_div_factor."""
        return self._recipe.fixed["final_div_factor"]

    @property
    def policy(self) -> str:
        """``cosine`` or ``linear``, or ``schedule:NAME``."""
        return self._recipe.policy

    def known(self) -> dict[str, Any]:
        """What :meth:`to_dict` gives, without the values that have not been suggested yet."""
        if not isinstance(self._trial, optuna.trial.Trial):
            with suppress(ValueError):  # a fixed trial that lacks one
                return self.to_dict()
        values = {**self._recipe.fixed, **self._suggested()}
        ordered = [*records.FIELDS, "final_div_factor"]
        return {
            **{field: values[field] for field in ordered if field in values},
            "policy": self.policy,
        }

    def _suggested(self) -> dict[str, float]:
        params, name = self._trial.params, self._recipe.name
        return {field: params[name(field)] for field in self._recipe.space if name(field) in params}

    def _repr_html_(self) -> str:
        """In a notebook: a table and the schedule."""
        from hpsched.notebook import one_cycle_html

        return one_cycle_html(self)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values: the six, final_div_factor and policy."""
        return {
            **{field: self._value(field) for field in records.FIELDS},
            "final_div_factor": self.final_div_factor,
            "policy": self.policy,
        }

    def torch_kwargs(self, total_steps: int) -> dict[str, Any]:
        """Arguments for ``torch.optim.lr_scheduler.OneCycleLR`` over ``total_steps`` steps.

        ``pct_start`` is the one rounded to a whole step, for which torch hits the peak.

        Raises:
            UsageError: The recipe follows another schedule.
        """
        values = self.to_dict()
        if self.policy.startswith(schedules.CLASSIC):
            raise UsageError(f"policy={self.policy!r} is no one-cycle: use lr_lambda, or schedule.")
        return {
            "max_lr": values["max_lr"],
            "total_steps": total_steps,
            "pct_start": schedules.rounded_pct_start(
                total_steps, values["pct_start"], values["policy"]
            ),
            "anneal_strategy": "cos" if values["policy"] == "cosine" else "linear",
            "three_phase": values["policy"] == "linear",
            "base_momentum": values["base_momentum"],
            "max_momentum": values["max_momentum"],
            "div_factor": values["div_factor"],
            "final_div_factor": values["final_div_factor"],
        }

    def lr_lambda(self, total_steps: int) -> Callable[[int], float]:
        """The rate over max_lr, for ``torch.optim.lr_scheduler.LambdaLR``: step → factor.

        For what takes schedulers only, such as ``SequentialLR``. Build the optimizer with
        ``lr=max_lr``; groups with other rates keep their ratio to it. A scheduler leaves momentum
        alone: :meth:`schedule` and ``OneCycleLR(optimizer, **torch_kwargs(…))`` drive it, too.
        """
        lr, max_lr = self._schedules(total_steps).lr, self.max_lr
        return lambda step: lr(step) / max_lr

    def schedule(self, optimizer: Any, total_steps: int) -> ScheduleDriver:
        """Drive ``optimizer`` through this recipe in a training loop of your own.

        Call ``.step()`` after each optimizer step.
        """
        from hpsched.cycle import ScheduleDriver

        return ScheduleDriver(
            optimizer,
            schedules=self._schedules(total_steps),
            reference_lr=self.max_lr,
            explicit_momentum=self._recipe.explicit_momentum,
        )

    def train(self, train: Train, total_steps: int, seed: int = 0) -> float:
        """Run the recipe once, outside any study: for the final model. Returns train's value.

        Raises:
            TrainingError: The run diverged, or ``train`` broke its contract.
        """
        cycle = self._cycle("final", total_steps, seed, name=f"final-{seed}")
        return _value_of(cycle, train)

    def run(self, train: Train, observers: Sequence[Observer] = ()) -> float:
        """One trial, start to end: range test if wanted, then rungs of complete cycles.

        ``train(cycle)`` is called once for each; see :class:`~hpsched.Cycle`. A trial put back in
        the queue continues after the rungs it has.

        Args:
            train: One training run.
            observers: Told of the range test, each cycle and the trial's end; see
                :mod:`hpsched.integrations` for TensorBoard, MLflow and Weights & Biases.

        Returns:
            What ``train`` returned for the full cycle: the trial's value.

        Raises:
            optuna.TrialPruned: The trial was pruned after a rung, a run diverged, or ran out of
                memory (:class:`OutOfMemory`).
            MemoryError: A confirmation ran out of memory: that says nothing of its recipe, which
                is to be confirmed all the same.
            TrainingError: ``train`` broke its contract.
            UsageError: total_steps was not given, ``run`` was called twice in one trial, or that is
                a proxy of a trial.
        """
        if self._recipe.total_steps is None:
            raise UsageError(
                "OneCycle.run needs the length of a full cycle: "
                "suggest_onecycle(trial, total_steps=3_000)."
            )
        if self._ran:
            raise UsageError("OneCycle.run was called twice in one trial: one run, one value.")
        self._ran = True
        if isinstance(self._trial, optuna.trial.FixedTrial | optuna.trial.FrozenTrial):
            return self.train(train, self._recipe.total_steps)
        if not isinstance(self._trial, optuna.trial.Trial):
            raise UsageError(
                f"OneCycle.run got a {type(self._trial).__name__}, which has no study to search "
                "with: pass the optuna.Trial itself, where several processes train together to "
                "rank 0 alone (hpsched.integrations.distributed)."
            )
        self._observers = observers
        return until_end(observers, self._trial, lambda: self._course(train))

    def _course(self, train: Train) -> float:
        if records.CONFIRMS in self._study_trial().user_attrs:
            return self._confirm(train)
        if self._range_test(train) and self._pre_stage and (doubt := self._pre_stage.doubt()):
            logger.warning("trial %d: range test: %s", self._study_trial().number, doubt)
        self.to_dict()  # all six before the first cycle, so that any end leaves a whole trial
        return self._climb(train)

    # -- values ------------------------------------------------------------------------------

    def _value(self, field: str) -> float:
        if field in self._recipe.fixed:
            return self._recipe.fixed[field]
        if field not in self._values:
            # The first read draws all six, so later ones come too late to ask.
            stage = self._pre_stage
            if not self._ran and not self._values and stage and stage.wants_another():
                evidence.warn_once(
                    f"{field} was read before run(): this trial is drawn without a range test of "
                    "its own. Call suggest_onecycle(...).run(train) first to get one."
                )
                self._pre_stage = None
            low, high, log = self._recipe.space[field]
            self._values[field] = self._trial.suggest_float(
                self._recipe.name(field), low, high, log=log
            )
        return self._values[field]

    def _schedules(self, total_steps: int) -> schedules.OneCycleSchedules:
        values = self.to_dict()
        values.pop("weight_decay")
        return schedules.follow(total_steps, **values)

    # -- runs --------------------------------------------------------------------------------

    def _climb(self, train: Train) -> float:
        trial, rungs = self._study_trial(), self._rungs()
        value = math.nan
        for rung, steps in rungs.items():
            key = f"{records.RUNG}{rung}"
            kept = self._kept("rung", rung, key)
            record = kept or self._run_cycle(train, "rung", rung, steps, key)
            if record.value is None:
                self._end_diverged(f"rung {rung} ({steps} steps): {record.diverged}")
            assert record.value is not None
            value = self._given or record.value  # type: ignore[assignment]
            if len(trial.study.directions) > 1:
                return value
            self._report(record.value, rung)
            is_last = rung == max(rungs)
            if is_last or f"{records.RUNG}{rung + 1}" in trial.user_attrs:
                continue
            if trial.should_prune() and not self._settles():
                raise optuna.TrialPruned(
                    f"rung {rung} ({steps} steps) gave {record.value:.6g}: {self._why_it_ends()}"
                )
            logger.info("trial %d: rung %d gave %.6g, climbs on", trial.number, rung, record.value)
        return value

    def _why_it_ends(self) -> str:
        if role_of(self._study_trial().study, self._study_trial()._trial_id) is not None:
            return "as planned: it tries a rate, and a later trial runs the best one in full"
        return "not likely enough to be the best" if self._by_model else "the pruner ended it"

    @property
    def _by_model(self) -> bool:
        """Whether the search's model decides which trials run on."""
        return bool(getattr(self._study_trial().study.pruner, "by_model", False))

    def _settles(self) -> bool:
        """Whether this is the refining trial that tries what was found at full length."""
        trial = self._study_trial()
        return role_of(trial.study, trial._trial_id) == SETTLES

    def _confirm(self, train: Train) -> float:
        self._pre_stage = None
        self.to_dict()
        rung, steps = self._recipe.rungs[-1]
        record = self._kept("confirm", rung, records.CONFIRM) or self._run_cycle(
            train, "confirm", rung, steps, records.CONFIRM
        )
        if record.value is None:
            self._end_diverged(f"confirmation: {record.diverged}")
        assert record.value is not None
        return record.value

    def _rungs(self) -> dict[int, int]:
        """Index → steps, rising.

        Only the full cycle with several objectives, or where short cycles have misled.
        """
        trial = self._study_trial()
        every = self._recipe.rungs
        if len(trial.study.directions) > 1:
            return dict(every[-1:])
        begun = [f"{records.RUNG}{index}" in trial.user_attrs for index, _ in every]
        if begun[-1]:  # put back in the queue when all was done: its ladder is what it ran
            return {index: n for (index, n), ran in zip(every, begun, strict=True) if ran}
        if not self._by_model or any(begun) or role_of(trial.study, trial._trial_id) is not None:
            return dict(every)
        trials = trial.study.get_trials(deepcopy=False)
        known = search.of_study(trials, trial.study.directions, self._recipe)
        return dict(every if known is None or known.trusts_rungs else every[-1:])

    def _run_cycle(self, train: Train, kind: Any, rung: int, steps: int, key: str) -> CycleRecord:
        trial = self._study_trial()
        cycle = self._cycle(kind, steps, self._seed(kind, rung), rung=rung)
        logger.info("trial %d: %s %d, %d steps", trial.number, kind, rung, steps)
        outcome = self._execute(cycle, train)
        return self._store(cycle, outcome, key)

    def _execute(self, cycle: Cycle, train: Train) -> Outcome:
        """Run ``train(cycle)``; afterwards the memory it took is free, however it ended."""
        from hpsched.cycle import execute, free_memory, out_of_memory

        try:
            outcome = execute(cycle, train)
        except StorageError:  # the trial goes back into the queue, to go on from its checkpoint
            raise
        except Exception as error:
            checkpoint.current().forget_failed(cycle.name)
            reason = out_of_memory(error)
            if reason is None:
                raise
        else:
            free_memory()
            return outcome
        # Only here has Python let go of the error, and with its traceback of train's variables.
        gc.collect()
        free_memory()
        self._end_out_of_memory(f"{cycle.kind} {cycle.rung} ({cycle.total_steps} steps): {reason}")

    def _store(self, cycle: Cycle, outcome: Outcome, key: str) -> CycleRecord:
        self._given = outcome.value if isinstance(outcome.value, list) else None
        record = CycleRecord(
            name=cycle.name,
            rung=cycle.rung,
            steps=outcome.steps,
            total_steps=self._recipe.total_steps or cycle.total_steps,
            seconds=round(outcome.seconds, 4),
            seed=cycle.seed,
            value=self._given[0] if self._given else outcome.value,
            diverged=outcome.diverged,
            curves=cycle.curves(),
        )
        self._study_trial().set_user_attr(key, record.to_json())
        checkpoint.current().forget(cycle.name)
        tell(self._observers, "on_rung", self._study_trial(), record)
        return record

    _given: list[float] | None = None  # several objectives: the values as train returned them

    def _range_test(self, train: Train) -> bool:
        """Run a sweep if the study wants one more; whether it did."""
        stage = self._pre_stage
        if stage is None or not stage.claim():
            return False
        trial = self._study_trial()
        cycle = stage.cycle(self._seed("range_test", 0), self._name("range_test", 0))
        logger.info("trial %d: range test, %d steps", trial.number, cycle.total_steps)
        test = stage.keep(cycle, self._execute(cycle, train))
        tell(self._observers, "on_range_test", trial, test)
        return True

    def _cycle(self, kind: Any, steps: int, seed: int, *, rung: int = 0, name: str = "") -> Cycle:
        from hpsched.cycle import Cycle

        values = self.to_dict()
        policy = values.pop("policy")
        return Cycle(
            values=values,
            schedules=self._schedules(steps),
            total_steps=steps,
            seed=seed,
            kind=kind,
            name=name or self._name(kind, rung),
            rung=rung,
            policy=policy,
            explicit_momentum=self._recipe.explicit_momentum,
        )

    # -- the study ---------------------------------------------------------------------------

    def _study_trial(self) -> optuna.trial.Trial:
        assert isinstance(self._trial, optuna.trial.Trial)
        return self._trial

    def _kept(self, kind: str, rung: int, key: str) -> CycleRecord | None:
        """The record of a run that ended before the trial was put back in the queue."""
        data = self._study_trial().user_attrs.get(key)
        if data is None:
            return None
        # Its checkpoint is there still, if the worker died between storing and removing.
        checkpoint.current().forget(self._name(kind, rung))
        return CycleRecord.from_json(data, f"trial {self._study_trial().number}: {key}")

    def _report(self, value: float, rung: int) -> None:
        trial = self._study_trial()
        stored = trial.study._storage.get_trial(trial._trial_id)
        if rung not in stored.intermediate_values:  # a resumed trial has reported it already
            trial.report(value, step=rung)

    def _end_diverged(self, reason: str) -> None:
        trial = self._study_trial()
        trial.set_user_attr(records.DIVERGED, reason)
        if records.CONSTRAINT not in trial.constraints:
            trial.set_constraint(records.CONSTRAINT, 1.0)
        raise Diverged(f"diverged: {reason}")

    def _end_out_of_memory(self, reason: str) -> NoReturn:
        trial = self._study_trial()
        trial.set_user_attr(records.OUT_OF_MEMORY, reason)
        if records.CONFIRMS in trial.user_attrs:
            raise MemoryError(f"out of memory: {reason}")
        trial.set_constraint(records.MEMORY_CONSTRAINT, 1.0)
        raise OutOfMemory(f"out of memory: {reason}")

    def _seed(self, kind: str, rung: int) -> int:
        paired = self._study_trial().user_attrs.get(records.SEED)
        if paired is not None:
            return int(paired)
        return records.derive_seed(self._study_seed, self._origin(), kind, rung)

    def _name(self, kind: str, rung: int) -> str:
        return checkpoint.run_name(self._study_trial().study.study_name, self._origin(), kind, rung)

    def _origin(self) -> int:
        """Number of the trial whose seeds these are: a retried copy keeps its first's."""
        trial = self._study_trial()
        origin = trial.user_attrs.get(records.ORIGIN)
        if origin is None:
            trial.set_user_attr(records.ORIGIN, trial.number)
            return trial.number
        return int(origin)

    @cached_property
    def _study_seed(self) -> int | str:
        study = self._study_trial().study
        stored = study.user_attrs.get(records.SETTINGS, {}).get("seed")
        sampler = find_sampler(study)
        own = sampler.seed if sampler else None
        return next((seed for seed in (stored, own) if seed is not None), study.study_name)


def find_lr(
    train: Train,
    *,
    num_iter: int = SWEEP_STEPS,
    start_lr: float = 1e-6,
    end_lr: float = 10.0,
    mode: str = "exp",
    weight_decays: Sequence[float] | None = None,
    validate_every: int | None = None,
    stop_diverged: bool = True,
    replicates: int = 3,
    seed: int | None = None,
) -> list[lr_curve.RangeTest]:
    """The range test of a ``train(cycle)`` function, by itself: what ``hpsched lr-find`` runs.

    Pool the sweeps with :func:`hpsched.proposal.pool`.

    Args:
        train: One training run, as in a study.
        num_iter: Steps of a sweep.
        start_lr: First rate.
        end_lr: Last rate.
        mode: ``exp`` (equal steps in log rate) or ``linear``.
        weight_decays: Sweep with each of these, ``replicates`` times. Default: ``replicates``
            sweeps in all, with 1e-4, 1e-3, 1e-5 in turn.
        validate_every: Steps between calls of what ``train`` hands to ``cycle.validate``.
        stop_diverged: False: sweep on after the loss has diverged, while it is finite.
        replicates: Sweeps of each weight decay, each with a seed of its own.
        seed: All seeds follow from it.

    Raises:
        UsageError: An option that cannot be right.
        TrainingError: ``train`` broke its contract.
    """
    if replicates < 1:
        raise UsageError(f"replicates={replicates!r}: at least 1.")
    sweeps = replicates * len(checked_decays(weight_decays) or (1,))
    sampler = OneCycleSampler(range_tests=sweeps, seed=seed)
    study = optuna.create_study(sampler=sampler, study_name="lr-find")
    sweep = {
        "num_iter": num_iter,
        "start_lr": start_lr,
        "end_lr": end_lr,
        "mode": mode,
        "validate_every": validate_every,
        "stop_diverged": stop_diverged,
        "weight_decays": weight_decays or LONE_WEIGHT_DECAYS,
    }
    for _ in range(sweeps):
        recipe = suggest_onecycle(study.ask(), num_iter, rungs=1, range_test=sweep)
        recipe._range_test(train)
    trials = study.get_trials(deepcopy=False)
    return [evidence.range_test(record) for record in evidence.sweeps(trials)]


def _value_of(cycle: Cycle, train: Train) -> float:
    from hpsched.cycle import execute

    try:
        outcome = execute(cycle, train)
    except Exception:
        checkpoint.current().forget_failed(cycle.name)
        raise
    checkpoint.current().forget(cycle.name)
    if outcome.diverged:
        raise TrainingError(f"The run diverged: {outcome.diverged}.")
    return outcome.value  # type: ignore[no-any-return]


def _study_settings(trial: BaseTrial) -> Mapping[str, Any]:
    """The settings of the trial's study, as they are stored; empty where it has none."""
    if not isinstance(trial, optuna.trial.Trial):
        return {}
    return dict(trial.study.user_attrs.get(records.SETTINGS, {}))


def _held(given: Mapping[str, Range]) -> dict[str, Range]:
    """The values that a classic schedule has no use for; its momentum stays as it is."""
    (low, _), (_, high) = (_ends(f, given[f]) for f in ("base_momentum", "max_momentum"))
    momentum = min(max(CLASSIC_MOMENTUM, low), high)
    both = {"base_momentum": momentum, "max_momentum": momentum}
    return {"div_factor": 1.0, "pct_start": 0.0, **both}


def _space(
    given: Mapping[str, Range], final_div_factor: float
) -> tuple[dict[str, tuple[float, float, bool]], dict[str, float]]:
    """Searched ranges and fixed values, checked."""
    space, fixed = {}, {"final_div_factor": float(final_div_factor)}
    if not math.isfinite(final_div_factor) or final_div_factor < 1:
        raise UsageError(f"final_div_factor={final_div_factor!r}: a number, at least 1.")
    for field, value in given.items():
        low, high = _ends(field, value)
        if isinstance(value, int | float):
            fixed[field] = low
        else:
            space[field] = (low, high, _LIMITS[field][3] and low > 0)
    return space, fixed


def _ends(field: str, value: Any) -> tuple[float, float]:
    try:
        low, high = (value, value) if isinstance(value, int | float) else value
        low, high = float(low), float(high)
    except (TypeError, ValueError):
        raise UsageError(
            f"{field}={value!r}: a pair (low, high) to search, or a number to fix it."
        ) from None
    lowest, highest, inclusive, _ = _LIMITS[field]
    if math.isnan(low) or math.isnan(high) or low > high:
        raise UsageError(f"{field}={value!r}: low must not be above high; swap them.")
    beyond = high > highest if inclusive else high >= highest
    if low < lowest or beyond or (field == "max_lr" and low <= 0):
        bracket = "]" if inclusive else ")"
        opening = "(" if field == "max_lr" else "["
        raise UsageError(
            f"{field}={value!r}: must lie in {opening}{lowest:g}, {highest:g}{bracket}."
        )
    return low, high


def _check_momenta(given: Mapping[str, Range]) -> None:
    base, top = (_ends(field, given[field]) for field in ("base_momentum", "max_momentum"))
    if base[1] > top[0]:
        raise UsageError(
            f"base_momentum={given['base_momentum']!r} reaches above "
            f"max_momentum={given['max_momentum']!r}: momentum falls from max to base while the "
            "rate rises, so keep base_momentum's high at or below max_momentum's low."
        )


def _check_collision(trial: BaseTrial, recipe: RecipeSpace) -> None:
    if records.recipe_attr(recipe.prefix) in trial.user_attrs:
        return  # the recipe asked for again, or a trial put back in the queue
    taken = sorted(set(recipe.names) & set(trial.params))
    if taken and isinstance(trial, optuna.trial.Trial):
        raise UsageError(
            f"the trial already has parameters named {taken}: pass prefix='onecycle_' to "
            "suggest_onecycle so that the names do not collide."
        )
