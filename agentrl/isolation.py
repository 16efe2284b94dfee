"""Checks that an episode depends on its seed, its task and its actions alone, and hides its truth.

Where episodes of several environments are compared, each comparison first repeats what it compares with: what
differs by itself proves nothing, and is the finding of another check.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
from gymnasium.vector.utils import CloudpickleWrapper

from agentrl.env import Env
from agentrl.probes import SEED, Episode, Start, Subject, Unsound, gold_of, play, require, same
from agentrl.tasks import freeze
from agentrl.types import Message, Task, ToolCall

__all__ = [
    "draws_by_its_seed",
    "hides_the_truth",
    "keeps_episodes_apart",
    "pickles_for_vector_environments",
    "repeats_itself",
    "starts_siblings_alike",
]

_SEEDS = range(20)  # of which at least two must differ where there is a choice
_READ_AGAIN = 100  # tasks of each split
_SIBLINGS = 3
_PAIRS = 10  # of episodes that are interleaved
_TRIED, _SHOWN = 40, 8  # random actions: drawn, and of those with calls played
_SCORES = frozenset({"reward_parts", "reward_note"})  # what info says of the score

Moment = Mapping[str, list[Any]]  # what was shown at once, by tool, role or key of info


def repeats_itself(subject: Subject) -> str:
    """Tasks, read again, are the same; so is the episode of the same seed, options and actions.

    The same seed alone draws the same task.
    """
    env, count = subject.env, 0
    for split in env.splits:
        _tasks_repeat(subject, split)
    for start in subject.starts:
        for said in (_random_actions(env), gold_of(env, start.task)):
            first, second = (play(env, start, said) for _ in range(2))
            require(
                same(first.shown, second.shown),
                start.task,
                "episodes with the same seed and actions differ: use np_random alone, begin in setup()",
            )
            count += 2
    drawn = [env.reset(seed=seed)[0] for seed in (*_SEEDS, *_SEEDS)]
    if drawn[: len(_SEEDS)] != drawn[len(_SEEDS) :]:
        raise Unsound(
            "reset with the same seed draws different tasks: let tasks(split) be the same every time"
        )
    return f"{count} episodes"


def draws_by_its_seed(subject: Subject) -> str:
    """Another seed, another episode, where there is more than one task to draw."""
    split = subject.env.splits[0]
    choice = {task.prompt for _, task in subject.sample(split, len(_SEEDS))}
    if len(choice) < 2:
        return f"{split} has one task: there is nothing to draw"
    drawn = [subject.env.reset(seed=seed) for seed in _SEEDS]
    different = sum(not same(drawn[0], other) for other in drawn[1:])
    if not different:
        raise Unsound(
            f"reset draws the same episode with each of {len(_SEEDS)} seeds, and {split} has several tasks: "
            "leave the draw to reset, or draw with np_random"
        )
    return f"{different} of {len(_SEEDS) - 1} seeds begin another episode than the first"


def starts_siblings_alike(subject: Subject) -> str:
    """A group's siblings, each an environment of its own, begin with the same messages, info and tools."""
    for start in subject.starts:
        begun = []
        for _ in range(_SIBLINGS):
            env = subject.make_twin()
            # What one sibling does is nothing to the next.
            episode = play(env, start, gold_of(env, start.task))
            begun.append((episode.opening, _schemas(env)))
        require(
            all(same(begun[0], other) for other in begun[1:]),
            start.task,
            "siblings with the same seed and options begin differently: what an episode begins with must "
            "depend on its task and np_random alone",
        )
    return f"{len(subject.starts)} groups of {_SIBLINGS}"


