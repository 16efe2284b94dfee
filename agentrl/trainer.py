"""What turns a step of a run: the engine, the learner and the rollouts over one base model.

It knows tasks, seeds and weights, and nothing of folders, signals or evaluations: ``agentrl.training`` runs
it from the first step to the last, ``agentrl.bench`` for a few.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentrl.advantages import ADVANTAGES, group_relative
from agentrl.config import RunConfig
from agentrl.engine import Adapter, Sampling
from agentrl.engines.embedded import EmbeddedEngine
from agentrl.env import Env
from agentrl.faults import check_invalid
from agentrl.learner import Learner
from agentrl.metrics import describe_groups, describe_rollout
from agentrl.models import default_device, load_model
from agentrl.prepare import make_chats, make_schedule
from agentrl.rollout import EpisodePlan, Rollouts
from agentrl.samples import to_samples
from agentrl.schedule import Schedule
from agentrl.seeds import derive
from agentrl.threads import in_compute_thread
from agentrl.types import Group, Sample

__all__ = ["Trainer"]


class Trainer:
    """The policy of one run, with what samples from it and what updates it."""

    def __init__(
        self,
        config: RunConfig,
        *,
        engine: EmbeddedEngine,
        learner: Learner,
        rollouts: Rollouts,
        schedule: Schedule,  # of the training split
    ) -> None:
        """:meth:`load` makes all of these."""
        self.rollouts, self.version = rollouts, 0  # of the adapter
        self._config, self._engine, self._learner, self._schedule = config, engine, learner, schedule

    @classmethod
    async def load(
        cls,
        config: RunConfig,
        base: str | Path,  # the model's folder or hub id
        *,
        tokenizer: Any,
        make_env: Callable[[], Env],
        on_note: Callable[[str], None],  # gets lines for people
    ) -> Trainer:
        """Load ``base`` and put a fresh adapter on it."""
        model = await in_compute_thread(load_model, base, dtype=config.model.dtype, device=default_device())
        engine = EmbeddedEngine(model, max_sequences=config.engine.max_sequences)
        learner = await in_compute_thread(
            Learner,  # after the engine, which takes the model without an adapter
            model,
            lora=config.lora,
            algorithm=config.algorithm,
            optimizer=config.optimizer,
            batch=config.batch,
            steps=config.steps,
            seed=derive(config.seed, "adapter"),
        )
        rollouts = Rollouts(
            make_env,
            chat=make_chats(config, tokenizer, model, on_certificate=on_note),
            engine=engine,
            limits=config.rollout,
            in_flight=config.engine.max_sequences,
            deterministic=config.engine.deterministic,
            on_stall=on_note,
        )
        schedule = make_schedule(config, make_env(), "train")
        return cls(config, engine=engine, learner=learner, rollouts=rollouts, schedule=schedule)

    async def close(self) -> None:
        """Stop the engine."""
        await self._engine.close()

    async def roll_out(self, step: int) -> list[Group]:
        """The groups of ``step`` (from 0)."""
        self._engine.take_figures()  # an evaluation's are not the step's
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
        return await self.rollouts.groups(plans, sampling=sampling)

    async def learn(self, step: int, groups: Sequence[Group], *, waited_s: float) -> dict[str, float]:
        """Update the policy and hand it to the engine; the row of ``step``, whose groups were waited for
        ``waited_s`` seconds.

        Raises TooManyInvalid where the world failed too many episodes; nothing is learnt then.
        """
        check_invalid(groups, most=self._config.rollout.max_invalid)
        row = describe_groups(groups) | describe_rollout(groups, seconds=waited_s)
        row |= self._engine.take_figures() | await self._update(step, groups)
        return row | self._learner.take_figures()

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
            self.version += 1
            await self._engine.load(await in_compute_thread(self._learner.publish), self.version)
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

    def memory_mib(self) -> dict[str, float]:
        """What the learner's parts take, and the engine's keys and values."""
        return self._learner.memory_mib() | {"cache": self._engine.cache_bytes / 2**20}

    def snapshot(self) -> tuple[Adapter, dict[str, Any]]:
        """The adapter and the optimizer's state; call it in the compute thread."""
        return self._learner.publish(), self._learner.optimizer_state()

    async def restore(self, adapter: Adapter, optimizer: dict[str, Any], *, version: int) -> None:
        """Go on with what ``snapshot`` gave at ``version``."""
        await in_compute_thread(self._learner.restore, adapter, optimizer)
        self.version = version
        if version:  # until then the engine had no adapter
            await self._engine.load(adapter, version)
