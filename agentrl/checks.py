"""Is this a sound environment? Checks that any author can run: ``agentrl check my_package.shop:Shop``.

Each check is one function whose name and docstring say what holds. It raises ``Unsound`` where that does not
hold, and returns what it looked at. A check in which the environment crashes has failed, with its exception.
What an environment does on purpose it says, with the reason, in its ``declared``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from agentrl import contract, isolation, resources, robustness, scoring
from agentrl.attacks import cheating
from agentrl.env import Env
from agentrl.probes import Subject, Unsound
from agentrl.registry import make

__all__ = ["Report", "Row", "Unsound", "check", "check_environment"]

_CHECKS: tuple[Callable[[Subject], str], ...] = (
    contract.follows_gymnasium,
    contract.tells_what_its_spaces_promise,
    contract.describes_its_tools,
    contract.keeps_its_splits_apart,
    contract.declares_what_there_is,
    isolation.repeats_itself,
    isolation.draws_by_its_seed,
    isolation.starts_siblings_alike,
    isolation.keeps_episodes_apart,
    isolation.hides_the_truth,
    isolation.pickles_for_vector_environments,
    scoring.gold_scores_the_maximum,
    scoring.nothing_said_scores_the_minimum,
    scoring.an_empty_message_scores_the_minimum,
    scoring.the_task_repeated_scores_the_minimum,
    scoring.a_list_of_guesses_scores_the_minimum,
    scoring.a_copied_tool_result_scores_the_minimum,
    scoring.scoring_twice_agrees,
    cheating.attacks_on_its_verdict_score_no_more_than_wrong_answers,
    robustness.survives_random_actions,
    robustness.answers_malformed_calls,
    robustness.answers_unknown_tools,
    robustness.answers_parallel_calls,
    robustness.leaves_errors_of_tools_their_fates,
    robustness.gives_slow_tools_up,
    robustness.takes_ten_megabytes_of_text,
    robustness.cuts_ten_megabytes_of_result,
    resources.keeps_memory_flat,
    resources.keeps_descriptors_flat,
)


@dataclass(frozen=True, slots=True)
class Row:
    """The outcome of one check."""

    name: str
    passed: bool
    detail: str  # what was looked at, or what is wrong


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of all checks of one environment."""

    target: str  # what was checked
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'ok  ' if row.passed else 'FAIL'}  {row.name}: {row.detail}" for row in self.rows]
        return "\n".join([self.target, *lines])


def check(
    target: str | type[Env] | Env | Callable[..., Env],
    *,
    episodes: int = 20,
    endurance: int = 1000,
    **kwargs: Any,
) -> Report:
    """Check the environment of a name, a class, a factory or an instance, also under a running event loop.

    ``kwargs`` make the environment where it is not an instance. Raises UserError where it can't be made.
    """
    return check_environment(make(target, **kwargs), episodes=episodes, endurance=endurance)


def check_environment(
    target: str | type[Env] | Env | Callable[..., Env], *, episodes: int = 20, endurance: int = 1000
) -> Report:
    """Run every check; those that play episodes play ``episodes`` tasks of each split.

    Memory and descriptors must stay flat over ``endurance`` episodes. Some checks play in environments of
    their own, made of the same class and settings as ``target``. Raises UserError where it can't be made,
    or where this host lacks what it needs.
    """
    env = cast("Env", make(target).unwrapped)
    env.check_made()
    env.check_host()
    subject = Subject(env, episodes=episodes, endurance=endurance)
    try:
        return Report(type(env).__qualname__, tuple(_row(holds, subject) for holds in _CHECKS))
    finally:
        if env is not target:
            env.close()


def _row(holds: Callable[[Subject], str], subject: Subject) -> Row:
    name = holds.__name__.replace("_", " ")
    try:
        with subject.closing_twins():
            return Row(name, True, holds(subject))
    except Unsound as found:
        return Row(name, False, str(found))
    # The checker's own boundary: what an unsound environment raises is a finding, and the other checks go on.
    except Exception as error:
        notes = getattr(error, "__notes__", ())
        return Row(name, False, "; ".join([f"{type(error).__name__}: {error}", *notes]))
