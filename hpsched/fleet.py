"""Workers on the devices of this node, a process each: started, watched, restarted, ended.

- A worker sees its own device only, and writes what it says to a log file of its own.
- One that crashes is started again, later each time, and given up when it only ever crashes. One
  whose objective is broken, whose call was wrong, or whose study is finished is left alone.
- Ctrl-C and SIGTERM go to the supervisor alone, which passes them on: every worker puts its trial
  back (:mod:`hpsched.worker`). A second one kills them.
- Each worker holds one end of a socket. It writes what it is doing there, and finds it closed when
  the supervisor is gone, however that ended: then it ends as by SIGTERM.

The supervisor never imports torch: it would take memory on every GPU.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from optuna.study import Study
from optuna.trial import TrialState

from hpsched import records
from hpsched.devices import CPU, VISIBLE, Device
from hpsched.errors import RecordError, UsageError
from hpsched.records import WorkerRecord
from hpsched.storage import clock
from hpsched.study import read_workers
from hpsched.worker import SAME_SECONDS

logger = logging.getLogger("hpsched.fleet")

DEVICE = "HPSCHED_DEVICE"  # what a worker calls its device
PROGRESS_FD = "HPSCHED_PROGRESS_FD"  # its end of the socket
OPTIONS = "HPSCHED_WORKER_ATTACH_"  # every option of `worker attach` can come from the environment

KILL_SECONDS = 20.0  # after its grace, a worker is killed that has not ended itself (worker.py)
_TICK = 0.2
_LINES = 20  # of each log kept at hand
_LONGEST_LINE = 1 << 16
_MOST_BYTES = 1 << 20  # of a log read at a time
_AWAY = os.EX_TEMPFAIL
FINAL = (os.EX_OK, 1, 2)  # finished; the objective is broken; the call was wrong
WORST_FIRST = (1, 2, 0)


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """When a worker that has ended is started again.

    Attributes:
        first: Seconds until the first restart; doubled by each further crash.
        longest: At most this many seconds.
        long_run: A crash after this many seconds of work counts as a first one for the delay.
        crashes: So many in a row without a finished trial, and it is given up.
    """

    first: float = 1.0
    longest: float = 60.0
    long_run: float = 600.0
    crashes: int = 10

    def delay(self, code: int, crashes: int, seconds: float) -> float | None:
        """Seconds until the restart; None: it is not started again.

        Args:
            code: How it ended: its exit code, or minus the number of the signal that killed it.
            crashes: In a row without a finished trial, this one included.
            seconds: That it ran.
        """
        if code == _AWAY:  # it has waited for the database for minutes, and may well do so again
            return self.longest
        if code in FINAL or crashes >= self.crashes:
            return None
        doublings = 0 if seconds >= self.long_run else crashes - 1
        return min(self.first * 2.0**doublings, self.longest)


@dataclass(kw_only=True)
class Slot:
    """A place for one worker, and the worker that has it now.

    Attributes:
        name: ``cuda:0/1``: the device, and the number of the worker on it.
        device: What it computes on.
        log: The file that it writes to.
        record: What the worker last said of itself; None before it has.
        first: The first such record of the run in hand.
        lines: The last lines of its log.
        done, failed: Trials that earlier workers of this slot finished and failed.
        starts: How many workers it has had.
        code: How the last one ended; None while it runs.
        restart: When the next one starts, by the monotonic clock; None: it does not.
        crashes: In a row without a finished trial.

    The rest ties the supervisor to the worker.
    """

    name: str
    device: Device
    log: Path
    record: WorkerRecord | None = None
    first: WorkerRecord | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES))
    done: int = 0
    failed: int = 0
    starts: int = 0
    code: int | None = None
    restart: float | None = None
    crashes: int = 0
    began: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    line: socket.socket | None = None
    tail: IO[bytes] | None = None
    rest: bytes = b""

    @property
    def state(self) -> str:
        """What the worker does, or what has become of it, in a word or two."""
        if self.process is not None:
            return self.record.state if self.record else "starting"
        if self.restart is not None:
            return f"restart in {max(0.0, self.restart - time.monotonic()):.0f} s"
        if self.code in (None, 0):
            return "ended"
        return "given up" if self.crashes else how(self.code)


def seconds_left(first: WorkerRecord | None, last: WorkerRecord | None) -> float | None:
    """Seconds that the run in hand will take at the pace it has had; None: not known yet.

    Args:
        first, last: Of the records of this run.
    """
    if first is None or last is None or _run(first) != _run(last):
        return None
    if first.step is None or last.step is None or last.total_steps is None:
        return None
    steps, seconds = last.step - first.step, last.seen - first.seen
    if steps <= 0 or seconds <= 0:
        return None
    return (last.total_steps - last.step) * seconds / steps


def how(code: int | None) -> str:
    """How a process ended, in words: ``exit code 1``, ``SIGSEGV``."""
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


class Fleet:
    """The workers of one study on this node.

    Args:
        name: The study's.
        url: Its storage, resolved; passed on by the environment, as it may hold a password.
        devices: One group of workers for each.
        per_device: Workers in a group.
        logs: Folder for the log files, made if need be.
        grace: Seconds that a worker told to end may use to reach its trial's next checkpoint.
        restarts: When a worker that has ended is started again.

    Raises:
        UsageError: The folder cannot be written to.
    """

    def __init__(
        self,
        name: str,
        url: str,
        devices: Sequence[Device],
        per_device: int = 1,
        *,
        logs: Path,
        grace: float = 0.0,
        restarts: Restarts | None = None,
    ) -> None:
        self._name = name
        self._url = url
        self._grace = grace
        self._restarts = restarts or Restarts()
        self._per_device = per_device
        self._pids: set[int] = set()
        self._began = time.monotonic()
        self._stop: int | None = None  # number of the signal that asked for it
        self._signals = 0  # that came
        self._signalled = -SAME_SECONDS
        self._passed_on = False
        self._kill_at = 0.0
        self.slots = tuple(
            Slot(
                name=f"{device.label}/{number}",
                device=device,
                log=logs / f"{device.label.replace(':', '')}-{number}.log",
            )
            for device in devices
            for number in range(1, per_device + 1)
        )
        try:
            logs.mkdir(parents=True, exist_ok=True)
            for slot in self.slots:
                slot.log.touch()
        except OSError as error:
            raise UsageError(
                f"The workers' logs cannot be written to {str(logs)!r} ({error.strerror}): name "
                "another folder with --logs."
            ) from None

    def run(self, tell: Callable[[Slot, str], None] = lambda slot, line: None) -> int:
        """Keep the workers at work until all have ended for good.

        Args:
            tell: Called with each line that a worker writes to its log.

        Returns:
            The exit code: 0 when all ended well; 128 + n after signal n; else 1 before 2.
        """
        with self._handling_signals():
            try:
                for slot in self.slots:
                    self._start(slot)
                while any(slot.process or slot.restart is not None for slot in self.slots):
                    self._pass_on_signals()
                    for slot in self.slots:
                        self._look_after(slot, tell)
                    time.sleep(_TICK)
            finally:
                for slot in self.slots:
                    self._forget(slot)
        if self._stop is not None:
            return 128 + self._stop
        codes = {slot.code if slot.code in FINAL else 1 for slot in self.slots}
        return min(codes, key=WORST_FIRST.index)

    @property
    def stop(self) -> int | None:
        """Number of the signal that ended it, if one did."""
        return self._stop

    def counts(self, study: Study) -> dict[str, int]:
        """Outcome → how many trials these workers have brought to it, as the study knows it."""
        since = clock(study._storage)() - (time.monotonic() - self._began)
        ours = {
            worker
            for worker, record in read_workers(study.user_attrs).items()
            if record.host == socket.gethostname()
            and record.pid in self._pids
            and record.started >= since
        }
        found: Counter[str] = Counter()
        for trial in study.get_trials(deepcopy=False):
            if trial.user_attrs.get(records.OWNER) in ours:
                confirmed = records.is_confirmation(trial) and trial.state != TrialState.FAIL
                found["confirmed" if confirmed else trial.state.name.lower()] += 1
        return {
            "completed": found["complete"],
            "pruned": found["pruned"],
            "confirmed": found["confirmed"],
            "failed": found["fail"],
        }

    # -- one worker ----------------------------------------------------------------------------

    def _start(self, slot: Slot) -> None:
        slot.starts += 1
        slot.restart = slot.code = slot.record = slot.first = None
        slot.began = time.monotonic()
        try:
            with slot.log.open("ab") as log:
                slot.tail = slot.log.open("rb")
                slot.tail.seek(0, os.SEEK_END)
                when = time.strftime("%F %T")
                log.write(f"=== {when} start {slot.starts} on {slot.device}\n".encode())
                log.flush()
                slot.process = self._spawn(slot, log)
        except OSError as error:  # no memory, no space left, the folder is gone
            self._forget(slot)
            slot.restart = time.monotonic() + self._restarts.longest
            logger.error("%s: cannot start a worker (%s); trying again", slot.name, error)
        else:
            self._pids.add(slot.process.pid)

    def _spawn(self, slot: Slot, log: IO[bytes]) -> subprocess.Popen[bytes]:
        slot.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        slot.line.setblocking(False)
        with theirs:
            return subprocess.Popen(
                [sys.executable, "-m", "hpsched", "worker", "attach", "--", self._name],
                env={
                    **worker_environment(os.environ, slot.device, self._per_device),
                    "HPSCHED_STORAGE": self._url,
                    PROGRESS_FD: str(theirs.fileno()),
                    **({f"{OPTIONS}GRACE": str(self._grace)} if self._grace else {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C is for the supervisor alone
                pass_fds=[theirs.fileno()],
            )

    def _forget(self, slot: Slot) -> None:
        """Close what ties us to the worker; one that still runs takes it for SIGTERM."""
        for held in (slot.line, slot.tail):
            if held is not None:
                held.close()
        slot.line = slot.tail = slot.record = slot.first = None
        slot.rest = b""

    def _look_after(self, slot: Slot, tell: Callable[[Slot, str], None]) -> None:
        if slot.process is not None:
            code = _exit_code(slot.process.pid)  # before reading: nothing comes after it
            self._listen(slot)
            for line in _new_lines(slot):
                slot.lines.append(line)
                tell(slot, line)
            if code is not None:
                self._ended(slot, code)
        elif slot.restart is not None and time.monotonic() >= slot.restart:
            self._start(slot)

    def _listen(self, slot: Slot) -> None:
        assert slot.line is not None
        with suppress(BlockingIOError, ConnectionError, RecordError):
            while said := slot.line.recv(1 << 16):
                record = WorkerRecord.from_json(json.loads(said), slot.name)
                if slot.first is None or _run(slot.first) != _run(record):
                    slot.first = record
                slot.record = record

    def _ended(self, slot: Slot, code: int) -> None:
        assert slot.process is not None
        crashed = code not in (*FINAL, _AWAY)
        if crashed:  # what it had forked, such as data loaders, holds memory of the device
            with suppress(ProcessLookupError):
                os.killpg(slot.process.pid, signal.SIGKILL)
        slot.process.wait()
        slot.process, slot.code = None, code
        done = slot.record.done if slot.record else 0
        slot.done += done
        slot.failed += slot.record.failed if slot.record else 0
        self._forget(slot)
        if self._stop is not None:
            return
        slot.crashes = (0 if done else slot.crashes) + 1 if crashed else 0
        seconds = time.monotonic() - slot.began
        delay = self._restarts.delay(code, slot.crashes, seconds)
        if delay is not None:
            slot.restart = time.monotonic() + delay
            what = f"worker ended with {how(code)}; the next starts in {delay:.3g} s"
            logger.warning("%s: %s (log: %s)", slot.name, what, slot.log)
        elif crashed:
            what = f"{slot.crashes} crashes in a row without a finished trial, the last with "
            what += f"{how(code)}; given up"
            logger.error("%s: %s. What it said is in %s", slot.name, what, slot.log)
        elif code:
            logger.error("%s: %s (log: %s)", slot.name, _reason(slot), slot.log)

    # -- signals -------------------------------------------------------------------------------

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGTERM and now - self._signalled < SAME_SECONDS:
            return
        self._stop, self._signalled = self._stop or number, now
        self._signals += 1

    def _pass_on_signals(self) -> None:
        if self._stop is None:
            return
        running = [slot for slot in self.slots if slot.process is not None]
        if not self._passed_on:
            self._kill_at = time.monotonic() + self._grace + KILL_SECONDS
            name = signal.Signals(self._stop).name
            logger.warning("%s: ending %d workers; again to end at once", name, len(running))
        first, self._passed_on = not self._passed_on, True
        late = time.monotonic() >= self._kill_at
        for slot in self.slots:
            slot.restart = None
        for slot in running:
            assert slot.process is not None
            if late or self._signals > 1:
                self._kill_at = math.inf
                what = "does not end; killed" if late else "killed"
                logger.warning("%s: %s", slot.name, what)
                with suppress(ProcessLookupError):
                    os.killpg(slot.process.pid, signal.SIGKILL)
            elif first:
                # Not to its group: a data loader that dies would look like a failure.
                os.kill(slot.process.pid, signal.SIGTERM)


def worker_environment(
    base: Mapping[str, str], device: Device, per_device: int = 1
) -> dict[str, str]:
    """The environment of a worker on ``device``: it sees nothing else, and shares its cores.

    Args:
        base: The supervisor's.
        device: Its device.
        per_device: How many workers share it.
    """
    env = {key: value for key, value in base.items() if not key.startswith(OPTIONS)}
    env |= {key: device.visible for key in VISIBLE if key in base or key == VISIBLE[0]}
    env |= {DEVICE: str(device), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    if device == CPU and per_device > 1:
        cores = len(os.sched_getaffinity(0))
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores // per_device)))
    return env


def logs_folder(study: str) -> Path:
    """Where the logs of this study's workers on this node go unless the user says otherwise."""
    # Nodes often share the working directory.
    return Path("hpsched-logs", re.sub(r"[^\w.-]|^\.", "_", study), socket.gethostname())


