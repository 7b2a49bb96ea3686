"""The stand-alone finder: nothing is left changed, and the sweep is what it says.

"Nothing" is checked two ways: training after the finder against training without it, bit for bit,
and by looking at each object for what training would not show.
"""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
    default_collate,
)

import hpsched
from hpsched import cycle as cycles
from hpsched import range_test
from hpsched.cycle import BLOCK, Cycle
from hpsched.errors import TrainingError, UsageError
from hpsched.range_test import lr_range_test, lr_range_tests

torch.set_num_threads(1)


class Net(nn.Module):
    """Every kind of state: parameters (one tied, one frozen), buffers, random draws, attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.frozen_norm = nn.BatchNorm1d(8).eval()
        self.second = nn.Linear(8, 8)
        self.second.weight.requires_grad_(False)
        self.tied = self.second.bias
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)
        self.register_buffer("mask", torch.ones(1).expand(8))  # shares one cell: cannot be written
        self.register_buffer("mean", torch.zeros(8), persistent=False)
        self.calls = 0
        self.history: list[Tensor] = [torch.zeros(2)]
        self.generator = torch.Generator().manual_seed(3)
        self.rng = np.random.default_rng(4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.frozen_norm(self.norm(F.relu(self.first(x)))) * self.mask
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)  # a new tensor each time
        self.history[0].add_(1.0)
        self.history.append(torch.ones(1))
        noise = torch.randn(h.shape, generator=self.generator) + float(self.rng.normal())
        jitter = random.random() + float(np.random.rand())
        return self.head(self.drop(F.relu(self.second(h) + self.tied))) + 0.01 * (
            noise.mean() + jitter
        )


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def data(rows: int = 48) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(rows, 4, generator=g), torch.randint(0, 3, (rows,), generator=g)
    )


class World:
    """A training run in the middle of nowhere; two of the same kind are equal bit for bit."""

    def __init__(
        self,
        optimizer: str = "sgd-momentum",
        *,
        warm: int = 0,
        scaler: torch.amp.GradScaler | None = None,
        **loader: Any,
    ) -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        self.model = Net()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[optimizer](trainable)
        self.loader = DataLoader(data(), **{"batch_size": 8, "shuffle": True, **loader})
        self.scaler = scaler
        self.train(warm)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def batches(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def train(self, steps: int) -> list[float]:
        losses = []
        for _, (x, y) in zip(range(steps), self.batches(), strict=False):
            self.optimizer.zero_grad()
            loss = self.loss(self.model(x), y)
            if self.scaler is None:
                loss.backward()
                self.optimizer.step()
            else:
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
            losses.append(loss.item())
        return losses

    def find(self, loss_fn: Any = None, **kwargs: Any) -> hpsched.RangeTest:
        options = {"num_iter": 30, "progress": False, "scaler": self.scaler, **kwargs}
        return lr_range_test(
            self.model, self.optimizer, loss_fn or self.loss, self.loader, **options
        )

    def state(self) -> dict[str, Any]:
        """All state that two worlds must share, as comparable bytes and plain values."""
        states = [self.optimizer.state.get(p, {}) for p in self.model.parameters()]
        return {
            "model": {k: _plain(v) for k, v in self.model.state_dict().items()},
            "attributes": _plain([self.model.calls, self.model.history, self.model.mean]),
            "grads": _plain([p.grad for p in self.model.parameters()]),
            "trainable": [p.requires_grad for p in self.model.parameters()],
            "modes": [module.training for module in self.model.modules()],
            "optimizer": _plain(states),
            "groups": [
                {k: _plain(v) for k, v in g.items() if k != "params"}
                for g in self.optimizer.param_groups
            ],
            "own generators": _plain(
                [self.model.generator.get_state(), self.model.rng.bit_generator.state]
            ),
            "scaler": self.scaler and self.scaler.state_dict(),
            "random": _plain([random.getstate(), np.random.get_state(), torch.get_rng_state()]),
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        content = value.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        return str(value.dtype), tuple(value.shape), content.view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def assert_equal_training(found: World, untouched: World, steps: int = 20) -> None:
    assert found.state() == untouched.state()
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    losses = found.train(steps)
    after = found.state()
    random.setstate(generators[0])
    np.random.set_state(generators[1])
    torch.set_rng_state(generators[2])
    assert losses == untouched.train(steps)
    assert after == untouched.state()


# ------------------------------------------------------------------ restored, bit for bit


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("warm", [0, 7], ids=["fresh", "warm"])
def test_training_after_the_finder_equals_training_without_it(optimizer: str, warm: int) -> None:
    found, untouched = World(optimizer, warm=warm), World(optimizer, warm=warm)
    test = found.find()
    assert len(test.losses) > 10
    assert_equal_training(found, untouched)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.3, "momentum": 0.5},
        {"seed": 11},
        {"accumulate": 3},
        {"mode": "linear"},
        {"start_lr": 1e-3, "end_lr": 1e6},
        {"stop_diverged": False},
        {"clip_grad_norm": 0.1},
        {"valid_loader": DataLoader(data(), 8, shuffle=True), "validate_batches": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_no_option_leaves_a_trace(options: dict[str, Any]) -> None:
    found, untouched = World("adamw", warm=3), World("adamw", warm=3)
    found.find(**options)
    assert_equal_training(found, untouched)


def test_objects_keep_their_identity() -> None:
    world = World("adamw-tensor-lr", warm=3)
    model, optimizer = world.model, world.optimizer

    def identities() -> list[int]:
        states = [value for state in optimizer.state.values() for value in state.values()]
        groups = [optimizer.param_groups, *optimizer.param_groups, optimizer.state]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        tensors = [*model.parameters(), *model.buffers(), *params, *states, model.history[0]]
        rates = [group["lr"] for group in optimizer.param_groups]
        return [id(value) for value in (*groups, *tensors, *rates)] + [
            tensor.data_ptr() for tensor in tensors if isinstance(tensor, Tensor)
        ]

    before = identities()
    world.find()
    assert identities() == before


def test_empty_optimizer_state_is_empty_again() -> None:
    world = World("adam")
    world.find()
    assert len(world.optimizer.state) == 0


def test_gradients_are_given_back() -> None:
    world = World()
    x, y = next(iter(world.loader))
    world.loss(world.model(x), y).backward()
    grads = [p.grad for p in world.model.parameters()]
    copies = copy.deepcopy(grads)
    world.find()
    for parameter, grad, content in zip(world.model.parameters(), grads, copies, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, content)


def test_gradients_that_the_optimizer_does_not_clear_are_given_back() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    F.mse_loss(model(x), y).backward()
    grads = [p.grad for p in model.parameters()]
    copies = copy.deepcopy(grads)
    lr_range_test(model, optimizer, F.mse_loss, [(x, y)], num_iter=10)
    for parameter, grad, content in zip(model.parameters(), grads, copies, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, content)


def test_evaluation_mode_is_given_back_and_sweeps_in_training_mode() -> None:
    world = World()
    world.model.eval()
    modes = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        modes.append(world.model.drop.training)
        return world.loss(output, target)

    world.find(loss)
    assert all(modes)
    assert not any(module.training for module in world.model.modules())


def test_a_frozen_submodule_stays_in_evaluation_mode_during_the_sweep() -> None:
    world, modes = World(), []
    world.find(lambda o, t: modes.append(world.model.frozen_norm.training) or world.loss(o, t))
    assert not any(modes)


def test_what_the_training_code_replaces_is_put_back() -> None:
    """New tensors under `.data`, flipped requires_grad, swapped lists and groups, additions."""
    found, untouched = World(warm=2), World(warm=2)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        model = found.model
        model.head.bias.data = model.head.bias.data.clone()
        model.second.weight.requires_grad_(True)
        model.history = []
        model.history.append(torch.zeros(1))
        model.extra = torch.ones(3)
        found.optimizer.load_state_dict(found.optimizer.state_dict())
        return found.loss(output, target)

    found.find(loss)
    assert not hasattr(found.model, "extra")
    assert_equal_training(found, untouched)


@pytest.mark.parametrize("warm", [0, 4], ids=["fresh", "warm"])
def test_grad_scaler_is_given_back(warm: int) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    found, untouched = World(warm=warm, scaler=scaler()), World(warm=warm, scaler=scaler())
    before = dict(vars(found.scaler))
    found.find()
    assert vars(found.scaler) == before
    assert_equal_training(found, untouched)


def test_a_loss_module_is_given_back() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centre = nn.Parameter(torch.zeros(3))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            self.seen += 1
            return F.cross_entropy(output - self.centre, target)

    world, criterion = World(), Centred()
    world.optimizer.add_param_group({"params": [criterion.centre]})
    before = copy.deepcopy(criterion.state_dict())
    world.find(criterion)
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randint(0, 10, (6, 3)), torch.randint(0, 2, (6,))
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    grad, content = model[0].weight.grad, model[0].weight.grad.to_dense()
    before = copy.deepcopy(model.state_dict())
    lr_range_test(model, optimizer, F.cross_entropy, [batch], num_iter=12)
    assert model[0].weight.grad is grad
    assert torch.equal(grad.to_dense(), content)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_content_in_a_file_is_restored_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_test, "SMALL", 0)  # all of this small model goes there
    found, untouched = World("adamw", warm=3), World("adamw", warm=3)
    seen = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(os.listdir(tmp_path))
        return found.loss(output, target)

    found.find(loss, cache_dir=tmp_path)
    assert not any(seen)  # it has no name, so that nothing can leave it behind
    assert_equal_training(found, untouched)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(7, 5),
        torch.randn(7, 5).t(),
        torch.randn(7, 5)[::2, 1:3],
        torch.randn(5).expand(7, 5)[:1],
        torch.randn(3, 3, dtype=torch.float64),
        torch.randn(3).bfloat16(),
        torch.randn(3).half(),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.tensor([True, False]),
        torch.arange(5),
        torch.tensor(1.5),
        torch.tensor([math.nan, -0.0, math.inf]),
        torch.empty(0, 3),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}-{tuple(tensor.stride())}",
)
@pytest.mark.parametrize("small", [0, 4096], ids=["file", "memory"])
def test_a_file_gives_back_what_it_was_given(
    tensor: Tensor, small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_test, "SMALL", small)
    store = range_test._File(tmp_path)
    first, second = store.keep(tensor), store.keep(tensor)
    for load in (second, first):
        back = load()
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        assert _plain(back.resolve_conj()) == _plain(tensor.resolve_conj())
    store.close()


def test_the_file_is_closed_however_the_sweep_ends(tmp_path: Path) -> None:
    model = nn.Linear(100, 100)  # large enough for the file
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches, before = [(torch.ones(4, 100), torch.ones(4, 100))], model.weight.clone()
    open_files = len(os.listdir("/proc/self/fd"))
    errors = []  # a traceback would keep the file open, were it not closed
    for how, error in ((boom, Boom), (interrupt, KeyboardInterrupt)):

        def fail(output: Tensor, target: Tensor, how: Callable[[], None] = how) -> Tensor:
            how()
            return F.mse_loss(output, target)

        with pytest.raises(error) as caught:
            lr_range_test(model, optimizer, fail, batches, cache_dir=tmp_path)
        errors.append(caught)
    lr_range_test(model, optimizer, F.mse_loss, batches, cache_dir=tmp_path)
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert torch.equal(model.weight, before)


# ------------------------------------------------------------------ loaders


@pytest.mark.parametrize("workers", [0, 1])
def test_shuffling_loader_with_workers(workers: int) -> None:
    found, untouched = (World(num_workers=workers) for _ in range(2))
    found.find(num_iter=12)
    assert not multiprocessing.active_children()
    assert_equal_training(found, untouched, steps=8)


def test_persistent_workers_are_those_of_the_training() -> None:
    found, untouched = (World(num_workers=1, persistent_workers=True) for _ in range(2))
    found.find(num_iter=12)
    assert not multiprocessing.active_children()
    assert_equal_training(found, untouched, steps=8)


def test_generators_and_epochs_of_loader_and_samplers() -> None:
    def worlds(**kwargs: Callable[[], Any]) -> list[World]:
        return [World(**{key: make() for key, make in kwargs.items()}) for _ in range(2)]

    found, untouched = worlds(generator=lambda: torch.Generator().manual_seed(5))
    found.find()
    assert_equal_training(found, untouched)

    def sampler() -> RandomSampler:
        return RandomSampler(data(), generator=torch.Generator().manual_seed(6))

    found, untouched = worlds(sampler=sampler, shuffle=lambda: False)
    found.find()
    assert_equal_training(found, untouched)

    def distributed() -> DistributedSampler:
        return DistributedSampler(data(), num_replicas=2, rank=1)

    found, untouched = worlds(sampler=distributed, shuffle=lambda: False)
    found.find(seed=7)
    assert (found.loader.sampler.epoch, found.loader.sampler.seed) == (0, 0)
    assert_equal_training(found, untouched)


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(data(), 8, shuffle=True, generator=torch.Generator().manual_seed(5)),
        lambda: DataLoader(data(), 8, sampler=RandomSampler(data(), generator=torch.Generator())),
        lambda: DataLoader(data(), 8, sampler=DistributedSampler(data(), 1, 0)),
    ],
    ids=["loader", "sampler", "distributed"],
)
def test_the_seed_is_also_that_of_the_loaders_order(loader: Callable[[], DataLoader]) -> None:
    model, first_batches = nn.Linear(4, 3), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = loader()
    for seed in (1, 2, 1):
        seen: list[list[int]] = []

        def loss(output: Tensor, target: Tensor, seen: list[list[int]] = seen) -> Tensor:
            seen.append(target.tolist())
            return F.cross_entropy(output, target)

        lr_range_test(model, optimizer, loss, batches, seed=seed, num_iter=10)
        assert first_batches.setdefault(seed, seen[0]) == seen[0]
    assert first_batches[1] != first_batches[2]


def test_generator_of_a_data_set() -> None:
    class Noisy(Dataset):
        def __init__(self) -> None:
            self.rng = np.random.default_rng(0)
            self.python = random.Random(0)
            self.legacy = np.random.RandomState(0)

        def __len__(self) -> int:
            return 32

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            draws = self.rng.normal(), self.python.random(), self.legacy.rand(), float(index)
            return torch.tensor(draws), index % 3

    worlds = [World(), World()]
    for world in worlds:
        world.loader = DataLoader(Noisy(), batch_size=8)
    worlds[0].find()
    assert_equal_training(*worlds)


# ------------------------------------------------------------------ cut off


class Boom(Exception):
    pass


def failing(world: World, call: int, how: Callable[[], None]) -> Callable[[Tensor, Tensor], Tensor]:
    calls = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            how()
        return world.loss(output, target)

    return loss


def boom() -> None:
    raise Boom


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Fault:
    """Does ``how`` at its k-th call, once."""

    def __init__(self, at: int, how: Callable[[], None]) -> None:
        self.at, self.how, self.calls = at, how, 0

    def __call__(self, *args: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            self.how()


class FaultyLoader(DataLoader):
    fault: Fault

    def __iter__(self) -> Any:
        self.fault()
        return super().__iter__()


def in_loader(loader: DataLoader, fault: Fault) -> None:
    loader.__class__, loader.fault = FaultyLoader, fault


def in_collate(loader: DataLoader, fault: Fault) -> None:
    loader.collate_fn = lambda items: fault() or default_collate(items)


def before(owner: Any, name: str) -> Callable[[World, Fault, pytest.MonkeyPatch], None]:
    """The fault strikes as ``owner.name`` is called."""

    def install(world: World, fault: Fault, patch: pytest.MonkeyPatch) -> None:
        method = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: fault() or method(*args, **kwargs))

    return install


#: stage → how to make it fail, and at which of its calls in a sweep of 30 steps
STAGES: dict[str, tuple[Callable[[World, Fault, pytest.MonkeyPatch], Any], tuple[int, ...]]] = {
    "preparation": (before(range_test, "_set_weight_decay"), (1,)),
    "seeding": (before(torch, "manual_seed"), (1,)),
    "first rate": (before(cycles.ScheduleDriver, "_apply"), (1, 2, 12)),
    "loader": (lambda w, f, p: in_loader(w.loader, f), (1, 2)),
    "batch": (lambda w, f, p: in_collate(w.loader, f), (1, 13)),
    "forward": (lambda w, f, p: w.model.second.register_forward_hook(f), (1, 24)),
    "backward": (lambda w, f, p: w.model.second.bias.register_hook(f), (1, 25)),
    "between backward and step": (before(torch.nn.utils, "clip_grad_norm_"), (1, 11)),
    "scale": (before(torch.amp.GradScaler, "scale"), (1, 11)),
    "unscale": (before(torch.amp.GradScaler, "unscale_"), (1, 11)),
    "scaler's step": (before(torch.amp.GradScaler, "step"), (1, 11)),
    "scaler's update": (before(torch.amp.GradScaler, "update"), (1, 11)),
    "before optimizer's step": (lambda w, f, p: w.optimizer.register_step_pre_hook(f), (1, 11)),
    "after optimizer's step": (lambda w, f, p: w.optimizer.register_step_post_hook(f), (1, 11)),
    "schedule": (before(Cycle, "_record"), (1, 10, 30)),
    "reading the losses": (before(cycles, "_read"), (1, 4)),
    "stop rule": (before(Cycle, "_sweep_is_over"), (1, 2)),
    "validation's loader": (lambda w, f, p: in_loader(w.valid_loader, f), (1, 2)),
    "validation's batch": (lambda w, f, p: in_collate(w.valid_loader, f), (1, 9)),
    "metric": (lambda w, f, p: setattr(w, "on_metric", f), (1, 9)),
    "after validation": (before(range_test, "_averaged"), (1, 4)),
    "closing": (before(Cycle, "close"), (1,)),
}


@pytest.mark.parametrize(
    ("stage", "at"), [(stage, at) for stage, (_, calls) in STAGES.items() for at in calls]
)
@pytest.mark.parametrize("how", ["exception", "ctrl-c"])
def test_restored_wherever_the_sweep_is_cut_off(
    stage: str, at: int, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def world() -> World:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        world = World("adamw", warm=4, scaler=scaler)
        world.valid_loader = DataLoader(data(), 8, shuffle=True)
        world.on_metric = lambda: None
        return world

    found, untouched = world(), world()
    options = {
        "accumulate": 2,
        "weight_decay": 0.2,
        "seed": 3,
        "clip_grad_norm": 1.0,
        "end_lr": 1e-2,
        "valid_loader": found.valid_loader,
        "validate_every": 5,
        "validate_batches": 2,
        "metrics": {"size": lambda o, t: found.on_metric() or o.abs().mean()},
        "cache_dir": tmp_path,
    }
    monkeypatch.setattr(range_test, "SMALL", 0)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        fault = Fault(at, {"exception": boom, "ctrl-c": interrupt}[how])
        STAGES[stage][0](found, fault, patch)
        with pytest.raises({"exception": Boom, "ctrl-c": KeyboardInterrupt}[how]):
            found.find(**options)
    assert fault.calls >= at
    assert signal.getsignal(signal.SIGINT) is handler
    assert not os.listdir(tmp_path)
    assert_equal_training(found, untouched)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_restored_after_an_exception_in_mid_sweep(optimizer: str) -> None:
    found, untouched = World(optimizer, warm=2), World(optimizer, warm=2)
    with pytest.raises(Boom):
        found.find(failing(found, 11, boom), start_lr=1e-5, end_lr=1e-2)
    assert_equal_training(found, untouched)


@pytest.mark.parametrize("call", [1, 17])
@pytest.mark.parametrize("persistent", [False, True])
def test_no_worker_process_outlives_ctrl_c(call: int, persistent: bool) -> None:
    loader = {"num_workers": 1, "persistent_workers": persistent}
    found, untouched = World(**loader), World(**loader)
    valid_loader = DataLoader(data(), 8, **loader)
    with pytest.raises(KeyboardInterrupt):
        found.find(failing(found, call, interrupt), valid_loader=valid_loader)
    assert not multiprocessing.active_children()
    assert_equal_training(found, untouched, steps=10)


def test_ctrl_c_during_the_restore_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = range_test._Snapshot.restore

    def interrupted(self: Any) -> None:
        interrupt()
        restore(self)
        interrupt()

    monkeypatch.setattr(range_test._Snapshot, "restore", interrupted)
    found, untouched = World(warm=2), World(warm=2)
    with pytest.raises(KeyboardInterrupt):
        found.find()
    assert_equal_training(found, untouched)


def test_impatient_ctrl_c_waits_for_the_end_of_the_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    restore, done = range_test._Snapshot.restore, []

    def interrupted(self: Any) -> None:
        interrupt()
        interrupt()
        restore(self)
        done.append(True)

    monkeypatch.setattr(range_test._Snapshot, "restore", interrupted)
    found, untouched = World(warm=2), World(warm=2)
    with pytest.raises(KeyboardInterrupt):
        found.find(failing(found, 3, interrupt))
    assert done
    assert_equal_training(found, untouched)


def test_only_the_first_ctrl_c_goes_through() -> None:
    from hpsched.range_test import _Interrupts

    interrupts = _Interrupts()
    interrupts.watch()
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        interrupt()  # held
    finally:
        with pytest.raises(KeyboardInterrupt):
            interrupts.release()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_only_takes_note_goes_on_doing_so() -> None:
    world, notes = World(), []
    previous = signal.signal(signal.SIGINT, lambda signum, frame: notes.append(signum))
    try:
        world.find(lambda o, t: interrupt() or world.loss(o, t), num_iter=12, end_lr=1e-3)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert notes == [signal.SIGINT] * 12


def test_outside_the_main_thread() -> None:
    found, untouched = World(), World()
    thread = threading.Thread(target=found.find)
    thread.start()
    thread.join()
    assert_equal_training(found, untouched)


def test_restored_after_bad_input_that_shows_late() -> None:
    found, untouched = World(warm=1), World(warm=1)
    with pytest.raises(TrainingError, match="very first step"):
        found.find(lambda o, t: found.loss(o, t) * math.nan)
    with pytest.raises(UsageError, match="scalar"):
        found.find(lambda o, t: F.cross_entropy(o, t, reduction="none"))
    with pytest.raises(UsageError, match="accumulate=0"):
        found.find(accumulate=0)
    assert_equal_training(found, untouched)


def test_one_thing_that_resists_keeps_no_other_from_being_restored() -> None:
    found, untouched = World(warm=2), World(warm=2)

    class Stubborn(list[int]):
        def clear(self) -> None:
            raise Boom

    found.model.first.extra = Stubborn([1])
    with pytest.raises(Boom):
        found.find()
    assert_equal_training(found, untouched)


# ------------------------------------------------------------------ the sweep


def rates_seen(optimizer: torch.optim.Optimizer) -> list[list[float]]:
    """Hooks the optimizer; each entry is the groups' rates at one step."""
    seen: list[list[float]] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([float(group["lr"]) for group in optimizer.param_groups])
    )
    return seen


