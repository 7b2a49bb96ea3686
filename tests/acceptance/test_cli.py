"""Every command as a user gives it: a real process in a folder of its own.

Right use: the result alone on stdout, exit code 0. Wrong use: one message on stderr that names the
value and the remedy, exit code 2 (the call was wrong) or 1 (it failed), no traceback, and the
database as it was.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import forked
import optuna
import pytest
import typer.main
import yaml
from optuna.trial import TrialState
from typer.testing import CliRunner

import hpsched
from hpsched import records
from hpsched.cli import app
from hpsched.present import rate_text
from hpsched.study import create_study, open_study
from tests.fleet import STUBBORN

STEPS = 180

TOY = f'''
"""A toy: the coefficients of a line; {STEPS} steps a full cycle."""
import os
import time

import torch

import hpsched

torch.set_num_threads(1)


def fit(cycle, *, loader=None, change_loss=lambda loss: loss, steps=True):
    torch.manual_seed(cycle.seed)
    x = torch.randn(256, 8)
    y = x @ torch.linspace(-1, 1, 8)[:, None] + 0.1 * torch.randn(256, 1)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=cycle.max_lr,
                                momentum=cycle.max_momentum, weight_decay=cycle.weight_decay)
    schedule = cycle.schedule(optimizer)
    for rows in cycle.batches(torch.randperm(256).split(32) if loader is None else loader):
        loss = torch.nn.functional.mse_loss(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(float(os.environ.get("TOY_PAUSE", 0)))
        if steps:
            schedule.step(change_loss(loss))
    return torch.nn.functional.mse_loss(model(x), y).item()


def train(cycle):
    return fit(cycle)


def objective(trial):
    return hpsched.suggest_onecycle(trial, total_steps={STEPS}, min_steps=20).run(train)
'''

# What a user's objective can do wrong: one function each.
BROKEN = """
from hpsched import suggest_onecycle
from toy import fit, train

def recipe(trial, **how):
    return suggest_onecycle(trial, **{"total_steps": 180, "min_steps": 20, **how})

def raises(trial):
    raise KeyError("the data set is gone")

def exits(trial):
    raise SystemExit(7)

def returns_none(trial):
    recipe(trial, rungs=1).run(train)

def train_returns_none(trial):
    return recipe(trial).run(lambda cycle: print(end=str(fit(cycle))[:0]))

def never_schedules(trial):
    return recipe(trial).run(lambda cycle: 1.0)

def never_steps(trial):
    return recipe(trial).run(lambda cycle: fit(cycle, steps=False))

def is_nan(trial):
    return recipe(trial).run(lambda cycle: fit(cycle, change_loss=lambda loss: loss * float("nan")))

def empty_loader(trial):
    return recipe(trial).run(lambda cycle: fit(cycle, loader=[]))

def reversed_range(trial):
    return recipe(trial, max_lr=(1.0, 0.01)).run(train)

def pct_start(trial):
    return recipe(trial, pct_start=1.5).run(train)

def momenta(trial):
    return recipe(trial, base_momentum=(0.8, 0.97), max_momentum=(0.9, 0.98)).run(train)

def momentum_of_one(trial):
    return recipe(trial, max_momentum=1.0).run(train)

def negative_rate(trial):
    return recipe(trial, max_lr=(-0.1, 1.0)).run(train)

def no_total_steps(trial):
    return recipe(trial, total_steps=None).run(train)

def validated(cycle):
    cycle.validate(lambda: {"loss": 1.0, "accuracy": 0.5})
    return fit(cycle)

def too_short_for_rungs(trial):
    return recipe(trial, total_steps=30, min_steps=50).run(train)
"""

OTHERS = {  # modules that cannot be imported, and one that can, without torch
    "light.py": "x = 3\ndef objective(trial):\n    return 1.0\n",
    "syntax.py": "def objective(trial)\n    return 1.0\n",
    "raises.py": "raise RuntimeError('no data in /data [at all]')\n",
    "exits.py": "import sys\nsys.exit(7)\n",
    "calls.py": "nothing = lambda: 3\ndef more(trial, data): return 3\n",
    "needs.py": "import a_package_nobody_has\n",
}
NO_SERVER = "postgresql+psycopg://user:secret@127.0.0.1:1/x"


def environment(**more: str) -> dict[str, str]:
    """This process's, less whatever would steer hpsched or its colours."""
    mine = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HPSCHED_", "OPTUNA_STORAGE"))
        and name not in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")
    }
    return {**mine, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "80", **more}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "hpsched", *map(str, arguments)]


