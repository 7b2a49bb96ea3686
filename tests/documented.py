"""The code that README and docs print, and how it is run: in order, in a stranger's folder.

``python tests/documented.py PAGE`` runs a page in the working directory and ends with the exit
code of the first block that failed, whose place it names.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import forked

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
#: Run, written to a file (with a title), checked by tools, or only shown.
RUN, CHECKED, SHOWN = {"python", "console"}, {"sh", "yaml"}, {"text", "sql", "dockerfile"}
_FENCE = re.compile(r"^( *)```(\S*)(?: title=(\S+))?\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_DIRECTIVE = re.compile(r"\{.*\}")  # MyST's, e.g. {toctree}: no code
_FILES_FROM = re.compile(r"^<!-- files from (\S+) -->$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: language, the file that it is written to, text, line of the fence."""

    kind: str
    title: str | None
    body: str
    line: int


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of code, in order; those in lists without their indentation."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        indent, kind, title, body = match.groups()
        if not _DIRECTIVE.fullmatch(kind):
            body = re.sub(f"^{indent}", "", body, flags=re.MULTILINE)
            found.append(Block(kind, title, body, text.count("\n", 0, match.start()) + 1))
    return found


def commands(block: Block) -> list[str]:
    """What a console block tells one to type, without prompts and trailing comments."""
    lines = [line for line in block.body.splitlines() if line.startswith("$ ")]
    return [line.removeprefix("$ ").split("  #")[0].strip() for line in lines]


def has_code(page: Path) -> bool:
    """Whether anything on the page is run."""
    return any(block.kind in RUN for block in blocks(page))


def write_files(page: Path, folder: Path) -> None:
    """Write the page's titled blocks, those of pages that it borrows from first."""
    for other in _FILES_FROM.findall(page.read_text()):
        write_files((page.parent / other).resolve(), folder)
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.body)


def environment() -> dict[str, str]:
    """The user's, without a database of theirs; studies whose budget is not printed are small."""
    kept = {k: v for k, v in os.environ.items() if not k.endswith(("_STORAGE", "_STORAGE_FILE"))}
    small = {"HPSCHED_STUDY_CREATE_CYCLES": "4", "OMP_NUM_THREADS": "1"}
    return {**small, **kept, "TQDM_DISABLE": "1"}


def type_command(command: str, folder: Path, timeout: float = 240) -> str:
    """Give a command as printed; returns its stdout.

    Raises:
        AssertionError: It ended with another code than 0, or showed a traceback.
    """
    name, *arguments = shlex.split(command)
    if name == "mkdir":
        done = subprocess.run([name, *arguments], cwd=folder, capture_output=True, text=True)
    else:
        assert name == "hpsched", f"{command!r}: mark as sh what cannot run here"
        done = forked.call(arguments, cwd=folder, env=environment(), timeout=timeout)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"
    return done.stdout


def parse(arguments: list[str]) -> None:
    """Parse a call of hpsched without running it; an unknown command or option raises."""
    from typer.main import get_command

    from hpsched.cli import app

    command: Any = get_command(app)
    context = command.make_context("hpsched", arguments[:1])
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(name, arguments, parent=context)


def run(page: Path, folder: Path) -> Iterator[Block]:
    """Run the page's blocks in order, in ``folder``; yields each before it is run."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    write_files(page, folder)
    for block in blocks(page):
        yield block
        if block.kind == "console":
            for command in commands(block):
                print(f"$ {command}\n{type_command(command, folder)}", flush=True)
        elif block.kind == "python" and not block.title:
            # Compiled under the page's own line numbers, for tracebacks.
            code = "\n" * block.line + block.body
            exec(compile(code, str(page), "exec"), namespace)


def main(page: Path) -> None:
    """Run a page here; end with 1 and the place of the first block that fails."""
    sys.path.insert(0, str(Path.cwd()))
    line = 0
    try:
        for block in run(page, Path.cwd()):
            line = block.line
        for block in blocks(page):  # files that nothing on the page uses, too
            if block.title and block.title.endswith(".py"):
                line = block.line
                importlib.import_module(block.title.removesuffix(".py"))
    except Exception:
        traceback.print_exc()
        sys.exit(f"{page}:{line}: this block fails")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
