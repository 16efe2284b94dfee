"""Can a reward that judges programs be cheated? The catalogue's attacks on verdicts, as the policy's answer.

An environment takes part by ``as_submission``, which says how a program is handed in, alone or with files.
None of the attacks solves its task; one that scores more than every wrong answer has cheated. The name that a
program must define is looked for in the task's truth: ``entry_point``, or that of its ``problem``; with none,
``as_submission`` is to map ``solve`` to what the task asks for.
"""

from __future__ import annotations

from collections.abc import Mapping

from agentrl.attacks.catalogue import VERDICTS
from agentrl.attacks.targets import renamed
from agentrl.env import Env
from agentrl.errors import WorldError
from agentrl.probes import Start, Subject, Unsound, play, require, same
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
    wrong = [max(_paid(subject, start, text, text) for text in _WRONG) for start in starts]
    attacks = [attack for attack in VERDICTS if attack.name not in {*_STALLING, *env.declared}]
    if not _takes_files(env, starts[0].task):
        attacks = [attack for attack in attacks if not attack.files]
    for place, attack in enumerate(attacks):
        start, most = starts[place % len(starts)], wrong[place % len(starts)]
        paid = _paid(subject, start, attack.source, attack.name, attack.files)
        require(
            paid <= most + _ROUNDING,
            start.task,
            f"the attack {attack.name!r} ({attack.tries}) scores {paid:g}, a wrong answer {most:g}: reach "
            "the verdict outside of the program's process, as agentrl.judge does, or say in "
            f"declared[{attack.name!r}] why that can't be",
        )
    declared = [attack.name for attack in VERDICTS if attack.name in env.declared]
    return f"{len(attacks)} attacks" + "".join(f"; declared: {name}" for name in declared)


def _paid(
    subject: Subject, start: Start, program: str, name: str, files: Mapping[str, str] | None = None
) -> float:
    """What a program is paid. Raises Unsound where it makes the world fail."""
    answer = subject.env.as_submission(start.task, renamed(program, _entry_point(start.task)), files)
    try:
        return play(subject.env, start, answer).total
    except WorldError as error:
        raise Unsound(
            f"task {start.task.id!r}: the program {name!r} ended as a failure of the world: {error}; "
            "what a program does is the policy's own fault"
        ) from error


def _takes_files(env: Env, task: Task) -> bool:
    return not same(env.as_submission(task, ""), env.as_submission(task, "", {"beside.py": ""}))


def _entry_point(task: Task) -> str:
    problem = task.truth.get("problem")
    named = problem if isinstance(problem, Mapping) else task.truth
    return str(named.get("entry_point") or "solve")
