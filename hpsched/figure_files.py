"""Figures → files, by suffix: a page that needs no network, or an image drawn by Kaleido."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpsched.errors import HpschedError, UsageError

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from jinja2 import Environment

IMAGES = (".png", ".svg", ".pdf")
FIGURES = (".html", *IMAGES)
WIDTH = 900  # of an image, in pixels; a PNG has twice as many


def check_path(path: Path, suffixes: Sequence[str] = FIGURES) -> None:
    """Refuse a path that cannot be written before the work rather than after it.

    Raises:
        UsageError: A folder, no folder to write into, a suffix that is none of these, or an image
            where nothing can draw one.
    """
    if path.is_dir():
        raise UsageError(f"Cannot write {path}: it is a folder. Name a file in it.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"Cannot write {path}: its folder does not exist. Create it first.")
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        known = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise UsageError(
            f"Cannot write {path}: end its name with {known}, which says what to write."
        )
    if suffix in IMAGES and (obstacle := no_images()):
        raise UsageError(f"Cannot write {path}: {obstacle}; or name an .html file.")


def no_images() -> str | None:
    """Why this machine cannot draw images, with the remedy; None when it can."""
    if importlib.util.find_spec("kaleido") is None or metadata.version("kaleido").startswith("0."):
        return "images are drawn by Kaleido 1: pip install 'hpsched[images]'"
    from choreographer.browsers.chromium import Chromium

    if Chromium.find_browser(skip_local=False) is None:
        return (
            "Kaleido draws images with Chrome or Chromium, and finds none: install one, or run "
            "plotly_get_chrome"
        )
    return None


def write_figure(figure: go.Figure, path: Path) -> None:
    """Write ``figure`` to ``path`` in the form that its suffix names.

    Raises:
        UsageError: The file cannot be written.
        HpschedError: Kaleido failed.
    """
    image = path.suffix.lower() in IMAGES
    content = _image(figure, path) if image else _page(figure).encode()
    write_file(content, path)


def write_file(content: bytes, path: Path) -> None:
    """Write ``content`` to ``path``.

    Raises:
        UsageError: The file cannot be written.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror}. Choose another -o.") from None


def _page(figure: go.Figure) -> str:
    """A page of its own, whose title is text: plotly's would be cut off on a narrow screen."""
    import plotly.graph_objects as go

    from hpsched.figure_style import titles, untitled

    title, note = titles(figure)
    plain = untitled(go.Figure(figure))
    said = {"title": title or "Figure", "note": note, "drawing": drawing()}
    page = templates().get_template("figure.html.jinja")
    return page.render(**said, height=height(plain), json=figure_json(plain))


# -- pages with figures ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What ``figures.html.jinja`` draws a page's figures with.

    Attributes:
        plotly: plotly.js, gzip and base64: a third of its size.
        colours: JSON: colour of a figure → what it becomes on a dark page.
        script: JavaScript.
    """

    plotly: str
    colours: str
    script: str


@cache
def drawing() -> Drawing:
    """Everything that draws figures on a page without a network."""
    import plotly.offline

    from hpsched.figure_style import DARK

    files = ("web/static/drawing.js", "templates/figures.js")
    script = "".join((resources.files("hpsched") / f).read_text(encoding="utf-8") for f in files)
    packed = gzip.compress(plotly.offline.get_plotlyjs().encode(), mtime=0)
    return Drawing(
        plotly=base64.b64encode(packed).decode(), colours=json.dumps(DARK), script=script
    )


@cache
def templates(package: str = "hpsched") -> Environment:
    """The templates of a package; whatever is put into them is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def figure_json(figure: go.Figure) -> str:
    """The figure as JSON in which nothing can end the script element that holds it."""
    data = str(figure.to_json())
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return data


def height(figure: go.Figure) -> int:
    """The figure's height in pixels."""
    return int(figure.layout.height or figure.layout.template.layout.height)


def _image(figure: go.Figure, path: Path) -> bytes:
    import kaleido

    kind = path.suffix.lower().removeprefix(".")
    options: dict[str, Any] = {"format": kind, "width": WIDTH, "scale": 2 if kind == "png" else 1}
    options["height"] = height(figure)
    try:
        # Not figure.write_image: it would have the page load MathJax from a host.
        made = kaleido.calc_fig_sync(figure.to_dict(), opts=options, kopts={"mathjax": False})
    except Exception as error:
        said = " ".join(str(part) for part in error.args[:1])
        raise HpschedError(
            f"Kaleido could not draw {path} ({type(error).__name__}: {said}). Check that Chrome "
            "starts here, or name an .html file."
        ) from error
    return bytes(made)
