"""What an environment's step and a turn of the rollout loop cost, beside the model.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/env_overhead.py

A step is a tool call or the answer that is scored, half of each, of episodes that are scripted beforehand:
agentrl's `calculator` awaited as rollouts do and stepped as Gymnasium does, and the calculator environment of
Aviary's own gsm8k package. What an environment does around its tool and its reward is validation, messages
and bookkeeping; the limit is what these two functions cost when they are called bare. Aims: under 100
microseconds a step awaited.

An environment is made for every episode; aim: under 100 microseconds.

A turn of the loop is everything but the model: 256 episodes in flight against an engine that answers at once
with what it was told to say, from the prompt's tokens to the next prompt's. Aim: under 1,000 microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from report import Row, make_parser, missing, report

from agentrl.chats import Chats
from agentrl.config import RolloutConfig
from agentrl.engine import Adapter, Sampling
from agentrl.env import Env
from agentrl.models import load_tokenizer
from agentrl.registry import make, make_reward
from agentrl.reward import Evidence
from agentrl.rollout import EpisodePlan, Rollouts, gold_episodes
from agentrl.tiny import TinyShape, make_tiny_model
from agentrl.types import Completion, FloatArray, IntArray, Message, Task

__all__ = ["Sizes", "main", "measure"]

_LIMITS = RolloutConfig(max_turn_tokens=256, max_episode_tokens=1024)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run."""

    episodes: int = 2000  # of each environment, in each repetition
    repeats: int = 5  # of which the median counts
    in_flight: int = 256  # episodes of the loop at once
    waves: int = 4  # of so many episodes each, in each repetition


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, default=True, help="measure Aviary too"
    )
    options = parser.parse_args(arguments)
    sizes = Sizes(episodes=20, repeats=1, in_flight=8, waves=1) if options.quick else Sizes()
    notes = missing("Aviary", module="aviary") if options.peer else []
    rows = asyncio.run(measure(sizes, peer=options.peer and not notes))
    report(rows, title="Microseconds a step, and a turn of the loop", notes=notes, json_path=options.json)


async def measure(sizes: Sizes, *, peer: bool) -> list[Row]:
    """A row each with ``name``, ``microseconds`` of one step or turn, and its ``aim`` where there is one."""
    env = make("calculator", levels=[1])
    tasks = [env.task_list("train")[index] for index in range(sizes.episodes)]
    steps = {
        "agentrl calculator, await astep": lambda: _agentrl_steps(env, tasks),
        "agentrl calculator, step": lambda: _in_thread(_gymnasium_steps, env, tasks),
        "agentrl calculator, made": lambda: _in_thread(_makings, sizes.episodes),
    }
    if peer:
        steps["aviary gsm8k calculator, await step"] = lambda: _aviary_steps(tasks)
    steps["limit: the tool's and the reward's functions alone"] = lambda: _bare_calls(tasks)
    loop = _Loop(sizes)
    await loop.prepare()
    medians = await _medians({**steps, f"agentrl loop, {sizes.in_flight} in flight": loop.turns}, sizes)
    made = {"agentrl calculator, await astep": 100, "agentrl calculator, made": 100}
    aims = made | {f"agentrl loop, {sizes.in_flight} in flight": 1000}
    return [
        {"name": name, "microseconds": seconds * 1e6, "aim": aims.get(name)}
        for name, seconds in medians.items()
    ]


