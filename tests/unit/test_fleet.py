"""The fleet's decisions, by value; tests/integration/test_fleet_processes.py has the processes."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpsched import fleet
from hpsched.cli.fleet_screen import node_table
from hpsched.devices import CPU, Device
from hpsched.errors import UsageError
from hpsched.fleet import Fleet, Restarts, Slot, seconds_left, worker_environment
from hpsched.records import WorkerRecord

HOURS = 3 * 3600.0


@pytest.mark.parametrize(
    ("code", "crashes", "seconds", "delay"),
    [
        (0, 0, 5, None),  # finished
        (1, 0, 5, None),  # the objective is broken
        (2, 0, 5, None),  # the call was wrong
        (75, 0, 5, 60),  # the database stayed away, however often
        (75, 99, 5, 60),
        *[(-9, n, 5, d) for n, d in enumerate((1, 2, 4, 8, 16, 32, 60, 60, 60), start=1)],
        (-11, 10, 5, None),
        (134, 3, 5, 4),
        (-9, 7, 600, 1),  # after a long time of work
        (-9, 10, HOURS, None),  # which never finished a trial
    ],
)
def test_when_a_worker_starts_again(
    code: int, crashes: int, seconds: float, delay: float | None
) -> None:
    assert Restarts().delay(code, crashes, seconds) == delay


def test_how_a_process_ended() -> None:
    assert fleet.how(3) == "exit code 3"
    assert fleet.how(-signal.SIGSEGV) == "SIGSEGV"
    assert fleet.how(-63) == "signal 63"


RECORD = WorkerRecord(
    host="h", pid=1, device="cpu", started=0, seen=100, state="running",
    trial=3, kind="rung", rung=1, step=100, total_steps=1000,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({"step": 200, "seen": 150}, 400),
        ({"step": 1000, "seen": 150}, 0),
        ({"step": 100, "seen": 150}, None),
        ({"step": 200, "seen": 100}, None),
        ({"step": 200, "seen": 150, "rung": 2}, None),
        ({"step": 200, "seen": 150, "trial": 4}, None),
        ({"step": None, "seen": 150}, None),
    ],
)
def test_seconds_left_in_a_run(change: dict[str, Any], left: float | None) -> None:
    assert seconds_left(RECORD, replace(RECORD, **change)) == left


def test_seconds_left_are_not_known_at_first() -> None:
    assert seconds_left(None, RECORD) is seconds_left(RECORD, None) is None


GPU = Device(label="cuda:1", visible="MIG-1", name="A100")


def test_a_worker_sees_its_device_only() -> None:
    base = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0,1", "HPSCHED_WORKER_ATTACH_DEVICES": "all"}
    env = worker_environment(base, GPU, 2)
    assert env == {
        "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "MIG-1", "HPSCHED_DEVICE": "cuda:1 A100",
        "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip
    assert worker_environment({}, CPU)["CUDA_VISIBLE_DEVICES"] == ""
    assert "HIP_VISIBLE_DEVICES" not in env
    assert worker_environment({"HIP_VISIBLE_DEVICES": "0,1"}, GPU)["HIP_VISIBLE_DEVICES"] == "MIG-1"


def test_workers_on_the_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert worker_environment({}, CPU, 3)["OMP_NUM_THREADS"] == "5"
    assert worker_environment({}, CPU, 32)["OMP_NUM_THREADS"] == "1"
    assert worker_environment({"OMP_NUM_THREADS": "7"}, CPU, 3)["OMP_NUM_THREADS"] == "7"
    assert "OMP_NUM_THREADS" not in worker_environment({}, CPU)
    assert "OMP_NUM_THREADS" not in worker_environment({}, GPU, 3)


def test_every_worker_has_a_log(tmp_path: Path) -> None:
    held = Fleet("s", "sqlite:///x.db", (GPU, CPU), 2, logs=tmp_path / "a" / "b")
    assert [slot.name for slot in held.slots] == ["cuda:1/1", "cuda:1/2", "cpu/1", "cpu/2"]
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == ["cpu-1.log", "cpu-2.log", "cuda1-1.log", "cuda1-2.log"]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/logs.*--logs"):
        Fleet("s", "sqlite:///x.db", (CPU,), logs=tmp_path / "file" / "logs")


def drawn(slots: tuple[Slot, ...], width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(node_table(slots, width))
    return console.export_text().splitlines()


def test_the_screen_of_the_node(tmp_path: Path) -> None:
    slots = Fleet("s", "sqlite:///x.db", (GPU,), 3, logs=tmp_path).slots
    at = replace(RECORD, step=600, seen=200, lr=0.0123, loss=0.5, done=2, failed=1)
    slots[0].record, slots[0].first, slots[0].starts, slots[0].done = at, RECORD, 2, 5
    slots[0].process = subprocess.Popen(["true"])
    slots[0].process.wait()
    slots[1].code, slots[1].crashes = -11, 10
    slots[2].code = 1
    pid = slots[0].process.pid
    lines = [line.split() for line in drawn(slots, 140)]
    row = next(line for line in lines if "cuda:1/1" in line)
    assert row[:8] == ["cuda:1/1", str(pid), "running", "3", "rung", "1", "600/1000", row[7]]
    assert row[8:18] == ["0.0123", "0.5", "▁", "1", "min", "20", "s", "7", "1", "1"]
    assert ["cuda:1/2", "given", "up", "0", "0", "0"] in lines
    assert ["cuda:1/3", "exit", "code", "1", "0", "0", "0"] in lines
    for width, hidden in ((100, "restarts"), (80, "loss")):
        narrow = drawn(slots, width)
        assert max(map(len, narrow)) <= width
        assert hidden not in narrow[1]
        (row,) = [line.split() for line in narrow if "cuda:1/1" in line]
        assert {"600/1000", "0.0123", "min", "7"} <= set(row), row


@pytest.mark.parametrize(
    ("study", "folder"), [("resnet-50", "resnet-50"), ("a/b [c]", "a_b__c_"), ("..", "_.")]
)
def test_logs_lie_below_this_folder(study: str, folder: str) -> None:
    path = fleet.logs_folder(study)
    assert path.parts[:2] == ("hpsched-logs", folder)
    assert len(path.parts) == 3


def test_a_worker_that_cannot_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def popen(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", popen)
    held = Fleet("s", "sqlite:///x.db", (CPU,), logs=tmp_path)
    held._start(held.slots[0])
    assert held.slots[0].state == "restart in 60 s"
    assert "cpu/1: cannot start a worker" in caplog.text
