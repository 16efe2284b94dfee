"""The inside of a workspace's sandbox: one hidden test, run beside the files that an agent left.

The judge sends ``["grade", node id, whether a hidden conftest.py is there]`` and is told ``["forked"]``, or
``["unsupported", why]`` where the test needs more than there is; then it sends ``["nonce", nonce]`` and gets
``["done", outcome, text, nonce]``, its outcome one of passed, failed and silent (it ended without a verdict,
or with several). pytest runs the test where this Python has it, with no plugin, no configuration, no cache
and no conftest.py but a hidden one; else the runner below does: functions ``test_*`` without fixtures but
``tmp_path``, methods, what sets these up, and unittest's cases.

Test and solution share a process by nature, so that a solution which means to can make its test pass. What
is in its way: that process is forked off one that keeps the judge's pipes and that it can't trace or open;
its verdict needs a number that no variable or object holds while a test runs, exactly once; the modules of
the workspace come last on the path, behind those beside the hidden file, so that they shadow nothing; ours,
unittest's and pytest's are imported before any of theirs; functions are run only where their code is what was
compiled from the hidden file, unless they are decorated there, or inherited; unittest's classes are restored
before they are used, and nobody traces. Standard library only and Python 3.8: it is sent as source.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib.util
import inspect
import os
import select
import sys
import tempfile
import time
import types
import unittest
import unittest.case
from pathlib import Path
from typing import Any

from agentrl.judging.solution_process import claim_pipes

__all__ = ["serve"]

_MOST_TEXT = 2_000  # characters of what a failed test said
_MOST_TOLD = 1 << 16  # bytes
_DESCRIPTOR, _NONCE = 4, 16  # bytes of what a child is to say its verdict with
_LOOK_S = 0.01  # between two looks whether a child has ended
_RESTORED = (
    unittest.TestCase,
    unittest.TestResult,
    unittest.TestSuite,
    unittest.BaseTestSuite,
    unittest.case._Outcome,  # type: ignore[attr-defined]
)
_PR_SET_DUMPABLE = 4  # 0: no process of the same user may trace this one or open its files


def serve() -> None:
    """Run one test in a child and say what became of it."""
    pipes = claim_pipes()
    _, node, is_hooked = pipes.receive()
    with contextlib.suppress(OSError, AttributeError):  # a hardened kernel, another libc: then without
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if lacking := _lacking(*node.split("::")):
        pipes.send(["unsupported", lacking])
        return
    nonce = os.urandom(_NONCE)
    heard, said = os.pipe()
    place = _hidden(said.to_bytes(_DESCRIPTOR, "big") + nonce)
    pid = os.fork()
    if pid == 0:
        os.close(heard)
        pipes.close()
        del nonce, said, heard  # frames below a test's are in its reach
        _child(node, place, is_hooked=is_hooked)
    os.close(said)
    pipes.send(["forked"])
    _, theirs = pipes.receive()  # not in the child's memory
    told = _told(heard, pid)
    if told[:_NONCE] != nonce or told.count(nonce) != 1:
        outcome, text = "silent", ""
    else:
        outcome, _, text = told[_NONCE:].decode("utf-8", "replace").partition(":")
    pipes.send(["done", outcome, text, theirs])


def _hidden(data: bytes) -> int:
    """Where ``data`` lies from now on: in no object, so that neither frames nor the collector lead to it."""
    malloc = ctypes.CDLL(None).malloc
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    place = int(malloc(len(data)))
    ctypes.memmove(place, data, len(data))
    return place


def _lacking(path: str, *names: str) -> str:
    """Why the hidden test can't be run here; none of the workspace's code has a say in it."""
    if importlib.util.find_spec("pytest"):
        return ""
    source = Path(path).read_text(encoding="utf-8")
    if "import pytest" in source or "from pytest" in source:
        return "it imports pytest, which this Python does not have"
    wanted = _fixtures(_definition(source, names), len(names) > 1)
    return next((f"it needs pytest's fixture {name}" for name in wanted if name != "tmp_path"), "")


def _definition(source: str, names: tuple[str, ...]) -> Any:
    """What the hidden file says of a test; None where it is not written there, but inherited, say."""
    found: Any = ast.parse(source)
    for name in names:
        within = getattr(found, "body", ())
        found = next((node for node in within if getattr(node, "name", "") == name.partition("[")[0]), None)
    return found


def _fixtures(definition: Any, is_method: bool) -> list[str]:
    if definition is None or not hasattr(definition, "args"):
        return []
    names = [argument.arg for argument in (*definition.args.posonlyargs, *definition.args.args)]
    return names[is_method : len(names) - len(definition.args.defaults)]


def _told(descriptor: int, pid: int) -> bytes:
    """What a child says until it ends, whoever else holds the pipe."""
    os.set_blocking(descriptor, False)
    told, ended = b"", False
    while True:
        is_there = select.select([descriptor], [], [], 0 if ended else _LOOK_S)[0]
        data = os.read(descriptor, 1 << 16) if is_there else b""
        told += data[: _MOST_TOLD - len(told)]
        if ended and not (data and len(told) < _MOST_TOLD):
            return told
        if is_there and not data and not ended:  # closed by all: it is about to end, or hangs without a pipe
            time.sleep(_LOOK_S)
        ended = ended or os.waitpid(pid, os.WNOHANG)[0] == pid


def _child(node: str, place: int, *, is_hooked: bool) -> None:
    write, leave, recall = os.write, os._exit, ctypes.string_at
    path, *names = node.split("::")
    sys.dont_write_bytecode = True
    sys.pycache_prefix = tempfile.mkdtemp()  # a planted .pyc is not looked for there
    # Looked for before theirs can be found.
    has_pytest = importlib.util.find_spec("pytest") is not None
    sys.path += [os.path.dirname(os.path.abspath(path)), os.getcwd()]
    hidden = _Hidden(path, names)
    try:
        passed = _with_pytest(hidden, is_hooked=is_hooked) if has_pytest else _without_pytest(hidden)
        told = "passed:" if passed else "failed:"
    except BaseException as error:
        told = f"failed:{type(error).__name__}: {_said(error)}"
    kept = recall(place, _DESCRIPTOR + _NONCE)
    write(
        int.from_bytes(kept[:_DESCRIPTOR], "big"),
        kept[_DESCRIPTOR:] + told[:_MOST_TEXT].encode("utf-8", "replace"),
    )
    leave(0)


def _said(error: BaseException) -> str:
    try:
        return str(error)[:_MOST_TEXT]
    except BaseException:
        return ""


class _Hidden:
    """A hidden test as its file has it, read before any of the agent's code is loaded."""

    def __init__(self, path: str, names: list[str]) -> None:
        self.path, self.names = path, names
        self.source = Path(path).read_text(encoding="utf-8")
        self.definition = _definition(self.source, tuple(names))
        self.code = compile(self.source, path, "exec", dont_inherit=True)
        self._codes = _codes(self.code)
        # What else decorates may put anything in a test's place, as what is inherited may be anybody's.
        decorators = getattr(self.definition, "decorator_list", ())
        self._is_known = self.definition is not None and all(map(_is_mark, decorators))
        self._originals = [
            (
                kind,
                dict(vars(kind)),
                [(value, value.__code__) for value in vars(kind).values() if _is_plain(value)],
            )
            for kind in _RESTORED
        ]
        self._trace, self._profile = sys.settrace, sys.setprofile

    def check(self, function: Any) -> None:
        """Raises AssertionError for what was put in the place of the hidden test; nobody traces after it."""
        self._trace(None)
        self._profile(None)
        function = getattr(function, "__func__", function)
        if self._is_known and not (_is_plain(function) and function.__code__ in self._codes):
            raise AssertionError("the test is not the hidden one any more")

    def restore(self) -> None:
        """Make unittest what it was."""
        for kind, attributes, codes in self._originals:
            for name in [name for name in vars(kind) if name not in attributes]:
                delattr(kind, name)
            for name, value in attributes.items():
                if vars(kind).get(name) is not value:
                    setattr(kind, name, value)
            for function, code in codes:
                if function.__code__ is not code:
                    function.__code__ = code


