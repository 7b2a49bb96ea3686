"""``hpsched compare``: is one-cycle better here than other schedules?"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from optuna.study import Study
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hpsched.cli.app import (
    Direction,
    Format,
    Objective,
    Storage,
    app,
    check_format,
    command_text,
    hint,
    option,
    show,
    state,
)
from hpsched.cli.screen import progress_line
from hpsched.present import number

if TYPE_CHECKING:
    from hpsched.compare import Arm, Difference
    from hpsched.records import WorkerRecord


@app.command(epilog="Example: hpsched compare resnet -o train:objective --cycles 10 --seeds 10")
def compare(
    name: Annotated[str, typer.Argument(help="Of the comparison; its studies are NAME-SCHEDULE.")],
    objective: Objective,
    schedules: Annotated[
        str, option(help="What to compare one-cycle with; see `hpsched schedule list`.")
    ] = "cosine,step,constant",
    cycles: Annotated[
        float, option(help="Budget of each schedule's search, in full-cycle equivalents.")
    ] = 20.0,
    seeds: Annotated[
        int, option(help="Fresh seeds, the same for all, that each found recipe runs with.", min=2)
    ] = 10,
    seed: Annotated[int, option(help="All runs' seeds follow from it.")] = 0,
    direction: Direction = "minimize",
    storage: Storage = None,
    format: Format = "table",
) -> None:
    """Is one-cycle better here than other schedules, by how much, and how sure is that?

    Each schedule gets a study of its own, with the same budget: a search over its rate and weight
    decay (over all six values for one-cycle). The recipes that they name then run with fresh seeds,
    the same for all. Needs nothing of the objective: cycle.schedule(optimizer) drives whichever
    schedule it is.

    Repeat the call to go on after an interruption, or, with more --seeds, for a surer answer. Other
    nodes help with the same call, or with `hpsched worker attach NAME-SCHEDULE`.
    """
    from hpsched import compare as comparing
    from hpsched import objective as objectives

    check_format(format)
    objectives.load_objective(objective)
    arms = comparing.open_arms(
        name,
        [part.strip() for part in schedules.split(",") if part.strip()],
        objective=objective,
        cycles=cycles,
        seed=seed,
        direction=direction,
        storage=storage,
    )
    for schedule, study in arms.items():
        hint(f"[bold]{schedule}[/]: search")
        _work(study, storage)
    for schedule, study in arms.items():
        if comparing.queue_seeds(study, seeds):
            hint(f"[bold]{schedule}[/]: fresh seeds")
            _work(study, storage)
    read = [comparing.read_arm(schedule, study) for schedule, study in arms.items()]
    found = comparing.differences(read, next(iter(arms.values())).direction)
    show(_as_json(read, found), format, lambda: _screen(read, found))
    names = " ".join(shlex.quote(arm.study) for arm in read)
    page = command_text(f"hpsched study report {names} -o compare.html", storage)
    hint(f"As a page: {page}")
    for arm in read:
        if len(arm.scores) < seeds:
            attach = command_text(f"hpsched worker attach {shlex.quote(arm.study)}", storage)
            hint(
                f"[yellow]Note:[/] {escape(arm.study)} has {len(arm.scores)} of {seeds} seeds: "
                f"repeat this call when its workers are done. To help them: {attach}"
            )


def _work(study: Study, storage: str | None) -> None:
    """Be a worker of the study until it has nothing to do."""
    from hpsched.study import open_study
    from hpsched.worker import Worker

    with progress_line(state.err) as draw:

        def watch(record: WorkerRecord) -> None:
            draw(f"{study.study_name}, trial {record.trial}: ", record)

        opened = open_study(study.study_name, storage, heartbeat=True)
        ended = Worker(opened, watch=watch, ends_process=True).run()
    if ended.signal is not None:
        hint("Interrupted; nothing is lost. Repeat the call to go on.")
        raise typer.Exit(128 + ended.signal)


def _as_json(arms: Sequence[Arm], found: Sequence[Difference]) -> dict[str, Any]:
    return {
        "arms": [
            {**asdict(arm), "mean": arm.mean, "spread": arm.spread, "diverged": arm.diverged}
            for arm in arms
        ],
        "differences": [{**asdict(one), "verdict": one.verdict} for one in found],
    }


def _screen(arms: Sequence[Arm], found: Sequence[Difference]) -> RenderableType:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.caption = (
        "gain: by how much one-cycle is better, with its 95 % interval; cost in full runs"
    )
    table.caption_justify = "left"
    table.add_column("schedule")
    columns = ("max_lr", "weight decay", "seeds", "mean ± sd", "cost", "gain", "interval", "p")
    for column in columns:
        table.add_column(column, justify="right")
    by_schedule = {one.against: one for one in found}
    for arm in arms:
        table.add_row(*_row(arm), *_difference(by_schedule.get(arm.schedule)))
    return Group(table, *(Text(f"· {sentence(one)}") for one in found))


def _row(arm: Arm) -> list[str]:
    recipe: Mapping[str, float] = arm.recipe
    diverged = f", {arm.diverged} diverged" if arm.diverged else ""
    return [
        arm.schedule,
        number(recipe.get("max_lr")),
        number(recipe.get("weight_decay")),
        f"{len(arm.scores)}{diverged}",
        f"{number(arm.mean, 4)} ± {number(arm.spread, 2)}",
        number(arm.cost),
    ]


def _difference(one: Difference | None) -> list[str]:
    if one is None:
        return ["", "", ""]
    interval = "–" if one.low is None else f"{number(one.low)} … {number(one.high)}"
    return [number(one.gain), interval, number(one.p, 2)]


def sentence(one: Difference) -> str:
    """The verdict on one schedule, in words."""
    if one.p is None:
        return f"against {one.against}: too few seeds for a verdict"
    if one.gain is None:
        ours, theirs = one.diverged
        counted = f"diverged on {ours} and {theirs} of {one.seeds} seeds"
        said = f"ahead on {one.wins} seeds and behind on {one.losses}; the two {counted}"
    else:
        said = f"by {number(abs(one.gain))} [{number(one.low)}, {number(one.high)}]"
    p = f"p = {number(one.p, 2)}"
    if one.verdict != "not decided":
        return f"one-cycle is {one.verdict} than {one.against}, {said}, {p}"
    more = f"; about {one.seeds_needed} seeds would decide it" if one.seeds_needed else ""
    return f"not decided whether one-cycle is better than {one.against} ({said}, {p}{more})"
