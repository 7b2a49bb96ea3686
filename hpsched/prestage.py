"""The range tests before a search: whether another one runs, over which rates, what is kept of it.

The trials of a context run them, one each, until there are enough. A sweep is a run of ``train``
like any other; :mod:`hpsched.suggest` runs it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from hpsched import evidence, lr_curve, records, schedules
from hpsched.coordinates import KAPPA_RANGE, STANDARD_KAPPA, STANDARD_RECIPE, coordinates
from hpsched.errors import UsageError
from hpsched.records import RecipeSpace, SweepRecord
from hpsched.sampler import find_sampler
from hpsched.storage import exclusive, patiently

if TYPE_CHECKING:
    from hpsched.cycle import Cycle, Outcome

logger = logging.getLogger("hpsched")

#: Weight decay of a range test while nothing better is known.
SWEEP_WEIGHT_DECAY = 1e-4
#: And of those that no search follows (Smith 1803.09820 section 4.4 tests 1e-3 … 1e-5 and 0).
LONE_WEIGHT_DECAYS = (1e-4, 1e-3, 1e-5)
SWEEP_STEPS = 100
#: Two range tests are enough where other seeds would move the centre by no more than this factor
#: in all (an octave): a third then makes it no surer (docs/design/search.md).
AGREED = 2.0
#: Range tests run again, further out, because their range missed the action, and how much further
#: in rate.
EXTENSIONS = 2
FURTHER = 100.0
#: How many times longer a sweep gets at most: further out, or because those before say nothing.
LONGEST = 2.0
#: Of the study's budget in full cycles, what range tests may take (but one is always run).
RANGE_TEST_SHARE = 0.05
SHORTEST_SWEEP = 20


@dataclass(frozen=True, kw_only=True)
class PreStage:
    """The range tests of a trial's context.

    Attributes:
        trial: The trial that may run the next one.
        recipe: Its search space.
        options: What ``suggest_onecycle(range_test=…)`` asks for, complete and checked.
    """

    trial: optuna.trial.Trial
    recipe: RecipeSpace
    options: Mapping[str, Any]

    def wants_another(self) -> bool:
        """Whether this trial is to run a range test."""
        trial = self.trial
        if records.RANGE_TEST in trial.user_attrs or records.CONFIRMS in trial.user_attrs:
            return False
        sampler = find_sampler(trial.study)
        if sampler is None:
            evidence.warn_once(
                f"study {trial.study.study_name!r} does not use hpsched.OneCycleSampler: "
                "suggest_onecycle is a plain search space here and runs no range test."
            )
            return False
        own = self._sweeps()
        useful = [record for record in own if evidence.range_test(record).missed is None]
        wanted = len(useful) < sampler.range_tests and len(own) < sampler.range_tests + EXTENSIONS
        return wanted and not self._agree(useful) and self._affordable()

    def claim(self) -> bool:
        """Whether this trial is to run a range test; from now on others count its steps as spent.

        Raises:
            StorageError: The study's lock was not obtained.
        """
        study = self.trial.study

        def decide() -> bool:
            with exclusive(study._storage, study.study_name):
                wanted = self.wants_another()
                if wanted:
                    self.trial.set_user_attr(records.SWEEPS, self._next()[2])
                return wanted

        return self.wants_another() and patiently(decide, "claiming a range test")

    def cycle(self, seed: int, name: str) -> Cycle:
        """The next sweep, as a run for ``train``."""
        from hpsched.cycle import Cycle

        options, momentum = self.options, self._typical("base_momentum")
        own = self._sweeps()
        decays = options["weight_decays"]
        start, end, steps = self._next()
        return Cycle(
            values={
                **{field: self._typical(field) for field in ("div_factor", "pct_start")},
                "max_lr": end,
                "base_momentum": momentum,
                "max_momentum": momentum,
                "weight_decay": (
                    decays[len(own) % len(decays)] if decays else self._telling_decay(own)
                ),
                "final_div_factor": self.recipe.fixed["final_div_factor"],
            },
            schedules=schedules.OneCycleSchedules(
                lr=schedules.range_test(steps, start, end, options["mode"]),
                momentum=lambda step: momentum,  # which may be 0
            ),
            total_steps=steps,
            seed=seed,
            kind="range_test",
            name=name,
            policy=self.recipe.policy,
            explicit_momentum=self.recipe.explicit_momentum,
            validate_every=options["validate_every"],
            stop_diverged=options["stop_diverged"],
        )

    def keep(self, cycle: Cycle, outcome: Outcome) -> lr_curve.RangeTest:
        """Store what the sweep gave with the trial, and read it."""
        trial, record = self.trial, self._record(cycle, outcome)
        trial.set_user_attr(records.RANGE_TEST, record.to_json())
        test = evidence.range_test(record)
        if test.reliable:
            logger.info("trial %d: range test suggests %.3g", trial.number, test.suggestion)
        else:  # together with others it may still be clear
            logger.info("trial %d: the range test is not clear alone", trial.number)
        return test

    def doubt(self) -> str | None:
        """Why the context's range tests deserve less than full trust; None if they say enough."""
        return evidence.doubt(self._sweeps())

    def _record(self, cycle: Cycle, outcome: Outcome) -> SweepRecord:
        losses = cycle.losses()
        driver = cycle.driver
        assert driver is not None
        return SweepRecord(
            name=cycle.name,
            context_key=self.recipe.context_key,
            lrs=tuple(float(f"{cycle.schedules.lr(i):.6g}") for i in range(cycle.total_steps)),
            losses=tuple(records.significant(loss) for loss in losses),
            momentum=cycle.base_momentum,
            weight_decay=cycle.weight_decay,
            seed=cycle.seed,
            optimizer=driver.optimizer_name,
            momentum_name=driver.momentum_name,
            steps=outcome.steps,
            seconds=round(outcome.seconds, 4),
            validation={
                metric: [(step, records.significant(value)) for step, value in points]
                for metric, points in cycle.validation.items()
            },
        )

    def _sweeps(self) -> list[SweepRecord]:
        """Those that the context has."""
        trials = self.trial.study.get_trials(deepcopy=False)
        return evidence.of_context(trials, self.recipe.context_key)

    def _next(self) -> tuple[float, float, int]:
        """First rate, last rate and steps of the next one."""
        return _extended(self.options, self._sweeps())

    def _agree(self, useful: Sequence[SweepRecord]) -> bool:
        """Whether these say so much that another one would say no more.

        Where the user names the weight decays, each has its turn.
        """
        if self.options["weight_decays"]:
            return False
        found = evidence.pool(useful, self.recipe.total_steps)
        if found is None or found.prior.replicates < 2:
            return False
        low, high = found.prior.interval
        return found.prior.reliable and high <= AGREED * low

    def _affordable(self) -> bool:
        """Whether another range test stays within its share of the budget, beside those that run.

        One always is while none has ended: nobody waits, and a trial drawn without any costs more.
        """
        study = self.trial.study
        settings = study.user_attrs.get(records.SETTINGS, {})
        cycles = settings.get("cycles") or settings.get("trials")
        trials = study.get_trials(deepcopy=False)
        spent = [record.steps for record in evidence.sweeps(trials)]
        if not spent or cycles is None or self.recipe.total_steps is None:
            return True
        running = [
            int(other.user_attrs.get(records.SWEEPS, 0))
            for other in trials
            if other.state == TrialState.RUNNING
            and other.number != self.trial.number
            and records.RANGE_TEST not in other.user_attrs
        ]
        budget = RANGE_TEST_SHARE * cycles * self.recipe.total_steps
        return bool(sum(spent) + sum(running) + self._next()[2] <= budget)

    def _telling_decay(self, own: list[SweepRecord]) -> float:
        """Weight decay of the next range test: typical, or, every second time, the largest.

        The pair says whether the large weight decays of the search are stable at the rates that
        the typical one suggests.
        """
        if "weight_decay" in self.recipe.fixed:
            return self.recipe.fixed["weight_decay"]
        study = self.trial.study
        where = coordinates(study.get_trials(deepcopy=False), self.recipe, study.directions)
        kappa = KAPPA_RANGE[1] if len(own) % 2 else STANDARD_KAPPA
        if where.evidence is None or not where.evidence.prior.reliable:
            return self._clip("weight_decay", SWEEP_WEIGHT_DECAY)
        if where.uses_kappa:
            return where.standard(kappa)["weight_decay"]
        low, high, _ = where.space_of("weight_decay")
        return high if len(own) % 2 else min(max(SWEEP_WEIGHT_DECAY, low), high)

    def _typical(self, field: str) -> float:
        """The standard recipe's value, within this recipe's range."""
        return self._clip(field, STANDARD_RECIPE[field])

    def _clip(self, field: str, value: float) -> float:
        if field in self.recipe.fixed:
            return self.recipe.fixed[field]
        low, high, _ = self.recipe.space[field]
        return min(max(value, low), high)


