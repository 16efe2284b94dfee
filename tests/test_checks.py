"""The checker: a sound environment passes, and each way to be unsound makes exactly its own check fail."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium
import pytest

import agentrl
from agentrl.checks import Report, check_environment
from agentrl.env import Env, Step, ToolEnv
from agentrl.reward import Evidence
from agentrl.tools import Tool, tool
from agentrl.types import Message, Task, ToolCall


class Sound(ToolEnv):
    """Read a word with a tool and say it."""

    words = {"train": ("ape", "bee", "cat"), "test": ("dog", "eel")}

    def setup(self, task: Task) -> None:
        self.reads = 0

    def tasks(self, split: str) -> Iterable[Task]:
        return [
            Task(id=word, prompt=(Message("user", f"Read word {index} of {split}."),), truth={"word": word})
            for index, word in enumerate(self.words[split])
        ]

    def gold(self, task: Task) -> Sequence[Message]:
        call = ToolCall(id="call_0", name="read", arguments={"loud": False})
        return (Message("assistant", "", (call,)), Message("assistant", task.truth["word"]))

    def reward(self, evidence: Evidence) -> float:
        return float(evidence.answer == evidence.task.truth["word"])

    @tool
    def read(self, loud: bool) -> str:
        """Read the word."""
        self.reads += 1
        word = str(self.task.truth["word"])
        return word.upper() if loud else word


class WarnsGymnasium(Sound):
    def seed(self, seed: int) -> None:
        """Gymnasium dropped this method and says so."""


class HidesValidity(Sound):
    async def astep(self, action: Message) -> Step:
        *step, info = await super().astep(action)
        del info["is_valid"]
        return (*step, info)  # type: ignore[return-value]


class RemembersEpisodes(Sound):
    total = 0

    @tool
    def read(self, loud: bool) -> str:
        self.reads += 1
        self.total += 1
        return f"read {self.total}" if self.reads > 1 else "read"

    def gold(self, task: Task) -> Sequence[Message]:
        first, last = super().gold(task)
        return (first, first, last)


class HasWrongGold(Sound):
    def gold(self, task: Task) -> Sequence[Message]:
        return (*super().gold(task)[:1], Message("assistant", "fox"))


class PaysSilence(Sound):
    def reward(self, evidence: Evidence) -> float:
        return 0.5 if evidence.answer == "" and evidence.env.reads == 0 else super().reward(evidence)


class CrashesLate(Sound):
    drawn = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.drawn = options is None
        return super().reset(seed=seed, options=options)

    @tool
    def read(self, loud: bool) -> str:
        self.reads += 1
        if self.drawn and self.reads > 9:
            raise ZeroDivisionError("the tenth page")
        return "read"


class DescribesNonsense(Sound):
    @property
    def tools(self) -> tuple[Tool, ...]:
        (read,) = super().tools
        return (dataclasses.replace(read, parameters={**read.parameters, "required": "loud"}),)


class RepeatsTasks(Sound):
    def tasks(self, split: str) -> Iterable[Task]:
        known = [task for known in self.words for task in super(RepeatsTasks, self).tasks(known)]
        return [dataclasses.replace(task, id=f"{split}-{task.id}") for task in known]


def failed(report: Report) -> list[str]:
    return [row.name for row in report.rows if not row.passed]


def test_a_sound_environment_passes_every_check() -> None:
    report = check_environment(Sound)
    assert report.ok, str(report)
    assert report.target == "Sound"
    assert len(report.rows) == 8


@pytest.mark.parametrize(
    ("unsound", "check", "detail"),
    [
        (WarnsGymnasium, "follows gymnasium", "Official support for the `seed` function is dropped"),
        (HidesValidity, "tells what its spaces promise", "task 'ape': info lacks is_valid"),
        (RemembersEpisodes, "repeats itself", "task 'ape': episodes with the same seed and actions differ"),
        (HasWrongGold, "gold scores the maximum", "task 'ape': gold scores 0, saying nothing 0"),
        (
            PaysSilence,
            "saying nothing scores the minimum",
            "saying nothing scores 0.5, more than an excuse: 0",
        ),
        (CrashesLate, "survives random actions", "ZeroDivisionError: the tenth page"),
        (DescribesNonsense, "describes its tools", "the parameters of read are no JSON schema"),
        (RepeatsTasks, "keeps its splits apart", "task 'test-ape' of 'test' lies in 'train' as well"),
    ],
)
def test_each_unsoundness_fails_its_own_check_alone(unsound: type[Sound], check: str, detail: str) -> None:
    report = check_environment(unsound)
    assert failed(report) == [check], str(report)
    assert not report.ok
    assert detail in next(row.detail for row in report.rows if not row.passed)


def test_a_crash_inside_a_check_is_that_checks_failure_with_its_notes() -> None:
    class Crashes(Sound):
        def setup(self, task: Task) -> None:
            super().setup(task)
            if task.id == "eel":
                raise OSError("no such page")

    report = check_environment(Crashes)
    assert "gold scores the maximum" in failed(report)
    assert "describes its tools" not in failed(report)
    assert "OSError: no such page; in the setup of environment" in str(report)
    assert "task 'eel'" in str(report)


def test_gold_that_does_not_end_its_episode_is_found() -> None:
    class Unending(Sound):
        def gold(self, task: Task) -> Sequence[Message]:
            return super().gold(task)[:1]

    report = check_environment(Unending)
    assert "the episode goes on" in str(report)


def test_an_empty_split_and_a_double_id_are_found() -> None:
    class Empty(Sound):
        words = {"train": ("ape",), "test": ()}

    class Double(Sound):
        words = {"train": ("ape", "ape"), "test": ("dog",)}

    assert "the split 'test' has no tasks" in str(check_environment(Empty))
    assert "two tasks have the id 'ape'" in str(check_environment(Double))


def test_an_endless_plain_environment_is_checked_too() -> None:
    class Count(Env):
        splits = ("all",)

        def tasks(self, split: str) -> Iterable[Task]:
            for index in itertools.count():
                yield Task(id=str(index), prompt=(Message("user", f"{index}?"),))

        def gold(self, task: Task) -> Sequence[Message]:
            return (Message("assistant", task.id),)

        def step(self, action: Message) -> Step:
            self.accept(action)
            solved = action.content == self.task.id
            return self.transition(score=float(solved), stop_reason="solved" if solved else "")

    report = check_environment(Count, episodes=5)
    assert report.ok, str(report)


def test_check_takes_names_instances_and_what_gymnasium_made() -> None:
    assert agentrl.check("calculator", episodes=4, levels=[1, 4]).ok
    assert agentrl.check(Sound(max_turns=4), episodes=4).ok
    assert agentrl.check(gymnasium.make("agentrl/Calculator-v0"), episodes=4).ok  # type: ignore[arg-type]


def test_check_works_under_a_running_event_loop() -> None:
    async def notebook() -> Report:
        return agentrl.check(Sound, episodes=2)

    assert asyncio.run(notebook()).ok
