"""A Python interpreter that keeps its state between cells, as one long run in a sandbox.

Covered: a deadline for each cell, the sandbox's limits also between cells, output of any size, an interpreter
that ends or lies about what it showed. All of that is the model's fault: what is lost is said in the text,
and the next cell has a new interpreter. A sandbox that goes away raises SandboxLost. Not covered: what stands
in the text, which is whatever the code inside wants it to be.
"""

from __future__ import annotations

import contextlib
import json
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from agentrl.sandbox import Channel, ExecResult, Sandbox, SandboxLost

__all__ = ["Interpreter"]

_START_S = 60.0  # for a python3 to say that it is ready; no code of the model's ran by then
_PING_S = 1.0  # between two looks at an interpreter that waits
_JOIN_S = 5.0  # for the thread of a run that is over
_LOOK_S = 0.5  # between two looks at whether it has ended, which is nearly always told at once
_FRAME_BYTES = 6  # of JSON for a byte of text, at most
_ENDS = {"cpu": "CPU time", "memory": "memory", "wall": "time", "output": "output"}


class Interpreter:
    """One interpreter, begun with the first cell. One cell at a time; ``close`` from any thread."""

    def __init__(self, open_sandbox: Callable[[], Sandbox], *, most_bytes: int) -> None:
        """``open_sandbox`` opens a session without a wall-clock limit; ``most_bytes`` are kept of a text."""
        self._open, self._most = open_sandbox, most_bytes
        self._sandbox: Sandbox | None = None
        self._run: _Run | None = None
        self._lost = ""  # what the next text begins with
        self._closed = False
        self._lock = threading.Lock()

    def run(self, code: str, *, deadline_s: float) -> str:
        """Run a cell and return what it showed: its output, its last value, its error in short.

        Where it took longer than ``deadline_s``, or ended the interpreter, the text says so. Raises
        SandboxLost.
        """
        self.start()
        run = self._run
        assert run is not None
        lost, self._lost = self._lost, ""
        text = run.ask({"code": code, "most": self._most}, deadline_s=deadline_s)
        if text is not None:
            return lost + text
        if not run.ended.is_set():
            self._drop()
            late = f"the cell took longer than {deadline_s:g} s"
            return f"{lost}error: {late}: all variables and files are lost"
        self._run = None
        return f"{lost}error: {_why(run.outcome())}: all variables are lost"

    def start(self) -> None:
        """Begin it where it does not run; ``run`` does as well. Raises SandboxLost."""
        if self._run is not None and self._run.ended.is_set():
            why = _why(self._run.outcome())  # raises where the world ended it
            self._lost += f"before this cell {why}: all variables are lost\n"
            self._run = None
        if self._run is None and self._sandbox is not None and self._begin() is not None:
            self._lost += "no interpreter starts among the files that were left: all files are lost\n"
        if self._run is None and (said := self._begin()) is not None:
            raise SandboxLost(f"python3 did not start in a sandbox within {_START_S:g} s: {said}")

    def _begin(self) -> str | None:
        """Start one, in the sandbox that there is or a fresh one; what it said where it does not start, when
        its sandbox is closed. Raises SandboxLost."""
        if self._sandbox is None:
            self._sandbox = self._opened()
        self._run = _Run(self._sandbox, most_bytes=self._most * _FRAME_BYTES + 1000)
        if self._run.ask(None, deadline_s=_START_S) is not None:
            return None
        ended = self._run.ended.is_set() and self._run.outcome()
        said = ended.stderr[-300:].decode(errors="replace") if ended else ""
        self._drop()
        return said

    def close(self) -> None:
        """End it and its sandbox. Idempotent."""
        with self._lock:
            self._closed = True
        self._drop()

    def _opened(self) -> Sandbox:
        sandbox = self._open()
        with self._lock:
            if not self._closed:
                return sandbox
        sandbox.close()
        raise SandboxLost("this interpreter is closed: make another")

    def _drop(self) -> None:
        with self._lock:
            sandbox, run, self._sandbox, self._run = self._sandbox, self._run, None, None
        if run is not None:
            run.leave()  # first: it is told at once, while a closed sandbox is noticed at the next ping
        if sandbox is not None:
            sandbox.close()
        if run is not None:
            run.join()


