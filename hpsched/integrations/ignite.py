"""PyTorch-Ignite: a handler that drives an engine's optimizer through the cycle.

::

    from hpsched.integrations.ignite import OneCycleHandler

    def train(cycle: hpsched.Cycle) -> float:
        trainer = create_supervised_trainer(
            model, optimizer, F.cross_entropy, output_transform=lambda x, y, y_pred, loss: loss
        )
        OneCycleHandler(cycle, optimizer).attach(trainer)
        trainer.run(loader, max_iters=cycle.total_steps)
        return validation_error(model)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hpsched.cycle import Cycle
from hpsched.errors import UsageError

try:
    from ignite.engine import Engine, Events
except ImportError as error:
    raise ImportError(
        f"hpsched.integrations.ignite needs PyTorch-Ignite ({error}): "
        "pip install 'hpsched[ignite]'."
    ) from error


class OneCycleHandler:
    """Drives the optimizers of an engine that trains, one step for each optimizer step.

    A step that a GradScaler skipped counts, too. A run that must end calls ``engine.terminate()``.

    Args:
        cycle: What ``train`` was given.
        optimizers: One or several, built with ``lr=cycle.max_lr``.
        accumulate: Iterations of the engine per optimizer step: its
            ``gradient_accumulation_steps``.
        output_transform: From the engine's output to the iteration's loss, a scalar tensor; losses
            are averaged over an optimizer step, on the device.

    Raises:
        UsageError: No optimizer; ``accumulate`` below 1. When the engine starts: its length is not
            the cycle's. After an iteration: ``output_transform`` gives no number.
    """

    def __init__(
        self,
        cycle: Cycle,
        *optimizers: Any,
        accumulate: int = 1,
        output_transform: Callable[[Any], Any] = lambda output: output,
    ) -> None:
        if not optimizers:
            raise UsageError("OneCycleHandler got no optimizer: OneCycleHandler(cycle, optimizer).")
        if accumulate < 1:
            raise UsageError(f"accumulate={accumulate!r}: iterations per step, at least 1.")
        self.cycle = cycle
        self.accumulate = accumulate
        self._output_transform = output_transform
        self._losses: list[Any] = []
        self._schedule = cycle.schedule(*optimizers)

    def attach(self, engine: Engine) -> OneCycleHandler:
        """Follow this engine from now on. Handlers attached before see the values just used."""
        engine.add_event_handler(Events.STARTED, self._check_length)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        return self

    def _check_length(self, engine: Engine) -> None:
        state, wanted = engine.state, self.cycle.total_steps * self.accumulate
        done = self.cycle.steps * self.accumulate
        if state.max_iters != wanted or state.iteration != done:
            raise UsageError(
                f"the engine runs from iteration {state.iteration} with max_iters="
                f"{state.max_iters}, max_epochs={state.max_epochs}, and the cycle from {done} to "
                f"{wanted}: engine.run(loader, max_iters=cycle.total_steps * accumulate), with "
                f"accumulate={self.accumulate} as passed to OneCycleHandler."
            )

    def _iteration_completed(self, engine: Engine) -> None:
        loss = self._output_transform(engine.state.output)
        if not isinstance(loss, Tensor | float | int):
            raise UsageError(
                f"the engine's output gives {loss!r} as the loss: pass "
                "OneCycleHandler(output_transform=…), from the engine's output to its loss."
            )
        self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        if engine.state.iteration % self.accumulate:
            return
        mean = sum(self._losses) / len(self._losses)
        self._losses.clear()
        if not self._schedule.advance(mean):
            engine.terminate()

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state, for Ignite's ``Checkpoint``."""
        return self._schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self._schedule.load_state_dict(state)
