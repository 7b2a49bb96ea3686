"""One training run's contract: the driver of the optimizer, the cycle, and ``execute``."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import multiprocessing
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import hpsched
from hpsched import divergence, evidence, records, schedules
from hpsched.cycle import (
    BLOCK,
    Cycle,
    Outcome,
    Progress,
    ScheduleDriver,
    _above_start,
    execute,
    observer,
)
from hpsched.cycle import StopTraining as Stop
from hpsched.errors import RecordError, TrainingError, UsageError
from hpsched.schedules import OneCycleSchedules

torch.set_num_threads(1)

VALUES = {
    "max_lr": 0.1,
    "div_factor": 25.0,
    "pct_start": 0.3,
    "base_momentum": 0.85,
    "max_momentum": 0.95,
    "weight_decay": 1e-4,
    "final_div_factor": 1e4,
}


def curves(steps: int = 20, max_lr: float = 0.1, **kwargs: Any) -> OneCycleSchedules:
    return schedules.one_cycle(steps, max_lr=max_lr, **kwargs)


def make_cycle(total_steps: int = 20, kind: Any = "rung", **kwargs: Any) -> Cycle:
    max_lr = kwargs.pop("max_lr", 0.1)
    pair = curves(total_steps, max_lr)
    if kind == "range_test":
        pair = OneCycleSchedules(
            schedules.range_test(total_steps, max_lr * 1e-6, max_lr), schedules.constant(0.85)
        )
    options = {"schedules": pair, "seed": 0, "name": "study-trial0-rung0", **kwargs}
    return Cycle(values={**VALUES, "max_lr": max_lr}, total_steps=total_steps, kind=kind, **options)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(2))


def sgd(cycle: Cycle | None = None, **kwargs: Any) -> torch.optim.SGD:
    return torch.optim.SGD([parameter()], **{"lr": 0.1, "momentum": 0.9, **kwargs})


def drive(*optimizers: Any, steps: int = 20, **kwargs: Any) -> ScheduleDriver:
    kwargs = {"schedules": curves(steps), "reference_lr": 0.1, **kwargs}
    return ScheduleDriver(*optimizers, **kwargs)


def stepping(losses: Callable[[int], Any] = lambda step: 1.0, result: Any = 0.5) -> Any:
    """A ``train`` that only steps the schedule; ``losses(step)`` from step 1."""

    def train(cycle: Cycle) -> Any:
        schedule = cycle.schedule(sgd())
        for step in range(1, cycle.total_steps + 1):
            schedule.step(losses(step))
        return result

    return train


# ------------------------------------------------------------------ the driver: rates


def test_rate_of_every_group_keeps_its_ratio() -> None:
    groups = [
        {"params": [parameter()]},
        {"params": [parameter()], "lr": 0.01},
        {"params": [parameter()], "lr": 0.3},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    driver, pair = drive(optimizer), curves()
    for step in range(25):
        rates = [group["lr"] for group in optimizer.param_groups]
        expected = pair.lr(step)
        assert rates == pytest.approx([expected, expected / 10, 3 * expected])
        assert driver.last_lr == rates[0]
        driver.step()


def test_without_a_group_at_max_lr_the_largest_is_the_reference() -> None:
    groups = [{"params": [parameter()], "lr": 0.5}, {"params": [parameter()], "lr": 5.0}]
    optimizer = torch.optim.SGD(groups)
    drive(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([curves().lr(0) / 10, curves().lr(0)])


def test_a_group_with_rate_zero_stays_frozen() -> None:
    groups = [{"params": [parameter()]}, {"params": [parameter()], "lr": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    drive(optimizer).step()
    assert optimizer.param_groups[1]["lr"] == 0


def test_past_the_end_the_last_values_stay() -> None:
    optimizer = sgd()
    driver = drive(optimizer)
    for _ in range(50):
        driver.step()
    assert optimizer.param_groups[0]["lr"] == curves().lr(19) > 0
    assert driver.step_count == 50


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_tensor_rates_are_filled_in_place(kind: Any, foreach: bool) -> None:
    rate = torch.tensor(0.1, dtype=torch.float64)
    if foreach and kind is not torch.optim.SGD:
        optimizer = kind([parameter()], lr=0.1, foreach=True)
        optimizer.param_groups[0]["lr"] = rate  # the constructor refuses it outside CUDA graphs
    else:
        optimizer = kind([parameter()], lr=rate, foreach=foreach)
    driver = drive(optimizer)
    for step in range(5):
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate.item() == curves().lr(step)
        driver.step()


def test_tensor_beta1_is_filled_in_place() -> None:
    beta1, beta2 = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.99)
    optimizer = torch.optim.AdamW(
        [parameter()], lr=torch.tensor(0.1), betas=(beta1, beta2), capturable=True, foreach=False
    )
    driver = drive(optimizer)
    for step in range(20):
        assert beta1.item() == curves().momentum(step)
        driver.step()
    assert optimizer.param_groups[0]["betas"][0] is beta1
    assert beta2.item() == pytest.approx(0.99)


def test_driven_rates_train_as_constant_ones_would() -> None:
    """Tensor and number rates give the same weights."""
    results = []
    for rate in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = torch.optim.SGD([weight], lr=rate, momentum=0.9, foreach=False)
        driver = drive(optimizer)
        for _ in range(20):
            optimizer.zero_grad()
            (weight**2).sum().backward()
            optimizer.step()
            driver.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results)


# ------------------------------------------------------------------ the driver: momentum


def test_momentum_of_sgd_mirrors_the_rate() -> None:
    optimizer = sgd()
    driver = drive(optimizer)
    assert driver.momentum_name == "momentum"
    for step in range(20):
        assert optimizer.param_groups[0]["momentum"] == curves().momentum(step)
        driver.step()


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adamax]
)
def test_beta1_of_adam_is_driven_and_beta2_is_not(kind: Any) -> None:
    optimizer = kind([parameter()], lr=0.1, betas=(0.9, 0.987))
    driver = drive(optimizer, explicit_momentum=True)
    assert driver.momentum_name == "beta1"
    for step in range(20):
        assert optimizer.param_groups[0]["betas"] == (curves().momentum(step), 0.987)
        driver.step()


def test_third_betas_survive() -> None:
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1, "betas": [0.9, 0.92, 0.99]}])
    drive(optimizer)
    assert optimizer.param_groups[0]["betas"] == (curves().momentum(0), 0.92, 0.99)


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Adafactor, torch.optim.Adadelta])
def test_optimizers_without_momentum_keep_their_other_values(kind: Any) -> None:
    optimizer = kind([parameter()], lr=0.1)
    before = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("lr", "params")}
    driver = drive(optimizer)
    driver.step()
    after = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("lr", "params")}
    assert after == before
    assert driver.momentum_name == "none"
    with pytest.raises(UsageError, match=f"{kind.__name__} has neither momentum nor betas"):
        drive(kind([parameter()], lr=0.1), explicit_momentum=True)


def test_sgd_built_with_momentum_0_keeps_it() -> None:
    optimizer = sgd(momentum=0.0)
    driver = drive(optimizer)
    assert driver.momentum_name == "none"
    driver.step()
    assert optimizer.param_groups[0]["momentum"] == 0
    with pytest.warns(UserWarning, match="SGD was built with momentum 0"):
        drive(sgd(momentum=0.0), explicit_momentum=True)
    with warnings.catch_warnings():  # asked for
        warnings.simplefilter("error")
        pair = curves(base_momentum=0.0, max_momentum=0.0)
        drive(sgd(momentum=0.0), explicit_momentum=True, schedules=pair)


def test_momentum_that_touches_0_comes_back() -> None:
    optimizer, pair = sgd(), curves(base_momentum=0.0)
    driver = drive(optimizer, schedules=pair)
    for _ in range(19):
        driver.step()
    assert optimizer.param_groups[0]["momentum"] == pair.momentum(19) == 0.95


def test_momentum_is_left_alone_when_told_so() -> None:
    optimizer = sgd(momentum=0.42)
    drive(optimizer, drives_momentum=False).step()
    assert optimizer.param_groups[0]["momentum"] == 0.42


@pytest.mark.parametrize("policy", ["cosine", "linear"])
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_parity_with_the_pure_schedules(kind: str, policy: str) -> None:
    """What a real optimizer uses at each step of a real run is what the pure functions say."""
    used = []
    cycle = make_cycle(37)
    cycle.schedules = curves(37, policy=policy)

    def train(cycle: Cycle) -> float:
        model = nn.Linear(2, 1)
        if kind == "SGD":
            optimizer: Any = torch.optim.SGD(model.parameters(), lr=cycle.max_lr, momentum=0.95)
        else:
            optimizer = torch.optim.Adam(model.parameters(), lr=cycle.max_lr)
        group = optimizer.param_groups[0]
        optimizer.register_step_pre_hook(
            lambda *_: used.append((group["lr"], group.get("momentum") or group["betas"][0]))
        )
        schedule = cycle.schedule(optimizer)
        for x in cycle.batches([torch.ones(4, 2)]):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step(loss)
        return 0.0

    execute(cycle, train)
    pair = cycle.schedules
    assert used == [(pair.lr(step), pair.momentum(step)) for step in range(37)]
    assert max(rate for rate, _ in used) == cycle.max_lr


def test_parity_with_torch_one_cycle() -> None:
    ours, theirs = sgd(), sgd()
    driver = drive(ours)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(theirs, 0.1, total_steps=20)
    for _ in range(19):
        for name in ("lr", "momentum"):
            expected = theirs.param_groups[0][name]
            assert ours.param_groups[0][name] == pytest.approx(expected, abs=1e-12)
        theirs.step()
        scheduler.step()
        driver.step()


# ------------------------------------------------------------------ the driver: changes in mid-run


def test_optimizer_load_state_dict_in_mid_run() -> None:
    optimizer = sgd()
    driver = drive(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(5):
        driver.step()
    optimizer.load_state_dict(saved)  # replaces the group objects, back to the rate of step 0
    driver.step()
    assert optimizer.param_groups[0]["lr"] == curves().lr(6)
    assert optimizer.param_groups[0]["momentum"] == curves().momentum(6)


def test_add_param_group_in_mid_run() -> None:
    first, second = sgd(), torch.optim.Adam([parameter()], lr=0.02)
    driver = drive(first, second)
    driver.step()
    first.add_param_group({"params": [parameter()], "lr": 0.05})  # half of max_lr
    for step in range(2, 6):
        driver.step()
        lr, momentum = curves().lr(step), curves().momentum(step)
        assert [g["lr"] for g in first.param_groups] == pytest.approx([lr, lr / 2])
        assert [g["momentum"] for g in first.param_groups] == [momentum, momentum]
        assert second.param_groups[0]["lr"] == pytest.approx(0.2 * lr)
        assert second.param_groups[0]["betas"] == (momentum, 0.999)


def test_two_optimizers_of_one_schedule() -> None:
    generator, critic = torch.optim.Adam([parameter()], lr=0.1), sgd(lr=0.4)
    driver = drive(generator, critic)
    assert driver.optimizer_name == "Adam"
    assert driver.momentum_name == "beta1"
    for step in range(20):
        assert generator.param_groups[0]["lr"] == curves().lr(step)
        assert critic.param_groups[0]["lr"] == pytest.approx(4 * curves().lr(step))
        assert critic.param_groups[0]["momentum"] == curves().momentum(step)
        driver.step()


@pytest.mark.parametrize("rate", [0.0, math.nan, math.inf, None])
def test_rates_that_cannot_be_driven(rate: Any) -> None:
    with pytest.raises(UsageError, match=r"learning rates are .* build it with lr=cycle\.max_lr"):
        drive(SimpleNamespace(param_groups=[{"lr": rate}]))


def test_no_optimizer() -> None:
    with pytest.raises(UsageError, match="learning rates are"):
        drive()
    with pytest.raises(UsageError, match="Linear has no param_groups"):
        drive(nn.Linear(1, 1))


def test_driver_state_survives_a_checkpoint_file(tmp_path: Any) -> None:
    driver = drive(torch.optim.SGD([{"params": [parameter()]}, {"params": [parameter()], "lr": 1}]))
    cycle = make_cycle(kind="rung")
    schedule = cycle.schedule(sgd())
    cycle.log(error=torch.tensor(0.5))
    schedule.step(torch.tensor(1.5))
    for state in (driver.state_dict(), schedule.state_dict()):
        torch.save(state, tmp_path / "checkpoint.pt")
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True) == state
    with pytest.raises(UsageError, match="that of 1 optimizers, but it drives 2"):
        drive(sgd(), sgd()).load_state_dict(driver.state_dict())


# ------------------------------------------------------------------ resume


class Run:
    """A run whose whole state fits in a checkpoint; data by step, so that it needs no loader."""

    def __init__(self, cycle: Cycle, kind: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
        if kind == "sgd":
            self.optimizer: Any = torch.optim.SGD(self.groups(), lr=0.1, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(self.groups(), lr=0.1)
        self.cycle, self.schedule = cycle, cycle.schedule(self.optimizer)

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": self.model[0].parameters(), "lr": 0.01},
            {"params": [*self.model[1].parameters(), *self.model[2].parameters()]},
        ]

    def state(self) -> dict[str, Any]:
        parts = (self.model, self.optimizer, self.schedule)
        return copy.deepcopy({type(part).__name__: part.state_dict() for part in parts})

    def load(self, state: dict[str, Any]) -> None:
        for part in (self.model, self.optimizer, self.schedule):
            part.load_state_dict(copy.deepcopy(state[type(part).__name__]))

    def take(self, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(self.cycle.steps))
            self.optimizer.zero_grad()
            loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.cycle.log(loss2=loss)
            self.schedule.step(loss)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("cut", [1, 13, 40])
def test_resumed_equals_uninterrupted(kind: str, cut: int) -> None:
    whole = Run(make_cycle(60), kind)
    whole.take(60)
    before = Run(make_cycle(60), kind)
    before.take(cut)
    resumed = Run(make_cycle(60), kind)
    resumed.load(before.state())
    resumed.take(60 - cut)
    for ours, theirs in zip(
        resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert resumed.cycle.losses() == whole.cycle.losses()
    assert resumed.cycle.curves() == whole.cycle.curves()
    assert resumed.schedule.state_dict() == whole.schedule.state_dict()


def test_a_resumed_run_ends_at_the_same_step() -> None:
    """The check for an explosion is made at the same steps as in the run that went through."""

    def loss(step: int) -> float:
        return 1.0 / step if step < 607 else 1e6 * step

    def ended_at(cycle: Cycle, schedule: Any) -> int:
        with pytest.raises(Stop):
            while True:
                schedule.step(loss(cycle.steps + 1))
        return cycle.steps

    whole = make_cycle(2000)
    ended = ended_at(whole, whole.schedule(sgd()))
    for cut in (1, 377, 601):
        first, second = make_cycle(2000), make_cycle(2000)
        schedule = first.schedule(sgd())
        for step in range(1, cut + 1):
            schedule.step(loss(step))
        resumed = second.schedule(sgd())
        resumed.load_state_dict(schedule.state_dict())
        assert ended_at(second, resumed) == ended


def test_a_resumed_run_takes_only_the_batches_that_remain() -> None:
    first, second = make_cycle(20), make_cycle(20)
    schedule = first.schedule(sgd())
    for _ in range(15):
        schedule.step(1.0)

    def train(cycle: Cycle) -> float:
        resumed = cycle.schedule(sgd())
        resumed.load_state_dict(schedule.state_dict())
        for index, _ in enumerate(cycle.batches([1, 2], accumulate=2)):
            if index % 2:
                resumed.step(1.0)
        return 0.0

    assert execute(second, train).value == 0


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("accumulate", [1, 3])
def test_batches_go_round_the_loader(accumulate: int) -> None:
    cycle = make_cycle(7)
    batches = list(cycle.batches("abcd", accumulate))
    assert batches == list(itertools.islice(itertools.cycle("abcd"), 7 * accumulate))


def test_accumulate_below_1() -> None:
    with pytest.raises(UsageError, match="accumulate=0"):
        make_cycle().batches([1], accumulate=0)


def small(rows: int = 8) -> TensorDataset:
    return TensorDataset(torch.arange(rows, dtype=torch.float32).reshape(-1, 1))


@pytest.mark.parametrize(
    "loader",
    [[], DataLoader(small(3), batch_size=4, drop_last=True), (x for x in ())],
    ids=["list", "drop_last", "generator"],
)
def test_empty_loader(loader: Any) -> None:
    with pytest.raises(TrainingError, match="yields no batches: check the data set's length"):
        list(make_cycle().batches(loader))


def test_a_generator_that_is_used_up() -> None:
    generator = (batch for batch in range(5))
    batches = make_cycle(10).batches(generator)
    assert list(itertools.islice(batches, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(TrainingError, match="generator that was used up"):
        next(batches)


def test_a_generator_that_is_long_enough() -> None:
    generator = iter(range(100))
    assert list(make_cycle(10).batches(generator)) == list(range(10))
    assert next(generator) == 10  # none was lost


def test_a_loader_without_length() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(6))

    assert len(list(make_cycle(9).batches(DataLoader(Stream(), batch_size=2)))) == 9


def test_samplers_are_told_the_round() -> None:
    class Sampler:
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    class Loader(Sampler):
        def __init__(self) -> None:
            super().__init__()
            self.sampler, self.batch_sampler = Sampler(), Sampler()

        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

    loader = Loader()
    list(make_cycle(9).batches(loader))
    assert loader.epochs == [0, 1, 2]
    assert loader.sampler.epochs == [0, 1, 2]
    assert loader.batch_sampler.epochs == [0, 1, 2]


class Broken(Exception):
    pass


def leave_by(how: str) -> Callable[[Cycle, int], None]:
    def leave(cycle: Cycle, step: int) -> None:
        if how == "exception" and step == 3:
            raise Broken
        if how == "interrupt" and step == 3:
            raise KeyboardInterrupt

    return leave


@pytest.mark.parametrize("persistent", [False, True], ids=["", "persistent"])
@pytest.mark.parametrize("how", ["normal", "stop", "exception", "interrupt", "break"])
def test_worker_processes_are_gone_however_train_ends(how: str, persistent: bool) -> None:
    loader = DataLoader(small(), batch_size=2, num_workers=1, persistent_workers=persistent)
    leave = leave_by(how)

    def train(cycle: Cycle) -> float:
        schedule = cycle.schedule(sgd())
        for step, _ in enumerate(cycle.batches(loader), start=1):
            assert multiprocessing.active_children()
            leave(cycle, step)
            if how == "break" and step == 3:
                break
            schedule.step(math.nan if how == "stop" and step > 1 else 1.0)
        return 0.0

    held = None
    try:
        execute(make_cycle(10), train)
    except (Broken, KeyboardInterrupt, TrainingError) as error:
        held = error  # with its traceback, and so the frames of train
    if persistent:
        del loader  # its workers are its own
        held = None
        gc.collect()
    assert not multiprocessing.active_children()
    del held


def test_worker_processes_are_gone_even_if_the_loader_keeps_its_iterator() -> None:
    class Loader(DataLoader[Any]):
        kept: Any = None

        def __iter__(self) -> Any:
            self.kept = super().__iter__()
            return self.kept

    loader = Loader(small(), batch_size=2, num_workers=1)
    execute(make_cycle(6), stepping_through(loader))
    assert not multiprocessing.active_children()
    assert loader.kept is not None


def stepping_through(loader: Any) -> Callable[[Cycle], float]:
    def train(cycle: Cycle) -> float:
        schedule = cycle.schedule(sgd())
        for _ in cycle.batches(loader):
            schedule.step(1.0)
        return 0.0

    return train


def test_batches_never_begun_are_closed() -> None:
    cycle = make_cycle()
    batches = cycle.batches([1])
    cycle.close()
    assert list(batches) == []


def test_batches_end_once_the_run_has_been_stopped() -> None:
    """For code that swallows what ends the run, at every step."""
    taken = 0

    def train(cycle: Cycle) -> float:
        nonlocal taken
        schedule = cycle.schedule(sgd())
        for _ in cycle.batches([1]):
            taken += 1
            try:
                schedule.step(math.inf if taken > 12 else 1.0)
            except BaseException:
                continue
        return 0.0

    outcome = execute(make_cycle(500), train)
    assert taken == 20
    assert outcome.diverged is not None


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize(
    "loss",
    [
        lambda step: torch.tensor(1.0 + step),
        lambda step: torch.tensor([1.0 + step], requires_grad=True) * 1,
        lambda step: torch.tensor(1.0 + step, dtype=torch.bfloat16),
        lambda step: torch.tensor(1 + step),
        lambda step: 1.0 + step,
        lambda step: np.float32(1.0 + step),
        lambda step: torch.tensor(1.0 + step) if step % 2 else 1.0 + step,
        lambda step: torch.tensor(1.0 + step, dtype=torch.float64 if step % 2 else torch.float32),
    ],
    ids=["tensor", "one element", "bfloat16", "whole", "float", "numpy", "mixed", "two dtypes"],
)
def test_losses_are_read_exactly(loss: Callable[[int], Any]) -> None:
    cycle = make_cycle(23)
    execute(cycle, stepping(loss))
    assert cycle.losses() == [2.0 + step for step in range(23)]


def test_a_loss_that_is_changed_afterwards_was_kept() -> None:
    cycle, loss = make_cycle(23), torch.tensor(1.0)
    execute(cycle, stepping(lambda step: loss.fill_(step)))  # as a captured graph does
    assert cycle.losses() == [float(step) for step in range(1, 24)]


def test_losses_hold_no_graph() -> None:
    cycle = make_cycle()
    schedule = cycle.schedule(sgd())
    weight = nn.Parameter(torch.ones(2))
    hidden = weight * 2
    alive = weakref.ref(hidden)
    schedule.step(hidden.sum())
    schedule.step(hidden.sum())
    del hidden
    assert alive() is None


@pytest.mark.parametrize("step", [1, 2, 15])
@pytest.mark.parametrize("kind", ["rung", "range_test"])
def test_a_loss_of_another_shape_is_named_at_its_step(kind: Any, step: int) -> None:
    cycle = make_cycle(kind=kind)

    def loss(at: int) -> Tensor:
        return torch.ones(4, 2) if at == step else torch.tensor(1.0)

    with pytest.raises(TrainingError, match=r"shape \(4, 2\): pass a scalar, e\.g\. loss\.mean"):
        execute(cycle, stepping(loss))
    assert cycle.steps == step


def test_a_loss_that_is_no_number() -> None:
    with pytest.raises(TrainingError, match=r"schedule\.step\(loss\) got \{'loss': 1\}"):
        execute(make_cycle(), stepping(lambda step: {"loss": 1}))


def test_no_loss_in_a_range_test() -> None:
    with pytest.raises(TrainingError, match=r"without a loss in a range test.*step\(loss\)"):
        execute(make_cycle(kind="range_test"), stepping(lambda step: None))
    assert execute(make_cycle(), stepping(lambda step: None)).value == 0.5


def test_the_error_is_raised_even_if_train_swallows_it() -> None:
    def train(cycle: Cycle) -> float:
        try:
            return stepping(lambda step: None)(cycle)  # type: ignore[no-any-return]
        except Exception:
            return 1.0

    with pytest.raises(TrainingError, match="without a loss in a range test"):
        execute(make_cycle(kind="range_test"), train)


class Counter:
    """Counts host reads of tensors."""

    NAMES = ("item", "tolist", "__float__", "__bool__", "__int__", "numpy", "cpu", "__index__")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = 0
        for name in self.NAMES:
            monkeypatch.setattr(Tensor, name, self._counted(getattr(Tensor, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, *args: Any) -> Any:
            self.reads += 1
            return method(tensor, *args)

        return counted


@pytest.mark.parametrize("kind", ["rung", "range_test"])
def test_losses_are_read_once_per_block_and_not_in_between(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cycle, counter = make_cycle(100, kind=kind), Counter(monkeypatch)
    optimizer = torch.optim.SGD([parameter()], lr=torch.tensor(0.1), momentum=0.9, foreach=False)
    schedule = cycle.schedule(optimizer)
    loss = torch.tensor(1.0)
    read_at = []
    for step in range(1, 100):
        counter.reads = 0
        cycle.log(loss2=loss)
        schedule.step(loss)
        if counter.reads:
            read_at.append(step)
            assert counter.reads <= 2  # the losses and the logged values, each in one go
    assert read_at == [1, *range(BLOCK, 100, BLOCK)]


@pytest.mark.gpu
def test_ordinary_steps_do_not_synchronise_with_the_device() -> None:
    cycle = make_cycle(100)
    model = nn.Linear(4, 1).cuda()
    x = torch.ones(8, 4, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=cycle.max_lr, momentum=0.9)
    schedule = cycle.schedule(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        cycle.log(loss2=loss)
        schedule.step(loss)

    for _ in range(BLOCK):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(BLOCK - 1):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(cycle.losses()) == 2 * BLOCK - 1


# ------------------------------------------------------------------ divergence and the stop


@pytest.mark.parametrize("kind", ["rung", "range_test"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_at_the_first_step_is_an_error(kind: Any, value: float) -> None:
    with pytest.raises(TrainingError, match=f"loss was {value} at the very first step"):
        execute(make_cycle(kind=kind), stepping(lambda step: value))


@pytest.mark.parametrize("at", [2, 9, 10, 11, 95])
def test_non_finite_later_ends_the_run_and_names_the_step(at: int) -> None:
    def loss(step: int) -> Tensor:
        return torch.tensor(math.nan if step == at else 1.0 / step)

    outcome = execute(make_cycle(100), stepping(loss))
    assert outcome.value is None
    assert outcome.diverged is not None
    assert f"nan at step {at - 1}" in outcome.diverged  # steps count from 0
    assert at <= outcome.steps < at + BLOCK


def test_exploding_loss_ends_the_run() -> None:
    outcome = execute(make_cycle(500), stepping(lambda step: 1.0 + 1.1**step))
    assert outcome.diverged is not None
    assert "exploded" in outcome.diverged
    assert outcome.steps < 200


def test_the_cheap_look_misses_no_explosion() -> None:
    """What it rules out, the full rule would not have called an explosion either."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        n, at = rng.integers(30, 200), rng.integers(1, 150)
        growth = np.exp(rng.uniform(0, 1) * np.maximum(np.arange(n) - at, 0).clip(max=200))
        losses = (rng.normal(0, 2) + rng.normal(0, 0.1, n) + growth - 1).tolist()
        losses[: rng.integers(0, 5)] = []  # the start may explode too
        if divergence.exploded(losses):
            found += 1
            assert _above_start(losses)
    assert found > 50


