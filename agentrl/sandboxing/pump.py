"""What goes in and out of a running command over three pipes, until it ends or goes over a limit.

Covered: stdin written while output is read (no deadlock, whatever is read first or never), head and tail of
each output kept and the rest counted, the wall clock, the CPU clock as its backend reads it, an interrupt by
``close``. Not covered: killing (the backend's), what remains in a pipe that somebody else still holds.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from agentrl.sandbox import ExecResult, Fault, Gone, Limits, Status, Talk
from agentrl.sandboxing.inherited import keep, release

__all__ = ["Clock", "Kept", "Pipes", "Pumped", "drive", "outcome", "refused"]

# hangup: a talk's other end closed its pipe and lived on, so that it was killed.
End = Literal["exit", "cpu", "wall", "output", "closed", "talked", "hangup"]

_READ_BYTES = 1 << 16
_LOOK_S = 0.02  # between two looks at the CPU clock
_FLOOD = 16  # times what is kept of an output: more ends the command
_MOST_UNHEARD = 64 << 20  # bytes said to a talk that does not listen, because it still speaks
_DRAIN_S = 1.0  # after the end, for what is still in the pipes


@dataclass(slots=True)
class Kept:
    """The head and the tail of an output, at most ``most`` bytes together; the rest is counted."""

    most: int  # bytes; 0: all of it
    head: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)
    seen: int = 0

    def add(self, data: bytes) -> None:
        """Take what was read."""
        self.seen += len(data)
        if not self.most:
            self.head += data
            return
        room = self.most - self.most // 2 - len(self.head)
        self.head += data[:room]
        self.tail += data[max(room, 0) :]
        if len(self.tail) > self.most // 2 + _READ_BYTES:
            del self.tail[: len(self.tail) - self.most // 2]

    @property
    def data(self) -> bytes:
        """What is kept."""
        half = self.most // 2
        return bytes(self.head) + bytes(self.tail[max(len(self.tail) - half, 0) :] if self.most else b"")

    @property
    def dropped(self) -> int:
        """Bytes that are not."""
        return self.seen - len(self.data)

    @property
    def is_flood(self) -> bool:
        """Whether it is so much that the command is not worth its time."""
        return bool(self.most) and self.seen > self.most * _FLOOD


@dataclass(frozen=True, slots=True)
class Pipes:
    """Our ends; closed by ``drive``."""

    stdin: int
    stdout: int
    stderr: int


@dataclass(frozen=True, slots=True)
class Clock:
    """How a backend tells what goes on."""

    exited: int  # a descriptor that becomes readable when the command's first process ends: a pidfd
    cpu_s: Callable[[], float]  # used by all its processes until now
    kill: Callable[[], None]  # all of them, from outside; called once the command is over, whatever ended it
    closing: threading.Event  # set, with a look at least every 20 ms: somebody wants it over


@dataclass(frozen=True, slots=True)
class Pumped:
    """What came out, and what ended it."""

    stdout: Kept
    stderr: Kept
    end: End
    wall_s: float  # until the first process ended, or was told to


def drive(pipes: Pipes, clock: Clock, *, stdin: bytes | Talk, limits: Limits) -> Pumped:
    """Feed and read a command until it is over, then have it killed and drain what is left."""
    pump = _Pump(pipes, clock, limits, stdin if isinstance(stdin, bytes) else None)
    end: End = "exit"
    try:
        if isinstance(stdin, bytes):
            while True:
                pump.turn()
        else:
            stdin(pump)
            end = "talked" if pump.over in (None, "exit") else pump.over  # also where it put up with Gone
    except _Over as over:
        end = over.end
    except Gone:
        end = pump.over or pump.part()
    finally:
        wall_s = time.monotonic() - pump.began
        try:
            clock.kill()
        finally:
            pump.drain()
    return Pumped(pump.stdout, pump.stderr, end, wall_s)


def outcome(end: End, code: int) -> tuple[Status, Fault]:
    """Status and fault of a command that ended so, with an exit code or minus the signal that killed it.

    A backend looks first whether memory ran out, or somebody outside killed it.
    """
    if end == "closed":
        return "lost", "world"
    if end in ("cpu", "wall", "output"):
        return end, "policy"
    if end == "talked" or code == 0:  # the talk was done with it, so it was killed
        return "ok", "none"
    if code == -signal.SIGXCPU:
        return "cpu", "policy"
    return ("signal" if code < 0 else "error"), "policy"


def overfull() -> ExecResult:
    """Of a command for which the files that are there leave no memory: they are the policy's."""
    return ExecResult(status="memory", fault="policy", stderr=b"the files are larger than memory_mib\n")


def refused(why: str, *, exit_code: int = 126) -> ExecResult:
    """Of a command that could not be run for what the policy's code has done or asked for."""
    return ExecResult(
        status="error", fault="policy", exit_code=exit_code, stderr=why.encode(errors="replace")
    )


class _Over(Exception):
    def __init__(self, end: End) -> None:
        self.end = end


