"""Wheel and sdist: what they hold, and that the wheel runs where nothing else of us is."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TRAIN = """
import torch
import hpsched

torch.manual_seed(0)
x = torch.randn(512, 8)
y = x @ torch.randn(8, 1)


def train(cycle):
    torch.manual_seed(cycle.seed)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=cycle.max_lr, momentum=cycle.max_momentum)
    schedule = cycle.schedule(optimizer)
    for _ in range(cycle.total_steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(loss)
    return loss.item()


def objective(trial):
    return hpsched.suggest_onecycle(trial, total_steps=200).run(train)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.suffix: path for path in out.iterdir()}


def test_the_wheel_holds_the_package_and_nothing_else(built: dict[str, Path]) -> None:
    names = set(zipfile.ZipFile(built[".whl"]).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hpsched"}
    assert {"hpsched/py.typed", "hpsched/_demo/digits.py"} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hpsched").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules | {"hpsched/_demo/digits.py"}


def test_the_sdist_holds_what_the_wheel_is_built_from(built: dict[str, Path]) -> None:
    """The wheel was built from it; tests, figures and recorded data stay in the repository."""
    with tarfile.open(built[".gz"]) as archive:
        files = {m.name.partition("/")[2]: m.size for m in archive.getmembers() if m.isfile()}
    beside = {name for name in files if not name.startswith("hpsched/")}
    assert beside - {".gitignore"} == {
        *("PKG-INFO", "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"),
        "studies/digits.py",
    }
    assert sum(files.values()) < 2_000_000


@pytest.fixture(scope="module")
def empty(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone, and this one's packages (torch is large) behind it."""
    made = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", str(made)], check=True)
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", str(built[".whl"])]
    subprocess.run([str(made / "bin/python"), *install], check=True)
    (packages,) = made.glob("lib/python*/site-packages")
    # Searched last; .pth files there (our editable install) are not read.
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made


def run(empty: Path, *arguments: str, cwd: Path) -> str:
    dropped = ("PYTHONPATH", "HPSCHED_STORAGE", "OPTUNA_STORAGE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    command = [str(empty / "bin" / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_wheel_imports_from_where_it_was_installed(empty: Path, tmp_path: Path) -> None:
    where = run(empty, "python", "-c", "import hpsched; print(hpsched.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(empty)
    assert run(empty, "hpsched", "--version", cwd=tmp_path).startswith("hpsched ")
    assert "hpsched " in run(empty, "hpsched", "doctor", cwd=tmp_path)


def test_the_wheel_runs_a_study_from_range_test_to_report(empty: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    create = ["study", "create", "s", "--objective", "train:objective", "--trials", "4"]
    run(empty, "hpsched", *create, cwd=tmp_path)
    run(empty, "hpsched", "worker", "attach", "s", cwd=tmp_path)
    best = run(empty, "hpsched", "study", "best", "s", "--format", "torch", cwd=tmp_path)
    assert "OneCycleLR(" in best
    run(empty, "hpsched", "study", "report", "s", "-o", "report.html", cwd=tmp_path)
    assert "plotly" in (tmp_path / "report.html").read_text()
