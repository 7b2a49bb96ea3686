"""Two gloo processes that search together: one decision each, and no rank waits for a dead one.

``seen``: both ranks run all peaceful scenarios in one go and write down what they saw; each test
looks at one. What kills ranks has processes of its own.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from optuna.trial import TrialState
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import hpsched
from hpsched import records, schedules
from hpsched.cycle import Cycle, execute
from hpsched.errors import RanksLostError, UsageError
from hpsched.integrations.distributed import on_all_ranks
from hpsched.worker import Worker

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/frameworks/ddp.md").read_text()
BLOCKS = re.findall(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
WORLD = 2
PATIENCE = 60.0  # of the tests with the ranks

X = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
Y = (X @ torch.randn(6, 3, generator=torch.Generator().manual_seed(2))).argmax(1)


def fit(
    cycle: Cycle,
    *,
    accumulate: int = 1,
    autocast: bool = False,
    at_step: Callable[[int], object] = lambda step: None,
    steps: int | None = None,
) -> dict[str, Any]:
    """A training run under DDP; what its optimizer was given, and the weights it ended with."""
    torch.manual_seed(cycle.seed)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
    )
    groups = [
        {"params": model.module[0].parameters(), "lr": cycle.max_lr / 10},
        {"params": model.module[3].parameters()},
    ]
    optimizer = torch.optim.SGD(groups, lr=cycle.max_lr, momentum=cycle.max_momentum)
    data = TensorDataset(X, Y)
    loader = DataLoader(data, 16, sampler=DistributedSampler(data, seed=cycle.seed % 2**31))
    used: list[tuple[float, ...]] = []
    optimizer.register_step_pre_hook(
        lambda opt, *_: used.append(
            (*(g["lr"] for g in opt.param_groups), opt.param_groups[0]["momentum"])
        )
    )
    seen = {"kind": cycle.kind, "name": cycle.name, "used": used, "lr": cycle.schedules.lr}
    schedule = cycle.schedule(optimizer)
    total = torch.tensor(0.0)
    try:
        for taken, (x, y) in enumerate(cycle.batches(loader, accumulate), start=1):
            last = taken % accumulate == 0
            with (
                nullcontext() if last else model.no_sync(),
                torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            ):
                loss = F.cross_entropy(model(x), y) / accumulate
            loss.backward()
            total += loss.detach()
            if last:
                at_step(taken // accumulate)
                if cycle.steps == steps:
                    break
                optimizer.step()
                optimizer.zero_grad()
                schedule.step(total)
                total.zero_()
    finally:
        count = range(len(used))
        seen["lr"] = [cycle.schedules.lr(step) for step in count]
        seen["momentum"] = [cycle.schedules.momentum(step) for step in count]
        seen["losses"] = list(cycle.losses())
        seen["stopped"] = cycle.stopped
        seen["weights"] = [p.detach().tolist() for p in model.parameters()]
        runs.append(seen)
    with torch.no_grad():
        error = (model(X).argmax(1) != Y).float().mean().item()
    return {"error": error}


#: What each call of `fit` saw, on this rank.
runs: list[dict[str, Any]] = []


# ------------------------------------------------------------------ what each rank does


def leading(train: Any, search: Callable[[], Any], **options: Any) -> dict[str, Any]:
    runs.clear()
    found = train.lead(search, **{"patience": PATIENCE, **options})
    return {"found": found, "runs": list(runs)}


def new_study() -> optuna.Study:
    return optuna.create_study(
        sampler=hpsched.OneCycleSampler(seed=3), pruner=hpsched.CyclePruner()
    )


def one_cycle(steps: int, kind: Any = "rung", **values: float) -> Cycle:
    full = {"max_lr": 0.3, "base_momentum": 0.85, "max_momentum": 0.95, **values}
    lr, momentum = schedules.one_cycle(steps, **full)
    return Cycle(
        values=full,
        schedules=schedules.OneCycleSchedules(lr, momentum),
        total_steps=steps,
        seed=7,
        kind=kind,
        name="one",
        progress=False,
    )


def whole_study() -> dict[str, Any]:
    @on_all_ranks
    def train(cycle: Cycle, rate_of_dropout: float) -> float:
        assert rate_of_dropout in (0.1, 0.2)
        return fit(cycle)["error"]

    def search() -> dict[str, Any]:
        def objective(trial: optuna.Trial) -> float:
            rate = trial.suggest_categorical("rate", [0.1, 0.2])
            recipe = hpsched.suggest_onecycle(trial, total_steps=150)
            return recipe.run(lambda cycle: train(cycle, rate_of_dropout=rate))

        study = new_study()
        study.optimize(objective, n_trials=6)
        hpsched.confirm(study, top=1, seeds=2)
        study.optimize(objective, n_trials=2)
        return {
            "states": [t.state.name for t in study.trials],
            "runs": [
                name
                for t in study.trials
                for name in t.user_attrs
                if name.startswith((records.RUNG, records.RANGE_TEST, records.CONFIRM))
                and "name" in (t.user_attrs[name] if isinstance(t.user_attrs[name], dict) else {})
            ],
            "best": hpsched.best(study).params,
        }

    return leading(train, search)


def parity() -> dict[str, Any]:
    @on_all_ranks
    def train(cycle: Cycle) -> float:
        return fit(cycle, accumulate=2, autocast=True)["error"]

    return leading(train, lambda: execute(one_cycle(60), train).value)


def divergence() -> dict[str, Any]:
    @on_all_ranks
    def train(cycle: Cycle) -> float:
        return fit(cycle)["error"]

    return leading(train, lambda: execute(one_cycle(200, max_lr=1e8), train).diverged)


def failures(broken: Callable[[Cycle], float]) -> dict[str, Any]:
    """Two trials: the first one's train is broken, the second one's not."""

    @on_all_ranks
    def train(cycle: Cycle, number: int) -> float:
        return broken(cycle) if number == 0 else fit(cycle)["error"]

    def search() -> Any:
        said = []
        for number in range(2):
            try:
                outcome = execute(one_cycle(20), lambda cycle: train(cycle, number))  # noqa: B023
                said.append(outcome.value)
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
        return said

    return leading(train, search)


def fails_everywhere(cycle: Cycle) -> float:
    raise RuntimeError("the disk is full")


def fails_on_rank_1(cycle: Cycle) -> float:
    error = fit(cycle)["error"]
    if dist.get_rank() == 1:
        raise ValueError("no validation data here")
    return error


def stops_early_on_rank_1(cycle: Cycle) -> float:
    model = nn.Linear(6, 3)
    schedule = cycle.schedule(torch.optim.SGD(model.parameters(), lr=0.1))
    steps = cycle.total_steps - dist.get_rank()
    for _ in range(steps):
        schedule._step += 1  # ranks that look at losses would wait for each other
    return 0.5


def misuse() -> dict[str, Any]:
    @on_all_ranks
    def train(cycle: Cycle) -> float:
        return 0.0

    said = []
    with pytest.raises(UsageError) as outside:
        train(one_cycle(20))
    said.append(str(outside.value))
    with pytest.raises(UsageError) as times:
        train.lead(lambda: None, patience=0)
    said.append(str(times.value))
    return {"said": said}


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "study": whole_study,
    "parity": parity,
    "divergence": divergence,
    "failure everywhere": lambda: failures(fails_everywhere),
    "failure on rank 1": lambda: failures(fails_on_rank_1),
    "apart": lambda: failures(stops_early_on_rank_1),
    "misuse": misuse,
}


def meet(rank: int, folder: str, seconds: float) -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=seconds),
    )


def work(rank: int, folder: str) -> None:
    meet(rank, folder, PATIENCE)
    torch.save({name: scenario() for name, scenario in SCENARIOS.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def start(target: Callable[..., None], folder: Path, *more: Any) -> list[Any]:
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=target, args=(rank, str(folder), *more)) for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    return processes


def end(processes: list[Any], seconds: float) -> list[int | None]:
    """Exit codes; None: it hung. A hang is what this is all about."""
    try:
        for process in processes:
            process.join(seconds)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


# ------------------------------------------------------------------ what was seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    assert end(start(work, folder), 250) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def without(run: dict[str, Any], *names: str) -> str:
    return repr({name: value for name, value in run.items() if name not in names})


def test_both_ranks_train_the_same_runs_to_the_same_weights(seen: list[dict[str, Any]]) -> None:
    first, second = (rank["study"]["runs"] for rank in seen)
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert without(one) == without(other)  # losses, weights, rates and ends, to the last bit
    kinds = [run["kind"] for run in first]
    assert kinds.count("range_test") == 3
    assert kinds.count("confirm") == 2
    assert kinds.count("rung") >= 6


def test_rank_0_alone_has_the_study_and_its_decisions(seen: list[dict[str, Any]]) -> None:
    found = seen[0]["study"]["found"]
    assert seen[1]["study"]["found"] is None
    assert len(found["runs"]) == len(seen[1]["study"]["runs"])  # what was stored was trained
    assert {"PRUNED", "COMPLETE"} == set(found["states"])
    assert found["best"]["max_lr"] > 0


def test_a_sweep_ends_early_on_both(seen: list[dict[str, Any]]) -> None:
    sweeps = [run for run in seen[1]["study"]["runs"] if run["kind"] == "range_test"]
    for sweep in sweeps:
        assert sweep["stopped"] is not None
        assert len(sweep["losses"]) == len(sweep["used"])


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("name", ["study", "parity"])
def test_the_optimizer_used_what_the_schedule_says(
    seen: list[dict[str, Any]], name: str, rank: int
) -> None:
    for run in seen[rank][name]["runs"]:
        small, rates, momenta = zip(*run["used"], strict=True)
        assert list(rates) == pytest.approx(run["lr"], rel=1e-12)
        assert list(small) == pytest.approx([lr / 10 for lr in run["lr"]], rel=1e-12)
        assert list(momenta) == pytest.approx(run["momentum"], rel=1e-12)


def test_accumulation_and_autocast(seen: list[dict[str, Any]]) -> None:
    (run,) = seen[0]["parity"]["runs"]
    assert len(run["used"]) == 60
    assert max(run["lr"]) == 0.3
    assert without(run) == without(seen[1]["parity"]["runs"][0])


def test_divergence_ends_both_at_once(seen: list[dict[str, Any]]) -> None:
    assert "loss" in seen[0]["divergence"]["found"]
    (first,), (second,) = (rank["divergence"]["runs"] for rank in seen)
    assert len(first["used"]) == len(second["used"]) < 100
    assert first["stopped"] == second["stopped"] == seen[0]["divergence"]["found"]


def test_a_failure_everywhere_is_told_as_it_is_and_the_next_run_goes_on(
    seen: list[dict[str, Any]],
) -> None:
    failed, value = seen[0]["failure everywhere"]["found"]
    assert failed == "RuntimeError: the disk is full"
    assert 0 <= value <= 1
    assert [len(rank["failure everywhere"]["runs"]) for rank in seen] == [1, 1]


def test_a_failure_of_another_rank_is_told_by_name(seen: list[dict[str, Any]]) -> None:
    failed, value = seen[0]["failure on rank 1"]["found"]
    assert failed.startswith("TrainingError: train failed on rank 1 of 2")
    assert "ValueError: no validation data here (test_ddp.py:" in failed
    assert 0 <= value <= 1


def test_ranks_that_took_other_steps(seen: list[dict[str, Any]]) -> None:
    failed, _ = seen[0]["apart"]["found"]
    assert "took 20, 19 optimizer steps" in failed
    assert "cycle.batches(loader)" in failed


@pytest.mark.parametrize("rank", range(WORLD))
def test_wrong_use_says_what_to_do(seen: list[dict[str, Any]], rank: int) -> None:
    outside, times = seen[rank]["misuse"]["said"]
    assert "train.lead(search) in each" in outside
    assert "patience=0" in times


def test_alone_the_decorator_changes_nothing() -> None:
    @on_all_ranks
    def train(cycle: Cycle, value: float) -> float:
        """Doc."""
        return value

    assert train(one_cycle(20), value=2.0) == 2.0
    assert train.lead(lambda: "found") == "found"
    assert (train.__name__, train.__doc__) == ("train", "Doc.")


def test_a_proxy_of_a_trial_is_refused() -> None:
    """optuna-integration's TorchDistributedTrial, for one: it has no study."""

    class Proxy(optuna.trial.BaseTrial):
        params: dict[str, Any] = {}  # noqa: RUF012
        user_attrs: dict[str, Any] = {}  # noqa: RUF012

        def set_user_attr(self, key: str, value: Any) -> None: ...

    Proxy.__abstractmethods__ = frozenset()
    recipe = hpsched.suggest_onecycle(Proxy(), total_steps=300)
    with pytest.raises(UsageError, match=r"Proxy.*rank 0 alone"):
        recipe.run(lambda cycle: 0.0)


