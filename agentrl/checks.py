"""Is this a sound environment? Checks that any author can run: ``agentrl check my_package.shop:Shop``.

Each check is one function whose name and docstring say what holds. It raises ``Unsound`` where that does not
hold, and returns what it looked at. A check in which the environment crashes has failed, with its exception.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import gymnasium
from gymnasium.utils.env_checker import check_env, data_equivalence

from agentrl.env import Env, Step
from agentrl.errors import AgentRLError
from agentrl.registry import make
from agentrl.tasks import TaskStream, freeze
from agentrl.types import Message, Task

__all__ = ["Report", "Row", "Unsound", "check", "check_environment"]

_SEED = 7  # of every reset and every random action here: a report is the same twice
_RANDOM_ACTIONS = 200
_LONGEST_EPISODE = 64  # actions; what runs longer is cut off by truncate()
_COMPARED_TASKS = 500  # of each split, where splits are compared
_NOTHING = Message("assistant", "")


class Unsound(AgentRLError):
    """What a check found: where, what, and what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """The outcome of one check."""

    name: str
    passed: bool
    detail: str  # what was looked at, or what is wrong


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of all checks of one environment."""

    target: str  # what was checked
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'ok  ' if row.passed else 'FAIL'}  {row.name}: {row.detail}" for row in self.rows]
        return "\n".join([self.target, *lines])


def check(target: str | type[Env] | Env | Callable[..., Env], *, episodes: int = 20, **kwargs: Any) -> Report:
    """Check the environment of a name, a class, a factory or an instance, also under a running event loop.

    ``kwargs`` make the environment where it is not an instance. Raises UserError where it can't be made.
    """
    return check_environment(make(target, **kwargs), episodes=episodes)


def check_environment(target: str | type[Env] | Env | Callable[..., Env], *, episodes: int = 20) -> Report:
    """Run every check; those that play episodes play ``episodes`` tasks of each split."""
    made = make(target)
    env = cast("Env", made.unwrapped)
    rows = tuple(_row(checked, _Subject(env, episodes)) for checked in _CHECKS)
    return Report(type(env).__qualname__, rows)


@dataclass(frozen=True, slots=True)
class _Subject:
    """What a check works on."""

    env: Env
    episodes: int  # to play in each split

    def sample(self, split: str, count: int) -> list[tuple[int, Task]]:
        """(index, task) of ``count`` tasks: evenly spread over a sequence, the first of a stream."""
        tasks = self.env.task_list(split)
        if isinstance(tasks, TaskStream):
            return list(enumerate(tasks.first(count)))
        step = max(1, len(tasks) // count)
        return [(index, tasks[index]) for index in range(0, len(tasks), step)[:count]]

    def starts(self) -> Iterator[tuple[Task, dict[str, Any]]]:
        """(task, reset options) of the tasks to play, of every split."""
        for split in self.env.splits:
            for index, task in self.sample(split, self.episodes):
                yield task, {"split": split, "index": index}


def _row(checked: Callable[[_Subject], str], subject: _Subject) -> Row:
    name = checked.__name__.strip("_").replace("_", " ")
    try:
        return Row(name, True, checked(subject))
    except Unsound as found:
        return Row(name, False, str(found))
    # The checker's own boundary: what an unsound environment raises is a finding, and the other checks go on.
    except Exception as error:
        notes = getattr(error, "__notes__", ())
        return Row(name, False, "; ".join([f"{type(error).__name__}: {error}", *notes]))


def _follows_gymnasium(subject: _Subject) -> str:
    """``gymnasium.utils.env_checker.check_env`` passes without a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(subject.env.unwrapped)
    # Only Gymnasium's own, and not the one that asks for gymnasium.make: our registry makes environments.
    complaints = [
        re.sub(r"\x1b\[[0-9;]*m|WARN: ", "", str(warning.message))
        for warning in caught
        if "WARN: " in str(warning.message) and "not having a spec" not in str(warning.message)
    ]
    if complaints:
        raise Unsound("; ".join(complaints))
    return f"check_env of Gymnasium {gymnasium.__version__}"