def run(
    *arguments: str | Path, cwd: Path, stdin: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    return forked.call(
        [str(argument) for argument in arguments], cwd=cwd, env=environment(**env), stdin=stdin
    )


def ok(*arguments: str | Path, cwd: Path, **env: str) -> str:
    """What the command prints, having worked."""
    done = run(*arguments, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """It said once what was wrong, with these words, and ended with this code."""
    said = " ".join(done.stderr.split())
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len(re.findall(r"^(?:Error:|╭─ Error ─)", done.stderr, re.MULTILINE)) == 1, done.stderr
    for word in words:
        assert word in said, done.stderr


def dump(folder: Path) -> list[str]:
    """The database in ``folder``, statement by statement; empty if there is none."""
    path = folder / "hpsched.db"
    if not path.exists():
        return []
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def write_modules(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"toy.py": TOY, "broken.py": BROKEN, **OTHERS}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the modules, and no database."""
    return write_modules(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished study, ``toy``; tests do not change it."""
    folder = write_modules(tmp_path_factory.mktemp("finished"))
    made = run("study", "create", "toy", "-o", "toy:objective", "--trials", "4", "--seed", "1",
               cwd=folder)  # fmt: skip
    assert (made.returncode, made.stdout) == (0, "toy\n"), made.stderr
    assert "hpsched worker attach toy" in made.stderr
    worked = run("worker", "attach", "toy", cwd=folder)
    assert worked.returncode == 0, worked.stderr
    assert re.fullmatch(r"\d completed, \d pruned, [36] confirmed, 0 failed\n", worked.stdout), (
        worked.stdout
    )
    assert "Next: hpsched study best toy --format torch" in worked.stderr
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished study, to be changed."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def new_study(folder: Path, objective: str, **settings: Any) -> optuna.Study:
    return create_study(
        "s", objective=objective, storage=f"sqlite:///{folder}/hpsched.db", seed=1, **settings
    )


def reopen(folder: Path, name: str = "s") -> optuna.Study:
    return open_study(name, f"sqlite:///{folder}/hpsched.db")


# -- right use -------------------------------------------------------------------------------------


def test_version_names_what_a_bug_report_needs(tmp_path: Path) -> None:
    said = ok("--version", cwd=tmp_path, HPSCHED_VERSION="9.9")  # as container images set it
    assert re.fullmatch(r"hpsched \S+, Optuna \S+, torch \S+, Python \S+, Linux\S+\n", said)
    assert hpsched.__version__ in said


def test_a_study_has_one_name_and_the_budget_it_was_given(finished: Path) -> None:
    listed = json.loads(ok("study", "list", "-f", "json", cwd=finished))
    assert [(row["name"], row["objective"]) for row in listed] == [("toy", "toy:objective")]
    settings = records.Settings.from_json(
        reopen(finished, "toy").user_attrs[records.SETTINGS], "here"
    )
    assert (settings.trials, settings.cycles, settings.seed) == (4, None, 1)
    assert (settings.base_sampler, settings.reduction_factor) == ("hpsched", None)


def test_skip_if_exists_keeps_the_study_and_says_what_differs(finished: Path) -> None:
    before = dump(finished)
    done = run("study", "create", "toy", "-o", "light:objective", "--trials", "9",
               "--skip-if-exists", cwd=finished)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "toy\n")
    assert "keeps objective=toy:objective" in done.stderr
    assert "keeps trials=4" in done.stderr
    assert dump(finished) == before


def test_a_study_may_begin_like_another(finished: Path) -> None:
    done = run("study", "create", "longer", "-o", "light:objective", "--cycles", "7",
               "--like", "toy", cwd=finished)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "longer\n")
    assert re.search(r"Begins like toy: max_lr × [\d.]+, κ [\d.]+, div_factor", done.stderr)
    again = run("study", "create", "longer", "-o", "light:objective", "--like", "longer",
                "--skip-if-exists", cwd=finished)  # fmt: skip
    assert again.returncode == 2 and "no finished full cycle" in again.stderr
    ok("study", "delete", "longer", "--yes", cwd=finished)


@pytest.mark.parametrize("format_", ["table", "json", "yaml"])
def test_list(finished: Path, format_: str) -> None:
    said = ok("study", "list", "-f", format_, cwd=finished)
    if format_ == "table":
        assert "toy:objective" in said
    else:
        read = json.loads if format_ == "json" else yaml.safe_load
        assert read(said)[0]["name"] == "toy"


@pytest.mark.parametrize("format_", ["table", "json", "yaml"])
def test_status(finished: Path, format_: str) -> None:
    said = ok("study", "status", "toy", "-f", format_, cwd=finished)
    if format_ == "table":
        for word in ("toy", "budget 4 trials", "rung", "±", "fresh seeds", "max_lr", "100 %"):
            assert word in said
        return
    read = json.loads(said) if format_ == "json" else yaml.safe_load(said)
    assert read["progress"] == 1.0
    assert sum(read["states"].values()) == 4
    assert read["best"]["confirmed"]
    assert read["next_command"] == "hpsched study best toy --format torch"


def test_status_watch_ends_with_the_study(finished: Path) -> None:
    assert "100 %" in ok("study", "status", "toy", "--watch", cwd=finished)


