"""Hidden tests over an agent's files; sandboxes are plain processes here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
