"""What memory costs in time: blocks that tensors free are kept, and what lasts is not looked at for garbage.

A kernel that need not hand memory out again need not zero it page by page either. The C library returns every
large block to the kernel when it is freed. A decoding step frees and takes the same megabytes over and over;
on two cores a log-softmax of (256, 262144) took 0.23 s so and 0.05 s with blocks that are kept.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["cheap_collection", "keep_freed_memory"]

# From glibc's malloc.h; musl, macOS and Windows have no mallopt and manage memory otherwise.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_KEPT_BYTES = 1 << 30


@contextmanager
def cheap_collection() -> Iterator[None]:
    """What exists already is not looked at by each collection: with libraries loaded, most of its time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@functools.cache
def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks of up to 1 GiB, once for the process; nothing to do elsewhere.

    Threads that start later share one heap, for only the main heap can hold such blocks. Settings of the
    user's own (``MALLOC_*``, another allocator's ``LD_PRELOAD``) are left alone.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or os.environ.get("LD_PRELOAD"):
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
