"""Each peer's rule against the package itself: on one run's raw losses, the same suggestion."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hpsched.errors import UsageError
from studies.bench.peers import FASTAI_RULES, peers, versions

NAMES = ["torch-lr-finder", *(f"fastai {rule}" for rule in FASTAI_RULES), "Lightning"]
STEPS = 100
LRS = [10 ** (-6 + 7 * i / (STEPS - 1)) for i in range(STEPS)]

# Real runs to compare on: (seed, noise in the labels, highest rate). The first two explode and are
# stopped; at the last one's highest rate nothing has diverged yet.
RUNS = [(0, 0.1, 1e3), (1, 1.0, 1e2), (2, 0.5, 1e-1)]

bench = pytest.mark.bench
real_runs = pytest.mark.parametrize(("seed", "noise", "highest"), RUNS)


def batches(seed: int, noise: float) -> tuple[nn.Module, TensorDataset]:
    """A seeded model, and 100 batches of 16 to regress on."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(STEPS * 16, 8)
    y = x.sum(1, keepdim=True) + noise * torch.randn(len(x), 1)
    return model, TensorDataset(x, y)


def falls_then_explodes(lr: float) -> float:
    return 2.3 - 2 / (1 + 0.05 / lr) + lr**3


def with_tail(tail: float, length: int) -> list[float]:
    return [*map(falls_then_explodes, LRS[: STEPS - length]), *[tail] * length]


def same(suggestion: float | None, expected: float) -> bool:
    """Equal but for the rounding of single precision, far below one step of the sweep."""
    return suggestion is not None and math.isclose(suggestion, expected, rel_tol=1e-5)


# ------------------------------------------------------------------ against the packages


class Sweep:
    """What one run of a package recorded: rates, losses as it keeps them, and its suggestion."""

    def __init__(self, lrs: Sequence[float], losses: Sequence[float], suggestion: Any = None):
        self.lrs, self.losses, self.suggestion = list(lrs), list(losses), suggestion


def run_torch_lr_finder(seed: int, noise: float, highest: float, **options: Any) -> Sweep:
    from matplotlib.figure import Figure
    from torch_lr_finder import LRFinder

    model, data = batches(seed, noise)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    finder = LRFinder(model, optimizer, nn.MSELoss())
    loader = DataLoader(data, batch_size=16)
    finder.range_test(loader, end_lr=highest, num_iter=STEPS, **options)
    _, suggestion = finder.plot(ax=Figure().add_subplot())
    return Sweep(finder.history["lr"], finder.history["loss"], suggestion)


@bench
@real_runs
def test_torch_lr_finder(seed: int, noise: float, highest: float) -> None:
    real = run_torch_lr_finder(seed, noise, highest)
    raw = run_torch_lr_finder(seed, noise, highest, smooth_f=0, diverge_th=math.inf)
    assert (len(real.losses) < STEPS) == (highest > 1)
    assert len(raw.losses) == STEPS
    assert same(peers()["torch-lr-finder"](raw.lrs, raw.losses), real.suggestion)


def run_lightning(tmp_path: Path, run: tuple[int, float, float], threshold: float | None) -> Any:
    """The finder of a real ``lr_find``, and the raw losses of its steps."""
    import lightning.pytorch as pl
    from lightning.pytorch.tuner import Tuner

    seed, noise, highest = run
    net, data = batches(seed, noise)
    raw: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.lr = 1e-3

        def training_step(self, batch: list[Tensor]) -> Tensor:
            loss = F.mse_loss(self.net(batch[0]), batch[1])
            raw.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        max_epochs=9,
    )
    loader = DataLoader(data, batch_size=16)
    finder = Tuner(trainer).lr_find(
        Module(), loader, min_lr=1e-6, max_lr=highest, early_stop_threshold=threshold
    )
    return finder, raw


@bench
@real_runs
def test_lightning(tmp_path: Path, seed: int, noise: float, highest: float) -> None:
    real, _ = run_lightning(tmp_path, (seed, noise, highest), threshold=4.0)
    to_the_end, raw = run_lightning(tmp_path, (seed, noise, highest), threshold=None)
    assert (len(real.results["loss"]) < STEPS) == (highest > 1)
    assert len(raw) == STEPS
    assert same(peers()["Lightning"](to_the_end.results["lr"], raw), real.suggestion())


