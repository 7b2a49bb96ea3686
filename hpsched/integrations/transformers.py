"""Hugging Face Transformers: a callback that drives the Trainer's optimizer through the cycle.

::

    from hpsched.integrations.transformers import OneCycleCallback

    def train(cycle: hpsched.Cycle) -> float:
        arguments = TrainingArguments(max_steps=cycle.total_steps, learning_rate=cycle.max_lr, ...)
        trainer = Trainer(make_model(), arguments, train_dataset=..., eval_dataset=...)
        OneCycleCallback(cycle).attach(trainer)
        trainer.train()
        return trainer.evaluate()["eval_loss"]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpsched.cycle import Cycle, CycleSchedule
from hpsched.errors import UsageError

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        f"hpsched.integrations.transformers needs Transformers ({error}): "
        "pip install 'hpsched[transformers]'."
    ) from error


class OneCycleCallback(TrainerCallback):
    """Drives the optimizer of a ``Trainer``, or of a subclass such as TRL's.

    One schedule step for each optimizer step, also under ``gradient_accumulation_steps`` and for
    steps that a GradScaler skips. The loss is what ``trainer.training_step`` returns, summed over
    the batches of an optimizer step (the Trainer has divided it); it stays on the device. A run
    that must end sets ``control.should_training_stop``. The Trainer's logs show the rate that was
    used as ``learning_rate``, and its checkpoints hold the schedule's state, so that
    ``train(resume_from_checkpoint=…)`` goes on in the cycle.

    Args:
        cycle: What ``train`` was given. ``max_steps=cycle.total_steps`` and
            ``learning_rate=cycle.max_lr`` belong into the TrainingArguments.
    """

    def __init__(self, cycle: Cycle) -> None:
        self.cycle = cycle
        self._trainer: Any = None
        self._losses: list[Any] = []
        self._scheduler = _Scheduler(cycle)

    def attach(self, trainer: Any) -> OneCycleCallback:
        """Join a Trainer, instead of ``callbacks=[…]``: callbacks alone do not see the loss.

        Raises:
            UsageError: A scheduler, or a warm-up, was configured; ``model_init`` was passed.
        """
        _check_schedulers(trainer)
        self._trainer = trainer
        self._training_step = trainer.training_step
        trainer.training_step = self._keep_loss
        trainer.lr_scheduler = self._scheduler
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the optimizer; the first step has the cycle's first rate."""
        if self._trainer is None:
            raise UsageError(
                "OneCycleCallback was passed in callbacks=[…], where it does not see the loss: "
                "leave it out there, and call OneCycleCallback(cycle).attach(trainer)."
            )
        if state.max_steps != self.cycle.total_steps:
            raise UsageError(
                f"the Trainer has max_steps={state.max_steps} and the cycle "
                f"{self.cycle.total_steps} optimizer steps: "
                "TrainingArguments(max_steps=cycle.total_steps)."
            )
        done = self._scheduler.saved.get("step", 0)
        if state.global_step != done:
            raise UsageError(
                f"the Trainer's checkpoint is at step {state.global_step} and the cycle at {done}: "
                "it is not the checkpoint of a Trainer with OneCycleCallback."
            )
        optimizer = self._trainer.optimizer
        self._scheduler.drive(getattr(optimizer, "optimizer", optimizer))  # not Accelerate's shell

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an optimizer step, set the values of the next one."""
        assert self.cycle.driver is not None
        loss = sum(self._losses)
        self._losses.clear()
        if not self.cycle.driver.advance(loss):
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the Trainer as it was."""
        self._trainer.__dict__.pop("training_step", None)

    def _keep_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = self._training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss


class _Scheduler:
    """What the Trainer takes for its scheduler: it says and saves what the cycle does."""

    def __init__(self, cycle: Cycle) -> None:
        self._cycle = cycle
        self._optimizer: Any = None
        self.saved: Mapping[str, Any] = {}  # of the Trainer's checkpoint

    def drive(self, optimizer: Any) -> None:
        """Begin, or go on where the Trainer's checkpoint was written."""
        self._optimizer = optimizer
        schedule = self._cycle.schedule(optimizer)
        if self.saved:
            schedule.load_state_dict(self.saved)

    def step(self) -> None:
        """Nothing: the callback counts the steps, also those that a GradScaler skips."""

    def get_last_lr(self) -> list[Any]:
        """Rates of the groups, for the logs."""
        return [group["lr"] for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state."""
        schedule: CycleSchedule | None = self._cycle.driver
        return schedule.state_dict() if schedule else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The Trainer calls this before training begins."""
        self.saved = state


def _check_schedulers(trainer: Any) -> None:
    given, args = trainer.lr_scheduler, trainer.args
    if given is not None:
        raise UsageError(
            f"the Trainer was given the scheduler {type(given).__name__}, which would set the "
            "rates that the cycle sets: pass optimizers=(optimizer, None), or leave it out."
        )
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if kind not in ("linear", "constant") or args.warmup_steps:  # linear is what nobody asked for
        raise UsageError(
            f"TrainingArguments has lr_scheduler_type={kind!r} and "
            f"warmup_steps={args.warmup_steps}, and the cycle sets the rates: leave both out."
        )
    if trainer.model_init is not None:
        raise UsageError(
            "the Trainer was given model_init: pass model=…, built anew in each train(cycle)."
        )
