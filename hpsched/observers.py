"""What a tracker hears of a trial: its range test, each complete cycle, its end.

``OneCycle.run(train, observers=[...])`` tells them. ``hpsched.integrations`` has those of
TensorBoard, MLflow and Weights & Biases; one of your own overrides what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import optuna
from optuna.trial import Trial

from hpsched import evidence, records
from hpsched.errors import StorageError, TrialLostError

if TYPE_CHECKING:
    from hpsched.lr_curve import RangeTest
    from hpsched.records import CycleRecord

_T = TypeVar("_T")
State = Literal["complete", "pruned", "diverged", "out of memory", "failed"]


@dataclass(frozen=True, kw_only=True)
class TrialEnd:
    """How a trial ended.

    Attributes:
        state: In one word; ``diverged`` and ``out of memory`` are ``pruned`` to Optuna.
        values: The trial's value, or one per objective; empty unless it is complete.
        reason: Why it is not complete.
    """

    state: State
    values: tuple[float, ...] = ()
    reason: str | None = None

    @property
    def named_values(self) -> dict[str, float]:
        """``value``, or ``value_0``, ``value_1``, … with several objectives."""
        if len(self.values) == 1:
            return {"value": self.values[0]}
        return {f"value_{i}": value for i, value in enumerate(self.values)}


class Observer:
    """Hears what happens in a trial, in the process that runs it, once its record is stored.

    An exception raised here never reaches the trial: it is shown once, as a warning. A trial
    that went back into the queue tells the rest to the observers of the process that goes on
    with it; what must be found again then (a run's id, say) belongs into an attribute of the
    trial.
    """

    def on_range_test(self, trial: Trial, test: RangeTest) -> None:
        """The trial ran a range test. It has no parameters yet."""

    def on_rung(self, trial: Trial, cycle: CycleRecord) -> None:
        """A complete cycle ended: a rung, or a confirmation; one that diverged has no value."""

    def on_trial_end(self, trial: Trial, end: TrialEnd) -> None:
        """The trial has its value, or ends without one. Not called when it is to be continued."""


def tell(observers: Iterable[Observer], event: str, *about: Any) -> None:
    """Call ``event`` of each observer; what one raises is shown once and goes no further."""
    for observer in observers:
        try:
            getattr(observer, event)(*about)
        except Exception as error:
            evidence.warn_once(
                f"{type(observer).__name__}.{event} raised {type(error).__name__}: {error}. "
                "The trial goes on and the tracker lacks this; mend the observer, or leave it out "
                "of run(train, observers=[...])."
            )


def until_end(observers: Iterable[Observer], trial: Trial, course: Callable[[], _T]) -> _T:
    """``course()``, the whole trial, whose end the observers are told."""
    try:
        value = course()
    except (StorageError, TrialLostError):  # it goes back into the queue, or is another worker's
        raise
    except Exception as error:
        tell(observers, "on_trial_end", trial, _ended_by(error, trial))
        raise
    values: Any = value if isinstance(value, list) else [value]
    tell(observers, "on_trial_end", trial, TrialEnd(state="complete", values=tuple(values)))
    return value


def confirmed(trial: Trial) -> int | None:
    """Number of the trial whose recipe this one repeats with a fresh seed, if it does."""
    return trial.user_attrs.get(records.CONFIRMS)


def run_name(trial: Trial) -> str:
    """``trial-7``; ``trial-31-confirms-7`` of a confirmation."""
    repeats = confirmed(trial)
    return f"trial-{trial.number}" + ("" if repeats is None else f"-confirms-{repeats}")


def cycle_name(trial: Trial, cycle: CycleRecord) -> str:
    """``rung_0``, ``rung_1``, …; ``confirm`` of a confirmation."""
    return f"rung_{cycle.rung}" if confirmed(trial) is None else "confirm"


def parameters(trial: Trial) -> dict[str, Any]:
    """All that the trial runs with: its parameters, what is fixed in its recipes, the context."""
    known: dict[str, Any] = {}
    for key, data in trial.user_attrs.items():
        if key == records.RECIPE or key.startswith(records.RECIPE + ":"):
            recipe = records.RecipeSpace.from_json(data, f"trial {trial.number}: {key}")
            known |= {recipe.name(field): value for field, value in recipe.fixed.items()}
            known |= {recipe.name("policy"): recipe.policy}
            known |= {recipe.name("total_steps"): recipe.total_steps, **recipe.context}
    return known | trial.params


def _ended_by(error: Exception, trial: Trial) -> TrialEnd:
    reason = str(error) or type(error).__name__
    state: State = "pruned" if isinstance(error, optuna.TrialPruned) else "failed"
    if records.OUT_OF_MEMORY in trial.user_attrs:
        state = "out of memory"
    elif records.DIVERGED in trial.user_attrs:
        state = "diverged"
    return TrialEnd(state=state, reason=reason)
