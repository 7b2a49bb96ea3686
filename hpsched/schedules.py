"""Learning-rate and momentum schedules, as pure functions of the optimizer step.

Every builder checks its arguments once and returns a cheap callable ``step -> value``. A step is
an optimizer step, counted from 0. Any integer may be asked: steps before the first give the first
value, steps after the last give the last one, so nothing runs past its end, divides by zero or
turns negative.

=========  =====================================================  =====================
symbol     meaning                                                unit
=========  =====================================================  =====================
t          optimizer step, from 0                                 steps
T          total_steps, the length of the run: t = 0 … T - 1      steps
p          peak_step, the one step taken at exactly max_lr        steps
w          warmup_steps                                           steps
f          position inside a phase, 0 … 1                         none
max_lr     highest learning rate, η₀ for schedules that decay     learning rate
low        max_lr / div_factor, where a one-cycle run starts      learning rate
last       low / final_div_factor, where it ends                  learning rate
pct_start  share of T until the peak, p = round(pct_start·T) - 1  none
momentum   SGD's momentum or Adam's beta1, in [0, 1)              none
=========  =====================================================  =====================

Sources: L. N. Smith, "Super-Convergence" (arXiv:1708.07120) and "A disciplined approach to neural
network hyper-parameters, part 1" (arXiv:1803.09820) for one-cycle; "Cyclical learning rates"
(arXiv:1506.01186) for the range test and the cyclical modes; torch's OneCycleLR (2.13), fastai 0.7,
1.0 and 2.8 and the TF2/Keras callback for their forms of one-cycle; "Dive into Deep Learning",
chapter "Learning Rate Scheduling" (D2L), and DJL's trackers for the other schedules.
"""

from __future__ import annotations

import math
import operator
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, SupportsFloat, SupportsIndex

from hpsched.errors import UsageError

Schedule = Callable[[int], float]
"""Optimizer step (from 0) to value; defined for every integer, constant outside the run."""


class OneCycleSchedules(NamedTuple):
    """The two schedules of one cycle: learning rate and momentum (or beta1)."""

    lr: Schedule
    momentum: Schedule


# --- one-cycle ------------------------------------------------------------------------------------


def one_cycle(
    total_steps: int,
    *,
    max_lr: float,
    div_factor: float = 25.0,
    pct_start: float = 0.3,
    final_div_factor: float = 1e4,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    policy: str = "cosine",
) -> OneCycleSchedules:
    """One cycle over ``total_steps`` steps; momentum mirrors the learning rate.

    ``"cosine"`` rises from max_lr/div_factor to max_lr and falls to max_lr/div_factor/
    final_div_factor in two half-cosines (torch's OneCycleLR). ``"linear"`` is Smith's three-phase
    form (1708.07120 section 4; torch's ``three_phase=True, anneal_strategy="linear"``): up, down
    again in as many steps, then the annihilation at constant momentum. The peak lies on
    `peak_step` and is max_lr exactly, once, for div_factor > 1 and total_steps >= 3 (a run of one
    or two steps starts at the peak). Equal to torch at ``pct_start=rounded_pct_start(...)``.

    Raises UsageError for a rate that is not positive, factors below 1, pct_start outside [0, 1],
    momenta not in 0 <= base <= max < 1, total_steps < 1 or an unknown policy.
    """
    p = peak_step(total_steps, pct_start, policy)
    shape = _half_cosines if policy == "cosine" or p == 0 else _straight_lines
    rates = _rates(max_lr, div_factor, final_div_factor)
    return shape(rates, _momenta(base_momentum, max_momentum), p, total_steps - 1)


