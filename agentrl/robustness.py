"""Checks that whatever a model says, and whatever its tools do, ends in an observation or in the right error.

The tools of a ToolEnv are replaced by ones that raise, hang or say ten megabytes; environments that derive
from Env run their tools themselves and are not examined here beyond what is said to them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from agentrl.env import Env
from agentrl.errors import ToolError, WorldError
from agentrl.probes import SEED, Start, Subject, Unsound, gold_of, play, require
from agentrl.tool_env import ToolEnv
from agentrl.tools import Tool
from agentrl.types import CallStatus, Message, ToolCall

__all__ = [
    "answers_malformed_calls",
    "answers_parallel_calls",
    "answers_unknown_tools",
    "cuts_ten_megabytes_of_result",
    "gives_slow_tools_up",
    "leaves_errors_of_tools_their_fates",
    "survives_random_actions",
    "takes_ten_megabytes_of_text",
]

_RANDOM_ACTIONS = 200
_PARALLEL_CALLS = 8
_HUGE = 10_000_000  # characters said, or of a result
_MOST_SHOWN = 1_000_000  # characters of an observation
_DEADLINE_S = 0.05  # of a tool that hangs
_HANGS_S = 2.0  # seconds for a deadline to be kept, however busy the machine is
_MALFORMED: tuple[CallStatus, ...] = ("invalid_json", "not_object", "unclosed", "schema_error")


class _Bug(Exception):
    """Stands for any error that nobody raises on purpose."""


def survives_random_actions(subject: Subject) -> str:
    """Random actions of the action space never crash it."""
    env = subject.env
    env.action_space.seed(SEED)
    env.reset(seed=SEED)
    for count in range(_RANDOM_ACTIONS):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset(seed=SEED + count)
    return f"{_RANDOM_ACTIONS} actions"


def answers_malformed_calls(subject: Subject) -> str:
    """Calls that are no JSON, no object, not closed, or do not fit the schema are answered."""
    count = 0
    for start in subject.first_starts:
        for name in _names(subject.env):
            for status in _MALFORMED:
                call = ToolCall(id="call_0", name=name, arguments=None, raw="<tool_call>{", status=status)
                _say(subject.env, start, call)
                count += 1
    return f"{count} calls"


def answers_unknown_tools(subject: Subject) -> str:
    """A call of a tool that there is not is answered, also where its name has ten megabytes."""
    names = ("no_such_tool", "", "0" * _HUGE)
    for start in subject.first_starts:
        for name in names:
            call = ToolCall(id="call_0", name=name, arguments={}, status="unknown_tool")
            _check_size(start, _say(subject.env, start, call))
    return f"{len(names) * len(subject.first_starts)} calls"


def answers_parallel_calls(subject: Subject) -> str:
    """Calls in one message are answered once each, in their order."""
    count = 0
    for start, calls in _good_calls(subject):
        many = (calls * _PARALLEL_CALLS)[:_PARALLEL_CALLS]
        _say(subject.env, start, *(replace(call, id=f"call_{place}") for place, call in enumerate(many)))
        count += len(many)
    return f"{count} calls" if count else "there are no tools"


def leaves_errors_of_tools_their_fates(subject: Subject) -> str:
    """A tool's ToolError is answered; its WorldError, or any bug, leaves the step as what it is."""
    tried = 0
    for start, calls in _good_calls(subject):
        for error in (ToolError("probed"), WorldError("probed"), _Bug("probed")):
            env = _with_tools(subject, _raising(error))
            if env is None:
                return "it runs its tools itself"
            for call in calls:
                _meet(env, start, call, error)
                tried += 1
    return f"{tried} errors" if tried else "there are no tools"


def gives_slow_tools_up(subject: Subject) -> str:
    """A tool that hangs is given up at its deadline; where it is remote, that is the world's fault."""
    tried = 0
    for start, calls in _good_calls(subject):
        for call in calls:
            released, late = threading.Event(), threading.Event()
            env = _with_tools(subject, _hanging(released, late), deadline_s=_DEADLINE_S)
            if env is None:
                return "it runs its tools itself"
            try:
                _say(env, start, call)
            except WorldError:
                require(_is_remote(env, call), start.task, f"{call.name} is late, which is the model's fault")
            finally:
                was_late = late.is_set()
                released.set()
            require(
                not was_late,
                start.task,
                f"a call of {call.name} was waited for beyond its deadline: leave calls to ToolEnv",
            )
            tried += 1
    return f"{tried} calls" if tried else "there are no tools"


