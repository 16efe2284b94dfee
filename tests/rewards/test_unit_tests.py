"""The reward of programs: which text is judged, and what the verdict is worth."""

from __future__ import annotations

import time
from dataclasses import replace
from textwrap import indent
from typing import Any

import pytest

from agentrl.errors import BadConfig, BadData
from agentrl.judge import AssertTest, CallTest, Problem, problem_to_json
from agentrl.registry import make_reward
from agentrl.reward import Evidence
from agentrl.rewards.unit_tests import UnitTests, program_in
from agentrl.sandbox import Limits
from agentrl.types import Message, Score, Task

_PROBLEM = Problem(
    entry_point="f", tests=tuple(CallTest(id=str(x), args=(x,), expected=x * x) for x in range(4))
)

_FENCED_DOCSTRING = 'def f(n):\n    """Twice.\n\n    ```\n    f(3)\n    ```\n    """\n    return 2 * n\n'


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("def f(x): return 1", "def f(x): return 1"),
        ("a\n```python\nfirst\n```\nb\n```python\nlast\n```\nc", "last\n"),
        ("```\nbare\n```", "bare\n"),
        ("```py\ncode\n```\n```text\noutput\n```", "code\n"),
        ("```rust\nfn main() {}\n```", ""),
        ("```python\nnever closed", "never closed"),
        ("```python\ncode\n```\nOutput:\n```\n1\n```", "code\n"),
        ("```\nbare\n```\n```", "bare\n"),
        ("```python\r\na\r\nb\r\n```\r\n", "a\nb\n"),
        ("```python\nreturn 1```", "return 1"),
        ("~~~python\n```\n~~~", "```\n"),
        ("```python\n'```'\n```", "'```'\n"),
        ("<think>```python\nno\n```</think>\n```python\nyes\n```", "yes\n"),
        ("1. So:\n\n   ```python\n   def f():\n       return 1\n   ```\n", "def f():\n    return 1\n"),
        ("  ```python\n a\n   b\n```", "a\n b\n"),
        *(
            (f"```{label}\ncode\n```", "code\n")
            for label in (
                "python:sol.py",
                "{python}",
                "{.python .numberLines}",
                "python3.11",
                "Python title=a",
            )
        ),
        ("```python-repl\n>>> 1\n```", ""),
        ("```pytest\ncode\n```", ""),
        ("````python\n'''\n```\n'''\n````", "'''\n```\n'''\n"),
        # A fence four columns in is code where one further out follows, else it closes.
        (f"```python\n{_FENCED_DOCSTRING}```\n", _FENCED_DOCSTRING),
        ("- So:\n" + indent(f"```python\n{_FENCED_DOCSTRING}```\n", "  "), _FENCED_DOCSTRING),
        (f"```python\n{_FENCED_DOCSTRING.replace('```', '```python', 1)}```\n", None),
        ("```python\n    x = 1\n    ```\nDone.", "    x = 1\n"),
        ("```python\na\n    ```\nor\n```python\nb\n    ```\n", "b\n"),
        # No line opens a fence.
        ("# ~~~ helpers ~~~\nx = 1\n", "# ~~~ helpers ~~~\nx = 1\n"),
        ("def f(x):\n    print('```')", "def f(x):\n    print('```')"),
        # The fence stands behind text.
        ("Here: ```python\ncode\n```", "code\n"),
        ("1. ``` py\n   def f():\n       return 1\n   ```", "def f():\n    return 1\n"),
        ("I write ```python\n\n```python\ncode\n```", "code\n"),
        ("It is in ```python\nas asked:\n```python\ncode\n```", "code\n"),
        ("Marked ```python\n```\ncode\n```", "code\n"),
        ("Marked ```rust\n```\ncode\n```", "code\n"),
    ],
)
def test_the_program_is_the_last_fenced_python(answer: str, program: str | None) -> None:
    assert program_in(answer) == (answer[len("```python\n") : -len("```\n")] if program is None else program)


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("```python\ns.split('</think>')\n```", "s.split('</think>')\n"),
        ('```python\ns.split("<think>")\nx\n```', 's.split("<think>")\nx\n'),
        ("so</think>\n```python\n'<think>' + '</think>'\n```", "'<think>' + '</think>'\n"),
        ("<think>```python\n'</think>'\n```</think>\n```python\nyes\n```", "yes\n"),
        ("```python\n'</think>'\n```\nhm</think>It is 4.", "It is 4."),
        ("```python\nno\n</think>\n```python\nyes\n```", "yes\n"),
        ("<think>\n```python\n'</think>'\n```\n```python\nno\n```", ""),
        ("<think>'</think>'\n```python\nyes\n```", "yes\n"),
        ("```python\nyes\n```\n<think>\n```python\n'</think>'\n```\n```python\nno\n```", "yes\n"),
    ],
)
def test_a_tag_that_a_program_quotes_is_code_and_thinking_stays_no_answer(answer: str, program: str) -> None:
    assert program_in(answer) == program


