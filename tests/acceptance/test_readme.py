"""Everything the README tells people to type is typed here, in a folder of a stranger's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented import README, ROOT, blocks, commands, environment, type_command, write_files

BLOCKS = blocks(README)
#: What the last block takes as given.
MODEL = """
import torch, torch.nn.functional as F, optuna, hpsched
from train import loader
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
"""


def typed() -> list[str]:
    return [line for block in BLOCKS if block.kind == "console" for line in commands(block)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stranger")
    write_files(README, made)
    return made


def test_the_three_file_example_runs_as_printed(folder: Path) -> None:
    given = [command for command in typed() if command.startswith("hpsched ")]
    assert [command.split()[1] for command in given] == [
        "study", "worker", "study", "study", "study", "compare", "lr-find",
    ]  # fmt: skip
    said = [type_command(command, folder) for command in given]
    assert "OneCycleLR(" in said[3]
    assert "fresh seeds" in said[2]
    assert (folder / "report.html").stat().st_size > 1_000_000
    assert (folder / "lr.html").exists()


TAKES_A_BATCH_SIZE = """
import torch

def train(cycle, batch_size):
    file.loader = torch.utils.data.DataLoader(file.loader.dataset, batch_size, shuffle=True)
    return file.train(cycle)
"""


def test_the_python_examples_run_as_printed(folder: Path) -> None:
    bodies = [b.body for b in BLOCKS if b.kind == "python" and not b.title]
    assert len(bodies) == 3
    plain, context, tools = bodies
    script = "\n".join(
        [plain, "import hpsched", "import train as file", TAKES_A_BATCH_SIZE, context,
         "study = optuna.create_study(sampler=hpsched.OneCycleSampler())",
         "study.optimize(objective, n_trials=2)", MODEL, tools]
    )  # fmt: skip
    (folder / "pasted.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "pasted.py"],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, *_ = done.stdout.splitlines()
    assert "max_lr" in first


@pytest.mark.parametrize("target", [c for c in typed() if c.startswith("make ")])
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(
        ["make", "-n", target.split()[1]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    missing = [to for to in links if not to.startswith("http") and not (ROOT / to).exists()]
    assert missing == []