def quadratic() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    return nn.Linear(3, 1), [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(4)]


def test_exponential_sweep_hits_both_ends_exactly() -> None:
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    seen = rates_seen(optimizer)
    test = lr_range_test(
        model, optimizer, F.mse_loss, batches, start_lr=1e-7, end_lr=1e-2, num_iter=20
    )
    used = [rate for (rate,) in seen]
    assert used == list(test.lrs)
    assert (used[0], used[-1], len(used)) == (1e-7, 1e-2, 20)
    steps = np.diff(np.log(used))
    assert steps == pytest.approx(np.full(19, steps[0]))
    assert len(test.losses) == 20


def test_linear_sweep() -> None:
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    options = {"start_lr": 0.01, "end_lr": 0.05, "num_iter": 11, "mode": "linear"}
    test = lr_range_test(model, optimizer, F.mse_loss, batches, **options)
    assert test.lrs == pytest.approx(np.linspace(0.01, 0.05, 11))


def test_groups_keep_their_ratio_to_the_largest() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    _, batches = quadratic()
    optimizer = torch.optim.SGD(
        [
            {"params": model[0].parameters(), "lr": 0.001},  # a tenth
            {"params": model[1].parameters(), "lr": torch.tensor(0.01)},
        ],
        lr=1.0,
        foreach=False,
    )
    seen = rates_seen(optimizer)
    test = lr_range_test(
        model, optimizer, F.mse_loss, batches, start_lr=1e-6, end_lr=0.001, num_iter=15
    )
    assert [slow for slow, _ in seen] == pytest.approx([0.1 * lr for lr in test.lrs], rel=1e-6)
    assert [fast for _, fast in seen] == pytest.approx(list(test.lrs), rel=1e-6)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.001, 0.01])