def keeps_episodes_apart(subject: Subject) -> str:
    """Two episodes whose steps alternate are what they are one after the other."""
    starts = subject.starts
    pairs = [*pairwise(starts), *((start, start) for start in starts[:1])][-_PAIRS:]
    for pair in pairs:
        alone = [[_alone(subject, start) for start in pair] for _ in range(2)]
        if not same(alone[0], alone[1]):
            continue
        require(
            same(alone[0], _interleaved(subject, pair)),
            pair[0].task,
            f"the episode is another one while task {pair[1].task.id!r} is played in between: keep what "
            "belongs to an episode on the instance, not on the class or in the module",
        )
    return f"{len(pairs)} pairs"


def hides_the_truth(subject: Subject) -> str:
    """With another truth the same actions show the same messages, tools, errors and info until the end.

    Not what ``declared`` names, and not the score.
    """
    compared = 0
    for start, other in _replaced(subject):
        for said in _scripts(subject.env, start.task):
            first, again, changed = (list(_moments(subject, posed, said)) for posed in (start, start, other))
            if not same(first, again):
                continue
            shown = [name for one, two in zip(first, changed, strict=False) for name in _differing(one, two)]
            require(
                not shown,
                start.task,
                f"with another truth {' and '.join(map(repr, dict.fromkeys(shown)))} of the same episode "
                "are different: show nothing of the truth, or say in declared why it is feedback",
            )
            compared += 1
    return f"{compared} episodes" if compared else "none to compare: no truth, or no episode repeats itself"


def pickles_for_vector_environments(subject: Subject) -> str:
    """What ``gymnasium.vector.AsyncVectorEnv`` sends survives: the maker, the spaces, episodes, actions."""
    env, start = subject.env, subject.starts[0]
    said = gold_of(env, start.task)
    episode = play(env, start, said)
    sent: Mapping[str, Any] = {
        "observation_space": env.observation_space,
        "action_space": env.action_space,
        "the messages and info of an episode": episode.shown,
        "gold": said,
    }
    for name, value in sent.items():
        require(same(_pickled(name, value), value), start.task, f"{name} came back changed from pickling")
    made: Env = _pickled("its class with its settings", CloudpickleWrapper(env.make_twin))()
    shown = [play(maker, start, said).shown for maker in (subject.make_twin(), subject.make_twin(), made)]
    # Sent once more, together: the objects in info are then of one class again, which was made anew as well.
    plays = _pickled("the messages and info of an episode", CloudpickleWrapper(lambda: shown))()
    require(
        same(plays[0], plays[2]) or not same(plays[0], plays[1]),
        start.task,
        "an environment made of the pickled class and settings shows another episode",
    )
    return ", ".join(["class and settings", *sent])


def _tasks_repeat(subject: Subject, split: str) -> None:
    """Another process reads the tasks for itself, and a resumed run finds them by their place."""
    first = list(islice(subject.env.task_list(split), _READ_AGAIN))
    second = list(islice(subject.make_twin().tasks(split), _READ_AGAIN))
    if len(first) != len(second):
        raise Unsound(f"tasks({split!r}) gives {len(first)} tasks, and read again {len(second)}")
    for place, (one, other) in enumerate(zip(first, second, strict=True)):
        for what in ("id", "prompt", "truth"):
            if not same(getattr(one, what), getattr(other, what)):
                raise Unsound(
                    f"tasks({split!r}), read again, has another {what} at {place}, task {other.id!r} where "
                    f"{one.id!r} was: make them the same in every process, drawn with a seed of their own"
                )


def _pickled(name: str, value: Any) -> Any:
    try:
        sent = pickle.dumps(value)
        with _as_elsewhere():
            return pickle.loads(sent)
    except (pickle.PickleError, TypeError, AttributeError) as error:  # one of these, by kind of object
        raise Unsound(
            f"{name} can't be pickled: {error}; hold plain values, open locks, files and clients in setup()"
        ) from error


@contextmanager
def _as_elsewhere() -> Iterator[None]:
    """Let cloudpickle make a class of ``__main__`` or of a function anew, as another process does.

    Where it knows the class it would set all its attributes, on the very class that is examined.
    """
    known = cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID
    before = dict(known)
    known.clear()
    try:
        yield
    finally:
        known.clear()
        known.update(before)


