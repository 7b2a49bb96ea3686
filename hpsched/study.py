"""Studies: create, open, confirm, name the best, delete.

What a study means — costs, decisions, rankings — is in :mod:`hpsched.ledger`.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.study import Study

from hpsched import ledger, records
from hpsched.coordinates import coordinates, spaces
from hpsched.errors import (
    HpschedError,
    RecordError,
    StudyExistsError,
    StudyNotFoundError,
    UsageError,
)
from hpsched.ledger import Best, Candidate
from hpsched.pruner import CyclePruner
from hpsched.records import Settings, WorkerRecord
from hpsched.sampler import OneCycleSampler, check_seed
from hpsched.schedules import CLASSIC
from hpsched.storage import clock, open_storage

DEFAULT_CYCLES = 20.0
LARGEST_BUDGET = 1e9  # cycles, trials or seconds: more is a slip of the pen
LONGEST_NAME = 250  # characters; Optuna's column has 512, and links and files carry the name too
WORKER_GONE_SECONDS = 60.0

SAMPLERS: dict[str, Callable[[int | None], BaseSampler | None]] = {
    "hpsched": lambda seed: None,
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed, warn_independent_sampling=False),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


# -- create and open -------------------------------------------------------------------------------


def create_study(
    name: str,
    *,
    objective: str,
    storage: str | None = None,
    direction: str = "minimize",
    trials: int | None = None,
    cycles: float | None = None,
    timeout: float | None = None,
    seed: int | None = None,
    sampler: str = "hpsched",
    range_tests: int = 3,
    reduction_factor: int | None = None,
    confirm_top: int = 2,
    confirm_seeds: int = 3,
    policy: str | None = None,
    like: Study | None = None,
    skip_if_exists: bool = False,
) -> Study:
    """Create a study that workers can attach to by name alone.

    Args:
        name: Unique in the storage.
        objective: ``module:function`` or ``file.py:function``; imported by each worker.
        storage: URL; see :func:`hpsched.storage.resolve_url`.
        direction: ``minimize`` or ``maximize``.
        trials: Budget as search trials over all workers (confirmations come on top).
        cycles: Budget as full-cycle equivalents: range tests, pruned rungs and confirmations
            count with the steps they took. The default, with 20.
        timeout: Budget as seconds of wall time since the first trial began.
        seed: Every run's seed follows from it; drawn at random if not given.
        sampler: ``hpsched`` (its own model), ``tpe``, ``gp``, ``qmc``, ``cmaes`` or ``random``.
        range_tests: Most replicates per context (two that agree are enough); 0 for none.
        reduction_factor: η of successive halving over the rungs; by default trials climb by the
            search's own model.
        confirm_top, confirm_seeds: Recipes confirmed at the end, and fresh seeds for each.
        policy: ``schedule:NAME`` makes every recipe follow that schedule instead of one-cycle, to
            compare with (:mod:`hpsched.compare`).
        like: Begin with the best recipe of this study of the same model, in units that carry over
            to another horizon or batch size: its distance from the range tests' rate, its κ.
        skip_if_exists: Return the existing study of that name instead of refusing.

    Raises:
        UsageError: A setting that cannot be right.
        StudyExistsError: The name is taken.
        StorageError: The database cannot be used.
    """
    settings = _settings(
        objective=objective,
        seed=secrets.randbelow(2**31) if seed is None else seed,
        trials=trials,
        cycles=cycles,
        timeout=timeout,
        range_tests=range_tests,
        reduction_factor=reduction_factor,
        base_sampler=sampler,
        confirm_top=confirm_top,
        confirm_seeds=confirm_seeds,
        policy=policy,
        like=None if like is None else like.study_name,
        first_guess=None if like is None else first_guess(like),
    )
    if direction not in ("minimize", "maximize"):
        raise UsageError(f"direction={direction!r}: 'minimize' or 'maximize'.")
    _check_name(name)
    held = open_storage(storage, create=True)
    try:
        study = optuna.create_study(study_name=name, storage=held, direction=direction)  # type: ignore[arg-type]
    except optuna.exceptions.DuplicatedStudyError:
        if skip_if_exists:
            return _existing(name, storage, settings)
        raise StudyExistsError(
            f"A study named {name!r} exists: choose another name, pass --skip-if-exists to go on "
            f"with it, or remove it with `hpsched study delete {name}`."
        ) from None
    study.set_user_attr(records.SETTINGS, settings.to_json())
    return open_study(name, storage)


def _existing(name: str, storage: str | None, settings: Settings) -> Study:
    study = open_study(name, storage)
    if read_settings(study) is None:
        if study.get_trials(deepcopy=False):
            raise StudyExistsError(
                f"A study named {name!r} exists and was not created by hpsched: "
                "choose another name."
            )
        study.set_user_attr(records.SETTINGS, settings.to_json())  # its creation was cut short
    return open_study(name, storage)


def open_study(name: str, storage: str | None = None, *, heartbeat: bool = False) -> Study:
    """The study, with the sampler and pruner its settings ask for (Optuna stores neither).

    Args:
        name: The study's name.
        storage: URL; see :func:`hpsched.storage.resolve_url`.
        heartbeat: For workers; see :func:`hpsched.storage.open_storage`.

    Raises:
        StudyNotFoundError: No such study; the message lists those there are.
        StorageError: The database cannot be used.
        RecordError: Its settings cannot be read.
    """
    study = find_study(name, storage, heartbeat=heartbeat)
    settings = read_settings(study)
    study.sampler = make_sampler(settings)
    study.pruner = CyclePruner(settings.reduction_factor if settings else None)
    return study


def find_study(name: str, storage: str | None = None, *, heartbeat: bool = False) -> Study:
    """The study as Optuna loads it, whatever its settings: see :func:`open_study`."""
    held = open_storage(storage, heartbeat=heartbeat)
    try:
        return optuna.load_study(study_name=name, storage=held)
    except KeyError:
        names = sorted(optuna.get_all_study_names(held))
        there = f"there are: {', '.join(names[:20])}" if names else "there is none yet"
        raise StudyNotFoundError(
            f"No study named {name!r} in this storage; {there}. Check --storage and the name."
        ) from None


def make_sampler(settings: Settings | None, trial: int | None = None) -> OneCycleSampler:
    """The sampler a study's settings ask for.

    Args:
        settings: The study's; None for a study made with plain Optuna.
        trial: Number of the trial it is for. The draw then follows from the study's seed and
            this number, whichever worker makes it: a study with one worker repeats exactly, and
            several never propose the same. None seeds it afresh.
    """
    if settings is None:
        return OneCycleSampler()
    seed = None if trial is None else records.derive_seed(settings.seed, trial, "sampler")
    if settings.base_sampler == "qmc":  # one sequence, of which each trial takes the next point
        seed = records.derive_seed(settings.seed, "sampler")
    base = SAMPLERS[settings.base_sampler](seed)
    return OneCycleSampler(
        base, range_tests=settings.range_tests, seed=settings.seed, draw_seed=seed
    )


def read_settings(study: Study) -> Settings | None:
    """The study's settings; None for a study made with plain Optuna.

    Raises:
        RecordError: The settings cannot be read.
    """
    data = study.user_attrs.get(records.SETTINGS)
    where = f"study {study.study_name!r}: {records.SETTINGS}"
    return None if data is None else Settings.from_json(data, where)


def _check_name(name: str) -> None:
    """Raise UsageError for a name that some database or terminal cannot hold."""
    if not name.strip():
        raise UsageError("a study needs a name, e.g. hpsched study create resnet ….")
    if name != name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
        raise UsageError(
            f"study name {name[:40]!r}{'…' if len(name) > 40 else ''}: at most {LONGEST_NAME} "
            "printable characters, no space at either end."
        )


def check_budget(name: str, value: float) -> None:
    """Raise UsageError for a budget that is none, not finite, or a slip of the pen."""
    if not 0 < value < LARGEST_BUDGET:
        raise UsageError(
            f"{name}={value!r}: a budget must be above 0 and below {LARGEST_BUDGET:g}."
        )


def _settings(**values: Any) -> Settings:
    limits = [key for key in ("trials", "cycles", "timeout") if values[key] is not None]
    if len(limits) > 1:
        raise UsageError(f"{' and '.join(limits)} were given: a study has one budget, choose one.")
    if not limits:
        values["cycles"] = DEFAULT_CYCLES
    for key in limits:
        check_budget(key, values[key])
    least = {"range_tests": 0, "reduction_factor": 2, "confirm_top": 0, "confirm_seeds": 0}
    for key, low in least.items():
        value = values[key]
        if value is not None and value < low:
            raise UsageError(f"{key}={value!r}: must be at least {low}.")
    check_seed(values["seed"])
    if values["base_sampler"] not in SAMPLERS:
        raise UsageError(f"sampler={values['base_sampler']!r}: one of {', '.join(SAMPLERS)}.")
    if ":" not in values["objective"]:
        raise UsageError(
            f"objective={values['objective']!r}: write module:function, e.g. train:objective."
        )
    return Settings(**values)


# -- confirm and name the best ---------------------------------------------------------------------


def confirm(study: Study, *, top: int = 2, seeds: int = 3) -> int:
    """Queue confirmations: the best ``top`` recipes, each again with ``seeds`` fresh seeds.

    The best are those of which the search expects most after all results; the one that :func:`best`
    names for its fresh seeds need not be among them.
    The study's workers run them even when its budget is spent; in plain Optuna the next
    ``study.optimize`` does.

    Returns:
        How many were queued.

    Raises:
        UsageError: No trial has finished a full cycle yet; top or seeds below 1.
    """
    return seeds * len(queue_confirmations(study, top=top, seeds=seeds).chosen)


@dataclass(frozen=True, kw_only=True)
class Queued:
    """What was queued to be confirmed.

    Attributes:
        chosen: The recipes, as they were before.
        best: The one that :func:`best` names.
        place: Its place among all recipes, by what the search expects of them, from 1.
    """

    chosen: Sequence[Candidate]
    best: Candidate
    place: int


def queue_confirmations(study: Study, *, top: int, seeds: int) -> Queued:
    """:func:`confirm`, which tells what it queued."""
    if top < 1 or seeds < 1:
        raise UsageError(f"top={top!r}, seeds={seeds!r}: both at least 1.")
    _check_single(study)
    runs = ledger.read_runs(study.get_trials(deepcopy=False))
    ranked = ledger.rank(runs, study.direction, unconfirmed=True)
    if not ranked:
        raise UsageError(
            f"Study {study.study_name!r} has no finished full cycle to confirm. To go on: "
            f"{_go_on(study)}."
        )
    chosen = ranked[:top]
    for candidate in seeds * chosen:
        enqueue_confirmation(study, candidate.number)
    named = ledger.rank(runs, study.direction)[0]
    place = 1 + [candidate.number for candidate in ranked].index(named.number)
    return Queued(chosen=chosen, best=named, place=place)


def enqueue_confirmation(study: Study, number: int) -> None:
    """Queue one more run of trial ``number``'s recipe with a fresh seed."""
    trial = study.get_trials(deepcopy=False)[number]
    study.enqueue_trial(dict(trial.params), user_attrs={records.CONFIRMS: number})


