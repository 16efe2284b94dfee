"""Tools: a typed Python function becomes a JSON schema, and a call becomes a checked run under a deadline.

    @tool
    def price(self, item: str, currency: Literal["EUR", "USD"] = "EUR") -> float:
        '''Look up what an item costs.

        item: as it is named in the catalogue
        '''

The schema is OpenAI's function format. Arguments are validated before the function sees them (strictly: "3"
is no integer). Synchronous functions run in daemon threads, asynchronous ones on the event loop; parallel
calls run at the same time, so a tool that changes its environment is asynchronous or takes a lock.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

from agentrl.errors import BadArguments, ToolError, ToolLate, UserError, WorldError, did_you_mean
from agentrl.threads import in_thread
from agentrl.types import ToolCall

if TYPE_CHECKING:
    from agentrl.schemas import Arguments

__all__ = ["Tool", "as_text", "as_tool", "is_tool", "tool"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]  # JSON schema of the arguments, an object without references
    function: Callable[..., Any]  # sync or async; takes the arguments by keyword
    deadline_s: float | None = None  # of one call; None: the environment's
    remote: bool = False  # True: OSError, httpx's TransportError and time-outs are the world's fault
    arguments: Arguments = field(repr=False, compare=False)  # validates those of a call

    def schema(self) -> dict[str, Any]:
        """What a chat template takes: {"type": "function", "function": {name, description, parameters}}."""
        described = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": described}

    def bind(self, owner: object) -> Tool:
        """The same tool as a method of ``owner``."""
        return replace(self, function=self.function.__get__(owner))

    def parse(self, call: ToolCall) -> dict[str, Any]:
        """The arguments of ``call`` as the function takes them; those left out are absent.

        Raises BadArguments, with a text for the model to read.
        """
        if call.arguments is None:
            raise BadArguments(call.note or f"the arguments of {self.name} are no JSON object")
        return self.arguments.parse(call.arguments)

    async def run(self, arguments: Mapping[str, Any], *, deadline_s: float | None = None) -> Any:
        """Call the function; ``deadline_s`` holds where the tool has none of its own.

        Raises ToolLate at the deadline and whatever the function raises; a remote tool's deadline, OSError,
        TimeoutError and httpx's TransportError are WorldErrors.
        """
        seconds = deadline_s if self.deadline_s is None else self.deadline_s
        scope = asyncio.timeout(seconds)
        try:
            async with scope:
                return await self._call(arguments)
        except _network_errors() as error:
            if self.remote:
                why = f"took over {seconds:g} s" if scope.expired() else f"{type(error).__name__}: {error}"
                raise WorldError(f"the remote tool {self.name} failed: {why}") from error
            if scope.expired():
                raise ToolLate(f"{self.name} took longer than {seconds:g} s and was given up") from None
            raise

    async def _call(self, arguments: Mapping[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self.function):
            return await self.function(**arguments)
        result = await in_thread(self.function, **arguments)
        # A plain function around an asynchronous one: a decorator's, or one that ends in self._fetch().
        return await result if inspect.isawaitable(result) else result


@overload
def tool(function: F, /) -> F: ...
@overload
def tool(*, deadline_s: float | None = None, remote: bool = False) -> Callable[[F], F]: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    deadline_s: float | None = None,
    remote: bool = False,
    **unknown: Any,
) -> Any:
    """Mark a function or method as a tool; it stays callable as before.

    Type hints and the docstring become the schema; a parameter is described by ``Annotated[int, "text"]`` or
    by a line ``name: text`` of the docstring. Raises UserError for a parameter without a type hint, for what
    can be no tool, and for options that there are not.
    """
    for name in unknown:
        raise UserError(
            f"@tool has no option {name!r}{did_you_mean(name, ('deadline_s', 'remote'))}; it has deadline_s "
            "and remote, and the model reads the function's name and docstring"
        )
    if deadline_s is not None and deadline_s <= 0:
        raise UserError(f"@tool(deadline_s={deadline_s}): a deadline is above 0 seconds")

    def mark(marked: F) -> F:
        _check_kind(marked)
        _check_signature(marked)
        marked.__agentrl_tool__ = {"deadline_s": deadline_s, "remote": remote}  # type: ignore[attr-defined]
        return marked

    return mark if function is None else mark(function)


def is_tool(candidate: object) -> bool:
    """Whether ``candidate`` was marked with :func:`tool`."""
    return hasattr(candidate, "__agentrl_tool__")


def as_tool(function: Callable[..., Any]) -> Tool:
    """The record of a function marked with :func:`tool`; a method not yet bound gets its owner by ``bind``.

    Raises UserError for a function that is not marked, or whose type hints make no JSON schema.
    """
    if not is_tool(function):
        raise UserError(f"{function!r} is no tool: mark it with @agentrl.tool")
    options: Mapping[str, Any] = function.__agentrl_tool__  # type: ignore[attr-defined]
    from agentrl.schemas import Arguments  # which loads pydantic

    description, documented = _read_docstring(function)
    arguments = Arguments(function, _parameters(function), documented)
    return Tool(
        name=function.__name__,
        description=description,
        parameters=arguments.schema(),
        function=function,
        arguments=arguments,
        **options,
    )


def _network_errors() -> tuple[type[Exception], ...]:
    """What a connection fails with: OSError (TimeoutError is one), and httpx's, where anybody loaded it."""
    httpx = sys.modules.get("httpx")
    return (OSError,) if httpx is None else (OSError, httpx.TransportError)


