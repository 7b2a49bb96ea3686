"""The summary of the races as one picture: quality against cost, all methods, task by task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hpsched.figure_style import BLUE, GREY, INK, ORANGE, styled
from studies.bench.summary import Row, Target, at, mean, target

COSTS = np.geomspace(0.5, 40, 40)
#: Method → (label, colour, dash); the others are left to the table.
DRAWN = {
    "hpsched": ("hpsched", BLUE, "solid"),
    "hyperband-wide": ("TPE + Hyperband, wide range", ORANGE, "solid"),
    "tpe-wide": ("TPE, wide range", ORANGE, "dot"),
    "hyperband-expert": ("TPE + Hyperband, expert's range", INK, "solid"),
    "tpe-expert": ("TPE, expert's range", INK, "dot"),
    "by-hand-then-tpe": ("lr_find by hand, then TPE near it", GREY, "solid"),
    "short-then-full-expert": ("many short runs, the best in full", GREY, "dot"),
}
WORST = 12.0  # tolerances; what is worse is drawn there
COLUMNS = 4


def search_figure(rows: Sequence[Row]) -> go.Figure:
    """A panel for each task: the named recipe's distance from the target, against the cost."""
    alone = [row for row in rows if row["workers"] == 1 and row["budget"] == 40.0]
    tasks = sorted({row["task"] for row in alone})
    lines = math.ceil(len(tasks) / COLUMNS)
    figure = make_subplots(
        lines, COLUMNS, subplot_titles=tasks, shared_yaxes=True, vertical_spacing=0.2
    )
    for number, task in enumerate(tasks):
        here = [row for row in alone if row["task"] == task]
        wanted = target(here)
        for method, (label, colour, dash) in DRAWN.items():
            mine = [row for row in here if row["method"] == method]
            if mine:
                figure.add_scatter(
                    x=COSTS,
                    y=[_gap(mine, wanted, cost) for cost in COSTS],
                    name=label,
                    legendgroup=method,
                    showlegend=number == 0,
                    line={"color": colour, "dash": dash, "width": 3 if method == "hpsched" else 2},
                    row=number // COLUMNS + 1,
                    col=number % COLUMNS + 1,
                )
    figure.add_hline(y=1, line={"color": GREY, "width": 1, "dash": "dash"})
    title = "Distance of the named recipe from the target, by cost"
    figure = styled(figure, title, height=330 * lines)
    figure.update_annotations(font_size=13)
    figure.update_xaxes(type="log", title="full runs spent", tickvals=[0.5, 1, 2, 5, 10, 20, 40])
    figure.update_yaxes(type="linear", range=[-5, WORST])
    figure.update_layout(width=1300, legend={"orientation": "h", "y": -0.15})
    return figure


def _gap(rows: Sequence[dict[str, Any]], wanted: Target, cost: float) -> float:
    """Median distance from the target's level, in tolerances."""
    gaps = []
    for row in rows:
        scores = at(row, cost)
        far = WORST if scores is None else (mean(scores) - wanted.level) / wanted.tolerance
        gaps.append(far)
    return min(statistics.median(gaps), WORST)