def _tells_what_its_spaces_promise(subject: _Subject) -> str:
    """Observations, rewards and infos of starts, gold steps and random steps are what the contract says."""
    env, seen = subject.env, 0
    env.action_space.seed(_SEED)
    for task, options in subject.starts():
        opening, info = env.reset(seed=_SEED, options=options)
        _require(opening in env.observation_space, task, f"reset showed {opening!r}, outside its space")
        _require(isinstance(info, dict), task, f"reset returned the info {info!r}: it must be a dict")
        for action in (*env.gold(task), env.action_space.sample()):
            _require(action in env.action_space, task, f"gold has {action!r}, outside action_space")
            step = env.step(action)
            seen += 1
            _check_step(env, step, task)
            if step[2] or step[3]:
                break
    return f"{seen} steps"


def _repeats_itself(subject: _Subject) -> str:
    """The same seed, options and actions give the same episode; the same seed alone draws the same task."""
    env, count = subject.env, 0
    for task, options in subject.starts():
        env.action_space.seed(_SEED)
        actions = [env.action_space.sample() for _ in range(4)]
        for said in (actions, env.gold(task)):
            first, second = (_play(env, options, said) for _ in range(2))
            _require(
                data_equivalence(first, second),
                task,
                "episodes with the same seed and actions differ: use np_random alone, begin in setup()",
            )
            count += 2
    drawn = [env.reset(seed=seed)[0] for seed in (*range(5), *range(5))]
    if drawn[:5] != drawn[5:]:
        raise Unsound(
            "reset with the same seed draws different tasks: let tasks(split) be the same every time"
        )
    return f"{count} episodes"


def _gold_scores_the_maximum(subject: _Subject) -> str:
    """Gold ends its episode, scores more than saying nothing, and no less than any other probe."""
    env, count = subject.env, 0
    for task, options in subject.starts():
        gold = _play(env, options, env.gold(task), until_over=False)
        _require(gold[-1][2], task, "the episode goes on, or was truncated, after the last message of gold")
        value = _total(gold)
        nothing = _total(_play(env, options, [_NOTHING]))
        _require(
            value > nothing, task, f"gold scores {value:g}, saying nothing {nothing:g}: gold must score more"
        )
        for name, said in _probes(env, task):
            other = _total(_play(env, options, said))
            _require(value >= other, task, f"gold scores {value:g}, less than {name}: {other:g}")
        count += 1
    return f"gold of {count} tasks"


def _saying_nothing_scores_the_minimum(subject: _Subject) -> str:
    """No probe scores less than an empty answer: silence must never pay."""
    env, count = subject.env, 0
    for task, options in subject.starts():
        nothing = _total(_play(env, options, [_NOTHING]))
        for name, said in _probes(env, task):
            other = _total(_play(env, options, said))
            _require(
                nothing <= other, task, f"saying nothing scores {nothing:g}, more than {name}: {other:g}"
            )
        count += 1
    return f"silence in {count} tasks"


def _survives_random_actions(subject: _Subject) -> str:
    """Random actions of the action space never crash it."""
    env = subject.env
    env.action_space.seed(_SEED)
    env.reset(seed=_SEED)
    for count in range(_RANDOM_ACTIONS):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset(seed=_SEED + count)
    return f"{_RANDOM_ACTIONS} actions"


def _describes_its_tools(subject: _Subject) -> str:
    """Every tool has a name that model APIs accept and a valid JSON schema of an object."""
    from jsonschema import Draft202012Validator, SchemaError  # here, because it is slow to import

    for tool in subject.env.tools:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", tool.name):
            raise Unsound(f"the tool name {tool.name!r} must be 1 to 64 of A-Z a-z 0-9 _ -")
        try:
            Draft202012Validator.check_schema(tool.parameters)
        except SchemaError as error:
            raise Unsound(f"the parameters of {tool.name} are no JSON schema: {error.message}") from error
        if tool.parameters.get("type") != "object":
            raise Unsound(f"the parameters of {tool.name} must be of type 'object': {tool.parameters!r}")
    return f"{len(subject.env.tools)} tools"


