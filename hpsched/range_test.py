"""The stand-alone learning-rate finder: one sweep over a model that is then as it was before.

Training after ``lr_range_test`` equals training without it, bit for bit. Two things see to that:

* :class:`_Snapshot` walks what can be reached from model, optimizer, GradScaler, loss and loader,
  and keeps each object *and* its content; restoring writes the content back into the same object.
* :class:`_Interrupts` lets the first Ctrl-C end the sweep at once and holds any further one until
  everything is back in place.

The sweep itself is a :class:`~hpsched.Cycle` of kind ``range_test``: the same driver, stop rule and
batches as in a study.
"""

from __future__ import annotations

import math
import random
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpsched import cycle as cycles
from hpsched import schedules
from hpsched.cycle import Cycle
from hpsched.errors import UsageError
from hpsched.lr_curve import MIN_POINTS, RangeTest

__all__ = ["lr_range_test"]

Undo = Callable[[], object]
Group = dict[str, Any]


def lr_range_test(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    loader: Iterable[Any],
    *,
    start_lr: float = 1e-6,
    end_lr: float = 10.0,
    num_iter: int = 100,
    mode: str = "exp",
    accumulate: int = 1,
    weight_decay: float | None = None,
    momentum: float | None = None,
    seed: int | None = None,
    scaler: Any = None,
    autocast: AbstractContextManager[Any] | None = None,
    device: torch.device | str | None = None,
    step_fn: Callable[[Any, Any], Tensor] | None = None,
    progress: bool = True,
) -> RangeTest:
    """Sweep the learning rate from far too small to far too large, and read a good one off.

    Trains ``model`` for up to ``num_iter`` optimizer steps, starting from the weights and the
    optimizer state it has, and ends early once the loss has diverged (L. N. Smith,
    arXiv:1506.01186 section 3.3). Leaves everything bit for bit as it was, also after an exception
    or Ctrl-C: parameters, buffers, gradients, modes and attributes of all submodules; the
    optimizer's state and groups; the GradScaler; the states of Python's, NumPy's and torch's random
    number generators, of generators that loader, sampler and data set hold, and sampler epochs.
    What only ``step_fn`` reaches is not restored, nor are batches given back to an iterator.

    Args:
        model: Put into training mode if it is in evaluation mode; submodules of a model in training
            mode (frozen batch normalisation) keep theirs.
        optimizer: Of some of the model's parameters. The group with the largest rate is swept, all
            others keep their ratio to it.
        loss_fn: ``loss_fn(output, target)``, a scalar to minimise. Not used with ``step_fn``.
        loader: Yields ``(input, target)``; gone round as often as it takes.
        start_lr: First rate, above 0.
        end_lr: Last rate.
        num_iter: Optimizer steps, one rate each; at least 10.
        mode: ``exp`` (equal steps in log rate) or ``linear``.
        accumulate: Batches per optimizer step; their mean loss is the step's.
        weight_decay: Weight decay during the sweep: that of the group with most, the others keep
            their ratio to it. Default: as it is.
        momentum: Momentum (or beta1) of all groups during the sweep. Default: as it is.
        seed: Seeds Python, NumPy and torch before the sweep. Default: their state as it is.
        scaler: A GradScaler; a step that it skips has had its rate like any other.
        autocast: Entered around each forward pass, e.g. ``torch.autocast("cuda")``.
        device: Where batches are moved to. Default: the model's first parameter's.
        step_fn: ``step_fn(model, batch) -> loss`` for anything else: several inputs, dict batches.
        progress: Show a progress bar, on a terminal.

    Returns:
        The raw curve with what it says: ``.suggestion``, ``.window``, ``.reliable``, ``.reason``.

    Raises:
        UsageError: An argument that cannot be right; the message names the remedy.
        TrainingError: The loader is empty, or the loss was non-finite before any update.
    """
    sweep = _Sweep(
        model=model,
        optimizer=optimizer,
        compute=_loss_of(loss_fn, step_fn),
        loader=loader,
        accumulate=accumulate,
        scaler=scaler,
        autocast=autocast if autocast is not None else nullcontext(),
        device=torch.device(device) if device is not None else _device_of(model),
    )
    _check(model, optimizer, num_iter, start_lr, weight_decay, momentum)
    cycle = Cycle(
        values={"max_lr": end_lr},
        schedules=schedules.OneCycleSchedules(
            lr=schedules.range_test(num_iter, start_lr, end_lr, mode),
            momentum=lambda step: 0.0,  # not driven
        ),
        total_steps=num_iter,
        seed=0 if seed is None else seed,
        kind="range_test",
        name="range test",
        drives_momentum=False,
        progress=progress,
    )
    interrupts = _Interrupts()
    saved = _Snapshot((model, optimizer, scaler, loss_fn, step_fn), loader)
    # Two finally clauses: an interrupt may strike in the first one before it holds the next, and
    # then the second restores all the same; by then further ones are held in either case.
    try:
        interrupts.watch()
        try:
            decay, beta = _prepare(model, optimizer, end_lr, weight_decay, momentum, seed)
            outcome = cycles.execute(cycle, sweep)
        finally:
            interrupts.holding = True
    finally:
        try:
            saved.restore()
        finally:
            interrupts.release()
    return RangeTest(
        lrs=tuple(cycle.schedules.lr(step) for step in range(num_iter)),
        losses=tuple(cycle.losses()),
        weight_decay=decay,
        momentum=beta,
        seed=seed,
        optimizer=type(optimizer).__name__,
        seconds=outcome.seconds,
    )


