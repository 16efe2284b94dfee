"""Which tasks a step trains on: shuffled passes over a split, a pure function of seed and position.

Nothing is stored, so a resumed run goes on with the tasks that the step would have had.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from agentrl.seeds import derive

__all__ = ["Schedule"]


class Schedule:
    """Task indices in an order of their own for each pass; a split of unknown size is taken as it comes."""

    def __init__(self, size: int | None, *, seed: int, name: str) -> None:
        """``size`` tasks (None: unknown); schedules of different ``name`` are independent."""
        self._size, self._seed, self._name = size, seed, name

    def take(self, start: int, count: int) -> list[int]:
        """The tasks at positions ``start`` to ``start + count`` of the endless order."""
        if self._size is None:
            return list(range(start, start + count))
        places = (divmod(position, self._size) for position in range(start, start + count))
        return [int(_order(self._size, self._seed, self._name, epoch)[place]) for epoch, place in places]


@lru_cache(maxsize=4)
def _order(size: int, seed: int, name: str, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(derive(seed, "schedule", name, epoch)).permutation(size)
