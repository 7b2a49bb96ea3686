"""Fashion-MNIST: the modern LeNet of D2L's chapter on schedules, under each of them and one-cycle.

What      LeNet with ReLU and max pooling (5x5 convolutions of 6 and 16 channels, linear layers of
          120, 84 and 10), Xavier weights, SGD without momentum, batch 256, 30 epochs. The chapter's
          schedules with the chapter's numbers, which count epochs: constant 0.3; square root from
          0.1; factor 0.9 down to 0.01 (from 0.3; the chapter only plots it, from 2); multi-factor
          0.5 at epochs 15 and 30 from 0.5; cosine from 0.3 to 0.01 in 20 epochs, pinned there; the
          same after a warm-up of 5 epochs. And one-cycle with momentum 0.95/0.85, step by step, at
          the rate that three range tests of 100 steps propose (--max-lr chooses another).
          Each epoch: training loss and accuracy (of the batches as they were trained on), test
          accuracy. One seed (--seed): differences below half a point mean nothing.
Source    Zhang, Lipton, Li, Smola, "Dive into Deep Learning", section 12.11; Xiao, Rasul, Vollgraf,
          arXiv 1708.07747.
Expected  The chapter's printed runs sit at chance (10 %) and prove nothing for any schedule. The
          data set's README lists 0.876 (Keras) and 0.916 (TensorFlow, over 300 epochs) for two
          convolutions with max pooling, sent in and not tested by its authors. Not run by us on
          the real data: no machine of ours has it.
Data      The four files of Fashion-MNIST in MNIST's own format, gzipped or not, in one folder.
          Nothing is downloaded: see the message that names what is missing.
Cost      13 core-seconds an epoch, from 20 timed steps (CPU, one thread, PyTorch 2.13): 45 minutes
          for 30 epochs of seven schedules. Not measured on a GPU. Resumable: a finished schedule
          is kept.

    python -m studies.fashion_mnist_schedules run --data DIR          # --epochs 3 for a first look
    python -m studies.fashion_mnist_schedules summarise
    python -m studies.fashion_mnist_schedules plot --output fashion-mnist.html
"""

from __future__ import annotations

import argparse
import gzip
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpsched
from hpsched import proposal, schedules
from hpsched.cycle import execute
from hpsched.errors import HpschedError, UsageError
from hpsched.schedules import OneCycleSchedules, Schedule
from hpsched.suggest import find_lr
from studies.results import append, read

BATCH_SIZE, EPOCHS = 256, 30
#: The chapter's schedules; a step of theirs is an epoch.
CHAPTER: Mapping[str, Schedule] = {
    "constant": schedules.constant(0.3),
    "square root": schedules.square_root(0.1),
    "factor": schedules.factor(0.3, alpha=0.9, min_lr=0.01),
    "multi-factor": schedules.multi_factor(0.5, milestones=[15, 30], alpha=0.5),
    "cosine": schedules.cosine(20, 0.3, end_lr=0.01),
    "warm-up cosine": schedules.warmup(
        lambda n: schedules.cosine(n, 0.3, end_lr=0.01), 20, 5, fit="squeeze"
    ),
}
ONE_CYCLE = "one-cycle"
NAMES = [*CHAPTER, ONE_CYCLE]
PUBLISHED = "0.876 and 0.916 (two convolutions with max pooling, the data set's README)"
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
IMAGES, LABELS = 0x0803, 0x0801  # an idx file begins with its type (8: bytes) and dimensions

# ------------------------------------------------------------------ data


class Split(NamedTuple):
    """Images of shape (n, 1, 28, 28), values in [0, 1], and their classes, 0 … 9."""

    x: Tensor
    y: Tensor


def load(folder: Path) -> dict[str, Split]:
    """``train`` and ``test`` from MNIST's four files.

    Raises:
        UsageError: A file is missing, or is not what its name says.
    """
    return {part: _split(folder, *names) for part, names in FILES.items()}


def _split(folder: Path, images: str, labels: str) -> Split:
    x = read_idx(_find(folder, images), IMAGES)
    y = read_idx(_find(folder, labels), LABELS)
    if len(x) != len(y):
        raise UsageError(f"{folder}: {images} has {len(x)} images and {labels} {len(y)} labels.")
    if x.shape[1:] != (28, 28) or y.max(initial=0) > 9:
        raise UsageError(
            f"{folder}: images of {x.shape[1:]} pixels and classes up to {y.max(initial=0)}; "
            "Fashion-MNIST has 28x28 pixels and classes 0 to 9."
        )
    return Split(torch.from_numpy(x).unsqueeze(1) / 255, torch.from_numpy(y).long())


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    wanted = ", ".join(f"{name}.gz" for names in FILES.values() for name in names)
    raise UsageError(
        f"{folder}: there is no {name}.gz. Get {wanted} from "
        "https://github.com/zalandoresearch/fashion-mnist (folder data/fashion) and name the "
        "folder that holds them with --data."
    )


