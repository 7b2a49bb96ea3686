"""Every page of the docs is followed to the letter, in a folder of a stranger's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from documented import CHECKED, DOCS, ROOT, RUN, SHOWN, blocks, environment, has_code, parse

PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
SHELL = [(page, block) for page in PAGES for block in blocks(page) if block.kind == "sh"]
FRAMEWORKS = DOCS / "how-to" / "frameworks"
ELSEWHERE = "".join(
    path.read_text()
    for folder in ("frameworks", "unit")
    for path in (ROOT / "tests" / folder).glob("*.py")
)
QUICK = {"quickstart", "how-to/frameworks/pytorch"}
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def name(page: Path) -> str:
    return str(page.relative_to(DOCS).with_suffix(""))


def runnable() -> Iterator[Any]:
    for page in filter(has_code, PAGES):
        mark = pytest.mark.frameworks if page.parent == FRAMEWORKS else pytest.mark.slow
        if not run_elsewhere(page):
            yield pytest.param(page, id=name(page), marks=[] if name(page) in QUICK else [mark])


def run_elsewhere(page: Path) -> bool:
    """Whether a test of what the page is about runs it: it names the page."""
    return f"docs/{name(page)}.md" in ELSEWHERE


@pytest.mark.parametrize("page", list(runnable()))
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "documented.py"), str(page)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=290,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr


def test_a_broken_page_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    fence = "```"
    page.write_text(f"{fence}python\nx = 1\n{fence}\n\n{fence}python\nassert x == 2\n{fence}\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "documented.py"), str(page)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"{page}:5: this block fails" in done.stderr
    page.write_text(f"{fence}console\n$ hpsched study status missing\n{fence}\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "documented.py"), str(page)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "hpsched study status missing: exit" in done.stderr


def test_pages_run_elsewhere_are_those_of_other_packages() -> None:
    found = {name(page) for page in PAGES if has_code(page) and run_elsewhere(page)}
    assert {"how-to/frameworks/keras", "how-to/trackers"} <= found
    assert not found & (QUICK | {"how-to/range-test", "how-to/budget", "how-to/moving-from-optuna"})


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is(page: Path) -> None:
    unknown = [b for b in blocks(page) if b.kind not in RUN | CHECKED | SHOWN]
    assert unknown == []


# -- what cannot run here --------------------------------------------------------------------------


def calls(script: str) -> list[list[str]]:
    """The hpsched commands in a shell script, wherever they stand in a pipe."""
    lines = script.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r"\||&&|;|\$\(|\)", line.split("  #")[0])]
    words = [shlex.split(part, comments=True) for part in parts if "hpsched " in part]
    found = [w[w.index("hpsched") + 1 :] for w in words if "hpsched" in w]
    return [w for w in found if w and w[0] in {"demo", "doctor", "study", "worker", "dashboard"}]


@pytest.mark.parametrize(
    ("page", "block"), SHELL, ids=[f"{name(page)}:{block.line}" for page, block in SHELL]
)
def test_shell_blocks_are_right_as_far_as_tools_can_tell(
    page: Path, block: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HPSCHED_STORAGE", raising=False)
    syntax = subprocess.run(["bash", "-n"], input=block.body, capture_output=True, text=True)
    assert syntax.returncode == 0, syntax.stderr
    # SC2148: no shebang. SC2164: a cd that may fail, typed by hand.
    lint = subprocess.run(
        [SHELLCHECK, "--shell=bash", "--exclude=SC2148,SC2164", "-"],
        input=block.body, capture_output=True, text=True,
    )  # fmt: skip
    assert lint.returncode == 0, lint.stdout
    for call in calls(block.body):
        parse(call)


def test_wrong_calls_are_noticed() -> None:
    assert calls("a && hpsched study list | hpsched worker list x  # hpsched study no") == [
        ["study", "list"],
        ["worker", "list", "x"],
    ]
    with pytest.raises(Exception, match="--cycle"):
        parse(["study", "create", "x", "--objective", "train:objective", "--cycle", "3"])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_yaml_blocks_parse(page: Path) -> None:
    for block in blocks(page):
        if block.kind == "yaml":
            assert list(yaml.safe_load_all(block.body))
