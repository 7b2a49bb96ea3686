"""Summaries and recipes as Rich renderables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpsched.ledger import Best, Cost
from hpsched.present import duration, mean_and_spread, number, rate_text
from hpsched.records import FIELDS, WorkerRecord
from hpsched.study import live_workers
from hpsched.summary import Summary

if TYPE_CHECKING:
    from hpsched.coordinates import Coordinates
    from hpsched.cycle import Progress as CycleProgress


def status_screen(summary: Summary) -> RenderableType:
    """The study at a glance."""
    parts: list[RenderableType] = [_title(summary)]
    if summary.progress is not None:
        parts.append(_progress(summary))
    parts += [_facts(summary), *_tables(summary)]
    parts += [Text(f"· {text}") for text in summary.findings]
    parts += [Text.from_markup(f"[yellow]![/] {escape(text)}") for text in summary.warnings]
    if summary.next_command:
        parts.append(Text.from_markup(f"\nNext: [bold cyan]{escape(summary.next_command)}[/]"))
    return Group(*parts)


def best_table(best: Best) -> RenderableType:
    """The recipe, how good it is, and how sure that is."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for field in (*FIELDS, "final_div_factor"):
        table.add_row(field, number(best.recipe[field], 4))
    table.add_row("policy", best.policy)
    for name, value in best.params.items():
        if name not in FIELDS and name not in best.recipe:
            table.add_row(escape(name), escape(str(value)))
    table.add_row("value", f"[green]{value_text(best)}[/]")
    if best.runner_up:
        table.add_row("runner-up", f"trial {best.runner_up.number}: {value_text(best.runner_up)}")
        table.add_row("difference", _difference(best))
    table.add_row("from", f"trial {best.number}" + (f"; {best.hint}" if best.hint else ""))
    return table


def value_text(found: object) -> str:
    """``mean ± spread over n seeds``."""
    from hpsched.ledger import Candidate

    assert isinstance(found, Candidate)
    kind = "fresh seeds" if found.fresh else "seed"
    if found.seeds == 1:
        return f"{mean_and_spread(found)} (one {'fresh ' if found.fresh else ''}seed)"
    return f"{mean_and_spread(found)} over {found.seeds} {kind}"


def _difference(best: Best) -> str:
    if best.significant is None:
        return "not known: too few seeds"
    return (
        "significant at 5 %" if best.significant else "[yellow]not significant[/]: either will do"
    )


def _title(summary: Summary) -> Text:
    budget = ""
    if summary.settings:
        s = summary.settings
        limit = (
            f"{number(s.cycles)} full cycles" if s.cycles is not None
            else f"{s.trials} trial{'s' * (s.trials != 1)}" if s.trials is not None
            else duration(s.timeout)
        )  # fmt: skip
        budget = f"   budget {limit}, {summary.direction}, seed {s.seed}"
    return Text.from_markup(f"[bold]{escape(summary.name)}[/]{budget}")


def _progress(summary: Summary) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_row(
        ProgressBar(total=1.0, completed=summary.progress or 0.0, width=40),
        f"{100 * (summary.progress or 0.0):.0f} %",
        f"about {duration(summary.eta)} left" if summary.eta else "",
    )
    return grid


def _facts(summary: Summary) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    said = {"complete": "completed", "fail": "failed"}
    states = ", ".join(f"{n} {said.get(s, s)}" for s, n in sorted(summary.states.items()))
    diverged = sum(run.diverged is not None for run in summary.runs)
    extra = f" ({diverged} diverged)" if diverged else ""
    again = summary.confirmations
    extra += f", {again} confirmation{'s' * (again != 1)}" if again else ""
    grid.add_row("trials", (states or "none yet") + extra)
    grid.add_row("best", value_text(summary.best) if summary.best else "no full cycle finished yet")
    grid.add_row("spent", _cost(summary.cost) + _parts(summary))
    if summary.saved_cycles:
        grid.add_row("saved", f"{number(summary.saved_cycles)} full cycles by pruning")
    for context, window in summary.windows.items():
        name = f"max_lr ({context})" if context else "max_lr"
        grid.add_row(escape(name), _window(window))
    return grid


def _window(where: Coordinates) -> str:
    """What the range tests and the complete cycles say of max_lr, and where it is searched."""
    found, centre = where.evidence, f"centre {rate_text(where.centre)}"
    if found is None or found.proposal == found.prior:
        return f"{_rates(where.window)}, {centre}"
    tested, refined = ((shown.low, shown.high) for shown in (found.prior, found.proposal))
    by = "complete cycles" if found.runs else "cycles of other contexts"
    tests = f"say {_rates(tested)}" if found.prior.reliable else "have no clear answer"
    said = f"range tests {tests}, {by} {_rates(refined)}, {centre}"
    moved = _rates(where.window) != _rates(refined)
    return f"{said}; searched is {_rates(where.window)}" if moved else said


def _rates(window: tuple[float, float]) -> str:
    return " … ".join(map(rate_text, window))


def _cost(cost: Cost) -> str:
    steps = f"{cost.steps:,} steps"
    return f"{number(cost.cycles)} full cycles ({steps}, {duration(cost.seconds)} of training)"


def _parts(summary: Summary) -> str:
    sweeps, again = summary.range_test_cost.cycles, summary.confirm_cost.cycles
    return f"; range tests {number(sweeps)}, confirmations {number(again)}"


def _tables(summary: Summary) -> Iterable[RenderableType]:
    if summary.rungs:
        table = Table(box=box.SIMPLE, pad_edge=False)
        for name in ("rung", "steps", "reached", "pruned after it"):
            table.add_column(name, justify="right")
        for rung in summary.rungs:
            table.add_row(str(rung.rung), f"{rung.steps:,}", str(rung.reached), str(rung.pruned))
        yield table
    live = live_workers(summary.workers, time.time())
    if live:
        table = Table(box=box.SIMPLE, pad_edge=False)
        for name in ("worker", "device", "at work on", "rate", "loss", "done"):
            table.add_column(name)
        for worker in live.values():
            table.add_row(*_worker_row(worker))
        yield table


def _worker_row(worker: WorkerRecord) -> list[str]:
    doing = worker.state
    if worker.trial is not None:
        doing = f"trial {worker.trial}"
        if worker.kind:
            what = worker.kind.replace("_", " ")
            what += f" {worker.rung}" if worker.kind == "rung" else ""
            doing += f", {what}, step {worker.step}/{worker.total_steps}"
    return [
        f"{escape(worker.host)}:{worker.pid}",
        escape(worker.device),
        doing,
        number(worker.lr),
        number(worker.loss),
        str(worker.done),
    ]


@contextmanager
def progress_line(console: Console) -> Iterator[Callable[[str, CycleProgress], None]]:
    """A line that shows the run in hand; on a terminal only, elsewhere the log has to do."""
    if not console.is_terminal:
        yield lambda _label, _at: None
        return
    screen = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        TextColumn("{task.fields[detail]}"),
        console=console,
        transient=True,
    )
    task = screen.add_task("", visible=False, detail="")

    def draw(label: str, at: CycleProgress) -> None:
        what = at.kind.replace("_", " ") + (f" {at.rung}" if at.kind == "rung" else "")
        loss = f", loss {number(at.loss)}" if at.loss is not None else ""
        screen.update(
            task,
            description=label + what,
            total=at.total_steps,
            completed=at.step,
            detail=f"rate {number(at.lr)}{loss}",
            visible=True,
        )

    with screen:
        yield draw
