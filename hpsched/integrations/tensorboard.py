"""TensorBoard: a run per trial, under the study's name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import Trial

from hpsched import observers
from hpsched.errors import HpschedError
from hpsched.observers import Observer, TrialEnd

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from hpsched.lr_curve import RangeTest
    from hpsched.records import CycleRecord


class TensorBoard(Observer):
    """Writes each trial into ``logdir/<study>/trial-7``; look at them with ``tensorboard``.

    Curves have the tags ``range_test/loss``, ``rung_0/loss``, ``rung_2/val_error``, …, with the
    optimizer step as the step; the recipe and the value are in the HParams tab.

    Args:
        logdir: What ``tensorboard --logdir`` is given.

    Raises:
        HpschedError: The package ``tensorboard`` is not installed.
    """

    def __init__(self, logdir: str | os.PathLike[str]) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise HpschedError(
                "tensorboard is not installed: pip install 'hpsched[tensorboard]'."
            ) from None
        self._logdir = Path(logdir)
        self._writers: dict[Path, SummaryWriter] = {}

    def on_range_test(self, trial: Trial, test: RangeTest) -> None:
        """Its loss and rate at each step, what was validated, and what it suggests."""
        writer = self._writer(trial)
        for step, (rate, loss) in enumerate(zip(test.lrs, test.losses, strict=False), start=1):
            writer.add_scalar("range_test/lr", rate, step)
            writer.add_scalar("range_test/loss", loss, step)
        for metric, points in test.validation.items():
            _add_curve(writer, f"range_test/validation_{metric}", points)
        writer.add_text("range_test", repr(test))
        writer.flush()

    def on_rung(self, trial: Trial, cycle: CycleRecord) -> None:
        """Its learning curves, and its value at its last step."""
        writer, name = self._writer(trial), observers.cycle_name(trial, cycle)
        for metric, points in cycle.curves.items():
            _add_curve(writer, f"{name}/{metric}", points)
        if cycle.value is not None:
            writer.add_scalar(f"{name}/value", cycle.value, cycle.steps)
        writer.flush()

    def on_trial_end(self, trial: Trial, end: TrialEnd) -> None:
        """The recipe, the value, and how it ended."""
        from torch.utils.tensorboard import summary

        writer = self._writer(trial)
        hparams: Any = summary.hparams  # neither has types
        events: Any = writer.file_writer
        for name, value in end.named_values.items():
            writer.add_scalar(name, value)
        writer.add_text("state", f"{end.state}: {end.reason}" if end.reason else end.state)
        known = {**observers.parameters(trial), "state": end.state}
        # Without the first part, the experiment, of which TensorBoard believes the first run's
        # alone: it then offers the parameters and scalars of all runs as columns.
        _, *session = hparams({name: _plain(value) for name, value in known.items()}, {})
        for part in session:
            events.add_summary(part)
        writer.close()
        self._writers = {folder: w for folder, w in self._writers.items() if w is not writer}

    def _writer(self, trial: Trial) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        folder = self._logdir / trial.study.study_name / observers.run_name(trial)
        if folder not in self._writers:
            self._writers[folder] = SummaryWriter(folder)
        return self._writers[folder]


def _add_curve(writer: SummaryWriter, tag: str, points: Any) -> None:
    for step, value in points:
        writer.add_scalar(tag, float("nan") if value is None else value, step)


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)
