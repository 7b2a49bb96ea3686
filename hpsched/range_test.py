"""The stand-alone learning-rate finder: sweeps over a model that is then as it was before.

Training after ``lr_range_test`` equals training without it, bit for bit. Two things see to that:

* :class:`_Snapshot` walks what can be reached from model, optimizer, GradScaler, loss and loader,
  and keeps each object *and* its content; restoring writes the content back into the same object.
* :class:`_Interrupts` lets the first Ctrl-C end the sweep at once and holds any further one until
  everything is back in place.

The sweep itself is a :class:`~hpsched.Cycle` of kind ``range_test``: the same driver, stop rule and
batches as in a study. ``lr_range_tests`` is several of them, by weight decay and seed.
"""

from __future__ import annotations

import inspect
import math
import os
import random
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpsched import cycle as cycles
from hpsched import random_state, ranks, schedules
from hpsched.batches import rounds
from hpsched.cycle import Cycle, Outcome
from hpsched.divergence import MIN_POINTS
from hpsched.errors import UsageError
from hpsched.lr_curve import RangeTest
from hpsched.weight_decay import RangeTests

__all__ = ["lr_range_test", "lr_range_tests"]

Undo = Callable[[], object]
Group = dict[str, Any]
Curves = dict[str, list[tuple[int, float]]]
SMALL = 4096  # bytes; tensors up to this size stay in memory


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
    total_steps: int | None = None,
    stop_diverged: bool = True,
    accumulate: int = 1,
    weight_decay: float | None = None,
    momentum: float | None = None,
    clip_grad_norm: float | None = None,
    seed: int | None = None,
    scaler: Any = None,
    autocast: AbstractContextManager[Any] | None = None,
    device: torch.device | str | None = None,
    step_fn: Callable[[Any, Any], Tensor] | None = None,
    valid_loader: Iterable[Any] | None = None,
    validate_every: int = 1,
    validate_batches: int = 1,
    metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
    valid_fn: Callable[[Any, Any], Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    process_group: Any = None,
    progress: bool = True,
) -> RangeTest:
    """Sweep the learning rate from far too small to far too large, and read a good one off.

    Trains ``model`` for up to ``num_iter`` optimizer steps, starting from the weights and the
    optimizer state it has, and ends early once the loss has diverged (L. N. Smith,
    arXiv:1506.01186 section 3.3). Leaves everything bit for bit as it was, also after an exception
    or Ctrl-C: parameters, buffers, gradients, modes and attributes of all submodules; the
    optimizer's state and groups; the GradScaler; the states of Python's, NumPy's and torch's random
    number generators, of generators that loader, sampler and data set hold, and sampler epochs.
    What only ``step_fn`` or ``valid_fn`` reaches is not restored, nor are batches given back to an
    iterator.

    Where several processes train together (torch.distributed, DDP), call it in all of them: the
    losses are averaged over the ranks, so that all end at the same step with the same curve.

    For users of fastai 0.7's ``lr_find2``:

    =========================  ===============================================================
    ``lr_find2``               here
    =========================  ===============================================================
    ``start_lr``, ``end_lr``   the same
    ``num_it``                 ``num_iter``, optimizer steps, going round the loader
    ``wds``                    ``weight_decays`` of :func:`lr_range_tests`
    ``linear=True``            ``mode="linear"``
    ``stop_dv``                ``stop_diverged``
    validation at each step    ``valid_loader`` (``validate_every=1, validate_batches=1``)
    ``metrics``                ``metrics``, on the validation batches
    =========================  ===============================================================

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
        mode: ``exp`` (equal steps in log rate) or ``linear`` (then give an end_lr of about 1).
        total_steps: Optimizer steps of the training that max_lr is for: the suggestion is moved
            from the sweep's length to it.
        stop_diverged: End the sweep once the loss has diverged. False: go on to ``end_lr``, unless
            the loss becomes non-finite.
        accumulate: Batches per optimizer step; their mean loss is the step's.
        weight_decay: Weight decay during the sweep: that of the group with most, the others keep
            their ratio to it. Default: as it is.
        momentum: Momentum (or beta1) of all groups during the sweep. Default: as it is.
        clip_grad_norm: Largest norm of the gradients, all parameters of the optimizer taken
            together; after the scaler has unscaled them. Default: not clipped.
        seed: Seeds Python, NumPy, torch, and the generators of loader and samplers before the
            sweep. Default: their state as it is.
        scaler: A GradScaler; a step that it skips has had its rate like any other.
        autocast: Entered around each forward pass, e.g. ``torch.autocast("cuda")``.
        device: Where batches are moved to. Default: the model's first parameter's.
        step_fn: ``step_fn(model, batch) -> loss`` for anything else: several inputs, dict batches.
        valid_loader: Measure the loss on its next batches, too, going round it: in evaluation mode,
            without gradients, under ``autocast``. What is found is in ``.validation``, and
            ``.validated`` reads the sweep by it. It leaves the training losses what they are (as
            long as it draws no random numbers but torch's on the CPU).
        validate_every: Optimizer steps from one validation to the next.
        validate_batches: Batches of each validation; their results are averaged with equal weights.
        metrics: Name → ``fn(output, target)``, a scalar, kept beside the validation ``loss``.
        valid_fn: ``valid_fn(model, batch)`` → loss or dict of metrics, for batches that are no
            pairs. Default: ``step_fn``, if that is given.
        cache_dir: Folder for a temporary file that takes what must be put back, instead of memory:
            for large models. It has no name and is gone when this returns or the process ends.
        process_group: Whose processes sweep together. Default: all, where torch.distributed is
            initialised; False: this process alone.
        progress: Show a progress bar, on a terminal.

    Returns:
        The raw curve and what it says (``.suggestion``, ``.window``, ``.reliable``, ``.reason``).

    Raises:
        UsageError: An argument that cannot be right; the message names the remedy.
        TrainingError: The loader is empty, or the loss was non-finite before any update.
        OSError: ``cache_dir`` cannot be written to; nothing has been changed then.
    """
    _check(model, optimizer, num_iter, start_lr, weight_decay, momentum, clip_grad_norm)
    _check_validation(valid_loader, validate_every, validate_batches, metrics, step_fn, valid_fn)
    measure = valid_fn or step_fn or partial(_pair_metrics, loss_fn, metrics or {})
    sweep = _Sweep(
        model=model,
        optimizer=optimizer,
        compute=_loss_of(loss_fn, step_fn),
        loader=loader,
        accumulate=accumulate,
        scaler=scaler,
        clip_grad_norm=clip_grad_norm,
        autocast=autocast if autocast is not None else nullcontext(),
        device=torch.device(device) if device is not None else _device_of(model),
        validation=None
        if valid_loader is None
        else _Validation(valid_loader, validate_batches, measure),
    )
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
        validate_every=validate_every,
        stop_diverged=stop_diverged,
        progress=progress,
        process_group=process_group,
    )

    def run() -> tuple[float | None, float | None, Outcome]:
        used = _prepare(model, optimizer, end_lr, weight_decay, momentum)
        if seed is not None:
            _seed_all(seed, (loader, valid_loader))
        return *used, cycles.execute(cycle, sweep)

    reached = (model, optimizer, scaler, loss_fn, step_fn, valid_fn, *(metrics or {}).values())
    saved = _Snapshot(reached, (loader, valid_loader), cache_dir)
    decay, beta, outcome = _run_without_trace(saved, run)
    return RangeTest(
        lrs=tuple(cycle.schedules.lr(step) for step in range(num_iter)),
        losses=tuple(cycle.losses()),
        weight_decay=decay,
        momentum=beta,
        seed=seed,
        optimizer=type(optimizer).__name__,
        seconds=outcome.seconds,
        total_steps=total_steps,
        validation=_over_ranks(cycle.validation, process_group, sweep.device),
    )


