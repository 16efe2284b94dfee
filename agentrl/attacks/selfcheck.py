"""Put a backend to its own word: the contract of every backend, and with it the whole catalogue of attacks.

A row is "held", "BROKEN", "not enforced" (the backend says so itself: its survey) or "not tried" (with the
reason). What is not enforced is not tried either: it would only hurt the host. The host is baited meanwhile:
a secret in its environment and in files, services that notice a caller; and afterwards there must be no more
processes, cgroups, containers, files and descriptors than before.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from agentrl.attacks.backend_contract import CONTRACT, Check, NotEnforced
from agentrl.attacks.bait import baited, children, containers, count_descriptors, leftovers, processes_marked
from agentrl.attacks.catalogue import COMMANDS
from agentrl.attacks.scenarios import SCENARIOS
from agentrl.attacks.stage import Stage
from agentrl.attacks.verdict_trials import CONTROLS, verdict_trials
from agentrl.errors import BadConfig, did_you_mean
from agentrl.registry import make_sandbox
from agentrl.sandbox import Backend

__all__ = ["Report", "Result", "Row", "self_check"]

Result = Literal["held", "BROKEN", "not enforced", "not tried"]

# That a backend may have open for what it keeps ready. Docker's connections to its engine are 22 from the
# fifth session on, and no more after fifty; the check opens hundreds, so that one lost in each is far more.
_DESCRIPTORS_KEPT = 32
_PATIENCE_S = 5.0  # for what a closed backend had to be gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What came of one check or attack."""

    name: str
    group: str
    result: Result
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of all."""

    backend: str
    adversarial: bool
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing broke."""
        return not self.broken

    @property
    def broken(self) -> tuple[Row, ...]:
        """What did not hold."""
        return tuple(row for row in self.rows if row.result == "BROKEN")

    @property
    def counts(self) -> Counter[Result]:
        """Rows by result."""
        return Counter(row.result for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "backend": self.backend,
            "adversarial": self.adversarial,
            "counts": dict(self.counts),
            "rows": [asdict(row) for row in self.rows],
        }


def self_check(
    backend: str | Backend,
    *,
    adversarial: bool = False,
    only: Sequence[str] = (),
    on_row: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Try a backend's contract, and with ``adversarial`` every attack; ``only``: names, or groups.

    A backend of a name is made and closed here; another stays its owner's to close, but is closed once all
    its sandboxes are. Raises BadConfig where it is not available, or ``only`` names what there is not.
    """
    made = make_sandbox(backend)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        on_row(row)

    with baited() as bait:
        before = (count_descriptors(), children(), leftovers(f"-{os.getpid()}-"), containers())
        # After the baits, so that what a backend starts inherits them where it is careless.
        survey = made.survey()
        if not survey.available:
            raise BadConfig(f"the sandbox {made.name!r} is not available here: {survey.note}")
        label = backend if isinstance(backend, str) else ""
        stage = Stage(backend=made, label=label, survey=survey, bait=bait)
        try:
            made.sweep()
            checks = _chosen(_checks(adversarial), only)
            for check in checks:
                if check.group != "verdicts":
                    add(_tried(check, stage))
            for row in _verdicts([check for check in checks if check.group == "verdicts"], stage):
                add(row)
            kept = count_descriptors()
        finally:
            made.close()
        for row in _traces(stage, before, kept):
            add(row)
    return Report(backend=made.name, adversarial=adversarial, rows=tuple(rows))


def _checks(adversarial: bool) -> Iterator[Check]:
    yield from CONTRACT
    if adversarial:
        for attack in COMMANDS:
            yield Check(
                name=attack.name,
                group=attack.group,
                needs=attack.needs,
                play=partial(Stage.play, attack=attack),
            )
        yield from SCENARIOS
        yield from CONTROLS
        yield from verdict_trials()


def _chosen(checks: Iterable[Check], only: Sequence[str]) -> list[Check]:
    known = list(checks)
    names = [name for check in known for name in (check.name, check.group)]
    unknown = [name for name in only if name not in names]
    if unknown:
        groups = ", ".join(dict.fromkeys(check.group for check in known))
        raise BadConfig(
            f"nothing of the self-check has the name or the group {', '.join(unknown)}"
            f"{did_you_mean(unknown[0], names)}; the groups are {groups}; those of attacks need --adversarial"
        )
    return [check for check in known if not only or check.name in only or check.group in only]


def _tried(check: Check, stage: Stage) -> Row:
    if lacking := stage.lacking(check.needs):
        return Row(name=check.name, group=check.group, result="not enforced", detail=lacking)
    begun = time.monotonic()
    try:
        broken = check.play(stage)
    except NotEnforced as lacking:
        return Row(name=check.name, group=check.group, result="not enforced", detail=str(lacking))
    except Exception as error:  # a third party's backend may fail in any check, in any way
        broken = f"{type(error).__name__}: {error}"
    return Row(
        name=check.name,
        group=check.group,
        result="BROKEN" if broken else "held",
        detail=broken,
        seconds=time.monotonic() - begun,
    )


def _verdicts(checks: Sequence[Check], stage: Stage) -> Iterator[Row]:
    """Judged some at a time, for most of them only wait for a limit."""
    if checks and not (reason := stage.shares_the_host()):
        with ThreadPoolExecutor(os.cpu_count() or 1, "selfcheck") as pool:
            yield from pool.map(lambda check: _tried(check, stage), checks)
        return
    for check in checks:
        lacking = stage.lacking(check.needs)
        result: Result = "not enforced" if lacking else "not tried"
        yield Row(name=check.name, group=check.group, result=result, detail=lacking or reason)


def _traces(
    stage: Stage,
    before: tuple[int, frozenset[int], frozenset[str], frozenset[str]],
    kept: int,  # descriptors while it was open
) -> Iterator[Row]:
    """What is left on the host once the backend is closed."""
    descriptors, processes, paths, engines = before

    def found() -> dict[str, str]:
        alive = [pid for mark in stage.marks[-200:] for pid in processes_marked(mark)]
        more: dict[str, list[Any]] = {
            "no process survives": sorted({*alive, *(children() - processes)}),
            "no cgroup or file is left": sorted(leftovers(f"-{os.getpid()}-") - paths),
            "no container is left": sorted(containers() - engines),
        }
        return {name: f"{len(left)}: {left[0]}" if left else "" for name, left in more.items()}

    until = time.monotonic() + _PATIENCE_S
    while any((told := found()).values()) and time.monotonic() < until:
        time.sleep(0.1)
    told["descriptors are flat"] = _descriptors(descriptors, kept)
    told["the baits are untouched"] = "; ".join([*stage.bait.missing(), *stage.bait.visits[:1]])
    for name, broken in told.items():
        lacking = stage.lacking(("survivors",) if "process" in name else ("files", "network"))
        result: Result = "held" if not broken else "not enforced" if lacking else "BROKEN"
        yield Row(name=name, group="traces", result=result, detail=broken or "")


def _descriptors(before: int, kept: int) -> str:
    after = count_descriptors()
    if kept - before > _DESCRIPTORS_KEPT or after > before:
        return f"{before} before, {kept} at the end, {after} after it was closed"
    return ""
