"""Schedules: written-out values, bounds for any argument, parity with torch, torch's traps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hpsched import schedules as s
from hpsched.errors import UsageError

POLICIES = ("cosine", "linear")
ANYWHERE = (-(10**400), -7, -1, 0, 1, 2, 3, 10, 99, 100, 101, 2**53, 10**18, 10**400)

totals = st.integers(1, 3000)
fractions = st.floats(0, 1)
policies = st.sampled_from(POLICIES)
steps = st.integers()


def values(schedule: s.Schedule, count: int) -> list[float]:
    return [schedule(t) for t in range(count)]


def near(expected: list[float]) -> object:
    return pytest.approx(expected, rel=1e-6, abs=1e-12)


# --- one-cycle: written out -----------------------------------------------------------------------


def test_cosine_policy_written_out() -> None:
    cycle = s.one_cycle(9, max_lr=1.0, div_factor=5, pct_start=0.55, final_div_factor=100)
    assert values(cycle.lr, 9) == near(
        [0.2, 0.317157288, 0.6, 0.882842712, 1.0, 0.853846183, 0.501, 0.148153817, 0.002]
    )
    assert values(cycle.momentum, 9) == near(
        [0.95, 0.935355339, 0.9, 0.864644661, 0.85, 0.864644661, 0.9, 0.935355339, 0.95]
    )


def test_linear_policy_written_out() -> None:
    cycle = s.one_cycle(
        10, max_lr=1.0, div_factor=4, pct_start=0.4, final_div_factor=10, policy="linear"
    )
    assert values(cycle.lr, 10) == near([0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0.175, 0.1, 0.025])
    third = 0.1 / 3
    assert values(cycle.momentum, 10) == near(
        [0.95, 0.95 - third, 0.85 + third, 0.85, 0.85 + third, 0.95 - third, *[0.95] * 4]
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pct_start", [0.0, 0.3, 0.5, 1.0])
def test_runs_too_short_for_a_cycle(policy: str, pct_start: float) -> None:
    one = s.one_cycle(1, max_lr=0.5, pct_start=pct_start, policy=policy)
    assert [one.lr(t) for t in (-1, 0, 1, 2)] == [0.5] * 4
    assert one.momentum(0) == 0.85
    two = s.one_cycle(2, max_lr=0.5, pct_start=pct_start, policy=policy)
    assert [two.lr(t) for t in (-1, 0, 1, 2)] == [0.5, 0.5, 0.5 / 25 / 1e4, 0.5 / 25 / 1e4]
    assert values(two.momentum, 2) == [0.85, 0.95]


def test_three_steps_have_room_for_all_but_the_annihilation() -> None:
    cosine, linear = (s.one_cycle(3, max_lr=1, policy=policy).lr for policy in POLICIES)
    assert values(cosine, 3) == [0.04, 1.0, 0.04 / 1e4]
    assert values(linear, 3) == [0.04, 1.0, 0.04]


@pytest.mark.parametrize(
    ("total", "pct_start", "policy", "expected"),
    [
        (30, 0.317, "cosine", 9),
        (100, 0.29, "cosine", 28),  # 100·0.29 is 28.999999999999996 in floats
        (100, 0.0, "cosine", 1),
        (100, 0.01, "cosine", 1),
        (100, 1.0, "cosine", 98),
        (100, 0.5, "linear", 49),
        (100, 0.8, "linear", 49),
        (101, 0.5, "linear", 49),
        (3, 0.9, "linear", 1),
        (2, 0.9, "cosine", 0),
        (1, 0.3, "cosine", 0),
    ],
)
def test_peak_step(total: int, pct_start: float, policy: str, expected: int) -> None:
    assert s.peak_step(total, pct_start, policy) == expected
    assert s.rounded_pct_start(total, pct_start, policy) == (expected + 1) / total


# --- one-cycle: properties ------------------------------------------------------------------------


@given(total=st.integers(3, 3000), pct_start=fractions, policy=policies)
def test_peak_exactly_once(total: int, pct_start: float, policy: str) -> None:
    cycle = s.one_cycle(total, max_lr=0.3, pct_start=pct_start, policy=policy)
    lrs, momenta = values(cycle.lr, total), values(cycle.momentum, total)
    assert lrs.count(0.3) == 1
    assert lrs.index(0.3) == momenta.index(0.85) == s.peak_step(total, pct_start, policy)
    assert momenta.count(0.85) == 1


@given(total=st.integers(4, 3000), pct_start=fractions, policy=policies)
def test_starts_low_and_ends_lowest(total: int, pct_start: float, policy: str) -> None:
    lr, momentum = s.one_cycle(total, max_lr=0.3, pct_start=pct_start, policy=policy)
    assert lr(0) == 0.3 / 25
    assert lr(total - 1) == 0.3 / 25 / 1e4
    assert momentum(0) == momentum(total - 1) == 0.95


@given(
    total=totals,
    step=steps,
    pct_start=fractions,
    policy=policies,
    max_lr=st.floats(1e-8, 1e3),
    div=st.floats(1, 1e3),
    final_div=st.floats(1, 1e6),
    momenta=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)).map(sorted),
)
def test_never_outside_its_bounds(
    total: int,
    step: int,
    pct_start: float,
    policy: str,
    max_lr: float,
    div: float,
    final_div: float,
    momenta: list[float],
) -> None:
    base, top = momenta
    cycle = s.one_cycle(
        total,
        max_lr=max_lr,
        div_factor=div,
        pct_start=pct_start,
        final_div_factor=final_div,
        base_momentum=base,
        max_momentum=top,
        policy=policy,
    )
    for t in (step, step % total):
        assert 0 < max_lr / div / final_div <= cycle.lr(t) <= max_lr
        assert base <= cycle.momentum(t) <= top


@given(total=st.integers(3, 500), pct_start=fractions, policy=policies)
def test_no_jumps_and_one_way_on_each_side_of_the_peak(
    total: int, pct_start: float, policy: str
) -> None:
    p = s.peak_step(total, pct_start, policy)
    lr = s.one_cycle(total, max_lr=1.0, pct_start=pct_start, policy=policy).lr
    steepest = math.pi / 2  # of a half-cosine, against a straight line
    fall = p if policy == "linear" else total - 1 - p
    for t in range(total - 1):
        change = lr(t + 1) - lr(t)
        if t < p:
            assert 0 <= change <= steepest / p + 1e-12
        elif policy == "linear" and t >= 2 * p:
            assert -0.04 <= change <= 0
        else:
            assert -steepest / fall - 1e-12 <= change <= 0


@given(total=st.integers(3, 500), pct_start=fractions, policy=policies)
def test_momentum_mirrors_the_rate(total: int, pct_start: float, policy: str) -> None:
    lr, momentum = s.one_cycle(
        total, max_lr=1.0, final_div_factor=1, pct_start=pct_start, policy=policy
    )
    for t in range(total):
        height = (lr(t) - 0.04) / 0.96
        assert momentum(t) == pytest.approx(0.95 - 0.1 * height, rel=1e-12)


# --- parity with torch ----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _quiet_torch() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def torch_cycle(
    total: int, pct_start: float, policy: str = "cosine", *, adam: bool = False, past: int = 0
) -> tuple[list[float], list[float]]:
    """The rates and momenta that a real optimizer has at steps 0 … total - 1 + past."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam([weight]) if adam else torch.optim.SGD([weight], lr=1, momentum=0.5)
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=0.3,
        total_steps=total,
        pct_start=pct_start,
        anneal_strategy="linear" if policy == "linear" else "cos",
        three_phase=policy == "linear",
    )
    lrs, momenta = [], []
    for step in range(total + past):
        if step:
            optimizer.step()
            scheduler.step()
        group = optimizer.param_groups[0]
        lrs.append(group["lr"])
        momenta.append(group["betas"][0] if adam else group["momentum"])
    return lrs, momenta


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("total", [3, 4, 5, 10, 30, 101, 1000])
@pytest.mark.parametrize("pct_start", [0.0, 0.1, 0.3, 0.317, 0.5, 0.75, 1.0])
def test_equals_torch(total: int, pct_start: float, policy: str, adam: bool) -> None:
    cycle = s.one_cycle(total, max_lr=0.3, pct_start=pct_start, policy=policy)
    rounded = s.rounded_pct_start(total, pct_start, policy)
    lrs, momenta = torch_cycle(total, rounded, policy, adam=adam)
    assert values(cycle.lr, total) == pytest.approx(lrs, rel=1e-12, abs=0)
    assert values(cycle.momentum, total) == pytest.approx(momenta, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("policy", "total", "counts"), [("cosine", 20, range(2, 20)), ("linear", 20, range(2, 11))]
)
def test_whole_peaks_need_no_rounding(policy: str, total: int, counts: range) -> None:
    for count in counts:
        pct_start = count / total
        assert s.rounded_pct_start(total, pct_start, policy) == pct_start
        lrs, _ = torch_cycle(total, pct_start, policy)
        ours = s.one_cycle(total, max_lr=0.3, pct_start=pct_start, policy=policy).lr
        assert values(ours, total) == pytest.approx(lrs, rel=1e-12, abs=0)


