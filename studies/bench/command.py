"""Which search finds a good recipe with how little training? Races on tasks of a second.

    python -m studies.bench run --seeds 20       # resumable; Ctrl-C loses only the races in hand
    python -m studies.bench summarise --output docs/data/search.json --markdown table.md
    python -m studies.bench plot --output docs/images/search.png

What is raced, and how it is scored: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hpsched.ledger import SIGNIFICANCE
from studies.bench.methods import METHODS
from studies.bench.rows import ALL, RESULTS, Job, Results, Row
from studies.bench.summary import OURS, TARGET_METHOD, ratio, summarise
from studies.bench.tasks import SEARCH_REPORTING, SEARCH_TUNING, TASKS

QUALITIES = ("5", "10", "20", "40")
TELLING = 6  # fewer pairs of races than that cannot be significant
BOUNDS = ("oracle-rate",)  # no methods
SPLITS = {"tuning": SEARCH_TUNING, "reporting": SEARCH_REPORTING}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="run the races that have no row yet")
    run.add_argument("--split", choices=list(SPLITS), default="reporting")
    run.add_argument("--tasks", nargs="*", choices=list(TASKS), help="instead of a split")
    run.add_argument("--methods", nargs="*", choices=list(ALL), default=list(METHODS))
    run.add_argument("--seeds", type=int, default=20, help="seeds 0 … N - 1")
    run.add_argument("--budget", type=float, default=40.0, help="in full runs")
    run.add_argument("--workers", type=int, default=1, help="simulated asynchronous workers")
    run.add_argument("--processes", type=int, default=os.cpu_count())
    run.set_defaults(command=_run)
    plot = commands.add_parser("plot", help="quality against cost, task by task")
    say = commands.add_parser("summarise", help="the tables of docs/benchmarks.md")
    say.add_argument("--output", type=Path, help="all numbers, as JSON")
    for command in (say, plot):
        command.add_argument(
            "--rules",
            nargs="+",
            default=(),
            help="rows of earlier states of hpsched (row key rules); the first that a race has",
        )
    say.add_argument("--markdown", type=Path, help="the tables")
    say.set_defaults(command=_summarise)
    plot.add_argument("--output", type=Path, required=True, help=".html, .png, .svg or .pdf")
    plot.set_defaults(command=_plot)
    arguments = parser.parse_args()
    arguments.command(arguments)


def _run(arguments: argparse.Namespace) -> None:
    tasks = arguments.tasks or SPLITS[arguments.split]
    jobs = [
        Job(task, method, seed, arguments.workers, arguments.budget)
        for seed in range(arguments.seeds)  # all of a seed first: every stop leaves a whole table
        for task in tasks
        for method in arguments.methods
    ]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    begun = time.monotonic()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("races", total=len(jobs))

        def done(row: Row) -> None:
            progress.advance(bar)
            if not console.is_terminal:
                console.print(f"{row['task']} {row['method']} {row['seed']}: {row['wall']:.1f} s")

        results = Results(arguments.results)
        progress.advance(bar, results.run(jobs, arguments.processes, done))
    console.print(
        f"{len(jobs)} races are in {arguments.results} ({time.monotonic() - begun:.0f} s)"
    )


def _reported(arguments: argparse.Namespace) -> list[Row]:
    every = Results(arguments.results).current(arguments.rules)
    rows = [row for row in every if row["task"] in SEARCH_REPORTING]
    for method in (OURS, TARGET_METHOD):
        if {row["task"] for row in rows if row["method"] == method} < {r["task"] for r in rows}:
            raise SystemExit(
                f"Some task has no race of {method} in {arguments.results} (for this state of the "
                f"code, or --rules): python -m studies.bench run --methods {method}"
            )
    if not rows:
        raise SystemExit(f"No races in {arguments.results}: python -m studies.bench run")
    return rows


def _summarise(arguments: argparse.Namespace) -> None:
    rows = _reported(arguments)
    found = summarise(rows)
    found["versions"] = rows[-1]["versions"]
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = _tables(found)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    print(text)


def _tables(found: dict[str, Any]) -> str:
    """Cost to the target by task, and the ratios over tasks."""
    methods = sorted(found["methods"], key=lambda m: (m != OURS, m))
    tasks = list(found["targets"])
    lines = [
        "Full runs to the target: median over seeds; – where most seeds miss it.",
        "",
        "| method | seeds | " + " | ".join(tasks) + " | solved | times ours |",
        "|---|" + "---:|" * (len(tasks) + 3),
    ]
    for method in methods:
        by_task = found["methods"][method]
        cells = [_number(by_task[t]["cost"]) if t in by_task else "" for t in tasks]
        solved = sum(row["solved"] for row in by_task.values()) / len(by_task)
        times, _ = ratio(found, method)
        seeds = min(row["seeds"] for row in by_task.values())
        shown = _number(times, "∞")
        lines.append(f"| {method} | {seeds} | {' | '.join(cells)} | {solved:.0%} | {shown} |")
    lines += [
        "",
        "Race by race, of the same task and seed: cost as a multiple of ours, median with its 95 %"
        " interval, races in which hpsched is cheaper : dearer, sign test.",
        "",
        "| method | races | times ours | cheaper : dearer | p |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, pairs in found["pairs"].items():
        times, low, high = (_number(t, "∞") for t in (pairs["times"], *pairs["interval"]))
        lines.append(
            f"| {method} | {pairs['races']} | {times} [{low}, {high}] | "
            f"{pairs['ours_cheaper']} : {pairs['ours_dearer']} | {pairs['p']:.1g} |"
        )
    lines += [
        "",
        "Distance from the target's level at equal budgets, in tolerances (lower is better):"
        " median over tasks of the median over seeds; tasks on which hpsched is better : worse.",
        "",
        "| method | " + " | ".join(f"{b} runs" for b in QUALITIES) + " | at 10 | at 40 |",
        "|---|" + "---:|" * (len(QUALITIES) + 2),
    ]
    ours = found["methods"][OURS]
    for method in methods:
        by_task = found["methods"][method]
        gaps = {
            b: {t: _gap(row["quality"][b]["median"]) for t, row in by_task.items()}
            for b in QUALITIES
        }
        cells = [_number(statistics.median(gaps[b].values())) for b in QUALITIES]
        won = []
        for b in ("10", "40"):
            pairs = [(gap, _gap(ours[t]["quality"][b]["median"])) for t, gap in gaps[b].items()]
            won.append(f"{sum(g > o for g, o in pairs)} : {sum(g < o for g, o in pairs)}")
        lines.append(f"| {method} | {' | '.join(cells)} | {' | '.join(won)} |")
    lines += ["", *(_clear(found, budget) for budget in ("10", "40"))]
    for workers, times in found["parallel"].items():
        one = {t: ours[t]["cost"] for t in times}
        lines += ["", f"Elapsed full runs to the target with {workers} workers (one worker):", ""]
        lines += [f"- {t}: {_number(times[t])} ({_number(one[t])})" for t in times]
    return "\n".join(lines) + "\n"


def _clear(found: dict[str, Any], budget: str) -> str:
    """Where one of the two names better recipes for certain, after so many full runs."""
    cells = [
        (f"{method} on {task}", row["quality"][budget])
        for method, by_task in found["methods"].items()
        if not method.startswith(OURS) and method not in BOUNDS
        for task, row in by_task.items()
        if row["quality"][budget].get("p") is not None and row["seeds"] >= TELLING
    ]
    clear = [(name, q) for name, q in cells if q["p"] < SIGNIFICANCE]
    worse = [name for name, q in clear if q["ours_worse"] > q["ours_better"]]
    return (
        f"- After {budget} full runs, of {len(cells)} pairs of a method and a task with {TELLING} "
        f"seeds or more, hpsched names better recipes in {len(clear) - len(worse)} and worse ones "
        f"in {len(worse)} with p < {SIGNIFICANCE} (races of the same seed, sign test, each pair "
        f"for itself){': ' if worse else ''}{', '.join(worse)}."
    )


def _gap(value: float | None) -> float:
    return math.inf if value is None else value


def _number(value: float | None, infinite: str = "–") -> str:
    return infinite if value is None or math.isinf(value) else f"{value:.1f}"


def _plot(arguments: argparse.Namespace) -> None:
    from hpsched.figure_files import write_figure
    from studies.bench.search_figure import search_figure

    write_figure(search_figure(_reported(arguments)), arguments.output)
