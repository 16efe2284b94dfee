"""The records that travel between the stages: frozen, checked once, without behaviour of their own.

Shapes: P tasks, G siblings of a group, K turns, C completion tokens, T sample tokens. Token ids are int32,
logprobs float32 in nats. Index t of every per-token field speaks of ``token_ids[t]`` given ``token_ids[:t]``.
Arrays inside a record are read-only; a changed record is a new record (``dataclasses.replace``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "CallStatus",
    "Completion",
    "Fault",
    "Finish",
    "FloatArray",
    "Group",
    "IntArray",
    "Message",
    "Sample",
    "Score",
    "Task",
    "ToolCall",
    "Trajectory",
    "Turn",
]

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

Role = Literal["system", "user", "assistant", "tool"]
CallStatus = Literal["ok", "invalid_json", "not_object", "unclosed", "unknown_tool", "schema_error"]
Finish = Literal["stop", "length", "aborted"]

_ROLES = ("system", "user", "assistant", "tool")


def _frozen(values: Any, dtype: Any) -> Any:
    """A read-only array of its own: a caller's later change of ``values`` never reaches into a record."""
    array = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array


def _make_tuple(record: Any, name: str, kind: type) -> None:
    """Turn a list in the field ``name`` into a tuple; refuse what else is no tuple of ``kind``."""
    given = getattr(record, name)
    if isinstance(given, (tuple, list)):
        for item in given:
            if not isinstance(item, kind):
                break
        else:
            if isinstance(given, list):
                object.__setattr__(record, name, tuple(given))
            return
    of = kind.__name__
    raise TypeError(f"{name} is a tuple of {of}, not {given!r}: write {name}=({of}(...),), with the comma")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One attempted call; a bad one is kept with its raw text, never dropped."""

    id: str  # unique within its conversation; the tool message that answers names it
    name: str  # "" where the attempt does not say
    arguments: Mapping[str, Any] | None  # None where status is not ok, unknown_tool or schema_error
    raw: str = ""  # the text that was said, delimiters included
    status: CallStatus = "ok"
    note: str = ""  # why the status is not ok, for the model to read
    span: tuple[int, int] | None = None  # tokens [start, stop) of the completion that the attempt covers


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()  # assistant only
    tool_call_id: str | None = None  # tool only: the call that this answers
    name: str | None = None  # tool only: the tool's name

    def __post_init__(self) -> None:
        if self.role not in _ROLES:
            raise ValueError(f"role {self.role!r} is none of {', '.join(_ROLES)}")
        if self.tool_calls != ():
            _make_tuple(self, "tool_calls", ToolCall)
            if self.tool_calls and self.role != "assistant":
                raise ValueError(
                    f"a message of role {self.role!r} has tool_calls; only the assistant calls tools"
                )
        if not isinstance(self.content, str):
            raise TypeError(f"the content of a message is a text, not {self.content!r}")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool message needs the tool_call_id that it answers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What an episode is about. The policy sees ``prompt`` and never ``truth``."""

    id: str  # unique in its environment, the same in every process
    prompt: tuple[Message, ...]  # the opening messages
    truth: Mapping[str, Any] = field(default_factory=dict)  # what the reward compares with
    meta: Mapping[str, Any] = field(default_factory=dict)  # difficulty, source: never for the policy

    def __post_init__(self) -> None:
        if not isinstance(self.id, str):
            raise TypeError(f"the id of a task is a text, not {self.id!r}: write str({self.id!r})")
        _make_tuple(self, "prompt", Message)


