"""Environments with tools: the assistant calls them, then answers, and the answer is scored.

Every call is answered exactly once. What the model did wrong is an observation that it can read, and by
``bad_calls`` and ``bad_call_penalty`` it may also end the episode or cost something.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

from agentrl.dispatch import CheckedCall, answer_calls, check_calls, collect_tools
from agentrl.env import Env, Step
from agentrl.errors import UserError, did_you_mean
from agentrl.registry import make_reward
from agentrl.reward import Evidence, Reward, as_score, check_host
from agentrl.threads import in_thread, run_sync
from agentrl.tools import Tool
from agentrl.types import Message, Score, Task

__all__ = ["BadCalls", "ToolEnv"]

BadCalls = Literal["explain", "end"]


class ToolEnv(Env):
    """A chat in which the assistant calls tools and then answers; the answer is scored.

    An author gives ``tasks``, ``gold``, methods marked with ``@tool`` and a ``reward``: the name of one, a
    method, or any callable that takes an Evidence. A message without tool calls is the answer.
    """

    max_turns: int = 8  # assistant messages in an episode
    tool_deadline_s: float = 10.0  # seconds, of one call of a tool without a deadline of its own
    max_result_chars: int = 20_000  # of a tool's result; what is longer is cut and says so
    # After a call that can't be run (malformed, no such tool, wrong arguments): "explain" lets the model read
    # why and go on; "end" ends the episode with the stop_reason "bad_call", scored as it stands.
    bad_calls: BadCalls = "explain"
    bad_call_penalty: float = 0.0  # subtracted from the turn's reward for each such call
    system: str = ""  # a system message before every task's prompt
    reward: str | Callable[..., Score | float] = ""

    _methods: ClassVar[tuple[Tool, ...]] = ()
    _functions: ClassVar[tuple[Tool, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "step" in vars(cls) and "astep" not in vars(cls):
            raise UserError(f"{cls.__name__} overrides step, which rollouts never call: override astep")
        reward = vars(cls).get("reward")
        if inspect.isfunction(reward) and len(inspect.signature(reward).parameters) == 1:
            cls.reward = staticmethod(reward)  # a plain function of the evidence, not a method
        cls._methods, cls._functions = collect_tools(cls, beside=ToolEnv)

    def __init__(
        self,
        *,
        max_turns: int | None = None,
        tool_deadline_s: float | None = None,
        max_result_chars: int | None = None,
        bad_calls: BadCalls | None = None,
        bad_call_penalty: float | None = None,
        system: str | None = None,
        reward: str | Reward | None = None,
        render_mode: str | None = None,
    ) -> None:
        limits = {
            "max_turns": max_turns,
            "tool_deadline_s": tool_deadline_s,
            "max_result_chars": max_result_chars,
        }
        for name, limit in limits.items():
            if limit is not None and limit <= 0:
                raise UserError(f"{type(self).__name__}({name}={limit}): it must be above 0")
            if limit is not None:
                setattr(self, name, limit)
        self.bad_calls = self.bad_calls if bad_calls is None else bad_calls
        self.bad_call_penalty = self.bad_call_penalty if bad_call_penalty is None else bad_call_penalty
        self._check_policy()
        self.system = self.system if system is None else system
        chosen = self.reward if reward is None else reward
        if not chosen:
            raise UserError(
                f'{type(self).__name__} has no reward: set reward = "exact", or define reward(self, evidence)'
            )
        if not isinstance(chosen, str) and not callable(chosen):
            raise UserError(
                f"{type(self).__name__}(reward={chosen!r}): it must be the name of a reward, or a callable "
                "that takes an Evidence"
            )
        self._reward: Reward = _reward_named(chosen) if isinstance(chosen, str) else chosen
        self._tools = (*(tool.bind(self) for tool in self._methods), *self._functions)
        self._turns = 0
        self._ending = ""
        super().__init__(render_mode=render_mode)

    @property
    def tools(self) -> tuple[Tool, ...]:
        return self._tools

    @property
    def tools_deadline_s(self) -> float:
        limits = (self.tool_deadline_s if tool.deadline_s is None else tool.deadline_s for tool in self.tools)
        return max(limits, default=0.0)

    def opening(self, task: Task) -> tuple[Message, ...]:
        if not self.system:
            return task.prompt
        if task.prompt and task.prompt[0].role == "system":
            raise UserError(
                f"{type(self).__name__} has a system text and task {task.id!r} brings its own: "
                "set system='' to use the task's"
            )
        return (Message("system", self.system), *task.prompt)

    def check_host(self) -> None:
        check_host(self._reward)

    def score(self) -> Score | float:
        """The reward of the conversation as it stands."""
        return self._reward(Evidence(self.task, self.messages, self, self.completion_tokens, self.is_cut))

    def end(self, stop_reason: str) -> None:
        """End the episode once the calls of this message are answered: for tools that submit or solve."""
        self._ending = stop_reason

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[Message, ...], dict[str, Any]]:
        self._turns = 0
        self._ending = ""
        return super().reset(seed=seed, options=options)

    def step(self, action: Message) -> Step:
        """``astep`` on a background loop, for Gymnasium and for stepping by hand."""
        return run_sync(self.astep(action))

    async def astep(self, action: Message) -> Step:
        """Run the calls of ``action`` at the same time and answer in order; without calls, score the answer.

        Raises WorldError where the world failed under a tool or the reward.
        """
        self.accept(action)
        self._turns += 1
        if not action.tool_calls:
            return await self._finish("answered")
        calls = check_calls(action.tool_calls, self._tools)
        self._messages[-1] = replace(action, tool_calls=tuple(checked.call for checked in calls))
        bad = sum(checked.tool is None for checked in calls)
        over = bad > 0 and self.bad_calls == "end"
        observation, reward, terminated, truncated, info = await self._act(calls, over=over)
        return observation, reward - self.bad_call_penalty * bad, terminated, truncated, info

    async def _act(self, calls: Sequence[CheckedCall], *, over: bool) -> Step:
        """Answer ``calls``; the episode ends where a tool says so, where it is ``over``, at the last turn."""
        with self._timing("tools"), self._naming("tools"):
            answers = await answer_calls(
                calls, deadline_s=self.tool_deadline_s, most_chars=self.max_result_chars
            )
        if self._ending:
            return await self._finish(self._ending, *answers)
        if over:
            return await self._finish("bad_call", *answers)
        if self._turns >= self.max_turns:
            # With a single turn there is nothing to cut off: the task is over, which Gymnasium insists on.
            return await self._finish("max_turns", *answers, truncated=self.max_turns > 1)
        return self.transition(*answers)

    def _check_policy(self) -> None:
        name, policy, penalty = type(self).__name__, self.bad_calls, self.bad_call_penalty
        if policy not in get_args(BadCalls):
            raise UserError(
                f"{name}(bad_calls={policy!r}){did_you_mean(str(policy), get_args(BadCalls))}: "
                f"{' or '.join(get_args(BadCalls))}; what a bad call costs is bad_call_penalty"
            )
        if not 0 <= penalty < math.inf:
            raise UserError(
                f"{name}(bad_call_penalty={penalty}): it is subtracted, so it must be finite and not below 0"
            )

    async def _finish(self, stop_reason: str, *new: Message, truncated: bool = False) -> Step:
        self._messages.extend(new)
        with self._timing("reward"), self._naming("reward"):
            inline = vars(type(self._reward)).get("inline", False) and type(self).score is ToolEnv.score
            score = as_score(self.score() if inline else await in_thread(self.score), self._reward)
        observation, *rest = self.transition(score=score, stop_reason=stop_reason, truncated=truncated)
        return (new, *rest)  # type: ignore[return-value]  # they were appended before the score was taken


@functools.cache
def _reward_named(name: str) -> Reward:
    """One object per name: rewards keep no state between calls, and some hold worker processes."""
    return make_reward(name)