def test_best_torch_is_code_that_runs(finished: Path) -> None:
    import torch

    code = ok("study", "best", "toy", "-f", "torch", cwd=finished)
    model = torch.nn.Linear(8, 1)
    names: dict[str, Any] = {"torch": torch, "model": model}
    exec(code, names)
    optimizer, scheduler = names["optimizer"], names["scheduler"]
    best = json.loads(ok("study", "best", "toy", "-f", "json", cwd=finished))
    rates = []
    for _ in range(STEPS):
        rates.append(scheduler.get_last_lr()[0])
        model(torch.zeros(1, 8)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert max(rates) == pytest.approx(best["max_lr"], rel=1e-12)
    assert rates[0] == pytest.approx(best["max_lr"] / best["div_factor"], rel=1e-12)


def test_best_in_words_and_as_data(finished: Path) -> None:
    table = ok("study", "best", "toy", cwd=finished)
    data = yaml.safe_load(ok("study", "best", "toy", "-f", "yaml", cwd=finished))
    for field in records.FIELDS:
        assert field in table
        assert data[field] > 0
    assert data["seeds"] == len(data["values"]) == 3


def test_a_format_from_the_environment_is_that_of_one_command(finished: Path) -> None:
    formats = {"HPSCHED_STUDY_BEST_FORMAT": "torch", "HPSCHED_STUDY_STATUS_FORMAT": "json"}
    assert "scheduler.step()" in ok("study", "best", "toy", cwd=finished, **formats)
    assert "seeds: 3" in ok("study", "best", "toy", "-f", "yaml", cwd=finished, **formats)
    assert json.loads(ok("study", "status", "toy", cwd=finished, **formats))["name"] == "toy"


def test_report_prints_where_it_is(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    assert ok("study", "report", "toy", "-o", path, cwd=finished) == f"{path}\n"
    assert "<html" in path.read_text()


def test_export(finished: Path, tmp_path: Path) -> None:
    whole = json.loads(ok("study", "export", "toy", cwd=finished))
    lines = ok("study", "export", "toy", "-f", "csv", cwd=finished)
    rows = list(csv.DictReader(io.StringIO(lines)))
    assert len(whole["trials"]) == len(rows) == len(reopen(finished, "toy").trials)
    assert sum(int(row["steps"]) for row in rows) > 0
    path = tmp_path / "toy.json"
    assert ok("study", "export", "toy", "-o", path, cwd=finished) == f"{path}\n"
    assert json.loads(path.read_text()) == whole


def test_confirm_queues_and_attach_runs_them(copied: Path) -> None:
    before = json.loads(ok("study", "best", "toy", "-f", "json", cwd=copied))
    queued = run("study", "confirm", "toy", "--top", "1", "--seeds", "2", cwd=copied)
    assert (queued.returncode, queued.stdout) == (0, "2\n")
    assert "hpsched worker attach toy" in queued.stderr
    said = ok("worker", "attach", "toy", cwd=copied)
    assert said == "0 completed, 0 pruned, 2 confirmed, 0 failed\n"
    study = reopen(copied, "toy")
    seeds = [json_["seed"] for trial in study.trials
             if (json_ := trial.user_attrs.get(records.CONFIRM))]  # fmt: skip
    assert len(seeds) == len(set(seeds)) >= before["seeds"] + 2


def test_delete(copied: Path) -> None:
    done = run("study", "delete", "toy", "--yes", cwd=copied)
    assert (done.returncode, done.stdout) == (0, "")
    assert json.loads(ok("study", "list", "-f", "json", cwd=copied)) == []


@pytest.mark.parametrize("answer", ["n\n", ""], ids=["no", "nobody to ask"])
def test_delete_declined_removes_nothing(finished: Path, answer: str) -> None:
    before = dump(finished)
    done = run("study", "delete", "toy", cwd=finished, stdin=answer)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Nothing was removed" in done.stderr and "--yes" in done.stderr
    assert dump(finished) == before


RULES = ("suggestion", "steepest", "minimum", "minimum_tenth", "valley", "slide", "max_stable")


def test_lr_find(folder: Path) -> None:
    done = run("lr-find", "toy:train", "--replicates", "2", "-f", "json", "-o", "lr.html",
               cwd=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 1e-3 < found["low"] < found["max_lr"] < found["high"] < 1.0
    assert found["low"] < found["interval"][0] < found["max_lr"] < found["interval"][1]
    assert len(found["replicates"]) == 2
    for row in found["replicates"]:
        assert all(1e-6 < row[rule] < 10 for rule in (*RULES, "diverged"))
    assert "<html" in (folder / "lr.html").read_text()


def test_lr_find_shows_every_rule_of_every_sweep_in_80_columns(folder: Path) -> None:
    told = ["lr-find", "toy:train", "--replicates", "2", "--num-iter", "60"]
    table = " ".join(ok(*told, cwd=folder).split())
    for heading in ("suggests", "steepest", "minimum", "valley", "slide", "stable", "diverged"):
        assert heading in table
    rows = json.loads(ok(*told, "-f", "json", cwd=folder))["replicates"]
    for row in rows:
        assert " ".join(rate_text(row[rule]) for rule in (*RULES, "diverged")) in table


def test_lr_find_with_weight_decays_chooses_one(folder: Path) -> None:
    drawn = ok("lr-find", "toy:train", "--weight-decays", "1e-2,3e-4,0", "--replicates", "2",
               "--num-iter", "60", "-o", "lr.html", "-f", "yaml", cwd=folder)  # fmt: skip
    found = yaml.safe_load(drawn)
    decays = [row["weight_decay"] for row in found["replicates"]]
    assert sorted(decays) == [0, 0, 3e-4, 3e-4, 1e-2, 1e-2]
    assert len({row["seed"] for row in found["replicates"]}) == 6
    assert found["weight_decay"] in decays
    assert "is the largest that tolerates the highest rate" in found["weight_decay_reason"]
    page = (folder / "lr.html").read_text()
    assert all(f'"weight decay {decay}"' in page for decay in ("0.01", "3e-4", "0"))


def test_lr_find_for_a_longer_training_proposes_a_lower_rate(folder: Path) -> None:
    def centre(*more: str) -> float:
        said = ok("lr-find", "toy:train", "--num-iter", "60", "-f", "json", *more, cwd=folder)
        return float(json.loads(said)["max_lr"])

    assert centre("--total-steps", "60000") < centre("--total-steps", "60")


def test_lr_find_writes_raw_curves(folder: Path) -> None:
    table = ok("lr-find", "broken:validated", "--no-stop", "--validate-every", "5",
               "--num-iter", "60", "--replicates", "1", "-o", "lr.json", cwd=folder)  # fmt: skip
    assert "max_lr" in table
    found = json.loads((folder / "lr.json").read_text())
    (sweep,) = found["replicates"]
    assert sweep["lrs"][0] == pytest.approx(1e-6)
    assert len(sweep["lrs"]) == len(sweep["losses"]) == 60  # not stopped at divergence
    assert [step for step, _ in sweep["validation"]["accuracy"]] == list(range(5, 61, 5))
    assert found["max_lr"] and found["reason"] and sweep["steepest"]


def test_lr_find_says_that_nothing_was_validated(folder: Path) -> None:
    done = run("lr-find", "toy:train", "--validate-every", "5", "--num-iter", "60", cwd=folder)
    assert done.returncode == 0
    assert "train never called cycle.validate" in done.stderr


def test_lr_find_that_finds_nothing_warns(folder: Path) -> None:
    done = run("lr-find", "toy:train", "--end-lr", "1e-5", "-f", "json", cwd=folder)
    assert done.returncode == 0
    assert not json.loads(done.stdout)["reliable"]
    assert "Not reliable:" in done.stderr and "end_lr" in done.stderr
    assert done.stderr.count("no proposal") == 1  # of all sweeps together, once


@pytest.mark.browser
@pytest.mark.parametrize(
    ("name", "opening"), [("lr.png", b"\x89PNG"), ("LR.SVG", b"<svg"), ("lr.pdf", b"%PDF")]
)
def test_lr_find_writes_images(folder: Path, name: str, opening: bytes) -> None:
    ok("lr-find", "toy:train", "--num-iter", "60", "--replicates", "1", "-o", name, cwd=folder)
    assert (folder / name).read_bytes().startswith(opening)


def test_schedules(tmp_path: Path) -> None:
    listed = json.loads(ok("schedule", "list", "-f", "json", cwd=tmp_path))
    assert {"one_cycle", "one_cycle_linear", "cosine"} <= {row["name"] for row in listed}
    assert "one_cycle" in ok("schedule", "list", cwd=tmp_path)
    drawn = ok("schedule", "plot", "one_cycle", "cosine", "-o", "s.html", cwd=tmp_path)
    assert drawn == "s.html\n"
    assert "<html" in (tmp_path / "s.html").read_text()


def test_doctor(finished: Path, tmp_path: Path) -> None:
    table = ok("doctor", "--study", "toy", cwd=finished)
    assert "wrong" not in table and "toy:objective" in table
    findings = json.loads(ok("doctor", "-f", "json", cwd=tmp_path))
    told = {finding["what"]: finding["detail"] for finding in findings}
    assert list(told) == ["versions", "extras", "system", "device", "storage"]
    assert all(finding["ok"] for finding in findings)
    assert f"hpsched {hpsched.__version__}, " in told["versions"]
    for package in ("optuna", "torch", "sqlalchemy"):
        assert f"{package} {metadata.version(package)}" in told["versions"]
    assert f"flask {metadata.version('flask')}" in told["extras"]
    assert "pytest" not in told["extras"]  # what only developers need
    assert told["system"].startswith(f"Python {platform.python_version()}, Linux")
    assert list(tmp_path.iterdir()) == []  # it looks, and makes nothing


def test_dashboard_serves_the_study(finished: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with started("dashboard", "--port", str(port), cwd=finished) as (process, said):
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/api/studies"), process, said)
        studies = urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies").read()
        assert b'"toy"' in studies
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/").read()
        assert b"<title>Studies" in page
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert "Traceback" not in said()


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    create_study(  # an earlier demo's: a second one leaves it alone
        "digits", objective="digits:objective", storage=f"sqlite:///{tmp_path}/hpsched.db"
    )
    said = ok("demo", "--trials", "2", "--folder", ".", cwd=tmp_path, HPSCHED_STORAGE=NO_SERVER)
    for word in ("$ hpsched study create digits-2", "$ hpsched worker attach digits-2",
                 "Best recipe", "Default recipe at max_lr 0.1", "Cost:"):  # fmt: skip
        assert word in said
    report = re.search(r"^Report: (.+)$", said, re.MULTILINE)
    assert report and Path(report[1]).is_file()
    assert reopen(tmp_path, "digits").trials == []


@pytest.mark.parametrize(
    "budget", ["--cycles 0", "--cycles nan", "--cycles inf", "--cycles=-1", "--trials 0"]
)
def test_a_demo_with_no_budget_makes_no_folder(tmp_path: Path, budget: str) -> None:
    option, value = re.split("[ =]", budget)
    refused(run("demo", *budget.split(), cwd=tmp_path), 2, option, value)
    assert list(tmp_path.iterdir()) == []


def test_names_need_no_care(folder: Path) -> None:
    """A name with spaces and brackets, a storage elsewhere: the next command can be pasted."""
    name, url = "a [b]study", "sqlite:///else where.db"
    made = run("study", "create", name, "-o", "light.py:objective", "--storage", url, cwd=folder)
    assert (made.returncode, made.stdout) == (0, f"{name}\n"), made.stderr
    pasted = shlex.split(made.stderr.partition(": ")[2])
    assert pasted == ["hpsched", "worker", "attach", name, "--storage", url]
    said = ok("study", "status", name, "--storage", url, cwd=folder)
    assert name in said and f"--storage '{url}'" in said


def test_a_worker_that_died_is_not_listed_as_at_work(copied: Path) -> None:
    long_ago = {"host": "node", "pid": 4711, "device": "cpu", "started": 1.0, "seen": 2.0}
    busy = records.WorkerRecord(**long_ago, state="running", trial=3, kind="rung", rung=1)
    study = reopen(copied, "toy")
    study.set_user_attr(records.WORKER + "dead", busy.to_json())
    assert "node:4711" not in ok("worker", "list", "toy", cwd=copied)
    shown = ok("worker", "list", "toy", "--all", cwd=copied)
    (row,) = (line for line in shown.splitlines() if "node:4711" in line)
    assert "lost" in row and "trial 3" not in row
    listed = json.loads(ok("worker", "list", "toy", "--all", "--format", "json", cwd=copied))
    assert [w["state"] for w in listed if w["id"] == "dead"] == ["lost"]


# -- help, completion, start-up --------------------------------------------------------------------


def _leaves(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, made in group.commands.items():
        if hasattr(made, "commands"):
            yield from _leaves(made, (*path, name))
        else:
            yield (*path, name), made


COMMANDS = dict(_leaves(typer.main.get_command(app)))


def test_the_commands_are_those_of_the_design() -> None:
    study = ("create", "list", "status", "best", "report", "confirm", "export", "import", "delete")
    worker = ("attach", "list", "pause", "resume", "drain", "stop")
    assert {" ".join(path) for path in COMMANDS} == {
        *(f"study {name}" for name in study),
        *(f"worker {name}" for name in worker),
        *(f"user {name}" for name in ("add", "remove", "list")),
        "compare", "lr-find", "schedule list", "schedule plot", "dashboard", "demo", "doctor",
    }  # fmt: skip


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_has_an_example_that_parses(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    assert "Example: " in shown.output
    made = COMMANDS[path]
    assert made.help, "say what it does"
    assert "\n" not in made.help.replace("\n\n", ""), "paragraphs flow"
    assert all(option.help for option in made.params if option.name != "help")
    example = made.epilog.removeprefix("Example: ").partition(" > ")[0]
    words = [word for word in shlex.split(example) if "=" not in word]
    assert words[: 1 + len(path)] == ["hpsched", *path]
    made.make_context(path[-1], words[1 + len(path) :])  # raises on an option that is not there


def complete(*arguments: str, cwd: Path, **env: str) -> list[str]:
    script = Path(sys.executable).with_name("hpsched")  # the console script of this environment
    whole = environment(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1", **env)
    done = subprocess.run([script, *arguments], env=whole, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split("\n")


def offered(line: str, cwd: Path) -> set[str]:
    """What Tab offers at the end of a line."""
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    return set(complete(cwd=cwd, _HPSCHED_COMPLETE="complete_bash", **asked)) - {""}


def test_completion(finished: Path, tmp_path: Path) -> None:
    said = complete("--show-completion", "bash", cwd=tmp_path)
    assert any("-F _hpsched_completion hpsched" in line for line in said)
    assert {"create", "status", "delete"} <= offered("hpsched study ", tmp_path)
    assert offered("hpsched study status ", finished) == {"toy"}
    assert offered("hpsched study status t", finished) == {"toy"}
    assert offered("hpsched study status ", tmp_path) == set()
    storage = f"--storage sqlite:///{finished}/hpsched.db"
    assert offered(f"hpsched worker pause {storage} ", tmp_path) == {"toy"}
    assert list(tmp_path.iterdir()) == []  # nothing was made


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("study status --format ", {"table", "json", "yaml"}),
        ("study best -f t", {"table", "torch"}),
        ("study create --direction ", {"minimize", "maximize"}),
        ("study create --sampler ", {"hpsched", "tpe", "gp", "qmc", "cmaes", "random"}),
    ],
)
def test_completion_of_values(line: str, values: set[str], tmp_path: Path) -> None:
    assert offered(f"hpsched {line}", tmp_path) == values


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import hpsched", "torch plotly typer rich sklearn scipy pandas optuna"),
        (
            "import hpsched.cli as c; sys.argv[1:] = ['study', 'list']\n"
            "try: c.main()\nexcept SystemExit as end: assert not end.code",
            "torch plotly sklearn scipy pandas optuna_dashboard",
        ),
    ],
    ids=["import", "study list"],
)
def test_start_up_imports_only_what_it_needs(finished: Path, code: str, unwanted: str) -> None:
    show = f"there = [m for m in {unwanted.split()} if m in sys.modules]"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{show}\nprint(*there, file=sys.stderr)"],
        cwd=finished, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.split() == []


# -- environment -----------------------------------------------------------------------------------


def test_storage_from_option_then_hpsched_then_optuna(folder: Path) -> None:
    urls = {name: f"sqlite:///{name}.db" for name in ("option", "hpsched", "optuna")}
    for name, url in urls.items():
        create_study(name, objective="light:objective", storage=f"sqlite:///{folder}/{name}.db")
        assert url

    def listed(*arguments: str, **env: str) -> list[str]:
        rows = json.loads(ok("study", "list", "-f", "json", *arguments, cwd=folder, **env))
        return [row["name"] for row in rows]

    both = {"HPSCHED_STORAGE": urls["hpsched"], "OPTUNA_STORAGE": urls["optuna"]}
    assert listed("--storage", urls["option"], **both) == ["option"]
    assert listed(**both) == ["hpsched"]
    assert listed(OPTUNA_STORAGE=urls["optuna"]) == ["optuna"]
    assert listed(HPSCHED_STORAGE="", OPTUNA_STORAGE=urls["optuna"]) == ["optuna"]


def test_options_from_the_environment(folder: Path) -> None:
    ok("study", "create", "s", cwd=folder, HPSCHED_OBJECTIVE="light:objective",
       HPSCHED_STUDY_CREATE_CYCLES="7.5")  # fmt: skip
    assert reopen(folder).user_attrs[records.SETTINGS]["cycles"] == 7.5


# -- wrong calls -----------------------------------------------------------------------------------


def test_a_refused_value_from_the_environment_is_named_with_its_variable(folder: Path) -> None:
    arguments = shlex.split(CREATE)
    variable = "HPSCHED_STUDY_CREATE_CYCLES"
    wide = {"COLUMNS": "200"}
    refused(run(*arguments, cwd=folder, **wide, **{variable: "abc"}), 2, f"'abc' (from {variable})")
    given = run(*arguments, "--cycles", "xyz", cwd=folder, **wide, **{variable: "abc"})
    refused(given, 2, "'xyz'")
    assert variable not in given.stderr
    debug = run("study", "list", cwd=folder, **wide, HPSCHED_DEBUG="perhaps")
    refused(debug, 2, "'perhaps' (from HPSCHED_DEBUG)")


def wrong(arguments: str, code: int, *words: str, id: str) -> Any:
    return pytest.param(arguments, code, words, id=id)


CREATE = "study create new -o light:objective"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        wrong("study status nope", 2, "'nope'", "there are: toy", id="unknown study"),
        wrong("worker attach nope", 2, "'nope'", "there are: toy", id="attach to unknown study"),
        wrong("study delete nope --yes", 2, "'nope'", "there are: toy", id="delete unknown study"),
        wrong("study create toy -o light:objective", 2, "'toy'", "--skip-if-exists",
              id="duplicate"),
        wrong(f"{CREATE} --like nope", 2, "'nope'", "there are: toy", id="like an unknown study"),
        wrong("study create ' ' -o light:objective", 2, "needs a name", id="no name"),
        wrong("study list --storage sqlite:///none.db", 2, "none.db", "--storage",
              id="no database"),
        wrong(f"{CREATE} --storage sqlite:////no/such/x.db", 2, "/no/such/x.db", "create it",
              id="database in no folder"),
        wrong("study list --storage rubbish", 2, "'rubbish'", "sqlite:///file.db", id="not a URL"),
        wrong("study list --storage oracle://u:secret@h/x", 2, "oracle://u:***@h/x", "PostgreSQL",
              id="unknown database"),
        wrong("study list --storage postgresql://user:p@secret@h/x", 2, "//user:***@h/x", "%40",
              id="an @ in the password"),
        wrong("study list --storage sqlite://", 2, "file", id="SQLite in memory"),
        wrong("study list --storage ''", 2, "storage given is empty", "leave --storage out",
              id="an empty storage"),
        wrong(f"{CREATE} --storage=", 2, "storage given is empty", "sqlite:///file.db",
              id="create in an empty storage"),
        wrong("study create new -o nothing:objective", 2, "'nothing'", "Run this from the folder",
              id="no module"),
        wrong("study create new -o nothing.py:objective", 2, "nothing.py", "no file", id="no file"),
        wrong("study create new -o light:nothing", 2, "'nothing'", "its functions are: objective",
              id="no function"),
        wrong("study create new -o light:x", 2, "'light:x' is int", id="not a function"),
        wrong("study create new -o calls:nothing", 2, "'calls:nothing'", "the arguments ()",
              "def objective(trial)", id="an objective that takes nothing"),
        wrong("study create new -o calls:more", 2, "(trial, data)", "'data'", "defaults",
              id="an objective that takes more than a trial"),
        wrong("study create new -o light", 2, "'light'", "module:function", id="not of the form"),
        wrong("study create new", 2, "--objective", "HPSCHED_OBJECTIVE", id="no objective"),
        wrong("study create new -o syntax:objective", 2, "SyntaxError", "syntax.py, line 1", "Mend",
              id="syntax error"),
        wrong("study create new -o raises:objective", 2, "RuntimeError: no data in /data [at all]",
              "(raises.py:1)", "Mend", id="raises while imported"),
        wrong("study create new -o exits:objective", 2, "SystemExit: 7", "(exits.py:2)",
              id="exits while imported"),
        wrong("study create new -o needs:objective", 2, "'a_package_nobody_has'", "install it",
              id="needs what is not installed"),
        wrong(f"{CREATE} --trials 3 --cycles 3", 2, "trials and cycles", "choose one",
              id="two budgets"),
        wrong(f"{CREATE} --cycles 0", 2, "cycles=0", "above 0", id="no cycles"),
        wrong(f"{CREATE} --trials 0", 2, "trials=0", "above 0", id="no trials"),
        wrong(f"{CREATE} --trials many", 2, "--trials", "integer", "'many'",
              id="trials not a number"),
        wrong(f"{CREATE} --cycles abc", 2, "--cycles", "number", "'abc'", id="cycles in words"),
        wrong(f"{CREATE} --timeout nonsense", 2, "'nonsense'", "30m", id="timeout nonsense"),
        wrong(f"{CREATE} --timeout -3h", 2, "'-3h'", "8h", id="timeout negative"),
        wrong(f"{CREATE} --sampler magic", 2, "'magic'", "hpsched, tpe, gp", id="unknown sampler"),
        wrong(f"{CREATE} --direction up", 2, "'up'", "maximize", id="unknown direction"),
        wrong(f"{CREATE} --reduction-factor 1", 2, "reduction_factor=1", "2", id="reduction by 1"),
        wrong("study list -f xml", 2, "'xml'", "json", id="unknown format of list"),
        wrong("study best toy -f keras", 2, "'keras'", "json", id="unknown format of best"),
        wrong("study import -", 2, "Nothing came on standard input", "hpsched study export NAME",
              id="import of nothing"),
        wrong("study export toy -f xml", 2, "'xml'", "csv", id="unknown format of export"),
        wrong("study status toy --watch -f json", 2, "--watch", id="watch as json"),
        wrong("study report toy -o /no/such/r.html", 2, "/no/such/r.html",
              id="report in no folder"),
        wrong("study report toy -o .", 2, "'.'", "name a file", id="report over a folder"),
        wrong("study export toy -o /no/such/x.json", 2, "/no/such/x.json", "--output",
              id="export in no folder"),
        wrong("study confirm toy --top 0", 2, "top=0", "at least 1", id="confirm none"),
        wrong("schedule plot wave", 2, "wave", "one_cycle", id="unknown schedule"),
        wrong("schedule plot -o /no/such/s.html", 2, "/no/such/s.html", id="plot in no folder"),
        wrong("lr-find light:objective -o /no/such/lr.html", 2, "/no/such/lr.html",
              id="lr-find into no folder"),
        wrong("lr-find light:objective --start-lr 1 --end-lr 0.1", 2, "1.0", "0.1",
              id="lr-find reversed"),
        wrong("lr-find toy:train -o lr.bmp", 2, "lr.bmp", ".png", ".json", id="lr-find to .bmp"),
        wrong("lr-find toy:train -o .", 2, "it is a folder", id="lr-find into a folder"),
        wrong("lr-find toy:train --weight-decays 1e-3,high", 2, "--weight-decays", "1e-3,high",
              id="weight decays in words"),
        wrong("lr-find toy:train --weight-decays=-1e-3", 2, "'-1e-3'", "0 or more",
              id="negative weight decay"),
        wrong("lr-find toy:train --weight-decays=1e-3,0.001", 2, "each once",
              id="a weight decay twice"),
        wrong("lr-find toy:train --weight-decays=", 2, "1e-3,1e-4", id="no weight decays"),
        wrong("lr-find toy:train --replicates 0", 2, "--replicates", id="no replicates"),
        wrong("lr-find toy:train --validate-every 0", 2, "--validate-every", id="every 0 steps"),
        wrong("lr-find toy:train --total-steps 0", 2, "--total-steps", id="no total steps"),
        wrong("lr-find toy:train --start-lr=-1", 2, "-1.0", id="lr-find from a negative rate"),
        wrong("lr-find toy:train --end-lr=-1", 2, "-1.0", id="lr-find to a negative rate"),
        wrong("lr-find toy:train --start-lr 0 --mode linear", 2, "0.0", "positive",
              id="lr-find from 0"),
        wrong("lr-find toy:train --mode cosine", 2, "'cosine'", "linear", id="lr-find mode"),
        wrong("lr-find toy:train -f xml", 2, "'xml'", "yaml", id="lr-find format"),
        wrong("schedule plot -o s.bmp", 2, "s.bmp", ".html", id="schedule plot to .bmp"),
        wrong("lr-find toy:objective", 1, "'toy:objective' failed", "toy.py", "train(cycle)",
              id="lr-find of an objective"),
        wrong("dashboard --port 99999", 2, "--port", "65535", "'99999'", id="no such port"),
        wrong("study frobnicate", 2, "frobnicate", id="unknown command"),
    ],
)  # fmt: skip
def test_wrong_calls(finished: Path, arguments: str, code: int, words: tuple[str, ...]) -> None:
    before = dump(finished)
    done = run(*shlex.split(arguments), cwd=finished)
    refused(done, code, *words)
    assert "secret" not in done.stderr
    assert dump(finished) == before


def test_debug_shows_the_traceback(finished: Path) -> None:
    done = run("--debug", "study", "status", "nope", cwd=finished)
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "StudyNotFoundError" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "password"),
    [
        ("study list", "secret"),
        ("study list", "p%40secret%2F"),
        ("--debug study list", "secret"),
        ("study create s -o light:objective", "secret"),
        ("worker attach s", "secret"),
        ("doctor", "secret"),
    ],
)
def test_an_unreachable_database_keeps_the_password(
    folder: Path, arguments: str, password: str
) -> None:
    url = NO_SERVER.replace("secret", password)
    done = run(*arguments.split(), cwd=folder, HPSCHED_STORAGE=url)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1
    assert "postgresql+psycopg://user:***@127.0.0.1:1/x" in said
    assert "server is running" in said
    assert "secret" not in said
    assert ("Traceback" in said) == ("--debug" in arguments)


