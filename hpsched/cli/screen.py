"""Summaries and recipes as Rich renderables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpsched.cli.sparkline import Seen, sparkline, steps_line
from hpsched.ledger import Best, Cost, best_so_far
from hpsched.present import counted, duration, mean_and_spread, number, rate_text
from hpsched.records import FIELDS, WorkerRecord
from hpsched.summary import Summary

if TYPE_CHECKING:
    from hpsched.coordinates import Coordinates
    from hpsched.cycle import Progress as CycleProgress


#: Column of the workers' table → from which width of the terminal on it is shown.
_WORKERS = {
    "worker": 70, "device": 0, "at work on": 0, "rate": 110, "loss": 60, "curve": 100,
    "left": 85, "heard": 0, "done": 75,
}  # fmt: skip
CURVE = 12  # letters of a worker's loss curve
NARROW = 60  # columns below which words make room


class StatusScreen:
    """The study at a glance, in as many columns as there are.

    Args:
        summary: The study.
        now: Unix time by the database's clock, for the age of heartbeats; None: this machine's.
        seen: Earlier looks at the workers, for the curves of their runs.
        orders: Worker id → what it was told.
    """

    def __init__(
        self,
        summary: Summary,
        now: float | None = None,
        seen: Seen | None = None,
        orders: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._summary = summary
        self._now = time.time() if now is None else now
        self._seen = seen or Seen()
        self._orders = orders

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """For Rich."""
        summary, width, plain = self._summary, options.max_width, options.ascii_only
        yield _title(summary)
        if summary.progress is not None:
            yield _progress(summary, width)
        yield _facts(summary, width, plain)
        if summary.rungs:
            yield _rungs(summary, width, plain)
        if summary.live:
            yield _workers(summary, self._now, self._seen, self._orders, width, plain)
        yield from (Text(f"· {text}") for text in summary.findings)
        for text in summary.warnings:
            yield Text.assemble(("! ", "yellow"), text)
        if summary.next_command:
            yield Text.assemble("\nNext: ", (summary.next_command, "bold cyan"))


def status_screen(
    summary: Summary,
    now: float | None = None,
    seen: Seen | None = None,
    orders: Mapping[str, str] = MappingProxyType({}),
) -> RenderableType:
    """The study at a glance; see :class:`StatusScreen`."""
    return StatusScreen(summary, now, seen, orders)


def status_line(summary: Summary) -> str:
    """The study in a line, for logs: budget, trials, best, workers, time left."""
    parts = [f"{100 * summary.progress:.0f} %"] if summary.progress is not None else []
    parts.append(counted(sum(summary.states.values()), "trial"))
    if again := summary.confirmations:
        parts.append(counted(again, "confirmation"))
    parts.append(f"{number(summary.cost.cycles)} full cycles spent")
    parts.append(f"best {value_text(summary.best)}" if summary.best else "no full cycle yet")
    parts.append(counted(len(summary.live), "worker"))
    if summary.eta:
        parts.append(f"about {duration(summary.eta)} left")
    return ", ".join(parts)


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
    table.add_row("from", f"trial {best.number}" + (f"; {escape(best.hint)}" if best.hint else ""))
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


# -- parts of the status ---------------------------------------------------------------------------


def _title(summary: Summary) -> Text:
    budget = ""
    if summary.settings:
        s = summary.settings
        limit = (
            f"{number(s.cycles)} full cycles" if s.cycles is not None
            else counted(s.trials, "trial") if s.trials is not None
            else duration(s.timeout)
        )  # fmt: skip
        budget = f"   budget {limit}, {summary.direction}, seed {s.seed}"
    return Text.assemble((summary.name, "bold"), budget)


def _progress(summary: Summary, width: int) -> RenderableType:
    share = summary.progress or 0.0
    left = f"about {duration(summary.eta)} left" if summary.eta else ""
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=1.0, completed=share, width=max(8, min(40, width - 30)))
    grid.add_row(bar, f"{100 * share:.0f} %", left)
    return grid


def _facts(summary: Summary, width: int, plain: bool) -> RenderableType:
    grid = Table.grid(padding=(0, 2 if width >= NARROW else 1))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    said = {"complete": "completed", "fail": "failed"}
    states = ", ".join(f"{n} {said.get(s, s)}" for s, n in sorted(summary.states.items()))
    diverged = sum(run.diverged is not None for run in summary.runs)
    extra = f" ({diverged} diverged)" if diverged else ""
    again = summary.confirmations
    extra += f", {counted(again, 'confirmation')}" if again else ""
    grid.add_row("trials", (states or "none yet") + extra)
    grid.add_row("best", value_text(summary.best) if summary.best else "no full cycle finished yet")
    if curve := _best_so_far(summary, min(40, width - 28), plain):
        grid.add_row("so far", curve)
    grid.add_row("spent", _cost(summary.cost) + _parts(summary))
    if summary.saved_cycles:
        grid.add_row("saved", f"{number(summary.saved_cycles)} full cycles by pruning")
    for context, window in summary.windows.items():
        name = f"{context}: " if context else ""
        grid.add_row("max_lr", Text(f"{name}{_window(window)}"))
    return grid


def _best_so_far(summary: Summary, width: int, plain: bool) -> Text | None:
    """The best single run over what was spent, as a curve between its first and last value."""
    points = best_so_far(summary.runs, summary.direction == "minimize")
    if len(points) < 2:
        return None
    line = steps_line(points, summary.cost.cycles, width, plain)
    first, last = number(points[0][1]), number(points[-1][1])
    return Text.assemble(f"{first} ", (line, "cyan"), f" {last}")


def _window(where: Coordinates) -> str:
    """What the range tests and the complete cycles say of max_lr, and where it is searched."""
    found, centre = where.evidence, f"centre {rate_text(where.centre)}"
    searched = _rates(where.window)
    if found is None or (found.prior.reliable and found.proposal == found.prior):
        return f"{searched}, {centre}"
    tested, refined = (_rates((shown.low, shown.high)) for shown in (found.prior, found.proposal))
    tests = f"range tests {f'say {tested}' if found.prior.reliable else 'have no clear answer'}"
    if found.proposal == found.prior:
        return f"{tests}; searched is {searched}, {centre}"
    by = "complete cycles" if found.runs else "cycles of other contexts"
    said = f"{tests}, {by} {refined}, {centre}"
    return said if searched == refined else f"{said}; searched is {searched}"


def _rates(window: tuple[float, float]) -> str:
    return " … ".join(map(rate_text, window))


def _cost(cost: Cost) -> str:
    steps = f"{cost.steps:,} steps"
    return f"{number(cost.cycles)} full cycles ({steps}, {duration(cost.seconds)} of training)"


def _parts(summary: Summary) -> str:
    sweeps, again = summary.range_test_cost.cycles, summary.confirm_cost.cycles
    return f"; range tests {number(sweeps)}, confirmations {number(again)}"


def _rungs(summary: Summary, width: int, plain: bool) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("rung", "steps", "reached", "pruned" if width < NARROW else "pruned after it"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    most = max(rung.reached for rung in summary.rungs)
    room = min(30, width - 46)
    for rung in summary.rungs:
        bar = _bar(rung.reached, rung.pruned, most, room, plain)
        table.add_row(str(rung.rung), f"{rung.steps:,}", str(rung.reached), str(rung.pruned), bar)
    return table


def _bar(reached: int, pruned: int, most: int, width: int, plain: bool) -> Text:
    """A bar of those that reached a rung; the part that was pruned after it is faint."""
    if width < 5:
        return Text("")
    whole = round(width * reached / most) or 1
    faint = round(whole * pruned / max(reached, 1))
    strong, weak = ("#", ".") if plain else ("█", "░")
    return Text.assemble((strong * (whole - faint), "cyan"), (weak * faint, "dim"))


def _workers(
    summary: Summary, now: float, seen: Seen, orders: Mapping[str, str], width: int, plain: bool
) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    shown = [name for name, least in _WORKERS.items() if width >= least]
    for name in shown:
        free = name == "at work on"
        most = width // 4 if name in ("worker", "device") else None
        how = "fold" if free else "ellipsis"
        table.add_column(name, no_wrap=not free, overflow=how, max_width=most)  # type: ignore[arg-type]
    for key, worker in summary.live.items():
        cells = {
            "worker": f"{worker.host}:{worker.pid}",
            "device": worker.device,
            "at work on": doing(worker, orders.get(key)),
            "rate": number(worker.lr),
            "loss": number(worker.loss),
            "curve": sparkline(seen.losses(key), CURVE, plain),
            "left": duration(seen.left(key)),
            "heard": heard(now - worker.seen),
            "done": str(worker.done),
        }
        table.add_row(*(Text(cells[name]) for name in shown))
    return table


def heard(seconds: float) -> str:
    """How long ago a worker gave a sign of life, in its largest unit."""
    return f"{' '.join(duration(max(0.0, round(seconds))).split()[:2])} ago"


def doing(worker: WorkerRecord, order: str | None = None) -> str:
    """What a worker does: ``trial 12, rung 1, step 40/300``, or its state; and what it will do.

    Args:
        worker: As it was last heard of.
        order: What it was told since (see :mod:`hpsched.orders`).
    """
    then = _then(worker, order)
    if worker.trial is None:
        return f"{worker.state}{then}"
    if worker.kind is None:
        return f"trial {worker.trial}, {worker.state}{then}"
    step = f"step {worker.step}/{worker.total_steps}"
    return f"trial {worker.trial}, {run_text(worker)}, {step}{then}"


def _then(worker: WorkerRecord, order: str | None) -> str:
    if order is None or worker.state == "stopped" or (worker.state, order) == ("paused", "pause"):
        return ""
    if worker.trial is None or order == "stop":
        return f", told to {order}"
    return f", {order}s after it"


def run_text(at: CycleProgress | WorkerRecord) -> str:
    """The run in hand: ``range test``, ``rung 1``, ``confirm``."""
    what = (at.kind or "").replace("_", " ")
    return what + (f" {at.rung}" if at.kind == "rung" else "")


@contextmanager
def progress_line(
    console: Console,
) -> Iterator[Callable[[str, CycleProgress | WorkerRecord], None]]:
    """A line that shows the run in hand; on a terminal only, elsewhere the log has to do."""
    if not is_live(console):
        yield lambda _label, _at: None
        return
    line = RunLine()
    with Live(line, console=console, transient=True):
        yield line.show


def is_live(console: Console) -> bool:
    """Whether a screen can be drawn over and over: on a terminal that can move its cursor."""
    return console.is_terminal and not console.is_dumb_terminal


class RunLine:
    """The run in hand in one line of the terminal, however narrow: what, how far, loss, time left.

    Call :meth:`show` with each news of it.
    """

    def __init__(self) -> None:
        self._label = ""
        self._at: CycleProgress | WorkerRecord | None = None
        self._losses: list[float] = []
        self._first: tuple[float, int] = (0.0, 0)

    def show(self, label: str, at: CycleProgress | WorkerRecord) -> None:
        """Take in where the run is; a worker between two runs shows the last one."""
        if at.kind is None:
            return
        before = self._at
        if before is None or (label, at.kind, at.rung) != (self._label, before.kind, before.rung):
            self._losses, self._first = [], (time.monotonic(), at.step or 0)
        self._label, self._at = label, at
        if at.loss is not None and (before is None or before.step != at.step):
            self._losses.append(at.loss)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """For Rich."""
        at = self._at
        if at is None:
            return
        width, plain = options.max_width, options.ascii_only
        grid = Table.grid(padding=(0, 1))
        for _ in range(3):
            grid.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=at.total_steps, completed=at.step or 0, width=min(20, width // 5))
        curve = sparkline(self._losses, min(20, width - 90), plain)
        grid.add_row(Text(f"{self._label}{run_text(at)}"), bar, Text(self._detail(at, curve)))
        yield grid

    def _detail(self, at: CycleProgress | WorkerRecord, curve: str) -> str:
        parts = [f"{at.step}/{at.total_steps} steps", f"rate {number(at.lr)}"]
        parts += [f"loss {number(at.loss)} {curve}".rstrip()] if at.loss is not None else []
        began, first = self._first
        taken, step, total = time.monotonic() - began, at.step or 0, at.total_steps or 0
        if taken > 1 and step > first:
            parts.append(f"{duration(round((total - step) * taken / (step - first)))} left")
        return ", ".join(parts)
