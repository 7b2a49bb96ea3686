"""The stand-alone finder: nothing is left changed, and the sweep is what it says.

"Nothing" is checked two ways: training after the finder against training without it, bit for bit,
and by looking at each object for what training would not show.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, TensorDataset

import hpsched
from hpsched.errors import TrainingError, UsageError
from hpsched.range_test import lr_range_test

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
        return str(value.dtype), tuple(value.shape), value.detach().contiguous().numpy().tobytes()
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
    found.find()
    assert found.loader.sampler.epoch == 0
    assert_equal_training(found, untouched)


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


@pytest.mark.parametrize("call", [1, 2, 9, 10, 11, 30])
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw"])
def test_restored_after_an_exception(call: int, optimizer: str) -> None:
    found, untouched = World(optimizer, warm=2), World(optimizer, warm=2)
    with pytest.raises(Boom):
        found.find(failing(found, call, boom), start_lr=1e-5, end_lr=1e-2, weight_decay=0.2)
    assert_equal_training(found, untouched)


@pytest.mark.parametrize("call", [1, 2, 10, 17])
def test_restored_after_ctrl_c(call: int) -> None:
    found, untouched = World(warm=2, num_workers=call % 2), World(warm=2, num_workers=call % 2)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        found.find(failing(found, call, interrupt))
    assert signal.getsignal(signal.SIGINT) is handler
    assert not multiprocessing.active_children()
    assert_equal_training(found, untouched, steps=10)


def test_ctrl_c_during_the_restore_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpsched import range_test

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
    from hpsched import range_test

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
    with pytest.raises(UsageError, match=r"rates are \[0\.0\]"):
        optimizer.param_groups[0]["lr"] = 0.0
        lr_range_test(model, optimizer, F.mse_loss, batches)
    with pytest.raises(UsageError, match="Linear has no trainable parameters"):
        lr_range_test(model.requires_grad_(False), optimizer, F.mse_loss, batches)
