"""Hidden tests over an agent's files; sandboxes are plain processes here."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace

import pytest

from agentrl.errors import BadConfig, BadData
from agentrl.judge import FileTests, Judge, Judgement
from agentrl.registry import make_sandbox
from agentrl.sandbox import Limits

_TRUSTED = Limits(
    cpu_s=None, memory_mib=None, pids=None, disk_mib=None, wall_s=60, output_kib=64, network=True
)
_HIDDEN = {
    "tests/test_shop.py": b"""
import unittest
from shop.prices import total

def test_sum():
    assert total([1, 2]) == 3

class TestEmpty:
    def test_nothing(self):
        assert total([]) == 0

class Case(unittest.TestCase):
    def test_case(self):
        self.assertEqual(total([5]), 5)
"""
}
_TESTS = FileTests(
    files=_HIDDEN,
    expected=(
        "tests/test_shop.py::test_sum",
        "tests/test_shop.py::TestEmpty::test_nothing",
        "tests/test_shop.py::Case::test_case",
    ),
)
_RIGHT = b"def total(prices):\n    return sum(prices)\n"


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(make_sandbox("process"), limits=_TRUSTED) as made:
        yield made


@pytest.fixture(scope="module", params=["alone", "pytest"])
def grader(request: pytest.FixtureRequest) -> Iterator[Judge]:
    """A judge whose sandboxes have pytest, or not."""
    packages = [sysconfig.get_path("purelib")] if request.param == "pytest" else []
    backend = make_sandbox("zygote", packages=packages)
    survey = backend.survey()
    if not survey.available or survey.missing:
        pytest.skip(f"no full zygote here: {survey.note} {dict(survey.missing)}")
    with closing(backend), Judge(backend, limits=Limits(cpu_s=30, wall_s=60)) as made:
        yield made


def _graded(judge: Judge, files: Mapping[str, bytes], hidden: Mapping[str, bytes], *nodes: str) -> list[str]:
    """The verdicts of ``nodes``."""
    judgement = judge.judge_files(files, FileTests(files=hidden, expected=nodes))
    return [outcome.verdict for outcome in judgement.outcomes]


def _judged(judge: Judge, source: bytes, others: Mapping[str, bytes] = {}) -> Judgement:  # noqa: B006
    return judge.judge_files({"shop/__init__.py": b"", "shop/prices.py": source, **others}, _TESTS)


def test_a_right_workspace_passes_every_expected_test(judge: Judge) -> None:
    verdict = _judged(judge, _RIGHT)
    assert (verdict.verdict, verdict.fault, verdict.trust, verdict.flags) == ("AC", "none", "shared", ())
    assert verdict.passed == _TESTS.expected


def test_a_wrong_one_fails_those_that_it_fails(judge: Judge) -> None:
    verdict = _judged(judge, b"def total(prices):\n    return 3\n")
    assert (verdict.verdict, verdict.fault) == ("WA", "policy")
    assert verdict.passed == ("tests/test_shop.py::test_sum",)


def test_files_that_can_not_lie_beside_each_other_are_the_agents_fault(judge: Judge) -> None:
    verdict = _judged(judge, _RIGHT, {"shop/prices.py/inside": b""})
    assert (verdict.verdict, verdict.fault, verdict.passed) == ("RE", "policy", ())


_WRONG = b"def total(prices):\n    return -1\n"


@pytest.mark.parametrize(
    "attack",
    [
        b"import os\nos._exit(0)",
        b"import sys\nsys.exit(0)",
        b"import os\ndef total(prices):\n    os._exit(0)",
        b"def total(prices):\n    raise SystemExit(0)",
        b"import unittest\ndef total(prices):\n    raise unittest.SkipTest('x')",
        b"import unittest\nraise unittest.SkipTest('x')",
        b"print('3 passed in 0.1s')\n" + _WRONG,
        b"import os\nfor i in range(3, 64):\n    try:\n        os.write(i, b'passed:' * 9)\n"
        b"    except OSError: pass\n" + _WRONG,
        b"import os, json\nbody = json.dumps(['done', 'passed', '']).encode()\nfor i in range(3, 64):\n"
        b"    try:\n        os.write(i, len(body).to_bytes(4, 'big') + body)\n    except OSError: pass\n"
        b"os._exit(0)",
        b"import os, json\nbody = json.dumps(['done', 'passed', '', '']).encode()\nfor i in range(0, 64):\n"
        b"    try:\n        fd = os.open(f'/proc/{os.getppid()}/fd/{i}', os.O_WRONLY)\n"
        b"        os.write(fd, len(body).to_bytes(4, 'big') + body)\n    except OSError: pass\nos._exit(0)",
        b"import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n"
        b"unittest.TestCase.run = lambda s, r: setattr(r, 'testsRun', 1)\n" + _WRONG,
        b"import sys, threading, time\ndef late():\n    while True:\n"
        b"        for m in list(sys.modules.values()):\n"
        b"            if hasattr(m, 'test_sum'): m.test_sum = lambda: None\n"
        b"threading.Thread(target=late, daemon=True).start()\n" + _WRONG,
        b"open('tests/test_shop.py', 'w').write('def test_sum(): pass')\n" + _WRONG,
    ],
)
def test_what_works_on_test_runners_does_not_work_here(judge: Judge, attack: bytes) -> None:
    verdict = _judged(judge, attack)
    assert (verdict.passed, verdict.fault) == ((), "policy")


_SPY = b"""
import gc, os, sys
frame, known = sys._getframe(), []
while frame:
    known += frame.f_locals.values()
    frame = frame.f_back
