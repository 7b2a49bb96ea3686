"""The trackers, with the real packages: what they wrote is read back with tools of theirs.

The Python of docs/how-to/trackers.md is typed here, block by block.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from fake_training import FakeTraining
from numpy.testing import assert_allclose
from optuna.trial import FrozenTrial, Trial

import hpsched
from hpsched import evidence
from hpsched.observers import Observer

pytestmark = pytest.mark.frameworks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/trackers.md").read_text()
SCRIPTS = dict(re.findall(r"^```python title=(\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
STEPS = 900
QUIET = {"mode": "offline", "settings": {"silent": True}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_observer_fails() -> Iterator[None]:
    """What an observer raises would be a warning only: here it fails the test."""
    evidence.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*mend the observer")
        yield


def a_study(observer: Observer, train: Any = None, trials: int = 4) -> optuna.Study:
    """Trials of all kinds: refining ones, a full one, and a confirmation."""
    study = optuna.create_study(
        study_name="s", sampler=hpsched.OneCycleSampler(seed=3), pruner=hpsched.CyclePruner()
    )

    def objective(trial: Trial) -> float:
        width = trial.suggest_int("width", 1, 3)
        recipe = hpsched.suggest_onecycle(trial, STEPS, div_factor=25.0)
        return recipe.run(train or FakeTraining(), observers=[observer]) + 0 * width

    study.optimize(objective, n_trials=trials)
    hpsched.confirm(study, top=1, seeds=1)
    study.optimize(objective, n_trials=1)
    return study


def rungs(trial: FrozenTrial) -> dict[str, dict[str, Any]]:
    """Name in the tracker → the record as it is stored with the trial."""
    named = {"hpsched:confirm": "confirm"}
    attrs = trial.user_attrs.items()
    found = {named.get(k, k.replace("hpsched:rung:", "rung_")): v for k, v in attrs}
    return {k: v for k, v in found.items() if k == "confirm" or re.fullmatch(r"rung_\d", k)}


def sweep_of(trial: FrozenTrial) -> dict[str, Any]:
    return trial.user_attrs["hpsched:range_test"]


# -- TensorBoard ---------------------------------------------------------------------------------


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars(found: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_tensorboard_holds_what_the_study_holds(folder: Path) -> None:
    from hpsched.integrations.tensorboard import TensorBoard

    study = a_study(TensorBoard(folder / "runs"))
    repeated = study.trials[-1].user_attrs["hpsched:confirms"]
    names = {f"trial-{i}" for i in range(4)} | {f"trial-4-confirms-{repeated}"}
    assert {path.name for path in (folder / "runs/s").iterdir()} == names
    for trial in study.trials:
        name = f"trial-{trial.number}"
        found = events(folder / "runs/s" / (name if name in names else f"{name}-confirms-3"))
        for rung, record in rungs(trial).items():
            assert_allclose(scalars(found, f"{rung}/loss"), record["curves"]["loss"], rtol=1e-6)
            ended = [(record["steps"], record["value"])]
            assert_allclose(scalars(found, f"{rung}/value"), ended, rtol=1e-6)
        state = trial.state.name.lower()
        (text,) = found.Tensors("state/text_summary")
        assert text.tensor_proto.string_val[0].decode().startswith(state)
        if state == "complete":
            assert_allclose(scalars(found, "value"), [(0, trial.value)], rtol=1e-6)


def test_tensorboard_shows_the_sweep_and_the_recipe(folder: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    from hpsched.integrations.tensorboard import TensorBoard

    study = a_study(TensorBoard("runs"))
    found = events(folder / "runs/s/trial-0")
    sweep = sweep_of(study.trials[0])
    rates, losses = scalars(found, "range_test/lr"), scalars(found, "range_test/loss")
    assert [step for step, _ in rates] == list(range(1, len(sweep["losses"]) + 1))
    assert [rate for _, rate in rates] == pytest.approx(sweep["lrs"][: len(rates)])
    assert [loss for _, loss in losses] == pytest.approx(sweep["losses"], nan_ok=True)
    (text,) = found.Tensors("range_test/text_summary")
    assert b"suggests" in text.tensor_proto.string_val[0]
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    params = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: params[name].number_value for name in study.trials[0].params} == pytest.approx(
        study.trials[0].params
    )
    assert params["div_factor"].number_value == 25.0
    assert params["state"].string_value == "pruned"


def test_tensorboard_offers_the_value_as_a_column_though_the_first_trials_have_none(
    folder: Path,
) -> None:
    from tensorboard import context
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.backend_context import Context

    from hpsched.integrations.tensorboard import TensorBoard

    a_study(TensorBoard("runs"))
    runs = EventMultiplexer().AddRunsFromDirectory("runs")
    runs.Reload()
    provider = MultiplexerDataProvider(runs, "runs")
    page = Context(TBContext(data_provider=provider, logdir="runs", multiplexer=runs))
    nothing = context.RequestContext()
    shown = page.experiment_from_metadata(nothing, "", True, page.hparams_metadata(nothing, ""), [])
    assert "value" in {info.name.tag for info in shown.metric_infos}
    assert {"max_lr", "width", "state"} <= {info.name for info in shown.hparam_infos}


# -- MLflow --------------------------------------------------------------------------------------


@pytest.fixture
def address(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"  # MLflow keeps a store for each address, per process


@pytest.fixture
def client(address: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(address)


def metric(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    history = client.get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in history)


def test_mlflow_holds_what_the_study_holds(client: Any, address: str) -> None:
    from hpsched.integrations.mlflow import MLflow

    study = a_study(MLflow(address))
    experiment = client.get_experiment_by_name("s")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == len(study.trials)
    for trial in study.trials:
        run = runs[trial.user_attrs["mlflow_run_id"]]
        kept = {name: float(run.data.params[name]) for name in trial.params}
        assert kept == trial.params
        assert float(run.data.params["div_factor"]) == 25.0
        for rung, record in rungs(trial).items():
            assert metric(client, run, f"{rung}/loss") == [
                tuple(p) for p in record["curves"]["loss"]
            ]
            assert metric(client, run, f"{rung}/value") == [(record["steps"], record["value"])]
        state = trial.state.name.lower()
        assert run.data.tags["hpsched.state"] == state
        assert run.info.status == {"complete": "FINISHED", "pruned": "KILLED"}[state]
        assert run.data.metrics.get("value") == (trial.value if state == "complete" else None)
        assert ("hpsched.reason" in run.data.tags) == (state == "pruned")


def test_mlflow_shows_the_sweep_and_its_figure(client: Any, address: str) -> None:
    from hpsched.integrations.mlflow import MLflow

    study = a_study(MLflow(address))
    run = client.get_run(study.trials[0].user_attrs["mlflow_run_id"])
    sweep = sweep_of(study.trials[0])
    rates, losses = (metric(client, run, f"range_test/{name}") for name in ("lr", "loss"))
    assert [rate for _, rate in rates] == list(sweep["lrs"][: len(rates)])
    assert [loss for _, loss in losses] == pytest.approx(sweep["losses"])
    page = Path(client.download_artifacts(run.info.run_id, "range_test.html")).read_text()
    assert "plotly" in page


def test_mlflow_nests_confirmations_and_leaves_the_active_run_alone(
    client: Any, address: str
) -> None:
    import mlflow

    from hpsched.integrations.mlflow import MLflow

    mlflow.set_tracking_uri(address)
    with mlflow.start_run() as mine:
        study = a_study(MLflow(experiment="onecycle"))
        active = mlflow.active_run()
        assert active is not None
        assert active.info.run_id == mine.info.run_id
    assert client.get_run(mine.info.run_id).data.metrics == {}
    *_, first, repeat = study.trials
    assert repeat.user_attrs["hpsched:confirms"] == first.number
    tags = client.get_run(repeat.user_attrs["mlflow_run_id"]).data.tags
    assert tags["mlflow.parentRunId"] == first.user_attrs["mlflow_run_id"]
    assert tags["hpsched.confirms"] == str(first.number)
    assert client.get_experiment_by_name("onecycle") is not None


def test_an_interrupted_trial_goes_on_in_its_run(client: Any, address: str) -> None:
    from hpsched.integrations.mlflow import MLflow

    study = optuna.create_study(study_name="s", sampler=hpsched.OneCycleSampler(seed=3))
    trial = study.ask()

    def run(stop: bool) -> float:
        def train(cycle: hpsched.Cycle) -> float:
            if stop and cycle.rung == 1:
                raise KeyboardInterrupt
            return FakeTraining()(cycle)

        again = Trial(study, trial._trial_id)  # as the worker makes it that goes on
        recipe = hpsched.suggest_onecycle(again, STEPS)
        return recipe.run(train, observers=[MLflow(address)])

    with pytest.raises(KeyboardInterrupt):
        run(stop=True)
    (begun,) = client.search_runs([client.get_experiment_by_name("s").experiment_id])
    assert begun.info.status == "RUNNING"
    value = run(stop=False)
    (ended,) = client.search_runs([client.get_experiment_by_name("s").experiment_id])
    assert ended.info.run_id == begun.info.run_id
    assert ended.info.status == "FINISHED"
    assert ended.data.metrics["value"] == value
    assert {"rung_0/value", "rung_1/value", "rung_2/value"} < set(ended.data.metrics)


# -- Weights & Biases ----------------------------------------------------------------------------


def wandb_records(path: Path) -> Iterator[Any]:
    """The protobuf records of a run file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # too little for a header: zeros until the next block
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


