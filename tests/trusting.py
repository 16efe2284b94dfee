"""Sandbox backends for tests that are not about sandboxes: named as ``sandbox="trusting:Trusting"``."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from agentrl.registry import make_sandbox
from agentrl.sandbox import GUARANTEES, LIMITS, ExecResult, Limits, Sandbox, SandboxLost, Survey, Talk

__all__ = ["Losing", "Trusting"]


class Trusting:
    """Plain processes under a name that claims all: for code that the tests wrote themselves."""

    name = "trusting"
    opened: ClassVar[deque[Sandbox]] = deque(maxlen=4)  # the last ones, by all of this class
    lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self._inner = make_sandbox("process")

    def survey(self) -> Survey:
        """Nothing of it is true."""
        return Survey(available=True, enforced=dict.fromkeys((*LIMITS, *GUARANTEES), "trust"))

    def open(self, limits: Limits) -> Sandbox:
        """A session of the process backend."""
        session = _Trusted(self._inner.open(_trusted(limits)))
        with self.lock:
            self.opened.append(session)
        return session

    def sweep(self) -> int:
        """Nothing is left behind."""
        return 0

    def close(self) -> None:
        """Close every session."""
        self._inner.close()


class Losing(Trusting):
    """Loses the sandboxes whose numbers, from 0, ``loses`` says yes to."""

    name = "losing"
    count: ClassVar[int] = 0
    loses: ClassVar[Any] = staticmethod(lambda number: True)

    def open(self, limits: Limits) -> Sandbox:
        """A session, or SandboxLost."""
        with self.lock:
            number = Losing.count
            Losing.count += 1
        if Losing.loses(number):
            raise SandboxLost(f"sandbox {number} fell over")
        return super().open(limits)


class _Trusted:
    """A session whose limits are lowered to what a process can."""

    def __init__(self, inner: Sandbox) -> None:
        self._inner = inner

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | Talk = b"",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
    ) -> ExecResult:
        lower = _trusted(limits) if limits is not None else None
        return self._inner.run(argv, stdin=stdin, files=files, limits=lower)

    def read(self, path: str, *, most_bytes: int = 1 << 20) -> bytes:
        return self._inner.read(path, most_bytes=most_bytes)

    def write(self, path: str, data: bytes) -> None:
        self._inner.write(path, data)

    def close(self) -> None:
        self._inner.close()


def _trusted(limits: Limits) -> Limits:
    return replace(limits, cpu_s=None, memory_mib=None, pids=None, disk_mib=None, network=True)
