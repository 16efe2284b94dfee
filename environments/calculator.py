r"""Arithmetic with a calculator that does one operation at a time: procedural, seeded, four levels.

Level n needs n calls, each on the result of the one before: level 1 asks for one operation, 2 and 3 for an
expression, 4 tells a story of four steps. Every result on the way is an integer from 0 to a million, so all
are exact. The answer goes into ``\boxed{}``. A task is made when it is asked for and is the same in every
process. Train and test are disjoint: the hash of its numbers and operations says to which of the two a
problem belongs, whatever its wording.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Any, Literal

from agentrl.errors import ToolError, UserError
from agentrl.seeds import derive
from agentrl.tasks import MadeTasks
from agentrl.tool_env import ToolEnv
from agentrl.tools import tool
from agentrl.types import Message, Task, ToolCall

__all__ = ["Calculator"]

Operator = Literal["+", "-", "*"]
Step = tuple[str, int]  # operator, operand

_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}
_LEVELS = (1, 2, 3, 4)
_LARGEST_RESULT = 1_000_000  # of a problem's steps
_LARGEST_FACTOR = 9  # where a result is multiplied; level 1 multiplies any two operands
_LARGEST_OPERAND = 10**15  # that the tool takes: whatever a policy chains together stays cheap
_TEST_SHARE = 8  # one problem of this many belongs to the test split

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon", "Kim", "Leo")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "keys", "nuts", "pens", "shells", "stamps")
_QUESTIONS = ("What is {}?", "Compute {}.", "Find {}.", "How much is {}?")
_BEGINNINGS = ("{name} has {n} {thing}.", "{name} starts with {n} {thing}.", "{name} finds {n} {thing}.")
_EVENTS: Mapping[str, tuple[str, ...]] = {
    "+": ("{name} buys {n} more.", "{name} gets {n} more.", "A friend brings {n} more."),
    "-": ("{name} gives away {n}.", "{name} loses {n}.", "A friend takes {n}."),
    "*": ("Then {name} has {n} times as many.", "{name} trades them for {n} times as many."),
}
_ENDINGS = ("How many {thing} does {name} have?", "How many {thing} are there now?")


class Calculator(ToolEnv):
    """Compute with a tool that does one operation on two integers."""

    reward = "numeric"
    inline_reset = True
    system = r"Use the tool for each step. Put the final answer in \boxed{}."

    def __init__(
        self,
        *,
        levels: Sequence[int] = _LEVELS,
        min_operand: int = 1,
        max_operand: int = 999,
        seed: int = 0,
        train_tasks: int = 100_000,
        test_tasks: int = 2_000,
        **settings: Any,
    ) -> None:
        if not levels or not set(levels) <= set(_LEVELS):
            raise UserError(f"Calculator(levels={levels!r}): name one or more of {_LEVELS}")
        if not 9 <= max_operand <= _LARGEST_RESULT // 2:
            raise UserError(f"Calculator(max_operand={max_operand}): it lies in 9 to {_LARGEST_RESULT // 2}")
        if not 1 <= min_operand <= max_operand // 2:
            raise UserError(f"Calculator(min_operand={min_operand}): it lies in 1 to {max_operand // 2}")
        if min(train_tasks, test_tasks) < 1:
            raise UserError(
                f"Calculator(train_tasks={train_tasks}, test_tasks={test_tasks}): both are above 0"
            )
        self._recipe = _Recipe(tuple(levels), range(min_operand, max_operand + 1), seed)
        self._sizes = {"train": train_tasks, "test": test_tasks}
        super().__init__(**settings)

    @tool
    async def calculate(self, a: int, op: Operator, b: int) -> int:
        """Do one operation on two integers."""  # async, because it is done sooner than a thread begins
        if max(abs(a), abs(b)) > _LARGEST_OPERAND:
            raise ToolError(f"the operands must not exceed {_LARGEST_OPERAND}")
        return _OPERATIONS[op](a, b)

    def tasks(self, split: str) -> Sequence[Task]:
        return MadeTasks(self._recipe.task, split, range(self._sizes[split]))

    def find_task(self, task_id: str) -> Task:
        split, _, index = task_id.partition("-")
        if split in self._sizes and index.isdecimal() and int(index) < self._sizes[split]:
            return self._recipe.task(split, int(index))
        raise UserError(f"Calculator has no task {task_id!r}; ids run from 'train-0' and from 'test-0'")

    def gold(self, task: Task) -> tuple[Message, ...]:
        """One call a turn, then the boxed answer."""
        value = task.truth["start"]
        turns = []
        for index, (symbol, operand) in enumerate(task.truth["steps"]):
            arguments = {"a": value, "op": symbol, "b": operand}
            call = ToolCall(id=f"call_{index}", name="calculate", arguments=arguments)
            turns.append(Message("assistant", "", (call,)))
            value = _OPERATIONS[symbol](value, operand)
        return (*turns, Message("assistant", rf"\boxed{{{value}}}"))


@dataclass(frozen=True, slots=True)
class _Recipe:
    """From a position in a split to its task, always the same one."""

    levels: tuple[int, ...]
    operands: range  # factors behind a result are smaller
    seed: int

    def task(self, split: str, index: int) -> Task:
        level = self.levels[index % len(self.levels)]  # in turn, so that any range of indices is balanced
        for attempt in count():
            random = Random(derive(self.seed, "calculator", split, index, attempt))
            start, steps = self._problem(random, level)
            if _split_of(start, steps) == split:
                break
        text = _story(random, start, steps) if level == 4 else _question(random, start, steps)
        answer = start
        for symbol, operand in steps:
            answer = _OPERATIONS[symbol](answer, operand)
        return Task(
            id=f"{split}-{index}",
            prompt=(Message("user", text),),
            truth={"answer": str(answer), "start": start, "steps": steps},
            meta={"level": level},
        )

    def _problem(self, random: Random, level: int) -> tuple[int, tuple[Step, ...]]:
        least, most = self.operands[0], self.operands[-1]
        start = value = _draw(random, self.operands)
        factors = (max(least, 2), most) if level == 1 else (2, _LARGEST_FACTOR)
        steps: list[Step] = []
        for _ in range(level):
            ranges = {
                "+": range(least, min(most, _LARGEST_RESULT - value) + 1),
                "-": range(least, min(most, value) + 1),
                "*": range(factors[0], min(factors[1], _LARGEST_RESULT // max(value, 1)) + 1),
            }
            symbol = random.choice([symbol for symbol, operands in ranges.items() if operands])
            operand = _draw(random, ranges[symbol])
            steps.append((symbol, operand))
            value = _OPERATIONS[symbol](value, operand)
        return start, tuple(steps)


def _draw(random: Random, numbers: range) -> int:
    """One of ``numbers``, of each length equally often.

    Of uniform numbers up to 999 one in ten would have less than three digits, and a policy could do without.
    """
    length = random.randint(len(str(numbers[0])), len(str(numbers[-1])))
    return random.choice(range(max(numbers[0], 10 ** (length - 1)), min(numbers[-1], 10**length - 1) + 1))


def _split_of(start: int, steps: tuple[Step, ...]) -> str:
    digest = hashlib.sha256(repr((start, steps)).encode()).digest()
    return "test" if digest[0] % _TEST_SHARE == 0 else "train"


def _question(random: Random, start: int, steps: tuple[Step, ...]) -> str:
    """``Compute (12 + 345) * 3.``"""
    expression = str(start)
    for index, (symbol, operand) in enumerate(steps):
        left = f"({expression})" if index else expression
        expression = f"{left} {symbol} {operand}"
    return random.choice(_QUESTIONS).format(expression)


def _story(random: Random, start: int, steps: tuple[Step, ...]) -> str:
    """``Ada has 12 coins. Ada buys 345 more. ... How many coins does Ada have?``"""
    who = {"name": random.choice(_NAMES), "thing": random.choice(_THINGS)}
    sentences = [random.choice(_BEGINNINGS).format(n=start, **who)]
    sentences += [random.choice(_EVENTS[symbol]).format(n=operand, **who) for symbol, operand in steps]
    return " ".join([*sentences, random.choice(_ENDINGS).format(**who)])
