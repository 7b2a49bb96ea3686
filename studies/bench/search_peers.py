"""Searches, and optimizers that need none, of other packages: as their documentation says.

    neps-priorband         neural-pipeline-search 0.17  PriorBand, with an expert's default as prior
    smac-expert            smac 2.4                     random forest, re-runs what looks best
    smac-hyperband-expert  smac 2.4                     the same on Hyperband's brackets
    prodigy                prodigyopt 1.1               no search: one run with its defaults
    schedule-free          schedulefree 1.4             no search: one run with its defaults

Packages are imported when a method first runs; requirements-search.txt beside this file tells how
to install them. All methods run with one worker only.

Where a method trains for shorter than a full run, it gets complete cycles of that length, not the
beginning of a long one: kinder to it, as their scores rank recipes better. They cannot be gone on
with, so that a recipe that is promoted is trained from the start, and all its runs are paid.

OptunaHub's AutoSampler is not here: PyPI has only its loader, which fetches samplers from GitHub.
For one objective, numbers only and fewer than 250 trials, it is Optuna's ``GPSampler`` with its
defaults after one random trial (``_determine_single_objective_sampler``), and so ``gp-wide`` and
``gp-expert`` of :data:`~studies.bench.methods.METHODS`. Optuna 5 has no such sampler itself.
"""

from __future__ import annotations

import importlib
import itertools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import hpsched
from hpsched.coordinates import STANDARD_RECIPE
from hpsched.errors import UsageError
from studies.bench.methods import DECAY, Method, expert
from studies.bench.race import CHECKPOINTS, Race
from studies.bench.tasks import Task, _Rows

#: The rate an expert tries first, by the task's optimizer.
FIRST_RATE = {"sgd": 0.1, "nesterov": 0.1, "adam": 3e-3, "adamw": 3e-3}
#: Worse than any task's model before training; the losses among them are all of order one.
CRASH_COST = 10.0


def default(task: Task) -> dict[str, float]:
    """What an expert would try first."""
    name = task.optimizer
    return {**STANDARD_RECIPE, "max_lr": FIRST_RATE[name], "weight_decay": DECAY[name]}


def _package(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{module} cannot be imported ({error}): "
            "pip install -c constraints.txt -r studies/bench/requirements-search.txt && "
            "pip install --no-deps -r studies/bench/requirements-search-no-deps.txt"
        ) from error


def _alone(race: Race) -> None:
    if race.workers != 1:
        raise UsageError(f"{race.workers} workers: this method is only run with one.")


# ------------------------------------------------------------------ NePS


def neps_priorband(race: Race) -> None:
    """PriorBand (2306.12370) on Hyperband's brackets of 1/9, 1/3 and full length.

    Prior: :func:`default`, of medium confidence, over an expert's range. Named is the best of the
    longest runs so far.
    """
    _alone(race)
    neps = _package("neps")
    prior = default(race.task)
    space = {
        field: neps.HPOFloat(low, high, log=log, prior=prior[field], prior_confidence="medium")
        for field, (low, high, log) in expert(race).items()
    }
    length = neps.HPOInteger(1, CHECKPOINTS, is_fidelity=True)
    search = neps.AskAndTell(
        neps.algorithms.priorband(neps.SearchSpace({**space, "length": length}))
    )
    found: list[tuple[int, float, dict[str, float]]] = []

    def work() -> None:
        while not race.over:
            # NePS draws from the global generators, which each training run sets to its own seed.
            np.random.seed(race.next_seed())
            torch.manual_seed(race.next_seed())
            trial = search.ask()
            length, recipe = trial.config["length"], {f: float(trial.config[f]) for f in space}
            score = race.train(recipe, share=length / CHECKPOINTS)
            search.tell(trial, score)
            found.append((-length, score, recipe))
            race.name(min(found, key=lambda run: run[:2])[2])

    race.work(work)


# ------------------------------------------------------------------ SMAC


