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
from plotly.subplots import make_subplots

from hpsched import evidence
from hpsched import figure_data as data
from hpsched.comparison_figures import histories_figure, super_convergence_figure
from hpsched.errors import UsageError
from hpsched.figure_style import (
    BLUE,
    COLOURS,
    DIM,
    GREY,
    ORANGE,
    PALE,
    RAMP,
    RED,
    SKY,
    VEIL,
    add_across,
    add_line,
    add_marks,
    empty,
    is_new,
    log_ticks,
    mark,
    shortened,
    styled,
    subtitled,
)
from hpsched.ledger import best_so_far
from hpsched.present import mean_and_spread, number
from hpsched.range_test_figure import range_test_figure
from hpsched.refining_figure import refining_figure
from hpsched.schedule_figures import schedule_figure, schedule_gallery
from hpsched.summary import Summary

__all__ = [
    "curves_figure",
    "histories_figure",
    "history_figure",
    "parallel_figure",
    "range_test_figure",
    "refining_figure",
    "rungs_figure",
    "schedule_figure",
    "schedule_gallery",
    "slice_figure",
    "study_figure",
    "super_convergence_figure",
]

CONFIRMED = 8  # confirmed recipes in the history, at most
FEW = 6  # trials, below which each has its own tick
CROWD = 60  # results from which on they are drawn smaller
METRICS = 6  # panels of learning curves, at most
_ENDING_COLOURS = dict(zip(data.ENDINGS, (SKY, BLUE, PALE, RED, ORANGE), strict=True))


def study_figure(summary: Summary, name: str) -> go.Figure:
    """A study's figure by its name, see :meth:`hpsched.Summary.figure`.

    Raises:
        UsageError: No such figure.
    """
    draw = {
        "history": history_figure,
        "rungs": rungs_figure,
        "slice": slice_figure,
        "parallel": parallel_figure,
        "curves": curves_figure,
        "schedule": _best_schedule,
        "range_test": _first_range_test,
    }
    if name not in draw:
        raise UsageError(f"no figure is named {name!r}: there are {', '.join(draw)}.")
    return draw[name](summary)


def _best_schedule(summary: Summary) -> go.Figure:
    best = summary.best
    if best is None or not best.total_steps:
        return empty("The best schedule", "no finished full cycle yet")
    return schedule_figure(best.recipe, best.total_steps, best.policy)


def _first_range_test(summary: Summary) -> go.Figure:
    sweeps = evidence.sweeps(run.trial for run in summary.runs)
    ours = [sweep for sweep in sweeps if sweep.context_key == sweeps[0].context_key]
    known = summary.windows.get(ours[0].context_key) if ours else None
    found = known.evidence if known else None
    return range_test_figure(
        [evidence.range_test(sweep) for sweep in ours], found.prior if found else None
    )


# -- history and rungs -----------------------------------------------------------------------------


def history_figure(summary: Summary) -> go.Figure:
    """Values of full cycles against what had been spent, best so far, short cycles, confirmations.

    Pruned trials stand where their last rung's value is expected to end up after a full cycle
    (:func:`hpsched.coordinates.full_scale_values`); hovering tells the value it really had.
    """
    found, shown = data.results(summary), data.shown(summary)
    if not found.full and not found.short:
        return empty("Search history", "no finished cycle yet")
    figure = styled(go.Figure(), _history_title(summary, found))
    size = 10 if len(shown.full) < CROWD else 6
    _draw_points(figure, shown.short, "pruned (expected value)", mark("x", GREY, size - 3))
    _draw_points(figure, shown.full, "full cycle", mark("circle", BLUE, size))
    _draw_best_so_far(figure, summary)
    _draw_points(figure, shown.again, "fresh seed", mark("diamond-open", ORANGE, 8))
    edges = _draw_confirmed(figure, summary)
    figure.update_xaxes(title_text="spent so far (full cycles)", rangemode="tozero")
    figure.update_yaxes(title_text=_value_name(summary))
    figure.update_yaxes(range=data.value_range(found, summary, edges))
    return _sampled(figure, summary)


def _sampled(
    figure: go.Figure, summary: Summary, kinds: Sequence[str] = ("full", "short", "again")
) -> go.Figure:
    """The figure, with how many of the results it shows if not all."""
    text = data.sample_text(summary, kinds)
    return subtitled(figure, text) if text else figure


