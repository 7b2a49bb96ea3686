"""One function per fault: what happens to a study's workers or to their database, and the account.

Each takes its own fresh database, and moments that follow from its seed. Workers beat every second,
and a silent one is left alone for ``grace`` seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from optuna.trial import TrialState

from tests.faults.crew import PACE, Result, crew
from tests.faults.namespace import Network
from tests.faults.proxy import Proxy
from tests.faults.servers import Postgres
from tests.fleet import environment

# Statements, as they are seen on the wire.
CLAIM = rb"UPDATE trials SET [^\0]*datetime_start="
REPORT = rb"INSERT INTO trial_intermediate_values"
TELL = rb"UPDATE trials SET [^\0]*datetime_complete="

STOPS = ("fast", "immediate", "crash")
MOMENTS = ("at random", "before a result is stored", "after, before the worker is told")
SECONDS = 600.0  # that workers have to end, when all is over


@contextlib.contextmanager
def proxied(server: Postgres, url: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy before the server, and the URL of a database by that way."""
    proxy = Proxy((server.host, server.port))
    try:
        yield proxy, server.url(_name(url), host="127.0.0.1", port=proxy.port)
    finally:
        proxy.mend()
        proxy.close()


def _name(url: str) -> str:
    """Of the database."""
    return url.rpartition("/")[2]


# -- workers ---------------------------------------------------------------------------------------