def _is_mark(decorator: Any) -> bool:
    """Whether it is one of pytest's marks, which leave the function as it is."""
    name = getattr(decorator, "func", decorator)
    mark = getattr(name, "value", None)
    return getattr(mark, "attr", "") == "mark" and getattr(getattr(mark, "value", None), "id", "") == "pytest"


def _is_plain(value: Any) -> bool:
    return type(value) is types.FunctionType


def _codes(code: types.CodeType) -> list[types.CodeType]:
    """``code`` and what is nested in it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [code, *(deep for constant in inner for deep in _codes(constant))]


def _without_pytest(hidden: _Hidden) -> bool:
    *outer, name = hidden.names
    module = types.ModuleType(Path(hidden.path).stem)
    module.__file__ = os.path.abspath(hidden.path)
    sys.modules[module.__name__] = module
    exec(hidden.code, module.__dict__)
    holder: Any = module
    for inner in outer:
        holder = getattr(holder, inner)
    if isinstance(holder, type) and issubclass(holder, unittest.TestCase):
        return _unittest_passes(hidden, holder, name)
    held = holder() if isinstance(holder, type) else holder
    function = getattr(held, name)
    fixtures = _fixtures(hidden.definition, held is not module)
    given = {name: Path(tempfile.mkdtemp()) for name in fixtures}
    _set_up(module, "setup_module", module)
    if held is module:
        _set_up(module, "setup_function", function)
    else:
        _set_up(holder, "setup_class", holder)
        _set_up(held, "setup_method", function)
    hidden.check(function)
    if function(**given) is not None:
        raise AssertionError("it returned something")
    return True


def _set_up(holder: Any, name: str, argument: Any) -> None:
    """Call what pytest calls before a test, with its one argument where it takes one."""
    step = getattr(holder, name, None)
    if step is not None:
        taken = len(inspect.signature(step).parameters)
        step(*[argument][:taken])


def _unittest_passes(hidden: _Hidden, kind: Any, name: str) -> bool:
    hidden.restore()
    hidden.check(getattr(kind, name))
    result = unittest.TestResult()
    unittest.TestSuite([kind(name)]).run(result)
    bad = [*result.failures, *result.errors]
    if bad:
        raise AssertionError(bad[0][1][-_MOST_TEXT:])
    return result.testsRun == 1 and not (
        result.skipped or result.expectedFailures or result.unexpectedSuccesses
    )


def _with_pytest(hidden: _Hidden, *, is_hooked: bool) -> bool:
    import pytest

    reports: list[Any] = []
    called: list[bool] = []  # by us and returned; or one of unittest's, which pytest lets run itself

    class Watch:
        """Sees the reports, and calls test functions itself."""

        @pytest.hookimpl(tryfirst=True)
        def pytest_pyfunc_call(self, pyfuncitem: Any) -> bool | None:
            function = pyfuncitem.obj
            if inspect.iscoroutinefunction(function):
                return None
            given = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
            hidden.check(function)
            function(**given)
            called.append(True)
            return True

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_call(self, item: Any) -> None:
            hidden.restore()
            if type(item).__name__ == "TestCaseFunction":
                hidden.check(getattr(item.cls, item.originalname or item.name))
                called.append(True)

        def pytest_runtest_logreport(self, report: Any) -> None:
            reports.append(report)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                reports.append(report)

    arguments = ["-qq", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={os.getcwd()}"]
    # Asserts are not rewritten: the code that runs is what the hidden file compiles to.
    arguments += ["--import-mode=importlib", "--assert=plain", "-o", "addopts="]
    arguments += [] if is_hooked else ["--noconftest"]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    node = "::".join([hidden.path, *hidden.names])
    code = pytest.main([*arguments, node], plugins=[Watch()])
    bad = [report for report in reports if not report.passed or hasattr(report, "wasxfail")]
    if bad:
        raise AssertionError(str(bad[0].longreprtext)[-_MOST_TEXT:])
    first, *calls, last = [report.when for report in reports]  # of subtests there are calls more
    return int(code) == 0 and (first, {*calls}, last) == ("setup", {"call"}, "teardown") and called == [True]
