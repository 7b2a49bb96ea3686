"""The classic studies: their loaders on files in the real formats, their schedules, their sums.

The runs start to end are in tests/integration/test_studies_run.py.
"""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from study_files import cifar_binary, cifar_pickle, fashion_mnist, idx, python2_pickle

from hpsched import schedules
from hpsched.errors import UsageError
from studies import char_transformer, cifar10_resnet56, fashion_mnist_schedules, super_convergence

# -- Fashion-MNIST ---------------------------------------------------------------------------------


def test_idx_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for name in ("a.gz", "a"):
        idx(tmp_path / name, x)
        assert (fashion_mnist_schedules.read_idx(tmp_path / name, 0x803) == x).all()


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_the_four_files_become_two_splits(tmp_path: Path, suffix: str) -> None:
    written = fashion_mnist(tmp_path, suffix=suffix)
    loaded = fashion_mnist_schedules.load(tmp_path)
    for part, (x, y) in written.items():
        assert loaded[part].x.shape == (len(x), 1, 28, 28)
        assert (loaded[part].x[:, 0] * 255 - torch.from_numpy(x)).abs().max() < 1e-4
        assert loaded[part].y.tolist() == y.tolist()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _regzip(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))

    return apply


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte.gz", Path.unlink, "no train-images-idx3-ubyte.gz. Get"),
        ("t10k-labels-idx1-ubyte.gz", Path.unlink, "github.com/zalandoresearch/fashion-mnist"),
        ("train-images-idx3-ubyte.gz", _truncate, "cannot be read .*get it again"),
        ("train-images-idx3-ubyte.gz", lambda p: p.write_bytes(b"<html>"), "cannot be read"),
        ("train-images-idx3-ubyte.gz", _regzip(lambda d: d[:-1]), "and its header promises"),
        ("train-images-idx3-ubyte.gz", _regzip(lambda d: d + b"0"), "and its header promises"),
        ("train-images-idx3-ubyte.gz", _regzip(lambda d: b""), "begins with nothing"),
        ("train-images-idx3-ubyte.gz", _regzip(lambda d: b"\0\0\x08\x01" + d[4:]), "08010?"),
        ("train-labels-idx1-ubyte.gz", _regzip(lambda d: b"\0\0\x0d\x01" + d[4:]), "00000d01"),
        ("train-labels-idx1-ubyte.gz", lambda p: idx(p, np.zeros(3, np.uint8)), "3 labels"),
        ("train-labels-idx1-ubyte.gz", _regzip(lambda d: d[:-1] + b"\x0b"), "up to 11"),
    ],
)
def test_damaged_files_of_fashion_mnist_are_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    fashion_mnist(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(UsageError, match=message):
        fashion_mnist_schedules.load(tmp_path)


def test_the_chapter_s_schedules_have_the_chapter_s_values() -> None:
    """By epoch, as printed in the chapter's own plots; constant within an epoch."""
    expected = {
        "constant": [0.3] * 30,
        "square root": [0.1 * (t + 1) ** -0.5 for t in range(30)],
        "factor": [max(0.01, 0.3 * 0.9**t) for t in range(30)],
        "multi-factor": [0.5] * 15 + [0.25] * 15,
        "cosine": [0.01 + 0.145 * (1 + np.cos(np.pi * min(t, 20) / 20)) for t in range(30)],
        "warm-up cosine": [0.06 * t for t in range(5)]
        + [0.01 + 0.145 * (1 + np.cos(np.pi * min(t, 15) / 15)) for t in range(25)],
    }
    for name, values in expected.items():
        made = fashion_mnist_schedules.curves(name, 30, per_epoch=7, max_lr=None)
        assert [made.lr(7 * t) for t in range(30)] == pytest.approx(values), name
        assert [made.lr(7 * t + 6) for t in range(30)] == pytest.approx(values), name
        assert {made.momentum(step) for step in range(210)} == {0.0}
    ours = fashion_mnist_schedules.curves("one-cycle", 30, per_epoch=7, max_lr=0.2)
    pure = schedules.one_cycle(210, max_lr=0.2)
    assert [ours.lr(t) for t in range(210)] == [pure.lr(t) for t in range(210)]


def test_lenet_is_the_chapter_s() -> None:
    net = fashion_mnist_schedules.lenet()
    assert sum(p.numel() for p in net.parameters()) == 61_706
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


# -- CIFAR-10 --------------------------------------------------------------------------------------


def test_both_versions_of_cifar10_give_the_same(tmp_path: Path) -> None:
    written = cifar_pickle(tmp_path / "a")
    cifar_binary(tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "a/cifar-10-batches-py", tmp_path / "b"):
        loaded = cifar10_resnet56.load(folder)
        assert len(loaded["train"].y) == 5 * len(loaded["test"].y)
        x, y = written["test_batch"]
        assert (loaded["test"].x.flatten(1).numpy() == x).all()
        assert loaded["test"].y.tolist() == y.tolist()
        first = written["data_batch_1"][0]  # red, green, blue planes, row by row
        assert loaded["train"].x[0, 1, 2, 3] == first[0, 1024 + 2 * 32 + 3]


class Evil:
    """A pickle that would run something."""

    def __reduce__(self) -> tuple[Callable[[str], Path], tuple[str]]:
        return Path, ("harm",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Evil()), "asks for pathlib.*Path"),
        (pickle.dumps({"data": Evil(), "labels": [0]}), "asks for pathlib.*Path"),
        (b"cos\nsystem\n(S'echo'\ntR.", "asks for os.system"),
        (b"cnumpy\nload\n.", "asks for numpy.load"),
        (b"", "EOFError"),
        (b"<!DOCTYPE html>", "no batch of CIFAR-10"),
        (pickle.dumps({"labels": [1]}), "KeyError: 'data'"),
        (python2_pickle(np.zeros((2, 3072), np.uint8), [1, 2])[:-2000], "no batch of CIFAR-10"),
        (python2_pickle(np.zeros((2, 3072), np.uint8), [1, 2, 3]), "3 classes"),
        (python2_pickle(np.zeros((2, 3072), np.uint8), [1, 77]), "classes 0 to 9"),
        (python2_pickle(np.zeros((0, 3072), np.uint8), []), "0 classes"),
    ],
)
def test_a_pickle_that_is_no_batch_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    cifar_pickle(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        cifar10_resnet56.load(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:-1], "whole images take 3073 each"),
        (lambda d: b"", "holds 0 bytes"),
        (lambda d: b"\x0c" + d[1:], "classes 0 to 9"),
    ],
)
def test_damaged_binary_files_are_refused(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    cifar_binary(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UsageError, match=message):
        cifar10_resnet56.load(tmp_path)


def test_missing_files_of_cifar10_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cs.toronto.edu/~kriz/cifar.html.*--data"):
        cifar10_resnet56.load(tmp_path)
    cifar_pickle(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(UsageError, match="data_batch_4 missing"):
        cifar10_resnet56.load(tmp_path)


def test_the_step_schedule_is_the_published_one() -> None:
    """He et al.: 0.1 for 32k of 64k steps, 0.01 to 48k, 0.001 to the end; here from 0.35."""
    made = cifar10_resnet56.step(64_000)
    at = {0: 1.0, 31_999: 1.0, 32_000: 0.1, 47_999: 0.1, 48_000: 0.01, 63_999: 0.01}
    assert {t: made.lr(t) / 0.35 for t in at} == pytest.approx(at)
    gallery = schedules.GALLERY["multi_factor"][1](1000, 0.35)
    assert [cifar10_resnet56.step(1000).lr(t) for t in range(1000)] == [
        gallery(t)  # type: ignore[operator]
        for t in range(1000)
    ]


def test_the_one_cycle_run_is_the_published_one() -> None:
    made = cifar10_resnet56.one_cycle(10_000)
    rates = [made.lr(t) for t in range(10_000)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[4_499] == 3.0
    assert rates[8_998] == pytest.approx(0.1)
    assert rates[-1] < 1e-4
    assert (made.momentum(0), made.momentum(4_499), made.momentum(9_999)) == (0.95, 0.85, 0.95)


@pytest.mark.parametrize(
    ("name", "up", "tail"), [("clr-95", 41, 13), ("clr-70", 31.5, 7), ("clr-50", 22.5, 5)]
)
def test_the_clr_beta_runs_are_the_published_ones(name: str, up: float, tail: float) -> None:
    recipe = cifar10_resnet56.RECIPES[name]
    made = recipe.curves(recipe.steps)
    epoch = cifar10_resnet56.IMAGES // recipe.batch_size
    rates = [made.lr(t) for t in range(recipe.steps)]
    top = 0.8 if name == "clr-95" else 3.0
    assert max(rates) == top
    assert rates.index(top) == pytest.approx(up * epoch, abs=epoch)
    assert recipe.steps - 2 * rates.index(top) == pytest.approx(tail * epoch, abs=2)


def test_resnet_56_has_its_weights() -> None:
    """0.85 million (He et al., table 6), and 0.27 million with 20 layers."""
    count = {d: sum(p.numel() for p in cifar10_resnet56.resnet(d).parameters()) for d in (20, 56)}
    assert count == {20: 269_722, 56: 853_018}
    with pytest.raises(UsageError, match="--depth 57"):
        cifar10_resnet56.resnet(57)


def test_augmented_images_are_crops_of_the_padded_one_or_its_mirror_image() -> None:
    torch.manual_seed(0)
    x = torch.randint(1, 256, (40, 3, 32, 32), dtype=torch.uint8)
    seen = set()
    for one, was in zip(cifar10_resnet56.augmented(x), x, strict=True):
        padded = torch.nn.functional.pad(was, (4, 4, 4, 4))
        crops = {
            (down, right): padded[:, down : down + 32, right : right + 32]
            for down in range(9)
            for right in range(9)
        }
        plain = [(*place, False) for place, crop in crops.items() if crop.equal(one)]
        mirrored = [(*place, True) for place, crop in crops.items() if crop.flip(2).equal(one)]
        assert len(plain + mirrored) == 1
        seen.update(plain + mirrored)
    assert {mirrored for *_, mirrored in seen} == {True, False}
    assert len({place[:2] for place in seen}) > 20


def test_images_become_floats_with_channels_last() -> None:
    x = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    made = cifar10_resnet56.normalised(x)
    assert made.is_contiguous(memory_format=torch.channels_last)
    red = (x[:, 0].float() / 255 - 0.4914) / 0.2470
    torch.testing.assert_close(made[:, 0], red)


# -- super-convergence -----------------------------------------------------------------------------

STEPS = (50, 100, 200, 400)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.4, 50.0),  # there at once
        (0.3, 100.0),
        (0.25, 100 * 2**0.5),  # half way, in log steps
        (0.1, 400.0),
        (0.05, np.inf),
    ],
)
def test_steps_to_a_target(target: float, expected: float) -> None:
    assert super_convergence.steps_to(target, STEPS, [0.4, 0.3, 0.2, 0.1]) == pytest.approx(
        expected
    )


