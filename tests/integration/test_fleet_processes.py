"""A fleet of real processes on this node: they finish, crash, are killed, and lose their head."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from fleet import QUICK, STUBBORN, environment
from fleet import Fleet as Workers
from optuna.trial import TrialState

from hpsched import fleet, records
from hpsched.devices import CPU
from hpsched.fleet import Fleet, Restarts

ENDLESS = '{"rung0": 600, "rung1": 600, "rung2": 600}'


@contextmanager
def supervisor(workers: Workers, *options: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """``hpsched worker attach fake`` with these options, its storage in the environment."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hpsched", "worker", "attach", "fake", *options],
        cwd=workers.folder,
        env=environment(HPSCHED_STORAGE=workers.url, **env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        ours = children(process.pid)
        process.kill()
        process.communicate()
        for pid in ours:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def ended(process: subprocess.Popen[str], code: int, seconds: float = 60) -> tuple[str, str]:
    output, said = process.communicate(timeout=seconds)
    assert process.returncode == code, said
    assert "Traceback" not in said
    return output, said


def children(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(n) for task in tasks for n in (task / "children").read_text().split()]
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def starts(workers: Workers) -> list[int]:
    return [pid for pid, _, word in workers.calls() if word == "starts"]


def logs(workers: Workers) -> dict[str, str]:
    return {path.name: path.read_text() for path in workers.folder.glob("hpsched-logs/fake/*/*")}


def test_three_slots_finish_a_study(sqlite_fleet: Workers) -> None:
    sqlite_fleet.create(trials=6, seed=1, confirm_top=1)
    with supervisor(sqlite_fleet, "--devices", "cpu", "--per-device", "3") as process:
        sqlite_fleet.until(lambda: len(set(starts(sqlite_fleet))) == 3)
        workers = children(process.pid)
        output, said = ended(process, 0)
    trials = sqlite_fleet.study().trials
    assert [trial.number for trial in trials] == list(range(9))
    assert sum(records.is_confirmation(trial) for trial in trials) == 3
    assert all(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)
    names = [name for _, name, word in sqlite_fleet.calls() if word == "ends"]
    runs = [name for name in names if "range_test" not in name]
    assert len(runs) == len(set(runs))
    counts = re.fullmatch(r"(\d+) completed, (\d+) pruned, 3 confirmed, 0 failed\n", output)
    assert counts and int(counts[1]) + int(counts[2]) == 6, output
    assert "Next: hpsched study best fake" in said
    held = logs(sqlite_fleet)
    assert sorted(held) == ["cpu-1.log", "cpu-2.log", "cpu-3.log"]
    for number in (1, 2, 3):
        log = held[f"cpu-{number}.log"]
        assert log.startswith("=== ") and "start 1 on cpu\n" in log.splitlines(True)[0]
        for line in log.splitlines():
            assert f"[cpu/{number}] {line}\n" in said
    assert not any(map(is_alive, workers))
    devices = {w.device for w in fleet.read_workers(sqlite_fleet.study().user_attrs).values()}
    assert devices <= {"cpu"}


def test_a_killed_worker_is_replaced_and_its_trial_goes_on(sqlite_fleet: Workers) -> None:
    sqlite_fleet.create(trials=3, seed=1, confirm_top=0)
    options = ("--devices", "cpu", "--per-device", "2")
    with supervisor(sqlite_fleet, *options, PACE='{"rung0": 1}', **QUICK) as process:
        sqlite_fleet.until_starts("rung0")
        victim = next(pid for pid, name, _ in sqlite_fleet.calls() if "rung0" in name)
        os.kill(victim, signal.SIGKILL)
        _, said = ended(process, 0)
    assert "worker ended with SIGKILL; the next starts in 1 s" in said
    assert sum("start 2 on cpu" in log for log in logs(sqlite_fleet).values()) == 1
    trials = sqlite_fleet.study().trials
    assert len(trials) == 3
    assert all(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)


def test_a_worker_that_only_crashes_is_given_up(
    sqlite_fleet: Workers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (sqlite_fleet.folder / "train.py").write_text(
        "import os, signal\n"
        "def objective(trial):\n"
        "    print('here it comes', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    sqlite_fleet.create(trials=9, seed=1)
    monkeypatch.chdir(sqlite_fleet.folder)
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    held = Fleet(
        "fake", sqlite_fleet.url, (CPU,), logs=Path("logs"), restarts=Restarts(first=0, crashes=2)
    )
    lines: list[str] = []
    assert held.run(lambda slot, line: lines.append(f"{slot.name} {line}")) == 1
    assert lines.count("cpu/1 here it comes") == 2
    assert any("Segmentation fault" in line for line in lines)  # where it was: faulthandler
    said = caplog.messages[-1]
    assert "2 crashes in a row without a finished trial, the last with SIGSEGV" in said
    assert "given up" in said and "logs/cpu-1.log" in said
    assert held.slots[0].state == "given up"


def test_a_broken_objective_ends_its_slot(sqlite_fleet: Workers) -> None:
    (sqlite_fleet.folder / "train.py").write_text("def objective(trial): return 'rubbish'\n")
    sqlite_fleet.create(trials=9, seed=1)
    with supervisor(sqlite_fleet, "--devices", "cpu") as process:
        output, said = ended(process, 1)
    assert output == "0 completed, 0 pruned, 0 confirmed, 1 failed\n"
    assert "cpu/1: Error: The objective returned 'rubbish'" in said
    assert "start 2" not in "".join(logs(sqlite_fleet).values())


def until_two_train(workers: Workers) -> None:
    workers.until(lambda: len({pid for pid, name, _ in workers.calls() if "rung0" in name}) == 2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_puts_every_trial_back(sqlite_fleet: Workers, number: int, code: int) -> None:
    sqlite_fleet.create(trials=9, seed=1)
    options = ("--devices", "cpu", "--per-device", "2")
    with supervisor(sqlite_fleet, *options, PACE=ENDLESS) as process:
        until_two_train(sqlite_fleet)
        workers = children(process.pid)
        process.send_signal(number)
        output, said = ended(process, code)
    assert output == "0 completed, 0 pruned, 0 confirmed, 0 failed\n"
    assert "Interrupted; nothing is lost" in said
    assert "hpsched worker attach fake --devices cpu --per-device 2" in said
    assert "Interrupted" not in "".join(logs(sqlite_fleet).values())
    assert not any(map(is_alive, workers))
    assert {trial.state for trial in sqlite_fleet.study().trials} == {TrialState.WAITING}


def test_a_second_signal_ends_them_at_once(sqlite_fleet: Workers) -> None:
    (sqlite_fleet.folder / "train.py").write_text(STUBBORN)
    sqlite_fleet.create(trials=9, seed=1)
    log = sqlite_fleet.folder / "hpsched-logs"
    with supervisor(sqlite_fleet, "--devices", "cpu") as process:
        sqlite_fleet.until((sqlite_fleet.folder / "here").exists)
        process.send_signal(signal.SIGTERM)
        sqlite_fleet.until(
            lambda: any("SIGTERM: ending" in p.read_text() for p in log.glob("fake/*/*"))
        )
        process.send_signal(signal.SIGTERM)
        _, said = ended(process, 143)
    assert "killed" not in said


@pytest.mark.slow
def test_a_worker_that_does_not_end_is_killed(sqlite_fleet: Workers) -> None:
    deaf = "    import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    head, body = STUBBORN.split("    Path", 1)
    (sqlite_fleet.folder / "train.py").write_text(f"{head}{deaf}    Path{body}")
    sqlite_fleet.create(trials=9, seed=1)
    with supervisor(sqlite_fleet, "--devices", "cpu", "--grace", "1s") as process:
        sqlite_fleet.until((sqlite_fleet.folder / "here").exists)
        workers = children(process.pid)
        process.send_signal(signal.SIGTERM)
        _, said = ended(process, 143)
    assert "cpu/1: does not end; killed" in said
    assert not any(map(is_alive, workers))


def test_workers_do_not_outlive_a_killed_supervisor(sqlite_fleet: Workers) -> None:
    sqlite_fleet.create(trials=9, seed=1)
    options = ("--devices", "cpu", "--per-device", "2")
    with supervisor(sqlite_fleet, *options, PACE=ENDLESS) as process:
        until_two_train(sqlite_fleet)
        workers = children(process.pid)
        assert len(workers) == 2 and all(map(is_alive, workers))
        process.kill()
        sqlite_fleet.until(lambda: not any(map(is_alive, workers)))
    assert {trial.state for trial in sqlite_fleet.study().trials} == {TrialState.WAITING}
    assert all("the supervisor is gone" in log for log in logs(sqlite_fleet).values())


@pytest.mark.postgres
def test_a_password_is_in_no_list_of_processes(postgres_fleet: Workers) -> None:
    # The private server trusts everyone, so that any password will do.
    user, rest = postgres_fleet.url.split("@", 1)
    postgres_fleet.url = f"{user}:geheim@{rest}"
    postgres_fleet.create(trials=9, seed=1)
    with supervisor(postgres_fleet, "--devices", "cpu", PACE=ENDLESS) as process:
        postgres_fleet.until_starts("rung0")
        (worker,) = children(process.pid)
        for pid in (process.pid, worker):
            assert b"geheim" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        process.send_signal(signal.SIGTERM)
        output, said = ended(process, 143)
    assert "geheim" not in output + said + "".join(logs(postgres_fleet).values())


MIG = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 1g.5gb      Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 1g.5gb      Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
"""


def test_without_options_there_is_a_worker_on_each_gpu(sqlite_fleet: Workers) -> None:
    """Of a node that only looks as if it had some."""
    program = sqlite_fleet.folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{MIG}END\n")
    program.chmod(0o755)
    path = f"{sqlite_fleet.folder}:{os.environ['PATH']}"
    (sqlite_fleet.folder / "train.py").write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "def objective(trial):\n"
        "    seen = os.environ['CUDA_VISIBLE_DEVICES']\n"
        "    Path(seen).write_text(os.environ['HPSCHED_DEVICE'])\n"
        "    while len(list(Path().glob('MIG-*'))) < 2: time.sleep(0.1)\n"
        "    return 1.0\n"
    )
    sqlite_fleet.create(trials=2, seed=1, confirm_top=0)
    with supervisor(sqlite_fleet, PATH=path) as process:
        _, said = ended(process, 0)
    assert {p.name: p.read_text() for p in sqlite_fleet.folder.glob("MIG-*")} == {
        "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f": "cuda:0 NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb": "cuda:1 NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    }
    assert sorted(logs(sqlite_fleet)) == ["cuda0-1.log", "cuda1-1.log"]
    assert "[cuda:1/1] " in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--devices", "cuda:77"), ("'cuda:77' is no device here", "cpu")),
        (("--devices", "cpu,cpu"), ("cpu twice", "--per-device")),
        (("--devices", "cpu", "--logs", "train.py"), ("'train.py'", "--logs")),
        (("--grace", "soon"), ("--grace 'soon'", "90s")),
        (("--ray", "auto", "--devices", "cpu"), ("--ray 'auto'", "--gpus-per-worker")),
    ],
)
def test_wrong_calls(sqlite_fleet: Workers, options: tuple[str, ...], words: list[str]) -> None:
    sqlite_fleet.create(trials=9, seed=1)
    with supervisor(sqlite_fleet, *options) as process:
        output, said = ended(process, 2)
    assert output == ""
    for word in words:
        assert word in " ".join(said.split())
    assert not sqlite_fleet.study().trials


def test_options_from_the_environment_do_not_reach_the_workers(sqlite_fleet: Workers) -> None:
    sqlite_fleet.create(trials=2, seed=1, confirm_top=0)
    given = {"DEVICES": "cpu", "PER_DEVICE": "2", "LOGS": "elsewhere", "GRACE": "5s"}
    env = {f"HPSCHED_WORKER_ATTACH_{key}": value for key, value in given.items()}
    with supervisor(sqlite_fleet, **env) as process:
        _, said = ended(process, 0)
    assert "2 workers on cpu; logs in elsewhere" in said
    assert sorted(path.name for path in (sqlite_fleet.folder / "elsewhere").iterdir()) == [
        "cpu-1.log", "cpu-2.log",
    ]  # fmt: skip
