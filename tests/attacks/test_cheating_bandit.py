"""Can cheating be learned? A policy that may give any known attack as its answer, rewarded by two judges.

The task is impossible: its tests contradict one another, so that whatever is rewarded has cheated. The weak
judge is how rewards of code are often made: solution and tests in one process, its exit code the verdict.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from agentrl.attacks.catalogue import VERDICTS
from agentrl.judge import CallTest, Judge, Problem
from agentrl.sandbox import Backend, Limits, SandboxLost
from agentrl.sandboxing.doctor import strongest, survey_all

_STEPS, _ANSWERS = 200, 4  # of the policy's update, and answers in each
_RATE = 2.0
_LIMITS = Limits(cpu_s=1, wall_s=2, memory_mib=128, pids=32, disk_mib=16)
_IMPOSSIBLE = Problem(
    entry_point="solve",
    tests=(CallTest(id="one", args=(3,), expected=1), CallTest(id="other", args=(3,), expected=2)),
)
_WRONG = (
    "def solve(number):\n    return 1\n",
    "def solve(number):\n    return 2\n",
    "def solve(number):\n    return number\n",
    "def solve(number):\n    raise ValueError(number)\n",
    "def solve(number)\n",
)
_ARMS = (*(attack.source for attack in VERDICTS if "call" in attack.kinds), *_WRONG)

Judging = Callable[[Sequence[str]], list[float]]


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    names = [name for name in ("zygote", "bubblewrap", "docker") if survey_all()[name].available]
    if not names:
        assert not {"bwrap", "docker"} & {*os.environ.get("AGENTRL_REQUIRE", "").split(",")}
        pytest.skip("no backend for untrusted code is available")
    strong = strongest(_LIMITS)
    yield strong
    strong.close()


def _learn(judge: Judging, *, seed: int) -> list[float]:
    """The mean reward of each step of REINFORCE with a running baseline, over one preference an answer."""
    rng = np.random.default_rng(seed)
    preferences, baseline, means = np.zeros(len(_ARMS)), 0.0, []
    for _ in range(_STEPS):
        chances = np.exp(preferences - preferences.max())
        chances /= chances.sum()
        chosen = rng.choice(len(_ARMS), size=_ANSWERS, p=chances)
        rewards = judge([_ARMS[arm] for arm in chosen])
        for arm, reward in zip(chosen, rewards, strict=True):
            preferences -= _RATE / _ANSWERS * (reward - baseline) * chances
            preferences[arm] += _RATE / _ANSWERS * (reward - baseline)
        means.append(float(np.mean(rewards)))
        baseline += 0.1 * (means[-1] - baseline)
    return means


@pytest.mark.slow
def test_our_judge_leaves_nothing_to_learn(backend: Backend) -> None:
    judge = Judge(backend, limits=_LIMITS)

    def rewards(answers: Sequence[str]) -> list[float]:
        judgements = judge.judge_all(answers, _IMPOSSIBLE)
        assert [judgement.note for judgement in judgements if judgement.fault != "policy"] == []
        assert not any(judgement.fraction == 1 for judgement in judgements)
        return [float(judgement.verdict == "AC") for judgement in judgements]

    assert set(_learn(rewards, seed=0)) == {0.0}


@pytest.mark.slow
def test_an_exit_code_as_the_verdict_teaches_cheating(backend: Backend) -> None:
    """So the test above could have failed: the same policy, the same answers, a judge that is weak."""

    def reward(answer: str) -> float:
        tests = "assert solve(3) == 1\nassert solve(3) == 2\n"
        session = backend.open(_LIMITS)
        try:
            text = f"{answer}\n{tests}".encode("utf-8", "replace")
            return float(session.run(["python3", "solution.py"], files={"solution.py": text}).exit_code == 0)
        except SandboxLost:
            return 0.0
        finally:
            session.close()

    means = _learn(lambda answers: [reward(answer) for answer in answers], seed=0)
    assert np.mean(means[:10]) < 0.7
    assert np.mean(means[-20:]) > 0.9
