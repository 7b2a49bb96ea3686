"""What must be true of a study when all is over, whatever happened to its workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import optuna
from optuna.trial import FixedTrial, FrozenTrial, TrialState

import hpsched
from hpsched import ledger, records
from hpsched.study import read_settings
from tests.fake_training import FakeTraining

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def search(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if not records.is_confirmation(trial)]


def confirmations(trials: Iterable[FrozenTrial]) -> Counter[int]:
    """Trial → how many finished confirmations it has."""
    return Counter(
        trial.user_attrs[records.CONFIRMS]
        for trial in trials
        if records.is_confirmation(trial) and trial.state in FINISHED
    )


def check(trials: Sequence[FrozenTrial], count: int) -> None:
    """``count`` search trials, all finished and whole, whose values follow from their seeds."""
    assert wrong(trials, count) == []


def wrong(trials: Sequence[FrozenTrial], count: int) -> list[str]:
    """What is not as :func:`check` demands."""
    found = []
    if [trial.number for trial in trials] != list(range(len(trials))):
        found.append(f"trials are numbered {[trial.number for trial in trials]}")
    if len(search(trials)) != count:
        found.append(f"{len(search(trials))} search trials instead of {count}")
    for trial in trials:
        found += [f"trial {trial.number}: {what}" for what in _wrong_with(trial)]
    return found


def again(trial: FrozenTrial, cycle: records.CycleRecord) -> float:
    """The value of the trial's stored recipe and the run's stored seed, trained once more."""
    recipe = hpsched.suggest_onecycle(FixedTrial(trial.params), total_steps=900)
    return recipe.train(FakeTraining(), cycle.steps, cycle.seed)


def _wrong_with(trial: FrozenTrial) -> list[str]:
    if trial.state not in FINISHED:
        return [f"is {trial.state.name} {trial.user_attrs.get(records.ERROR, '')}".rstrip()]
    found = []
    if set(trial.params) != set(records.FIELDS):
        return [f"has the parameters {sorted(trial.params)}"]
    cycles = records.cycles(trial)
    for cycle in cycles:
        if cycle.diverged is None and cycle.value != (value := again(trial, cycle)):
            found.append(f"rung {cycle.rung} has {cycle.value}, and {value} when run again")
    if not cycles:
        found.append("has no cycle")
    elif trial.state == TrialState.COMPLETE and trial.value != cycles[-1].value:
        found.append(f"has the value {trial.value}, its last cycle {cycles[-1].value}")
    reported = {cycle.rung: cycle.value for cycle in cycles if cycle.diverged is None}
    if not records.is_confirmation(trial) and trial.intermediate_values != reported:
        found.append(f"reported {trial.intermediate_values}, its rungs gave {reported}")
    return found


# -- a whole study ---------------------------------------------------------------------------------


def differences(study: optuna.Study) -> list[str]:
    """What a study with a budget of trials is short of, or has too much of, at its end."""
    settings, trials = read_settings(study), study.get_trials()
    assert settings is not None and settings.trials is not None
    found = wrong(trials, settings.trials)
    candidates = sum(trial.state == TrialState.COMPLETE for trial in search(trials))
    planned = min(ledger.confirmations_planned(settings), candidates * settings.confirm_seeds)
    if (done := sum(confirmations(trials).values())) != planned:
        found.append(f"{done} confirmations instead of {planned}")
    for trial in trials:
        for cycle in records.cycles(trial):
            kind = "confirm" if records.is_confirmation(trial) else "rung"
            if cycle.seed != records.derive_seed(settings.seed, trial.number, kind, cycle.rung):
                found.append(f"trial {trial.number}: rung {cycle.rung} has another trial's seed")
    return found


def repeated(calls: Iterable[tuple[int, str, str]], victims: set[int]) -> list[str]:
    """Runs of ``train`` that were begun more than once, but for those of victims.

    Args:
        calls: (pid, name of the run, ``starts`` or ``ends``), in order.
        victims: Processes that were kept from their work: theirs may be begun by one more.
    """
    starts: dict[str, list[int]] = {}
    for pid, name, word in calls:
        if word == "starts":
            starts.setdefault(name, []).append(pid)
    return [
        f"{name} was begun by {pids}; nothing had happened to {sorted(set(pids) - victims)}"
        for name, pids in starts.items()
        if len(set(pids)) < len(pids) or len(set(pids) - victims) > 1
    ]


def unlike(ours: Sequence[FrozenTrial], theirs: Sequence[FrozenTrial]) -> list[str]:
    """Where the trials of two studies differ; the second one's knew no faults."""
    found = []
    if len(ours) != len(theirs):
        found.append(f"{len(ours)} trials, {len(theirs)} without faults")
    for one, other in zip(ours, theirs, strict=False):
        if (here := _told(one)) != (there := _told(other)):
            what = [key for key in here | there if here.get(key) != there.get(key)]
            found.append(f"trial {one.number}: other {', '.join(what)} than without faults")
    return found


def _told(trial: FrozenTrial) -> dict[str, Any]:
    """What must not depend on what happened meanwhile."""
    kept = {"state": trial.state, "values": trial.values, "params": trial.params}
    kept |= {"intermediate values": trial.intermediate_values}
    for key, value in trial.user_attrs.items():
        if key not in (records.OWNER, records.DEATHS):
            kept[key] = _timeless(value)
    return kept


def _timeless(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "seconds"} if isinstance(value, dict) else value