@dataclass(slots=True)
class _Asked:
    """A message for the interpreter and its answer; neither is set twice."""

    message: Any  # None: only wait until it is ready
    answered: threading.Event
    text: str | None = None  # None: it ended instead


class _Run:
    """A run of the interpreter, in a thread of its own, since a run may end with the thread that began it."""

    def __init__(self, sandbox: Sandbox, *, most_bytes: int) -> None:
        self._sandbox, self._most = sandbox, most_bytes
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._current: _Asked | None = None
        self._result: ExecResult | BaseException | None = None
        self.ended = threading.Event()
        # A daemon: who forgets to close an environment must still be able to leave the program.
        self._thread = threading.Thread(target=self._drive, name="agentrl-interpreter", daemon=True)
        self._thread.start()

    def ask(self, message: Any, *, deadline_s: float) -> str | None:
        """The text that answers ``message``; None where it ended instead, or is late."""
        asked = _Asked(message, threading.Event())
        self._asked.put(asked)
        until = time.monotonic() + deadline_s
        while not asked.answered.wait(max(min(_LOOK_S, until - time.monotonic()), 0)):
            if self.ended.is_set() or time.monotonic() >= until:
                break
        return asked.text

    def outcome(self) -> ExecResult:
        """How it ended. Raises what the run raised, and SandboxLost."""
        assert self._result is not None
        if isinstance(self._result, BaseException):
            raise self._result
        if self._result.status == "lost":
            raise SandboxLost("the sandbox of an interpreter went away")
        return self._result

    def leave(self) -> None:
        """End the conversation, where the interpreter waits for a cell."""
        self._asked.put(None)

    def join(self) -> None:
        """Wait for its thread, once its sandbox is closed."""
        self._thread.join(_JOIN_S)

    def _drive(self) -> None:
        try:
            self._result = self._sandbox.run(["python3", "-I", "-c", _source()], stdin=self._talk)
        except BaseException as error:  # told to whoever waits, whatever it is
            self._result = error
        finally:
            self.ended.set()
            if self._current is not None:
                self._current.answered.set()

    def _talk(self, channel: Channel) -> None:
        heard = bytearray()
        with contextlib.suppress(_Garbled):
            ready = self._text(channel, heard, number=None)
            while True:
                try:
                    self._current = self._asked.get(timeout=_PING_S)
                except queue.Empty:  # the sandbox looks at its limits while we listen
                    self._current = _Asked({"ping": True}, threading.Event())
                if self._current is None:
                    return
                if self._current.message is None:
                    text = ready
                else:
                    number = secrets.token_hex(8)
                    body = json.dumps({**self._current.message, "number": number}).encode()
                    channel.send(len(body).to_bytes(4, "big") + body)
                    text = self._text(channel, heard, number=number)
                self._current.text = text
                self._current.answered.set()

    def _text(self, channel: Channel, heard: bytearray, *, number: str | None) -> str:
        """The text of the next frame, which answers ``number``. Raises Gone; _Garbled for anything else."""
        size = int.from_bytes(_take(channel, heard, 4), "big")
        if size > self._most:
            raise _Garbled
        try:
            frame = json.loads(_take(channel, heard, size))
            text, answered = frame["text"], frame["number"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _Garbled from None
        if type(text) is not str or answered != number:
            raise _Garbled
        return text


class _Garbled(Exception):
    """What was heard is no answer: something inside speaks for the interpreter."""


def _take(channel: Channel, heard: bytearray, size: int) -> bytes:
    while len(heard) < size:
        heard += channel.receive(1 << 16)
    data = bytes(heard[:size])
    del heard[:size]
    return data


def _why(result: ExecResult) -> str:
    if result.status in _ENDS:
        return f"the interpreter was ended at its limit of {_ENDS[result.status]}"
    if result.status == "signal":
        return f"the interpreter was ended by signal {result.signal}"
    if result.status == "ok":
        return "the interpreter was ended"
    return f"the interpreter ended with exit code {result.exit_code}"


@cache
def _source() -> str:
    return Path(__file__).with_name("interpreter_process.py").read_text(encoding="utf-8")