def test_divergence_ends_the_sweep_and_is_recorded() -> None:
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    test = lr_range_test(model, optimizer, F.mse_loss, batches, end_lr=1e6)
    assert len(test.losses) < 100 == len(test.lrs)
    assert test.lr_diverged is not None


def test_losses_are_the_means_over_accumulated_batches_one_rate_per_step() -> None:
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    seen, each = rates_seen(optimizer), []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        value = F.mse_loss(output, target)
        each.append(value.item())
        return value

    test = lr_range_test(
        model, optimizer, loss, batches, num_iter=12, end_lr=1e-2, accumulate=4, progress=False
    )
    assert len(each) == 48
    assert len(seen) == 12
    assert test.losses == pytest.approx(np.mean(np.reshape(each, (12, 4)), axis=1))


def test_accumulated_batches_train_as_one_batch() -> None:
    model, batches = quadratic()
    large = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    options = {"num_iter": 15, "start_lr": 1e-3, "end_lr": 0.5, "progress": False}
    one = lr_range_test(model, optimizer, F.mse_loss, large, **options)
    four = lr_range_test(model, optimizer, F.mse_loss, batches, accumulate=4, **options)
    assert four.losses == pytest.approx(one.losses, rel=1e-4)


def test_step_fn_takes_any_batch() -> None:
    model = nn.Bilinear(2, 3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [{"a": torch.randn(4, 2), "b": [torch.randn(4, 3)], "y": torch.randn(4, 1)}]

    def step(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch["a"], batch["b"][0]), batch["y"])

    test = lr_range_test(model, optimizer, None, batches, step_fn=step, num_iter=20)
    assert len(test.losses) >= 10


