"""Environments whose tools work in a sandbox of the episode's own.

The sandbox is opened by the first call that needs it and closed when the episode ends, is begun anew, or the
environment is closed. Calls of one message run one after the other, in their order, and share a budget of
seconds: what the model asks for at once can't take longer than one call may. What exceeds the budget is the
model's fault and is told to it; a sandbox that can't be opened in time or goes away is the world's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, ParamSpec, TypeVar

from agentrl.env import Step
from agentrl.errors import BadConfig, ToolError, UserError
from agentrl.registry import check_sandbox
from agentrl.sandbox import Limits, Sandbox
from agentrl.sandboxing.backends import limits_of, prove_backend, shared_backend
from agentrl.threads import in_thread
from agentrl.tool_env import ToolEnv
from agentrl.types import Message, Task

__all__ = ["SessionEnv"]

P = ParamSpec("P")
T = TypeVar("T")

_WORLD_S = 60.0  # beside the model's own seconds, for the world to open sandboxes and answer
_END_S = 5.0  # of it at least, to end what took all of the model's seconds
_MOST_CALLS = 16  # of a message that are run


class SessionEnv(ToolEnv):
    """A ToolEnv with one sandbox an episode; its tools are ``@tool(remote=True)`` and await ``in_turn``."""

    session_limits: ClassVar[Limits] = Limits()  # by default
    seconds: float = 10.0  # that the calls of one message may take

    def __init__(
        self,
        *,
        sandbox: str = "auto",
        limits: Mapping[str, float | bool | None] | None = None,
        seconds: float | None = None,
        tool_deadline_s: float | None = None,
        **settings: Any,
    ) -> None:
        """``sandbox`` names a backend, "auto" the strongest here. ``limits`` changes single ones of
        ``agentrl.sandbox.Limits``. ``seconds``: what the calls of one message may take together, the model's
        own limit; past ``tool_deadline_s``, by default a minute more, the world is to blame."""
        name = type(self).__name__
        if seconds is not None and not 0 < seconds < 3600:
            raise UserError(f"{name}(seconds={seconds}): it lies between 0 and 3600")
        self.seconds = self.seconds if seconds is None else seconds
        check_sandbox(sandbox)
        self.limits = limits_of(self.session_limits, limits, asked_by=name)
        self.sandbox = sandbox
        self._session: Sandbox | None = None
        self._left_s, self._calls = self.seconds, 0
        if tool_deadline_s is None:
            tool_deadline_s = self.seconds + _WORLD_S
        super().__init__(tool_deadline_s=tool_deadline_s, **settings)
        least = self.seconds + _END_S
        if not tool_deadline_s >= least:  # else a policy could blame the world for its own sleep
            raise BadConfig(
                f"{name}(tool_deadline_s={tool_deadline_s:g}): it is {least:g} or more, {_END_S:g} above "
                f"seconds={self.seconds:g}; set seconds for how long the model's calls may take"
            )

    def check_host(self) -> None:
        super().check_host()
        prove_backend(self.sandbox, self.limits)

    def setup(self, task: Task) -> None:
        self.release()
        self._line = asyncio.Lock()  # fair: who comes first goes first

    async def in_turn(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """``work(...)`` in a thread, after the calls before it. Raises ToolError without time left."""
        async with self._line:
            self._calls += 1
            if self._left_s <= 0 or self._calls > _MOST_CALLS:
                raise ToolError("not run: the calls of one message took too long, or were too many")
            return await in_thread(work, *args, **kwargs)

    @property
    def left_s(self) -> float:
        """Seconds that the calls of this message may still take."""
        return self._left_s

    def spend(self, seconds: float) -> None:
        """Take off what a call took."""
        self._left_s -= seconds

    def session(self) -> Sandbox:
        """The episode's sandbox, opened where it is not. Raises SandboxLost."""
        if self._session is None:
            self._session = self.open_session()
        return self._session

    def open_session(self) -> Sandbox:
        """A sandbox with this environment's limits."""
        return shared_backend(self.sandbox, self.limits).open(self.limits)

    def release(self) -> None:
        """Close what the episode opened. Idempotent; overridden by who opens more."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    async def astep(self, action: Message) -> Step:
        self._left_s, self._calls = self.seconds, 0
        return await super().astep(action)

    def truncate(self, reason: str, message: Message | None = None) -> Step:
        step = super().truncate(reason, message)
        self.release()
        return step

    def close(self) -> None:
        """Close the sandbox too."""
        self.release()
        super().close()

    async def _finish(self, stop_reason: str, *new: Message, truncated: bool = False) -> Step:
        step = await super()._finish(stop_reason, *new, truncated=truncated)
        await in_thread(self.release)
        return step
