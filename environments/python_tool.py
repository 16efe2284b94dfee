r"""Questions answered with the help of a Python interpreter that keeps its state, as in ReTool and ToRL.

The tool ``python`` runs a cell in an interpreter of the episode's own, inside a sandbox: variables, functions
and files persist until the episode ends. It shows what was printed, the value of the last expression, and
errors in short. The answer goes into ``\boxed{}`` and is compared as mathematics.

By default the questions are procedural, seeded counting and number theory that a short program answers;
``dataset`` takes what ``math`` takes: "gsm8k", "math", "math500", a path, a hub id. Train and test of the
procedural ones are disjoint: the hash of a question says to which of the two it belongs.

ReTool: arXiv 2504.11536; ToRL: arXiv 2503.23383.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from random import Random
from typing import Any, ClassVar

from agentrl.errors import BadConfig, UserError
from agentrl.interpreter import Interpreter
from agentrl.questions import Questions
from agentrl.sandbox import Limits
from agentrl.seeds import derive
from agentrl.session_env import SessionEnv
from agentrl.tasks import MadeTasks
from agentrl.tools import tool
from agentrl.types import Message, Task, ToolCall

__all__ = ["PythonTool"]

_TEST_SHARE = 8  # one question of this many belongs to the test split
_RESULT_BYTES = 4000  # kept of what a cell shows


class PythonTool(SessionEnv):
    r"""Answer a question in ``\boxed{}`` with a Python interpreter at hand."""

    reward = "boxed"
    system = r"Use the Python tool to compute. Put the final answer in \boxed{}."
    # The run lasts as long as the episode, waiting for the model included: cells have a deadline instead.
    session_limits: ClassVar[Limits] = Limits(wall_s=None, cpu_s=60.0)
    seconds = 10.0

    def __init__(
        self,
        *,
        dataset: str = "counting",
        question_key: str | None = None,
        answer_key: str | None = None,
        splits: Mapping[str, str] | None = None,
        limit: int | None = None,
        seed: int = 0,
        train_tasks: int = 10_000,
        test_tasks: int = 1_000,
        **settings: Any,
    ) -> None:
        """``dataset`` is "counting", or what ``math`` takes with its columns, splits and limit.

        ``seed``, ``train_tasks`` and ``test_tasks`` are of "counting".
        """
        if min(train_tasks, test_tasks) < 1:
            raise UserError(
                f"PythonTool(train_tasks={train_tasks}, test_tasks={test_tasks}): both are above 0"
            )
        self._questions: Questions | None = None
        self._sizes, self._seed = {"train": train_tasks, "test": test_tasks}, seed
        columns = {"question_key": question_key, "answer_key": answer_key, "splits": splits, "limit": limit}
        if dataset != "counting":
            self._questions = Questions(dataset, asked_by="PythonTool", **columns)  # type: ignore[arg-type]
            self.splits = self._questions.splits  # type: ignore[misc]  # which they are depends on the data
        elif any(value is not None for value in columns.values()):
            given = next(name for name, value in columns.items() if value is not None)
            raise BadConfig(
                f"PythonTool({given}=...) has no effect without a dataset: name one, or leave it out"
            )
        self._interpreter: Interpreter | None = None
        super().__init__(**settings)
        if self.limits.wall_s is not None:
            raise BadConfig(
                f"PythonTool(limits={{'wall_s': {self.limits.wall_s:g}}}): it is None, no other: "
                "it would count while the model writes; set seconds for what the cells of a message may take"
            )

    @tool(remote=True)
    async def python(self, code: str) -> str:
        """Run Python code. Variables persist from call to call. Returns what is printed and the value of the
        last expression."""
        return await self.in_turn(self._cell, code)

    def tasks(self, split: str) -> Sequence[Task]:
        if self._questions is None:
            return MadeTasks(functools.partial(_counting_task, self._seed), split, range(self._sizes[split]))
        return [
            Task(
                id=f"{split}-{index}",
                prompt=(Message("user", question.text),),
                truth={"answer": question.answer, "gold": question.gold},
                meta=question.meta,
            )
            for index, question in enumerate(self._questions.read(split))
        ]

    def find_task(self, task_id: str) -> Task:
        split, _, index = task_id.partition("-")
        if self._questions is not None:
            return super().find_task(task_id)
        if split in self._sizes and index.isdecimal() and int(index) < self._sizes[split]:
            return _counting_task(self._seed, split, int(index))
        raise UserError(f"PythonTool has no task {task_id!r}; ids run from 'train-0' and from 'test-0'")

    def gold(self, task: Task) -> tuple[Message, ...]:
        """One cell that computes the answer, then the box; for read questions the worked solution."""
        if "program" not in task.truth:
            return (Message("assistant", task.truth["gold"]),)
        call = ToolCall(id="call_0", name="python", arguments={"code": task.truth["program"]})
        answer = Message("assistant", rf"\boxed{{{task.truth['answer']}}}")
        return (Message("assistant", "", (call,)), answer)

    def release(self) -> None:
        """End the interpreter, with its sandbox."""
        interpreter, self._interpreter = self._interpreter, None
        if interpreter is not None:
            interpreter.close()
        super().release()

    def _cell(self, code: str) -> str:
        if self._interpreter is None:
            self._interpreter = Interpreter(self.open_session, most_bytes=_RESULT_BYTES)
        self._interpreter.start()
        began = time.monotonic()
        try:
            return self._interpreter.run(code, deadline_s=self.left_s)
        finally:
            self.spend(time.monotonic() - began)


# -- questions that a program answers --


def _digits(random: Random) -> tuple[str, str, int]:
    limit, total = random.randrange(200, 3000), random.randrange(3, 18)
    text = f"How many integers from 1 to {limit} have a digit sum of {total}?"
    program = f"sum(sum(map(int, str(n))) == {total} for n in range(1, {limit + 1}))"
    return text, program, sum(sum(map(int, str(n))) == total for n in range(1, limit + 1))


def _coprime(random: Random) -> tuple[str, str, int]:
    limit, other = random.randrange(100, 3000), random.randrange(12, 400)
    text = f"How many integers from 1 to {limit} have no common factor with {other} but 1?"
    program = f"from math import gcd\nsum(gcd(n, {other}) == 1 for n in range(1, {limit + 1}))"
    return text, program, sum(math.gcd(n, other) == 1 for n in range(1, limit + 1))


def _power(random: Random) -> tuple[str, str, int]:
    base, exponent, modulus = (random.randrange(*span) for span in ((2, 60), (50, 2000), (11, 997)))
    text = f"What is the remainder of {base} to the power of {exponent}, divided by {modulus}?"
    return text, f"pow({base}, {exponent}, {modulus})", pow(base, exponent, modulus)


def _coins(random: Random) -> tuple[str, str, int]:
    coins, total = sorted(random.sample(range(1, 26), 3)), random.randrange(30, 200)
    named = f"{coins[0]}, {coins[1]} and {coins[2]}"
    text = f"In how many ways can {total} cents be paid with coins of {named} cents?"
    program = (
        f"ways = [1] + [0] * {total}\nfor coin in {coins}:\n    for paid in range(coin, {total + 1}):\n"
        "        ways[paid] += ways[paid - coin]\nways[-1]"
    )
    ways = [1] + [0] * total
    for coin in coins:
        for paid in range(coin, total + 1):
            ways[paid] += ways[paid - coin]
    return text, program, ways[-1]


def _divisible(random: Random) -> tuple[str, str, int]:
    first, second, limit = random.randrange(3, 30), random.randrange(3, 30), random.randrange(200, 5000)
    text = f"What is the sum of all positive integers below {limit} that {first} or {second} divides?"
    program = f"sum(n for n in range(1, {limit}) if n % {first} == 0 or n % {second} == 0)"
    return text, program, sum(n for n in range(1, limit) if n % first == 0 or n % second == 0)


_KINDS: tuple[Callable[[Random], tuple[str, str, int]], ...] = (_digits, _coprime, _power, _coins, _divisible)


def _counting_task(seed: int, split: str, index: int) -> Task:
    """The task at a position of a split, always the same one."""
    kind = _KINDS[index % len(_KINDS)]  # in turn, so that any range of indices is balanced
    for attempt in count():
        text, program, answer = kind(Random(derive(seed, "python_tool", split, index, attempt)))
        if _split_of(text) == split:
            break
    return Task(
        id=f"{split}-{index}",
        prompt=(Message("user", text),),
        truth={"answer": str(answer), "program": program},
        meta={"kind": kind.__name__.strip("_")},
    )


def _split_of(text: str) -> str:
    return "test" if hashlib.sha256(text.encode()).digest()[0] % _TEST_SHARE == 0 else "train"
