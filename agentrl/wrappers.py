"""Gymnasium wrappers for language: text instead of messages, whole conversations, recordings.

They nest with each other and with Gymnasium's own, and keep ``astep`` and ``atruncate`` working. Around a
wrapper of Gymnasium's, which knows neither, ``astep`` runs ``step`` in a thread and ``atruncate`` goes to the
environment.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gymnasium
from gymnasium.utils import RecordConstructorArgs

from agentrl.env import Env
from agentrl.spaces import Unicode
from agentrl.threads import in_thread
from agentrl.transcript import message_to_json
from agentrl.types import Message

__all__ = ["FullHistory", "LanguageWrapper", "RecordTrajectory", "TextAction", "TextObservation"]

AnyStep = tuple[
    Any, float, bool, bool, dict[str, Any]
]  # Gymnasium's five values, the observation of any type

_MAX_CHARS = 1_000_000


class LanguageWrapper(gymnasium.Wrapper[Any, Any, tuple[Message, ...], Message]):
    """Changes actions on their way in and observations on their way out, awaited or not."""

    def action(self, action: Any) -> Any:
        """What the wrapped environment is given."""
        return action

    def observation(self, observation: Any) -> Any:
        """What the caller is given."""
        return observation

    def done(self, step: AnyStep) -> AnyStep:
        """The step as the caller gets it."""
        observation, *rest = step
        return cast("AnyStep", (self.observation(observation), *rest))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self.observation(observation), info

    def step(self, action: Any) -> AnyStep:
        return self.done(cast("AnyStep", self.env.step(self.action(action))))

    async def astep(self, action: Any) -> AnyStep:
        """See :meth:`agentrl.env.Env.astep`."""
        if isinstance(self.env, Env | LanguageWrapper):
            return self.done(await self.env.astep(self.action(action)))
        return self.done(cast("AnyStep", await in_thread(self.env.step, self.action(action))))

    def truncate(self, reason: str, message: Any = None) -> AnyStep:
        """See :meth:`agentrl.env.Env.truncate`."""
        said = None if message is None else self.action(message)
        return self.done(self._truncatable().truncate(reason, said))

    async def atruncate(self, reason: str, message: Any = None) -> AnyStep:
        """See :meth:`agentrl.env.Env.atruncate`."""
        said = None if message is None else self.action(message)
        return self.done(await self._truncatable().atruncate(reason, said))

    def _truncatable(self) -> Env | LanguageWrapper:
        inner = self.env if isinstance(self.env, LanguageWrapper) else self.env.unwrapped
        return cast("Env | LanguageWrapper", inner)


class TextAction(LanguageWrapper, RecordConstructorArgs):
    """Actions are plain text, which ``parse`` makes a message of; by default the text is the message."""

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        *,
        parse: Callable[[str], Message] | None = None,
        max_chars: int = _MAX_CHARS,
    ) -> None:
        RecordConstructorArgs.__init__(self, parse=parse, max_chars=max_chars)
        super().__init__(env)
        self._parse = parse
        self.action_space = Unicode(max_chars)

    def action(self, action: str) -> Message:
        return Message("assistant", action) if self._parse is None else self._parse(action)


class FullHistory(LanguageWrapper, RecordConstructorArgs):
    """Observations are the whole conversation so far, not only what is new."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)

    def observation(self, observation: Any) -> tuple[Message, ...]:
        return cast("Env", self.unwrapped).messages


class TextObservation(LanguageWrapper, RecordConstructorArgs):
    """Observations are text, ``role: content`` for each message; what exceeds ``max_chars`` is cut off."""

    def __init__(self, env: gymnasium.Env[Any, Any], *, max_chars: int = _MAX_CHARS) -> None:
        RecordConstructorArgs.__init__(self, max_chars=max_chars)
        super().__init__(env)
        self._max_chars = max_chars
        self.observation_space = Unicode(max_chars)

    def observation(self, observation: tuple[Message, ...]) -> str:
        return "\n".join(f"{message.role}: {message.content}" for message in observation)[: self._max_chars]


class RecordTrajectory(LanguageWrapper, RecordConstructorArgs):
    """Appends every episode that ends to a JSONL file: task_id, messages, rewards by step, stop_reason.

    Lone surrogates, which UTF-8 can't hold, become "?".
    """

    def __init__(self, env: gymnasium.Env[Any, Any], *, path: str | Path) -> None:
        RecordConstructorArgs.__init__(self, path=str(path))
        super().__init__(env)
        self._path = Path(path)
        self._rewards: list[float] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        self._rewards = []
        return super().reset(seed=seed, options=options)

    def done(self, step: AnyStep) -> AnyStep:
        _, reward, terminated, truncated, info = step
        self._rewards.append(float(reward))
        if terminated or truncated:
            self._write(info["stop_reason"])
        return step

    def _write(self, stop_reason: str) -> None:
        env = cast("Env", self.unwrapped)
        episode = {
            "task_id": env.task.id,
            "messages": [message_to_json(message) for message in env.messages],
            "rewards": self._rewards,
            "stop_reason": stop_reason,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(json.dumps(episode, ensure_ascii=False) + "\n")
