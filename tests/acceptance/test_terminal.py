"""The screens on a real terminal: drawn over and over, left cleanly by Ctrl-C, lines elsewhere."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from test_cli import TOY, command, environment, ok

from hpsched.study import create_study

HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"  # the cursor


class Terminal:
    """A process on a pseudo-terminal, and what it has written there."""

    def __init__(self, process: subprocess.Popen[bytes], end: int) -> None:
        self.process, self._end, self.said = process, end, b""

    def wait_for(self, *words: bytes, seconds: float = 90.0) -> None:
        limit = time.monotonic() + seconds
        while not all(word in self.said for word in words):
            assert time.monotonic() < limit, (words, self.said[-2000:])
            if not self.read():
                break
        assert all(word in self.said for word in words), (words, self.said[-2000:])

    def read(self) -> bool:
        """Take in what there is; False at the end."""
        if select.select([self._end], [], [], 0.2)[0]:
            with suppress(OSError):  # Linux's way of saying that the other end is closed
                if new := os.read(self._end, 65_536):
                    self.said += new
                    return True
            return False
        return True

    def finish(self) -> int:
        while self.read():
            pass
        return self.process.wait(timeout=60)


@contextmanager
def terminal(*arguments: str, cwd: Path, columns: int = 80, **env: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    wanted = {**environment(**{"TERM": "xterm", **env})}
    wanted.pop("COLUMNS")
    process = subprocess.Popen(
        command(*arguments), cwd=cwd, env=wanted, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(ours)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy.py").write_text(TOY)
    url = f"sqlite:///{tmp_path}/hpsched.db"
    create_study("toy", objective="toy:objective", storage=url, trials=2, confirm_top=0, seed=0)
    return tmp_path


def lines_of(said: bytes) -> list[str]:
    """The lines, without colours and cursor moves."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())
    return re.split(r"[\r\n]+", text)


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_watching_draws_over_and_over_until_ctrl_c(folder: Path, columns: int) -> None:
    asked = ("study", "status", "toy", "--watch", "--interval", "0.2")
    with terminal(*asked, cwd=folder, columns=columns) as screen:
        screen.wait_for(HIDE, b"none yet")
        while screen.said.count(b"none yet") < 3:  # drawn again
            assert screen.read()
        screen.process.send_signal(signal.SIGINT)
        assert screen.finish() == 130
    assert screen.said.rindex(SHOW) > screen.said.rindex(HIDE)  # the cursor is back
    assert b"Traceback" not in screen.said and b"Abort" not in screen.said
    assert max(map(len, lines_of(screen.said))) <= columns
    assert not re.search(rb"\x1b\[3[0-7]m", screen.said)  # NO_COLOR


def test_a_worker_shows_its_run_on_a_narrow_terminal(folder: Path) -> None:
    attach = ("worker", "attach", "toy", "--devices", "cpu")
    with terminal(*attach, cwd=folder, columns=60, TOY_PAUSE="0.005") as screen:
        screen.wait_for(b"rung", HIDE)
        assert screen.finish() == 0
    assert screen.said.rindex(SHOW) > screen.said.rindex(HIDE)
    shown = [line for line in lines_of(screen.said) if "cpu" in line]
    assert shown and max(map(len, shown)) <= 60


def test_where_there_is_no_terminal_a_line_is_said_when_something_changes(folder: Path) -> None:
    asked = command("study", "status", "toy", "--watch", "--interval", "0.2")
    watch = subprocess.Popen(
        asked, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    ok("worker", "attach", "toy", cwd=folder, TOY_PAUSE="0.002")
    said, errors = watch.communicate(timeout=60)
    assert watch.returncode == 0 and errors == b""
    lines = [x for x in said.decode().splitlines() if re.match(r"\d\d:\d\d:\d\d toy: ", x)]
    assert "no full cycle yet" in lines[0] and lines[-1].split("toy: ")[1].startswith("100 %")
    assert len(lines) == len({line.split("toy: ")[1] for line in lines}) < 40
    assert b"\x1b" not in said
    assert said.decode().splitlines()[-1].startswith("Next: ")


def test_a_dumb_terminal_gets_lines_too(folder: Path) -> None:
    asked = ("study", "status", "toy", "--watch", "--interval", "0.2")
    with terminal(*asked, cwd=folder, TERM="dumb") as screen:
        screen.wait_for(b" toy: 0 %, 0 trials")
        screen.process.send_signal(signal.SIGINT)
        assert screen.finish() == 130
    assert b"\x1b[?25l" not in screen.said
