"""Two gloo processes that train together: one curve, one end, nothing left changed on either.

Both ranks run all scenarios in one go (starting them is what takes time) and write down what they
saw; each test looks at one scenario.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hpsched import schedules
from hpsched.cycle import BLOCK, Cycle, execute
from hpsched.range_test import lr_range_test, lr_range_tests
from hpsched.suggest import find_lr

WORLD = 2


class Training:
    """Differs by rank in its data only."""

    def __init__(self, *, ddp: bool = True, warm: int = 0) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3)
        )
        if ddp:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        x = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
        y = (x @ torch.randn(6, 3, generator=torch.Generator().manual_seed(2))).argmax(1)
        self.data = TensorDataset(x, y)
        self.loader = DataLoader(self.data, 16, sampler=DistributedSampler(self.data))
        self.train(warm)

    def find(self, loss_fn: Any = F.cross_entropy, **options: Any) -> Any:
        defaults = {"num_iter": 60, "start_lr": 1e-4, "end_lr": 100.0, "progress": False}
        arguments = (self.model, self.optimizer, loss_fn, self.loader)
        return lr_range_test(*arguments, **{**defaults, **options})

    def train(self, steps: int) -> list[float]:
        losses = []
        for _, (x, y) in zip(range(steps), self.loader, strict=False):
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def content(self) -> list[Tensor]:
        tensors = [*self.model.state_dict().values()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        return [tensor.clone() for tensor in tensors]


# ------------------------------------------------------------------ what each rank does


def nan_on_rank_1(at: int) -> Any:
    calls = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        bad = dist.get_rank() == 1 and calls == at
        return F.cross_entropy(output, target) * (math.nan if bad else 1.0)

    return loss


def finder() -> dict[str, Any]:
    """A warm DDP model, with validation; training after it against training without it."""
    found, untouched = Training(warm=3), Training(warm=3)
    before, reductions = found.content(), []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *a, **k: (reductions.append(a[0].numel()), all_reduce(*a, **k))[1]
    try:
        test = found.find(valid_loader=found.loader, metrics={"size": lambda o, t: o.abs().mean()})
    finally:
        dist.all_reduce = all_reduce
    same = all(map(torch.equal, before, found.content()))
    state = torch.get_rng_state()
    losses = found.train(5)
    torch.set_rng_state(state)
    return {
        "losses": test.losses,
        "validation": test.validation,
        "same": same,
        "equal training": losses == untouched.train(5)
        and all(map(torch.equal, found.content(), untouched.content())),
        "reductions": reductions,
    }


def nan(at: int) -> dict[str, Any]:
    training = Training(ddp=False)  # gradients stay apart: only the loss can tell rank 0
    before = training.content()
    test = training.find(nan_on_rank_1(at), end_lr=1e-3)
    same = all(map(torch.equal, before, training.content()))
    return {"losses": test.losses, "same": same}


def alone() -> dict[str, Any]:
    training = Training(ddp=False)
    return {"losses": training.find(process_group=False, end_lr=1e-2).losses}


def several() -> dict[str, Any]:
    training = Training()
    options = {"num_iter": 40, "start_lr": 1e-4, "end_lr": 100.0, "progress": False}
    arguments = (training.model, training.optimizer, F.cross_entropy, training.loader)
    tests = lr_range_tests(*arguments, weight_decays=(1e-3, 0.0), replicates=2, **options)
    return {"losses": [test.losses for test in tests.tests], "reason": tests.reason}


def ordinary(loss: Any) -> dict[str, Any]:
    """An ordinary cycle of 100 steps; ``loss(rank, step)``. Rank 0 alone saves in mid-block."""
    cycle = Cycle(
        values={"max_lr": 0.1},
        schedules=schedules.one_cycle(100, max_lr=0.1),
        total_steps=100,
        seed=0,
        kind="rung",
        name="ordinary",
        progress=False,
    )
    saved = []

    def train(cycle: Cycle) -> float:
        schedule = cycle.schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
        for step in range(1, 101):
            schedule.step(torch.tensor(loss(dist.get_rank(), step)))
            if step == 14 and dist.get_rank() == 0:
                cycle.losses()
                saved.append(schedule.state_dict())
        return 0.5

    outcome = execute(cycle, train)
    return {
        "losses": list(cycle.losses()),
        "steps": outcome.steps,
        "diverged": outcome.diverged,
        "saved": saved,
    }


def in_a_study() -> dict[str, Any]:
    def train(cycle: Cycle) -> float:
        training = Training()
        training.optimizer.param_groups[0]["lr"] = cycle.max_lr
        schedule = cycle.schedule(training.optimizer)
        for x, y in cycle.batches(training.loader):
            loss = F.cross_entropy(training.model(x), y)
            training.optimizer.zero_grad()
            loss.backward()
            training.optimizer.step()
            schedule.step(loss)
        return 0.0

    tests = find_lr(train, num_iter=40, start_lr=1e-4, end_lr=100.0, replicates=2, seed=0)
    return {"losses": [test.losses for test in tests]}


SCENARIOS = {
    "finder": finder,
    "nan": lambda: nan(14),
    "alone": alone,
    "several": several,
    "average": lambda: ordinary(lambda rank, step: float(rank + 200 - step)),
    "nan in training": lambda: ordinary(
        lambda rank, step: math.nan if (rank, step) == (1, 33) else 1.0
    ),
    "explosion": lambda: ordinary(
        lambda rank, step: 1e6 * step if rank == 1 and step > 20 else 1.0 / step
    ),
    "study": in_a_study,
}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    seen = {name: scenario() for name, scenario in SCENARIOS.items()}
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# ------------------------------------------------------------------ what was seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.start_processes(
        work, (str(folder),), nprocs=WORLD, join=False, start_method="spawn"
    )
    try:
        finished = context.join(timeout=120)  # a hang is what this is all about
        while not finished:
            assert finished is not None
            finished = context.join(timeout=120)
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def same_text(parts: list[Any]) -> bool:
    """Equal to the last bit, NaN included."""
    return len({repr(part) for part in parts}) == 1


@pytest.mark.parametrize("name", SCENARIOS)
def test_same_losses_and_same_end(seen: list[dict[str, Any]], name: str) -> None:
    if name != "alone":
        assert same_text([rank[name]["losses"] for rank in seen])


def test_the_finder_stops_early_with_one_curve_and_validation(seen: list[dict[str, Any]]) -> None:
    first, second = (rank["finder"] for rank in seen)
    assert 20 < len(first["losses"]) < 60
    assert same_text([first["validation"], second["validation"]])
    assert first["validation"].keys() == {"loss", "size"}
    assert len(first["validation"]["loss"]) == len(first["losses"])


def test_the_finder_leaves_no_trace(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["finder"]["same"]
        assert rank["finder"]["equal training"]
        assert rank["nan"]["same"]


def test_one_small_all_reduce_per_block(seen: list[dict[str, Any]]) -> None:
    reductions = seen[0]["finder"]["reductions"]
    *blocks, validation = reductions
    steps = len(seen[0]["finder"]["losses"])
    assert blocks == [1, BLOCK - 1, *[BLOCK] * (steps // BLOCK - 1)]
    assert validation == 2 * steps  # once, when the sweep is over


def test_nan_on_one_rank_ends_the_sweep_on_both(seen: list[dict[str, Any]]) -> None:
    losses = seen[0]["nan"]["losses"]
    assert len(losses) == 20
    assert [math.isnan(loss) for loss in losses] == [step >= 14 for step in range(1, 21)]


def test_without_a_group_each_has_its_own(seen: list[dict[str, Any]]) -> None:
    assert not same_text([rank["alone"]["losses"] for rank in seen])


def test_several_sweeps_choose_alike(seen: list[dict[str, Any]]) -> None:
    assert same_text([rank["several"]["reason"] for rank in seen])
    assert len(seen[0]["several"]["losses"]) == 4


def test_ordinary_losses_are_averaged(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["average"]["losses"] == [200.5 - step for step in range(1, 101)]
    (saved,) = seen[0]["average"]["saved"]
    assert saved["losses"] == [200.5 - step for step in range(1, 11)]
    assert saved["pending"] == [189.0, 188.0, 187.0, 186.0]  # of rank 0, not averaged yet


@pytest.mark.parametrize("name", ["nan in training", "explosion"])
def test_divergence_is_seen_by_both_at_the_same_step(seen: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in seen)
    assert first["diverged"] is not None
    assert (first["diverged"], first["steps"]) == (second["diverged"], second["steps"])
    assert first["steps"] < 100