def test_an_error_that_rises_again_counts_where_it_first_was_down() -> None:
    assert super_convergence.steps_to(0.2, STEPS, [0.4, 0.2, 0.3, 0.1]) == 100


def test_factors() -> None:
    ours = np.array([[0.4, 0.3, 0.2, 0.1]] * 3)
    assert super_convergence.factor(ours, np.full((3, 1), 0.2), STEPS) == pytest.approx(2)
    assert super_convergence.factor(ours, np.full((3, 1), 0.5), STEPS) == 8
    assert super_convergence.factor(ours, np.full((3, 1), 0.0), STEPS) == 0
    assert super_convergence.factor(ours, ours, STEPS) == pytest.approx(1)


def test_the_interval_covers_the_factor_and_narrows() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (5, 80):
        ours = np.array([0.4, 0.3, 0.2, 0.1]) + 0.02 * rng.standard_normal((n, 4))
        theirs = 0.2 + 0.02 * rng.standard_normal((n, 1))
        low, high = super_convergence.interval(ours, theirs, STEPS)
        assert low <= super_convergence.factor(ours, theirs, STEPS) <= high
        widths.append(high - low)
    assert widths[1] < 0.7 * widths[0]


def test_only_seeds_that_every_cell_has_run_with_count() -> None:
    rows = [
        {**cell._asdict(), "seed": seed, "error": 0.1 * seed}
        for cell in super_convergence.cells(["mlp"], 1)
        for seed in (1, 2, 3)
    ]
    assert super_convergence.table(rows, "mlp")["one-cycle"].shape == (3, 4)
    found = super_convergence.table(rows[:-1], "mlp")  # the last cell lacks seed 3
    assert found["one-cycle"].tolist() == [[0.1] * 4, [0.2] * 4]
    assert found["constant"].tolist() == [[0.1], [0.2]]


