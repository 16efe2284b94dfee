"""Every error that agentrl raises on purpose.

    AgentRLError
    |-- UserError                what the caller handed in is wrong: one clear line, exit code 2
    |   |-- UnknownName          a name that is not registered; says what is meant perhaps
    |   |-- BadConfig            a configuration that can't be used
    |   |-- BadData              a data file or a task that can't be read
    |   |-- MissingExtra         an optional package is not installed
    |   `-- UnsupportedModel     a model, tokenizer or chat template that can't be used here
    |-- BadArguments             the model's fault: a tool call's arguments do not fit the schema
    |-- ToolError                the model's fault, raised by a tool on purpose, for the model to read
    `-- WorldError               the world's fault: sandbox, engine or data gone; retried, then invalid
        |-- EngineError          at the engine's boundary
        `-- WorkerLost           a worker process died or could not start

Three faults, three fates: the model's becomes an observation, the world's is retried and then left out, and
anything else is a bug and crashes with its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AgentRLError",
    "BadArguments",
    "BadConfig",
    "BadData",
    "EngineError",
    "MissingExtra",
    "ToolError",
    "UnknownName",
    "UnsupportedModel",
    "UserError",
    "WorkerLost",
    "WorldError",
    "did_you_mean",
]


class AgentRLError(Exception):
    """The root of the tree."""


class UserError(AgentRLError):
    """What the caller handed in is wrong; the message names the value, what is allowed and the next step."""


class UnknownName(UserError):
    """A name that is not registered."""


class BadConfig(UserError):
    """A configuration that can't be used."""


class BadData(UserError):
    """A data file or a task that can't be read."""


class MissingExtra(UserError):
    """An optional package is not installed; the message has the command that installs it."""


class UnsupportedModel(UserError):
    """A model, tokenizer or chat template that can't be used here."""


class BadArguments(AgentRLError):
    """A tool call's arguments do not fit the tool's schema."""


class ToolError(AgentRLError):
    """Raised by a tool on purpose; its text is what the model reads."""


class WorldError(AgentRLError):
    """The world failed, not the policy: never a reward of zero."""


class EngineError(WorldError):
    """The inference engine failed or went away."""


class WorkerLost(WorldError):
    """A worker process died or could not start, and a known-good probe failed too."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'calculator'?"`` for a name close to a known one, ``""`` for none."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
