"""The environment contract: a chat with tools that is a ``gymnasium.Env``.

Observations are the messages that are new since the last action, an action is one assistant message. ``Env``
keeps the conversation, the choice of the task and the end of an episode; tool calls and a reward at the end
are ``agentrl.tool_env``'s. Three faults have three fates: what the model did wrong is an observation, a
WorldError leaves ``astep`` for the caller to retry, anything else is a bug whose traceback names the task.

Making an environment is cheap (well under 0.1 ms): every episode gets a new one. Many interleave in one
process, so their state is their own and their only randomness is ``np_random``.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import gymnasium
from gymnasium.error import ResetNeeded

from agentrl.errors import BadData, UserError, did_you_mean
from agentrl.faults import blamed_on
from agentrl.reward import as_score
from agentrl.spaces import Assistant, Chat
from agentrl.tasks import TaskList, TaskStream, draw_task, freeze, task_at
from agentrl.threads import in_thread
from agentrl.tools import Tool
from agentrl.transcript import to_ansi, to_html, to_json
from agentrl.types import Message, Score, Task

__all__ = ["Env", "Step"]

Step = tuple[
    tuple[Message, ...], float, bool, bool, dict[str, Any]
]  # observation, reward, terminated, truncated, info

_RENDERERS: Mapping[str, Callable[[Sequence[Message]], str]] = {
    "ansi": to_ansi,
    "html": to_html,
    "json": to_json,
}
_BOUNDARIES = {"tools": "tool", "reward": "reward"}  # by part; every other part is the environment's own
_KEPT_TASK_LISTS = 8  # per class; more configurations at once read theirs again


class _TaskLists(dict[Hashable, TaskList]):
    """What a class has read. A class that pickles by value, as a script's does, leaves it behind."""

    def __reduce__(self) -> tuple[type[_TaskLists], tuple[()]]:
        return _TaskLists, ()


