"""What the tests of all frameworks share: cycles, a model, what optimizers really used."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import hpsched
from hpsched import evidence, records, schedules
from hpsched.cycle import Cycle
from hpsched.schedules import OneCycleSchedules

torch.set_num_threads(1)

PACKAGE = str(Path(hpsched.__file__).parent)
MAX_LR = 0.1
VALUES = {
    "max_lr": MAX_LR,
    "div_factor": 25.0,
    "pct_start": 0.3,
    "base_momentum": 0.85,
    "max_momentum": 0.95,
    "weight_decay": 1e-4,
    "final_div_factor": 1e4,
}
Used = list[list[tuple[float, float]]]  # step → group → (rate, momentum or beta1)


def make_cycle(total_steps: int = 20, kind: Any = "rung", max_lr: float = MAX_LR) -> Cycle:
    pair = schedules.one_cycle(total_steps, max_lr=max_lr)
    if kind == "range_test":
        sweep = schedules.range_test(total_steps, max_lr * 1e-6, max_lr)
        pair = OneCycleSchedules(sweep, schedules.constant(0.85))
    return Cycle(
        values={**VALUES, "max_lr": max_lr},
        schedules=pair,
        total_steps=total_steps,
        seed=0,
        kind=kind,
        name="a-run",
    )


@contextmanager
def recorded() -> Iterator[Used]:
    """Rate and momentum of every group at every step that a torch optimizer takes."""
    used: Used = []

    def keep(optimizer: Any, args: Any, kwargs: Any) -> None:
        groups = optimizer.param_groups
        momenta = [g["betas"][0] if "betas" in g else g["momentum"] for g in groups]
        used.append([(float(g["lr"]), float(m)) for g, m in zip(groups, momenta, strict=True)])

    handle = register_optimizer_step_pre_hook(keep)
    try:
        yield used
    finally:
        handle.remove()


def _is_torch(filename: str) -> bool:
    return filename.startswith(str(Path(torch.__file__).parent))


class Waits(TorchDispatchMode):
    """Notes where hpsched reads a tensor's value, for which the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = [f for f in traceback.extract_stack()[:-1] if not _is_torch(f.filename)]
            if frames[-1].filename.startswith(PACKAGE):
                self.found.append(str(frames[-1]))
        return func(*args, **(kwargs or {}))


def expected(cycle: Cycle, ratios: tuple[float, ...] = (1.0, 0.25)) -> Used:
    """What the pure schedules say, for every step."""
    lr, momentum = cycle.schedules.lr, cycle.schedules.momentum
    return [[(lr(step) * r, momentum(step)) for r in ratios] for step in range(cycle.total_steps)]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def optimizer_of(model: nn.Sequential, name: str = "SGD", lr: float = MAX_LR) -> Any:
    """Two groups, the second with a quarter of the rate."""
    groups = [
        {"params": model[0].parameters(), "lr": lr},
        {"params": model[2].parameters(), "lr": lr * 0.25},
    ]
    if name == "SGD":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=lr)


def make_data() -> TensorDataset:
    """Learnable: three classes, 112 examples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(112, 8, generator=generator)
    return TensorDataset(x, (x @ torch.randn(8, 3, generator=generator)).argmax(1))


def make_loader() -> Any:
    """Seven batches a round, in the same order."""
    return DataLoader(make_data(), batch_size=16)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).float(), targets)


def plain_run(cycle: Cycle, accumulate: int = 1, optimizer: str = "SGD") -> nn.Sequential:
    """The reference: the same training without any framework; the model afterwards."""
    model = make_model()
    torch_optimizer = optimizer_of(model, optimizer)
    schedule = cycle.schedule(torch_optimizer)
    losses: list[Tensor] = []
    for batch in cycle.batches(make_loader(), accumulate):
        losses.append(loss_of(model, batch))
        (losses[-1] / accumulate).backward()
        if len(losses) == accumulate:
            torch_optimizer.step()
            torch_optimizer.zero_grad()
            mean = torch.stack(losses).mean()
            losses.clear()
            if not schedule.advance(mean.detach()):
                break
    return model


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-6)


def search(train: Any, n_trials: int = 4, total_steps: int = 150) -> optuna.Study:
    """A small study, with everything a study has."""
    sampler = hpsched.OneCycleSampler(seed=0)
    study = optuna.create_study(sampler=sampler, pruner=hpsched.CyclePruner())
    study.optimize(
        lambda trial: hpsched.suggest_onecycle(trial, total_steps=total_steps).run(train),
        n_trials=n_trials,
    )
    return study


def two_agree(sweeps: list[records.SweepRecord]) -> bool:
    """Whether the first two range tests leave the centre open by an octave at most."""
    found = evidence.pool(sweeps[:2])
    assert found is not None
    low, high = found.prior.interval
    return found.prior.reliable and found.prior.replicates == 2 and high <= 2 * low


def assert_whole(study: optuna.Study, optimizer: str, momentum_name: str) -> None:
    """Range tests with their curves, rungs and values are all stored."""
    sweeps = evidence.sweeps(study.get_trials(deepcopy=False))
    assert len(sweeps) == (2 if two_agree(sweeps) else 3)
    for sweep in sweeps:
        assert len(sweep.losses) > 10
        assert (sweep.optimizer, sweep.momentum_name) == (optimizer, momentum_name)
        exact = schedules.range_test(sweep.steps, sweep.lrs[0], sweep.lrs[-1])
        assert len(sweep.losses) <= len(sweep.lrs)
        assert exact(0) == sweep.lrs[0]
    full = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert full
    assert all(0 <= trial.value < 0.6 for trial in full)  # chance is 0.9 and 0.67
    assert any(key.startswith(records.RUNG) for key in full[0].user_attrs)


def assert_learned(study: optuna.Study) -> None:
    """Of a framework with optimizers of its own, like Adam: range tests, and good full runs."""
    sweeps = evidence.sweeps(study.get_trials(deepcopy=False))
    assert len(sweeps) == (2 if two_agree(sweeps) else 3)
    assert all(sweep.momentum_name == "beta1" for sweep in sweeps)
    full = [t.value for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert full
    assert min(full) < 0.2  # chance is 0.67
    assert hpsched.best(study).params["max_lr"] > 0
