"""``hpsched demo``: a real study, start to end, through the commands a user gives."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import optuna
import typer
from rich.markup import escape

from hpsched.cli.app import app, hint, option, state
from hpsched.cli.screen import value_text
from hpsched.errors import HpschedError, UsageError
from hpsched.present import number
from hpsched.records import FIELDS
from hpsched.storage import open_storage

STUDY = "digits"


@app.command(epilog="Example: hpsched demo --folder try-hpsched")
def demo(
    folder: Annotated[Path, option(help="Where to put the study and its report.")] = Path(
        "hpsched-demo"
    ),
    cycles: Annotated[float, option(help="Budget in full cycles.")] = 20.0,
    trials: Annotated[
        int | None, option(help="Budget in search trials instead, for a quick look.", min=1)
    ] = None,
    workers: Annotated[int, option(help="Workers side by side.", min=1)] = 2,
    seed: Annotated[int, option(help="The study's seed.")] = 0,
) -> None:
    """Search a recipe for a small CNN on scikit-learn's digits; a few minutes on two cores.

    Writes the study's one source file, digits.py, into the folder: change it and go on.
    """
    from hpsched.study import check_budget

    check_budget("--cycles", cycles)  # `study create` would, in a folder by then
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UsageError("The demo needs scikit-learn: pip install 'hpsched[demo]'.") from None
    name = _prepare(folder)
    budget = ["--trials", str(trials)] if trials is not None else ["--cycles", str(cycles)]
    _run(folder, "study", "create", name, "--objective", f"{STUDY}:objective",
         *budget, "--seed", str(seed))  # fmt: skip
    together = ["--devices", "cpu", "--per-device", str(workers)] if workers > 1 else []
    _run(folder, "worker", "attach", name, *together, quiet=True)
    _run(folder, "study", "status", name)
    _run(folder, "study", "report", name, "--output", "report.html")
    _verdict(folder, name)


def _prepare(folder: Path) -> str:
    """Put the source file there; returns a name for the study that is not taken there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{STUDY}.py"
    if not target.exists():
        shutil.copyfile(_source(), target)
    hint(f"The study is {escape(str(target))}: a model, train(cycle), objective(trial).\n")
    return _free_name(folder)


def _free_name(folder: Path) -> str:
    if not (folder / "hpsched.db").exists():
        return STUDY
    taken = set(optuna.get_all_study_names(open_storage(_url(folder))))
    numbered = (f"{STUDY}-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([STUDY], numbered) if name not in taken)


def _url(folder: Path) -> str:
    return f"sqlite:///{folder.resolve() / 'hpsched.db'}"


def _source() -> Path:
    package = Path(__file__).resolve().parents[1]
    places = [package / "_demo" / f"{STUDY}.py", package.parent / "studies" / f"{STUDY}.py"]
    for place in places:  # an installed wheel; a checkout
        if place.is_file():
            return place
    raise HpschedError(f"The demo's study is missing from this installation ({places[0]}).")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "hpsched", *arguments]


def _environment() -> dict[str, str]:
    """The demo keeps to its own database, whatever the user's environment says."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HPSCHED_STORAGE", "OPTUNA_STORAGE")}
    return {**kept, "HPSCHED_STORAGE": "sqlite:///hpsched.db"}


def _run(folder: Path, *arguments: str, quiet: bool = False) -> None:
    """Give a command as the user would, and wait for it; the demo ends where it fails."""
    state.out.print(f"[bold]$[/] [cyan]hpsched {shlex.join(arguments)}[/]", highlight=False)
    out = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(_command(*arguments), cwd=folder, env=_environment(), stdout=out)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # it got the signal too: let it put its trials back
        code = process.wait()
    if code != 0:
        raise typer.Exit(code)
    state.out.print()


def _verdict(folder: Path, name: str) -> None:
    """The best recipe on fresh seeds against what one would use without a search."""
    from hpsched import objective as objectives
    from hpsched.study import best as find_best
    from hpsched.study import open_study
    from hpsched.summary import summarise

    study = open_study(name, _url(folder))
    summary, best = summarise(study), find_best(study)
    os.environ.setdefault("TQDM_DISABLE", "1")
    source = f"{folder / STUDY}.py"
    total_steps: int = best.total_steps or 0
    seeds = range(max(3, best.seeds))
    with state.err.status("the default recipes again, for comparison"):
        rows = compare_defaults(objectives.load(f"{source}:train"), total_steps, seeds)
    state.out.print(f"[bold green]Best recipe[/] (trial {best.number}), validation error "
                    f"[bold]{value_text(best)}[/]", highlight=False)  # fmt: skip
    values = ", ".join(f"{field} {number(best.recipe[field])}" for field in FIELDS)
    state.out.print(f"  {values}", highlight=False)
    for name, text in rows:
        state.out.print(f"Default recipe at max_lr {name}: {text}", highlight=False)
    state.out.print(
        f"Cost: {number(summary.cost.cycles)} full training runs in all, "
        f"{number(summary.range_test_cost.cycles)} of them for range tests and "
        f"{number(summary.confirm_cost.cycles)} for confirmation; a default recipe costs 1.",
        highlight=False,
    )
    state.out.print(f"Report: [bold]{(folder / 'report.html').resolve()}[/]", soft_wrap=True)


def compare_defaults(train: object, total_steps: int, seeds: range) -> list[tuple[str, str]]:
    """The standard recipe at rates people guess, over these seeds: (rate, mean ± spread)."""
    from optuna.trial import FixedTrial

    from hpsched.coordinates import STANDARD_RECIPE
    from hpsched.errors import TrainingError
    from hpsched.ledger import Candidate
    from hpsched.suggest import suggest_onecycle

    rows = []
    for rate in (0.1, 0.01):
        params = {**STANDARD_RECIPE, "max_lr": rate, "weight_decay": 1e-4}
        values = []
        for seed in seeds:
            recipe = suggest_onecycle(FixedTrial(params), total_steps, rungs=1)
            try:
                values.append(recipe.train(train, total_steps, seed=1000 + seed))  # type: ignore[arg-type]
            except TrainingError:
                values.append(float("inf"))
        found = Candidate(
            number=-1, params={}, recipe=params, policy="cosine", total_steps=total_steps,
            found=values[0], fresh=tuple(values),
        )  # fmt: skip
        rows.append((number(rate), value_text(found)))
    return rows