@pytest.mark.parametrize(
    "loss",
    [
        lambda step: -100.0 + 1.0 / step,  # below zero
        lambda step: 2.0 + math.sin(step),  # noise
        lambda step: 1.0,
        lambda step: 1.0 + min(step, 40) / 20 - step / 100,  # a hump, as in a cycle
    ],
)
def test_ordinary_losses_do_not_end_the_run(loss: Callable[[int], float]) -> None:
    outcome = execute(make_cycle(500), stepping(loss))
    assert outcome == Outcome(value=0.5, diverged=None, steps=500, seconds=outcome.seconds)


def test_a_sweep_ends_with_its_last_step_or_with_divergence() -> None:
    cycle = make_cycle(50, kind="range_test")
    outcome = execute(cycle, stepping(lambda step: 1.0))
    assert (outcome.value, outcome.diverged, outcome.steps) == (None, None, 50)
    assert cycle.stopped == "the sweep is complete"
    cycle = make_cycle(50, kind="range_test")
    outcome = execute(cycle, stepping(lambda step: 1.0 if step < 25 else 10.0**step))
    assert (outcome.value, outcome.diverged) == (None, None)
    assert outcome.steps == 30
    assert cycle.stopped == "the sweep has diverged"


@pytest.mark.parametrize("kind", ["rung", "range_test"])
def test_except_exception_does_not_swallow_the_stop(kind: Any) -> None:
    reached = []

    def train(cycle: Cycle) -> float:
        try:
            stepping(lambda step: 1.0 if step < 12 else math.inf)(cycle)
        except Exception:
            reached.append("handler")
        reached.append("end")
        return 1.0

    outcome = execute(make_cycle(50, kind=kind), train)
    assert reached == []
    assert outcome.steps == 20


