"""PyTorch Lightning: a callback that drives the Trainer's optimizer through the cycle.

::

    from hpsched.integrations.lightning import OneCycleCallback

    def train(cycle: hpsched.Cycle) -> float:
        model = LitModel(cycle)  # configure_optimizers: SGD(..., lr=cycle.max_lr), no scheduler
        trainer = Trainer(max_steps=cycle.total_steps, callbacks=[OneCycleCallback(cycle)])
        trainer.fit(model, train_loader)
        return trainer.validate(model, val_loader)[0]["val_error"]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpsched.cycle import Cycle
from hpsched.errors import UsageError

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            f"hpsched.integrations.lightning needs Lightning ({error}): "
            "pip install 'hpsched[lightning]'."
        ) from error


class OneCycleCallback(Callback):
    """Drives the optimizer of a ``Trainer`` (of ``lightning`` or ``pytorch_lightning``).

    One schedule step for each optimizer step, also under ``accumulate_grad_batches`` and for steps
    that a GradScaler skips. The loss is what ``training_step`` returns, averaged over the batches
    of an optimizer step; it stays on the device. A run that must end sets ``trainer.should_stop``.
    Its state is part of Lightning's checkpoints, so ``fit(ckpt_path=…)`` goes on in the cycle.

    Args:
        cycle: What ``train`` was given. ``max_steps=cycle.total_steps`` belongs into the Trainer,
            ``lr=cycle.max_lr`` into the optimizer.

    Raises:
        UsageError: When training starts: the Trainer's length is not the cycle's; a scheduler,
            several optimizers or manual optimization; a Trainer that has trained already; a
            checkpoint without this callback's state.
    """

    def __init__(self, cycle: Cycle) -> None:
        self.cycle = cycle
        self._losses: list[Any] = []
        self._stepped = 0  # the trainer's count of optimizer steps
        self._saved: Mapping[str, Any] = {}  # of Lightning's checkpoint

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what the cycle cannot drive."""
        _check_length(trainer, self.cycle.total_steps)
        if trainer.global_step:
            raise UsageError(
                f"the Trainer has taken {trainer.global_step} optimizer steps already: make a new "
                "Trainer, and a new model, in each train(cycle)."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take over the optimizer; the first step has the cycle's first rate."""
        _check_optimizers(trainer, pl_module)
        self._stepped = trainer.global_step
        done = self._saved.get("step", 0)
        if done != self._stepped:
            raise UsageError(
                f"the checkpoint is at step {self._stepped} and the cycle at {done}: ckpt_path is "
                "not the checkpoint of a Trainer with OneCycleCallback."
            )
        schedule = self.cycle.schedule(*trainer.optimizers)
        if self._saved:
            schedule.load_state_dict(self._saved)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch's loss; after an optimizer step, set the values of the next one."""
        if outputs:  # training_step may skip a batch
            # Lightning hands over the loss divided by the batches of a whole optimizer step.
            self._losses.append(outputs["loss"] * trainer.accumulate_grad_batches)
        if trainer.global_step == self._stepped:
            return
        self._stepped = trainer.global_step
        assert self.cycle.driver is not None
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        if not self.cycle.driver.advance(loss):
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state, for Lightning's checkpoints."""
        return self.cycle.driver.state_dict() if self.cycle.driver else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls this before there is an optimizer."""
        self._saved = state_dict


def _check_optimizers(trainer: Any, model: Any) -> None:
    if not model.automatic_optimization:
        raise UsageError(
            "the module has automatic_optimization=False, so only its own code knows its steps: "
            "leave out OneCycleCallback; in training_step call schedule.advance(loss) after each "
            "optimizer.step() with schedule = cycle.schedule(*optimizers), and set "
            "self.trainer.should_stop = cycle.should_stop."
        )
    count = sum(bool(optimizer.param_groups) for optimizer in trainer.optimizers)
    if count != 1:
        raise UsageError(
            f"configure_optimizers returned {count} optimizers, and OneCycleCallback drives one: "
            "return one, with parameter groups where rates differ."
        )
    for config in trainer.lr_scheduler_configs:
        raise UsageError(
            f"configure_optimizers returned the scheduler {type(config.scheduler).__name__}, which "
            "would set the rates that the cycle sets: return the optimizer alone."
        )


def _check_length(trainer: Any, total_steps: int) -> None:
    if trainer.max_steps != total_steps or trainer.max_epochs not in (-1, None):
        raise UsageError(
            f"the Trainer has max_steps={trainer.max_steps} and max_epochs={trainer.max_epochs}, "
            f"and the cycle {total_steps} optimizer steps: Trainer(max_steps=cycle.total_steps), "
            "without max_epochs and fast_dev_run."
        )
    if trainer.min_steps or trainer.min_epochs:
        raise UsageError(
            f"the Trainer has min_steps={trainer.min_steps} and min_epochs={trainer.min_epochs}, "
            "which would keep a range test from ending: leave both out."
        )
