"""Accelerate's own loop: ``accumulate``, mixed precision, and the cycle that follows both."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from framework_runs import (
    Waits,
    assert_same_weights,
    assert_whole,
    expected,
    loss_of,
    make_cycle,
    make_data,
    make_loader,
    make_model,
    optimizer_of,
    plain_run,
    recorded,
    search,
)

import hpsched
from hpsched import checkpoint
from hpsched.cycle import Cycle, execute
from hpsched.errors import UsageError

pytestmark = pytest.mark.frameworks


@pytest.fixture(autouse=True)
def own_state() -> Iterator[None]:
    """Accelerate keeps its settings in the process."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerator_of(accumulate: int = 1, precision: str = "no", whole_steps: bool = False) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    plugin = GradientAccumulationPlugin(num_steps=accumulate, sync_with_dataloader=not whole_steps)
    return Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_plugin=plugin)


def run(
    cycle: Cycle, accelerator: Any = None, optimizer: str = "SGD", scale: Any = lambda step: 1.0
) -> Any:
    """Train as Accelerate's guide does; the model afterwards."""
    from hpsched.integrations.accelerate import OneCycleSchedule

    accelerator = accelerator or accelerator_of()
    model = make_model()
    model, prepared, loader = accelerator.prepare(
        model, optimizer_of(model, optimizer), make_loader()
    )
    schedule = OneCycleSchedule(cycle, accelerator, prepared)
    for batch in schedule.batches(loader):
        with accelerator.accumulate(model):
            loss = loss_of(model, batch) * scale(cycle.steps)
            accelerator.backward(loss)
            prepared.step()
            schedule.step(loss)
            prepared.zero_grad()
    return model


# ------------------------------------------------------------------ parity