def test_skipped_scaler_steps_have_had_their_rate() -> None:
    """The scale starts so high that the first steps overflow; each still takes one rate."""
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-40)
    seen = rates_seen(optimizer)
    test = lr_range_test(
        model, optimizer, F.mse_loss, batches, num_iter=20, end_lr=1e-2, scaler=scaler
    )
    assert len(test.losses) == 20
    assert 10 <= len(seen) < 20  # the hook sees only steps that were taken
    assert {rate for (rate,) in seen} < set(test.lrs)
    assert seen[-1] == [test.lrs[-1]]


def test_autocast_is_entered_for_each_batch() -> None:
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    kinds = set()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        kinds.add(output.dtype)
        return F.mse_loss(output.float(), target)

    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    lr_range_test(model, optimizer, loss, batches, num_iter=10, end_lr=1e-3, autocast=autocast)
    assert kinds == {torch.bfloat16}


def test_negative_losses_sweep_to_the_end_and_are_read() -> None:
    """A constant taken off every loss changes nothing that a range test says."""

    def run(offset: float) -> hpsched.RangeTest:
        world = World("sgd")
        return world.find(lambda o, t: world.loss(o, t) - offset, num_iter=60)

    positive, negative = run(0.0), run(1000.0)
    assert max(negative.losses) < 0
    assert len(negative.losses) == len(positive.losses)
    assert negative.reliable == positive.reliable


