"""The sampler as a package of the OptunaHub registry, loaded by OptunaHub's own functions."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import optuna
import optunahub
import pytest
import yaml
from fake_training import FakeTraining

import hpsched

ROOT = Path(__file__).parents[2]
REGISTRY = ROOT / "studies/optunahub/package"
NAME = "samplers/hpsched_onecycle"
README = (REGISTRY / NAME / "README.md").read_text()


def official_tests() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "hub_tests", REGISTRY / NAME / "tests/test_sampler.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
class TestOfficialSuites(official_tests().TestOneCycleSampler):
    """What the package's own tests run."""


def test_the_layout_is_the_registrys() -> None:
    files = {str(p.relative_to(REGISTRY / NAME)) for p in (REGISTRY / NAME).rglob("*.*")}
    assert {"README.md", "__init__.py", "example.py", "requirements.txt"} <= files
    assert (REGISTRY / NAME / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (REGISTRY / NAME / "requirements.txt").read_text() == "hpsched\n"


def test_the_front_matter_has_what_the_registry_asks_for() -> None:
    _, front, _ = README.split("---\n", 2)
    matter = yaml.safe_load(front)
    wanted = ["author", "title", "description", "tags", "optuna_versions", "license"]
    assert list(matter) == wanted
    assert "sampler" in matter["tags"]  # the registry's rule for packages under samplers/
    assert matter["license"] == "MIT License"
    assert str(optuna.__version__) in map(str, matter["optuna_versions"])
    sections = re.findall(r"^## (.*)", README, re.MULTILINE)
    assert sections[:4] == ["Abstract", "Class or Function Names", "Installation", "Example"]


def test_it_hands_out_hpscheds_own_classes() -> None:
    package = optunahub.load_local_module(NAME, registry_root=str(REGISTRY))
    assert all(getattr(package, name) is getattr(hpsched, name) for name in package.__all__)
    for name in package.__all__:
        assert f"`{name}(" in README


def test_the_example_is_the_readmes() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert (REGISTRY / NAME / "example.py").read_text() == code


@pytest.mark.slow
def test_the_example_runs_from_where_optunahub_keeps_its_downloads(tmp_path: Path) -> None:
    kept = tmp_path / "github.com/optuna/optunahub-registry/main/package"
    shutil.copytree(REGISTRY, kept)
    done = subprocess.run(
        [sys.executable, str(REGISTRY / NAME / "example.py")],
        cwd=tmp_path, env={**os.environ, "OPTUNAHUB_CACHE_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.fullmatch(r"\{.*'max_lr': .*\} 0\.\d+ \S+ 2\n", done.stdout), done.stdout


def optuna_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = "from optuna.cli import main; raise SystemExit(main())"
    return subprocess.run(
        [sys.executable, "-c", command, *arguments, "--storage", "sqlite:///s.db"],
        cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_optunas_command_reads_our_studies_but_finds_only_its_own_samplers(tmp_path: Path) -> None:
    """As docs/how-to/optuna-tools.md says; when this fails, its advice can become simpler."""
    study = optuna.create_study(
        study_name="s", storage=f"sqlite:///{tmp_path}/s.db", sampler=hpsched.OneCycleSampler()
    )
    study.optimize(
        lambda trial: hpsched.suggest_onecycle(trial, 900, rungs=1).run(FakeTraining()), n_trials=1
    )
    best = optuna_cli("best-trial", "--study-name", "s", "-f", "json", cwd=tmp_path)
    assert json.loads(best.stdout)["params"] == study.best_trial.params
    for name, found in (("RandomSampler", True), ("OneCycleSampler", False)):
        asked = optuna_cli("ask", "--study-name", "s", "--sampler", name, cwd=tmp_path)
        assert (asked.returncode == 0) is found, asked.stderr


def test_the_docs_page_loads_it() -> None:
    page = (ROOT / "docs/how-to/optuna-tools.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names = {"REGISTRY": str(REGISTRY)}
    exec(code, names)
    assert isinstance(names["sampler"], hpsched.OneCycleSampler)
    assert isinstance(names["pruner"], hpsched.CyclePruner)
