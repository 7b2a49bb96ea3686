"""Checkpoints of long cycles: an interrupted run goes on, bit for bit, and files never harm."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from fake_training import FakeTraining
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import hpsched
from hpsched import checkpoint, records, schedules
from hpsched.checkpoint import Keeper
from hpsched.cycle import Cycle, Outcome, execute
from hpsched.errors import StorageError, TrainingError, UsageError
from hpsched.suggest import suggest_onecycle

VALUES = {
    "max_lr": 0.1,
    "div_factor": 10.0,
    "pct_start": 0.3,
    "base_momentum": 0.85,
    "max_momentum": 0.95,
    "weight_decay": 1e-4,
    "final_div_factor": 1e4,
}
STEPS = 23  # rounds have 7 batches


class Ending(BaseException):
    """What a worker raises in a trial that must end."""


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    """Saves after every step."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    mine = Keeper(folder, every=0.0)
    token = checkpoint.keeper.set(mine)
    yield mine
    checkpoint.keeper.reset(token)


def files(keeper: Keeper) -> list[Path]:
    assert keeper.folder is not None
    return sorted(keeper.folder.iterdir())


def make_cycle(steps: int = STEPS, name: str = "study-trial0-rung2", **options: Any) -> Cycle:
    recipe = {k: v for k, v in VALUES.items() if k != "weight_decay"}
    options = {"values": VALUES, "seed": 5, "kind": "rung", **options}
    return Cycle(
        schedules=schedules.one_cycle(steps, **recipe, policy="cosine"),
        total_steps=steps,
        name=name,
        **options,
    )


