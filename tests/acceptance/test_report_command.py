"""``hpsched study report``: one study or several, a page or Markdown, in a file or on stdout."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import report_studies
from test_cli import ok, refused, run

from hpsched.storage import open_storage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database of three studies: confirmed, not finished, and empty."""
    folder = tmp_path_factory.mktemp("reports")
    storage = open_storage(f"sqlite:///{folder}/hpsched.db", create=True)
    for name, made in (("a", report_studies.confirmed()), ("b", report_studies.mixed())):
        study = optuna.create_study(study_name=name, storage=storage)
        study.add_trials([run.trial for run in made.runs if run.trial.state.is_finished()])
    optuna.create_study(study_name="c d", storage=storage)
    return folder


def test_the_suffix_chooses_the_kind(folder: Path) -> None:
    assert ok("study", "report", "a", "-o", "r.md", cwd=folder) == "r.md\n"
    assert (folder / "r.md").read_text(encoding="utf-8").startswith("# hpsched report: a\n\n**The")
    assert ok("study", "report", "a", cwd=folder) == "report.html\n"
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_markdown_goes_to_stdout_alone(folder: Path) -> None:
    said = ok("study", "report", "b", "-o", "-", cwd=folder)
    assert said.startswith("# hpsched report: b\n") and said.endswith(".\n")
    assert ok("study", "report", "b", "-o", "-", "-f", "html", cwd=folder).startswith("<!doctype")


def test_several_studies_are_compared(folder: Path) -> None:
    assert ok("study", "report", "a", "b", "c d", "-o", "x.html", cwd=folder) == "x.html\n"
    page = (folder / "x.html").read_text(encoding="utf-8")
    assert "hpsched comparison: a, b, c d" in page
    said = ok("study", "report", "a", "b", "c d", "-o", "-", cwd=folder)
    assert "Nothing is certain yet: b, c d ran no recipe on fresh seeds." in said
    assert "c d has not finished a full cycle yet." in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "nope"], ["'nope'", "there are: a, b, c d"]),
        (["a", "a"], ["'a' is named twice"]),
        (["a", "-f", "pdf"], ["'pdf'", "html or md"]),
        (["a", "-o", "none/r.md"], ["'none/r.md'", "folder that exists"]),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, arguments: list[str], words: list[str]) -> None:
    refused(run("study", "report", *arguments, cwd=folder), 2, *words)