def _keeps_its_splits_apart(subject: _Subject) -> str:
    """Every split has tasks, ids are unique, and no prompt with the same truth lies in two splits."""
    ids: dict[str, str] = {}
    contents: dict[Any, str] = {}
    for split in subject.env.splits:
        sampled = subject.sample(split, _COMPARED_TASKS)
        if not sampled:
            raise Unsound(f"the split {split!r} has no tasks: fill it or leave it out of splits")
        for _, task in sampled:
            if task.id in ids:
                raise Unsound(
                    f"two tasks have the id {task.id!r}, in {ids[task.id]!r} and {split!r}: make it unique"
                )
            ids[task.id] = split
            other = contents.setdefault((task.prompt, repr(freeze(task.truth))), split)
            if other != split:
                raise Unsound(
                    f"task {task.id!r} of {split!r} lies in {other!r} as well: take it out of one of them"
                )
    return f"{len(ids)} tasks"


_CHECKS: tuple[Callable[[_Subject], str], ...] = (
    _follows_gymnasium,
    _tells_what_its_spaces_promise,
    _repeats_itself,
    _gold_scores_the_maximum,
    _saying_nothing_scores_the_minimum,
    _survives_random_actions,
    _describes_its_tools,
    _keeps_its_splits_apart,
)


def _require(holds: bool, task: Task, otherwise: str) -> None:
    if not holds:
        raise Unsound(f"task {task.id!r}: {otherwise}")


def _check_step(env: Env, step: Any, task: Task) -> None:
    _require(
        isinstance(step, tuple) and len(step) == 5,
        task,
        f"step returned {step!r}, not Gymnasium's five values",
    )
    observation, reward, terminated, truncated, info = step
    _require(
        observation in env.observation_space,
        task,
        f"step returned {observation!r}, outside observation_space",
    )
    _require(math.isfinite(reward), task, f"the reward is {reward!r}: it must be finite")
    missing = [key for key in ("stop_reason", "is_valid", "reward_parts") if key not in info]
    _require(not missing, task, f"info lacks {', '.join(missing)}: return self.transition(...)")
    _require(
        bool(info["stop_reason"]) == (terminated or truncated),
        task,
        "an episode that ends needs a stop_reason, no other",
    )


def _probes(env: Env, task: Task) -> Iterator[tuple[str, Sequence[Message]]]:
    """(name, assistant messages) of what a policy that can't do the task might try."""
    yield "an excuse", [Message("assistant", "I don't know.")]
    yield "the prompt again", [Message("assistant", "\n".join(message.content for message in task.prompt))]
    yield "a guess", [Message("assistant", r"The answer is \boxed{0}.")]
    env.action_space.seed(_SEED)
    yield "random actions", [env.action_space.sample() for _ in range(8)]


def _play(
    env: Env, options: dict[str, Any], actions: Iterable[Message], *, until_over: bool = True
) -> list[Step]:
    """The steps of an episode that says ``actions``, then nothing until it is over."""
    env.reset(seed=_SEED, options=options)
    steps: list[Step] = []
    for action in actions:
        steps.append(env.step(action))
        if steps[-1][2] or steps[-1][3]:
            return steps
    while until_over and len(steps) < _LONGEST_EPISODE:
        steps.append(env.step(_NOTHING))
        if steps[-1][2] or steps[-1][3]:
            return steps
    return [*steps, env.truncate("checked")] if until_over else steps


def _total(steps: Sequence[Step]) -> float:
    return math.fsum(step[1] for step in steps)
