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
COLUMNS = 3  # of the grid
MOMENTA = [0.835, 0.965]  # range of the momenta in the gallery
MOMENTUM: dict[str, Any] = {"color": RED, "width": 1.5, "dash": "4px,3px"}
Made = schedules.Schedule | schedules.OneCycleSchedules
_EXACT: dict[str, Any] = {"line": {"simplify": False}}  # no corners cut


def schedule_figure(
    recipe: Mapping[str, float], total_steps: int, policy: str = "cosine"
) -> go.Figure:
    """Learning rate and momentum of a recipe over a run of ``total_steps`` optimizer steps."""
    values = {name: value for name, value in recipe.items() if name != "weight_decay"}
    made = schedules.follow(total_steps, **values, policy=policy)
    if policy.startswith(schedules.CLASSIC):
        title = f"{policy.removeprefix(schedules.CLASSIC)}, from a learning rate of"
        return _cycle_figure(made, total_steps, f"{title} {recipe['max_lr']:.3g}")
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
    momenta = any(isinstance(one, schedules.OneCycleSchedules) for one in made.values())
    title = f"Learning rate{' and momentum' * momenta} over optimizer steps"
    draw = _overlay if len(chosen) <= OVERLAID else _grid
    return draw(made, total_steps, title if len(chosen) > 1 else about)


def _rate(made: Made) -> schedules.Schedule:
    return made.lr if isinstance(made, schedules.OneCycleSchedules) else made


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


def _overlay(made: Mapping[str, Made], total_steps: int, title: str) -> go.Figure:
    """All rates in one pair of axes, and below it the momenta of those that have one."""
    cycles = [one for one in made.values() if isinstance(one, schedules.OneCycleSchedules)]
    rows, steps = 2 if cycles else 1, _steps(total_steps)
    figure = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for (name, one), colour in zip(made.items(), COLOURS, strict=False):
        look = {**_EXACT, "legendgroup": name, "col": 1}
        add_line(figure, steps, [_rate(one)(step) for step in steps], name, colour, row=1, **look)
        if isinstance(one, schedules.OneCycleSchedules):
            y = [one.momentum(step) for step in steps]
            add_line(figure, steps, y, f"{name}, momentum", colour, row=2, showlegend=False, **look)
    figure.update_xaxes(title_text="optimizer step", row=rows)
    figure.update_yaxes(title_text="learning rate", row=1)
    if cycles:
        figure.update_yaxes(title_text="momentum", row=2)
    return styled(figure, title, showlegend=len(made) > 1)


def _grid(made: Mapping[str, Made], total_steps: int, title: str) -> go.Figure:
    """A small pair of axes for each; the momentum on a scale of its own, on the right."""
    rows, steps = math.ceil(len(made) / COLUMNS), _steps(total_steps)
    figure = make_subplots(
        rows=rows,
        cols=COLUMNS,
        subplot_titles=list(made),
        vertical_spacing=0.36 / rows,
        horizontal_spacing=0.09,
        specs=[[{"secondary_y": True}] * COLUMNS] * rows,
    )
    figure.update_yaxes(visible=False, showgrid=False, range=MOMENTA, secondary_y=True)
    figure.update_yaxes(nticks=4, secondary_y=False)
    for index, (name, one) in enumerate(made.items()):
        cell = {"row": index // COLUMNS + 1, "col": index % COLUMNS + 1}
        look = {**_EXACT, "showlegend": False, **cell}
        add_line(figure, steps, [_rate(one)(step) for step in steps], name, BLUE, **look)
        if isinstance(one, schedules.OneCycleSchedules):
            _draw_momentum(figure, name, steps, one.momentum, cell)
    for name, look in (("learning rate", {"color": BLUE}), ("momentum", MOMENTUM)):
        figure.add_scatter(x=[None], y=[None], name=name, mode="lines", line=look)
    figure.update_annotations(font_size=12)
    figure.update_xaxes(nticks=4)
    return styled(figure, title, height=140 * rows + 130)


def _draw_momentum(
    figure: go.Figure,
    name: str,
    steps: Sequence[int],
    momentum: schedules.Schedule,
    cell: dict[str, int],
) -> None:
    y = [momentum(step) for step in steps]
    look = {"line": {**MOMENTUM, "simplify": False}, "showlegend": False, "secondary_y": True}
    add_line(figure, steps, y, f"{name}, momentum", MOMENTUM["color"], **look, **cell)
    ticks = {"tickvals": [0.85, 0.95], "tickfont": {"size": 10, "color": MOMENTUM["color"]}}
    figure.update_yaxes(visible=True, secondary_y=True, **ticks, **cell)


def _steps(total_steps: int, *also: int | None) -> list[int]:
    """The steps that are drawn: all of a short run, else a sample, and ``also`` these."""
    wanted = np.linspace(0, total_steps - 1, min(total_steps, DRAWN_STEPS)).round().astype(int)
    return sorted({*wanted.tolist(), *(step for step in also if step is not None)})