def best(study: Study) -> Best:
    """The best recipe of any Optuna study whose trials used ``suggest_onecycle``.

    Recipes confirmed on fresh seeds rank before those that were run once, and by the mean over
    the fresh seeds only: the value a recipe was chosen for is too good to be true on average.

    Raises:
        UsageError: No trial has finished a full cycle; several objectives.
    """
    _check_single(study)
    runs = ledger.read_runs(study.get_trials(deepcopy=False))
    named = ledger.best_of(runs, study.direction, study.study_name)
    if named is None:
        recipe = proposed(study)
        so_far = f"; as far as it knows, {_in_words(recipe)} is best" if recipe else ""
        raise UsageError(
            f"Study {study.study_name!r} has no finished full cycle yet{so_far}. To go on: "
            f"{_go_on(study)}."
        )
    return named


def first_guess(study: Study) -> dict[str, float]:
    """The study's best recipe in units that carry over to other studies of the same model.

    Returns:
        max_lr as a multiple of what the study's range tests proposed, weight decay as κ
        (``kappa``; as it is for optimizers that normalise it away), the other fields as they are.

    Raises:
        UsageError: No trial has finished a full cycle; several objectives; its recipes follow
            another schedule than one-cycle.
    """
    number = best(study).number
    trials = study.get_trials(deepcopy=False)
    recipe = next(records.recipe_spaces(trials[number]))
    if recipe.policy.startswith(CLASSIC):
        raise UsageError(
            f"Study {study.study_name!r} follows {recipe.policy!r}: its recipes say nothing of "
            "one-cycle. Begin like a study without --policy, or like none."
        )
    values = recipe.values(trials[number].params)
    assert values is not None
    found = coordinates(trials, recipe, study.directions).guess_of(values)
    return {field: float(f"{value:.6g}") for field, value in found.items()}


