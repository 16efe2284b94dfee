"""Task lists: streams that are read as far as needed, choosing by index, drawing, keys of equal settings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from agentrl.errors import BadData, UserError, WorldError
from agentrl.tasks import TaskStream, draw_task, freeze, place_in, task_at
from agentrl.types import Message, Task


def tasks(count: int, read: list[int] | None = None) -> Iterator[Task]:
    for index in range(count):
        if read is not None:
            read.append(index)
        yield Task(id=str(index), prompt=(Message("user", str(index)),))


def test_a_stream_makes_each_task_once_and_only_when_asked() -> None:
    read: list[int] = []
    stream = TaskStream(tasks(100, read))
    assert [stream[3].id, stream[1].id] == ["3", "1"]
    assert stream[3] is stream[3]
    assert read == [0, 1, 2, 3]


def test_a_stream_can_be_iterated_from_its_beginning_twice() -> None:
    stream = TaskStream(tasks(3))
    assert [task.id for task in stream] == [task.id for task in stream] == ["0", "1", "2"]


def test_the_first_of_a_short_stream_are_all_of_it() -> None:
    assert [task.id for task in TaskStream(tasks(2)).first(10)] == ["0", "1"]
    assert [task.id for task in TaskStream(tasks(10)).first(2)] == ["0", "1"]


@pytest.mark.parametrize("many", [TaskStream(tasks(3)), list(tasks(3))], ids=["stream", "list"])
@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_out_of_range_says_what_is_in_range(many: list[Task], index: int) -> None:
    with pytest.raises(UserError, match=f"the split 'train' has no task {index}"):
        task_at(many, index, split="train")
    assert task_at(many, np.int64(2), split="train").id == "2"


def test_a_stream_that_is_used_up_begins_again() -> None:
    stream = TaskStream(tasks(3))
    assert [place_in(stream, position, split="train") for position in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    with pytest.raises(BadData, match="has no tasks"):
        place_in(TaskStream(()), 0, split="train")


def test_a_stream_that_could_not_be_read_does_not_look_finished() -> None:
    def torn() -> Iterator[Task]:
        yield from tasks(2)
        raise WorldError("the server is gone")

    stream = TaskStream(torn())
    for _ in range(2):
        with pytest.raises(WorldError, match="the server is gone"):
            place_in(stream, 5, split="train")
    assert stream.failed
    assert stream[1].id == "1"


def test_tasks_of_a_stream_are_drawn_from_all_that_it_has() -> None:
    random = np.random.default_rng(0)
    drawn = {draw_task(TaskStream(tasks(4)), random, split="train").id for _ in range(100)}
    assert drawn == {"0", "1", "2", "3"}


@pytest.mark.parametrize("none", [TaskStream(()), []], ids=["stream", "list"])
def test_nothing_can_be_drawn_from_nothing(none: list[Task]) -> None:
    with pytest.raises(BadData, match="has no tasks"):
        draw_task(none, np.random.default_rng(0), split="train")


def test_settings_are_equal_by_content() -> None:
    assert freeze({"levels": [1, 2], "columns": {"q": "a"}}) == freeze(
        {"levels": (1, 2), "columns": {"q": "a"}}
    )
    assert freeze({"levels": [1, 2]}) != freeze({"levels": [2, 1]})


def test_what_cannot_be_hashed_is_equal_to_itself_alone() -> None:
    array = np.zeros(1)
    hash(freeze({"array": array}))
    assert freeze(array) != freeze(np.zeros(1))
