"""What observers are told of a trial, and that what they do never changes it."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
import pytest
from fake_training import FakeTraining
from optuna.trial import Trial, TrialState

import hpsched
from hpsched import evidence
from hpsched.errors import HpschedError, TrialLostError
from hpsched.observers import Observer, TrialEnd, parameters, run_name

STEPS = 900


class Notebook(Observer):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, str, Any]] = []

    def on_range_test(self, trial: Trial, test: hpsched.RangeTest) -> None:
        assert trial.params == {}
        self.heard.append((trial.number, "range_test", test))

    def on_rung(self, trial: Trial, cycle: Any) -> None:
        self.heard.append((trial.number, "rung", cycle))

    def on_trial_end(self, trial: Trial, end: TrialEnd) -> None:
        self.heard.append((trial.number, "end", end))

    def of(self, event: str) -> list[Any]:
        return [about for _, what, about in self.heard if what == event]


class Broken(Observer):
    def on_range_test(self, trial: Trial, test: hpsched.RangeTest) -> None:
        raise ConnectionError("the tracker is away")

    def on_rung(self, trial: Trial, cycle: Any) -> None:
        raise ConnectionError("the tracker is away")

    def on_trial_end(self, trial: Trial, end: TrialEnd) -> None:
        raise ConnectionError("the tracker is away")


def a_study(train: Any, observers: Sequence[Observer], trials: int, **recipe: Any) -> optuna.Study:
    study = optuna.create_study(
        study_name="s", sampler=hpsched.OneCycleSampler(seed=3), pruner=hpsched.CyclePruner()
    )

    def objective(trial: Trial) -> float:
        return hpsched.suggest_onecycle(trial, STEPS, **recipe).run(train, observers=observers)

    study.optimize(objective, n_trials=trials, catch=(RuntimeError, MemoryError))
    return study


def test_each_cycle_is_told_in_order_and_as_it_is_stored() -> None:
    notebook = Notebook()
    study = a_study(FakeTraining(), [notebook], trials=5)
    for trial in study.trials:
        heard = [(what, about) for number, what, about in notebook.heard if number == trial.number]
        names = [name for name in trial.user_attrs if name.startswith("hpsched:rung:")]
        first = ["range_test"] if "hpsched:range_test" in trial.user_attrs else []
        assert [what for what, _ in heard] == [*first, *["rung"] * len(names), "end"]
        stored = {name: trial.user_attrs[name]["value"] for name in names}
        told = {f"hpsched:rung:{c.rung}": c.value for what, c in heard if what == "rung"}
        assert told == stored
    ends = {trial.number: end for trial, end in zip(study.trials, notebook.of("end"), strict=True)}
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    for trial in study.trials:
        assert ends[trial.number].state == trial.state.name.lower()
        if trial.state == TrialState.COMPLETE:
            assert ends[trial.number] == TrialEnd(state="complete", values=tuple(trial.values))
        else:
            assert "gave" in ends[trial.number].reason


def test_range_tests_arrive_as_they_are_read_from_the_study() -> None:
    notebook = Notebook()
    study = a_study(FakeTraining(), [notebook], trials=3)
    stored = [evidence.range_test(record) for record in evidence.sweeps(study.trials)]
    assert notebook.of("range_test") == stored
    assert len(stored) == 2


def test_a_study_is_the_same_with_a_broken_observer_which_is_shown_once() -> None:
    evidence.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = a_study(FakeTraining(), [Broken(), notebook := Notebook()], trials=4)
    said = [str(w.message) for w in caught if "tracker is away" in str(w.message)]
    alone = a_study(FakeTraining(), [], trials=4)
    assert [t.values for t in watched.trials] == [t.values for t in alone.trials]
    assert [t.params for t in watched.trials] == [t.params for t in alone.trials]
    assert len(said) == 3  # one per event
    assert all("leave it out of run(train, observers=[...])" in text for text in said)
    assert len(notebook.of("end")) == 4  # those after the broken one still hear


@pytest.mark.parametrize(
    ("fault", "state", "reason"),
    [
        (RuntimeError("the data set is on fire"), "failed", "on fire"),
        (MemoryError("no room"), "out of memory", "no room"),
    ],
)
def test_a_trial_that_fails_says_why(fault: Exception, state: str, reason: str) -> None:
    def train(cycle: hpsched.Cycle) -> float:
        if cycle.kind == "rung":
            raise fault
        return FakeTraining()(cycle)

    notebook = Notebook()
    a_study(train, [notebook], trials=1)
    (end,) = notebook.of("end")
    assert end.state == state
    assert reason in end.reason
    assert end.named_values == {}


def test_divergence_is_told_apart_from_pruning() -> None:
    notebook = Notebook()
    a_study(FakeTraining(), [notebook], trials=1, max_lr=9.0, range_test=False)
    *_, cycle = notebook.of("rung")
    (end,) = notebook.of("end")
    assert cycle.value is None
    assert cycle.diverged is not None
    assert cycle.diverged in end.reason
    assert end.state == "diverged"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), TrialLostError("given away")])
def test_a_trial_that_is_to_be_continued_has_no_end(stop: BaseException) -> None:
    def train(cycle: hpsched.Cycle) -> float:
        if cycle.kind == "rung" and cycle.rung == 1:
            raise stop
        return FakeTraining()(cycle)

    notebook = Notebook()
    with pytest.raises(type(stop)):
        a_study(train, [notebook], trials=1, rungs=3)
    assert [cycle.rung for cycle in notebook.of("rung")] == [0]
    assert notebook.of("end") == []


def test_confirmations_are_named_after_what_they_confirm() -> None:
    names: list[str] = []

    class Names(Observer):
        def on_trial_end(self, trial: Trial, end: TrialEnd) -> None:
            names.append(run_name(trial))

    study = optuna.create_study(sampler=hpsched.OneCycleSampler(seed=3))

    def objective(trial: Trial) -> float:
        recipe = hpsched.suggest_onecycle(trial, STEPS, rungs=1)
        return recipe.run(FakeTraining(), observers=[Names()])

    study.optimize(objective, n_trials=2)
    hpsched.confirm(study, top=1, seeds=1)
    study.optimize(objective, n_trials=1)
    repeated = study.trials[2].user_attrs["hpsched:confirms"]
    assert names == ["trial-0", "trial-1", f"trial-2-confirms-{repeated}"]


def test_parameters_hold_what_is_searched_what_is_fixed_and_the_context() -> None:
    found: list[dict[str, Any]] = []

    class Parameters(Observer):
        def on_trial_end(self, trial: Trial, end: TrialEnd) -> None:
            found.append(parameters(trial) | {"searched": set(trial.params)})

    a_study(
        FakeTraining(), [Parameters()], trials=1,
        div_factor=25.0, prefix="a_", context={"batch_size": 64}, range_test=False,
    )  # fmt: skip
    (known,) = found
    assert known["a_div_factor"] == 25.0
    assert "a_div_factor" not in known["searched"]
    assert "a_max_lr" in known["searched"]
    assert (known["batch_size"], known["a_policy"], known["a_total_steps"]) == (64, "cosine", STEPS)


def test_several_objectives_have_a_value_each() -> None:
    notebook = Notebook()
    study = optuna.create_study(directions=["minimize"] * 2, sampler=hpsched.OneCycleSampler())

    def train(cycle: hpsched.Cycle) -> Any:
        value = FakeTraining()(cycle)
        return value if cycle.is_range_test else [value, 2 * value]

    def objective(trial: Trial) -> Any:
        return hpsched.suggest_onecycle(trial, STEPS).run(train, observers=[notebook])

    study.optimize(objective, n_trials=1)
    (end,) = notebook.of("end")
    assert end.values == tuple(study.trials[0].values)
    assert end.named_values == dict(zip(("value_0", "value_1"), end.values, strict=True))


@pytest.mark.parametrize(
    ("module", "observer", "missing", "arguments"),
    [
        ("tensorboard", "TensorBoard", "tensorboard", ("runs",)),
        ("mlflow", "MLflow", "mlflow", ()),
        ("wandb", "WandB", "wandb", ()),
    ],
)
def test_a_missing_tracker_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, observer: str, missing: str, arguments: tuple[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # what Python itself does not find
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    made = getattr(importlib.import_module(f"hpsched.integrations.{module}"), observer)
    with pytest.raises(HpschedError, match=rf"pip install 'hpsched\[{module}\]'"):
        made(*arguments)
