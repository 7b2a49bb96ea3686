"""Schedules → plotly figures: a recipe's cycle, and the gallery of schedules.

Apart from the other figures so that ``hpsched schedule plot`` starts without Optuna.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpsched import schedules
from hpsched.errors import UsageError
from hpsched.figure_style import BLUE, COLOURS, RED, add_line, styled

DRAWN_STEPS = 600  # points of a drawn schedule
OVERLAID = 4  # schedules drawn in one pair of axes; more get one each
_EXACT: dict[str, Any] = {"line": {"simplify": False}}  # no corners cut


def schedule_figure(
    recipe: Mapping[str, float], total_steps: int, policy: str = "cosine"
) -> go.Figure:
    """Learning rate and momentum of a recipe over a run of ``total_steps`` optimizer steps."""
    values = {name: value for name, value in recipe.items() if name != "weight_decay"}
    made = schedules.one_cycle(total_steps, **values, policy=policy)
    peak = schedules.peak_step(total_steps, recipe["pct_start"], policy)
    title = f"The learning rate peaks at {recipe['max_lr']:.3g} on step {peak:,}"
    return _cycle_figure(made, total_steps, title, peak)


def schedule_gallery(
    names: Sequence[str] = (), *, total_steps: int = 1000, max_lr: float = 1.0
) -> go.Figure:
    """Schedules of :data:`hpsched.schedules.GALLERY` over steps; all of them unless named.

    Raises:
        UsageError: A name that is not in the gallery.
    """
    chosen = list(dict.fromkeys(names)) or list(schedules.GALLERY)
    if unknown := [name for name in chosen if name not in schedules.GALLERY]:
        known = ", ".join(schedules.GALLERY)
        raise UsageError(f"no schedule is named {', '.join(unknown)}: there are {known}.")
    made = {name: schedules.GALLERY[name][1](total_steps, max_lr) for name in chosen}
    first, about = made[chosen[0]], f"{chosen[0]}: {schedules.GALLERY[chosen[0]][0]}"
    if len(chosen) == 1 and isinstance(first, schedules.OneCycleSchedules):
        return _cycle_figure(first, total_steps, about)
    title = "Learning rate over optimizer steps" if len(chosen) > 1 else about
    rates = {
        name: one.lr if isinstance(one, schedules.OneCycleSchedules) else one
        for name, one in made.items()
    }
    draw = _overlay if len(chosen) <= OVERLAID else _grid
    return draw(rates, total_steps, title)


def _cycle_figure(
    made: schedules.OneCycleSchedules, total_steps: int, title: str, peak: int | None = None
) -> go.Figure:
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    steps = _steps(total_steps, peak)
    both = (("learning rate", made.lr, BLUE), ("momentum", made.momentum, RED))
    for row, (name, schedule, colour) in enumerate(both, 1):
        add_line(
            figure,
            steps,
            [schedule(step) for step in steps],
            name,
            colour,
            **_EXACT,
            row=row,
            col=1,
        )
        figure.update_yaxes(title_text=name, row=row, col=1)
    figure.update_xaxes(title_text="optimizer step", row=2, col=1)
    return styled(figure, title, showlegend=False, hovermode="x unified")


def _overlay(rates: Mapping[str, schedules.Schedule], total_steps: int, title: str) -> go.Figure:
    figure, steps = styled(go.Figure(), title), _steps(total_steps)
    for (name, schedule), colour in zip(rates.items(), COLOURS, strict=False):
        add_line(figure, steps, [schedule(step) for step in steps], name, colour, **_EXACT)
    figure.update_xaxes(title_text="optimizer step")
    return figure.update_yaxes(title_text="learning rate")


def _grid(rates: Mapping[str, schedules.Schedule], total_steps: int, title: str) -> go.Figure:
    rows, steps = math.ceil(len(rates) / 3), _steps(total_steps)
    figure = make_subplots(
        rows=rows, cols=3, subplot_titles=list(rates), vertical_spacing=0.36 / rows
    )
    for index, (name, schedule) in enumerate(rates.items()):
        cell = {"row": index // 3 + 1, "col": index % 3 + 1}
        add_line(figure, steps, [schedule(step) for step in steps], name, BLUE, **_EXACT, **cell)
    figure.update_annotations(font_size=12)
    figure.update_xaxes(nticks=4)
    figure.update_yaxes(nticks=4)
    return styled(figure, title, showlegend=False, height=140 * rows + 110)


def _steps(total_steps: int, *also: int | None) -> list[int]:
    """The steps that are drawn: all of a short run, else a sample, and ``also`` these."""
    wanted = np.linspace(0, total_steps - 1, min(total_steps, DRAWN_STEPS)).round().astype(int)
    return sorted({*wanted.tolist(), *(step for step in also if step is not None)})
