"""Devices: what nvidia-smi prints and what CUDA_VISIBLE_DEVICES says, by value."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpsched import devices
from hpsched.devices import CPU, Device, parse_devices, visible_gpus
from hpsched.errors import UsageError

A = "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77"
B = "GPU-5d5bffff-2c3e-9a51-1b6e-0b0f2bd1c7aa"
C = "GPU-e1d10a51-2f0b-4f7a-8a32-4c3b1d1f5a01"
M0 = "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f"
M1 = "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb"

PLAIN = "".join(f"GPU {i}: NVIDIA A100-SXM4-40GB (UUID: {u})\n" for i, u in enumerate((A, B, C)))
MIXED = f"GPU 0: NVIDIA T1000 (UUID: {A})\nGPU 1: NVIDIA H100 (UUID: {B})\n"
MIG = f"""\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: {A})
  MIG 1g.5gb      Device  0: (UUID: {M0})
  MIG 1c.2g.10gb  Device  1: (UUID: {M1})
GPU 1: NVIDIA A100-SXM4-40GB (UUID: {B})
"""
OLD_MIG = f"GPU 0: A100-SXM4-40GB (UUID: {A})\n  MIG 1g.5gb Device 0: (UUID: MIG-{A}/1/0)\n"


def shown(listing: str, entries: str | None = None) -> list[tuple[str, str]]:
    found = visible_gpus(listing, entries)
    assert [device.label for device in found] == [f"cuda:{i}" for i in range(len(found))]
    return [(device.visible, device.name.removeprefix("NVIDIA ")) for device in found]


A100 = "A100-SXM4-40GB"


def test_a_listing() -> None:
    assert shown(PLAIN) == [("0", A100), ("1", A100), ("2", A100)]
    assert shown("No devices found.\n") == []
    assert shown("") == []


def test_mig_devices_replace_their_gpu() -> None:
    assert shown(MIG) == [
        (M0, f"{A100} MIG 1g.5gb"),
        (M1, f"{A100} MIG 1c.2g.10gb"),
        (B, A100),
    ]
    assert shown(OLD_MIG) == [(f"MIG-{A}/1/0", f"{A100} MIG 1g.5gb")]


def test_gpus_of_several_kinds_have_no_name_by_index() -> None:
    """CUDA numbers the fastest first, nvidia-smi by bus."""
    assert shown(MIXED) == [("0", ""), ("1", "")]
    assert shown(MIXED, B) == [(B, "H100")]


@pytest.mark.parametrize(
    ("entries", "visible"),
    [
        ("0", ["0"]),
        ("2,0", ["2", "0"]),
        (" 1 , 2 ", ["1", "2"]),
        (f"{C},{A}", [C, A]),
        ("GPU-5d5ba,GPU-e", ["GPU-5d5ba", "GPU-e"]),
        ("GPU-5d5b", []),  # of two
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,-1,1", ["0"]),
        ("0,3,1", ["0"]),
        ("7", []),
        ("1,1", []),
        (M0, []),
    ],
)
def test_what_cuda_visible_devices_leaves(entries: str, visible: list[str]) -> None:
    assert [entry for entry, _ in shown(PLAIN, entries)] == visible


@pytest.mark.parametrize(
    ("entries", "visible"),
    [(M1, [M1]), (f"{M1},{M0}", [M1, M0]), (B, [B]), ("1", ["1"]), (M1[:12], []), ("MIG-0", [])],
)
def test_what_it_leaves_of_mig_devices(entries: str, visible: list[str]) -> None:
    assert [entry for entry, _ in shown(MIG, entries)] == visible


THREE = visible_gpus(PLAIN, "2,0,1")


@pytest.mark.parametrize(
    ("text", "labels", "visible"),
    [
        ("all", ["cuda:0", "cuda:1", "cuda:2"], ["2", "0", "1"]),
        ("cuda", ["cuda:0", "cuda:1", "cuda:2"], ["2", "0", "1"]),
        ("cpu", ["cpu"], [""]),
        ("cuda:2,cuda:0", ["cuda:2", "cuda:0"], ["1", "2"]),
        ("cuda:1, cpu", ["cuda:1", "cpu"], ["0", ""]),
        ("cuda:0+cuda:2,cuda:1", ["cuda:0+cuda:2", "cuda:1"], ["2,1", "0"]),
    ],
)
def test_naming_devices(text: str, labels: list[str], visible: list[str]) -> None:
    found = parse_devices(text, THREE)
    assert [device.label for device in found] == labels
    assert [device.visible for device in found] == visible


def test_several_gpus_together_have_a_name() -> None:
    (both,) = parse_devices("cuda:0+cuda:2", THREE)
    assert str(both) == "cuda:0+cuda:2 2 × NVIDIA A100-SXM4-40GB"


@pytest.mark.parametrize(
    ("text", "available", "words"),
    [
        ("cuda:3", THREE, ("'cuda:3' is no device here", "cuda:2 NVIDIA A100")),
        ("cuda:1,cuda:1", THREE, ("cuda:1 twice", "--per-device")),
        ("cuda:1+cuda:1", THREE, ("cuda:1 twice",)),
        ("cpu,cpu", THREE, ("cpu twice",)),
        ("cpu+cuda:0", THREE, ("'cpu' is no device",)),
        ("gpu", THREE, ("'gpu' is no device",)),
        ("0", THREE, ("'0' is no device",)),
        ("", THREE, ("'' is no device",)),
        ("cuda:0", (CPU,), ("No GPU is visible", "--devices cpu", "nvidia-smi -L")),
        ("cuda", (CPU,), ("'cuda' is no device", "No GPU is visible")),
    ],
)
def test_devices_that_are_not_there(
    text: str, available: tuple[Device, ...], words: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_devices(text, available)
    for word in (f"--devices {text!r}", *words):
        assert word in str(caught.value)


def fake_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_a_node_with_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, f"test \"$1\" = -L && printf '%s' '{PLAIN}'", monkeypatch)
    assert [device.visible for device in devices.available({})] == ["0", "1", "2"]
    assert devices.available({"CUDA_VISIBLE_DEVICES": ""}) == (CPU,)
    assert [d.visible for d in devices.available({"HIP_VISIBLE_DEVICES": "1"})] == ["1"]


@pytest.mark.parametrize("script", ["echo No devices were found; exit 6", "exit 127"])
def test_a_node_with_none(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, script, monkeypatch)
    monkeypatch.setattr(devices, "_DRIVERS", (str(tmp_path / "no-driver*"),))
    assert devices.available({}) == (CPU,)


@pytest.mark.parametrize(
    ("count", "entries", "visible"),
    [(2, None, ["0", "1"]), (2, "3,1", ["3", "1"]), (1, "3,-1", ["3"]), (0, None, [""])],
)
def test_a_driver_without_nvidia_smi_is_left_to_torch(
    count: int, entries: str | None, visible: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fake_nvidia_smi(tmp_path, "exit 9", monkeypatch)
    (tmp_path / "kfd").touch()
    monkeypatch.setattr(devices, "_DRIVERS", (str(tmp_path / "kfd"),))
    monkeypatch.setattr(devices, "_COUNT", f"print({count})")
    env = {} if entries is None else {"CUDA_VISIBLE_DEVICES": entries}
    assert [device.visible for device in devices.available(env)] == visible


def test_torch_is_not_imported() -> None:
    code = "import sys, hpsched.devices, hpsched.fleet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
