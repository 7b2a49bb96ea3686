"""What pyproject.toml, constraints.txt, CHANGELOG.md and the committed files promise together."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:work|root|opt/(?:wheels|pypi)|tmp/explore)(?![\w-])")
REGISTRY = re.compile(
    r"(?:--(?:extra-)?index-url|--find-links)[ =]"
    r"|(?:test\.|upload\.)?pypi\.org/simple|files\.pythonhosted[.]org|download\.pytorch[.]org"
    r"|registry\.npmjs[.]org|deb\.debian[.]org|file:///[o]pt"
)


def requirements() -> dict[str, Requirement]:
    """Every requirement of the package and its extras, by name."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return {(parsed := Requirement(line)).name: parsed for line in chain(*groups)}


def constraints() -> dict[str, SpecifierSet]:
    """The pins of constraints.txt, by name."""
    text = (ROOT / "constraints.txt").read_text()
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {(parsed := Requirement(line)).name: parsed.specifier for line in lines if line}


def committed_files() -> list[Path]:
    """Files git tracks or would track, or, outside a checkout, all that were unpacked."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    """``file:line: text`` of each match in the committed text files."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in committed_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("torch", "2.6.0", "2.5.1"),
        ("optuna", "5.0.0", "4.6.0"),
        ("optuna", "5.9.1", "6.0.0"),
        ("numpy", "1.26.0", "1.25.2"),
        ("sqlalchemy", "2.0.0", "1.4.54"),
        ("plotly", "6.0.0", "5.24.1"),
        ("psycopg", "3.2.0", "3.1.20"),
        ("optuna-dashboard", "0.21.0", "0.20.0"),
    ],
)
def test_declared_ranges(name: str, inside: str, outside: str) -> None:
    specifier = requirements()[name].specifier
    assert inside in specifier
    assert outside not in specifier


def test_every_requirement_has_a_lower_bound() -> None:
    unbounded = [str(r) for r in requirements().values() if ">=" not in str(r.specifier)]
    assert unbounded == []


def test_python_range() -> None:
    python = SpecifierSet(PROJECT["requires-python"])
    assert "3.11.0" in python
    assert "3.10.14" not in python


def test_torch_is_pinned() -> None:
    assert str(constraints()["torch"]) == "==2.13.0"


def test_pins_are_exact_and_within_the_declared_ranges() -> None:
    for name, pin in constraints().items():
        (exact,) = pin
        assert exact.operator == "=="
        assert exact.version in requirements()[name].specifier, name


def test_extras() -> None:
    assert set(PROJECT["optional-dependencies"]) == {
        *("postgres", "mysql", "dashboard", "images", "demo", "ray", "docs", "dev"),
        *("lightning", "transformers", "accelerate", "keras", "fastai", "ignite"),
        *("tensorboard", "mlflow", "wandb"),
    }


def test_console_script() -> None:
    assert PROJECT["scripts"] == {"hpsched": "hpsched.cli:main"}


def test_installed_version_is_the_declared_one() -> None:
    assert version("hpsched") == PROJECT["version"]


def test_changelog_opens_with_this_version() -> None:
    first = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == PROJECT["version"]


def imported_packages() -> set[str]:
    """Top-level names that hpsched's modules import, less the standard library's."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "hpsched").rglob("*.py"))
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"hpsched"}


def test_every_import_is_declared() -> None:
    declared = {name.replace("-", "_") for name in requirements()}
    distributions = {"yaml": "pyyaml", "sklearn": "scikit_learn", "mlflow": "mlflow_skinny"}
    distributions |= {"ignite": "pytorch_ignite"}
    others = {"_typeshed", "pytorch_lightning"}  # type checkers' own; lightning by its older name
    imported = {distributions.get(name, name) for name in imported_packages() - others}
    assert imported - declared == set()


def imports(statement: str) -> dict[str, int]:
    """Top-level module → microseconds that ``statement`` takes in it, in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, int] = {}
    for line in done.stderr.splitlines():
        own, _, name = line.removeprefix("import time:").split("|")
        if own.strip().isdigit():
            top = name.strip().partition(".")[0]
            found[top] = found.get(top, 0) + int(own)
    return found


HEAVY = {"torch", "plotly", "typer", "rich", "sklearn", "flask", "scipy", "pandas", "optuna"}
FRAMEWORKS = {
    *("accelerate", "fastai", "ignite", "keras", "lightning", "mlflow", "pytorch_lightning"),
    *("ray", "tensorboard", "transformers", "wandb"),
}


def test_import_is_light() -> None:
    found = imports("import hpsched")
    assert "hpsched" in found
    assert set(found) & (HEAVY | FRAMEWORKS) == set()


def test_a_search_imports_no_page_no_command_line_and_no_framework() -> None:
    found = imports("import hpsched; hpsched.OneCycleSampler, hpsched.suggest_onecycle")
    assert "optuna" in found
    assert set(found) & (FRAMEWORKS | {"plotly", "typer", "flask", "sklearn", "torch"}) == set()


INTEGRATIONS = [path.stem for path in (ROOT / "hpsched/integrations").glob("[!_]*.py")]


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_an_integration_without_its_framework_says_what_to_install(name: str) -> None:
    """At its import, or (those that import nothing then) when it is used: they test that."""
    block = f"import sys; sys.modules.update(dict.fromkeys({sorted(FRAMEWORKS)}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{block}; import hpsched.integrations.{name}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        assert re.search(r"pip install 'hpsched\[\w+\]'", done.stderr), done.stderr


def test_integrations_have_an_extra_each() -> None:
    assert set(INTEGRATIONS) - set(PROJECT["optional-dependencies"]) <= {"distributed"}


@pytest.mark.parametrize(
    "line", ["cd /" + "work/main", '"/' + 'root"', "/" + "opt/wheels", "x=/" + "tmp/explore/a"]
)
def test_machine_paths_are_recognised(line: str) -> None:
    assert MACHINE_PATH.search(line)


@pytest.mark.parametrize(
    "line",
    ["a/" + "work", "hpsched/" + "worker.py", "/" + "workers", "./" + "root/x", "/" + "tmp/a"],
)
def test_other_paths_are_let_through(line: str) -> None:
    assert not MACHINE_PATH.search(line)


def test_no_machine_paths() -> None:
    assert lines_matching(MACHINE_PATH) == []


def test_no_registry_addresses() -> None:
    assert lines_matching(REGISTRY) == []
