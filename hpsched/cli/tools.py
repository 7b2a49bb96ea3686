"""``hpsched lr-find``, ``schedule``, ``dashboard`` and ``doctor``."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from hpsched.cli.app import Format, Storage, app, hint, option, show, state
from hpsched.cli.screen import progress_line
from hpsched.errors import HpschedError, TrainingError, UsageError
from hpsched.present import number


@app.command("lr-find", epilog="Example: hpsched lr-find train:train --output lr.html")
def lr_find(
    train: Annotated[str, typer.Argument(help="Your train(cycle), as module:function.")],
    num_iter: Annotated[int, option(help="Steps of a sweep.", min=10)] = 100,
    start_lr: Annotated[float, option(help="First rate.")] = 1e-6,
    end_lr: Annotated[float, option(help="Last rate.")] = 10.0,
    mode: Annotated[str, option(help="exp or linear.")] = "exp",
    replicates: Annotated[int, option(help="Sweeps, each with its own seed and weight decay.")] = 3,
    seed: Annotated[int, option(help="Seeds of the sweeps follow from it.")] = 0,
    output: Annotated[
        Path | None, option("--output", "-o", help="Write the figure as an HTML page.")
    ] = None,
    format: Format = "table",
) -> None:
    """Find max_lr by learning-rate range tests alone; about 100 training steps each."""
    from hpsched import cycle, lr_curve
    from hpsched import objective as objectives
    from hpsched.suggest import find_lr

    function = objectives.load(train)
    _check_output(output)
    options = {
        "num_iter": num_iter, "start_lr": start_lr, "end_lr": end_lr, "mode": mode,
        "replicates": replicates, "seed": seed,
    }  # fmt: skip
    with progress_line(state.err) as draw:
        cycle.observer.set(lambda at: draw("", at))
        try:
            tests = find_lr(function, **options)  # type: ignore[arg-type]
        except HpschedError:
            raise
        except Exception as error:
            raise TrainingError(
                f"{train!r} failed: {objectives.describe(error)}. lr-find calls it with a Cycle: "
                "name your train(cycle), not the objective; --debug shows the traceback."
            ) from error
    found = lr_curve.pool(tests)
    data = {
        "max_lr": found.centre,
        "low": found.low,
        "high": found.high,
        "lr_diverged": found.lr_diverged,
        "reliable": found.reliable,
        "reason": found.reason,
        "replicates": [
            {
                "suggestion": test.suggestion,
                "steepest": test.lr_steepest,
                "minimum": test.lr_minimum,
                "diverged": test.lr_diverged,
                "weight_decay": test.weight_decay,
                "seed": test.seed,
                "reason": test.reason,
            }
            for test in tests
        ],
    }
    show(data, format, lambda: _lr_table(data))
    if output is not None:
        from hpsched.range_test_figure import range_test_figure

        _write_figure(range_test_figure(tests, found), output)
        hint(f"Wrote {escape(str(output))}")
    for reason in dict.fromkeys(test.reason for test in tests if not test.reliable):
        hint(f"[yellow]Not reliable:[/] {escape(reason)}")


def _lr_table(data: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, caption=escape(data["reason"]))
    columns = ("suggestion", "steepest", "minimum", "diverged", "weight_decay", "seed")
    table.add_column("")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for index, row in enumerate(data["replicates"]):
        values = [number(row[name]) for name in columns[:-1]]
        table.add_row(f"sweep {index + 1}", *values, str(row["seed"]))
    window = f"{number(data['low'])} … {number(data['high'])}"
    table.title = f"max_lr {number(data['max_lr'])}, search {window}"
    return table


schedule_app = typer.Typer(no_args_is_help=True, help="The schedules hpsched knows.")
app.add_typer(schedule_app, name="schedule")


@schedule_app.command("list", epilog="Example: hpsched schedule list")
def schedule_list(format: Format = "table") -> None:
    """List the schedules, each with what it does."""
    from hpsched.schedules import GALLERY

    rows = [{"name": name, "what": what} for name, (what, _) in GALLERY.items()]

    def table() -> Table:
        made = Table("name", "what", box=box.SIMPLE, pad_edge=False)
        for row in rows:
            made.add_row(row["name"], row["what"])
        return made

    show(rows, format, table)


@schedule_app.command("plot", epilog="Example: hpsched schedule plot one_cycle cosine -o s.html")
def schedule_plot(
    names: Annotated[
        list[str] | None, typer.Argument(help="Schedules to draw; all when none is named.")
    ] = None,
    total_steps: Annotated[int, option(help="Steps to draw.", min=3)] = 1000,
    max_lr: Annotated[float, option(help="Peak rate.")] = 1.0,
    output: Annotated[Path, option("--output", "-o", help="HTML page to write.")] = Path(
        "schedules.html"
    ),
) -> None:
    """Draw schedules over their steps."""
    from hpsched.schedule_figures import schedule_gallery
    from hpsched.schedules import GALLERY

    unknown = [name for name in names or () if name not in GALLERY]
    if unknown:
        raise UsageError(
            f"No schedule named {', '.join(unknown)}; there are: {', '.join(GALLERY)}."
        )
    figure = schedule_gallery(names or list(GALLERY), total_steps=total_steps, max_lr=max_lr)
    _write_figure(figure, output)
    typer.echo(output)


def _check_output(output: Path | None) -> None:
    """Refuse a path that cannot be written before the work rather than after it."""
    if output is None:
        return
    if output.is_dir():
        raise UsageError(f"Cannot write {output}: it is a folder. Name a file in it.")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"Cannot write {output}: its folder does not exist. Create it first.")


def _write_figure(figure: Any, output: Path) -> None:
    try:
        figure.write_html(output, include_plotlyjs=True)
    except OSError as error:
        raise UsageError(f"Cannot write {output}: {error.strerror}. Choose another -o.") from None


@app.command(epilog="Example: hpsched dashboard --port 8080")
def dashboard(
    storage: Storage = None,
    host: Annotated[str, option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option(help="Port to listen on.", min=1, max=65_535)] = 8080,
) -> None:
    """Start the Optuna Dashboard on a storage, on this machine only unless told otherwise.

    It has no log-in: whoever reaches the port can delete studies.
    """
    from hpsched.storage import open_storage

    try:
        import optuna_dashboard
    except ImportError:
        raise UsageError(
            "The Optuna Dashboard is not installed: pip install 'hpsched[dashboard]'."
        ) from None
    held = open_storage(storage)
    hint(f"Optuna Dashboard on http://{host}:{port} (Ctrl-C ends it)")
    failed: list[OSError] = []

    def serve() -> None:
        try:
            optuna_dashboard.run_server(held, host=host, port=port)
        except OSError as error:
            failed.append(error)

    # In a thread: the server swallows a Ctrl-C that comes while it answers a request.
    server = threading.Thread(target=serve, daemon=True)
    server.start()
    server.join()
    if failed:
        error = failed[0]
        raise UsageError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another --port or --host."
        ) from None


@app.command(epilog="Example: hpsched doctor --study resnet")
def doctor(
    storage: Storage = None,
    study: Annotated[
        str | None, option(help="Check this study too: settings, records, objective.")
    ] = None,
    objective: Annotated[
        str | None, option("--objective", "-o", help="Check this module:function.")
    ] = None,
    format: Format = "table",
) -> None:
    """Check versions, devices, storage, schema and objective; say how to mend what is wrong."""
    from hpsched.doctor import examine

    findings = examine(storage, study=study, objective=objective)

    def table() -> Table:
        made = Table(box=box.SIMPLE, pad_edge=False, show_header=False)
        for finding in findings:
            mark = "[green]ok[/]" if finding.ok else "[bold red]wrong[/]"
            made.add_row(mark, escape(finding.what), escape(finding.detail))
        return made

    show([finding.__dict__ for finding in findings], format, table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)