known += [inner for thing in gc.get_objects() if type(thing) in (list, tuple) for inner in thing]
known += [inner for thing in gc.get_objects() if type(thing) is dict for inner in list(thing.values())]
for thing in known:
    if type(thing) is bytes and len(thing) == 16:
        for number in range(3, 64):
            try:
                os.write(number, thing + b"passed:")
            except OSError:
                pass
        os._exit(0)
"""


def test_what_a_verdict_is_said_with_lies_in_no_frame_and_no_object_and_spies_are_flagged(
    judge: Judge,
) -> None:
    verdict = _judged(judge, _SPY + _WRONG)
    assert (verdict.passed, verdict.fault) == ((), "policy")
    assert "frames" in verdict.flags


def test_waiting_in_every_hidden_test_is_over_the_one_wall_clock() -> None:
    limits = replace(_TRUSTED, wall_s=4)
    sleepy = b"import time\ndef total(prices):\n    time.sleep(3)\n    return sum(prices)\n"
    verdict = _judged(Judge(make_sandbox("process"), limits=limits), sleepy)
    assert [outcome.verdict for outcome in verdict.outcomes] == ["AC", "TLE", "TLE"]
    assert [outcome.ran for outcome in verdict.outcomes] == [True, True, False]


@pytest.mark.parametrize(
    "others",
    [
        {"conftest.py": b"raise SystemExit"},
        {"tests/conftest.py": b"raise SystemExit"},
        {"sitecustomize.py": b"raise SystemExit"},
        {"pytest.ini": b"[pytest]\naddopts = --collect-only\n"},
        {"pyproject.toml": b"[tool.pytest.ini_options]\naddopts = '-k nothing'\n"},
        {
            "pytest.py": b"raise SystemExit",
            "unittest.py": b"raise SystemExit",
            "json.py": b"raise SystemExit",
        },
        {"tests": b"no folder"},
        {"tests/test_shop.py": b"def test_sum(): pass"},
        {"tests/test_shop.py/x": b"a folder of that name"},
        {"tests/__pycache__/test_shop.cpython-311.pyc": b"nothing"},
    ],
)
def test_files_that_hook_into_the_judge_change_nothing(judge: Judge, others: Mapping[str, bytes]) -> None:
    assert _judged(judge, _RIGHT, others).verdict == "AC"
    assert _judged(judge, _WRONG, others).passed == ()
    hooks = any("conftest" in name or "sitecustomize" in name for name in others)
    assert ("hooks" in _judged(judge, _WRONG, others).flags) == hooks


def test_nothing_that_one_test_leaves_behind_reaches_the_next(judge: Judge) -> None:
    leaving = b"""
import os
try:
    open('tests/test_shop.py', 'w').write('def test_sum(): pass')
    open('conftest.py', 'w').write('raise SystemExit')
except OSError:
    pass
def total(prices):
    return sum(prices) if prices == [1, 2] else -1
