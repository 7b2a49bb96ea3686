"""MLflow: an experiment per study, a run per trial, confirmations nested under their recipe's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from optuna.trial import Trial

from hpsched import observers
from hpsched.errors import HpschedError
from hpsched.observers import Observer, TrialEnd

if TYPE_CHECKING:
    from hpsched.lr_curve import RangeTest
    from hpsched.records import CycleRecord

#: The trial's attribute with the id of its run.
RUN_ID = "mlflow_run_id"
#: Entities that one request may carry.
BATCH = 1000
_STATUS = {"complete": "FINISHED", "failed": "FAILED"}  # of the others: KILLED


class MLflow(Observer):
    """Logs each trial as a run of the experiment that has the study's name.

    Curves are metrics ``range_test/loss``, ``rung_0/loss``, ``rung_2/val_error``, … with the
    optimizer step as the step, the recipe is the run's parameters, ``hpsched.state`` and
    ``hpsched.reason`` are tags, the range test's figure is an artifact. The active run of the
    process, if there is one, is left alone.

    Args:
        tracking_uri: The server or database, e.g. ``http://host:5000`` or
            ``sqlite:///mlflow.db``. Default: MLflow's own (``MLFLOW_TRACKING_URI``).
        experiment: Name of the experiment. Default: the study's.

    Raises:
        HpschedError: The package ``mlflow`` (or ``mlflow-skinny``) is not installed.
    """

    def __init__(self, tracking_uri: str | None = None, experiment: str | None = None) -> None:
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise HpschedError("mlflow is not installed: pip install 'hpsched[mlflow]'.") from None
        self._client = MlflowClient(tracking_uri=tracking_uri)
        self._experiment = experiment

    def on_range_test(self, trial: Trial, test: RangeTest) -> None:
        """Its loss and rate at each step, what was validated, and its figure."""
        curves: dict[str, Any] = {f"validation_{name}": c for name, c in test.validation.items()}
        curves["loss"] = list(enumerate(test.losses, start=1))
        curves["lr"] = list(enumerate(test.lrs[: len(test.losses)], start=1))
        self._log_curves(trial, "range_test", curves)
        self._client.log_figure(self._run(trial), test.figure(), "range_test.html")

    def on_rung(self, trial: Trial, cycle: CycleRecord) -> None:
        """Its learning curves, and its value at its last step."""
        self._log_parameters(trial)
        curves: dict[str, Any] = {**cycle.curves, "value": [(cycle.steps, cycle.value)]}
        self._log_curves(trial, observers.cycle_name(trial, cycle), curves)

    def on_trial_end(self, trial: Trial, end: TrialEnd) -> None:
        """The recipe, the value, and how it ended."""
        self._log_parameters(trial)
        run = self._run(trial)
        for name, value in end.named_values.items():
            self._client.log_metric(run, name, value)
        self._client.set_tag(run, "hpsched.state", end.state)
        if end.reason:
            self._client.set_tag(run, "hpsched.reason", end.reason)
        self._client.set_terminated(run, _STATUS.get(end.state, "KILLED"))

    def _run(self, trial: Trial) -> str:
        """Id of the trial's run, which is made when first asked for."""
        if RUN_ID not in trial.user_attrs:
            run = self._client.create_run(
                self._experiment_id(self._experiment or trial.study.study_name),
                run_name=observers.run_name(trial),
                tags=_tags(trial),
            )
            trial.set_user_attr(RUN_ID, run.info.run_id)
        return str(trial.user_attrs[RUN_ID])

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return str(self._client.create_experiment(name))
        except MlflowException:  # it is there, or another worker makes it at this moment
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def _log_parameters(self, trial: Trial) -> None:
        from mlflow.entities import Param

        known = observers.parameters(trial).items()
        params = [Param(name, str(value)) for name, value in known]
        self._client.log_batch(self._run(trial), params=params)

    def _log_curves(self, trial: Trial, name: str, curves: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [
            Metric(f"{name}/{metric}", float(value), now, step)
            for metric, points in curves.items()
            for step, value in points
            if value is not None
        ]
        for start in range(0, len(found), BATCH):
            self._client.log_batch(self._run(trial), metrics=found[start : start + BATCH])


def _tags(trial: Trial) -> dict[str, str]:
    tags = {"hpsched.study": trial.study.study_name, "hpsched.trial": str(trial.number)}
    repeats = observers.confirmed(trial)
    if repeats is None:
        return tags
    tags["hpsched.confirms"] = str(repeats)
    first = trial.study.get_trials(deepcopy=False)[repeats].user_attrs.get(RUN_ID)
    return tags if first is None else {**tags, "mlflow.parentRunId": first}
