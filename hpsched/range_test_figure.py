"""Range tests → plotly figure: the loss over the rate, and below it what each rule says.

Top to bottom, over one axis of rates: the training loss (with the validation loss, if that was
measured), a panel for each other validation metric, and a strip with one row per rule. The window
and the divergence edge run through all of them.

Apart from the other figures so that ``RangeTest.figure()`` needs no study.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from hpsched import range_test_data as data
from hpsched.figure_style import (
    BLUE,
    FAINT,
    GREY,
    INK,
    ORANGE,
    PINK,
    RED,
    SHADES,
    SKY,
    add_line,
    add_marks,
    empty,
    mark,
    styled,
    subtitled,
)
from hpsched.lr_curve import RangeTest
from hpsched.present import capitalised, rate_text
from hpsched.proposal import Proposal, pool
from hpsched.rate_panels import (
    draw_bars,
    draw_rate,
    draw_window,
    place_of,
    scale_rates,
    stack,
    trust,
    update_axis,
)

CURVES = (BLUE, ORANGE, PINK, SKY, INK)  # green is the window's, red the divergence edge's
POINTS = 1500  # single steps of a group that are drawn, at most
BANDED = 3  # sweeps of one weight decay from which on they are a median in a band
LOSS, METRIC, ROW = 300, 110, 19  # pixels: two kinds of panel, a strip's row
TEXT = 0.12  # of the axis's length: the widest value beside a mark, on a telephone


def range_test_figure(
    tests: Sequence[RangeTest], proposal: Proposal | None, title: str | None = None
) -> go.Figure:
    """Loss over learning rate: every step, smoothed, and where max_lr is to be searched.

    Three or more sweeps with the same weight decay are drawn as their median in a band from the
    lowest to the highest; sweeps with different ones have different colours.

    Args:
        tests: The replicates.
        proposal: What they say together; pooled here when None.
        title: Instead of a sentence that says what one sees.
    """
    if not tests:
        return empty(title or "Range test", "no range test yet")
    shown = proposal or pool(tests)
    groups = data.groups(tests)
    rows = data.rows(groups, shown)
    others = [metric for metric in data.metrics(tests) if metric != "loss"]
    figure = styled(go.Figure(), title or _title(shown), hovermode="closest")
    strip = [ROW * len(rows)] if rows else []
    axes = stack(figure, [LOSS, *[METRIC] * len(others), *strip])
    _scale_axes(figure, tests, shown, dict(zip(others, axes[1:], strict=False)))
    draw_window(figure, shown)
    if shown.lr_diverged is not None:
        edge = {"color": RED, "dash": "dot"}
        draw_rate(figure, "diverges at", shown.lr_diverged, edge, row=1)
    for group, colour in zip(groups, _colours(len(groups)), strict=True):
        _draw_losses(figure, group, colour)
        for metric, axis in zip(["loss", *others], axes, strict=False):
            _draw_validation(figure, group, colour, metric, axis)
    _explain(figure, groups)
    if rows:
        _draw_strip(figure, shown, rows, _colours(len(groups)), axes[-1])
    return subtitled(figure, f"{capitalised(shown.reason)}.")


def _title(shown: Proposal) -> str:
    window = f"max_lr from {data.span(shown.low, shown.high)}"
    if not shown.reliable:
        return f"Not reliable: {window}"
    return f"Search {window}, around {rate_text(shown.centre)}"


def _colours(count: int) -> list[str]:
    if count <= len(CURVES):
        return list(CURVES[:count])
    return list(sample_colorscale(SHADES, [0.2 + 0.65 * i / (count - 1) for i in range(count)]))


# ------------------------------------------------------------------ axes


def _scale_axes(
    figure: go.Figure, tests: Sequence[RangeTest], shown: Proposal, others: dict[str, str]
) -> None:
    low, high = data.rate_range(tests, shown)
    scale_rates(figure, low, high, "learning rate")
    label = "loss" if "loss" in data.metrics(tests) else "training loss"
    update_axis(figure, "y", title={"text": label}, range=data.loss_range(tests))
    for metric, axis in others.items():
        text = {"text": html.escape(metric)}
        update_axis(figure, axis, title=text, range=data.metric_range(tests, metric), nticks=4)


# ------------------------------------------------------------------ curves


def _draw_losses(figure: go.Figure, group: data.Group, colour: str) -> None:
    """Every step of every sweep, faint, and the smooth lines or their median in a band."""
    curves = data.smoothed(group.tests)
    name = "smoothed"
    points = {"size": 4, "color": colour, "opacity": 0.4}
    if len(curves) >= BANDED:
        name = f"median of {len(curves)} sweeps, smoothed"
        points = {"size": 3, "color": colour, "opacity": 0.25}
    steps = [(lr, y) for t in group.tests for lr, y in zip(t.lrs, t.losses, strict=False)]
    steps = steps[:: math.ceil(len(steps) / POINTS) or 1]
    add_marks(
        figure,
        [lr for lr, _ in steps],
        [y for _, y in steps],
        group.named("each step"),
        points,
        **_linked(group),
        **_hover("loss"),
    )
    if len(curves) >= BANDED:
        curves = [_draw_band(figure, group, curves, colour)]
    drawn = {**_linked(group), **_hover("loss"), "showlegend": True}
    add_line(figure, *_joined(curves), group.name or name, colour, **drawn)


def _draw_band(
    figure: go.Figure, group: data.Group, curves: Sequence[data.Curve], colour: str
) -> data.Curve:
    """From the lowest curve to the highest; returns their median."""
    rates, levels = data.levels(curves)
    figure.add_scatter(
        x=[*rates.tolist(), *rates[::-1].tolist()],
        y=_rounded([*levels.min(axis=0), *levels.max(axis=0)[::-1]]),
        name=group.named("lowest to highest"),
        mode="lines",
        line={"width": 0, "color": colour},
        fill="toself",
        fillcolor=colour,
        opacity=0.2,
        hoverinfo="skip",
        **_linked(group),
    )
    return data.Curve(rates, np.median(levels, axis=0))


def _draw_validation(
    figure: go.Figure, group: data.Group, colour: str, metric: str, axis: str
) -> None:
    curves = data.validated(group.tests, metric)
    if not curves:
        return
    if len(curves) >= BANDED:
        rates, levels = data.levels(curves)
        curves = [data.Curve(rates, np.median(levels, axis=0))]
    name = f"validation {html.escape(metric)}"
    line = {"dash": "6px,3px", "width": 2}
    drawn = {**_linked(group), **_hover(name), "yaxis": axis}
    add_line(figure, *_joined(curves), group.named(name), colour, line=line, **drawn)


def _linked(group: data.Group) -> dict[str, Any]:
    """A click on the group's name in the legend hides all that belongs to it."""
    return {"legendgroup": group.name or "sweeps", "showlegend": False}


