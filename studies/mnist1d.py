"""MNIST-1D: four objectives (MLP and CNN, SGD and AdamW) hard enough to tell recipes apart.

What      `mlp_sgd`, `mlp_adamw`: 40-100-100-10 perceptron, 600 optimizer steps of batch 100;
          `cnn_sgd`, `cnn_adamw`: three strided convolutions of 25 channels, 400 steps of batch 100.
          Each is an objective for Optuna or for `hpsched study create`; it minimises the error
          (fraction wrong) on the validation half.
Data      MNIST-1D (Greydanus and Kobak, arXiv 2011.14439), generated once per process by the
          package `mnist1d` with its default settings and seed 42: nothing is downloaded. Its 4,000
          training signals are for training. Its 1,000 test signals are halved: the first 500 are
          half A, for validation; the last 500 are half B, for `test_error` alone.
Cost      A full run (CPU, one thread, PyTorch 2.13): 0.3 core-seconds for mlp_sgd, 0.5 for
          mlp_adamw, 0.8 for either cnn; generating the data takes 2 seconds once per process.
Evidence  The standard recipe at a hand-picked max_lr, validation error of seeds 0 and 1:
          mlp_sgd at 0.46 0.326, 0.304; mlp_adamw at 0.03 0.350, 0.384; cnn_sgd at 0.3 0.176, 0.114;
          cnn_adamw at 0.03 0.120, 0.088 (PyTorch 2.13, CPU).

    hpsched study create mlp --objective studies.mnist1d:mlp_sgd      # in the repository's root
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import optuna
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpsched

if __name__ == "__main__":  # run as a file, this folder leads the path and hides the data package
    _HERE = Path(__file__).resolve().parent
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != _HERE]

BATCH_SIZE = 100
TOTAL_STEPS: Mapping[str, int] = MappingProxyType({"mlp": 600, "cnn": 400})

Score = Callable[[nn.Module], float]
Train = Callable[[hpsched.Cycle], float]


class Split(NamedTuple):
    """Signals of shape (n, 40), about zero mean and unit variance, and their digits."""

    x: Tensor
    y: Tensor


class Data(NamedTuple):
    """The three parts of the data, which never overlap."""

    train: Split
    validation: Split
    test: Split


@cache
def data() -> Data:
    """Generate MNIST-1D once per process (this seeds Python's and NumPy's global generators)."""
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    x, y = _tensors(made["x"], made["y"])
    x_held_out, y_held_out = _tensors(made["x_test"], made["y_test"])
    half = len(y_held_out) // 2
    return Data(
        train=Split(x, y),
        validation=Split(x_held_out[:half], y_held_out[:half]),
        test=Split(x_held_out[half:], y_held_out[half:]),
    )


def _tensors(x: object, y: object) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.long)


class TensorBatches:
    """Shuffled batches of tensors in memory; `DataLoader` would cost more than the training."""

    def __init__(self, split: Split, batch_size: int) -> None:
        self.split, self.batch_size = split, batch_size

    def __len__(self) -> int:
        return len(self.split.y) // self.batch_size  # whole batches only

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.randperm(len(self.split.y))  # the global generator: `manual_seed` rules it
        for batch in rows.split(self.batch_size)[: len(self)]:
            yield self.split.x[batch], self.split.y[batch]


def mlp() -> nn.Module:
    """40-100-100-10 with ReLU, as in the MNIST-1D paper."""
    return nn.Sequential(
        *(nn.Linear(40, 100), nn.ReLU()),
        *(nn.Linear(100, 100), nn.ReLU()),
        nn.Linear(100, 10),
    )


def cnn() -> nn.Module:
    """Three strided convolutions (40 -> 20 -> 10 -> 5 positions) and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 40)),
        *(nn.Conv1d(1, 25, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv1d(25, 25, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv1d(25, 25, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(125, 10)),
    )


def sgd(model: nn.Module, cycle: hpsched.Cycle) -> torch.optim.Optimizer:
    """SGD; the schedule drives its learning rate and momentum."""
    return torch.optim.SGD(
        model.parameters(),
        lr=cycle.max_lr,
        momentum=cycle.max_momentum,
        weight_decay=cycle.weight_decay,
    )


def adamw(model: nn.Module, cycle: hpsched.Cycle) -> torch.optim.Optimizer:
    """AdamW; the schedule drives its learning rate and beta1."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=cycle.max_lr,
        betas=(cycle.max_momentum, 0.999),
        weight_decay=cycle.weight_decay,
    )


@torch.no_grad()
def error(model: nn.Module, split: Split) -> float:
    """Fraction of wrong answers."""
    model.eval()
    wrong = (model(split.x).argmax(1) != split.y).float().mean().item()
    model.train()
    return wrong


def validation_error(model: nn.Module) -> float:
    """What the search minimises: the error on half A."""
    return error(model, data().validation)


def test_error(model: nn.Module) -> float:
    """Error on half B, for finished recipes only: no choice may depend on it."""
    return error(model, data().test)


def train(
    cycle: hpsched.Cycle,
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module, hpsched.Cycle], torch.optim.Optimizer],
    score: Score = validation_error,
) -> float:
    """Train once, as `cycle` says; return the error."""
    # Batches this small take longer to hand to other threads than to compute, and the other cores
    # are for the other workers.
    torch.set_num_threads(1)
    batches = TensorBatches(data().train, BATCH_SIZE)
    torch.manual_seed(cycle.seed)
    model = make_model()
    optimizer = make_optimizer(model, cycle)
    schedule = cycle.schedule(optimizer)
    quarter = max(1, cycle.total_steps // 4)
    for step, (x, y) in enumerate(cycle.batches(batches), start=1):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(loss)
        if step % quarter == 0 and not cycle.is_range_test:  # four points of the learning curve
            cycle.log(train_loss=loss.item(), validation_error=validation_error(model))
    return score(model)


# The train functions by objective name; `partial(TRAIN["mlp_sgd"], score=test_error)` tests one.
TRAIN: Mapping[str, partial[float]] = MappingProxyType(
    {
        "mlp_sgd": partial(train, make_model=mlp, make_optimizer=sgd),
        "mlp_adamw": partial(train, make_model=mlp, make_optimizer=adamw),
        "cnn_sgd": partial(train, make_model=cnn, make_optimizer=sgd),
        "cnn_adamw": partial(train, make_model=cnn, make_optimizer=adamw),
    }
)


def mlp_sgd(trial: optuna.trial.BaseTrial) -> float:
    """Perceptron with SGD."""
    return _search(trial, "mlp_sgd")


def mlp_adamw(trial: optuna.trial.BaseTrial) -> float:
    """Perceptron with AdamW."""
    return _search(trial, "mlp_adamw")


def cnn_sgd(trial: optuna.trial.BaseTrial) -> float:
    """Convolutional network with SGD."""
    return _search(trial, "cnn_sgd")


def cnn_adamw(trial: optuna.trial.BaseTrial) -> float:
    """Convolutional network with AdamW."""
    return _search(trial, "cnn_adamw")


def _search(trial: optuna.trial.BaseTrial, name: str) -> float:
    total_steps = TOTAL_STEPS[name.partition("_")[0]]
    return hpsched.suggest_onecycle(trial, total_steps=total_steps).run(TRAIN[name])
