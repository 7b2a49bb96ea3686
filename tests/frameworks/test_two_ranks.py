"""Two processes that train together inside a framework: they decide alike, and search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hpsched

pytestmark = pytest.mark.frameworks
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("framework", ["lightning", "transformers", "accelerate"])
def test_both_ranks_end_at_the_same_step_and_search_together(
    framework: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(TESTS / "frameworks" / "two_ranks.py")
    root = str(Path(hpsched.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    subprocess.run(
        [*command, script, framework, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        check=True,
        timeout=280,
    )
    (runs, (trained, trials)), (other_runs, (other_trained, no_trials)) = (
        json.loads((tmp_path / rank).read_text()) for rank in "01"
    )
    assert runs == other_runs
    (steps, counted, stopped, _), rung = runs
    assert stopped == "the sweep has diverged"
    assert steps == counted < 200
    assert rung[:3] == [20, 20, None]
    assert trained == other_trained
    # Three range tests: the first had ended too low, the other two agree.
    kinds = [*["range_test0", "rung2"] * 3, "rung2"]
    assert [name.split("-")[1] for name in trained] == kinds
    assert no_trials is None
    assert len(trials) == 4
    assert any(state == "COMPLETE" and 0 <= value < 1 for state, value in trials)
