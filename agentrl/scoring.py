"""Checks of what an environment pays: gold the most, what is worth nothing the least, and the same twice."""

from __future__ import annotations

from agentrl.probes import Start, Subject, Unsound, gold_of, play, require
from agentrl.reward import as_score
from agentrl.types import Score

__all__ = [
    "a_copied_tool_result_scores_the_minimum",
    "a_list_of_guesses_scores_the_minimum",
    "an_empty_message_scores_the_minimum",
    "gold_scores_the_maximum",
    "nothing_said_scores_the_minimum",
    "scoring_twice_agrees",
    "the_task_repeated_scores_the_minimum",
]

_ROUNDING = 1e-9  # between two sums of the same rewards


def gold_scores_the_maximum(subject: Subject) -> str:
    """Gold ends its episode, scores more than an empty message, and no less than any probe."""
    for start, worth in subject.worths:
        gold = play(subject.env, start, gold_of(subject.env, start.task), until_over=False)
        ended = bool(gold.steps) and gold.steps[-1][2]
        require(ended, start.task, "the episode goes on, or was truncated, after the last message of gold")
        nothing = worth["an empty message"]
        note = gold.steps[-1][4].get("reward_note")
        why = f" ({note})" if note else ""
        require(
            gold.total > nothing,
            start.task,
            f"gold scores {gold.total:g}{why}, an empty message {nothing:g}: gold must score more",
        )
        for name, value in worth.items():
            require(
                gold.total >= value - _ROUNDING,
                start.task,
                f"gold scores {gold.total:g}{why}, less than {name}: {value:g}",
            )
    return f"gold of {len(subject.worths)} tasks"


def nothing_said_scores_the_minimum(subject: Subject) -> str:
    """An episode that is cut off before its first message."""
    return _scores_the_minimum(subject, "nothing said")


def an_empty_message_scores_the_minimum(subject: Subject) -> str:
    """Empty messages until the episode is over."""
    return _scores_the_minimum(subject, "an empty message")


def the_task_repeated_scores_the_minimum(subject: Subject) -> str:
    """The prompt, repeated."""
    return _scores_the_minimum(subject, "the task repeated")


def a_list_of_guesses_scores_the_minimum(subject: Subject) -> str:
    r"""``\\boxed{1} ... \\boxed{1000}``: one of them may well be right."""
    return _scores_the_minimum(subject, "a list of guesses")


def a_copied_tool_result_scores_the_minimum(subject: Subject) -> str:
    """Gold's calls, and then their last result without the answer's format."""
    return _scores_the_minimum(subject, "a copied tool result")


def scoring_twice_agrees(subject: Subject) -> str:
    """Asked again about the same conversation, ``score()`` says the same."""
    count = 0
    for start in subject.starts:
        for said in (gold_of(subject.env, start.task), ()):
            play(subject.env, start, said)
            first, second = _score(subject), _score(subject)
            require(
                (first.value, first.parts) == (second.value, second.parts),
                start.task,
                f"scored twice, a conversation is worth {first.value:g}, then {second.value:g}: a reward "
                "keeps nothing between calls and draws nothing",
            )
            count += 1
    return f"{count} episodes"


def _score(subject: Subject) -> Score:
    return as_score(subject.env.score(), type(subject.env).__qualname__)


def _scores_the_minimum(subject: Subject, probe: str) -> str:
    """No probe scores less than this one: what is worth nothing must never pay."""
    if probe in subject.env.declared:
        return f"declared: {subject.env.declared[probe]}"
    tried: list[Start] = []
    for start, worth in subject.worths:
        if probe not in worth:
            continue
        tried.append(start)
        lowest = min(worth, key=lambda name: worth[name])
        if worth[probe] > worth[lowest] + _ROUNDING:
            raise Unsound(
                f"task {start.task.id!r}: {probe} scores {worth[probe]:g}, more than {lowest}: "
                f"{worth[lowest]:g}; pay the minimum for it, or say why not in declared[{probe!r}]"
            )
    return f"{len(tried)} tasks" if tried else "there is none to try"
