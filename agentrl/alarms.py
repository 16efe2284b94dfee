"""Alarms for a run that goes wrong: rows of metrics in, alarms out, nothing printed and no clock read.

A rule watches one metric. It raises an alarm when the value has reached its limit in so many steps running,
once, and again only after the value has been inside the limit for ``CALM_STEPS`` steps running. A step that
does not have the metric (no update was made) neither raises nor calms; a value that is not finite counts as
beyond the limit. The rows alone decide: a resumed run that is handed its rows goes on as if it had not
stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["BEGINNING_STEPS", "CALM_STEPS", "RULES", "Alarm", "Alarms", "Rule"]

CALM_STEPS = 5  # inside the limit before the same alarm may come again: a value at its limit is said once
BEGINNING_STEPS = 5  # whose mean is a metric's beginning: one step's entropy scatters by a fifth


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When a metric is an alarm."""

    name: str  # what goes wrong, in a few words
    key: str  # of the metric
    side: Literal["above", "below"]  # of the limit that is bad; the limit itself is bad, too
    limit: float  # in the metric's unit; with ``relative`` in units of its beginning
    relative: bool = False  # to the mean of its first BEGINNING_STEPS finite values
    steps: int  # running that the value is bad before the alarm
    hint: str  # what to do

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"the rule {self.name!r} has steps={self.steps}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A rule that was broken; ``str()`` is the line for people."""

    name: str  # the rule's
    key: str  # of the metric
    step: int  # of the run, from 1
    value: float  # of the metric at that step; nan where the row has none that is finite
    threshold: float  # in the metric's unit
    side: Literal["above", "below"]  # of the threshold
    steps: int  # running that it was so
    hint: str  # what to do

    def __str__(self) -> str:
        lasting = f" for {self.steps} steps" if self.steps > 1 else ""
        return (
            f"alarm at step {self.step}: {self.name}: {self.key} is {self.value:.4g}, at or {self.side} "
            f"{self.threshold:.4g}{lasting}; next: {self.hint}"
        )


# Each limit is beyond what healthy runs do and before what ruins one; where a number is not a convention, its
# reason stands beside it.
RULES: tuple[Rule, ...] = (
    Rule(
        name="entropy collapses",
        key="loss/entropy",
        side="below",
        limit=0.05,  # learning itself takes a policy to about a tenth: it becomes sure of what is right
        relative=True,
        steps=5,
        hint="the policy hardly explores any more; raise rollout.temperature or, with several minibatches, "
        "algorithm.clip_high, lower optimizer.learning_rate, or stop here if held-out pass@1 is good enough",
    ),
    Rule(
        name="entropy is almost zero",
        key="loss/entropy",
        side="below",
        limit=0.001,  # nats: e^0.001 choices a token, so the siblings of a group say the same
        steps=5,
        hint="siblings say the same, so nothing is left to compare; begin from an earlier checkpoint or from "
        "a base that was trained less, and lower optimizer.learning_rate",
    ),
    Rule(
        name="entropy explodes",
        key="loss/entropy",
        side="above",
        limit=3.0,  # exploration doubles it at times and comes back; texts that fall apart do not
        relative=True,
        steps=3,
        hint="the texts fall apart; lower optimizer.learning_rate or algorithm.clip_high, or set "
        "algorithm.kl, and read trajectories/",
    ),
    Rule(
        name="no reward spread",
        key="group/informative",
        side="below",
        limit=0.0,
        steps=5,  # a single such step happens with few or hard tasks
        hint="all siblings get the same reward, so nothing is learnt; with a low reward/mean take easier "
        "tasks, a warm_start or a larger rollout.group_size, with a high one harder tasks",
    ),
    Rule(
        name="programs try to cheat",
        key="sandbox/hack_flags",
        side="above",
        limit=0.25,  # flags an episode: a program that calls exit() has one, now and then by mistake
        steps=3,
        hint="read the programs in trajectories/; see that agentrl check ENV and agentrl sandbox selfcheck "
        "--adversarial hold here",
    ),
    Rule(
        name="the policy jumps",
        key="loss/policy_kl",
        side="above",
        limit=0.05,  # nats a token within one step; PPO's usual early stop is at 0.015 (Spinning Up)
        steps=1,  # one such step can ruin a policy
        hint="one step changed the policy a lot; lower optimizer.learning_rate, optimizer.grad_clip or "
        "algorithm.minibatches",
    ),
    Rule(
        name="the policy is far from its reference",
        key="loss/kl",
        side="above",
        limit=1.0,  # nats a token: a typical token is e times likelier than under the base
        steps=5,
        hint="raise algorithm.kl or lower optimizer.learning_rate, and look in trajectories/ for a hacked "
        "reward",
    ),
    Rule(
        name="too much is clipped",
        key="loss/clip_fraction",
        side="above",
        limit=0.1,  # of tokens; healthy updates of language models clip about one in a hundred
        steps=3,
        hint="the updates are larger than their clip range; lower optimizer.learning_rate or "
        "algorithm.minibatches",
    ),
    Rule(
        name="episodes end at the token limit",
        key="episode/cut",
        side="above",
        limit=0.25,  # of episodes: their reward says nothing of what they would have answered
        steps=5,
        hint="raise rollout.max_turn_tokens or rollout.max_episode_tokens if the texts make sense, else see "
        "whether the policy forgot how to end a turn (trajectories/)",
    ),
    Rule(
        name="texts repeat themselves",
        key="episode/repeated",
        side="above",
        limit=0.2,  # of episodes
        steps=3,
        hint="the policy loops; lower optimizer.learning_rate or set algorithm.kl, go back to an earlier "
        "checkpoint, and see that the reward does not pay for length",
    ),
    Rule(
        name="calls are malformed",
        key="call/bad",
        side="above",
        limit=0.5,  # of calls
        steps=5,
        hint="the policy does not speak the tool-call format, or no longer; begin with a warm_start, or go "
        "back to an earlier checkpoint and lower optimizer.learning_rate",
    ),
    Rule(
        name="engine and learner disagree",
        key="mismatch/kl",
        side="above",
        limit=0.02,  # nats a token: 100 tokens are 2 nats apart; below 0.001 in bfloat16
        steps=3,
        hint="what is trained is not what was sampled; set model.dtype to float32, lower "
        "algorithm.max_staleness, and see that both sides have the same weights and temperature",
    ),
    Rule(
        name="importance weights are uneven",
        key="mismatch/ess",
        side="below",
        limit=0.7,  # of the tokens: weights that scatter by two thirds of their mean
        steps=3,
        hint="few tokens do most of the learning; lower algorithm.max_staleness or optimizer.learning_rate, "
        "and see mismatch/kl",
    ),
    Rule(
        name="stale samples are dropped",
        key="staleness/dropped",
        side="above",
        limit=1,  # steps run no further ahead than is allowed: the engine serves older weights than it got
        steps=3,
        hint="what was sampled is thrown away; see that the engine takes new weights while it samples, or "
        "raise algorithm.max_staleness",
    ),
    Rule(
        name="the world fails",
        key="episode/valid",
        side="below",
        limit=0.9,  # of episodes; above 2 % invalid an evaluation has no headline either
        steps=3,
        hint="episodes are lost to failures that are not the policy's; fault/* names the boundary: see that "
        "its tools, sandbox and engine answer within rollout.deadline_s",
    ),
)


