"""What the stand-alone finder costs over a bare training loop of as many steps.

    python tests/benchmarks/bench_finder_overhead.py [repeats]

Per row, ``lr_range_test`` (all of it: snapshot, sweep, restore, reading the curve) and a bare
loop of 100 steps run in turn, many times, in one process on one thread, each order as often as the
other, so that a change of the machine's pace meets both. Times are the processor's, which other
processes on a busy machine lengthen least. Shown are the medians in milliseconds per step, the
median of the paired ratios finder/loop with its quartiles, and what snapshot and restore take, in
milliseconds per sweep. Nothing is learned here, so that reading the curve takes longest: it is
smoothed three times. Goal: a ratio of at most 1.05.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hpsched.range_test import _Snapshot, lr_range_test

STEPS = 100
Batch = tuple[torch.Tensor, torch.Tensor]


class Task(NamedTuple):
    """A model with its optimizer, and the options of the finder."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[Batch]
    options: dict[str, Any]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn(width: int, blocks: int) -> nn.Module:
    layers: list[nn.Module] = []
    for index in range(blocks):
        layers += [
            nn.Conv2d(width if index else 1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def task(name: str, model: nn.Module, shape: tuple[int, ...], kind: Any, **options: Any) -> Task:
    batches = [(torch.randn(shape), torch.randint(0, 10, shape[:1])) for _ in range(8)]
    return Task(name, model, kind(model.parameters(), lr=0.01), batches, options)


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def tasks(folder: str) -> Iterator[Task]:
    digits, images, large = (64, 64), (32, 1, 8, 8), (64, 1, 12, 12)
    yield task("MLP, SGD", mlp(), digits, momentum)
    yield task("MLP, AdamW", mlp(), digits, torch.optim.AdamW)
    yield task("CNN 3x16, SGD", cnn(16, 3), images, momentum)
    yield task("CNN 5x20, SGD", cnn(20, 5), (48, 1, 8, 8), momentum)
    yield task("CNN 4x24, SGD", cnn(24, 4), large, momentum)
    yield task("CNN 20x16, AdamW", cnn(16, 20), images, torch.optim.AdamW)
    yield task("  the same, cache_dir", cnn(16, 20), images, torch.optim.AdamW, cache_dir=folder)
    yield task("CNN 6x32, SGD", cnn(32, 6), large, momentum)


def sweep(task: Task) -> None:
    test = lr_range_test(
        task.model, task.optimizer, F.cross_entropy, task.batches,
        num_iter=STEPS, start_lr=1e-6, end_lr=1e-2, progress=False, **task.options,
    )  # fmt: skip
    assert len(test.losses) == STEPS
    test.suggestion  # noqa: B018 (reads the curve)


def bare(task: Task) -> None:
    """What one would write without the finder; the loss is read once, at the end."""
    model, optimizer = task.model, task.optimizer
    model.train()
    for step in range(STEPS):
        x, y = task.batches[step % len(task.batches)]
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()


def snapshot(task: Task) -> None:
    folder = task.options.get("cache_dir")
    _Snapshot((task.model, task.optimizer), (task.batches,), folder).restore()


def milliseconds(run: Callable[[Task], None], task: Task) -> float:
    started = time.process_time()
    run(task)
    return (time.process_time() - started) * 1e3


def measure(task: Task, repeats: int) -> tuple[list[float], list[float], list[float]]:
    """Times of finder, loop and snapshot, one entry per repeat."""
    times: dict[Callable[[Task], None], list[float]] = {sweep: [], bare: [], snapshot: []}
    for repeat in range(repeats + 2):
        order = (sweep, bare) if repeat % 2 else (bare, sweep)
        for run in (*order, snapshot):
            elapsed = milliseconds(run, task)
            if repeat >= 2:  # warm by then
                times[run].append(elapsed)
    return times[sweep], times[bare], times[snapshot]


def main(repeats: int = 20) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()
    print(f"torch {torch.__version__}, median of {repeats} pairs of {STEPS} steps, one thread")
    print(
        f"{'task':<24}{'tensors':>9}{'loop ms/step':>14}{'finder ms/step':>16}"
        f"{'ratio [quartiles]':>22}{'snapshot and restore ms':>26}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for one in tasks(folder):
            ours, theirs, extra = measure(one, repeats)
            low, middle, high = statistics.quantiles(
                [a / b for a, b in zip(ours, theirs, strict=True)], n=4
            )
            tensors = len(one.model.state_dict())
            loop, finder = statistics.median(theirs) / STEPS, statistics.median(ours) / STEPS
            spread = f"{middle:.3f} [{low:.3f}, {high:.3f}]"
            print(
                f"{one.name:<24}{tensors:>9}{loop:>14.2f}{finder:>16.2f}{spread:>22}"
                f"{statistics.median(extra):>26.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