def test_the_record_says_how_it_was_run() -> None:
    world = World("adamw")
    test = world.find(seed=5)
    assert (test.weight_decay, test.momentum, test.seed, test.optimizer) == (0.1, 0.9, 5, "AdamW")
    assert test.seconds is not None
    assert test.seconds > 0
    test = world.find(weight_decay=0.01, momentum=0.7)
    assert (test.weight_decay, test.momentum, test.seed) == (0.01, 0.7, None)
    assert World("adagrad").find().momentum is None


def test_weight_decay_and_momentum_are_those_of_the_sweep() -> None:
    model, batches = quadratic()
    optimizer = torch.optim.SGD(
        [
            {"params": [model.weight], "weight_decay": 0.2},
            {"params": [model.bias], "weight_decay": 0.0},  # as one does for biases
        ],
        lr=0.1,
        momentum=0.9,
    )
    seen: list[tuple[float, float]] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend((g["weight_decay"], g["momentum"]) for g in optimizer.param_groups)
    )
    options = {"num_iter": 10, "end_lr": 1e-3}
    lr_range_test(model, optimizer, F.mse_loss, batches, weight_decay=0.5, momentum=0.0, **options)
    assert set(seen) == {(0.5, 0.0), (0.0, 0.0)}
    seen.clear()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    lr_range_test(model, optimizer, F.mse_loss, batches, weight_decay=0.5, **options)
    assert set(seen) == {(0.5, 0.9)}


def test_the_same_seed_gives_the_same_curve() -> None:
    world = World()
    first, second, other = (world.find(seed=seed) for seed in (1, 1, 2))
    world.model.generator.manual_seed(3)
    assert first.losses == second.losses != other.losses


def test_works_under_no_grad_and_inference_mode() -> None:
    world = World()
    with torch.no_grad():
        expected = world.find().losses
    with torch.inference_mode():
        assert world.find().losses == expected


