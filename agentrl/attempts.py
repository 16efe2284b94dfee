"""One attempt at one episode: an environment, a chat and a speaker take turns in a fresh environment.

Nothing here waits for ever: a request to the engine, a reset, a step and a close each have a deadline. A
failure of the world leaves as a WorldError that knows its boundary; anything else that is raised is a bug and
leaves as it is, with a note of the environment and the task.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast

import gymnasium
import numpy as np

from agentrl.chat import Chat, Extension
from agentrl.config import RolloutConfig
from agentrl.engine import Engine, Sampling
from agentrl.env import Env, Step
from agentrl.errors import BadData, EngineError, UserError, WorldError
from agentrl.faults import in_line_s
from agentrl.seeds import derive
from agentrl.tasks import place_in
from agentrl.threads import in_thread
from agentrl.types import Completion, Fault, IntArray, Message, Score, Task, Trajectory, Turn
from agentrl.watchdog import Watchdog

T = TypeVar("T")

__all__ = ["Attempts", "EngineSpeaker", "EpisodePlan", "GoldSpeaker", "Speaker"]

_GLANCE_S = 0.01  # at least, between looks at a deadline that standing in line moves
_CANCEL_S = 1.0  # for what was given up to end


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

    async def turn(self) -> None:
        """Wait for other episodes, where this one must, before it may speak."""
        ...


class EngineSpeaker:
    """Speaks through an engine, each turn with a seed of its own."""

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        *,
        seed: int,
        deadline_s: float,  # of a request, from when it is sent
        turn: Callable[[], Awaitable[None]],  # awaited before each request
    ) -> None:
        self._engine, self._sampling, self._turn = engine, sampling, turn
        self._seed, self._deadline_s = seed, deadline_s
        self._turns = 0

    async def __call__(
        self, prompt_ids: IntArray, messages: Sequence[Message], max_tokens: int
    ) -> Completion:
        """See :class:`Speaker`. Raises EngineError for a completion that the engine gave up, or that did not
        come in time."""
        sampling = replace(self._sampling, max_tokens=max_tokens, seed=derive(self._seed, self._turns))
        self._turns += 1
        request = self._engine.generate(prompt_ids, sampling)
        completion = await _within(request, self._deadline_s, late=self._late)
        if completion.finish == "aborted":
            raise EngineError("the engine aborted a request that nobody had cancelled")
        return completion

    async def turn(self) -> None:
        """See :class:`Speaker`."""
        await self._turn()

    def _late(self) -> EngineError:
        return EngineError(
            f"a request to the engine took over {self._deadline_s:g} s (rollout.request_deadline_s)"
        )


class GoldSpeaker:
    """Says the assistant messages of a right episode, token for token as the model's template writes them."""

    def __init__(self, env: Env, chat: Chat) -> None:
        self._env, self._chat = env, chat
        self._messages: deque[Message] | None = None

    async def __call__(
        self, prompt_ids: IntArray, messages: Sequence[Message], max_tokens: int
    ) -> Completion:
        """See :class:`Speaker`. Raises BadData where the environment goes on after its gold messages."""
        if self._messages is None:
            self._messages = deque(self._env.gold(self._env.task))
        if not self._messages:
            raise BadData(
                f"the episode of task {self._env.task.id!r} goes on after its last gold message; the last of "
                "gold's messages must end it: run agentrl check"
            )
        token_ids = self._chat.say(messages, self._messages.popleft())
        size = len(token_ids)
        return Completion(token_ids, np.zeros(size, np.float32), np.zeros(size, np.int32), "stop")

    async def turn(self) -> None:
        """See :class:`Speaker`; whoever says what is known waits for nobody."""


