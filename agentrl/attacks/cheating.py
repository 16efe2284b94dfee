"""Can a reward that judges programs be cheated? The catalogue's attacks on verdicts, as the policy's answer.

An environment takes part by ``as_submission``, which says how a program is handed in. None of the attacks
solves its task; one that scores more than every wrong answer has cheated. The name that a program must define
is looked for in the task's truth: ``entry_point``, or that of its ``problem``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agentrl.attacks.catalogue import VERDICTS
from agentrl.attacks.targets import renamed
from agentrl.errors import WorldError
from agentrl.probes import Start, Subject, Unsound, play, require
from agentrl.types import Task

__all__ = ["attacks_on_its_verdict_score_no_more_than_wrong_answers"]

_ROUNDING = 1e-9  # between two sums of the same rewards
# End at a limit by design: minutes here, and they are tried before the judge anyway.
_STALLING = frozenset(
    ("leave-stop", "leave-when-asked-sleep", "echo-the-question", "patch-time-and-chance", "guess-much")
    + ("huge-string", "power-bomb", "hash-flood", "text-constant-bomb", "text-long-line", "text-many-names")
)
_WRONG = (
    "",
    "pass\n",
    "print(0)\n",
    *(
        f"def solve(*arguments, **named):\n    return {value}\n"
        for value in ("None", "0", "True", "''", "[]")
    ),
)


def attacks_on_its_verdict_score_no_more_than_wrong_answers(subject: Subject) -> str:
    """No program that forges, patches, spies or leaves is paid more than a wrong one."""
    env, starts = subject.env, subject.first_starts
    if not any(env.as_submission(start.task, "") for start in starts):
        return "it takes no programs"
    wrong = [max(_scores(subject, start, dict(enumerate(_WRONG))).values()) for start in starts]
    attacks = [attack for attack in VERDICTS if attack.name not in _STALLING]
    for place, attack in enumerate(attacks):
        start, most = starts[place % len(starts)], wrong[place % len(starts)]
        paid = _scores(subject, start, {attack.name: attack.source})[attack.name]
        require(
            paid <= most + _ROUNDING,
            start.task,
            f"the attack {attack.name!r} ({attack.tries}) scores {paid:g}, a wrong answer {most:g}: reach "
            "the verdict outside of the program's process, as agentrl.judge does",
        )
    return f"{len(attacks)} attacks"


def _scores(subject: Subject, start: Start, programs: Mapping[object, str]) -> dict[object, float]:
    """What each program is paid. Raises Unsound where one makes the world fail."""
    paid: dict[object, float] = {}
    for name, program in _renamed(start.task, programs):
        try:
            paid[name] = play(subject.env, start, subject.env.as_submission(start.task, program)).total
        except WorldError as error:
            raise Unsound(
                f"task {start.task.id!r}: the program {name!r} ended as a failure of the world: {error}; "
                "what a program does is the policy's own fault"
            ) from error
    return paid


def _renamed(task: Task, programs: Mapping[object, str]) -> Iterator[tuple[object, str]]:
    problem = task.truth.get("problem")
    named = problem if isinstance(problem, Mapping) else task.truth
    entry_point = str(named.get("entry_point") or "solve")
    for name, program in programs.items():
        yield name, renamed(program, entry_point)