def test_suggestion_is_near_a_sensible_rate() -> None:
    """Digits, MLP, SGD with momentum: against the best of a grid of short one-cycle runs."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digits)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(x, y), 64, shuffle=True, generator=generator)

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    test = lr_range_test(*build(), F.cross_entropy, loader, seed=0)
    assert test.reliable, test.reason

    def final_loss(max_lr: float) -> float:
        model, optimizer = build()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=100)
        rows = torch.randint(0, len(x), (100, 64), generator=torch.Generator().manual_seed(1))
        for batch in rows:
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
        return F.cross_entropy(model(x), y).item()

    grid = [0.01 * 2.0**k for k in range(10)]  # 0.01 to 5.12
    best = min(grid, key=final_loss)
    assert best / 4 <= test.suggestion <= best * 4
    assert test.window[0] < best < test.window[1]


def test_exported() -> None:
    assert hpsched.lr_range_test is lr_range_test
    assert hpsched.lr_range_tests is lr_range_tests


@pytest.mark.parametrize(("risen", "steps"), [(100.0, 60), (math.inf, 40)])
def test_without_the_stop_rule_the_sweep_goes_on_while_it_can(risen: float, steps: int) -> None:
    """The loss rises to ``risen`` at step 32; the rule sees it when step 40 has been taken."""
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

    def sweep(**options: Any) -> hpsched.RangeTest:
        calls = iter(range(1, 100))

        def loss(output: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(output, target) + (risen if next(calls) >= 32 else 0.0)

        return lr_range_test(
            model, optimizer, loss, batches, num_iter=60, end_lr=1e-2, progress=False, **options
        )

    assert len(sweep().losses) == 40
    assert len(sweep(stop_diverged=False).losses) == steps


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_clipped_as_in_a_loop_of_ones_own(scaled: bool) -> None:
    """All groups together, to the norm that they have without the scaler's factor."""
    model, batches = quadratic()
    optimizer = torch.optim.SGD(
        [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.1}], lr=0.3
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    norms = []

    def norm(*_: Any) -> None:
        grads = [p.grad.flatten() for p in model.parameters()]
        norms.append(torch.cat(grads).norm().item())

    optimizer.register_step_pre_hook(norm)
    options = {"num_iter": 12, "start_lr": 1e-4, "end_lr": 1e-3, "scaler": scaler}
    lr_range_test(model, optimizer, F.mse_loss, batches, clip_grad_norm=1e-2, **options)
    assert norms == pytest.approx([1e-2] * 12, rel=1e-3)
    norms.clear()
    lr_range_test(model, optimizer, F.mse_loss, batches, clip_grad_norm=1e9, **options)
    assert min(norms) > 0.1


# ------------------------------------------------------------------ validation


