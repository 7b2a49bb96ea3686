"""The Hydra recipe of docs/how-to/hydra.md, typed as printed."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.frameworks

PAGE = (Path(__file__).parents[2] / "docs/how-to/hydra.md").read_text()
FILES = dict(re.findall(r"^```\w+ title=(\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^\$ (hpsched .*)", PAGE, re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, body in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(body)
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.endswith("_STORAGE")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=kept, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_an_application_searches_with_overrides(folder: Path) -> None:
    said = run(folder, "search.py", "trials=5", "widths=[64]", "recipe.div_factor=30")
    params = ast.literal_eval(said.splitlines()[-1])  # Hydra logs to stdout
    assert params["width"] == 64
    assert params["div_factor"] == 30
    assert 1e-4 <= params["max_lr"] <= 10


def test_the_service_runs_the_composed_objective(folder: Path) -> None:
    assert len(COMMANDS) == 2
    for command in COMMANDS:
        run(folder, "-m", *shlex.split(command))
    said = run(folder, "-m", "hpsched", "study", "best", "digits", "--format", "json")
    assert '"width"' in said
