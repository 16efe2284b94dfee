"""What turns a step of a run: the engine, the learner and the rollouts over one base model.

It knows tasks, seeds and weights, and nothing of folders, signals or evaluations: ``agentrl.training`` runs
it from the first step to the last, ``agentrl.bench`` for a few.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from agentrl.advantages import ADVANTAGES, group_relative
from agentrl.canary import SAMPLED_TOKENS, Canary
from agentrl.config import RunConfig
from agentrl.engine import Adapter, Engine, Measured, Sampling, Sleeper
from agentrl.engines.embedded import EmbeddedEngine
from agentrl.env import Env
from agentrl.errors import EngineError
from agentrl.faults import check_invalid
from agentrl.learner import Learner
from agentrl.metrics import describe_groups, describe_rollout, describe_staleness
from agentrl.models import default_device, linear_layers, load_model, stop_token_ids
from agentrl.prepare import make_chats, make_schedule
from agentrl.rollout import EpisodePlan, Rollouts
from agentrl.samples import oldest_version, to_samples
from agentrl.schedule import Schedule
from agentrl.seeds import derive
from agentrl.serving import Served, open_engine
from agentrl.threads import in_compute_thread
from agentrl.types import Group, Sample

__all__ = ["RolledOut", "Trainer"]

T = TypeVar("T")

_CANARIES = 4  # prompts, of different tasks
_CANARY_TOKENS = 128  # of a prompt, at most: its last ones, as all may begin alike


@dataclass(frozen=True, slots=True, eq=False)
class RolledOut:
    """What a step's rollouts came to."""

    groups: Sequence[Group]
    seconds: float  # from the beginning of the first episode to the end of the last


