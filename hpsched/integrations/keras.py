"""Keras 3 on torch: the cycle as a callback of ``model.fit``, and the one-cycle callback alone.

::

    from hpsched.integrations.keras import OneCycleCallback

    def train(cycle: hpsched.Cycle) -> float:
        keras.utils.set_random_seed(cycle.seed % 2**32)
        model.compile(keras.optimizers.SGD(cycle.max_lr, cycle.max_momentum), loss)
        model.fit(x, y, epochs=cycle.total_steps, callbacks=[OneCycleCallback(cycle)])
        return validation_error(model)

Needs ``KERAS_BACKEND=torch``. Not with ``jit_compile=True``: it builds momentum into the compiled
step, and would compile at each one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hpsched import schedules
from hpsched.cycle import Cycle, ScheduleDriver
from hpsched.errors import TrainingError, UsageError

try:
    import keras
except ImportError as error:
    if error.name not in (None, "keras"):  # its backend, TensorFlow unless told otherwise
        raise ImportError(
            f"Keras needs {error.name}, its backend: set KERAS_BACKEND=torch in the environment."
        ) from error
    raise ImportError(
        f"hpsched.integrations.keras needs Keras ({error}): pip install 'hpsched[keras]'."
    ) from error

if keras.config.backend() != "torch":
    raise ImportError(
        f"Keras runs on {keras.config.backend()!r}, and hpsched.integrations.keras on torch: set "
        "KERAS_BACKEND=torch in the environment."
    )


class _Driving(keras.callbacks.Callback):
    """Knows when the optimizer has taken a step: not after each batch if it accumulates."""

    _batches = 0  # since the last step
    _iterations = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin where the optimizer is."""
        self._iterations = int(self.model.optimizer.iterations)

    def _is_step(self) -> bool:
        """Whether the batch that has just ended made one, or one that loss scaling skipped."""
        iterations, self._batches = int(self.model.optimizer.iterations), self._batches + 1
        accumulate = _inner(self.model.optimizer).gradient_accumulation_steps or 1
        if iterations == self._iterations and self._batches < 2 * accumulate - 1:
            return False
        self._iterations, self._batches = iterations, 0
        return True