@pytest.mark.parametrize("result", [1.0, None, math.nan])
def test_a_train_that_returns_after_the_stop_is_recognised(result: Any) -> None:
    def train(cycle: Cycle) -> Any:
        try:
            stepping(lambda step: 1.0 if step < 12 else math.inf)(cycle)
        except BaseException:
            assert cycle.should_stop
        return result

    outcome = execute(make_cycle(50), train)
    assert outcome.value is None
    assert "inf at step 11" in (outcome.diverged or "")


def test_a_stop_that_a_framework_wraps_is_recognised() -> None:
    def train(cycle: Cycle) -> float:
        try:
            stepping(lambda step: 1.0 if step < 12 else math.inf)(cycle)
        except BaseException as error:
            raise RuntimeError("training failed") from error
        return 1.0

    assert execute(make_cycle(50), train).diverged is not None


def test_cooperative_stop() -> None:
    def train(cycle: Cycle) -> float:
        schedule = cycle.schedule(sgd())
        step = 0
        while not cycle.should_stop:
            step += 1
            try:
                schedule.step(1.0)
            except Stop:
                assert cycle.should_stop
        assert step == 30
        return 0.0

    assert execute(make_cycle(30, kind="range_test"), train).steps == 30


def test_each_step_after_the_stop_stops_again_and_counts_no_more() -> None:
    cycle = make_cycle(10, kind="range_test")
    schedule = cycle.schedule(sgd())
    with pytest.raises(Stop):
        for _ in range(20):
            schedule.step(1.0)
    for _ in range(3):
        with pytest.raises(Stop, match="the sweep is complete"):
            schedule.step(1.0)
    assert cycle.steps == len(cycle.losses()) == 10


