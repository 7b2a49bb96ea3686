"""Records → plotly figures, legible from 700 px on.

What a figure shows is collected in :mod:`hpsched.figure_data`; here it is drawn. Every figure says
so in words when there is nothing to show yet, and its title says what one sees.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from hpsched import figure_data as data
from hpsched.figure_style import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    PALE,
    RED,
    SHADES,
    SKY,
    add_across,
    add_line,
    add_marks,
    empty,
    is_new,
    log_ticks,
    mark,
    styled,
)
from hpsched.present import mean_and_spread, number
from hpsched.range_test_figure import range_test_figure
from hpsched.refining_figure import refining_figure
from hpsched.schedule_figures import schedule_figure, schedule_gallery
from hpsched.summary import Summary

__all__ = [
    "curves_figure",
    "history_figure",
    "parallel_figure",
    "range_test_figure",
    "refining_figure",
    "rungs_figure",
    "schedule_figure",
    "schedule_gallery",
    "slice_figure",
]

_ENDING_COLOURS = dict(zip(data.ENDINGS, (SKY, BLUE, PALE, RED, ORANGE), strict=True))


# -- history and rungs -----------------------------------------------------------------------------


def history_figure(summary: Summary) -> go.Figure:
    """Values of full cycles against what had been spent, best so far, short cycles, confirmations.

    Pruned trials stand where their last rung's value is expected to end up after a full cycle
    (:func:`hpsched.coordinates.full_scale_values`); hovering tells the value it really had.
    """
    found = data.results(summary)
    if not found.full and not found.short:
        return empty("Search history", "no finished cycle yet")
    figure = styled(go.Figure(), _history_title(summary, found))
    _draw_best_so_far(figure, found.full, summary)
    _draw_points(figure, found.short, "pruned (expected value)", mark("x", GREY, 7))
    _draw_points(figure, found.full, "full cycle", mark("circle", BLUE, 10))
    _draw_points(figure, found.again, "fresh seed", mark("diamond-open", ORANGE, 8))
    edges = _draw_confirmed(figure, summary)
    figure.update_xaxes(title_text="spent so far (full cycles)", rangemode="tozero")
    figure.update_yaxes(title_text=_value_name(summary))
    return figure.update_yaxes(range=data.value_range(found, summary, edges))


def _history_title(summary: Summary, found: data.Results) -> str:
    values = [point.value for point in found.full]
    if not values:
        return f"No full cycle among {len(found.short)} results yet"
    best = number(min(values) if data.minimises(summary) else max(values))
    if summary.best and summary.best.confirmed:
        return f"Best single run {best}; best recipe on fresh seeds {mean_and_spread(summary.best)}"
    return f"Best single run {best}, of {len(values)} full cycles"


def _draw_points(
    figure: go.Figure, points: Sequence[data.Point], name: str, marker: dict[str, Any]
) -> None:
    if points:
        x, y = [p.spent for p in points], [p.value for p in points]
        add_marks(figure, x, y, name, marker, text=[p.text for p in points])


def _draw_best_so_far(figure: go.Figure, full: Sequence[data.Point], summary: Summary) -> None:
    if full:
        pick = np.minimum if data.minimises(summary) else np.maximum
        best = pick.accumulate([p.value for p in full]).tolist()
        spent = [p.spent for p in full]
        x, y = [*spent, max(spent[-1], summary.cost.cycles)], [*best, best[-1]]
        step = {"shape": "hv", "width": 2}
        add_line(figure, x, y, "best so far, one seed", SKY, line=step, hoverinfo="skip")


def _draw_confirmed(figure: go.Figure, summary: Summary) -> list[float]:
    """Means over fresh seeds, right of everything else; returns the ends of the error bars."""
    shown = [c for c in data.ranked(summary) if c.fresh and math.isfinite(c.mean)]
    if not shown:
        return []
    spreads = [c.spread or 0.0 for c in shown]
    add_marks(
        figure,
        [summary.cost.cycles * (1.03 + 0.03 * index) for index in range(len(shown))],
        [c.mean for c in shown],
        "confirmed, mean ± sd",
        mark("square", RED, 10),
        error_y={"type": "data", "array": spreads, "color": RED, "thickness": 2},
        text=[f"<b>trial {c.number}</b>: {mean_and_spread(c)}, {c.seeds} seeds" for c in shown],
    )
    both = zip(shown, spreads, strict=True)
    return [edge for c, spread in both for edge in (c.mean - spread, c.mean + spread)]


def rungs_figure(summary: Summary) -> go.Figure:
    """What became of the trials that reached each rung of complete cycles."""
    if not summary.rungs:
        return empty("Rungs", "no rung reached yet")
    first, last = summary.rungs[0], summary.rungs[-1]
    title = f"{first.reached} trials ran {first.steps:,} steps, {last.reached} ran {last.steps:,}"
    figure = styled(go.Figure(), title, barmode="stack", height=190 + 46 * len(summary.rungs))
    counts = data.rung_outcomes(summary)
    labels = [f"rung {rung.rung}<br>{rung.steps:,} steps" for rung in summary.rungs]
    for name, colour in _ENDING_COLOURS.items():
        values = [counts[rung.rung][name] for rung in summary.rungs]
        if any(values):
            figure.add_bar(
                y=labels,
                x=values,
                name=name,
                orientation="h",
                marker_color=colour,
                text=[value or "" for value in values],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                hovertemplate="%{x} " + name + "<extra></extra>",
            )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure.update_xaxes(title_text="trials", rangemode="tozero", tickformat="d")


# -- where good recipes lie ------------------------------------------------------------------------


def slice_figure(summary: Summary) -> go.Figure:
    """Values against each searched parameter; the best recipe is marked at its mean."""
    found, axes, best = data.results(summary), data.axes(summary), data.best_point(summary)
    if not axes or not (found.full or found.short):
        return empty("Values by parameter", "no finished cycle yet")
    rows = math.ceil(len(axes) / 2)
    figure = make_subplots(
        rows=rows, cols=2, shared_yaxes=True, vertical_spacing=0.36 / rows, horizontal_spacing=0.07
    )
    groups = (
        ("pruned (expected value)", found.short, mark("x", "#A9B0B8", 7)),
        ("full cycle", found.full, mark("circle", BLUE, 9)),
        ("best recipe", best, mark("star", RED, 16)),
    )
    for index, axis in enumerate(axes):
        cell = {"row": index // 2 + 1, "col": index % 2 + 1}
        for name, points, marker in groups:
            _draw_slice(figure, axis, name, points, marker, showlegend=index == 0, **cell)
        figure.update_xaxes(**_axis_layout(axis), **cell)
    wanted = data.value_range(found, summary, [point.value for point in best])
    figure.update_yaxes(range=wanted, nticks=6)
    figure.update_yaxes(title_text="value", col=1)
    return styled(
        figure,
        "Value against each searched parameter; the star is the best recipe",
        height=200 * rows + 110,
    )


def _draw_slice(
    figure: go.Figure,
    axis: data.Axis,
    name: str,
    points: Sequence[data.Point],
    marker: dict[str, Any],
    **more: Any,
) -> None:
    shown = [point for point in points if axis.name in point.params]
    values = [point.params[axis.name] for point in shown]
    x = [html.escape(str(value)) for value in values] if axis.categorical else values
    text = [point.text for point in shown]
    add_marks(
        figure, x, [p.value for p in shown], name, marker, text=text, legendgroup=name, **more
    )


def _axis_layout(axis: data.Axis) -> dict[str, Any]:
    if axis.categorical:
        order = [html.escape(str(value)) for value in axis.values]
        ordered = {"categoryorder": "array", "categoryarray": order}
        return {"type": "category", "title_text": axis.label, **ordered}
    if not axis.log:
        return {"type": "linear", "title_text": axis.label, "nticks": 6}
    ticks = log_ticks(axis.values[0], axis.values[-1], 5)
    return {"title_text": f"{axis.label} (log scale)", **ticks}


def parallel_figure(summary: Summary) -> go.Figure:
    """Each full cycle as a line through its parameters, coloured by its value.

    Drawn as plain lines: plotly's own parallel coordinates need WebGL, and do not print.
    """
    axes, points = data.axes(summary), data.results(summary).full
    points = [p for p in points if all(axis.name in p.params for axis in axes)]
    if not points or not axes:
        return empty("Recipes as lines", "no finished full cycle yet")
    best = {point.number for point in data.best_point(summary)}
    figure = styled(go.Figure(), "Full cycles, a line each: dark is good, red the best recipe")
    shades = dict(zip([p.number for p in points], _shades(points, summary), strict=True))
    for point in sorted(points, key=lambda p: p.number in best):  # the best on top
        line = {"width": 4} if point.number in best else {"width": 1.8}
        colour = RED if point.number in best else shades[point.number]
        heights = [axis.height(point.params[axis.name]) for axis in axes]
        hover = {"text": [point.text] * len(axes), "hovertemplate": "%{text}<extra></extra>"}
        name = f"trial {point.number}"
        add_line(figure, range(len(axes)), heights, name, colour, line=line, **hover)
    _draw_axes(figure, axes)
    _draw_colour_bar(figure, [point.value for point in points], summary)
    return figure.update_layout(height=460, margin={"t": 90, "b": 30, "l": 30}, showlegend=False)


def _shades(points: Sequence[data.Point], summary: Summary) -> list[str]:
    values = np.array([point.value for point in points])
    places = (values - values.min()) / (np.ptp(values) or 1.0)
    if not data.minimises(summary):
        places = 1 - places
    return list(sample_colorscale(SHADES, places.tolist()))


def _draw_axes(figure: go.Figure, axes: Sequence[data.Axis]) -> None:
    last = len(axes) - 1
    for index, axis in enumerate(axes):
        add_across(
            figure, "line", axis.label, index, index, y="y", line={"color": GREY, "width": 1}
        )
        side, shift = ("right", -3) if index == last else ("left", 3)
        for place, label in axis.ticks():
            style = {"font_size": 11, "bgcolor": "rgba(255,255,255,0.8)", "showarrow": False}
            figure.add_annotation(
                x=index, y=place, text=label, xanchor=side, xshift=shift, borderpad=0, **style
            )
    names = {"tickvals": list(range(len(axes))), "ticktext": [axis.label for axis in axes]}
    figure.update_xaxes(
        showline=False, side="top", ticks="", showgrid=False, range=[-0.2, last + 0.2], **names
    )
    figure.update_yaxes(visible=False, range=[-0.06, 1.06])


def _draw_colour_bar(figure: go.Figure, values: Sequence[float], summary: Summary) -> None:
    scale = {"colorscale": SHADES, "reversescale": not data.minimises(summary)}
    bar = {"title": {"text": "value"}, "thickness": 12, "nticks": 6}
    marker = {**scale, "color": [min(values), max(values)], "showscale": True, "colorbar": bar}
    add_marks(figure, [None, None], [None, None], "value", marker)


# -- learning curves -------------------------------------------------------------------------------


def curves_figure(summary: Summary, top: int = 5) -> go.Figure:
    """Training loss and logged metrics over the steps of the best ``top`` full cycles."""
    shown = data.curves(summary, top)
    metrics = sorted({m for _, curves in shown for m in curves}, key=lambda m: (m != "loss", m))
    if not metrics:
        return empty("Learning curves", "no curves of a full cycle yet")
    rows = len(metrics)
    figure = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.12 / rows)
    for row, metric in enumerate(metrics, 1):
        for (trial, curves), colour in zip(shown, COLOURS * len(shown), strict=False):
            name = f"trial {trial}"
            place = {"legendgroup": name, "showlegend": is_new(figure, name), "row": row, "col": 1}
            points = curves.get(metric, [])
            x, y = [step for step, _ in points], [value for _, value in points]
            add_line(figure, x, y, name, colour, line={"width": 2}, **place)
        seen = [v for _, curves in shown for _, v in curves.get(metric, []) if v is not None]
        label = "training loss" if metric == "loss" else html.escape(metric)
        wanted = data.robust_range(
            seen, [curves[metric][0][1] for _, curves in shown if curves.get(metric)]
        )
        figure.update_yaxes(title_text=label, range=wanted, row=row, col=1)
    figure.update_xaxes(title_text="optimizer step", row=rows, col=1)
    title = f"How the {len(shown)} best full cycles learned, step by step"
    return styled(figure, title, height=210 * rows + 130, showlegend=True)


def _value_name(summary: Summary) -> str:
    return f"value ({'lower' if data.minimises(summary) else 'higher'} is better)"