async def _medians(works: dict[str, Callable[[], Awaitable[float]]], sizes: Sizes) -> dict[str, float]:
    """The median of each work's seconds over rounds in which all take their turn, after one of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(1 + sizes.repeats):
        for name, work in works.items():
            taken = await work()
            if turn:
                seconds[name].append(taken)
    return {name: median(taken) for name, taken in seconds.items()}


# -- steps --


async def _agentrl_steps(env: Env, tasks: Sequence[Task]) -> float:
    spent = 0.0
    for index, task in enumerate(tasks):
        call, answer = env.gold(task)
        env.reset(seed=0, options={"split": "train", "index": index})
        began = time.perf_counter()
        await env.astep(call)
        _, reward, terminated, *_ = await env.astep(answer)
        spent += time.perf_counter() - began
        assert (reward, terminated) == (1.0, True)
    return spent / (2 * len(tasks))


def _gymnasium_steps(env: Env, tasks: Sequence[Task]) -> float:
    spent = 0.0
    for index, task in enumerate(tasks):
        call, answer = env.gold(task)
        env.reset(seed=0, options={"split": "train", "index": index})
        began = time.perf_counter()
        env.step(call)
        _, reward, terminated, *_ = env.step(answer)
        spent += time.perf_counter() - began
        assert (reward, terminated) == (1.0, True)
    return spent / (2 * len(tasks))


def _makings(count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        make("calculator", levels=[1])
    return (time.perf_counter() - began) / count


async def _in_thread(function: Callable[..., float], *arguments: Any) -> float:
    return await asyncio.to_thread(function, *arguments)


async def _aviary_steps(tasks: Sequence[Task]) -> float:
    from aviary.core import ToolCall, ToolRequestMessage
    from aviary.envs.gsm8k.env import CalculatorEnv

    spent = 0.0
    for task in tasks:
        env = CalculatorEnv(task.id, task.prompt[0].content, float(task.truth["answer"]))
        _, (calculator, submit_answer) = await env.reset()
        ((symbol, operand),) = task.truth["steps"]
        expression = f"{task.truth['start']} {symbol} {operand}"
        call, answer = (
            ToolRequestMessage(tool_calls=[ToolCall.from_tool(tool, argument)])
            for tool, argument in ((calculator, expression), (submit_answer, task.truth["answer"]))
        )
        began = time.perf_counter()
        await env.step(call)
        _, reward, done, _ = await env.step(answer)
        spent += time.perf_counter() - began
        assert (reward, done) == (1.0, True)
    return spent / (2 * len(tasks))


async def _bare_calls(tasks: Sequence[Task]) -> float:
    reward, operations = make_reward("numeric"), {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    spent = 0.0
    for task in tasks:
        ((symbol, operand),) = task.truth["steps"]
        evidence = Evidence(task, (Message("assistant", rf"\boxed{{{task.truth['answer']}}}"),))
        began = time.perf_counter()
        operations[symbol](task.truth["start"], operand)
        reward(evidence)
        spent += time.perf_counter() - began
    return spent / (2 * len(tasks))


# -- the loop --


class _Prompter:
    """An engine that answers every prompt at once with the completion that it was given for it."""

    def __init__(self, answers: dict[bytes, Completion]) -> None:
        self._answers = answers

    async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        """See :class:`agentrl.engine.Engine`."""
        return self._answers[prompt_ids.tobytes()]

    async def score(self, token_ids: IntArray, temperature: float) -> FloatArray:
        """See :class:`agentrl.engine.Engine`."""
        return np.zeros(len(token_ids), np.float32)

    async def load(self, adapter: Adapter | None, version: int) -> None:
        """See :class:`agentrl.engine.Engine`."""

    async def close(self) -> None:
        """See :class:`agentrl.engine.Engine`."""


class _Loop:
    """Gold episodes of calculator, all levels, through ``Rollouts``."""

    def __init__(self, sizes: Sizes) -> None:
        self._plans = [
            EpisodePlan(split="train", index=index, sibling=0, env_seed=0, seed=index)
            for index in range(sizes.in_flight * sizes.waves)
        ]
        self._in_flight = sizes.in_flight

    async def prepare(self) -> None:
        """Make a tokenizer of the environment's text, and learn what the engine will be asked."""
        env = make("calculator")
        texts = [
            message.content for plan in self._plans for message in env.task_list("train")[plan.index].prompt
        ]
        with tempfile.TemporaryDirectory() as folder:
            shape = TinyShape(
                hidden_size=16, intermediate_size=16, layers=1, heads=1, kv_heads=1, vocab_size=384
            )
            make_tiny_model(folder, texts=texts, seed=0, shape=shape)
            chats = Chats(load_tokenizer(folder))
        episodes = await gold_episodes(_calculator, chats, self._plans, limits=_LIMITS)
        answers = {
            episode.prompt_ids(at).tobytes(): turn.completion
            for episode in episodes
            for at, turn in enumerate(episode.turns)
        }
        self._turns = sum(len(episode.turns) for episode in episodes)
        self._rollouts = Rollouts(
            _calculator, chat=chats, engine=_Prompter(answers), limits=_LIMITS, in_flight=self._in_flight
        )

    async def turns(self) -> float:
        """Seconds a turn, from the plans to the groups."""
        began = time.perf_counter()
        groups = await self._rollouts.groups(self._plans, sampling=Sampling(max_tokens=1, seed=0))
        seconds = time.perf_counter() - began
        assert all(episode.reward == 1.0 for group in groups for episode in group.trajectories)
        return seconds / self._turns


def _calculator() -> Env:
    return make("calculator")


if __name__ == "__main__":
    main()
