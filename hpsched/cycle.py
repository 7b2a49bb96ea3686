"""One training run: the cycle handed to ``train``, and the driver of its optimizer.

=========  ======  =====================================================================
symbol     unit    meaning
=========  ======  =====================================================================
step       –       optimizer steps taken, 0 … total_steps
lr         –       learning rate of the reference group; others keep their ratio to it
block      steps   losses stay on the device and are looked at once per block
=========  ======  =====================================================================

Nothing here synchronises with the device on ordinary steps: a loss is kept as a tensor until
its block is full. Decisions (a sweep's end, divergence) fall on block boundaries counted in
steps, never on the clock, so that a run repeated with its seed ends at the same step. Where
several processes train together (torch.distributed), a block is averaged over them first, in one
small all_reduce, so that all have the same losses and end at the same step.
"""

from __future__ import annotations

import gc
import itertools
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hpsched import checkpoint, divergence, random_state, ranks
from hpsched.batches import Place, is_empty, no_batches, rounds
from hpsched.errors import TrainingError, UsageError
from hpsched.schedules import OneCycleSchedules

Kind = Literal["range_test", "rung", "confirm", "final"]
BLOCK = 10  # losses between looks at them
SAMPLES = 256  # losses kept of a long run: enough for the curve and for divergence
CURVE_POINTS = 64  # points kept of a learning curve
PROGRESS_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is: what a worker shows of it. ``loss`` is that of the last full block."""

    kind: Kind
    rung: int
    step: int
    total_steps: int
    lr: float
    loss: float | None


#: Called about once a second with a :class:`Progress`, while a worker listens.
observer: ContextVar[Callable[[Progress], None] | None] = ContextVar("observer", default=None)


class StopTraining(BaseException):
    """Ends ``train`` early. Not an Exception: users' ``except Exception`` must not swallow it."""


class _Plan(NamedTuple):
    """What one parameter group follows: its rate over the reference rate, and its momentum."""

    ratio: float
    momentum_name: str


