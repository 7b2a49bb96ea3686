"""The fastai callback inside the real ``Learner.fit``, and fastai's own schedules beside ours."""

from __future__ import annotations

import importlib
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from framework_runs import assert_learned, search
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hpsched import schedules
from hpsched.cycle import Cycle, execute
from hpsched.errors import TrainingError, UsageError
from hpsched.schedules import OneCycleSchedules

pytestmark = pytest.mark.frameworks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/frameworks/fastai.md").read_text()
BATCHES = 7  # an epoch

_generator = torch.Generator().manual_seed(1)
X = torch.randn(BATCHES * 16, 8, generator=_generator)
Y = (X @ torch.randn(8, 3, generator=_generator)).argmax(1)
DATA = TensorDataset(X, Y)


def make_cycle(steps: int = 20, kind: Any = "rung", max_lr: float = 0.1, **options: Any) -> Cycle:
    pair = schedules.one_cycle(steps, max_lr=max_lr)
    if kind == "range_test":
        sweep = schedules.range_test(steps, max_lr * 1e-6, max_lr)
        pair = OneCycleSchedules(sweep, schedules.constant(0.85))
    return Cycle(
        values={"max_lr": max_lr, "max_momentum": 0.95, "weight_decay": 0.0},
        schedules=pair,
        total_steps=steps,
        seed=0,
        kind=kind,
        name="a-run",
        **options,
    )


def optimizer_named(name: str) -> Any:
    from fastai import optimizer

    return {
        "SGD": partial(optimizer.SGD, mom=0.9),
        "Adam": optimizer.Adam,
        "Lookahead": optimizer.ranger,
        "torch SGD": partial(optimizer.OptimWrapper, opt=torch.optim.SGD, momentum=0.9),
        "torch AdamW": partial(optimizer.OptimWrapper, opt=torch.optim.AdamW),
    }[name]


def halves(model: nn.Sequential) -> list[list[nn.Parameter]]:
    return [list(model[0].parameters()), list(model[2].parameters())]


def make_learner(optimizer: str = "SGD", **options: Any) -> Any:
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    dls = DataLoaders(DataLoader(DATA, 16), DataLoader(DATA, 112), device=torch.device("cpu"))
    defaults = {"loss_func": nn.CrossEntropyLoss(), "opt_func": optimizer_named(optimizer)}
    return Learner(dls, model, splitter=halves, **{**defaults, **options})


def fit(learn: Any, *callbacks: Any, epochs: int = 100, lr: Any = 0.1) -> Any:
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, lr=lr, cbs=list(callbacks))
    return learn


def recorder() -> Any:
    """A callback that keeps rate and mom of each group at every step the optimizer takes."""
    from fastai.callback.core import Callback

    class Used(Callback):
        order = 1000  # after what may call the step off
        run_valid = False

        def __init__(self) -> None:
            self.steps: list[list[tuple[float, float]]] = []

        def before_step(self) -> None:
            self.steps.append([(h["lr"], h["mom"]) for h in self.learn.opt.hypers])

    return Used()


def cpu_bfloat16() -> Any:
    """fastai's MixedPrecision, which has 'cuda' written into it."""
    from fastai.callback.fp16 import AMPMode, MixedPrecision

    class OnCpu(MixedPrecision):
        def before_fit(self) -> None:
            super().before_fit()
            self.autocast = torch.autocast("cpu", torch.bfloat16)

        def after_pred(self) -> None:
            assert self.learn.pred.dtype is torch.bfloat16
            super().after_pred()

    return OnCpu(AMPMode.BF16)


def expected(pair: OneCycleSchedules, steps: int, ratios: Any = (0.25, 1.0)) -> list[Any]:
    return [
        [(pytest.approx(pair.lr(step) * r, rel=1e-12), pair.momentum(step)) for r in ratios]
        for step in range(steps)
    ]


# ------------------------------------------------------------------ parity


