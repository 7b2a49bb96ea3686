"""Workers on a Ray cluster: Ray places them, and places them again when their node is lost.

``hpsched worker attach NAME --ray ADDRESS`` is the driver. Each worker is a Ray task that runs
``hpsched worker attach NAME`` as a child process, as :mod:`hpsched.fleet` does on one node: so
signals, exit codes and a crash in native code are what they are without Ray. The child holds one
end of a socket: when its Ray process dies, however that happens, it ends as by SIGTERM.

=============================  ===================================================================
what happens                   what follows
=============================  ===================================================================
the budget is spent            the workers end with 0, one after the other, and then the driver
a worker's process crashes,    the worker goes to Ray again, under the rules of a node's workers
or the database stays away     (:class:`hpsched.fleet.Restarts`)
a Ray process or node is lost  the worker goes to Ray again, without end: machines come and go
a worker ends with 1 or 2      it stays away: it would end the same way again
Ctrl-C or SIGTERM              the driver ends its workers; their trials go back; a second one ends
                               all at once
the driver is killed           Ray ends its workers; their trials go back, or count as silent soon
=============================  ===================================================================

The storage URL, which may hold a password, travels as a value inside a Ray object and reaches the
worker in its environment: Ray shows it in no list, log or command line.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from optuna.study import Study
from sqlalchemy.engine import make_url

from hpsched.devices import CPU, VISIBLE, Device
from hpsched.errors import HpschedError, UsageError
from hpsched.fleet import (
    FINAL,
    KILL_SECONDS,
    OPTIONS,
    PROGRESS_FD,
    WORST_FIRST,
    Restarts,
    how,
    worker_environment,
)
from hpsched.redaction import redact
from hpsched.storage import resolve_url
from hpsched.study import open_study

#: Seconds, besides their grace, that interrupted workers get to put their trials back.
FAREWELL_SECONDS = 2 * KILL_SECONDS
_TICK = 0.2
#: Not sent to the cluster: what is large, secret or of no use there. .gitignore is respected too.
_EXCLUDED = (
    ".env",
    ".git",
    ".venv",
    "*.db",
    "*.db-*",
    "*.log",
    "__pycache__",
    "hpsched-logs",
    "venv",
)

Say = Callable[[str], None]


def run_on_ray(
    name: str,
    storage_url: str | None,
    *,
    address: str,
    workers: int,
    gpus_per_worker: float,
    say: Say,
    grace: float = 0.0,
) -> int:
    """Work on a study with ``workers`` workers under Ray until its budget is spent.

    Args:
        name: The study's name.
        storage_url: Its database, which all nodes must reach; see
            :func:`hpsched.storage.resolve_url`.
        address: ``local`` starts Ray on this machine for as long as this runs; ``auto`` and
            ``HOST:PORT`` join a cluster of which this machine is a node, and send it this folder.
        workers: How many.
        gpus_per_worker: GPUs reserved for each; a fraction shares one; with 0 they see none.
        say: Told in a line when a worker ends, is lost or starts again, and the totals. What
            workers say themselves Ray prints.
        grace: Seconds that an interrupted worker may use to reach its trial's next checkpoint.

    Returns:
        An exit code: 0, the budget is spent; 1 or 2, a worker failed so; 128 + the number of the
        signal that ended it.

    Raises:
        UsageError: A number or the address cannot be right; SQLite with more than this machine;
            Ray is not installed; this folder cannot be sent.
        HpschedError: There is no cluster at the address, or it is of another version.
    """
    url = resolve_url(storage_url)
    _check(url, address, workers, gpus_per_worker)
    ray = _import_ray()
    study = open_study(name, url, heartbeat=True)
    before = _states(study)
    with _cluster(ray, address), _signals() as caught:
        _check_gpus(ray, address, workers * gpus_per_worker, say)
        crew = _Crew(ray, name, url, address, gpus_per_worker, grace, say)
        code = crew.run(workers, caught)
    new = _states(study) - before
    counts = ", ".join(f"{new[state]} {state.lower()}" for state in ("COMPLETE", "PRUNED", "FAIL"))
    say(f"{workers} workers ended, {crew.restarts} restarts; trials meanwhile: {counts}")
    return code


def _states(study: Study) -> Counter[str]:
    return Counter(trial.state.name for trial in study.get_trials(deepcopy=False))


# -- before anything starts ------------------------------------------------------------------------


def _check(url: str, address: str, workers: int, gpus: float) -> None:
    if workers < 1:
        raise UsageError(f"--workers {workers}: one or more.")
    if not (0 <= gpus <= 1 or (gpus > 1 and float(gpus).is_integer())):
        raise UsageError(
            f"--gpus-per-worker {gpus:g}: 0, a share of one GPU such as 0.5, or a whole number."
        )
    if address.startswith("ray://"):
        raise UsageError(
            f"--ray {address}: Ray Client is not supported. Give this command on a node of the "
            "cluster with --ray auto, or as a job: ray job submit -- hpsched worker attach …"
        )
    if make_url(url).get_backend_name() == "sqlite" and address != "local":
        raise UsageError(
            f"--ray {address}: the nodes of a cluster cannot share {redact(url)}. Keep the study "
            "in PostgreSQL or MySQL (--storage), or use --ray local."
        )


def _import_ray() -> Any:
    # Read when Ray is imported. Two workers may well say the same thing.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of a change
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs the package ray: pip install 'hpsched[ray]'.") from None
    return ray


def _check_gpus(ray: Any, address: str, wanted: float, say: Say) -> None:
    there = ray.cluster_resources().get("GPU", 0)
    if wanted <= there:
        return
    text = f"the workers ask for {wanted:g} GPUs in all, and Ray sees {there:g} here"
    if address == "local":  # nothing will join
        raise UsageError(f"{text}: fewer --workers, or less --gpus-per-worker.")
    say(f"{text}: some workers wait until the cluster has one for them")


@contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    """Ray, joined or started; left or ended at the end."""
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": True}
    if address == "local":
        # Nothing large goes through Ray: the least that it accepts, instead of a third of RAM.
        options |= {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    else:
        options["runtime_env"] = {"working_dir": str(Path.cwd()), "excludes": list(_EXCLUDED)}
    try:
        _reach(address)
        ray.init(address, **options)
    except OSError as error:  # Ray's ConnectionError among them
        raise HpschedError(
            f"--ray {address}: no Ray cluster answers there ({_line(error)}). Start one with "
            "`ray start --head`, or use --ray local."
        ) from None
    except (RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if "exceed" in str(error):
            raise UsageError(
                f"The folder {Path.cwd()} is too large for Ray to send to its nodes: "
                f"{_line(error)} Run this from a folder that holds only the code, or name what "
                "stays here in its .gitignore."
            ) from None
        raise HpschedError(f"--ray {address}: {_line(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise an OSError at once where Ray would try for minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=10).close()


def _line(error: BaseException) -> str:
    return redact(" ".join(str(error).split()))[:400]


# -- the driver ------------------------------------------------------------------------------------


class _Crew:
    """The workers of one driver: handed to Ray, watched, handed to it again."""

    def __init__(
        self, ray: Any, name: str, url: str, address: str, gpus: float, grace: float, say: Say
    ) -> None:
        self._ray = ray
        self._say = say
        self._grace = grace
        self._task = ray.remote(_work).options(
            name=f"hpsched {name}",
            num_cpus=0,  # a worker waits for its GPU; CPUs are shared as the system shares them
            num_gpus=gpus,
            max_retries=0,  # the driver hands it to Ray again, and says why
            scheduling_strategy="SPREAD",
        )
        # Elsewhere Ray has put the folder that was sent, and starts its processes in it.
        folder = str(Path.cwd()) if address == "local" else None
        # In a list, so that the task fetches it itself: Ray would put a value of its own into
        # the task's description.
        self._settings = [ray.put(_settings(url, grace))]
        self._args = (name, folder, gpus > 0, self._settings)
        self._running: dict[Any, int] = {}  # Ray's reference → the worker's number
        self._crashes: Counter[int] = Counter()  # in a row, by the worker's number
        self.restarts = 0

    def run(self, workers: int, caught: list[int]) -> int:
        """Until all have ended, or signals are ``caught``; the driver's exit code."""
        for number in range(1, workers + 1):
            self._start(number)
        codes: list[int] = []
        while self._running and not caught:
            codes += self._look()
        if caught:
            self._end(caught)
            return 128 + caught[0]
        return min(codes, key=WORST_FIRST.index)

    def _start(self, number: int, delay: float = 0.0) -> None:
        self._running[self._task.remote(number, delay, *self._args)] = number

    def _look(self) -> list[int]:
        """Wait a moment; exit codes of the workers that have ended for good."""
        ready, _ = self._ray.wait(list(self._running), timeout=_TICK)
        codes = []
        for reference in ready:
            number = self._running.pop(reference)
            result, reason = self._result(reference)
            delay = Restarts().first if result is None else self._delay(number, *result)
            if delay is not None:
                self._say(f"worker {number}: {reason}; Ray starts it again in {delay:.3g} s")
                self.restarts += 1
                self._start(number, delay)
            else:
                self._say(f"worker {number}: ended, {reason}")
                codes.append(result[0] if result and result[0] in FINAL else 1)
        return codes

    def _delay(self, number: int, code: int, done: int, seconds: float) -> float | None:
        """Seconds until the worker starts again; None: it does not."""
        crashed = code not in (*FINAL, os.EX_TEMPFAIL)
        before = 0 if done else self._crashes[number]
        self._crashes[number] = before + 1 if crashed else 0
        return Restarts().delay(code, self._crashes[number], seconds)

    def _result(self, reference: Any) -> tuple[_Result | None, str]:
        """What a worker's task returned, or None if Ray lost it; and that in words."""
        errors = self._ray.exceptions
        try:
            result: _Result = self._ray.get(reference)
        except errors.OutOfMemoryError:  # of the node: the same trial would do it again
            return (-signal.SIGKILL, 0, 0.0), "killed by Ray: the node's memory ran out"
        except (errors.WorkerCrashedError, errors.NodeDiedError) as error:
            return None, f"lost ({type(error).__name__})"
        except errors.RayError as error:  # e.g. no hpsched there, or an environment that fails
            raise HpschedError(
                f"Ray cannot run a worker: {_line(error)}. Every node needs the same Python, Ray "
                "and hpsched as this one."
            ) from None
        words = {os.EX_OK: "the budget is spent", os.EX_TEMPFAIL: "the database stayed away"}
        return result, words.get(result[0], how(result[0]))

    def _end(self, caught: list[int]) -> None:
        """Interrupt the workers; wait until they have put their trials back."""
        name = signal.Signals(caught[0]).name
        self._say(f"{name}: ending {len(self._running)} workers; again to end at once")
        for reference in self._running:
            self._ray.cancel(reference, force=False)
        limit = time.monotonic() + self._grace + FAREWELL_SECONDS
        left = list(self._running)
        while left and len(caught) == 1 and time.monotonic() < limit:
            _, left = self._ray.wait(left, num_returns=len(left), timeout=_TICK)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of the signals that asked to end, as they come."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {
        number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _settings(url: str, grace: float) -> dict[str, str]:
    """What workers get of the driver's environment."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key == "OMP_NUM_THREADS"
        or (key.startswith("HPSCHED_") and not key.startswith((OPTIONS, "HPSCHED_STORAGE")))
    }
    if grace:
        kept[f"{OPTIONS}GRACE"] = f"{grace:g}s"
    return {**kept, "HPSCHED_STORAGE": url}


# -- on the nodes ----------------------------------------------------------------------------------

_Result = tuple[int, int, float]  # as Popen.returncode; trials it finished; seconds it ran


def _work(
    number: int, delay: float, name: str, folder: str | None, gpu: bool, settings: list[Any]
) -> _Result:
    """One worker, in a Ray process."""
    import ray

    device = _device() if gpu else CPU
    environment = worker_environment(os.environ, device) | ray.get(settings[0])
    time.sleep(delay)
    # Ray shows it where the driver runs.
    print(f"worker {number} starts on {socket.gethostname()}, {device}", file=sys.stderr)
    began = time.monotonic()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours, theirs:
        child = subprocess.Popen(
            [sys.executable, "-m", "hpsched", "worker", "attach", "--", name],
            cwd=folder,
            env={**environment, PROGRESS_FD: str(theirs.fileno())},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # signals reach it through us alone
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        done = _watch(child, ours)
    return child.returncode, done, time.monotonic() - began


def _watch(child: subprocess.Popen[bytes], line: socket.socket) -> int:
    """Wait until the worker ends; how many trials it said that it has finished."""
    done = 0
    try:
        while child.poll() is None:  # a wait would not see that Ray cancels this task
            time.sleep(_TICK)
            with suppress(BlockingIOError, ConnectionError):
                while said := line.recv(1 << 16):
                    done = json.loads(said)["done"]
    finally:
        if child.returncode is None:  # cancelled, or this process is asked to end
            child.terminate()
            child.wait()
    return done


def _device() -> Device:
    """The GPUs that Ray has given this task."""
    visible = os.environ.get(VISIBLE[0], "")
    return Device(label="+".join(f"cuda:{gpu}" for gpu in visible.split(",")), visible=visible)