def _random_actions(env: Env, *, count: int = 4) -> list[Message]:
    env.action_space.seed(SEED)
    return [env.action_space.sample() for _ in range(count)]


def _schemas(env: Env) -> list[dict[str, Any]]:
    return [tool.schema() for tool in env.tools]


def _alone(subject: Subject, start: Start) -> tuple[Any, ...]:
    env = subject.make_twin()
    return play(env, start, gold_of(env, start.task), until_over=False).shown


def _interleaved(subject: Subject, starts: Sequence[Start]) -> list[tuple[Any, ...]]:
    """What each episode shows, one step of each in turn."""
    envs = [subject.make_twin() for _ in starts]
    said = [gold_of(env, start.task) for env, start in zip(envs, starts, strict=True)]
    shown: list[list[Any]] = [
        [env.reset(seed=SEED, options=start.options)] for env, start in zip(envs, starts, strict=True)
    ]
    for turn in range(max(map(len, said))):
        for env, actions, seen in zip(envs, said, shown, strict=True):
            if turn < len(actions) and not _ended(seen):
                seen.append(env.step(actions[turn]))
    return [tuple(seen) for seen in shown]


def _ended(seen: Sequence[Any]) -> bool:
    return Episode(seen[0], tuple(seen[1:])).over


def _replaced(subject: Subject) -> Iterator[tuple[Start, Start]]:
    """Each task to play, and the same with the truth of another task, or a changed one of its own."""
    for start in subject.starts:
        own = freeze(start.task.truth)
        others = (other.task.truth for other in subject.starts if other.split == start.split)
        changed = next((truth for truth in others if freeze(truth) != own), _changed(start.task.truth))
        if freeze(changed) != own:
            yield start, replace(start, task=replace(start.task, truth=changed))


def _changed(value: Any) -> Any:
    """Another value of the same shape; what is no text, number, list or mapping stays as it is."""
    if isinstance(value, Mapping):
        return {key: _changed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_changed, value))
    if isinstance(value, str):
        return value[::-1] + "x"
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else value


def _scripts(env: Env, task: Task) -> Iterator[Sequence[Message]]:
    """What is said whatever the truth is: gold of the task as it was, calls that err, and anything."""
    yield gold_of(env, task)
    names = [tool.name for tool in env.tools]
    calls = (ToolCall(id=f"call_{name}", name=name, arguments={"no such": 1}) for name in names)
    yield [Message("assistant", "", tuple(calls))]
    calling = [action for action in _random_actions(env, count=_TRIED) if action.tool_calls]
    yield calling[:_SHOWN] or _random_actions(env)  # a text would end most episodes


def _moments(subject: Subject, start: Start, said: Iterable[Message]) -> Iterator[Moment]:
    """What an environment that knows no task but this one shows until its episode ends."""
    env = subject.make_twin()
    vars(env)["task_list"] = lambda split: (start.task,)
    declared = env.declared
    episode = play(env, replace(start, index=0), said, until_over=False)
    yield {**_moment(*episode.opening, declared), "tools": _schemas(env)}
    for observation, _, terminated, truncated, info in episode.steps:
        if terminated or truncated:
            return
        yield _moment(observation, info, declared)


def _moment(observation: Iterable[Message], info: Mapping[str, Any], declared: Mapping[str, str]) -> Moment:
    shown: dict[str, list[Any]] = {}
    for message in observation:
        shown.setdefault(message.name or message.role, []).append(message)
    for key, value in info.items():
        shown.setdefault(key, []).append(value)
    return {name: values for name, values in shown.items() if name not in declared and name not in _SCORES}


def _differing(one: Moment, two: Moment) -> list[str]:
    return [name for name in {**one, **two} if not same(one.get(name), two.get(name))]
