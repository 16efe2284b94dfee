"""The verdicts' attacks as checks of a backend: judged in every way that they name, none may pass."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from agentrl.attacks.attack import Attack, Kind
from agentrl.attacks.backend_contract import Check, NotEnforced
from agentrl.attacks.catalogue import VERDICTS
from agentrl.attacks.stage import Stage
from agentrl.attacks.targets import KINDS, RIGHT, WRONG, judged, verdict_of
from agentrl.judge import Judge
from agentrl.judging.verdicts import Judgement

__all__ = ["CONTROLS", "verdict_trials"]

# A solution can do to its host what a command can, so that all must be enforced before one is tried.
_NEEDS = ("files", "processes", "privileges", "survivors", "memory_mib", "pids", "wall_s")
# Room for an attack to fail in: most of those that wait are over at the wall clock.
_LIMITS = {"cpu_s": 2, "wall_s": 6, "memory_mib": 192, "pids": 48}


def _judge(stage: Stage, **changed: float) -> Judge:
    return Judge(stage.backend, limits=stage.limits({**_LIMITS, **changed}))


def _accepts(stage: Stage, kind: Kind) -> str:
    judgement = judged(_judge(stage, cpu_s=10, wall_s=60), kind, RIGHT[kind])
    return "" if judgement.verdict == "AC" else f"a right answer is {judgement.verdict}: {judgement.note}"


def _rejects(stage: Stage, kind: Kind) -> str:
    judgement = judged(_judge(stage, cpu_s=10, wall_s=60), kind, WRONG[kind])
    if (judgement.verdict, judgement.fault) != ("WA", "policy"):
        return f"a wrong answer is {judgement.verdict}, the fault {judgement.fault}"
    return ""


def _withstands(stage: Stage, attack: Attack, kind: Kind) -> str:
    judgement = verdict_of(_judge(stage), attack, kind)
    if judgement.fault == "world":
        return f"the world is blamed for it: {judgement.note}"
    return _accepted(judgement)


def _accepted(judgement: Judgement) -> str:
    if judgement.verdict != "AC" and not judgement.passed:
        return ""
    if judgement.trust == "shared":
        raise NotEnforced("tests and solution share a process here, and the result says so: trust='shared'")
    passed = ", ".join(judgement.passed)
    return f"it was accepted: {judgement.verdict}" + (f" ({passed} passed)" if passed else "")


CONTROLS: tuple[Check, ...] = tuple(
    check
    for kind in KINDS
    for check in (
        Check(
            name=f"a right answer is accepted [{kind}]",
            group="verdicts",
            needs=_NEEDS,
            play=partial(_accepts, kind=kind),
        ),
        Check(
            name=f"a wrong answer is rejected [{kind}]",
            group="verdicts",
            needs=_NEEDS,
            play=partial(_rejects, kind=kind),
        ),
    )
)


def verdict_trials() -> Iterator[Check]:
    """One check for each attack and way of judging."""
    for attack in VERDICTS:
        for kind in attack.kinds:
            yield Check(
                name=f"{attack.name} [{kind}]",
                group="verdicts",
                needs=_NEEDS,
                play=partial(_withstands, attack=attack, kind=kind),
            )
