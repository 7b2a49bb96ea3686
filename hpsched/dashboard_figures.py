"""The range-test figure on a study's page in the Optuna Dashboard, and a note that names hpsched.

The dashboard keeps figures with the study and ships all of them at every poll, so they are small:
the loss panel alone, thinned, four digits. A worker stores them anew after each trial that brought
evidence, and ``hpsched dashboard`` when it starts, for studies that plain ``study.optimize`` runs.
Nothing here ever fails a worker or the dashboard. Heavy modules are imported when they are needed.
"""

from __future__ import annotations

import html
import importlib.util
import logging
import math
import shlex
import threading
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial

from hpsched import evidence, records
from hpsched.ledger import read_runs
from hpsched.storage import exclusive, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

logger = logging.getLogger("hpsched.dashboard")

FIGURE_ID = "hpsched-range-test-"  # and the figure's place among them
CONTEXTS = 4  # figures of a study, at most
SWEEPS = 12  # drawn in a figure, at most; its title and window speak of all
POINTS = 1200  # in a figure, about
DIGITS = 4
HEIGHT = 450  # pixels that the dashboard has for a figure; it cuts off what is higher
TITLE = 14  # pixels: at half of a page's width, it ends before the buttons; only two of them stay
BUTTONS = ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "autoScale2d", "select2d", "lasso2d"]
LINE, LETTERS = 16, 60  # of small text under the title: a line's pixels, and its length
NOTE_KEYS = "dashboard:note"  # what the dashboard's attributes of a study's note begin with


def publish_after(study: Study, number: int) -> None:
    """Store the study's figures if trial ``number`` brought evidence; a failure is only logged."""
    try:
        if not _is_installed():
            return
        storage = study._storage
        trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
        brought = storage.get_trial(trial_id).user_attrs
        if {records.RANGE_TEST, records.REFINES} & set(brought):
            publish(study)
    except Exception as error:
        logger.warning("no range-test figure for the dashboard: %s", plain(error))


def publish_in_background(storage: BaseStorage) -> threading.Thread:
    """Store the figures of all studies of the storage, from a thread of its own."""
    thread = threading.Thread(target=publish_all, args=[storage], daemon=True)
    thread.start()
    return thread


def publish_all(storage: BaseStorage) -> None:
    """Store the figures of all studies; one line in the log tells of those that failed."""
    failed: dict[str, str] = {}
    try:
        for name in optuna.get_all_study_names(storage):
            try:
                publish(optuna.load_study(study_name=name, storage=storage))
            except Exception as error:
                failed[name] = plain(error)
    except Exception as error:
        logger.warning("no range-test figures for the dashboard: %s", plain(error))
    if failed:
        name, reason = next(iter(failed.items()))
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        logger.warning("no new range-test figure for study %r%s: %s", name, others, reason)


def publish(study: Study) -> int:
    """Store the study's figures for the dashboard, and a note unless it ever had one.

    Returns:
        The number of figures; none without evidence.
    """
    from optuna_dashboard import save_note, save_plotly_graph_object

    # Figures are stored in pieces: those of two workers must not mix, nor the older one win.
    with exclusive(study._storage, f"{study.study_name}/figures"):
        drawn = figures(study.get_trials(deepcopy=False), study.directions)
        for place, figure in enumerate(drawn):
            save_plotly_graph_object(study, figure, graph_object_id=f"{FIGURE_ID}{place}")
        attributes = study._storage.get_study_system_attrs(study._study_id)
        if drawn and not any(key.startswith(NOTE_KEYS) for key in attributes):
            save_note(study, note(study.study_name))
    return len(drawn)


def note(name: str) -> str:
    """What the study's page says of hpsched, in Markdown."""
    command = f"hpsched study report {shlex.quote(' '.join(name.split()))}"
    return (
        "hpsched searches for the best one-cycle recipe: range tests (see the figure) say where "
        "max_lr lies, trials climb complete short cycles. All figures, on one page:\n\n"
        f"    {command}\n"  # by its indent, a name with backticks stays code
    )


def figures(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[go.Figure]:
    """A small range-test figure for each of the contexts with the most trials."""
    runs = [run for run in read_runs(trials) if run.recipe]
    recipes = {run.recipe.context_key: run.recipe for run in runs if run.recipe}
    sweeps = evidence.sweeps(trials)
    tried = Counter(run.recipe.context_key for run in runs if run.recipe)
    tested = list(dict.fromkeys(sweep.context_key for sweep in sweeps))
    chosen = sorted(tested, key=lambda key: -tried[key])[:CONTEXTS]
    drawn = []
    for key in sorted(chosen, key=tested.index):
        own = [sweep for sweep in sweeps if sweep.context_key == key]
        known = evidence.of(trials, recipes[key], directions) if key in recipes else None
        drawn.append(_figure(own, known or evidence.pool(own), key))
    return drawn


def _figure(
    sweeps: Sequence[records.SweepRecord], known: evidence.Evidence | None, context: str
) -> go.Figure:
    from hpsched.range_test_figure import range_test_figure

    tests = [evidence.range_test(sweep) for sweep in sweeps[:SWEEPS]]
    figure = _loss_panel(range_test_figure(tests, known.proposal if known else None))
    if context:
        short = context if len(context) <= LETTERS else context[: LETTERS - 1] + "…"
        lines = f"{html.escape(short, quote=False)}<br>{figure.layout.title.subtitle.text or ''}"
        figure.update_layout(title_subtitle_text=lines, margin_t=figure.layout.margin.t + LINE)
    return _small(figure)


def _loss_panel(figure: go.Figure) -> go.Figure:
    """The uppermost panel alone, in the dashboard's height."""
    figure.data = [trace for trace in figure.data if trace.yaxis in (None, "y")]
    others = [axis for axis in figure.layout if axis.startswith("yaxis") and axis != "yaxis"]
    figure.update_layout(dict.fromkeys(others), height=HEIGHT)
    figure.update_layout(title_font_size=TITLE, modebar_remove=[*BUTTONS, "sendChartToCloud"])
    return figure.update_layout(xaxis_anchor="y", yaxis_domain=[0, 1])


def _small(figure: go.Figure) -> go.Figure:
    import plotly.graph_objects as go

    step = math.ceil(sum(len(trace.x) for trace in figure.data) / POINTS)
    for trace in figure.data:
        kept = _kept(trace.x, step)
        trace.update(x=[trace.x[i] for i in kept], y=[trace.y[i] for i in kept])
    return go.Figure(_rounded(figure.to_plotly_json()))


def _kept(x: Sequence[float | None], step: int) -> list[int]:
    """Every ``step``-th index, and the ends of each stretch between two gaps."""
    ends = {0, len(x) - 1}
    for gap in (i for i, place in enumerate(x) if place is None):
        ends |= {gap - 1, gap, gap + 1}
    return [i for i in range(len(x)) if i % step == 0 or i in ends]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return records.significant(value, DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _is_installed() -> bool:
    return importlib.util.find_spec("optuna_dashboard") is not None
