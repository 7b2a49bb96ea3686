"""``hpsched study …``"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import optuna
import typer
from rich import box
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from hpsched.cli.app import (
    Format,
    Name,
    Storage,
    app,
    command_text,
    hint,
    option,
    show,
    state,
    with_storage,
)
from hpsched.cli.screen import best_table, status_screen, value_text
from hpsched.errors import UsageError
from hpsched.present import number

if TYPE_CHECKING:
    from hpsched.summary import Summary

study_app = typer.Typer(no_args_is_help=True, help="Create, watch, judge and remove studies.")
app.add_typer(study_app, name="study")


def parse_duration(text: str | None) -> float | None:
    """``90``, ``45s``, ``30m``, ``8h``, ``2d`` → seconds.

    Raises:
        UsageError: Not a duration above 0.
    """
    if text is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    digits, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(digits) * units[unit]
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UsageError(f"--timeout {text!r}: a duration such as 90s, 30m, 8h or 2d.")
    return seconds


@study_app.command(epilog="Example: hpsched study create resnet -o train:objective --cycles 20")
def create(
    name: Name,
    objective: Annotated[
        str,
        option(
            "--objective",
            "-o",
            envvar="HPSCHED_OBJECTIVE",
            show_envvar=True,
            help="The objective, as module:function or file.py:function.",
        ),
    ],
    storage: Storage = None,
    direction: Annotated[str, option(help="minimize or maximize.")] = "minimize",
    trials: Annotated[int | None, option(help="Budget: search trials over all workers.")] = None,
    cycles: Annotated[
        float | None,
        option(help="Budget: full-cycle equivalents over all workers (default: 20)."),
    ] = None,
    timeout: Annotated[
        str | None, option(help="Budget: wall time from the first trial on, e.g. 8h.")
    ] = None,
    seed: Annotated[int | None, option(help="Default: drawn at random and stored.")] = None,
    sampler: Annotated[
        str,
        option(help="What draws recipes: hpsched's own model, or tpe, gp, qmc, cmaes or random."),
    ] = "hpsched",
    range_tests: Annotated[int, option(help="Range-test replicates per context.")] = 3,
    reduction_factor: Annotated[
        int | None,
        option(
            help="At each rung let the best 1 in this many climb (successive halving). "
            "Default: those that the model gives a fair chance."
        ),
    ] = None,
    confirm_top: Annotated[int, option(help="Recipes to confirm at the end.")] = 2,
    confirm_seeds: Annotated[int, option(help="Fresh seeds for each of them.")] = 3,
    skip_if_exists: Annotated[
        bool, option("--skip-if-exists", help="Accept an existing study, as it is.")
    ] = False,
    check: Annotated[
        bool, option("--check/--no-check", help="Import the objective once, to see that it works.")
    ] = True,
) -> None:
    """Create a study: what to run, and how much of it."""
    from hpsched import objective as objectives
    from hpsched.study import create_study

    if check:
        objectives.load_objective(objective)
    study = create_study(
        name,
        objective=objective,
        storage=storage,
        direction=direction,
        trials=trials,
        cycles=cycles,
        timeout=parse_duration(timeout),
        seed=seed,
        sampler=sampler,
        range_tests=range_tests,
        reduction_factor=reduction_factor,
        confirm_top=confirm_top,
        confirm_seeds=confirm_seeds,
        skip_if_exists=skip_if_exists,
    )
    typer.echo(study.study_name)
    if skip_if_exists:
        _note_kept(study, objective=objective, trials=trials, cycles=cycles)
    attach = command_text(f"hpsched worker attach {shlex.quote(name)}", storage)
    if plan := confirmation_plan(study):
        hint(plan)
    hint(f"Next, on every node that shall work: {attach}")


def _note_kept(study: optuna.Study, **wanted: Any) -> None:
    """An existing study keeps its settings: say so where they are not those asked for."""
    from hpsched.study import read_settings

    settings = read_settings(study)
    for key, value in wanted.items():
        kept = getattr(settings, key)
        if value is not None and value != kept:
            hint(f"[yellow]Note:[/] the study exists and keeps {key}={escape(str(kept))}.")


def confirmation_plan(study: optuna.Study) -> str:
    """What the budget leaves for confirmations, in words; empty when that is all one could want."""
    from hpsched.ledger import CONFIRM_SHARE, confirmations_planned
    from hpsched.study import read_settings

    settings = read_settings(study)
    if settings is None or not (wanted := settings.confirm_top * settings.confirm_seeds):
        return ""
    planned = confirmations_planned(settings)
    if planned >= wanted:
        return ""
    recipes = max(1, planned // settings.confirm_seeds)
    said = f"{recipes} recipe{'s' if recipes > 1 else ''} with fresh seeds, {planned} runs in all"
    return (
        f"[yellow]Note:[/] this budget confirms {said if planned else 'nothing'}; "
        f"--cycles {math.ceil(wanted / CONFIRM_SHARE)} would confirm {settings.confirm_top} x "
        f"{settings.confirm_seeds}."
    )


@study_app.command("list", epilog="Example: hpsched study list -f json")
def list_(storage: Storage = None, format: Format = "table") -> None:
    """List the studies in a storage."""
    from hpsched.records import SETTINGS
    from hpsched.storage import open_storage

    found = optuna.get_all_study_summaries(open_storage(storage), include_best_trial=False)
    rows = [
        {
            "name": s.study_name,
            "direction": s.directions[0].name.lower(),
            "trials": s.n_trials,
            "objective": s.user_attrs.get(SETTINGS, {}).get("objective"),
            "started": s.datetime_start.isoformat(timespec="seconds") if s.datetime_start else None,
        }
        for s in sorted(found, key=lambda s: s.study_name)
    ]

    def table() -> Any:
        if not rows:
            return "No studies yet: hpsched study create NAME --objective train:objective"
        made = Table(box=box.SIMPLE, pad_edge=False)
        for column in rows[0]:
            made.add_column(column, justify="right" if column == "trials" else "left")
        for row in rows:
            made.add_row(*("–" if v is None else escape(str(v)) for v in row.values()))
        return made

    show(rows, format, table)


@study_app.command(epilog="Example: hpsched study status resnet --watch")
def status(
    name: Name,
    storage: Storage = None,
    watch: Annotated[
        bool, option("--watch", "-w", help="Refresh until the study is done.")
    ] = False,
    interval: Annotated[float, option(help="Seconds between refreshes.", min=0.2)] = 2.0,
    format: Format = "table",
) -> None:
    """How a study stands: rungs, workers, best ± seed spread, cost, and what to do next."""
    from hpsched.study import open_study

    study = open_study(name, storage)
    if not watch:
        summary = _summary(study, storage)
        show(summary.to_json(), format, lambda: status_screen(summary))
        return
    if format != "table":
        raise UsageError("--watch draws a screen: leave --format out, or call it repeatedly.")
    # Logs and CI get one report after the other, as plain lines.
    live = Live(console=state.out, auto_refresh=False) if state.out.is_terminal else None
    with live or nullcontext():
        while True:
            summary = _summary(study, storage)
            if "--watch" in summary.next_command:  # the reader is doing it
                summary = replace(summary, next_command="")
            if live:
                live.update(status_screen(summary), refresh=True)
            else:
                state.out.print(status_screen(summary))
            if summary.progress == 1.0:
                return
            time.sleep(interval)


def _summary(study: optuna.Study, storage: str | None) -> Summary:
    from hpsched.summary import summarise

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the summary names what it could not read
        found = summarise(study)
    return replace(found, next_command=with_storage(found.next_command, storage))


@study_app.command(epilog="Example: hpsched study best resnet --format torch")
def best(
    name: Name,
    storage: Storage = None,
    format: Annotated[str, option("--format", "-f", help="table, torch, json or yaml.")] = "table",
) -> None:
    """The best recipe: its values, how good it is on fresh seeds, and code to paste."""
    from hpsched.ledger import best_json, optimizer_name, read_runs
    from hpsched.present import torch_snippet
    from hpsched.study import best as find_best
    from hpsched.study import open_study

    study = open_study(name, storage)
    found = find_best(study)
    if format not in ("table", "torch", "json", "yaml"):
        raise UsageError(f"--format {format!r}: table, torch, json or yaml.")
    if format == "torch":
        optimizer = optimizer_name(read_runs(study.get_trials(deepcopy=False)))
        typer.echo(torch_snippet(found, optimizer), nl=False)
    else:
        show(best_json(found), format, lambda: best_table(found))
    if found.hint:
        hint(f"[yellow]Note:[/] {escape(found.hint)}")


@study_app.command(epilog="Example: hpsched study report resnet -o report.html")
def report(
    name: Name,
    storage: Storage = None,
    output: Annotated[Path, option("--output", "-o", help="Where to write it.")] = Path(
        "report.html"
    ),
) -> None:
    """Write one self-contained HTML page: the answer, the evidence, the plots. Works offline."""
    from hpsched.report import write_report
    from hpsched.study import open_study
    from hpsched.summary import summarise

    typer.echo(write_report(summarise(open_study(name, storage)), output))


@study_app.command(epilog="Example: hpsched study confirm resnet --top 2 --seeds 3")
def confirm(
    name: Name,
    storage: Storage = None,
    top: Annotated[int, option(help="How many of the best recipes.")] = 2,
    seeds: Annotated[int, option(help="Fresh seeds for each.")] = 3,
) -> None:
    """Queue the best recipes again with fresh seeds; workers run them even on a spent budget."""
    from hpsched.study import confirm as confirm_study
    from hpsched.study import open_study

    queued = confirm_study(open_study(name, storage), top=top, seeds=seeds)
    typer.echo(queued)
    attach = command_text(f"hpsched worker attach {shlex.quote(name)}", storage)
    hint(f"{queued} full cycles queued. Next: {attach}")


@study_app.command(epilog="Example: hpsched study export resnet > resnet.json")
def export(
    name: Name,
    storage: Storage = None,
    output: Annotated[
        Path | None, option("--output", "-o", help="A file instead of stdout.")
    ] = None,
    format: Annotated[str, option("--format", "-f", help="json or csv.")] = "json",
) -> None:
    """Every trial with all records as JSON, or one line a trial as CSV."""
    from hpsched.study import export_csv, export_study, open_study

    study = open_study(name, storage)
    if format not in ("json", "csv"):
        raise UsageError(f"--format {format!r}: json or csv.")
    text = (
        json.dumps(export_study(study), indent=1) + "\n" if format == "json" else export_csv(study)
    )
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text)
    except OSError as error:
        raise UsageError(
            f"Cannot write {output}: {error.strerror}. Choose another --output."
        ) from None
    typer.echo(output)


@study_app.command(epilog="Example: hpsched study delete resnet --yes")
def delete(
    name: Name,
    storage: Storage = None,
    yes: Annotated[bool, option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a study with all its trials. Export it first if in doubt."""
    from hpsched.study import delete_study, open_study

    trials = len(open_study(name, storage).get_trials(deepcopy=False))
    if not (yes or _agrees(f"Remove study {name!r} with {trials} trials for good?")):
        hint("Nothing was removed; --yes removes without asking.")
        raise typer.Exit(1)
    delete_study(name, storage)
    hint(f"Removed {escape(repr(name))} with {trials} trials.")


def _agrees(question: str) -> bool:
    typer.echo(f"{question} [y/N] ", nl=False, err=True)  # typer.confirm dirties stdout
    answer = sys.stdin.readline()
    if not answer:
        typer.echo(err=True)
    return answer.strip().lower() in ("y", "yes")


def one_line(summary: Any) -> str:
    """A study's result in one line, for the end of a worker."""
    if summary.best is None:
        return "no full cycle finished yet"
    spent = number(summary.cost.cycles)
    return f"best {value_text(summary.best)}, {spent} full cycles spent"
