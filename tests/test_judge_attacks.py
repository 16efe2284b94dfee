"""What a policy tries against a verdict, against each kind of test: none of it may be accepted.

The attacks on verdicts, case by case. Sandboxes are zygote's or bubblewrap's where this host can
enforce them, else plain processes: what is tried is the judge.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentrl.judge import AssertTest, CallTest, IOTest, Judge, Problem
from agentrl.registry import make_sandbox
from agentrl.sandbox import Limits

_TRUSTED = Limits(
    cpu_s=None, memory_mib=None, pids=None, disk_mib=None, wall_s=60, output_kib=64, network=True
)
_HARDENED = Limits(wall_s=6)  # which some attacks wait for, twice
_CALLS = Problem(
    entry_point="f",
    tests=(CallTest(id="one", args=(1,), expected=731), CallTest(id="two", args=([2],), expected=[4, 6])),
)
_ASSERTS = Problem(
    entry_point="f",
    tests=(
        AssertTest(id="one", code="assert candidate(1) == 731"),
        AssertTest(id="two", code="def check(g):\n    assert g([2]) == [4, 6]\ncheck(candidate)"),
    ),
)

_FRAMES = """
import json, os
def frame(message):
    body = json.dumps(message).encode()
    return len(body).to_bytes(4, "big") + body
"""
_FORGED = {
    "verdicts": '["done", 0, "passed", ""], ["done", 1, "passed", ""], ["passed"], ["AC"], {"verdict": "AC"}',
    "booleans": '[0, "value", True], [1, "value", True]',
    "strings of values": '[0, "value", {"eval": "731"}], [0, "value", {"__class__": "AlwaysEqual"}]',
    "the right number as another type": '[0, "value", "731"], [1, "value", "[4, 6]"]',
    "other numbers": '[1, "value", 731], [True, "value", 731], ["0", "value", 731], [None, "value", 731]',
    "a second ready": '["ready"], ["ready"]',
}
_ATTACKS = {
    "exit 0 at import": "import os; os._exit(0)",
    "exit 0 in the call": """
import os
def f(x): os._exit(0)
""",
    "sys.exit": "import sys; sys.exit(0)",
    "SystemExit": "def f(x): raise SystemExit",
    "quit": "def f(x): quit()",
    "execv": "import os; os.execv('/bin/true', ['/bin/true'])",
    "execv in the call": """
import os
def f(x): os.execv('/bin/true', ['/bin/true'])
""",
    "a runner's marker": """
import os
def f(x):
    print('2 passed in 0.1s')
    os._exit(0)
""",
    "AlwaysEqual": """
class A:
    def __eq__(self, other): return True
    __hash__ = None
def f(x): return A()
""",
    "an int that is always equal": """
class A(int):
    def __eq__(self, other): return True
def f(x): return A()
""",
    "a list that is always equal": """
class A(list):
    def __eq__(self, o): return True
def f(x): return A()
""",
    "a dict with a hostile key": """
class A(str): pass
def f(x): return {A('a'): 1}
""",
    "an exception in __eq__": """
class A:
    def __eq__(self, o): raise SystemExit(0)
def f(x): return A()
""",
    "an exit in __del__": """
import os
class A:
    def __del__(self): os._exit(0)
def f(x): return A()
""",
    "an exit in __reduce__": """
import os
class A:
    def __reduce__(self): os._exit(0)
def f(x): return A()
""",
    "atexit": """
import atexit, os
atexit.register(os._exit, 0)
def f(x): raise SystemExit
""",
    "frames": """
import gc, sys
def f(x):
    frame, found = sys._getframe(), []
    while frame:
        for names in (frame.f_locals, frame.f_globals):
            found += [v for k, v in names.items() if 'expected' in k]
        frame = frame.f_back
    return found[0] if found else 0
""",
    "memory": """
import gc
def f(x):
    for thing in gc.get_objects():
        if type(thing) is dict and 'expected' in thing: return thing['expected']
        if type(thing) is list and 731 in [v for v in thing if type(v) is int]: return 731
""",
    "the command line": """
