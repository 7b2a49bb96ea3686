"""Orders to workers, through the study they work on: pause, resume, drain, stop.

=========  =================================================================================
order      the worker
=========  =================================================================================
``pause``  finishes the trial in hand and then waits, until told otherwise
``resume`` goes on
``drain``  finishes the trial in hand and ends (exit code 0)
``stop``   puts the trial in hand back in the queue and ends (exit code 0)
=========  =================================================================================

An order is for one worker, which looks for it every few seconds; workers that attach later know
nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.study import Study

from hpsched import records
from hpsched.errors import UsageError
from hpsched.records import WorkerRecord
from hpsched.storage import study_attr
from hpsched.study import at_work

ORDERS = ("pause", "resume", "drain", "stop")


def give(study: Study, order: str, workers: Sequence[str] = ()) -> dict[str, WorkerRecord]:
    """Give an order to the study's live workers, or to some of them.

    Args:
        study: The study they work on.
        order: One of :data:`ORDERS`.
        workers: Each an id or the beginning of one, a host, or ``host:pid``. Default: all.

    Returns:
        Id → record of the workers it was given to.

    Raises:
        UsageError: No worker is at work, or one named is not among them.
    """
    if order not in ORDERS:
        raise UsageError(f"order={order!r}: one of {', '.join(ORDERS)}.")
    live = at_work(study)
    chosen = _chosen(live, workers)
    if not chosen:
        raise UsageError(f"No worker is at work on {study.study_name!r}: nothing to {order}.")
    for worker in chosen:
        study.set_user_attr(records.ORDER + worker, order)
    return chosen


def read(study: Study, worker: str) -> str | None:
    """What this worker was told; None if nothing, or something this version does not know."""
    return _to_follow(study_attr(study._storage, study._study_id, records.ORDER + worker))


def given(attrs: Mapping[str, Any]) -> dict[str, str]:
    """Worker id → what it was told, from a study's user attributes."""
    told = {
        key.removeprefix(records.ORDER): _to_follow(order)
        for key, order in attrs.items()
        if key.startswith(records.ORDER)
    }
    return {worker: order for worker, order in told.items() if order is not None}


def _to_follow(order: object) -> str | None:
    return order if isinstance(order, str) and order in ORDERS and order != "resume" else None


def _chosen(live: Mapping[str, WorkerRecord], names: Sequence[str]) -> dict[str, WorkerRecord]:
    if not names:
        return dict(live)
    chosen: dict[str, WorkerRecord] = {}
    for name in names:
        found = {id_: w for id_, w in live.items() if _is_called(name, id_, w)}
        if not found:
            there = ", ".join(f"{id_} ({w.host}:{w.pid})" for id_, w in live.items()) or "none"
            raise UsageError(
                f"No worker {name!r}; at work are: {there}. Give an id, host or host:pid of these, "
                "or leave the name out to tell all of them."
            )
        chosen |= found
    return chosen


def _is_called(name: str, id_: str, worker: WorkerRecord) -> bool:
    return id_.startswith(name) or name in (worker.host, f"{worker.host}:{worker.pid}")
