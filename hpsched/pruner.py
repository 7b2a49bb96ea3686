"""``CyclePruner``: compares complete cycles of the same length, and nothing else.

Asynchronous successive halving (Li et al. 2018, arXiv 1810.05934) over rungs of complete
one-cycle runs: at each rung a trial goes on if it is among the best 1/η of those that reached
the rung so far. A diverged trial counts as worst; confirmations do not count.
"""

from __future__ import annotations

import math

from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpsched import records
from hpsched.errors import UsageError


class CyclePruner(BasePruner):
    """Prunes a trial between its complete cycles, never within one.

    Trials that report by themselves (not through ``OneCycle.run``) are never pruned.

    Args:
        reduction_factor: η; of the trials at a rung, the best 1/η go on. At least 2.

    Raises:
        UsageError: ``reduction_factor`` is below 2.
    """

    def __init__(self, reduction_factor: int = 3) -> None:
        if reduction_factor < 2:
            raise UsageError(f"reduction_factor={reduction_factor!r}: at least 2.")
        self.reduction_factor = reduction_factor

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial's last reported rung was not good enough to climb on."""
        rung = trial.last_step
        if rung is None or f"{records.RUNG}{rung}" not in trial.user_attrs:
            return False
        sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
        own = _score(trial.intermediate_values[rung], sign)
        others = [
            _score(t.intermediate_values.get(rung, math.nan), sign)
            for t in study.get_trials(deepcopy=False)
            if t.number != trial.number and _competes(t, rung)
        ]
        return not climbs(own, others, self.reduction_factor)


def climbs(own: float, others: list[float], reduction_factor: int) -> bool:
    """Whether ``own`` (lower is better) is in the best 1/η of all at the rung; the first always."""
    places = max(1, (len(others) + 1) // reduction_factor)
    return math.isfinite(own) and sum(other < own for other in others) < places


def _competes(trial: FrozenTrial, rung: int) -> bool:
    if records.is_confirmation(trial) or trial.state == TrialState.FAIL:
        return False
    return f"{records.RUNG}{rung}" in trial.user_attrs


def _score(value: float, sign: float) -> float:
    return sign * value if math.isfinite(value) else math.inf
