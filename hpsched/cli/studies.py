"""``hpsched study …``"""

from __future__ import annotations

import math
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import optuna
import typer
from rich import box
from rich.live import Live
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from hpsched.cli.app import (
    Direction,
    Format,
    Name,
    NewName,
    Objective,
    Storage,
    app,
    command_text,
    hint,
    option,
    show,
    state,
    with_storage,
)
from hpsched.cli.completion import one_of, sampler_names, study_names
from hpsched.cli.screen import best_table, is_live, status_line, status_screen, value_text
from hpsched.cli.sparkline import Seen
from hpsched.errors import UsageError
from hpsched.present import counted, duration, guess_text, number

if TYPE_CHECKING:
    from hpsched.ledger import Candidate
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
    name: NewName,
    objective: Objective,
    storage: Storage = None,
    direction: Direction = "minimize",
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
        option(
            help="What draws recipes: hpsched's own model, or tpe, gp, qmc, cmaes or random.",
            autocompletion=sampler_names,
        ),
    ] = "hpsched",
    range_tests: Annotated[
        int, option(help="Range tests per context, at most: two that agree are enough.")
    ] = 3,
    reduction_factor: Annotated[
        int | None,
        option(
            help="At each rung let the best 1 in this many climb (successive halving). "
            "Default: those that the model gives a fair chance."
        ),
    ] = None,
    confirm_top: Annotated[int, option(help="Recipes to confirm at the end.")] = 2,
    confirm_seeds: Annotated[int, option(help="Fresh seeds for each of them.")] = 3,
    like: Annotated[
        str | None,
        option(
            help="Begin with the best recipe of this study of the same model, at another length "
            "or batch size, instead of with the standard one.",
            autocompletion=study_names,
        ),
    ] = None,
    skip_if_exists: Annotated[
        bool, option("--skip-if-exists", help="Accept an existing study, as it is.")
    ] = False,
    check: Annotated[
        bool, option("--check/--no-check", help="Import the objective once, to see that it works.")
    ] = True,
) -> None:
    """Create a study: what to run, and how much of it."""
    from hpsched import objective as objectives
    from hpsched.study import create_study, open_study, read_settings

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
        like=open_study(like, storage) if like is not None else None,
        skip_if_exists=skip_if_exists,
    )
    typer.echo(study.study_name)
    settings = read_settings(study)
    if settings is not None and settings.like is not None and settings.first_guess is not None:
        hint(f"Begins like {escape(settings.like)}: {guess_text(settings.first_guess)}")
    if skip_if_exists:
        _note_kept(study, objective=objective, trials=trials, cycles=cycles, like=like)
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
    runs = f"{planned} run{'s' if planned > 1 else ''} in all"
    said = f"{recipes} recipe{'s' if recipes > 1 else ''} with fresh seeds, {runs}"
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
    if watch:
        if format != "table":
            raise UsageError("--watch draws a screen: leave --format out, or call it repeatedly.")
        _watch(study, storage, interval)
        return
    look = _look(study, storage)
    show(look.summary.to_json(), format, look.screen)


@dataclass(frozen=True)
class Look:
    """A study as it stands: ``now`` by the database's clock, and what its workers were told."""

    summary: Summary
    now: float
    orders: Mapping[str, str]

    def screen(self, seen: Seen | None = None) -> Any:
        """What a terminal shows."""
        return status_screen(self.summary, self.now, seen, self.orders)


def _watch(study: optuna.Study, storage: str | None, interval: float) -> None:
    """Show the study until its budget is spent, or Ctrl-C."""
    draw = _draw_over if is_live(state.out) else _log_changes
    try:
        draw(_looks(study, storage, interval))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _looks(study: optuna.Study, storage: str | None, interval: float) -> Iterator[Look]:
    """The study every few seconds until it is done."""
    last: Look | None = None
    while True:
        try:
            last = _look(study, storage)
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if last is None:
                raise
            lost = f"no news of the study: the database is away ({type(error).__name__})"
            last = replace(last, summary=replace(last.summary, warnings=(lost,)))
        yield last
        if last.summary.progress == 1.0:
            return
        time.sleep(interval)


