"""The finder on real models that it must refuse to answer for, and on one that it must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpsched import lr_range_test
from hpsched.lr_curve import RangeTest
from hpsched.proposal import Proposal, pool

Batches = list[tuple[Tensor, Tensor]]


def blobs(shuffled: bool = False, batches: int = 30) -> Batches:
    """Ten classes in 20 dimensions about random centres; ``shuffled`` labels mean nothing."""
    torch.manual_seed(0)
    centres = torch.randn(10, 20)
    y = torch.randint(0, 10, (batches * 64,))
    x = centres[y] + torch.randn(len(y), 20)
    if shuffled:
        y = y[torch.randperm(len(y))]
    return list(zip(x.split(64), y.split(64), strict=True))


def network(hidden: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(20, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def replicates(data: Batches, model: nn.Module | None = None, **options: Any) -> list[RangeTest]:
    """Three range tests; a new model for each seed unless one is given."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        tested = model or network()
        optimizer = torch.optim.SGD(tested.parameters(), lr=0.1, momentum=0.9)
        shuffled = [data[i] for i in torch.randperm(len(data))]
        found.append(lr_range_test(tested, optimizer, F.cross_entropy, shuffled, **options))
    return found


def refuses(tests: list[RangeTest], *words: str) -> Proposal:
    assert [test for test in tests if test.reliable] == []
    assert all(test.suggestion is None and test.window is None for test in tests)
    proposal = pool(tests)
    assert not proposal.reliable
    for word in words:
        assert word in proposal.reason
    return proposal


def test_a_model_that_learns_gets_an_answer() -> None:
    tests = replicates(blobs())
    assert all(test.reliable for test in tests)
    assert pool(tests).reliable


def test_a_frozen_model_is_refused() -> None:
    """What is trained has no part in the output."""
    model = network()
    idle = nn.Parameter(torch.zeros(1))
    model.register_parameter("idle", idle)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is idle)
    optimizer = torch.optim.SGD([idle], lr=0.1)
    tests = [
        lr_range_test(
            model,
            optimizer,
            None,
            blobs(),
            step_fn=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]) + 0 * idle.sum(),
        )
        for _ in range(3)
    ]
    refuses(tests, "never falls")


def test_a_constant_loss_is_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constant = lambda output, target: (output * 0).sum() + 2.3  # noqa: E731
    refuses([lr_range_test(model, optimizer, constant, blobs())], "never falls")


def test_pure_noise_is_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(0)
    noise = lambda output, target: (output * 0).sum() + 2.3 + 0.1 * torch.randn(())  # noqa: E731
    refuses([lr_range_test(model, optimizer, noise, blobs()) for _ in range(3)], "never falls")


@pytest.mark.parametrize("num_iter", [100, 200])  # as a study sweeps, and when that says nothing
def test_shuffled_labels_are_refused(num_iter: int) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(20, 10)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    data = blobs(shuffled=True, batches=300)
    refuses(replicates(data, linear, num_iter=num_iter), "never falls")


@pytest.mark.parametrize("num_iter", [100, 200])
def test_a_converged_model_is_refused(num_iter: int) -> None:
    data = blobs()
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    refuses(replicates(data, model, num_iter=num_iter), "never falls")


@pytest.mark.parametrize(
    ("start_lr", "end_lr", "missed", "remedy"),
    [(1e-7, 1e-3, "high", "raise end_lr"), (0.3, 30.0, "low", "lower start_lr")],
)
def test_a_range_that_misses_the_action_is_refused(
    start_lr: float, end_lr: float, missed: str, remedy: str
) -> None:
    tests = replicates(blobs(), start_lr=start_lr, end_lr=end_lr)
    proposal = refuses(tests, remedy)
    assert proposal.missed in (missed, None)  # so little may have happened that nothing is seen


def test_a_sweep_that_blows_up_at_once_is_told_to_start_lower() -> None:
    tests = replicates(blobs(), start_lr=300.0, end_lr=3000.0)
    proposal = refuses(tests, "lower start_lr")
    assert proposal.missed == "low" or all(len(test.smoothed) < 10 for test in tests)
    for test in tests:
        if len(test.smoothed):
            assert test.smoothed.min() >= min(test.losses[: len(test.smoothed)])