def test_a_text_file_is_no_database(folder: Path) -> None:
    (folder / "hpsched.db").write_text("dear diary, " * 100)
    refused(run("study", "list", cwd=folder), 1, "hpsched.db", "not a database", "Check")
    assert (folder / "hpsched.db").read_text() == "dear diary, " * 100


def test_another_programs_database_stays_as_it_is(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "hpsched.db")) as connection:
        connection.execute("CREATE TABLE studies (id INTEGER, school TEXT)")
    before = dump(folder)
    for arguments in (["study", "list"], ["study", "create", "s", "-o", "light:objective"]):
        refused(
            run(*arguments, cwd=folder), 1, "studies", "id, school", "another program", "--stor"
        )
    assert dump(folder) == before


def test_a_schema_of_another_optuna(folder: Path) -> None:
    new_study(folder, "light:objective")
    with closing(sqlite3.connect(folder / "hpsched.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v1.3.0.a'")
    before = dump(folder)
    refused(run("study", "list", cwd=folder), 1, "hpsched.db", "optuna storage upgrade")
    assert dump(folder) == before


# -- objectives that go wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("returns_none", 1, ["returned None", "return a number"]),
        ("train_returns_none", 1, ["train returned None", "return the validation result"]),
        ("never_schedules", 1, ["cycle.schedule(optimizer)"]),
        ("never_steps", 1, ["took 0 of the cycle's 60 steps", "schedule.step(loss)"]),
        ("is_nan", 1, ["nan at the very first step", "Check the data"]),
        ("empty_loader", 1, ["yields no batches", "drop_last"]),
        ("reversed_range", 2, ["max_lr=(1.0, 0.01)", "swap"]),
        ("pct_start", 2, ["pct_start=1.5", "[0, 1]"]),
        ("momenta", 2, ["base_momentum=(0.8, 0.97)", "max_momentum=(0.9, 0.98)", "keep"]),
        ("momentum_of_one", 2, ["max_momentum=1.0", "[0, 1)"]),
        ("negative_rate", 2, ["max_lr=(-0.1, 1.0)", "(0, inf)"]),
        ("no_total_steps", 2, ["total_steps=3_000"]),
    ],
)
def test_an_objective_that_breaks_the_contract(
    folder: Path, function: str, code: int, words: list[str]
) -> None:
    new_study(folder, f"broken:{function}", trials=4)
    done = run("worker", "attach", "s", cwd=folder)
    refused(done, code, *words, "Trial 0 failed", "attach again")
    (trial,) = reopen(folder).trials
    assert trial.state == TrialState.FAIL
    assert words[0] in trial.user_attrs[records.ERROR]


