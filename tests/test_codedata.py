"""Rows become problems: which columns make what, and what can't be used is named with its place."""

from __future__ import annotations

from typing import Any

import pytest

from agentrl.codedata import CodeTask, draft_of
from agentrl.errors import BadConfig, BadData
from agentrl.judge import AssertTest, CallTest, IOTest, Judge, Problem
from agentrl.sandbox import Limits

TRUSTED = Limits(
    cpu_s=None, memory_mib=None, pids=None, disk_mib=None, wall_s=60, output_kib=64, network=True
)
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "entry_point": "double",
    "prompt": 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef double(x):\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": (
        "METADATA = {'author': 'x'}\n\n\ndef check(candidate):\n    import random\n"
        "    assert candidate(1) == 2, 'one'\n    assert True, 'prints'\n"
        "    for n in range(3):\n        assert half(candidate(n)) == n\n"
    ),
}
MBPP = {
    "task_id": 11,
    "prompt": "Write a function to count.",
    "code": "import math\r\ndef count(x):\r\n    return len(x)",
    "test_imports": ["import sys"],
    "test_list": ["assert count([1]) == 1", "assert count([]) == 0"],
}

OWN = {"statement": "Add.", "entry_point": "add", "tests": [{"args": [1, 2], "expected": 3}]}


def never(row: Any, place: str) -> Problem:
    raise AssertionError("no reference is needed")


def task(row: Any, *, visible: int | None = None, **columns: str) -> CodeTask:
    return draft_of(row, "rows.jsonl:7", columns=columns, visible=visible, expected=never).task()


def test_humaneval_has_one_test_for_each_assertion_about_the_candidate() -> None:
    made = task(HUMANEVAL)
    tests = made.problem.tests
    assert [test.id for test in tests] == ["check-0", "check-1"]
    assert all(isinstance(test, AssertTest) and test.trust == "remote" for test in tests)
    assert tests[0].code == "import random\nassert candidate(1) == 2, 'one'"  # type: ignore[union-attr]
    assert not any(test.visible for test in tests)
    assert made.problem.setup == "import math\n\ndef half(x):\n    return x / 2"
    assert made.solution.endswith("return 2 * x\n")
    assert "METADATA" not in str(tests)


def test_assertions_that_need_a_variable_stay_one_test() -> None:
    source = "def check(candidate):\n    n = 3\n    assert candidate(n) == 6\n    assert candidate(1) == 2\n"
    (test,) = task({**HUMANEVAL, "test": source}).problem.tests
    assert test.id == "check"
    assert test.code.endswith("check(candidate)\n")  # type: ignore[union-attr]


def test_mbpp_shows_its_first_assertion_which_names_the_function() -> None:
    made = task(MBPP)
    assert made.id == "Mbpp/11"
    assert [test.visible for test in made.problem.tests] == [True, False]
    assert "assert count([1]) == 1" in made.statement
    assert "count([])" not in made.statement
    assert made.problem.setup == "import sys"  # of the tests; the reference's own are for the tests alone
    assert [test.code.partition("\n")[0] for test in made.problem.tests] == ["import math"] * 2  # type: ignore[union-attr]
    assert "The function's name is count." in task(MBPP, visible=0).statement


def test_mbpp_tests_that_need_the_solutions_classes_are_shared() -> None:
    row = {
        **MBPP,
        "code": "class Pair: pass\ndef count(x): return 1",
        "test_list": ["assert count(Pair()) == 1"],
    }
    (test,) = task(row).problem.tests
    assert test.trust == "shared"  # type: ignore[union-attr]
    assert task({**MBPP, "task_id": 737}).problem.tests[0].trust == "shared"  # type: ignore[union-attr]


# As evalplus/mbppplus and evalplus/humanevalplus on the hub have it.
HUB_TEST = """
import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False

def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"

"""


