"""``hpsched lr-find``: the range test alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from hpsched.cli.app import Format, app, check_format, hint, option, show, state
from hpsched.cli.screen import progress_line
from hpsched.errors import HpschedError, TrainingError, UsageError
from hpsched.present import rate_text

if TYPE_CHECKING:
    from hpsched.lr_curve import RangeTest
    from hpsched.proposal import Proposal
    from hpsched.weight_decay import RangeTests


@app.command("lr-find", epilog="Example: hpsched lr-find train:train --output lr.html")
def lr_find(
    train: Annotated[str, typer.Argument(help="Your train(cycle), as module:function.")],
    num_iter: Annotated[int, option(help="Steps of a sweep.", min=10)] = 100,
    start_lr: Annotated[float, option(help="First rate.")] = 1e-6,
    end_lr: Annotated[float, option(help="Last rate.")] = 10.0,
    mode: Annotated[str, option(help="exp or linear.")] = "exp",
    replicates: Annotated[
        int,
        option(
            help="Sweeps, each with its own seed and weight decay; with --weight-decays, of each.",
            min=1,
        ),
    ] = 3,
    weight_decays: Annotated[
        str | None, option(help="Sweep with each of these, e.g. 1e-3,1e-4,1e-5.")
    ] = None,
    validate_every: Annotated[
        int | None,
        option(help="Every so many steps, call what train gave to cycle.validate.", min=1),
    ] = None,
    no_stop: Annotated[
        bool, option("--no-stop", help="Sweep on after the loss has diverged, while it is finite.")
    ] = False,
    total_steps: Annotated[
        int | None, option(help="Steps of the training that max_lr is for.", min=1)
    ] = None,
    seed: Annotated[int, option(help="Seeds of the sweeps follow from it.")] = 0,
    output: Annotated[
        Path | None,
        option(
            "--output",
            "-o",
            help="Write the figure (.html, .png, .svg or .pdf) or the raw curves (.json).",
        ),
    ] = None,
    format: Format = "table",
) -> None:
    """Find max_lr by learning-rate range tests alone; about 100 training steps each."""
    from hpsched import objective as objectives
    from hpsched import proposal
    from hpsched.figure_files import FIGURES, check_path
    from hpsched.weight_decay import RangeTests

    check_format(format)  # before the work rather than after it
    if output is not None:
        check_path(output, (*FIGURES, ".json"))
    decays = _numbers("--weight-decays", weight_decays)
    function = objectives.load(train)
    options = {
        "num_iter": num_iter, "start_lr": start_lr, "end_lr": end_lr, "mode": mode,
        "replicates": replicates, "weight_decays": decays,
        "validate_every": validate_every, "stop_diverged": not no_stop, "seed": seed,
    }  # fmt: skip
    tests = _sweep(train, function, options)
    several = len(decays or ()) > 1
    chosen = RangeTests(tests=tuple(tests), total_steps=total_steps) if several else None
    found = chosen.proposal if chosen else proposal.pool(tests, total_steps)
    data = _reading(tests, found, chosen, total_steps)
    show(data, format, lambda: _lr_table(data))
    if output is not None:
        _write_sweeps(output, tests, found, chosen, data)
        hint(f"Wrote {escape(str(output))}")
    for line in verdict(tests, found):
        hint(line)
    if validate_every and not any(test.validation for test in tests):
        hint("[yellow]No validation:[/] train never called cycle.validate(fn).")


def _numbers(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    once = len(set(values)) == len(values)
    if not values or not once or not all(0 <= value < math.inf for value in values):
        raise UsageError(
            f"{name} {text!r}: numbers of 0 or more with commas between them, each once, "
            "e.g. 1e-3,1e-4."
        )
    return values


def _sweep(train: str, function: Any, options: dict[str, Any]) -> list[RangeTest]:
    """Run the sweeps, drawing their progress."""
    from hpsched import cycle
    from hpsched import objective as objectives
    from hpsched.suggest import find_lr

    with progress_line(state.err) as draw:
        cycle.observer.set(lambda at: draw("", at))
        try:
            return find_lr(function, **options)
        except HpschedError:
            raise
        except Exception as error:
            # What an objective does to a Cycle that it takes for a trial.
            mistaken = isinstance(error, AttributeError | TypeError)
            name = " name your train(cycle), not the objective;" if mistaken else ""
            raise TrainingError(
                f"{train!r} failed: {objectives.describe(error)}. lr-find calls it with a Cycle:"
                f"{name} --debug shows the traceback."
            ) from error


def _reading(
    tests: list[RangeTest], found: Proposal, chosen: RangeTests | None, total_steps: int | None
) -> dict[str, Any]:
    """What the sweeps say, one by one and together."""
    return {
        "weight_decay": chosen.weight_decay if chosen else None,
        "weight_decay_reason": chosen.reason if chosen else None,
        "max_lr": found.centre if found.reliable else None,  # a script must not train at a guess
        "low": found.low,
        "high": found.high,
        "interval": list(found.interval),
        "lr_diverged": found.lr_diverged,
        "reliable": found.reliable,
        "reason": found.reason,
        "total_steps": total_steps,
        "replicates": [
            {
                **test.rules,
                "diverged": test.lr_diverged,
                "weight_decay": test.weight_decay,
                "seed": test.seed,
                "reliable": test.reliable,
                "reason": test.reason,
            }
            for test in tests
        ],
    }


#: Columns of the table: heading → key of a replicate.
_COLUMNS = {
    "weight decay": "weight_decay",
    "suggests": "suggestion",
    "steepest": "steepest",
    "minimum": "minimum",
    "minimum / 10": "minimum_tenth",
    "valley": "valley",
    "slide": "slide",
    "max stable": "max_stable",
    "diverged": "diverged",
}


def _lr_table(data: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=0, caption_justify="left")
    reasons = (data["reason"], data["weight_decay_reason"])
    table.caption = escape("\n".join(filter(None, reasons)))
    table.add_column("#")
    for heading in _COLUMNS:
        table.add_column(heading, justify="right")
    for index, row in enumerate(data["replicates"], 1):
        table.add_row(str(index), *(rate_text(row[key]) for key in _COLUMNS.values()))
    window = f"search {rate_text(data['low'])} … {rate_text(data['high'])}"
    decay = data["weight_decay"]
    with_decay = "" if decay is None else f"weight decay {rate_text(decay)}, "
    answer = f"max_lr {rate_text(data['max_lr'])}" if data["reliable"] else "not reliable"
    table.title = f"{with_decay}{answer}, {window}"
    if (steps := data["total_steps"]) is not None and data["reliable"]:
        table.title += f", for {steps:,} steps of training"
    return table


def _write_sweeps(
    output: Path,
    tests: list[RangeTest],
    found: Proposal,
    chosen: RangeTests | None,
    data: dict[str, Any],
) -> None:
    """Write the figure, or with ``.json`` the raw curves beside what they say."""
    from hpsched.figure_files import write_figure, write_file

    if output.suffix.lower() != ".json":
        from hpsched.range_test_figure import range_test_figure

        figure = chosen.figure() if chosen else range_test_figure(tests, found)
        return write_figure(figure, output)
    raw = [
        {**row, "lrs": test.lrs, "losses": test.losses, "validation": dict(test.validation)}
        for row, test in zip(data["replicates"], tests, strict=True)
    ]
    text = json.dumps(_without_nan({**data, "replicates": raw}), indent=1)
    return write_file(text.encode(), output)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict(tests: Sequence[RangeTest], found: Proposal) -> Iterator[str]:
    """Lines to be warned with, as Rich markup: all sweeps together, then what single ones lack."""
    if not found.reliable:
        yield f"[yellow]Not reliable:[/] {escape(found.reason)}"
    alone: dict[str, list[str]] = {}
    for index, test in enumerate(tests, 1):
        if not test.reliable and test.reason not in found.reason:
            alone.setdefault(test.reason, []).append(str(index))
    if alone and found.reliable:
        yield "Reliable together, but not every sweep alone:"
    for reason, sweeps in alone.items():
        yield f"  {'sweep' if len(sweeps) == 1 else 'sweeps'} {', '.join(sweeps)}: {escape(reason)}"