def test_of_a_failed_trial_what_it_finished_counts_as_spent(folder: Path) -> None:
    new_study(folder, "broken:train_returns_none", trials=4)
    done = run("worker", "attach", "s", cwd=folder)
    refused(done, 1, "the range tests and cycles that it finished count as spent")
    (trial,) = reopen(folder).trials
    sweep = records.sweep(trial)
    assert sweep is not None and not records.cycles(trial)
    spent = json.loads(ok("study", "status", "s", "-f", "json", cwd=folder))["cost"]
    assert spent["steps"] == sweep.steps  # without the cycle that ended with None


@pytest.mark.parametrize(
    ("function", "reason"),
    [("raises", "KeyError: 'the data set is gone'"), ("exits", "SystemExit: 7")],
)
def test_three_failures_in_a_row_end_the_worker(folder: Path, function: str, reason: str) -> None:
    new_study(folder, f"broken:{function}", trials=4)
    done = run("worker", "attach", "s", cwd=folder)
    refused(done, 1, "3 trials failed in a row", reason, "(broken.py:", "attach again")
    trials = reopen(folder).trials
    assert [trial.state for trial in trials] == 3 * [TrialState.FAIL]
    assert reason in trials[0].user_attrs[records.ERROR]
    found = run("doctor", "--study", "s", cwd=folder)
    assert found.returncode == 1
    assert reason in " ".join(found.stdout.split())


