"""Verdicts: every one, on the conversation that reaches it; sandboxes are plain processes here."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from agentrl.errors import BadData
from agentrl.evalplus import plus_problem
from agentrl.faults import Ledger, in_line_s
from agentrl.judge import (
    AssertTest,
    CallTest,
    IOTest,
    Judge,
    Problem,
    problem_from_json,
    problem_to_json,
    shared_judge,
)
from agentrl.registry import make_sandbox
from agentrl.sandbox import ExecResult, Limits, Sandbox, SandboxLost, Survey

_TRUSTED = Limits(
    cpu_s=None, memory_mib=None, pids=None, disk_mib=None, wall_s=60, output_kib=64, network=True
)
_CALLS = Problem(
    entry_point="f",
    tests=(
        CallTest(id="one", args=(1,), expected=2, visible=True),
        CallTest(id="two", args=(2,), expected=3),
        CallTest(id="three", kwargs={"x": 3}, expected=4),
    ),
)
_ASSERTS = Problem(
    entry_point="f",
    setup="import math\n\ndef twice(x):\n    return 2 * x\n",
    tests=(
        AssertTest(id="one", code="assert candidate(twice(1)) == 3", visible=True),
        AssertTest(id="two", code="def check(g):\n    assert g(2) == 3\ncheck(f)"),
    ),
)
_PROGRAM = Problem(
    tests=(IOTest(id="one", stdin="1\n", stdout="2\n", visible=True), IOTest(id="two", stdin="2", stdout="3"))
)
_INCREMENT = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(make_sandbox("process"), limits=_TRUSTED) as made:
        yield made


def test_right_answers_are_accepted(judge: Judge) -> None:
    for problem, solution in (
        (_CALLS, _INCREMENT),
        (_ASSERTS, _INCREMENT),
        (_PROGRAM, "print(int(input()) + 1)"),
    ):
        verdict = judge.judge(solution, problem)
        assert (verdict.verdict, verdict.fault, verdict.fraction) == ("AC", "none", 1.0)
        assert (verdict.flags, verdict.note, verdict.trust) == ((), "", "remote")
        assert verdict.wall_ms > 0
        assert all(outcome.ran for outcome in verdict.outcomes)


def test_a_wrong_answer_stops_it_and_what_did_not_run_is_failed(judge: Judge) -> None:
    verdict = judge.judge("def f(x):\n    return 2 if x == 1 else 0", _CALLS)
    assert (verdict.verdict, verdict.fault, verdict.passed) == ("WA", "policy", ("one",))
    assert [outcome.ran for outcome in verdict.outcomes] == [True, True, False]
    assert verdict.visible_only
    assert verdict.fraction == pytest.approx(1 / 3)


def test_without_early_stop_every_test_is_run(judge: Judge) -> None:
    solution = "def f(x):\n    if x == 2:\n        raise KeyError('no')\n    return x + 1"
    verdict = judge.judge(solution, _CALLS, stop_early=False)
    assert [outcome.verdict for outcome in verdict.outcomes] == ["AC", "RE", "AC"]


def test_notes_tell_of_visible_tests_only(judge: Judge) -> None:
    verdict = judge.judge("def f(x):\n    return [x]", _CALLS, stop_early=False)
    assert [outcome.note for outcome in verdict.outcomes] == ["f(1) gave [1], expected 2", "", ""]
    verdict = judge.judge("def f(x):\n    return 2", _CALLS)
    assert verdict.note == "a hidden test failed"
    verdict = judge.judge("def f(x):\n    return 2", _ASSERTS)
    assert (verdict.outcomes[0].note, verdict.outcomes[1].note) == ("AssertionError", "")
    verdict = judge.judge("print(0)", _PROGRAM)
    assert verdict.note == "for the input '1\\n' it printed '0\\n', expected '2\\n'"


def test_no_hidden_input_gets_into_the_note_of_a_visible_test(judge: Judge) -> None:
    tests = tuple(
        CallTest(id=name, args=(value,), expected=0, visible=name == "seen")
        for name, value in (("first", 10**9 + 7), ("seen", 1), ("last", 10**9 + 9))
    )
    looks = """
