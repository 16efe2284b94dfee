"""Rows become problems: which columns make what, and what can't be used is named with its place."""

from __future__ import annotations

from typing import Any

import pytest

from agentrl.codedata import CodeTask, draft_of
from agentrl.errors import BadData
from agentrl.judge import AssertTest, CallTest, IOTest, Problem

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
    assert made.problem.setup == "import math\nimport sys"
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
        ({"statement": "?", "tests": ["assert ("]}, "rows.jsonl:7: Python that can't be parsed"),
        ({"statement": "?", "tests": ["assert 1"]}, "rows.jsonl:7: no function's name in the column"),
        ({**MBPP, "test_list": ["assert 1"]}, "the first assertion calls no function of the solution"),
        ({**HUMANEVAL, "test": 3}, "rows.jsonl:7: TypeError"),
    ],
)
def test_what_can_not_be_used_is_refused_with_its_place(row: Any, said: str) -> None:
    with pytest.raises(BadData, match=said):
        task(row)