def peak_step(total_steps: int, pct_start: float, policy: str = "cosine") -> int:
    """The step (from 0) at which `one_cycle` reaches max_lr: round(pct_start * T) - 1.

    torch ends its first phase at pct_start·T - 1, whole or not, and misses the peak if it is not.
    The step is kept inside the run, so that every phase has a step to be taken in: within
    [1, T - 2], and for the linear policy, whose way down is as long as its way up, at most
    (T - 2) // 2 (1 for T = 3, which leaves no room for the annihilation). 0 for T < 3.
    """
    total_steps = _whole("total_steps", total_steps, 1)
    pct_start = _fraction("pct_start", pct_start)
    _one_of("policy", policy, ("cosine", "linear"))
    latest = total_steps - 2
    if policy == "linear":
        latest = max(latest // 2, min(latest, 1))
    return max(min(max(round(pct_start * total_steps) - 1, 1), latest), 0)


def rounded_pct_start(total_steps: int, pct_start: float, policy: str = "cosine") -> float:
    """The pct_start, (peak_step + 1) / T, at which torch's OneCycleLR has the same schedule."""
    return (peak_step(total_steps, pct_start, policy) + 1) / total_steps


def fastai_v1(
    total_steps: int,
    max_lr: float,
    *,
    div_factor: float = 25.0,
    pct_start: float = 0.3,
    final_div_factor: float = 1e4,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
) -> OneCycleSchedules:
    """fastai 1.0's ``fit_one_cycle``: half-cosines of int(pct_start·T) and the remaining steps.

    The peak is one step later than torch's. The last value, max_lr/(div_factor·final_div_factor),
    belongs to t = T: training stops one step short of it. Raises UsageError as `one_cycle`.
    """
    total_steps = _whole("total_steps", total_steps, 1)
    joint = int(total_steps * _fraction("pct_start", pct_start))
    rates = _rates(max_lr, div_factor, final_div_factor)
    return _half_cosines(rates, _momenta(base_momentum, max_momentum), joint, total_steps)


def fastai_v2(
    total_steps: int,
    max_lr: float,
    *,
    div_factor: float = 25.0,
    pct_start: float = 0.25,
    div_final: float = 1e5,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
) -> OneCycleSchedules:
    """fastai 2's ``fit_one_cycle``: half-cosines that meet at t = pct_start·T, whole or not.

    The last value, max_lr/div_final (counted from max_lr), belongs to t = T. Raises UsageError as
    `one_cycle`.
    """
    total_steps = _whole("total_steps", total_steps, 1)
    joint = total_steps * _fraction("pct_start", pct_start)
    low, max_lr, _ = _rates(max_lr, div_factor, 1.0)
    rates = (low, max_lr, max_lr / _at_least_1("div_final", div_final))
    return _half_cosines(rates, _momenta(base_momentum, max_momentum), joint, total_steps)


def keras_one_cycle(
    total_steps: int,
    max_lr: float,
    *,
    div_factor: float = 25.0,
    pct_start: float = 0.3,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
) -> OneCycleSchedules:
    """The TF2/Keras callback: fastai 1.0's curves, as the callback walks through them.

    It counts up before it computes: the second phase opens with its *second* value, so max_lr
    itself is never taken (at T = 100 the largest rate is 0.05 % less) and the last step sits at
    max_lr/(div_factor·1e4) when pct_start·T is whole. Raises UsageError as `one_cycle`.
    """
    total_steps = _whole("total_steps", total_steps, 1)
    up = total_steps * _fraction("pct_start", pct_start)
    low, max_lr, last = _rates(max_lr, div_factor, 1e4)
    top, base = _momenta(base_momentum, max_momentum)
    turn = max(math.ceil(up), 1)  # step 0 is set before training, always to the start

    def walk(start: float, middle: float, end: float) -> Schedule:
        rise = _through([(0, start), (up, middle)], _cosine)
        fall = _through([(0, middle), (total_steps - up, end)], _cosine)
        return lambda step: rise(step) if step < turn else fall(step - turn + 1)

    return OneCycleSchedules(walk(low, max_lr, last), walk(top, base, top))


def use_clr_beta(
    total_steps: int,
    max_lr: float,
    clr_beta: Sequence[float] = (10.0, 10.0, 0.95, 0.85),
    *,
    momentum: float = 0.9,
) -> OneCycleSchedules:
    """fastai 0.7's ``use_clr_beta=(div, pct, max_mom, min_mom)``, the first public one-cycle.

    pct is the annihilation tail in *percent* (0 … 100): c = int(T·(1 - pct/100)/2) steps linearly
    up from max_lr/div, c down, the rest on to a hundredth of max_lr/div, which belongs to t = T.
    Momentum goes max → min → max and stays there; with ``(div, pct)`` it is ``momentum``
    throughout. Raises UsageError for another number of values or values out of range.
    """
    total_steps = _whole("total_steps", total_steps, 1)
    if len(clr_beta) not in (2, 4):
        raise UsageError(
            f"clr_beta = {clr_beta!r} has {len(clr_beta)} values: "
            "give (div, pct, max_mom, min_mom), or (div, pct) for constant momentum"
        )
    tail = _real("clr_beta pct", clr_beta[1], 0.0, 100.0, "give the tail in percent, 0 to 100")
    c = int(total_steps * (1 - tail / 100) / 2)
    top, base = clr_beta[2:] if len(clr_beta) == 4 else (momentum, momentum)
    rates = _rates(max_lr, clr_beta[0], 100.0)
    return _straight_lines(rates, _momenta(base, top), c, total_steps)


# --- by policy ------------------------------------------------------------------------------------

CLASSIC = "schedule:"
"""A policy that is no one-cycle: this and a name in `GALLERY`, e.g. ``schedule:cosine``."""


def follow(total_steps: int, *, policy: str, **recipe: float) -> OneCycleSchedules:
    """What a recipe's run follows: `one_cycle`, or a classic schedule from ``max_lr`` down.

    A classic one holds the momentum at ``max_momentum``, and has no use for the recipe's other
    values. Raises UsageError as `one_cycle`, or for a schedule that is not in `classics`.
    """
    if not policy.startswith(CLASSIC):
        return one_cycle(total_steps, policy=policy, **recipe)
    name = policy.removeprefix(CLASSIC)
    _one_of("schedule", name, classics())
    made = GALLERY[name][1](total_steps, recipe["max_lr"])
    assert not isinstance(made, OneCycleSchedules)
    return OneCycleSchedules(made, lambda step: recipe["max_momentum"])


def classics() -> list[str]:
    """Names in `GALLERY` of whole schedules of the rate alone: no one-cycle, no sweep."""
    made = {name: build(2, 1.0) for name, (_, build) in GALLERY.items()}
    alone = [name for name, one in made.items() if not isinstance(one, OneCycleSchedules)]
    return [name for name in alone if not name.startswith("range_test")]


# --- learning-rate range test ---------------------------------------------------------------------


def range_test(num_steps: int, start_lr: float, end_lr: float, mode: str = "exp") -> Schedule:
    """A sweep of ``num_steps`` rates from start_lr to end_lr, both taken exactly.

    ``"exp"`` is geometric (equal steps in log lr), ``"linear"`` arithmetic (1506.01186 section
    3.3). Raises UsageError unless num_steps >= 2 and 0 < start_lr < end_lr (0 is a linear start).
    """
    num_steps = _whole("num_steps", num_steps, 2)
    _one_of("mode", mode, ("exp", "linear"))
    end_lr = _positive("end_lr", end_lr)
    ease, lowest = (_geometric, _TINY) if mode == "exp" else (_linear, 0.0)
    remedy = f"give a positive rate below end_lr = {end_lr!r}"
    start_lr = _real("start_lr", start_lr, lowest, math.nextafter(end_lr, 0.0), remedy)
    return _through([(0, start_lr), (num_steps - 1, end_lr)], ease)


# --- schedules to compare with --------------------------------------------------------------------


def constant(max_lr: float) -> Schedule:
    """max_lr at every step."""
    max_lr = _positive("max_lr", max_lr)
    return lambda step: max_lr


def square_root(max_lr: float) -> Schedule:
    """max_lr·(t + 1)^-½ (D2L, square-root scheduler)."""
    max_lr = _positive("max_lr", max_lr)
    return lambda step: max_lr / math.sqrt(min(max(step, 0), _FAR) + 1)


def factor(max_lr: float, *, alpha: float, min_lr: float = 0.0) -> Schedule:
    """max(min_lr, max_lr·alphaᵗ), alpha in (0, 1] per step (D2L, factor scheduler)."""
    max_lr = _positive("max_lr", max_lr)
    alpha = _decay("alpha", alpha)
    min_lr = _up_to("min_lr", min_lr, "max_lr", max_lr)
    return lambda step: max(min_lr, max_lr * alpha ** min(max(step, 0), _FAR))


def multi_factor(max_lr: float, *, milestones: Sequence[int], alpha: float = 0.5) -> Schedule:
    """max_lr, times alpha in (0, 1] from each milestone step on (D2L, multi-factor scheduler)."""
    max_lr = _positive("max_lr", max_lr)
    alpha = _decay("alpha", alpha)
    steps = [_whole("milestones", step, 0) for step in milestones]
    if steps != sorted(set(steps)):
        raise UsageError(f"milestones = {milestones!r} are not increasing: list each step once")
    values = [max_lr * alpha**passed for passed in range(len(steps) + 1)]
    return lambda step: values[bisect_right(steps, max(step, 0))]


def polynomial(
    total_steps: int, max_lr: float, *, end_lr: float = 0.0, power: float = 1.0
) -> Schedule:
    """end_lr + (max_lr - end_lr)·(1 - t/T)^power, held after T; power 1 is linear decay (DJL)."""
    total_steps = _whole("total_steps", total_steps, 1)
    max_lr = _positive("max_lr", max_lr)
    end_lr = _up_to("end_lr", end_lr, "max_lr", max_lr)
    power = _positive("power", power)

    def fall(start: float, end: float, f: float) -> float:
        return end + (start - end) * math.pow(1 - f, power)

    return _through([(0, max_lr), (total_steps, end_lr)], fall)


def cosine(total_steps: int, max_lr: float, *, end_lr: float = 0.0) -> Schedule:
    """end_lr + (max_lr - end_lr)/2·(1 + cos πt/T), pinned at end_lr after T (D2L, cosine)."""
    total_steps = _whole("total_steps", total_steps, 1)
    max_lr = _positive("max_lr", max_lr)
    end_lr = _up_to("end_lr", end_lr, "max_lr", max_lr)
    return _through([(0, max_lr), (total_steps, end_lr)], _cosine)


def cyclical(
    min_lr: float,
    max_lr: float,
    *,
    step_size: int,
    mode: str = "triangular",
    gamma: float = 1.0,
) -> Schedule:
    """Triangles between min_lr and max_lr, step_size steps up and as many down (1506.01186).

    ``"triangular"`` repeats unchanged, ``"triangular2"`` halves its height after every cycle,
    ``"exp_range"`` scales it by gammaᵗ, gamma in (0, 1].
    """
    max_lr = _positive("max_lr", max_lr)
    min_lr = _up_to("min_lr", min_lr, "max_lr", max_lr)
    step_size = _whole("step_size", step_size, 1)
    _one_of("mode", mode, ("triangular", "triangular2", "exp_range"))
    per_step = _decay("gamma", gamma) if mode == "exp_range" else 1.0
    per_cycle = 0.5 if mode == "triangular2" else 1.0

    def value(step: int) -> float:
        t = min(max(step, 0), _FAR)
        cycle, within = divmod(t, 2 * step_size)
        height = 1 - abs(within / step_size - 1)
        height *= per_cycle**cycle * per_step**t
        return min(_linear(min_lr, max_lr, height), max_lr)

    return value


def warmup(
    main: Callable[[int], Schedule],
    total_steps: int,
    warmup_steps: int,
    *,
    start_lr: float = 0.0,
    mode: str = "linear",
    fit: str = "shift",
) -> Schedule:
    """``warmup_steps`` steps in front of any schedule; ``main(n)`` builds it for n steps.

    The warm-up climbs linearly from start_lr to the main schedule's first value, or stays at
    start_lr (``mode="constant"``). Then the main schedule starts from its step 0: built for
    total_steps and so cut short (``fit="shift"``, DJL's WarmUpTracker), or built for the steps
    that remain (``fit="squeeze"``, D2L's cosine scheduler). Raises UsageError unless
    0 <= warmup_steps < total_steps and start_lr is at most the main schedule's first value.
    """
    total_steps = _whole("total_steps", total_steps, 1)
    warmup_steps = _whole("warmup_steps", warmup_steps, 0)
    _one_of("mode", mode, ("linear", "constant"))
    _one_of("fit", fit, ("shift", "squeeze"))
    if warmup_steps >= total_steps:
        raise UsageError(
            f"warmup_steps = {warmup_steps} leaves nothing of total_steps = {total_steps}: "
            "warm up for fewer steps"
        )
    after = main(total_steps if fit == "shift" else total_steps - warmup_steps)
    first = after(0)
    start_lr = _up_to("start_lr", start_lr, "the main schedule's first value", first)
    top = first if mode == "linear" else start_lr
    ramp = _through([(0, start_lr), (warmup_steps, top)], _linear)
    if warmup_steps == 0:
        return after
    return lambda step: ramp(step) if step < warmup_steps else after(step - warmup_steps)


# --- curves ---------------------------------------------------------------------------------------

_FAR = 2**53  # schedules without an end hold here: later steps are not exact as floats
_Ease = Callable[[float, float, float], float]  # (start, end, f in [0, 1]) -> value


def _linear(start: float, end: float, f: float) -> float:
    return start + (end - start) * f


def _cosine(start: float, end: float, f: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * f))