def proposed(study: Study) -> dict[str, float] | None:
    """The recipe to use if nothing more could be run: field → value; None without a range test.

    It is the standard recipe at the rate that range tests and short cycles point to by now; it has
    not been run itself. None, too, where complete cycles were run and all of them diverged.
    """
    trials = study.get_trials(deepcopy=False)
    recipe = next((space for trial in trials for space in spaces(trial)), None)
    if recipe is None:
        return None
    where = coordinates(trials, recipe, study.directions)
    known = where.evidence is not None and not ledger.fruitless(ledger.read_runs(trials))
    return {**recipe.fixed, **where.standard()} if known else None


def _in_words(recipe: Mapping[str, float]) -> str:
    named = ("max_lr", "weight_decay", "max_momentum", "base_momentum")
    return ", ".join(f"{field} {recipe[field]:.3g}" for field in named)


def _check_single(study: Study) -> None:
    if len(study.directions) > 1:
        raise UsageError(
            f"Study {study.study_name!r} has several objectives: see study.best_trials."
        )


def _go_on(study: Study) -> str:
    settings, name = read_settings(study), shlex.quote(study.study_name)
    if settings is None:
        return "run study.optimize with an objective that uses hpsched.suggest_onecycle"
    runs = ledger.read_runs(study.get_trials(deepcopy=False))
    if ledger.fruitless(runs):
        return f"see `hpsched doctor --study {name}`: no run gave a finite result"
    if ledger.is_over(settings, runs, study.direction):
        return (
            "create another study with a larger budget, since this one's is spent (unless "
            f"`hpsched doctor --study {name}` names another reason)"
        )
    return f"run `hpsched worker attach {name}`"