@pytest.mark.parametrize("kind", ["mbpp", "humaneval"])
def test_the_hubs_plus_versions_need_no_numpy(kind: str) -> None:
    data = "inputs = [[[1.0]], [[1.0, 2.0]], [[]]]\nresults = [[0.1], [0.1, 0.2], []]\n"
    loop = "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion({}(*inp), exp, 0)\n"
    if kind == "mbpp":
        row: dict[str, Any] = {**MBPP, "code": "import math\ndef f(x):\n    return [v / 10 for v in x]"}
        row |= {"test_list": ["assert f([]) == []"], "test": HUB_TEST + data + loop.format("f")}
    else:
        lines = "".join(f"    {line}\n" for line in (data + loop.format("candidate")).splitlines())
        row = {"task_id": "h/1", "prompt": 'def f(x):\n    """Tenths."""\n', "entry_point": "f"}
        row |= {"canonical_solution": "    return [v / 10 for v in x]\n"}
        row |= {"test": f"{HUB_TEST}def check(candidate):\n{lines}"}
    made = task(row)
    with Judge("process", limits=TRUSTED) as judge:
        assert judge.judge(made.solution, made.problem).verdict == "AC"
        for wrong in ("[v / 10 + 1e-5 for v in x]", "[v / 10 for v in x[:1]]", "[float('inf') for v in x]"):
            assert judge.judge(f"def f(x):\n    return {wrong}\n", made.problem).verdict == "WA"


def test_bundled_rows_show_their_visible_tests_and_no_other() -> None:
    row = {
        "id": "sum",
        "statement": "Add.",
        "kind": "call",
        "entry_point": "add",
        "signature": "def add(a, b)",
        "solution": "def add(a, b): return a + b",
        "tests": [
            {"args": [1, 2], "expected": 3, "visible": True},
            {"args": [40, 2], "expected": 42, "visible": False},
        ],
    }
    made = task(row)
    assert "add(1, 2) == 3" in made.statement
    assert "42" not in made.statement
    first, second = made.problem.tests
    assert isinstance(second, CallTest)
    assert (second.args, second.expected, second.alike) == ((40, 2), 42, True)
    io = {**row, "kind": "stdin", "tests": [{"stdin": "1\n", "stdout": "2\n", "visible": True}]}
    assert task(io).problem.tests == (IOTest(id="test-0", stdin="1\n", stdout="2\n", visible=True),)