# -- the worker's side -----------------------------------------------------------------------------


def supervised(grace: float = 0.0) -> Callable[[WorkerRecord], None] | None:
    """In a fleet's worker, what tells the supervisor a record; None in any other process.

    From this call on the process ends when its supervisor is gone.
    """
    number = os.environ.pop(PROGRESS_FD, None)  # not for the processes that the objective starts
    if number is None:
        return None
    line = socket.socket(fileno=int(number))
    line.set_inheritable(False)
    pid = os.getpid()

    def watch() -> None:
        with suppress(OSError):
            line.recv(1)  # the supervisor never writes: this returns when it is gone
        logger.warning("the supervisor is gone")
        os.kill(pid, signal.SIGTERM)
        time.sleep(grace + KILL_SECONDS)
        os.killpg(pid, signal.SIGKILL)

    def tell(record: WorkerRecord) -> None:
        # A supervisor that is gone or stopped, or does not read as fast, must not hold us up.
        with suppress(OSError):
            line.send(json.dumps(record.to_json()).encode(), socket.MSG_DONTWAIT)

    threading.Thread(target=watch, name="hpsched-supervisor", daemon=True).start()
    return tell


# -- small things ----------------------------------------------------------------------------------


def _run(record: WorkerRecord) -> tuple[object, ...]:
    return record.trial, record.kind, record.rung, record.total_steps


def _exit_code(pid: int) -> int | None:
    """As :attr:`subprocess.Popen.returncode`, but not reaped: its process group stays its own."""
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _new_lines(slot: Slot) -> Iterator[str]:
    """The lines of its log since the last call; a progress bar's as it was when it was ended."""
    assert slot.tail is not None
    *lines, rest = (slot.rest + slot.tail.read(_MOST_BYTES)).split(b"\n")
    slot.rest = rest[-_LONGEST_LINE:]  # a progress bar may go on for days
    for line in lines:
        yield line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")


def _reason(slot: Slot) -> str:
    said = [line for line in slot.lines if line.startswith("Error: ")]
    return said[-1] if said else f"worker ended with {how(slot.code)}"
