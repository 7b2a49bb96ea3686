"""``CyclePruner``: compares complete cycles, never the middle of one.

By default a trial runs on while the model of the search (:mod:`hpsched.search`) gives it a fair
chance of being the best. With a ``reduction_factor`` it is asynchronous successive halving (Li et
al. 2018, arXiv 1810.05934) over rungs of complete one-cycle runs: at each rung a trial goes on if
it is among the best 1/η of those that reached the rung so far.
"""

from __future__ import annotations

import math

from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpsched import records, search
from hpsched.coordinates import Snapshot, located, spaces
from hpsched.errors import UsageError
from hpsched.sampler import is_small, role_of


class CyclePruner(BasePruner):
    """Prunes a trial between its complete cycles, never within one.

    Trials that report by themselves (not through ``OneCycle.run``) are never pruned. The refining
    trials, with which a study begins, end with their short cycles: ``OneCycle.run`` sees to it that
    the last of them runs in full what they have found. With a small budget the first does too.

    Args:
        reduction_factor: η of successive halving: of the trials at a rung, the best 1/η go on. At
            least 2. Default: by the model.

    Raises:
        UsageError: ``reduction_factor`` is below 2.
    """

    def __init__(self, reduction_factor: int | None = None) -> None:
        if reduction_factor is not None and reduction_factor < 2:
            raise UsageError(f"reduction_factor={reduction_factor!r}: at least 2.")
        self.reduction_factor = reduction_factor

    @property
    def by_model(self) -> bool:
        """Whether the search's model decides, and not successive halving."""
        return self.reduction_factor is None

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial's last reported rung was not good enough to climb on."""
        rung = trial.last_step
        if rung is None or f"{records.RUNG}{rung}" not in trial.user_attrs:
            return False
        if self.reduction_factor is None:
            return not _runs_on(study, trial, rung)
        sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
        own = _score(trial.intermediate_values[rung], sign)
        others = [
            _score(t.intermediate_values.get(rung, math.nan), sign)
            for t in study.get_trials(deepcopy=False)
            if t.number != trial.number and _competes(t, rung)
        ]
        return not climbs(own, others, self.reduction_factor)


def _runs_on(study: Study, trial: FrozenTrial, rung: int) -> bool:
    if not math.isfinite(trial.intermediate_values[rung]):
        return False
    recipe = next(iter(spaces(trial)), None)
    if recipe is None:
        return True
    now = Snapshot(study.get_trials(deepcopy=False), study.directions)
    where = located(now, recipe)
    role = role_of(study, trial._trial_id)
    if role is not None:
        later = [index for index, _ in recipe.rungs if index > rung]
        # Without a range test there is one such trial only, and it shows what to beat.
        return where.evidence is None or len(later) > 1 or (role == 0 and is_small(study))
    known = search.learn(now, where, trial)
    return known is None or known.promises(trial.number)


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
