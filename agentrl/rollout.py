"""Episodes: an environment, a chat and an engine take turns until the environment, a budget or the world ends
it.

Every episode is its own asyncio task: no turn waits for another episode's tool. What is sampled depends on
the seeds in the plan alone; with ``deterministic`` also the shapes of the engine's batches do, because a
round of generation begins only when every episode in flight waits for one, and requests are handed over in
the plan's order.

A failure of the world (WorldError, a deadline) costs the environment: the episode starts anew in a fresh one,
and after ``retries`` it is returned as invalid. Anything else that is raised is a bug: it leaves as it is,
with a note of the environment and the task.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Protocol, TypeVar

import numpy as np

from agentrl.chat import Chat, Extension
from agentrl.config import RolloutConfig
from agentrl.engine import Engine, Sampling
from agentrl.env import Env, Step
from agentrl.errors import AgentRLError, EngineError, UserError, WorldError
from agentrl.seeds import derive
from agentrl.threads import in_thread
from agentrl.types import Completion, Group, IntArray, Message, Score, Task, Trajectory, Turn

T = TypeVar("T")

__all__ = ["EpisodePlan", "GoldSpeaker", "Rollouts", "Speaker", "gold_episodes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodePlan:
    """Which episode to run, and everything random about it."""

    split: str
    index: int  # of the task within its split
    sibling: int  # of the task's episodes
    env_seed: int  # of reset; the same for all siblings
    seed: int  # of what is sampled


class Speaker(Protocol):
    """Who says the assistant's turns of one episode."""

    async def __call__(
        self, prompt_ids: IntArray, messages: Sequence[Message], max_tokens: int
    ) -> Completion:
        """The next turn; ``messages`` is the conversation that ``prompt_ids`` (prompt tokens,) spell."""
        ...


class EngineSpeaker:
    """Speaks through an engine, each turn with a seed of its own."""

    def __init__(
        self, engine: Engine, sampling: Sampling, *, seed: int, go: Callable[[], Awaitable[None]]
    ) -> None:
        """``go`` is awaited before each request."""
        self._engine, self._sampling, self._seed, self._go = engine, sampling, seed, go
        self._turn = 0

    async def __call__(
        self, prompt_ids: IntArray, messages: Sequence[Message], max_tokens: int
    ) -> Completion:
        """See :class:`Speaker`. Raises EngineError for a completion that the engine gave up."""
        await self._go()
        sampling = replace(self._sampling, max_tokens=max_tokens, seed=derive(self._seed, self._turn))
        self._turn += 1
        completion = await self._engine.generate(prompt_ids, sampling)
        if completion.finish == "aborted":
            raise EngineError("the engine aborted a request that nobody had cancelled")
        return completion


class GoldSpeaker:
    """Says the assistant messages of a right episode, token for token as the model's template writes them."""

    def __init__(self, env: Env, chat: Chat) -> None:
        self._env, self._chat = env, chat
        self._messages: deque[Message] | None = None

    async def __call__(
        self, prompt_ids: IntArray, messages: Sequence[Message], max_tokens: int
    ) -> Completion:
        """See :class:`Speaker`. Raises AgentRLError where the environment goes on after its gold messages."""
        if self._messages is None:
            self._messages = deque(self._env.gold(self._env.task))
        if not self._messages:
            raise AgentRLError(f"task {self._env.task.id}: the episode goes on after the last gold message")
        token_ids = self._chat.say(messages, self._messages.popleft())
        size = len(token_ids)
        return Completion(token_ids, np.zeros(size, np.float32), np.zeros(size, np.int32), "stop")


