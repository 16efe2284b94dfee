"""The inside of the judge's own sandbox: it runs the text of assertions, with a stub for the solution.

Messages are frames of ``agentrl.judging.plain``. The judge sends ``["load", setup, entry_point]`` and gets
``["ready"]`` or ``["raised", name, text]``; then ``["test", number, code, in place]``. While a test runs,
each call of the stub is ``["call", args, kwargs]``, answered with ``["value", tree, ...]``,
``["raised", name, text]`` or ``["unplain", name]``. A test ends with ``["done", number, outcome, text]``, its
outcome one of passed, failed (an assertion), raised (something else), theirs (what the solution raised),
unplain (the solution returned something else than plain data, or so much of it that the test can't hand it
back), objects (the test hands the solution something else than plain data) and broken (the test is no Python,
or imports a module that is not there).

Standard library only and Python 3.8: it is sent as source.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import sys
import types
from typing import Any

from agentrl.judging.plain import NotPlain, TooMuch, decode, encode
from agentrl.judging.solution_process import Pipes, claim_pipes, load, text_of

__all__ = ["serve", "serve_shared"]

# What a test may not mistake for its own flow: map() ends at a StopIteration and all() is then content.
_NOT_RAISED = ("StopIteration", "StopAsyncIteration", "GeneratorExit", "SystemExit", "KeyboardInterrupt")


class _Unplain(BaseException):
    """The solution returned something else than plain data; no test is to catch it."""


class _Objects(BaseException):
    """A test handed something else than plain data over; no test is to catch it."""


class _Stub:
    """The solution's entry point, at a distance."""

    def __init__(self, pipes: Pipes) -> None:
        self._pipes = pipes
        self.in_place = False
        self.raised: list[BaseException] = []  # on the solution's behalf, in this test
        self.fatal = ""  # outcome that stands whatever the test catches

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            call = ["call", encode(list(args)), encode(kwargs)]
        except TooMuch as error:  # what the solution returned may be in it
            self.fatal = "unplain"
            raise _Unplain(error.name) from None
        except NotPlain as error:
            self.fatal = "objects"
            raise _Objects(error.name) from None
        self._pipes.send(call)
        kind, *rest = self._pipes.receive()
        if kind == "unplain":
            self.fatal = "unplain"
            raise _Unplain(rest[0])
        if kind == "raised":
            self.raised.append(_exception(*rest))
            raise self.raised[-1]
        if self.in_place:
            _update(list(args), decode(rest[1]))
        return decode(rest[0])


def _exception(name: str, text: str) -> BaseException:
    kind = builtins.__dict__.get(name, Exception)
    if name in _NOT_RAISED or not (isinstance(kind, type) and issubclass(kind, Exception)):
        return RuntimeError(name)
    bases = [base for base in kind.__mro__ if issubclass(base, Exception)]
    for base in bases:  # UnicodeDecodeError wants five arguments; its base, ValueError, takes a text
        with contextlib.suppress(TypeError):
            return base(text)
    return RuntimeError(name)


def _update(given: list[Any], now: list[Any]) -> None:
    """Make what is mutable in ``given`` what it has become."""
    for before, after in zip(given, now):  # noqa: B905 (Python 3.8 has no strict)
        if type(before) is not type(after):
            continue
        if type(before) is list:
            before[:] = after
        elif type(before) in (dict, set):
            before.clear()
            before.update(after)


def serve() -> None:
    """Run the judge's tests until it goes away."""
    pipes = claim_pipes()
    _, setup, entry_point = pipes.receive()
    stub = _Stub(pipes)
    names = types.ModuleType("tests").__dict__
    try:
        exec(compile(setup, "setup.py", "exec", dont_inherit=True), names)
    except BaseException as error:
        pipes.send(["raised", type(error).__name__, text_of(error)])
        return
    names.update({entry_point: stub, "candidate": stub})
    pipes.send(["ready"])
    while True:
        _, number, code, stub.in_place = pipes.receive()
        stub.raised, stub.fatal = [], ""
        outcome, text = _run(code, dict(names), stub.raised)
        pipes.send(["done", number, stub.fatal or outcome, text])


def serve_shared() -> None:
    """Run tests in the solution's own process: what either can do, the other can undo.

    The messages are those of ``agentrl.judging.solution_process``, and of each test
    ``["test", number, code, nonce]`` and ``["done", number, outcome, text, nonce]``.
    """
    pipes = claim_pipes()
    receive, send, run = pipes.receive, pipes.send, _run
    _, setup, solution, entry_point = receive()
    function, problem = load(setup, solution, entry_point)
    send(problem or ["ready"])
    while not problem:
        _, number, code, nonce = receive()
        names = dict(vars(sys.modules["solution"]), candidate=function)
        outcome, text = run(code, names, [])
        send(["done", number, outcome, text, nonce])


def _run(code: str, names: dict[str, Any], theirs: list[BaseException]) -> tuple[str, str]:
    """The outcome of a test and what it said; ``theirs``: what was raised on the solution's behalf."""
    try:
        program = compile(code, "test.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        return "broken", f"{type(error).__name__}: {text_of(error)}"
    try:
        exec(program, names)
    except BaseException as error:
        is_theirs = any(error is raised for raised in theirs)
        outcome = "theirs" if is_theirs else "failed" if isinstance(error, AssertionError) else "raised"
        if isinstance(error, (_Objects, _Unplain)):
            return outcome, text_of(error)
        if outcome == "raised" and isinstance(error, ModuleNotFoundError) and error.name in _imported(code):
            outcome = "broken"
        return outcome, f"{type(error).__name__}: {text_of(error)}".rstrip(": ")
    return "passed", ""


def _imported(code: str) -> set[str]:
    """The modules that a text imports by name."""
    nodes = list(ast.walk(ast.parse(code)))
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return named | {name.partition(".")[0] for name in named}
