"""A character transformer on the sources of Python's standard library, with AdamW.

What      A decoder of two pre-norm layers (width 64, four heads, context 64, 110,000 weights) that
          predicts the next character; AdamW, batch 32, gradients clipped to norm 1; hpsched
          searches the one-cycle recipe over 600 optimizer steps, beta1 in place of momentum. The
          objective is the cross-entropy on modules that it was not trained on, in bits per
          character.
Data      A dozen modules of the standard library that is running this, as ASCII; three others to
          choose by, three more for the test. Nothing is downloaded. Another Python version has
          other sources: numbers compare within one.
Cost      15 core-seconds for --trials 2 --steps 100 (CPU, one thread, PyTorch 2.13): runs of 100
          steps at some 25 ms, range tests included.
Evidence  --trials 2 --steps 100 (seed 0, Python 3.11): 3.44 bits per character on the modules to
          choose by and 3.85 on the others, max_lr 0.0070; a model that knows nothing needs 7.

    python -m studies.char_transformer                              # a search, and a sample
    python -m studies.char_transformer --trials 2 --steps 100       # does it work?
    hpsched study create chars --objective studies.char_transformer:objective
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import optuna
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hpsched
from hpsched.errors import HpschedError, UsageError

TOTAL_STEPS, BATCH_SIZE, CONTEXT = 600, 32, 64
CHARACTERS = 128  # ASCII
PARTS = {
    "train": ("argparse", "ast", "cmd", "configparser", "csv", "difflib", "fractions", "inspect",
              "pdb", "pickle", "subprocess", "tarfile"),
    "validation": ("dis", "shlex", "textwrap"),
    "test": ("calendar", "heapq", "zipapp"),
}  # fmt: skip


@cache
def codes(part: str) -> Tensor:
    """The characters of a part's modules, one after the other, as numbers below 128.

    Raises:
        UsageError: This Python comes without its sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for name in PARTS[part]:
        path = folder / f"{name}.py"
        if not path.is_file():
            raise UsageError(f"{path} is not there: use a Python that comes with its sources.")
        texts.append(path.read_text(encoding="utf-8").encode("ascii", "ignore"))
    return torch.tensor(list(b"\n".join(texts)), dtype=torch.long)


class Windows:
    """Batches of windows from random places, each with the window one character further on."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            starts = torch.randint(len(self.text) - CONTEXT, (BATCH_SIZE, 1))
            rows = starts + torch.arange(CONTEXT + 1)
            yield self.text[rows[:, :-1]], self.text[rows[:, 1:]]


class Layer(nn.Module):
    """Attention to what came before, then a perceptron, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Characters (n, t) → logits of the next ones (n, t, 128)."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)
        nn.init.normal_(self.characters.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.layers(self.characters(x) + self.places(places))))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Nats per character."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


@torch.no_grad()
def bits(model: nn.Module, part: str) -> float:
    """Bits per character on windows that cover a part without overlap."""
    text = codes(part)
    windows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    losses = [cross_entropy(model(w[:, :-1]), w[:, 1:]) * len(w) for w in windows.split(256)]
    return float(torch.stack(losses).sum()) / len(windows) / math.log(2)


def train(
    cycle: hpsched.Cycle, part: str = "validation", keep: list[nn.Module] | None = None
) -> float:
    """Train once, as `cycle` says; return the bits per character on `part`."""
    torch.manual_seed(cycle.seed)
    model = Transformer()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=cycle.max_lr,
        betas=(cycle.max_momentum, 0.99),
        weight_decay=cycle.weight_decay,
    )
    schedule = cycle.schedule(optimizer)
    for x, y in cycle.batches(Windows(codes("train"))):
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step(loss)
    if keep is not None:
        keep.append(model)
    return 0.0 if cycle.is_range_test else bits(model, part)


def objective(trial: optuna.trial.BaseTrial, total_steps: int = TOTAL_STEPS) -> float:
    """One trial: a one-cycle recipe, tried on rungs of complete cycles."""
    return hpsched.suggest_onecycle(trial, total_steps=total_steps).run(train)


@torch.no_grad()
def sample(model: nn.Module, start: str = "def ", length: int = 200) -> str:
    """What the model writes on."""
    text = torch.tensor(list(start.encode("ascii")))
    for _ in range(length):
        chances = model(text[-CONTEXT:].unsqueeze(0))[0, -1].softmax(0)
        text = torch.cat([text, torch.multinomial(chances, 1)])
    return bytes(text.tolist()).decode("ascii")


def main(arguments: Sequence[str] | None = None) -> None:
    """Search with plain Optuna, then train the best recipe once and let it write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=TOTAL_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        sampler = hpsched.OneCycleSampler(seed=options.seed)
        study = optuna.create_study(sampler=sampler, pruner=hpsched.CyclePruner())
        study.optimize(partial(objective, total_steps=options.steps), n_trials=options.trials)
        best = hpsched.best(study)
        recipe = hpsched.suggest_onecycle(optuna.trial.FixedTrial(best.params), options.steps)
        models: list[nn.Module] = []
        test = recipe.train(partial(train, part="test", keep=models), options.steps, seed=1)
    except HpschedError as failure:
        parser.exit(failure.exit_code, f"error: {failure}\n")
    print(f"bits per character: validation {best.mean:.3f}, test {test:.3f}")
    for name, value in recipe.to_dict().items():
        print(f"  {name}: {value}")
    print(sample(models[0]))


if __name__ == "__main__":
    main()
