"""The Lightning callback inside the real Trainer, of both packages that it comes in."""

from __future__ import annotations

import importlib
import math
import os
import signal
import subprocess
import sys
import time
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
    make_loader,
    make_model,
    optimizer_of,
    plain_run,
    recorded,
    search,
)

import hpsched
from hpsched.cycle import Cycle, execute
from hpsched.errors import TrainingError, UsageError

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pytorch_lightning"),
]
BOTH = ("lightning.pytorch", "pytorch_lightning")


@pytest.fixture(autouse=True)
def in_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def module(optimizer: str = "SGD", package: str = BOTH[0], **changes: Any) -> Any:
    """A LightningModule around the common model; ``changes`` replace its methods."""

    class Module(importlib.import_module(package).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss_of(self.net, batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", loss_of(self.net, batch))

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.net, optimizer)

    return type("Changed", (Module,), changes)()


def trainer_of(
    cycle: Cycle, package: str = BOTH[0], callbacks: list[Any] | None = None, **options: Any
) -> Any:
    from hpsched.integrations.lightning import OneCycleCallback

    defaults = {
        "max_steps": cycle.total_steps,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [OneCycleCallback(cycle), *(callbacks or [])],
    }
    return importlib.import_module(package).Trainer(**{**defaults, **options})


def fit(cycle: Cycle, model: Any = None, **options: Any) -> Any:
    model = model or module(package=options.get("package", BOTH[0]))
    trainer = trainer_of(cycle, **options)
    trainer.fit(model, make_loader())
    return trainer


# ------------------------------------------------------------------ parity


@pytest.mark.parametrize("kind", ["rung", "range_test"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("package", BOTH)
def test_the_optimizer_used_exactly_the_schedule(
    package: str, accumulate: int, optimizer: str, kind: Any
) -> None:
    cycle, model = make_cycle(20, kind), module(optimizer, package)
    with recorded() as used:
        fit(
            cycle,
            model,
            package=package,
            accumulate_grad_batches=accumulate,
            precision="bf16-mixed",
        )
    assert used == expected(cycle)
    assert len(cycle.losses()) == 20
    assert cycle.should_stop == (kind == "range_test")


@pytest.mark.parametrize("kind", ["rung", "range_test"])
@pytest.mark.parametrize("accumulate", [1, 7])
def test_the_same_training_as_without_lightning(accumulate: int, kind: Any) -> None:
    ours, plain = make_cycle(20, kind), make_cycle(20, kind)
    model = module()
    fit(ours, model, accumulate_grad_batches=accumulate)
    assert_same_weights(model.net, plain_run(plain, accumulate))
    assert ours.losses() == pytest.approx(plain.losses(), rel=1e-5)


def test_the_loss_of_a_shorter_last_step_is_a_mean_too() -> None:
    """Seven batches a round in steps of three: Lightning steps on the seventh alone."""
    seen: list[float] = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        seen.append(float(batch_idx))
        return loss_of(self.net, batch) * 0 + batch_idx

    cycle = make_cycle(6, "range_test")
    fit(cycle, module(training_step=training_step), accumulate_grad_batches=3)
    assert cycle.losses() == [1.0, 4.0, 6.0] * 2
    assert len(seen) == 14


def test_a_step_that_the_scaler_skips_counts_as_one() -> None:
    from lightning.pytorch.plugins import MixedPrecision

    def on_after_backward(self: Any) -> None:
        if self.global_step == 3:
            self.net[0].bias.grad.fill_(math.inf)

    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    cycle = make_cycle(12)
    precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    with recorded() as used:
        fit(cycle, module(on_after_backward=on_after_backward), plugins=precision)
    every = expected(cycle)
    assert used == every[:3] + every[4:]
    assert cycle.steps == 12


def test_the_host_does_not_wait_for_the_loss() -> None:
    with Waits() as waits:
        fit(make_cycle(20, "range_test"), accumulate_grad_batches=3)
    assert waits.found == []


# ------------------------------------------------------------------ the end of a run


def test_a_sweep_that_diverges_ends_the_trainer_in_the_ordinary_way() -> None:
    ended: list[str] = []

    def on_train_end(self: Any) -> None:
        ended.append("train")

    def train(cycle: Cycle) -> float:
        trainer = fit(cycle, module(on_train_end=on_train_end))
        assert trainer.state.finished
        assert trainer.global_step == cycle.steps
        return 0.0

    cycle = make_cycle(200, "range_test", max_lr=1e6)
    outcome = execute(cycle, train)
    assert cycle.stopped == "the sweep has diverged"
    assert (outcome.value, outcome.diverged, ended) == (None, None, ["train"])
    assert 10 < outcome.steps < 200


def test_a_run_that_diverges_ends_at_once() -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        return loss_of(self.net, batch) * (math.nan if self.global_step >= 25 else 1.0)

    def train(cycle: Cycle) -> float:
        fit(cycle, module(training_step=training_step))
        return 0.0

    outcome = execute(make_cycle(200), train)
    assert outcome.value is None and outcome.diverged
    assert outcome.steps == 30


def test_a_validating_trainer_ends_too_and_the_next_one_is_whole() -> None:
    """Lightning validates when it is stopped; nothing of the sweep is left for the next run."""
    for kind in ("range_test", "rung"):
        cycle = make_cycle(20, kind)  # type: ignore[arg-type]
        trainer, model = trainer_of(cycle, check_val_every_n_epoch=1), module()
        with recorded() as used:
            trainer.fit(model, make_loader(), make_loader())
        assert used == expected(cycle)
        assert trainer.callback_metrics["val_loss"] > 0


# ------------------------------------------------------------------ logging, checkpoints


def test_the_learning_rate_monitor_logs_what_was_used() -> None:
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger

    class Kept(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if "lr-SGD/pg1" in metrics:
                kept[step] = (metrics["lr-SGD/pg1"], metrics["lr-SGD/pg1-momentum"])

    kept: dict[int, tuple[float, float]] = {}
    cycle = make_cycle(20)
    monitor = LearningRateMonitor(log_momentum=True)
    fit(cycle, callbacks=[monitor], logger=Kept("."), log_every_n_steps=1)
    assert [kept[step] for step in range(20)] == [step[0] for step in expected(cycle)]


def test_the_progress_bar_goes_on_working(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning.pytorch.callbacks import TQDMProgressBar

    cycle = make_cycle(20, "range_test")
    fit(cycle, callbacks=[TQDMProgressBar()], enable_progress_bar=True)
    shown = capsys.readouterr()
    assert "Epoch 2" in shown.out + shown.err


def test_a_checkpoint_of_lightning_goes_on_in_the_cycle() -> None:
    whole = make_cycle(20)
    reference = module()
    fit(whole, reference)

    first, model = make_cycle(20), module()
    trainer = trainer_of(first, callbacks=[_StopAfter(9)])
    with recorded() as used:
        trainer.fit(model, make_loader())
        trainer.save_checkpoint("half.ckpt")
        second, model = make_cycle(20), module()
        trainer_of(second).fit(model, make_loader(), ckpt_path="half.ckpt")
    assert used == expected(whole)
    assert second.losses() == pytest.approx(whole.losses(), abs=0.5)
    assert second.losses()[:9] == first.losses()


def _StopAfter(steps: int) -> Any:
    from lightning.pytorch import Callback

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= steps

    return Stop()


# ------------------------------------------------------------------ a study, and a worker


def test_a_study_and_its_recipe_in_a_final_training() -> None:
    def train(cycle: Cycle) -> float:
        torch.manual_seed(cycle.seed)
        model = module(
            configure_optimizers=lambda self: torch.optim.SGD(
                self.parameters(), lr=cycle.max_lr, momentum=cycle.max_momentum
            )
        )
        trainer = fit(cycle, model, accumulate_grad_batches=2)
        if cycle.should_stop:
            return math.nan
        return float(trainer.validate(model, make_loader(), verbose=False)[0]["val_loss"])

    study = search(train)
    assert_whole(study, "SGD", "momentum")
    recipe = hpsched.suggest_onecycle(
        importlib.import_module("optuna").trial.FixedTrial(hpsched.best(study).params)
    )
    with recorded() as used:
        assert 0 <= recipe.train(train, total_steps=60, seed=1) < 0.6
    exact = recipe._schedules(60)
    assert used == [[(exact.lr(step), exact.momentum(step))] for step in range(60)]


WORKED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import hpsched
from frameworks.test_lightning import fit, module

def on_train_batch_end(self, *args):
    if self.global_step == 5:
        Path("begun").touch()

def train(cycle):
    fit(cycle, module(on_train_batch_end=on_train_batch_end))
    return 0.0

def objective(trial):
    return hpsched.suggest_onecycle(trial, total_steps=1_000_000, range_test=False).run(train)
"""


def test_a_worker_told_to_end_puts_the_trial_back_although_lightning_handles_sigterm() -> None:
    Path("worked.py").write_text(WORKED.format(tests=str(Path(__file__).parents[1])))
    command = [sys.executable, "-m", "hpsched"]
    root = str(Path(hpsched.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    create = ["study", "create", "s", "--objective", "worked:objective", "--trials", "3"]
    subprocess.run([*command, *create], env=environment, check=True)
    attach = [*command, "worker", "attach", "s", "--devices", "cpu"]
    with subprocess.Popen(attach, env=environment) as worker:
        try:
            while not Path("begun").exists():
                assert worker.poll() is None
                time.sleep(0.1)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(60) == 128 + signal.SIGTERM
        finally:
            worker.kill()
    study = hpsched.open_study("s", "sqlite:///hpsched.db")
    assert [trial.state.name for trial in study.trials] == ["WAITING"]


# ------------------------------------------------------------------ wrong use


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 7}, r"max_steps=7 and max_epochs=-1, and the cycle 20 .*max_steps=cycle"),
        ({"max_epochs": 2}, "without max_epochs"),
        ({"fast_dev_run": 1, "max_steps": 20}, "without max_epochs and fast_dev_run"),
        ({"min_steps": 5}, "min_steps=5 .*leave both out"),
        ({"min_epochs": 1}, "min_epochs=1, .*leave both out"),
    ],
)
def test_a_trainer_of_another_length_is_refused(options: dict[str, Any], message: str) -> None:
    with recorded() as used, pytest.raises(UsageError, match=message):
        fit(make_cycle(), **options)
    assert not used


def _with_scheduler(self: Any) -> Any:
    optimizer = optimizer_of(self.net)
    return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]


def _two(self: Any) -> Any:
    return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"configure_optimizers": _with_scheduler}, "returned the scheduler StepLR, .*alone"),
        ({"automatic_optimization": False}, "automatic_optimization=False, .*schedule.advance"),
        (
            {"automatic_optimization": False, "configure_optimizers": _two},
            "cycle.schedule\\(\\*optimizers\\)",
        ),
        ({"configure_optimizers": lambda self: None}, "returned 0 optimizers"),
    ],
)
def test_a_module_that_the_cycle_cannot_drive_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with recorded() as used, pytest.raises(UsageError, match=message):
        fit(make_cycle(), module(**changes))
    assert not used


def test_a_trainer_that_has_trained_is_refused() -> None:
    from hpsched.integrations.lightning import OneCycleCallback

    trainer = fit(make_cycle())
    trainer.callbacks = [OneCycleCallback(make_cycle())]
    with pytest.raises(UsageError, match=r"taken 20 optimizer steps already: .*new Trainer"):
        trainer.fit(module(), make_loader())


def test_a_checkpoint_without_the_cycle_is_refused() -> None:
    model = module()
    trainer = trainer_of(make_cycle(), max_steps=5)
    trainer.callbacks.clear()
    trainer.fit(model, make_loader())
    trainer.save_checkpoint("other.ckpt")
    with pytest.raises(UsageError, match=r"at step 5 and the cycle at 0: .*OneCycleCallback"):
        trainer_of(make_cycle()).fit(module(), make_loader(), ckpt_path="other.ckpt")


def test_one_callback_is_for_one_run() -> None:
    cycle = make_cycle()
    fit(cycle)
    with pytest.raises(TrainingError, match="called twice"):
        fit(cycle)


@pytest.mark.parametrize("kind", ["rung", "range_test"])
def test_manual_optimization_as_the_message_says(kind: Any) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if cycle.driver is None:
            cycle.schedule(optimizer.optimizer)
        assert cycle.driver is not None
        optimizer.zero_grad()
        loss = loss_of(self.net, batch)
        self.manual_backward(loss)
        optimizer.step()
        cycle.driver.advance(loss)
        self.trainer.should_stop = cycle.should_stop

    cycle = make_cycle(20, kind)
    model = module(training_step=training_step, automatic_optimization=False)
    with recorded() as used:
        trainer = trainer_of(cycle)
        del trainer.callbacks[0]
        trainer.fit(model, make_loader())
    assert used == expected(cycle)