class Attempts:
    """Makes attempts at episodes of one environment."""

    def __init__(
        self,
        make_env: Callable[[], Env],
        chat: Callable[[Env], Chat],
        *,
        limits: RolloutConfig,
        watchdog: Watchdog,
    ) -> None:
        self._make_env, self._chat, self._limits, self._watchdog = make_env, chat, limits, watchdog

    async def run(
        self, plan: EpisodePlan, speaker: Callable[[Env, Chat], Speaker]
    ) -> tuple[Task, Trajectory]:
        """One attempt, in a fresh environment, which is closed at the end. Raises WorldError."""
        env: Env | None = None
        try:
            env = self._make_env()
            chat = self._chat(env)
            episode = _Episode(env, chat, speaker(env, chat), limits=self._limits, watchdog=self._watchdog)
            return await episode.run(plan)
        except WorldError:
            raise
        except BaseException as error:
            where = f"of environment {type(env.unwrapped).__qualname__}" if env else "(no environment yet)"
            error.add_note(f"in task {plan.index} of the split {plan.split!r} {where}")
            raise
        finally:
            if env is not None:
                await self._close(env)

    async def task(self, plan: EpisodePlan) -> Task:
        """The task of an episode that came to nothing; a stand-in without content where the world fails that,
        too."""

        def read() -> Task:
            env = self._make_env()
            try:
                tasks = env.task_list(plan.split)
                return tasks[place_in(tasks, plan.index, split=plan.split)]
            finally:
                with suppress(WorldError):
                    env.close()

        try:
            return await _within(in_thread(read), self._limits.deadline_s, late=WorldError)
        except WorldError:
            return Task(id=f"{plan.split}[{plan.index}]", prompt=())

    async def _close(self, env: Env) -> None:
        """Close ``env``; one that hangs, or whose world is gone, keeps nobody from going on without it."""
        if type(env).close is gymnasium.Env.close:  # it does nothing, and a thread costs 0.3 ms
            return
        closing = asyncio.ensure_future(in_thread(env.close))
        try:
            with self._watchdog.waiting(lambda: f"the close of a {type(env.unwrapped).__qualname__}"):
                await asyncio.wait({closing}, timeout=self._limits.deadline_s)
        except asyncio.CancelledError:  # a bug in another episode ends the run: what is open is closed first
            await asyncio.wait({closing}, timeout=self._limits.deadline_s)
            raise
        if closing.done():
            with suppress(WorldError):
                closing.result()


