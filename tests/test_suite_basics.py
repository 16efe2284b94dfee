"""The bundled offline suite: its rows are complete, its gold solutions right, its wrong solutions rejected.

The solutions are our own data, so they run in plain Python processes here, without the judge and its sandbox.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import textwrap
from collections import Counter
from functools import cache
from importlib import resources
from typing import Any

import pytest

_AT_LEAST = 150  # tasks
_MOST_BYTES = 1_500_000  # of the file
_MOST_TEST_BYTES = 20_000  # of one test's arguments or stdin
_ROW = {"id", "title", "statement", "kind", "tests", "solution", "wrong", "level", "topics"}
_PARTS = {"call": {"args", "expected", "visible"}, "stdin": {"stdin", "stdout", "visible"}}

# Reads rows as JSON, writes for each of a row's programs (gold first) the tests that it fails. A program that
# does not end is cut short by an alarm of CPU time, so that a busy machine changes nothing; what a program
# prints never reaches the runner's own stdout.
_RUNNER = textwrap.dedent(
    """
    import contextlib, copy, io, json, signal, sys

    class Late(BaseException):
        pass

    def late(*_):
        raise Late

    def answer(row, code, test):
        if row["kind"] == "call":
            space = {"__name__": "solution"}
            exec(code, space)
            return space[row["entry_point"]](*copy.deepcopy(test["args"]))
        sys.stdin, printed = io.StringIO(test["stdin"]), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            exec(code, {"__name__": "__main__"})
        return lines(printed.getvalue())

    def lines(text):
        return [line.rstrip() for line in text.rstrip().splitlines()]

    def passes(row, code, test):
        wanted = test["expected"] if row["kind"] == "call" else lines(test["stdout"])
        signal.setitimer(signal.ITIMER_VIRTUAL, 3)
        try:
            got = answer(row, code, test)
        except (Exception, Late):
            return False
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        return type(got) is type(wanted) and got == wanted

    signal.signal(signal.SIGVTALRM, late)
    found = []
    for row in json.load(sys.stdin):
        failed = []
        for source in (row["solution"], *row["wrong"]):
            code = compile(source, row["id"], "exec")
            failed.append([n for n, test in enumerate(row["tests"]) if not passes(row, code, test)])
        found.append(failed)
    json.dump(found, sys.stdout)
    """
)


@cache
def _text() -> str:
    return (resources.files("agentrl.environments") / "data" / "basics.jsonl").read_text(encoding="utf-8")


@cache
def _rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text().splitlines()]


@pytest.fixture(scope="module")
def failures() -> dict[str, list[set[int]]]:
    """By task: for the gold solution and then each wrong one, the numbers of the tests that it fails."""
    rows = _rows()
    halves = [rows[::2], rows[1::2]]
    running = [
        subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in halves
    ]
    found: dict[str, list[set[int]]] = {}
    for process, half in zip(running, halves, strict=True):
        assert process.stdin is not None
        process.stdin.write(json.dumps(half))
        process.stdin.close()
        process.stdin = None
    for process, half in zip(running, halves, strict=True):
        output, _ = process.communicate(timeout=300)
        for row, failed in zip(half, json.loads(output), strict=True):
            found[row["id"]] = [set(numbers) for numbers in failed]
    return found


def _tests(row: dict[str, Any], *, visible: bool) -> list[dict[str, Any]]:
    return [test for test in row["tests"] if test["visible"] is visible]


def _input(test: dict[str, Any]) -> str:
    return json.dumps(test["args"] if "args" in test else test["stdin"], sort_keys=True)


def _is_plain(value: Any) -> bool:
    """JSON without floats, so that equality is exact."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | str)


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def test_the_suite_is_large_enough_and_small_enough_to_ship() -> None:
    assert len(_rows()) >= _AT_LEAST
    assert len(_text().encode()) <= _MOST_BYTES
    levels = Counter(row["level"] for row in _rows())
    kinds = Counter(row["kind"] for row in _rows())
    assert set(levels) == {1, 2, 3, 4}
    assert min(levels.values()) >= 10
    assert min(kinds["call"], kinds["stdin"]) >= 35


