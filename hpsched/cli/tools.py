"""``hpsched schedule`` and ``hpsched doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from hpsched.cli.app import Format, Storage, app, option, show
from hpsched.cli.completion import study_names
from hpsched.errors import UsageError

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
    output: Annotated[
        Path, option("--output", "-o", help="What to write: .html, .png, .svg or .pdf.")
    ] = Path("schedules.html"),
) -> None:
    """Draw schedules over their steps."""
    from hpsched.figure_files import check_path, write_figure
    from hpsched.schedule_figures import schedule_gallery
    from hpsched.schedules import GALLERY

    unknown = [name for name in names or () if name not in GALLERY]
    if unknown:
        raise UsageError(
            f"No schedule named {', '.join(unknown)}; there are: {', '.join(GALLERY)}."
        )
    check_path(output)
    figure = schedule_gallery(names or list(GALLERY), total_steps=total_steps, max_lr=max_lr)
    write_figure(figure, output)
    typer.echo(output)


@app.command(epilog="Example: hpsched doctor --study resnet")
def doctor(
    storage: Storage = None,
    study: Annotated[
        str | None,
        option(
            help="Check this study too: settings, records, objective.",
            autocompletion=study_names,
        ),
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
