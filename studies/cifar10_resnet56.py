"""CIFAR-10, ResNet-56: super-convergence as published, one-cycle against the step schedule.

What      ResNet-56 for CIFAR-10 (three stages of nine blocks with 16, 32 and 64 channels, shortcuts
          without parameters), SGD, weight decay 1e-4, crops of the image padded by 4 and mirrored
          at random. Mixed precision and channels-last on a GPU. The recipes, with what was
          published for them (test accuracy in %):
            one-cycle   batch 1000, 10,000 steps, 0.1 to 3 and back in straight lines, the last
                        tenth down to nearly nothing; momentum 0.95/0.85               92.4
            step        batch 1000, 80,000 steps, 0.35, a tenth after half and after three quarters
                        (as He et al. have it); momentum 0.9                           91.2
            step-10k    the same in 10,000 steps                                       90.32
            clr-95      batch 512, 95 epochs, 0.8, use_clr_beta=(10, 13.68, 0.95, 0.85)  93.53
            clr-70      batch 512, 70 epochs, 3, use_clr_beta=(20, 10, 0.95, 0.85)     93.08
            clr-50      batch 512, 50 epochs, 3, use_clr_beta=(20, 10, 0.95, 0.85)     92.31
          The sources leave open where the step schedule's drops lay, one-cycle's share of the last
          phase and clr-50's tuple; these are ours. Batch 1000 and 0.35 are as we remember the
          paper: check before you cite them.
Source    Smith and Topin, arXiv 1708.07120; Smith, arXiv 1803.09820, and its author's logs; the
          first public one-cycle runs (fastai, 2018); He et al., arXiv 1512.03385, section 4.2.
Expected  One-cycle within half a point of 92.4, above `step` with an eighth of its steps. Not run
          by us on the real data: no machine of ours has it.
Data      CIFAR-10 as its authors give it, either version: `cifar-10-batches-py` (pickles, which are
          read without running anything in them) or `cifar-10-batches-bin`. Nothing is downloaded.
Cost      Not measured: no GPU of ours. 10,000 steps of batch 1000 are 200 epochs, some 8e15
          operations (0.13 GMAC an image and pass); `step` takes eight times as long. A CPU core
          needs 0.6 s for 50 images: it is for a look at whether it works. With
          HPSCHED_CHECKPOINTS=FOLDER an interrupted run goes on where it was.

    python -m studies.cifar10_resnet56 run --data DIR --recipes one-cycle step-10k clr-95
    python -m studies.cifar10_resnet56 run --data DIR --scale 0.01 --device cpu   # does it work?
    python -m studies.cifar10_resnet56 summarise
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpsched
from hpsched import checkpoint, schedules
from hpsched.cycle import execute
from hpsched.errors import HpschedError, UsageError
from hpsched.schedules import OneCycleSchedules
from studies.results import append, read

IMAGES = 50_000  # to train on
WEIGHT_DECAY, MOMENTUM = 1e-4, 0.9
LOOKS = 50  # at the test accuracy during a run
PIXELS = 3 * 32 * 32
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

# ------------------------------------------------------------------ recipes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published run.

    Attributes:
        batch_size: Images per step.
        steps: Optimizer steps.
        curves: Steps → rate and momentum by step.
        accuracy: Published test accuracy, in per cent.
    """

    batch_size: int
    steps: int
    curves: Callable[[int], OneCycleSchedules]
    accuracy: float


def one_cycle(steps: int) -> OneCycleSchedules:
    """0.1 → 3 → 0.1 in straight lines, then the annihilation."""
    return schedules.one_cycle(steps, max_lr=3.0, div_factor=30.0, pct_start=0.45, policy="linear")


