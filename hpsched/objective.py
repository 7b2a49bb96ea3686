"""``module:function`` or ``file.py:function`` → the function; users' code is never stored."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpsched.errors import ObjectiveError

_HERE = str(Path(__file__).parent)
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def load(spec: str) -> Callable[..., Any]:
    """Import the function that ``spec`` names, with the working directory on the path.

    Args:
        spec: ``module:function`` (``pkg.train:objective``) or ``path/to/file.py:function``.

    Raises:
        ObjectiveError: Not of that form, not found, raised while imported, or not callable.
    """
    source, _, attribute = spec.rpartition(":")
    if not source or not attribute:
        raise ObjectiveError(
            f"{spec!r} is not of the form module:function, e.g. train:objective for the function "
            "`objective` in train.py here."
        )
    module = _import(source, spec)
    function = getattr(module, attribute, None)
    if function is None:
        there = [name for name, value in vars(module).items() if _is_function(value, module)]
        raise ObjectiveError(
            f"{source!r} has no {attribute!r}; its functions are: {', '.join(there) or 'none'}."
        )
    if not callable(function):
        raise ObjectiveError(f"{spec!r} is {type(function).__name__}, not a function.")
    return function  # type: ignore[no-any-return]


def load_objective(spec: str) -> Callable[..., Any]:
    """:func:`load`, for ``objective(trial)``.

    Raises:
        ObjectiveError: As :func:`load`; it is a ``train(cycle)``; or it cannot be called with a
            trial alone.
    """
    function = load(spec)
    try:
        first = next(iter(inspect.signature(function).parameters), "")
        # A decorator may well give the function it wraps more than it takes itself.
        own = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # a callable that does not say
        return function
    if first == "cycle":
        raise ObjectiveError(
            f"{spec!r} takes a cycle: it is a train(cycle), to be called by an objective(trial) "
            "such as `return hpsched.suggest_onecycle(trial, total_steps=3_000).run(train)`."
        )
    try:
        own.bind(None)
    except TypeError as error:
        raise ObjectiveError(
            f"{spec!r} has the arguments {own} and cannot be called with a trial alone ({error}): "
            "define it as `def objective(trial):`, with defaults for whatever else it takes."
        ) from None
    return function


def _import(source: str, spec: str) -> Any:
    name = source
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise ObjectiveError(f"{spec!r}: there is no file {source!r} in {Path.cwd()}.")
        folder, name = str(path.parent.resolve()), path.stem
    else:
        folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ObjectiveError(
                f"{spec!r}: there is no module {error.name!r} in {folder} or among the installed "
                "packages. Run this from the folder that holds it, or name its file: "
                f"{name.replace('.', '/')}.py:{spec.rpartition(':')[2]}."
            ) from error
        raise ObjectiveError(
            f"{spec!r} needs the module {error.name!r}, which is not installed here: install it, "
            "or activate the environment that has it."
        ) from error
    except (Exception, SystemExit) as error:
        raise ObjectiveError(
            f"{spec!r} raised while it was imported: {describe(error)}. Mend it, and try "
            f"`python -c 'import {name}'`."
        ) from error


def describe(error: BaseException) -> str:
    """One line: the exception, and the last line of the user's own code on the way to it."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text}{_where(error)}" if text else f"{name}{_where(error)}"


def _where(error: BaseException) -> str:
    if isinstance(error, SyntaxError):  # its text says where, and no frame does
        return ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_ours(f.filename)]
    users = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)] or frames
    return f" ({Path(users[-1].filename).name}:{users[-1].lineno})" if users else ""


def _is_ours(filename: str) -> bool:
    return filename.startswith(("<frozen", _HERE))


def _is_function(value: Any, module: Any) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__
