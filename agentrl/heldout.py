"""The held-out tasks of a run: measured before the first step, in between for the curve, and after the last.

Every measurement has the same tasks and seeds. What was measured or written before a kill is not done twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from agentrl.config import RunConfig
from agentrl.engine import Sampling
from agentrl.env import Env
from agentrl.evaluation import Evaluation, Measurement, evaluation_plans, run_evaluation, tasks_available
from agentrl.files import writing
from agentrl.log import Display, RunLog
from agentrl.rollout import Rollouts

__all__ = ["HeldOut"]


class HeldOut:
    """Measures the policy that the engine of ``rollouts`` has at the moment."""

    def __init__(
        self,
        config: RunConfig,
        rollouts: Rollouts,
        *,
        make_env: Callable[[], Env],
        log: RunLog,
        display: Display,
    ) -> None:
        self._config, self._rollouts, self._make_env = config, rollouts, make_env
        self._log, self._display = log, display

    async def before(self) -> Measurement:
        """The base's measurement: made now, or read back where the run goes on behind it."""
        path = self._log.folder.before
        if path.is_file():
            measured = Measurement.read(path)
        else:
            measured = await self._measure("before", path)
        self._log_point(0, measured.sampled)
        return measured

    async def between(self, step: int) -> float | None:
        """A point of the curve after ``step``; its score, which is pass@k of the smallest k, None above 2 %
        invalid episodes."""
        evaluation = await self._evaluate(tasks=self._config.evaluation.curve_tasks)
        self._log_point(step, evaluation)
        headline = evaluation.reports[f"pass@{min(evaluation.k)}"].headline
        return None if headline is None else headline.value

    async def after(self) -> Measurement:
        """The trained policy's measurement, the last point of the curve."""
        measured = await self._measure("after", self._log.folder.after)
        self._log_point(self._config.steps, measured.sampled)
        return measured

    def _log_point(self, step: int, evaluation: Evaluation) -> None:
        if not self._log.has(step, phase="evaluation"):
            self._log.step(step, _point(evaluation), phase="evaluation")

    async def _measure(self, name: str, path: Path) -> Measurement:
        settings = self._config.evaluation
        sampled = await self._evaluate(tasks=settings.tasks, name=name)
        greedy = None
        if settings.greedy:
            greedy = await self._evaluate(tasks=settings.tasks, name=f"{name}, greedy", greedy=True)
        measured = Measurement(sampled, greedy)
        with writing(path):
            measured.write(path)
        return measured

    async def _evaluate(self, *, tasks: int, name: str = "", greedy: bool = False) -> Evaluation:
        settings, split = self._config.evaluation, self._config.environment.held_out
        sampling = Sampling(
            max_tokens=self._config.rollout.max_turn_tokens,
            seed=0,
            temperature=0.0 if greedy else settings.temperature,
            top_p=1.0 if greedy else settings.top_p,
            top_k=0 if greedy else settings.top_k,
        )
        plans = evaluation_plans(
            split=split,
            tasks=tasks_available(self._make_env, split, wanted=tasks),
            samples=1 if greedy else settings.samples,
            seed=self._config.seed,
        )
        k = (1,) if greedy else settings.k
        if not name:
            return await run_evaluation(self._rollouts, plans, sampling=sampling, k=k)
        with self._display.bar(f"evaluation {name}", total=len(plans)) as bar:
            on_episode: Callable[[], None] = bar.advance
            return await run_evaluation(self._rollouts, plans, sampling=sampling, k=k, on_episode=on_episode)


def _point(evaluation: Evaluation) -> dict[str, float]:
    """An evaluation as metrics: ``eval/pass@1`` with ``_low`` and ``_high``."""
    point = {} if evaluation.mean_return is None else {"eval/return": evaluation.mean_return}
    for name, report in evaluation.reports.items():
        if report.headline is not None:
            figures = dataclasses.asdict(report.headline)
            point |= {f"eval/{name}": figures["value"]}
            point |= {f"eval/{name}_{side}": figures[side] for side in ("low", "high")}
    return point
