"""Which devices this node has for workers, and what each worker must see of them.

Nothing here imports torch: whoever starts the workers must not take GPU memory of its own.

``cuda:i`` is the i-th visible device, as in torch. CUDA_VISIBLE_DEVICES is read as CUDA reads it
(CUDA C++ Programming Guide, "CUDA Environment Variables"): indexes, GPU-UUIDs or their unique
beginnings, and MIG-UUIDs, up to the first entry that names no device.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpsched.errors import UsageError

logger = logging.getLogger("hpsched.devices")

#: The variables that say which devices a process sees; the second is ROCm's, which reads both.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")

_SECONDS = 120  # the first call after a boot initialises the driver
_DRIVERS = ("/dev/nvidia*", "/dev/nvhost-gpu", "/dev/dxg", "/dev/kfd")
_COUNT = "import torch; print(torch.cuda.device_count())"

_GPU = re.compile(r"GPU (\d+): (.*) \(UUID: (GPU-[^)]+)\)")
_MIG = re.compile(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: (MIG-[^)]+)\)")


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one worker computes on.

    Attributes:
        label: ``cuda:0`` or ``cpu``; ``cuda:0+cuda:1`` for several GPUs together.
        visible: The worker's CUDA_VISIBLE_DEVICES; empty for the CPU.
        name: As the vendor calls it; empty where that is not known.
    """

    label: str
    visible: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.label} {self.name}".rstrip()


CPU = Device(label="cpu", visible="")


@dataclass(frozen=True, kw_only=True)
class _Gpu:
    uuid: str
    name: str
    mig: tuple[_Gpu, ...] = ()


def available(env: Mapping[str, str] = os.environ) -> tuple[Device, ...]:
    """The GPUs a process with this environment can use, MIG devices for a GPU that has them.

    The CPU alone where there is none.
    """
    entries = next((env[name] for name in VISIBLE if name in env), None)
    try:
        command = ["nvidia-smi", "-L"]
        listing = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_SECONDS
        ).stdout
        found = visible_gpus(listing, entries)
    except (OSError, subprocess.SubprocessError):  # ROCm, or a container without nvidia-smi
        found = _as_torch_sees(entries)
    return found or (CPU,)


def visible_gpus(listing: str, entries: str | None = None) -> tuple[Device, ...]:
    """The GPUs of ``nvidia-smi -L`` that a value of CUDA_VISIBLE_DEVICES leaves visible.

    Args:
        listing: The command's output.
        entries: The variable's value; None if it is not set.
    """
    gpus = _parse(listing)
    if entries is None:
        # As CUDA numbers them, which may not be nvidia-smi's order; but an index names no MIG.
        by_index = not any(gpu.mig for gpu in gpus)
        seen = [gpu for whole in gpus for gpu in whole.mig or (whole,)]
        named = [(str(i) if by_index else gpu.uuid, gpu) for i, gpu in enumerate(seen)]
    else:
        named = []
        for entry in map(str.strip, entries.split(",")):
            gpu = _find(entry, gpus)
            if gpu is None:
                break
            named.append((entry, gpu))
        if len({entry for entry, _ in named}) < len(named):  # CUDA then shows none
            named = []
    alike = len({gpu.name for gpu in gpus}) == 1  # else an index of CUDA's may be another GPU here
    return tuple(
        Device(
            label=f"cuda:{i}",
            visible=entry,
            name=gpu.name if alike or not entry.isdecimal() else "",
        )
        for i, (entry, gpu) in enumerate(named)
    )


def parse_devices(text: str, available: Sequence[Device]) -> tuple[Device, ...]:
    """The devices that ``--devices`` names, one for each group of workers.

    Args:
        text: ``all``; ``cuda`` (all GPUs); ``cpu``; or a list such as ``cuda:0,cuda:2``, in which
            ``cuda:0+cuda:1`` stands for several GPUs that a worker uses together.
        available: From :func:`available`.

    Raises:
        UsageError: A device that is not there, or that is named twice.
    """
    if text == "all":
        return tuple(available)
    gpus = {device.label: device for device in available if device.visible}
    if text == "cuda" and gpus:
        return tuple(gpus.values())
    known = {**gpus, CPU.label: CPU}
    groups = [[part.strip() for part in group.split("+")] for group in text.split(",")]
    labels = [label for group in groups for label in group]
    for label in labels:
        if label not in known or (label == CPU.label and [label] not in groups):
            raise UsageError(f"--devices {text!r}: {label!r} is no device here. {_remedy(gpus)}")
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise UsageError(
            f"--devices {text!r} names {twice[0]} twice: for several workers on one device use "
            "--per-device."
        )
    return tuple(_together([known[label] for label in group]) for group in groups)


def _together(devices: Sequence[Device]) -> Device:
    names = Counter(device.name for device in devices if device.name)
    return Device(
        label="+".join(device.label for device in devices),
        visible=",".join(device.visible for device in devices),
        name=", ".join(f"{n} × {name}" if n > 1 else name for name, n in names.items()),
    )


def _remedy(gpus: Mapping[str, Device]) -> str:
    if gpus:
        return f"There are {', '.join(map(str, gpus.values()))}, and cpu; all takes every GPU."
    return (
        "No GPU is visible (see `nvidia-smi -L`, CUDA_VISIBLE_DEVICES and `hpsched doctor`): use "
        "--devices cpu, with --per-device for several workers."
    )


def _parse(listing: str) -> list[_Gpu]:
    gpus: list[_Gpu] = []
    for line in listing.splitlines():
        if whole := _GPU.match(line):
            gpus.append(_Gpu(uuid=whole[3], name=whole[2]))
        elif (part := _MIG.match(line)) and gpus:
            gpu = gpus.pop()
            mig = _Gpu(uuid=part[2], name=f"{gpu.name} MIG {part[1]}")
            gpus.append(_Gpu(uuid=gpu.uuid, name=gpu.name, mig=(*gpu.mig, mig)))
    return gpus


def _find(entry: str, gpus: Sequence[_Gpu]) -> _Gpu | None:
    if entry.isdecimal():
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    if entry.startswith("MIG-"):
        parts = (part for gpu in gpus for part in gpu.mig)
        return next((part for part in parts if part.uuid == entry), None)
    found = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None


def _as_torch_sees(entries: str | None) -> tuple[Device, ...]:
    """Ask torch, in a process of its own, where there is a driver of any kind."""
    if not any(map(glob.glob, _DRIVERS)):
        return ()
    try:
        counted = subprocess.run(
            [sys.executable, "-c", _COUNT],
            capture_output=True, text=True, check=True, timeout=_SECONDS,
        )  # fmt: skip
        count = int(counted.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        logger.warning("torch cannot say which GPUs there are (%s); none is used", error)
        return ()
    if not count:
        logger.warning("there is a GPU driver, but torch sees no GPU; see `hpsched doctor`")
    named = map(str, range(count)) if entries is None else map(str.strip, entries.split(","))
    return tuple(
        Device(label=f"cuda:{i}", visible=entry)
        for i, entry in zip(range(count), named, strict=False)
    )