def as_text(result: object, *, most_chars: int) -> tuple[str, int]:
    """What the model reads of a tool's result (texts as they are, lists and mappings as JSON, else ``str``),
    and how many characters it does not.

    Longer results are cut and say so; lone surrogates, which no tokenizer takes, become "?". Raises ToolError
    for an integer of more digits than Python writes, whose size is the model's choice (``10 ** 5000``).
    """
    try:
        if isinstance(result, list | tuple | dict):
            result = json.dumps(result, ensure_ascii=False, default=str)
        whole = str(result)
    except ValueError as error:
        if "int_max_str_digits" not in str(error):
            raise
        most = sys.get_int_max_str_digits()
        raise ToolError(f"the result has an integer of more than {most} digits") from error
    text = whole[:most_chars].encode("utf-8", "replace").decode()  # cut first: a result can be megabytes
    left_out = len(whole) - len(text)
    if left_out:
        text += f"\n[cut: {left_out} of {len(whole)} characters are not shown]"
    return text, left_out


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that the model fills in: all but ``self``."""
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    return parameters


def _check_kind(function: Any) -> None:
    """Raise UserError for what can be no tool, before anything is read off it."""
    if isinstance(function, staticmethod):
        raise UserError(f"tool {function.__qualname__}: write @staticmethod above @tool, not below it")
    if isinstance(function, classmethod):
        raise UserError(
            f"tool {function.__qualname__}: a tool is a method or a static method, no class method"
        )
    if not callable(function):
        raise UserError(f"@tool({function!r}): it marks a function; write @tool, or @tool(deadline_s=5)")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(
            f"tool {function.__qualname__} yields: a call has one result, return it (a list, say)"
        )


def _check_signature(function: Callable[..., Any]) -> None:
    for name, parameter in _parameters(function).items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(
                f"tool {function.__qualname__}: {parameter} can't be passed by name; use ordinary parameters"
            )
        if name == "cls" and parameter.annotation is parameter.empty:
            raise UserError(
                f"tool {function.__qualname__}: a tool is a method or a static method, no class method"
            )
        if parameter.annotation is parameter.empty:
            raise UserError(
                f"tool {function.__qualname__}: the parameter {name!r} has no type hint, so the model "
                f"can't be told what to pass; write for example '{name}: str'"
            )


def _read_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """(description, text of each parameter that has a line ``name: text`` or ``name (type): text``)."""
    names = "|".join(map(re.escape, _parameters(function))) or r"(?!)"
    line_of_parameter = re.compile(rf"(?P<indent>\s*)(?P<name>{names})\s*(\([^)]*\))?:\s+(?P<text>.*)")
    kept: list[str] = []
    documented: dict[str, str] = {}
    current: re.Match[str] | None = None
    for line in (inspect.getdoc(function) or "").splitlines():
        found = line_of_parameter.fullmatch(line)
        indent = len(line) - len(line.lstrip())
        if found:
            current = found
            documented[found["name"]] = found["text"].strip()
        elif current and line.strip() and indent > len(current["indent"]):
            documented[current["name"]] += " " + line.strip()
        else:
            current = None
            kept.append(line)
    text = "\n".join(line for line in kept if line.strip() not in ("Args:", "Arguments:", "Parameters:"))
    return re.sub(r"\n{3,}", "\n\n", text).strip(), documented