def _draw_over(looks: Iterator[Look]) -> None:
    """On a terminal, one screen."""
    seen = Seen()
    with Live(console=state.out, auto_refresh=False) as live:
        for look in looks:
            for key, worker in look.summary.live.items():
                seen.look(key, worker)
            if "--watch" in look.summary.next_command:  # the reader is doing it
                look = replace(look, summary=replace(look.summary, next_command=""))
            live.update(look.screen(seen), refresh=True)


def _log_changes(looks: Iterator[Look]) -> None:
    """In logs and CI, a line whenever something has changed, and the whole at the end."""
    said, last = "", None
    for last in looks:
        summary = last.summary
        line = status_line(replace(summary, eta=None))
        if line != said:
            said = line
            left = f", about {duration(summary.eta)} left" if summary.eta else ""
            typer.echo(f"{time.strftime('%H:%M:%S')} {summary.name}: {line}{left}")
    if last is not None:
        state.out.print(last.screen())


def _look(study: optuna.Study, storage: str | None) -> Look:
    """The study now."""
    from hpsched.orders import given
    from hpsched.storage import clock
    from hpsched.summary import summarise

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the summary names what it could not read
        now = clock(study._storage)()
        found = summarise(study, now)
    found = replace(found, next_command=with_storage(found.next_command, storage))
    return Look(found, now, given(study.user_attrs))


@study_app.command(epilog="Example: hpsched study best resnet --format torch")
def best(
    name: Name,
    storage: Storage = None,
    format: Annotated[
        str,
        option(
            "--format",
            "-f",
            help="table, torch, json or yaml.",
            autocompletion=one_of("table", "torch", "json", "yaml"),
        ),
    ] = "table",
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
    if found.hint and format != "table":  # a row of the table says it
        hint(f"[yellow]Note:[/] {escape(found.hint)}")


@study_app.command(epilog="Example: hpsched study report resnet -o report.html")
def report(
    names: Annotated[
        list[str],
        typer.Argument(
            help="A study, or several to compare.",
            show_default=False,
            metavar="NAME…",
            autocompletion=study_names,
        ),
    ],
    storage: Storage = None,
    output: Annotated[
        Path, option("--output", "-o", help="Where to write it: .html, .md, or - for stdout.")
    ] = Path("report.html"),
    format: Annotated[
        str | None,
        option(
            "--format",
            "-f",
            help="html or md. Default: by the name of --output; md on stdout.",
            show_default=False,
            autocompletion=one_of("html", "md"),
        ),
    ] = None,
) -> None:
    """Write one self-contained page: the answer, the evidence, the plots. Works offline.

    As Markdown, without plots, for a pull request: hpsched study report resnet -o report.md

    Several studies against each other: hpsched study report resnet resnet-2 -o compare.html
    """
    from hpsched.report import is_markdown, render, write_report
    from hpsched.study import open_study
    from hpsched.summary import summarise

    as_markdown = is_markdown(output, format)
    found = [summarise(open_study(name, storage)) for name in names]
    if str(output) == "-":
        typer.echo(render(found, as_markdown=as_markdown), nl=False)
    else:
        typer.echo(write_report(found, output, as_markdown=as_markdown))


@study_app.command(epilog="Example: hpsched study confirm resnet --top 2 --seeds 3")
def confirm(
    name: Name,
    storage: Storage = None,
    top: Annotated[int, option(help="How many recipes, those expected best first.")] = 2,
    seeds: Annotated[int, option(help="Fresh seeds for each.")] = 3,
) -> None:
    """Queue the recipes of which the search expects most again with fresh seeds.

    They need not be what `hpsched study best` names, which goes by the fresh seeds there are.
    Workers run them even on a spent budget.
    """
    from hpsched.study import open_study, queue_confirmations

    queued = queue_confirmations(open_study(name, storage), top=top, seeds=seeds)
    count = seeds * len(queued.chosen)
    typer.echo(count)
    trials = ", ".join(_with_seeds(candidate) for candidate in queued.chosen)
    hint(f"Queued, each with {counted(seeds, 'fresh seed')}: {trials}.")
    if queued.place > top:
        more = f"hpsched study confirm {shlex.quote(name)} --top {queued.place} --seeds {seeds}"
        hint(
            f"Not queued: {_with_seeds(queued.best)}, which `hpsched study best` names; by all "
            f"results, the search expects more of the others. {command_text(more, storage)} queues "
            "it too, and them once more."
        )
    attach = command_text(f"hpsched worker attach {shlex.quote(name)}", storage)
    hint(f"{counted(count, 'full cycle')} queued. Next: {attach}")


def _with_seeds(candidate: Candidate) -> str:
    """A recipe's trial, and the fresh seeds that it has already."""
    there = len(candidate.fresh)
    return f"trial {candidate.number}" + (f" (has {there} already)" if there else "")


@study_app.command(epilog="Example: hpsched study export resnet > resnet.json")
def export(
    name: Name,
    storage: Storage = None,
    output: Annotated[
        Path | None, option("--output", "-o", help="A file instead of stdout.")
    ] = None,
    format: Annotated[
        str,
        option("--format", "-f", help="json or csv.", autocompletion=one_of("json", "csv")),
    ] = "json",
) -> None:
    """Everything as JSON, which `hpsched study import` reads; or one line a trial as CSV."""
    from hpsched.archive import export_csv, export_json
    from hpsched.study import open_study

    study = open_study(name, storage)
    if format not in ("json", "csv"):
        raise UsageError(f"--format {format!r}: json or csv.")
    text = export_json(study) if format == "json" else export_csv(study)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"Cannot write {output}: {error.strerror}. Choose another --output."
        ) from None
    typer.echo(output)


