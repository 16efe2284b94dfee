"""One command of a zygote's session, from its fork to its result, and the death of all that it began."""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from agentrl.sandbox import ExecResult, Limits, SandboxLost, Talk
from agentrl.sandboxing.cgroups import Group
from agentrl.sandboxing.inherited import keep, release
from agentrl.sandboxing.pump import Clock, Pipes, Pumped, drive, outcome

__all__ = ["ZygoteRun"]

_MOST_REPORT = 4096  # bytes of an init's last words
_KILL_S = 30.0  # for the kernel to end a run
Fork = Callable[[Sequence[int]], int]


class ZygoteRun:
    """One command from its fork to its result. A context manager; leaving it kills what is left."""

    def __init__(self, group: Group, closing: threading.Event, *, owner: int | None) -> None:
        self._group = group
        self._owner = owner
        self._closing = closing
        self._init = -1  # a pidfd
        self._pipes: list[int] = []  # our ends of stdin, stdout, stderr and status, until drive has them

    def start(self, fork: Fork, argv: Sequence[str], *, entries: Sequence[int]) -> None:
        """Let ``fork`` make its processes, to have these descriptors. Raises SandboxLost."""
        theirs: list[int] = []  # closed here once they are the zygote's
        try:
            command = os.memfd_create("command", os.MFD_CLOEXEC)
            theirs.append(command)
            with open(command, "wb", closefd=False) as file:
                file.write(json.dumps(list(argv)).encode())
            os.lseek(command, 0, os.SEEK_SET)
            for stream in range(4):
                read, write = os.pipe2(os.O_CLOEXEC)
                self._pipes.append(read if stream else write)
                theirs.append(write if stream else read)
                keep(read, write)
                if stream < 3 and self._owner is not None:
                    os.fchown(read, self._owner, self._owner)  # so that it can be opened as /dev/stdin is
            self._init = fork([*theirs, *entries])
        except OSError as error:
            raise SandboxLost(f"a run can't be started: {error}") from error
        finally:
            release(*theirs)
            for descriptor in theirs:
                os.close(descriptor)

    def drive(self, *, stdin: bytes | Talk, limits: Limits) -> Pumped:
        """Until it is over and everything is dead."""
        *streams, status = self._pipes
        self._pipes = [status]
        clock = Clock(exited=status, cpu_s=self._group.cpu_s, kill=self._kill, closing=self._closing)
        return drive(Pipes(*streams), clock, stdin=stdin, limits=limits)

    def result(self, pumped: Pumped, *, queue_ms: float) -> ExecResult:
        """What became of it. Raises SandboxLost where it never began."""
        os.set_blocking(
            self._pipes[0], False
        )  # all that could write is dead, but for a stranger with its end
        said = b""
        with suppress(BlockingIOError):
            said = os.read(self._pipes[0], _MOST_REPORT)
        if said.startswith(b"E"):
            raise SandboxLost(f"a sandbox could not be made: {said[1:].decode(errors='replace')}")
        code = os.waitstatus_to_exitcode(struct.unpack("=i", said[1:])[0]) if said else None
        status, fault = outcome(pumped.end, -signal.SIGKILL if code is None else code)
        if pumped.end != "closed" and self._group.oom_kills():
            status, fault = "memory", "policy"
        elif pumped.end == "exit" and code is None:  # the init is out of its reach
            status, fault = "lost", "world"
        killed = code is None or code < 0
        return ExecResult(
            status=status,
            fault=fault,
            exit_code=code if status in ("ok", "error") and not killed else None,
            signal=(-code if code else signal.SIGKILL) if killed else None,
            stdout=pumped.stdout.data,
            stderr=pumped.stderr.data,
            truncated=pumped.stdout.dropped + pumped.stderr.dropped,
            cpu_ms=self._group.cpu_s() * 1000,
            wall_ms=pumped.wall_s * 1000,
            queue_ms=queue_ms,
            peak_bytes=self._group.peak_bytes(),
            flags=("pids_hit",) if self._group.pids_hit() else (),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            self._kill()
        finally:
            release(*self._pipes)
            for descriptor in (*self._pipes, self._init):
                if descriptor >= 0:
                    os.close(descriptor)

    def _kill(self) -> None:
        """The init, and wait for its end: it comes when no other process of the run is left."""
        if self._init < 0:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._init, signal.SIGKILL)
        poll = select.poll()
        poll.register(self._init, select.POLLIN)
        if not poll.poll(_KILL_S * 1000):
            raise SandboxLost("the processes of a sandbox can't be killed: the kernel holds them")