class Env(gymnasium.Env[tuple[Message, ...], Message]):
    """A conversation about a task.

    An author gives ``tasks``, ``gold`` and ``step``; in ``step``, ``accept(action)`` comes first and
    ``return self.transition(...)`` last.
    """

    metadata = {"render_modes": list(_RENDERERS), "render_fps": 1}
    splits: ClassVar[tuple[str, ...]] = ("train", "test")  # what tasks() knows; the first is reset's default
    # What ``agentrl check`` would take for a hole and is meant, each with its reason: a probe that may score
    # above the minimum; a tool, a role or a key of info that may show something of the truth.
    declared: ClassVar[Mapping[str, str]] = {}
    # Whether a reset never waits for anything: rollouts then do without a thread, which costs 0.3 ms. A class
    # says it for itself, not for those that derive from it.
    inline_reset: ClassVar[bool] = False

    completion_tokens: int  # sampled in this episode; whoever samples adds to it before each action
    is_cut: bool  # a token limit cut the last assistant message off
    timings: dict[str, float]  # seconds by stage of this episode: "step", or "tools" and "reward"
    at_boundary: str  # where it works now: "tool", "reward", else "environment"

    _task_lists: ClassVar[dict[Hashable, TaskList]] = _TaskLists()
    _settings: Hashable
    make_twin: Callable[[], Env]  # another one of the same class and settings; pickles where these do

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        splits: object = cls.splits
        if isinstance(splits, str):
            raise UserError(f"{cls.__name__}: splits is a tuple of names; write splits = ({splits!r},)")
        cls._task_lists = _TaskLists()

    def __new__(cls, *args: Any, **kwargs: Any) -> Env:
        env: Env = super().__new__(cls)
        env._settings = freeze((args, kwargs))  # equal settings share their task lists
        env.make_twin = functools.partial(cls, *args, **kwargs)
        return env

    def __init__(self, *, render_mode: str | None = None) -> None:
        if render_mode is not None and render_mode not in _RENDERERS:
            raise UserError(
                f"render_mode={render_mode!r}{did_you_mean(render_mode, _RENDERERS)}: ansi, html or json"
            )
        self.render_mode = render_mode
        self.observation_space, self.action_space = Chat(), Assistant(self.tools)
        self.completion_tokens, self.timings, self.at_boundary = 0, {}, "environment"
        self.is_cut = False
        self._task: Task | None = None
        self._messages: list[Message] = []
        self._running = False

    def tasks(self, split: str) -> Iterable[Task]:
        """The tasks of a split: a sequence, or any iterable, which is read as far as needed."""
        raise UserError(f"{type(self).__name__} has no tasks: define tasks(split), see agentrl.Env")

    def gold(self, task: Task) -> Sequence[Message]:
        """The assistant messages of a right episode of ``task``."""
        raise NotImplementedError(f"{type(self).__name__} must define gold(task)")

    def as_submission(
        self, task: Task, code: str, files: Mapping[str, str] | None = None
    ) -> Sequence[Message]:
        """The assistant messages that hand in the program ``code``; none where the reward judges no programs.

        ``files``: what it brings along, text by name, for environments whose answers may have more than one.
        With it ``agentrl check`` tries whether the verdict can be cheated.
        """
        return ()

    def setup(self, task: Task) -> None:
        """Prepare an episode's state, with no randomness but ``self.np_random``; called by every reset."""

    def opening(self, task: Task) -> tuple[Message, ...]:
        """The messages that an episode begins with."""
        return task.prompt

    def score(self) -> Score | float:
        """What the conversation is worth where a budget cuts it off; nothing, unless overridden."""
        return 0.0

    @property
    def tools(self) -> tuple[Tool, ...]:
        """What the assistant may call."""
        return ()

    @property
    def tools_deadline_s(self) -> float:
        """Seconds after which a step's tools have answered or been given up; 0 where tools have no
        deadline."""
        return 0.0

    @property
    def task(self) -> Task:
        """The task of this episode."""
        if self._task is None:
            raise ResetNeeded(f"{type(self).__name__} has no task before reset()")
        return self._task

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation of this episode."""
        return tuple(self._messages)

    def task_list(self, split: str) -> TaskList:
        """``tasks(split)`` for reading by index, shared between environments of equal settings.

        Raises BadData for a split that is not in ``splits``, UserError where ``tasks`` returns none.
        """
        if split not in self.splits:
            raise BadData(
                f"{type(self).__name__} has no split {split!r}{did_you_mean(split, self.splits)}; "
                f"it has {', '.join(self.splits)}"
            )
        lists, key = type(self)._task_lists, (split, self._settings)
        if key not in lists or getattr(lists[key], "failed", None):
            tasks = self._read_tasks(split)
            while len(lists) >= _KEPT_TASK_LISTS:
                lists.pop(next(iter(lists)), None)
            lists[key] = tasks
        return lists[key]

    def _read_tasks(self, split: str) -> TaskList:
        where = f"in tasks({split!r}) of environment {type(self).__qualname__}"
        with _noting(where):
            tasks = self.tasks(split)
        if isinstance(tasks, Sequence):
            return tasks
        try:
            rest = iter(tasks)
        except TypeError:
            raise UserError(
                f"tasks({split!r}) of {type(self).__qualname__} returned {tasks!r}: return a list of Task, "
                "or yield each"
            ) from None
        return TaskStream(_noted(rest, where))

    def find_task(self, task_id: str) -> Task:
        """The task with this id, of whatever split. Raises UserError where there is none.

        Looks at every task in turn; environments with more tasks than fit into memory override it.
        """
        for split in self.splits:
            for task in self.task_list(split):
                if task.id == task_id:
                    return task
        raise UserError(
            f"{type(self).__name__} has no task with the id {task_id!r} in {', '.join(self.splits)}"
        )

    def check_made(self) -> None:
        """Raise UserError where the ``__init__`` of a derived class left ours out."""
        if "_running" not in vars(self):
            raise UserError(f"{type(self).__qualname__}.__init__ must call super().__init__()")

    def check_host(self) -> None:
        """Raise UserError where this host lacks what episodes need, such as a sandbox.

        A run, a check and ``agentrl eval`` ask before they begin.
        """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[Message, ...], dict[str, Any]]:
        """Begin an episode: of ``{"split", "index"}``, of ``{"task_id"}``, else drawn from the split.

        Raises UserError for options that are unknown, do not fit together or point nowhere, and where the
        environment's ``__init__`` left ours out.
        """
        self.check_made()
        super().reset(seed=seed)
        self._task = self._choose(options or {})
        self._messages = []
        self._running = True
        self.completion_tokens, self.timings, self.at_boundary = 0, {}, "environment"
        self.is_cut = False
        with self._naming("setup"):
            self.setup(self._task)
        opening = self.opening(self._task)
        self._messages.extend(opening)
        return tuple(opening), {"task_id": self._task.id}

    def step(self, action: Message) -> Step:
        """One turn: ``accept`` the action, and return a ``transition``."""
        raise NotImplementedError(f"{type(self).__name__} must define step(action)")

    async def astep(self, action: Message) -> Step:
        """``step`` for an event loop; by default in a thread of its own."""
        with self._timing("step"):
            return await in_thread(self.step, action)

    def truncate(self, reason: str, message: Message | None = None) -> Step:
        """End the episode because a budget outside it ran out (tokens, context); it is scored as it stands.

        ``message`` is what the assistant had said of its last turn; its tool calls are not run, and it is no
        answer: a policy that is paid for one that it never ends learns not to end it.
        """
        self._check_running()
        if message is not None:
            self.accept(message)
            self.is_cut = True
        with self._timing("reward"), self._naming("reward"):
            score = self.score()
        return self.transition(score=score, stop_reason=reason, truncated=True)

    async def atruncate(self, reason: str, message: Message | None = None) -> Step:
        """``truncate`` for an event loop."""
        return await in_thread(self.truncate, reason, message)

    def accept(self, action: Message) -> None:
        """Append what the assistant said.

        Raises UserError for anything else, ResetNeeded outside an episode.
        """
        self._check_running()
        if not self.action_space.contains(action):
            raise UserError(
                f"an action is one Message('assistant', ...), not {action!r}; "
                "for plain text wrap the environment in agentrl.wrappers.TextAction"
            )
        self._messages.append(action)

    def transition(
        self, *new: Message, score: Score | float = 0.0, stop_reason: str = "", truncated: bool = False
    ) -> Step:
        """Append ``new`` and say what ``step`` returns; the episode is over where there is a ``stop_reason``.

        ``truncated`` says that a budget ended it and not the task.
        """
        self._check_running()
        if truncated and not stop_reason:
            raise ValueError("a truncated episode needs a stop_reason, such as 'max_turns'")
        self._messages.extend(new)
        self._running = not stop_reason
        given = as_score(score, type(self).__qualname__)
        info = {
            "stop_reason": stop_reason,
            "is_valid": True,
            "reward_parts": dict(given.parts),
            "reward_note": given.note,
        }
        return new, float(given.value), bool(stop_reason) and not truncated, truncated, info

    def render(self) -> str | None:
        """The conversation as ``render_mode`` says; None without one."""
        return None if self.render_mode is None else _RENDERERS[self.render_mode](self._messages)

    def _choose(self, options: Mapping[str, Any]) -> Task:
        known = ("split", "index", "task_id")
        for name in options:
            if name not in known:
                raise UserError(
                    f"reset has no option {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}"
                )
        if "task_id" in options:
            if len(options) > 1:
                raise UserError(
                    f"reset options {dict(options)!r}: a task_id stands alone, without split and index"
                )
            return self.find_task(options["task_id"])
        split = options.get("split", self.splits[0])
        tasks = self.task_list(split)
        if "index" in options:
            return task_at(tasks, options["index"], split=split)
        return draw_task(tasks, self.np_random, split=split)

    def _check_running(self) -> None:
        if not self._running:
            raise ResetNeeded(f"an episode of {type(self).__name__} is over or never began: call reset()")

    @contextmanager
    def _timing(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - start

    @contextmanager
    def _naming(self, part: str) -> Iterator[None]:
        """Let a traceback, a failure of the world and a watchdog say where in which episode they are."""
        self.at_boundary = _BOUNDARIES.get(part, "environment")
        try:
            with blamed_on(self.at_boundary):
                yield
        except BaseException as error:
            error.add_note(f"in the {part} of environment {type(self).__qualname__}, task {self.task.id!r}")
            raise
        finally:
            self.at_boundary = "environment"


@contextmanager
def _noting(where: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(where)
        raise


def _noted(tasks: Iterator[Task], where: str) -> Iterator[Task]:
    with _noting(where):
        yield from tasks