def read_idx(path: Path, magic: int) -> np.ndarray:
    """An array of bytes from a file in MNIST's idx format, gzipped or not.

    The header is big-endian: the magic number, then the size of each of its dimensions.

    Raises:
        UsageError: The file is damaged, of another kind, or shorter or longer than it says.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read ({error}): get it again.") from None
    dimensions = magic & 0xFF
    header = np.frombuffer(data[: 4 + 4 * dimensions], dtype=">u4") if len(data) >= 4 else []
    if len(header) != 1 + dimensions or header[0] != magic:
        began = data[:4].hex() or "nothing"
        raise UsageError(
            f"{path} begins with {began}, and a file of this name with {magic:08x}: "
            "it is another file, or damaged; get it again."
        )
    shape = tuple(int(size) for size in header[1:])
    if len(data) != 4 * len(header) + math.prod(shape):
        raise UsageError(
            f"{path} holds {len(data):,} bytes, and its header promises "
            f"{4 * len(header) + math.prod(shape):,}: it was cut short or damaged; get it again."
        )
    return np.frombuffer(data, dtype=np.uint8, offset=4 * len(header)).reshape(shape).copy()


# ------------------------------------------------------------------ training


def lenet() -> nn.Module:
    """The chapter's "slightly modernised" LeNet."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU()),
        *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )
    for module in net:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
    return net


class Batches:
    """Shuffled whole batches of a split that lies on the device."""

    def __init__(self, split: Split) -> None:
        self.split, self.size = split, min(BATCH_SIZE, len(split.y))

    def __len__(self) -> int:
        return len(self.split.y) // self.size

    def __iter__(self) -> Any:
        rows = torch.randperm(len(self.split.y)).to(self.split.x.device)
        for batch in rows.split(self.size)[: len(self)]:
            yield self.split.x[batch], self.split.y[batch]


