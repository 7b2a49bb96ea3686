"""Figures → files, by suffix: a page that needs no network, or an image drawn by Kaleido."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpsched.errors import HpschedError, UsageError

if TYPE_CHECKING:
    import plotly.graph_objects as go

IMAGES = (".png", ".svg", ".pdf")
FIGURES = (".html", *IMAGES)
WIDTH = 900  # of an image, in pixels; a PNG has twice as many
_CONFIG = {"displaylogo": False, "plotlyServerURL": "", "responsive": True}


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
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("hpsched"), autoescape=True)
    drawn = figure.to_html(full_html=False, include_plotlyjs=True, config=_CONFIG)
    title = html.unescape(figure.layout.title.text or "Figure")  # plotly's titles are HTML
    return template.get_template("figure.html.jinja").render(title=title, figure=drawn)


def _image(figure: go.Figure, path: Path) -> bytes:
    import kaleido

    kind = path.suffix.lower().removeprefix(".")
    options: dict[str, Any] = {"format": kind, "width": WIDTH, "scale": 2 if kind == "png" else 1}
    options["height"] = figure.layout.height or figure.layout.template.layout.height
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
