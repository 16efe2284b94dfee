"""The inside of a solution's sandbox: it loads a program and answers calls of one function of it.

Messages are frames of ``agentrl.judging.plain``. The judge sends ``["load", setup, solution, entry_point]``
and gets ``["ready"]``, ``["syntax", text]``, ``["raised", builtin name, text]``, ``["missing"]`` or, where
it is the setup that can't be run, ``["setup", text]``; then
``["calls", [[number, args, kwargs], ...], in place]`` and gets one reply for each call, in order:
``[number, "value", tree]`` (where in place, followed by the positional arguments as they are now),
``[number, "unplain", type's name]`` or ``[number, "raised", builtin name, text]``.

It knows no expected value and no test. A solution that takes these descriptors over can say what it could
have returned as well, and nothing else. It claims them before the solution's code is loaded; what the
solution prints goes to stderr, and its stdin is empty. Standard library only and Python 3.8: it is sent as
source.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from agentrl.judging.plain import HEADER_BYTES, MOST_BYTES, NotPlain, decode, encode, frame, frame_size

__all__ = ["Pipes", "builtin_name", "claim_pipes", "load", "serve", "text_of"]

_MOST_TEXT = 300  # characters of an exception's text


class Pipes:
    """The judge's two pipes, away from descriptors 0 and 1, which now lead to nowhere and to stderr."""

    def __init__(self, requests: BinaryIO, replies: int) -> None:
        self._requests, self._replies = requests, replies
        self._loads, self._write = json.loads, os.write  # before anybody can replace them

    def receive(self) -> Any:
        """The next message; ends the process where there is none."""
        header = self._requests.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            os._exit(0)
        return self._loads(self._requests.read(frame_size(header)))

    def close(self) -> None:
        """In a child that has no business with the judge."""
        self._requests.close()
        os.close(self._replies)

    def send(self, message: Any) -> None:
        """Write one message."""
        data = frame(message)
        while data:
            data = data[self._write(self._replies, data) :]


def claim_pipes() -> Pipes:
    """Take descriptors 0 and 1 for the protocol."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)
    cast(Any, sys.stdout).reconfigure(line_buffering=True)  # its process is killed, not ended
    return Pipes(requests, replies)


def serve() -> None:
    """Load what the judge sends and answer its calls until it goes away."""
    pipes = claim_pipes()
    _, setup, solution, entry_point = pipes.receive()
    function, problem = load(setup, solution, entry_point)
    pipes.send(problem or ["ready"])
    if problem:
        os._exit(0)
    while True:
        _, calls, in_place = pipes.receive()
        for number, arguments, named in calls:
            reply = _answer(function, arguments, named, in_place)
            data = [number, *reply]
            pipes.send(data if _fits(data) else [number, "unplain", "something too large"])


def _fits(message: Any) -> bool:
    # A guess from below would do: the judge refuses what is larger.
    return len(message) < 3 or type(message[2]) not in (str, list, dict) or len(frame(message)) <= MOST_BYTES


def load(setup: str, solution: str, entry_point: str) -> tuple[Any, list[Any]]:
    """The entry point of a program that was run as a module, and what went wrong in the words of a reply."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses and typing look their module up
    try:
        exec(compile(setup, "setup.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        return None, ["setup", f"{type(error).__name__}: {text_of(error)}"]
    try:
        code = compile(solution, "solution.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError) as error:  # ValueError: a NUL in it
        return None, ["syntax", text_of(error)]
    except BaseException as error:
        return None, ["raised", builtin_name(error), text_of(error)]
    try:
        exec(code, module.__dict__)
        function = module.__dict__.get(entry_point)
    except BaseException as error:
        return None, ["raised", builtin_name(error), text_of(error)]
    return function, ([] if callable(function) else ["missing"])


def _answer(function: Callable[..., Any], arguments: Any, named: Any, in_place: bool) -> list[Any]:
    try:
        given, keywords = decode(arguments), decode(named)
        value = function(*given, **keywords)
        return ["value", encode(value), *([encode(given)] if in_place else [])]
    except NotPlain as error:
        return ["unplain", error.name]
    except BaseException as error:
        return ["raised", builtin_name(error), text_of(error)]


def builtin_name(error: BaseException) -> str:
    """The name of the nearest builtin exception that ``error`` is one of."""
    for kind in type(error).__mro__:
        if builtins.__dict__.get(kind.__name__) is kind:
            return str(kind.__name__)
    return "Exception"


def text_of(error: BaseException) -> str:
    """What ``error`` says, shortened; its own code may run and fail."""
    try:
        return str(error)[:_MOST_TEXT]
    except BaseException:
        return ""
