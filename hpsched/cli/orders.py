"""``hpsched worker list|pause|resume|drain|stop``: see the workers, and tell them what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from hpsched.cli.app import Format, Name, Storage, hint, option, show
from hpsched.cli.screen import doing
from hpsched.cli.workers import worker_app
from hpsched.present import duration

Which = Annotated[
    list[str] | None,
    typer.Argument(
        help="Worker ids (or their beginnings), hosts or host:pid. Default: all.",
        show_default=False,
    ),
]


@worker_app.command("list", epilog="Example: hpsched worker list resnet")
def list_(
    name: Name,
    storage: Storage = None,
    every: Annotated[bool, option("--all", "-a", help="Also those that have ended.")] = False,
    format: Format = "table",
) -> None:
    """Who is at work on a study: host, device, last sign of life, what it runs and has done."""
    from hpsched.orders import given
    from hpsched.storage import clock
    from hpsched.study import live_workers, open_study, read_workers

    study = open_study(name, storage)
    now, attrs = clock(study._storage)(), study.user_attrs
    known, told = read_workers(attrs), given(attrs)
    live = live_workers(known, now)
    shown = live if not every else {
        id_: w if id_ in live or w.state == "stopped" else replace(w, state="lost", trial=None)
        for id_, w in known.items()
    }  # fmt: skip
    rows = [{"id": id_, **w.to_json(), "order": told.get(id_)} for id_, w in shown.items()]

    def table() -> Any:
        if not rows:
            return f"No worker is at work on {escape(name)}" + (
                f"; {len(known)} have ended: --all lists them." if known else "."
            )
        made = Table(box=box.SIMPLE, pad_edge=False)
        for column in ("worker", "process", "device", "state", "heard", "done", "failed"):
            made.add_column(column, justify="right" if column in ("done", "failed") else "left")
        for id_, worker in shown.items():
            made.add_row(
                id_.partition("-")[0],
                f"{escape(worker.host)}:{worker.pid}",
                escape(worker.device),
                doing(worker, told.get(id_)),
                f"{duration(max(0.0, now - worker.seen))} ago",
                str(worker.done),
                str(worker.failed),
            )
        return made

    show(rows, format, table)


@worker_app.command(epilog="Example: hpsched worker pause resnet gpu-node-3")
def pause(name: Name, workers: Which = None, storage: Storage = None) -> None:
    """Let workers finish the trial in hand and then wait, until told otherwise."""
    _give("pause", name, workers, storage)


@worker_app.command(epilog="Example: hpsched worker resume resnet")
def resume(name: Name, workers: Which = None, storage: Storage = None) -> None:
    """Let paused workers go on."""
    _give("resume", name, workers, storage)


@worker_app.command(epilog="Example: hpsched worker drain resnet gpu-node-3:4711")
def drain(name: Name, workers: Which = None, storage: Storage = None) -> None:
    """Let workers finish the trial in hand and end."""
    _give("drain", name, workers, storage)


@worker_app.command(epilog="Example: hpsched worker stop resnet")
def stop(name: Name, workers: Which = None, storage: Storage = None) -> None:
    """Let workers put the trial in hand back in the queue and end."""
    _give("stop", name, workers, storage)


def _give(order: str, name: str, workers: list[str] | None, storage: str | None) -> None:
    from hpsched.orders import give
    from hpsched.study import open_study

    told = give(open_study(name, storage), order, workers or ())
    for id_, worker in told.items():
        typer.echo(f"{id_} {worker.host}:{worker.pid} {order}")
    hint(f"{len(told)} told to {order}; they look every few seconds.")
