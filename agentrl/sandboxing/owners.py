"""Whose a thing is that outlives processes: a mark in its name, by which others know that it is left over.

A mark names a process by pid, start time and the namespace in which it has that pid, so a pid that is used
again is not taken for its earlier owner. Of an owner in another pid namespace nothing can be said: it counts
as alive.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["MARK", "is_gone", "is_running", "this_process"]

MARK = r"\d+-\d+-\d+"  # as a regular expression

_NAMESPACE = Path("/proc/self/ns/pid")


def this_process() -> str:
    """The mark of the calling process: "namespace-pid-start"; a forked child has its own."""
    start = _start(os.getpid())
    assert start is not None
    return f"{_NAMESPACE.stat().st_ino}-{os.getpid()}-{start}"


def is_gone(mark: str) -> bool:
    """Whether the owner has ended, waited for or not."""
    match = re.fullmatch(r"(\d+)-(\d+)-(\d+)", mark)
    if match is None:
        return False
    namespace, pid, start = (int(part) for part in match.groups())
    return namespace == _NAMESPACE.stat().st_ino and _start(pid) != start


def is_running(pid: int) -> bool:
    """Whether a process has not ended; one that is not waited for has."""
    return _start(pid) is not None


def _start(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None for one that is over."""
    try:
        # The name, in parentheses, may hold anything; state is the first field after it, the start the 20th.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
