"""The inside of a workspace's sandbox: one hidden test, run beside the files that an agent left.

The judge sends ``["grade", node id]`` and is told ``["forked"]``, or ``["unsupported", why]`` where the test
needs more than there is; then it sends ``["nonce", nonce]`` and gets ``["done", outcome, text, nonce]``, its
outcome one of passed, failed and silent (it ended without a verdict, or with several). pytest runs the test
where this Python has it, with no plugin, no configuration, no cache and no conftest.py but a hidden one; else
the runner below does: functions ``test_*`` without fixtures but ``tmp_path``, methods, unittest's cases.

Test and solution share a process by nature, so that a solution which means to can make its test pass. What
is in its way: that process is forked off one that keeps the judge's pipes and that it can't trace or open;
its verdict needs a number that no variable or object holds while a test runs, exactly once; the modules of
the workspace come last on the path, so that they shadow nothing; ours, unittest's and pytest's are imported
before any of theirs; functions are run only where their code is what was compiled from the hidden file;
unittest's classes are restored before they are used. Standard library only and Python 3.8: it is sent as
source.
"""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

from agentrl.judging.solution_process import claim_pipes

__all__ = ["serve"]

_MOST_TEXT = 2_000  # characters of what a failed test said
_MOST_TOLD = 1 << 16  # bytes
_DESCRIPTOR, _NONCE = 4, 16  # bytes of what a child is to say its verdict with
_LOOK_S = 0.01  # between two looks whether a child has ended
_PR_SET_DUMPABLE = 4  # 0: no process of the same user may trace this one or open its files


def serve() -> None:
    """Run one test in a child and say what became of it."""
    pipes = claim_pipes()
    _, node = pipes.receive()
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
        _child(node, place)
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
    codes = _codes(compile(source, path, "exec", dont_inherit=True))
    wanted = [name for code in codes if code.co_name == names[-1] for name in _fixtures(code, len(names) > 1)]
    return next((f"it needs pytest's fixture {name}" for name in wanted if name != "tmp_path"), "")


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


def _child(node: str, place: int) -> None:
    write, leave, recall = os.write, os._exit, ctypes.string_at
    path, *names = node.split("::")
    sys.dont_write_bytecode = True
    sys.pycache_prefix = tempfile.mkdtemp()  # a planted .pyc is not looked for there
    # Looked for before theirs can be found.
    run = _with_pytest if importlib.util.find_spec("pytest") else _without_pytest
    sys.path += [os.getcwd(), os.path.dirname(os.path.abspath(path))]
    originals = [(kind, dict(vars(kind))) for kind in (unittest.TestCase, unittest.TestResult)]
    try:
        told = "passed:" if run(path, names, originals) else "failed:"
    except BaseException as error:
        told = f"failed:{type(error).__name__}: {_said(error)}"
    hidden = recall(place, _DESCRIPTOR + _NONCE)
    write(
        int.from_bytes(hidden[:_DESCRIPTOR], "big"),
        hidden[_DESCRIPTOR:] + told[:_MOST_TEXT].encode("utf-8", "replace"),
    )
    leave(0)


def _said(error: BaseException) -> str:
    try:
        return str(error)[:_MOST_TEXT]
    except BaseException:
        return ""


def _without_pytest(path: str, names: list[str], originals: Any) -> bool:
    source = Path(path).read_text(encoding="utf-8")
    code = compile(source, path, "exec", dont_inherit=True)
    module = types.ModuleType(Path(path).stem)
    module.__file__ = os.path.abspath(path)
    sys.modules[module.__name__] = module
    exec(code, module.__dict__)
    holder: Any = module
    for name in names[:-1]:
        holder = getattr(holder, name)
    if isinstance(holder, type) and issubclass(holder, unittest.TestCase):
        return _unittest_passes(holder, names[-1], _codes(code), originals)
    held = holder() if isinstance(holder, type) else holder
    function = getattr(held, names[-1])
    plain = inspect.unwrap(getattr(function, "__func__", function))
    if getattr(plain, "__code__", None) not in _codes(code):
        raise AssertionError("the test is not the hidden one any more")
    given = {name: Path(tempfile.mkdtemp()) for name in _fixtures(plain.__code__, held is not module)}
    for step in ("setup_method", "setup"):
        if hasattr(held, step):
            getattr(held, step)()
    if function(**given) is not None:
        raise AssertionError("it returned something")
    return True


def _codes(code: types.CodeType) -> list[types.CodeType]:
    """``code`` and what is nested in it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [code, *(deep for constant in inner for deep in _codes(constant))]


def _fixtures(code: types.CodeType, is_method: bool) -> tuple[str, ...]:
    return code.co_varnames[is_method : code.co_argcount]


def _unittest_passes(kind: Any, name: str, codes: list[types.CodeType], originals: Any) -> bool:
    _restore(originals)
    if inspect.unwrap(getattr(kind, name)).__code__ not in codes:
        raise AssertionError("the test is not the hidden one any more")
    result = unittest.TestResult()
    unittest.TestSuite([kind(name)]).run(result)
    bad = [*result.failures, *result.errors]
    if bad:
        raise AssertionError(bad[0][1][-_MOST_TEXT:])
    return result.testsRun == 1 and not (
        result.skipped or result.expectedFailures or result.unexpectedSuccesses
    )


def _restore(originals: Any) -> None:
    for kind, attributes in originals:
        for name in [name for name in vars(kind) if name not in attributes]:
            delattr(kind, name)
        for name, value in attributes.items():
            if vars(kind).get(name) is not value:
                setattr(kind, name, value)


def _with_pytest(path: str, names: list[str], originals: Any) -> bool:
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
            given = pyfuncitem._fixtureinfo.argnames
            function(**{name: pyfuncitem.funcargs[name] for name in given})
            called.append(True)
            return True

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_call(self, item: Any) -> None:
            _restore(originals)
            if type(item).__name__ == "TestCaseFunction":
                called.append(True)

        def pytest_runtest_logreport(self, report: Any) -> None:
            reports.append(report)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                reports.append(report)

    folders = (".", os.path.dirname(path))  # a conftest.py that is here is a hidden one: others were left out
    is_hooked = any(os.path.exists(os.path.join(folder, "conftest.py")) for folder in folders)
    arguments = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={os.getcwd()}"]
    arguments += ["--import-mode=importlib", "-o", "addopts=", *([] if is_hooked else ["--noconftest"])]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    node = "::".join([path, *names])
    code = pytest.main([*arguments, node], plugins=[Watch()])
    bad = [report for report in reports if not report.passed or hasattr(report, "wasxfail")]
    if bad:
        raise AssertionError(str(bad[0].longreprtext)[-_MOST_TEXT:])
    phases = [report.when for report in reports]
    return int(code) == 0 and phases == ["setup", "call", "teardown"] and called == [True]
