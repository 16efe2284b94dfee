r"""What checks play: scripted episodes, and what a policy that can't do the task might say.

An episode is played as moments: the opening, then one step for each action. Everything is derived from one
seed, so a report is the same twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gymnasium.utils.env_checker import data_equivalence

from agentrl.env import Env, Step
from agentrl.errors import AgentRLError
from agentrl.tasks import TaskStream
from agentrl.types import Message, Task

__all__ = [
    "SEED",
    "WORTHLESS",
    "Episode",
    "Start",
    "Subject",
    "Unsound",
    "gold_of",
    "play",
    "require",
    "same",
]

SEED = 7  # of every reset and every random action of a check
# The probes that must score the minimum, unless the environment declares them.
WORTHLESS = (
    "nothing said",
    "an empty message",
    "the task repeated",
    "a list of guesses",
    "a copied tool result",
)

_NOTHING = Message("assistant", "")
_LONGEST_EPISODE = 64  # actions; what runs longer is cut off by truncate()
_GUESSES = " ".join(rf"\boxed{{{number}}}" for number in range(1, 1001))
_RANDOM_ACTIONS = 8  # of the probe that acts at random


class Unsound(AgentRLError):
    """What a check found: where, what, and what to do."""


def require(holds: bool, task: Task, otherwise: str) -> None:
    """Raise Unsound with ``otherwise`` and the task where something does not hold."""
    if not holds:
        raise Unsound(f"task {task.id!r}: {otherwise}")


def same(first: Any, second: Any) -> bool:
    """Whether two observations, infos, steps or episodes are equal, arrays in them included."""
    return bool(data_equivalence(first, second))


@dataclass(frozen=True, slots=True)
class Start:
    """Where an episode begins."""

    task: Task
    split: str
    index: int

    @property
    def options(self) -> dict[str, Any]:
        """What reset takes."""
        return {"split": self.split, "index": self.index}


@dataclass(frozen=True, slots=True)
class Episode:
    """What an environment showed."""

    opening: tuple[tuple[Message, ...], dict[str, Any]]  # what reset returned
    steps: tuple[Step, ...]

    @property
    def shown(self) -> tuple[Any, ...]:
        """All of it, for :func:`same`."""
        return (self.opening, *self.steps)

    @property
    def total(self) -> float:
        """The return."""
        return math.fsum(step[1] for step in self.steps)

    @property
    def over(self) -> bool:
        """Whether it came to an end."""
        return bool(self.steps) and (self.steps[-1][2] or self.steps[-1][3])


class Subject:
    """An environment under examination, and what several checks want to know of it."""

    def __init__(self, env: Env, *, episodes: int, endurance: int) -> None:
        self.env = env
        self.endurance = endurance  # episodes over which resources must stay flat
        self._episodes = episodes  # to play in each split
        self._twins: list[Env] = []

    def make_twin(self) -> Env:
        """Another environment of the same class and settings, closed when the check is over."""
        self._twins.append(self.env.make_twin())
        return self._twins[-1]

    @contextmanager
    def closing_twins(self) -> Iterator[None]:
        """Close the twins that are made meanwhile."""
        try:
            yield
        finally:
            while self._twins:
                self._twins.pop().close()

    def sample(self, split: str, count: int) -> list[tuple[int, Task]]:
        """(index, task) of ``count`` tasks: evenly spread over a sequence, the first of a stream."""
        tasks = self.env.task_list(split)
        if isinstance(tasks, TaskStream):
            return list(enumerate(tasks.first(count)))
        step = max(1, len(tasks) // count)
        return [(index, tasks[index]) for index in range(0, len(tasks), step)[:count]]

    @cached_property
    def starts(self) -> tuple[Start, ...]:
        """The tasks to play, of every split."""
        return tuple(
            Start(task, split, index)
            for split in self.env.splits
            for index, task in self.sample(split, self._episodes)
        )

    @cached_property
    def first_starts(self) -> tuple[Start, ...]:
        """One task of each split, for checks to which one is like another."""
        return tuple({start.split: start for start in reversed(self.starts)}.values())

    @cached_property
    def worths(self) -> tuple[tuple[Start, Mapping[str, float]], ...]:
        """What every probe scores, by name, in each task to play."""
        return tuple(
            (start, {name: play(self.env, start, said).total for name, said in _probes(self.env, start)})
            for start in self.starts
        )


def gold_of(env: Env, task: Task) -> tuple[Message, ...]:
    """``env.gold(task)``. Raises Unsound where that is no sequence of messages."""
    given: Any = env.gold(task)
    messages = tuple(given) if isinstance(given, Iterable) else (None,)
    if not all(isinstance(message, Message) for message in messages):
        raise Unsound(
            f"task {task.id!r}: gold(task) returned {given!r}: it is a sequence of assistant messages, such "
            "as (Message('assistant', ...),)"
        )
    return messages


def play(env: Env, start: Start, actions: Iterable[Message], *, until_over: bool = True) -> Episode:
    """An episode that says ``actions``, then nothing until it is over."""
    opening = env.reset(seed=SEED, options=start.options)
    steps: list[Step] = []
    for action in actions:
        steps.append(env.step(action))
        if steps[-1][2] or steps[-1][3]:
            return Episode(opening, tuple(steps))
    while until_over and steps and len(steps) < _LONGEST_EPISODE:
        steps.append(env.step(_NOTHING))
        if steps[-1][2] or steps[-1][3]:
            return Episode(opening, tuple(steps))
    if until_over:
        steps.append(env.truncate("checked"))
    return Episode(opening, tuple(steps))


def _probes(env: Env, start: Start) -> Iterator[tuple[str, Sequence[Message]]]:
    """(name, assistant messages): the worthless ones, and others beside which they must not stand out."""
    yield "nothing said", []
    yield "an empty message", [_NOTHING]
    yield "the task repeated", [_said("\n".join(message.content for message in start.task.prompt))]
    yield "a list of guesses", [_said(_GUESSES)]
    copied = _copied_result(env, start)
    if copied:
        yield "a copied tool result", copied
    yield "an excuse", [_said("I don't know.")]
    yield "a guess", [_said(r"The answer is \boxed{0}.")]
    env.action_space.seed(SEED)
    yield "random actions", [env.action_space.sample() for _ in range(_RANDOM_ACTIONS)]


def _copied_result(env: Env, start: Start) -> list[Message]:
    """Gold's calls, then their last result as it stands; [] where there is none, or gold says just that."""
    gold = gold_of(env, start.task)
    calling = [place for place, message in enumerate(gold, start=1) if message.tool_calls]
    calls, answer = gold[: max(calling, default=0)], gold[-1:]
    if not calls or play(env, start, calls, until_over=False).over:
        return []
    results = [message.content for message in env.messages if message.role == "tool"]
    if not results or any(results[-1].strip() == message.content.strip() for message in answer):
        return []
    return [*calls, _said(results[-1])]


def _said(text: str) -> Message:
    return Message("assistant", text)
