"""The Ignite handler on real engines."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from framework_runs import (
    Waits,
    assert_same_weights,
    assert_whole,
    expected,
    loss_of,
    make_cycle,
    make_loader,
    make_model,
    optimizer_of,
    plain_run,
    recorded,
    search,
)
from torch import nn

import hpsched
from hpsched.cycle import Cycle, execute
from hpsched.errors import UsageError

pytestmark = pytest.mark.frameworks


def engine_of(model: nn.Module, optimizer: Any, accumulate: int = 1) -> Any:
    from ignite.engine import create_supervised_trainer

    return create_supervised_trainer(
        model,
        optimizer,
        F.cross_entropy,
        output_transform=lambda x, y, y_pred, loss: loss.detach(),
        gradient_accumulation_steps=accumulate,
    )


def run(cycle: Cycle, update: Any = None, optimizer: str = "SGD", accumulate: int = 1) -> Any:
    """Train in an engine, Ignite's own or one around ``update``; the model afterwards."""
    from ignite.engine import Engine

    from hpsched.integrations.ignite import OneCycleHandler

    model = make_model()
    torch_optimizer = optimizer_of(model, optimizer)
    if update is None:
        engine = engine_of(model, torch_optimizer, accumulate)
    else:
        engine = Engine(lambda engine, batch: update(engine, batch, model, torch_optimizer))
    OneCycleHandler(cycle, torch_optimizer, accumulate=accumulate).attach(engine)
    engine.run(make_loader(), max_iters=cycle.total_steps * accumulate)
    return model


# ------------------------------------------------------------------ parity