@dataclass(frozen=True, slots=True)
class Score:
    """A reward with its explanation."""

    value: float  # finite
    parts: Mapping[str, float] = field(default_factory=dict)  # of which it is made, by name
    note: str = ""  # why, in one line

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"a score must be finite, not {self.value!r}: clip it or raise WorldError")


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """What the engine sampled for one turn."""

    token_ids: IntArray  # (C,), the stop token included
    logprobs: FloatArray  # (C,) nats, of the distribution that was sampled from
    versions: IntArray  # (C,) adapter version that sampled each token
    finish: Finish  # stop: a stop token was said; length: max_tokens or the context; aborted: cancelled

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _frozen(self.token_ids, np.int32))
        object.__setattr__(self, "logprobs", _frozen(self.logprobs, np.float32))
        object.__setattr__(self, "versions", _frozen(self.versions, np.int32))
        if not len(self.token_ids) == len(self.logprobs) == len(self.versions):
            lengths = len(self.token_ids), len(self.logprobs), len(self.versions)
            raise ValueError(f"token_ids, logprobs and versions differ in length: {lengths}")


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One request to the engine. Only what is new is stored, so long episodes stay linear."""

    new_ids: IntArray  # what the prompt gained since the last completion; all of it if not `extends`
    completion: Completion
    reward: float = 0.0  # the environment's, for this action
    extends: bool = True  # False: the history was rewritten and the prompt begins anew

    def __post_init__(self) -> None:
        object.__setattr__(self, "new_ids", _frozen(self.new_ids, np.int32))


@dataclass(frozen=True, slots=True)
class Fault:
    """One failure of the world, as an episode met it."""

    boundary: str  # the innermost one that it crossed, of ``agentrl.faults.BOUNDARIES``
    message: str  # what it said


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Trajectory:
    """One episode, as it happened."""

    task_id: str
    sibling: int  # which of the G of its group
    seed: int  # of the environment's reset; the same for all siblings
    turns: tuple[Turn, ...]  # (K,)
    messages: tuple[Message, ...]  # the whole conversation
    stop_reason: str  # the environment's, or "length", "context", "fault"
    score: Score | None  # None where no score was taken (invalid)
    valid: bool = True  # False: the world failed; not trained on, not counted
    fault: str = ""  # where not valid: the boundary of the last fault, of ``agentrl.faults.BOUNDARIES``
    faults: tuple[Fault, ...] = ()  # every failure of the world in all attempts, the healed ones included
    calls: Mapping[str, int] = field(default_factory=dict)  # of all attempts, by ``agentrl.faults.CALL_ENDS``
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds by stage: "engine", "env", and of it
    # what the environment reports, such as "tools", "reward"

    def prompt_ids(self, turn: int) -> IntArray:
        """The whole prompt of a turn, (prompt tokens,) int32: what the engine was asked with."""
        pieces: list[IntArray] = []
        for index in range(turn, -1, -1):
            pieces.append(self.turns[index].new_ids)
            if index == 0 or not self.turns[index].extends:
                break
            pieces.append(self.turns[index - 1].completion.token_ids)
        joined: IntArray = np.concatenate(pieces[::-1])
        return joined

    @property
    def reward(self) -> float:
        """The return of the episode: the sum of its turns' rewards."""
        return math.fsum(turn.reward for turn in self.turns)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The siblings of one task."""

    task: Task
    trajectories: tuple[Trajectory, ...]  # (G,), the invalid ones included

    @property
    def valid(self) -> tuple[Trajectory, ...]:
        """The trajectories that count."""
        return tuple(trajectory for trajectory in self.trajectories if trajectory.valid)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Sample:
    """A contiguous token sequence to train on; an episode is one sample unless its history was rewritten."""

    task_id: str
    sibling: int
    token_ids: IntArray  # (T,)
    mask: BoolArray  # (T,) True exactly on sampled tokens; mask[0] is False
    logprobs: FloatArray  # (T,) nats, the sampler's; 0 where mask is False
    rewards: FloatArray  # (T,) a turn's reward on its last sampled token
    versions: IntArray  # (T,) adapter version that sampled; -1 where mask is False
    values: FloatArray | None = None  # (T,) the critic's
    reference: FloatArray | None = None  # (T,) nats, under the adapter-free base
    old: FloatArray | None = None  # (T,) nats, the learner's at the start of the optimizer batch
    advantages: FloatArray | None = None  # (T,)

    def __post_init__(self) -> None:
        dtypes = {"token_ids": np.int32, "mask": np.bool_, "versions": np.int32}
        for name in _PER_TOKEN:
            values = getattr(self, name)
            if values is None:
                continue
            object.__setattr__(self, name, _frozen(values, dtypes.get(name, np.float32)))
            if getattr(self, name).shape != self.token_ids.shape:
                raise ValueError(f"{name} has shape {np.shape(values)}, token_ids {self.token_ids.shape}")
        if self.mask[0]:
            raise ValueError("mask[0] is True, but nothing comes before the first token: it can't be sampled")

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry loss."""
        return int(self.mask.sum())


_PER_TOKEN: Sequence[str] = (
    "token_ids",
    "mask",
    "logprobs",
    "rewards",
    "versions",
    "values",
    "reference",
    "old",
    "advantages",
)