def _history_title(summary: Summary, found: data.Results) -> str:
    values = [point.value for point in found.full]
    if not values:
        return f"No full cycle among {len(found.short)} results yet"
    best = number(min(values) if data.minimises(summary) else max(values))
    if summary.best and summary.best.confirmed:
        return f"Best single run {best}; best recipe on fresh seeds {mean_and_spread(summary.best)}"
    return f"Best single run {best}, of {len(values):,} full cycles"


def _draw_points(
    figure: go.Figure, points: Sequence[data.Point], name: str, marker: dict[str, Any]
) -> None:
    if points:
        x, y = [p.spent for p in points], [p.value for p in points]
        add_marks(figure, x, y, name, marker, text=[p.text for p in points])


def _draw_best_so_far(figure: go.Figure, summary: Summary) -> None:
    if steps := best_so_far(summary.runs, data.minimises(summary)):
        x, y = zip(*steps, (summary.cost.cycles, steps[-1][1]), strict=True)
        step = {"shape": "hv", "width": 2}
        add_line(figure, x, y, "best so far, one seed", SKY, line=step, hoverinfo="skip")


def _draw_confirmed(figure: go.Figure, summary: Summary) -> list[float]:
    """Means over fresh seeds, right of everything else; returns the ends of the error bars."""
    confirmed = [c for c in data.ranked(summary) if c.fresh and math.isfinite(c.mean)]
    shown = confirmed[:CONFIRMED]
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
    title = f"{first.reached:,} trial{'s' * (first.reached != 1)} ran {first.steps:,} steps"
    if last is not first:
        title += f", {last.reached:,} ran {last.steps:,}"
    figure = styled(
        go.Figure(),
        title,
        barmode="stack",
        height=190 + 46 * len(summary.rungs),
        showlegend=True,  # of a single colour, too
    )
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
    whole = {"dtick": 1} if first.reached < FEW else {}
    return figure.update_xaxes(title_text="trials", rangemode="tozero", tickformat="d", **whole)


# -- where good recipes lie ------------------------------------------------------------------------


