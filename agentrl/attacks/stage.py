"""Where attacks are tried: a backend's sandboxes with the self-check's limits,
and what the host sees of them."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

from agentrl.attacks.attack import Attack, Seen
from agentrl.attacks.bait import Bait, leftovers, processes_marked
from agentrl.errors import BadConfig
from agentrl.sandbox import LIMITS, Backend, ExecResult, Limits, Sandbox, Survey

__all__ = ["SELF_CHECK_LIMITS", "Stage", "probe_source"]

# Small, so that an attack reaches them soon and a broken one costs the host little.
SELF_CHECK_LIMITS = Limits(cpu_s=2, wall_s=20, memory_mib=128, pids=32, disk_mib=16, output_kib=64)
_PATIENCE_S = 1.0  # for the last processes of a run to leave the host's process table
_CLOSING_S = 5.0  # for a session to be closed, whatever was left in it
_SLOWER = 8  # times the CPU time and the wall clock of an attack whose first try they ended


@cache
def probe_source() -> bytes:
    """The text of what attacks import as ``probe``."""
    return files("agentrl.attacks").joinpath("probe.py").read_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A backend under test."""

    backend: Backend
    label: str  # by which another process can make the same backend; "" where there is none
    survey: Survey
    bait: Bait
    marks: list[str] = field(default_factory=list)  # of all attacks so far

    def lacking(self, needs: tuple[str, ...]) -> str:
        """Why something that is needed is not enforced here, by the backend's own word; "": all is."""
        missing = self.survey.missing
        return next((f"{need}: {missing[need]}" for need in needs if need in missing), "")

    def limits(self, changed: Mapping[str, Any] | None = None) -> Limits:
        """The self-check's limits with some changed, as far as the backend enforces them."""
        wanted = replace(SELF_CHECK_LIMITS, **changed or {})
        without: dict[str, Any] = {name: None for name in LIMITS if name in self.survey.missing}
        return replace(wanted, **without, network=wanted.network or "network" in self.survey.missing)

    @contextlib.contextmanager
    def sandbox(self, changed: Mapping[str, Any] | None = None) -> Iterator[Sandbox]:
        """A session, closed at the end."""
        session = self.backend.open(self.limits(changed))
        try:
            yield session
        finally:
            session.close()

    def run(
        self, session: Sandbox, source: str, *, facts: Mapping[str, Any] | None = None, stdin: bytes = b""
    ) -> tuple[ExecResult, str]:
        """Run ``source`` as an attack with more ``facts``; its result and its mark."""
        mark = "agentrl-mark-" + secrets.token_hex(8)
        self.marks.append(mark)
        told = json.dumps({**self.bait.facts, **(facts or {})})
        result = session.run(
            ["python3", "attack.py", mark, told],
            stdin=stdin,
            files={"attack.py": source.encode(), "probe.py": probe_source()},
        )
        return result, mark

    def play(self, attack: Attack) -> str:
        """Try one attack of commands; what broke, or "".

        One that time ended before it was through shows nothing yet: a slow host gives it more.
        """
        limits = self.limits(attack.limits)
        broken, is_unfinished = self._played(attack, limits)
        if is_unfinished:
            times = {"cpu_s": limits.cpu_s, "wall_s": limits.wall_s}
            longer: dict[str, Any] = {name: most and most * _SLOWER for name, most in times.items()}
            broken, _ = self._played(attack, replace(limits, **longer))
        return broken

    def _played(self, attack: Attack, limits: Limits) -> tuple[str, bool]:
        """What broke in one try, and whether that is no more than that its time was up."""
        session = self.backend.open(limits)
        try:
            for name, text in attack.files.items():
                session.write(name, text.encode())
            visits = len(self.bait.visits)
            begun = time.monotonic()
            result, mark = self.run(session, attack.source, stdin=attack.stdin)
            seconds = time.monotonic() - begun
            seen = Seen(result=result, said=result.stdout.decode(errors="replace"), seconds=seconds)
            told = attack.judged(seen)
            found = [
                self._traces(mark, result, visits),
                *(self._readable(session, name) for name in attack.refused),
            ]
        finally:
            begun = time.monotonic()
            session.close()
        if time.monotonic() - begun > _CLOSING_S:
            found.append(f"closing it took {time.monotonic() - begun:.0f} s")
        is_unfinished = attack.is_cut_off(seen) and not any(found)
        return "; ".join(part for part in (*found[:1], told, *found[1:]) if part)[:400], is_unfinished

    def shares_the_host(self) -> str:
        """Why what hurts a host must not be tried in this backend's sandboxes; "": it may."""
        with self.sandbox() as session:
            result, _ = self.run(session, "from probe import *\ncontained()\ndone()\n")
        return "" if b"DONE" in result.stdout.splitlines() else "it shares the host's processes"

    def _traces(self, mark: str, result: ExecResult, visits: int) -> str:
        """What an attack left or took, told from outside."""
        until = time.monotonic() + _PATIENCE_S
        while (alive := processes_marked(mark)) and time.monotonic() < until:
            time.sleep(0.02)
        if alive:
            return f"{len(alive)} processes survive"
        if self.bait.secret.encode() in result.stdout + result.stderr:
            return "the host's secret is in its output"
        if len(self.bait.visits) > visits:
            return f"the host was reached: {self.bait.visits[visits]}"
        if self.bait.missing():
            return f"the host's files: {self.bait.missing()[0]}"
        if left := leftovers(mark):
            return f"on the host lies {sorted(left)[0]}"
        if result.status == "lost":
            return "the world is blamed for it"
        return ""

    def _readable(self, session: Sandbox, name: str) -> str:
        begun = time.monotonic()
        try:
            data = session.read(name)
        except (OSError, BadConfig):
            slow = time.monotonic() - begun > _CLOSING_S
            return f"reading {name!r} took {time.monotonic() - begun:.0f} s" if slow else ""
        what = "the secret" if self.bait.secret.encode() in data else f"{len(data)} bytes"
        return f"the host read {what} from {name!r}"