import sys
def f(x):
    waiting = [str(frame.f_locals) for frame in _frames()]
    raise ValueError([last for last in (7, 9) if any(str(10**9 + last) in text for text in waiting)])
def _frames():
    frame = sys._getframe()
    while frame := frame.f_back:
        yield frame
"""
    verdict = judge.judge(looks, Problem(entry_point="f", tests=tests), stop_early=False)
    assert [outcome.note for outcome in verdict.outcomes] == ["", "f raised ValueError: []", ""]
    assert verdict.note == "f raised ValueError: []"


def test_a_reply_that_only_looks_like_a_complex_number_is_a_wrong_answer(judge: Judge) -> None:
    for part in ("{}", '{"int":"zz"}', '{"float":"abc"}'):
        forged = f"""
import json
def f(x):
    json.dumps = lambda *_, **named: '[0,"value",{{"complex":[{part},0.0]}}]'
    return 1
"""
        problem = Problem(entry_point="f", tests=(CallTest(id="one", args=(1,), expected=1j),))
        verdict = judge.judge(forged, problem)
        assert (verdict.verdict, verdict.fault, verdict.flags) == ("RE", "policy", ("garbled",))


def test_an_expected_output_of_any_size_is_kept(judge: Judge) -> None:
    for text in ("x" * (64 << 10), "\u4e2d" * 30_000, "x" * 1_000_000):
        problem = Problem(
            tests=(IOTest(id="a", stdin="0", stdout="0"), IOTest(id="b", stdin="1", stdout=text))
        )
        right = f"print(0 if input() == '0' else {text[0]!r} * {len(text)})"
        assert judge.judge(right, problem).verdict == "AC"
        assert judge.judge("print(0)", problem).verdict == "WA"


@pytest.mark.parametrize("problem", [_CALLS, _ASSERTS, _PROGRAM], ids=["calls", "asserts", "program"])
def test_what_is_no_python_is_a_compile_error(judge: Judge, problem: Problem) -> None:
    verdict = judge.judge("def f(x) return x", problem)
    assert (verdict.verdict, verdict.compiled, verdict.passed) == ("CE", False, ())
    assert "expected ':'" in verdict.note


@pytest.mark.parametrize("problem", [_CALLS, _ASSERTS], ids=["calls", "asserts"])
@pytest.mark.parametrize(
    ("solution", "flags"),
    [
        ("raise ValueError('at import')", ()),
        ("def g(x):\n    return x + 1", ()),
        ("f = 3", ()),
        ("def f(x):\n    raise ValueError(x)", ()),
        ("import os\nos._exit(0)", ("exit_early",)),
        ("import os\ndef f(x):\n    os._exit(0)", ("exit_early",)),
        ("raise SystemExit(0)", ("exit_early",)),
        ("def f(x):\n    raise SystemExit(0)", ()),
        ("import os\ndef f(x):\n    os.kill(os.getpid(), 9)", ()),
        ("import os\ndef f(x):\n    os._exit(3)", ()),
    ],
)
def test_a_crash_and_an_early_exit_are_runtime_errors(
    judge: Judge, problem: Problem, solution: str, flags: tuple[str, ...]
) -> None:
    verdict = judge.judge(solution, problem)
    assert (verdict.verdict, verdict.fault, verdict.passed) == ("RE", "policy", ())
    assert verdict.flags == flags


@pytest.mark.slow
def test_the_wall_clock_is_the_submissions_own(judge: Judge) -> None:
    hurried = Judge(make_sandbox("process"), limits=Limits(**{**_fields(_TRUSTED), "wall_s": 3}))
    for problem, solution in (
        (_CALLS, "import time\ndef f(x):\n    time.sleep(1e9)"),
        (_ASSERTS, "import time\ndef f(x):\n    time.sleep(1e9)"),
        (_PROGRAM, "import time\ntime.sleep(1e9)"),
    ):
        verdict = hurried.judge(solution, problem)
        assert (verdict.verdict, verdict.fault) == ("TLE", "policy")


def test_an_output_without_end_is_over_the_limit(judge: Judge) -> None:
    flood = "import os\nwhile True:\n    os.write(1, bytes(60000))"
    assert judge.judge(flood, _PROGRAM).verdict == "OLE"
    assert judge.judge(f"def f(x):\n    {flood.replace(chr(10), chr(10) + '    ')}", _CALLS).verdict == "OLE"


def test_an_exception_that_wants_more_than_a_text_reaches_a_test_as_its_base(judge: Judge) -> None:
    code = "try:\n    candidate('ff')\nexcept ValueError:\n    pass\nelse:\n    assert False\n"
    problem = Problem(entry_point="f", tests=(AssertTest(id="a", code=code),))
    assert judge.judge("def f(x):\n    return bytes.fromhex(x).decode()", problem).verdict == "AC"
    assert judge.judge("def f(x):\n    raise KeyError", problem).verdict == "RE"


def test_what_is_printed_to_look_like_a_test_runner_costs_little(judge: Judge) -> None:
    """Each piece could begin a summary: a pattern that reads on from each would take minutes."""
    flood = "import sys\nsys.stderr.write('1 passed, ' * 100_000 + '9' * 500_000)\n"
    verdict = Judge(make_sandbox("process"), limits=replace(_TRUSTED, output_kib=4096)).judge(
        flood + _INCREMENT, _CALLS
    )
    assert (verdict.verdict, verdict.flags) == ("AC", ())


def test_every_call_may_print_something(judge: Judge) -> None:
    tests = tuple(CallTest(id=str(n), args=(n,), expected=n + 1) for n in range(1000))
    chatty = "def f(x):\n    print('debug' * 300)\n    return x + 1\n"
    assert judge.judge(chatty, Problem(entry_point="f", tests=tests)).verdict == "AC"


def test_blanks_at_the_ends_of_many_lines_are_not_too_much(judge: Judge) -> None:
    lines = "".join(f"{n % 10}\n" for n in range(60_000))
    problem = Problem(tests=(IOTest(id="t", stdin="", stdout=lines),))
    for end in (" ", "\\r"):
        source = f"for n in range(60_000):\n    print(n % 10, end='{end}\\n')\n"
        assert judge.judge(source, problem).verdict == "AC"


@pytest.mark.parametrize("setup", ["import no_such_module", "1 / 0", "def (:"])
@pytest.mark.parametrize(
    "tests",
    [
        (CallTest(id="t", args=(1,), expected=2),),
        (AssertTest(id="t", code="assert f(1) == 2"),),
        (IOTest(id="t", stdin="", stdout="2\n"),),
    ],
)
def test_a_setup_that_fails_by_itself_is_the_problems_fault(
    judge: Judge, setup: str, tests: tuple[Any, ...]
) -> None:
    with pytest.raises(BadData, match="the setup of a problem fails by itself, with .*Error"):
        judge.judge(f"{_INCREMENT}print(f(1))", Problem(entry_point="f", setup=setup, tests=tests))


def test_a_solution_can_not_blame_the_setup(judge: Judge) -> None:
    forged = (
        'import os, struct\ndata = b\'["setup", "ValueError: no"]\'\n'
        "for number in range(3, 20):\n    try:\n"
        "        os.write(number, struct.pack('>I', len(data)) + data)\n"
        "    except OSError:\n        pass\n"
    )
    problem = Problem(entry_point="f", setup="x = 1", tests=(CallTest(id="t", args=(1,), expected=2),))
    verdict = judge.judge(forged + _INCREMENT, problem)
    assert (verdict.verdict, verdict.fault) == ("RE", "policy")
    assert "garbled" in verdict.flags


@pytest.mark.parametrize(
    "code", ["assert f(1) == = 2", "import no_such_module\nassert f(1) == 2", "from no_such import x\nf(1)"]
)
def test_a_test_that_can_not_be_run_is_the_problems_fault(judge: Judge, code: str) -> None:
    problem = Problem(entry_point="f", tests=(AssertTest(id="t", code=code),))
    with pytest.raises(BadData, match="test 't' can't be run, with .*Error"):
        judge.judge(_INCREMENT, problem)


def test_a_module_that_a_solution_names_is_its_own_fault(judge: Judge) -> None:
    problem = Problem(entry_point="f", tests=(AssertTest(id="t", code="__import__(f(1))"),))
    assert judge.judge("def f(x):\n    return 'no_such_module'", problem).verdict == "WA"
    lacking = "def f(x):\n    import no_such_module\n"
    assert judge.judge(lacking, problem).verdict == "RE"


def test_what_is_expected_to_be_printed_is_no_sign_of_cheating(judge: Judge) -> None:
    says = Problem(tests=(IOTest(id="a", stdin="", stdout="OK\n"),))
    assert judge.judge("print('OK')", says).flags == ()
    assert judge.judge("print('OK')", _PROGRAM).flags == ("runner_markers",)


def test_outputs_are_compared_without_blanks_at_the_ends(judge: Judge) -> None:
    assert judge.judge("print(int(input()) + 1, ' \\n\\n')", _PROGRAM).verdict == "AC"
    assert judge.judge("print(f' {int(input()) + 1}')", _PROGRAM).verdict == "WA"


def test_more_output_than_is_kept_is_over_the_limit(judge: Judge) -> None:
    assert judge.judge("print('x' * 100_000)", _PROGRAM).verdict == "OLE"


def test_values_keep_their_types_on_the_way(judge: Judge) -> None:
    values = [
        None, True, -1, 10**5000, 1.5, float("nan"), float("-inf"), -0.0, 1 + 2j, "é\ud800\0", b"\xff",
        [1, [2]], (1, (2,)), {1: "a", (2, 3): {4}}, {1, 2}, frozenset({"a"}), [], (), {}, set(),
    ]  # fmt: skip
    problem = Problem(
        entry_point="f",
        tests=tuple(CallTest(id=str(i), args=(v,), expected=v) for i, v in enumerate(values)),
    )
    assert judge.judge("def f(x):\n    return x", problem).verdict == "AC"
    asserted = Problem(
        entry_point="f",
        tests=(AssertTest(id="a", code=f"for v in {values[:3] + values[7:]!r}:\n    assert f(v) == v"),),
    )
    assert judge.judge("def f(x):\n    return x", asserted).verdict == "AC"


def test_what_a_test_sees_of_an_exception_is_its_builtin_name(judge: Judge) -> None:
    code = """