class WandBRun:
    """What one run file says."""

    def __init__(self, path: Path) -> None:
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.step_metrics: dict[str, str] = {}
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self._keep(self.config, record.run.config.update)
            elif kind == "config":
                self._keep(self.config, record.config.update)
            elif kind == "summary":
                self._keep(self.summary, record.summary.update)
            elif kind == "history":
                self.rows.append(self._keep({}, record.history.item))
            elif kind == "metric":
                name = record.metric.name or record.metric.glob_name
                self.step_metrics[name] = record.metric.step_metric
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    @staticmethod
    def _keep(into: dict[str, Any], items: Any) -> dict[str, Any]:
        for item in items:
            into["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        return into

    def points(self, over: str, name: str) -> list[tuple[float, float]]:
        return [(row[over], row[name]) for row in self.rows if name in row]


def wandb_runs(folder: Path) -> dict[str, WandBRun]:
    import wandb

    wandb.teardown()  # its service writes the last records some time after a run was finished
    return {
        path.stem.removeprefix("run-"): WandBRun(path)
        for path in folder.glob("wandb/offline-run-*/run-*.wandb")
    }


def test_wandb_holds_what_the_study_holds(folder: Path) -> None:
    from hpsched.integrations.wandb import WandB

    study = a_study(WandB("onecycle", dir=folder, **QUIET))
    runs = wandb_runs(folder)
    assert len(runs) == len(study.trials)
    for trial in study.trials:
        found = runs[trial.user_attrs["wandb_run_id"]]
        confirms = trial.user_attrs.get("hpsched:confirms")
        assert (found.run.project, found.run.run_group) == ("onecycle", "s")
        assert found.run.job_type == ("search" if confirms is None else "confirm")
        assert found.config["confirms"] == confirms
        assert {name: found.config[name] for name in trial.params} == trial.params
        assert found.config["div_factor"] == 25.0
        for rung, record in rungs(trial).items():
            assert found.step_metrics[f"{rung}/*"] == f"{rung}/step"
            curve = found.points(f"{rung}/step", f"{rung}/loss")
            assert curve == [tuple(point) for point in record["curves"]["loss"]]
            value = found.points(f"{rung}/step", f"{rung}/value")
            assert value == [(record["steps"], record["value"])]
        assert found.summary["state"] == trial.state.name.lower()
        assert found.summary.get("value") == (None if found.summary["reason"] else trial.value)
        assert found.exit_code == 0


def test_wandb_shows_the_sweep_over_its_rate(folder: Path) -> None:
    from hpsched.integrations.wandb import WandB

    study = a_study(WandB("onecycle", dir=folder, **QUIET))
    found = wandb_runs(folder)[study.trials[0].user_attrs["wandb_run_id"]]
    sweep = sweep_of(study.trials[0])
    assert found.step_metrics["range_test/*"] == "range_test/lr"
    points = found.points("range_test/lr", "range_test/loss")
    assert [rate for rate, _ in points] == pytest.approx(sweep["lrs"][: len(points)])
    assert [loss for _, loss in points] == pytest.approx(sweep["losses"])
    media = folder.glob(f"wandb/offline-run-*-{found.run.run_id}/files/media/plotly/range_test/*")
    (figure,) = map(Path.read_text, media)
    assert json.loads(figure)["layout"]["xaxis"]["type"] == "log"


def test_wandb_leaves_the_run_of_the_process_alone_and_marks_failures(folder: Path) -> None:
    import wandb

    from hpsched.integrations.wandb import WandB

    def train(cycle: hpsched.Cycle) -> float:
        if cycle.kind == "rung":
            raise RuntimeError("the data set is on fire")
        return FakeTraining()(cycle)

    mine = wandb.init(project="mine", dir=folder, **QUIET)
    study = optuna.create_study(study_name="s", sampler=hpsched.OneCycleSampler(seed=3))
    tracker = WandB("onecycle", dir=folder, **QUIET)
    study.optimize(
        lambda trial: hpsched.suggest_onecycle(trial, STEPS).run(train, observers=[tracker]),
        n_trials=1, catch=(RuntimeError,),
    )  # fmt: skip
    assert wandb.run is mine
    mine.log({"x": 1})
    mine.finish()
    runs = wandb_runs(folder)
    failed = runs[study.trials[0].user_attrs["wandb_run_id"]]
    assert (failed.exit_code, failed.summary["state"]) == (1, "failed")
    assert "on fire" in failed.summary["reason"]
    assert runs[mine.id].points("x", "x") == [(1, 1)]
    assert len(runs) == 2


# -- the page ------------------------------------------------------------------------------------


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    for name, body in SCRIPTS.items():
        (folder / name).write_text(body)
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_STORAGE")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env={**kept, "WANDB_SILENT": "true"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mend the observer" not in done.stderr
    return done


def test_workers_of_the_service_have_the_observer_too(folder: Path) -> None:
    objective = ("--objective", "with_tensorboard:objective", "--trials", "1", "--confirm-top", "0")
    python(folder, "-m", "hpsched", "study", "create", "digits", *objective)
    python(folder, "-m", "hpsched", "worker", "attach", "digits")
    (trial,) = (folder / "runs/digits").iterdir()
    assert "rung_2/value" in events(trial).Tags()["scalars"]


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith("with_")])
def test_the_page_runs_as_printed(folder: Path, script: str) -> None:
    done = python(folder, script)
    if script == "with_tensorboard.py":
        expected = [*(f"trial-{i}" for i in range(4)), "trial-4-confirms-3"]
        assert sorted(path.name for path in (folder / "runs/digits").iterdir()) == expected
        found = events(folder / "runs/digits/trial-3")
        assert {"rung_1/loss", "rung_2/val_error", "rung_2/value"} <= set(found.Tags()["scalars"])
    elif script == "with_wandb.py":
        runs = wandb_runs(folder).values()
        assert sorted(run.run.job_type for run in runs) == ["confirm", *["search"] * 4]
    elif script == "with_mlflow.py":
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
        runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
        assert len(runs) == 5
        assert sum("mlflow.parentRunId" in run.data.tags for run in runs) == 1
    else:
        assert len(re.findall(r"the range test suggests \d", done.stdout)) == 2
        assert "complete {'value':" in done.stdout