@study_app.command("import", epilog="Example: hpsched study import resnet.json --name resnet-2")
def import_(
    file: Annotated[Path, typer.Argument(help="What `hpsched study export` wrote; - for stdin.")],
    name: Annotated[str | None, option(help="Default: the name it was exported under.")] = None,
    storage: Storage = None,
) -> None:
    """Store an exported study, exactly as it was; trials that were running wait to run again."""
    from hpsched.archive import import_study, read_archive

    archive = read_archive(_read(file), _called(file))
    with Progress(console=state.err, transient=True, disable=not state.err.is_terminal) as screen:
        task = screen.add_task("trials", total=len(archive.trials))
        study = import_study(
            archive,
            name=name,
            storage=storage,
            on_progress=lambda stored: screen.update(task, completed=stored),
        )
    typer.echo(study.study_name)
    hint(f"{len(archive.trials)} trials imported.")
    if archive.requeued:
        numbers = ", ".join(map(str, archive.requeued))
        hint(f"Running when exported, and back in the queue with what they have: {numbers}")
    status = f"hpsched study status {shlex.quote(study.study_name)}"
    hint(f"Next: {command_text(status, storage)}")


def _read(file: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if _is_stdin(file) else file.read_bytes()
        text = data.decode()
    except OSError as error:
        raise UsageError(
            f"Cannot read {_called(file)}: {error.strerror}. Name what `hpsched study export` "
            "wrote."
        ) from None
    except UnicodeDecodeError:
        raise UsageError(
            f"{_called(file)} is no export of a study: it is not UTF-8 text."
        ) from None
    if _is_stdin(file) and not text.strip():
        raise UsageError(
            "Nothing came on standard input: name a file, or pipe `hpsched study export NAME` into "
            "this (when that fails, it says why)."
        )
    return text


def _is_stdin(file: Path) -> bool:
    return str(file) == "-"


def _called(file: Path) -> str:
    return "standard input" if _is_stdin(file) else str(file)


@study_app.command(epilog="Example: hpsched study delete resnet --yes")
def delete(
    name: Name,
    storage: Storage = None,
    yes: Annotated[bool, option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a study with all its trials. Export it first if in doubt."""
    from hpsched.study import delete_study, find_study

    trials = len(find_study(name, storage).get_trials(deepcopy=False))
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
        over = summary.progress == 1.0
        return "no full cycle finished " + ("within the budget" if over else "yet")
    spent = number(summary.cost.cycles)
    return f"best {value_text(summary.best)}, {spent} full cycles spent"