def _geometric(start: float, end: float, f: float) -> float:
    return math.pow(start, 1 - f) * math.pow(end, f)


def _through(knots: Sequence[tuple[float, float]], ease: _Ease) -> Schedule:
    """The curve through (step, value) knots: exact on each, between its neighbours elsewhere.

    Of knots on the same step the first gives the value there and the last starts the next phase.
    """
    steps = [step for step, _ in knots]
    values = [value for _, value in knots]
    final = steps[-1]

    def value(step: int) -> float:
        t = step if 0 <= step <= final else 0 if step < 0 else final  # clamped
        i = bisect_left(steps, t)
        end = values[i]
        if t == steps[i]:
            return end
        before, start = steps[i - 1], values[i - 1]
        eased = ease(start, end, (t - before) / (steps[i] - before))
        # rounding may leave the interval by one unit in the last place
        low, high = (start, end) if start < end else (end, start)
        return low if eased < low else high if eased > high else eased

    return value


def _half_cosines(
    rates: tuple[float, float, float], momenta: tuple[float, float], joint: float, end: int
) -> OneCycleSchedules:
    """low → max_lr → last and max → base → max; a rise of no length is left out."""
    (low, max_lr, last), (top, base) = rates, momenta
    lr, momentum = [(joint, max_lr), (end, last)], [(joint, base), (end, top)]
    if joint > 0:
        lr, momentum = [(0, low), *lr], [(0, top), *momentum]
    return OneCycleSchedules(_through(lr, _cosine), _through(momentum, _cosine))