try:
    f(1)
except ValueError as error:
    assert type(error) is ValueError
else:
    raise AssertionError
"""
    problem = Problem(entry_point="f", tests=(AssertTest(id="raises", code=code),))
    assert judge.judge("def f(x):\n    raise ValueError", problem).verdict == "AC"
    assert judge.judge("class E(ValueError): pass\ndef f(x):\n    raise E", problem).verdict == "AC"
    assert judge.judge("def f(x):\n    raise KeyError", problem).verdict == "RE"
    assert judge.judge(_INCREMENT, problem).verdict == "WA"


@pytest.mark.parametrize("name", ["StopIteration", "SystemExit", "KeyboardInterrupt", "GeneratorExit"])
def test_an_exception_that_ends_loops_fails_the_test(judge: Judge, name: str) -> None:
    problem = Problem(
        entry_point="f", tests=(AssertTest(id="all", code="assert all(map(lambda x: f(x) == x, [1, 2]))"),)
    )
    assert judge.judge(f"def f(x):\n    raise {name}", problem).verdict == "RE"


def test_arguments_are_copies_unless_a_test_looks_at_them(judge: Judge) -> None:
    code = "xs = [2, 1]\nf(xs)\nassert xs == [1, 2]"
    in_place = Problem(entry_point="f", tests=(AssertTest(id="a", code=code, in_place=True),))
    copied = Problem(entry_point="f", tests=(AssertTest(id="a", code=code),))
    assert judge.judge("def f(xs):\n    xs.sort()", in_place).verdict == "AC"
    assert judge.judge("def f(xs):\n    xs.sort()", copied).verdict == "WA"


def test_a_test_with_objects_must_be_marked(judge: Judge) -> None:
    code = "assert f(lambda: 1) == 1"
    with pytest.raises(BadData, match="hands the solution a function, no plain data"):
        judge.judge(
            "def f(x):\n    return x()", Problem(entry_point="f", tests=(AssertTest(id="a", code=code),))
        )
    shared = Problem(entry_point="f", tests=(AssertTest(id="a", code=code, trust="shared"),))
    verdict = judge.judge("def f(x):\n    return x()", shared)
    assert (verdict.verdict, verdict.trust) == ("AC", "shared")
    assert judge.judge("def f(x):\n    return 2", shared).verdict == "WA"
    assert judge.judge("import os\ndef f(x):\n    os._exit(0)", shared).verdict == "RE"


def test_a_mended_setup_is_asked_for(judge: Judge) -> None:
    with pytest.raises(BadData, match="setup of a problem fails"):
        judge.judge(
            _INCREMENT, Problem(setup="1/0", entry_point="f", tests=(AssertTest(id="a", code="f(1)"),))
        )


def test_kinds_of_tests_mix_in_one_problem(judge: Judge) -> None:
    tests = (*_ASSERTS.tests, CallTest(id="c", args=(1,), expected=2))
    problem = Problem(entry_point="f", tests=tests, setup=_ASSERTS.setup)
    assert judge.judge(_INCREMENT, problem).passed == ("one", "two", "c")


def test_problems_without_sense_are_refused() -> None:
    with pytest.raises(BadData, match="without tests has no verdict"):
        Problem(tests=())
    with pytest.raises(BadData, match="two tests have the id 'a'"):
        Problem(tests=(IOTest(id="a", stdin="", stdout=""),) * 2)
    with pytest.raises(BadData, match="needs a function to call"):
        Problem(tests=(CallTest(id="a"),))
    with pytest.raises(BadData, match="no plain data: object"):
        Problem(entry_point="f", tests=(CallTest(id="a", args=(object(),)),))


@pytest.mark.parametrize("problem", [_CALLS, _ASSERTS, _PROGRAM], ids=["calls", "asserts", "program"])
def test_a_problem_survives_json(problem: Problem) -> None:
    assert problem_from_json(problem_to_json(problem)) == problem
    with pytest.raises(BadData, match="no problem in JSON"):
        problem_from_json({"tests": [{"kind": "riddle"}]})


# -- programs --


_ECHO = Problem(
    tests=tuple(IOTest(id=str(n), stdin=f"{n}\n", stdout=f"{n}\n", visible=n == 1) for n in (1, 2, 3))
)


def test_waiting_in_every_test_is_over_the_one_wall_clock() -> None:
    hurried = Judge(make_sandbox("process"), limits=Limits(**{**_fields(_TRUSTED), "wall_s": 4}))
    sleepy = "import time\ntime.sleep(3)\nprint(input())"
    verdict = hurried.judge(sleepy, _ECHO, stop_early=False)
    assert (verdict.verdict, verdict.fault) == ("TLE", "policy")
    assert [(outcome.verdict, outcome.ran) for outcome in verdict.outcomes] == [
        ("AC", True),
        ("TLE", True),
        ("TLE", False),
    ]


def test_nothing_that_a_program_leaves_in_one_test_reaches_the_next(judge: Judge) -> None:
    counting = """
