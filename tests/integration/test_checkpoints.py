"""A worker that is told to end lets its trial reach a checkpoint; the next goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from optuna.trial import TrialState

import hpsched
from tests.fleet import environment

TRAIN = """
import os, time
from pathlib import Path
import torch
import hpsched

x = torch.arange(64.0).reshape(64, 1) / 64
data = torch.utils.data.TensorDataset(x, 3 * x + 1)
loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)


def train(cycle):
    torch.manual_seed(cycle.seed)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=cycle.max_lr, momentum=0.9)
    schedule = cycle.schedule(optimizer)
    cycle.restore(model=model, optimizer=optimizer)
    for inputs, targets in cycle.batches(loader):
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        schedule.step(loss)
        with Path("steps.txt").open("a") as file:
            file.write(f"{cycle.kind}{cycle.rung} {schedule.step_count}\\n")
        if cycle.rung == 2:
            time.sleep(float(os.environ.get("PACE", "0")))
        cycle.checkpoint(model=model, optimizer=optimizer)
    return torch.nn.functional.mse_loss(model(x), 3 * x + 1).item()


def objective(trial):
    recipe = hpsched.suggest_onecycle(trial, total_steps=180, min_steps=20, max_lr=(0.01, 0.1))
    return recipe.run(train)
"""


def attach(folder: Path, **env: str) -> subprocess.Popen[str]:
    (folder / "shared").mkdir(exist_ok=True)
    options = ["--checkpoints", "shared", "--grace", "30s"]
    return subprocess.Popen(
        [sys.executable, "-m", "hpsched", "worker", "attach", "s", *options],
        cwd=folder,
        env=environment(HPSCHED_CHECKPOINT_SECONDS="1000", **env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def create(folder: Path) -> None:
    (folder / "train.py").write_text(TRAIN)
    url = f"sqlite:///{folder / 'hpsched.db'}"
    hpsched.create_study(
        "s", objective="train.py:objective", storage=url, trials=1, seed=1, confirm_top=0
    )


def steps(folder: Path) -> list[str]:
    path = folder / "steps.txt"
    return path.read_text().splitlines() if path.exists() else []


def value(folder: Path) -> float:
    study = hpsched.open_study("s", f"sqlite:///{folder / 'hpsched.db'}")
    (trial,) = study.trials
    assert trial.state == TrialState.COMPLETE
    assert trial.value is not None
    return trial.value


@pytest.mark.parametrize("whole_group", [False, True], ids=["worker", "its group"])
def test_a_cycle_goes_on_where_it_was_interrupted(tmp_path: Path, whole_group: bool) -> None:
    folders = [tmp_path / name for name in ("once", "twice")]
    for folder in folders:
        folder.mkdir()
        create(folder)
    once, twice = folders
    assert attach(once).wait(60) == 0
    worker = attach(twice, PACE="0.05")
    while "rung2 40" not in steps(twice):
        assert worker.poll() is None
    os.kill(worker.pid, signal.SIGTERM)
    if whole_group:  # as schedulers do: the same signal once more
        os.kill(worker.pid, signal.SIGTERM)
    said, _ = worker.communicate(timeout=30)
    assert worker.returncode == 143, said
    assert "back in the queue" in said
    assert len(list((twice / "shared").iterdir())) == 1
    assert attach(twice).wait(60) == 0
    assert Counter(steps(twice)) == Counter(steps(once))  # none again, none left out
    assert value(twice) == value(once)
    assert not list((twice / "shared").iterdir())
