"""What all figures share: colours, fonts, the empty figure, and the usual traces.

Colours that colour-blind people tell apart: Okabe & Ito, "Color Universal Design" (2008).
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from hpsched.present import number

BLUE, RED, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PINK, INK, GREY, PALE = "#56B4E9", "#CC79A7", "#1B1F24", "#7A828C", "#C3C9D0"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, INK)
PAPER, GRID, FAINT, VEIL = "white", "#E9ECEF", "#F3F5F7", "rgba(255,255,255,0.8)"
DIM = "#A9B0B8"  # of points that matter little
#: From weak to strong: as visible as what it shows is good.
RAMP = (
    "#D3DAE2", "#B4C6DA", "#8FB2D2", "#6A9DC9", "#4488BF", "#2472AE", "#0F5A92", "#063F6B",
)  # fmt: skip
SHADES = "Viridis"
#: What each colour becomes on a dark page; colours of other kinds are legible on both.
DARK = {
    INK: "#E6E9ED", GREY: "#9AA5B1", PALE: "#4C5763", DIM: "#6B7683",
    PAPER: "#1B2128", GRID: "#2C343D", FAINT: "#252C34", VEIL: "rgba(27,33,40,0.8)",
    BLUE: "#4BA3DB", RED: "#FF7A3D", GREEN: "#2BC39A", ORANGE: "#F2B632",
    SKY: "#93CDF2", PINK: "#E39AC4",
    **dict(zip(RAMP, (
        "#434F5C", "#40566C", "#385A78", "#3A6F9C", "#4288BF", "#5AA3DA", "#86C0EC", "#BFE0FA",
    ), strict=True)),
}  # fmt: skip
TICKS = 7  # on an axis, at most
SUBTITLE_WIDTH, SUBTITLE_LINE = 60, 16  # letters that a telephone shows, pixels of a line

_AXIS = {
    "automargin": True,
    "gridcolor": GRID,
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
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "title": {"font": {"size": 16}, "x": 0.01, "xanchor": "left", "y": 0.98, "yanchor": "top"},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)


def styled(figure: go.Figure, title: str, **layout: Any) -> go.Figure:
    """The figure in the common style, with this title and other layout."""
    text = html.escape(title, quote=False)
    return figure.update_layout(template=TEMPLATE, title_text=text, **layout)


def subtitled(figure: go.Figure, text: str) -> go.Figure:
    """The figure with a line or more of small text under its title, and room for them."""
    lines = [html.escape(line, quote=False) for line in _wrapped(text)]
    room = SUBTITLE_LINE * len(lines)
    subtitle = {"text": "<br>".join(lines), "font": {"size": 12, "color": GREY}}
    height, top = _height_and_top(figure)
    return figure.update_layout(title_subtitle=subtitle, height=height + room, margin_t=top + room)


def titles(figure: go.Figure) -> tuple[str, str]:
    """The figure's title and subtitle, as plain text on one line each."""
    title = figure.layout.title
    said = [(text or "").replace("<br>", " ") for text in (title.text, title.subtitle.text)]
    return html.unescape(said[0]), html.unescape(said[1])


def untitled(figure: go.Figure) -> go.Figure:
    """The figure without title and subtitle, for a page that says them in its own text."""
    lines = figure.layout.title.subtitle.text
    room = SUBTITLE_LINE * (lines.count("<br>") + 1) if lines else 0
    height, top = _height_and_top(figure)
    figure.update_layout(title_text=None, title_subtitle_text=None)
    return figure.update_layout(height=height - room, margin_t=max(top - room - 30, 26))


def _height_and_top(figure: go.Figure) -> tuple[int, int]:
    layout, default = figure.layout, TEMPLATE.layout
    return int(layout.height or default.height), int(layout.margin.t or default.margin.t)


def _wrapped(text: str) -> list[str]:
    """As few lines as a telephone allows, of about equal length."""
    fewest = textwrap.wrap(text, SUBTITLE_WIDTH)
    widths = range(len(text) // max(len(fewest), 1), SUBTITLE_WIDTH)
    balanced = (textwrap.wrap(text, width) for width in widths if width)
    return next((lines for lines in balanced if len(lines) == len(fewest)), fewest)


def shortened(text: str, most: int = 20) -> str:
    """``text`` as plotly's HTML, cut to so many letters: a long label leaves no room for a plot."""
    return html.escape(text if len(text) <= most else text[: most - 1] + "…")


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
    edge = {"color": PAPER, "width": 0 if symbol == "x" else 1}  # it would eat a cross's strokes
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


def add_across(
    figure: go.Figure, kind: str, name: str, x0: float, x1: float, y: str = "paper", **more: Any
) -> None:
    """A shape over the whole height of the plot, under the curves."""
    place = {"x0": x0, "x1": x1, "y0": 0, "y1": 1, "yref": y}
    figure.add_shape(type=kind, name=name, **{"layer": "below", **place, **more})


def is_new(figure: go.Figure, name: str) -> bool:
    """Whether no trace of this name has been drawn yet, so that the legend names it once."""
    return all(trace.name != name for trace in figure.data)


def log_ticks(low: float, high: float, most: int) -> dict[str, Any]:
    """A log axis with a few round numbers on it; plotly's own choice crowds or runs dry."""
    places = round_numbers(low, high, most)
    return {"type": "log", "tickvals": places, "ticktext": [number(place) for place in places]}


def round_numbers(low: float, high: float, most: int = TICKS) -> list[float]:
    """At most ``most`` round numbers from ``low`` to ``high`` for a log axis, or its two ends."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        found = [float(f"{d}e{k}") for k in range(first, last + 1) for d in digits]
        found = [value for value in found if low / 1.001 <= value <= high * 1.001]
        if len(found) <= most:
            return found if len(found) > 1 else [low, high]
    return found[:: math.ceil(len(found) / most)]