def test_an_exception_of_train_reaches_the_caller() -> None:
    def train(cycle: Cycle) -> float:
        cycle.schedule(sgd()).step(1.0)
        raise Broken

    with pytest.raises(Broken):
        execute(make_cycle(), train)


@pytest.mark.parametrize("kind", ["range_test", "rung"])
def test_advance_says_when_to_end_and_never_raises_the_stop(kind: Any) -> None:
    def train(cycle: Cycle) -> float:
        schedule = cycle.schedule(sgd(cycle))
        losses = [1.0] * 30 + [math.nan] * 30
        said = [schedule.advance(loss) for loss in losses]
        assert said == [True] * 39 + [False] * 21  # the block of ten that has the first NaN
        assert cycle.should_stop
        return 0.0

    outcome = execute(make_cycle(60, kind), train)
    assert (outcome.value, outcome.steps) == (None, 40)
    assert (outcome.diverged is None) == (kind == "range_test")


def test_advance_sets_the_rates_of_step_and_raises_its_errors() -> None:
    cycle, optimizer = make_cycle(20), sgd()
    schedule = cycle.schedule(optimizer)
    for step in range(20):
        assert optimizer.param_groups[0]["lr"] == cycle.schedules.lr(step)
        assert schedule.advance(torch.tensor(1.0))
    with pytest.raises(TrainingError, match=r"shape \(2,\)"):
        schedule.advance(torch.ones(2))


