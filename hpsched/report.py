"""A study, or several against each other, as one self-contained page: HTML or Markdown.

The HTML page holds plotly.js and asks no host for anything. Study names, parameters and error texts
were written by others: the templates escape them all, and figures are data, not code.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hpsched import report_content as content
from hpsched.comparison import RESULTS, Comparison, Pair, comparable, compare
from hpsched.comparison_figures import HISTORIES, histories_figure
from hpsched.errors import UsageError
from hpsched.figure_files import drawing, templates
from hpsched.present import capitalised, number
from hpsched.report_content import headline
from hpsched.report_figures import groups, page_figure
from hpsched.summary import Summary

__all__ = [
    "MARKDOWN",
    "headline",
    "is_markdown",
    "render",
    "render_comparison",
    "render_markdown",
    "render_report",
    "write_report",
]

HTML, MARKDOWN = (".html", ".htm"), (".md", ".markdown")


def write_report(
    summaries: Summary | Sequence[Summary], path: Path, *, as_markdown: bool | None = None
) -> Path:
    """Write the page to ``path``, and return it.

    Args:
        summaries: One study, or several to compare.
        path: Where to.
        as_markdown: Whether to write Markdown rather than HTML; by default its suffix says so.

    Raises:
        UsageError: The file cannot be written, or the studies cannot be compared.
    """
    text = render(summaries, as_markdown=is_markdown(path) if as_markdown is None else as_markdown)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"the report cannot be written to {str(path)!r} ({reason}): "
            "name a file in a folder that exists and is yours to write."
        ) from None
    return path


def is_markdown(path: Path, format: str | None = None) -> bool:
    """Whether a report is to be Markdown: as ``format`` says, else the path's suffix.

    Raises:
        UsageError: An unknown format, or a suffix that names none.
    """
    if format not in (None, "html", "md"):
        raise UsageError(f"--format {format!r}: html or md.")
    if format is not None:
        return format == "md"
    if path.suffix.lower() not in ("", *HTML, *MARKDOWN):
        raise UsageError(
            f"Cannot write a report to {path}: end its name with .html or .md, which says what to "
            "write, or give --format."
        )
    return str(path) == "-" or path.suffix.lower() in MARKDOWN


def render(summaries: Summary | Sequence[Summary], *, as_markdown: bool = False) -> str:
    """The report of one study, or the comparison of several.

    Raises:
        UsageError: The studies cannot be compared.
    """
    several = [summaries] if isinstance(summaries, Summary) else list(summaries)
    if len(several) > 1:
        return render_comparison(several, as_markdown=as_markdown)
    return render_markdown(several[0]) if as_markdown else render_report(several[0])


def render_report(summary: Summary) -> str:
    """The page as HTML; also of a study that is unfinished or empty."""
    page = templates().get_template("report.html.jinja")
    drawn = list(groups(summary))
    script = {"drawing": drawing()} if drawn else {}
    return page.render(**_said(summary), groups=drawn, **script)


def render_markdown(summary: Summary) -> str:
    """The same without figures, for a pull request or a wiki."""
    return markdown().get_template("report.md.jinja").render(**_said(summary))


def render_comparison(summaries: Sequence[Summary], *, as_markdown: bool = False) -> str:
    """Several studies against each other; see :func:`hpsched.comparison.compare`.

    Raises:
        UsageError: Fewer than two studies, or one twice.
    """
    found = compare(summaries)
    said = {**_compared(found), "versions": content.versions(), "written": _now()}
    if as_markdown:
        return markdown().get_template("comparison.md.jinja").render(**said)
    page = templates().get_template("comparison.html.jinja")
    drawn = page_figure("histories", histories_figure(summaries), HISTORIES)
    return page.render(**said, figures=[drawn] if said["goal"] else [], drawing=drawing())


def _compared(found: Comparison) -> dict[str, Any]:
    """What both kinds of comparison say."""
    goals = {"minimize": "lower is better", "maximize": "higher is better"}
    names = [summary.name for summary in found.studies]
    return {
        "names": names,
        "headline": found.headline,
        "goal": goals[found.studies[0].direction] if comparable(found.studies) else "",
        "warnings": found.warnings,
        "heads": RESULTS,
        "results": found.results,
        "note": "Best value: mean ± standard deviation over the fresh seeds on which the study’s "
        "best recipe was run again; without any, the single run it was chosen by.",
        "pair_heads": ("better", "worse", "difference", "test", "p", "at the 5 % level"),
        "pairs": [_pair_row(pair) for pair in found.pairs],
        "pair_note": "Two-sided, between the fresh seeds of the studies’ best recipes: seed by "
        "seed (paired, with a 95 % interval, as hpsched compare does) where both ran on the same "
        "ones, else by Welch’s t-test. p is corrected for the number of pairs (Holm), an interval "
        "is not. With two or three seeds it finds large differences only.",
        "recipe_heads": ("parameter", *names),
        "recipes": found.recipes,
    }


def _pair_row(pair: Pair) -> list[str]:
    interval = "" if pair.low is None else f" [{number(pair.low)}, {number(pair.high)}]"
    test = "paired" if pair.paired else "Welch"
    difference = f"{number(pair.difference)}{interval}"
    names = [f"{name} (equal)" if pair.equal else name for name in (pair.better, pair.worse)]
    return [*names, difference, test, number(pair.p, 2), pair.verdict]


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z")


def _said(summary: Summary) -> dict[str, Any]:
    """What both kinds of page say."""
    return {
        "name": summary.name,
        "headline": headline(summary),
        "status": content.status(summary),
        "next_step": content.next_step(summary),
        "recipe": content.recipe_table(summary),
        "warnings": [capitalised(text) for text in summary.warnings],
        "spent": content.spent(summary),
        "saved": content.saved(summary),
        "findings": [f"{capitalised(text)}." for text in summary.findings],
        "top": content.top_recipes(summary),
        "settings": content.settings(summary),
        "versions": content.versions(),
        "written": _now(),
    }


# -- Markdown --------------------------------------------------------------------------------------


@cache
def markdown() -> Environment:
    """The Markdown templates; every value goes through one of their filters."""
    made = Environment(
        loader=PackageLoader("hpsched"),
        autoescape=False,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_escaped,
    )
    made.filters |= {
        "code": _code,
        "fenced": _fenced,
        "row": _row,
        "rule": _rule,
        "listed": ", ".join,
    }
    return made


class _Markdown(str):
    """Text that is Markdown already."""


def _escaped(value: Any) -> str:
    """Text as Markdown that shows it: on one line, nothing in it starts anything."""
    if isinstance(value, _Markdown):
        return value
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\`*\[\]|~#>])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def _code(value: Any) -> _Markdown:
    """A name or a value as code, also in a table."""
    text = " ".join(str(value).split()).replace("|", "\\|") or " "
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    room = " " if "`" in text else ""
    return _Markdown(f"{fence}{room}{text}{room}{fence}")


def _fenced(text: str, language: str = "") -> _Markdown:
    """A block of code."""
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return _Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def _row(cells: Sequence[Any]) -> _Markdown:
    """A table's row."""
    return _Markdown("| " + " | ".join(map(_escaped, cells)) + " |")


def _rule(heads: Sequence[Any]) -> _Markdown:
    """The line under a table's head; all columns but the first hold numbers."""
    return _Markdown("|---|" + "--:|" * (len(heads) - 1))
