"""The loop: rollouts, advantages, update, publish; once for on-policy and for asynchronous training.

Rollouts may run ahead of the update by ``algorithm.max_staleness`` versions; 0 is strictly on-policy.
Held-out tasks are measured before, every ``evaluation.every`` steps and after. Ctrl-C and SIGTERM let the
step finish, save, and say how to resume; a second Ctrl-C stops at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import torch

from agentrl.advantages import ADVANTAGES, group_relative
from agentrl.chats import Chats
from agentrl.checkpoint import Checkpoints, State
from agentrl.config import RunConfig, config_digest, dump_config
from agentrl.configfile import load_config
from agentrl.engine import Adapter, Sampling
from agentrl.engines.embedded import EmbeddedEngine
from agentrl.env import Env
from agentrl.evaluation import (
    Evaluation,
    Measurement,
    compare,
    evaluation_plans,
    run_evaluation,
    tasks_available,
)
from agentrl.learner import Learner
from agentrl.log import Display, RunFolder, RunLog, read_rows
from agentrl.metrics import describe_groups
from agentrl.models import load_model, load_tokenizer
from agentrl.prepare import make_chats, make_schedule, prepare_base
from agentrl.registry import make
from agentrl.rollout import EpisodePlan, Rollouts
from agentrl.samples import to_samples
from agentrl.seeds import derive
from agentrl.show import plot_curve, summary_table
from agentrl.threads import in_compute_thread, run_sync
from agentrl.types import Group, Sample

__all__ = ["train"]

Summary = dict[str, Any]


def train(
    source: str | Path | Mapping[str, Any] | RunConfig,
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    resume: bool = False,
) -> Summary:
    """Run a configuration to its end and return its summary; blocks, also under a running event loop.

    ``source`` is a YAML file, a packaged configuration's name, an environment's name or a mapping;
    ``overrides`` are ``key=value``; ``model`` replaces the configured one. The summary is what
    ``summary.json`` holds: before, after and gain with 95 % intervals; ``{"stopped_at": step}`` where a
    signal ended the run early. Raises UserError.
    """
    config = source if isinstance(source, RunConfig) else load_config(source, overrides, model=model)
    with _StopSignal() as stop:
        return run_sync(_Run(config, stop, resume=resume).run())


class _StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop reads between steps."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Run:
    """One run of a configuration."""

    def __init__(self, config: RunConfig, stop: _StopSignal, *, resume: bool) -> None:
        self._config, self._stop, self._resume = config, stop, resume
        self._folder = RunFolder(Path(config.output) / config.name)
        self._checkpoints = Checkpoints(self._folder.checkpoints, keep=config.checkpoint.keep)
        self._digest = config_digest(config)
        self._began = time.perf_counter()

    async def run(self) -> Summary:
        """Prepare, evaluate, train, evaluate."""
        if self._resume and self._folder.summary.is_file():
            return dict(json.loads(self._folder.summary.read_text()))  # nothing is left to do
        latest = self._checkpoints.latest() if self._resume else None
        restored = self._checkpoints.read(latest, digest=self._digest) if latest else None
        done = restored[0].step if restored else 0
        with (
            Display() as self._display,
            RunLog(
                self._folder,
                config_text=dump_config(self._config),
                trackers=self._config.log.trackers,
                transcripts=self._config.log.transcripts,
                resume_after=done if self._resume else None,
            ) as self._log,
        ):
            await self._load()
            try:
                if restored:
                    await self._restore(*restored)
                before = await self._before(done)
                if not await self._steps(done):
                    return {"stopped_at": self._done}
                return await self._finish(before)
            finally:
                await self._engine.close()

    async def _load(self) -> None:
        """The base model, the engine and the learner over it, and what episodes need."""
        config = self._config
        base = await prepare_base(config, self._make_env, log=self._log, display=self._display)
        model = await in_compute_thread(
            load_model, base, dtype=config.model.dtype, device="cuda" if torch.cuda.is_available() else "cpu"
        )
        chats = make_chats(config, load_tokenizer(base), model, on_certificate=self._display.note)
        self._engine = EmbeddedEngine(model, max_sequences=config.engine.max_sequences)
        self._learner = Learner(  # after the engine, which takes the model without an adapter
            model,
            lora=config.lora,
            algorithm=config.algorithm,
            optimizer=config.optimizer,
            batch=config.batch,
            steps=config.steps,
        )
        self._version = 0
        self._rollouts = self._make_rollouts(chats)
        self._schedule = make_schedule(config, self._make_env(), "train")

    async def _restore(self, state: State, adapter: Adapter, optimizer: dict[str, Any]) -> None:
        self._learner.restore(adapter, optimizer)
        self._version = state.version
        await self._engine.load(adapter, state.version)

    def _make_env(self) -> Env:
        return make(self._config.environment.id, **self._config.environment.args)

    def _make_rollouts(self, chats: Chats) -> Rollouts:
        return Rollouts(
            self._make_env,
            chat=chats,
            engine=self._engine,
            limits=self._config.rollout,
            in_flight=self._config.engine.max_sequences,
            deterministic=self._config.engine.deterministic,
        )

    # -- steps --

    async def _steps(self, start: int) -> bool:
        """Train from ``start`` steps done to the end; False where a signal ended it early."""
        config, ahead, following = self._config, deque[asyncio.Task[list[Group]]](), start
        self._done = start
        with self._display.bar("training", total=config.steps) as bar:
            bar.advance(start)
            for step in range(start, config.steps):
                while len(ahead) <= config.algorithm.max_staleness and following < config.steps:
                    ahead.append(asyncio.create_task(self._roll_out(following)))
                    following += 1
                began = time.perf_counter()
                groups = await ahead.popleft()
                row = describe_groups(groups) | {"time/rollout_s": time.perf_counter() - began}
                row |= await self._update(step, groups)
                self._done = step + 1
                row["time/step_s"] = time.perf_counter() - began
                self._log.step(self._done, row)
                self._log.transcripts(self._done, groups)
                bar.advance(note=f"reward {row.get('reward/mean', float('nan')):.3f}")
                every = config.evaluation.every
                if every and self._done % every == 0 and self._done < config.steps:
                    point = _point(await self._evaluate(tasks=config.evaluation.curve_tasks))
                    self._log.step(self._done, point, phase="evaluation")
                if self._stop.requested:
                    break
                if self._done % config.checkpoint.every == 0:
                    self._save()
        for task in ahead:
            task.cancel()
        if start < config.steps:
            path = self._save()
            if self._stop.requested:
                self._display.note(
                    f"stopped after step {self._done} of {config.steps}, saved in {path}; "
                    "go on with the same command and --resume"
                )
        return not self._stop.requested

    async def _roll_out(self, step: int) -> list[Group]:
        """The groups of a step."""
        config = self._config
        rollout, split = config.rollout, config.environment.train
        indices = self._schedule.take(step * rollout.tasks_per_step, rollout.tasks_per_step)
        plans = [
            EpisodePlan(
                split=split,
                index=index,
                sibling=sibling,
                env_seed=derive(config.seed, "environment", step, place) % 2**32,
                seed=derive(config.seed, "rollout", step, place, sibling),
            )
            for place, index in enumerate(indices)
            for sibling in range(rollout.group_size)
        ]
        sampling = Sampling(max_tokens=rollout.max_turn_tokens, seed=0, temperature=rollout.temperature)
        return await self._rollouts.groups(plans, sampling=sampling)

    async def _update(self, step: int, groups: Sequence[Group]) -> dict[str, float]:
        """One update and the swap of the adapter in the engine; nothing where no group is informative."""
        samples = self._with_advantages(step, groups)
        if not any(sample.advantages is not None and sample.advantages.any() for sample in samples):
            return {"time/update_s": 0.0, "time/load_s": 0.0}
        began = time.perf_counter()
        metrics = await in_compute_thread(
            self._learner.update,
            samples,
            step=step,
            temperature=self._config.rollout.temperature,
            seed=derive(self._config.seed, "minibatches", step),
        )
        updated = time.perf_counter()
        self._version += 1
        await self._engine.load(self._learner.publish(), self._version)
        swap = {"time/update_s": updated - began, "time/load_s": time.perf_counter() - updated}
        return metrics | swap

    def _with_advantages(self, step: int, groups: Sequence[Group]) -> list[Sample]:
        """The samples of the valid episodes, each with its episode's advantage."""
        algorithm = self._config.algorithm
        samples: list[Sample] = []
        for place, group in enumerate(groups):
            rewards = [trajectory.reward for trajectory in group.valid]
            if algorithm.shuffle_rewards:
                generator = np.random.default_rng(derive(self._config.seed, "shuffle", step, place))
                rewards = generator.permutation(rewards).tolist()
            if rewards:
                episodes = [to_samples(trajectory) for trajectory in group.valid]
                samples += group_relative(rewards, episodes, estimator=ADVANTAGES[algorithm.advantage])
        return samples

    def _save(self) -> Path:
        state = State(self._done, self._version, self._digest)
        return self._checkpoints.save(
            state, adapter=self._learner.publish(), optimizer=self._learner.optimizer_state()
        )

    # -- evaluations --

    async def _before(self, done: int) -> Measurement:
        """The base's measurement: made now, or read back where the run goes on behind it."""
        path = self._folder.before
        if done and path.is_file():
            return Measurement.read(path)
        measured = await self._measure("before")
        measured.write(path)
        self._log.step(0, _point(measured.sampled), phase="evaluation")
        return measured

    async def _finish(self, before: Measurement) -> Summary:
        """Measure the trained policy; write the summary, the curve and the table."""
        after = await self._measure("after")
        gain = {f"pass@{k}": compare(before.sampled, after.sampled, k) for k in before.sampled.k}
        summary = {
            "before": before.figures,
            "after": after.figures,
            "gain": {name: dataclasses.asdict(estimate) for name, estimate in gain.items()},
            "tasks": len(after.sampled.counts),
            "steps": self._config.steps,
            "seed": self._config.seed,
            "seconds": time.perf_counter() - self._began,
        }
        if self._config.steps:
            self._log.step(self._config.steps, _point(after.sampled), phase="evaluation")
        self._log.summary(summary)
        plot_curve(read_rows(self._folder), self._folder.curve, title=self._config.name)
        self._display.show(summary_table(summary))
        self._display.note(f"{summary['seconds']:.0f} s; learning curve: {self._folder.curve}")
        return summary

    async def _measure(self, name: str) -> Measurement:
        settings = self._config.evaluation
        sampled = await self._evaluate(tasks=settings.tasks, name=name)
        greedy = None
        if settings.greedy:
            greedy = await self._evaluate(tasks=settings.tasks, name=f"{name}, greedy", greedy=True)
        return Measurement(sampled, greedy)

    async def _evaluate(self, *, tasks: int, name: str = "", greedy: bool = False) -> Evaluation:
        """Held-out episodes; the same tasks and seeds whenever it is called."""
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
            tasks=tasks_available(self._make_env(), split, wanted=tasks),
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