import os
number = len(os.listdir("."))
open(f"seen-{number}", "w").write(input())
print(number)
"""
    verdict = judge.judge(counting, _ECHO, stop_early=False)
    assert verdict.passed == ("1",)


@pytest.mark.parametrize("error", ["SyntaxError", "IndentationError: x", "ValueError: x"])
def test_a_program_can_not_claim_to_be_no_python_and_tells_nothing_of_a_hidden_input(
    judge: Judge, error: str
) -> None:
    solution = f"import sys\nsys.stderr.write(sys.stdin.read() + '\\n{error}')\nsys.exit(1)"
    problem = Problem(tests=(IOTest(id="hidden", stdin="secret input", stdout="1"),))
    verdict = judge.judge(solution, problem)
    assert (verdict.verdict, verdict.compiled, verdict.note) == ("RE", True, "a hidden test failed")


def test_a_setup_stands_before_a_program_that_begins_with_future_imports(judge: Judge) -> None:
    tests = (IOTest(id="one", stdin="1\n", stdout="2\n"),)
    problem = Problem(setup="from math import floor\n", tests=tests)
    begun = '"""A program."""\nfrom __future__ import annotations\n'
    body = "def f(x: Unknown) -> int:\n    return floor(x) + 1\nprint(f(int(input())))"
    assert judge.judge(begun + body, problem).verdict == "AC"
    verdict = judge.judge(begun + "def f(x) return x", problem)
    assert (verdict.verdict, verdict.compiled) == ("CE", False)


# -- what a solution can't steer --


@pytest.mark.parametrize(
    "value", ["eval('[' * 50 + ']' * 50)", "[0] * 2_000_000", "nested(99)", "nested(100)", "nested(98)"]
)
def test_plain_data_that_a_test_can_not_hand_back_is_a_wrong_answer(judge: Judge, value: str) -> None:
    nested = "def nested(n):\n    d = []\n    for _ in range(n):\n        d = [d]\n    return d\n"
    code = "assert candidate(candidate([1, 2])) == [1, 2]"
    problem = Problem(entry_point="f", tests=(AssertTest(id="a", code=code),))
    verdict = judge.judge(f"{nested}def f(x):\n    return {value}", problem)
    assert (verdict.verdict, verdict.fault) == ("WA", "policy")


def test_a_solution_beside_its_tests_can_not_blame_them(judge: Judge) -> None:
    blaming = """