def test_a_failure_with_debug_shows_the_line(folder: Path) -> None:
    new_study(folder, "broken:reversed_range", trials=4)
    done = run("--debug", "worker", "attach", "s", cwd=folder)
    assert done.returncode == 2
    assert "Traceback" in done.stderr and "broken.py" in done.stderr


def test_too_few_steps_for_rungs_warns_and_goes_on(folder: Path) -> None:
    new_study(folder, "broken:too_short_for_rungs", trials=2, confirm_top=0)
    done = run("worker", "attach", "s", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 completed, 0 pruned, 0 confirmed, 0 failed\n"
    (warning,) = [line for line in done.stderr.splitlines() if "WARNING" in line and "rung" in line]
    assert "total_steps=30" in warning and "min_steps" in warning


def test_corrupt_evidence_is_named_and_left_out(folder: Path) -> None:
    study = new_study(folder, "toy:objective", trials=3, confirm_top=0)
    trial = study.ask()
    trial.set_user_attr(records.RANGE_TEST, {"lrs": "garbage"})
    study.tell(trial, 0.5)
    before = reopen(folder).trials

    status = run("study", "status", "s", cwd=folder)
    assert status.returncode == 0
    assert f"trial 0: attribute {records.RANGE_TEST}" in " ".join(status.stdout.split())
    found = run("doctor", "--study", "s", cwd=folder)
    assert found.returncode == 1
    assert f"trial 0: attribute {records.RANGE_TEST}" in " ".join(found.stdout.split())
    worked = run("worker", "attach", "s", cwd=folder)
    assert worked.returncode == 0, worked.stderr
    assert worked.stderr.count(f"trial 0: attribute {records.RANGE_TEST}") == 1
    assert "Traceback" not in worked.stderr
    after = reopen(folder).trials
    assert after[0] == before[0]
    assert len(after) == 3
    assert records.RANGE_TEST in after[1].user_attrs  # it ran one of its own


def test_a_study_of_plain_optuna(folder: Path) -> None:
    study = optuna.create_study(study_name="s", storage=f"sqlite:///{folder}/hpsched.db")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    before = dump(folder)
    refused(run("worker", "attach", "s", cwd=folder), 2, "'s'", "not created by hpsched",
            "study.optimize")  # fmt: skip
    refused(run("study", "best", "s", cwd=folder), 2, "'s'", "study.optimize", "suggest_onecycle")
    refused(run("study", "create", "s", "-o", "light:objective", "--skip-if-exists", cwd=folder), 2,
            "'s'", "another name")  # fmt: skip
    assert "2 completed" in ok("study", "status", "s", cwd=folder)
    assert dump(folder) == before


def test_several_objectives_have_no_single_best(folder: Path) -> None:
    optuna.create_study(
        study_name="s", storage=f"sqlite:///{folder}/hpsched.db", directions=2 * ["minimize"]
    )
    for name in ("best", "confirm"):
        refused(run("study", name, "s", cwd=folder), 2, "several objectives", "best_trials")


# -- signals ---------------------------------------------------------------------------------------


@contextmanager
def started(
    *arguments: str, cwd: Path, **env: str
) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """A running command, and what it has said on stderr so far."""
    log = cwd / f"{'-'.join(arguments[:2])}-{time.monotonic_ns()}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command(*arguments), cwd=cwd, env=environment(**env), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
        )  # fmt: skip
    try:
        yield process, log.read_text
    finally:
        process.kill()
        process.communicate()