class Rollouts:
    """Runs planned episodes of one environment against one engine."""

    def __init__(
        self,
        make_env: Callable[[], Env],
        *,
        chat: Callable[[Env], Chat],
        engine: Engine,
        limits: RolloutConfig,
        in_flight: int,  # episodes at once
        deterministic: bool = False,
    ) -> None:
        self._make_env, self._chat, self._engine, self._limits = make_env, chat, engine, limits
        self._in_flight, self._deterministic = in_flight, deterministic

    async def groups(
        self,
        plans: Sequence[EpisodePlan],
        *,
        sampling: Sampling,
        on_episode: Callable[[], None] = lambda: None,
    ) -> list[Group]:
        """Run ``plans``; siblings of a task, which stand next to each other, become a group, in the plans'
        order.

        Of ``sampling``, max_tokens and seed are set for each turn, and the chat's stop tokens are added.
        ``on_episode`` is called after each episode.
        """
        queue = deque(enumerate(plans))
        done: list[tuple[Task, Trajectory] | None] = [None] * len(plans)
        workers = min(self._in_flight, len(plans))
        rounds = _Rounds(workers if self._deterministic else 0)

        async def work() -> None:
            # A worker between two episodes still counts as live, so the next episode joins the next round.
            while queue:
                at, plan = queue.popleft()
                done[at] = await self._episode(plan, sampling, go=partial(rounds.turn, at))
                on_episode()
            rounds.leave()

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(workers):
                    tasks.create_task(work())
        except (
            BaseExceptionGroup
        ) as failures:  # callers look for a UserError or their own bug, not for a group
            raise failures.exceptions[0] from None
        return _grouped(plans, [outcome for outcome in done if outcome is not None])

    async def _episode(
        self, plan: EpisodePlan, sampling: Sampling, *, go: Callable[[], Awaitable[None]]
    ) -> tuple[Task, Trajectory]:
        """One episode, in a fresh environment for each attempt."""
        fault = ""
        for _ in range(1 + self._limits.retries):
            env = self._make_env()
            try:
                return await self._attempt(plan, env, sampling, go=go)
            except WorldError as error:
                fault = "engine" if isinstance(error, EngineError) else "environment"
            except BaseException as error:
                error.add_note(f"in task {plan.index} of the split {plan.split!r} of {_name(env)}")
                raise
            finally:
                await self._close(env)
        task = env.task_list(plan.split)[plan.index]
        return task, _invalid(plan, task, fault)

    async def _close(self, env: Env) -> None:
        """Close ``env``; one that hangs, or whose world is gone, keeps nobody from going on without it."""
        closing = asyncio.ensure_future(in_thread(env.close))
        try:
            await asyncio.wait({closing}, timeout=self._limits.deadline_s)
        except asyncio.CancelledError:  # a bug in another episode ends the run: what is open is closed first
            await asyncio.wait({closing}, timeout=self._limits.deadline_s)
            raise
        if closing.done():
            with suppress(WorldError):
                closing.result()

    async def _attempt(
        self, plan: EpisodePlan, env: Env, sampling: Sampling, *, go: Callable[[], Awaitable[None]]
    ) -> tuple[Task, Trajectory]:
        chat = self._chat(env)
        stops = tuple(sorted({*sampling.stop_token_ids, *chat.stop_token_ids}))
        sampling = replace(sampling, stop_token_ids=stops)
        speaker = EngineSpeaker(self._engine, sampling, seed=plan.seed, go=go)
        return await _Episode(env, chat, speaker, limits=self._limits).run(plan)


class _Episode:
    """One attempt at one episode."""

    def __init__(self, env: Env, chat: Chat, speaker: Speaker, *, limits: RolloutConfig) -> None:
        self._env, self._chat, self._speaker, self._limits = env, chat, speaker, limits
        self._turns: list[Turn] = []
        self._seconds = {"engine": 0.0, "env": 0.0}

    async def run(self, plan: EpisodePlan) -> tuple[Task, Trajectory]:
        """From reset to the end. Raises WorldError; UserError for a task whose opening does not fit the
        context."""
        options = {"split": plan.split, "index": plan.index}
        reset = in_thread(self._env.reset, seed=plan.env_seed, options=options)
        messages, _ = await self._timed("env", reset)
        prompt_ids = self._chat.open(messages)
        self._check_opening(len(prompt_ids))
        extension = Extension(prompt_ids, extends=True)
        over, info = False, dict[str, Any]()
        while not over:
            room = self._limits.max_episode_tokens - len(prompt_ids)
            if room < 1:
                _, reward, *_, info = await self._timed("env", self._env.atruncate("context"))
                self._turns[-1] = replace(self._turns[-1], reward=self._turns[-1].reward + reward)
                break
            said = self._speaker(prompt_ids, self._env.messages, min(room, self._limits.max_turn_tokens))
            completion = await self._timed("engine", said)
            new, reward, terminated, truncated, info = await self._act(completion)
            self._turns.append(Turn(extension.new_ids, completion, reward, extension.extends))
            over = terminated or truncated
            if not over:
                extension = self._extend(prompt_ids, completion, new)
                past = (prompt_ids, completion.token_ids) if extension.extends else ()
                prompt_ids = np.concatenate([*past, extension.new_ids])
        return self._env.task, self._trajectory(plan, info)

    def _check_opening(self, tokens: int) -> None:
        if tokens >= self._limits.max_episode_tokens:
            raise UserError(
                f"the opening of task {self._env.task.id!r} has {tokens} tokens, and "
                f"rollout.max_episode_tokens is {self._limits.max_episode_tokens}: nothing could be said; "
                "raise it or shorten the prompt"
            )

    async def _act(self, completion: Completion) -> Step:
        """Hand what was said to the environment; a turn that was cut off ends the episode."""
        attempted = sum(len(message.tool_calls) for message in self._env.messages)
        message = self._chat.parse(completion.token_ids, first_call=attempted)
        self._env.completion_tokens += len(completion.token_ids)
        if completion.finish == "stop":
            return await self._timed("env", self._env.astep(message))
        return await self._timed("env", self._env.atruncate("length", message))

    def _extend(self, prompt_ids: IntArray, completion: Completion, new: Sequence[Message]) -> Extension:
        messages = self._env.messages
        return self._chat.extend(
            prompt_ids, completion.token_ids, messages=messages[: len(messages) - len(new)], new=new
        )

    async def _timed(self, stage: str, work: Awaitable[T]) -> T:
        """``work``, its seconds noted; an environment that outlasts its deadline is a failure of the
        world."""
        began = time.perf_counter()
        deadline = asyncio.timeout(self._limits.deadline_s if stage == "env" else None)
        try:
            async with deadline:
                return await work
        except TimeoutError as error:
            if not deadline.expired():  # it was raised by the work, so it is a bug like any other
                raise
            raise WorldError(
                f"a step of the environment took over {self._limits.deadline_s:g} s (rollout.deadline_s)"
            ) from error
        finally:
            self._seconds[stage] += time.perf_counter() - began

    def _trajectory(self, plan: EpisodePlan, info: Mapping[str, Any]) -> Trajectory:
        valid = bool(info.get("is_valid", True))
        reward = math.fsum(turn.reward for turn in self._turns)
        score = Score(reward, info.get("reward_parts", {}), info.get("reward_note", ""))
        return Trajectory(
            task_id=self._env.task.id,
            sibling=plan.sibling,
            seed=plan.env_seed,
            turns=tuple(self._turns),
            messages=self._env.messages,
            stop_reason=str(info.get("stop_reason", "")),
            score=score if valid else None,
            valid=valid,
            fault="" if valid else "environment",
            timings=dict(self._seconds),
        )


