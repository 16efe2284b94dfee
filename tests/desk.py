"""Environments with tools of every kind and without, for the tests of both."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from agentrl.env import Env, Step
from agentrl.errors import ToolError, WorldError
from agentrl.reward import Evidence
from agentrl.tool_env import ToolEnv
from agentrl.tools import tool
from agentrl.types import Message, Score, Task, ToolCall

__all__ = ["Desk", "Echo", "answer", "begun", "calls", "right", "task"]


def task(split: str, index: int) -> Task:
    return Task(
        id=f"{split}-{index}",
        prompt=(Message("user", f"Say {split} {index}."),),
        truth={"answer": str(index)},
    )


def right(evidence: Evidence) -> Score:
    value = float(evidence.answer == evidence.task.truth["answer"])
    return Score(value, {"right": value}, "compared")


class Desk(ToolEnv):
    """Tools of every kind; the right answer is the task's index."""

    reward = right
    all_here: asyncio.Barrier  # where the tool `meet` waits for the others

    def setup(self, task: Task) -> None:
        self.log: list[str] = []

    def tasks(self, split: str) -> Sequence[Task]:
        return [task(split, index) for index in range(5)]

    def gold(self, task: Task) -> Sequence[Message]:
        return (calls(("echo", {"text": "hi"})), Message("assistant", task.truth["answer"]))

    @tool
    def echo(self, text: str) -> str:
        """Say it again."""
        self.log.append(text)
        return text

    @tool
    async def wait(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return f"waited {seconds}"

    @tool
    async def meet(self) -> str:
        await self.all_here.wait()
        return "met"

    @tool
    def refuse(self) -> str:
        raise ToolError("not today")

    @tool
    def lose(self) -> str:
        raise WorldError("the sandbox is gone")

    @tool
    def crash(self) -> str:
        raise ZeroDivisionError("a bug")

    @tool
    def flood(self) -> str:
        return "x" * 1000

    @tool
    def submit(self) -> str:
        self.end("submitted")
        return "received"

    @staticmethod
    @tool
    def double(n: int) -> int:
        return 2 * n


class Echo(Env):
    """The smallest environment without tools: says everything once more, three times."""

    splits = ("all",)

    def tasks(self, split: str) -> Iterator[Task]:
        return (task(split, index) for index in itertools.count())

    def gold(self, task: Task) -> Sequence[Message]:
        return (Message("assistant", "a"),) * 3

    def setup(self, task: Task) -> None:
        self.left = 3

    def step(self, action: Message) -> Step:
        self.accept(action)
        self.left -= 1
        reply = Message("user", action.content)
        return self.transition(reply, score=0.5, stop_reason="" if self.left else "solved")


def calls(*wanted: tuple[str, dict[str, Any]]) -> Message:
    made = [
        ToolCall(id=f"c{index}", name=name, arguments=given) for index, (name, given) in enumerate(wanted)
    ]
    return Message("assistant", "", tuple(made))


def answer(text: str) -> Message:
    return Message("assistant", text)


def begun(**settings: Any) -> Desk:
    env = Desk(**settings)
    env.reset(seed=1, options={"split": "train", "index": 2})
    return env