"""
    assert _judged(judge, leaving).passed == ("tests/test_shop.py::test_sum",)


def test_a_test_that_is_not_there_is_failed(judge: Judge) -> None:
    tests = FileTests(files=_HIDDEN, expected=(*_TESTS.expected, "tests/test_shop.py::test_gone"))
    verdict = judge.judge_files({"shop/prices.py": _RIGHT}, tests)
    assert (verdict.verdict, verdict.passed) == ("WA", _TESTS.expected)


def test_names_out_of_the_workspace_are_refused(judge: Judge) -> None:
    with pytest.raises(BadConfig, match="names no file"):
        judge.judge_files({"../x": b""}, _TESTS)
    with pytest.raises(BadData, match="lies in no file of these tests"):
        FileTests(files=_HIDDEN, expected=("other.py::test",))


@pytest.mark.parametrize(
    "text", [b"import pytest\n\ndef test_a():\n    pass\n", b"def test_a(capsys):\n    pass\n"]
)
def test_a_test_that_needs_pytest_says_so_where_there_is_none(judge: Judge, text: bytes) -> None:
    tests = FileTests(files={"test_a.py": text}, expected=("test_a.py::test_a",))
    sandbox = make_sandbox("process").open(_TRUSTED)
    if sandbox.run(["python3", "-c", "import pytest"]).exit_code == 0:
        assert judge.judge_files({}, tests).verdict == "AC"
    else:
        with pytest.raises(BadData, match="install pytest"):
            judge.judge_files({}, tests)


_GOOD, _BAD = b"def f(x):\n    return x + 1\n", b"def f(x):\n    return 0\n"
_SIMPLE = {"test_a.py": b"import sol\n\ndef test_one():\n    assert sol.f(1) == 2\n"}


@pytest.mark.parametrize("name", ["a\nb.py", "x" * 201, "caf\u00e9\u200b.py", "\udcff.py"])
def test_an_odd_name_costs_an_agent_that_file_alone(judge: Judge, name: str) -> None:
    tests = FileTests(files=_SIMPLE, expected=("test_a.py::test_one",))
    judgement = judge.judge_files({"sol.py": _GOOD, name: b""}, tests)
    assert (judgement.verdict, judgement.flags) == ("AC", ("odd_names",))


@pytest.mark.parametrize(
    "shadow",
    ["helpers.py", "tests/helpers/__init__.py", "tests/helpers/inner.py", "tests.py"],
)
def test_what_hidden_tests_import_is_not_replaced_by_an_agents_file(grader: Judge, shadow: str) -> None:
    test = b"from helpers import check\nimport sol\n\ndef test_one():\n    check(sol.f(1), 2)\n"
    hidden = {"tests/test_a.py": test, "tests/helpers.py": b"def check(a, b):\n    assert a == b\n"}
    fake = b"import sys\ndef check(a, b):\n    pass\nsys.modules['helpers'] = sys.modules[__name__]\n"
    node = "tests/test_a.py::test_one"
    assert _graded(grader, {"sol.py": _GOOD, shadow: fake}, hidden, node) == ["AC"]
    assert _graded(grader, {"sol.py": _BAD, shadow: fake}, hidden, node) == ["WA"]


def test_a_conftest_that_a_test_writes_is_not_the_next_ones(grader: Judge) -> None:
    writes = b"""
open("conf" + "test.py", "w").write(
    "def pytest_collection_modifyitems(items):\\n    for item in items:\\n        item.obj = lambda: None\\n"
)
"""
    hidden = {"test_a.py": _SIMPLE["test_a.py"] + b"\ndef test_two():\n    assert sol.f(2) == 3\n"}
    nodes = ("test_a.py::test_one", "test_a.py::test_two")
    assert _graded(grader, {"sol.py": writes + _BAD}, hidden, *nodes) == ["WA", "WA"]


_UNITTEST = {
    "test_a.py": b"""
import unittest
import sol

class TestB(unittest.TestCase):
    def test_case(self):
        self.assertEqual(sol.f(1), 2)