# -- workers, as others see them -------------------------------------------------------------------


def read_workers(attrs: Mapping[str, Any]) -> dict[str, WorkerRecord]:
    """Worker id → record, from a study's user attributes; unreadable ones are left out."""
    found = {}
    for key, data in attrs.items():
        if key.startswith(records.WORKER):
            try:
                found[key.removeprefix(records.WORKER)] = WorkerRecord.from_json(data, key)
            except RecordError:
                continue
    return found


def at_work(study: Study) -> dict[str, WorkerRecord]:
    """Worker id → record of those that are at work on the study now."""
    return live_workers(read_workers(study.user_attrs), clock(study._storage)())


def live_workers(workers: Mapping[str, WorkerRecord], now: float) -> dict[str, WorkerRecord]:
    """Those heard of within the last minute that have not said goodbye."""
    return {
        key: worker
        for key, worker in workers.items()
        if worker.state != "stopped" and now - worker.seen < WORKER_GONE_SECONDS
    }


# -- delete ----------------------------------------------------------------------------------------


def delete_study(name: str, storage: str | None = None) -> None:
    """Remove the study and all its trials.

    Raises:
        StudyNotFoundError: No such study.
        HpschedError: A worker is still at work on it.
    """
    study = find_study(name, storage)
    live = at_work(study)
    if live:
        hosts = ", ".join(f"{w.host}:{w.pid}" for w in live.values())
        raise HpschedError(f"Workers are at work on {name!r} ({hosts}): stop them first.")
    optuna.delete_study(study_name=name, storage=study._storage)
