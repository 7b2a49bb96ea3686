"""Our recipe in torch's own schedulers: the optimizer gets the rates of the pure schedule."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, SequentialLR

import hpsched
from hpsched import schedules
from hpsched.errors import UsageError
from hpsched.suggest import OneCycle

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/torch-schedulers.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
STEPS = 40
VALUES = {
    "max_lr": 0.3,
    "div_factor": 20.0,
    "pct_start": 0.317,
    "base_momentum": 0.85,
    "max_momentum": 0.95,
    "weight_decay": 1e-4,
}


def make_recipe(policy: str = "cosine") -> OneCycle:
    return hpsched.suggest_onecycle(optuna.trial.FixedTrial(VALUES), policy=policy)


def make_optimizer(lr: Any = 0.3) -> torch.optim.Optimizer:
    """Two groups, the second with a tenth of the rate."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [{"params": parameters[0]}, {"params": parameters[1], "lr": lr * 0.1}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.95)


def rates(
    optimizer: torch.optim.Optimizer, scheduler: LRScheduler, steps: int
) -> list[tuple[float, ...]]:
    """The rate of each group at each step that the optimizer takes."""
    used = []
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(2)
        used.append(tuple(float(group["lr"]) for group in optimizer.param_groups))
        optimizer.step()
        scheduler.step()
    return used


def pure(policy: str, step: int) -> float:
    values = {name: value for name, value in VALUES.items() if name != "weight_decay"}
    return schedules.one_cycle(STEPS, **values, policy=policy).lr(step)


def near(lrs: list[float]) -> list[Any]:
    return [
        (pytest.approx(lr, rel=1e-14, abs=0), pytest.approx(lr * 0.1, rel=1e-14, abs=0))
        for lr in lrs
    ]


@pytest.mark.parametrize("policy", ["cosine", "linear"])
def test_lambda_lr_gives_the_pure_schedule_and_keeps_ratios(policy: str) -> None:
    optimizer = make_optimizer()
    scheduler = LambdaLR(optimizer, make_recipe(policy).lr_lambda(STEPS))
    used = rates(optimizer, scheduler, STEPS + 5)  # past the end, the last rate stays
    assert used == near([pure(policy, step) for step in range(STEPS + 5)])
    assert max(rate for rate, _ in used) == 0.3
    assert optimizer.param_groups[0]["momentum"] == 0.95


def test_a_tensor_as_rate() -> None:
    optimizer = make_optimizer(torch.tensor(0.3, dtype=torch.float64))
    scheduler = LambdaLR(optimizer, make_recipe().lr_lambda(STEPS))
    assert rates(optimizer, scheduler, STEPS) == near([pure("cosine", s) for s in range(STEPS)])


@pytest.mark.parametrize("build", [list, reversed], ids=["in order", "built in reverse"])
def test_after_a_warm_up_the_cycle_begins_at_its_first_step(build: Callable[..., Any]) -> None:
    optimizer = make_optimizer()
    builders: dict[str, Callable[[], LRScheduler]] = {
        "warm-up": lambda: LinearLR(optimizer, 0.001, 0.05, total_iters=7),
        "cycle": lambda: LambdaLR(optimizer, make_recipe().lr_lambda(STEPS)),
    }
    made = {name: builders[name]() for name in build(list(builders))}
    scheduler = SequentialLR(optimizer, [made["warm-up"], made["cycle"]], milestones=[7])
    used = rates(optimizer, scheduler, 7 + STEPS)
    warm = [0.3 * (0.001 + (0.05 - 0.001) * step / 7) for step in range(7)]
    assert used[:7] == [(pytest.approx(a), pytest.approx(a * 0.1)) for a in warm]
    assert used[7:] == near([pure("cosine", step) for step in range(STEPS)])


def test_a_resumed_scheduler_goes_on() -> None:
    optimizer = make_optimizer()
    scheduler = LambdaLR(optimizer, make_recipe().lr_lambda(STEPS))
    rates(optimizer, scheduler, 11)
    states = optimizer.state_dict(), scheduler.state_dict()
    resumed = make_optimizer()
    again = LambdaLR(resumed, make_recipe().lr_lambda(STEPS))
    resumed.load_state_dict(states[0])
    again.load_state_dict(states[1])
    left = range(11, STEPS)
    assert rates(resumed, again, len(left)) == near([pure("cosine", step) for step in left])


def test_wrong_lengths_are_refused() -> None:
    with pytest.raises(UsageError, match="total_steps = 0"):
        make_recipe().lr_lambda(0)


def test_the_page_runs_as_printed_and_its_three_ways_agree() -> None:
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "torch-schedulers.md", "exec"), namespace)
    ours, one_cycle, factors = (namespace[name] for name in ("ours", "one_cycle", "factors"))
    for _ in range(299):
        expected = [pytest.approx(ours.last_lr, rel=1e-12, abs=0)]
        assert one_cycle.get_last_lr() == expected
        assert factors.get_last_lr() == expected
        for scheduler in (one_cycle, factors):
            scheduler.optimizer.step()
            scheduler.step()
        ours.step()
    scheduler, optimizer = namespace["scheduler"], namespace["optimizer"]
    used = []
    for _ in range(320):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert used[0] == pytest.approx(0.3 * 0.001)
    assert used[20] == pytest.approx(0.3 / 20)
    assert max(used) == 0.3
    assert used[-1] == pytest.approx(0.3 / 20 / 1e4)


def test_one_cycle_lr_changes_what_others_start_from() -> None:
    """Why the page keeps it out of SequentialLR."""
    optimizer = make_optimizer()
    torch.optim.lr_scheduler.OneCycleLR(optimizer, **make_recipe().torch_kwargs(STEPS))
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.015, 0.015]
