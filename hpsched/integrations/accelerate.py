"""Hugging Face Accelerate: the cycle in a loop of your own, with ``accelerator.accumulate``.

::

    from hpsched.integrations.accelerate import OneCycleSchedule

    def train(cycle: hpsched.Cycle) -> float:
        accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision="bf16")
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        schedule = OneCycleSchedule(cycle, accelerator, optimizer)  # not to be prepared
        for inputs, targets in schedule.batches(loader):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step(loss)
                optimizer.zero_grad()
        return validation_error(model)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from hpsched.cycle import Cycle
from hpsched.errors import UsageError

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError(
        f"hpsched.integrations.accelerate needs Accelerate ({error}): "
        "pip install 'hpsched[accelerate]'."
    ) from error


class OneCycleSchedule:
    """Drives prepared optimizers through the cycle, one step for each optimizer step.

    Args:
        cycle: What ``train`` was given.
        accelerator: Says when gradients are complete.
        optimizers: One or several, prepared or not, built with ``lr=cycle.max_lr``.

    Raises:
        UsageError: Arguments in another order; no optimizer.
    """

    def __init__(self, cycle: Cycle, accelerator: Accelerator, *optimizers: Any) -> None:
        if not isinstance(accelerator, Accelerator) or not optimizers:
            raise UsageError(
                f"OneCycleSchedule got {type(accelerator).__name__} as accelerator and "
                f"{len(optimizers)} optimizers: OneCycleSchedule(cycle, accelerator, optimizer)."
            )
        self.cycle = cycle
        self.accelerator = accelerator
        self._losses: list[Any] = []
        # Accelerate's shells would hide which optimizers these are.
        self._schedule = cycle.schedule(*(getattr(o, "optimizer", o) for o in optimizers))

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Batches for ``cycle.total_steps`` optimizer steps, going round the prepared loader.

        Ends early once the run has been stopped.
        """
        accumulate = self.accelerator.gradient_accumulation_steps
        try:
            for batch in self.cycle.batches(loader, accumulate):
                yield batch
                # The last batches of a round make a step even where they are too few for one.
                if self.cycle.steps >= self.cycle.total_steps:
                    break
        finally:
            if hasattr(loader, "end"):  # Accelerate counts a loader that was left as one in use
                loader.end()

    def step(self, loss: Tensor) -> bool:
        """After each ``optimizer.step()`` inside ``accelerator.accumulate``.

        Acts when the gradients are complete, as ``optimizer.step()`` does, also for a step that a
        GradScaler skipped.

        Args:
            loss: This batch's loss; averaged over those of an optimizer step, on the device.

        Returns:
            Whether to train on; :meth:`batches` ends by itself.
        """
        self._losses.append(loss.detach())
        if not self.accelerator.sync_gradients:
            return True
        mean = sum(self._losses) / len(self._losses)
        self._losses.clear()
        return self._schedule.advance(mean)

    def state_dict(self) -> dict[str, Any]:
        """For ``accelerator.register_for_checkpointing(schedule)``."""
        return self._schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self._schedule.load_state_dict(state)
