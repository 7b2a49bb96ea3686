"""Everything the README tells people to type is typed here, in a folder of a stranger's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
#: What the last block takes as given.
MODEL = """
import torch, torch.nn.functional as F, optuna, hpsched
from train import loader
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
"""


def commands() -> list[str]:
    text = "".join(body for kind, _, body in BLOCKS if kind == "console")
    return [line.removeprefix("$ ").split("  #")[0] for line in text.splitlines()]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.endswith("_STORAGE")}
    return {**kept, "TQDM_DISABLE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stranger")
    for _, title, body in BLOCKS:
        if title:
            (made / title).write_text(body)
    return made


def test_the_three_file_example_runs_as_printed(folder: Path) -> None:
    typed = [command for command in commands() if command.startswith("hpsched ")]
    assert [command.split()[1] for command in typed] == [
        "study", "worker", "study", "study", "study", "lr-find",
    ]  # fmt: skip
    said = []
    for command in typed:
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)],
            cwd=folder, env=environment(), capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        said.append(done.stdout)
    assert "OneCycleLR(" in said[3]
    assert "fresh seeds" in said[2]
    assert (folder / "report.html").stat().st_size > 1_000_000
    assert (folder / "lr.html").exists()


def test_the_python_examples_run_as_printed(folder: Path) -> None:
    bodies = [body for kind, title, body in BLOCKS if kind == "python" and not title]
    assert len(bodies) == 3
    plain, context, tools = bodies
    script = "\n".join(
        [plain, "import hpsched", "from train import train", context,
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


@pytest.mark.parametrize("target", [c for c in commands() if c.startswith("make ")])
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(
        ["make", "-n", target.split()[1]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [to for to in links if not to.startswith("http") and not (ROOT / to).exists()]
    assert missing == []
