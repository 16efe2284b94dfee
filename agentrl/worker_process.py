"""The inside of a worker process: one function, served over stdin and stdout until the parent goes away.

A frame is four bytes of length, big-endian, and that much JSON. A request is ``{"payload": ...}``; a reply is
``{"value": ...}``, ``{"limit": "memory"}`` or ``{"bug": traceback}``, and has ``"worn": true`` where the
process has grown so much that the next request should get a fresh one. The first reply answers the probe,
unasked.
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
import traceback
from collections.abc import Callable
from pathlib import Path
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
            _send(replies, {**_answer(function, request["payload"]), "worn": memory.is_worn()})
            signal.setitimer(signal.ITIMER_REAL, 0)


class _MemoryCap:
    """Caps the address space at what is in use now, plus ``allowance`` bytes; on Linux only."""

    def __init__(self, allowance: int) -> None:
        self._worn_at = _address_space() + allowance // 4
        self._known = _address_space() > 0
        if self._known:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            cap = _address_space() + allowance
            cap = cap if hard == resource.RLIM_INFINITY else min(cap, hard)
            resource.setrlimit(resource.RLIMIT_AS, (cap, cap))

    def is_worn(self) -> bool:
        """Whether a quarter of the allowance stayed in use: the next request would not get its share."""
        return self._known and _address_space() > self._worn_at


def _address_space() -> int:
    """Bytes of this process's address space; 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    except FileNotFoundError:
        return 0
    return int(pages) * resource.getpagesize()


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
