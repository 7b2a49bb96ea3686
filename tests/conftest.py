"""Leaves out the tests this machine cannot run, and says so at the end of every run."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path

import hypothesis
import pytest

from tests.browsing import BROWSERS, browser_path

# Before torch is imported: test processes and what they start share few cores, on which threads
# would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Nothing here is about how long something takes.
hypothesis.settings.register_profile("hpsched", deadline=None)
hypothesis.settings.load_profile("hpsched")

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
    found = (OBSTACLES[m.name]() for m in item.iter_markers() if m.name in OBSTACLES)
    return next(filter(None, found), None)


def pytest_configure() -> None:
    """Let Ctrl-C through: a shell starts what runs in its background with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)  # after -m and -k: only tests that were asked for are looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what cannot run; the closing lines name it."""
    left_out = [item for item in items if _obstacle(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name each kind of test that this run had to leave out."""
    for marker, obstacle in OBSTACLES.items():
        if f"not {marker}" in config.option.markexpr:
            continue  # left out by choice
        if reason := obstacle():
            terminalreporter.write_line(f"NOT RUN HERE: {marker} tests ({reason})", yellow=True)
