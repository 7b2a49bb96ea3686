"""fastai: the cycle as a callback of ``Learner.fit``.

::

    from hpsched.integrations.fastai import OneCycleCallback

    def train(cycle: hpsched.Cycle) -> float:
        learn = Learner(dls, model, loss, opt_func=SGD, wd=cycle.weight_decay)
        learn.fit(epochs, lr=cycle.max_lr, cbs=OneCycleCallback(cycle))
        return 1 - float(learn.validate()[1])

``fit``, not ``fit_one_cycle``, which brings a schedule of its own. ``lr=slice(…)`` gives layer
groups rates of their own, which keep their ratio to the largest.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hpsched.cycle import Cycle
from hpsched.errors import TrainingError, UsageError

try:
    from fastai.callback.core import Callback, CancelFitException, CancelTrainException
    from fastai.callback.schedule import ParamScheduler
except ImportError as error:
    raise ImportError(
        f"hpsched.integrations.fastai needs fastai ({error}): pip install 'hpsched[fastai]'."
    ) from error


class OneCycleCallback(Callback):
    """Drives the optimizer of ``Learner.fit`` through a cycle, one step for each optimizer step.

    Learning rate, and ``mom`` (momentum, or beta1 of Adam and its kin). At the cycle's last step
    the epoch in hand ends, is validated and logged, and with it the fit. A run that was stopped
    ends at once, by CancelFitException. Batches that GradientAccumulation puts into one step count
    with their mean loss; a step that mixed precision skipped counts, too.

    Args:
        cycle: What ``train`` was given.

    Raises:
        UsageError: ``fit`` begins with another scheduler, such as ``fit_one_cycle``'s, or with
            momentum bounds and an optimizer without momentum.
        TrainingError: ``fit`` was over before the cycle.
    """

    order = ParamScheduler.order
    run_valid = False

    def __init__(self, cycle: Cycle) -> None:
        super().__init__()
        self.cycle = cycle
        self._losses: list[Tensor] = []  # of the batches since the last step

    def before_fit(self) -> None:
        """Take the optimizer over."""
        others = [cb for cb in self.learn.cbs if isinstance(cb, ParamScheduler)]
        if others:
            raise UsageError(
                f"{type(others[0]).__name__} would overwrite the cycle's learning rates: call "
                "learn.fit(epochs, lr=cycle.max_lr, cbs=OneCycleCallback(cycle)) in place of "
                "fit_one_cycle."
            )
        if self.cycle.driver is None:
            self.cycle.schedule(_unwrapped(self.learn.opt))

    def after_loss(self) -> None:
        """Keep the batch's loss."""
        self._losses.append(self.learn.loss.detach())

    def after_step(self) -> None:
        """Take a step of the schedule."""
        driver = self.cycle.driver
        assert driver is not None
        driver.advance(sum(self._losses) / len(self._losses))
        self._losses.clear()

    def after_batch(self) -> None:
        """End what must end."""
        if self.cycle.should_stop:
            raise CancelFitException
        if self._is_complete:
            raise CancelTrainException

    def after_epoch(self) -> None:
        """No further epoch, now that the last one was validated."""
        if self._is_complete:
            raise CancelFitException

    def after_fit(self) -> None:
        """Say so if the cycle is not complete."""
        steps, total = self.cycle.steps, self.cycle.total_steps
        if not self._is_complete and not self.cycle.should_stop:
            raise TrainingError(
                f"learn.fit was over after {steps} of the cycle's {total} optimizer steps: give it "
                "more epochs, e.g. learn.fit(cycle.total_steps, …); the callback ends it in time."
            )

    @property
    def _is_complete(self) -> bool:
        return self.cycle.steps >= self.cycle.total_steps


class FastaiOptimizer:
    """A fastai optimizer as the driver wants it: parameter groups that write through.

    (Its own ``param_groups`` are copies.)
    """

    def __init__(self, optimizer: Any) -> None:
        self.param_groups = [_Group(hypers) for hypers in optimizer.hypers]


class _Group(dict[str, Any]):
    def __init__(self, hypers: dict[str, Any]) -> None:
        super().__init__(lr=float(hypers["lr"]))
        self._hypers = hypers
        if "sqr_mom" in hypers:  # then mom is what torch calls beta1
            self["betas"] = (hypers["mom"], hypers["sqr_mom"])
        elif "mom" in hypers:
            self["momentum"] = hypers["mom"]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key == "lr":
            self._hypers["lr"] = value
        elif key == "momentum":
            self._hypers["mom"] = value
        elif key == "betas":
            self._hypers["mom"] = value[0]


def _unwrapped(optimizer: Any) -> Any:
    """The torch optimizer in an OptimWrapper, the fastai one in Lookahead, adapted."""
    while hasattr(optimizer, "opt"):
        optimizer = optimizer.opt
    return FastaiOptimizer(optimizer) if hasattr(optimizer, "hypers") else optimizer
