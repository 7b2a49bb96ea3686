"""Workers under Ray, on a cluster that lives on this machine for as long as the driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from optuna.trial import TrialState

from tests.faults.account import check, confirmations
from tests.fleet import QUICK, Fleet, environment

PASSWORD = "correct-horse-battery"  # the private server asks for none

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.postgres]


class RayFleet(Fleet):
    """Workers that a driver process runs on a local Ray."""

    def __init__(self, folder: Path, url: str) -> None:
        with_password = sqlalchemy.make_url(url).set(password=PASSWORD)
        super().__init__(folder, with_password.render_as_string(hide_password=False))
        # Short, for Ray's sockets have their paths in it.
        self.ray_folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))

    def drive(self, workers: int, address: str = "local", **env: str) -> subprocess.Popen[str]:
        options = f"--ray {address} --workers {workers} --gpus-per-worker 0"
        mine = {"RAY_TMPDIR": str(self.ray_folder), "HPSCHED_STORAGE": self.url}
        driver = subprocess.Popen(
            [sys.executable, "-m", "hpsched", "worker", "attach", "fake", *options.split()],
            cwd=self.folder,
            env=environment(**mine, **env),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # as a terminal's foreground job
        )
        self.processes.append(driver)
        return driver

    def pid_of(self, part: str) -> int:
        """The worker that has started a run with ``part`` in its name."""
        name = self.until_starts(part)
        return next(pid for pid, run, word in self.calls() if (run, word) == (name, "starts"))

    def processes_of_ray(self) -> list[int]:
        """Those that were started with our folder in their environment, and still run."""
        mark = f"RAY_TMPDIR={self.ray_folder}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
            except OSError:
                continue
        return found


@pytest.fixture
def crew(tmp_path: Path, postgres_url: str) -> Iterator[RayFleet]:
    held = RayFleet(tmp_path, postgres_url)
    yield held
    held.end()
    for pid in held.processes_of_ray():
        os.kill(pid, signal.SIGKILL)
    subprocess.run(["rm", "-rf", str(held.ray_folder)], check=True)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", ["worker", "ray's process"])
def test_four_workers_lose_one_by_kill_and_finish_exact(killed: str, crew: RayFleet) -> None:
    crew.create(trials=10, seed=1, confirm_top=1, confirm_seeds=2)
    pace = '{"range_test0": 1, "rung1": 0.5, "rung2": 2, "confirm2": 0.5}'
    driver = crew.drive(4, PACE=pace, **QUICK)
    victim = crew.pid_of("rung2")
    os.kill(victim if killed == "worker" else parent(victim), signal.SIGKILL)
    output = crew.wait(driver)
    lost = "SIGKILL" if killed == "worker" else "lost (WorkerCrashedError)"
    assert f": {lost}; Ray starts it again in" in output, output
    assert output.count(" starts on ") == 5
    assert output.count("ended, the budget is spent") == 4
    assert "4 workers ended, 1 restarts" in output
    trials = crew.study().trials
    check(trials, 10)
    assert repeated(crew) == 1
    assert sum(confirmations(trials).values()) == 2
    assert len({pid for pid, _, _ in crew.calls()} - {victim}) >= 3
    assert PASSWORD not in output
    assert not whispers(crew.ray_folder)


def repeated(crew: RayFleet) -> int:
    """How many runs were started again."""
    started = [name for _, name, word in crew.calls() if word == "starts"]
    return len(started) - len(set(started))


def whispers(folder: Path) -> list[str]:
    """Files that Ray has left and that hold the password."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if PASSWORD.encode() in path.read_bytes()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGKILL"])
def test_an_ended_driver_ends_its_workers(how: str, crew: RayFleet) -> None:
    crew.create(trials=4, seed=1)
    driver = crew.drive(2, PACE='{"range_test0": 60}', **QUICK)
    crew.until(lambda: len(crew.calls()) == 2)
    if how == "Ctrl-C":  # a terminal tells all that run in it
        os.killpg(driver.pid, signal.SIGINT)
    else:
        driver.send_signal(getattr(signal, how))
    if how == "SIGKILL":
        driver.communicate()
    else:
        number = signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM
        output = crew.wait(driver, 128 + number)
        assert states(crew) == {TrialState.WAITING}, output
    crew.until(lambda: not crew.processes_of_ray(), seconds=90)
    crew.run(1, **QUICK)
    check(crew.study().trials, 4)


def states(crew: RayFleet) -> set[Any]:
    return {trial.state for trial in crew.study().trials}


@pytest.mark.timeout(300)
def test_a_worker_that_fails_is_not_started_again(crew: RayFleet) -> None:
    (crew.folder / "train.py").write_text("def objective(trial):\n    return 'much'\n")
    crew.create(trials=4, seed=1)
    output = crew.wait(crew.drive(2), 1)
    assert output.count("ended, exit code 1") == 2
    assert "0 restarts" in output
    assert "The objective returned 'much'" in output


@pytest.mark.timeout(400)
def test_a_node_is_lost_and_the_folder_was_sent(
    crew: RayFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of Ray on this machine, which know neither our folder nor our storage."""
    from ray.cluster_utils import Cluster

    pace = '{"range_test0": 1, "rung1": 1, "rung2": 2}'
    for key, value in environment(PACE=pace, RAY_TMPDIR=str(crew.ray_folder)).items():
        monkeypatch.setenv(key, value)
    crew.create(trials=6, seed=1, confirm_top=1, confirm_seeds=1)
    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "_system_config": quick})
    try:
        other = cluster.add_node(**node)
        driver = crew.drive(2, cluster.address, **QUICK)
        running = (TrialState.RUNNING,)
        crew.until(lambda: len(crew.study().get_trials(deepcopy=False, states=running)) == 2)
        cluster.remove_node(other, allow_graceful=False)
        output = crew.wait(driver, seconds=240)
    finally:
        cluster.shutdown()
    assert "lost (" in output and "2 workers ended, 1 restarts" in output, output
    assert output.count("ended, the budget is spent") == 2
    assert not crew.calls()  # they were written in Ray's copy of the folder
    check(crew.study().trials, 6)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "a:b"])
def test_an_address_where_nothing_answers(address: str, crew: RayFleet) -> None:
    crew.create(trials=1)
    output = crew.wait(crew.drive(1, address), 1, seconds=60)
    assert f"Error: --ray {address}: " in output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--ray auto --workers 2", "the nodes of a cluster cannot share sqlite"),
        ("--ray local --gpus-per-worker 1.5", "--gpus-per-worker 1.5: 0, a share of one GPU"),
        ("--ray local --workers 4 --gpus-per-worker 32", "the workers ask for 128 GPUs in all"),
        ("--ray 127.0.0.1:1", "the nodes of a cluster cannot share sqlite"),
        ("--ray ray://127.0.0.1:1", "Ray Client is not supported"),
    ],
)
def test_what_cannot_be_right_is_refused(options: str, said: str, sqlite_url: str) -> None:
    crew = Fleet(Path(sqlite_url.removeprefix("sqlite:///")).parent, sqlite_url)
    crew.create(trials=1)
    ended = subprocess.run(
        [*crew.command(), *options.split()],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2, ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
