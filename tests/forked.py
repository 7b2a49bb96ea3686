"""``hpsched`` as a user types it, forked from a process that has imported what takes long.

Each call is a process of its own, with a working directory, environment and files of its own, and
imports hpsched itself; torch and Optuna, which take most of the time of most commands, are there.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

IMPORTED = ["torch", "optuna", "scipy.stats", "sqlalchemy.orm"]  # nothing that looks at the colours
_context = multiprocessing.get_context("forkserver")


def call(
    arguments: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    stdin: str = "",
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """``hpsched`` with these arguments, as ``subprocess.run`` would give it."""
    _context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # the first call starts it
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        given, out, err = files = [Path(folder) / name for name in ("in", "out", "err")]
        given.write_text(stdin)
        process = _context.Process(target=_run, args=(list(arguments), cwd, dict(env), files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), timeout, stderr=err.read_bytes())
        return subprocess.CompletedProcess(
            list(arguments), process.exitcode, out.read_text(), err.read_text()
        )


def _run(arguments: list[str], cwd: Path, env: dict[str, str], files: list[Path]) -> None:
    for number, path in enumerate(files):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = os.fdopen(0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    here = str(Path(__file__).parent)  # holds modules that a user's folder has not
    sys.path[:] = [str(cwd), *(path for path in sys.path if path != here)]
    sys.argv = ["hpsched", *arguments]
    runpy.run_module("hpsched", run_name="__main__", alter_sys=True)
