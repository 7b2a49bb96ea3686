"""Range tests at several weight decays: trained together with torch.func against one by one.

    python tests/benchmarks/bench_vmap.py [device] [repeats]

One by one is ``hpsched.lr_range_tests``, which is also what the curves together are checked
against. Together: the models' parameters stacked, the loss mapped over them by ``vmap``, the
torch optimizer stepping the stack (its update is elementwise; weight decay, which differs, is
applied by hand). Per row, both run in turn in one process; shown are the medians in seconds of
processor time (of wall time on a GPU), the median of the paired ratios, and the largest relative
difference of two losses up to a rate of 1e-2: beyond, where training is unstable, rounding grows.

The feature is not in hpsched: this says whether it would pay, and where.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import hpsched

STEPS, BATCH, START, END, MOMENTUM = 100, 64, 1e-5, 1.0, 0.85


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(40, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def cnn(channels: int) -> nn.Module:
    kept = {"kernel_size": 3, "stride": 2, "padding": 1}
    return nn.Sequential(
        nn.Unflatten(1, (1, 40)), nn.Conv1d(1, channels, **kept), nn.ReLU(),
        nn.Conv1d(channels, channels, **kept), nn.ReLU(),
        nn.Conv1d(channels, channels, **kept), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * channels, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP, width 32": lambda: mlp(32),
    "MLP, width 256": lambda: mlp(256),
    "CNN, 8 channels": lambda: cnn(8),
    "CNN, 25 channels": lambda: cnn(25),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=START, momentum=MOMENTUM),
    "AdamW": lambda params: torch.optim.AdamW(
        params, lr=START, betas=(MOMENTUM, 0.999), weight_decay=0.0
    ),
}


def rate(step: int) -> float:
    return START * (END / START) ** (step / (STEPS - 1))


def one_by_one(
    model: nn.Module, optimizer: str, batches: list[tuple[Tensor, Tensor]], decays: list[float]
) -> list[tuple[float, ...]]:
    tests = hpsched.lr_range_tests(
        model, OPTIMIZERS[optimizer](model.parameters()), F.cross_entropy, batches,
        weight_decays=decays, start_lr=START, end_lr=END, num_iter=STEPS, momentum=MOMENTUM,
        stop_diverged=False, progress=False,
    )  # fmt: skip
    return [test.losses for test in tests.tests]


def together(
    model: nn.Module, optimizer: str, batches: list[tuple[Tensor, Tensor]], decays: list[float]
) -> list[tuple[float, ...]]:
    stacked, buffers = stack_module_state([model] * len(decays))  # type: ignore[arg-type]
    parameters = {name: value.detach().requires_grad_() for name, value in stacked.items()}
    stepper = OPTIMIZERS[optimizer](parameters.values())

    def loss(parameters: Any, buffers: Any, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (parameters, buffers), (inputs,)), targets)

    losses, decay = [], torch.tensor(decays, device=batches[0][0].device)
    for step, (inputs, targets) in enumerate(batches):
        lr = rate(step)
        stepper.param_groups[0]["lr"] = lr
        each = vmap(loss, in_dims=(0, 0, None, None))(parameters, buffers, inputs, targets)
        stepper.zero_grad()
        each.sum().backward()
        with torch.no_grad():
            for value in parameters.values():
                factor = decay.view(-1, *[1] * (value.dim() - 1))
                if optimizer == "AdamW":
                    value.mul_(1 - lr * factor)
                else:
                    value.grad.add_(value * factor)  # type: ignore[union-attr]
        stepper.step()
        losses.append(each.detach())
    return [tuple(curve) for curve in torch.stack(losses, 1).tolist()]


def seconds(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    result = run()  # ends with the losses on the host
    return clock() - began, result


def difference(ones: list[tuple[float, ...]], others: list[tuple[float, ...]]) -> float:
    steps = sum(rate(step) <= 1e-2 for step in range(STEPS))
    pairs = zip(ones, others, strict=True)
    return max(abs(a[i] - b[i]) / abs(a[i]) for a, b in pairs for i in range(steps))


def row(name: str, optimizer: str, runs: int, device: str, repeats: int) -> str:
    torch.manual_seed(0)
    model = MODELS[name]().to(device)
    teacher = torch.randn(40, 10)
    inputs = torch.randn(STEPS, BATCH, 40)
    targets = (inputs @ teacher).argmax(2)
    batches = list(zip(inputs.to(device), targets.to(device), strict=True))
    decays = [10 ** (-2 - 3 * run / runs) for run in range(runs)]
    apart, joint, worst = [], [], 0.0
    for _ in range(repeats):
        spent, ones = seconds(lambda: one_by_one(model, optimizer, batches, decays), device)
        apart.append(spent)
        spent, others = seconds(lambda: together(model, optimizer, batches, decays), device)
        joint.append(spent)
        worst = max(worst, difference(ones, others))
    if not worst < 1e-3:
        raise SystemExit(f"{name}, {optimizer}: the curves differ by {worst:.0e}; no ratio.")
    ratio = statistics.median(a / b for a, b in zip(apart, joint, strict=True))
    times = f"{statistics.median(apart):.3f} | {statistics.median(joint):.3f}"
    return f"| {name} | {optimizer} | {runs} | {times} | {ratio:.2f} | {worst:.0e} |"


def main(device: str = "cpu", repeats: str = "5") -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {device}, {STEPS} steps of {BATCH}, {repeats} repeats")
    row("MLP, width 32", "SGD", 3, device, 1)  # what is set up once, is set up
    print("| model | optimizer | sweeps | one by one | together | ratio | difference |")
    print("|---|---|---|---|---|---|---|")
    for name in MODELS:
        for optimizer in OPTIMIZERS:
            for runs in (3, 12):
                print(row(name, optimizer, runs, device, int(repeats)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
