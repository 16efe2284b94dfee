"""A process that is killed at a chosen moment of a run; for processes that tests start."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from agentrl.learner import Optimization
from agentrl.log import RunLog

__all__ = ["kill_before"]

_PLACES: dict[str, tuple[Any, str]] = {
    "update": (Optimization, "step"),
    "row": (RunLog, "step"),
    "save": (os, "fsync"),
    "rename": (Path, "rename"),
}


def kill_before(place: str, count: int, *, engine: type) -> None:
    """Kill this process, as SIGKILL does, before the ``count``-th call at ``place``: one of those above, or
    "rollout", a request to ``engine``."""
    owner, name = (engine, "generate") if place == "rollout" else _PLACES[place]
    function, calls = getattr(owner, name), iter(range(1, 10**9))

    def counted(*args: Any, **settings: Any) -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **settings)

    setattr(owner, name, counted)
