"""``hpsched worker …``"""

from __future__ import annotations

import shlex

import typer
from rich.markup import escape

from hpsched.cli.app import Name, Storage, app, command_text, hint, state
from hpsched.cli.screen import progress_line
from hpsched.cli.studies import one_line

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
    with progress_line(state.err) as draw:
        worker = Worker(study, on_progress=lambda trial, at: draw(f"trial {trial}: ", at))
        ended = worker.run()
    counts = {
        "completed": ended.done,
        "pruned": ended.pruned,
        "confirmed": ended.confirmed,
        "failed": ended.failed,
    }
    typer.echo(", ".join(f"{count} {what}" for what, count in counts.items()))
    summary = summarise(study)
    hint(escape(f"{name}: {one_line(summary)}"))
    if ended.signal is not None:
        again = command_text(f"hpsched worker attach {shlex.quote(name)}", storage)
        hint(f"Interrupted; nothing is lost. Go on with: {again}")
        raise typer.Exit(128 + ended.signal)
    hint(f"Next: {command_text(summary.next_command, storage)}")
