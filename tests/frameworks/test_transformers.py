"""The Transformers callback in the real Trainer, with models that need no hub."""

from __future__ import annotations

import importlib
import math
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
    make_model,
    optimizer_of,
    plain_run,
    recorded,
    search,
)
from torch import nn

import hpsched
from hpsched.cycle import Cycle, execute
from hpsched.errors import TrainingError, UsageError

pytestmark = pytest.mark.frameworks
DATA = [{"inputs": x, "labels": y} for x, y in make_data()]


@pytest.fixture(autouse=True)
def in_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Model(nn.Module):
    """The common model as the Trainer wants it."""

    def __init__(self, scale: Any = lambda batch: 1.0) -> None:
        super().__init__()
        self.net = make_model()
        self.scale = scale
        self.batches = 0

    def forward(self, inputs: Any, labels: Any) -> dict[str, Any]:
        factor = self.scale(self.batches)
        self.batches += self.training
        return {"loss": loss_of(self.net, (inputs, labels)) * factor, "logits": self.net(inputs)}


def arguments_of(cycle: Cycle, accumulate: int = 1, **options: Any) -> Any:
    from transformers import TrainingArguments

    defaults = {
        "output_dir": "runs",
        "max_steps": cycle.total_steps,
        "learning_rate": cycle.max_lr,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": accumulate,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **options})


def trainer_of(
    cycle: Cycle, model: Any = None, optimizer: str = "SGD", accumulate: int = 1, **options: Any
) -> Any:
    from transformers import Trainer

    from hpsched.integrations.transformers import OneCycleCallback

    model = model or Model()
    trainer = Trainer(
        model,
        arguments_of(cycle, accumulate, **options),
        train_dataset=DATA,  # type: ignore[arg-type]
        eval_dataset=DATA,  # type: ignore[arg-type]
        optimizers=(optimizer_of(model.net, optimizer), None),
    )
    OneCycleCallback(cycle).attach(trainer)
    return trainer


# ------------------------------------------------------------------ parity


@pytest.mark.parametrize("kind", ["rung", "range_test"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_optimizer_used_exactly_the_schedule(
    accumulate: int, optimizer: str, kind: Any
) -> None:
    cycle = make_cycle(20, kind)
    with recorded() as used:
        trainer_of(cycle, None, optimizer, accumulate, bf16=True).train()
    assert used == expected(cycle)
    assert len(cycle.losses()) == 20
    assert cycle.should_stop == (kind == "range_test")


@pytest.mark.parametrize("kind", ["rung", "range_test"])
@pytest.mark.parametrize("accumulate", [1, 7])
def test_the_same_training_as_without_the_trainer(accumulate: int, kind: Any) -> None:
    ours, plain = make_cycle(20, kind), make_cycle(20, kind)
    model = Model()
    trainer_of(ours, model, accumulate=accumulate).train()
    assert_same_weights(model.net, plain_run(plain, accumulate))
    assert ours.losses() == pytest.approx(plain.losses(), rel=1e-5)


def test_the_loss_of_a_shorter_last_step_is_a_mean_too() -> None:
    """Seven batches a round in steps of three: the Trainer steps on the seventh alone."""

    def forward(inputs: Any, labels: Any) -> dict[str, Any]:
        batches.append(len(batches))
        return {"loss": loss_of(model.net, (inputs, labels)) * 0 + batches[-1]}

    batches: list[int] = []
    cycle, model = make_cycle(6), Model()
    model.forward = forward  # type: ignore[method-assign]
    trainer_of(cycle, model, accumulate=3).train()
    assert cycle.losses() == [1.0, 4.0, 6.0, 8.0, 11.0, 13.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_language_models_loss_is_the_one_that_the_trainer_optimizes(smoothing: float) -> None:
    """It divides by the tokens of all batches of a step, and may smooth the labels itself."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer

    from hpsched.integrations.transformers import OneCycleCallback

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    rows = torch.randint(0, 20, (12, 16))
    data = [{"input_ids": row, "labels": row.clone()} for row in rows]
    data[0]["labels"][4:] = -100  # steps of unequal numbers of tokens
    cycle = make_cycle(8, max_lr=0.01)
    arguments = arguments_of(
        cycle,
        3,
        per_device_train_batch_size=2,
        label_smoothing_factor=smoothing,
        logging_steps=1,
        adam_beta1=cycle.max_momentum,
    )
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data)  # type: ignore[arg-type]
    OneCycleCallback(cycle).attach(trainer)
    with recorded() as used:
        trainer.train()
    logs = [log for log in trainer.state.log_history if "learning_rate" in log]
    assert cycle.losses() == pytest.approx([log["loss"] for log in logs], rel=1e-4)
    assert used == expected(cycle, (1.0, 1.0))
    assert [log["learning_rate"] for log in logs] == [groups[0][0] for groups in expected(cycle)]


def test_a_subclass_with_a_loss_of_its_own() -> None:
    from transformers import Trainer

    from hpsched.integrations.transformers import OneCycleCallback

    class Doubled(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(model, inputs, *args, **kwargs)

    own, plain = make_cycle(5, "range_test"), make_cycle(5, "range_test")
    model = Model()
    optimizers = (optimizer_of(model.net), None)
    trainer = Doubled(model, arguments_of(own), train_dataset=DATA, optimizers=optimizers)  # type: ignore[arg-type]
    OneCycleCallback(own).attach(trainer)
    trainer.train()
    trainer_of(plain).train()
    assert own.losses()[0] == pytest.approx(2 * plain.losses()[0], rel=1e-5)
    assert len(own.losses()) == 5


def test_a_step_that_the_scaler_skips_counts_as_one() -> None:
    """Accelerate has a GradScaler on GPUs only, so the optimizer is given one here."""
    from transformers import TrainerCallback

    class Overflow(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            from accelerate.optimizer import patch_optimizer_step

            shell = trainer.optimizer
            shell.scaler = scaler
            shell._accelerate_step_called = False
            shell._optimizer_original_step_method = shell.optimizer.step
            shell._optimizer_patched_step_method = patch_optimizer_step(shell, shell.optimizer.step)
            trainer.accelerator.scaler = scaler

        def on_pre_optimizer_step(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                model.net[0].bias.grad.fill_(math.inf)  # type: ignore[union-attr, operator]

    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    cycle, model = make_cycle(12), Model()
    trainer = trainer_of(cycle, model)
    trainer.add_callback(Overflow())
    with recorded() as used:
        trainer.train()
    every = expected(cycle)
    assert used == every[:3] + every[4:]
    assert cycle.steps == trainer.state.global_step == 12


def test_the_host_does_not_wait_for_the_loss() -> None:
    with Waits() as waits:
        trainer_of(make_cycle(20, "range_test"), accumulate=3).train()
    assert waits.found == []


# ------------------------------------------------------------------ the end of a run


@pytest.mark.parametrize("kind", ["rung", "range_test"])
def test_a_run_that_diverges_ends_at_once_in_the_ordinary_way(kind: Any) -> None:
    from transformers import Trainer

    def train(cycle: Cycle) -> float:
        trainer = trainer_of(cycle, Model(lambda batch: math.nan if batch >= 25 else 1.0))
        output = trainer.train()
        assert output.global_step == cycle.steps
        assert not trainer.is_in_train
        assert trainer.training_step.__func__ is Trainer.training_step
        return 0.0

    outcome = execute(make_cycle(200, kind), train)
    assert (outcome.value, outcome.steps) == (None, 30)
    assert (outcome.diverged is None) == (kind == "range_test")


def test_a_sweep_that_diverges_for_real_is_ended() -> None:
    cycle = make_cycle(200, "range_test", max_lr=1e6)
    outcome = execute(cycle, lambda cycle: trainer_of(cycle).train() and 0.0)
    assert outcome.value is None
    assert cycle.stopped == "the sweep has diverged"
    assert 10 < outcome.steps < 200


# ------------------------------------------------------------------ logging, checkpoints


def test_logs_and_progress_bar_show_what_was_used(capsys: pytest.CaptureFixture[str]) -> None:
    cycle = make_cycle(20, "range_test")
    trainer = trainer_of(
        cycle,
        accumulate=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=7,
        disable_tqdm=False,
    )
    trainer.train()
    logs = trainer.state.log_history
    rates = [log["learning_rate"] for log in logs if "learning_rate" in log]
    assert rates == [groups[0][0] for groups in expected(cycle)]
    assert [log["step"] for log in logs if "eval_loss" in log] == [7, 14, 20]
    assert "20/20" in capsys.readouterr().err


def test_a_checkpoint_of_the_trainer_goes_on_in_the_cycle() -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 9

    whole = make_cycle(20)
    trainer_of(whole).train()
    saving = {"save_strategy": "steps", "save_steps": 9}
    first, second = make_cycle(20), make_cycle(20)
    trainer = trainer_of(first, **saving)
    trainer.add_callback(Stop())
    with recorded() as used:
        trainer.train()
        trainer_of(second, **saving).train(resume_from_checkpoint="runs/checkpoint-9")
    assert used == expected(whole)
    assert second.losses() == pytest.approx(whole.losses(), rel=1e-5)


# ------------------------------------------------------------------ a study


def test_a_study_and_its_recipe_in_a_final_training() -> None:
    from transformers import Trainer

    from hpsched.integrations.transformers import OneCycleCallback

    def train(cycle: Cycle) -> float:
        arguments = arguments_of(cycle, 2, adam_beta1=cycle.max_momentum, bf16=True)
        trainer = Trainer(Model(), arguments, train_dataset=DATA, eval_dataset=DATA)  # type: ignore[arg-type]
        OneCycleCallback(cycle).attach(trainer)
        trainer.train()
        return math.nan if cycle.should_stop else float(trainer.evaluate()["eval_loss"])

    study = search(train)
    assert_whole(study, "AdamW", "beta1")
    fixed = importlib.import_module("optuna").trial.FixedTrial(hpsched.best(study).params)
    recipe = hpsched.suggest_onecycle(fixed)
    with recorded() as used:
        assert 0 <= recipe.train(train, total_steps=60, seed=1) < 0.6
    exact = recipe._schedules(60)
    assert used == [[(exact.lr(step), exact.momentum(step))] * 2 for step in range(60)]


# ------------------------------------------------------------------ wrong use


def test_a_callback_that_is_not_attached_is_refused() -> None:
    from transformers import Trainer

    from hpsched.integrations.transformers import OneCycleCallback

    cycle = make_cycle()
    trainer = Trainer(
        Model(),
        arguments_of(cycle),
        train_dataset=DATA,  # type: ignore[arg-type]
        callbacks=[OneCycleCallback(cycle)],
    )
    with recorded() as used, pytest.raises(UsageError, match=r"callbacks=\[…\].*attach\(trainer\)"):
        trainer.train()
    assert not used


def test_a_trainer_of_another_length_is_refused() -> None:
    with recorded() as used, pytest.raises(UsageError, match=r"max_steps=7 and the cycle 20 "):
        trainer_of(make_cycle(20), max_steps=7).train()
    assert not used


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type='cosine' and warmup_steps=0.*leave"),
        ({"warmup_steps": 10}, "warmup_steps=10.*leave both out"),
    ],
)
def test_another_scheduler_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainer_of(make_cycle(), **options)


def test_a_scheduler_that_was_passed_and_a_model_init_are_refused() -> None:
    from transformers import Trainer

    from hpsched.integrations.transformers import OneCycleCallback

    cycle, model = make_cycle(), Model()
    optimizer = optimizer_of(model.net)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Trainer(model, arguments_of(cycle), optimizers=(optimizer, scheduler))
    with pytest.raises(UsageError, match=r"the scheduler LambdaLR, .*optimizers=\(optimizer, None"):
        OneCycleCallback(cycle).attach(trainer)
    trainer = Trainer(args=arguments_of(cycle), model_init=Model)
    with pytest.raises(UsageError, match="model_init: pass model="):
        OneCycleCallback(cycle).attach(trainer)


def test_a_checkpoint_without_the_cycle_is_refused() -> None:
    from transformers import Trainer

    cycle = make_cycle()
    options = {"save_strategy": "steps", "save_steps": 5}
    Trainer(Model(), arguments_of(cycle, max_steps=5, **options), train_dataset=DATA).train()  # type: ignore[arg-type]
    trainer = trainer_of(cycle, optimizer="AdamW")
    with pytest.raises(UsageError, match=r"at step 5 and the cycle at 0: .*OneCycleCallback"):
        trainer.train(resume_from_checkpoint="runs/checkpoint-5")


def test_one_callback_is_for_one_run() -> None:
    trainer = trainer_of(make_cycle())
    trainer.train()
    with pytest.raises(TrainingError, match="called twice"):
        trainer.train()