def test_validation_takes_the_next_batches_in_evaluation_mode() -> None:
    """Compared with the same done by hand after each of the optimizer's steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    model[1].eval()  # frozen: stays so in training, too
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    valid = [(torch.full((2, 4), float(k)), torch.tensor([0, k % 3])) for k in range(5)]
    steps, following, by_hand, seen = iter(range(1, 100)), itertools.cycle(valid), [], []

    def validate_by_hand(*_: Any) -> None:
        if (step := next(steps)) % 3 == 0:
            copied = copy.deepcopy(model).eval()
            batches = [next(following) for _ in range(2)]
            with torch.no_grad():
                values = [F.cross_entropy(copied(x), y).item() for x, y in batches]
            by_hand.append((step, sum(values) / 2))

    def accuracy(output: Tensor, target: Tensor) -> Tensor:
        seen.append((output.requires_grad, *(part.training for part in model)))
        return (output.argmax(1) == target).float().mean()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if output.requires_grad:
            assert [part.training for part in model] == [True, False, True, True]
        return F.cross_entropy(output, target)

    optimizer.register_step_post_hook(validate_by_hand)
    test = lr_range_test(
        model, optimizer, loss, DataLoader(data(), 8), num_iter=30, end_lr=0.1,
        valid_loader=valid, validate_every=3, validate_batches=2, metrics={"accuracy": accuracy},
    )  # fmt: skip
    assert [step for step, _ in test.validation["loss"]] == list(range(3, 31, 3))
    assert np.array(test.validation["loss"]) == pytest.approx(np.array(by_hand))
    assert {value for _, value in test.validation["accuracy"]} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert set(seen) == {(False,) * 5}


def test_validation_leaves_the_training_losses_what_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(data(), 8, shuffle=True, num_workers=1)
    arguments = (model, optimizer, F.cross_entropy, loader)
    without = lr_range_test(*arguments, seed=3, num_iter=30)
    valid_loader = DataLoader(data(), 8, shuffle=True, num_workers=1)
    found = lr_range_test(*arguments, seed=3, num_iter=30, valid_loader=valid_loader)
    assert found.losses == without.losses
    assert len(found.validation["loss"]) == len(found.losses)
    assert without.validation == {}


def test_validated_reads_the_sweep_by_the_validation_loss() -> None:
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    options = {"num_iter": 60, "start_lr": 1e-4, "end_lr": 10.0, "validate_every": 2}
    test = lr_range_test(model, optimizer, F.mse_loss, batches, valid_loader=batches, **options)
    assert test.validated is not None
    assert test.validated.losses == tuple(value for _, value in test.validation["loss"])
    assert test.validated.lrs == test.lrs[1 : len(test.losses) : 2]


def test_valid_fn_and_step_fn_take_any_batch() -> None:
    model, _ = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    batches = [{"x": torch.randn(4, 3), "y": torch.randn(4, 1)}]

    def step(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch["x"]), batch["y"])

    def valid(model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"loss": step(model, batch), "rows": len(batch["x"])}

    options = {"step_fn": step, "valid_loader": batches, "num_iter": 10, "end_lr": 1e-3}
    test = lr_range_test(model, optimizer, None, batches, **options)
    assert list(test.validation) == ["loss"]
    with_rows = lr_range_test(model, optimizer, None, batches, valid_fn=valid, **options)
    assert with_rows.validation["loss"] == test.validation["loss"]
    assert with_rows.validation["rows"] == [(step, 4.0) for step in range(1, 11)]


def test_validation_under_autocast() -> None:
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    kinds: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def loss(output: Tensor, target: Tensor) -> Tensor:
        kinds[model.training].add(output.dtype)
        return F.mse_loss(output.float(), target)

    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    options = {"num_iter": 10, "end_lr": 1e-3, "autocast": autocast, "valid_loader": batches}
    lr_range_test(model, optimizer, loss, batches, **options)
    assert kinds == {True: {torch.bfloat16}, False: {torch.bfloat16}}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"validate_every": 0}, UsageError, "validate_every=0"),
        ({"validate_batches": 0}, UsageError, "validate_batches=0"),
        ({"metrics": {"loss": F.mse_loss}}, UsageError, r"metrics\['loss'\].*always"),
        ({"valid_loader": []}, TrainingError, "yields no batches"),
        ({"valid_loader": [torch.ones(2)]}, UsageError, "not a pair"),
        ({"valid_fn": lambda m, b: 1.0, "metrics": {"a": F.mse_loss}}, UsageError, "from valid_fn"),
        ({"metrics": {"a": lambda o, t: o}}, TrainingError, r"'a' got a tensor of shape \(8, 1\)"),
        ({"valid_fn": lambda m, b: {"a": "high"}}, UsageError, "'a' is 'high': return a scalar"),
        ({"valid_fn": lambda m, b: None}, UsageError, "'loss' is None: return a scalar"),
        ({"valid_loader": None, "metrics": {"a": F.mse_loss}}, UsageError, "pass valid_loader"),
        ({"valid_loader": None, "valid_fn": F.mse_loss}, UsageError, "pass valid_loader"),
    ],
)
def test_validation_that_cannot_be(options: Any, error: type[Exception], message: str) -> None:
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with pytest.raises(error, match=message):
        lr_range_test(model, optimizer, F.mse_loss, batches, **{"valid_loader": batches, **options})


# ------------------------------------------------------------------ several sweeps


def options_of_several() -> dict[str, Any]:
    return {"num_iter": 30, "progress": False, "valid_loader": DataLoader(data(), 8)}


def test_several_sweeps_are_as_many_single_ones_from_the_same_start() -> None:
    found, untouched = World(warm=3), World(warm=3)
    arguments = (found.model, found.optimizer, found.loss, found.loader)
    tests = lr_range_tests(
        *arguments, weight_decays=(0.1, 0.0), replicates=2, seed=4, **options_of_several()
    )
    assert [(test.weight_decay, test.seed) for test in tests.tests] == [
        (0.1, 4), (0.1, 5), (0.0, 4), (0.0, 5)
    ]  # fmt: skip
    for test in tests.tests:
        single = found.find(weight_decay=test.weight_decay, seed=test.seed, **options_of_several())
        assert (single.losses, single.validation) == (test.losses, test.validation)
    # One replicate meets the same batches whatever the weight decay: the first loss is the same.
    assert tests.tests[0].losses[0] == tests.tests[2].losses[0] != tests.tests[1].losses[0]
    assert_equal_training(found, untouched)


@pytest.mark.parametrize("how", ["exception", "ctrl-c"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_restored_when_cut_off_between_sweeps(
    at: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, untouched = World(warm=3), World(warm=3)
    fault = Fault(at, {"exception": boom, "ctrl-c": interrupt}[how])
    arguments = (found.model, found.optimizer, found.loss, found.loader)
    with monkeypatch.context() as patch:
        before(range_test, "RangeTest")(found, fault, patch)  # the last thing that each one does
        with pytest.raises({"exception": Boom, "ctrl-c": KeyboardInterrupt}[how]):
            lr_range_tests(*arguments, num_iter=12, progress=False)
    assert fault.calls == at
    assert_equal_training(found, untouched)


def test_several_sweeps_choose_a_weight_decay() -> None:
    """Too much of it lets the loss fall less; the smaller ones differ in nothing that shows."""
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    batches = [(part, (part @ torch.ones(8, 1))) for part in x.split(64)]
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decays = (3.0, 1e-3, 1e-4)
    tests = lr_range_tests(model, optimizer, F.mse_loss, batches, weight_decays=decays)
    assert tests.weight_decay == 1e-3, tests.reason
    assert tests.proposal.replicates == 1
    assert tests.by_weight_decay[1e-3] == (tests.tests[1],)
    assert "weight decay 0.001 is the largest" in tests.reason
    assert tests.reason in repr(tests)
    assert tests.figure().data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decays": ()}, "at least one"),
        ({"weight_decays": (0.1, 0.1)}, "give each once"),
        ({"replicates": 0}, "replicates=0"),
        ({"weight_decays": (-1.0,)}, r"weight_decay=-1\.0"),
        ({"num_iter": 3}, "num_iter=3"),
    ],
    ids=str,
)
def test_several_sweeps_that_cannot_be(options: dict[str, Any], message: str) -> None:
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with pytest.raises(UsageError, match=message):
        lr_range_tests(model, optimizer, F.mse_loss, batches, **options)


# ------------------------------------------------------------------ cost


class Reads:
    """Counts how often the host waits for a tensor's value."""

    NAMES = ("item", "tolist", "__float__", "__bool__", "__int__", "numpy", "cpu", "__index__")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in self.NAMES:
            patch.setattr(Tensor, name, self._counted(getattr(Tensor, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return method(tensor, *args, **kwargs)

        return counted


@pytest.mark.parametrize("scaled", [False, True])
def test_the_host_reads_values_in_blocks_only(scaled: bool, monkeypatch: Any) -> None:
    """With all that may tempt it: validation, metrics, clipping, accumulation, a scaler.

    torch's GradScaler looks once per step, and once per optimizer, whether it is to be skipped.
    """
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    steps, at = 60, []
    reads = Reads(monkeypatch)
    optimizer.register_step_post_hook(lambda *_: at.append(reads.count))
    lr_range_test(
        model, optimizer, F.mse_loss, batches, num_iter=steps, end_lr=1e-3, accumulate=2,
        scaler=scaler, clip_grad_norm=1.0, valid_loader=batches, validate_batches=2,
        metrics={"size": lambda o, t: o.abs().mean()}, progress=False,
    )  # fmt: skip
    per_step = 1 if scaled else 0
    new = [count - per_step for count in np.diff(at)]
    looks = [0, *range(BLOCK - 1, steps - 1, BLOCK)]  # after the first step and each full block
    assert [step for step, count in enumerate(new) if count] == looks
    assert {new[step] for step in looks} == {2}  # losses and validation, each in one go


@pytest.mark.gpu
def test_no_synchronisation_with_the_device_except_in_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Linear(64, 1)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    batches = [(torch.randn(8, 4, device="cuda"), torch.randn(8, 1, device="cuda"))] * 3
    steps = 0

    def watched(output: Tensor, target: Tensor) -> Tensor:
        nonlocal steps
        if model.training:
            steps += 1
            quiet = (steps - 1) % BLOCK not in (0, 1)  # a look follows steps 1, 10, 20, …
            torch.cuda.set_sync_debug_mode("error" if quiet and steps % BLOCK else "default")
        return F.mse_loss(output, target)

    try:
        test = lr_range_test(
            model, optimizer, watched, batches, num_iter=40, end_lr=1e-3, clip_grad_norm=1.0,
            valid_loader=batches, metrics={"size": lambda o, t: o.abs().mean()}, progress=False,
        )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(test.losses) == len(test.validation["size"]) == 40


@pytest.mark.gpu
@pytest.mark.parametrize("cached", [False, True])
def test_restored_on_the_device(cached: bool, tmp_path: Path) -> None:
    torch.backends.cudnn.deterministic = True

    def build() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 3))
        model = model.cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        return model, optimizer, torch.amp.GradScaler("cuda", init_scale=2.0**30)

    x, y = torch.randn(64, 32, device="cuda"), torch.randint(0, 3, (64,), device="cuda")

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> list[float]:
        losses = []
        for _ in range(5):
            with torch.autocast("cuda"):
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        return losses

    results = []
    for finds in (True, False):
        model, optimizer, scaler = build()
        train(model, optimizer, scaler)
        if finds:
            options = {"cache_dir": tmp_path if cached else None, "clip_grad_norm": 1.0}
            lr_range_test(
                model, optimizer, F.cross_entropy, [(x, y)], scaler=scaler, num_iter=50,
                autocast=torch.autocast("cuda"), valid_loader=[(x, y)], seed=5, **options,
            )  # fmt: skip
        losses = train(model, optimizer, scaler)
        results.append((losses, [_plain(v.cpu()) for v in model.state_dict().values()]))
    assert results[0] == results[1]


# ------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_lr": 1.0, "end_lr": 0.1}, r"start_lr = 1\.0.*below end_lr = 0\.1"),
        ({"start_lr": 0.1, "end_lr": 0.1}, "start_lr"),
        ({"start_lr": 0.0}, r"start_lr=0\.0: give a positive rate"),
        ({"start_lr": 0.0, "mode": "linear"}, "positive rate"),
        ({"end_lr": math.inf}, "end_lr"),
        ({"num_iter": 9}, "num_iter=9.*at least 10"),
        ({"mode": "log"}, "mode = 'log'.*exp, linear"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"momentum": 1.0}, r"momentum=1\.0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"clip_grad_norm": 0.0}, r"clip_grad_norm=0\.0"),
        ({"clip_grad_norm": math.nan}, "clip_grad_norm=nan"),
        ({"cache_dir": "/nowhere"}, "cache_dir='/nowhere' is no folder"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with pytest.raises(UsageError, match=message):
        lr_range_test(model, optimizer, F.mse_loss, batches, **options)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(4, 3), "a Tensor, not a pair.*step_fn"),
        ({"x": torch.zeros(4, 3)}, "a dict of 1, not a pair.*step_fn"),
        ((torch.zeros(4, 3),) * 3, "a tuple of 3, not a pair.*step_fn"),
    ],
)
def test_batches_that_are_no_pair(batch: Any, message: str) -> None:
    model, _ = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with pytest.raises(UsageError, match=message):
        lr_range_test(model, optimizer, F.mse_loss, [batch])