def lr_range_tests(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    loader: Iterable[Any],
    *,
    weight_decays: Sequence[float] = (1e-3, 1e-4, 1e-5, 0.0),
    replicates: int = 1,
    seed: int = 0,
    **options: Any,
) -> RangeTests:
    """Sweep once per weight decay and replicate, and choose weight decay and rate together.

    Every sweep starts from exactly the same state: weights, optimizer, loader, and, for the same
    replicate, random numbers; so weight decays are compared on the same batches.

    Args:
        model, optimizer, loss_fn, loader: As in :func:`lr_range_test`.
        weight_decays: One curve each (``wds`` of ``lr_find2``); the default is Smith's grid for a
            first look (arXiv:1803.09820 section 4.4).
        replicates: Sweeps per weight decay; their seeds are ``seed``, ``seed`` + 1, …
        seed: Seeds the first replicate.
        options: All others of :func:`lr_range_test`.

    Returns:
        ``.weight_decay`` and ``.proposal``, with ``.reason``; all curves in ``.tests`` and in one
        ``.figure()``.

    Raises:
        UsageError: An argument that cannot be right; the message names the remedy.
        TrainingError: The loader is empty, or the loss was non-finite before any update.
    """
    if not weight_decays:
        raise UsageError("weight_decays=(): give at least one, e.g. (1e-3, 1e-4, 0.0).")
    if len(set(weight_decays)) < len(weight_decays):
        raise UsageError(f"weight_decays={weight_decays!r}: give each once; see replicates.")
    if "weight_decay" in options:
        raise UsageError("weight_decay: lr_range_tests takes weight_decays, e.g. (1e-3, 1e-4).")
    if replicates < 1:
        raise UsageError(f"replicates={replicates!r}: sweeps per weight decay, at least 1.")
    sweep = partial(lr_range_test, model, optimizer, loss_fn, loader, **options)
    return RangeTests(
        tests=tuple(
            sweep(weight_decay=decay, seed=seed + replicate)
            for decay in weight_decays
            for replicate in range(replicates)
        )
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
    clip_grad_norm: float | None
    autocast: AbstractContextManager[Any]
    device: torch.device
    validation: _Validation | None

    def __call__(self, cycle: Cycle) -> None:
        schedule = cycle.schedule(self.optimizer)
        total: Tensor | None = None
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if self.validation is not None:
                batches = stack.enter_context(closing(rounds(self.validation.loader)))
                cycle.validate(partial(self._validate, batches, self.validation))
            for taken, batch in enumerate(cycle.batches(self.loader, self.accumulate), start=1):
                loss = self._backward(batch)
                total = loss if total is None else total + loss
                if taken % self.accumulate == 0:
                    self._step()
                    schedule.step(total)
                    total = None

    def _backward(self, batch: Any) -> Tensor:
        with self.autocast:
            loss = _check_loss(self.compute(self.model, _to(batch, self.device)))
        if loss.ndim:
            loss = loss.reshape(())
        if self.accumulate > 1:
            loss = loss / self.accumulate
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def _step(self) -> None:
        if self.clip_grad_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def _validate(self, batches: Iterator[Any], validation: _Validation) -> dict[str, Any]:
        trained = [module for module in self.model.modules() if module.training]
        try:
            self.model.eval()
            # A loader's iterator draws a seed: from a copy, lest training sees other numbers.
            with torch.random.fork_rng(devices=[]), torch.no_grad(), self.autocast:
                found = [
                    validation.measure(self.model, _to(next(batches), self.device))
                    for _ in range(validation.batches)
                ]
        finally:
            for module in trained:
                module.training = True
        return _averaged(found)


@dataclass(frozen=True)
class _Validation:
    """How a sweep validates: on how many batches of what, and ``measure(model, batch)``."""

    loader: Iterable[Any]
    batches: int
    measure: Callable[[Any, Any], Any]


def _averaged(found: Sequence[Any]) -> dict[str, Any]:
    """Mean of each metric over batches; a number alone is the loss."""
    each = [part if isinstance(part, Mapping) else {"loss": part} for part in found]
    return {metric: _mean(metric, [part[metric] for part in each]) for metric in each[0]}


def _mean(metric: str, values: Sequence[Any]) -> Any:
    try:
        return sum(values) / len(values)
    except TypeError:
        raise UsageError(
            f"validation: {metric!r} is {values[0]!r}: return a scalar tensor or a number."
        ) from None


def _over_ranks(curves: Curves, group: Any, device: torch.device) -> Curves:
    """Validation, averaged over the processes that sweep together, in one all_reduce."""
    if not curves or ranks.size(group) == 1:
        return curves
    values = [value for points in curves.values() for _, value in points]
    means = iter(ranks.mean(values, group, device))
    return {metric: [(step, next(means)) for step, _ in curves[metric]] for metric in curves}


def _loss_of(
    loss_fn: Callable[[Any, Any], Any] | None, step_fn: Callable[[Any, Any], Any] | None
) -> Callable[[Any, Any], Any]:
    if step_fn is not None:
        return step_fn
    if loss_fn is None:
        raise UsageError("loss_fn=None: pass loss_fn(output, target), or step_fn(model, batch).")
    return partial(_pair_loss, loss_fn)


def _pair_loss(loss_fn: Callable[[Any, Any], Any], model: nn.Module, batch: Any) -> Any:
    inputs, target = _pair(batch)
    return loss_fn(model(inputs), target)


def _pair_metrics(
    loss_fn: Any, metrics: Mapping[str, Callable[[Any, Any], Any]], model: nn.Module, batch: Any
) -> dict[str, Any]:
    inputs, target = _pair(batch)
    output = model(inputs)
    return {name: fn(output, target) for name, fn in {"loss": loss_fn, **metrics}.items()}


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        length = f" of {len(batch)}" if isinstance(batch, tuple | list | Mapping) else ""
        raise UsageError(
            f"the loader yields a {type(batch).__name__}{length}, not a pair (input, target): "
            "pass step_fn=lambda model, batch: ... that returns the loss of such a batch."
        )
    return batch[0], batch[1]


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
    if isinstance(value, tuple | list):
        parts = [_to(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        return {key: _to(part, device) for key, part in value.items()}
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
    clip_grad_norm: float | None,
) -> None:
    if num_iter < MIN_POINTS:
        raise UsageError(f"num_iter={num_iter!r}: a curve needs at least {MIN_POINTS} steps.")
    if not start_lr > 0:
        raise UsageError(f"start_lr={start_lr!r}: give a positive rate, e.g. 1e-6.")
    if weight_decay is not None and not 0 <= weight_decay < math.inf:
        raise UsageError(f"weight_decay={weight_decay!r}: give a finite number, 0 or more.")
    if momentum is not None and not 0 <= momentum < 1:
        raise UsageError(f"momentum={momentum!r}: give 0 or more, below 1.")
    if clip_grad_norm is not None and not 0 < clip_grad_norm < math.inf:
        raise UsageError(f"clip_grad_norm={clip_grad_norm!r}: give a positive number, or leave it.")
    _check_parameters(model, optimizer)
    _check_step(optimizer)


def _check_step(optimizer: torch.optim.Optimizer) -> None:
    """Refuse LBFGS and its like, which evaluate the loss several times in one step."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(
            f"{type(optimizer).__name__}.step needs a closure and searches along its own direction,"
            " so one rate per step says nothing about it: sweep with SGD or AdamW, or leave "
            f"{type(optimizer).__name__} at lr=1 with line_search_fn='strong_wolfe'."
        )


def _check_validation(
    loader: Iterable[Any] | None,
    every: int,
    batches: int,
    metrics: Mapping[str, Any] | None,
    step_fn: Callable[[Any, Any], Any] | None,
    valid_fn: Callable[[Any, Any], Any] | None,
) -> None:
    if loader is None and (metrics or valid_fn is not None):
        raise UsageError("metrics and valid_fn are for validation: pass valid_loader, too.")
    if every < 1:
        raise UsageError(f"validate_every={every!r}: steps between validations, at least 1.")
    if batches < 1:
        raise UsageError(f"validate_batches={batches!r}: batches of a validation, at least 1.")
    if "loss" in (metrics or {}):
        raise UsageError("metrics['loss']: the loss is always measured; name this one otherwise.")
    if metrics and (step_fn is not None or valid_fn is not None):
        raise UsageError(
            "metrics take (output, target), which step_fn and valid_fn do not give: return them "
            "from valid_fn(model, batch), as a dict with the loss under 'loss'."
        )


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
) -> tuple[float | None, float | None]:
    """Set up everything for the sweep; the weight decay and momentum that it runs with."""
    groups = optimizer.param_groups
    reference = _scale_rates(groups, end_lr)
    if weight_decay is not None:
        _set_weight_decay(groups, weight_decay, type(optimizer).__name__)
    if momentum is not None:
        _set_momentum(groups, momentum, type(optimizer).__name__)
    if not model.training:
        model.train()
    optimizer.zero_grad()  # gradients of the caller's are no part of the sweep
    betas = reference.get("betas")
    used = betas[0] if betas is not None else reference.get("momentum")
    return _number(reference.get("weight_decay")), _number(used)


def _seed_all(seed: int, loaders: Iterable[Any]) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    for part in (part for loader in loaders for part in _parts(loader)):
        for value in vars(part).values():
            if isinstance(value, torch.Generator):
                value.manual_seed(seed)
        if hasattr(part, "set_epoch") and isinstance(getattr(part, "seed", None), int):
            part.seed = seed  # a DistributedSampler shuffles by seed + epoch


def _parts(loader: Any) -> Iterator[Any]:
    """The loader and its samplers, those that have attributes."""
    samplers = (getattr(loader, name, None) for name in ("sampler", "batch_sampler"))
    yield from (part for part in (loader, *samplers) if hasattr(part, "__dict__"))


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


def _run_without_trace(saved: _Snapshot, run: Callable[[], Any]) -> Any:
    """``run()``, after which everything is as it was when ``saved`` was made, whatever happens."""
    interrupts = _Interrupts()
    # Two finally clauses: an interrupt may strike in the first one before it holds the next, and
    # then the second restores all the same; by then further ones are held in either case.
    try:
        interrupts.watch()
        try:
            return run()
        finally:
            interrupts.holding = True
    finally:
        try:
            saved.restore()
        finally:
            interrupts.release()


class _Snapshot:
    """Objects and their content, as they were; ``restore`` writes it back into the same objects.

    Follows modules, optimizers, containers and tensors. Any other object is kept by reference
    only, random number generators apart, whose state is kept.
    """

    def __init__(
        self, roots: Iterable[Any], loaders: Iterable[Any], folder: str | os.PathLike[str] | None
    ) -> None:
        self._store = _Memory() if folder is None else _File(folder)
        self._undo: list[Undo] = []
        self._seen: dict[int, Any] = {}  # holds the objects, so that their ids stay theirs
        for root in roots:
            self._save(getattr(root, "__dict__", None))
            if isinstance(root, nn.Module):  # scripted modules keep these out of __dict__
                self._save([*root.parameters(), *root.buffers()])
        for loader in loaders:
            self._save_loader(loader)
        self._undo += _generators(random_state.of_process().values())

    def restore(self) -> None:
        """Put everything back; one object that resists keeps no other from it."""
        failures: list[Exception] = []
        with torch.no_grad():
            for undo in self._undo:
                try:
                    undo()
                except Exception as error:
                    failures.append(error)
        self._store.close()
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
            self._save_generator(value)

    def _save_generator(self, value: Any) -> None:
        handle = random_state.handle(value)
        if handle is not None:
            self._undo.append(partial(handle.write, handle.read()))

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
        storage = tensor.detach()
        content = self._store.keep(_dense(storage))
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
            self._save_generator(value)
        for name in ("sampler", "batch_sampler", "dataset"):
            self._save_loader(attributes.get(name))


class _Memory:
    """Where copies of tensors are kept."""

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Copy it; returns what gives the copy back."""
        copy = tensor.clone()
        return lambda: copy

    def close(self) -> None:
        """Let go of everything."""


class _File(_Memory):
    """In a temporary file: one without a name, which is gone with the process at the latest."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not os.path.isdir(folder):
            raise UsageError(f"cache_dir={str(folder)!r} is no folder: make it first.")
        self._file = tempfile.TemporaryFile(prefix="hpsched-", dir=folder)  # noqa: SIM115

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Write its bytes; in memory if it is small or no plain array of numbers."""
        size = tensor.numel() * tensor.element_size()
        plain = type(tensor) is Tensor and tensor.layout is torch.strided
        if size <= SMALL or not plain or tensor.is_quantized:
            return super().keep(tensor)
        values = tensor.resolve_conj().resolve_neg().cpu()
        values = values.clone(memory_format=torch.contiguous_format)  # strides of one element too
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        return partial(self._load, start, size, tensor.dtype, tensor.shape)

    def _load(self, start: int, size: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        self._file.seek(start)
        return torch.frombuffer(bytearray(self._file.read(size)), dtype=dtype).reshape(shape)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()


def _restore_tensor(
    tensor: Tensor,
    storage: Tensor,
    content: Callable[[], Tensor],
    requires_grad: bool,
    grad: Tensor | None,
) -> None:
    if _layout(tensor) != _layout(storage):  # `.data` was set
        tensor.data = storage
    with torch.inference_mode(storage.is_inference()):  # which may only be written there
        _dense(storage).copy_(content())
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


def _generators(handles: Iterable[random_state.Handle]) -> list[Undo]:
    """How to put random number generators back into the states that they have now."""
    return [partial(one.write, one.read()) for one in handles]


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
        for signum in (signal.SIGTERM, signal.SIGINT):  # put back last what is most likely to raise
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
