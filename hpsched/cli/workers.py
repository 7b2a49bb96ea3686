"""``hpsched worker …``"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import optuna
import typer
from optuna.study import Study
from rich.markup import escape
from sqlalchemy.exc import SQLAlchemyError

from hpsched.cli.app import Name, Storage, app, command_text, hint, option, state
from hpsched.cli.fleet_screen import node_screen
from hpsched.cli.screen import progress_line
from hpsched.cli.studies import one_line, parse_duration
from hpsched.errors import StorageError, UsageError
from hpsched.present import counted

if TYPE_CHECKING:
    from hpsched.devices import Device
    from hpsched.records import WorkerRecord

worker_app = typer.Typer(no_args_is_help=True, help="Work on studies.")
app.add_typer(worker_app, name="worker")


@worker_app.command(epilog="Example: hpsched worker attach resnet")
def attach(
    name: Name,
    storage: Storage = None,
    devices: Annotated[
        str | None,
        option(
            help="all, cuda, cpu, or a list such as cuda:0,cuda:2. Default: all GPUs that "
            "CUDA_VISIBLE_DEVICES leaves, MIG devices included, or the CPU.",
            show_default=False,
        ),
    ] = None,
    per_device: Annotated[int, option(help="Workers that share a device.", min=1)] = 1,
    logs: Annotated[
        Path | None,
        option(
            help="Folder for the logs of several workers. Default: hpsched-logs/NAME/HOST.",
            show_default=False,
        ),
    ] = None,
    grace: Annotated[
        str | None,
        option(
            help="How long a trial may go on to its next checkpoint after a signal, e.g. 90s. "
            "Default: not at all.",
            show_default=False,
        ),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        option(
            envvar="HPSCHED_CHECKPOINTS",
            help="Folder, on a disk that all nodes share, from which interrupted cycles go on "
            "(cycle.checkpoint, cycle.restore). Default: none.",
            show_default=False,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        option(
            metavar="ADDRESS",
            help="Work on a Ray cluster instead: auto, HOST:PORT or local.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[int, option(help="With --ray: how many.", min=1)] = 1,
    gpus_per_worker: Annotated[
        float, option(help="With --ray: GPUs for each; 0.5 shares one, 0 takes none.", min=0.0)
    ] = 1.0,
) -> None:
    """Work on a study until its budget, shared by all workers, is spent.

    Starts a worker on each GPU of this node (a process each, started again after a crash, with a
    log of its own), on as many nodes as you like; each sees the study's objective in its own
    working directory. Ctrl-C or SIGTERM puts the trials in hand back in the queue.

    Two workers on each of two GPUs: --devices cuda:0,cuda:2 --per-device 2

    Workers that train on two GPUs each: --devices cuda:0+cuda:1,cuda:2+cuda:3

    Four workers without a GPU: --devices cpu --per-device 4

    On a Ray cluster: --ray auto --workers 16 --gpus-per-worker 1
    """
    from hpsched import devices as found
    from hpsched.fleet import DEVICE

    seconds = _grace(grace)
    if checkpoints is not None:  # also for those that are started from here
        os.environ["HPSCHED_CHECKPOINTS"] = str(checkpoints.absolute())
    if DEVICE in os.environ:  # whoever started this worker has given it its device
        _work_here(name, storage, os.environ[DEVICE], seconds)
    elif ray is not None:
        if devices is not None or per_device != 1:
            raise UsageError(
                f"--ray {ray!r} places the workers itself: use --workers and --gpus-per-worker "
                "instead of --devices and --per-device."
            )
        _work_on_ray(name, storage, ray, workers, gpus_per_worker, seconds)
    else:
        chosen = found.parse_devices("all" if devices is None else devices, found.available())
        if devices is None and len(chosen) * per_device == 1:
            _work_here(name, storage, None, seconds)
        else:
            again = "" if devices is None else f" --devices {shlex.quote(devices)}"
            again += "" if per_device == 1 else f" --per-device {per_device}"
            _work_on_node(name, storage, chosen, per_device, logs, seconds, again)


def _work_here(name: str, storage: str | None, device: str | None, grace: float) -> None:
    """Be the worker."""
    from hpsched.fleet import supervised
    from hpsched.study import open_study
    from hpsched.worker import Worker

    tell = supervised(grace)
    try:
        study = open_study(name, storage, heartbeat=True)
    except StorageError as error:
        if tell:  # the supervisor could open it: it is away, and will be back
            error.exit_code = os.EX_TEMPFAIL
        raise
    with progress_line(state.err) as draw:

        def watch(record: WorkerRecord) -> None:
            draw(f"trial {record.trial}: ", record)

        ended = Worker(
            study, watch=tell or watch, device=device, grace=grace, ends_process=True
        ).run()
    counts = {
        "completed": ended.done,
        "pruned": ended.pruned,
        "confirmed": ended.confirmed,
        "failed": ended.failed,
    }
    _conclude(study, storage, counts, ended.signal, brief=tell is not None)


def _work_on_node(
    name: str,
    storage: str | None,
    devices: tuple[Device, ...],
    per_device: int,
    logs: Path | None,
    grace: float,
    again: str,
) -> None:
    """Have workers on these devices, and show them."""
    from hpsched.fleet import Fleet, logs_folder
    from hpsched.storage import resolve_url
    from hpsched.study import open_study
    from hpsched.summary import summarise

    study = open_study(name, storage)
    folder = logs or logs_folder(name)
    fleet = Fleet(name, resolve_url(storage), devices, per_device, logs=folder, grace=grace)
    workers = counted(len(fleet.slots), "worker")
    hint(escape(f"{workers} on {', '.join(map(str, devices))}; "
                f"logs in {folder}"))  # fmt: skip
    with node_screen(state.err, fleet, lambda: f"{name}: {one_line(summarise(study))}") as tell:
        code = fleet.run(tell)
    counts: Mapping[str, int] = {}
    try:
        counts = fleet.counts(study)
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError):
        if fleet.stop is None:
            raise
    _conclude(study, storage, counts, fleet.stop, again)
    raise typer.Exit(code)


def _work_on_ray(
    name: str,
    storage: str | None,
    address: str,
    workers: int,
    gpus_per_worker: float,
    grace: float,
) -> None:
    """Have Ray place the workers."""
    from hpsched.cluster import run_on_ray

    code = run_on_ray(
        name,
        storage,
        address=address,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        say=lambda text: hint(escape(text)),
        grace=grace,
    )
    raise typer.Exit(code)


def _conclude(
    study: Study,
    storage: str | None,
    counts: Mapping[str, int],
    ended_by: int | None,
    again: str = "",
    brief: bool = False,
) -> None:
    """Say what came of it, and (unless a supervisor does) what next; after signal n exit 128 + n.

    Args:
        study: The study.
        storage: As given.
        counts: Outcome → trials.
        ended_by: Number of the signal that ended the work, if one did.
        again: Options that the same work would take.
        brief: Leave out what is next.
    """
    from hpsched.summary import summarise

    if counts:
        typer.echo(", ".join(f"{count} {what}" for what, count in counts.items()))
    if not brief:
        name = study.study_name
        if ended_by is None:
            summary = summarise(study)
            if not any(counts.values()) and summary.progress == 1.0:
                hint("Nothing was left to do: the study's budget is spent.")
            hint(escape(f"{name}: {one_line(summary)}"))
            hint(f"Next: {command_text(summary.next_command, storage)}")
        else:  # in a hurry, and perhaps without a database
            command = command_text(f"hpsched worker attach {shlex.quote(name)}{again}", storage)
            hint(f"Interrupted; nothing is lost. Go on with: {command}")
    if ended_by is not None:
        raise typer.Exit(128 + ended_by)


def _grace(text: str | None) -> float:
    try:
        return parse_duration(text) or 0.0
    except UsageError:
        raise UsageError(f"--grace {text!r}: a duration such as 90s or 5m.") from None
