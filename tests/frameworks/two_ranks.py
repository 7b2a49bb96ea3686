"""Run by ``torch.distributed.run`` in test_two_ranks: a sweep, a rung and a study."""

from __future__ import annotations

import importlib
import json
import sys
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import torch.distributed as dist
from framework_runs import expected, make_cycle, recorded, search

from hpsched.cycle import Cycle, execute
from hpsched.integrations.distributed import on_all_ranks


def run_of(framework: str) -> Any:
    module = importlib.import_module(f"frameworks.test_{framework}")
    if framework == "lightning":
        return lambda cycle: module.fit(cycle, strategy="ddp", devices=2)
    if framework == "transformers":
        return lambda cycle: module.trainer_of(cycle, ddp_backend="gloo").train()
    return module.run


def two_runs(run: Any) -> list[Any]:
    found = []
    for kind, max_lr, steps in (("range_test", 1e6, 200), ("rung", 0.1, 20)):
        cycle = make_cycle(steps, kind, max_lr)  # type: ignore[arg-type]
        with recorded() as used:
            outcome = execute(cycle, lambda cycle: run(cycle) and 0.0)
        assert used == expected(cycle)[: len(used)]
        found.append([len(used), outcome.steps, cycle.stopped, cycle.losses()])
    return found


def study_of(run: Any) -> list[Any]:
    """States and values; None on rank 1, which knows no study."""

    @on_all_ranks
    def train(cycle: Cycle) -> float:
        seen.append(cycle.name)
        run(cycle)
        return fmean(cycle.losses()[-10:])

    seen: list[str] = []
    study = train.lead(lambda: search(train, n_trials=4, total_steps=60))
    trials = study and [[trial.state.name, trial.value] for trial in study.trials]
    return [[name.split("-trial")[1] for name in seen], trials]


def main(framework: str, folder: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    run = run_of(framework)
    found = [two_runs(run), study_of(run)]
    Path(folder, str(dist.get_rank())).write_text(json.dumps(found))
    assert dist.get_world_size() == 2
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