def _straight_lines(
    rates: tuple[float, float, float], momenta: tuple[float, float], joint: float, end: int
) -> OneCycleSchedules:
    """low → max_lr → low → last (the annihilation) and max → base → max, which then stays."""
    (low, max_lr, last), (top, base) = rates, momenta
    lr = [(0, low), (joint, max_lr), (2 * joint, low), (end, last)]
    momentum = [(0, top), (joint, base), (2 * joint, top), (end, top)]
    return OneCycleSchedules(_through(lr, _linear), _through(momentum, _linear))


# --- arguments ------------------------------------------------------------------------------------


_TINY = math.ulp(0.0)  # the smallest positive number


def _real(name: str, value: SupportsFloat, low: float, high: float, remedy: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if low <= number <= high:  # false for NaN
        return number
    raise UsageError(f"{name} = {value!r} is out of range: {remedy}")


def _positive(name: str, value: float) -> float:
    return _real(name, value, _TINY, sys.float_info.max, "give a finite number above 0")


def _at_least_1(name: str, value: float) -> float:
    return _real(name, value, 1.0, sys.float_info.max, "give a finite number, 1 or more")


def _fraction(name: str, value: float) -> float:
    return _real(name, value, 0.0, 1.0, "give a fraction of the run, 0 to 1")


def _decay(name: str, value: float) -> float:
    return _real(name, value, _TINY, 1.0, "give a factor above 0, at most 1")


def _up_to(name: str, value: float, limit: str, high: float) -> float:
    return _real(name, value, 0.0, high, f"give 0 or more, at most {limit} = {high!r}")


def _rates(max_lr: float, div: float, final_div: float) -> tuple[float, float, float]:
    """(low, max_lr, last), checked."""
    max_lr = _positive("max_lr", max_lr)
    low = max_lr / _at_least_1("div_factor", div)
    return low, max_lr, low / _at_least_1("final_div_factor", final_div)


def _momenta(base: float, top: float) -> tuple[float, float]:
    """(max_momentum, base_momentum), in the order a cycle takes them, checked."""
    below_1 = math.nextafter(1.0, 0.0)
    top = _real("max_momentum", top, 0.0, below_1, "give 0 or more, below 1")
    return top, _up_to("base_momentum", base, "max_momentum", top)


def _whole(name: str, value: SupportsIndex, low: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if number >= low:
        return number
    raise UsageError(f"{name} = {value!r} is not possible: give a whole number, {low} or more")


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{name} = {value!r} is unknown: give one of {', '.join(known)}")


# --- gallery --------------------------------------------------------------------------------------

_Builder = Callable[[int, float], Schedule | OneCycleSchedules]


def _warm(mode: str, fit: str) -> _Builder:
    return lambda n, lr: warmup(
        lambda rest: cosine(rest, lr), n, n // 5, start_lr=lr / 10, mode=mode, fit=fit
    )


def _triangles(mode: str) -> _Builder:
    return lambda n, lr: cyclical(
        lr / 10, lr, step_size=max(n // 8, 1), mode=mode, gamma=0.1 ** (1 / n)
    )


def _sweep(mode: str) -> _Builder:
    return lambda n, lr: range_test(max(n, 2), lr * 1e-6, lr, mode)


def _drops(total_steps: int, max_lr: float) -> Schedule:
    milestones = sorted({total_steps // 2, total_steps * 3 // 4} - {0})
    return multi_factor(max_lr, milestones=milestones, alpha=0.1)


GALLERY: Mapping[str, tuple[str, _Builder]] = MappingProxyType(
    {
        "one_cycle": (
            "one-cycle in two half-cosines, as torch's OneCycleLR",
            lambda n, lr: one_cycle(n, max_lr=lr),
        ),
        "one_cycle_linear": (
            "Smith's one-cycle: linear up, down, annihilation",
            lambda n, lr: one_cycle(n, max_lr=lr, pct_start=0.45, policy="linear"),
        ),
        "fastai_v1": ("fastai 1.0's fit_one_cycle", fastai_v1),
        "fastai_v2": ("fastai 2's fit_one_cycle", fastai_v2),
        "keras_one_cycle": ("the TF2/Keras one-cycle callback", keras_one_cycle),
        "use_clr_beta": (
            "fastai 0.7's use_clr_beta=(10, 13.68, 0.95, 0.85)",
            lambda n, lr: use_clr_beta(n, lr, (10, 13.68, 0.95, 0.85)),
        ),
        "range_test_exp": ("range-test sweep, geometric over six decades", _sweep("exp")),
        "range_test_linear": ("range-test sweep, linear", _sweep("linear")),
        "constant": ("the same rate throughout", lambda n, lr: constant(lr)),
        "square_root": ("falls with the square root of the step", lambda n, lr: square_root(lr)),
        "factor": (
            "the same factor every step, to a hundredth",
            lambda n, lr: factor(lr, alpha=0.01 ** (1 / n), min_lr=lr / 100),
        ),
        "multi_factor": ("a tenth after half and after three quarters of the run", _drops),
        "linear": ("straight line to zero: polynomial of power 1", polynomial),
        "polynomial": (
            "parabola to zero: polynomial of power 2",
            lambda n, lr: polynomial(n, lr, power=2),
        ),
        "cosine": ("half a cosine to zero", cosine),
        "cyclical_triangular": ("four triangles of one height", _triangles("triangular")),
        "cyclical_triangular2": ("four triangles, each half as high", _triangles("triangular2")),
        "cyclical_exp_range": ("four triangles that shrink step by step", _triangles("exp_range")),
        "warmup_linear": ("linear warm-up, then a cosine cut short", _warm("linear", "shift")),
        "warmup_constant": (
            "constant warm-up, then a cosine cut short",
            _warm("constant", "shift"),
        ),
        "warmup_squeeze": ("linear warm-up, then a whole cosine", _warm("linear", "squeeze")),
    }
)
"""Name to (one line about it, ``builder(total_steps, max_lr)``): every schedule, ready to plot."""
