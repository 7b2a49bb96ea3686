"""Host time of one schedule step: ours against torch's OneCycleLR.

    python tests/benchmarks/bench_schedule_step.py [repeats]

Per row, the schedules run in turn, many times, in one process (so that a change of the machine's
pace meets all of them), each time a whole cycle of 3,000 steps on parameters of one element. Shown
are the medians in microseconds per step and the median of the paired ratios ours/torch with its
quartiles. "with loss" is what a training loop pays: a tensor copied every few steps, blocks of them
read, and the check for divergence.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hpsched import schedules
from hpsched.cycle import Cycle, ScheduleDriver

STEPS = 3_000
MAX_LR = 0.1
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=MAX_LR, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=MAX_LR),
}


class Row(NamedTuple):
    """Microseconds per step, one entry per repeat."""

    torch: list[float]
    driver: list[float]
    cycle: list[float]
    with_loss: list[float]


def optimizer(name: str, groups: int) -> torch.optim.Optimizer:
    return OPTIMIZERS[name]([{"params": [torch.zeros(1)]} for _ in range(groups)])


def torch_step(built: torch.optim.Optimizer) -> Callable[[], None]:
    step = torch.optim.lr_scheduler.OneCycleLR(built, MAX_LR, total_steps=STEPS + 1).step
    built.step()  # else it warns that it was called before the optimizer
    return step


def driver_step(built: torch.optim.Optimizer) -> Callable[[], None]:
    curves = schedules.one_cycle(STEPS, max_lr=MAX_LR)
    return ScheduleDriver(built, schedules=curves, reference_lr=MAX_LR).step


def cycle_step(built: torch.optim.Optimizer) -> Callable[..., None]:
    cycle = Cycle(
        values={"max_lr": MAX_LR},
        schedules=schedules.one_cycle(STEPS, max_lr=MAX_LR),
        total_steps=STEPS,
        seed=0,
        kind="rung",
        name="benchmark",
    )
    return cycle.schedule(built).step


def cycle_step_with_loss(built: torch.optim.Optimizer) -> Callable[[], None]:
    step, loss = cycle_step(built), torch.tensor(1.0)
    return lambda: step(loss)


MAKERS = Row(torch_step, driver_step, cycle_step, cycle_step_with_loss)  # type: ignore[arg-type]


def microseconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - started) / STEPS * 1e6


def measure(name: str, groups: int, repeats: int) -> Row:
    row = Row([], [], [], [])
    for repeat in range(repeats + 2):
        for times, make in zip(row, MAKERS, strict=True):
            step = make(optimizer(name, groups))  # type: ignore[operator]
            elapsed = microseconds(step)
            if repeat >= 2:  # warm by then
                times.append(elapsed)
    return row


def ratio(ours: list[float], theirs: list[float]) -> str:
    paired = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(paired, n=4)
    return f"{middle:5.2f} [{low:.2f}, {high:.2f}]"


def main(repeats: int = 30) -> None:
    torch.set_num_threads(1)
    gc.disable()
    print(f"torch {torch.__version__}, µs per step, median of {repeats} runs of {STEPS} steps")
    print(
        f"{'optimizer':<10}{'groups':>6}{'OneCycleLR':>12}{'driver':>9}{'ratio':>20}"
        f"{'cycle':>9}{'ratio':>20}{'with loss':>11}{'ratio':>20}"
    )
    for name in OPTIMIZERS:
        for groups in (1, 2, 10):
            row = measure(name, groups, repeats)
            theirs, *ours = (statistics.median(times) for times in row)
            print(f"{name:<10}{groups:>6}{theirs:>12.2f}", end="")
            for width, middle, times in zip((9, 9, 11), ours, row[1:], strict=True):
                print(f"{middle:>{width}.2f}{ratio(times, row.torch):>20}", end="")
            print(flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
