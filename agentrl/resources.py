"""Checks that a thousand episodes leave nothing behind: memory that Python allocates, and open descriptors.

Half of the episodes are played in one environment, half in one of their own. What grows in every stretch of
them is a leak; caches fill up and stop. Not seen: memory that libraries allocate outside Python.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from agentrl.allocator import cheap_collection
from agentrl.probes import Subject, Unsound, play

__all__ = ["keeps_descriptors_flat", "keeps_memory_flat"]

_STRETCHES = 10  # into which the episodes are divided; after each it is measured
_WARM = 2  # stretches before the first measurement, in which caches fill
_FEWEST = 4  # measurements that tell growth from noise
_LONGEST_S = 30.0  # slower environments are measured over as many stretches as this allows
_MOST_BYTES = 32  # that an episode may keep: less than any object
_NOISE_BYTES = 4096  # of a stretch: blocks from before the tracing that were freed and taken again
_CLEAR_BYTES = 10_000  # kept by every episode: to play on would only fill the memory
_DESCRIPTORS = Path("/proc/self/fd")


def keeps_memory_flat(subject: Subject) -> str:
    """What Python has allocated does not grow with the episodes."""
    with _traced():
        sizes = _measured(subject, _allocated, clear=_CLEAR_BYTES * _stretch(subject))
    growth = _growth(sizes)
    if growth > _NOISE_BYTES + _MOST_BYTES * _stretch(subject):
        raise Unsound(
            f"an episode keeps {growth // _stretch(subject)} bytes or more: hold what belongs to it on the "
            "instance, and begin it anew in setup()"
        )
    return _played(subject, sizes)


def keeps_descriptors_flat(subject: Subject) -> str:
    """Open files and sockets do not become more with the episodes."""
    if not _DESCRIPTORS.is_dir():
        return f"can't be seen here: there is no {_DESCRIPTORS}"
    counts = _measured(subject, _open_descriptors, clear=0)
    growth = _growth(counts)
    if growth > 0:
        raise Unsound(
            f"{growth} or more descriptors stay open after every {_stretch(subject)} episodes: close what an "
            "episode opens"
        )
    return _played(subject, counts)


def _allocated() -> int:
    return tracemalloc.get_traced_memory()[0]


def _open_descriptors() -> int:
    return sum(1 for _ in _DESCRIPTORS.iterdir())


@contextmanager
def _traced() -> Iterator[None]:
    if tracemalloc.is_tracing():  # somebody else's: it goes on
        yield
        return
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def _measured(subject: Subject, measure: Callable[[], int], *, clear: int) -> list[int]:
    """``measure()`` after each stretch; ends early where each grew by more than ``clear``, or time is up."""
    values: list[int] = []
    began = time.monotonic()
    with cheap_collection():
        for stretch in range(1, _STRETCHES + 1):
            _play_stretch(subject)
            if stretch < _WARM:
                continue
            gc.collect()
            values.append(measure())
            late = time.monotonic() - began > _LONGEST_S
            if len(values) >= _FEWEST and (late or _growth(values) > clear):
                break
    return values


def _play_stretch(subject: Subject) -> None:
    for number in range(_stretch(subject)):
        start = subject.starts[number // 2 % len(subject.starts)]
        env = subject.env if number % 2 else subject.env.make_twin()
        play(env, start, env.gold(start.task))
        if env is not subject.env:
            env.close()


def _stretch(subject: Subject) -> int:
    """Episodes of a stretch."""
    return max(1, subject.endurance // _STRETCHES)


def _growth(values: Sequence[int]) -> int:
    """The least growth of a stretch; 0 or less where it did not always grow."""
    return min(after - before for before, after in pairwise(values))


def _played(subject: Subject, values: Sequence[int]) -> str:
    return f"{(len(values) + _WARM - 1) * _stretch(subject)} episodes"
