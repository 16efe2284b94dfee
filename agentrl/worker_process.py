"""The inside of a worker process: one function, served over stdin and stdout until the parent goes away.

A frame is four bytes of length, big-endian, and that much JSON. A request is ``{"payload": ...}``; a reply
is ``{"value": ...}``, ``{"limit": "memory"}`` or ``{"bug": traceback}``. The first two also have ``seconds``,
what the request took, and ``worn``: whether the process has grown so much that the next request should get a
fresh one. The first reply of all is the bare answer to the probe, unasked.

Requests may stand in the pipe while one is worked on. Each is answered before the next is taken up; after a
reply that is worn, or has no value, the process ends and takes none up.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, BinaryIO

__all__ = ["HEADER_BYTES", "frame", "serve"]

HEADER_BYTES = 4
_GRACE_S = (
    1.0  # the parent kills at the deadline; this much later the kernel does, in case the parent is gone
)


def frame(message: Any) -> bytes:
    """One message, ready to be written. Raises TypeError for what JSON can't carry."""
    body = json.dumps(message).encode()
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def serve(*, target: str, probe: Any, start_s: float, deadline_s: float, memory_mib: int) -> None:
    """Answer the probe, then requests, one at a time, until stdin ends."""
    requests, replies = _claim_pipes()
    sys.excepthook = functools.partial(_report_bug, replies)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel's own kill: no Python code need get its turn
    signal.setitimer(signal.ITIMER_REAL, start_s + _GRACE_S)
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    answer = function(probe)
    memory = _MemoryCap(memory_mib << 20)
    signal.setitimer(signal.ITIMER_REAL, 0)
    _silence(2)
    with contextlib.suppress(BrokenPipeError):  # the parent is gone: nobody wants the answer
        _send(replies, {"value": answer})
        while (request := _receive(requests)) is not None:
            signal.setitimer(signal.ITIMER_REAL, deadline_s + _GRACE_S)
            began = time.monotonic()
            reply = _answer(function, request["payload"])
            worn = memory.is_worn()
            _send(replies, {**reply, "seconds": time.monotonic() - began, "worn": worn})
            if worn or "value" not in reply:
                break
            signal.setitimer(signal.ITIMER_REAL, 0)


class _MemoryCap:
    """Caps the address space at what is in use now, plus ``allowance`` bytes; on Linux only."""

    def __init__(self, allowance: int) -> None:
        try:
            self._statm = os.open(
                "/proc/self/statm", os.O_RDONLY
            )  # kept: opened anew it costs ten times as much
        except FileNotFoundError:
            self._statm = -1
            return
        in_use = self._address_space()
        self._worn_at = in_use + allowance // 4
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        cap = in_use + allowance
        cap = cap if hard == resource.RLIM_INFINITY else min(cap, hard)
        resource.setrlimit(resource.RLIMIT_AS, (cap, cap))

    def is_worn(self) -> bool:
        """Whether a quarter of the allowance stayed in use: the next request would not get its share."""
        return self._statm >= 0 and self._address_space() > self._worn_at

    def _address_space(self) -> int:
        """Bytes of this process's address space."""
        return int(os.pread(self._statm, 64, 0).split()[0]) * resource.getpagesize()


def _answer(function: Callable[[Any], Any], payload: Any) -> dict[str, Any]:
    try:
        return {"value": function(payload)}
    except MemoryError:
        return {"limit": "memory"}


def _report_bug(
    replies: BinaryIO, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Python's last word before it exits: the parent raises it."""
    with contextlib.suppress(BrokenPipeError):
        _send(replies, {"bug": "".join(traceback.format_exception(kind, error, trace))})


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The parent's pipes, out of reach of a stray print() or input()."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _silence(0)
    _silence(1)
    return requests, replies


def _silence(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _send(replies: BinaryIO, message: Any) -> None:
    replies.write(frame(message))
    replies.flush()


def _receive(requests: BinaryIO) -> Any:
    header = requests.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    return json.loads(requests.read(int.from_bytes(header, "big")))
