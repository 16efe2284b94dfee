"""HumanEval+ and MBPP+: what is right, as EvalPlus has it. Sandboxes are plain processes here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from agentrl.evalplus import plus_problem
from agentrl.judge import Judge, Problem
from agentrl.registry import make_sandbox
from agentrl.sandbox import Backend, Limits

_TRUSTED = Limits(
    cpu_s=None, memory_mib=None, pids=None, disk_mib=None, wall_s=60, output_kib=64, network=True
)


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    made = make_sandbox("process")
    yield made
    made.close()


@pytest.fixture(scope="module")
def judge(backend: Backend) -> Iterator[Judge]:
    with Judge(backend, limits=_TRUSTED) as made:
        yield made


def _problem(backend: Backend, gives: str, inputs: list[Any], *, name: str = "f", atol: float = 0) -> Problem:
    row = {
        "task_id": "HumanEval/999",
        "entry_point": name,
        "solution": f"import re\ndef {name}(x):\n    return {gives}\n",
        "base_input": inputs[:1],
        "plus_input": inputs[1:],
        "atol": atol,
    }
    return plus_problem(row, "row 1", open_sandbox=lambda _: backend.open(_TRUSTED))


@pytest.mark.parametrize(
    ("gives", "says", "is_right"),
    [
        ("x[:0]", "x[:0]", True),
        ("x[:0]", "()", False),
        ("x[:0]", "''", False),
        ("tuple(x[:0])", "[]", False),
        ("[v / 2 for v in x]", "tuple(v / 2 for v in x)", False),
        ("[v / 2 for v in x]", "{v / 2: 0 for v in x}", False),
        ("[v / 2 for v in x]", "[v / 2 + 1e-9 for v in x]", True),
        ("x[0] * 1e308 * 10", "x[0] * 1e308 * 10", True),
        ("x[0] * 1e308 * 10", "5.0", False),
        ("x[0] * 1e308 * 10", "-x[0] * 1e308 * 10", False),
        ("1 if x else 0", "bool(x)", True),
        ("[1 if v > 1 else 0 for v in x]", "[v > 1 for v in x]", True),
        ("[1 if v > 1 else 0 for v in x]", "[v > 0 for v in x]", False),
        ("x[0]", "complex(x[0], 0)", True),
        ("x[0]", "complex(x[0], 1)", False),
        ("complex(x[0], 0)", "float(x[0])", True),
    ],
)
def test_answers_are_compared_by_type_and_value(
    backend: Backend, judge: Judge, gives: str, says: str, is_right: bool
) -> None:
    problem = _problem(backend, gives, [[[1, 2, 3]], [[2, 3]]])
    judgement = judge.judge(f"def f(x):\n    return {says}\n", problem)
    assert (judgement.verdict == "AC") == is_right


def test_where_it_counts_whether_something_was_found_a_match_and_a_bool_are_right(
    backend: Backend, judge: Judge
) -> None:
    name, inputs = "text_match_three", [["abbb"], ["ac"], ["xabbbx"]]
    problem = _problem(backend, "re.search('ab{3}', x)", inputs, name=name)
    assert len(problem.tests) == 3
    for says, verdict in (
        ("re.search('ab{3}', x)", "AC"),
        ("bool(re.search('ab{3}', x))", "AC"),
        ("None", "WA"),
        ("True", "WA"),
    ):
        source = f"import re\ndef {name}(x):\n    return {says}\n"
        assert judge.judge(source, problem).verdict == verdict


def test_an_input_that_wants_all_memory_costs_the_others_nothing(backend: Backend, judge: Judge) -> None:
    problem = _problem(backend, "len(bytes(x))", [[1], [1 << 34], [3]])
    assert [test.id for test in problem.tests] == ["input-0", "input-2"]
    assert judge.judge("def f(x):\n    return x", problem).verdict == "AC"
