"""What an attack on a sandbox or on a verdict is: its source, where it runs, and what must come of it.

An attack is data. Its source is Python that runs inside a sandbox next to ``probe.py`` (the text of
``agentrl.attacks.probe``): it says "BROKEN: ..." for each thing that it should not have been able to do, and
"DONE" once it has tried all of them. Each is bounded by itself, so that it does no lasting harm where it
succeeds: a fork bomb stops at some hundred processes, and what would hurt a host looks first whether it is in
one. What the host sees meanwhile (survivors, files, connections, secrets) counts in every one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from agentrl.sandbox import GUARANTEES, LIMITS, ExecResult, Status

__all__ = ["Attack", "Group", "Kind", "Seen"]

Group = Literal["resources", "processes", "isolation", "files", "outputs", "verdicts"]
# How a solution is judged: calls of a function, assertions about it, a program's output, pytest in a folder.
Kind = Literal["call", "assert", "stdin", "files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the host saw of an attack."""

    result: ExecResult
    said: str  # its stdout, decoded with replacement
    seconds: float  # by the host's clock, from asking to having the result


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One attack, and what must come of it.

    In the group "verdicts" the source is a solution that must not be accepted, judged in each of ``kinds``;
    in every other it is a command's, and ``needs`` are the limits and guarantees that it tries.
    """

    name: str  # words with hyphens, unique
    group: Group
    tries: str  # one line
    source: str
    needs: tuple[str, ...] = ()
    limits: Mapping[str, Any] = field(default_factory=dict)  # that differ from selfcheck's own
    statuses: tuple[Status, ...] = ("ok",)  # one of which must be the result's
    finishes: bool = True  # whether it must get as far as saying DONE
    flag: str = ""  # that the result must have
    stdin: bytes = b""
    files: Mapping[str, str] = field(default_factory=dict)  # beside the source
    refused: tuple[str, ...] = ()  # names that the host must not be able to read afterwards
    check: Callable[[Seen], str] | None = None  # what else is wrong; "": nothing
    kinds: tuple[Kind, ...] = ()

    def __post_init__(self) -> None:
        assert self.group in get_args(Group)
        assert {*self.needs} <= {*LIMITS, *GUARANTEES}, self.name
        assert (self.group == "verdicts") == bool(self.kinds), self.name

    def judged(self, seen: Seen) -> str:
        """What broke, as far as the result tells; "": it held."""
        result = seen.result
        if broken := _broken(seen):
            return "; ".join(broken)[:400]
        if result.status not in self.statuses:
            tail = result.stderr.decode(errors="replace").strip().splitlines()[-1:]
            return f"status {result.status}, not {' or '.join(self.statuses)} {' '.join(tail)}".strip()[:400]
        if self.finishes and result.status == "ok" and "DONE" not in seen.said.splitlines():
            return "it ended before it had tried everything"
        if self.flag and self.flag not in result.flags:
            return f"no flag {self.flag!r} in {result.flags}"
        return self.check(seen) if self.check is not None else ""

    def is_cut_off(self, seen: Seen) -> bool:
        """Whether its time was up, as it must not be, before anything broke."""
        late = seen.result.status in ("cpu", "wall") and seen.result.status not in self.statuses
        return late and not _broken(seen)


def _broken(seen: Seen) -> list[str]:
    return [line for line in seen.said.splitlines() if line.startswith("BROKEN")]