def kill(
    server: Postgres, *, kills: int, workers: int, seed: int, trials: int = 0, grace: int = 3
) -> Result:
    """SIGKILL to random workers at random moments; each is replaced.

    One that works alone is replaced when its trial counts as given up: the next one would begin
    another trial meanwhile, as no study without faults does.
    """
    with server.database() as url, crew(url, seed=seed, grace=grace) as team:
        team.create(trials=trials or max(3, 3 * kills // 4))
        team.team(workers)
        done = 0
        while done < kills and (alive := team.alive()):
            victim = team.random.choice(alive)
            if workers == 1:
                team.until_busy(victim)
            team.pause(0, 6 / workers)
            if victim.poll() is not None:
                continue
            team.strike(victim, signal.SIGKILL, -signal.SIGKILL)
            victim.wait()
            done += 1
            if workers == 1:
                time.sleep(grace + 1)
            team.start()
        team.expect(done == kills, f"the study was over after {done} of {kills} kills")
        return team.account("kill", f"{done} SIGKILLs", alone=workers == 1, seconds=SECONDS)


def suspend(
    server: Postgres, *, times: int, workers: int, seed: int, trials: int = 0, grace: int = 3
) -> Result:
    """SIGSTOP to random workers at random moments, for longer than the grace period."""
    with server.database() as url, crew(url, seed=seed, grace=grace) as team:
        team.create(trials=trials or max(3, 9 * times))
        team.team(workers)
        team.until_starts("range_test0")
        done = 0
        while done < times and (alive := team.alive()):
            team.pause(0, 3)
            victim = team.random.choice(alive)
            if victim.poll() is not None:
                continue
            team.strike(victim, signal.SIGSTOP)
            team.pause(grace + 2, 2 * grace + 2)
            os.kill(victim.pid, signal.SIGCONT)
            done += 1
        team.expect(done == times, f"the study was over after {done} of {times} suspensions")
        return team.account("suspend", f"{done} SIGSTOPs", alone=workers == 1, seconds=SECONDS)


# -- SIGTERM in every phase ------------------------------------------------------------------------

PACED = {"range test": "range_test0", "rung": "rung1", "confirmation": "confirm2"}
HELD = {"claiming": CLAIM, "reporting": REPORT, "telling": TELL}
PHASES = ("import", *PACED, *HELD, "idle", "database away")
SLOW_IMPORT = """
import time
from pathlib import Path

if Path("slow").exists():
    Path("importing").touch()
    time.sleep(60)
from train import objective
"""


def terminate(
    server: Postgres, *, phase: str, seed: int, grace: int = 3, within: float = 20
) -> Result:
    """SIGTERM in that phase: the worker ends within seconds, its trial goes back, and on."""
    pace = {PACED.get(phase, "rung1"): 60.0 if phase in PACED else 1.0}
    with (
        server.database() as url,
        proxied(server, url) as (proxy, by_proxy),
        crew(url, seed=seed, grace=60 if phase == "idle" else grace, pace=pace) as team,
    ):
        (team.folder / "slow.py").write_text(SLOW_IMPORT)
        (team.folder / "slow").touch()
        objective = "slow.py:objective" if phase == "import" else "train.py:objective"
        team.create(trials=1, confirm_top=1, confirm_seeds=1, objective=objective)
        trap = proxy.trap(HELD[phase]) if phase in HELD else None
        worker = team.start(url=by_proxy)
        if trap:
            team.until(trap.caught.is_set)
        elif phase == "import":
            team.until((team.folder / "importing").exists)
        else:
            team.until_starts(PACED.get(phase, "rung1"))
        if phase == "idle":  # all there is to do is another worker's, which gives no sign of life
            os.kill(worker.pid, signal.SIGSTOP)
            busy, worker = worker, team.start()
            team.until(lambda: "waiting for a sign of life" in team.output(worker))
        elif phase == "database away":
            server.stop()
            team.until(lambda: "is away" in team.output(worker))
        codes = (128 + signal.SIGTERM, *((-signal.SIGTERM,) if phase == "import" else ()))
        team.strike(worker, signal.SIGTERM, *codes)
        began = time.monotonic()
        if trap:
            time.sleep(0.5)
            trap.release(deliver=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(within)
        took = time.monotonic() - began
        team.figures["seconds to end"] = round(took, 2)
        team.expect(worker.returncode in codes, f"after {took:.0f} s: {worker.returncode}")
        if phase == "database away":
            server.start()
        elif phase == "idle":
            os.kill(busy.pid, signal.SIGCONT)
        else:
            running = team.study().get_trials(states=(TrialState.RUNNING,))
            team.expect(not running, f"still RUNNING: {[trial.number for trial in running]}")
        (team.folder / "slow").unlink()
        team.start(PACE="{}")
        return team.account("terminate", f"SIGTERM: {phase}", alone=True, seconds=SECONDS)


# -- the database ----------------------------------------------------------------------------------


def restart(
    server: Postgres,
    *,
    times: int,
    workers: int,
    seed: int,
    trials: int = 0,
    grace: int = 3,
    longest: float = 3.0,
    moments: Sequence[str] = MOMENTS,
) -> Result:
    """Restarts of the database, of each kind, at random moments and in the middle of a ``tell``.

    Args:
        longest: Seconds that it is away, at most.
        moments: Those of MOMENTS that are wanted.
    """
    with (
        server.database() as url,
        proxied(server, url) as (proxy, by_proxy),
        crew(by_proxy, seed=seed, grace=grace) as team,
    ):
        team.create(trials=trials or times * min(workers + 1, 4))
        team.team(workers)
        team.until_starts("range_test0")
        done, plan = 0, itertools.product(moments, STOPS)
        for moment, how in itertools.islice(itertools.cycle(plan), times):
            if not team.alive():
                break
            trap = None
            if moment == MOMENTS[0]:
                team.pause(0, 3)
            else:
                trap = proxy.trap(TELL, answer=moment == MOMENTS[2])
                team.until(lambda held=trap: held.caught.is_set() or not team.alive())
            server.stop(how)
            team.pause(0, longest)
            server.start()
            if trap:
                trap.release(deliver=False)
            done += 1
        team.expect(done == times, f"the study was over after {done} of {times} restarts")
        return team.account("restart", f"{done} restarts", alone=workers == 1, seconds=SECONDS)


def outage(server: Postgres, *, seconds: float, workers: int, seed: int, grace: int = 3) -> Result:
    """The database is away for longer than the grace period: nobody's trial is anybody else's."""
    pace = PACE | {"rung2": seconds / 2}
    with server.database() as url, crew(url, seed=seed, grace=grace, pace=pace) as team:
        team.create(trials=2 * workers)
        team.team(workers)
        team.until_starts("rung2")
        server.stop()
        time.sleep(seconds)
        server.start()
        return team.account("outage", f"{seconds:g} s away", alone=workers == 1, seconds=SECONDS)


def cut(
    server: Postgres,
    *,
    seconds: float,
    grace: int,
    seed: int,
    workers: int = 2,
    everyone: bool = False,
    network: Network | None = None,
) -> Result:
    """A cut between one worker (or everyone) and the database: nothing passes, nobody is told.

    One that is cut off for longer than the grace period loses its trial to another, and drops it.

    Args:
        network: Where those are that will be cut off; default: behind a proxy.
    """
    pace = PACE | {"rung2": 3.0}
    with (
        server.database() as url,
        proxied(server, url) as (proxy, by_proxy),
        crew(url, seed=seed, grace=grace, pace=pace) as team,
    ):
        wire = network or proxy
        far = by_proxy if network is None else server.url(_name(url), host=network.host)
        within = () if network is None else network.command
        team.create(trials=3 * workers)
        cut_off = [team.start(url=far, within=within) for _ in range(workers if everyone else 1)]
        name = team.until_starts("rung2")

        def begun() -> int:
            return sum(each == name and word == "starts" for _, each, word in team.calls())

        wire.cut()
        team.team(workers - len(cut_off))
        time.sleep(seconds)
        lost = not everyone and seconds > grace
        if lost:  # on a busy machine the other worker takes longer to start
            team.until(lambda: begun() == 2)
            team.victims.add(cut_off[0].pid)
        wire.mend()
        how = "proxy" if network is None else "namespace"
        who = "everyone" if everyone else "one worker"
        words = f"{seconds:g} s for {who} by {how}, grace {grace} s"
        found = team.account("cut", words, alone=workers == 1, seconds=SECONDS)
        dropped = "given to another worker; dropped here" in team.output(cut_off[0])
        if lost != dropped or begun() != 1 + lost:
            found.differences.append(f"{name} was begun {begun()} times; dropped: {dropped}")
        return found


def crowd(server: Postgres, *, workers: int, seed: int, trials: int = 10) -> Result:
    """More workers than the server has connections attach at the same instant."""
    with server.database() as url, crew(url, seed=seed, grace=60, heartbeat=10) as team:
        team.create(trials=trials)
        command = [sys.executable, "-m", "tests.faults.herd", str(workers), "fake", url]
        herd = subprocess.run(
            command, cwd=team.folder, env=environment(), capture_output=True, text=True, check=True
        )
        team.figures = json.loads(herd.stdout)
        for index, code in enumerate(team.figures.pop("codes")):
            output = (team.folder / f"herd{index}.log").read_text()
            if code or "Traceback" in output:
                last = output.rstrip().rpartition("\n")[2]
                team.differences.append(f"worker {index} ended with {code}: {last}")
        return team.account("crowd", f"{workers} at once", alone=False, seconds=1)


# -- SQLite, and all three -------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(mebibytes: int) -> Iterator[Path]:
    """A disk of that size; only root can have one."""
    with tempfile.TemporaryDirectory() as place:
        options = ["-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", place]
        subprocess.run(["mount", *options], check=True)
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)


def disk_full(*, times: int, workers: int, seed: int, grace: int = 3) -> Result:
    """The disk with the SQLite file is full for a while: workers wait, and go on."""
    with (
        small_disk(16) as disk,
        crew(f"sqlite:///{disk / 'studies.db'}", seed=seed, grace=grace) as team,
    ):
        team.create(trials=3 * times)
        team.team(workers)
        team.until_starts("range_test0")
        done = 0

        def complaints() -> int:
            return sum(team.output(each).count("is away") for each in team.processes)

        while done < times and team.alive():
            team.pause(0, 3)
            before = complaints()
            fill(disk / "filler")
            team.until(lambda seen=before: complaints() > seen or not team.alive())
            team.pause(0, 3)
            (disk / "filler").unlink()
            done += 1
        team.expect(done == times, f"the study was over after {done} of {times}")
        return team.account("disk-full", f"{done} times", alone=workers == 1, seconds=SECONDS)


def fill(path: Path) -> None:
    """Write until nothing fits any more."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 9, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)


def backend(url: str, *, workers: int, seed: int, trials: int = 15) -> Result:
    """Workers that share a study on that database, and nothing happens to them."""
    with crew(url, seed=seed, grace=60, heartbeat=10, pace={}) as team:
        team.create(trials=trials)
        team.team(workers)
        kind = url.partition(":")[0].partition("+")[0]
        return team.account("backend", f"{workers} workers on {kind}", alone=False, seconds=SECONDS)
