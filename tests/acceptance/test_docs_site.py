"""The site is built as CI builds it, and its pages are read as a browser reads them."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlparse

import pytest
import typer
from documented import DOCS, ROOT

import hpsched
from hpsched import errors, figures, schedules
from hpsched.cli import app
from hpsched.records import SETTINGS, Settings

VARIABLE = re.compile(r"\bHPSCHED_[A-Z][A-Z_]*[A-Z]\b")


class Page(HTMLParser):
    """What one page links, loads, and can be linked at; and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.words: list[str] = []
        self.feed(path.read_text())
        self.text = "".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("index", "search", "next", "prev"):
            self.loads.append(given["href"])
        elif tag in ("script", "img", "iframe", "source", "video") and "src" in given:
            self.loads.append(given["src"])

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-d",
         str(made / "doctrees"), str(DOCS), str(made / "html")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return made / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


@pytest.fixture(scope="module")
def written(pages: dict[Path, Page], site: Path) -> dict[str, Page]:
    names = {p.relative_to(DOCS).with_suffix("") for p in DOCS.rglob("*.md")}
    return {str(name): pages[site / f"{name}.html"] for name in names if "_build" not in name.parts}


def target(page: Page, link: str) -> tuple[Path, str]:
    path, fragment = urldefrag(link)
    return (page.path.parent / unquote(path)).resolve() if path else page.path, unquote(fragment)


def is_elsewhere(link: str) -> bool:
    return bool(urlparse(link).scheme or urlparse(link).netloc) and not link.startswith("data:")


def test_links_lead_somewhere(pages: dict[Path, Page]) -> None:
    dead = []
    for page in pages.values():
        for link in filter(lambda link: not is_elsewhere(link), page.links):
            path, fragment = target(page, link)
            anchors = pages[path].anchors if path in pages else set()
            if not path.is_file() or (fragment and path in pages and fragment not in anchors):
                dead.append((page.path.name, link))
    assert dead == []


def test_links_elsewhere_are_https(pages: dict[Path, Page]) -> None:
    found = {link for page in pages.values() for link in page.links if is_elsewhere(link)}
    assert found
    assert [link for link in found if not link.startswith("https://")] == []


def test_pages_load_nothing_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for page in pages.values():
        assert [link for link in page.loads if is_elsewhere(link)] == [], page.path
        missing = [link for link in page.loads if not target(page, link.split("?")[0])[0].is_file()]
        assert missing == [], page.path
    styles = [path.read_text() for path in site.rglob("*.css")]
    assert styles
    for style in styles:
        assert re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]*\)|@import[^;]*//", style) == []


def test_every_page_is_reached_from_the_index(site: Path, pages: dict[Path, Page]) -> None:
    reached, waiting = set(), [site / "index.html"]
    while waiting:
        path = waiting.pop()
        if path in reached or path not in pages:
            continue
        reached.add(path)
        links = [link for link in pages[path].links if not is_elsewhere(link)]
        waiting += [target(pages[path], link)[0] for link in links]
    made_by_sphinx = {site / name for name in ("search.html", "py-modindex.html")}
    assert set(pages) - reached - made_by_sphinx == set()


# -- nothing is left out ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", hpsched.__all__)
def test_every_public_name_is_documented(name: str, written: dict[str, Page]) -> None:
    anchors = {anchor for page in written.values() for anchor in page.anchors}
    assert {f"hpsched.{name}", f"module-hpsched.{name}"} & anchors


@pytest.mark.parametrize("module", [schedules, figures], ids=lambda module: module.__name__)
def test_every_function_of_a_module_is_documented(module: Any, written: dict[str, Page]) -> None:
    anchors = written[f"reference/{module.__name__.partition('.')[2]}"].anchors
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]  # fmt: skip
    assert len(names) > 5
    assert [name for name in names if f"{module.__name__}.{name}" not in anchors] == []


def error_classes(base: type[BaseException] = errors.HpschedError) -> Iterator[type]:
    yield base
    for below in base.__subclasses__():
        yield from error_classes(below)


def test_every_error_is_documented(written: dict[str, Page]) -> None:
    anchors = written["reference/errors"].anchors
    found = {error for error in error_classes() if error.__module__.startswith("hpsched")}
    assert len(found) > 8
    for error in found:
        assert {f"{error.__module__}.{error.__name__}", f"hpsched.{error.__name__}"} & anchors, (
            error
        )


def all_commands(command: Any, path: tuple[str, ...] = ("hpsched",)) -> Iterator[tuple[str, Any]]:
    yield " ".join(path), command
    for name, below in getattr(command, "commands", {}).items():
        yield from all_commands(below, (*path, name))


def test_every_command_and_option_is_documented(written: dict[str, Page]) -> None:
    page = written["reference/cli"]
    for path, command in all_commands(typer.main.get_command(app)):
        anchor = path.replace(" ", "-")
        assert anchor in page.anchors, path
        section = page.path.read_text().partition(f'id="{anchor}"')[2].partition("<section")[0]
        for param in command.params:
            for option in param.opts if param.param_type_name == "option" else ():
                assert option in section, f"{path} {option}"
        about = " ".join((command.help or "").split()).replace("`", "")
        assert about[:30] in page.text, path


def test_every_environment_variable_is_documented() -> None:
    text = (DOCS / "reference" / "settings.md").read_text()
    files = [*(ROOT / "hpsched").rglob("*.py"), ROOT / "docker" / "Dockerfile"]
    of_an_option = {"HPSCHED_STUDY_CREATE_CYCLES"}  # the example in --help
    used = {name for file in files for name in VARIABLE.findall(file.read_text())}
    assert len(used) > 8
    assert used - of_an_option - {"HPSCHED_WORKER_ATTACH"} == (
        set(VARIABLE.findall(text)) - of_an_option
    )


def test_settings_are_documented_as_they_are_stored(written: dict[str, Page]) -> None:
    text = written["reference/settings"].text
    assert SETTINGS in text
    assert [f.name for f in dataclasses.fields(Settings) if f.name not in text] == []
