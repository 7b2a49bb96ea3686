"""What the processes (ranks) of one distributed run must agree on.

Each rank sees its own share of the data and so has a loss of its own. Averaged over the ranks it is
the same number on all of them, and so is everything that is decided by it: where a sweep ends,
whether a run has diverged. A rank that stopped alone would leave the others waiting for it forever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def size(group: Any = None) -> int:
    """How many processes train together: 1 without torch.distributed, or with ``group=False``."""
    if group is False or not dist.is_available() or not dist.is_initialized():
        return 1
    return max(1, dist.get_world_size(group))


def mean(values: Sequence[float], group: Any, device: torch.device) -> list[float]:
    """Average over the ranks of ``group``, the same to the last bit on each; one all_reduce.

    Every rank must call this, with as many values. A NaN of one rank is then that of all.
    """
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(shared, group=group)
    return [float(value) for value in (shared / size(group)).tolist()]


def device_of(values: Sequence[Any], group: Any) -> torch.device:
    """Where to average these: on their own device, from which gradients travel, too."""
    for value in values:
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