# ------------------------------------------------------------------ the sweep


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """The training loop of the sweep, as a cycle calls it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    compute: Callable[[Any, Any], Any]
    loader: Iterable[Any]
    accumulate: int
    scaler: Any
    autocast: AbstractContextManager[Any]
    device: torch.device

    def __call__(self, cycle: Cycle) -> None:
        schedule = cycle.schedule(self.optimizer)
        total: Tensor | float = 0.0
        with torch.inference_mode(False), torch.enable_grad():
            for taken, batch in enumerate(cycle.batches(self.loader, self.accumulate), start=1):
                total = total + self._backward(batch)
                if taken % self.accumulate == 0:
                    self._step()
                    schedule.step(total)
                    total = 0.0

    def _backward(self, batch: Any) -> Tensor:
        with self.autocast:
            loss = _check_loss(self.compute(self.model, _to(batch, self.device)))
        loss = loss.reshape(()) / self.accumulate
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def _step(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()


def _loss_of(
    loss_fn: Callable[[Any, Any], Any] | None, step_fn: Callable[[Any, Any], Any] | None
) -> Callable[[Any, Any], Any]:
    if step_fn is not None:
        return step_fn
    if loss_fn is None:
        raise UsageError("loss_fn=None: pass loss_fn(output, target), or step_fn(model, batch).")
    return partial(_pair_loss, loss_fn)


def _pair_loss(loss_fn: Callable[[Any, Any], Any], model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        length = f" of {len(batch)}" if isinstance(batch, tuple | list | Mapping) else ""
        raise UsageError(
            f"the loader yields a {type(batch).__name__}{length}, not a pair (input, target): "
            "pass step_fn=lambda model, batch: ... that returns the loss of such a batch."
        )
    return loss_fn(model(batch[0]), batch[1])


def _check_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(f"the loss is a {what}: return a scalar tensor, e.g. loss.mean().")
    if not loss.requires_grad:
        raise UsageError(
            "the loss does not depend on any trainable parameter: do not compute it under "
            "torch.no_grad() or from .detach()ed, .item() or NumPy values."
        )
    return loss


def _to(value: Any, device: torch.device) -> Any:
    """Tensors, and batches with a ``to`` of their own, on ``device``; containers rebuilt."""
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(part, device) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to(part, device) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(_to(part, device) for part in value)
    return value


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _check(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    num_iter: int,
    start_lr: float,
    weight_decay: float | None,
    momentum: float | None,
) -> None:
    if num_iter < MIN_POINTS:
        raise UsageError(f"num_iter={num_iter!r}: a curve needs at least {MIN_POINTS} steps.")
    if not start_lr > 0:
        raise UsageError(f"start_lr={start_lr!r}: give a positive rate, e.g. 1e-6.")
    if weight_decay is not None and not 0 <= weight_decay < math.inf:
        raise UsageError(f"weight_decay={weight_decay!r}: give a finite number, 0 or more.")
    if momentum is not None and not 0 <= momentum < 1:
        raise UsageError(f"momentum={momentum!r}: give 0 or more, below 1.")
    _check_parameters(model, optimizer)


def _check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if not trainable:
        raise UsageError(
            f"{type(model).__name__} has no trainable parameters: set requires_grad on those that "
            "the sweep shall train."
        )
    if not any(id(p) in trainable for group in optimizer.param_groups for p in group["params"]):
        raise UsageError(
            f"{type(optimizer).__name__} holds no trainable parameter of {type(model).__name__}: "
            "build it from model.parameters(), after anything that replaces them."
        )
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise UsageError(
            f"{type(model).__name__} has lazy parameters without a shape: "
            "run one batch through the model first."
        )


# ------------------------------------------------------------------ before the sweep


def _prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    end_lr: float,
    weight_decay: float | None,
    momentum: float | None,
    seed: int | None,
) -> tuple[float | None, float | None]:
    """Set up everything for the sweep; the weight decay and momentum that it runs with."""
    groups = optimizer.param_groups
    reference = _scale_rates(groups, end_lr)
    if weight_decay is not None:
        _set_weight_decay(groups, weight_decay, type(optimizer).__name__)
    if momentum is not None:
        _set_momentum(groups, momentum, type(optimizer).__name__)
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
    if not model.training:
        model.train()
    optimizer.zero_grad()  # gradients of the caller's are no part of the sweep
    betas = reference.get("betas")
    used = betas[0] if betas is not None else reference.get("momentum")
    return _number(reference.get("weight_decay")), _number(used)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _scale_rates(groups: list[Group], end_lr: float) -> Group:
    """Give the group with the largest rate ``end_lr``, as a cycle expects; return that group."""
    rates = [float(group["lr"]) for group in groups]
    largest = max(rates)
    if not 0 < largest < math.inf:
        raise UsageError(
            f"the optimizer's learning rates are {rates}: the sweep keeps their ratios, so one "
            "must be positive (call the finder before a warm-up scheduler sets them to 0)."
        )
    for group, rate in zip(groups, rates, strict=True):
        cycles._set_lr(group, rate / largest * end_lr)
    return groups[rates.index(largest)]


def _set_weight_decay(groups: list[Group], value: float, optimizer: str) -> None:
    decays = [float(group["weight_decay"]) for group in groups if "weight_decay" in group]
    if not decays:
        raise UsageError(f"weight_decay={value!r}: {optimizer} has none; leave it out.")
    largest = max(decays)
    for group in groups:
        if "weight_decay" in group:
            share = group["weight_decay"] / largest if largest > 0 else 1.0
            group["weight_decay"] = value * share


def _set_momentum(groups: list[Group], value: float, optimizer: str) -> None:
    driven = [group for group in groups if group.get("betas") is not None or "momentum" in group]
    if not driven:
        raise UsageError(f"momentum={value!r}: {optimizer} has none; leave it out.")
    for group in driven:
        if group.get("betas") is not None:
            cycles._set_beta1(group, value)
        else:
            group["momentum"] = value


# ------------------------------------------------------------------ restoring


class _Snapshot:
    """Objects and their content, as they were; ``restore`` writes it back into the same objects.

    Follows modules, optimizers, containers and tensors. Any other object is kept by reference
    only, random number generators apart, whose state is kept.
    """

    def __init__(self, roots: Iterable[Any], loader: Any) -> None:
        self._undo: list[Undo] = []
        self._seen: dict[int, Any] = {}  # holds the objects, so that their ids stay theirs
        for root in roots:
            self._save(getattr(root, "__dict__", None))
            if isinstance(root, nn.Module):  # scripted modules keep these out of __dict__
                self._save([*root.parameters(), *root.buffers()])
        self._save_loader(loader)
        self._undo += _global_generators()

    def restore(self) -> None:
        """Put everything back; one object that resists keeps no other from it."""
        failures: list[Exception] = []
        with torch.no_grad():
            for undo in self._undo:
                try:
                    undo()
                except Exception as error:
                    failures.append(error)
        if failures:
            raise failures[0]

    def _save(self, value: Any) -> None:
        if value is None or isinstance(value, str | int | float) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._save_tensor(value)
        elif isinstance(value, nn.Module | torch.optim.Optimizer):
            self._save(value.__dict__)
        elif isinstance(value, dict):
            self._save_content(value, dict(value), value.update)
            self._save_all(value.keys())  # an optimizer's state has its parameters as keys
            self._save_all(value.values())
        elif isinstance(value, list | deque):
            self._save_content(value, list(value), value.extend)
            self._save_all(value)
        elif isinstance(value, set):
            self._save_content(value, set(value), value.update)
        elif isinstance(value, tuple):
            self._save_all(value)
        else:
            self._undo += _generator(value)

    def _save_all(self, values: Iterable[Any]) -> None:
        for value in list(values):
            self._save(value)

    def _save_content(self, value: Any, content: Any, fill: Callable[[Any], Any]) -> None:
        def undo() -> None:
            value.clear()
            fill(content)

        self._undo.append(undo)

    def _save_tensor(self, tensor: Tensor) -> None:
        grad = tensor.grad if tensor.is_leaf else None
        self._save(grad)
        storage, content = tensor.detach(), _dense(tensor.detach()).clone()
        undo = partial(_restore_tensor, tensor, storage, content, tensor.requires_grad, grad)
        self._undo.append(undo)

    def _save_loader(self, part: Any) -> None:
        """Rebind attributes only: their content may be the whole data set."""
        attributes = getattr(part, "__dict__", None)
        if attributes is None or id(part) in self._seen:
            return
        self._seen[id(part)] = part
        self._undo.append(partial(_restore_loader, part, dict(attributes)))
        for value in attributes.values():
            self._undo += _generator(value)
        for name in ("sampler", "batch_sampler", "dataset"):
            self._save_loader(attributes.get(name))


def _restore_tensor(
    tensor: Tensor, storage: Tensor, content: Tensor, requires_grad: bool, grad: Tensor | None
) -> None:
    if _layout(tensor) != _layout(storage):  # `.data` was set
        tensor.data = storage
    with torch.inference_mode(storage.is_inference()):  # which may only be written there
        _dense(storage).copy_(content)
    if tensor.is_leaf:
        tensor.requires_grad_(requires_grad)
        tensor.grad = grad


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided:
        return (tensor.layout, tensor.shape)
    return (tensor.data_ptr(), tensor.shape, tensor.stride())


def _dense(tensor: Tensor) -> Tensor:
    """The part of an expanded tensor that has memory of its own: the rest cannot be written."""
    if tensor.layout is not torch.strided:
        return tensor
    return tensor[tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())]


def _restore_loader(part: Any, attributes: dict[str, Any]) -> None:
    iterator = part.__dict__.get("_iterator")  # of a DataLoader with persistent workers
    if iterator is not None and iterator is not attributes.get("_iterator"):
        iterator._shutdown_workers()
    part.__dict__.clear()
    part.__dict__.update(attributes)


def _generator(value: Any) -> list[Undo]:
    """How to restore a random number generator; nothing for any other object."""
    if isinstance(value, torch.Generator):
        return [partial(value.set_state, value.get_state())]
    if isinstance(value, random.Random):
        return [partial(value.setstate, value.getstate())]
    if isinstance(value, np.random.RandomState):
        return [partial(value.set_state, value.get_state())]
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return [partial(setattr, bits, "state", bits.state)]
    return []


def _global_generators() -> list[Undo]:
    undo: list[Undo] = [
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        undo.append(partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if torch.backends.mps.is_available():
        undo.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return undo


class _Interrupts:
    """Signals whose handlers raise (Ctrl-C): the first goes through, later ones wait.

    Nothing to do outside the main thread, which alone runs Python's signal handlers.
    """

    def __init__(self) -> None:
        self.holding = False
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._held: list[int] = []

    def watch(self) -> None:
        """Put this in front of the handlers there are."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(signum)
            if callable(handler):  # not the system's default, nor ignored
                self._handlers[signum] = handler
                signal.signal(signum, self._handle)

    def release(self) -> None:
        """Put the handlers back, then let them have what was held."""
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        held, self._held = self._held, []
        for signum in held:
            self._handlers[signum](signum, None)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.holding:
            self._held.append(signum)
            return
        self.holding = True  # stays so if the handler raises
        self._handlers[signum](signum, frame)
        self.holding = False