def cycles_for_another(
    trials: Sequence[FrozenTrial], own: Sequence[SweepRecord], total_steps: int
) -> int:
    """The budget that pays for one more range test of a context, which may get twice as long.

    Args:
        trials: All of the study.
        own: The context's range tests, one at least.
        total_steps: Of a full cycle.
    """
    steps = sum(record.steps for record in evidence.sweeps(trials)) + LONGEST * len(own[0].lrs)
    return math.ceil(steps / (RANGE_TEST_SHARE * total_steps))


def of(trial: BaseTrial, recipe: RecipeSpace, range_test: Any) -> PreStage | None:
    """The pre-stage of this trial; None where a range test is not wanted, or has no meaning.

    Raises:
        UsageError: ``range_test`` is not what :func:`hpsched.suggest_onecycle` takes.
    """
    options = _options(range_test, recipe)
    if options is None or not isinstance(trial, optuna.trial.Trial):
        return None
    return PreStage(trial=trial, recipe=recipe, options=options)


def _options(wanted: Any, recipe: RecipeSpace) -> dict[str, Any] | None:
    if wanted is False or "max_lr" not in recipe.space or recipe.total_steps is None:
        return None
    low, high, _ = recipe.space["max_lr"]
    if low == high:
        return None
    steps = max(SHORTEST_SWEEP, min(SWEEP_STEPS, recipe.total_steps // 3))
    options: dict[str, Any] = {
        "num_iter": steps,
        "start_lr": low,
        "end_lr": high,
        "mode": "exp",
        "validate_every": None,
        "stop_diverged": True,
        "weight_decays": None,
        "extend": True,
    }
    if isinstance(wanted, Mapping):
        unknown = sorted(set(wanted) - set(options))
        if unknown:
            raise UsageError(f"range_test has unknown keys {unknown}: use {sorted(options)}.")
        chosen = {"start_lr", "end_lr"} & set(wanted) or wanted.get("mode") == "linear"
        options |= {"extend": not chosen, **wanted}
    elif wanted is not True:
        raise UsageError(f"range_test={wanted!r}: True, False or a dict of options.")
    schedules.range_test(  # refuses bad options here rather than inside the first trial
        options["num_iter"], options["start_lr"], options["end_lr"], options["mode"]
    )
    if not options["start_lr"] > 0:  # a linear sweep could begin at 0, but no curve in log rate
        raise UsageError(f"start_lr={options['start_lr']!r}: a positive rate, e.g. 1e-6.")
    _check_every(options["validate_every"])
    options["weight_decays"] = checked_decays(options["weight_decays"])
    return options


def _extended(options: Mapping[str, Any], own: Sequence[SweepRecord]) -> tuple[float, float, int]:
    """First rate, last rate and steps of the next sweep: further out where one missed the action.

    Steps grow with the decades, so that the curve stays as fine, but not beyond twice as many.
    Twice as many it has, too, where those before say nothing together though none missed the
    action: a descent that drowns in noise shows in a longer sweep (docs/calibration.md).
    """
    start, end = float(options["start_lr"]), float(options["end_lr"])
    if not options["extend"]:
        return start, end, options["num_iter"]
    decades = math.log(end / start)
    missed = [evidence.range_test(record).missed for record in own]
    for record, side in zip(own, missed, strict=True):
        start = min(start, record.lrs[0] / FURTHER if side == "low" else start)
        end = max(end, record.lrs[-1] * FURTHER if side == "high" else end)
    drowned = not any(missed) and evidence.doubt(own) is not None
    longer = LONGEST if drowned else min(math.log(end / start) / decades, LONGEST)
    return start, end, round(options["num_iter"] * longer)


def _check_every(steps: Any) -> None:
    whole = isinstance(steps, int) and not isinstance(steps, bool)
    if steps is not None and not (whole and steps >= 1):
        raise UsageError(f"validate_every={steps!r}: steps between validations, at least 1.")


def checked_decays(given: Any) -> tuple[float, ...] | None:
    """The weight decays to sweep with, checked; None: the default ones."""
    if given is None:
        return None
    try:
        decays = tuple(map(float, given)) if not isinstance(given, str) else ()
    except (TypeError, ValueError):
        decays = ()
    if not decays or not all(0 <= decay < math.inf for decay in decays):
        raise UsageError(f"weight_decays={given!r}: numbers of 0 or more, e.g. [1e-3, 1e-4].")
    return decays
