"""Files from which a long cycle goes on after an interruption, on a disk that all nodes share.

:meth:`hpsched.Cycle.checkpoint` and :meth:`hpsched.Cycle.restore` are what users call; the
:class:`Keeper` says where and how often files are written, and lets a worker that is being ended
have one more. A file belongs to one run (name, seed, recipe, length), is replaced as a whole, and
carries a digest, so that what is read is what was written. It holds plain data only, and is read
as such: reading it runs no code.

HPSCHED_CHECKPOINTS is the folder, and HPSCHED_CHECKPOINT_SECONDS the time between two files (60).

Torch is imported when a file is written or read: a worker needs this module before.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import struct
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

from optuna.trial import FrozenTrial

from hpsched import records
from hpsched.errors import RecordError, TrainingError, UsageError

FOLDER = "HPSCHED_CHECKPOINTS"
SECONDS = "HPSCHED_CHECKPOINT_SECONDS"
EVERY = 60.0  # seconds

SUFFIX = ".checkpoint"
_MAGIC = b"hpsched checkpoint 1\n"
_HEADER = struct.Struct(f">{len(_MAGIC)}sQ32s")  # magic, step, digest of the rest


@dataclass
class Keeper:
    """Where checkpoints are kept, how often, and whether the worker is being ended.

    Attributes:
        folder: On a disk that all nodes share; None: nothing is saved.
        every: Seconds between two saves of a run.
        used: Set by the run in hand once it has called ``checkpoint`` and will save.
        ending: Set by a worker that is being ended: the next ``checkpoint`` saves at once and
            raises it.
        stopping: Set by a worker that is being ended: what fails from then on (data loaders get the
            signal too) fails because of that, and the run's file stays.
        is_ours: Asked before each save: False when the trial was given to another worker, whose
            file must stay.

    Raises:
        UsageError: No such folder, one that cannot be written, or ``every`` is no time.
    """

    folder: Path | None = None
    every: float = EVERY
    used: bool = False
    ending: type[BaseException] | None = None
    stopping: bool = False
    is_ours: Callable[[], bool] = lambda: True
    _failed: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.every < math.inf:
            raise UsageError(f"{self.every!r} seconds between checkpoints: 0 or more.")
        if self.folder is None:
            return
        if not self.folder.is_dir():
            raise UsageError(
                f"checkpoints go to {str(self.folder)!r}, which is no folder: make it first, on a "
                "disk that all nodes share."
            )
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise UsageError(
                f"checkpoints go to {str(self.folder)!r}, which cannot be written: change its "
                "permissions, or name another folder."
            )

    @staticmethod
    def from_environment() -> Keeper:
        """As HPSCHED_CHECKPOINTS and HPSCHED_CHECKPOINT_SECONDS say.

        Raises:
            UsageError: One of them cannot be right.
        """
        seconds = os.environ.get(SECONDS, str(EVERY))
        try:
            every = float(seconds)
        except ValueError:
            raise UsageError(f"{SECONDS}={seconds!r}: a number of seconds, e.g. 60.") from None
        return _of_environment(os.environ.get(FOLDER), every)

    def path(self, name: str, **run: Any) -> Path | None:
        """The file of the run of that name; None where nothing is saved.

        Args:
            name: Of the run.
            run: What makes another run of the same name another run: its seed, recipe, length.
        """
        if self.folder is None:
            return None
        text = json.dumps(run, sort_keys=True, default=repr)
        return self.folder / f"{_stem(name)}-{_digest(text, 8)}{SUFFIX}"

    def forget_failed(self, name: str) -> None:
        """:meth:`forget` a run that failed, unless it goes on elsewhere or later."""
        if not self.stopping and self.is_ours():
            self.forget(name)

    def forget(self, name: str) -> None:
        """Remove the files of the run of that name, unfinished ones of killed workers too."""
        if self.folder is None:
            return
        with suppress(OSError):
            for path in self.folder.glob(f"{_stem(name)}-{'[0-9a-f]' * 16}{SUFFIX}*"):
                with suppress(OSError):
                    path.unlink()

    def save(self, path: Path, step: int, content: Mapping[str, Any]) -> None:
        """Write a run's file; a disk that is full or away costs the file only.

        A file that is further on stays: its run was given to another worker meanwhile.

        Raises:
            TrainingError: ``content`` holds more than plain data.
        """
        if not self.is_ours() or (_step_of(path) or -1) > step:
            return
        try:
            _write(path, step, content)
        except OSError as error:
            if not self._failed:
                self._failed = True
                warnings.warn(
                    f"no checkpoint could be written to {str(path.parent)!r} ({error}): training "
                    "goes on, but an interruption costs what was done since the last one. Make "
                    "room there.",
                    stacklevel=4,
                )


@lru_cache
def _of_environment(folder: str | None, every: float) -> Keeper:
    return Keeper(Path(folder) if folder else None, every)


#: Who keeps the checkpoints of what runs here; set by a worker.
keeper: ContextVar[Keeper | None] = ContextVar("keeper", default=None)


def current() -> Keeper:
    """The worker's keeper, or, without a worker, one as the environment says.

    Raises:
        UsageError: The environment names no folder that could be.
    """
    return keeper.get() or Keeper.from_environment()


def run_name(study: str, origin: int, kind: str, rung: int) -> str:
    """Unique name of a run: the study's, the trial's whose seeds it has, and which of its runs."""
    return f"{study}-trial{origin}-{kind}{rung}"


def forget_trial(study: str, trial: FrozenTrial) -> None:
    """Remove what the runs of a trial have left that ended while nobody ran it."""
    origin = trial.user_attrs.get(records.ORIGIN, trial.number)
    with suppress(RecordError):
        for recipe in records.recipe_spaces(trial):
            for kind, (rung, _) in itertools.product(("rung", "confirm"), recipe.rungs):
                current().forget(run_name(study, origin, kind, rung))


def load(path: Path) -> dict[str, Any] | None:
    """What was saved there; None, with a warning unless there is no file, if it cannot be read.

    Tensors are on the CPU.
    """
    import torch

    try:
        with path.open("rb") as file:
            _check(file)
            content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            return content
    except FileNotFoundError:
        return None
    except MemoryError:
        raise
    except Exception as error:  # whatever the file's bytes made of it
        warnings.warn(
            f"the checkpoint {str(path)!r} cannot be read ({_first_line(error)}): the run starts "
            "from its beginning.",
            stacklevel=3,
        )
        if not isinstance(error, OSError):  # the disk may be back in a moment
            with suppress(OSError):
                path.unlink()
        return None


def _write(path: Path, step: int, content: Mapping[str, Any]) -> None:
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # two workers may have the run
    try:
        with own.open("x+b") as file:
            file.write(_HEADER.pack(b"", step, b""))  # refused, should it ever be read like this
            rest = _Hashed(file)
            _dump(content, rest)
            file.seek(0)
            file.write(_HEADER.pack(_MAGIC, step, rest.digest()))
            file.flush()
            os.fsync(file.fileno())
            if path not in _written:
                _check_readable(file)
        own.replace(path)
        _written.add(path)
    finally:
        with suppress(OSError):
            own.unlink()


_written: set[Path] = set()  # by this process: a run's files are all alike


def _dump(content: Mapping[str, Any], file: _Hashed) -> None:
    import torch

    try:
        torch.save(dict(content), cast(IO[bytes], file))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # pickle raises what it likes
        if file.error is None:
            raise _not_plain(error) from None
    if file.error is not None:
        raise file.error


class _Hashed:
    """A file that is only written to, and a digest of what was written.

    An error waits for the end, since torch's writer cannot be left in the middle.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.error: OSError | None = None
        self._file = file
        self._hash = hashlib.blake2b(digest_size=32)

    def write(self, data: Any) -> int:
        """Write all of ``data``, unless a write failed before."""
        if self.error is None:
            try:
                self._file.write(data)
                self._hash.update(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing: the file is flushed as a whole."""

    def digest(self) -> bytes:
        """Of all that was written."""
        return self._hash.digest()


def _check(file: IO[bytes]) -> None:
    """Raise ValueError unless the file is whole; leaves it after the header."""
    magic, _, digest = _header(file)
    if magic != _MAGIC:
        raise ValueError("not a checkpoint of this version of hpsched")
    found = hashlib.blake2b(digest_size=32)
    while block := file.read(1 << 20):
        found.update(block)
    if found.digest() != digest:
        raise ValueError("damaged or cut off")
    file.seek(_HEADER.size)


def _check_readable(file: IO[bytes]) -> None:
    """Better told at the first save than when it is too late."""
    import torch

    file.seek(_HEADER.size)
    try:
        torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        raise _not_plain(error) from None


def _not_plain(error: Exception) -> TrainingError:
    return TrainingError(
        f"what cycle.checkpoint was given cannot be kept ({_first_line(error)}): pass state_dicts, "
        "tensors, numbers, strings, and dicts, lists and tuples of them; .tolist() of an array."
    )


def _header(file: IO[bytes]) -> tuple[bytes, int, bytes]:
    data = file.read(_HEADER.size)
    if len(data) < _HEADER.size:
        raise ValueError("cut off")
    magic, step, digest = _HEADER.unpack(data)
    return magic, step, digest


def _step_of(path: Path) -> int | None:
    try:
        with path.open("rb") as file:
            magic, step, _ = _header(file)
    except (OSError, ValueError):
        return None
    return step if magic == _MAGIC else None


def _stem(name: str) -> str:
    """A file name's beginning: readable, safe, and another one for each name."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)[-80:].lstrip('.-')}-{_digest(name, 4)}"


def _digest(text: str, size: int) -> str:
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
