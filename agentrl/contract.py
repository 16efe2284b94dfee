"""Checks of the contract: Gymnasium's rules, what spaces promise, tools, splits, and what is declared."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium
from gymnasium.utils.env_checker import check_env

from agentrl.attacks.catalogue import VERDICTS
from agentrl.env import Env, Step
from agentrl.errors import did_you_mean
from agentrl.probes import SEED, WORTHLESS, Start, Subject, Unsound, gold_of, play, require
from agentrl.tasks import freeze
from agentrl.threads import run_sync
from agentrl.types import Message, Task

__all__ = [
    "declares_what_there_is",
    "describes_its_tools",
    "follows_gymnasium",
    "keeps_its_splits_apart",
    "tells_what_its_spaces_promise",
]

_COMPARED_TASKS = 500  # of each split, where splits are compared


def follows_gymnasium(subject: Subject) -> str:
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


def tells_what_its_spaces_promise(subject: Subject) -> str:
    """Observations, rewards and infos of starts, gold steps and random steps are what the contract says.

    So is the conversation that the environment keeps, which is what its reward and the trainer read.
    """
    env, seen = subject.env, 0
    env.action_space.seed(SEED)
    for start in subject.starts:
        seen += _play_checked(env, start, env.step)
    for start in subject.first_starts:
        seen += _play_checked(env, start, partial(_astep, env))
    return f"{seen} steps"


def describes_its_tools(subject: Subject) -> str:
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


def keeps_its_splits_apart(subject: Subject) -> str:
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


def declares_what_there_is(subject: Subject) -> str:
    """What is declared is a probe, an attack, a tool, a role or a key of info, and each has its reason."""
    env = subject.env
    attacks = {attack.name for attack in VERDICTS}
    known = {*WORTHLESS, *(tool.name for tool in env.tools), "system", "user", "tool"}
    if env.declared and subject.starts:
        start = subject.starts[0]
        episode = play(env, start, gold_of(env, start.task))
        known |= {key for info in (episode.opening[1], *(step[4] for step in episode.steps)) for key in info}
    for name, reason in env.declared.items():
        if name not in known | attacks:
            raise Unsound(
                f"declared has {name!r}{did_you_mean(name, known | attacks)}: it takes "
                f"{', '.join(sorted(known))}, and the names of attacks on verdicts"
            )
        if not reason.strip():
            raise Unsound(f"declared[{name!r}] is empty: write down the reason")
    return ", ".join(env.declared) or "nothing is declared"


def _play_checked(env: Env, start: Start, step_with: Callable[[Message], Step]) -> int:
    """How many steps were taken: gold's and a random one, until the episode was over."""
    task, count = start.task, 0
    opening, info = env.reset(seed=SEED, options=start.options)
    require(opening in env.observation_space, task, f"reset showed {opening!r}, outside its space")
    require(isinstance(info, dict), task, f"reset returned the info {info!r}: it must be a dict")
    for action in (*gold_of(env, task), env.action_space.sample()):
        require(action in env.action_space, task, f"gold has {action!r}, outside action_space")
        before = env.messages
        step = step_with(action)
        count += 1
        _check_step(env, step, task)
        _check_conversation(env, task, before, (action, *step[0]))
        if step[2] or step[3]:
            break
    return count


def _astep(env: Env, action: Message) -> Step:
    """A step as rollouts take it."""
    pending: Any = env.astep(action)
    if not inspect.iscoroutine(pending):
        raise Unsound(f"astep returned {pending!r}, and rollouts await it: write 'async def astep'")
    step: Step = run_sync(pending)
    return step


def _check_conversation(env: Env, task: Task, before: Sequence[Message], new: Sequence[Message]) -> None:
    """Calls apart: an environment notes on them what became of them."""
    kept = [replace(message, tool_calls=()) for message in env.messages]
    expected = [replace(message, tool_calls=()) for message in (*before, *new)]
    require(
        kept == expected,
        task,
        f"the step shows {len(new) - 1} messages, env.messages has {len(kept)}, not {len(expected)}; "
        "it must gain the action and then what the step shows; begin with self.accept(action) and return "
        "self.transition(...)",
    )


def _check_step(env: Env, step: Any, task: Task) -> None:
    require(
        isinstance(step, tuple) and len(step) == 5,
        task,
        f"step returned {step!r}, not Gymnasium's five values",
    )
    observation, reward, terminated, truncated, info = step
    require(
        observation in env.observation_space,
        task,
        f"step returned {observation!r}, outside observation_space",
    )
    require(math.isfinite(reward), task, f"the reward is {reward!r}: it must be finite")
    missing = [key for key in ("stop_reason", "is_valid", "reward_parts") if key not in info]
    require(not missing, task, f"info lacks {', '.join(missing)}: return self.transition(...)")
    require(
        bool(info["stop_reason"]) == (terminated or truncated),
        task,
        "an episode that ends needs a stop_reason, no other",
    )
