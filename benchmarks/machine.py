"""What this machine can do at most: the rates that a benchmark's physical limit is computed from.

Each is the best of several repetitions: a limit is what was possible once, not what is usual.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["matmul_rate", "read_rate"]

_REPEATS = 8


def matmul_rate(dtype: torch.dtype, *, size: int = 2048) -> float:
    """FLOP/s of a product of two square matrices."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right))


def read_rate(*, mib: int = 512) -> float:
    """Bytes/s of a sum over a block of memory far larger than the caches."""
    block = torch.ones(mib << 18)
    return block.nbytes / _best_seconds(block.sum)


def _best_seconds(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
