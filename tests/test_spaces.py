"""Spaces of language: membership, seeded samples that fit the schemas, JSON, pickling, batches."""

from __future__ import annotations

import pickle
from typing import Annotated, Any, Literal

import pytest
from gymnasium.spaces import Space
from gymnasium.vector.utils import batch_space
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import Field

from agentrl.errors import UserError
from agentrl.spaces import Assistant, Chat, Unicode
from agentrl.tools import as_tool, tool
from agentrl.types import Message, ToolCall


@tool
def everything(
    text: Annotated[str, Field(min_length=2, max_length=5)],
    choice: Literal["a", "b"],
    constant: Literal["only"],
    whole: Annotated[int, Field(ge=3, lt=6)],
    even: Annotated[int, Field(gt=0, le=10, multiple_of=2)],
    real: Annotated[float, Field(gt=0, lt=1)],
    flag: bool,
    pair: tuple[int, str],
    many: Annotated[list[bool], Field(min_length=1, max_length=2)],
    table: dict[str, int],
    maybe: str | None = None,
) -> None: ...


@tool
def nothing() -> None: ...


SPACES: list[Space[Any]] = [
    Unicode(8),
    Chat(),
    Assistant(),
    Assistant([as_tool(everything), as_tool(nothing)]),
]
spaces = pytest.mark.parametrize("space", SPACES, ids=repr)


@spaces
def test_samples_are_contained(space: Space[Any]) -> None:
    space.seed(1)
    assert all(space.sample() in space for _ in range(200))


@spaces
def test_the_same_seed_gives_the_same_samples(space: Space[Any]) -> None:
    space.seed(3)
    first = [space.sample() for _ in range(20)]
    space.seed(3)
    assert [space.sample() for _ in range(20)] == first
    assert len({repr(sample) for sample in first}) > 5


@spaces
def test_a_pickled_space_is_equal_and_samples_alike(space: Space[Any]) -> None:
    space.seed(5)
    copy = pickle.loads(pickle.dumps(space))
    assert copy == space
    assert [copy.sample() for _ in range(5)] == [space.sample() for _ in range(5)]


@spaces
def test_samples_survive_json(space: Space[Any]) -> None:
    space.seed(7)
    samples = [space.sample() for _ in range(30)]
    assert space.from_jsonable(space.to_jsonable(samples)) == samples


@spaces
def test_a_batch_of_spaces_samples_one_of_each(space: Space[Any]) -> None:
    batch = batch_space(space, 3)
    batch.seed(0)
    assert all(sample in space for sample in batch.sample())


@spaces
def test_masks_are_refused(space: Space[Any]) -> None:
    with pytest.raises(UserError, match="without a mask"):
        space.sample(mask=1)


def test_sampled_calls_fit_the_schema_and_the_function() -> None:
    described = {"everything": as_tool(everything), "nothing": as_tool(nothing)}
    space = Assistant(described.values(), seed=11)
    calls = [call for _ in range(300) for call in space.sample().tool_calls]
    assert {call.name for call in calls} == {"everything", "nothing"}
    for call in calls:
        Draft202012Validator(described[call.name].parameters).validate(call.arguments)
        described[call.name].parse(call)
    assert len({call.id for call in calls}) == len(calls)


def test_samples_are_texts_single_calls_and_parallel_calls() -> None:
    space = Assistant([as_tool(nothing)], seed=13)
    counts = {len(space.sample().tool_calls) for _ in range(100)}
    assert counts == {0, 1, 2, 3}


@given(st.text(max_size=12))
def test_unicode_contains_every_text_up_to_its_length(text: str) -> None:
    assert (text in Unicode(8)) == (len(text) <= 8)


@pytest.mark.parametrize("stranger", ["\ud800", b"bytes", None, 3])
def test_unicode_refuses_what_utf8_cannot_carry(stranger: object) -> None:
    assert stranger not in Unicode(8)


def test_a_chat_is_a_tuple_of_messages() -> None:
    assert () in Chat()
    assert (Message("tool", "é", tool_call_id="1"),) in Chat()
    assert [Message("user", "")] not in Chat()
    assert ("hi",) not in Chat()


def test_an_assistant_may_say_anything_also_a_bad_call() -> None:
    bad = ToolCall(id="1", name="", arguments=None, raw="{", status="invalid_json")
    assert Message("assistant", "", (bad,)) in Assistant()
    assert Message("user", "hi") not in Assistant()
    assert "hi" not in Assistant()


def test_spaces_differ_by_what_they_contain() -> None:
    assert Unicode(3) != Unicode(4)
    assert Assistant() != Assistant([as_tool(nothing)])
    assert Assistant() != Chat()


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(UserError, match="0 characters or more"):
        Unicode(-1)
