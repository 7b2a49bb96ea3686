"""What mends overfitting: lower rates, or more weight decay? A grid on tuning tasks that overfit.

    python -m studies.bench.overfitting    # about three minutes of two cores

The standard recipe at rates an octave apart, with so many times the standard weight decay (κ = 0.3,
or 1e-4 where κ has no meaning). Prints, for each weight decay, the best of the rates and how much
worse it scores than the best of all, in standard deviations between seeds.
"""

from __future__ import annotations

import math
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor

from hpsched.coordinates import COUPLED_DECAY, STANDARD_KAPPA, STANDARD_RECIPE
from studies.bench.race import scored
from studies.bench.rows import prepare
from studies.bench.tasks import OVERFITTING, TASKS

TIMES = (0.25, 1, 4, 16, 64)
RATES = tuple(2.0**k for k in range(-10, -2))  # 1e-3 … 0.125
SEEDS = range(500, 503)


def decay(task: str, max_lr: float, times: float) -> float:
    """So many times the standard weight decay at this rate."""
    optimizer, steps = TASKS[task].optimizer, TASKS[task].total_steps
    if optimizer == "adam":
        return times * COUPLED_DECAY
    sgd = optimizer in ("sgd", "nesterov")
    effective = max_lr / (1 - STANDARD_RECIPE["base_momentum"]) if sgd else max_lr
    return times * STANDARD_KAPPA / (effective * steps)


def scores(task: str, max_lr: float, times: float) -> list[float]:
    """Test scores of one place of the grid."""
    warnings.simplefilter("ignore")  # some weight decays lie beyond those that studies search
    values = {"max_lr": max_lr, "weight_decay": decay(task, max_lr, times)}
    return scored(TASKS[task], {**STANDARD_RECIPE, **values, "final_div_factor": 1e4}, SEEDS)


def main() -> None:
    """Run the grid and print the table of docs/design/search.md."""
    places = [(task, rate, times) for task in OVERFITTING for rate in RATES for times in TIMES]
    with ProcessPoolExecutor(initializer=prepare) as pool:
        every = dict(zip(places, pool.map(scores, *zip(*places, strict=True)), strict=True))
    print(f"| weight decay, times the standard one | {' | '.join(f'{t:g}' for t in TIMES)} |")
    print(f"|---|{'---:|' * len(TIMES)}")
    for task in OVERFITTING:
        here = {(r, t): s for (name, r, t), s in every.items() if name == task}
        mean = {place: statistics.fmean(found) for place, found in here.items()}
        best = min(mean.values())
        noise = statistics.median(
            statistics.stdev(s) for s in here.values() if all(map(math.isfinite, s))
        )
        cells = []
        for times in TIMES:
            rate = min(RATES, key=lambda one: mean[one, times])
            cells.append(f"{(mean[rate, times] - best) / noise:.1f} at {rate:.2g}")
        print(f"| {task} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