def slice_figure(summary: Summary) -> go.Figure:
    """Values against each searched parameter; the best recipe is marked at its mean."""
    found, shown = data.results(summary), data.shown(summary)
    axes, best = data.axes(summary), data.best_point(summary)
    if not axes or not (found.full or found.short):
        return empty("Values by parameter", "no finished cycle yet")
    rows = math.ceil(len(axes) / 2)
    figure = make_subplots(
        rows=rows, cols=2, shared_yaxes=True, vertical_spacing=0.36 / rows, horizontal_spacing=0.07
    )
    size = 9 if len(shown.full) < CROWD else 5
    groups = (
        ("pruned (expected value)", shown.short, mark("x", DIM, size - 2)),
        ("full cycle", shown.full, mark("circle", BLUE, size)),
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
    said = "Value against each searched parameter; the star is the best recipe"
    return _sampled(styled(figure, said, height=200 * rows + 110), summary, ("full", "short"))


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
    text = [_at_axis(point, axis) for point in shown]
    add_marks(
        figure, x, [p.value for p in shown], name, marker, text=text, legendgroup=name, **more
    )


def _axis_layout(axis: data.Axis) -> dict[str, Any]:
    if axis.categorical:
        order = [html.escape(str(value)) for value in axis.values]
        ordered = {"categoryorder": "array", "categoryarray": order}
        short = [shortened(str(value)) for value in axis.values]
        ticks = {"tickvals": order, "ticktext": short}
        return {"type": "category", "title_text": axis.label, **ordered, **ticks}
    if not axis.log:
        return {"type": "linear", "title_text": axis.label, "nticks": 6}
    ticks = log_ticks(axis.values[0], axis.values[-1], 5)
    return {"title_text": f"{axis.label} (log scale)", **ticks}


def parallel_figure(summary: Summary) -> go.Figure:
    """Each full cycle as a line through its parameters, coloured by its value.

    Drawn as plain lines: plotly's own parallel coordinates need WebGL, and do not print.
    """
    axes, points = data.axes(summary), data.shown(summary).full
    points = [p for p in points if all(axis.name in p.params for axis in axes)]
    if not points or not axes:
        return empty("Recipes as lines", "no finished full cycle yet")
    best = {point.number for point in data.best_point(summary)}
    figure = styled(go.Figure(), "Full cycles, a line each: the stronger the better, red the best")
    shades = _shades(points, summary)
    for shade, colour in enumerate(RAMP):  # the better on top
        drawn = [p for p, s in zip(points, shades, strict=True) if s == shade]
        _draw_lines(figure, axes, drawn, "full cycle", colour, 1.8)
    _draw_lines(figure, axes, [p for p in points if p.number in best], "best recipe", RED, 4)
    _draw_axes(figure, axes)
    _draw_colour_bar(figure, [point.value for point in points], summary)
    figure.update_layout(height=460, margin={"t": 90, "b": 30, "l": 30}, showlegend=False)
    return _sampled(figure, summary, ["full"])


def _shades(points: Sequence[data.Point], summary: Summary) -> list[int]:
    """Place in :data:`RAMP` of each point, by value between the range's ends."""
    values = np.array([point.value for point in points])
    low, high = data.robust_range(values.tolist()) or [0.0, 1.0]
    places = np.clip((values - low) / (high - low), 0, 1)
    if data.minimises(summary):
        places = 1 - places
    return list(np.minimum((places * len(RAMP)).astype(int), len(RAMP) - 1).tolist())


def _draw_lines(
    figure: go.Figure,
    axes: Sequence[data.Axis],
    points: Sequence[data.Point],
    name: str,
    colour: str,
    width: float,
) -> None:
    """The points as one trace, with a gap between their lines."""
    if not points:
        return
    x = [*range(len(axes)), None] * len(points)
    y = [v for p in points for v in (*(axis.height(p.params[axis.name]) for axis in axes), None)]
    said = [line for p in points for line in (*(_at_axis(p, axis) for axis in axes), "")]
    hover = {"text": said, "hoverinfo": "text"}
    add_line(figure, x[:-1], y[:-1], name, colour, line={"width": width}, **hover)


def _at_axis(point: data.Point, axis: data.Axis) -> str:
    return (
        f"{point.head}<br>{axis.label} = {shortened(data.cell_text(point.params[axis.name]), 60)}"
    )


def _draw_axes(figure: go.Figure, axes: Sequence[data.Axis]) -> None:
    last = len(axes) - 1
    for index, axis in enumerate(axes):
        add_across(
            figure, "line", axis.label, index, index, y="y", line={"color": GREY, "width": 1}
        )
        side, shift = ("right", -3) if index == last else ("left", 3)
        for place, label in axis.ticks():
            style = {"font_size": 11, "bgcolor": VEIL, "showarrow": False}
            figure.add_annotation(
                x=index, y=place, text=label, xanchor=side, xshift=shift, borderpad=0, **style
            )
    names = {"tickvals": list(range(len(axes))), "ticktext": [axis.label for axis in axes]}
    figure.update_xaxes(
        showline=False, side="top", ticks="", showgrid=False, range=[-0.2, last + 0.2], **names
    )
    figure.update_yaxes(visible=False, range=[-0.06, 1.06])


def _draw_colour_bar(figure: go.Figure, values: Sequence[float], summary: Summary) -> None:
    low, high = data.robust_range(values) or [0.0, 1.0]
    shades = RAMP[::-1] if data.minimises(summary) else RAMP
    edges = [place / len(shades) for place in range(len(shades) + 1)]
    ends = zip(edges, edges[1:], shades, strict=False)
    scale = [[edge, shade] for start, stop, shade in ends for edge in (start, stop)]
    bar = {"title": {"text": "value"}, "thickness": 12, "nticks": 6}
    marker = {"colorscale": scale, "color": [low, high], "showscale": True, "colorbar": bar}
    add_marks(figure, [None, None], [None, None], "value", {**marker, "cmin": low, "cmax": high})


# -- learning curves -------------------------------------------------------------------------------


def curves_figure(summary: Summary, top: int = 5) -> go.Figure:
    """Training loss and logged metrics over the steps of the best ``top`` full cycles."""
    shown = data.curves(summary, top)
    metrics = sorted({m for _, curves in shown for m in curves}, key=lambda m: (m != "loss", m))
    if not metrics:
        return empty("Learning curves", "no curves of a full cycle yet")
    left_out, metrics = metrics[METRICS:], metrics[:METRICS]
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
    styled(figure, title, height=210 * rows + 130, showlegend=True)
    said = f"Shown: {rows} of {rows + len(left_out)} metrics, in the order of their names."
    return subtitled(figure, said) if left_out else figure


def _value_name(summary: Summary) -> str:
    return f"value ({'lower' if data.minimises(summary) else 'higher'} is better)"
