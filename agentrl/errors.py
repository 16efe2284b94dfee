"""Every error that agentrl raises on purpose.

    AgentRLError
    |-- UserError                what the caller handed in is wrong: one clear line, exit code 2
    |   |-- UnknownName          a name that is not registered; says what is meant perhaps
    |   |-- BadConfig            a configuration that can't be used
    |   |-- BadData              a data file or a task that can't be read
    |   |-- CannotWrite          a file or folder that the disk refuses: full, or not to be written to
    |   |-- MissingExtra         an optional package is not installed
    |   `-- UnsupportedModel     a model, tokenizer or chat template that can't be used here
    |-- BadArguments             the model's fault: a tool call's arguments do not fit the schema
    |-- ToolError                the model's fault, raised by a tool on purpose, for the model to read
    |   `-- ToolLate             given up at its deadline
    |-- TooManyInvalid           the world failed more of a step's episodes than a run puts up with
    |-- WrongWeights             the engine serves other weights than it was given: ends the run
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
    "CannotWrite",
    "EngineError",
    "Diverged",
    "MissingExtra",
    "TooManyInvalid",
    "ToolError",
    "ToolLate",
    "UnknownName",
    "UnsupportedModel",
    "UserError",
    "WorkerLost",
    "WorldError",
    "WrongWeights",
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


class CannotWrite(UserError):
    """A file or a folder that the disk refuses: it is full, or may not be written to."""


class MissingExtra(UserError):
    """An optional package is not installed; the message has the command that installs it."""


class UnsupportedModel(UserError):
    """A model, tokenizer or chat template that can't be used here."""


class BadArguments(AgentRLError):
    """A tool call's arguments do not fit the tool's schema."""


class ToolError(AgentRLError):
    """Raised by a tool on purpose; its text is what the model reads."""


class ToolLate(ToolError):
    """A tool was given up at its deadline."""


class TooManyInvalid(AgentRLError):
    """The world failed more of a step's episodes than a run puts up with; names the commonest cause."""


class WrongWeights(AgentRLError):
    """The engine serves other weights than it was given; whatever it samples would be trained on wrongly."""


class Diverged(AgentRLError):
    """A policy whose numbers are no longer finite."""


class WorldError(AgentRLError):
    """The world failed, not the policy: never a reward of zero."""

    boundary = ""  # the innermost one that it crossed, of ``agentrl.faults.BOUNDARIES``; "": none yet


class EngineError(WorldError):
    """The inference engine failed or went away."""

    boundary = "engine"


class WorkerLost(WorldError):
    """A worker process died or could not start, and a known-good probe failed too."""

    boundary = "worker"


_LONGEST_NAME = 200  # characters of a name that somebody may have meant


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'calculator'?"`` for a name close to a known one, ``""`` for none."""
    if len(name) > _LONGEST_NAME:  # a model may send megabytes, and the comparison takes seconds then
        return ""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
