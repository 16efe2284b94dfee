"""Tools: schemas from functions, validation of calls, deadlines, whose fault an exception is."""

from __future__ import annotations

import asyncio
import enum
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Literal

import httpx
import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from agentrl.errors import BadArguments, ToolError, UserError, WorldError
from agentrl.tools import Tool, as_text, as_tool, tool
from agentrl.types import ToolCall


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    x: int
    title: str = ""


class Node(BaseModel):
    children: list[Node] = []


@tool
def paint(
    title: str,
    colour: Colour,
    points: list[Point],
    mode: Literal["fill", "edge"] = "fill",
    width: Annotated[float, "in pixels"] = 1.5,
    note: str | None = None,
) -> str:
    """Paint a shape.

    It is drawn at once.

    title: shown above,
        in bold
    points (list): its corners
    """
    return f"{title} {colour} {len(points)} {mode} {width} {note}"


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(id="call_0", name=name, arguments=arguments)


def parameters(function: Any) -> Any:
    return as_tool(function).parameters


def test_hints_and_docstring_become_an_openai_schema() -> None:
    assert as_tool(paint).schema() == {
        "type": "function",
        "function": {
            "name": "paint",
            "description": "Paint a shape.\n\nIt is drawn at once.",
            "parameters": {
                "type": "object",
                "additionalProperties": False,
                "required": ["title", "colour", "points"],
                "properties": {
                    "title": {"type": "string", "description": "shown above, in bold"},
                    "colour": {"type": "string", "enum": ["red", "blue"]},
                    "points": {
                        "type": "array",
                        "description": "its corners",
                        "items": {
                            "type": "object",
                            "required": ["x"],
                            "properties": {
                                "x": {"type": "integer"},
                                "title": {"type": "string", "default": ""},
                            },
                        },
                    },
                    "mode": {"type": "string", "enum": ["fill", "edge"], "default": "fill"},
                    "width": {"type": "number", "description": "in pixels", "default": 1.5},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
                },
            },
        },
    }


def test_the_schema_is_valid_json_schema_and_accepts_what_parse_accepts() -> None:
    arguments = {"title": "t", "colour": "red", "points": [{"x": 1}]}
    Draft202012Validator(parameters(paint)).validate(arguments)
    parsed = as_tool(paint).parse(call("paint", **arguments))
    assert parsed["colour"] is Colour.RED
    assert parsed["points"] == [{"x": 1}] or parsed["points"] == [Point(x=1)]
    assert set(parsed) == {"title", "colour", "points"}


def test_a_tool_without_parameters_takes_an_empty_object() -> None:
    @tool
    def look() -> str:
        return "a door"

    assert parameters(look)["properties"] == {}
    assert as_tool(look).parse(call("look")) == {}


def test_a_decorated_function_is_called_as_before() -> None:
    assert paint("a", Colour.RED, []) == "a Colour.RED 0 fill 1.5 None"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"colour": "red", "points": []}, "the argument 'title' is missing"),
        (
            {"title": "t", "colour": "red", "points": [], "widht": 1},
            "there is no argument 'widht'; did you mean 'width'?",
        ),
        ({"title": "t", "colour": "green", "points": []}, "colour: Input should be 'red' or 'blue'"),
        ({"title": 3, "colour": "red", "points": []}, "title: Input should be a valid string"),
        (
            {"title": "t", "colour": "red", "points": [{"x": "1"}]},
            "points.0.x: Input should be a valid integer",
        ),
    ],
)
def test_wrong_arguments_are_told_to_the_model(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadArguments) as caught:
        as_tool(paint).parse(call("paint", **arguments))
    assert str(caught.value) == f"wrong arguments for paint: {complaint}"


@pytest.mark.parametrize("hostile", ["\ud800", 10**5000, float("nan")], ids=["surrogate", "huge", "nan"])
def test_arguments_that_json_cannot_carry_are_the_models_fault(hostile: Any) -> None:
    @tool
    def count(n: int) -> int:
        return n

    with pytest.raises(BadArguments):
        as_tool(count).parse(call("count", n=hostile))


def test_arguments_nested_too_deeply_are_the_models_fault() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(BadArguments, match="no usable JSON"):
        as_tool(paint).parse(call("paint", title=deep))


def test_a_parameter_without_type_hint_is_refused_when_decorated() -> None:
    with pytest.raises(
        UserError, match=r"the parameter 'item' has no type hint.*write for example 'item: str'"
    ):

        @tool
        def price(item) -> int:  # type: ignore[no-untyped-def]
            return 1


def test_parameters_that_cannot_be_named_are_refused() -> None:
    with pytest.raises(UserError, match="can't be passed by name"):

        @tool
        def add(*numbers: int) -> int:
            return sum(numbers)


def test_a_type_that_json_cannot_carry_is_refused() -> None:
    @tool
    def attach(thread: threading.Thread) -> None: ...

    with pytest.raises(UserError, match="JSON can carry"):
        as_tool(attach)


def test_an_unknown_name_in_a_hint_is_refused_with_the_next_step() -> None:
    @tool
    def pay(amount: Money) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(UserError, match="'Money' is not defined in its type hints; import it"):
        as_tool(pay)


def test_a_type_that_contains_itself_is_refused() -> None:
    @tool
    def plant(tree: Node) -> None: ...

    with pytest.raises(UserError, match="Node contains itself"):
        as_tool(plant)


def test_a_function_that_is_not_marked_is_no_tool() -> None:
    with pytest.raises(UserError, match=r"mark it with @agentrl\.tool"):
        as_tool(len)