class _Rounds:
    """Holds requests back until every live episode has one, then lets them go in the plan's order.

    With ``live`` 0 nobody is ever held back.
    """

    def __init__(self, live: int) -> None:
        self._live, self._held_back = live, live > 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    async def turn(self, place: int) -> None:
        """Wait for the round in which the episode at ``place`` of the plans may ask."""
        if not self._held_back:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((place, future))
        self._begin_if_complete()
        await future

    def leave(self) -> None:
        """One live episode less."""
        self._live -= 1
        self._begin_if_complete()

    def _begin_if_complete(self) -> None:
        if self._waiting and len(self._waiting) == self._live:
            # Later, because who came last does not wait yet: its future done, it would go before the others.
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        for _, future in sorted(self._waiting, key=lambda entry: entry[0]):
            if not future.done():  # cancelled
                future.set_result(None)  # waiters wake in this order
        self._waiting.clear()


async def gold_episodes(
    make_env: Callable[[], Env],
    chat: Callable[[Env], Chat],
    plans: Iterable[EpisodePlan],
    *,
    limits: RolloutConfig,
) -> list[Trajectory]:
    """The episodes of ``plans`` as ``Env.gold`` says them: what a warm start learns from.

    Raises AgentRLError for an episode that the environment does not reward: its gold messages are wrong.
    """
    episodes: list[Trajectory] = []
    for plan in plans:
        with closing(make_env()) as env:
            speaker = GoldSpeaker(env, chat(env))
            _, trajectory = await _Episode(env, chat(env), speaker, limits=limits).run(plan)
        if not trajectory.reward > 0:
            raise AgentRLError(
                f"the gold episode of task {trajectory.task_id!r} ended with {trajectory.stop_reason!r} and "
                f"a reward of {trajectory.reward:g}; a right episode is rewarded: run agentrl check"
            )
        episodes.append(trajectory)
    return episodes


def _grouped(plans: Sequence[EpisodePlan], outcomes: Sequence[tuple[Task, Trajectory]]) -> list[Group]:
    pairs = zip(plans, outcomes, strict=True)
    groups: list[Group] = []
    # The seed parts two groups of the same task that happen to be neighbours.
    for _, siblings in groupby(pairs, key=lambda pair: (pair[0].split, pair[0].index, pair[0].env_seed)):
        members = [outcome for _, outcome in siblings]
        groups.append(Group(members[0][0], tuple(trajectory for _, trajectory in members)))
    return groups


def _invalid(plan: EpisodePlan, task: Task, fault: str) -> Trajectory:
    """What is left of an episode that the world failed every time."""
    return Trajectory(
        task_id=task.id,
        sibling=plan.sibling,
        seed=plan.env_seed,
        turns=(),
        messages=task.prompt,
        stop_reason="fault",
        score=None,
        valid=False,
        fault=fault,
    )


def _name(env: Env) -> str:
    return f"environment {type(env.unwrapped).__qualname__}"