def smac(race: Race, facade: str, min_share: float = 1.0) -> None:
    """A facade of SMAC with its defaults over an expert's range; its incumbent is named.

    By its default runs are noisy and SMAC says which seed each is to have:
    ``HyperparameterOptimizationFacade`` runs a recipe that may be the best on up to three seeds,
    ``MultiFidelityFacade`` all recipes on one. The latter repeats a race exactly only where
    PYTHONHASHSEED is set. A diverged run gets a finite score: the forest cannot learn from others.

    Args:
        race: The race.
        facade: Name of a class in ``smac``.
        min_share: Of a full run, the shortest one; 1 for a facade that knows one length only.
    """
    _alone(race)
    package, spaces = _package("smac"), _package("ConfigSpace")
    runhistory = _package("smac.runhistory")
    shorter = min_share < 1
    # Hyperband's brackets of three lengths hold about 2.6 runs for each full one's steps.
    trials = math.ceil(race.budget * (2.6 if shorter else 1))
    lengths = {"min_budget": CHECKPOINTS * min_share, "max_budget": CHECKPOINTS} if shorter else {}
    space = spaces.ConfigurationSpace(seed=race.seed)
    space.add(
        spaces.Float(field, (low, high), log=log)
        for field, (low, high, log) in expert(race).items()
    )

    def plain(config: Any) -> dict[str, float]:
        return {field: float(value) for field, value in config.items()}

    def work() -> None:
        while not race.over:
            asked = search.ask()
            share = asked.budget / CHECKPOINTS if shorter else 1.0
            score = race.train(plain(asked.config), share=share, seed=asked.seed)
            cost = runhistory.TrialValue(cost=min(score, CRASH_COST))
            search.tell(asked, cost, save=False)
            best = search.intensifier.get_incumbent()
            race.name(best and plain(best))

    with tempfile.TemporaryDirectory() as folder:
        scenario = package.Scenario(
            space, seed=race.seed, n_trials=trials, output_directory=Path(folder), **lengths
        )
        search = getattr(package, facade)(scenario, logging_level=False)
        race.work(work)


# ------------------------------------------------------------------ no search


@dataclass(frozen=True, kw_only=True)
class Unsearched(Task):
    """A task trained by an optimizer that needs no search.

    Of a cycle only its seed and its steps count; the recipe is looked at by nobody. Runs that
    diverge are seen as in any other cycle.

    Attributes:
        start: (task, model, steps) → the optimizer, and what to call after each of its steps.
    """

    start: Callable[[Task, nn.Module, int], tuple[Optimizer, Callable[[], None]]]

    def _fit(self, cycle: hpsched.Cycle, look: Any = None) -> nn.Module:
        model = self._new_model(cycle)
        optimizer, after_step = self.start(self, model, cycle.total_steps)
        stand_in = torch.optim.SGD([torch.zeros(1)], cycle.max_lr, momentum=cycle.max_momentum)
        self._run(cycle, model, optimizer, cycle.schedule(stand_in), lambda _: after_step())
        if hasattr(optimizer, "eval"):
            self._average(model, optimizer)
        return model

    @torch.no_grad()
    def _average(self, model: nn.Module, optimizer: Any) -> None:
        """Go to schedule-free's averaged weights; batch norm's statistics as its README says."""
        optimizer.eval()
        data = self.data()
        if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
            for rows in itertools.islice(_Rows(len(data.x), self.batch_size), 50):
                model(data.x[rows])


def unsearched(
    race: Race, start: Callable[[Task, nn.Module, int], tuple[Optimizer, Callable[[], None]]]
) -> None:
    """One full run; from then on the race's task is trained by that optimizer."""
    _alone(race)
    own = {field.name: getattr(race.task, field.name) for field in fields(race.task)}
    race.task = Unsearched(**own, start=start)
    recipe = default(race.task)

    def work() -> None:
        race.train(recipe)
        race.name(recipe)

    race.work(work)


def prodigy(task: Task, model: nn.Module, steps: int) -> tuple[Optimizer, Callable[[], None]]:
    """Prodigy (2306.06101) with its defaults and cosine annealing, as its README advises."""
    optimizer = _package("prodigyopt").Prodigy(model.parameters())
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps).step


def schedule_free(task: Task, model: nn.Module, steps: int) -> tuple[Optimizer, Callable[[], None]]:
    """Schedule-free SGD or AdamW (2405.15682), as the task's own is, with its defaults."""
    adam = task.optimizer in ("adam", "adamw")
    package = _package("schedulefree")
    optimizer = (package.AdamWScheduleFree if adam else package.SGDScheduleFree)(model.parameters())
    optimizer.train()
    return optimizer, lambda: None


PEERS: dict[str, Method] = {
    "neps-priorband": neps_priorband,
    "smac-expert": partial(smac, facade="HyperparameterOptimizationFacade"),
    "smac-hyperband-expert": partial(smac, facade="MultiFidelityFacade", min_share=1 / CHECKPOINTS),
    "prodigy": partial(unsearched, start=prodigy),
    "schedule-free": partial(unsearched, start=schedule_free),
}
#: The distribution each peer needs: its version belongs into its rows.
PACKAGES = {
    "neps-priorband": "neural-pipeline-search",
    "smac-expert": "smac",
    "smac-hyperband-expert": "smac",
    "prodigy": "prodigyopt",
    "schedule-free": "schedulefree",
}