class ScheduleDriver:
    """Applies learning-rate and momentum schedules to one or more torch optimizers.

    Rates: the group built with ``reference_lr`` follows the schedule and every other group keeps
    its ratio to it; if no group was built with that rate, the largest one is the reference.
    Momentum: ``momentum`` where a group has a non-zero one, else beta1 of ``betas`` (beta2 is not
    touched); groups with neither keep what they have. Tensor rates are filled in place, which
    compiled and captured optimizers need.

    Args:
        optimizers: Torch optimizers, or anything with ``param_groups``.
        schedules: ``step → value`` for rate and momentum.
        reference_lr: The rate that the recipe calls max_lr.
        explicit_momentum: Momentum bounds were asked for: refuse optimizers without momentum.
        drives_momentum: False leaves momentum and betas as they are.

    Raises:
        UsageError: ``explicit_momentum`` with an optimizer that has no momentum; no group with a
            positive rate; something that is no optimizer.
    """

    def __init__(
        self,
        *optimizers: Any,
        schedules: OneCycleSchedules,
        reference_lr: float,
        explicit_momentum: bool = False,
        drives_momentum: bool = True,
    ) -> None:
        groups = _groups(optimizers)
        self._optimizers = optimizers
        self._schedules = schedules
        self._drives_momentum = drives_momentum
        self._step = 0
        self._optimizer_name = type(optimizers[0]).__name__ if optimizers else "none"
        self._reference_lr = _reference(groups, reference_lr)
        if explicit_momentum:
            _check_momentum(groups, self._optimizer_name, schedules.momentum(0))
        self._plans: list[list[_Plan]] = [[] for _ in optimizers]
        self._apply()

    @property
    def step_count(self) -> int:
        """Optimizer steps taken so far."""
        return self._step

    @property
    def last_lr(self) -> float:
        """Learning rate of the reference group for the next step."""
        return self._schedules.lr(self._step)

    @property
    def optimizer_name(self) -> str:
        """Class name of the (first) optimizer."""
        return self._optimizer_name

    @property
    def momentum_name(self) -> str:
        """What the momentum schedule drives: ``momentum``, ``beta1`` or ``none``."""
        driven = {plan.momentum_name for plans in self._plans for plan in plans}
        return next((name for name in ("beta1", "momentum") if name in driven), "none")

    def step(self, loss: Any = None) -> None:
        """Count one optimizer step, then set rate and momentum for the next one.

        Call it once after each ``optimizer.step()``, also after one that a GradScaler skipped.
        Past the schedule's end the last values stay.

        Args:
            loss: Not used here; a cycle's schedule takes it.
        """
        self._step += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: the step, and each group's ratio."""
        plans = [[tuple(plan) for plan in plans] for plans in self._plans]
        return {"step": self._step, "groups": plans, "reference_lr": self._reference_lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; sets rate and momentum at once.

        Raises:
            UsageError: The state belongs to another number of optimizers.
        """
        plans = [[_Plan(float(r), str(name)) for r, name in plans] for plans in state["groups"]]
        if len(plans) != len(self._optimizers):
            raise UsageError(
                f"the schedule's state is that of {len(plans)} optimizers, but it drives "
                f"{len(self._optimizers)}: pass the same optimizers to schedule(...) as then."
            )
        self._step, self._plans = int(state["step"]), plans
        self._reference_lr = float(state.get("reference_lr", self._reference_lr))
        self._apply()

    def _release(self) -> None:
        """Let go of the optimizers, and with them of device memory."""
        self._optimizers = ()

    def _apply(self) -> None:
        lr = self._schedules.lr(self._step)
        momentum = self._schedules.momentum(self._step)
        for index, optimizer in enumerate(self._optimizers):
            # Read anew each time: optimizer.load_state_dict replaces the group objects.
            groups, plans = optimizer.param_groups, self._plans[index]
            if len(groups) > len(plans):  # the first call, or add_param_group since the last
                self._adopt(groups[len(plans) :], plans)
            for group, (ratio, momentum_name) in zip(groups, plans):  # noqa: B905 (takes time)
                if type(group["lr"]) is float:
                    group["lr"] = lr * ratio
                else:
                    _set_lr(group, lr * ratio)
                if momentum_name == "momentum":
                    group["momentum"] = momentum
                elif momentum_name == "beta1":
                    _set_beta1(group, momentum)

    def _adopt(self, groups: list[dict[str, Any]], plans: list[_Plan]) -> None:
        for group in groups:
            momentum_name = _momentum_name(group) if self._drives_momentum else "none"
            plans.append(_Plan(float(group["lr"]) / self._reference_lr, momentum_name))


def _groups(optimizers: Sequence[Any]) -> list[dict[str, Any]]:
    for optimizer in optimizers:
        if not hasattr(optimizer, "param_groups"):
            raise UsageError(
                f"{type(optimizer).__name__} has no param_groups: pass the torch optimizer itself."
            )
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def _reference(groups: list[dict[str, Any]], wanted: float) -> float:
    """The rate that others are counted in: ``wanted`` if a group has it, else the largest."""
    given = [group.get("lr") for group in groups]
    try:
        rates = [float(rate) for rate in given]  # type: ignore[arg-type]
    except TypeError:  # None: some optimizers then choose rates of their own
        rates = []
    if not rates or max(rates) <= 0 or not all(map(math.isfinite, rates)):
        raise UsageError(
            f"The optimizer's learning rates are {given}: build it with lr=cycle.max_lr."
        )
    return wanted if any(math.isclose(r, wanted, rel_tol=1e-6) for r in rates) else max(rates)


def _check_momentum(groups: list[dict[str, Any]], optimizer: str, momentum: float) -> None:
    if not any("momentum" in group or group.get("betas") is not None for group in groups):
        raise UsageError(
            f"{optimizer} has neither momentum nor betas, but base_momentum or max_momentum was "
            "given. Leave both out of suggest_onecycle, or use an optimizer that has momentum."
        )
    if momentum > 0 and all(_momentum_name(group) == "none" for group in groups):
        warnings.warn(
            f"{optimizer} was built with momentum 0, which the schedule keeps: the bounds "
            "base_momentum and max_momentum change nothing. Build it with "
            "momentum=cycle.max_momentum, or leave the bounds out of suggest_onecycle.",
            stacklevel=5,
        )


def _momentum_name(group: Mapping[str, Any]) -> str:
    if group.get("betas") is not None:
        return "beta1"
    return "momentum" if group.get("momentum") else "none"  # SGD built with momentum 0 keeps it


def _set_lr(group: dict[str, Any], value: float) -> None:
    rate = group["lr"]
    if isinstance(rate, Tensor):
        rate.fill_(value)
    else:
        group["lr"] = value


def _set_beta1(group: dict[str, Any], value: float) -> None:
    betas = group["betas"]
    if isinstance(betas[0], Tensor):
        betas[0].fill_(value)
    else:
        group["betas"] = (value, betas[1]) if len(betas) == 2 else (value, *betas[1:])


class CycleSchedule(ScheduleDriver):
    """The driver of one cycle: also collects the losses and ends the run when it must."""

    def __init__(self, cycle: Cycle, *optimizers: Any) -> None:
        self._cycle = cycle
        super().__init__(
            *optimizers,
            schedules=cycle.schedules,
            reference_lr=cycle.max_lr,
            explicit_momentum=cycle.explicit_momentum,
            drives_momentum=cycle.drives_momentum,
        )

    def step(self, loss: Any = None) -> None:
        """Count one optimizer step, then set rate and momentum for the next one.

        Args:
            loss: This step's training loss, a scalar tensor or number. Required in a range test;
                otherwise it feeds divergence detection and the learning curve.

        Raises:
            StopTraining: The range test has seen enough, or the run has diverged; again at every
                call after that, for code that swallowed the first.
            TrainingError: No loss in a range test, or a loss that is not a scalar.
        """
        if self._cycle.stopped is not None:
            raise StopTraining(self._cycle.stopped)
        step = self._step = self._step + 1
        self._apply()
        self._cycle._record(step, loss)

    def advance(self, loss: Any = None) -> bool:
        """:meth:`step` for frameworks: says whether to train on, instead of raising StopTraining.

        Frameworks have to be stopped their own way, which lets them tidy up.

        Args:
            loss: As for :meth:`step`.

        Raises:
            TrainingError: As :meth:`step`.
        """
        with suppress(StopTraining):
            self.step(loss)
        return not self._cycle.should_stop

    def state_dict(self) -> dict[str, Any]:
        """Step, ratios, and the losses and curves so far."""
        return {**super().state_dict(), **self._cycle._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        super().load_state_dict(state)
        self._cycle._restore(state)


class Cycle:
    """One training run handed to ``train``: the recipe's values, and the means to follow it.

    Attributes:
        max_lr, div_factor, final_div_factor, pct_start, policy: The recipe's schedule. In a range
            test ``max_lr`` is the sweep's end.
        base_momentum, max_momentum, weight_decay: The rest of the recipe. In a range test both
            momenta are what the schedule has at its peak.
        total_steps: Optimizer steps of this run.
        seed: For ``torch.manual_seed``; follows from the study's seed, the trial and the rung.
        kind: ``range_test``, ``rung``, ``confirm`` or ``final``.
        rung: Index of the rung (0 for a range test).
        name: Unique; for loggers and checkpoints.
        process_group: Whose processes train this run together: their losses are averaged. None:
            the default group of torch.distributed, where it is initialised; False: this process
            trains alone. Another one is to be set before the first ``schedule.step``.
    """

    max_lr: float
    div_factor: float
    pct_start: float
    base_momentum: float
    max_momentum: float
    weight_decay: float
    final_div_factor: float

    def __init__(
        self,
        *,
        values: Mapping[str, float],
        schedules: OneCycleSchedules,
        total_steps: int,
        seed: int,
        kind: Kind,
        name: str,
        rung: int = 0,
        policy: str = "cosine",
        explicit_momentum: bool = False,
        drives_momentum: bool = True,
        validate_every: int | None = None,
        stop_diverged: bool = True,
        progress: bool = True,
        process_group: Any = None,
    ) -> None:
        for field, value in values.items():
            setattr(self, field, value)
        self.values = dict(values)
        self.schedules = schedules
        self.total_steps = total_steps
        self.seed = seed
        self.kind: Kind = kind
        self.name = name
        self.rung = rung
        self.policy = policy
        self.explicit_momentum = explicit_momentum
        self.drives_momentum = drives_momentum
        self.process_group = process_group
        self.stopped: str | None = None
        self.diverged: str | None = None
        self._failure: TrainingError | None = None
        self._driver: CycleSchedule | None = None
        self._validate: Callable[[], Any] | None = None
        self._validate_every = validate_every
        self._stop_diverged = stop_diverged
        self._pending: list[Any] = []
        self._losses: list[float] = []
        # A copy of the loss costs more than the whole schedule: long runs keep one in a few.
        self._every = 1 if kind == "range_test" else max(1, total_steps // SAMPLES)
        self._logged = _Curves()
        self._validated = _Curves()
        self._iterators: list[Iterator[Any]] = []
        self._places: list[Place] = []  # of the iterators, while checkpoints are kept
        self._keeper = checkpoint.current()
        self._file = self._file_of_checkpoints()
        self._resumed: dict[str, Any] | None = None  # what is not yet put back of a checkpoint
        self._earlier_seconds = 0.0
        self._started = self._saved = time.monotonic()
        self._observer = observer.get()
        self._progress_bar = progress
        self._next_progress = 0.0
        self._next_check = 0

    @property
    def is_range_test(self) -> bool:
        """Whether this run is a learning-rate sweep."""
        return self.kind == "range_test"

    @property
    def should_stop(self) -> bool:
        """True once the run has ended: for frameworks that stop cooperatively."""
        return self.stopped is not None

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far."""
        return self._driver.step_count if self._driver else 0

    @property
    def driver(self) -> CycleSchedule | None:
        """What :meth:`schedule` returned, if it was called."""
        return self._driver

    def schedule(self, *optimizers: Any) -> CycleSchedule:
        """Drive these optimizers through the cycle; call ``.step(loss)`` after each of their steps.

        Raises:
            TrainingError: Called twice (pass several optimizers to one call instead).
            UsageError: Momentum bounds were given but the optimizer has no momentum.
        """
        if self._driver is not None:
            raise TrainingError(
                "cycle.schedule was called twice in one run: pass all optimizers to one call, "
                "cycle.schedule(generator_optimizer, critic_optimizer)."
            )
        self._driver = CycleSchedule(self, *optimizers)
        if self._resumed is not None:
            self._driver.load_state_dict(self._resumed["schedule"])
        return self._driver

    def batches(self, loader: Iterable[Any], accumulate: int = 1) -> Iterator[Any]:
        """``total_steps × accumulate`` batches, going round the loader as often as it takes.

        Fewer by the steps that were taken before, in a run that was resumed; ends early once the
        run has been stopped. Shows a progress bar on a terminal. Worker iterators are closed
        however the loop is left.

        Raises:
            TrainingError: The loader yields nothing.
            UsageError: ``accumulate`` below 1.
        """
        if accumulate < 1:
            raise UsageError(f"accumulate={accumulate!r}: batches per optimizer step, at least 1.")
        if is_empty(loader):
            raise no_batches(loader)
        batches = self._batches(loader, accumulate)
        self._iterators.append(batches)
        return batches

    def _batches(self, loader: Iterable[Any], accumulate: int) -> Iterator[Any]:
        count = (self.total_steps - self.steps) * accumulate
        hidden = self._observer is not None or not self._progress_bar  # a worker draws its own
        bar = tqdm(total=count, desc=self.name, leave=False, disable=hidden or None)
        self._put_back_random_states()  # train may have drawn since restore()
        source = self._source(loader, accumulate)
        try:
            for _ in range(count):
                yield next(source)
                bar.update()
                if self.stopped is not None:
                    break
        finally:
            source.close()
            bar.close()

    def _source(self, loader: Iterable[Any], accumulate: int) -> Any:
        """The loader's batches without end, from where a resumed run was."""
        if self._file is None:
            return rounds(loader)
        saved = self._resumed["places"] if self._resumed else []
        state = saved[len(self._places)] if len(self._places) < len(saved) else None
        self._places.append(Place(loader, accumulate, self.steps))
        return self._places[-1].batches(state)

    # -- checkpoints -------------------------------------------------------------------------

    def checkpoint(
        self,
        state: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        /,
        **parts: Any,
    ) -> None:
        """Once a minute, save what the run needs to go on after an interruption.

        Call it after each ``schedule.step(loss)``; on ordinary steps it looks at the clock and
        returns. Does nothing in a range test, nor without a folder for checkpoints
        (HPSCHED_CHECKPOINTS, or the worker's). The file is removed when the run's result is
        stored, or when the trial ends otherwise.

        The schedule, losses and curves, the states of the random number generators (Python, NumPy,
        torch, CUDA) and the place in the loader are saved with it: a run that was interrupted and
        resumed gives the same value, bit for bit, as one that was not, on hardware and with
        operations that repeat themselves. Going on reads, and skips, the batches that the round
        in hand had yielded. What cannot be put back: generators that only the user's code knows
        (pass their states in ``state``); those of persistent worker processes after the first
        round; loaders that never give the same round twice, as streams; gradients, so that
        ``optimizer.zero_grad()`` must come before the first ``backward`` of a step.

        One process per trial: not with torch.distributed.

        Args:
            state: A dict, or a function that returns it, called only when a file is written:
                state_dicts, tensors, numbers, strings, and containers of them.
            parts: Model, optimizer, GradScaler …, whose ``state_dict()`` is saved under that name;
                anything without one is saved as it is.

        Raises:
            TrainingError: Not called right after ``schedule.step``; or what is to be saved is no
                plain data.
            UsageError: Several processes train this run together.
        """
        ending = self._keeper.ending
        if self._file is not None and self._driver is not None:
            self._keeper.used = True
            if not self._is_between_steps():
                return
            if ending or time.monotonic() - self._saved >= self._keeper.every:
                self._save({**_called(state), **{k: _state_of(part) for k, part in parts.items()}})
        if ending is not None:
            raise ending(f"{self.name}: step {self.steps} of {self.total_steps}")

    def restore(self, **parts: Any) -> dict[str, Any] | None:
        """Go on where the run was interrupted; None at the start of a run.

        Call it before the first batch. Puts back the schedule, the losses and curves and the random
        states by itself, and :meth:`batches` yields what was left.

        Args:
            parts: Model, optimizer, GradScaler …, as passed to :meth:`checkpoint`: their
                ``load_state_dict`` is called with what was saved under that name.

        Returns:
            What was saved by :meth:`checkpoint`, ``state`` and ``parts``; tensors on the CPU.

        Raises:
            TrainingError: Called after the first batch or step; or nothing was saved under a name.
            UsageError: Several processes train this run together.
        """
        if self._file is None:
            return None
        self._check_alone()
        if self.steps or self._places:
            raise self._fail(
                f"cycle.restore() was called after step {self.steps}: call it before the loop over "
                "cycle.batches."
            )
        content = checkpoint.load(self._file)
        if content is None:
            return None
        saved: dict[str, Any] = content.pop("state")  # large: not to be held by us
        self._resumed = content
        for name, part in parts.items():
            if name not in saved:
                raise self._fail(
                    f"cycle.restore({name}=…): the checkpoint has {sorted(saved)} only. Pass the "
                    "same names to cycle.checkpoint and cycle.restore."
                )
            part.load_state_dict(saved[name])
        if self._driver is not None:
            self._driver.load_state_dict(content["schedule"])
        self._earlier_seconds = content["seconds"]
        self._put_back_random_states()
        return saved

    def _file_of_checkpoints(self) -> Path | None:
        if self.is_range_test:  # short
            return None
        return self._keeper.path(
            self.name,
            values=self.values,
            seed=self.seed,
            total_steps=self.total_steps,
            policy=self.policy,
        )

    def _is_between_steps(self) -> bool:
        """Whether all batches that were taken belong to steps that were taken."""
        self._check_alone()
        ahead = [place.ahead(self.steps) for place in self._places]
        if not ahead or 0 in ahead:  # others were left: a loop over batches ended early
            return True
        if ahead[-1] >= self._places[-1].accumulate:
            raise self._fail(
                f"cycle.checkpoint was called with {ahead[-1]} batches taken beyond step "
                f"{self.steps}: call it right after schedule.step(loss), and take no batches of "
                "cycle.batches in advance."
            )
        return False  # the gradients of these batches wait for their step

    def _check_alone(self) -> None:
        if ranks.size(self.process_group) > 1:
            raise UsageError(
                f"{ranks.size(self.process_group)} processes train this run together, and "
                "checkpoints are for one process per trial: leave out cycle.checkpoint and "
                "cycle.restore, or the folder for checkpoints."
            )

    def _save(self, state: dict[str, Any]) -> None:
        assert self._file is not None and self._driver is not None
        content = {
            "state": state,
            "schedule": self._driver.state_dict(),
            "random": random_state.read(random_state.of_process()),
            "places": [p.state() for p in self._places if p.ahead(self.steps) == 0],
            "seconds": self._seconds(),
        }
        self._keeper.save(self._file, self.steps, content)
        self._saved = time.monotonic()

    def _put_back_random_states(self) -> None:
        if self._resumed is not None and not self._places:
            states = self._resumed["random"]
            random_state.write(random_state.of_process(also=states), states)

    def _seconds(self) -> float:
        """Time spent on this run, before an interruption too."""
        return self._earlier_seconds + time.monotonic() - self._started

    def log(self, **metrics: Any) -> None:
        """Keep points of learning curves, e.g. ``cycle.log(val_error=0.12)``.

        Numbers or scalar tensors (read with the losses); thinned and stored once per run.

        Raises:
            TrainingError: A value that is neither.
        """
        for metric, value in metrics.items():
            self._logged.add(metric, self.steps, self._scalar(f"cycle.log({metric}=…)", value))

    def validate(self, fn: Callable[[], Any]) -> None:
        """In a range test asked to validate, call ``fn()`` every few steps and keep what it says.

        Does nothing in other runs, so ``train`` may call it always.

        Args:
            fn: Returns the validation loss, or a dict of metrics, the one to be minimised under
                ``loss``: numbers or scalar tensors (read with the losses). It puts the model into
                evaluation mode and back itself.
        """
        self._validate = fn

    @property
    def validation(self) -> dict[str, list[tuple[int, float]]]:
        """What :meth:`validate`'s function returned: metric → (step, value), step from 1.

        Synchronises with the device. Not averaged over processes.
        """
        return self._validated.read()

    def losses(self) -> list[float]:
        """Training losses so far, as floats; of long runs one in a few, about 256 in all.

        Synchronises with the device. Where several processes train together: those up to the last
        full block, averaged.
        """
        if ranks.size(self.process_group) == 1:  # else all ranks must meet, and do in _look
            self._flush()
        return self._losses

    def curves(self) -> dict[str, list[tuple[int, float | None]]]:
        """Logged curves and the training loss, at most 64 points each."""
        logged = {
            metric: [(step, _number(value)) for step, value in points]
            for metric, points in self._logged.read().items()
        }
        if self._losses and "loss" not in logged:
            steps = range(1, self.total_steps + 1, self._every)
            logged["loss"] = [(s, _number(v)) for s, v in zip(steps, self._losses, strict=False)]
        return {metric: _thin(points) for metric, points in logged.items()}

    def close(self) -> None:
        """Close the batch iterators and let go of the optimizer and of device memory.

        ``train`` is over; what it left (losses, curves, the driver's names) stays readable.
        """
        for iterator in self._iterators:
            with suppress(ValueError):  # running in another thread
                iterator.close()  # type: ignore[attr-defined]
        self._iterators.clear()
        self._validate = None
        if self._driver is not None:
            self._driver._release()

    def _record(self, step: int, loss: Any) -> None:
        if loss is not None:
            if (step - 1) % self._every == 0:
                self._pending.append(self._scalar("schedule.step(loss)", loss))
        elif self.is_range_test:
            raise self._fail(
                "schedule.step() was called without a loss in a range test: "
                "call schedule.step(loss) with the training loss of the step."
            )
        if self._validate and self._validate_every and step % self._validate_every == 0:
            self._keep_validation(step, self._validate())
        if step % (BLOCK * self._every) == 0 or step >= self.total_steps or step == 1:
            self._look(step)
        if self._observer and time.monotonic() >= self._next_progress:
            self._next_progress = time.monotonic() + PROGRESS_SECONDS
            self._observer(self._progress(step))

    def _keep_validation(self, step: int, found: Any) -> None:
        metrics = found if isinstance(found, Mapping) else {"loss": found}
        for metric, value in metrics.items():
            held = self._scalar(f"cycle.validate(fn): {metric!r}", value)
            self._validated.add(metric, step, held)

    def _progress(self, step: int) -> Progress:
        assert self._driver is not None
        return Progress(
            kind=self.kind,
            rung=self.rung,
            step=step,
            total_steps=self.total_steps,
            lr=self._driver.last_lr,
            loss=self._losses[-1] if self._losses else None,
        )

    def _look(self, step: int) -> None:
        """Read the block's losses and end the run if they say so."""
        self._flush()
        self._logged.read()
        self._validated.read()
        if self._losses and not math.isfinite(self._losses[0]):
            raise self._fail(
                f"The loss was {self._losses[0]} at the very first step, before any update: no "
                "learning rate mends that. Check the data, the model's initialisation and the loss."
            )
        if self.is_range_test:
            if step >= self.total_steps:
                self._stop("the sweep is complete")
            elif self._sweep_is_over():
                self._stop("the sweep has diverged")
        else:
            self._check_divergence(step)

    def _sweep_is_over(self) -> bool:
        if self._stop_diverged:
            return divergence.should_stop(self._losses)
        return not all(map(math.isfinite, self._losses[-BLOCK:]))

    def _check_divergence(self, step: int) -> None:
        finite = all(map(math.isfinite, self._losses[-BLOCK:]))
        if finite and step < self._next_check:
            return
        self._next_check = step + max(BLOCK * self._every, step // 20)  # it reads all losses
        if finite and not _above_start(self._losses):
            return
        self.diverged = divergence.exploded(self._losses, self._every)
        if self.diverged:
            self._stop(self.diverged)

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        raise StopTraining(reason)

    def _fail(self, message: str) -> TrainingError:
        """The error to raise; kept, so that ``execute`` raises it if ``train`` swallows it."""
        self._failure = TrainingError(message)
        return self._failure

    def _scalar(self, what: str, value: Any) -> Any:
        """A copy that can wait: the tensor, not yet read, or the number as float."""
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise self._fail(
                    f"{what} got a tensor of shape {tuple(value.shape)}: "
                    "pass a scalar, e.g. loss.mean()."
                )
            copy = value.detach().clone()
            return copy.reshape(()) if copy.ndim else copy
        try:
            return float(value)
        except (TypeError, ValueError):
            raise self._fail(f"{what} got {value!r}: pass a scalar tensor or a number.") from None

    def _flush(self) -> None:
        if not self._pending:
            return
        values, group = _read(self._pending), self.process_group
        if ranks.size(group) > 1:
            values = ranks.mean(values, group, ranks.device_of(self._pending, group))
        self._losses.extend(values)
        self._pending.clear()

    def _state(self) -> dict[str, Any]:
        # Losses that wait are not averaged yet, and one rank may be the only one that saves.
        return {
            "losses": list(self._losses),
            "pending": _read(self._pending),
            "next_check": self._next_check,
            "curves": _copied(self._logged.read()),
            "validation": _copied(self._validated.read()),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._losses[:] = state["losses"]
        self._pending[:] = state["pending"]
        self._next_check = state["next_check"]
        self._logged = _Curves(_copied(state["curves"]))
        self._validated = _Curves(_copied(state["validation"]))


class _Curves:
    """Metric → (step, value) points; what is added waits until it is read together."""

    def __init__(self, points: dict[str, list[tuple[int, float]]] | None = None) -> None:
        self._points = points or {}
        self._waiting: list[tuple[str, int, Any]] = []

    def add(self, metric: str, step: int, value: Any) -> None:
        """Keep a scalar tensor or a number."""
        self._waiting.append((metric, step, value))

    def read(self) -> dict[str, list[tuple[int, float]]]:
        """All points as floats; synchronises with the device if some have waited."""
        if self._waiting:
            values = _read([value for _, _, value in self._waiting])
            for (metric, step, _), value in zip(self._waiting, values, strict=True):
                self._points.setdefault(metric, []).append((step, value))
            self._waiting.clear()
        return self._points


def _called(state: Any) -> Mapping[str, Any]:
    return (state() if callable(state) else state) or {}


def _state_of(part: Any) -> Any:
    return part.state_dict() if hasattr(part, "state_dict") else part


def _copied(curves: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, list[Any]]:
    return {metric: list(points) for metric, points in curves.items()}


def _read(values: Sequence[Any]) -> list[float]:
    """Scalar tensors and floats as floats, in one synchronisation where they share a device."""
    if all(isinstance(value, Tensor) for value in values):
        with suppress(RuntimeError):  # on several devices
            return [float(value) for value in torch.stack(list(values)).tolist()]
    return [float(value) for value in values]


def _above_start(losses: Sequence[float]) -> bool:
    """Whether the last losses lie above the first: rules out most explosions at little cost."""
    last, first = sorted(losses[-BLOCK:]), sorted(losses[:5])
    return bool(losses) and last[len(last) // 2] > min(losses[0], first[len(first) // 2])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one run of ``train`` ended.

    Attributes:
        value: What ``train`` returned; None for a range test or a diverged run.
        diverged: Why it was ended as diverged, or None.
        steps, seconds: What it cost.
    """

    value: Any
    diverged: str | None
    steps: int
    seconds: float


def execute(cycle: Cycle, train: Callable[[Cycle], Any]) -> Outcome:
    """Run ``train(cycle)`` once and hold it to its contract.

    Raises:
        TrainingError: ``train`` never called ``cycle.schedule`` or ``schedule.step``, took another
            number of steps than the cycle has, or returned something that is not a number.
    """
    cycle._started = cycle._saved = time.monotonic()
    cycle._keeper.used = False
    try:
        value = train(cycle)
    except StopTraining:
        value = None
    except Exception:
        # Frameworks wrap or replace what we raise; what counts is that the run had been stopped.
        if not cycle.should_stop:
            raise
        value = None
    finally:
        cycle._keeper.used = False
        cycle.close()
    steps = cycle.steps
    cycle.losses()
    if not cycle.should_stop:
        if cycle._failure is not None:  # train swallowed it
            raise cycle._failure
        _check_steps(cycle)
        value, cycle.diverged = _check_value(value)
        cycle.diverged = cycle.diverged or divergence.collapsed(cycle.losses())
    return Outcome(
        value=None if cycle.should_stop or cycle.diverged else value,
        diverged=cycle.diverged,
        steps=steps,
        seconds=cycle._seconds(),
    )


#: What torch and the libraries below it say when a tensor does not fit.
_NO_MEMORY = re.compile(
    "out of memory|not enough memory|can(no|')t allocate memory|alloc(ation)?_failed", re.IGNORECASE
)


def out_of_memory(error: BaseException) -> str | None:
    """What ran out of memory, if that is why there is this error, or one that it stems from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        known = isinstance(cause, MemoryError | torch.OutOfMemoryError)
        text = str(cause).strip()
        if known or (isinstance(cause, RuntimeError | OSError) and _NO_MEMORY.search(text)):
            return text.splitlines()[0] if text else type(cause).__name__
        cause = cause.__cause__ or cause.__context__
    return None


def free_memory() -> None:
    """Give back the device memory that the last run left behind (a collection takes 0.1 s)."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()


def _check_steps(cycle: Cycle) -> None:
    if cycle.driver is None:
        raise TrainingError(
            "train returned without calling cycle.schedule(optimizer): build the optimizer with "
            "lr=cycle.max_lr, then schedule = cycle.schedule(optimizer)."
        )
    if cycle.steps != cycle.total_steps:
        what = "it never called schedule.step(loss)"
        if cycle.steps:
            what = "too few" if cycle.steps < cycle.total_steps else "too many"
        raise TrainingError(
            f"train took {cycle.steps} of the cycle's {cycle.total_steps} steps ({what}): call "
            "schedule.step(loss) once after each optimizer.step(), and take cycle.total_steps "
            "steps in all, e.g. with `for batch in cycle.batches(loader)`."
        )


def _check_value(value: Any) -> tuple[Any, str | None]:
    """The value as float (or floats), and why it counts as diverged."""
    try:
        numbers = [float(v) for v in value] if isinstance(value, list | tuple) else [float(value)]
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        raise TrainingError(
            f"train returned {value!r}: return the validation result as a number."
        ) from None
    if not all(map(math.isfinite, numbers)):
        return None, f"train returned {value!r}"
    return (numbers if isinstance(value, list | tuple) else numbers[0]), None


def _number(value: Any) -> float | None:
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None


def _thin(points: list[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """At most 64 points: means over equal stretches, each at its last step."""
    if len(points) <= CURVE_POINTS:
        return points
    edges = [round(i * len(points) / CURVE_POINTS) for i in range(CURVE_POINTS + 1)]
    thinned: list[tuple[int, float | None]] = []
    for start, end in itertools.pairwise(edges):
        finite = [value for _, value in points[start:end] if value is not None]
        mean = _number(sum(finite) / len(finite)) if finite else None
        thinned.append((points[end - 1][0], mean))
    return thinned