@pytest.mark.parametrize(
    "hostile",
    [
        "\n".join("~" * 300 + f" x{line}" for line in range(300)),
        "~" * 64_000 + "`",
        "```\n" * 20_000,
        "```\n    ```\n```python\n" * 3_000,
        "x ```python\n" * 5_000,
        "x ```python\n" * 5_000 + "```python\ncode\n```",
        "".join(
            " " * blanks + "`" * fence + "\na\n" for fence in range(40, 3, -1) for blanks in range(0, 120, 4)
        ),
        "```\n" + " " * 30_000 + "'" + "</think>" * 4_000 + "'",
        "`~" * 30_000,
        "```" + " " * 64_000 + "x y",
    ],
)
def test_finding_the_program_takes_one_pass(hostile: str) -> None:
    began = time.perf_counter()
    program_in(hostile)
    assert time.perf_counter() - began < 0.5


def _score(answer: str, **settings: Any) -> Score:
    return _judged(answer, _PROBLEM, **settings)


def _judged(answer: str, problem: Problem, **settings: Any) -> Score:
    reward = make_reward("unit_tests", sandbox="process", cpu_s=None, memory_mib=None, **settings)
    task = Task(id="t", prompt=(Message("user", "Square it."),), truth={"problem": problem_to_json(problem)})
    score = reward(Evidence(task, (*task.prompt, Message("assistant", answer))))
    assert isinstance(score, Score)
    return score


def test_all_tests_or_nothing() -> None:
    right = _score("```python\ndef f(x):\n    return x * x\n```")
    assert (right.value, dict(right.parts)) == (
        1.0,
        {"compiled": 1.0, "passed": 1.0, "hack_flags": 0.0, "visible_only": 0.0},
    )
    assert _score("```python\ndef f(x):\n    return x + x\n```").value == 0.0


def test_the_share_that_is_passed() -> None:
    score = _score("def f(x):\n    return x + x", mode="fraction")
    assert (score.value, score.parts["passed"]) == (0.5, 0.5)


def test_attacks_are_worth_nothing_and_are_counted() -> None:
    score = _score("import os\nos._exit(0)")
    assert (score.value, score.parts["hack_flags"]) == (0.0, 1.0)
    broken = _score("def f(x) return x")
    assert (broken.value, broken.parts["compiled"]) == (0.0, 0.0)
    assert broken.note.startswith("CE: ")


@pytest.mark.parametrize("trust", ["remote", "shared"])
def test_an_assertion_that_fails_is_shown_where_it_is_visible(trust: Any) -> None:
    tests = (
        AssertTest(id="right", code="assert f(0) == 0", visible=True, trust=trust),
        AssertTest(id="shown", code="x = 3\nassert f(x) == 9", visible=True, trust=trust),
        AssertTest(id="hidden", code="assert f(7001) == 49014001", trust=trust),
    )
    problem = Problem(entry_point="f", tests=tests)
    note = _judged("def f(x):\n    return 0", problem).note
    assert note == "WA: AssertionError\nThe test:\nx = 3\nassert f(x) == 9"
    assert _judged("def f(x):\n    return [][x]", problem).note.endswith("The test:\nassert f(0) == 0")
    assert _judged("def f(x):\n    return 3 * x", problem).note == "WA: a hidden test failed"
    hidden = _judged(
        "def f(x):\n    return 3 * x", replace(problem, tests=(tests[0], tests[2])), mode="fraction"
    )
    assert (hidden.value, hidden.note) == (0.5, "WA: a hidden test failed")
    assert "The test" not in _judged("def f(x) return", problem).note


def test_without_a_limit_of_cpu_time_there_is_one_of_the_clock() -> None:
    assert UnitTests(cpu_s=None).limits == Limits(cpu_s=None, wall_s=60.0)
    assert UnitTests(sandbox="process", cpu_s=2.0).limits == Limits(cpu_s=2.0, wall_s=10.0)
    with pytest.raises(BadConfig, match="set cpu_s=None to do without"):
        make_reward("unit_tests", sandbox="process")(_right_answer())
    with pytest.raises(BadConfig, match="set memory_mib=None to do without"):
        make_reward("unit_tests", sandbox="process", cpu_s=None)(_right_answer())


def _right_answer() -> Evidence:
    task = Task(id="t", prompt=(Message("user", "?"),), truth={"problem": problem_to_json(_PROBLEM)})
    return Evidence(task, (Message("assistant", "def f(x): return x * x"),))


def test_what_can_not_be_judged_is_refused() -> None:
    with pytest.raises(BadConfig, match="it is 'all' or 'fraction'"):
        UnitTests(mode="most")  # type: ignore[arg-type]
    task = Task(id="t", prompt=(Message("user", "?"),), truth={"problem": "none"})
    with pytest.raises(BadData, match="use problem_to_json"):
        UnitTests(sandbox="process")(Evidence(task, (Message("assistant", ""),)))
