"""Weights & Biases: a run per trial, grouped by study."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optuna.trial import Trial

from hpsched import observers
from hpsched.errors import HpschedError
from hpsched.observers import Observer, TrialEnd

if TYPE_CHECKING:
    from hpsched.lr_curve import RangeTest
    from hpsched.records import CycleRecord

#: The trial's attribute with the id of its run.
RUN_ID = "wandb_run_id"


class WandB(Observer):
    """Logs each trial as a run of the group that has the study's name.

    Curves are ``rung_0/loss``, ``rung_2/val_error``, … over ``rung_0/step``, … and
    ``range_test/loss`` over ``range_test/lr``; the recipe is the run's config; ``value``,
    ``state`` and ``reason`` are in its summary; its job type is ``search`` or ``confirm``. A run
    of your own that is open in the process is left alone.

    Args:
        project: The project. Default: W&B's own (``WANDB_PROJECT``).
        init: More arguments of ``wandb.init``, e.g. ``mode="offline"``, ``entity="lab"``.

    Raises:
        HpschedError: The package ``wandb`` is not installed.
    """

    def __init__(self, project: str | None = None, **init: Any) -> None:
        try:
            import wandb
        except ImportError:
            raise HpschedError("wandb is not installed: pip install 'hpsched[wandb]'.") from None
        self._wandb: Any = wandb
        self._init = {"project": project, **init}
        self._runs: dict[str, Any] = {}

    def on_range_test(self, trial: Trial, test: RangeTest) -> None:
        """Its loss over its rate, what was validated, and its figure."""
        run = self._run(trial)
        run.define_metric("range_test/*", step_metric="range_test/lr")
        validated: dict[int, dict[str, float]] = {}
        for metric, points in test.validation.items():
            for step, value in points:
                validated.setdefault(step, {})[f"range_test/validation_{metric}"] = value
        for step, (rate, loss) in enumerate(zip(test.lrs, test.losses, strict=False), start=1):
            run.log({"range_test/lr": rate, "range_test/loss": loss, **validated.get(step, {})})
        run.log({"range_test/figure": test.figure()})

    def on_rung(self, trial: Trial, cycle: CycleRecord) -> None:
        """Its learning curves, and its value at its last step."""
        run, name = self._run(trial), observers.cycle_name(trial, cycle)
        run.config.update(observers.parameters(trial), allow_val_change=True)
        run.define_metric(f"{name}/*", step_metric=f"{name}/step")
        rows: dict[int, dict[str, Any]] = {}
        for metric, points in [*cycle.curves.items(), ("value", [(cycle.steps, cycle.value)])]:
            for step, value in points:
                if value is not None:
                    rows.setdefault(step, {})[f"{name}/{metric}"] = value
        for step in sorted(rows):
            run.log({f"{name}/step": step, **rows[step]})

    def on_trial_end(self, trial: Trial, end: TrialEnd) -> None:
        """The recipe, the value, and how it ended."""
        run = self._run(trial)
        run.config.update(observers.parameters(trial), allow_val_change=True)
        run.summary.update({**end.named_values, "state": end.state, "reason": end.reason})
        run.finish(exit_code=int(end.state == "failed"))
        del self._runs[run.id]

    def _run(self, trial: Trial) -> Any:
        """The trial's run, which is opened when first asked for."""
        key = trial.user_attrs.get(RUN_ID)
        if key not in self._runs:
            run = self._wandb.init(**{**_described(trial), "id": key, **self._init})
            trial.set_user_attr(RUN_ID, run.id)
            key = run.id
            self._runs[key] = run
        return self._runs[key]


def _described(trial: Trial) -> dict[str, Any]:
    confirms = observers.confirmed(trial)
    return {
        "group": trial.study.study_name,
        "name": observers.run_name(trial),
        "job_type": "search" if confirms is None else "confirm",
        "config": {"study": trial.study.study_name, "trial": trial.number, "confirms": confirms},
        "resume": "allow",
        "reinit": "create_new",
    }
