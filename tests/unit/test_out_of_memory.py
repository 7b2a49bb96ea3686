"""Runs that need more memory than there is: recognised, freed, recorded, and the study goes on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from fake_training import FakeTraining
from optuna.trial import FrozenTrial, TrialState

import hpsched
from hpsched import ledger, records
from hpsched.cycle import Cycle, out_of_memory
from hpsched.records import Settings
from hpsched.study import enqueue_confirmation
from hpsched.suggest import OutOfMemory, suggest_onecycle

STEPS = 300


def on_the_cpu() -> None:
    torch.empty(2**60)


def in_python() -> None:
    bytearray(2**62)


def in_numpy() -> None:
    np.zeros(2**55)


def on_the_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")


class Framework(Exception):
    """What some frameworks raise instead."""


def with_cause() -> None:
    try:
        on_the_cpu()
    except RuntimeError as error:
        raise Framework("fit failed") from error


def with_context() -> None:
    try:
        in_python()
    except MemoryError:
        raise Framework("fit failed") from None


REAL = [on_the_cpu, in_python, in_numpy, on_the_gpu, with_cause, with_context]


def caught(call: Callable[[], None]) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("call", REAL)
def test_real_ones_are_recognised(call: Callable[[], None]) -> None:
    reason = out_of_memory(caught(call))
    assert reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to …"),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_words_that_say_it(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("the student ran out of memory cards"),
        OSError(28, "No space left on device"),
        KeyError("memory"),
    ],
)
def test_words_that_do_not(error: Exception) -> None:
    assert out_of_memory(error) is None


def test_errors_that_cause_each_other() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert out_of_memory(first) is None


# -- in a study ------------------------------------------------------------------------------------


def new_study(**options: Any) -> optuna.Study:
    return optuna.create_study(
        sampler=hpsched.OneCycleSampler(seed=0), pruner=hpsched.CyclePruner(3), **options
    )


def too_large(at: Callable[[Cycle], bool], call: Callable[[], None]) -> Callable[[Cycle], float]:
    fine = FakeTraining(horizon=STEPS)

    def train(cycle: Cycle) -> float:
        if at(cycle):
            call()
        return fine(cycle)

    return train


def objective(train: Callable[[Cycle], float]) -> Callable[[optuna.Trial], float]:
    return lambda trial: suggest_onecycle(trial, total_steps=STEPS).run(train)


def ran_out(trial: FrozenTrial) -> str:
    assert trial.state == TrialState.PRUNED
    assert trial.constraints == {records.MEMORY_CONSTRAINT: 1.0}
    assert records.DIVERGED not in trial.user_attrs
    reason = trial.user_attrs[records.OUT_OF_MEMORY]
    assert isinstance(reason, str)
    return reason


@pytest.mark.parametrize("call", REAL)
def test_a_rung_that_runs_out_is_pruned_with_the_reason(call: Callable[[], None]) -> None:
    study = new_study()
    train = too_large(lambda cycle: cycle.kind == "rung" and cycle.rung == 1, call)
    study.optimize(objective(train), n_trials=2)
    reason = ran_out(study.trials[0])
    assert reason.startswith("rung 1 (100 steps): ")
    assert len(study.trials[0].params) == 6
    assert records.sweep(study.trials[0]) is not None


def test_a_range_test_that_runs_out() -> None:
    study = new_study()
    train = too_large(lambda cycle: cycle.is_range_test, on_the_cpu)
    study.optimize(objective(train), n_trials=1)
    assert ran_out(study.trials[0]).startswith("range_test 0 (100 steps): ")
    assert records.RANGE_TEST not in study.trials[0].user_attrs
    study.optimize(objective(FakeTraining(horizon=STEPS)), n_trials=8)
    assert records.sweep(study.trials[1]) is not None
    assert hpsched.best(study).number > 0


def test_the_message_for_the_worker() -> None:
    study = new_study()
    with pytest.raises(OutOfMemory, match=r"^out of memory: range_test 0 .*allocate") as caught:
        objective(too_large(lambda cycle: True, on_the_cpu))(study.ask())
    assert isinstance(caught.value, optuna.TrialPruned)
    assert caught.value.__context__ is None  # which would hold train's variables


def test_the_memory_is_free_before_the_next_trial_begins() -> None:
    held: list[weakref.ref[Any]] = []

    def train(cycle: Cycle) -> float:
        big = torch.zeros(1000)
        ring: list[Any] = [big]
        ring.append(ring)  # only a collection finds it
        held.append(weakref.ref(big))
        on_the_cpu()
        return 0.0

    gc.disable()
    try:
        with pytest.raises(OutOfMemory) as caught:
            objective(train)(new_study().ask())
        assert [ref() for ref in held] == [None]
        del caught
    finally:
        gc.enable()


def test_several_objectives() -> None:
    study = optuna.create_study(
        directions=["minimize", "maximize"], sampler=hpsched.OneCycleSampler(seed=0)
    )
    study.optimize(objective(too_large(lambda cycle: True, in_python)), n_trials=2)
    assert [ran_out(trial) for trial in study.trials]


@pytest.mark.parametrize("budget", [{"trials": 4}, {"cycles": 4.0}])
def test_budgets(budget: dict[str, Any]) -> None:
    study = new_study()
    study.optimize(objective(too_large(lambda cycle: True, in_python)), n_trials=4)
    runs = ledger.read_runs(study.trials)
    move = ledger.next_move(Settings(objective="x:y", seed=0, **budget), runs, study.direction)
    # They count as trials. In full cycles they cost nothing: the worker gives up after a few.
    assert move.what == ("done" if "trials" in budget else "search")
    assert ledger.total_cost(runs).steps == 0


@pytest.mark.parametrize("base", ["hpsched", "tpe", "gp", "random"])
def test_a_study_in_which_large_models_run_out_finds_a_recipe(base: str) -> None:
    def train(cycle: Cycle, width: int) -> float:
        if width > 512:
            on_the_cpu()
        return FakeTraining(horizon=STEPS)(cycle)

    def widths(trial: optuna.Trial) -> float:
        width = trial.suggest_int("width", 16, 1024)
        return suggest_onecycle(trial, total_steps=STEPS).run(lambda cycle: train(cycle, width))

    sampler = hpsched.OneCycleSampler(seed=1)
    if base != "hpsched":
        bases: dict[str, Any] = {
            "tpe": optuna.samplers.TPESampler,
            "gp": optuna.samplers.GPSampler,
            "random": optuna.samplers.RandomSampler,
        }
        sampler = hpsched.OneCycleSampler(bases[base](seed=1), seed=1)
    study = optuna.create_study(sampler=sampler, pruner=hpsched.CyclePruner(3))
    study.optimize(widths, n_trials=14)
    lost = [t for t in study.trials if records.OUT_OF_MEMORY in t.user_attrs]
    assert lost
    assert all(ran_out(t) and t.params["width"] > 512 for t in lost)
    best = hpsched.best(study)
    assert best.own["width"] <= 512
    assert 0.03 < best.params["max_lr"] < 3


# -- confirmations ---------------------------------------------------------------------------------


def test_a_confirmation_that_runs_out_fails_and_is_no_mark_against_its_recipe() -> None:
    study = new_study()
    study.optimize(objective(FakeTraining(horizon=STEPS)), n_trials=6)
    before = hpsched.best(study)
    for _ in range(2):
        enqueue_confirmation(study, before.number)
    train = too_large(lambda cycle: cycle.kind == "confirm", on_the_cpu)
    with pytest.raises(MemoryError, match=r"out of memory: confirm 2 \(300 steps\): .*allocate"):
        study.optimize(objective(train), n_trials=1)
    failed = study.trials[-2]
    assert failed.state == TrialState.FAIL
    assert failed.user_attrs[records.OUT_OF_MEMORY].startswith("confirm 2 (300 steps): ")
    assert failed.constraints == {}
    after = hpsched.best(study)
    assert (after.number, after.mean) == (before.number, before.mean)
    study.optimize(objective(FakeTraining(horizon=STEPS)), n_trials=1)
    assert hpsched.best(study).fresh == (study.trials[-1].value,)
    # Another is to be run in its place.
    settings = Settings(objective="x:y", seed=0, trials=6, confirm_top=1, confirm_seeds=2)
    move = ledger.next_move(settings, ledger.read_runs(study.trials), study.direction)
    assert (move.what, move.confirms) == ("confirm", before.number)


def test_the_final_training_tells_the_user() -> None:
    recipe = suggest_onecycle(
        optuna.trial.FixedTrial(
            {"max_lr": 0.1, "div_factor": 10.0, "pct_start": 0.3, "base_momentum": 0.85,
             "max_momentum": 0.95, "weight_decay": 1e-4}
        ),
        total_steps=STEPS,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        recipe.run(too_large(lambda cycle: True, on_the_cpu))
