"""The seam to verification: a conversation in, a finite score with its parts out.

A reward is any callable that takes :class:`Evidence` and returns a float or a :class:`Score`. It runs in a
worker thread and not on the event loop, unless its class says ``inline = True``: done in microseconds, where
a thread takes 0.3 ms. It must not keep state between calls. A limit hit while judging the policy's output is
the policy's fault (the minimum); only a failure of the world raises :class:`WorldError`. One that needs
something of its host, such as a sandbox, may have a method ``check_host()``, called before a run, which
raises UserError where that is not there.

Rewards make rewards. A :class:`Rubric` is the usual one, gates in front of a weighted sum::

    Rubric(
        {"correct": ("boxed", 1.0), "length": (Length(max_tokens=512, buffer_tokens=128), 0.2)},
        gates={"format": "format"},
    )

which says ``Gate("format", then=WeightedSum({...}))``. Wherever a reward is expected, a registered name does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import numpy as np

from agentrl.errors import BadConfig
from agentrl.types import Message, Score, Task

__all__ = ["Evidence", "Gate", "Reward", "Rubric", "WeightedSum", "as_score", "check_host"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a reward may look at."""

    task: Task  # with its truth
    messages: tuple[Message, ...]  # the whole conversation
    env: Any = None  # the environment in its final state, for rewards that inspect it
    completion_tokens: int = 0  # sampled in this episode so far; 0 where nobody counted (stepped by hand)
    is_cut: bool = False  # a token limit cut the last assistant message off

    @property
    def answer(self) -> str:
        """The text of the last assistant message; "" if the assistant said nothing or was cut off in it."""
        if self.is_cut:
            return ""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")


class Reward(Protocol):
    """What environments need of a reward."""

    def __call__(self, evidence: Evidence, /) -> Score | float:
        """Score an episode. Raises WorldError for a failure of the world; anything else raised is a bug."""
        ...


def check_host(*rewards: object) -> None:
    """Raise UserError where this host lacks what one of ``rewards`` needs and can tell."""
    for reward in rewards:
        check = getattr(reward, "check_host", None)
        if check is not None:
            check()


def as_score(result: object, reward: object = "a reward") -> Score:
    """What ``reward`` returned, as a Score: numbers (numpy's and bool included) become one without parts.

    Raises TypeError for anything else and ValueError for a number that is not finite: both are bugs of the
    reward.
    """
    if isinstance(result, Score):
        return result
    if not isinstance(result, (Real, np.bool_)):
        kind = type(result).__name__
        raise TypeError(
            f"{_label(reward)} returned {result!r}, a {kind}: a reward returns a float or a Score"
        )
    value = float(result)
    if not math.isfinite(value):
        raise ValueError(
            f"{_label(reward)} returned {value}: a reward is finite; clip it or raise WorldError"
        )
    return Score(value)


class WeightedSum:
    """The sum of weight times value over named rewards: ``WeightedSum({"correct": ("boxed", 1.0), ...})``.

    Range: the weighted sum of the ranges. Parts: every reward's own value, unweighted, under its name, and
    its parts under ``name/part``.
    """

    def __init__(self, parts: Mapping[str, tuple[Reward | str, float]]) -> None:
        if not parts:
            raise BadConfig("a weighted sum of no rewards has no value: name at least one")
        for name, (_, weight) in parts.items():
            if not math.isfinite(weight):
                raise BadConfig(f"the weight of {name!r} is {weight!r}: a weight is a finite number")
        self._parts = {name: (_resolved(reward), float(weight)) for name, (reward, weight) in parts.items()}

    def check_host(self) -> None:
        """See ``check_host`` of this module."""
        check_host(*(reward for reward, _ in self._parts.values()))

    def __call__(self, evidence: Evidence) -> Score:
        """Score with every reward, in the order they were given."""
        scores = {name: as_score(reward(evidence), reward) for name, (reward, _) in self._parts.items()}
        return Score(
            math.fsum(weight * scores[name].value for name, (_, weight) in self._parts.items()),
            {key: value for name, score in scores.items() for key, value in _named(name, score).items()},
            "; ".join(f"{name}: {score.note}" for name, score in scores.items() if score.note),
        )


class Gate:
    """``then`` counts where ``condition`` scores at least ``at_least``; elsewhere the value is ``closed``.

    Behind a closed gate ``then`` is not called and has no parts. Range: that of ``then``, and ``closed``.
    Parts: the condition's value under ``name``, its parts under ``name/part``, and those of ``then``.
    """

    def __init__(
        self,
        condition: Reward | str,
        then: Reward | str,
        *,
        at_least: float = 1.0,
        closed: float = 0.0,
        name: str = "gate",
    ) -> None:
        if not (math.isfinite(at_least) and math.isfinite(closed)):
            raise BadConfig(
                f"gate {name!r} has at_least={at_least!r}, closed={closed!r}: both must be finite"
            )
        self._condition = _resolved(condition)
        self._then = _resolved(then)
        self._at_least = at_least
        self._closed = closed
        self._name = name

    def check_host(self) -> None:
        """See ``check_host`` of this module."""
        check_host(self._condition, self._then)

    def __call__(self, evidence: Evidence) -> Score:
        """Score the condition and, where it holds, ``then``."""
        condition = as_score(self._condition(evidence), self._condition)
        parts = _named(self._name, condition)
        if condition.value < self._at_least:
            why = f": {condition.note}" if condition.note else ""
            return Score(float(self._closed), parts, f"{self._name} is closed{why}")
        then = as_score(self._then(evidence), self._then)
        return Score(then.value, {**parts, **then.parts}, then.note)


class Rubric:
    """A weighted sum behind gates: each gate must score 1, else the episode is worth ``closed``.

    Gates are tried in order and the first closed one decides. For another threshold, or gates in front of
    single parts, write :class:`Gate`. Range: that of the sum, and ``closed``.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[Reward | str, float]],
        *,
        gates: Mapping[str, Reward | str] | None = None,
        closed: float = 0.0,
    ) -> None:
        twice = sorted(parts.keys() & (gates or {}).keys())
        if twice:
            raise BadConfig(f"a rubric has {twice[0]!r} among its parts and its gates: rename one")
        self._root: Reward = WeightedSum(parts)
        for name, condition in reversed(list((gates or {}).items())):
            self._root = Gate(condition, self._root, closed=closed, name=name)

    def check_host(self) -> None:
        """See ``check_host`` of this module."""
        check_host(self._root)

    def __call__(self, evidence: Evidence) -> Score:
        """Score the tree."""
        return as_score(self._root(evidence), self)


def _resolved(reward: Reward | str) -> Reward:
    from agentrl.registry import make_reward  # the registry knows rewards: at the top this would be a circle

    return make_reward(reward)


def _named(name: str, score: Score) -> dict[str, float]:
    return {name: score.value, **{f"{name}/{part}": value for part, value in score.parts.items()}}


def _label(reward: object) -> str:
    return reward if isinstance(reward, str) else getattr(reward, "__qualname__", type(reward).__qualname__)