def test_schedules_are_the_library_s() -> None:
    for name in super_convergence.SCHEDULES:
        made = super_convergence.curves(name, 40, 0.5)
        momenta = {made.momentum(t) for t in range(40)}
        assert (momenta == {0.9}) == (name != "one-cycle")
        assert max(made.lr(t) for t in range(40)) == 0.5


# -- characters ------------------------------------------------------------------------------------


def test_the_parts_of_the_text_share_no_module() -> None:
    names = [name for part in char_transformer.PARTS.values() for name in part]
    assert len(names) == len(set(names))
    assert all(char_transformer.codes(part).max() < 128 for part in char_transformer.PARTS)


def test_the_transformer_sees_only_what_came_before() -> None:
    torch.manual_seed(0)
    model = char_transformer.Transformer()
    x = torch.randint(0, 128, (2, 16))
    changed = x.clone()
    changed[:, 10:] = 5
    with torch.no_grad():
        a, b = model(x), model(changed)
    torch.testing.assert_close(a[:, :10], b[:, :10])
    assert not torch.allclose(a[:, 10:], b[:, 10:])


def test_a_model_that_knows_nothing_needs_seven_bits() -> None:
    model = char_transformer.Transformer()
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    assert char_transformer.bits(model, "validation") == pytest.approx(7.0, abs=1e-3)