# ------------------------------------------------------------------ execute: the contract


def test_outcome() -> None:
    started = time.monotonic()
    outcome = execute(make_cycle(12), stepping(result=np.float32(0.25)))
    assert outcome.value == 0.25
    assert type(outcome.value) is float
    assert outcome.steps == 12
    assert 0 < outcome.seconds <= time.monotonic() - started
    assert execute(make_cycle(), stepping(result=[1, torch.tensor(2)])).value == [1.0, 2.0]
    assert execute(make_cycle(), stepping(result=torch.tensor(2))).value == 2.0


def test_a_train_that_never_calls_schedule() -> None:
    with pytest.raises(TrainingError, match=r"without calling cycle\.schedule\(optimizer\)"):
        execute(make_cycle(), lambda cycle: 0.0)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, "0 of the cycle's 20 steps .*never called"),
        (7, "7 of the cycle's 20 steps .*too few"),
        (25, "25 of the cycle's 20 steps .*too many"),
    ],
)
def test_a_train_that_takes_another_number_of_steps(steps: int, message: str) -> None:
    def train(cycle: Cycle) -> float:
        schedule = cycle.schedule(sgd())
        for _ in range(steps):
            schedule.step(1.0)
        return 0.0

    with pytest.raises(TrainingError, match=rf"{message}.*cycle\.batches\(loader\)"):
        execute(make_cycle(), train)


