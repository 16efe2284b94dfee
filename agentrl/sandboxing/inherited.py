"""Descriptors that a fork of this process must not keep: our ends of a sandbox's pipes and sockets.

A process forked without an exec, as multiprocessing and data loaders make them, has a copy of every
descriptor. A pipe whose other end a stranger holds never ends, and what waits for its end waits for the
stranger.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

__all__ = ["keep", "release"]

_ours: dict[int, tuple[int, int]] = {}  # by number: which file it is
_lock = threading.Lock()


def keep(*descriptors: int) -> None:
    """In a child that is forked from now on these lead nowhere."""
    with _lock:
        _ours.update({descriptor: _file(descriptor) for descriptor in descriptors})


def release(*descriptors: int) -> None:
    """To be called before they are closed: their numbers are somebody else's then."""
    with _lock:
        for descriptor in descriptors:
            _ours.pop(descriptor, None)


def _file(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _in_child() -> None:
    """Not closed: what the child has of our objects would close the numbers again, whosever they were."""
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    if not _ours:
        return
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor, file in _ours.items():
        with suppress(OSError):  # closed without a word, and perhaps another's by now
            if _file(descriptor) == file:
                os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)
    _ours.clear()


os.register_at_fork(after_in_child=_in_child)