def train(
    cycle: hpsched.Cycle,
    data: Mapping[str, Split],
    keep: Callable[[dict[str, float]], None] = lambda row: None,
) -> float:
    """Train once, as `cycle` says; `keep` gets a row for each epoch. Returns the test error."""
    torch.manual_seed(cycle.seed)
    net = lenet().to(data["train"].x.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=cycle.max_lr, momentum=cycle.max_momentum)
    schedule = cycle.schedule(optimizer)
    batches = Batches(data["train"])
    total = torch.zeros(2, device=data["train"].x.device)  # of loss and right answers
    row = {"test_accuracy": 0.0}
    for step, (x, y) in enumerate(cycle.batches(batches), start=1):
        output = net(x)
        loss = F.cross_entropy(output, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(loss)
        total += torch.stack([loss.detach(), (output.argmax(1) == y).float().mean()])
        if step % len(batches) == 0 and not cycle.is_range_test:
            train_loss, train_accuracy = (total / len(batches)).tolist()
            row = {
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "test_accuracy": accuracy(net, data["test"]),
            }
            keep(row)
            total.zero_()
    return 1 - row["test_accuracy"]


@torch.no_grad()
def accuracy(net: nn.Module, split: Split) -> float:
    """Fraction of right answers."""
    parts = zip(split.x.split(1000), split.y.split(1000), strict=True)
    right = torch.stack([(net(x).argmax(1) == y).sum() for x, y in parts]).sum()
    return float(right) / len(split.y)


def curves(name: str, epochs: int, per_epoch: int, max_lr: float | None) -> OneCycleSchedules:
    """Rate and momentum by optimizer step; the chapter's schedules change once an epoch."""
    if name == ONE_CYCLE:
        assert max_lr is not None
        return schedules.one_cycle(epochs * per_epoch, max_lr=max_lr)
    by_epoch = CHAPTER[name]
    return OneCycleSchedules(lambda step: by_epoch(step // per_epoch), lambda step: 0.0)


def run_schedule(
    name: str, data: Mapping[str, Split], epochs: int, seed: int, max_lr: float | None
) -> list[dict[str, float]]:
    """A row for each epoch: training loss, training and test accuracy. Fewer if it diverged."""
    per_epoch = len(Batches(data["train"]))
    made = curves(name, epochs, per_epoch, max_lr)
    first = max(made.lr(step) for step in range(0, epochs * per_epoch, per_epoch))
    cycle = hpsched.Cycle(
        values={"max_lr": first, "max_momentum": made.momentum(0), "weight_decay": 0.0},
        schedules=made,
        total_steps=epochs * per_epoch,
        seed=seed,
        kind="final",
        name=f"fashion-mnist {name}",
        drives_momentum=name == ONE_CYCLE,
    )
    rows: list[dict[str, float]] = []
    execute(cycle, partial(train, data=data, keep=rows.append))
    return rows


def proposed_rate(data: Mapping[str, Split], steps: int, seed: int) -> float:
    """What range tests propose for a one-cycle run of so many steps."""
    tests = find_lr(partial(train, data=data), seed=seed, weight_decays=[0.0])
    found = proposal.pool(tests, steps)
    unsure = "" if found.reliable else f" ({found.reason})"
    print(f"range tests propose max_lr {found.centre:.3g}{unsure}", flush=True)
    return found.centre


# ------------------------------------------------------------------ results


def run(options: argparse.Namespace) -> None:
    """Run the schedules that have no result yet, and keep each as it comes."""
    device = torch.device(options.device)
    data = {part: Split(*(t.to(device) for t in s)) for part, s in load(options.data).items()}
    done = read(options.results)
    key = {"epochs": options.epochs, "seed": options.seed, "images": len(data["train"].y)}
    for name in options.schedules:
        if any(row["schedule"] == name and key.items() <= row.items() for row in done):
            continue
        max_lr = options.max_lr
        if name == ONE_CYCLE and max_lr is None:
            steps = options.epochs * len(Batches(data["train"]))
            max_lr = proposed_rate(data, steps, options.seed)
        rows = run_schedule(name, data, options.epochs, options.seed, max_lr)
        record = {"schedule": name, **key, "max_lr": max_lr if name == ONE_CYCLE else None,
                  "torch": torch.__version__, "device": options.device, "rows": rows}  # fmt: skip
        append(options.results, record)
        print(_line(record), flush=True)
    print(summary(read(options.results)))


def summary(done: Sequence[Mapping[str, Any]]) -> str:
    """The end of each run, beside what was published."""
    return "\n".join([*map(_line, done), f"published: {PUBLISHED}"])


def _line(record: Mapping[str, Any]) -> str:
    if len(record["rows"]) < record["epochs"]:
        return f"{record['schedule']}: diverged in epoch {len(record['rows']) + 1}"
    last, best = record["rows"][-1], max(row["test_accuracy"] for row in record["rows"])
    return (
        f"{record['schedule']}: training loss {last['train_loss']:.3f}, training accuracy "
        f"{last['train_accuracy']:.3f}, test accuracy {last['test_accuracy']:.3f} "
        f"(best {best:.3f}) after {record['epochs']} epochs"
    )


def plot(done: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Training loss, training and test accuracy over epochs, a line a schedule."""
    from plotly.subplots import make_subplots

    from hpsched.figure_files import write_figure
    from hpsched.figure_style import COLOURS, add_line, styled

    if not done:
        raise UsageError("no results to plot: run the schedules first.")
    panels = {"train_loss": "training loss", "train_accuracy": "training accuracy",
              "test_accuracy": "test accuracy"}  # fmt: skip
    figure = make_subplots(rows=1, cols=3, subplot_titles=list(panels.values()))
    for index, record in enumerate(done):
        colour, epochs = COLOURS[index % len(COLOURS)], range(1, len(record["rows"]) + 1)
        for column, field in enumerate(panels, start=1):
            values = [row[field] for row in record["rows"]]
            name = record["schedule"]
            add_line(figure, epochs, values, name, colour, legendgroup=name,
                     showlegend=column == 1, row=1, col=column)  # fmt: skip
    figure.update_xaxes(title_text="epoch")
    best = max(
        done, key=lambda record: record["rows"][-1]["test_accuracy"] if record["rows"] else 0
    )
    title = f"Fashion-MNIST, LeNet: {best['schedule']} ends with the highest test accuracy"
    write_figure(styled(figure, title, width=1100), output)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("fashion-mnist.jsonl"))
    commands = parser.add_subparsers(dest="command", required=True)
    go = commands.add_parser("run", help="run the schedules that have no result yet")
    go.add_argument("--data", type=Path, default=Path("data/fashion-mnist"))
    go.add_argument("--schedules", nargs="+", choices=NAMES, default=NAMES)
    go.add_argument("--epochs", type=int, default=EPOCHS)
    go.add_argument("--max-lr", type=float, help="one-cycle's; default: by range tests")
    go.add_argument("--seed", type=int, default=0)
    go.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    commands.add_parser("summarise", help="the end of each run")
    draw = commands.add_parser("plot", help="loss and accuracies over epochs")
    draw.add_argument("--output", type=Path, default=Path("fashion-mnist.html"))
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            run(options)
        elif options.command == "plot":
            plot(read(options.results), options.output)
        else:
            print(summary(read(options.results)))
    except HpschedError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


if __name__ == "__main__":
    main()