def step(steps: int) -> OneCycleSchedules:
    """0.35, a tenth of it after half and a hundredth after three quarters of the steps."""
    drops = sorted({steps // 2, steps * 3 // 4} - {0})
    rate = schedules.multi_factor(0.35, milestones=drops, alpha=0.1)
    return OneCycleSchedules(rate, schedules.constant(MOMENTUM))


def _clr(max_lr: float, epochs: int, div: float, tail: float, accuracy: float) -> Recipe:
    return Recipe(
        batch_size=512,
        steps=epochs * (IMAGES // 512),
        curves=lambda n: schedules.use_clr_beta(n, max_lr, (div, tail, 0.95, 0.85)),
        accuracy=accuracy,
    )


RECIPES: Mapping[str, Recipe] = {
    "one-cycle": Recipe(batch_size=1000, steps=10_000, curves=one_cycle, accuracy=92.4),
    "step": Recipe(batch_size=1000, steps=80_000, curves=step, accuracy=91.2),
    "step-10k": Recipe(batch_size=1000, steps=10_000, curves=step, accuracy=90.32),
    "clr-95": _clr(0.8, 95, 10, 13.68, 93.53),
    "clr-70": _clr(3.0, 70, 20, 10, 93.08),
    "clr-50": _clr(3.0, 50, 20, 10, 92.31),
}

# ------------------------------------------------------------------ data


class Split(NamedTuple):
    """Images of shape (n, 3, 32, 32), bytes, and their classes, 0 … 9."""

    x: Tensor
    y: Tensor


def load(folder: Path) -> dict[str, Split]:
    """``train`` and ``test`` from either version of CIFAR-10, in ``folder`` or in a folder there.

    Raises:
        UsageError: A file is missing, or is not what its name says.
    """
    places = [folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"]
    for place in places:
        for suffix, reads in (("", read_pickle), (".bin", read_binary)):
            if (place / f"data_batch_1{suffix}").is_file():
                return _both(place, suffix, reads)
    raise UsageError(
        f"{folder}: there is neither data_batch_1 nor data_batch_1.bin. Get the python or the "
        "binary version from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and name the "
        "folder that holds it with --data."
    )


def _both(folder: Path, suffix: str, read: Callable[[Path], Split]) -> dict[str, Split]:
    names = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    found = {}
    for part, files in names.items():
        paths = [folder / f"{name}{suffix}" for name in files]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise UsageError(f"{folder}: {', '.join(missing)} missing: unpack CIFAR-10 again.")
        splits = [read(path) for path in paths]
        found[part] = Split(torch.cat([s.x for s in splits]), torch.cat([s.y for s in splits]))
    return found


def read_binary(path: Path) -> Split:
    """Records of a class and 3,072 pixels (red, green, blue, row by row), a byte each.

    Raises:
        UsageError: The file does not consist of whole records of that kind.
    """
    data = np.fromfile(path, dtype=np.uint8)
    if not len(data) or len(data) % (1 + PIXELS):
        raise UsageError(
            f"{path} holds {len(data):,} bytes, and whole images take {1 + PIXELS} each: it was "
            "cut short or damaged; unpack CIFAR-10 again."
        )
    rows = data.reshape(-1, 1 + PIXELS)
    return _checked(path, rows[:, 1:], rows[:, 0])


#: All that a batch's pickle may name: how NumPy puts an array together, under its two addresses.
ARRAYS = frozenset({
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"), ("numpy", "dtype"),
})  # fmt: skip


class _ArraysOnly(pickle.Unpickler):
    """Reads plain data and NumPy arrays; a pickle that names anything else is refused unread."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        if name == "_reconstruct":  # wherever this NumPy keeps it
            return np.zeros(0).__reduce__()[0]
        return getattr(np, name)


def read_pickle(path: Path) -> Split:
    """A batch of the python version: a dict with ``data`` (n, 3072) and ``labels``.

    Raises:
        UsageError: The file is no such pickle, or holds more than data.
    """
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="latin1").load()  # the files are Python 2's
        pixels, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(
            f"{path} is no batch of CIFAR-10 ({reason}): unpack CIFAR-10 again."
        ) from None
    return _checked(path, pixels, labels)


def _checked(path: Path, pixels: np.ndarray, labels: np.ndarray) -> Split:
    n = len(labels)
    good = pixels.shape == (n, PIXELS) and pixels.dtype == np.uint8 and labels.shape == (n,)
    if not good or not n or not np.isin(labels, range(10)).all():
        raise UsageError(
            f"{path} holds pixels of shape {pixels.shape} ({pixels.dtype}) and {n} classes; "
            f"CIFAR-10 has {PIXELS} bytes an image and classes 0 to 9."
        )
    x = torch.from_numpy(pixels.reshape(n, 3, 32, 32).copy())
    return Split(x, torch.from_numpy(labels.astype(np.int64)))


class Batches:
    """Shuffled whole batches, cropped and mirrored at random, as floats about 0."""

    def __init__(self, split: Split, batch_size: int) -> None:
        self.split, self.size = split, min(batch_size, len(split.y))

    def __len__(self) -> int:
        return len(self.split.y) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.split.x.device
        rows = torch.randperm(len(self.split.y)).to(device)  # the CPU's generator: resumable
        for batch in rows.split(self.size)[: len(self)]:
            yield normalised(augmented(self.split.x[batch])), self.split.y[batch]


def augmented(x: Tensor) -> Tensor:
    """Each image, padded by 4 black pixels, cropped anywhere, and mirrored every second time."""
    n, device = len(x), x.device
    padded = F.pad(x, (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2, n)).to(device)
    mirrored = (torch.rand(n) < 0.5).to(device)
    span = torch.arange(32, device=device)
    columns = torch.where(mirrored[:, None], span.flip(0), span) + right[:, None]
    image = torch.arange(n, device=device)[:, None, None, None]
    colour = torch.arange(3, device=device)[None, :, None, None]
    return padded[image, colour, (down[:, None] + span)[:, None, :, None], columns[:, None, None]]


def normalised(x: Tensor) -> Tensor:
    """Bytes → floats with about zero mean and unit variance per colour, channels last."""
    mean = x.new_tensor([0.4914, 0.4822, 0.4465], dtype=torch.float32)[:, None, None]
    deviation = x.new_tensor([0.2470, 0.2435, 0.2616], dtype=torch.float32)[:, None, None]
    return ((x / 255 - mean) / deviation).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------ model


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut drops pixels and adds black channels (option A)."""

    def __init__(self, low: int, high: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(low, high, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(high)
        self.conv2 = nn.Conv2d(high, high, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(high)
        self.stride, self.added = stride, high - low

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(short, (0, 0, 0, 0, self.added // 2, self.added // 2)))


def resnet(depth: int = 56) -> nn.Module:
    """He et al.'s ResNet for CIFAR-10 with 6n + 2 layers."""
    if depth < 8 or (depth - 2) % 6:
        raise UsageError(f"--depth {depth}: 6n + 2 layers, e.g. 20, 56 or 110.")
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
    layers.append(nn.ReLU())
    for low, high, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        for index in range((depth - 2) // 6):
            layers.append(Block(high if index else low, high, 1 if index else stride))
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


# ------------------------------------------------------------------ training


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a recipe; `looks` gets (step, test accuracy in per cent) as it goes."""

    recipe: Recipe
    data: Mapping[str, Split]
    depth: int
    precision: str
    looks: list[tuple[int, float]]

    def train(self, cycle: hpsched.Cycle) -> float:
        """Train once, as `cycle` says; return the test error in per cent."""
        torch.manual_seed(cycle.seed)
        device = self.data["train"].x.device
        net = resnet(self.depth).to(device)
        optimizer = torch.optim.SGD(
            net.parameters(), lr=cycle.max_lr, momentum=cycle.max_momentum,
            weight_decay=cycle.weight_decay,
        )  # fmt: skip
        scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "float16")
        schedule = cycle.schedule(optimizer)
        parts = {"net": net, "optimizer": optimizer, "scaler": scaler}
        cycle.restore(**parts)
        every = max(1, cycle.total_steps // LOOKS)
        for x, y in cycle.batches(Batches(self.data["train"], self.recipe.batch_size)):
            with self.autocast(device):
                loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step(loss)
            if cycle.steps % every == 0 or cycle.steps == cycle.total_steps:
                self.looks.append((cycle.steps, self.accuracy(net)))
            cycle.checkpoint(**parts)
        return 100 - self.looks[-1][1]

    def autocast(self, device: torch.device) -> Any:
        """Mixed precision, or nothing."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    @torch.no_grad()
    def accuracy(self, net: nn.Module) -> float:
        """Test accuracy in per cent."""
        net.eval()
        split = self.data["test"]
        with self.autocast(split.x.device):
            parts = [net(normalised(x)).argmax(1) for x in split.x.split(1000)]
        net.train()
        return 100 * float((torch.cat(parts) == split.y).float().mean())


def run_recipe(run: Run, name: str, steps: int, seed: int) -> str | None:
    """Train; returns why the run diverged, if it did."""
    made = run.recipe.curves(steps)
    cycle = hpsched.Cycle(
        values={
            "max_lr": max(made.lr(step) for step in range(steps)),
            "max_momentum": made.momentum(0),
            "weight_decay": WEIGHT_DECAY,
        },
        schedules=made,
        total_steps=steps,
        seed=seed,
        kind="final",
        name=f"cifar10-resnet{run.depth}-{name}-{steps}-{seed}",
    )
    diverged = execute(cycle, run.train).diverged
    checkpoint.current().forget(cycle.name)
    return diverged


# ------------------------------------------------------------------ results


def run(options: argparse.Namespace) -> None:
    """Run the recipes that have no result yet, and keep each as it comes."""
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    data = {part: Split(*(t.to(device) for t in s)) for part, s in load(options.data).items()}
    key = {"seed": options.seed, "depth": options.depth, "scale": options.scale,
           "images": len(data["train"].y)}  # fmt: skip
    done = read(options.results)
    for name in options.recipes:
        if any(row["recipe"] == name and key.items() <= row.items() for row in done):
            continue
        recipe = RECIPES[name]
        steps = max(3, round(recipe.steps * options.scale))
        one = Run(recipe=recipe, data=data, depth=options.depth, precision=options.precision,
                  looks=[])  # fmt: skip
        begun = time.perf_counter()
        diverged = run_recipe(one, name, steps, options.seed)
        record = {
            "recipe": name, **key, "steps": steps, "looks": one.looks, "diverged": diverged,
            "seconds": round(time.perf_counter() - begun, 1), "precision": options.precision,
            "device": options.device, "torch": torch.__version__,
        }  # fmt: skip
        append(options.results, record)
    print(summary(read(options.results)))


def summary(done: Sequence[Mapping[str, Any]]) -> str:
    """What each run reached beside what was published, and one-cycle's steps to `step`'s level."""
    lines = [f"{'recipe':<10} {'steps':>7} {'accuracy':>9} {'published':>10} {'seconds':>8}"]
    for row in done:
        whole = row["scale"] == 1 and row["images"] == IMAGES and row["depth"] == 56
        reached = "diverged" if row["diverged"] else f"{row['looks'][-1][1]:.2f}"
        published = f"{RECIPES[row['recipe']].accuracy:.2f}" if whole else "–"
        lines.append(
            f"{row['recipe']:<10} {row['steps']:>7} {reached:>9} {published:>10} "
            f"{row['seconds']:>8.0f}"
        )
    return "\n".join([*lines, *_saved(done)])


def _saved(done: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """When one-cycle reached what the step schedule has in the end, of the same kind of run."""
    for ours in done:
        for other in done:
            kind = all(ours[key] == other[key] for key in ("seed", "depth", "scale", "images"))
            if ours["recipe"] == "one-cycle" and other["recipe"].startswith("step") and kind:
                target = other["looks"][-1][1] if other["looks"] else 0.0
                first = next((n for n, value in ours["looks"] if value >= target), None)
                when = f"after {first} steps" if first else "never"
                yield (
                    f"one-cycle reaches {other['recipe']}'s {target:.2f} (in {other['steps']} "
                    f"steps) {when}"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    fast = "bfloat16" if cuda and torch.cuda.is_bf16_supported() else "float16"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("cifar10-resnet56.jsonl"))
    commands = parser.add_subparsers(dest="command", required=True)
    go = commands.add_parser("run", help="run the recipes that have no result yet")
    go.add_argument("--data", type=Path, default=Path("data"))
    go.add_argument("--recipes", nargs="+", choices=RECIPES, default=["one-cycle", "step-10k"])
    go.add_argument("--seed", type=int, default=0)
    go.add_argument("--depth", type=int, default=56, help="6n + 2 layers")
    go.add_argument("--scale", type=float, default=1.0, help="of the steps: 0.01 for a first look")
    go.add_argument("--device", default="cuda" if cuda else "cpu")
    go.add_argument("--precision", choices=PRECISIONS, default=fast if cuda else "float32")
    commands.add_parser("summarise", help="beside what was published")
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            run(options)
        else:
            print(summary(read(options.results)))
    except HpschedError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


if __name__ == "__main__":
    main()