def run_fastai(tmp_path: Path, run: tuple[int, float, float], stop: bool) -> Sweep:
    """A real ``lr_find``; the losses are the raw ones."""
    from fastai.basics import SGD, Callback, DataLoaders, Learner
    from fastai.callback import schedule
    from fastai.data.load import DataLoader

    seed, noise, highest = run
    net, data = batches(seed, noise)
    raw: list[float] = []

    class Raw(Callback):
        def after_batch(self) -> None:
            raw.append(self.learn.loss.item())

    loader = DataLoader(data, bs=16, device=torch.device("cpu"))
    learner = Learner(
        DataLoaders(loader, loader),
        net,
        loss_func=nn.MSELoss(),
        opt_func=functools.partial(SGD, mom=0.0),
        cbs=Raw(),
        path=tmp_path,
    )
    suggestions = learner.lr_find(
        start_lr=1e-6,
        end_lr=highest,
        stop_div=stop,
        show_plot=False,
        suggest_funcs=tuple(getattr(schedule, rule) for rule in FASTAI_RULES),
    )
    return Sweep(learner.recorder.lrs, raw, suggestions)


@bench
@real_runs
def test_fastai(tmp_path: Path, seed: int, noise: float, highest: float) -> None:
    real = run_fastai(tmp_path, (seed, noise, highest), stop=True)
    raw = run_fastai(tmp_path, (seed, noise, highest), stop=False)
    assert (len(real.losses) < STEPS) == (highest > 1)
    assert len(raw.losses) == STEPS
    for rule in FASTAI_RULES:
        suggestion = peers()[f"fastai {rule}"](raw.lrs, raw.losses)
        assert same(suggestion, getattr(real.suggestion, rule)), rule


# ------------------------------------------------------------------ on planted sweeps


@bench
@pytest.mark.parametrize("name", NAMES)
def test_what_came_after_the_stop_does_not_matter(name: str) -> None:
    rule = peers()[name]
    recorded = [*map(falls_then_explodes, LRS[:-5]), 1e6, *[math.nan] * 4]
    stopped = [*recorded[:-4], *[0.0] * 4]
    assert rule(LRS, recorded) == rule(LRS, stopped)
    assert rule(LRS, recorded) is not None


@bench
@pytest.mark.parametrize("name", NAMES)
def test_infinite_tail_ends_the_sweep(name: str) -> None:
    suggestion = peers()[name](LRS, with_tail(math.inf, 15))
    assert suggestion is not None
    assert LRS[9] / 10 < suggestion < LRS[-15]


@bench
@pytest.mark.parametrize("name", [name for name in NAMES if name != "torch-lr-finder"])
def test_nan_tail_is_left_out(name: str) -> None:
    suggestion = peers()[name](LRS, with_tail(math.nan, 15))
    assert suggestion is not None
    assert LRS[9] / 10 < suggestion < LRS[-15]


@bench
def test_torch_lr_finder_suggests_where_nan_begins() -> None:
    """NumPy's argmin counts a NaN as the least: the package's own doing, shown as it is."""
    assert peers()["torch-lr-finder"](LRS, with_tail(math.nan, 15)) == LRS[-16]


@bench
@pytest.mark.parametrize("name", NAMES)
def test_no_suggestion_from_a_sweep_that_ends_at_once(name: str) -> None:
    assert peers()[name](LRS, [2.0] * 8 + [math.inf] * 92) is None


@bench
@pytest.mark.parametrize("name", NAMES)
def test_rules_leave_no_trace(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    losses = with_tail(math.inf, 92)
    before = torch.get_rng_state()
    peers()[name](LRS, losses)
    peers()[name](LRS, [falls_then_explodes(lr) for lr in LRS])
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


@bench
def test_versions() -> None:
    found = versions()
    assert list(found) == ["torch-lr-finder", "fastai", "lightning"]
    assert found["torch-lr-finder"] == "0.2.2"
    assert found["fastai"].startswith("2.8.")
    assert found["lightning"].startswith("2.6.")


# ------------------------------------------------------------------ without the packages


def test_every_peer_is_named() -> None:
    assert list(peers()) == NAMES


def test_peers_are_imported_only_when_called() -> None:
    program = (
        "import sys; from studies.bench.peers import peers; peers(); "
        "sys.exit(bool({'torch_lr_finder', 'fastai', 'lightning'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0


@pytest.mark.parametrize(
    ("name", "module", "remedy"),
    [
        ("torch-lr-finder", "torch_lr_finder", r"pip install torch-lr-finder==0\.2\.2"),
        ("fastai valley", "fastai.callback.schedule", r"pip install --no-deps -r studies/bench/"),
        ("Lightning", "lightning.pytorch.tuner.lr_finder", r"pip install 'lightning==2\.6"),
    ],
)
def test_missing_package(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=remedy):
        peers()[name](LRS, with_tail(math.inf, 5))


def test_missing_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UsageError, match=r"torch-lr-finder cannot be imported .*pip install"):
        versions()