def test_rows_of_ones_own_have_columns_that_are_named() -> None:
    row = {
        "q": "Double it.",
        "checks": ["assert f(1) == 2", "assert f(2) == 4"],
        "code": "def f(x): return 2 * x",
    }
    made = task(row, visible=1, statement="q", tests="checks", solution="code")
    assert (made.problem.entry_point, made.id[:4]) == ("f", "row-")
    assert "assert f(1) == 2" in made.statement
    assert "f(2)" not in made.statement
    mixed = {"statement": "Echo.", "tests": [{"input": "a", "output": "a"}]}
    assert isinstance(task(mixed).problem.tests[0], IOTest)
    typed = {"statement": "Add.", "entry_point": "add", "tests": [{"args": [1], "expected": 2}]}
    assert isinstance(task(typed).problem.tests[0], CallTest)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tests": ["assert f(1)"]}, "rows.jsonl:7: no text in the column 'statement'.*columns="),
        ({"statement": "?"}, "rows.jsonl:7: no list of tests in the column 'tests'"),
        ({"statement": "?", "tests": [3]}, "rows.jsonl:7: test 0 is '3'; a test is an assertion"),
        ({"statement": "?", "tests": ["assert ("]}, "rows.jsonl:7: test 0: Python that can't be parsed"),
        ({"statement": "?", "tests": ["assert 1"]}, "rows.jsonl:7: no function's name in the column"),
        ({**MBPP, "test_list": ["assert 1"]}, "the first assertion calls no function of the solution"),
        ({**HUMANEVAL, "test": 3}, "rows.jsonl:7: TypeError"),
        ({**HUMANEVAL, "test": "x = 1"}, "rows.jsonl:7: ValueError"),
        ({**MBPP, "test_list": []}, "rows.jsonl:7: IndexError"),
        ({**MBPP, "code": "# \ud800"}, "rows.jsonl:7: Python that can't be parsed: .*surrogates"),
        ({**MBPP, "prompt": "\ud800"}, "rows.jsonl:7: statement=.*surrogate pair.*mend or remove"),
        ({**OWN, "solution": ["def add"]}, "rows.jsonl:7: solution=.*it is a text; put"),
        ({**OWN, "setup": ["import math"]}, "rows.jsonl:7: setup=.* .list.: it is a text"),
        ({**OWN, "solution": "# \ud800"}, "rows.jsonl:7: solution='# .ud800': half of a surrogate pair"),
        ({**OWN, "entry_point": ["add"]}, "rows.jsonl:7: entry_point=.* .list.: it is a text"),
        ({**OWN, "entry_point": "my add"}, "rows.jsonl:7: test 'test-0' needs a function"),
        ({**OWN, "entry_point": "class"}, "rows.jsonl:7: entry_point='class': a word of Python"),
        ({**OWN, "id": ["x"]}, "rows.jsonl:7: id=.*an id is a text or a number"),
        ({**OWN, "id": "\ud800"}, "rows.jsonl:7: id=.*surrogate"),
    ],
)
def test_what_can_not_be_used_is_refused_with_its_place(row: Any, said: str) -> None:
    with pytest.raises(BadData, match=said):
        task(row)


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ({"tolerance": "x"}, "has tolerance='x': it is a finite number of at least 0"),
        ({"tolerance": -1}, "has tolerance='-1': it is a finite"),
        ({"tolerance": float("nan")}, "has tolerance='nan': it is a finite"),
        ({"tolerance": float("inf")}, "has tolerance='inf': it is a finite"),
        ({"tolerance": 10**400}, "has tolerance='1000.*: it is a finite"),
        ({"tolerance": True}, "has tolerance='True': it is a finite"),
        ({"kwargs": "abc"}, r"has kwargs='abc' \(str\): it is an object"),
        ({"args": "ab"}, r"has args='ab' \(str\): it is a list"),
        ({"args": {"a": 1}}, r"has args=.* \(dict\): it is a list .* go into kwargs"),
        ({"args": 5}, r"has args='5' \(int\): it is a list"),
        ({"args": None}, "a test is an assertion as a text or as code, or has stdin"),
        ({"visible": "false"}, "has visible='false': it is true or false"),
        ({"visible": 1}, "has visible='1': it is true or false"),
        ({"tolerence": 0.1}, "has 'tolerence'; did you mean 'tolerance'.*kwargs, tolerance, visible: rename"),
        ({"visble": True}, "has 'visble'; did you mean 'visible'"),
        ({"stdin": "1"}, "has 'stdin'; one with args and expected may have"),
    ],
)
def test_a_call_of_other_types_or_names_is_refused_with_its_place(test: Any, said: str) -> None:
    with pytest.raises(BadData, match=f"^rows.jsonl:7: test 1 .*{said}"):
        task({**OWN, "tests": [{"args": [], "expected": 3}, {"args": [1, 2], "expected": 3, **test}]})


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ({"stdin": None, "stdout": "x"}, "a test is an assertion"),
        ({"stdin": "1", "stdout": None}, "a test is an assertion"),
        ({"sdtin": "1", "stdout": "x"}, "did you mean 'stdin'.; a test is an assertion"),
        ({"input": [1, 2], "output": 3}, r"has input='\[1, 2\]' \(list\): it is a text; .* write args"),
        ({"stdin": "1", "stdout": 1}, "has stdout='1' .int.: it is a text"),
        ({"stdin": "\ud800", "stdout": "x"}, "has stdin='.ud800': half of a surrogate pair"),
        ("assert add('\ud800') == 3", "has code=.*half of a surrogate pair"),
        ("assert add(1)\0", "Python that can't be parsed"),
        ("", "is '', which every program passes.* write 'assert"),
        ("pass", "is 'pass', which every program passes"),
        ("# nothing", "is '# nothing', which every program passes"),
        ("def test_add():\n    assert add(1, 2) == 3", "every program passes: outside of functions"),
        ({"code": "x = 1"}, "every program passes"),
        ({"code": ["assert add(1, 2)"]}, "has code=.* .list.: it is a text"),
        ({"code": "assert add(1)", "trust": "local"}, "has trust='local': it is 'remote' or 'shared'"),
        ({"code": "assert add(1)", "in_place": "yes"}, "has in_place='yes': it is true or false"),
        ({"code": "assert add(1)", "inplace": True}, "has 'inplace'; did you mean 'in_place'"),
    ],
)
def test_texts_of_other_types_and_assertions_that_always_pass_are_refused(test: Any, said: str) -> None:
    with pytest.raises(BadData, match=f"^rows.jsonl:7: test 0.*{said}"):
        task({**OWN, "tests": [test]})


