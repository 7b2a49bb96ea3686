"""Weight decay by range tests: a sweep of the rate for each, with validation loss and accuracy.

What      What fastai 0.7's `lr_find2(wds=…)` was for: sweep the learning rate once per weight decay
          (three replicates each, from the same weights and batches), measure loss and accuracy on
          a validation batch at every second step, and take the largest weight decay that still
          tolerates the highest rate. Then the check that a range test cannot make: the standard
          one-cycle recipe at the proposed rate with each of these weight decays, three seeds each.
          The model is the ResNet with batch normalisation of studies/super_convergence.py, the
          MLP or the CNN of studies/mnist1d.py, with SGD.
Source    Smith, arXiv 1803.09820, section 4.4 (the grid 1e-3, 1e-4, 1e-5, 0, here with 1e-2).
Data      MNIST-1D, generated (see studies/super_convergence.py).
Cost      15 sweeps of 100 steps and 15 runs of 320: 40 core-seconds for the ResNet (CPU, one
          thread, PyTorch 2.13).
Evidence  ResNet: the rule takes the largest, 1e-2 (no weight decay lowers the highest stable rate
          or the validation loss of a sweep), and max_lr 0.15. Whole runs at that rate say
          otherwise: validation error 0.115 ± 0.015 with 1e-2, 0.099 ± 0.001 with 1e-3, 0.090 ±
          0.009 with 1e-4, 0.085 ± 0.020 with 1e-5, 0.095 ± 0.019 with none (three seeds, mean ±
          standard deviation; PyTorch 2.13, CPU). A sweep is too short for a weight decay to hurt.

    python -m studies.weight_decay_range_tests --model resnet --output sweeps.html
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import hpsched
from hpsched.cycle import execute
from hpsched.errors import HpschedError
from hpsched.present import number, rate_text
from hpsched.schedules import one_cycle
from studies.mnist1d import TensorBatches
from studies.super_convergence import BATCH_SIZE, MODELS, TOTAL_STEPS, data, train

WEIGHT_DECAYS = (1e-2, 1e-3, 1e-4, 1e-5, 0.0)
REPLICATES, SEEDS = 3, range(3)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of right answers, as a tensor: a number would synchronise with the device."""
    return (output.argmax(1) == target).float().mean()


def sweeps(model: str, num_iter: int = 100) -> hpsched.RangeTests:
    """The range tests of a new model, at each weight decay."""
    torch.manual_seed(0)
    net = MODELS[model]()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.85)
    return hpsched.lr_range_tests(
        net,
        optimizer,
        F.cross_entropy,
        TensorBatches(data().train, BATCH_SIZE),
        weight_decays=WEIGHT_DECAYS,
        replicates=REPLICATES,
        num_iter=num_iter,
        total_steps=TOTAL_STEPS[model],
        valid_loader=TensorBatches(data().validation, BATCH_SIZE),
        validate_every=2,
        metrics={"accuracy": accuracy},
    )


def table(tests: hpsched.RangeTests) -> str:
    """For each weight decay: where it diverged, and the best of loss, validation and accuracy."""
    heads = ("weight decay", "diverged", "training loss", "validation loss", "accuracy")
    lines = ["".join(f"{head:>17}" for head in heads)]
    for decay, group in tests.by_weight_decay.items():
        edges = [test.lr_diverged for test in group if test.lr_diverged is not None]
        metrics = [test.validation for test in group]
        columns = (
            rate_text(decay),
            rate_text(statistics.median(edges)) if edges else "–",
            number(statistics.fmean(min(test.smoothed) for test in group)),
            number(statistics.fmean(min(v for _, v in m["loss"]) for m in metrics)),
            number(statistics.fmean(max(v for _, v in m["accuracy"]) for m in metrics)),
        )
        lines.append("".join(f"{column:>17}" for column in columns))
    return "\n".join(lines)


def error(model: str, max_lr: float, weight_decay: float, steps: int, seed: int) -> float:
    """Validation error of the standard one-cycle recipe; 0.9, which is chance, if it diverged."""
    made = one_cycle(steps, max_lr=max_lr)
    cycle = hpsched.Cycle(
        values={"max_lr": max_lr, "max_momentum": 0.95, "weight_decay": weight_decay},
        schedules=made,
        total_steps=steps,
        seed=seed,
        kind="final",
        name=f"weight decay {weight_decay:g}",
    )
    value = execute(cycle, lambda c: train(c, model, data().validation)).value
    return 0.9 if value is None else float(value)


def check(model: str, max_lr: float, steps: int) -> str:
    """What whole runs at that rate say of each weight decay."""
    lines = []
    for decay in WEIGHT_DECAYS:
        errors = [error(model, max_lr, decay, steps, seed) for seed in SEEDS]
        lines.append(
            f"weight decay {rate_text(decay):>6}: validation error "
            f"{statistics.fmean(errors):.3f} ± {statistics.stdev(errors):.3f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="resnet")
    parser.add_argument("--num-iter", type=int, default=100, help="steps of a sweep")
    parser.add_argument("--steps", type=int, help="of the check's runs; default: the model's")
    parser.add_argument("--output", type=Path, help="draw the sweeps: .html, .png, .svg or .pdf")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        tests = sweeps(options.model, options.num_iter)
        print(table(tests))
        chosen = "none" if tests.weight_decay is None else rate_text(tests.weight_decay)
        rate = tests.proposal.centre
        print(f"\nchosen weight decay: {chosen} ({tests.reason})\nmax_lr {rate_text(rate)}\n")
        if options.output:
            from hpsched.figure_files import write_figure

            write_figure(tests.figure(), options.output)
        print(check(options.model, rate, options.steps or TOTAL_STEPS[options.model]))
    except HpschedError as failure:
        parser.exit(failure.exit_code, f"error: {failure}\n")


if __name__ == "__main__":
    main()
