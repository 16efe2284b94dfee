"""The reward of programs: which text is judged, and what the verdict is worth."""

from __future__ import annotations

import time
from typing import Any

import pytest

from agentrl.errors import BadConfig, BadData
from agentrl.judge import CallTest, Problem, problem_to_json
from agentrl.registry import make_reward
from agentrl.reward import Evidence
from agentrl.rewards.unit_tests import UnitTests, program_in
from agentrl.sandbox import Limits
from agentrl.types import Message, Score, Task

_PROBLEM = Problem(
    entry_point="f", tests=tuple(CallTest(id=str(x), args=(x,), expected=x * x) for x in range(4))
)


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
    ],
)
def test_the_program_is_the_last_fenced_python(answer: str, program: str) -> None:
    assert program_in(answer) == program


@pytest.mark.parametrize(
    "hostile",
    ["\n".join("~" * 300 + f" x{line}" for line in range(300)), "~" * 64_000 + "`", "```\n" * 20_000],
)
def test_finding_the_program_takes_one_pass(hostile: str) -> None:
    began = time.perf_counter()
    program_in(hostile)
    assert time.perf_counter() - began < 0.5


def _score(answer: str, **settings: Any) -> Score:
    reward = make_reward("unit_tests", sandbox="process", **settings)
    assert isinstance(reward, UnitTests)
    reward.limits = Limits(
        cpu_s=None, memory_mib=None, pids=None, disk_mib=None, wall_s=60, output_kib=64, network=True
    )
    task = Task(id="t", prompt=(Message("user", "Square it."),), truth={"problem": problem_to_json(_PROBLEM)})
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


def test_what_can_not_be_judged_is_refused() -> None:
    with pytest.raises(BadConfig, match="it is 'all' or 'fraction'"):
        UnitTests(mode="most")  # type: ignore[arg-type]
    task = Task(id="t", prompt=(Message("user", "?"),), truth={"problem": "none"})
    with pytest.raises(BadData, match="use problem_to_json"):
        UnitTests(sandbox="process")(Evidence(task, (Message("assistant", ""),)))