class Data(Dataset[tuple[Tensor, Tensor]]):
    """Draws from every generator there is, so that none may be forgotten."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rng = np.random.default_rng(1)
        self.old = np.random.RandomState(1)
        self.plain = random.Random(1)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = sum(
            (random.random(), np.random.rand(), self.rng.random(), self.old.rand(),
             self.plain.random())
        )  # fmt: skip
        x = torch.full((4,), index / self.size) + 0.1 * noise * torch.randn(4)
        return x, (x.sum(dim=0, keepdim=True) > 1.5).float()


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@dataclass
class Training:
    """A real, small one. ``cut``: interrupted after that many batches."""

    workers: int = 0
    accumulate: int = 1
    how: str = "parts"
    own_generator: bool = False
    cut: int | None = None
    losses: list[float] = field(default_factory=list)
    saved: Any = None
    loaded: int = 0

    def __call__(self, cycle: Cycle) -> float:
        seed_all(cycle.seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(
            model.parameters(), lr=cycle.max_lr, momentum=0.95, weight_decay=cycle.weight_decay
        )
        generator = torch.Generator().manual_seed(3) if self.own_generator else None
        loader = DataLoader(
            Data(28), 4, shuffle=True, num_workers=self.workers, generator=generator
        )
        if self.how == "early":  # before there is a schedule
            self.saved = cycle.restore(model=model, optimizer=optimizer)
        schedule = cycle.schedule(optimizer)
        if self.how == "parts":
            self.saved = cycle.restore(model=model, optimizer=optimizer)
        elif self.how == "dict":
            self.saved = cycle.restore()
            if self.saved:
                model.load_state_dict(self.saved["model"])
                optimizer.load_state_dict(self.saved["optimizer"])
                schedule.load_state_dict(self.saved["schedule"])
        torch.randn(3)  # must not matter: what the loop draws is put back when it begins
        for x, y in cycle.batches(loader, self.accumulate):
            self.loaded += 1
            loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
            (loss / self.accumulate).backward()  # type: ignore[no-untyped-call]
            if self.loaded % self.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                schedule.step(loss)
                self.losses.append(loss.item())
                cycle.log(norm=model[0].weight.norm())
            if self.how == "dict":
                cycle.checkpoint(
                    lambda: {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                    }
                )
            else:
                cycle.checkpoint(model=model, optimizer=optimizer)
            if self.loaded == self.cut:
                raise Ending
        rest = float(torch.rand(1)) + random.random() + float(np.random.rand())  # all as it was
        return rest + sum(p.detach().double().sum().item() for p in model.parameters())


def run(training: Training, **options: Any) -> tuple[Outcome, Cycle]:
    cycle = make_cycle(**options)
    return execute(cycle, training), cycle


def interrupted(training: Training, **options: Any) -> None:
    with pytest.raises(Ending):
        run(training, **options)


def uninterrupted(**options: Any) -> tuple[Training, Outcome, Cycle]:
    token = checkpoint.keeper.set(Keeper())
    try:
        training = Training(**options)
        return training, *run(training)
    finally:
        checkpoint.keeper.reset(token)


# -- going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["parts", "dict", "early"])
@pytest.mark.parametrize("cut", [1, 6, 7, 8, 14, 20, 23])
def test_resumed_equals_uninterrupted_bit_for_bit(cut: int, how: str, keeper: Keeper) -> None:
    whole, expected, seen = uninterrupted(how=how)
    interrupted(Training(how=how, cut=cut))
    rest = Training(how=how)
    outcome, cycle = run(rest)
    assert (outcome.value, outcome.steps) == (expected.value, STEPS)
    assert rest.losses == whole.losses[cut:]
    assert rest.loaded == STEPS - cut
    assert cycle.curves() == seen.curves()
    assert cycle.losses() == seen.losses()


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("cut", [3, 7, 15])
def test_with_worker_processes(cut: int, own_generator: bool, keeper: Keeper) -> None:
    whole, expected, _ = uninterrupted(workers=2, own_generator=own_generator)
    interrupted(Training(workers=2, own_generator=own_generator, cut=cut))
    rest = Training(workers=2, own_generator=own_generator)
    assert run(rest)[0].value == expected.value
    assert rest.losses == whole.losses[cut:]


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cuts=st.lists(st.integers(1, STEPS), min_size=1, max_size=4),
    own_generator=st.booleans(),
    accumulate=st.sampled_from([1, 2]),
)
def test_interrupted_again_and_again(
    cuts: list[int], own_generator: bool, accumulate: int, keeper: Keeper
) -> None:
    keeper.forget("study-trial0-rung2")
    options: Any = {"own_generator": own_generator, "accumulate": accumulate}
    expected = uninterrupted(**options)[1].value
    for cut in cuts:  # batches of each piece; some end in the middle of a step
        training = Training(cut=cut, **options)
        try:
            assert run(training)[0].value == expected
            return
        except Ending:
            pass
    assert run(Training(**options))[0].value == expected


KILLED = """
import os, sys
sys.path[:0] = ["tests/unit", "tests"]
import test_checkpoint as t

class Killed(t.Training):
    def __call__(self, cycle):
        try:
            return super().__call__(cycle)
        except t.Ending:
            os.kill(os.getpid(), 9)