@pytest.mark.parametrize("kind", ["rung", "range_test"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_optimizer_used_exactly_the_schedule(
    accumulate: int, optimizer: str, kind: Any
) -> None:
    """Under bfloat16 autocast, in an update function of one's own, as Ignite's AMP is for CUDA."""

    def update(engine: Any, batch: Any, model: nn.Module, torch_optimizer: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        (loss / accumulate).backward()
        if engine.state.iteration % accumulate == 0:
            torch_optimizer.step()
            torch_optimizer.zero_grad()
        return loss

    cycle = make_cycle(20, kind)
    with recorded() as used:
        run(cycle, update, optimizer, accumulate)
    assert used == expected(cycle)
    assert len(cycle.losses()) == 20
    assert cycle.should_stop == (kind == "range_test")


@pytest.mark.parametrize("kind", ["rung", "range_test"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_same_training_as_without_ignite(accumulate: int, kind: Any) -> None:
    ours, plain = make_cycle(20, kind), make_cycle(20, kind)
    model = run(ours, accumulate=accumulate)
    assert_same_weights(model, plain_run(plain, accumulate))
    assert ours.losses() == pytest.approx(plain.losses(), rel=1e-5)


def test_a_step_that_the_scaler_skips_counts_as_one() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)

    def update(engine: Any, batch: Any, model: nn.Module, optimizer: Any) -> Any:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        if engine.state.iteration == 4:
            model[0].bias.grad.fill_(math.inf)  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        return loss

    cycle = make_cycle(12)
    with recorded() as used:
        run(cycle, update)
    every = expected(cycle)
    assert used == every[:3] + every[4:]
    assert cycle.steps == 12


def test_losses_in_other_outputs_and_several_optimizers() -> None:
    from ignite.engine import Engine

    from hpsched.integrations.ignite import OneCycleHandler

    model, cycle = make_model(), make_cycle(10)
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.AdamW(model[2].parameters(), lr=0.025)

    def update(engine: Any, batch: Any) -> Any:
        loss = loss_of(model, batch)
        loss.backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss}

    engine = Engine(update)
    handler = OneCycleHandler(cycle, first, second, output_transform=lambda out: out["loss"])
    handler.attach(engine)
    with recorded() as used:
        engine.run(make_loader(), max_iters=10)
    assert used[0::2] == [[group[0]] for group in expected(cycle)]
    assert used[1::2] == [[group[1]] for group in expected(cycle)]


def test_the_host_does_not_wait_for_the_loss() -> None:
    with Waits() as waits:
        run(make_cycle(20, "range_test"), accumulate=3)
    assert waits.found == []
    with Waits() as waits:  # and that it would be noticed
        hpsched.cycle._read([torch.tensor(1.0), 2.0])  # type: ignore[attr-defined]
    assert waits.found


# ------------------------------------------------------------------ the end of a run


@pytest.mark.parametrize("kind", ["rung", "range_test"])
def test_a_run_that_diverges_ends_at_once_in_the_ordinary_way(kind: Any) -> None:
    from ignite.engine import Engine, Events

    from hpsched.integrations.ignite import OneCycleHandler

    events: list[str] = []

    def train(cycle: Cycle) -> float:
        model = make_model()
        optimizer = optimizer_of(model)

        def update(engine: Any, batch: Any) -> Any:
            optimizer.step()
            return torch.tensor(math.nan if engine.state.iteration > 25 else 1.0)

        engine = Engine(update)
        OneCycleHandler(cycle, optimizer).attach(engine)
        for event in (Events.TERMINATE, Events.COMPLETED):
            engine.add_event_handler(event, lambda name: events.append(name), event.name)
        state = engine.run(make_loader(), max_iters=200)
        assert state.iteration == cycle.steps
        return 0.0

    outcome = execute(make_cycle(200, kind), train)
    assert (outcome.value, outcome.steps) == (None, 30)
    assert (outcome.diverged is None) == (kind == "range_test")
    assert events == ["TERMINATE", "COMPLETED"]


def test_a_sweep_that_diverges_for_real_is_ended() -> None:
    outcome = execute(make_cycle(200, "range_test", max_lr=1e6), lambda cycle: run(cycle) and 0.0)
    assert outcome.value is None
    assert 10 < outcome.steps < 200


# ------------------------------------------------------------------ logging, checkpoints


def test_the_parameter_logger_and_the_progress_bar_show_what_was_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ignite.engine import Events
    from ignite.handlers import ProgressBar, TensorboardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from hpsched.integrations.ignite import OneCycleHandler

    cycle, model = make_cycle(20), make_model()
    optimizer = optimizer_of(model)
    engine = engine_of(model, optimizer)
    OneCycleHandler(cycle, optimizer).attach(engine)
    with TensorboardLogger(log_dir=str(tmp_path)) as logger:
        logger.attach_opt_params_handler(engine, Events.ITERATION_STARTED, optimizer=optimizer)
        ProgressBar(desc="digits").attach(engine)
        engine.run(make_loader(), max_iters=20)
    events = EventAccumulator(str(tmp_path)).Reload()
    logged = [event.value for event in events.Scalars("lr/group_1")]
    assert logged == pytest.approx([groups[1][0] for groups in expected(cycle)], rel=1e-6)
    assert "digits" in capsys.readouterr().err


def test_an_ignite_checkpoint_goes_on_in_the_cycle(tmp_path: Path) -> None:
    from ignite.engine import Events
    from ignite.handlers import Checkpoint, DiskSaver

    from hpsched.integrations.ignite import OneCycleHandler

    def parts(cycle: Cycle) -> dict[str, Any]:
        model = make_model()
        optimizer = optimizer_of(model)
        engine = engine_of(model, optimizer)
        handler = OneCycleHandler(cycle, optimizer).attach(engine)
        return {"model": model, "optimizer": optimizer, "engine": engine, "cycle": handler}

    whole = make_cycle(20)
    run(whole)
    first = parts(make_cycle(20))
    saver = Checkpoint(first, DiskSaver(str(tmp_path)))
    first["engine"].add_event_handler(Events.ITERATION_COMPLETED(once=14), saver)
    first["engine"].add_event_handler(
        Events.ITERATION_COMPLETED(once=14), lambda engine: engine.terminate()
    )
    with recorded() as used:
        first["engine"].run(make_loader(), max_iters=20)
        second_cycle = make_cycle(20)
        second = parts(second_cycle)
        saved = torch.load(next(tmp_path.iterdir()), weights_only=True)
        Checkpoint.load_objects(second, saved)
        second["engine"].run(make_loader(), max_iters=20)
    assert used == expected(whole)
    assert second_cycle.losses() == pytest.approx(whole.losses(), rel=1e-5)


# ------------------------------------------------------------------ a study


def test_a_study_and_its_recipe_in_a_final_training() -> None:
    def train(cycle: Cycle) -> float:
        from hpsched.integrations.ignite import OneCycleHandler

        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=cycle.max_lr)
        engine = engine_of(model, optimizer, 2)
        OneCycleHandler(cycle, optimizer, accumulate=2).attach(engine)
        engine.run(make_loader(), max_iters=cycle.total_steps * 2)
        with torch.no_grad():
            losses = [loss_of(model, batch) for batch in make_loader()]
        return float(torch.stack(losses).mean())

    study = search(train)
    assert_whole(study, "AdamW", "beta1")
    fixed = importlib.import_module("optuna").trial.FixedTrial(hpsched.best(study).params)
    recipe = hpsched.suggest_onecycle(fixed)
    with recorded() as used:
        assert 0 <= recipe.train(train, total_steps=60, seed=1) < 0.6
    exact = recipe._schedules(60)
    assert used == [[(exact.lr(step), exact.momentum(step))] for step in range(60)]


# ------------------------------------------------------------------ wrong use


def test_an_engine_of_another_length_is_refused() -> None:
    from hpsched.integrations.ignite import OneCycleHandler

    for options, accumulate, message in [
        ({"max_epochs": 2}, 1, r"max_iters=None, max_epochs=2, .* from 0 to 20"),
        ({"max_iters": 20}, 3, r"max_iters=20, .* 0 to 60: .*accumulate=3"),
    ]:
        model = make_model()
        optimizer = optimizer_of(model)
        engine = engine_of(model, optimizer)
        OneCycleHandler(make_cycle(20), optimizer, accumulate=accumulate).attach(engine)
        with recorded() as used, pytest.raises(UsageError, match=message):
            engine.run(make_loader(), **options)
        assert not used


def test_wrong_arguments_are_refused() -> None:
    from hpsched.integrations.ignite import OneCycleHandler

    optimizer = optimizer_of(make_model())
    with pytest.raises(UsageError, match=r"no optimizer: OneCycleHandler\(cycle, optimizer\)"):
        OneCycleHandler(make_cycle())
    with pytest.raises(UsageError, match="Linear has no param_groups"):
        OneCycleHandler(make_cycle(), make_model()[0])
    with pytest.raises(UsageError, match="accumulate=0: iterations per step, at least 1"):
        OneCycleHandler(make_cycle(), optimizer, accumulate=0)


def test_an_output_that_is_no_loss_is_refused() -> None:
    with pytest.raises(UsageError, match=r"gives \{'loss': 1\.0\} as the loss: .*output_transform"):
        run(make_cycle(), lambda *args: {"loss": 1.0})
