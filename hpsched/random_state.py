"""Random number generators: those of the process, and those that a data loader holds.

A handle reads a generator's state as plain numbers and tensors, fit for a file, and writes it back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Handle(NamedTuple):
    """How to read one generator's state, and how to write it back."""

    read: Callable[[], Any]
    write: Callable[[Any], object]


def handle(value: Any) -> Handle | None:
    """How to read and write a random number generator; None for any other object."""
    if isinstance(value, torch.Generator):
        return Handle(value.get_state, value.set_state)
    if isinstance(value, random.Random):
        return Handle(value.getstate, value.setstate)
    if isinstance(value, np.random.RandomState):
        return Handle(lambda: _plain(value.get_state()), value.set_state)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return Handle(lambda: _plain(bits.state), partial(setattr, bits, "state"))
    return None


def of_process(also: Container[str] = ()) -> dict[str, Handle]:
    """The generators of Python, NumPy, torch, and of the devices in use.

    Args:
        also: Names to include even if this process has not used that device yet.
    """
    found = {
        "python": Handle(random.getstate, random.setstate),
        "numpy": Handle(lambda: _plain(np.random.get_state()), np.random.set_state),
        "torch": Handle(torch.get_rng_state, torch.set_rng_state),
    }
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if used or ("cuda" in also and torch.cuda.is_available()):
        found["cuda"] = Handle(torch.cuda.get_rng_state_all, _write_cuda)
    if torch.backends.mps.is_available():
        found["mps"] = Handle(torch.mps.get_rng_state, torch.mps.set_rng_state)
    return found


def of_loader(loader: Any) -> dict[str, Handle]:
    """The generators that a loader, its samplers and its data set have as attributes."""
    return dict(_held("loader", loader, set()))


def read(handles: Mapping[str, Handle]) -> dict[str, Any]:
    """The state of each generator, by name."""
    return {name: one.read() for name, one in handles.items()}


def write(handles: Mapping[str, Handle], states: Mapping[str, Any]) -> None:
    """Put the generators that ``states`` names into these states."""
    for name, one in handles.items():
        if name in states:
            one.write(states[name])


def _held(name: str, part: Any, seen: set[int]) -> Iterator[tuple[str, Handle]]:
    attributes = getattr(part, "__dict__", None)
    if attributes is None or id(part) in seen:
        return
    seen.add(id(part))
    for key, value in attributes.items():
        found = handle(value)
        if found is not None:
            yield f"{name}.{key}", found
    for key in ("sampler", "batch_sampler", "dataset"):
        yield from _held(f"{name}.{key}", attributes.get(key), seen)


def _write_cuda(states: Sequence[Tensor]) -> None:
    # As many as there are: the machine that goes on may have fewer devices.
    for device, state in zip(range(torch.cuda.device_count()), states, strict=False):
        torch.cuda.set_rng_state(state, device)


def _plain(state: Any) -> Any:
    """The same with lists for arrays, which files of weights only must not hold."""
    if isinstance(state, np.ndarray):
        return state.tolist()
    if isinstance(state, tuple):
        return tuple(map(_plain, state))
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state
