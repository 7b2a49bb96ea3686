"""``hpsched worker …``"""

from __future__ import annotations

import signal
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn

from hpsched.cli.app import Name, Storage, app, hint, state
from hpsched.cli.studies import one_line
from hpsched.present import number

if TYPE_CHECKING:
    from hpsched.cycle import Progress as CycleProgress

worker_app = typer.Typer(no_args_is_help=True, help="Work on studies.")
app.add_typer(worker_app, name="worker")


@worker_app.callback()
def _group() -> None:
    """Keep ``worker attach`` a subcommand although it is the only one."""


@worker_app.command(epilog="Example: CUDA_VISIBLE_DEVICES=0 hpsched worker attach resnet")
def attach(name: Name, storage: Storage = None) -> None:
    """Work on a study until its budget, shared by all workers, is spent.

    Start one per GPU, on as many nodes as you like; each sees the study's objective in its own
    working directory. Ctrl-C or SIGTERM puts the trial in hand back in the queue.
    """
    from hpsched.study import open_study
    from hpsched.summary import summarise
    from hpsched.worker import Worker

    study = open_study(name, storage, heartbeat=True)
    screen = _screen() if state.err.is_terminal else None
    with screen or nullcontext():
        worker = Worker(study, on_progress=_drawer(screen) if screen else None)
        ended = worker.run()
    counts = {
        "completed": ended.done,
        "pruned": ended.pruned,
        "confirmed": ended.confirmed,
        "failed": ended.failed,
    }
    typer.echo(", ".join(f"{count} {what}" for what, count in counts.items()))
    summary = summarise(study)
    hint(f"{name}: {one_line(summary)}")
    if ended.interrupted:
        hint(
            f"Interrupted; nothing is lost. Go on with: [bold cyan]hpsched worker attach {name}[/]"
        )
        raise typer.Exit(128 + signal.SIGINT)
    hint(f"Next: [bold cyan]{summary.next_command}[/]")


def _screen() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        TextColumn("{task.fields[detail]}"),
        console=state.err,
        transient=True,
    )


def _drawer(screen: Progress) -> Any:
    task = screen.add_task("starting", total=None, visible=False, detail="")

    def draw(trial: int, at: CycleProgress) -> None:
        what = at.kind.replace("_", " ") + (f" {at.rung}" if at.kind == "rung" else "")
        loss = f", loss {number(at.loss)}" if at.loss is not None else ""
        screen.update(
            task,
            description=f"trial {trial}: {what}",
            total=at.total_steps,
            completed=at.step,
            detail=f"rate {number(at.lr)}{loss}",
            visible=True,
        )

    return draw
