"""The host's end of a container's first process: its frames over the engine's attach stream, under one poll.

Covered: what ``agentrl.sandboxing.pump`` covers for pipes (input written while output is read, head and tail
kept, the clocks, an interrupt by ``close``), with at most a window of input under way, so that a command that
reads nothing holds up no order to kill it; and files in and out. Not covered: a first process that does not
answer, or a stream that breaks. Both raise LinkLost or leave ``is_dead`` False, and the container must be
killed from outside.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from agentrl.sandbox import Gone, Limits, Talk
from agentrl.sandboxing import container_process as first
from agentrl.sandboxing.pump import End, Kept, Pumped

__all__ = ["Conversation", "Link", "LinkClock", "LinkLost"]

_LOOK_S = 0.02  # between two looks at the clocks
_WINDOW = 1 << 19  # bytes of input under way to a command that has not taken them
_READ_BYTES = 1 << 16
_READS = 16  # at most, before what was read is looked at
_MOST_FRAME = 1 << 20  # bytes; the first process sends none so long
_MOST_COMPLAINT = 2000  # bytes of what the first process itself printed on its stderr
_STREAM = struct.Struct(">BxxxI")  # the engine's header of a piece of stdout (1) or stderr (2)
_FLOOD = 16  # times what is kept of an output, as in agentrl.sandboxing.pump
_PART_S = 1.0
_KILL_S = 5.0  # for the first process to say that all others are dead

Frame = tuple[bytes, bytes]  # kind, data


class LinkLost(Exception):
    """The stream broke off or the first process does not answer: the container is dead, or must be killed."""


class Link:
    """Frames to and from one container. For one thread at a time."""

    def __init__(self, stream: socket.socket, *, owner: object = None) -> None:
        stream.setblocking(False)
        self.complaint = b""  # the last of what the first process printed on its own stderr
        self.is_torn = False  # an exception came between: what is heard next may answer another question
        self._socket = stream
        self._owner = owner  # what would close the stream if it were collected
        self._unsent = bytearray()
        self._raw = bytearray()  # in the engine's headers
        self._framed = bytearray()  # out of them
        self._frames: deque[Frame] = deque()
        self._poll = select.poll()
        self._poll.register(stream, select.POLLIN)

    @property
    def is_sent(self) -> bool:
        """Whether the kernel has taken all that was posted."""
        return not self._unsent

    def post(self, kind: bytes, data: bytes | memoryview = b"") -> None:
        """Send a frame, as far as there is room now; ``wait`` sends the rest. Raises LinkLost."""
        with self._whole():
            self._unsent += first.HEADER.pack(kind, len(data))
            self._unsent += data
            self._flush()

    def take(self) -> Frame | None:
        """The next frame that has come."""
        return self._frames.popleft() if self._frames else None

    def wait(self, patience_s: float) -> None:
        """Until something has come, at most so long. Raises LinkLost where nothing can come any more."""
        if self._frames:
            return
        events = select.POLLIN | (select.POLLOUT if self._unsent else 0)
        self._poll.modify(self._socket, events)
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            pass  # read from the network already, so that no poll tells of it
        elif not self._poll.poll(max(patience_s, 0) * 1000):
            return
        with self._whole():
            self._flush()
            self._receive()

    def hear(self, kinds: Sequence[bytes], *, within_s: float) -> Frame:
        """The next frame, which is one of ``kinds``. Raises LinkLost, also where it takes too long."""
        until = time.monotonic() + within_s
        while (frame := self.take()) is None:
            if time.monotonic() >= until:
                raise LinkLost(f"the container's first process did not answer in {within_s:g} s")
            self.wait(until - time.monotonic())
        if frame[0] not in kinds:
            raise LinkLost(f"the container's first process said {frame[0]!r}, not one of {kinds!r}")
        return frame

    def read(self, path: str, *, most_bytes: int, within_s: float) -> bytes:
        """A file's content. Raises OSError and LinkLost."""
        wanted, data = json.dumps([path, most_bytes]).encode(), bytearray()
        with self._whole():
            self.post(first.READ, wanted)
            while True:
                kind, more = self.hear((first.DATA, first.DONE, first.FAILED), within_s=within_s)
                if kind != first.DATA:
                    break
                data += more
                if len(data) > most_bytes:
                    raise LinkLost("the container's first process sent more than it was asked for")
        if kind == first.FAILED:
            raise _failure(more, path)
        return bytes(data)

    def write(self, path: str, data: bytes, *, within_s: float) -> None:
        """Write a file. Raises OSError and LinkLost."""
        until = time.monotonic() + within_s
        name, content = path.encode(), memoryview(data)
        with self._whole():
            self.post(first.WRITE, name)
            for start in range(0, len(content), first.CHUNK):
                self.post(first.INPUT, content[start : start + first.CHUNK])
                while not self.is_sent and not self._frames:
                    if time.monotonic() >= until:
                        raise LinkLost(f"the container's first process took no file in {within_s:g} s")
                    self.wait(until - time.monotonic())
            self.post(first.END)
            kind, more = self.hear((first.DONE, first.FAILED), within_s=within_s)
        if kind == first.FAILED:
            raise _failure(more, path)

    def is_fresh(self) -> bool:
        """Whether it still stands, and nothing has come since the first process was ready."""
        return not self._frames and not self._poll.poll(0)

    def close(self) -> None:
        """Hang up; the first process ends, and with it the container."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if isinstance(self._owner, io.IOBase):
            self._owner.close()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Tears the link where anything but LinkLost comes out, as from a signal's handler."""
        was_torn, self.is_torn = self.is_torn, True
        try:
            yield
        except LinkLost:
            self.is_torn = was_torn
            raise
        self.is_torn = was_torn

    def _flush(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError as error:
            raise LinkLost(f"the engine's stream broke off: {error}") from error

    def _receive(self) -> None:
        for _ in range(_READS):
            try:
                data = self._socket.recv(_READ_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            except OSError as error:
                raise LinkLost(f"the engine's stream broke off: {error}") from error
            if not data:
                if self._frames:  # what came before is heard first
                    break
                raise LinkLost("the engine's stream ended")
            self._raw += data
            self._parse()

    def _parse(self) -> None:
        while len(self._raw) >= _STREAM.size:
            stream, size = _STREAM.unpack_from(self._raw)
            if len(self._raw) < _STREAM.size + size:
                break
            piece = self._raw[_STREAM.size : _STREAM.size + size]
            del self._raw[: _STREAM.size + size]
            if stream == 1:
                self._framed += piece
            else:
                self.complaint = (self.complaint + piece)[-_MOST_COMPLAINT:]
        while len(self._framed) >= first.HEADER.size:
            kind, size = first.HEADER.unpack_from(self._framed)
            if size > _MOST_FRAME:
                raise LinkLost(f"the container's first process sent a frame of {size} bytes")
            if len(self._framed) < first.HEADER.size + size:
                break
            self._frames.append((kind, bytes(self._framed[first.HEADER.size : first.HEADER.size + size])))
            del self._framed[: first.HEADER.size + size]


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)


def _failure(data: bytes, path: str) -> OSError:
    return OSError(_number(data), os.strerror(_number(data)), path)


@dataclass(frozen=True, slots=True)
class LinkClock:
    """What ends a command from outside."""

    cpu_s: Callable[[], float]  # used by all its processes until now
    closing: threading.Event  # set, with a look at least every 20 ms: somebody wants it over


class _Over(Exception):
    def __init__(self, end: End) -> None:
        self.end = end


class Conversation:
    """One command over a link; also the channel of its talk.

    ``hold`` runs it, ``finish`` has all its processes killed: call it whatever became of ``hold``.
    """

    def __init__(self, link: Link, clock: LinkClock, limits: Limits) -> None:
        most = max(int(limits.output_kib * 1024), 2) if limits.output_kib is not None else 0
        self.stdout, self.stderr = Kept(most), Kept(most)
        self.began = 0.0  # on the monotonic clock, when the command was started; 0.0: it was not
        self.exit_code: int | None = None  # or minus the signal; None where it did not end by itself
        self.cpu_s = 0.0  # when it was last looked at
        self.is_dead = False  # the first process said that no other is left
        self.lost: LinkLost | None = None
        self._link, self._clock, self._limits = link, clock, limits
        self._end: End | None = None
        self._wall_s = 0.0
        self._looked = 0.0
        self._talks = False
        self._heard = bytearray()  # by the talk
        self._input = memoryview(b"")
        self._under_way = 0  # bytes of input
        self._is_shut = False  # its stdin
        self._is_silent = False  # its stdout is at its end

    @property
    def pumped(self) -> Pumped:
        """What came out, and what ended it."""
        return Pumped(self.stdout, self.stderr, self._end or "exit", self._wall_s)

    def hold(self, argv: Sequence[str], *, stdin: bytes | Talk, within_s: float) -> None:
        """Start the command, at most ``within_s`` from now, and feed and hear it until it is over."""
        self._talks = not isinstance(stdin, bytes)
        try:
            self._link.post(first.RUN, json.dumps(list(argv)).encode())
            self._link.hear((first.STARTED,), within_s=within_s)
            self.began = self._looked = time.monotonic()
            if isinstance(stdin, bytes):
                self._say_all(stdin)
            else:
                stdin(self)
                if self._end in (None, "exit"):  # not where it took a limit for an end
                    self._end = "talked"
        except LinkLost as lost:
            self.lost = lost
        except _Over as over:
            self._end = over.end
        except Gone:
            self._part()
        finally:
            self._wall_s = time.monotonic() - self.began if self.began else 0.0

    def finish(self) -> None:
        """Have everything killed and hear the last of it, where there is a link for that."""
        if self.lost is not None or self._link.is_torn:
            return
        until = time.monotonic() + _KILL_S
        try:
            self._link.post(first.KILL)
            while not self.is_dead and time.monotonic() < until:
                self._link.wait(until - time.monotonic())
                self._take_all()
        except LinkLost as lost:
            self.lost = lost

    def _say_all(self, data: bytes) -> None:
        self._input = memoryview(data)
        is_ended = False
        while True:
            self._push()
            if not self._input and not is_ended and not self._is_shut:
                self._link.post(first.END)
                is_ended = True
            self._turn()

    # -- the channel --

    def send(self, data: bytes) -> None:
        """Write all of ``data`` while reading what comes. Raises Gone."""
        self._input = memoryview(data)
        self._push()
        while self._input or not self._link.is_sent:
            self._turn_or_gone()
            self._push()

    def receive(self, most: int) -> bytes:
        """What was said, at least one byte. Raises Gone."""
        while not self._heard:
            if self._is_silent:
                raise Gone
            self._turn_or_gone(is_hearing=True)
        data = bytes(self._heard[:most])
        del self._heard[:most]
        return data

    def _turn_or_gone(self, *, is_hearing: bool = False) -> None:
        try:
            self._turn()
        except LinkLost as lost:
            self.lost = lost
            raise Gone from None
        except _Over as over:
            self._end = over.end
            if not (is_hearing and over.end == "exit" and self._heard):  # its last words
                raise Gone from None
        if self._is_shut and self._input:
            raise Gone

    def _part(self) -> None:
        """Wait for the exit of a command that closed its pipe: often it is a moment away."""
        until = time.monotonic() + _PART_S
        try:
            while self._end is None and self.lost is None and time.monotonic() < until:
                self._turn()
        except LinkLost as lost:
            self.lost = lost
        except _Over as over:
            self._end = over.end

    # -- the poll --

    def _push(self) -> None:
        """Send of the input what the window has room for."""
        if self._is_shut and not self._talks:
            self._input = memoryview(b"")
        while self._input and self._under_way < _WINDOW and self._link.is_sent and not self._is_shut:
            piece = self._input[: min(_WINDOW - self._under_way, first.CHUNK)]
            self._link.post(first.INPUT, piece)
            self._under_way += len(piece)
            self._input = self._input[len(piece) :]

    def _turn(self) -> None:
        """Wait for something to do and do it. Raises _Over and LinkLost."""
        self._link.wait(self._patience_s())
        self._take_all()
        if self.stdout.is_flood or self.stderr.is_flood or self._is_unheard_flood():
            raise _Over("output")
        if self.exit_code is not None:
            raise _Over("exit")
        now = time.monotonic()
        if self._limits.wall_s is not None and now >= self.began + self._limits.wall_s:
            raise _Over("wall")
        if now - self._looked < _LOOK_S / 2:
            return
        self._looked = now
        if self._clock.closing.is_set():
            raise _Over("closed")
        self.cpu_s = max(self._clock.cpu_s(), self.cpu_s)
        if self._limits.cpu_s is not None and self.cpu_s >= self._limits.cpu_s:
            raise _Over("cpu")

    def _is_unheard_flood(self) -> bool:
        """Whether it prints without end to a talk that does not listen."""
        return bool(self.stdout.most) and len(self._heard) > max(self.stdout.most * _FLOOD, _WINDOW)

    def _patience_s(self) -> float:
        if self._limits.wall_s is None:
            return _LOOK_S
        return min(_LOOK_S, self.began + self._limits.wall_s - time.monotonic())

    def _take_all(self) -> None:
        while (frame := self._link.take()) is not None:
            kind, data = frame
            if kind == first.OUT and not data:
                self._is_silent = True
            elif kind == first.OUT and not self._talks:
                self.stdout.add(data)
            elif kind == first.OUT:
                self._heard += data
            elif kind == first.ERR:
                self.stderr.add(data)
            elif kind == first.TOOK:
                self._under_way -= _number(data)
            elif kind == first.SHUT:
                self._is_shut = True
            elif kind == first.EXIT:
                self.exit_code = _number(data)
            elif kind == first.DEAD:
                self.is_dead = True
