"""The workers of this node, live: what each is doing, the ends of their logs, and the study."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpsched.cli.screen import heard, is_live, run_text
from hpsched.cli.sparkline import Seen, sparkline
from hpsched.fleet import Fleet, Slot, seconds_left
from hpsched.present import duration, number

STUDY_SECONDS = 15.0  # between two looks at the study
LINES = 5  # of the logs, newest last


@contextmanager
def node_screen(
    console: Console, fleet: Fleet, study_line: Callable[[], str]
) -> Iterator[Callable[[Slot, str], None]]:
    """Show the fleet on a terminal; elsewhere pass on what the workers log, each line by name.

    Args:
        console: Where to.
        fleet: About to be run.
        study_line: The study in one line; may take its time, and fail.

    Yields:
        What to call with each line of a worker's log.
    """
    if not is_live(console):
        yield lambda slot, line: typer.echo(f"[{slot.name}] {line}", file=console.file)
        return
    lines: deque[Text] = deque(maxlen=LINES)
    study = Text(style="bold")
    over = threading.Event()

    def look() -> None:
        while not over.wait(STUDY_SECONDS):
            try:
                study.plain = study_line()
            except Exception as error:  # most likely the database is away; the workers wait for it
                study.plain = f"no news of the study: {type(error).__name__}"

    seen = Seen()

    def draw() -> RenderableType:
        plain = console.options.ascii_only
        return Group(node_table(fleet.slots, console.width, seen, plain), *lines, study)

    def tell(slot: Slot, line: str) -> None:
        lines.append(Text(f"{slot.name}  {line}", style="dim", no_wrap=True, overflow="ellipsis"))

    threading.Thread(target=look, name="hpsched-study-line", daemon=True).start()
    with Live(get_renderable=draw, console=console, transient=True):
        try:
            yield tell
        finally:
            over.set()


#: Column → from which width of the terminal on it is shown.
_COLUMNS = {
    "device": 0, "pid": 130, "state": 56, "trial": 0, "run": 0, "step": 48, "": 120,
    "rate": 70, "loss": 84, "curve": 110, "ETA": 0, "done": 40, "failed": 96, "restarts": 140,
    "heard": 100,
}  # fmt: skip
_LEFT = ("device", "state", "run", "", "curve")
CURVE = 12  # letters of a loss curve


def node_table(
    slots: Sequence[Slot], width: int, seen: Seen | None = None, plain: bool = False
) -> Table:
    """One row for each worker, in so many columns of a terminal.

    Args:
        slots: The workers.
        width: Of the terminal.
        seen: Earlier looks at them, for the curves of their losses; this one is added.
        plain: ASCII only.
    """
    seen = seen or Seen()
    shown = [name for name, least in _COLUMNS.items() if width >= least]
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for name in shown:
        table.add_column(name, no_wrap=True, justify="left" if name in _LEFT else "right")
    for slot in slots:
        if slot.record is not None:
            seen.look(slot.name, slot.record)
        cells = _cells(slot, sparkline(seen.losses(slot.name), CURVE, plain))
        table.add_row(*[cells.get(name, "") for name in shown])
    return table


def _cells(slot: Slot, curve: str) -> dict[str, RenderableType]:
    """Column → what it says of this worker."""
    at = slot.record
    cells: dict[str, RenderableType] = {
        "device": Text(slot.name),
        "state": Text(slot.state),
        "done": str(slot.done + (at.done if at else 0)),
        "failed": str(slot.failed + (at.failed if at else 0)),
        "restarts": str(max(0, slot.starts - 1)),
    }
    if slot.process is not None:
        cells["pid"] = str(slot.process.pid)
    if at is None:
        return cells
    cells["heard"] = heard(time.time() - at.seen)
    if at.trial is None:
        return cells
    cells["trial"] = str(at.trial)
    if at.kind is None:
        return cells
    return cells | {
        "run": run_text(at),
        "step": f"{at.step}/{at.total_steps}",
        "": ProgressBar(total=at.total_steps, completed=at.step or 0, width=12),
        "rate": number(at.lr),
        "loss": number(at.loss),
        "curve": curve,
        "ETA": duration(seconds_left(slot.first, at)),
    }