class _Episode:
    """One attempt at one episode."""

    def __init__(
        self, env: Env, chat: Chat, speaker: Speaker, *, limits: RolloutConfig, watchdog: Watchdog
    ) -> None:
        self._env, self._chat, self._speaker = env, chat, speaker
        self._limits, self._watchdog = limits, watchdog
        self._who = ""  # the episode's name for the watchdog
        self._turns: list[Turn] = []
        self._seconds = {"engine": 0.0, "env": 0.0}

    async def run(self, plan: EpisodePlan) -> tuple[Task, Trajectory]:
        """From reset to the end. Raises WorldError; UserError for a task whose opening does not fit the
        context."""
        self._who = f"task {plan.index} of the split {plan.split!r}, sibling {plan.sibling}"
        messages = await self._act_in_env(self._begin(plan), doing="reset")
        self._who = f"task {self._env.task.id!r}, sibling {plan.sibling}"
        prompt_ids = self._chat.open(messages)
        self._check_opening(len(prompt_ids))
        extension = Extension(prompt_ids, extends=True)
        over, info = False, dict[str, Any]()
        while not over:
            room = self._limits.max_episode_tokens - len(prompt_ids)
            if room < 1:
                _, reward, *_, info = await self._act_in_env(self._env.atruncate("context"))
                self._turns[-1] = replace(self._turns[-1], reward=self._turns[-1].reward + reward)
                break
            completion = await self._speak(prompt_ids, min(room, self._limits.max_turn_tokens))
            new, reward, terminated, truncated, info = await self._act(completion)
            self._turns.append(Turn(extension.new_ids, completion, reward, extension.extends))
            over = terminated or truncated
            if not over:
                extension = self._extend(prompt_ids, completion, new)
                past = (prompt_ids, completion.token_ids) if extension.extends else ()
                prompt_ids = np.concatenate([*past, extension.new_ids])
        return self._env.task, self._trajectory(plan, info)

    async def _begin(self, plan: EpisodePlan) -> tuple[Message, ...]:
        if vars(type(self._env)).get("inline_reset", False):
            return self._reset(plan)
        return await in_thread(self._reset, plan)

    def _reset(self, plan: EpisodePlan) -> tuple[Message, ...]:
        index = place_in(self._env.task_list(plan.split), plan.index, split=plan.split)
        messages, _ = self._env.reset(seed=plan.env_seed, options={"split": plan.split, "index": index})
        return messages

    def _check_opening(self, tokens: int) -> None:
        if tokens >= self._limits.max_episode_tokens:
            raise UserError(
                f"the opening of task {self._env.task.id!r} has {tokens} tokens, and the context is "
                f"{self._limits.max_episode_tokens}: nothing could be said; raise rollout.max_episode_tokens "
                "(of eval --context, up to what the model has), or shorten the prompt"
            )

    async def _speak(self, prompt_ids: IntArray, most_tokens: int) -> Completion:
        with self._clock("engine"):
            await self._speaker.turn()
            with self._watchdog.waiting(lambda: f"{self._who}, on the engine"):
                return await self._speaker(prompt_ids, self._env.messages, most_tokens)

    async def _act(self, completion: Completion) -> Step:
        """Hand what was said to the environment; a turn that was cut off ends the episode."""
        attempted = sum(len(message.tool_calls) for message in self._env.messages)
        message = self._chat.parse(completion.token_ids, first_call=attempted)
        self._env.completion_tokens += len(completion.token_ids)
        if completion.finish == "stop":
            return await self._act_in_env(self._env.astep(message))
        return await self._act_in_env(self._env.atruncate("length", message))

    def _extend(self, prompt_ids: IntArray, completion: Completion, new: Sequence[Message]) -> Extension:
        messages = self._env.messages
        return self._chat.extend(
            prompt_ids, completion.token_ids, messages=messages[: len(messages) - len(new)], new=new
        )

    async def _act_in_env(self, work: Awaitable[T], *, doing: str = "step") -> T:
        """``work`` of the environment. What outlasts its deadline is a failure of the world; a hanging tool
        of the model's is given up before, at its own."""
        env = cast("Env", self._env.unwrapped)
        deadline_s = self._limits.deadline_s + env.tools_deadline_s

        def late() -> WorldError:
            error = WorldError(
                f"a {doing} of the environment took over {deadline_s:g} s (rollout.deadline_s)"
            )
            error.boundary = env.at_boundary
            return error

        with (
            self._clock("env"),
            self._watchdog.waiting(lambda: f"{self._who}, on the {env.at_boundary} in its {doing}"),
        ):
            return await _within(work, deadline_s, late=late)

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - began

    def _trajectory(self, plan: EpisodePlan, info: Mapping[str, Any]) -> Trajectory:
        valid = bool(info.get("is_valid", True))
        reward = math.fsum(turn.reward for turn in self._turns)
        score = Score(reward, info.get("reward_parts", {}), info.get("reward_note", ""))
        stop_reason = str(info.get("stop_reason", ""))
        fault = Fault("environment", f"the environment called its episode invalid: {stop_reason}")
        return Trajectory(
            task_id=self._env.task.id,
            sibling=plan.sibling,
            seed=plan.env_seed,
            turns=tuple(self._turns),
            messages=self._env.messages,
            stop_reason=stop_reason,
            score=score if valid else None,
            valid=valid,
            fault="" if valid else fault.boundary,
            faults=() if valid else (fault,),
            timings={**self._env.timings, **self._seconds},
        )


async def _within(work: Awaitable[T], seconds: float, *, late: Callable[[], WorldError]) -> T:
    """What ``work`` returns or raises. Raises ``late()`` after ``seconds``, without those that it stood in
    line behind other episodes, and does not wait for work that refuses to be cancelled; RuntimeError for work
    that cancels itself, which asyncio would take for an episode that nobody wants any more."""
    until = time.monotonic() + seconds - in_line_s()
    task = asyncio.ensure_future(work)
    try:
        while (left := until + in_line_s() - time.monotonic()) > 0 and not task.done():
            await asyncio.wait({task}, timeout=max(left, _GLANCE_S))
        if not task.done():
            raise late()
        try:
            return task.result()
        except asyncio.CancelledError as error:
            raise RuntimeError("a CancelledError was raised that nobody had asked for") from error
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_S)