@pytest.mark.parametrize("result", [None, "good", {}, torch.ones(2), np.ones(2)], ids=repr)
def test_a_train_that_returns_no_number(result: Any) -> None:
    with pytest.raises(TrainingError, match="return the validation result as a number"):
        execute(make_cycle(), stepping(result=result))


@pytest.mark.parametrize("result", [math.nan, -math.inf, [1.0, math.nan]])
def test_a_train_that_returns_a_non_finite_number_has_diverged(result: Any) -> None:
    outcome = execute(make_cycle(), stepping(result=result))
    assert outcome.value is None
    assert outcome.diverged == f"train returned {result!r}"


def test_schedule_called_twice() -> None:
    cycle = make_cycle()
    cycle.schedule(sgd())
    with pytest.raises(TrainingError, match="twice in one run: pass all optimizers to one call"):
        cycle.schedule(sgd())


def test_nothing_of_train_is_kept_alive() -> None:
    """The cycle outlives the run (its curves are stored); model and optimizer must not."""
    cycle, alive = make_cycle(), []

    def train(cycle: Cycle) -> float:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=cycle.max_lr, momentum=0.9)
        alive.extend([weakref.ref(model), weakref.ref(optimizer)])
        schedule = cycle.schedule(optimizer)
        cycle.validate(lambda: float(model.weight.sum()))
        for _ in cycle.batches([1]):
            schedule.step(model.weight.sum())
        return 0.0

    execute(cycle, train)
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert cycle.driver is not None
    assert (cycle.driver.optimizer_name, cycle.driver.momentum_name) == ("SGD", "momentum")
    assert len(cycle.losses()) == cycle.steps == 20