class Trainer:
    """The policy of one run, with what samples from it and what updates it."""

    def __init__(
        self,
        config: RunConfig,
        *,
        engine: Engine,
        learner: Learner,
        rollouts: Rollouts,
        schedule: Schedule,  # of the training split
    ) -> None:
        """:meth:`load` makes all of these."""
        self.rollouts, self.version = rollouts, 0  # of the adapter
        self._config, self._engine, self._learner, self._schedule = config, engine, learner, schedule
        self._canary: Canary | None = None  # of an engine with weights of its own, once episodes have opened
        self._figures: dict[str, float] = {}  # the engine's of the row to come, as far as they are taken

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
        served = Served(
            base=base,
            model=model,
            tokenizer=tokenizer,
            dtype=str(model.dtype).removeprefix("torch."),
            limits=config.rollout,
            max_lora_rank=config.lora.r,
            lora_modules=_adapted(model, config.lora.target_modules),
            training=True,
            seed=derive(config.seed, "retries"),
        )
        engine = await open_engine(config.engine, served, on_note=on_note)
        try:  # the learner after the engine, which takes the model without an adapter
            learner = await in_compute_thread(_make_learner, config, model)
            rollouts = Rollouts(
                make_env,
                chat=make_chats(config, tokenizer, stop_token_ids(model), on_certificate=on_note),
                engine=engine,
                limits=config.rollout,
                in_flight=config.engine.max_sequences,
                deterministic=config.engine.deterministic,
                on_stall=on_note,
            )
            schedule = make_schedule(config, make_env, "train")
        except BaseException:
            await engine.close()
            raise
        return cls(config, engine=engine, learner=learner, rollouts=rollouts, schedule=schedule)

    async def close(self) -> None:
        """Stop the engine."""
        await self._engine.close()

    async def roll_out(self, step: int) -> RolledOut:
        """The groups of ``step`` (from 0). Several steps' rollouts may be in flight, and an update beside
        them: an earlier step's episodes are served first, each turn by what the engine has then."""
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
        began: list[float] = []  # one, once there is a place for an episode

        def on_begin() -> None:
            began.append(time.perf_counter())

        groups = await self.rollouts.groups(plans, sampling=sampling, on_begin=on_begin)
        return RolledOut(groups, time.perf_counter() - began[0])

    async def learn(self, step: int, rolled: RolledOut, *, waited_s: float) -> dict[str, float]:
        """Update the policy and hand it to the engine; the row of ``step``, whose rollouts were waited for
        ``waited_s`` seconds.

        A sample whose oldest token is more than ``max_staleness`` versions behind is dropped: it is in
        neither the loss nor its normaliser. Its episode's reward stays in the group's baseline, which need
        not be of the newest policy, but of all siblings: episodes that take long are the ones that grow old,
        and a baseline of the quick ones alone would favour what they have in common.

        The engine's figures in the row are of all that it did since the row before, for whichever step, but
        for what was done ``apart``. Raises TooManyInvalid where the world failed too many episodes; nothing
        is learnt then.
        """
        groups, most = rolled.groups, self._config.algorithm.max_staleness
        check_invalid(groups, most=self._config.rollout.max_invalid)
        self._keep_engine_figures()
        figures, self._figures = self._figures, {}
        samples = self._with_advantages(step, groups)
        behind = [self.version - oldest_version(sample) for sample in samples]
        fresh = [sample for sample, versions in zip(samples, behind, strict=True) if versions <= most]
        row = describe_groups(groups) | describe_staleness(behind, most=most) | figures
        row |= describe_rollout(groups, waited_s=waited_s, rolled_s=rolled.seconds)
        if prompts := figures.get("rollout/prefill_tokens", 0) + figures.get("rollout/reused_tokens", 0):
            row["rollout/prefix_hit_rate"] = figures["rollout/reused_tokens"] / prompts
        if self._canary is None and not isinstance(self._engine, EmbeddedEngine):
            self._canary = self._make_canary(groups)
        row |= await self._update(step, fresh)
        return row | self._learner.take_figures()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """The tokens of meanwhile, of an evaluation say, are in no row's figures; those of rollouts that run
        ahead can't be told from them."""
        self._keep_engine_figures()
        try:
            yield
        finally:
            if isinstance(self._engine, Measured):
                kept = ("engine/restarts",)
                self._add_figures({k: v for k, v in self._engine.take_figures().items() if k in kept})

    def _keep_engine_figures(self) -> None:
        if isinstance(self._engine, Measured):
            self._add_figures(self._engine.take_figures())

    def _add_figures(self, figures: Mapping[str, float]) -> None:
        for name, amount in figures.items():
            self._figures[name] = self._figures.get(name, 0.0) + amount

    async def _update(self, step: int, samples: Sequence[Sample]) -> dict[str, float]:
        """One update and the swap of the adapter in the engine; no swap where nothing was learnt."""
        began = time.perf_counter()
        async with self._engine_asleep():
            metrics = await in_compute_thread(
                self._learner.update,
                samples,
                step=step,
                temperature=self._config.rollout.temperature,
                seed=derive(self._config.seed, "minibatches", step),
            )
        updated = time.perf_counter()
        if metrics:
            self.version += 1
            metrics |= await self._hand_over(await in_compute_thread(self._learner.publish))
        swap = {"time/update_s": updated - began, "time/load_s": time.perf_counter() - updated}
        return metrics | swap

    @asynccontextmanager
    async def _engine_asleep(self) -> AsyncIterator[None]:
        """The learner's turn on a GPU that the engine shares with it; nothing where they share none."""
        engine = self._engine
        if not self._config.engine.share_gpu or not isinstance(engine, Sleeper):
            yield
            return
        await engine.sleep()
        try:
            yield
        finally:
            await engine.wake()

    async def _hand_over(self, adapter: Adapter) -> dict[str, float]:
        """Have the engine serve ``adapter`` as the current version, and prove it; what the proof found."""
        await self._insist(lambda: self._engine.load(adapter, self.version))
        canary = self._canary
        if canary is None:
            return {}
        with self.apart():
            return await self._insist(lambda: canary.prove(adapter, self.version))

    async def _insist(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What the engine answers, asked again where it fails. Raises EngineError."""
        for _ in range(self._config.rollout.retries):
            with suppress(EngineError):
                return await ask()
        try:
            return await ask()
        except EngineError as error:
            raise EngineError(
                f"{error}; see to the engine, then go on behind what was saved with the same command and "
                "--resume"
            ) from error

    def _make_canary(self, groups: Sequence[Group]) -> Canary | None:
        """A proof of weights on the openings of these groups; None where no episode has one."""
        episodes = [group.valid[0] for group in groups if group.valid][:_CANARIES]
        room = self._config.rollout.max_episode_tokens - 2 * SAMPLED_TOKENS - 1
        prompts = [episode.turns[0].new_ids[-min(room, _CANARY_TOKENS) :] for episode in episodes]
        if not prompts or room < 2:
            return None
        # An engine of another process casts adapters to the precision of the base, or what it merges of both.
        merged, dtype = self._config.engine.merge, self._learner.policy.get_base_model().dtype
        return Canary(
            self._engine,
            self._learner,
            prompts=prompts,
            seed=derive(self._config.seed, "canary"),
            adapter_dtype=None if merged else dtype,
            merged=merged,
            deadline_s=self._config.rollout.request_deadline_s,
        )

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
        """What the learner's parts take, and the keys and values of an engine in this process."""
        held = self._learner.memory_mib()
        if isinstance(self._engine, EmbeddedEngine):  # any other's are another process's
            held["cache"] = self._engine.cache_bytes / 2**20
        return held

    def snapshot(self) -> tuple[Adapter, dict[str, Any]]:
        """The adapter and the optimizer's state; call it in the compute thread."""
        return self._learner.publish(), self._learner.optimizer_state()

    async def restore(self, adapter: Adapter, optimizer: dict[str, Any], *, version: int) -> None:
        """Go on with what ``snapshot`` gave at ``version``."""
        await in_compute_thread(self._learner.restore, adapter, optimizer)
        self.version = version
        if version:  # until then the engine had no adapter
            await self._engine.load(adapter, version)


def _adapted(model: Any, targets: str | Sequence[str]) -> Sequence[str]:
    """The last parts of the names of the layers that get an adapter."""
    return linear_layers(model) if isinstance(targets, str) else targets


def _make_learner(config: RunConfig, model: Any) -> Learner:
    return Learner(
        model,
        lora=config.lora,
        algorithm=config.algorithm,
        optimizer=config.optimizer,
        batch=config.batch,
        steps=config.steps,
        seed=derive(config.seed, "adapter"),
    )