def test_the_bundled_form_is_read_as_strictly() -> None:
    row = {**OWN, "id": "x", "kind": "call", "tests": [{"args": [1], "expected": 1, "visible": "no"}]}
    with pytest.raises(BadData, match="^rows.jsonl:7: test 0 has visible='no'"):
        task(row)
    assert task({**OWN, "kind": "easy"}).problem.entry_point == "add"


def test_an_assertion_says_how_it_is_run() -> None:
    tests = [
        {"code": "class P: x = 3\nassert add(P()) == 3", "trust": "shared", "visible": True},
        {"code": "x = [1]\nadd(x)\nassert x == []", "in_place": True},
        {"code": "assert add(1)", "trust": None, "in_place": None, "visible": None, "stdin": None},
    ]
    made = task({"statement": "Add.", "tests": tests})
    assert made.problem.entry_point == "add"
    shared, in_place, plain = made.problem.tests
    assert isinstance(shared, AssertTest)
    assert isinstance(in_place, AssertTest)
    assert (shared.trust, shared.visible, shared.in_place) == ("shared", True, False)
    assert (in_place.trust, in_place.visible, in_place.in_place) == ("remote", False, True)
    assert plain == AssertTest(id="test-2", code="assert add(1)")
    assert "assert add(P()) == 3" in made.statement


def test_empty_cells_of_a_table_are_as_if_they_were_not_there() -> None:
    test = {"args": [1], "expected": None, "kwargs": None, "tolerance": None, "visible": None, "stdin": None}
    row = {**OWN, "solution": None, "setup": None, "id": None, "tests": [test]}
    made = task(row)
    assert made.problem.tests == (CallTest(id="test-0", args=(1,), alike=True),)
    assert (made.solution, made.problem.setup, made.id[:4]) == ("", "", "row-")
    io = {"stdin": "1", "stdout": "2", "args": None, "expected": None}
    assert task({**OWN, "tests": [io]}).problem.tests == (IOTest(id="test-0", stdin="1", stdout="2"),)


def test_an_id_may_be_nothing_but_a_zero() -> None:
    assert [task({**OWN, "id": given}).id for given in (0, 1, "a")] == ["0", "1", "a"]


@pytest.mark.parametrize("row", [HUMANEVAL, {**HUMANEVAL, "plus_input": []}])
def test_what_can_not_be_shown_is_not_asked_for(row: Any) -> None:
    with pytest.raises(BadConfig, match="rows.jsonl:7: visible=1 has no effect .* feedback='verdict'"):
        task(row, visible=1)
    assert not draft_of(row, "x", columns={}, visible=0, expected=never).has_visible