def test_other_bad_input() -> None:
    model, batches = quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with pytest.raises(TrainingError, match="yields no batches"):
        lr_range_test(model, optimizer, F.mse_loss, [])
    with pytest.raises(UsageError, match=r"loss_fn=None.*step_fn"):
        lr_range_test(model, optimizer, None, batches)
    with pytest.raises(UsageError, match="does not depend on any trainable parameter"):
        lr_range_test(model, optimizer, lambda o, t: F.mse_loss(o.detach(), t), batches)
    with pytest.raises(UsageError, match="the loss is a float"):
        lr_range_test(model, optimizer, lambda o, t: F.mse_loss(o, t).item(), batches)
    with pytest.raises(UsageError, match="holds no trainable parameter of Linear"):
        lr_range_test(nn.Linear(3, 1), optimizer, F.mse_loss, batches)
    with pytest.raises(UsageError, match="Adagrad has none"):
        adagrad = torch.optim.Adagrad(model.parameters())
        lr_range_test(model, adagrad, F.mse_loss, batches, momentum=0.9)
    with pytest.raises(UsageError, match="Rprop has none"):
        rprop = torch.optim.Rprop(model.parameters())
        lr_range_test(model, rprop, F.mse_loss, batches, weight_decay=0.1)
    with pytest.raises(UsageError, match=r"LBFGS\.step needs a closure.*SGD or AdamW"):
        lbfgs = torch.optim.LBFGS(model.parameters())
        lr_range_test(model, lbfgs, F.mse_loss, batches)
    with pytest.raises(UsageError, match=r"rates are \[0\.0\]"):
        optimizer.param_groups[0]["lr"] = 0.0
        lr_range_test(model, optimizer, F.mse_loss, batches)
    with pytest.raises(UsageError, match="Linear has no trainable parameters"):
        lr_range_test(model.requires_grad_(False), optimizer, F.mse_loss, batches)