def takes_ten_megabytes_of_text(subject: Subject) -> str:
    """Arguments or an answer of ten megabytes are taken, and not repeated to the model."""
    text = "0" * _HUGE
    for start in subject.first_starts[:1]:
        for name in _names(subject.env):
            call = ToolCall(id="call_0", name=name, arguments={"text": text}, raw=text, status="schema_error")
            _check_size(start, _say(subject.env, start, call))
        answer = play(subject.env, start, [Message("assistant", text)])
        require(math.isfinite(answer.total), start.task, f"ten megabytes of answer score {answer.total}")
        for observation, *_ in answer.steps:
            _check_size(start, observation)
    return "arguments, an answer"


def cuts_ten_megabytes_of_result(subject: Subject) -> str:
    """Of a result of ten megabytes the model is shown a part."""
    tried = 0
    for start, calls in _good_calls(subject):
        env = _with_tools(subject, _saying("0" * _HUGE))
        if env is None:
            return "it runs its tools itself"
        for call in calls:
            _check_size(start, _say(env, start, call))
            tried += 1
    return f"{tried} results" if tried else "there are no tools"


def _names(env: Env) -> list[str]:
    return [tool.name for tool in env.tools] or ["no_such_tool"]


def _good_calls(subject: Subject) -> Iterator[tuple[Start, list[ToolCall]]]:
    """For a task of each split, one call of each tool: gold's own, else one that the action space has."""
    env = subject.env
    for start in subject.first_starts:
        env.action_space.seed(SEED)
        drawn = (env.action_space.sample() for _ in range(_RANDOM_ACTIONS))
        calls: dict[str, ToolCall] = {}
        for message in (*gold_of(env, start.task), *drawn):
            for call in message.tool_calls:
                calls.setdefault(call.name, call)
        if env.tools:
            yield start, [calls[tool.name] for tool in env.tools if tool.name in calls]


def _say(env: Env, start: Start, *calls: ToolCall) -> tuple[Message, ...]:
    """What an episode that begins with ``calls`` shows. Raises Unsound where one is not answered once."""
    env.reset(seed=SEED, options=start.options)
    observation, reward, terminated, truncated, _ = env.step(Message("assistant", "", calls))
    require(math.isfinite(reward), start.task, f"the reward is {reward!r}: it must be finite")
    answered = [message.tool_call_id for message in observation if message.role == "tool"]
    asked = [call.id for call in calls]
    require(
        answered == asked or bool(terminated or truncated) or not env.tools,
        start.task,
        f"the calls {asked} got answers to {answered}: answer each once, in order",
    )
    return tuple(observation)


def _with_tools(subject: Subject, function: Callable[[Tool], Callable[..., Any]], **changes: Any) -> Any:
    """A twin whose tools do something else; None where it runs them itself."""
    env = subject.make_twin()
    if not isinstance(env, ToolEnv):
        return None
    env._tools = tuple(replace(tool, function=function(tool), **changes) for tool in env._tools)
    return env


def _raising(error: Exception) -> Callable[[Tool], Callable[..., Any]]:
    async def run(**arguments: Any) -> None:
        raise error

    return lambda tool: run


def _saying(text: str) -> Callable[[Tool], Callable[..., Any]]:
    async def run(**arguments: Any) -> str:
        return text

    return lambda tool: run


def _hanging(released: threading.Event, late: threading.Event) -> Callable[[Tool], Callable[..., Any]]:
    """Synchronous, since only such a tool can't be cancelled."""

    def run(**arguments: Any) -> str:
        if not released.wait(_HANGS_S):
            late.set()
        return "late"

    return lambda tool: run


def _meet(env: Env, start: Start, call: ToolCall, error: Exception) -> None:
    """Let ``call`` fail with ``error``. Raises Unsound for another fate than its own."""
    try:
        shown = _say(env, start, call)
    except type(error) as left:
        if isinstance(error, ToolError):
            raise Unsound(f"a ToolError of {call.name} left step: let the model read it") from left
        return
    if not isinstance(error, ToolError):
        kind = "WorldError" if isinstance(error, WorldError) else "bug"
        raise Unsound(f"task {start.task.id!r}: a {kind} of {call.name} was swallowed: let it leave step")
    said = any("probed" in message.content for message in shown)
    require(said, start.task, f"the text of a ToolError of {call.name} was not shown to the model")


def _is_remote(env: Env, call: ToolCall) -> bool:
    return any(tool.remote for tool in env.tools if tool.name == call.name)


def _check_size(start: Start, observation: Sequence[Message]) -> None:
    size = sum(len(message.content) for message in observation)
    require(
        size <= _MOST_SHOWN,
        start.task,
        f"after ten megabytes the model is shown {size} characters, more than {_MOST_SHOWN}: cut them off",
    )