@pytest.mark.parametrize("kind", ["rung", "range_test"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "Lookahead", "torch SGD", "torch AdamW"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_optimizer_used_exactly_the_schedule(accumulate: int, name: str, kind: Any) -> None:
    from fastai.callback.training import GradientAccumulation

    from hpsched.integrations.fastai import OneCycleCallback

    cycle, used = make_cycle(20, kind), recorder()
    more = [GradientAccumulation(16 * accumulate)] if accumulate > 1 else []
    learn = make_learner(name)
    callbacks = [OneCycleCallback(cycle), used, cpu_bfloat16(), *more]
    fit(learn, *callbacks, lr=np.array([0.025, 0.1]))
    assert used.steps == expected(cycle.schedules, 20)
    assert len(cycle.losses()) == cycle.steps == 20
    assert cycle.should_stop == (kind == "range_test")
    assert cycle.driver is not None
    assert cycle.driver.momentum_name == ("momentum" if "SGD" in name else "beta1")


def test_the_loss_of_a_step_is_the_mean_of_its_batches() -> None:
    from fastai.callback.training import GradientAccumulation

    from hpsched.integrations.fastai import OneCycleCallback

    single, paired = (make_cycle(n, "range_test", max_lr=1e-9) for n in (14, 7))
    fit(make_learner(), OneCycleCallback(single), lr=1e-9)
    fit(make_learner(), OneCycleCallback(paired), GradientAccumulation(32), lr=1e-9)
    own = single.losses()
    assert own[:7] == pytest.approx(own[7:])
    assert paired.losses() == pytest.approx([sum(own[i : i + 2]) / 2 for i in range(0, 14, 2)])


def test_steps_that_mixed_precision_skips_count() -> None:
    from fastai.callback.core import Callback, CancelStepException

    from hpsched.integrations.fastai import OneCycleCallback

    class Skips(Callback):
        order = 10  # MixedPrecision's; it calls a step off in this way

        def before_step(self) -> None:
            if self.learn.train_iter == 4:
                raise CancelStepException

    cycle, used = make_cycle(20), recorder()
    fit(make_learner(), OneCycleCallback(cycle), used, Skips(), lr=np.array([0.025, 0.1]))
    every = expected(cycle.schedules, 20)
    assert used.steps == every[:4] + every[5:]
    assert cycle.steps == 20


# ------------------------------------------------------------------ fastai's own schedules


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"div": 10.0, "pct_start": 0.4, "div_final": 1e3}])
def test_fit_one_cycle_is_fastai_v2(epochs: int, options: dict[str, float]) -> None:
    importlib.import_module("fastai.callback.schedule")
    used, total = recorder(), epochs * BATCHES
    learn = make_learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 0.3, cbs=used, **options)
    names = {"div": "div_factor", "pct_start": "pct_start", "div_final": "div_final"}
    lr, momentum = schedules.fastai_v2(total, 0.3, **{names[k]: v for k, v in options.items()})
    rates, momenta = zip(*(step[1] for step in used.steps), strict=True)
    assert rates == pytest.approx([lr(step) for step in range(total)], rel=1e-4, abs=1e-7)
    assert momenta == pytest.approx([momentum(step) for step in range(total)], rel=1e-6)


def test_how_far_one_cycle_is_from_fit_one_cycle() -> None:
    (said,) = re.findall(r"differ by at most ([\d.]+) % of lr_max at any of 100 steps", PAGE)
    theirs = schedules.fastai_v2(100, 1.0, div_factor=25, pct_start=0.25, div_final=1e5)
    ours = schedules.one_cycle(100, max_lr=1.0, pct_start=0.25, final_div_factor=1e5 / 25)
    apart = max(abs(theirs.lr(step) - ours.lr(step)) for step in range(100))
    assert float(said) == pytest.approx(100 * apart, abs=0.05)
    assert theirs.lr(25) == ours.lr(24) == 1.0  # torch's peak and ours is a step earlier
    assert theirs.lr(100) == pytest.approx(ours.lr(99))


def test_use_clr_beta_through_fastai_is_what_it_was() -> None:
    """(10, 13.68, .95, .85) over 95 epochs: 41 epochs up, 41 down, 13 of annihilation."""
    from fastai.callback.schedule import ParamScheduler

    total, used = 95 * BATCHES, recorder()
    lr, momentum = schedules.use_clr_beta(total, 0.8, (10, 13.68, 0.95, 0.85))
    scheduler = ParamScheduler(
        {
            "lr": lambda position: lr(round(position * total)),
            "mom": lambda position: momentum(round(position * total)),
        }
    )
    fit(make_learner(), scheduler, used, epochs=95)
    rates, momenta = zip(*(step[1] for step in used.steps), strict=True)
    c = 41 * BATCHES
    up, down = np.linspace(0.08, 0.8, c + 1), np.linspace(0.95, 0.85, c + 1)
    tail = np.linspace(0.08, 0.0008, total - 2 * c + 1)
    assert rates == pytest.approx([*up, *up[-2::-1], *tail[1:-1]], rel=1e-9)
    assert momenta == pytest.approx([*down, *down[-2::-1], *[0.95] * (total - 2 * c - 1)])


