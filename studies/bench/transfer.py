"""Does it pay to begin like an earlier study (``study create --like``)? Pairs of tuning tasks.

    python -m studies.bench.transfer run --seeds 3     # resumable; a line of JSON for each pair
    python -m studies.bench.transfer show

A study of 20 full runs on the first task of a pair, then two of 10 on the second: one that begins
with the standard recipe, one that begins like the first. What each would name after so many full
runs is run again on five fresh seeds and scored on data that no search sees.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from hpsched.study import first_guess
from studies.bench.methods import hpsched_search
from studies.bench.race import Race, scorer
from studies.bench.rows import FRESH_SEEDS, RESULTS, append, prepare
from studies.bench.tasks import TASKS

PATH = RESULTS.parent / "transfer.jsonl"
COSTS = (1.0, 2.0, 3.5, 5.0, 10.0)
EARLIER, LATER = 20.0, 10.0  # budgets in full runs
#: The same model for longer, and unlike ones.
SAME = (
    ("signals-mlp-sgd@200", "signals-mlp-sgd@800"),
    ("table-mlp-adamw@150", "table-mlp-adamw@600"),
)
OTHER = (
    ("cancer-mlp-sgd@150", "diabetes-mlp-sgd@200"),
    ("friedman-mlp-adam@200", "letters-mlp-adam@200"),
    ("digits-mlp-adamw@150", "table-mlp-adamw@150"),
)

Row = dict[str, Any]


def measure(pair: Sequence[str], seed: int) -> Row:
    """One pair of tasks: scores of what was named at each cost, with and without."""
    earlier, later = pair
    guess = first_guess(hpsched_search(Race(TASKS[earlier], seed, EARLIER)))
    row: Row = {"earlier": earlier, "later": later, "seed": seed, "guess": guess}
    for name, told in (("standard", {}), ("like", {"like": "earlier", "first_guess": guess})):
        race = Race(TASKS[later], seed + 50, LATER)
        hpsched_search(race, **told)
        row[name] = _scores(race)
    return row


def _scores(race: Race) -> list[list[float] | None]:
    tested = scorer(race.task, FRESH_SEEDS)
    found = []
    for budget in COSTS:
        named = [recipe for cost, _, recipe in race.named if cost <= budget]
        found.append(tested(named[-1]) if named else None)
    return found


def _rows() -> list[Row]:
    return [json.loads(line) for line in PATH.read_text().splitlines()] if PATH.exists() else []


def run(seeds: int, processes: int) -> None:
    """Measure the pairs that have no row yet."""
    PATH.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["earlier"], row["later"], row["seed"]) for row in _rows()}
    jobs = [(pair, seed) for seed in range(seeds) for pair in (*SAME, *OTHER)]
    with ProcessPoolExecutor(processes, initializer=prepare) as pool:
        todo = [pool.submit(measure, *job) for job in jobs if (*job[0], job[1]) not in done]
        for future in as_completed(todo):
            row = future.result()
            append(PATH, json.dumps(row))
            print(row["earlier"], row["later"], row["seed"], differences(row), flush=True)


def differences(row: Row) -> list[float | None]:
    """At each cost: how much worse with ``--like``, in standard deviations between seeds."""
    both = [*row["standard"], *row["like"]]
    spread = statistics.median(
        statistics.stdev(scores) for scores in both if scores and all(map(math.isfinite, scores))
    )
    means = [
        [statistics.fmean(scores) if scores else math.nan for scores in row[name]]
        for name in ("standard", "like")
    ]
    gaps = [(like - plain) / spread for plain, like in zip(*means, strict=True)]
    return [round(gap, 2) if math.isfinite(gap) else None for gap in gaps]


def show() -> None:
    """The table of docs/design/search.md."""
    print(f"| pair | seeds | {' | '.join(f'{cost:g}' for cost in COSTS)} |")
    print(f"|---|{'---:|' * (len(COSTS) + 1)}")
    for earlier, later in (*SAME, *OTHER):
        rows = [row for row in _rows() if (row["earlier"], row["later"]) == (earlier, later)]
        cells = []
        for gaps in zip(*map(differences, rows), strict=True):
            known = [gap for gap in gaps if gap is not None]
            cells.append(f"{statistics.median(known):.1f}" if known else "–")
        print(f"| {earlier} → {later} | {len(rows)} | {' | '.join(cells)} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("run", help="measure what is missing")
    measuring.add_argument("--seeds", type=int, default=3)
    measuring.add_argument("--processes", type=int, default=2)
    commands.add_parser("show", help="the table")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.seeds, arguments.processes)
    else:
        show()


if __name__ == "__main__":
    main()
