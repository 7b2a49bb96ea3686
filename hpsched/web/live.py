"""hpsched's live page: the list of studies, and each study's page, which keeps itself up to date.

The pages are frames; what they show comes as JSON that the browser asks for every few seconds, and
that is answered from :mod:`hpsched.web.snapshots`. GET only, by numbers: a study's name may be
anything. No page asks another host for anything, and none has scripts or styles in its text. What
a Content-Security-Policy must allow: scripts, styles, images and connections of ``'self'``, and
images from ``data:`` and ``blob:``, to save a figure.
"""

from __future__ import annotations

import gzip
import json
import re
from functools import cache
from importlib import metadata

import plotly.offline
from flask import Blueprint, Response, abort, make_response, render_template, request
from optuna.storages import BaseStorage

from hpsched.figure_style import DARK
from hpsched.web.content import digest
from hpsched.web.snapshots import Answer, Snapshots, to_json

YEAR = 31_536_000  # seconds
LEAST_ZIPPED = 1000  # bytes
#: The parts of a study's page that hold figures, beside the schedule's, which is the recipe's.
GROUPS = ("range-test", "search", "space", "curves")


def make_blueprint(storage: BaseStorage) -> Blueprint:
    """The live page's routes, to be mounted with a prefix.

    Args:
        storage: The studies'; it is read in the background, by one thread, while somebody looks.

    Returns:
        The blueprint ``hpsched``; its attribute ``snapshots`` is what it answers from.
    """
    made = Blueprint("hpsched", __name__, template_folder="templates", static_folder="static")
    snapshots = Snapshots(storage)

    @made.get("/")
    def index() -> str:
        return render_template("index.html.jinja", start=snapshots.studies().data)

    @made.get("/state.json")
    def index_state() -> Response:
        return _answered(snapshots.studies())

    @made.get("/studies/<int:study_id>")
    def study(study_id: int) -> str:
        found = snapshots.study(study_id) or abort(404, f"There is no study {study_id}.")
        return render_template(
            "study.html.jinja",
            study_id=study_id,
            start=found.data,
            groups=GROUPS,
            dark=json.dumps(DARK),
            plotly=metadata.version("plotly"),
            sheets=_sheets(),
        )

    @made.get("/studies/<int:study_id>/state.json")
    def study_state(study_id: int) -> Response:
        return _answered(snapshots.study(study_id) or abort(404))

    @made.get("/studies/<int:study_id>/figures/<name>.json")
    def figure(study_id: int, name: str) -> Response:
        found = snapshots.figure(study_id, name) or abort(404)
        return _json(found.json.encode(), found.digest)

    @made.get("/plotly.js")
    def plotly_js() -> Response:
        """Plotly's own file, from its package; the page names its version, so it never changes."""
        answer = make_response(_plotly_js())
        answer.headers["Content-Type"] = "text/javascript; charset=utf-8"
        answer.headers["Content-Encoding"] = "gzip"
        answer.headers["Cache-Control"] = f"private, max-age={YEAR}, immutable"
        return answer

    # Flask escapes by the ending of a template's name, and knows .html but not .html.jinja.
    made.record_once(lambda setup: setattr(setup.app.jinja_env, "autoescape", True))
    made.snapshots = snapshots  # type: ignore[attr-defined]
    return made


def _answered(answer: Answer) -> Response:
    """The answer as JSON; its age is in the headers, so that 304 can say it too."""
    body = to_json(answer.data)
    made = _json(body, digest(body.decode()))
    for name, value in (("Age", answer.age), ("Taken", answer.taken)):
        if value is not None:
            made.headers[f"Hpsched-{name}"] = f"{value:.2f}"
    return made


def _json(body: bytes, etag: str) -> Response:
    answer = Response(body, content_type="application/json")
    answer.headers["Cache-Control"] = "private, no-cache"
    answer.vary.add("Accept-Encoding")
    answer.set_etag(etag)
    answer.make_conditional(request)
    if answer.status_code == 200 and len(body) > LEAST_ZIPPED and _takes_gzip():
        answer.set_data(gzip.compress(body, 5))
        answer.headers["Content-Encoding"] = "gzip"
    return answer


def _takes_gzip() -> bool:
    return request.accept_encodings.quality("gzip") > 0


@cache
def _plotly_js() -> bytes:
    return gzip.compress(str(plotly.offline.get_plotlyjs()).encode(), 6)


@cache
def _sheets() -> tuple[str, ...]:
    """Ids of the style elements that plotly.js writes into a page which has none of this id.

    They are for maps, which we do not draw, and a strict Content-Security-Policy refuses them.
    """
    made = r'if\(!document\.getElementById\("(\w+)"\)\)\{var \w+=document\.createElement\("style"\)'
    return tuple(re.findall(made, plotly.offline.get_plotlyjs()))