print(t.run(Killed(cut=int(sys.argv[1]) or None))[0].value.hex())
"""


def test_a_killed_process_is_followed_by_another(tmp_path: Path) -> None:
    folder, other = tmp_path / "shared", tmp_path / "other"
    folder.mkdir()
    other.mkdir()

    def start(cut: int, folder: Path = folder) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(cut)],
            env={**os.environ, "HPSCHED_CHECKPOINTS": str(folder), checkpoint.SECONDS: "0"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    assert start(9).returncode == -9
    assert len(list(folder.iterdir())) == 1
    second = start(0)
    assert second.returncode == 0, second.stderr
    # In a process of its own too: sums depend on the number of threads.
    assert second.stdout == start(0, other).stdout != ""


def test_two_loaders_go_on_together(keeper: Keeper) -> None:
    def train(cycle: Cycle, cut: int | None = None) -> float:
        seed_all(cycle.seed)
        weight = nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.SGD([weight], lr=cycle.max_lr)
        schedule = cycle.schedule(optimizer)
        first, second = (DataLoader(Data(n), 2, shuffle=True) for n in (10, 14))
        saved = cycle.restore(optimizer=optimizer)
        if saved:
            weight.data.copy_(saved["weight"])
        pairs = zip(cycle.batches(first), cycle.batches(second), strict=True)
        for (a, _), (b, _) in pairs:
            optimizer.zero_grad()
            loss = ((weight - a.mean(0) + b.mean(0)) ** 2).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step(loss)
            cycle.checkpoint({"weight": weight.detach()}, optimizer=optimizer)
            if cycle.steps == cut:
                raise Ending
        return weight.detach().double().sum().item()

    expected = execute(make_cycle(name="whole"), train).value
    for cut in (5, 7, 12):
        with pytest.raises(Ending):
            execute(make_cycle(), lambda cycle, cut=cut: train(cycle, cut))
    assert execute(make_cycle(), train).value == expected


def test_a_loop_of_ones_own(keeper: Keeper) -> None:
    def train(cycle: Cycle, cut: int = 0) -> float:
        torch.manual_seed(cycle.seed)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cycle.max_lr)
        schedule = cycle.schedule(optimizer)
        total = (cycle.restore() or {"total": 0.0})["total"]
        while cycle.steps < cycle.total_steps:
            total += float(torch.rand(1))
            schedule.step(1.0)
            cycle.checkpoint(total=total)
            if cycle.steps == cut:
                raise Ending
        return float(total)

    expected = execute(make_cycle(name="whole"), train).value
    with pytest.raises(Ending):
        execute(make_cycle(), lambda cycle: train(cycle, 9))
    assert execute(make_cycle(), train).value == expected


def test_seconds_add_up_and_steps_count_once(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("hpsched.cycle.time.monotonic", lambda: now[0])

    def train(cycle: Cycle, cut: int = 0) -> float:
        schedule = cycle.schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], cycle.max_lr))
        cycle.restore()
        while cycle.steps < cycle.total_steps:
            now[0] += 10.0
            schedule.step(1.0)
            cycle.checkpoint()
            if cycle.steps == cut:
                now[0] += 500.0  # lost
                raise Ending
        return 0.0

    with pytest.raises(Ending):
        execute(make_cycle(), lambda cycle: train(cycle, 9))
    now[0] += 3600.0  # in the queue
    outcome = execute(make_cycle(), train)
    assert (outcome.steps, outcome.seconds) == (STEPS, 10.0 * STEPS)


# -- when ------------------------------------------------------------------------------------------


def test_it_saves_once_a_minute_and_calls_the_function_only_then(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper.every, now, calls = 60.0, [0.0], []
    monkeypatch.setattr("hpsched.cycle.time.monotonic", lambda: now[0])

    def train(cycle: Cycle) -> float:
        schedule = cycle.schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], cycle.max_lr))

        def state() -> dict[str, Any]:
            calls.append(cycle.steps)
            return {}

        while cycle.steps < cycle.total_steps:
            now[0] += 25.0
            schedule.step(1.0)
            cycle.checkpoint(state)
        return 0.0

    execute(make_cycle(), train)
    assert calls == [3, 6, 9, 12, 15, 18, 21]


def test_a_worker_that_is_being_ended_has_one_more_at_once(keeper: Keeper) -> None:
    keeper.every = 3600.0
    seen = []

    def train(cycle: Cycle) -> float:
        schedule = cycle.schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], cycle.max_lr))
        assert not keeper.used
        while cycle.steps < cycle.total_steps:
            schedule.step(1.0)
            cycle.checkpoint(at=cycle.steps)
            seen.append((cycle.steps, keeper.used))
            if cycle.steps == 4:
                keeper.ending = Ending
        return 0.0

    with pytest.raises(Ending, match=r"study-trial0-rung2: step 5 of 23"):
        execute(make_cycle(), train)
    assert seen == [(step, True) for step in range(1, 5)]
    assert not keeper.used  # no run is in hand
    keeper.ending = None
    again = make_cycle()
    assert again.restore() == {"at": 5}


def test_the_end_waits_for_the_end_of_a_step(keeper: Keeper) -> None:
    keeper.ending = Ending
    training = Training(accumulate=2)
    interrupted(training)
    assert training.loaded == 2
    keeper.ending = None
    assert run(Training(accumulate=2))[0].value == uninterrupted(accumulate=2)[1].value


@pytest.mark.parametrize("kind", ["rung", "range_test"])
def test_an_end_where_nothing_is_saved(kind: str, tmp_path: Path) -> None:
    mine = Keeper(tmp_path if kind == "range_test" else None, every=0.0, ending=Ending)
    token = checkpoint.keeper.set(mine)
    try:
        cycle = make_cycle(kind=kind)
    finally:
        checkpoint.keeper.reset(token)
    with pytest.raises(Ending):
        cycle.checkpoint()
    assert not mine.used
    assert not list(tmp_path.iterdir())


def test_without_a_folder_nothing_happens() -> None:
    cycle = make_cycle()

    def never() -> dict[str, Any]:
        raise AssertionError

    cycle.checkpoint(never)
    assert cycle.restore(model=None) is None


def test_the_environment_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPSCHED_CHECKPOINTS", str(tmp_path))
    monkeypatch.setenv("HPSCHED_CHECKPOINT_SECONDS", "7.5")
    assert checkpoint.current() == Keeper(tmp_path, 7.5)
    assert checkpoint.current() is checkpoint.current()
    monkeypatch.delenv("HPSCHED_CHECKPOINTS")
    monkeypatch.delenv("HPSCHED_CHECKPOINT_SECONDS")
    assert checkpoint.current() == Keeper(None, 60.0)


@pytest.mark.parametrize(
    ("folder", "seconds", "message"),
    [
        ("missing", "60", r"missing', which is no folder: make it first"),
        ("", "soon", r"HPSCHED_CHECKPOINT_SECONDS='soon': a number of seconds"),
        ("", "-1", r"-1.0 seconds between checkpoints"),
        ("", "nan", r"nan seconds between checkpoints"),
    ],
)
def test_an_environment_that_cannot_be_right(
    folder: str, seconds: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPSCHED_CHECKPOINTS", str(tmp_path / folder) if folder else "")
    monkeypatch.setenv("HPSCHED_CHECKPOINT_SECONDS", seconds)
    with pytest.raises(UsageError, match=message):
        make_cycle()


# -- misuse ----------------------------------------------------------------------------------------


def drive(cycle: Cycle) -> Any:
    return cycle.schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], cycle.max_lr))


def test_called_before_the_step(keeper: Keeper) -> None:
    def train(cycle: Cycle) -> float:
        schedule = drive(cycle)
        for _ in cycle.batches([1, 2]):
            cycle.checkpoint()
            schedule.step(1.0)
        return 0.0

    with pytest.raises(TrainingError, match=r"1 batches taken beyond step 0: call it right after"):
        execute(make_cycle(), train)


def test_called_before_there_is_a_schedule(keeper: Keeper) -> None:
    make_cycle().checkpoint(x=1)
    assert files(keeper) == []


def test_restored_after_the_first_step(keeper: Keeper) -> None:
    cycle = make_cycle()
    drive(cycle).step(1.0)
    with pytest.raises(TrainingError, match="called after step 1: call it before the loop"):
        cycle.restore()


def test_a_name_that_was_not_saved(keeper: Keeper) -> None:
    cycle = make_cycle()
    drive(cycle).step(1.0)
    cycle.checkpoint(net=nn.Linear(1, 1))
    with pytest.raises(TrainingError, match=r"cycle.restore\(model=…\): the checkpoint has \['net"):
        make_cycle().restore(model=nn.Linear(1, 1))


@pytest.mark.parametrize("thing", [np.zeros(3), Data(1), lambda: None])
def test_what_is_no_plain_data_is_refused_at_the_first_save(thing: Any, keeper: Keeper) -> None:
    cycle = make_cycle()
    drive(cycle).step(1.0)
    with pytest.raises(TrainingError, match=r"cannot be kept .*pass state_dicts, tensors, numbers"):
        cycle.checkpoint({"thing": thing})
    assert files(keeper) == []


def test_several_processes(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsched.ranks.size", lambda group=None: 2)
    for call in (Cycle.restore, Cycle.checkpoint):
        cycle = make_cycle()
        drive(cycle)
        with pytest.raises(UsageError, match="2 processes train this run together"):
            call(cycle)


def test_a_loader_that_has_become_shorter(keeper: Keeper) -> None:
    def train(cycle: Cycle, batches: int, cut: int = 0) -> float:
        schedule = drive(cycle)
        cycle.restore()
        for _ in cycle.batches(range(batches)):
            schedule.step(1.0)
            cycle.checkpoint()
            if cycle.steps == cut:
                raise Ending
        return 0.0

    with pytest.raises(Ending):
        execute(make_cycle(), lambda cycle: train(cycle, 10, cut=18))
    with pytest.raises(TrainingError, match="after 8 batches of round 1, but the loader has fewer"):
        execute(make_cycle(), lambda cycle: train(cycle, 5))


# -- files -----------------------------------------------------------------------------------------


def saved_run(cut: int = 9, **options: Any) -> None:
    interrupted(Training(cut=cut), **options)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 6},
        {"values": {**VALUES, "max_lr": 0.2}},
        {"steps": 24},
        {"name": "study-trial1-rung2"},
        {"name": "study/trial0-rung2"},
        {"policy": "linear"},
    ],
)
def test_a_file_is_for_the_very_same_run(other: dict[str, Any], keeper: Keeper) -> None:
    saved_run()
    (path,) = files(keeper)
    assert path.name.startswith("study-trial0-rung2-")
    assert path.suffix == ".checkpoint"
    assert make_cycle(**other).restore() is None
    assert make_cycle().restore() is not None


def test_names_are_safe(keeper: Keeper) -> None:
    name = "../../etc/" + "ü ' $(rm -rf) " * 30 + "-trial0-rung2"
    saved_run(name=name)
    (path,) = files(keeper)
    assert len(path.name) < 150
    assert path.name.isascii() and "/" not in path.name
    keeper.forget("../../etc/-trial0-rung2")
    assert files(keeper) == [path]
    keeper.forget(name)
    assert files(keeper) == []


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut off":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "of another version":
        path.write_bytes(bytes(data).replace(b"checkpoint 1", b"checkpoint 9"))
    elif how == "another program's":
        path.write_text("my notes " * 99)
    else:
        path.unlink()
        path.mkdir()


@pytest.mark.filterwarnings("ignore:no checkpoint could be written:UserWarning")
@pytest.mark.parametrize(
    "how",
    ["cut off", "flipped", "empty", "of another version", "another program's", "a folder"],
)
def test_what_cannot_be_read_costs_the_beginning_only(how: str, keeper: Keeper) -> None:
    saved_run()
    damage(files(keeper)[0], how)
    training = Training()
    with pytest.warns(UserWarning, match=r"cannot be read .*the run starts from its beginning"):
        outcome, _ = run(training)
    assert training.saved is None
    assert training.loaded == STEPS
    assert outcome.value == uninterrupted()[1].value


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(place: float, bit: int, keeper: Keeper) -> None:
    keeper.forget("study-trial0-rung2")
    saved_run(cut=3)
    (path,) = files(keeper)
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    if 21 <= at < 29:  # the step, which nobody trusts
        return
    data[at] ^= 1 << bit
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert make_cycle().restore() is None


def test_a_file_is_data_and_runs_no_code(keeper: Keeper, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    cycle = make_cycle()
    assert cycle._file is not None
    checkpoint._written.add(cycle._file)  # no look at what was written
    keeper.save(cycle._file, 3, {"state": Evil()})
    assert len(files(keeper)) == 1
    with pytest.warns(UserWarning, match="cannot be read"):
        assert cycle.restore() is None
    assert not (tmp_path / "owned").exists()


DISK_FULL = """
import resource, sys, warnings
from pathlib import Path
import torch
from hpsched import checkpoint
sys.path[:0] = ["tests/unit", "tests"]
import test_checkpoint as t

