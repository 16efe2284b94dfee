"""What this machine can do at most: the rates that a benchmark's physical limit is computed from.

Each is the best of several repetitions: a limit is what was possible once, not what is usual.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["device_name", "matmul_rate", "now", "read_rate"]

_REPEATS = 8


def matmul_rate(dtype: torch.dtype, *, device: str = "cpu") -> float:
    """FLOP/s of a product of two square matrices that keeps the device busy."""
    size = 2048 if device == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right))


def read_rate(*, device: str = "cpu") -> float:
    """Bytes/s of a sum over a block of memory far larger than the caches."""
    block = torch.ones((512 if device == "cpu" else 8192) << 18, device=device)
    return block.nbytes / _best_seconds(block.sum)


def device_name() -> str:
    """The GPU's name where there is one, else CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def now() -> float:
    """Seconds on the clock, once the GPU, where there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _best_seconds(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(_REPEATS):
        began = now()
        work()
        seconds.append(now() - began)
    return min(seconds)