class _Pump:
    """The pipes under one poll; also the channel of a talk."""

    def __init__(self, pipes: Pipes, clock: Clock, limits: Limits, stdin: bytes | None) -> None:
        self.began = time.monotonic()
        self.over: End | None = None
        most = (limits.output_kib or 0) * 1024
        most = max(int(most), 2) if limits.output_kib is not None else 0
        self.stdout, self.stderr = Kept(most), Kept(most)
        self._clock = clock
        self._until = self.began + limits.wall_s if limits.wall_s is not None else None
        self._cpu_s = limits.cpu_s
        self._looked = self.began
        self._talks = stdin is None
        self._input = memoryview(stdin or b"")
        self._heard = bytearray()  # by the talk
        self._open = {pipes.stdin, pipes.stdout, pipes.stderr}
        self._pipes = pipes
        self._poll = select.poll()
        keep(*self._open)
        for descriptor in self._open:
            os.set_blocking(descriptor, False)
        self._poll.register(pipes.stdout, select.POLLIN)
        self._poll.register(pipes.stderr, select.POLLIN)
        self._poll.register(clock.exited, select.POLLIN)
        if self._input:
            self._poll.register(pipes.stdin, select.POLLOUT)
        elif not self._talks:
            self._shut(pipes.stdin)

    # -- the channel --

    def send(self, data: bytes) -> None:
        """Write all of ``data`` while reading what comes. Raises Gone."""
        if self._pipes.stdin not in self._open:
            raise Gone
        self._input = memoryview(data)
        self._poll.register(self._pipes.stdin, select.POLLOUT)
        try:
            self._write()  # most of the time there is room
            while self._input:
                self._turn_or_gone()
                if self.over:  # it ended: what it said last can be heard, and nobody reads any more
                    raise Gone
        finally:
            if self._pipes.stdin in self._open:
                self._poll.unregister(self._pipes.stdin)

    def receive(self, most: int) -> bytes:
        """What was said, at least one byte. Raises Gone."""
        while not self._heard:
            if self._pipes.stdout not in self._open:
                raise Gone
            self._turn_or_gone()
        data = bytes(self._heard[:most])
        del self._heard[:most]
        return data

    def part(self) -> End:
        """What ends a command that closed its pipe: often its exit, which is a moment away."""
        until = time.monotonic() + _DRAIN_S
        try:
            while time.monotonic() < until:
                self.turn()
        except _Over as over:
            return over.end
        return "hangup"

    def _turn_or_gone(self) -> None:
        try:
            self.turn()
        except _Over as over:
            self.over = over.end
            if not (over.end == "exit" and self._rest()):
                raise Gone from None
        if self._pipes.stdin not in self._open and self._input:
            raise Gone

    def _rest(self) -> bool:
        """Whether something is left to hear of a command that has ended."""
        self._read(self._pipes.stdout, wait=False)
        return bool(self._heard)

    # -- the poll --

    def turn(self) -> None:
        """Wait for something to do and do it. Raises _Over."""
        for descriptor, _ in self._poll.poll(self._patience_s() * 1000):
            if descriptor == self._clock.exited:
                raise _Over("exit")
            if descriptor == self._pipes.stdin:
                self._write()
            else:
                self._read(descriptor)
        self._look()

    def _patience_s(self) -> float:
        if self._until is None:
            return _LOOK_S
        return max(min(_LOOK_S, self._until - time.monotonic()), 0)

    def _look(self) -> None:
        if self.stdout.is_flood or self.stderr.is_flood or len(self._heard) > _MOST_UNHEARD:
            raise _Over("output")
        now = time.monotonic()
        if self._until is not None and now >= self._until:
            raise _Over("wall")
        if now - self._looked < _LOOK_S / 2:
            return
        self._looked = now
        if self._clock.closing.is_set():
            raise _Over("closed")
        if self._cpu_s is not None and self._clock.cpu_s() >= self._cpu_s:
            raise _Over("cpu")

    def _write(self) -> None:
        try:
            self._input = self._input[os.write(self._pipes.stdin, self._input) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # not read to its end: its own business
            self._shut(self._pipes.stdin)
            return
        if not self._input and not self._talks:
            self._shut(self._pipes.stdin)

    def _read(self, descriptor: int, *, wait: bool = True) -> bool:
        """Take what is there; whether there was anything."""
        if descriptor not in self._open:
            return False
        try:
            data = os.read(descriptor, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            if wait:
                self._shut(descriptor)
            return False
        if descriptor == self._pipes.stderr:
            self.stderr.add(data)
        elif self._talks:
            self._heard += data
        else:
            self.stdout.add(data)
        return True

    def _shut(self, descriptor: int) -> None:
        self._open.discard(descriptor)
        with contextlib.suppress(KeyError):
            self._poll.unregister(descriptor)
        release(descriptor)
        os.close(descriptor)

    def drain(self) -> None:
        """Read what is left in the pipes of what is dead, and close them."""
        until = time.monotonic() + _DRAIN_S
        for descriptor in (self._pipes.stdout, self._pipes.stderr):
            while time.monotonic() < until and not (self.stdout.is_flood or self.stderr.is_flood):
                if not self._read(descriptor):
                    break
        for descriptor in list(self._open):
            self._shut(descriptor)