keeper = checkpoint.Keeper(Path(sys.argv[1]), every=0.0)
checkpoint.keeper.set(keeper)
cycle = t.make_cycle()
schedule = t.drive(cycle)
schedule.step(1.0)
cycle.checkpoint(x=torch.zeros(10))
before = t.files(keeper)[0].read_bytes()
for limit in (100, 20_000, 1_000_000):
    keeper._failed = False
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            schedule.step(1.0)
            cycle.checkpoint(x=torch.zeros(1_000_000))
    assert len(told) == 1, told
    assert "no checkpoint could be written" in str(told[0].message), told[0]
    assert told[0].filename == "<string>", told[0]
    assert [p.read_bytes() for p in t.files(keeper)] == [before]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
schedule.step(1.0)
cycle.checkpoint(x=torch.ones(1_000_000))
assert t.make_cycle().restore()["x"].sum() == 1_000_000
"""


def test_a_full_disk_costs_the_file_only(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", DISK_FULL, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_an_interrupt_while_saving_leaves_the_file_before(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_run()
    before = files(keeper)[0].read_bytes()

    def fsync(fd: int) -> None:
        raise Ending

    monkeypatch.setattr("hpsched.checkpoint.os.fsync", fsync)
    with pytest.raises(Ending):
        run(Training())
    assert [path.read_bytes() for path in files(keeper)] == [before]


def test_an_older_worker_does_not_put_back_the_clock(keeper: Keeper) -> None:
    def taken(steps: int) -> Cycle:
        cycle = make_cycle()
        schedule = drive(cycle)
        for _ in range(steps):
            schedule.step(1.0)
        return cycle

    taken(9).checkpoint(at=9)
    taken(4).checkpoint(at=4)
    assert make_cycle().restore() == {"at": 9}
    taken(12).checkpoint(at=12)
    assert make_cycle().restore() == {"at": 12}
    keeper.is_ours = lambda: False
    taken(20).checkpoint(at=20)
    assert make_cycle().restore() == {"at": 12}
    assert len(files(keeper)) == 1


# -- with a study ----------------------------------------------------------------------------------


def objective(train: Callable[[Cycle], float]) -> Callable[[optuna.Trial], float]:
    return lambda trial: suggest_onecycle(trial, total_steps=300, range_test=False).run(train)


def new_study(**options: Any) -> optuna.Study:
    return optuna.create_study(
        study_name="kept", sampler=hpsched.OneCycleSampler(seed=0),
        pruner=hpsched.CyclePruner(3), **options
    )  # fmt: skip


def saving(ends: Callable[[Cycle], BaseException | None]) -> Callable[[Cycle], float]:
    def train(cycle: Cycle) -> float:
        schedule = drive(cycle)
        total = (cycle.restore() or {"total": 0.0})["total"]
        torch.manual_seed(cycle.seed + cycle.steps)
        while cycle.steps < cycle.total_steps:
            total += float(torch.rand(1))
            schedule.step(1.0)
            if cycle.steps % 50 == 0:
                cycle.checkpoint(total=total)
            if (error := ends(cycle)) is not None:
                raise error
        return float(total)

    return train


def test_files_go_when_the_result_is_stored(keeper: Keeper) -> None:
    seen: list[list[str]] = []

    def look(cycle: Cycle) -> None:
        if cycle.steps == cycle.total_steps:
            seen.append([path.name[:18] for path in files(keeper)])

    study = new_study()
    study.optimize(objective(saving(look)), n_trials=1)
    assert seen == [["kept-trial0-rung1-"], ["kept-trial0-rung2-"]]
    assert files(keeper) == []


@pytest.mark.parametrize(
    "error", [RuntimeError("the data set is on fire"), MemoryError(), optuna.TrialPruned()]
)
def test_files_go_when_the_trial_ends_otherwise(error: Exception, keeper: Keeper) -> None:
    def ends(cycle: Cycle) -> Exception | None:
        assert cycle.steps != 60 or files(keeper)
        return error if cycle.steps == 60 else None

    new_study().optimize(objective(saving(ends)), n_trials=1, catch=RuntimeError)
    assert files(keeper) == []


@pytest.mark.parametrize("error", [Ending(), StorageError("away"), KeyboardInterrupt()])
def test_files_stay_for_a_trial_that_goes_back_into_the_queue(
    error: BaseException, keeper: Keeper
) -> None:
    study = new_study()

    def ends(cycle: Cycle) -> BaseException | None:
        return error if (cycle.rung, cycle.steps) == (2, 160) else None

    whole = new_study()
    whole.optimize(objective(saving(lambda cycle: None)), n_trials=1)
    trial = study.ask()
    with pytest.raises(type(error)):
        objective(saving(ends))(trial)
    assert len(files(keeper)) == 1
    study._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.WAITING)
    steps: list[int] = []

    def count(cycle: Cycle) -> None:
        steps.append(cycle.steps)

    study.optimize(objective(saving(count)), n_trials=1)
    assert steps == list(range(151, 301))
    record = records.cycles(study.trials[0])[-1]
    assert record.steps == 300
    assert files(keeper) == []


def test_a_file_that_outlived_its_result_goes_with_the_next_look(keeper: Keeper) -> None:
    study = new_study()
    trial = study.ask()
    objective(saving(lambda cycle: None))(trial)
    name = "kept-trial0-rung1"
    saved_run(name=name)
    study._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.WAITING)
    study.optimize(objective(saving(lambda cycle: None)), n_trials=1)
    assert files(keeper) == []


def test_files_of_a_trial_that_nobody_runs(keeper: Keeper) -> None:
    study = new_study()
    trial = study.ask()
    with pytest.raises(Ending):
        objective(saving(lambda cycle: Ending() if cycle.steps == 60 else None))(trial)
    (path,) = files(keeper)
    path.with_name(path.name + ".0123.tmp").touch()  # of a worker that was killed
    checkpoint.forget_trial("other", study.trials[0])
    assert len(files(keeper)) == 2
    checkpoint.forget_trial("kept", study.trials[0])
    assert files(keeper) == []


def test_the_final_training_keeps_its_file_until_it_has_ended(keeper: Keeper) -> None:
    recipe = suggest_onecycle(optuna.trial.FixedTrial(VALUES), total_steps=300)
    with pytest.raises(Ending):
        recipe.train(saving(lambda cycle: Ending() if cycle.steps == 60 else None), 100)
    assert [path.name[:8] for path in files(keeper)] == ["final-0-"]
    recipe.train(saving(lambda cycle: None), 100)
    assert files(keeper) == []


def test_range_tests_have_none(keeper: Keeper) -> None:
    def train(cycle: Cycle) -> float:
        if cycle.is_range_test:
            assert cycle.restore() is None
            cycle.checkpoint()
            assert files(keeper) == []
        return FakeTraining()(cycle)

    study = new_study()
    study.optimize(lambda t: suggest_onecycle(t, total_steps=300).run(train), n_trials=1)
    assert records.RANGE_TEST in study.trials[0].user_attrs


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, hpsched.checkpoint; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
