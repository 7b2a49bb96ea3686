"""What all figures share: colours, fonts, the empty figure, and the usual traces.

Colours that colour-blind people tell apart: Okabe & Ito, "Color Universal Design" (2008).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

BLUE, RED, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PINK, INK, GREY, PALE = "#56B4E9", "#CC79A7", "#1B1F24", "#7A828C", "#C3C9D0"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, INK)
SHADES = "Viridis"

_AXIS = {
    "automargin": True,
    "gridcolor": "#E9ECEF",
    "linecolor": PALE,
    "tickcolor": PALE,
    "ticks": "outside",
    "showline": True,
    "title": {"font": {"size": 13}, "standoff": 8},
    "zeroline": False,
}
TEMPLATE = go.layout.Template(
    layout={
        "colorway": COLOURS,
        "font": {"family": "system-ui, 'Segoe UI', Arial, sans-serif", "size": 13, "color": INK},
        "height": 420,
        "hoverlabel": {"align": "left", "font": {"size": 12}},
        "legend": {
            "orientation": "h",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "traceorder": "normal",
        },
        # A button of plotly.js sends the chart to plotly's cloud; nothing here leaves the machine.
        "modebar": {"remove": ["sendChartToCloud", "lasso2d", "select2d", "autoScale2d"]},
        "margin": {"l": 64, "r": 20, "t": 64, "b": 56},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "title": {"font": {"size": 16}, "x": 0.01, "xanchor": "left", "y": 0.98, "yanchor": "top"},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)


def styled(figure: go.Figure, title: str, **layout: Any) -> go.Figure:
    """The figure in the common style, with this title and other layout."""
    text = html.escape(title, quote=False)
    return figure.update_layout(template=TEMPLATE, title_text=text, **layout)


def empty(title: str, text: str) -> go.Figure:
    """A figure that says in words that there is nothing to draw yet."""
    figure = styled(go.Figure(), title, height=160)
    font = {"size": 16, "color": GREY}
    figure.add_annotation(
        text=text, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font=font
    )
    figure.update_xaxes(visible=False)
    return figure.update_yaxes(visible=False)


def mark(symbol: str, colour: str, size: int) -> dict[str, Any]:
    """A marker that stays visible where others lie under it."""
    edge = {"color": "white", "width": 0 if symbol == "x" else 1}  # it would eat a cross's strokes
    return {"symbol": symbol, "color": colour, "size": size, "line": edge}


def add_line(
    figure: go.Figure, x: Sequence[Any], y: Sequence[Any], name: str, colour: str, **more: Any
) -> None:
    """Draw a curve."""
    line = {"color": colour, "width": 2.5, **more.pop("line", {})}
    figure.add_scatter(x=list(x), y=list(y), name=name, mode="lines", line=line, **more)


def add_marks(
    figure: go.Figure,
    x: Sequence[Any],
    y: Sequence[Any],
    name: str,
    marker: dict[str, Any],
    **more: Any,
) -> None:
    """Draw points; ``text``, if given, is all that hovering tells."""
    if "text" in more:
        more["hovertemplate"] = "%{text}<extra></extra>"
    figure.add_scatter(x=list(x), y=list(y), name=name, mode="markers", marker=marker, **more)
