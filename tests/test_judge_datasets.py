"""The judge on published problems: every reference solution is accepted, and wrong ones are not.

The folder AGENTRL_DATA has humaneval/, mbpp/ and evalplus/. Sandboxes are plain processes: the code is known.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from agentrl.evalplus import plus_problem
from agentrl.judge import AssertTest, Judge, Problem
from agentrl.registry import make_sandbox
from agentrl.sandbox import Limits

_DATA = Path(os.environ.get("AGENTRL_DATA", "/nonexistent"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (_DATA / "humaneval").is_dir(), reason="AGENTRL_DATA names no folder with humaneval/"
    ),
]
_TRUSTED = Limits(
    cpu_s=None, memory_mib=None, pids=None, disk_mib=None, wall_s=300, output_kib=64, network=True
)
# Tasks whose own tests accept None for an answer. None of HumanEval's do.
_ACCEPT_NONE: frozenset[str] = frozenset()
# Tasks whose mutated reference is another right solution, or differs where no test of the task looks.
_EQUIVALENT_MUTANTS: Mapping[str, str] = {
    "HumanEval/116": "all binary numbers without their first digit have the same order by their ones",
    "HumanEval/127": "a composite length is taken for prime, and no test has intervals that share one",
}
# Tests that look at whether an object is true, a match of a regular expression: beside the solution only.
_NEED_OBJECTS = frozenset({737, 787, 794})


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(make_sandbox("process"), limits=_TRUSTED) as made:
        yield made


def _rows(path: str) -> list[dict[str, Any]]:
    with gzip.open(_DATA / path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _human_eval() -> list[tuple[str, Problem, str]]:
    """Id, problem and reference."""
    found = []
    for row in _rows("humaneval/HumanEval.jsonl.gz"):
        test = AssertTest(id="check", code=row["test"] + "\ncheck(candidate)\n")
        problem = Problem(tests=(test,), entry_point=row["entry_point"], setup=row["prompt"])
        found.append((row["task_id"], problem, row["prompt"] + row["canonical_solution"]))
    return found


def _wrong(judge: Judge, submissions: list[tuple[str, Problem, str]]) -> dict[str, str]:
    """What was not accepted."""
    verdicts = {name: judge.judge(solution, problem) for name, problem, solution in submissions}
    return {
        name: f"{verdict.verdict} {verdict.outcomes} {verdict.note}"
        for name, verdict in verdicts.items()
        if verdict.verdict != "AC"
    }


def test_all_references_of_human_eval_are_accepted(judge: Judge) -> None:
    submissions = _human_eval()
    assert len(submissions) == 164
    assert _wrong(judge, submissions) == {}


def test_a_function_that_returns_none_is_rejected_by_every_task(judge: Judge) -> None:
    submissions = [
        (name, problem, f"def {problem.entry_point}(*args, **kwargs):\n    return None\n")
        for name, problem, _ in _human_eval()
    ]
    assert set(_wrong(judge, submissions)) == {name for name, *_ in submissions} - _ACCEPT_NONE


def test_a_mutated_reference_is_rejected(judge: Judge) -> None:
    submissions = [
        (name, problem, _mutated(reference, problem.entry_point))
        for name, problem, reference in _human_eval()
    ]
    accepted = {name for name, *_ in submissions} - set(_wrong(judge, submissions))
    assert accepted == set(_EQUIVALENT_MUTANTS)


def _mutated(source: str, entry_point: str) -> str:
    """The reference with the first thing in its function changed that can be: a comparison is turned round, a
    sum becomes a difference, a number is one more, what is returned is None."""
    tree = ast.parse(source)
    (function,) = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry_point
    ][-1:]
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    for kind in (ast.Compare, ast.BinOp, ast.Constant, ast.Return):
        for node in nodes:
            if isinstance(node, kind) and _mutate(node):
                return ast.unparse(tree)
    raise AssertionError(f"nothing to change in {entry_point}")


_TURNED = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add,
}  # fmt: skip


def _mutate(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _TURNED:
        node.ops[0] = _TURNED[type(node.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(node, ast.BinOp) and type(node.op) in _TURNED:
        node.op = _TURNED[type(node.op)]()  # type: ignore[call-overload]
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1
    elif isinstance(node, ast.Return):
        node.value = ast.Constant(None)
    else:
        return False
    return True


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_all_references_of_sanitized_mbpp_are_accepted(judge: Judge) -> None:
    rows = json.loads((_DATA / "mbpp" / "sanitized-mbpp.json").read_text(encoding="utf-8"))
    submissions = []
    for row in rows:
        trust: Literal["remote", "shared"] = "shared" if row["task_id"] in _NEED_OBJECTS else "remote"
        tests = tuple(
            AssertTest(id=str(i), code=code, trust=trust) for i, code in enumerate(row["test_list"])
        )
        used = [node for node in ast.parse(row["code"]).body if isinstance(node, ast.Import | ast.ImportFrom)]
        setup = "\n".join([*map(ast.unparse, used), *row["test_imports"]])
        problem = Problem(tests=tests, entry_point=_called(row["test_list"][0], row["code"]), setup=setup)
        submissions.append((str(row["task_id"]), problem, row["code"]))
    assert len(submissions) == 427
    assert _wrong(judge, submissions) == {}


def _called(test: str, code: str) -> str:
    """The function of the program that a test calls."""
    defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
    return next(
        node.func.id
        for node in ast.walk(ast.parse(test))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in defined
    )


@pytest.mark.parametrize("path", ["HumanEvalPlus-v0.1.10.jsonl.gz", "MbppPlus-v0.2.0.jsonl.gz"])
def test_all_references_of_evalplus_are_accepted_and_none_is_no_answer(judge: Judge, path: str) -> None:
    limits = replace(_TRUSTED, output_kib=1 << 16)
    with closing(make_sandbox("process")) as backend:
        submissions = []
        for row in _rows(f"evalplus/{path}"):
            source = row["prompt"] + row["canonical_solution"]
            problem = plus_problem(
                {**row, "solution": source}, row["task_id"], open_sandbox=lambda _: backend.open(limits)
            )
            submissions.append((row["task_id"], problem, source))
    assert len(submissions) == {"HumanEvalPlus-v0.1.10.jsonl.gz": 164, "MbppPlus-v0.2.0.jsonl.gz": 378}[path]
    assert _wrong(judge, submissions) == {}
    nothing = [
        (name, problem, f"def {problem.entry_point}(*given):\n    return None\n")
        for name, problem, _ in submissions
    ]
    assert set(_wrong(judge, nothing)) == {name for name, *_ in submissions} - _ACCEPT_NONE