def test_no_two_tasks_are_the_same() -> None:
    for key in ("id", "title", "statement", "solution"):
        repeated = [text for text, n in Counter(_squeezed(row[key]) for row in _rows()).items() if n > 1]
        assert not repeated, key


def test_every_row_has_exactly_the_documented_fields() -> None:
    for row in _rows():
        extra = {"entry_point", "signature"} if row["kind"] == "call" else set()
        assert set(row) == _ROW | extra, row["id"]
        assert re.fullmatch(r"basics-[a-z0-9]+(-[a-z0-9]+)*", row["id"])
        assert all(
            isinstance(row[key], str) and row[key].strip() for key in ("title", "statement", "solution")
        )
        assert row["topics"], row["id"]
        assert all(isinstance(topic, str) for topic in row["topics"]), row["id"]
        for test in row["tests"]:
            assert set(test) == _PARTS[row["kind"]], row["id"]
            assert isinstance(test["visible"], bool), row["id"]


def test_inputs_and_answers_are_plain_bounded_data() -> None:
    for row in _rows():
        for test in row["tests"]:
            assert len(_input(test)) <= _MOST_TEST_BYTES, row["id"]
            if row["kind"] == "call":
                assert isinstance(test["args"], list), row["id"]
                assert _is_plain(test["args"]), row["id"]
                assert _is_plain(test["expected"]), row["id"]
            else:
                assert isinstance(test["stdin"], str), row["id"]
                assert test["stdout"].strip(), row["id"]


def test_visible_and_hidden_tests_are_enough_and_all_different() -> None:
    for row in _rows():
        assert 2 <= len(_tests(row, visible=True)) <= 3, row["id"]
        assert 8 <= len(_tests(row, visible=False)) <= 15, row["id"]
        inputs = [_input(test) for test in row["tests"]]
        assert len(set(inputs)) == len(inputs), row["id"]


def test_no_task_is_solved_by_one_constant() -> None:
    for row in _rows():
        answers = [json.dumps(test.get("expected", test.get("stdout"))) for test in row["tests"]]
        assert len(set(answers)) > 1, row["id"]


def test_a_statement_says_what_to_write() -> None:
    for row in _rows():
        if row["kind"] == "stdin":
            assert "standard input" in row["statement"].lower(), row["id"]
            continue
        (function,) = ast.parse(f"{row['signature']}: ...").body
        assert isinstance(function, ast.FunctionDef)
        names = ", ".join(argument.arg for argument in function.args.args)
        assert function.name == row["entry_point"]
        assert f"`{function.name}({names})`" in row["statement"], row["id"]
        assert f"{row['signature']}:\n" in row["solution"], row["id"]
        assert all(len(test["args"]) == len(function.args.args) for test in row["tests"]), row["id"]


def test_every_gold_solution_passes_all_its_tests(failures: dict[str, list[set[int]]]) -> None:
    assert {name: failed[0] for name, failed in failures.items() if failed[0]} == {}


def test_every_wrong_solution_compiles_and_fails_a_hidden_test(failures: dict[str, list[set[int]]]) -> None:
    for row in _rows():
        hidden = {number for number, test in enumerate(row["tests"]) if not test["visible"]}
        wrong = failures[row["id"]][1:]
        assert len(wrong) >= 2, row["id"]
        assert len(set(row["wrong"])) == len(wrong), row["id"]
        assert row["solution"] not in row["wrong"], row["id"]
        assert all(failed & hidden for failed in wrong), row["id"]


def test_most_tasks_have_a_wrong_solution_that_only_hidden_tests_reject(
    failures: dict[str, list[set[int]]],
) -> None:
    caught = 0
    for row in _rows():
        visible = {number for number, test in enumerate(row["tests"]) if test["visible"]}
        caught += any(not failed & visible for failed in failures[row["id"]][1:])
    assert caught >= 0.8 * len(_rows())
