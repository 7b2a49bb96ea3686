"""What the learning-rate finders of other packages suggest, by their own code.

Each rule takes one recorded sweep: the learning rates, and the raw loss of each step to the end,
also past divergence (``nan`` and ``inf`` are let through). It hands the losses one by one to the
package's own sweep, which smooths them, stops where it would have stopped, and suggests; only the
training step is replaced. So a rule answers as the package would have, had it seen these losses.

    torch-lr-finder  0.2.2   ``LRFinder.range_test`` and ``LRFinder.plot``, default arguments
    fastai           2.8.12  ``Learner.lr_find`` with each of its four suggestion functions
    Lightning        2.6.6   ``_LRCallback`` and ``_LRFinder.suggestion``, as ``Tuner.lr_find``

A package is imported when its rule is first called: ``make bench-venv`` installs them all.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from hpsched.errors import UsageError

Suggest = Callable[[Sequence[float], Sequence[float]], float | None]

# distribution -> how to install it; fastai declares a torchvision that it does not need here
REMEDIES = {
    "torch-lr-finder": "pip install torch-lr-finder==0.2.2 matplotlib",
    "fastai": "pip install -r studies/bench/requirements.txt && "
    "pip install --no-deps -r studies/bench/requirements-no-deps.txt",
    "lightning": "pip install 'lightning==2.6.*'",
}
FASTAI_RULES = ("valley", "slide", "minimum", "steep")

# What the packages raise where a sweep leaves them too few points to suggest anything.
TOO_SHORT = (IndexError, RuntimeError, ValueError)


def peers() -> dict[str, Suggest]:
    """Every peer's rule by its name: learning rates and raw losses to a suggestion, or none."""
    return {
        "torch-lr-finder": torch_lr_finder,
        **{f"fastai {rule}": partial(fastai, rule) for rule in FASTAI_RULES},
        "Lightning": lightning,
    }


def versions() -> dict[str, str]:
    """The installed version of each peer."""
    return {package: _version(package) for package in REMEDIES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing(package, error) from error


def _import(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(package, error) from error


def _missing(package: str, error: ImportError) -> UsageError:
    return UsageError(
        f"The peer {package} cannot be imported ({error}): {REMEDIES[package]} "
        "(make bench-venv does it)"
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what the packages print and log: progress bars, each suggestion, and its absence."""
    logged_from = logging.root.manager.disable
    logging.disable()
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield
    finally:
        logging.disable(logged_from)


# ------------------------------------------------------------------ torch-lr-finder


def torch_lr_finder(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """The steepest step between the tenth and the fifth last (torch_lr_finder/lr_finder.py)."""
    package = _import("torch-lr-finder", "torch_lr_finder")
    figure = _import("torch-lr-finder", "matplotlib.figure").Figure()
    with _silence(), contextlib.suppress(*TOO_SHORT):
        finder = _finder(package, lrs, losses)
        # The package works its rates out again: the same, save for the last digit.
        finder.history["lr"] = list(lrs[: len(finder.history["loss"])])
        _, suggestion = finder.plot(ax=figure.add_subplot())
        return float(suggestion)
    return None


def _finder(package: Any, lrs: Sequence[float], losses: Sequence[float]) -> Any:
    """An ``LRFinder`` whose ``range_test`` has seen these losses."""
    model = torch.nn.ParameterList([torch.zeros(1)])  # draws nothing from torch's generator
    optimizer = torch.optim.SGD(model.parameters(), lr=lrs[0])
    finder = package.LRFinder(model, optimizer, criterion=None)
    remaining = iter(losses)

    def train_batch(*_: Any, **__: Any) -> float:
        optimizer.step()  # no gradients, no change: the scheduler wants the call
        return float(next(remaining))

    finder._train_batch = train_batch
    batches = package.TrainDataLoaderIter([])  # of the required type; nothing is drawn from it
    finder.range_test(batches, end_lr=lrs[-1], num_iter=len(lrs))
    return finder


# ------------------------------------------------------------------ fastai


def fastai(rule: str, lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """One of ``FASTAI_RULES`` (fastai/callback/schedule.py), as ``lr_find`` calls it."""
    schedule = _import("fastai", "fastai.callback.schedule")
    learner = _Learner(schedule, lrs, losses)
    with contextlib.suppress(*TOO_SHORT):
        (suggestion,) = schedule.Learner.lr_find(
            learner, num_it=len(lrs), show_plot=False, suggest_funcs=getattr(schedule, rule)
        )
        return float(suggestion)
    return None


class _Learner:
    """As much of a fastai ``Learner`` as ``lr_find``, ``LRFinder`` and ``Recorder`` touch."""

    training = True
    yb = (None,)
    smooth_loss: torch.Tensor  # Recorder sets it

    def __init__(self, schedule: Any, lrs: Sequence[float], losses: Sequence[float]) -> None:
        self.schedule = schedule
        self.sweep = list(zip(lrs, losses, strict=True))
        self.dls = SimpleNamespace(train=self.sweep)
        self.no_logging = contextlib.nullcontext
        self.recorder = schedule.Recorder()
        self.recorder.learn = self
        self.recorder.lrs, self.recorder.losses = [], []

    def fit(self, _epochs: int, cbs: Any) -> None:
        """Recorder, then ``LRFinder``, after each recorded step until the finder cancels."""
        finder = cbs  # lr_find passes this one callback
        finder.learn = self
        # LRFinder.before_fit, less saving the model:
        self.schedule.ParamScheduler.before_fit(finder)
        finder.best_loss = float("inf")
        with contextlib.suppress(self.schedule.CancelFitException):
            for step, (lr, loss) in enumerate(self.sweep, start=1):
                self.train_iter = step
                self.opt = SimpleNamespace(hypers=[{"lr": lr}])
                self.loss = torch.tensor(loss, dtype=torch.float32)  # as a model's loss would be
                self.recorder.after_batch()
                finder.after_batch()


# ------------------------------------------------------------------ Lightning


def lightning(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """The steepest step per unit of rate, not of its logarithm (lightning/pytorch/tuner)."""
    tuner = _import("lightning", "lightning.pytorch.tuner.lr_finder")
    callback = _lightning_callback(tuner, lrs, losses)
    finder = tuner._LRFinder("exponential", lrs[0], lrs[-1], len(lrs))
    finder.results = {"lr": callback.lrs, "loss": callback.losses}
    with _silence():
        suggestion = finder.suggestion()
    return None if suggestion is None else float(suggestion)


def _lightning_callback(tuner: Any, lrs: Sequence[float], losses: Sequence[float]) -> Any:
    """The callback of ``Tuner.lr_find``, run on these losses until it stops the trainer."""
    callback = tuner._LRCallback(len(lrs))
    scheduler = SimpleNamespace()
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=1,
        fit_loop=SimpleNamespace(batch_idx=0),
        lr_scheduler_configs=[SimpleNamespace(scheduler=scheduler)],
        should_stop=False,
        strategy=SimpleNamespace(broadcast=lambda value: value),
    )
    for step, (lr, loss) in enumerate(zip(lrs, losses, strict=True), start=1):
        scheduler.lr = [lr]
        callback.on_train_batch_start(trainer, None, None, step - 1)
        trainer.global_step = step  # the optimizer has stepped when on_train_batch_end is called
        outputs = {"loss": torch.tensor(loss, dtype=torch.float64)}
        callback.on_train_batch_end(trainer, None, outputs, None, step - 1)
        if trainer.should_stop:
            break
    return callback
