"""Leaves out the tests this machine cannot run, and says so at the end of every run."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import hypothesis
import pytest

from tests.browsing import BROWSERS, browser_path

# Before torch is imported: test processes and what they start share few cores, on which threads
# would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Nothing here is about how long something takes.
hypothesis.settings.register_profile("hpsched", deadline=None)
hypothesis.settings.load_profile("hpsched")

BEGUN = time.monotonic()
MARIADB = ("127.0.0.1", 3306)
BENCH = ("torch_lr_finder", "fastai", "lightning", "neps", "prodigyopt", "schedulefree", "smac")
FRAMEWORKS = (
    "accelerate",
    "fastai",
    "hydra",
    "ignite",
    "keras",
    "lightning",
    "mlflow",
    "tensorboard",
    "transformers",
    "wandb",
)


@cache
def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


@cache
def _no_browser() -> str | None:
    return None if browser_path() else f"none of {', '.join(BROWSERS)} found"


@cache
def _no_mariadb() -> str | None:
    try:
        socket.create_connection(MARIADB, timeout=2).close()
    except OSError:
        return "nothing answers at {}:{}".format(*MARIADB)
    return None


def _missing(packages: tuple[str, ...], remedy: str) -> str | None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"no {', '.join(missing)}: {remedy}" if missing else None


@cache
def _no_bench() -> str | None:
    return _missing(BENCH, "make bench-venv")


@cache
def _no_frameworks() -> str | None:
    return _missing(FRAMEWORKS, "make frameworks-venv")


@cache
def _no_ray() -> str | None:
    return None if importlib.util.find_spec("ray") else "no package ray: make ray-venv"


def _no_tls() -> str | None:
    there = any(Path("/usr/lib/postgresql").glob("*/bin"))
    return None if there else "no PostgreSQL built with TLS: Debian's postgresql"


def _no_root() -> str | None:
    return None if os.geteuid() == 0 else "only root can mount a disk that is full"


# marker -> why its tests cannot run here, or None when they can
OBSTACLES: dict[str, Callable[[], str | None]] = {
    "gpu": _no_gpu,
    "browser": _no_browser,
    "mariadb": _no_mariadb,
    "bench": _no_bench,
    "frameworks": _no_frameworks,
    "ray": _no_ray,
    "tls": _no_tls,
    "root": _no_root,
}


def _obstacle(item: pytest.Item) -> str | None:
    """Which tests cannot run here that this one belongs to, and why; None when it can."""
    for marker in item.iter_markers():
        if marker.name in OBSTACLES and (reason := OBSTACLES[marker.name]()):
            return f"{marker.name} tests ({reason})"
    return None


def _one_case_each(items: list[pytest.Item]) -> list[pytest.Item]:
    """One case of each test function: any, but the same in every run and on every worker."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return [group[crc32(name.encode()) % len(group)] for name, group in cases.items()]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--short` and `--stop-after`."""
    parser.addoption("--short", action="store_true", help="run one case of each parametrized test")
    parser.addoption(
        "--stop-after", type=float, metavar="SECONDS", help="begin no further test after this time"
    )


def pytest_configure() -> None:
    """Let Ctrl-C through: a shell starts what runs in its background with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


NOT_RUN = pytest.StashKey[Counter[str]]()  # what was asked for and left out -> how many tests


@pytest.hookimpl(trylast=True)  # after -m and -k: only tests that were asked for are looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what cannot run, or need not; the closing lines name it."""
    obstacles = [_obstacle(item) for item in items]
    not_run = Counter(filter(None, obstacles))
    able = [item for item, obstacle in zip(items, obstacles, strict=True) if obstacle is None]
    kept = _one_case_each(able) if config.option.short else able
    if further := len(able) - len(kept):
        not_run[f"further cases of parametrized tests (--short, -m {config.option.markexpr!r})"] = (
            further
        )
    config.stash[NOT_RUN] = not_run
    if not_run:
        config.hook.pytest_deselected(items=list(set(items).difference(kept)))
        items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what there is no time for; it is listed like any skipped test."""
    limit = item.config.option.stop_after
    if limit is not None and time.monotonic() - BEGUN > limit:
        pytest.skip(f"no time left of {limit:.0f} seconds")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that prints the summary, under pytest-xdist, what was left out."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["not_run"] = dict(session.config.stash.get(NOT_RUN, {}))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Hear it: every worker collects the same tests, so the last one's account is all of it."""
    if not_run := getattr(node, "workeroutput", {}).get("not_run"):
        node.config.stash[NOT_RUN] = Counter(not_run)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name each kind of test that was asked for and left out."""
    for what, count in sorted(config.stash.get(NOT_RUN, {}).items()):
        terminalreporter.write_line(f"NOT RUN HERE: {count} {what}", yellow=True)