@given(total=st.integers(4, 60), pct_start=fractions, policy=policies)
@settings(max_examples=50)
def test_torch_survives_the_rounded_pct_start(total: int, pct_start: float, policy: str) -> None:
    """What `rounded_pct_start` exports may be stepped T times, as most training loops do."""
    lrs, _ = torch_cycle(total, s.rounded_pct_start(total, pct_start, policy), policy, past=1)
    assert max(lrs) == pytest.approx(0.3, rel=1e-12)


# --- torch's traps: torch wrong, ours right -------------------------------------------------------


def test_trap_the_last_step_runs_past_the_end() -> None:
    lrs, _ = torch_cycle(10, 0.4, "linear", past=1)
    assert lrs[10] < 0 < lrs[9]
    lr = s.one_cycle(10, max_lr=0.3, pct_start=0.4, policy="linear").lr
    assert lr(10) == lr(9) == pytest.approx(lrs[9], rel=1e-12)

    lrs, _ = torch_cycle(10, 0.4, past=1)
    assert lrs[10] > 1000 * lrs[9]  # up the cosine's other side
    lr = s.one_cycle(10, max_lr=0.3, pct_start=0.4).lr
    assert lr(10) == lr(9) == pytest.approx(lrs[9], rel=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_trap_a_first_phase_of_one_step_divides_by_zero(policy: str) -> None:
    with pytest.raises(ZeroDivisionError):
        torch_cycle(10, 0.1, policy)
    lrs = values(s.one_cycle(10, max_lr=0.3, pct_start=0.1, policy=policy).lr, 10)
    assert lrs[:2] == [0.012, 0.3]
    assert max(lrs[2:]) < 0.3


def test_trap_pct_start_1_divides_by_zero() -> None:
    with pytest.raises(ZeroDivisionError):
        torch_cycle(10, 1.0, past=1)
    lr = s.one_cycle(10, max_lr=0.3, pct_start=1.0).lr
    assert [lr(8), lr(9), lr(10)] == [0.3, 0.012 / 1e4, 0.012 / 1e4]


def test_trap_the_peak_is_missed_between_steps() -> None:
    lrs, _ = torch_cycle(30, 0.317)
    ours = values(s.one_cycle(30, max_lr=0.3, pct_start=0.317).lr, 30)
    error = max(abs(a - b) for a, b in zip(lrs, ours, strict=True)) / 0.3
    assert max(lrs) < 0.3
    assert error == pytest.approx(0.048, abs=5e-4)
    assert ours.count(0.3) == 1
    assert ours == pytest.approx(torch_cycle(30, 10 / 30)[0], rel=1e-12, abs=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_trap_pct_start_0_never_reaches_the_maximum(policy: str) -> None:
    lrs, _ = torch_cycle(10, 0.0, policy)
    assert max(lrs) < 0.995 * 0.3
    assert values(s.one_cycle(10, max_lr=0.3, pct_start=0.0, policy=policy).lr, 10).count(0.3) == 1


# --- other forms of one-cycle ---------------------------------------------------------------------

SIXTHS = [0.5 + math.sqrt(3) / 4, 0.75, 0.5, 0.25, 0.5 - math.sqrt(3) / 4, 0.0]  # (1 + cos kπ/6)/2


def test_fastai_v1_written_out() -> None:
    cycle = s.fastai_v1(10, 1.0, div_factor=5, pct_start=0.47, final_div_factor=100)
    rise = [0.2, 0.317157288, 0.6, 0.882842712, 1.0]
    assert values(cycle.lr, 12) == near([*rise, *(0.002 + 0.998 * c for c in SIXTHS), 0.002])
    assert [cycle.momentum(t) for t in (0, 2, 4, 7, 10)] == near([0.95, 0.9, 0.85, 0.9, 0.95])
    assert s.fastai_v1(100, 1.0).lr(100) == pytest.approx(1 / (25 * 1e4))


def test_fastai_v2_written_out() -> None:
    cycle = s.fastai_v2(8, 1.0, div_factor=5, div_final=100)
    assert values(cycle.lr, 9) == near([0.2, 0.6, 1.0, *(0.01 + 0.99 * c for c in SIXTHS)])
    assert [cycle.momentum(t) for t in (0, 1, 2, 5, 8)] == near([0.95, 0.9, 0.85, 0.9, 0.95])
    assert s.fastai_v2(100, 1.0).lr(100) == 1e-5


def test_fastai_v2_does_not_round_its_peak() -> None:
    lr = s.fastai_v2(10, 1.0, div_factor=5).lr  # the peak is at step 2.5
    up, down = (1 - math.cos(math.pi * 2 / 2.5)) / 2, (1 + math.cos(math.pi * 0.5 / 7.5)) / 2
    assert [lr(2), lr(3)] == near([0.2 + 0.8 * up, 1e-5 + (1 - 1e-5) * down])


def test_keras_written_out() -> None:
    cycle = s.keras_one_cycle(8, 1.0, div_factor=5, pct_start=0.25)
    assert values(cycle.lr, 9) == near([0.2, 0.6, *(2e-5 + 0.99998 * c for c in SIXTHS), 2e-5])
    assert [cycle.momentum(t) for t in (0, 1, 4, 7)] == near([0.95, 0.9, 0.9, 0.95])
    assert s.keras_one_cycle(100, 1.0).lr(99) == pytest.approx(1 / (25 * 1e4))


def counting_callback(total: int, pct_start: float) -> list[float]:
    """The Keras callback as it runs: two counters, the one in use goes up after every batch."""
    lengths = [total * pct_start, total - total * pct_start]
    ends, counts = [(0.04, 1.0), (1.0, 0.04 / 1e4)], [0, 0]
    lrs = [0.04]
    for batch in range(1, total):
        phase = int(batch >= lengths[0])
        counts[phase] += 1
        start, end = ends[phase]
        f = min(counts[phase] / lengths[phase], 1)
        lrs.append(end + (start - end) / 2 * (1 + math.cos(math.pi * f)))
    return lrs


@given(total=st.integers(1, 200), pct_start=st.floats(0, 0.99))
def test_keras_equals_the_counting_callback(total: int, pct_start: float) -> None:
    lr = s.keras_one_cycle(total, 1.0, pct_start=pct_start).lr
    assert values(lr, total) == pytest.approx(counting_callback(total, pct_start), rel=1e-9)


def test_use_clr_beta_written_out() -> None:
    cycle = s.use_clr_beta(10, 1.0, (4, 20, 0.95, 0.85))
    assert values(cycle.lr, 12) == near(
        [0.25, 0.4375, 0.625, 0.8125, 1, 0.8125, 0.625, 0.4375, 0.25, 0.12625, 0.0025, 0.0025]
    )
    assert values(cycle.momentum, 11) == near(
        [0.95, 0.925, 0.9, 0.875, 0.85, 0.875, 0.9, 0.925, 0.95, 0.95, 0.95]
    )


def test_use_clr_beta_of_the_cifar_log() -> None:
    """(10, 13.68, .95, .85) over 95 epochs is 41 up, 41 down and 13 of annihilation."""
    lr, momentum = s.use_clr_beta(95, 0.8, (10, 13.68, 0.95, 0.85))
    assert [lr(t) for t in (0, 41, 82, 95)] == near([0.08, 0.8, 0.08, 0.0008])
    assert lr(40) < lr(41) > lr(42)
    assert [momentum(t) for t in (0, 41, 82, 90)] == [0.95, 0.85, 0.95, 0.95]


def test_use_clr_beta_with_two_values_keeps_momentum() -> None:
    lr, momentum = s.use_clr_beta(10, 1.0, (4, 20), momentum=0.8)
    assert values(momentum, 11) == [0.8] * 11
    assert values(lr, 11) == values(s.use_clr_beta(10, 1.0, (4, 20, 0.9, 0.8)).lr, 11)


# --- range test -----------------------------------------------------------------------------------


def test_sweeps_written_out() -> None:
    exp, linear = s.range_test(5, 1e-4, 1.0), s.range_test(5, 0.0, 1.0, "linear")
    assert values(exp, 5) == near([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert values(linear, 5) == near([0.0, 0.25, 0.5, 0.75, 1.0])


@given(
    count=st.integers(2, 500),
    ends=st.tuples(st.floats(1e-10, 100), st.floats(1e-10, 100)).map(sorted),
    mode=st.sampled_from(["exp", "linear"]),
)
def test_sweeps_hit_both_ends_and_rise_evenly(count: int, ends: list[float], mode: str) -> None:
    low, high = ends
    assume(low * (1 + 1e-10) < high)  # closer ones rise only to within rounding (below)
    sweep = s.range_test(count, low, high, mode)
    assert (sweep(-3), sweep(0), sweep(count - 1), sweep(10**400)) == (low, low, high, high)
    lrs = values(sweep, count)
    assert lrs == sorted(lrs)
    for i, lr in enumerate(lrs):
        f = i / (count - 1)
        even = low * (high / low) ** f if mode == "exp" else low + (high - low) * f
        assert lr == pytest.approx(even, rel=1e-12)


def test_rounding_never_leaves_a_narrow_sweep() -> None:
    low, high = 8.439648258176347e-05, 8.439648258176357e-05  # powers alone leave it at step 4
    lrs = values(s.range_test(62, low, high), 62)
    assert (min(lrs), max(lrs)) == (low, high)


# --- schedules to compare with --------------------------------------------------------------------

WRITTEN_OUT: dict[str, tuple[s.Schedule, list[float]]] = {
    "constant": (s.constant(0.3), [0.3, 0.3, 0.3]),
    "square_root": (s.square_root(1.0), [1, 2**-0.5, 3**-0.5, 0.5, 5**-0.5]),
    "factor": (s.factor(1.0, alpha=0.5, min_lr=0.2), [1, 0.5, 0.25, 0.2, 0.2]),
    "multi_factor": (
        s.multi_factor(1.0, milestones=[2, 3], alpha=0.1),
        [1, 1, 0.1, 0.01, 0.01],
    ),
    "polynomial": (
        s.polynomial(4, 1.0, end_lr=0.2, power=2),
        [1, 0.65, 0.4, 0.25, 0.2, 0.2, 0.2],
    ),
    "cosine": (
        s.cosine(4, 1.0, end_lr=0.2),
        [1, 0.882842712, 0.6, 0.317157288, 0.2, 0.2, 0.2],
    ),
    "triangular": (
        s.cyclical(0.2, 1.0, step_size=2),
        [0.2, 0.6, 1, 0.6, 0.2, 0.6, 1, 0.6, 0.2],
    ),
    "triangular2": (
        s.cyclical(0.2, 1.0, step_size=2, mode="triangular2"),
        [0.2, 0.6, 1, 0.6, 0.2, 0.4, 0.6, 0.4, 0.2, 0.3, 0.4],
    ),
    "exp_range": (
        s.cyclical(0.0, 1.0, step_size=2, mode="exp_range", gamma=0.5),
        [0, 0.25, 0.25, 0.0625, 0, 2**-6, 2**-6],
    ),
    "warmup shift": (
        s.warmup(lambda n: s.polynomial(n, 1.0), 6, 2, start_lr=0.2),
        [0.2, 0.6, 1, 5 / 6, 4 / 6, 3 / 6],
    ),
    "warmup squeeze": (
        s.warmup(lambda n: s.polynomial(n, 1.0), 6, 2, start_lr=0.2, fit="squeeze"),
        [0.2, 0.6, 1, 0.75, 0.5, 0.25, 0.0],
    ),
    "warmup constant": (
        s.warmup(lambda n: s.square_root(1.0), 6, 2, start_lr=0.2, mode="constant"),
        [0.2, 0.2, 1, 2**-0.5, 3**-0.5, 0.5],
    ),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_written_out(name: str) -> None:
    schedule, expected = WRITTEN_OUT[name]
    assert values(schedule, len(expected)) == near(expected)
    assert schedule(-5) == schedule(0)


def torch_rates(
    build: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler], count: int
) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = build(optimizer)
    lrs = []
    for _ in range(count):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs


lr_scheduler = torch.optim.lr_scheduler
TORCH_TWINS: dict[str, tuple[s.Schedule, Callable[..., lr_scheduler.LRScheduler]]] = {
    "factor": (s.factor(1.0, alpha=0.9), lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    "multi_factor": (
        s.multi_factor(1.0, milestones=[5, 20], alpha=0.3),
        lambda o: lr_scheduler.MultiStepLR(o, [5, 20], 0.3),
    ),
    "polynomial": (
        s.polynomial(30, 1.0, power=2),
        lambda o: lr_scheduler.PolynomialLR(o, 30, power=2),
    ),
    "cosine": (
        s.cosine(40, 1.0, end_lr=0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 40, eta_min=0.1),
    ),
    **{
        mode: (
            s.cyclical(0.1, 1.0, step_size=7, mode=mode, gamma=0.97),
            lambda o, mode=mode: lr_scheduler.CyclicLR(
                o, 0.1, 1.0, step_size_up=7, mode=mode, gamma=0.97, cycle_momentum=False
            ),
        )
        for mode in ("triangular", "triangular2", "exp_range")
    },
}


@pytest.mark.parametrize("name", TORCH_TWINS)
def test_equals_its_torch_twin(name: str) -> None:
    ours, theirs = TORCH_TWINS[name]
    assert values(ours, 40) == pytest.approx(torch_rates(theirs, 40), rel=1e-9, abs=1e-12)


# --- the special case is the simple one -----------------------------------------------------------

REDUCTIONS: dict[str, tuple[s.Schedule, s.Schedule]] = {
    "factor 1": (s.factor(0.3, alpha=1), s.constant(0.3)),
    "no milestone": (s.multi_factor(0.3, milestones=[]), s.constant(0.3)),
    "flat cosine": (s.cosine(9, 0.3, end_lr=0.3), s.constant(0.3)),
    "flat cycle": (s.one_cycle(9, max_lr=1, div_factor=1, final_div_factor=1).lr, s.constant(1)),
    "gamma 1": (
        s.cyclical(0.1, 0.3, step_size=4, mode="exp_range", gamma=1),
        s.cyclical(0.1, 0.3, step_size=4),
    ),
    "no warm-up": (s.warmup(lambda n: s.cosine(n, 0.3), 9, 0), s.cosine(9, 0.3)),
    "sweep to zero": (
        s.polynomial(9, 1.0),
        lambda t: 1 - s.range_test(10, 0.0, 1.0, "linear")(t),
    ),
    "warmed constant": (
        s.warmup(lambda n: s.constant(1.0), 20, 9),
        s.range_test(10, 0.0, 1.0, "linear"),
    ),
    "use_clr_beta": (
        s.use_clr_beta(95, 0.8, (10, 13.68, 0.95, 0.85)).lr,
        s.one_cycle(
            96,
            max_lr=0.8,
            div_factor=10,
            pct_start=42 / 96,
            final_div_factor=100,
            policy="linear",
        ).lr,
    ),
    "fastai_v1": (s.fastai_v1(20, 0.8).lr, s.one_cycle(21, max_lr=0.8, pct_start=7 / 21).lr),
    "fastai_v2": (
        s.fastai_v2(20, 0.8, pct_start=0.3, div_final=25e4).lr,
        s.fastai_v1(20, 0.8).lr,
    ),
    "linear cycle": (
        lambda t: s.one_cycle(99, max_lr=1, div_factor=10, pct_start=0.5, policy="linear").lr(
            t % 97
        ),
        lambda t: s.cyclical(0.1, 1.0, step_size=48)(t % 97),
    ),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduces(name: str) -> None:
    special, simple = REDUCTIONS[name]
    assert values(special, 130) == pytest.approx(values(simple, 130), rel=1e-9, abs=1e-12)


# --- any step, any length -------------------------------------------------------------------------


@pytest.mark.parametrize("name", s.GALLERY)
@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 7, 10, 100])
def test_gallery_is_clamped_and_bounded(name: str, total: int) -> None:
    _, build = s.GALLERY[name]
    built = build(total, 0.3)
    lr, momentum = built if isinstance(built, s.OneCycleSchedules) else (built, s.constant(0.9))
    for step in (*ANYWHERE, total - 1, total, total + 1):
        assert isinstance(lr(step), float)
        assert 0 <= lr(step) <= 0.3
        assert 0.85 <= momentum(step) <= 0.95
    assert lr(-(10**400)) == lr(-1) == lr(0)
    assert lr(10**400) == lr(10**401)


@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_gallery_drops_nothing_before_the_first_step(total: int) -> None:
    _, build = s.GALLERY["multi_factor"]
    built = build(total, 0.3)
    assert not isinstance(built, s.OneCycleSchedules)
    assert built(0) == 0.3


def test_gallery_shows_every_schedule_in_one_line() -> None:
    builders = {"one_cycle", "fastai_v1", "fastai_v2", "keras_one_cycle", "use_clr_beta"} | {
        name.split(" ")[0] for name in WRITTEN_OUT
    }
    for name in builders | {"range_test", "cosine", "linear"}:
        assert any(name in key for key in s.GALLERY), name
    for description, build in s.GALLERY.values():
        assert 0 < len(description) <= 72
        assert "\n" not in description
        assert build(50, 0.1) is not None


@pytest.mark.parametrize("name", ["fastai_v1", "fastai_v2", "keras_one_cycle"])
@given(total=totals, pct_start=fractions, step=steps)
@settings(max_examples=50)
def test_other_forms_stay_bounded(name: str, total: int, pct_start: float, step: int) -> None:
    lr, momentum = getattr(s, name)(total, 0.3, pct_start=pct_start)
    for t in (step, step % (total + 1)):
        assert 0 < lr(t) <= 0.3
        assert 0.85 <= momentum(t) <= 0.95
    assert lr(-1) == lr(0)


@given(total=totals, div=st.floats(1, 100), tail=st.floats(0, 100), step=steps)
def test_use_clr_beta_stays_bounded(total: int, div: float, tail: float, step: int) -> None:
    lr, momentum = s.use_clr_beta(total, 0.3, (div, tail, 0.95, 0.85))
    for t in (step, step % (total + 1)):
        assert 0 < lr(t) <= 0.3
        assert 0.85 <= momentum(t) <= 0.95


def test_whole_numbers_of_other_libraries_are_steps_too() -> None:
    lr = s.one_cycle(np.int64(10), max_lr=np.float32(0.5)).lr
    assert lr(np.int64(2)) == lr(2) == 0.5


# --- arguments that cannot be right ---------------------------------------------------------------

NAN, INF = math.nan, math.inf
BAD_CYCLES = [
    ("total_steps", 0),
    ("total_steps", -3),
    ("total_steps", 10.0),
    ("total_steps", None),
    ("max_lr", 0.0),
    ("max_lr", -0.1),
    ("max_lr", NAN),
    ("max_lr", INF),
    ("max_lr", 10**400),
    ("max_lr", None),
    ("div_factor", 0.5),
    ("div_factor", NAN),
    ("div_factor", INF),
    ("final_div_factor", 0.99),
    ("final_div_factor", NAN),
    ("pct_start", -0.01),
    ("pct_start", 1.01),
    ("pct_start", 30),
    ("pct_start", NAN),
    ("max_momentum", 1.0),
    ("max_momentum", NAN),
    ("base_momentum", -0.1),
    ("base_momentum", 0.96),
    ("base_momentum", NAN),
    ("policy", "cos"),
]


def assert_refused(call: Callable[..., object], name: str, value: object, **kwargs: object) -> None:
    """The message names the argument and its value, and says after the colon what to give."""
    with pytest.raises(UsageError) as caught:
        call(**{**kwargs, name: value})
    told, _, remedy = str(caught.value).partition(": ")
    assert f"{name} = {value!r}" in told
    assert remedy.startswith("give ")


@pytest.mark.parametrize(("name", "value"), BAD_CYCLES)
def test_one_cycle_refuses(name: str, value: object) -> None:
    assert_refused(s.one_cycle, name, value, **{"total_steps": 10, "max_lr": 0.3})


@pytest.mark.parametrize("call", [s.fastai_v1, s.fastai_v2, s.keras_one_cycle])
@pytest.mark.parametrize(
    ("name", "value"), [bad for bad in BAD_CYCLES if bad[0] not in ("policy", "final_div_factor")]
)
def test_other_forms_refuse(call: Callable[..., object], name: str, value: object) -> None:
    assert_refused(call, name, value, **{"total_steps": 10, "max_lr": 0.3})


@pytest.mark.parametrize("call", [s.peak_step, s.rounded_pct_start])
@pytest.mark.parametrize(("name", "value"), [("total_steps", 0), ("pct_start", 2), ("policy", "x")])
def test_peak_step_refuses(call: Callable[..., object], name: str, value: object) -> None:
    assert_refused(call, name, value, **{"total_steps": 10, "pct_start": 0.3})


SWEEP = {"num_steps": 10, "start_lr": 1e-5, "end_lr": 1.0}
DECAY = {"total_steps": 10, "max_lr": 0.3}
CYCLES = {"min_lr": 0.1, "max_lr": 0.3, "step_size": 5}
WARM = {"main": lambda n: s.cosine(n, 0.3), "total_steps": 10, "warmup_steps": 2}


@pytest.mark.parametrize(
    ("call", "kwargs", "name", "value"),
    [
        (s.range_test, SWEEP, "num_steps", 1),
        (s.range_test, SWEEP, "start_lr", 1.0),
        (s.range_test, SWEEP, "start_lr", 2.0),
        (s.range_test, SWEEP, "start_lr", 0.0),
        (s.range_test, SWEEP, "end_lr", NAN),
        (s.range_test, SWEEP, "mode", "log"),
        (s.range_test, SWEEP | {"mode": "linear"}, "start_lr", -1e-9),
        (s.constant, {}, "max_lr", 0),
        (s.square_root, {}, "max_lr", NAN),
        (s.factor, {"max_lr": 0.3}, "alpha", 1.1),
        (s.factor, {"max_lr": 0.3}, "alpha", 0.0),
        (s.factor, {"max_lr": 0.3, "alpha": 0.5}, "min_lr", 0.4),
        (s.multi_factor, {"max_lr": 0.3, "milestones": [3]}, "alpha", NAN),
        (s.polynomial, DECAY, "end_lr", 0.4),
        (s.polynomial, DECAY, "power", 0),
        (s.cosine, DECAY, "end_lr", -0.1),
        (s.cosine, DECAY, "total_steps", 0),
        (s.cyclical, CYCLES, "min_lr", 0.4),
        (s.cyclical, CYCLES, "step_size", 0),
        (s.cyclical, CYCLES, "mode", "sawtooth"),
        (s.cyclical, CYCLES | {"mode": "exp_range"}, "gamma", 1.5),
        (s.warmup, WARM, "warmup_steps", -1),
        (s.warmup, WARM, "start_lr", 0.31),
        (s.warmup, WARM, "mode", "exp"),
        (s.warmup, WARM, "fit", "stretch"),
        (s.use_clr_beta, {"max_lr": 0.3}, "total_steps", 0),
        (s.use_clr_beta, {"total_steps": 10, "max_lr": 0.3}, "clr_beta", (10, 10, 0.95)),
    ],
)
def test_refuses(
    call: Callable[..., object], kwargs: dict[str, object], name: str, value: object
) -> None:
    assert_refused(call, name, value, **kwargs)


@pytest.mark.parametrize(
    ("clr_beta", "told"),
    [
        ((0.5, 10), "div_factor = 0.5"),
        ((10, 101), "clr_beta pct = 101"),
        ((10, NAN), "clr_beta pct = nan"),
        ((10, 10, 0.85, 0.95), "base_momentum = 0.95"),
    ],
)
def test_use_clr_beta_refuses(clr_beta: tuple[float, ...], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        s.use_clr_beta(10, 0.3, clr_beta)


def test_warmup_must_leave_steps() -> None:
    told = "warmup_steps = 10 leaves nothing of total_steps = 10: warm up for fewer"
    with pytest.raises(UsageError, match=told):
        s.warmup(lambda n: s.constant(0.3), 10, 10)


@pytest.mark.parametrize("milestones", [[5, 3], [3, 3]])
def test_milestones_must_increase(milestones: list[int]) -> None:
    with pytest.raises(UsageError, match="not increasing: list each step once"):
        s.multi_factor(0.3, milestones=milestones)


def test_a_milestone_is_a_step() -> None:
    with pytest.raises(UsageError, match=r"milestones = 2\.5"):
        s.multi_factor(0.3, milestones=[2.5])  # type: ignore[list-item]
