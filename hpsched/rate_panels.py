"""Panels stacked over one axis of learning rates: what the figures about max_lr share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from hpsched import range_test_data as data
from hpsched.figure_style import GREEN, GREY, add_across, add_line, log_ticks
from hpsched.present import rate_text
from hpsched.proposal import Proposal

GAP = 18  # pixels between panels
HEAD, FOOT = 92, 100  # pixels: labels under title or toolbar above, axis and legend below


def stack(figure: go.Figure, heights: Sequence[int]) -> list[str]:
    """Panels of these heights (pixels), the first on top; names of their value axes."""
    inner = sum(heights) + GAP * (len(heights) - 1)
    names, top = [], inner
    for index, height in enumerate(heights):
        names.append(f"y{index + 1}" if index else "y")
        update_axis(figure, names[-1], domain=[(top - height) / inner, top / inner])
        top -= height + GAP
    figure.update_xaxes(anchor=names[-1])
    figure.update_layout(height=inner + HEAD + FOOT, margin={"t": HEAD, "b": FOOT})
    return names


def update_axis(figure: go.Figure, axis: str, **look: Any) -> None:
    """Change the look of the value axis of this name."""
    figure.update_layout({axis.replace("y", "yaxis"): look})


def scale_rates(figure: go.Figure, low: float, high: float, title: str) -> None:
    """The axis of rates, from ``low`` to ``high``, with round numbers on it."""
    ticks = log_ticks(low, high, 9)
    ticks["ticktext"] = [rate_text(place) for place in ticks["tickvals"]]
    figure.update_xaxes(title_text=f"{title} (log scale)", **ticks, tickangle=0)
    figure.update_xaxes(range=[math.log10(low), math.log10(high)], tickfont={"size": 11})


def trust(shown: Proposal) -> str:
    """Green for a proposal, grey for one that is no more than a guess."""
    return GREEN if shown.reliable else GREY


def draw_window(figure: go.Figure, shown: Proposal) -> None:
    """The window, shaded through all panels, and its centre."""
    fill: dict[str, Any] = {"fillcolor": trust(shown), "opacity": 0.12, "line_width": 0}
    add_across(figure, "rect", "window", shown.low, shown.high, **fill)
    name = "centre" if shown.reliable else "guess"
    draw_rate(figure, name, shown.centre, {"color": trust(shown), "dash": "dash"})


def draw_rate(
    figure: go.Figure,
    name: str,
    rate: float,
    look: dict[str, str],
    row: int = 0,
) -> None:
    """A vertical line with its label above; rows of their own, so that labels never collide."""
    line = {"width": 1.5, **look}
    # Above, not below: a grid line would hide it; plotly's "between" takes no line over all panels.
    add_across(figure, "line", name, rate, rate, line=line, layer="above", opacity=0.8)
    figure.add_annotation(  # on a log axis an annotation's x is the exponent, a shape's is not
        x=math.log10(rate),
        y=1,
        yref="paper",
        yanchor="bottom",
        yshift=15 * row,
        xanchor="right" if place_of(figure, rate) > 0.4 else "left",
        text=f"{name} {rate_text(rate)}",
        showarrow=False,
        font={"color": look["color"], "size": 12},
    )


def place_of(figure: go.Figure, rate: float) -> float:
    """Where a rate stands between the axis's ends, 0 to 1."""
    low, high = figure.layout.xaxis.range
    return float((math.log10(rate) - low) / (high - low))


def draw_bars(figure: go.Figure, shown: Proposal, axis: str, at: float = 0.0) -> None:
    """The window as a thin bar, the interval of its centre as a thick one."""
    bars = [("window", (shown.low, shown.high), 2), ("interval", data.interval(shown), 7)]
    for name, ends, width in bars:
        if ends is not None:
            drawn = {"yaxis": axis, "showlegend": False, "hoverinfo": "skip"}
            line = {"width": width}
            add_line(figure, ends, (at, at), name, trust(shown), line=line, opacity=0.6, **drawn)
