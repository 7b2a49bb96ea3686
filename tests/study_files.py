"""Tiny files in the formats of the data sets that studies read."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

Part = tuple[np.ndarray, np.ndarray]  # images and their classes

# -- MNIST's idx -----------------------------------------------------------------------------------


def idx(path: Path, array: np.ndarray) -> None:
    """Write bytes in the idx format: a big-endian header, then the values."""
    header = np.array([0x800 + array.ndim, *array.shape], dtype=">u4").tobytes()
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def fashion_mnist(
    folder: Path, train: int = 24, test: int = 12, suffix: str = ".gz"
) -> dict[str, Part]:
    """The four files, with images whose brightness goes with their class."""
    folder.mkdir(exist_ok=True, parents=True)
    rng, made = np.random.default_rng(0), {}
    for part, name, count in (("train", "train", train), ("test", "t10k", test)):
        y = rng.integers(0, 10, count).astype(np.uint8)
        x = (25 * y[:, None, None] + rng.integers(0, 20, (count, 28, 28))).astype(np.uint8)
        idx(folder / f"{name}-images-idx3-ubyte{suffix}", x)
        idx(folder / f"{name}-labels-idx1-ubyte{suffix}", y)
        made[part] = (x, y)
    return made


# -- CIFAR-10 --------------------------------------------------------------------------------------

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def _batches(count: int) -> dict[str, Part]:
    rng = np.random.default_rng(0)
    return {
        name: (
            rng.integers(0, 256, (count, 3072)).astype(np.uint8),
            rng.integers(0, 10, count).astype(np.uint8),
        )
        for name in BATCHES
    }


def cifar_pickle(folder: Path, count: int = 12) -> dict[str, Part]:
    """The python version, in its own folder."""
    inside = folder / "cifar-10-batches-py"
    inside.mkdir(exist_ok=True, parents=True)
    made = _batches(count)
    for name, (x, y) in made.items():
        (inside / name).write_bytes(python2_pickle(x, y.tolist()))
    return made


def cifar_binary(folder: Path, count: int = 12) -> dict[str, Part]:
    """The binary version, in its own folder."""
    inside = folder / "cifar-10-batches-bin"
    inside.mkdir(exist_ok=True, parents=True)
    made = _batches(count)
    for name, (x, y) in made.items():
        (inside / f"{name}.bin").write_bytes(np.hstack([y[:, None], x]).tobytes())
    return made


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 pickled it (protocol 2, byte strings), which Python 3 cannot write."""
    count = struct.pack("<i", len(pixels))
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _text(b"b") + b"\x87R"
        b"(K\x01J" + count + b"M\x00\x0c\x86cnumpy\ndtype\n" + _text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + _text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + _text(pixels.tobytes()) + b"tb"
    )  # fmt: skip
    classes = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    pairs = _text(b"batch_label") + _text(b"training batch 1 of 5") + _text(b"labels") + classes
    return b"\x80\x02}(" + pairs + _text(b"data") + array + b"u."


def _text(data: bytes) -> bytes:
    """Python 2's ``str``: SHORT_BINSTRING or BINSTRING."""
    short = b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))
    return short + data