@pytest.mark.parametrize("kind", ["rung", "range_test"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("whole_steps", [False, True])
def test_the_optimizer_used_exactly_the_schedule(
    whole_steps: bool, accumulate: int, optimizer: str, kind: Any
) -> None:
    cycle = make_cycle(20, kind)
    with recorded() as used:
        run(cycle, accelerator_of(accumulate, "bf16", whole_steps), optimizer)
    assert used == expected(cycle)
    assert len(cycle.losses()) == 20
    assert cycle.should_stop == (kind == "range_test")


@pytest.mark.parametrize("kind", ["rung", "range_test"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_same_training_as_without_accelerate(accumulate: int, kind: Any) -> None:
    ours, plain = make_cycle(20, kind), make_cycle(20, kind)
    model = run(ours, accelerator_of(accumulate, whole_steps=True))
    assert_same_weights(model, plain_run(plain, accumulate))
    assert ours.losses() == pytest.approx(plain.losses(), rel=1e-5)


def test_the_loss_of_a_shorter_last_step_is_a_mean_too() -> None:
    """Seven batches a round in steps of three: Accelerate steps on the seventh alone."""
    from hpsched.integrations.accelerate import OneCycleSchedule

    cycle, accelerator = make_cycle(6), accelerator_of(3)
    model = make_model()
    model, optimizer, loader = accelerator.prepare(model, optimizer_of(model), make_loader())
    schedule = OneCycleSchedule(cycle, accelerator, optimizer)
    for index, _batch in enumerate(schedule.batches(loader)):
        with accelerator.accumulate(model):
            optimizer.step()
            schedule.step(torch.tensor(float(index)))
    assert cycle.losses() == [1.0, 4.0, 6.0, 8.0, 11.0, 13.0]


def test_a_step_that_the_scaler_skips_counts_as_one() -> None:
    """Accelerate has a GradScaler on GPUs only, so its optimizer is given one here."""
    from accelerate.optimizer import AcceleratedOptimizer

    from hpsched.integrations.accelerate import OneCycleSchedule

    cycle, accelerator, model = make_cycle(12), accelerator_of(), make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    optimizer = AcceleratedOptimizer(optimizer_of(model), scaler=scaler)
    schedule = OneCycleSchedule(cycle, accelerator, optimizer)
    skipped = []
    with recorded() as used:
        for batch in schedule.batches(accelerator.prepare(make_loader())):
            with accelerator.accumulate(model):
                loss = loss_of(model, batch)
                scaler.scale(loss).backward()
                if cycle.steps == 3:
                    model[0].bias.grad.fill_(math.inf)
                optimizer.step()
                skipped.append(optimizer.step_was_skipped)
                schedule.step(loss)
                optimizer.zero_grad()
    every = expected(cycle)
    assert used == every[:3] + every[4:]
    assert skipped == [step == 3 for step in range(12)]
    assert cycle.steps == 12


def test_the_host_does_not_wait_for_the_loss() -> None:
    with Waits() as waits:
        run(make_cycle(20, "range_test"), accelerator_of(3))
    assert waits.found == []


# ------------------------------------------------------------------ the end of a run


@pytest.mark.parametrize("kind", ["rung", "range_test"])
def test_a_run_that_diverges_ends_the_loop_at_once_and_leaves_no_trace(kind: Any) -> None:
    from accelerate.state import GradientState

    def train(cycle: Cycle) -> float:
        run(cycle, scale=lambda step: math.nan if step >= 25 else 1.0)
        ended.append("train")
        return 0.0

    ended: list[str] = []
    outcome = execute(make_cycle(200, kind), train)
    assert (outcome.value, outcome.steps, ended) == (None, 30, ["train"])
    assert (outcome.diverged is None) == (kind == "range_test")
    assert GradientState().dataloader_references == [None]


def test_a_sweep_that_diverges_for_real_is_ended() -> None:
    outcome = execute(make_cycle(200, "range_test", max_lr=1e6), lambda cycle: run(cycle) and 0.0)
    assert outcome.value is None
    assert 10 < outcome.steps < 200


# ------------------------------------------------------------------ logging, checkpoints


def test_a_tracker_logs_what_was_used(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from hpsched.integrations.accelerate import OneCycleSchedule

    cycle, model = make_cycle(20), make_model()
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("runs")
    model, optimizer, loader = accelerator.prepare(model, optimizer_of(model), make_loader())
    schedule = OneCycleSchedule(cycle, accelerator, optimizer)
    for batch in schedule.batches(loader):
        with accelerator.accumulate(model):
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            accelerator.log({"lr": optimizer.param_groups[0]["lr"]}, step=cycle.steps)
            schedule.step(loss)
            optimizer.zero_grad()
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    logged = [event.value for event in events.Scalars("lr")]
    assert logged == pytest.approx([groups[0][0] for groups in expected(cycle)], rel=1e-6)


def test_a_saved_state_goes_on_in_the_cycle(tmp_path: Path) -> None:
    from hpsched.integrations.accelerate import OneCycleSchedule

    def parts(cycle: Cycle) -> Any:
        accelerator, model = accelerator_of(), make_model()
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        schedule = OneCycleSchedule(cycle, accelerator, optimizer)
        accelerator.register_for_checkpointing(schedule)
        return accelerator, model, optimizer, schedule

    cycle = make_cycle(20)
    with recorded() as used:
        for steps in (9, 11):
            accelerator, model, optimizer, schedule = parts(make_cycle(20))
            if steps == 11:
                accelerator.load_state(str(tmp_path))
            for _ in range(steps):
                optimizer.step()
                assert schedule.step(loss_of(model, make_loader().dataset[:16]))
            accelerator.save_state(str(tmp_path))
    assert used == expected(cycle)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_trials_checkpoint_goes_on_in_the_cycle(accumulate: int, tmp_path: Path) -> None:
    """hpsched's own, where accumulation does not stop at the end of a round."""
    from torch.utils.data import DataLoader

    from hpsched.integrations.accelerate import OneCycleSchedule

    class Killed(Exception):
        pass

    def train(cycle: Cycle, last: int = 20) -> Any:
        accelerator = accelerator_of(accumulate, whole_steps=True)
        torch.manual_seed(cycle.seed)
        model = make_model()
        model, optimizer, loader = accelerator.prepare(
            model, optimizer_of(model), DataLoader(make_data(), batch_size=16, shuffle=True)
        )
        schedule = OneCycleSchedule(cycle, accelerator, optimizer)
        cycle.restore(model=model, optimizer=optimizer)
        for batch in schedule.batches(loader):
            with accelerator.accumulate(model):
                loss = loss_of(model, batch)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step(loss)
                optimizer.zero_grad()
            cycle.checkpoint(model=model, optimizer=optimizer)
            if cycle.steps == last:
                raise Killed
        return model

    whole = train(make_cycle(20), last=-1)
    token = checkpoint.keeper.set(checkpoint.Keeper(tmp_path, every=0.0))
    try:
        with recorded() as used:
            with pytest.raises(Killed):
                train(make_cycle(20), last=9)
            resumed = train(make_cycle(20), last=-1)
    finally:
        checkpoint.keeper.reset(token)
    assert used == expected(make_cycle(20))
    assert_same_weights(whole, resumed)


# ------------------------------------------------------------------ a study


def test_a_study_and_its_recipe_in_a_final_training() -> None:
    def train(cycle: Cycle) -> float:
        from hpsched.integrations.accelerate import OneCycleSchedule

        accelerator, model = accelerator_of(2), make_model()
        model, optimizer, loader = accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), lr=cycle.max_lr), make_loader()
        )
        schedule = OneCycleSchedule(cycle, accelerator, optimizer)
        for batch in schedule.batches(loader):
            with accelerator.accumulate(model):
                loss = loss_of(model, batch)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step(loss)
                optimizer.zero_grad()
        with torch.no_grad():
            return float(torch.stack([loss_of(model, batch) for batch in make_loader()]).mean())

    study = search(train)
    assert_whole(study, "AdamW", "beta1")
    fixed = importlib.import_module("optuna").trial.FixedTrial(hpsched.best(study).params)
    recipe = hpsched.suggest_onecycle(fixed)
    with recorded() as used:
        assert 0 <= recipe.train(train, total_steps=60, seed=1) < 0.6
    exact = recipe._schedules(60)
    assert used == [[(exact.lr(step), exact.momentum(step))] for step in range(60)]


# ------------------------------------------------------------------ wrong use


def test_arguments_in_another_order_are_refused() -> None:
    from hpsched.integrations.accelerate import OneCycleSchedule

    optimizer = optimizer_of(make_model())
    with pytest.raises(UsageError, match=r"got SGD as accelerator and 1 .*\(cycle, accelerator, o"):
        OneCycleSchedule(make_cycle(), optimizer, accelerator_of())
    with pytest.raises(UsageError, match="and 0 optimizers"):
        OneCycleSchedule(make_cycle(), accelerator_of())
    with pytest.raises(UsageError, match="Linear has no param_groups"):
        OneCycleSchedule(make_cycle(), accelerator_of(), make_model()[0])