def f(x):
    text = open('/proc/self/cmdline').read() + open('/proc/self/environ').read()
    return 731 if '731' in text else [4, 6] if '4, 6' in text else 0
""",
    "the files": """
import os
def f(x):
    for folder, _, names in os.walk('.'):
        for name in names:
            if '731' in open(os.path.join(folder, name), errors='replace').read(): return 731
    return 0
""",
    "its own stdin": """
import sys
def f(x): return 731 if '731' in sys.stdin.read() else 0
""",
    "patched builtins": """
import builtins
for n in ('len','type','isinstance','list','int','str','repr'):
    setattr(builtins, n, lambda *a, **k: True)
def f(x): return True
""",
    "patched json": """
import json, json.encoder
json.dumps = lambda *a, **k: '[0, "value", true]'
json.loads = lambda *a: 1/0
def f(x): return True
""",
    "patched os.write": """
import os
os.write = lambda *a: 0
os.read = lambda *a: b''
def f(x): return True
""",
    "patched sys": """
import sys
sys.exit = sys.excepthook = sys.settrace = lambda *a: None
sys.modules.clear()
def f(x): return True
""",
    "patched unittest": """
import unittest
unittest.TestCase.assertEqual = lambda *a: None
def f(x): return 0
""",
    "patched AssertionError": """
import builtins
builtins.AssertionError = type('E', (BaseException,), {})
def f(x): return 0
""",
    "SkipTest": """
import unittest
def f(x): raise unittest.SkipTest('no')
""",
    "AssertionError": "def f(x): raise AssertionError",
    "StopIteration": "def f(x): raise StopIteration",
    "an exception with a hostile text": """
class E(Exception):
    def __str__(self): raise SystemExit(0)
def f(x): raise E
""",
    "an exception of a hostile name": """
E = type('passed', (Exception,), {})
def f(x): raise E('AC')
""",
    "a deep value": """
def f(x):
    v = []
    for _ in range(100000): v = [v]
    return v
""",
    "a value in itself": """
def f(x):
    v = []
    v += [v, v]
    return v
""",
    "a huge value": "def f(x): return [0] * 5_000_000",
    "a huge text": "def f(x): return 'x' * 50_000_000",
    "a huge integer": "def f(x): return 10 ** 1_000_000",
    "a generator without end": """
import itertools
def f(x): return itertools.count()
""",
    "a mutated argument": """
def f(x):
    if type(x) is list: x.clear()
    return x
""",
    "a deep recursion": """
import sys
sys.setrecursionlimit(10**9)
def f(x): return f(x)
""",
    "closed descriptors": """
import os
def f(x):
    os.closerange(0, 1000)
    return 0
""",
    "a later thread": """
import threading, time, os
def f(x):
    def late():
        time.sleep(0.05)
        os._exit(0)
    threading.Thread(target=late).start()
    time.sleep(1)
    return 0
""",
    "another process that goes on": """
import os, time
if os.fork() == 0:
    time.sleep(0.2)
    os._exit(0)
def f(x): return 0
""",
    "the parent's end": """
import os
if os.fork():
    os._exit(0)
def f(x): return 0
""",
    **{
        f"forged: {name}": f"{_FRAMES}\nfor fd in range(1, 64):\n    for message in [{messages}]:\n"
        "        try: os.write(fd, frame(message))\n        except OSError: pass\ndef f(x): return 0"
        for name, messages in _FORGED.items()
    },
    **{
        f"forged in the call: {name}": f"{_FRAMES}\ndef f(x):\n    for fd in range(1, 64):\n"
        f"        for message in [{messages}]:\n            try: os.write(fd, frame(message))\n"
        "            except OSError: pass\n    os._exit(0)"
        for name, messages in _FORGED.items()
    },
    "no frames": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'\\xff' * 5000)
    except OSError: pass
def f(x): return 0
""",
    "a frame without end": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'\\x00\\x7f\\xff\\xff' + b'[' * 60000)
    except OSError: pass
def f(x): return 0
""",
    "nested JSON": f"""
{_FRAMES}
body = b'[' * 500_000 + b']' * 500_000
for fd in range(3, 64):
    try:
        os.write(fd, len(body).to_bytes(4, 'big') + body)
    except OSError: pass
