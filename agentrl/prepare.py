"""From a configuration to the base checkpoint of a run: make the tiny model, warm it up, or take what is
given.

What is made stands in the run's folder, whole or not at all, and is taken from there when the run is resumed.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from agentrl.chats import Chats
from agentrl.checkpoint import saving_weights
from agentrl.config import RunConfig, TinyConfig, WarmStartConfig
from agentrl.engine import Sampling
from agentrl.engines.embedded import EmbeddedEngine
from agentrl.env import Env
from agentrl.errors import WorldError
from agentrl.evaluation import run_evaluation
from agentrl.files import write_folder
from agentrl.log import Display, RunLog
from agentrl.models import default_device, load_model, load_tokenizer, stop_token_ids
from agentrl.rollout import EpisodePlan, Rollouts, gold_episodes
from agentrl.samples import to_samples
from agentrl.schedule import Schedule
from agentrl.seeds import derive
from agentrl.tasks import place_in
from agentrl.threads import in_compute_thread
from agentrl.tiny import TinyShape, make_tiny_model
from agentrl.types import Sample
from agentrl.warm_start import WarmStart

__all__ = ["make_chats", "make_schedule", "prepare_base"]


def make_schedule(config: RunConfig, make_env: Callable[[], Env], name: str) -> Schedule:
    """The order of the training split for the purpose called ``name``."""
    with closing(make_env()) as env:
        tasks = env.task_list(config.environment.train)
    return Schedule(len(tasks) if isinstance(tasks, Sequence) else None, seed=config.seed, name=name)


def make_chats(
    config: RunConfig, tokenizer: Any, stops: tuple[int, ...], *, on_certificate: Callable[[str], None]
) -> Chats:
    """The chats of a run's environments; ``stops``: the token ids that end a completion by the model's own
    account."""
    return Chats(
        tokenizer,
        parser=config.model.parser,
        history=config.model.history,
        stop_token_ids=stops,
        on_certificate=on_certificate,
    )


async def prepare_base(
    config: RunConfig, make_env: Callable[[], Env], *, log: RunLog, display: Display
) -> str | Path:
    """The folder or hub id of the base model that the run's adapter is trained on."""
    base: str | Path = config.model.path or log.folder.base
    if config.model.tiny is not None and not Path(base).exists():
        await _make_tiny(config, config.model.tiny, make_env, Path(base))
        display.note(f"made a tiny model in {base}")
    if config.warm_start is None:
        return base
    warm = log.folder.warm_start
    if not warm.exists():
        await _warm_up(config, base, warm, make_env, log=log, display=display)
    return warm


async def _make_tiny(config: RunConfig, tiny: TinyConfig, make_env: Callable[[], Env], path: Path) -> None:
    indices = make_schedule(config, make_env, "tokenizer").take(0, tiny.texts)
    split = config.environment.train
    with closing(make_env()) as env:
        places = [place_in(env.task_list(split), index, split=split) for index in indices]
        said = {place: await _gold_texts(config, env, split, place) for place in dict.fromkeys(places)}
        texts = [text for place in places for text in said[place]]
    shape = TinyShape(**tiny.model_dump(exclude={"texts"}), max_position=config.rollout.max_episode_tokens)
    seed = derive(config.seed, "tiny model") % 2**32

    def write(folder: Path) -> None:
        with saving_weights():
            make_tiny_model(folder, texts=texts, seed=seed, shape=shape)

    write_folder(path, write)


async def _gold_texts(config: RunConfig, env: Env, split: str, index: int) -> list[str]:
    """Everything that is said in the gold episode of a task, whose steps have deadlines and second chances as
    those of any episode. Raises WorldError."""
    for retries_left in reversed(range(config.rollout.retries + 1)):
        try:
            env.reset(seed=0, options={"split": split, "index": index})
            for message in env.gold(env.task):
                async with asyncio.timeout(config.rollout.deadline_s):
                    await env.astep(message)
            break
        except (WorldError, TimeoutError) as error:
            if not retries_left:
                raise WorldError(
                    f"the gold episode of task {env.task.id!r}: {str(error) or 'a step was late'}; see "
                    "rollout.deadline_s and rollout.retries"
                ) from error
    calls = (call for message in env.messages for call in message.tool_calls)
    spoken = (json.dumps({"name": call.name, "arguments": call.arguments}) for call in calls)
    return [*(message.content for message in env.messages), *spoken]