class Alarms:
    """Watches a run step by step."""

    def __init__(
        self,
        past: Iterable[Mapping[str, Any]] = (),  # rows of metrics.jsonl that a resumed run goes on behind
        *,
        rules: Sequence[Rule] = RULES,
    ) -> None:
        self._watches = [_Watch(rule) for rule in rules]
        for row in past:
            if row["phase"] == "train":
                self.watch(row["step"], row)

    def watch(self, step: int, row: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that begin at ``step``, in the order of the rules; mostly none."""
        return [alarm for watch in self._watches for alarm in watch.see(step, row)]


class _Watch:
    """One rule and what it has seen."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._beginning: list[float] = []
        self._bad = 0  # steps running
        self._calm = 0  # steps running
        self._raised = False

    def see(self, step: int, row: Mapping[str, Any]) -> Iterator[Alarm]:
        """The alarm, where one begins."""
        rule = self._rule
        if rule.key not in row:
            return
        value = math.nan if row[rule.key] is None else float(row[rule.key])
        threshold = self._threshold(value)
        if threshold is None:
            return
        self._count(self._is_bad(value, threshold))
        if self._bad >= rule.steps and not self._raised:
            self._raised = True
            yield Alarm(
                name=rule.name,
                key=rule.key,
                step=step,
                value=value,
                threshold=threshold,
                side=rule.side,
                steps=rule.steps,
                hint=rule.hint,
            )

    def _threshold(self, value: float) -> float | None:
        """In the metric's unit; None while the beginning that it refers to is not known."""
        if not self._rule.relative:
            return self._rule.limit
        if len(self._beginning) == BEGINNING_STEPS:
            return self._rule.limit * math.fsum(self._beginning) / BEGINNING_STEPS
        if math.isfinite(value):
            self._beginning.append(value)
        return None

    def _is_bad(self, value: float, threshold: float) -> bool:
        if not math.isfinite(value):
            return True
        return value >= threshold if self._rule.side == "above" else value <= threshold

    def _count(self, bad: bool) -> None:
        self._bad = self._bad + 1 if bad else 0
        self._calm = 0 if bad else self._calm + 1
        if self._calm >= CALM_STEPS:
            self._raised = False