def test_attributes() -> None:
    cycle = make_cycle(rung=2, policy="linear")
    assert {name: getattr(cycle, name) for name in VALUES} == VALUES == cycle.values
    assert (cycle.total_steps, cycle.seed, cycle.kind, cycle.rung) == (20, 0, "rung", 2)
    assert (cycle.policy, cycle.name, cycle.steps) == ("linear", "study-trial0-rung0", 0)
    assert not cycle.is_range_test
    assert make_cycle(kind="range_test").is_range_test


# ------------------------------------------------------------------ curves


def test_curves_are_thinned_to_means() -> None:
    cycle = make_cycle(6400)
    execute(cycle, stepping(lambda step: 1.0 + (step % 2)))
    loss = cycle.curves()["loss"]
    assert len(loss) == 64
    # One loss in 25 is kept (steps 1, 26, 51, 76, …), four of them make a point.
    assert [step for step, _ in loss] == list(range(76, 6401, 100))
    assert [value for _, value in loss] == [1.5] * 64


@pytest.mark.parametrize("points", [1, 64, 65, 127, 1000])
def test_curves_have_at_most_64_points_and_end_with_the_last(points: int) -> None:
    cycle = make_cycle(points)
    execute(cycle, stepping(lambda step: 1.0 / step))
    loss = cycle.curves()["loss"]
    assert len(loss) == min(points, 64)
    assert loss[-1][0] == points


def test_logged_curves() -> None:
    cycle = make_cycle()

    def train(cycle: Cycle) -> float:
        schedule = cycle.schedule(sgd())
        for step in range(20):
            schedule.step(1.0)
            if step % 5 == 0:
                cycle.log(error=torch.tensor([1.0 / (step + 1)]), accuracy=step)
        cycle.log(error=math.nan)
        return 0.0

    execute(cycle, train)
    logged = cycle.curves()
    assert [step for step, _ in logged["error"]] == [1, 6, 11, 16, 20]
    assert [value for _, value in logged["error"]] == [1.0, 0.166667, 0.0909091, 0.0625, None]
    assert logged["accuracy"] == [(1, 0.0), (6, 5.0), (11, 10.0), (16, 15.0)]
    assert len(logged["loss"]) == 20


def test_log_refuses_at_once_what_is_no_number() -> None:
    cycle = make_cycle()
    with pytest.raises(TrainingError, match=r"cycle\.log\(error=…\) got a tensor of shape \(3,\)"):
        cycle.log(error=torch.ones(3))
    with pytest.raises(TrainingError, match=r"cycle\.log\(error=…\) got 'low'"):
        cycle.log(error="low")


def test_a_curve_named_loss_is_the_users() -> None:
    cycle = make_cycle()
    schedule = cycle.schedule(sgd())
    schedule.step(1.0)
    cycle.log(loss=7.0)
    assert cycle.curves()["loss"] == [(1, 7.0)]


def test_validation_at_sweep_points() -> None:
    calls = iter(range(100))
    for options, expected in (
        ({"kind": "range_test", "validate_every": 8}, {"loss": [(8, 0.0), (16, 1.0)]}),
        ({"kind": "range_test"}, {}),
        ({"kind": "rung"}, {}),
    ):
        cycle = make_cycle(20, **options)

        def train(cycle: Cycle) -> float:
            cycle.validate(lambda: next(calls))
            return stepping()(cycle)  # type: ignore[no-any-return]

        execute(cycle, train)
        assert cycle.validation == expected


def test_validation_keeps_all_metrics() -> None:
    def measure() -> dict[str, Any]:
        return {"loss": torch.tensor(0.5), "accuracy": 1, "size": torch.tensor([2.0])}

    cycle = validating(measure)
    assert cycle.validation == {
        "loss": [(5, 0.5), (10, 0.5), (15, 0.5), (20, 0.5)],
        "accuracy": [(5, 1.0), (10, 1.0), (15, 1.0), (20, 1.0)],
        "size": [(5, 2.0), (10, 2.0), (15, 2.0), (20, 2.0)],
    }


