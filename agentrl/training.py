"""The loop: rollouts, advantages, update, publish; once for on-policy and for asynchronous training.

Rollouts may run ahead of the update by ``algorithm.max_staleness`` versions; 0 is strictly on-policy.
Held-out tasks are measured before, every ``evaluation.every`` steps and after. Ctrl-C and SIGTERM let the
step finish, save, and say how to resume; a second one stops at once, as does one before or after the steps,
where nothing would be saved.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import torch

from agentrl.advantages import ADVANTAGES, group_relative
from agentrl.chats import Chats
from agentrl.checkpoint import Checkpoints, State, check_same_configuration
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
    signal ended the run early. Raises UserError, and KeyboardInterrupt for a signal between the steps' ends.
    """
    config = source if isinstance(source, RunConfig) else load_config(source, overrides, model=model)
    with _StopSignal() as stop:
        try:
            return run_sync(_Run(config, stop, resume=resume).run())
        except KeyboardInterrupt:
            Display().note("interrupted; the same command with --resume goes on from what was saved last")
            raise


class _StopSignal:
    """Turns the first Ctrl-C or SIGTERM while steps run into a request that the loop reads between them."""

    def __init__(self) -> None:
        self.requested = False
        self._held = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this is open a signal waits; outside it interrupts."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self._held:
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
        self._done = 0  # steps
        self._version = 0  # of the adapter

    async def run(self) -> Summary:
        """Prepare, evaluate, train, evaluate."""
        if self._resume:
            check_same_configuration(self._folder.config, dump_config(self._config))
            if self._folder.summary.is_file():
                Display().note(f"{self._folder.root} is finished already: see its summary.json")
                return dict(json.loads(self._folder.summary.read_text(encoding="utf-8")))
        latest = self._checkpoints.latest() if self._resume else None
        restored = self._checkpoints.read(latest, digest=self._digest) if latest else None
        with (
            Display() as self._display,
            RunLog(
                self._folder,
                config_text=dump_config(self._config),
                trackers=self._config.log.trackers,
                transcripts=self._config.log.transcripts,
                resume_after=restored[0].step if restored else 0 if self._is_prepared() else None,
            ) as self._log,
        ):
            await self._load()
            try:
                before = await self._before()
                if restored:
                    await self._restore(*restored)
                if not await self._steps():
                    return {"stopped_at": self._done}
                return await self._finish(before)
            finally:
                await self._engine.close()

    def _is_prepared(self) -> bool:
        """Whether a resumed run finds its base; without it, it begins anew."""
        return self._resume and (self._config.warm_start is None or self._folder.warm_start.is_dir())

    async def _load(self) -> None:
        """The base model, the engine and the learner over it, and what episodes need."""
        config = self._config
        base = await prepare_base(config, self._make_env, log=self._log, display=self._display)
        model = await in_compute_thread(
            load_model, base, dtype=config.model.dtype, device="cuda" if torch.cuda.is_available() else "cpu"
        )
        chats = make_chats(config, load_tokenizer(base), model, on_certificate=self._display.note)
        self._engine = EmbeddedEngine(model, max_sequences=config.engine.max_sequences)
        self._learner = await in_compute_thread(
            Learner,  # after the engine, which takes the model without an adapter
            model,
            lora=config.lora,
            algorithm=config.algorithm,
            optimizer=config.optimizer,
            batch=config.batch,
            steps=config.steps,
            seed=derive(config.seed, "adapter"),
        )
        self._rollouts = self._make_rollouts(chats)
        self._schedule = make_schedule(config, self._make_env(), "train")

    async def _restore(self, state: State, adapter: Adapter, optimizer: dict[str, Any]) -> None:
        await in_compute_thread(self._learner.restore, adapter, optimizer)
        self._done, self._version = state.step, state.version
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

    async def _steps(self) -> bool:
        """Train to the end; False where a signal ended it early."""
        config, ahead, following = self._config, deque[asyncio.Task[list[Group]]](), self._done
        stopped = False
        with self._stop.held(), self._display.bar("training", total=config.steps) as bar:
            bar.advance(self._done)
            while self._done < config.steps and not stopped:
                while len(ahead) <= config.algorithm.max_staleness and following < config.steps:
                    ahead.append(asyncio.create_task(self._roll_out(following)))
                    following += 1
                reward = await self._step(ahead.popleft())
                bar.advance(note=f"reward {reward:.3f}")
                stopped = self._stop.requested
                if stopped or self._is_saved_at(self._done):
                    path = await in_compute_thread(self._save)
        for task in ahead:
            task.cancel()
        if stopped:
            self._display.note(
                f"stopped after step {self._done} of {config.steps}, saved in {path}; "
                "go on with the same command and --resume"
            )
        return not stopped

    def _is_saved_at(self, step: int) -> bool:
        return step == self._config.steps or step % self._config.checkpoint.every == 0

    async def _step(self, rollout: asyncio.Task[list[Group]]) -> float:
        """One step from its rollouts to its row, and a point of the curve where one is due; the mean
        reward."""
        began = time.perf_counter()
        groups = await rollout
        row = describe_groups(groups) | {"time/rollout_s": time.perf_counter() - began}
        row |= await self._update(self._done, groups)
        row["time/step_s"] = time.perf_counter() - began
        self._done += 1
        self._log.step(self._done, row)
        self._log.transcripts(self._done, groups)
        settings = self._config.evaluation
        if settings.every and self._done % settings.every == 0 and self._done < self._config.steps:
            evaluation = await self._evaluate(tasks=settings.curve_tasks)
            self._log.step(self._done, _point(evaluation), phase="evaluation")
        return row.get("reward/mean", float("nan"))

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
        """One update and the swap of the adapter in the engine; no swap where nothing was learnt."""
        began = time.perf_counter()
        metrics = await in_compute_thread(
            self._learner.update,
            self._with_advantages(step, groups),
            step=step,
            temperature=self._config.rollout.temperature,
            seed=derive(self._config.seed, "minibatches", step),
        )
        updated = time.perf_counter()
        if metrics:
            self._version += 1
            await self._engine.load(await in_compute_thread(self._learner.publish), self._version)
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

    async def _before(self) -> Measurement:
        """The base's measurement: made now, or read back where the run goes on behind it."""
        path = self._folder.before
        if path.is_file():
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
            "gain": {name: one and dataclasses.asdict(one) for name, one in gain.items()},
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
