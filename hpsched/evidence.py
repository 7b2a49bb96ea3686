"""Range-test evidence in a study: read it, pool it by context.

Each replicate is stored with the trial that ran it, whatever became of the trial: no lock, no
leader, nobody waits. Pooling is a pure function of what is stored, so all workers see the same
window as soon as they see the same records.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from hpsched import lr_curve, records
from hpsched.errors import RecordError
from hpsched.records import SweepRecord


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the range tests of one context say.

    Attributes:
        proposal: Pooled centre and window for max_lr.
        momentum_name: ``momentum``, ``beta1`` or ``none``: what the user's optimizer has.
        replicates: Replicates that were pooled.
    """

    proposal: lr_curve.Proposal
    momentum_name: str
    replicates: int


def sweeps(trials: Iterable[FrozenTrial]) -> list[SweepRecord]:
    """All readable range tests, once each (a retried trial carries a copy of its first's).

    A record that cannot be read is left out with one warning that names the trial.
    """
    found: dict[str, SweepRecord] = {}
    for trial in trials:
        if records.RANGE_TEST not in trial.user_attrs:
            continue
        try:
            record = records.sweep(trial)
        except RecordError as error:
            warn_once(str(error))
            continue
        if record is not None:
            found.setdefault(record.name, record)
    return list(found.values())


def of_context(trials: Iterable[FrozenTrial], context_key: str) -> list[SweepRecord]:
    """The range tests run in this context."""
    return [record for record in sweeps(trials) if record.context_key == context_key]


def pool(found: Sequence[SweepRecord]) -> Evidence | None:
    """Replicates → evidence; None when there are none."""
    if not found:
        return None
    tests = tuple(range_test(record) for record in found)
    kinds = [record.momentum_name for record in found]
    return Evidence(
        proposal=_pool(tests),
        momentum_name=max(set(kinds), key=kinds.count),
        replicates=len(tests),
    )


def doubt(found: Sequence[SweepRecord]) -> str | None:
    """Why these range tests deserve less than full trust; None when all are reliable."""
    if not found or all(range_test(record).reliable for record in found):
        return None
    return _pool(tuple(range_test(record) for record in found)).reason


@functools.lru_cache(maxsize=256)
def _pool(tests: tuple[lr_curve.RangeTest, ...]) -> lr_curve.Proposal:
    # Each proposal of a trial asks again; the replicates hardly ever change.
    return lr_curve.pool(tests)


def range_test(record: SweepRecord) -> lr_curve.RangeTest:
    """The stored replicate as a :class:`~hpsched.RangeTest`."""
    return lr_curve.RangeTest(
        lrs=tuple(record.lrs),
        losses=tuple(math.nan if loss is None else loss for loss in record.losses),
        weight_decay=record.weight_decay,
        momentum=record.momentum,
        seed=record.seed,
        optimizer=record.optimizer,
        seconds=record.seconds,
    )


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Warn, but only the first time in this process: trials come by the hundred."""
    warnings.warn(message, stacklevel=3)
