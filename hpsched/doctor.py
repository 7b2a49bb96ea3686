"""What ``hpsched doctor`` looks at: everything a run needs, each with how to mend it."""

from __future__ import annotations

import os
import platform
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import optuna
from optuna.trial import TrialState

from hpsched import objective as objectives
from hpsched import records
from hpsched.errors import HpschedError
from hpsched.ledger import FRUITLESS, is_over, read_runs
from hpsched.present import capitalised
from hpsched.redaction import redact
from hpsched.storage import is_new, open_storage, resolve_url
from hpsched.study import open_study, read_settings

MISSING = "(not installed)"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: Its name.
        ok: Whether it is as it should be.
        detail: What was found, and the remedy if it is wrong.
    """

    what: str
    ok: bool
    detail: str


def examine(
    storage: str | None = None, *, study: str | None = None, objective: str | None = None
) -> list[Finding]:
    """Look at everything a run needs; nothing is changed.

    Args:
        storage: URL; see :func:`hpsched.storage.resolve_url`.
        study: Also check this study's settings, records and objective.
        objective: Also check this ``module:function``.
    """
    database = _try("storage", lambda: _storage(storage, needed=study is not None))
    looks = {"versions": _versions, "extras": _extras, "system": _system, "device": _device}
    found = [*(_try(what, look) for what, look in looks.items()), database]
    if study is not None and database.ok:
        found.append(_try("study", lambda: _opened(study, storage)))
        if found[-1].ok:
            found.append(_try("records", lambda: _records(study, storage)))
            found.append(_try("trials", lambda: _trials(study, storage)))
            found.append(_try("its objective", lambda: _objective_of(study, storage)))
    if objective is not None:
        found.append(_try("objective", lambda: _objective(objective)))
    return found


def _try(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what=what, ok=True, detail=look())
    except HpschedError as error:
        return Finding(what=what, ok=False, detail=redact(str(error)))


def _versions() -> str:
    names = ["hpsched", *_required(lambda marker: not marker)]
    return ", ".join(f"{name} {_version(name)}" for name in names)


def _extras() -> str:
    """What is installed of the packages that extras ask for: drivers, frameworks, trackers."""
    names = _required(lambda marker: "extra ==" in marker and not re.search("dev|docs", marker))
    found = {name: _version(name) for name in names}
    there = [f"{name} {version}" for name, version in found.items() if version != MISSING]
    return ", ".join(there) or "none installed"


def _required(wanted: Callable[[str], bool]) -> list[str]:
    """Names of the packages that ours requires under a wanted marker, sorted."""
    lines = [line.partition(";") for line in metadata.requires("hpsched") or []]
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line, _, m in lines if wanted(m)}
    return sorted(names, key=str.lower)


def _system() -> str:
    return f"Python {platform.python_version()}, {platform.platform()}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return MISSING


def _device() -> str:
    try:
        import torch
    except ImportError:
        raise HpschedError("torch is not installed: pip install torch.") from None
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        fewer = "; small models train faster with OMP_NUM_THREADS=1" if threads > 1 else ""
        return f"cpu only ({os.cpu_count()} cores, {threads} threads a worker{fewer})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ", ".join(f"cuda:{i} {name}" for i, name in enumerate(names))
    return f"{devices}; CUDA {torch.version.cuda}"


def _storage(url: str | None, *, needed: bool) -> str:
    resolved = resolve_url(url)
    if not needed and is_new(resolved):
        return f"{redact(resolved)} (nothing there yet; `hpsched study create` makes the tables)"
    held = open_storage(resolved)
    count = len(held.get_all_studies())
    return f"{redact(resolved)}: schema of Optuna {optuna.__version__}, studies: {count}"


def _opened(name: str, url: str | None) -> str:
    study = open_study(name, url)
    return f"{name}, trials: {len(study.get_trials(deepcopy=False))}"


def _records(name: str, url: str | None) -> str:
    runs = read_runs(open_study(name, url).get_trials(deepcopy=False))
    broken = [text for run in runs for text in run.broken]
    if broken:
        raise HpschedError("\n".join(broken))
    return "all readable"


def _trials(name: str, url: str | None) -> str:
    study = open_study(name, url)
    runs = read_runs(study.get_trials(deepcopy=False))
    failed = [run.trial for run in runs if run.trial.state == TrialState.FAIL]
    diverged = [run.diverged for run in runs if run.diverged]
    if failed and runs[-1].trial.state == TrialState.FAIL:
        reason = failed[-1].user_attrs.get(records.ERROR, "no reason was stored")
        raise HpschedError(
            f"{len(failed)} failed, the last one with {reason}. They do not count as "
            f"trials: mend the objective, then `hpsched worker attach {shlex.quote(name)}`."
        )
    if runs and len(diverged) == len(runs):
        raise HpschedError(
            f"all {len(runs)} diverged, the last one so: {diverged[-1]}. {capitalised(FRUITLESS)}."
        )
    ran_in_full = any(run.trial.state == TrialState.COMPLETE for run in runs)
    if not ran_in_full and is_over(read_settings(study), runs, study.directions[0]):
        raise HpschedError(
            "the budget was spent before any trial ran in full: create another study with a larger "
            "one. A search begins with three or four trials of short cycles."
        )
    return f"{len(failed)} failed, {len(diverged)} diverged"


def _objective_of(name: str, url: str | None) -> str:
    settings = read_settings(open_study(name, url))
    if settings is None:
        return "none stored (a plain Optuna study)"
    return _objective(settings.objective)


def _objective(spec: str) -> str:
    function = objectives.load_objective(spec)
    return f"{spec}: imports ({type(function).__name__})"