async def _warm_up(
    config: RunConfig,
    base: str | Path,
    warm: Path,
    make_env: Callable[[], Env],
    *,
    log: RunLog,
    display: Display,
) -> None:
    """Fine-tune on gold episodes and write the checkpoint ``warm``."""
    settings = config.warm_start
    assert settings is not None
    tokenizer = load_tokenizer(base)
    given = await in_compute_thread(load_model, base, dtype=config.model.dtype, device=default_device())
    dtype = given.dtype
    # Full fine-tuning in bfloat16 would round most updates away; an adapter has float32 weights of its own.
    model = given if settings.lora else given.float()
    chats = make_chats(config, tokenizer, stop_token_ids(model), on_certificate=display.note)
    samples = await _gold_samples(config, make_env, chats)
    start = await in_compute_thread(
        WarmStart, model, settings=settings, lora=config.lora, batch=config.batch, seed=config.seed
    )
    probe = _make_probe(config, model, make_env, chats, on_stall=display.note)
    with display.bar("warm start", total=settings.steps) as bar:
        for step in range(settings.steps):
            metrics = await in_compute_thread(start.step, step, samples)
            due = settings.probe_every and (step + 1) % settings.probe_every == 0
            if due and not _is_far(settings, metrics["loss/nll"], samples):
                metrics["probe/pass@1"] = await probe()
            log.step(step + 1, metrics, phase="warm_start")
            bar.advance(note=f"nll {metrics['loss/nll']:.3f}")
            if settings.until is not None and metrics.get("probe/pass@1", -1.0) >= settings.until:
                break
    await in_compute_thread(start.save, warm, tokenizer=tokenizer, dtype=dtype)
    found = f", a probe passes {metrics['probe/pass@1']:.2f}" if "probe/pass@1" in metrics else ""
    display.note(f"warm start: {step + 1} steps on {len(samples)} gold episodes{found}; saved in {warm}")


async def _gold_samples(config: RunConfig, make_env: Callable[[], Env], chats: Chats) -> list[Sample]:
    assert config.warm_start is not None
    split = config.environment.train
    indices = make_schedule(config, make_env, "warm start").take(0, config.warm_start.episodes)
    plans = [EpisodePlan(split=split, index=i, sibling=0, env_seed=i, seed=0) for i in indices]
    episodes = await gold_episodes(make_env, chats, plans, limits=config.rollout)
    return [sample for episode in episodes for sample in to_samples(episode)]


def _is_far(settings: WarmStartConfig, nll: float, samples: Sequence[Sample]) -> bool:
    """Whether a probe would be wasted: the likelihood of a gold episode is below a twentieth of the mark.

    It lies below pass@1, since a mean over tokens weighs what fails most: where a probe finds the mark, it is
    about a third of it or more.
    """
    if settings.until is None:
        return False
    tokens = sum(sample.trained_tokens for sample in samples) / len(samples)
    return math.exp(-nll * tokens) < settings.until / 20


def _make_probe(
    config: RunConfig,
    model: Any,
    make_env: Callable[[], Env],
    chats: Chats,
    *,
    on_stall: Callable[[str], None],
) -> Callable[[], Awaitable[float]]:
    """A function that measures pass@1 of ``model`` as it is, on the training tasks that come after the warm
    start's own."""
    settings, split = config.warm_start, config.environment.train
    assert settings is not None
    order = make_schedule(config, make_env, "warm start")
    indices = order.take(settings.episodes, settings.probe_tasks)
    plans = [
        EpisodePlan(split=split, index=i, sibling=0, env_seed=i, seed=derive(config.seed, "probe", i))
        for i in indices
    ]
    sampling = Sampling(max_tokens=config.rollout.max_turn_tokens, seed=0, temperature=1.0)

    async def probe() -> float:
        # The engine shares the weights that are being trained, so a new one needs no copy and holds no stale
        # keys.
        engine = EmbeddedEngine(model, max_sequences=config.engine.max_sequences)
        rollouts = Rollouts(
            make_env,
            chat=chats,
            engine=engine,
            limits=config.rollout,
            in_flight=config.engine.max_sequences,
            deterministic=config.engine.deterministic,
            on_stall=on_stall,
        )
        try:
            evaluation = await run_evaluation(rollouts, plans, sampling=sampling, k=(1,))
        finally:
            await engine.close()
        report = evaluation.reports["pass@1"]
        return report.estimate.value if report.estimate else 0.0

    return probe