os._exit(0)
""",
    "endless digits": f"""
{_FRAMES}
body = b'[0, "value", ' + b'7' * 1_000_000 + b']'
for fd in range(3, 64):
    try: os.write(fd, len(body).to_bytes(4, 'big') + body)
    except OSError: pass
os._exit(0)
""",
}


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    for name in ("zygote", "bubblewrap"):
        backend = make_sandbox(name)
        survey = backend.survey()
        if survey.available and not survey.missing:
            break
        backend.close()
    else:
        backend = make_sandbox("process")
    limits = _TRUSTED if backend.name == "process" else _HARDENED
    with Judge(backend, limits=limits) as made:
        yield made
    backend.close()


_WAITS = ("a frame without end",)  # for its wall clock
_attacks = [pytest.param(name, marks=[pytest.mark.slow] if name in _WAITS else []) for name in _ATTACKS]


@pytest.mark.parametrize("attack", _attacks)
def test_no_attack_passes_a_test(judge: Judge, attack: str) -> None:
    for problem in (_CALLS, _ASSERTS):
        verdict = judge.judge(_ATTACKS[attack], problem, stop_early=False)
        assert (verdict.passed, verdict.fault) == ((), "policy")
        assert verdict.verdict in ("WA", "RE", "OLE", "CE", "TLE", "MLE")
        assert [outcome.id for outcome in verdict.outcomes] == ["one", "two"]


@pytest.mark.parametrize(
    ("attack", "flag"),
    [
        ("exit 0 at import", "exit_early"),
        ("AlwaysEqual", "not_plain"),
        ("frames", "frames"),
        ("a runner's marker", "runner_markers"),
        ("forged: other numbers", "garbled"),
        ("the command line", "proc"),
    ],
)
def test_what_looks_like_an_attack_is_flagged(judge: Judge, attack: str, flag: str) -> None:
    assert flag in judge.judge(_ATTACKS[attack], _CALLS).flags


@pytest.mark.parametrize(
    "attack",
    [
        "",
        "import os; os._exit(0)",
        "print('2 passed in 0.1s')",
        "import sys\nsys.stdout.buffer.write(b'731'.replace(b'1', b'\\xff'))",
        "import os\nprint(open('/proc/self/cmdline').read(), os.environ)",
        "print(' 731' * 2)",
        "import sys\nsys.exit(print('731'))if 0 else 1/0",
    ],
)
def test_no_attack_passes_a_program(judge: Judge, attack: str) -> None:
    problem = Problem(tests=(IOTest(id="one", stdin="1\n", stdout="731\n"),))
    verdict = judge.judge(attack, problem)
    assert (verdict.passed, verdict.fault) == ((), "policy")


def test_a_right_answer_with_wrong_ones_behind_it_counts_once(judge: Judge) -> None:
    solution = f"""{_FRAMES}
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, frame([0, "value", 731]) + frame([1, "value", 0]))
        except OSError: pass
    return 731 if x == 1 else [4, 6]
"""
    verdict = judge.judge(solution, _CALLS, stop_early=False)
    assert "two" not in verdict.passed


def test_what_is_said_when_all_is_answered_is_flagged(judge: Judge) -> None:
    solution = f"""{_FRAMES}
def f(x):
    if x == 1:
        return 731
    for fd in range(3, 64):
        try: os.write(fd, frame([1, "value", 0]) + frame([1, "value", {{"list": [4, 6]}}]))
        except OSError: pass
"""
    verdict = judge.judge(solution, _CALLS, stop_early=False)
    assert verdict.passed == ("one",)


def test_a_solution_can_not_reach_the_assertions(judge: Judge) -> None:
    problem = Problem(
        entry_point="f",
        tests=(
            AssertTest(id="aliased", code="xs = [3, 1, 2]\nassert f(xs) == [1, 2, 3] and xs == [3, 1, 2]"),
            AssertTest(id="itself", code="xs = [2, 1]\nassert f(xs) == xs[::-1]"),
        ),
    )
    cheat = "def f(xs):\n    xs.clear()\n    return []"
    assert judge.judge(cheat, problem, stop_early=False).passed == ()
