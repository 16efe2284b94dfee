"""Failures of the world: at which boundary they happened, who counts them, and how many are too many.

A WorldError is blamed on the innermost boundary that it crosses on its way out; what fails without raising
is reported with ``healed``. An episode opens a ledger, and whatever runs on its behalf, also in a thread,
writes into it; outside of episodes nothing is kept.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

from agentrl.errors import TooManyInvalid, WorldError
from agentrl.types import Fault, Group

__all__ = [
    "BOUNDARIES",
    "CALL_ENDS",
    "Ledger",
    "as_fault",
    "blamed_on",
    "check_invalid",
    "commonest_failure",
    "count_call",
    "healed",
    "in_line",
    "in_line_s",
]

# What an episode depends on, and therefore the keys of the metrics: fixed for ever.
BOUNDARIES = ("tool", "environment", "reward", "worker", "sandbox", "engine")
# How a tool call can end other than with its result: the tool raised a ToolError, it was given up at its
# deadline, its result was cut.
CALL_ENDS = ("error", "late", "cut")

_ledger: ContextVar[Ledger] = ContextVar("ledger")


class Line:
    """How long an episode has stood in line behind others, in whichever threads; overlapping waits once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits = 0
        self._since = self._before = 0.0

    @property
    def seconds(self) -> float:
        """Until now."""
        with self._lock:
            return self._before + (time.monotonic() - self._since if self._waits else 0.0)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Stand in line meanwhile."""
        with self._lock:
            self._since = self._since if self._waits else time.monotonic()
            self._waits += 1
        try:
            yield
        finally:
            with self._lock:
                self._waits -= 1
                self._before += 0.0 if self._waits else time.monotonic() - self._since


@dataclass(slots=True)
class Ledger:
    """What went wrong in the attempts at one episode."""

    faults: list[Fault] = field(default_factory=list)  # in the order in which they were met
    calls: Counter[str] = field(default_factory=Counter)  # by ``CALL_ENDS``
    line: Line = field(default_factory=Line, compare=False, repr=False)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Everything that is awaited or run in a thread meanwhile writes here."""
        token = _ledger.set(self)
        try:
            yield
        finally:
            _ledger.reset(token)


def healed(error: WorldError) -> None:
    """Count a failure of the world that whoever met it made good, so that nothing need be raised."""
    ledger = _ledger.get(None)
    if ledger is not None:
        ledger.faults.append(as_fault(error))


@contextmanager
def in_line() -> Iterator[None]:
    """Wait meanwhile for a turn that other episodes have: no deadline of a step counts this time."""
    ledger = _ledger.get(None)
    with nullcontext() if ledger is None else ledger.line.joined():
        yield


def in_line_s() -> float:
    """Seconds that this episode has waited ``in_line`` until now; 0 outside of episodes."""
    ledger = _ledger.get(None)
    return 0.0 if ledger is None else ledger.line.seconds


def count_call(end: str) -> None:
    """Count a tool call that ended as ``end``, of ``CALL_ENDS``."""
    ledger = _ledger.get(None)
    if ledger is not None:
        ledger.calls[end] += 1


def as_fault(error: WorldError) -> Fault:
    """The record of ``error``; what crossed no boundary came from the environment's own code."""
    return Fault(error.boundary or "environment", str(error))


@contextmanager
def blamed_on(boundary: str) -> Iterator[None]:
    """Let a WorldError that leaves say that it happened at ``boundary``, unless it is known more closely."""
    try:
        yield
    except WorldError as error:
        error.boundary = error.boundary or boundary
        raise


def check_invalid(groups: Sequence[Group], *, most: float) -> None:
    """Raise TooManyInvalid where more than the share ``most`` of the episodes is invalid."""
    episodes = [trajectory for group in groups for trajectory in group.trajectories]
    invalid = [trajectory for trajectory in episodes if not trajectory.valid]
    if len(invalid) <= most * len(episodes):
        return
    raise TooManyInvalid(
        f"the world failed {len(invalid)} of {len(episodes)} episodes of a step, and rollout.max_invalid "
        f"allows a share of {most:g}; {commonest_failure(groups)}. Repair that and go on with --resume, or "
        "raise rollout.max_invalid"
    )


def commonest_failure(groups: Sequence[Group]) -> str:
    """At which boundary the most invalid episodes failed, and the last one's message; "" where none did."""
    invalid = [each for group in groups for each in group.trajectories if not each.valid]
    if not invalid:
        return ""
    ((cause, count),) = Counter(trajectory.fault for trajectory in invalid).most_common(1)
    last = next(trajectory for trajectory in reversed(invalid) if trajectory.fault == cause)
    said = last.faults[-1].message if last.faults else "it said nothing"
    return f"{count} failed at the boundary {cause!r}, the last one, of task {last.task_id!r}, with: {said}"
