"""An analytic stand-in for a training run: cheap, seeded, shaped like the real thing.

The loss falls from 2.3 as steps × rate add up and explodes beyond a divergence edge; the returned
validation error has its optimum at ``best_lr`` (in log rate), at a little weight decay (κ ≈ 0.3),
gets better with longer cycles, and carries seed noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

import hpsched


class Optimizer:
    """What the driver needs of a torch optimizer."""

    def __init__(self, lr: float, momentum: float = 0.9) -> None:
        self.param_groups = [{"lr": lr, "momentum": momentum}]


@dataclass
class FakeTraining:
    best_lr: float = 0.3
    noise: float = 0.01
    loss_noise: float = 0.02
    horizon: int = 900
    edge: float = math.inf  # divergence; 8 × best_lr when that is lower
    calls: list[tuple[str, int, float]] = field(default_factory=list)
    fail_on: Callable[[hpsched.Cycle], bool] = lambda cycle: False

    def __call__(self, cycle: hpsched.Cycle) -> float:
        self.calls.append((cycle.kind, cycle.total_steps, cycle.max_lr))
        if self.fail_on(cycle):
            raise RuntimeError("the data set is on fire")
        rng = np.random.default_rng(cycle.seed)
        optimizer = Optimizer(cycle.max_lr)
        schedule = cycle.schedule(optimizer)
        progress, burst, broken = 0.0, 0.0, False
        edge = min(8 * self.best_lr, self.edge)
        for _ in range(cycle.total_steps):
            loss = 0.3 + 2.0 * math.exp(-0.15 * progress) + burst
            loss += self.loss_noise * rng.standard_normal()
            lr = optimizer.param_groups[0]["lr"]  # its effect shows at the next step
            progress += lr / self.best_lr
            burst = 5.0 * (lr / edge) ** 2 if lr > edge else 0.0
            schedule.step(1e30 if broken else loss)
            broken = broken or lr > 4 * edge
        octaves = math.log2(cycle.max_lr / self.best_lr)
        kappa = cycle.weight_decay * cycle.max_lr / (1 - cycle.base_momentum) * cycle.total_steps
        error = 0.1 + 0.02 * octaves**2 + 0.005 * math.log(max(kappa, 1e-9) / 0.3) ** 2
        error += 0.3 * (1 - cycle.total_steps / self.horizon)
        return error + self.noise * rng.standard_normal()