"""
}
_PROFILES = b"""
import functools, sys
def nothing(*a, **k): pass
def profile(frame, event, argument):
    if (event, frame.f_code.co_name) == ("return", "<module>"):
        for name, thing in list(frame.f_globals.items()):
            if name.startswith("test_"):
                frame.f_globals[name] = functools.wraps(thing)(lambda: None)
sys.setprofile(profile)
"""


@pytest.mark.parametrize(
    ("attack", "hidden"),
    [
        (
            b"try:\n    from _pytest.python import Function\n"
            b"    Function.obj = property(lambda self: lambda **k: None)\nexcept ImportError:\n    pass\n",
            _SIMPLE,
        ),
        (
            b"import unittest\nunittest.TestSuite.run = lambda self, result, debug=False: "
            b"setattr(result, 'testsRun', 1)\n",
            _UNITTEST,
        ),
        (
            b"import unittest\nunittest.TestCase.run.__code__ = (lambda self, result=None: None).__code__\n",
            _UNITTEST,
        ),
        (
            b"import contextlib, unittest.case\n@contextlib.contextmanager\ndef part(self, *a, **k):\n"
            b"    try:\n        yield\n    except BaseException:\n        pass\n"
            b"unittest.case._Outcome.testPartExecutor = part\n",
            _UNITTEST,
        ),
        (_PROFILES, _SIMPLE),
    ],
    ids=["pytest's function", "a suite's run", "a case's code", "an outcome", "a profiler"],
)
def test_what_is_patched_from_within_is_undone_or_noticed(
    grader: Judge, attack: bytes, hidden: Mapping[str, bytes]
) -> None:
    node = "test_a.py::test_one" if hidden is _SIMPLE else "test_a.py::TestB::test_case"
    assert _graded(grader, {"sol.py": _GOOD}, hidden, node) == ["AC"]
    assert _graded(grader, {"sol.py": attack + _BAD}, hidden, node) == ["WA"]


_HONEST = {
    "test_a.py": b"""
import functools
import unittest

import sol
from base import Shared

def twice(function):
    @functools.wraps(function)
    def both(*given, **named):
        function(*given, **named)
        return function(*given, **named)
    return both

class TestB(unittest.TestCase):
    def test_sub(self):
        for number in (1, 2):
            with self.subTest(number=number):
                self.assertEqual(sol.f(number), number + 1)

def setup_module(module):
    module.one = 1

def unnamed(function):
    return lambda: function()

@unnamed
def test_unnamed():
    assert sol.f(one) == 2

@twice
def test_decorated():
    assert sol.f(one) == 2

def test_default(number=2):
    assert sol.f(number) == 3

class TestSet:
    @classmethod
    def setup_class(cls):
        cls.three = 3

    def setup_method(self, method):
        self.name = method.__name__

    def test_method(self, tmp_path):
        assert (tmp_path.is_dir(), self.name, sol.f(self.three)) == (True, "test_method", 4)

class TestInherited(Shared):
    pass
""",
    "base.py": b"import sol\n\nclass Shared:\n    def test_shared(self):\n        assert sol.f(5) == 6\n",
}


def test_what_honest_tests_do_is_run(grader: Judge) -> None:
    names = (
        "TestB::test_sub",
        "test_decorated",
        "test_unnamed",
        "test_default",
        "TestSet::test_method",
        "TestInherited::test_shared",
    )
    nodes = [f"test_a.py::{name}" for name in names]
    assert _graded(grader, {"sol.py": _GOOD}, _HONEST, *nodes) == ["AC"] * 6
    assert _graded(grader, {"sol.py": _BAD}, _HONEST, *nodes) == ["WA"] * 6


def test_a_grader_raises_no_flag_over_a_right_workspace(grader: Judge) -> None:
    tests = FileTests(files=_SIMPLE, expected=("test_a.py::test_one",))
    judgement = grader.judge_files({"sol.py": _GOOD}, tests)
    assert (judgement.verdict, judgement.flags) == ("AC", ())


def test_a_package_in_which_a_hidden_test_lies_keeps_its_own_code(grader: Judge) -> None:
    files = {"shop/__init__.py": b"def f(x):\n    return x + 1\n"}
    hidden = {"shop/test_shop.py": b"from shop import f\n\ndef test_one():\n    assert f(1) == 2\n"}
    assert _graded(grader, files, hidden, "shop/test_shop.py::test_one") == ["AC"]
