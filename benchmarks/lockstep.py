"""Turn-lockstep: rollouts as batched frameworks do them, for async_rollouts.py to compare with.

A turn of all live episodes is sampled as one batch; then their tools run at the same time; the next turn
begins when the last of them has answered. Environments, chats, seeds and engine are agentrl's own, so that
nothing else differs. Every completion is a whole turn, and whatever fails is raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from agentrl.attempts import EngineSpeaker, EpisodePlan
from agentrl.chat import Chat
from agentrl.engine import Engine, Sampling
from agentrl.env import Env
from agentrl.types import Completion, Message

__all__ = ["Conversation", "lockstep"]

Conversation = tuple[list[list[int]], tuple[Message, ...]]  # the sampled tokens of each turn; all messages

_DEADLINE_S = 600.0  # of a request to the engine


async def lockstep(
    make_env: Callable[[], Env],
    plans: Sequence[EpisodePlan],
    *,
    chat: Callable[[Env], Chat],
    engine: Engine,
    sampling: Sampling,
) -> list[Conversation]:
    """Run ``plans`` beside one another, turn by turn; of ``sampling``, the seed is set for each turn."""
    episodes = [_Episode(make_env(), chat, engine, plan=plan, sampling=sampling) for plan in plans]
    live = episodes
    while live:
        completions = await asyncio.gather(*(episode.speak() for episode in live))
        pairs = zip(live, completions, strict=True)
        await asyncio.gather(*(episode.act(completion) for episode, completion in pairs))
        live = [episode for episode in live if not episode.over]
    return [(episode.said, episode.messages) for episode in episodes]


class _Episode:
    """One episode, told when to speak and when to act."""

    def __init__(
        self,
        env: Env,
        chat: Callable[[Env], Chat],
        engine: Engine,
        *,
        plan: EpisodePlan,
        sampling: Sampling,
    ) -> None:
        self._env, self._chat, self._max_tokens = env, chat(env), sampling.max_tokens
        self._speaker = EngineSpeaker(engine, sampling, seed=plan.seed, deadline_s=_DEADLINE_S, turn=_at_once)
        messages, _ = env.reset(seed=plan.env_seed, options={"split": plan.split, "index": plan.index})
        self._prompt_ids = self._chat.open(messages)
        self.said: list[list[int]] = []
        self.over = False

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation."""
        return self._env.messages

    async def speak(self) -> Completion:
        """Sample a turn."""
        return await self._speaker(self._prompt_ids, self.messages, self._max_tokens)

    async def act(self, completion: Completion) -> None:
        """Hand a turn to the environment, and wait for its tools."""
        self.said.append(completion.token_ids.tolist())
        attempted = sum(len(message.tool_calls) for message in self.messages)
        action = self._chat.parse(completion.token_ids, first_call=attempted)
        new, _, terminated, truncated, _ = await self._env.astep(action)
        self.over = terminated or truncated
        if not self.over:
            messages = self.messages[: len(self.messages) - len(new)]
            extension = self._chat.extend(self._prompt_ids, completion.token_ids, messages=messages, new=new)
            past = (self._prompt_ids, completion.token_ids) if extension.extends else ()
            self._prompt_ids = np.concatenate([*past, extension.new_ids])


async def _at_once() -> None:
    """Between two barriers nobody waits for a turn."""