# ------------------------------------------------------------------ ranks that are lost

TIMEOUT, GRACE = 20.0, 5.0  # seconds, of the process group and of lead


def kill(step: int) -> None:
    if step == 25:
        os.kill(os.getpid(), signal.SIGKILL)


def hang(step: int) -> None:
    if step == 25:
        os.kill(os.getpid(), signal.SIGSTOP)


def fail(step: int) -> None:
    if step == 25:
        raise ValueError("this rank only")


def lose(rank: int, folder: str, victim: int, how: Callable[[int], None]) -> None:
    """A worker of a study in a file; ``victim`` comes to grief in its second run."""
    meet(rank, folder, TIMEOUT)

    @on_all_ranks
    def train(cycle: Cycle) -> float:
        grief = rank == victim and cycle.kind == "rung" and not Path(f"{folder}/lost").exists()
        return fit(cycle, at_step=how if grief else lambda step: None)["error"]

    def objective(trial: optuna.Trial) -> float:
        return hpsched.suggest_onecycle(trial, total_steps=60).run(train)

    def search() -> None:
        study = hpsched.open_study("lost", f"sqlite:///{folder}/study.db", heartbeat=True)
        Worker(study, objective).run()

    try:
        train.lead(search, patience=PATIENCE, grace=GRACE)
    except RanksLostError as error:
        Path(f"{folder}/{rank}.txt").write_text(str(error))
        raise


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("victim", "how"),
    [(1, kill), (0, kill), (1, hang), (1, fail), (0, fail)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_lost_rank_ends_the_others_and_its_trial_is_run_again(
    tmp_path: Path,
    victim: int,
    how: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HPSCHED_HEARTBEAT", "1")
    monkeypatch.setenv("HPSCHED_GRACE", "3")
    storage = f"sqlite:///{tmp_path}/study.db"
    hpsched.create_study("lost", objective="train:objective", storage=storage, trials=2, seed=0)
    processes = start(lose, tmp_path, victim, how)
    other = 1 - victim
    processes[other].join(100)
    if how is hang:
        os.kill(processes[victim].pid, signal.SIGCONT)
    codes = end(processes, 60)
    assert codes[other] == 1, codes
    assert f"Rank {other} of 2 has lost the others" in (tmp_path / f"{other}.txt").read_text()
    if how is fail:
        assert "ValueError: this rank only" in (tmp_path / f"{victim}.txt").read_text()
        assert codes[victim] == 1
    (trial,) = hpsched.open_study("lost", storage).trials
    expected = TrialState.RUNNING if (victim, how) == (0, kill) else TrialState.WAITING
    assert trial.state == expected

    (tmp_path / "lost").touch()  # the next time all goes well
    (tmp_path / "meet").unlink(missing_ok=True)
    assert end(start(lose, tmp_path, victim, how), 240) == [0, 0]
    done = hpsched.open_study("lost", storage).trials
    assert all(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in done)
    assert len(done) >= 2


def fall_out_of_step(rank: int, folder: str) -> None:
    """All fail, but rank 0 has begun a reduction that the others have not."""
    meet(rank, folder, TIMEOUT)

    @on_all_ranks
    def train(cycle: Cycle) -> float:
        if rank == 0:
            dist.all_reduce(torch.ones(1000), async_op=True)
        raise ValueError("all ranks")

    with suppress(ValueError):  # it must not be taken for an ordinary failure
        train.lead(lambda: execute(one_cycle(20), train), patience=PATIENCE)


@pytest.mark.slow
def test_ranks_that_a_failure_left_out_of_step_end(tmp_path: Path) -> None:
    codes = end(start(fall_out_of_step, tmp_path), 100)
    assert set(codes) <= {1, -signal.SIGABRT}  # gloo aborts where sizes differ


@pytest.mark.slow
def test_the_page_runs_as_printed(tmp_path: Path) -> None:
    (script, *_) = [(title, body) for kind, title, body in BLOCKS if title]
    (tmp_path / script[0]).write_text(script[1])
    (typed,) = [body for kind, _, body in BLOCKS if kind == "sh"]
    assert typed == f"torchrun --nproc-per-node 2 {script[0]}\n"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *typed.split()[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "max_lr" in done.stdout