def run(marked: Any, deadline_s: float = 5.0, **arguments: Any) -> Any:
    return asyncio.run(as_tool(marked).run(arguments, deadline_s=deadline_s))


def test_sync_and_async_tools_both_run() -> None:
    @tool
    def where() -> str:
        return threading.current_thread().name

    @tool
    async def here() -> str:
        return threading.current_thread().name

    assert run(where) == "agentrl-call"
    assert run(here) == threading.current_thread().name


def test_a_local_tool_at_its_deadline_is_the_models_fault() -> None:
    @tool
    async def nap() -> None:
        await asyncio.sleep(60)

    with pytest.raises(ToolError, match=r"nap took longer than 0\.01 s"):
        run(nap, deadline_s=0.01)


def test_a_hung_synchronous_tool_is_given_up() -> None:
    release = threading.Event()

    @tool(deadline_s=0.05)
    def hang() -> None:
        release.wait(30)

    try:
        with pytest.raises(ToolError, match=r"hang took longer than 0\.05 s"):
            run(hang, deadline_s=30)
        assert not release.is_set()  # it hangs still
    finally:
        release.set()


@pytest.mark.parametrize(
    "error", [OSError("no route"), TimeoutError("slow"), ConnectionError("reset"), httpx.ReadError("cut")]
)
def test_a_remote_tools_connection_is_the_worlds_fault(error: Exception) -> None:
    @tool(remote=True)
    def fetch() -> None:
        raise error

    with pytest.raises(WorldError, match="the remote tool fetch failed"):
        run(fetch)


def test_a_remote_tools_deadline_is_the_worlds_fault() -> None:
    @tool(remote=True, deadline_s=0.01)
    async def fetch() -> None:
        await asyncio.sleep(60)

    with pytest.raises(WorldError):
        run(fetch)


@pytest.mark.parametrize(
    "error", [OSError("disk"), TimeoutError("mine"), KeyError("bug"), ToolError("sold out")]
)
def test_what_a_local_tool_raises_is_left_as_it_is(error: Exception) -> None:
    @tool
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        run(fail)
    assert caught.value.args == error.args


def test_a_tool_that_raises_stop_iteration_does_not_hang() -> None:
    @tool
    def first() -> int:
        return next(iter(()))

    with pytest.raises(RuntimeError, match="StopIteration"):
        run(first)


def test_a_deadline_is_above_zero() -> None:
    with pytest.raises(UserError, match="above 0"):
        tool(deadline_s=0)


def test_a_method_gets_its_owner_by_bind() -> None:
    class Till:
        cents = 5

        @tool
        def pay(self, times: int) -> int:
            return self.cents * times

    unbound: Tool = as_tool(Till.pay)
    assert list(unbound.parameters["properties"]) == ["times"]
    assert asyncio.run(unbound.bind(Till()).run({"times": 3})) == 15


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("é", "é"),
        (3, "3"),
        (None, "None"),
        ({"a": [1, "é"]}, '{"a": [1, "é"]}'),
        (("x", 2), '["x", 2]'),
        ("\ud800!", "?!"),
        ("x" * 25, "xxxxxxxxxxxxxxxxxxxx\n[cut: 5 of 25 characters are not shown]"),
    ],
)
def test_results_become_text(result: object, text: str) -> None:
    assert as_text(result, most_chars=20)[0] == text


def test_an_integer_too_long_to_be_written_is_the_models_fault() -> None:
    for result in (10**5000, [10**5000], {"a": 10**5000}):
        with pytest.raises(ToolError, match="more than 4300 digits"):
            as_text(result, most_chars=20)


def test_a_result_that_can_not_be_written_for_another_reason_is_a_bug() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="Circular"):
        as_text(endless, most_chars=20)


async def fetch(*, item: str) -> str:
    return f"fetched {item}"


@tool
def passes_on(item: str) -> Any:
    return fetch(item=item)


@tool
@functools.wraps(fetch)
def wrapped(**given: Any) -> Any:
    return fetch(**given)


@pytest.mark.parametrize("function", [passes_on, wrapped])
def test_what_a_plain_function_leaves_to_await_is_awaited(function: Callable[..., Any]) -> None:
    assert asyncio.run(as_tool(function).run({"item": "tea"})) == "fetched tea"


def yields(item: str) -> Iterator[str]:
    yield item


async def yields_later(item: str) -> AsyncIterator[str]:
    yield item


def of_a_class(cls, item: str) -> str:  # type: ignore[no-untyped-def]
    return item


@pytest.mark.parametrize(
    ("marked", "message"),
    [
        (yields, "tool yields yields: a call has one result"),
        (yields_later, "tool yields_later yields"),
        (staticmethod(fetch), "tool fetch: write @staticmethod above @tool, not below it"),
        (classmethod(of_a_class), "tool of_a_class: a tool is a method or a static method, no class method"),
        (of_a_class, "tool of_a_class: a tool is a method or a static method, no class method"),
        ("look", r"@tool\('look'\): it marks a function"),
    ],
)
def test_what_can_be_no_tool_is_refused_where_it_is_marked(marked: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tool(marked)


def test_an_option_that_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="@tool has no option 'deadline'; did you mean 'deadline_s'"):
        tool(deadline=3)  # type: ignore[call-overload]
    with pytest.raises(
        UserError, match="no option 'description'; it has deadline_s and remote, and the model"
    ):
        tool(description="Look.")  # type: ignore[call-overload]


def test_a_parameter_without_a_json_schema_is_refused() -> None:
    @tool
    def apply(change: Callable[[int], int]) -> int:
        return change(1)

    with pytest.raises(
        UserError, match="apply: Cannot generate a JsonSchema .* Use types that JSON can carry"
    ):
        as_tool(apply)