def _hover(what: str) -> dict[str, str]:
    return {"hovertemplate": f"rate %{{x:.3g}}<br>{what} %{{y:.4g}}"}


def _joined(curves: Iterable[data.Curve]) -> tuple[list[float | None], list[float | None]]:
    """The curves as one trace, with a gap between them."""
    x: list[float | None] = []
    y: list[float | None] = []
    for curve in curves:
        x += [*curve.rates.tolist(), None]
        y += [*_rounded(curve.values), None]
    return x[:-1], y[:-1]


def _rounded(values: Iterable[float]) -> list[float]:
    """To the digits that a figure can show: the files get shorter."""
    return [float(f"{value:.6g}") for value in values]


def _explain(figure: go.Figure, groups: Sequence[data.Group]) -> None:
    """What the legend says beside the curves' names: of points, band and dashes, once each."""
    colour = GREY if len(groups) > 1 else CURVES[0]
    looks: dict[str, dict[str, Any]] = {
        "each step": {"mode": "markers", "marker": {"size": 5, "color": colour, "opacity": 0.5}},
        "lowest to highest": {
            "mode": "markers",
            "marker": {"size": 12, "symbol": "square", "color": colour, "opacity": 0.25},
        },
        "validation": {
            "mode": "lines",
            "line": {"color": colour, "dash": "6px,3px", "width": 2},
        },
    }
    drawn = [str(trace.name) for trace in figure.data]
    for name, look in looks.items():
        if any(name in one for one in drawn):
            figure.add_scatter(x=[None], y=[None], name=name, hoverinfo="skip", **look)


# ------------------------------------------------------------------ rules


def _draw_strip(
    figure: go.Figure, shown: Proposal, rows: Sequence[data.Row], colours: list[str], axis: str
) -> None:
    """A row per rule: a tick for each sweep, a diamond and the value for their median."""
    places = list(range(len(rows)))
    labels = {"tickvals": places, "ticktext": [row.label for row in rows], "ticks": ""}
    look = {"range": [len(rows) - 0.4, -0.6], "tickfont": {"size": 11}, "gridcolor": FAINT}
    update_axis(figure, axis, **labels, **look)
    draw_bars(figure, shown, axis)
    _draw_ticks(figure, rows, colours, axis)
    _draw_values(figure, rows, [shown.centre, shown.lr_diverged or shown.centre], axis)
    add_marks(
        figure,
        [row.rate for row in rows],
        places,
        "rule",
        {**mark("diamond", INK, 9), "color": [trust(shown), *[INK] * (len(rows) - 1)]},
        text=[row.hover for row in rows],
        yaxis=axis,
        showlegend=False,
    )


def _draw_values(
    figure: go.Figure, rows: Sequence[data.Row], lines: Sequence[float], axis: str
) -> None:
    """Each row's rate in figures, beyond all of its marks."""
    sides = [_beside(figure, row.ends, lines) for row in rows]
    ends = {"left": min, "right": max}
    figure.add_scatter(
        x=[
            ends[side](row.ends) if side in ends else row.rate
            for row, side in zip(rows, sides, strict=True)
        ],
        y=list(range(len(rows))),
        yaxis=axis,
        name="rate",
        mode="text",
        text=[f"\u00a0\u00a0{rate_text(row.rate)}\u00a0\u00a0" for row in rows],
        textposition=[f"middle {side if side in ends else 'right'}" for side in sides],
        textfont={"size": 11},
        showlegend=False,
        hoverinfo="skip",
    )


def _beside(figure: go.Figure, ends: tuple[float, float], lines: Sequence[float]) -> str:
    """On which side of a row's marks there is room for its value, best with no line through it."""
    low, high = (place_of(figure, end) for end in ends)
    spans = {"right": (high, high + TEXT), "left": (low - TEXT, low)}
    free = {side: span for side, span in spans.items() if span[0] >= 0 and span[1] <= 1}
    clear = [
        side
        for side, (start, stop) in free.items()
        if not any(start < place_of(figure, line) < stop for line in lines)
    ]
    return next(iter([*clear, *free]), "centre")


def _draw_ticks(figure: go.Figure, rows: Sequence[data.Row], colours: list[str], axis: str) -> None:
    ticks = [(rate, place, group) for place, row in enumerate(rows) for rate, group in row.ticks]
    line = {"width": 1.5, "color": [colours[group] for *_, group in ticks]}
    add_marks(
        figure,
        [rate for rate, *_ in ticks],
        [place for _, place, _ in ticks],
        "rule, each sweep",
        {"symbol": "line-ns", "size": 9, "line": line},
        yaxis=axis,
        showlegend=False,
        hoverinfo="skip",
    )
