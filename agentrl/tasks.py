"""Lists of tasks: found by index or drawn, and streams that are read only as far as needed."""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from agentrl.errors import BadData, UserError, WorldError
from agentrl.types import Task

__all__ = ["MadeTasks", "TaskList", "TaskStream", "draw_task", "freeze", "place_in", "task_at"]

_DRAWN_FROM = 1024  # tasks of a stream, whose size nobody knows, among which an unspecified one is drawn


@dataclass(frozen=True, slots=True)
class MadeTasks(Sequence[Task]):
    """A split of which no task is made before it is asked for, each time anew and always the same."""

    make: Callable[[str, int], Task]  # of a split and a position in it; it can be pickled
    split: str
    indices: range

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> MadeTasks: ...
    def __getitem__(self, index: int | slice) -> Task | MadeTasks:
        if isinstance(index, slice):
            return MadeTasks(self.make, self.split, self.indices[index])
        return self.make(self.split, self.indices[index])


class TaskStream:
    """The tasks of an iterable of unknown size; each is made once and remembered. Safe between threads.

    A stream that could not be read any further stays ``failed``: a generator that raised has ended, and what
    it had given until then is not all there is.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._rest = iter(tasks)
        self._read: list[Task] = []
        self.failed: WorldError | None = None
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> Task:
        """The task at ``index`` from 0; IndexError past the end."""
        with self._lock:
            while len(self._read) <= index:
                task = self._next()
                if task is None:
                    raise IndexError(f"there are only {len(self._read)} tasks")
                self._read.append(task)
            return self._read[index]

    def _next(self) -> Task | None:
        if self.failed is not None:
            raise WorldError(f"reading the tasks failed before: {self.failed}") from self.failed
        try:
            return next(self._rest, None)
        except WorldError as error:
            self.failed = error
            raise

    def __iter__(self) -> Iterator[Task]:
        for index in itertools.count():
            try:
                task = self[index]
            except IndexError:
                return
            yield task

    def first(self, count: int) -> list[Task]:
        """The first ``count`` tasks, or all where there are fewer."""
        try:
            self[count - 1]
        except IndexError:
            return list(self._read)
        return self._read[:count]


TaskList = Sequence[Task] | TaskStream


def task_at(tasks: TaskList, index: Any, *, split: str) -> Task:
    """The task at ``index`` from 0. Raises UserError for an index out of range or that is no integer."""
    try:
        position = operator.index(index)
    except TypeError:
        raise UserError(f"index={index!r} is no integer: pass the position of a task in its split") from None
    try:
        if position < 0:
            raise IndexError
        return tasks[position]
    except IndexError:
        size = len(tasks) if isinstance(tasks, Sequence) else len(tasks.first(position))
        raise UserError(
            f"the split {split!r} has no task {position}: an index lies in 0 to {size - 1}"
        ) from None


def place_in(tasks: TaskList, position: int, *, split: str) -> int:
    """The index of the task at ``position`` of endless passes over ``tasks``.

    A stream that is used up begins again: its end is known only once it is read. Raises BadData for an empty
    one.
    """
    if isinstance(tasks, Sequence):
        return position
    try:
        tasks[position]
    except IndexError:
        size = len(tasks.first(position))
        if not size:
            raise BadData(f"the split {split!r} has no tasks: there is nothing to run") from None
        return position % size
    return position


def draw_task(tasks: TaskList, random: np.random.Generator, *, split: str) -> Task:
    """A task drawn evenly; of a stream, evenly from its first 1024. Raises BadData where there is none."""
    known = tasks if isinstance(tasks, Sequence) else tasks.first(_DRAWN_FROM)
    if not len(known):
        raise BadData(f"the split {split!r} has no tasks: there is nothing to draw from")
    return known[int(random.integers(len(known)))]


def freeze(value: Any) -> Hashable:
    """A key equal for equal settings: lists and mappings by content, what can't be hashed by identity."""
    if isinstance(value, Mapping):
        return tuple((key, freeze(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(freeze, value))
    return value if isinstance(value, Hashable) else _Identity(value)


class _Identity:
    """Equal to itself alone; keeps what it stands for alive, so that no later object takes its place."""

    def __init__(self, value: object) -> None:
        self.value = value