class OneCycleCallback(_Driving):
    """Drives the optimizer of ``model.fit`` through a cycle, one step for each optimizer step.

    Learning rate, and ``momentum`` or ``beta_1``. Training ends at the cycle's last step, or when
    the run has been stopped, through ``model.stop_training``; the epoch in hand is validated and
    logged as any other. Batches of one optimizer step (``gradient_accumulation_steps``) count with
    their mean loss.

    Args:
        cycle: What ``train`` was given. The model is compiled with ``learning_rate=cycle.max_lr``
            and a loss.

    Raises:
        UsageError: ``fit`` begins with an optimizer that has a LearningRateSchedule, or with
            momentum bounds and an optimizer without momentum.
        TrainingError: ``fit`` was over before the cycle, or the model has no loss in a range test.
    """

    def __init__(self, cycle: Cycle) -> None:
        super().__init__()
        self.cycle = cycle
        self._losses: list[Tensor] = []  # of the batches since the last step

    def on_train_begin(self, logs: Any = None) -> None:
        """Take the optimizer over, and listen to the loss."""
        super().on_train_begin()
        if self.cycle.driver is None:
            self.cycle.schedule(KerasOptimizer(self.model.optimizer))
        compute_loss = self.model.compute_loss

        def recorded(*args: Any, **kwargs: Any) -> Any:
            loss = compute_loss(*args, **kwargs)
            if self.model.training:  # not when it validates
                self._losses.append(loss.detach())
            return loss

        # The logs have the mean since the epoch's begin, not the batch's loss.
        self.model.compute_loss = recorded

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Take a step of the schedule where the optimizer took one."""
        if not self._is_step():
            return
        driver = self.cycle.driver
        assert driver is not None
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        if not driver.advance(loss) or self.cycle.steps >= self.cycle.total_steps:
            self.model.stop_training = True

    def on_train_end(self, logs: Any = None) -> None:
        """Let go of the loss; say so if the cycle is not complete."""
        del self.model.compute_loss
        steps, total = self.cycle.steps, self.cycle.total_steps
        if steps < total and not self.cycle.should_stop:
            raise TrainingError(
                f"model.fit was over after {steps} of the cycle's {total} optimizer steps: give it "
                "more epochs, e.g. epochs=cycle.total_steps; the callback ends it in time."
            )


class OneCycle(_Driving):
    """The one-cycle policy by itself, without study or search: ``OneCycle(lr_max, steps)``.

    The rate rises from lr_max/div_factor to lr_max and falls to lr_max/(div_factor·1e4) in two
    half-cosines; ``momentum`` or ``beta_1`` mirrors it. Begins anew with each ``fit``; after
    ``steps`` steps the last values stay.

    The arguments are those of the well-known callback for TF2 and Keras, which differs in the first
    phase: there the rate would reach lr_max one step later than here, but by then the second phase
    opens, with its second value, so that lr_max is never taken. From there on both are equal.
    (``schedules.keras_one_cycle`` is that callback, step for step.)

    Args:
        lr_max: Highest learning rate.
        steps: Optimizer steps of the cycle: epochs × batches per epoch (/ accumulated batches).
        mom_min: Momentum (or beta_1) at the peak of the rate.
        mom_max: Momentum (or beta_1) at both ends.
        phase_1_pct: Share of the steps in which the rate rises.
        div_factor: The first rate is lr_max/div_factor.

    Raises:
        UsageError: A value that cannot be right.
    """

    def __init__(
        self,
        lr_max: float,
        steps: int,
        mom_min: float = 0.85,
        mom_max: float = 0.95,
        phase_1_pct: float = 0.3,
        div_factor: float = 25.0,
    ) -> None:
        super().__init__()
        self._lr_max = lr_max
        self._schedules = schedules.one_cycle(
            steps,
            max_lr=lr_max,
            div_factor=div_factor,
            pct_start=phase_1_pct,
            base_momentum=mom_min,
            max_momentum=mom_max,
        )
        self._driver: ScheduleDriver | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Take the optimizer over."""
        super().on_train_begin()
        self._driver = ScheduleDriver(
            KerasOptimizer(self.model.optimizer),
            schedules=self._schedules,
            reference_lr=self._lr_max,
        )

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Take a step of the schedule where the optimizer took one."""
        if self._is_step() and self._driver is not None:
            self._driver.step()


class KerasOptimizer:
    """A Keras optimizer as the driver wants it: one parameter group, which writes through.

    Raises:
        UsageError: Its learning rate cannot be set: a LearningRateSchedule or a function.
    """

    def __init__(self, optimizer: Any) -> None:
        self.param_groups = [_Group(_inner(optimizer))]


class _Group(dict[str, Any]):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(lr=float(optimizer.learning_rate))
        self._optimizer = optimizer
        if hasattr(optimizer, "beta_1"):
            self["betas"] = (optimizer.beta_1, getattr(optimizer, "beta_2", None))
        elif hasattr(optimizer, "momentum"):
            self["momentum"] = optimizer.momentum
        try:
            self["lr"] = self["lr"]
        except (AttributeError, TypeError):
            raise UsageError(
                f"{type(optimizer).__name__} has a learning rate of its own, which cannot be set: "
                "compile the model with a number, learning_rate=cycle.max_lr."
            ) from None

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key == "lr":
            self._optimizer.learning_rate = value
        elif key == "momentum":
            self._optimizer.momentum = value
        elif key == "betas":
            self._optimizer.beta_1 = value[0]


def _inner(optimizer: Any) -> Any:
    """The optimizer itself, not what scales its loss."""
    return getattr(optimizer, "inner_optimizer", optimizer)