def validating(measure: Callable[[], Any]) -> Cycle:
    cycle = make_cycle(20, kind="range_test", validate_every=5)

    def train(cycle: Cycle) -> float:
        cycle.validate(measure)
        return stepping()(cycle)  # type: ignore[no-any-return]

    execute(cycle, train)
    return cycle


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"cycle\.validate\(fn\): 'loss' got None"),
        ({"top5": "high"}, "'top5' got 'high'"),
        ({"loss": torch.ones(3)}, r"'loss' got a tensor of shape \(3,\)"),
    ],
)
def test_validation_that_is_no_number(value: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        validating(lambda: value)


def test_validation_survives_a_checkpoint() -> None:
    first = make_cycle(20, kind="range_test", validate_every=5)
    schedule = first.schedule(sgd())
    first.validate(lambda: torch.tensor(float(first.steps)))
    for _ in range(7):
        schedule.step(1.0)
    second = make_cycle(20, kind="range_test", validate_every=5)
    resumed = second.schedule(sgd())
    resumed.load_state_dict(schedule.state_dict())
    second.validate(lambda: second.steps)
    for _ in range(12):
        resumed.step(1.0)
    assert second.validation == {"loss": [(5, 5.0), (10, 10.0), (15, 15.0)]}
    assert first.validation == {"loss": [(5, 5.0)]}
    assert len(second.losses()) == 19


def test_validation_of_a_study_comes_back_with_its_range_test() -> None:
    """Through JSON, NaN included."""
    study = optuna.create_study(sampler=hpsched.OneCycleSampler(seed=0))
    trial = study.ask()
    sweep = {"num_iter": 20, "validate_every": 10}
    recipe = hpsched.suggest_onecycle(trial, 90, rungs=1, range_test=sweep)

    def train(cycle: Cycle) -> float:
        cycle.validate(lambda: {"loss": 0.25, "accuracy": math.nan})
        return stepping()(cycle)  # type: ignore[no-any-return]

    recipe.run(train)
    (stored,) = evidence.sweeps(study.get_trials())
    copied = records.SweepRecord.from_json(json.loads(json.dumps(stored.to_json())), "here")
    assert copied.validation["accuracy"] == [[10, None], [20, None]]
    test = evidence.range_test(copied)
    assert test.validation["loss"] == [(10, 0.25), (20, 0.25)]
    assert math.isnan(test.validation["accuracy"][1][1])
    bad = {**stored.to_json(), "validation": {"loss": [[21, 1.0]]}}
    with pytest.raises(RecordError, match="'loss' at a step that the sweep does not have"):
        records.SweepRecord.from_json(bad, "here")


# ------------------------------------------------------------------ mixed precision, progress


def test_a_step_that_the_scaler_skips_counts_once() -> None:
    torch.manual_seed(0)
    cycle, model = make_cycle(20), nn.Linear(2, 1)
    taken = []

    def train(cycle: Cycle) -> float:
        optimizer = torch.optim.SGD(model.parameters(), lr=cycle.max_lr, momentum=0.9)
        group = optimizer.param_groups[0]
        optimizer.register_step_pre_hook(lambda *_: taken.append((cycle.steps, group["lr"])))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
        schedule = cycle.schedule(optimizer)
        for index, x in enumerate(cycle.batches([torch.ones(4, 2)])):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            scaler.scale(loss).backward()
            if index in (3, 4, 11):
                model.weight.grad.fill_(math.inf)
            scaler.step(optimizer)
            scaler.update()
            schedule.step(loss)
        return 0.0

    outcome = execute(cycle, train)
    assert outcome.steps == 20
    assert [step for step, _ in taken] == [s for s in range(20) if s not in (3, 4, 11)]
    assert all(rate == cycle.schedules.lr(step) for step, rate in taken)


def test_bfloat16_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)

    def train(cycle: Cycle) -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=cycle.max_lr)
        schedule = cycle.schedule(optimizer)
        for x in cycle.batches([torch.randn(16, 2)]):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step(loss)
        return loss.item()

    cycle = make_cycle(40)
    assert execute(cycle, train).value == pytest.approx(cycle.losses()[-1])
    assert cycle.losses()[-1] < cycle.losses()[0]


def test_the_observer_gets_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(step=0.25)
    monkeypatch.setattr("hpsched.cycle.time.monotonic", lambda: next(seconds))
    seen: list[Progress] = []
    token = observer.set(seen.append)
    try:
        cycle = make_cycle(40, rung=1)
        execute(cycle, stepping(lambda step: 1.0 / step))
    finally:
        observer.reset(token)
    assert 5 < len(seen) < 25  # about once a second, whatever the number of steps
    assert [p.step for p in seen] == sorted({p.step for p in seen})
    last = seen[-1]
    assert (last.kind, last.rung, last.total_steps) == ("rung", 1, 40)
    assert last.lr == cycle.schedules.lr(last.step)
    assert last.loss == 1.0 / (last.step // BLOCK * BLOCK)


@pytest.mark.parametrize("hidden", ["observer", "progress=False"])
def test_the_bar_is_hidden(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    disabled = []
    original = __import__("hpsched.cycle", fromlist=["tqdm"]).tqdm

    def tqdm(*args: Any, disable: Any, **kwargs: Any) -> Any:
        disabled.append(disable)
        return original(*args, disable=True, **kwargs)

    monkeypatch.setattr("hpsched.cycle.tqdm", tqdm)
    list(make_cycle().batches([1]))
    token = observer.set((lambda progress: None) if hidden == "observer" else None)
    try:
        list(make_cycle(progress=hidden == "observer").batches([1]))
    finally:
        observer.reset(token)
    assert disabled == [None, True]  # None: shown on a terminal


# ------------------------------------------------------------------ a real run


def test_a_real_run_learns() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    loader = DataLoader(TensorDataset(x, y), 32, shuffle=True)

    def train(cycle: Cycle) -> float:
        torch.manual_seed(cycle.seed)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        optimizer = torch.optim.SGD(
            model.parameters(), lr=cycle.max_lr, momentum=cycle.max_momentum
        )
        schedule = cycle.schedule(optimizer)
        for xs, ys in cycle.batches(loader):
            loss = F.cross_entropy(model(xs), ys)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step(loss)
        return F.cross_entropy(model(x), y).item()

    first, second = (execute(make_cycle(300), train) for _ in range(2))
    assert first.value == second.value < 0.2