import sys
def f(x):
    frame = sys._getframe()
    while "nonce" not in frame.f_locals:
        frame = frame.f_back
    said = frame.f_locals
    said["send"](["done", said["number"], "objects", "function", said["nonce"]])
"""
    shared = AssertTest(id="a", code="assert f(lambda: 1) == 1", trust="shared")
    verdict = judge.judge(blaming, Problem(entry_point="f", tests=(shared,)))
    assert (verdict.verdict, verdict.fault) == ("WA", "policy")


@pytest.mark.parametrize("problem", [_CALLS, _ASSERTS, _PROGRAM], ids=["calls", "asserts", "program"])
@pytest.mark.parametrize(
    "text", ["raise ValueError('\\ud800')", "def f(x):\n    raise ValueError('\\ud800')"]
)
def test_every_note_can_be_written(judge: Judge, problem: Problem, text: str) -> None:
    verdict = judge.judge(text, problem)
    assert not verdict.passed
    for note in (verdict.note, *(outcome.note for outcome in verdict.outcomes)):
        note.encode()


def test_a_root_is_asked_for_once(judge: Judge) -> None:
    row = {
        "entry_point": "find_zero",
        "base_input": [[[1, 2]]],
        "plus_input": [],
        "atol": 0,
        "task_id": "h/32",
    }
    problem = plus_problem(row, "row 1", open_sandbox=make_sandbox("process").open)
    assert judge.judge("def find_zero(xs):\n    return -xs[0] / xs[1]", problem).verdict == "AC"
    stateful = "calls = []\ndef find_zero(xs):\n    calls.append(1)\n    return -len(calls) / 4"
    assert judge.judge(stateful, problem).verdict == "WA"


# -- many at once --


def test_equal_submissions_are_judged_once_and_come_back_in_order(judge: Judge) -> None:
    backend = _Counting()
    many = Judge(backend, limits=_TRUSTED).judge_all([_INCREMENT, "def f(x):\n    return x"] * 8, _CALLS)
    assert [verdict.verdict for verdict in many] == ["AC", "WA"] * 8
    assert backend.opened == 3  # one for the program that proves the world


def test_what_had_no_turn_before_the_deadline_has_no_verdict() -> None:
    slow = "import time\ndef f(x):\n    time.sleep(1.5)\n    return x + 1"
    judge = Judge(_Counting(), limits=_TRUSTED, at_once=1)
    first, second = judge.judge_all([slow, _INCREMENT], _CALLS, deadline_s=1)
    assert (first.verdict, first.fault) == ("AC", "none")
    assert (second.fault, second.passed) == ("world", ())
    assert "no turn before the deadline" in second.note


def test_no_more_than_at_once_run_at_a_time() -> None:
    backend = _Counting()
    judge = Judge(backend, limits=_TRUSTED, at_once=1)
    threads = [threading.Thread(target=judge.judge, args=(_INCREMENT + "#" * i, _CALLS)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (backend.opened, backend.most_open) == (5, 1)


def test_a_lost_sandbox_is_tried_once_more_and_then_raised() -> None:
    assert Judge(_Counting(failures=1), limits=_TRUSTED).judge(_INCREMENT, _CALLS).verdict == "AC"
    with pytest.raises(SandboxLost):
        Judge(_Counting(failures=2), limits=_TRUSTED).judge(_INCREMENT, _CALLS)
    (lost,) = Judge(_Counting(failures=2), limits=_TRUSTED).judge_all([_INCREMENT], _CALLS)
    assert lost.fault == "world"


def test_a_world_without_python_is_no_verdict() -> None:
    with pytest.raises(SandboxLost, match="a known-good program got RE in the sandbox 'counting'"):
        Judge(_Counting(command="no-such-python"), limits=_TRUSTED).judge(_INCREMENT, _CALLS)


def test_waiting_counts_as_waiting_in_line() -> None:
    judge = Judge(_Counting(), limits=_TRUSTED, at_once=1)
    slow = threading.Thread(
        target=judge.judge, args=("import time\ndef f(x):\n    time.sleep(0.5)\n    return x + 1", _CALLS)
    )
    slow.start()
    time.sleep(0.2)
    with Ledger().opened():
        verdict = judge.judge(_INCREMENT, _CALLS)
        waited_s = in_line_s()
    slow.join()
    assert verdict.verdict == "AC"
    assert verdict.queue_ms > 500
    assert 0 < waited_s <= verdict.queue_ms / 1000


def test_a_configuration_has_one_judge() -> None:
    judge = shared_judge("process", limits=_TRUSTED)
    assert judge is shared_judge("process", limits=_TRUSTED)
    assert judge is not shared_judge("process", limits=Limits(**{**_fields(_TRUSTED), "wall_s": 61}))


class _Counting:
    """The process backend, counted; it can't open the first ``failures`` times."""

    name = "counting"

    def __init__(self, *, failures: int = 0, command: str = "python3") -> None:
        self.command = command
        self._inner = make_sandbox("process")
        self._failures = failures
        self._lock = threading.Lock()
        self._open = self.opened = self.most_open = 0

    def survey(self) -> Survey:
        return self._inner.survey()

    def open(self, limits: Limits) -> Sandbox:
        with self._lock:
            if self._failures:
                self._failures -= 1
                raise SandboxLost("the engine went away")
            self.opened += 1
            self._open += 1
            self.most_open = max(self.most_open, self._open)
        return _Closing(self._inner.open(limits), self)  # type: ignore[return-value]

    def sweep(self) -> int:
        return self._inner.sweep()

    def close(self) -> None:
        self._inner.close()

    def forget(self) -> None:
        with self._lock:
            self._open -= 1


class _Closing:
    def __init__(self, inner: Sandbox, backend: _Counting) -> None:
        self._inner, self._backend = inner, backend

    def run(self, argv: list[str], **how: object) -> ExecResult:
        return self._inner.run([self._backend.command, *argv[1:]], **how)  # type: ignore[arg-type]

    def close(self) -> None:
        self._inner.close()
        self._backend.forget()


def _fields(limits: Limits) -> dict[str, float | bool | None]:
    return {name: getattr(limits, name) for name in Limits.__slots__}
