"""``hpsched compare`` as a user calls it: real searches, real training, a database in a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

import hpsched
from hpsched import compare, comparison
from hpsched.errors import StudyExistsError
from hpsched.summary import summarise

LINE = '''
"""The coefficients of a line, 90 steps a full cycle."""
import os
import time

import torch

import hpsched

torch.set_num_threads(1)


def train(cycle):
    torch.manual_seed(cycle.seed)
    x = torch.randn(256, 8)
    y = x @ torch.linspace(-1, 1, 8)[:, None] + 0.3 * torch.randn(256, 1)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=cycle.max_lr, momentum=cycle.max_momentum,
                                weight_decay=cycle.weight_decay)
    schedule = cycle.schedule(optimizer)
    for rows in cycle.batches(torch.arange(256).split(32)):
        loss = (model(x[rows]) - y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(loss)
        time.sleep(float(os.environ.get("SLOWLY", "0")))
    return (model.weight - torch.linspace(-1, 1, 8)).square().sum().item()


def objective(trial):
    return hpsched.suggest_onecycle(trial, total_steps=90).run(train)
'''
CALL = ("compare", "line", "-o", "line.py:objective", "--schedules", "step", "--cycles", "2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "line.py").write_text(LINE)
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from hpsched.cli import main; main()", *arguments]


def environment(**more: str) -> dict[str, str]:
    root = str(Path(hpsched.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **more}


def compared(folder: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        command(*CALL, *arguments, "-f", "json"),
        cwd=folder, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def interrupted(folder: Path) -> None:
    """The call, ended by SIGTERM in its first complete cycle."""
    slowly = environment(SLOWLY="0.02")
    process = subprocess.Popen(command(*CALL), cwd=folder, env=slowly, stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:
        if b"rung" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"Repeat the call to go on" in said


def trials(folder: Path) -> dict[str, int]:
    storage = f"sqlite:///{folder}/hpsched.db"
    names = optuna.get_all_study_names(storage)
    return {n: len(optuna.load_study(study_name=n, storage=storage).trials) for n in names}


def test_a_comparison_interrupted_finished_and_made_surer(folder: Path) -> None:
    interrupted(folder)
    found = compared(folder, "--seeds", "3")
    ours, other = found["arms"]
    assert (ours["schedule"], other["schedule"]) == ("one_cycle", "multi_factor")
    assert list(ours["scores"]) == list(other["scores"])
    assert len(ours["scores"]) == 3
    for arm in (ours, other):  # its budget, at most the trial in hand more, and the fresh seeds
        assert 2 + 3 - 1 <= arm["cost"] <= 2 + 1.5 + 3
        assert arm["recipe"]["max_lr"] > 0
    assert other["recipe"]["max_momentum"] == other["recipe"]["base_momentum"] == 0.9
    (difference,) = found["differences"]
    gains = [other["scores"][seed] - ours["scores"][seed] for seed in ours["scores"]]
    assert difference["gain"] == pytest.approx(sum(gains) / 3)
    assert difference["verdict"] in ("better", "worse", "not decided")

    before = trials(folder)
    more = compared(folder, "--seeds", "4")
    assert trials(folder) == {name: count + 1 for name, count in before.items()}
    for was, arm in zip(found["arms"], more["arms"], strict=True):
        assert arm["trial"] == was["trial"], "more seeds do not change which recipe is compared"
        assert arm["scores"].items() > was["scores"].items()
    assert_page_says(folder, more)


def assert_page_says(folder: Path, found: dict[str, Any]) -> None:
    """The page of the studies has the means, the test and the verdict that the call printed."""
    storage = f"sqlite:///{folder}/hpsched.db"
    studies = [optuna.load_study(study_name=a["study"], storage=storage) for a in found["arms"]]
    page = comparison.compare([summarise(study) for study in studies])
    means = [summary.best.mean for summary in page.studies if summary.best]
    assert means == pytest.approx([arm["mean"] for arm in found["arms"]])
    (pair,), (difference,) = page.pairs, found["differences"]
    assert pair.paired
    assert (pair.difference, pair.p) == pytest.approx((abs(difference["gain"]), difference["p"]))
    assert not any("same seeds" in warning for warning in page.warnings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, r"'line-one_cycle' exists with seed=0, and 5 was asked for"),
        ({"cycles": 3.0}, "cycles=2.0, and 3.0 was asked for"),
        ({"direction": "maximize"}, "direction='minimize', and 'maximize' was"),
        ({"objective": "other.py:objective"}, "objective='line.py:objective', and"),
    ],
)
def test_other_options_for_the_same_name_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {
        "objective": "line.py:objective", "cycles": 2.0, "storage": f"sqlite:///{tmp_path}/a.db"
    }  # fmt: skip
    made = compare.open_arms("line", ["step"], **options)
    assert [arm.study_name for arm in made.values()] == ["line-one_cycle", "line-multi_factor"]
    with pytest.raises(StudyExistsError, match=message):
        compare.open_arms("line", ["step"], **(options | change))


def test_seeds_wait_for_the_search(tmp_path: Path) -> None:
    """While a trial runs, here or elsewhere, the recipe to compare is not settled."""
    options: dict[str, Any] = {"storage": f"sqlite:///{tmp_path}/a.db", "cycles": 2.0}
    study = compare.open_arms("line", ["step"], objective="line.py:objective", **options)[
        "one_cycle"
    ]
    assert compare.queue_seeds(study, 3) == 0  # nothing has run
    trial = study.ask()
    study.tell(trial, _ran(trial))
    running = study.ask()
    assert compare.queue_seeds(study, 3) == 0
    study.tell(running, _ran(running))
    assert compare.queue_seeds(study, 3) == 3
    assert compare.queue_seeds(study, 3) == 0  # they wait


def _ran(trial: optuna.Trial) -> float:
    recipe = hpsched.suggest_onecycle(trial, 90, rungs=1, range_test=False)
    return float(recipe.to_dict()["max_lr"])
