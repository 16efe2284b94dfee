"""This process's sandbox backends by name: each is made once and closed at exit.

A forked child makes its own: sandboxes belong to the process that opened them.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from agentrl.errors import BadConfig, did_you_mean
from agentrl.registry import make_sandbox
from agentrl.sandbox import Backend, Limits
from agentrl.sandboxing.doctor import strongest

__all__ = ["limits_for", "limits_of", "new_backend", "prove_backend", "shared_backend"]


def shared_backend(sandbox: str, limits: Limits) -> Backend:
    """The backend of this name; "auto": the strongest that enforces ``limits`` and every guarantee here.

    Raises BadConfig where there is none, UnknownName for a name that leads nowhere.
    """
    key: Any = (sandbox, limits) if sandbox == "auto" else sandbox
    with _lock:
        if key not in _backends:
            _backends[key] = new_backend(sandbox, limits)
            _backends[key].sweep()
        return _backends[key]


def prove_backend(sandbox: str, limits: Limits) -> None:
    """Open a sandbox and close it. Raises BadConfig, UnknownName and SandboxLost where that can't be done."""
    shared_backend(sandbox, limits).open(limits).close()


def limits_for(sandbox: str, limits: Limits) -> Limits:
    """``limits``, without those of processes and disk where "process" is asked for CPU time without one: for
    trusted code, it can limit neither."""
    if sandbox == "process" and limits.cpu_s is None:
        return replace(limits, pids=None, disk_mib=None)
    return limits


def limits_of(default: Limits, changes: Mapping[str, Any] | None, *, asked_by: str) -> Limits:
    """``default`` with ``changes``, as a configuration gives them; None there: no limit. Raises BadConfig."""
    known = [entry.name for entry in fields(Limits)]
    for name in changes or {}:
        if name not in known:
            raise BadConfig(
                f"{asked_by}(limits=...) has {name!r}{did_you_mean(name, known)}; it takes {', '.join(known)}"
            )
    return replace(default, **(changes or {}))


def new_backend(sandbox: str, limits: Limits) -> Backend:
    """A backend of its own, the caller's to close; named, and raising, as for ``shared_backend``."""
    return strongest(limits) if sandbox == "auto" else make_sandbox(sandbox)


def _close() -> None:
    for backend in _backends.values():
        backend.close()


def _start_anew() -> None:
    global _backends, _lock
    _parents.append(_backends)  # kept: neither closed nor dropped
    _backends, _lock = {}, threading.Lock()


_backends: dict[Any, Backend] = {}
_lock = threading.Lock()
_parents: list[dict[Any, Backend]] = []
atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