def wait_for(
    what: Callable[[], bool], process: subprocess.Popen[str], said: Callable[[], str]
) -> None:
    until = time.monotonic() + 60
    while not what():
        assert process.poll() is None and time.monotonic() < until, said()
        time.sleep(0.05)


def answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
        return bool(response.status == 200)
    return False


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_puts_the_trial_back(folder: Path, number: signal.Signals, code: int) -> None:
    new_study(folder, "toy:objective", trials=2, confirm_top=1, confirm_seeds=1)
    with started("worker", "attach", "s", cwd=folder, TOY_PAUSE="0.02") as (process, said):
        wait_for(lambda: "rung 2, 180 steps" in said(), process, said)  # 3.6 s long
        time.sleep(0.5)
        process.send_signal(number)
        assert process.wait(60) == code
        assert "nothing is lost" in said() and "hpsched worker attach s" in said()
        assert "Traceback" not in said()
        assert process.stdout is not None
        assert process.stdout.read() == "0 completed, 0 pruned, 0 confirmed, 0 failed\n"
    (waiting,) = reopen(folder).trials
    assert waiting.state == TrialState.WAITING
    held = {key: value for key, value in waiting.user_attrs.items() if key != records.OWNER}
    assert {"hpsched:rung:0", "hpsched:rung:1", records.RANGE_TEST} <= set(held)
    assert "hpsched:rung:2" not in held

    ok("worker", "attach", "s", cwd=folder)
    study = reopen(folder)
    search = [trial for trial in study.trials if records.CONFIRMS not in trial.user_attrs]
    assert len(search) == 2 and len(study.trials) == 3
    assert all(trial.state.is_finished() for trial in study.trials)
    resumed = study.trials[0]
    assert resumed.params == waiting.params
    assert held.items() <= resumed.user_attrs.items()  # what was done is not done again
    assert resumed.user_attrs["hpsched:rung:2"]["steps"] == STEPS


def test_a_second_signal_ends_it_at_once(folder: Path) -> None:
    (folder / "stubborn.py").write_text(STUBBORN)
    new_study(folder, "stubborn:objective", trials=1)
    with started("worker", "attach", "s", cwd=folder) as (process, said):
        wait_for((folder / "here").exists, process, said)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: "again to end at once" in said(), process, said)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)  # a second SIGTERM at once would count as the same
        assert process.wait(60) == 130  # 143: it ended by itself, some time after the first