# ------------------------------------------------------------------ in a study


def test_a_small_study() -> None:
    from fastai.metrics import error_rate

    from hpsched.integrations.fastai import OneCycleCallback

    def train(cycle: Cycle) -> float:
        learn = make_learner("Adam", wd=cycle.weight_decay, metrics=error_rate)
        fit(learn, OneCycleCallback(cycle), lr=slice(cycle.max_lr / 10, cycle.max_lr))
        with learn.no_bar(), learn.no_logging():
            return float(learn.validate()[1])

    assert_learned(search(train))


def test_a_sweep_ends_when_it_has_seen_enough() -> None:
    from hpsched.integrations.fastai import OneCycleCallback

    cycle = make_cycle(100, "range_test", max_lr=1e4)
    learn = fit(make_learner(), OneCycleCallback(cycle), lr=1e4)
    assert cycle.stopped == "the sweep has diverged"
    assert 20 < cycle.steps < 100
    assert learn.epoch == (cycle.steps - 1) // BATCHES


def test_divergence_ends_the_run_at_once() -> None:
    from hpsched.integrations.fastai import OneCycleCallback

    cycle, ends = make_cycle(200, max_lr=1e6), []

    def train(cycle: Cycle) -> float:
        learn = fit(make_learner(), OneCycleCallback(cycle), lr=1e6)
        ends.append(learn.epoch + 1)
        return 0.0

    outcome = execute(cycle, train)
    assert outcome.diverged is not None
    assert outcome.steps <= 60
    assert ends == [math.ceil(outcome.steps / BATCHES)]


def test_the_epoch_in_hand_is_validated_and_logged(capsys: pytest.CaptureFixture[str]) -> None:
    from fastai.metrics import error_rate

    from hpsched.integrations.fastai import OneCycleCallback

    cycle = make_cycle(10)
    learn = make_learner(metrics=error_rate)
    learn.fit(5, lr=0.1, cbs=OneCycleCallback(cycle))
    assert len(learn.recorder.values) == 2  # epochs
    assert len(learn.recorder.losses) == 10
    assert all(math.isfinite(value) for row in learn.recorder.values for value in row)
    shown = capsys.readouterr().out
    assert "error_rate" in shown
    assert learn.epoch == 1


# ------------------------------------------------------------------ wrong use


def test_too_few_epochs() -> None:
    from hpsched.integrations.fastai import OneCycleCallback

    with pytest.raises(TrainingError, match=r"after 14 of the cycle's 20 .*more epochs"):
        fit(make_learner(), OneCycleCallback(make_cycle()), epochs=2)


def test_fit_one_cycle_is_refused() -> None:
    from hpsched.integrations.fastai import OneCycleCallback

    learn = make_learner()
    with pytest.raises(UsageError, match=r"in place of fit_one_cycle"):
        learn.fit_one_cycle(3, 0.1, cbs=OneCycleCallback(make_cycle()))


def test_momentum_bounds_for_an_optimizer_without_momentum() -> None:
    from fastai.optimizer import OptimWrapper

    from hpsched.integrations.fastai import OneCycleCallback

    learn = make_learner(opt_func=partial(OptimWrapper, opt=torch.optim.Adagrad))
    with pytest.raises(UsageError, match="neither momentum nor betas"):
        fit(learn, OneCycleCallback(make_cycle(explicit_momentum=True)))


def test_a_loss_that_is_broken_from_the_start() -> None:
    from hpsched.integrations.fastai import OneCycleCallback

    learn = make_learner(loss_func=lambda output, target: output.sum() * math.nan)
    with pytest.raises(TrainingError, match="no learning rate mends that"):
        fit(learn, OneCycleCallback(make_cycle()))


def test_without_fastai(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpsched.integrations import fastai as ours

    monkeypatch.setitem(sys.modules, "fastai.callback.core", None)
    with pytest.raises(ImportError, match=r"pip install 'hpsched\[fastai\]'"):
        importlib.reload(ours)
