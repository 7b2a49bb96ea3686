"""Scores of the calibration benchmark → one picture: how far off each rule is, task by task.

python -m studies.bench.calibration_figure docs/data/calibration-*.json -o docs/images/x.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from hpsched.figure_files import write_figure
from hpsched.figure_style import BLUE, GREY, INK, ORANGE, styled

#: From the bottom up.
ORDER = (
    "fastai minimum",
    "fastai steep",
    "fastai slide",
    "fastai valley",
    "Lightning",
    "torch-lr-finder",
    "our steepest",
    "our minimum",
    "our geometric_mean",
    "hpsched, one sweep",
    "hpsched",
    "hpsched, refined",
)
LABELS = {
    "hpsched": "<b>hpsched</b>: three range tests",
    "hpsched, refined": "<b>hpsched</b>: and refining trials",
    "hpsched, one sweep": "<b>hpsched</b>: one range test",
    "our geometric_mean": "geometric mean of the two below",
    "our minimum": "minimum, without lag",
    "our steepest": "steepest, without lag",
}
FARTHEST = 8.0  # octaves; what lies further is drawn there


def calibration_figure(scores: Sequence[dict[str, Any]]) -> go.Figure:
    """A dot per task and rule: median signed distance from the best rates, in octaves."""
    figure = styled(go.Figure(), "How far from the best max_lr, task by task", height=560)
    for split, colour in (("tuning", GREY), ("reporting", BLUE)):
        rows = [task for score in scores if score["split"] == split for task in score["tasks"]]
        points = [
            (max(-FARTHEST, min(FARTHEST, rule["bias"])), name, task["task"])
            for task in rows
            for name, rule in task["rules"].items()
            if name in ORDER and rule["bias"] is not None
        ]
        figure.add_scatter(
            x=[x for x, _, _ in points],
            y=[ORDER.index(name) + (0.12 if split == "tuning" else -0.12) for _, name, _ in points],
            text=[task for _, _, task in points],
            mode="markers",
            marker={"color": colour, "size": 8, "opacity": 0.6},
            name=f"{split} task",
        )
    for name in ORDER:
        errors = [
            task["rules"][name]["median"]
            for score in scores
            if score["split"] == "reporting"
            for task in score["tasks"]
            if task["rules"][name]["median"] is not None
        ]
        if errors:
            figure.add_annotation(
                x=FARTHEST + 1.6,
                y=ORDER.index(name),
                text=f"{statistics.median(errors):.2f}",
                showarrow=False,
                font={"color": ORANGE if name.startswith("hpsched") else INK, "size": 13},
            )
    figure.add_annotation(
        x=FARTHEST + 2.6,  # where the axis ends: centred on the numbers it would be cut
        y=len(ORDER) - 0.3,
        xanchor="right",
        text="reporting: median",
        showarrow=False,
    )
    figure.add_vline(x=0, line={"color": INK, "width": 1})
    ticks = list(range(-8, 9, 2))
    figure.update_xaxes(
        title_text="octaves from the best rates (left: too low; ±8: that or more)",
        range=[-FARTHEST - 0.5, FARTHEST + 2.6],
        tickvals=ticks,
    )
    figure.update_yaxes(
        tickvals=list(range(len(ORDER))), ticktext=[LABELS.get(name, name) for name in ORDER]
    )
    return figure.update_layout(margin_l=230)


def main() -> None:
    """Read the scores, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    scores = [json.loads(path.read_text()) for path in args.scores]
    write_figure(calibration_figure(scores), args.output)


if __name__ == "__main__":
    main()
