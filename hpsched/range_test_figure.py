"""Range tests → plotly figure.

Apart from the other figures so that ``RangeTest.figure()`` needs no study.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from hpsched.figure_style import (
    COLOURS,
    GREEN,
    GREY,
    RED,
    add_across,
    add_line,
    add_marks,
    empty,
    is_new,
    log_ticks,
    mark,
    styled,
)
from hpsched.lr_curve import Proposal, RangeTest, pool
from hpsched.present import number


def range_test_figure(
    tests: Sequence[RangeTest], proposal: Proposal | None, title: str | None = None
) -> go.Figure:
    """Loss over learning rate: every step, smoothed, and where max_lr is to be searched.

    Args:
        tests: The replicates.
        proposal: What they say together; pooled here when None.
        title: Instead of a sentence that says what one sees.
    """
    if not tests:
        return empty(title or "Range test", "no range test yet")
    shown = proposal or pool(tests)
    figure = styled(go.Figure(), title or _range_test_title(shown), height=460)
    for index, test in enumerate(tests):
        _draw_sweep(figure, test, index)
    _draw_window(figure, shown)
    ends = [math.log10(end(rate for t in tests for rate in t.lrs)) for end in (min, max)]
    figure.update_xaxes(title_text="learning rate (log scale)", range=ends)
    figure.update_xaxes(**log_ticks(10 ** ends[0], 10 ** ends[1], 9))
    figure.update_yaxes(title_text="training loss", range=_loss_range(tests))
    return figure.update_layout(margin_t=88)


def _range_test_title(shown: Proposal) -> str:
    window = f"{number(shown.low, 2)} to {number(shown.high, 2)}"
    if not shown.reliable:
        return f"Range test without a clear answer: max_lr is searched from {window}"
    return f"Range test: search max_lr from {window}, around {number(shown.centre, 2)}"


def _draw_sweep(figure: go.Figure, test: RangeTest, index: int) -> None:
    colour, name = COLOURS[index % len(COLOURS)], f"replicate {index + 1}"
    smooth = test.smoothed
    rates, losses = test.lrs[: len(smooth)], test.losses[: len(smooth)]
    points = {"size": 4, "color": colour, "opacity": 0.35}
    add_marks(figure, rates, losses, f"{name}, each step", points, showlegend=False)
    add_line(figure, rates, smooth.tolist(), f"{name}, smoothed", colour)
    found = (("steepest fall", test.lr_steepest, "diamond"), ("minimum", test.lr_minimum, "circle"))
    for what, rate, symbol in found:
        if rate is not None:
            at = float(np.interp(rate, rates, smooth))
            group: dict[str, Any] = {"legendgroup": what, "showlegend": is_new(figure, what)}
            group["legendrank"] = 2000  # after the curves
            add_marks(figure, [rate], [at], what, mark(symbol, colour, 10), **group)


def _draw_window(figure: go.Figure, shown: Proposal) -> None:
    colour = GREEN if shown.reliable else GREY
    fill: dict[str, Any] = {"fillcolor": colour, "opacity": 0.12, "line_width": 0}
    add_across(figure, "rect", "window", shown.low, shown.high, **fill)
    _draw_rate(figure, "centre", shown.centre, colour, "dash", 0)
    if shown.lr_diverged is not None:
        _draw_rate(figure, "diverges at", shown.lr_diverged, RED, "dot", 1)


def _draw_rate(figure: go.Figure, name: str, rate: float, colour: str, dash: str, row: int) -> None:
    """A vertical line with its label above; rows of their own, so that labels never collide."""
    line = {"color": colour, "width": 1.5, "dash": dash}
    add_across(figure, "line", name, rate, rate, line=line)
    figure.add_annotation(  # on a log axis an annotation's x is the exponent, a shape's is not
        x=math.log10(rate),
        y=1,
        yref="paper",
        yanchor="bottom",
        yshift=15 * row,
        xanchor="right",
        text=f"{name} {number(rate, 2)}",
        showarrow=False,
        font={"color": colour, "size": 12},
    )


def _loss_range(tests: Sequence[RangeTest]) -> list[float] | None:
    """From the lowest loss to a little above the start: an explosion must not squash the curve."""
    curves = [np.array(test.losses[: len(test.smoothed)]) for test in tests]
    curves = [curve for curve in curves if len(curve)]
    if not curves:
        return None
    low = min(float(curve.min()) for curve in curves)
    top = max(float(np.median(curve[: max(3, len(curve) // 10)])) for curve in curves)
    height = (top - low) or abs(top) or 1.0
    return [low - 0.08 * height, top + 0.45 * height]
