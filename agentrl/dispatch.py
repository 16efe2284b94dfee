"""The tools of an environment class, the status of each call of one message, and the answers to the calls.

``check_calls`` says which calls can be run; those that can't are the bad ones. Every call is answered exactly
once, in the order of the calls, whatever is wrong with it: what the model did wrong becomes a text that it
can read, and is counted. WorldErrors and bugs leave, and end the other calls of the message.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agentrl.errors import BadArguments, ToolError, ToolLate, UserError, did_you_mean
from agentrl.faults import count_call
from agentrl.tools import Tool, as_text, as_tool, is_tool
from agentrl.types import Message, ToolCall

__all__ = ["CheckedCall", "answer_calls", "check_calls", "collect_tools"]

_BAD_CALLS: Mapping[str, str] = {
    "invalid_json": "the tool call is malformed",
    "not_object": "the tool call does not give a tool's name and arguments",
    "unclosed": "the tool call was not closed",
    "schema_error": "the arguments of the tool call do not fit",
}
_NAME_CHARS = 100  # of the name of an unknown tool that are compared and repeated: a name can be megabytes
_CANCEL_S = 1.0  # for cancelled calls to end; a coroutine that refuses to keeps nobody


@dataclass(frozen=True, slots=True)
class CheckedCall:
    """A call beside the tool that it means."""

    call: ToolCall  # with the status that it has here; a bad one's note says why
    tool: Tool | None = None  # None: the call is bad
    arguments: Mapping[str, Any] = field(default_factory=dict)  # as the tool's function takes them


def collect_tools(cls: type, *, beside: type) -> tuple[tuple[Tool, ...], tuple[Tool, ...]]:
    """(tools among the methods of ``cls``, among its static methods), in the order of their definition.

    Raises UserError where a tool takes the place of an attribute of ``beside``, a base class, where one is
    overridden by a method that is none, and where two share a name.
    """
    methods: list[Tool] = []
    functions: list[Tool] = []
    for attribute in dict.fromkeys(name for base in reversed(cls.__mro__) for name in vars(base)):
        defined = inspect.getattr_static(cls, attribute)
        function = getattr(defined, "__func__", defined)
        if is_tool(function):
            if any(attribute in {**vars(base), **inspect.get_annotations(base)} for base in beside.__mro__):
                raise UserError(
                    f"{cls.__name__}: {attribute!r} is {beside.__name__}'s own: name the tool otherwise"
                )
            (functions if isinstance(defined, staticmethod) else methods).append(as_tool(function))
        elif callable(function) and any(is_tool(vars(base).get(attribute)) for base in cls.__mro__):
            raise UserError(
                f"{cls.__name__}.{attribute} overrides a tool and is none: mark it with @tool, or set it "
                "to None"
            )
    names = [tool.name for tool in (*methods, *functions)]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{cls.__name__} has two tools named {name!r}: rename one")
    return tuple(methods), tuple(functions)


def check_calls(calls: Sequence[ToolCall], tools: Sequence[Tool]) -> list[CheckedCall]:
    """Each call with its tool and its arguments, as far as it can be run."""
    return [_check(call, tools) for call in calls]


async def answer_calls(calls: Sequence[CheckedCall], *, deadline_s: float, most_chars: int) -> list[Message]:
    """One tool message for each call, the calls run at the same time.

    ``deadline_s`` holds for tools without one of their own; results are cut to ``most_chars``.
    """
    if len(calls) == 1:  # as mostly: a task of its own costs three times as much as all that is done here
        return [await _answer(calls[0], deadline_s, most_chars)]
    running = [asyncio.ensure_future(_answer(call, deadline_s, most_chars)) for call in calls]
    try:
        return await asyncio.gather(*running)
    except BaseException:  # nothing of a failed step goes on behind its back
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=_CANCEL_S)
        raise


def _check(call: ToolCall, tools: Sequence[Tool]) -> CheckedCall:
    if call.status in _BAD_CALLS:
        return CheckedCall(replace(call, note=call.note or _BAD_CALLS[call.status]))
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        return CheckedCall(replace(call, status="unknown_tool", note=_unknown(call.name, tools)))
    try:
        return CheckedCall(replace(call, status="ok", note=""), tool, tool.parse(call))
    except BadArguments as error:
        return CheckedCall(replace(call, status="schema_error", note=str(error)))


def _unknown(name: str, tools: Sequence[Tool]) -> str:
    names = [tool.name for tool in tools]
    meant = name[:_NAME_CHARS]
    known = f"the tools are {', '.join(names)}" if names else "there are no tools"
    return f"no tool named {meant!r}{did_you_mean(meant, names)}; {known}"


async def _answer(checked: CheckedCall, deadline_s: float, most_chars: int) -> Message:
    call = checked.call
    try:
        if checked.tool is None:
            raise BadArguments(call.note)
        result = await checked.tool.run(checked.arguments, deadline_s=deadline_s)
        text, left_out = as_text(result, most_chars=most_chars)
        if left_out:
            count_call("cut")
    except (BadArguments, ToolError) as error:  # the model's fault: let it read why
        if isinstance(error, ToolError):
            count_call("late" if isinstance(error, ToolLate) else "error")
        text, _ = as_text(f"error: {error}", most_chars=most_chars)
    except BaseException as error:
        error.add_note(f"in the tool {call.name!r}, called with {_shown(call.arguments)}")
        raise
    return Message("tool", text, tool_call_id=call.id, name=call.name or None)


def _shown(arguments: Mapping[str, Any] | None) -> str:
    text = repr(arguments)
    return text if len(text) <= 500 else f"{text[:500]}..."
