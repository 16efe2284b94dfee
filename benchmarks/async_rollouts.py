"""What slow tools cost: episodes that wait for nobody, beside turn-lockstep on the same engine.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/async_rollouts.py
    python benchmarks/async_rollouts.py --engine vllm --model DIR

64 episodes of 3 turns of 32 tokens each. Every turn is a call, whatever the model said, and is answered after
a latency of its own, log-normal with a median of 0.2 s and a 99th percentile of 5 s; the third answer ends
the episode. agentrl's rollouts are one asyncio task an episode. Turn-lockstep, as batched frameworks do it,
samples a turn of all episodes as one batch, runs all their tools at the same time, and begins the next turn
when the last has answered. Environments, chats, seeds and engine are the same, a warm-up in lockstep leaves
both the same cache, and they take turns at going first. Aim: half of lockstep's time.

No scheduler is faster than its slowest episode: the limit is the longest chain of one episode's own
latencies, and the engine's time for that episode alone. Nor is one much faster than the engine with full
batches and tools that answer at once (engine_s). Without engine time lockstep takes at most as many times the
limit as there are turns, and with these latencies 1.8 times as a rule.

"same" counts the episodes whose tokens and messages agree in both. Where the rounding of the engine's kernels
depends on the batch a token may differ, and the rest of its episode with it: often in 16 bits, hardly ever
with --dtype float32. The number of tokens is the same in any case.

Without --model a tiny model is made on the spot.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from lockstep import Conversation, lockstep
from report import Row, make_parser, report

from agentrl.chat import Chat
from agentrl.chats import Chats
from agentrl.config import EngineConfig, RolloutConfig, TinyConfig
from agentrl.engine import Adapter, Engine, Sampling
from agentrl.env import Env, Step
from agentrl.models import load_model, load_tokenizer
from agentrl.rollout import EpisodePlan, Rollouts
from agentrl.seeds import derive
from agentrl.serving import Served, open_engine
from agentrl.threads import in_compute_thread
from agentrl.tiny import TinyShape, make_tiny_model
from agentrl.types import Completion, FloatArray, IntArray, Message, Task

__all__ = ["TOKENS", "TURNS", "ExactLength", "Sizes", "SlowTools", "latencies", "main", "measure"]

TURNS = 3
TOKENS = 32  # of a turn
_MEDIAN_S, _P99_S = 0.2, 5.0
_SIGMA = math.log(_P99_S / _MEDIAN_S) / 2.3263  # the normal distribution's 99th percentile
_LIMITS = RolloutConfig(
    max_turn_tokens=TOKENS, max_episode_tokens=1024, deadline_s=600, stall_s=600, retries=0
)
_SAMPLING = Sampling(max_tokens=TOKENS, seed=0)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run."""

    episodes: int = 64
    seeds: int = 5  # each draws its own latencies
    scale: float = 1.0  # of the latencies


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--engine", choices=("embedded", "vllm"), default="embedded", help="what samples")
    parser.add_argument("--model", metavar="PATH", help="folder of a chat model (a tiny one is made)")
    dtypes = ("auto", "float32", "bfloat16")
    parser.add_argument(
        "--dtype", choices=dtypes, default="auto", help="of the weights (the engine's choice)"
    )
    options = parser.parse_args(arguments)
    sizes = Sizes(episodes=4, seeds=1, scale=0.02) if options.quick else Sizes()
    with ExitStack() as stack:
        model = options.model or _tiny_model(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = asyncio.run(_run(options, model, sizes))
    title = f"Rollouts of {sizes.episodes} episodes of {TURNS} turns with slow tools, {options.engine} engine"
    report(rows, title=title, notes=_notes(rows), json_path=options.json)


async def _run(options: argparse.Namespace, model: str, sizes: Sizes) -> list[Row]:
    embedded = options.engine == "embedded"
    tokenizer = load_tokenizer(model)
    served = Served(
        base=model,
        model=await in_compute_thread(load_model, model, dtype=options.dtype) if embedded else None,
        tokenizer=tokenizer,
        dtype=options.dtype,
        limits=_LIMITS,
        max_lora_rank=None,
        training=False,
    )
    # Compiling takes a CPU minutes, which these few episodes would not earn.
    given: dict[str, Any] = {} if embedded else {"args": {"enforce_eager": not torch.cuda.is_available()}}
    settings = EngineConfig(kind=options.engine, max_sequences=sizes.episodes, **given)
    engine = await open_engine(settings, served)
    try:
        return await measure(engine, Chats(tokenizer), sizes)
    finally:
        await engine.close()


async def measure(engine: Engine, chat: Callable[[Env], Chat], sizes: Sizes) -> list[Row]:
    """A row for each seed, and one of their means."""
    contest = _Contest(ExactLength(engine), chat, sizes)
    rounds = [await contest.round(seed) for seed in range(sizes.seeds)]
    rows = [figures.row(f"seed {seed}", sizes.episodes) for seed, figures in enumerate(rounds)]
    return [*rows, _mean(rounds).row("mean", sizes.episodes)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    """What was measured with one seed, in seconds, or the means of several."""

    agentrl: float
    lockstep: float
    limit: float  # the longest episode's latencies and its engine's time alone
    engine: float  # for all episodes, in lockstep, with tools that answer at once
    latencies: float  # their sum over all episodes
    slowest: float  # the largest of them
    same: float  # episodes, as many tokens and messages of which agree

    def row(self, name: str, episodes: int) -> Row:
        """The figures as a row of the table."""
        return {
            "name": name,
            "agentrl_s": self.agentrl,
            "lockstep_s": self.lockstep,
            "ratio": self.lockstep / self.agentrl,
            "limit_s": self.limit,
            "limit_ratio": self.lockstep / self.limit,
            "engine_s": self.engine,
            "latencies_s": self.latencies,
            "slowest_s": self.slowest,
            "same": f"{self.same:g}/{episodes}",
        }


def _mean(rounds: Sequence[_Figures]) -> _Figures:
    fields = _Figures.__dataclass_fields__
    return _Figures(**{name: fmean(getattr(figures, name) for figures in rounds) for name in fields})


def _notes(rows: Sequence[Row]) -> list[str]:
    mean = rows[-1]
    return [
        f"lockstep takes {mean['ratio']:.2f} times agentrl's seconds; aim: 2",
        f"limit_s, which no scheduler beats, is the longest episode alone: {mean['limit_ratio']:.2f} times",
        "engine_s is the engine's time for all episodes, in full batches, with tools that answer at once",
    ]


# -- the episodes --


class SlowTools(Env):
    """A conversation of TURNS turns, each answered after a latency, whatever was said."""

    splits = ("train",)

    def __init__(self, *, seed: int, episodes: int, scale: float) -> None:
        super().__init__()
        self._seed, self._episodes, self._scale = seed, episodes, scale
        self._turn = 0

    def tasks(self, split: str) -> Iterable[Task]:
        """One for each episode; the latencies of its turns stand in its meta, in seconds."""
        return [
            Task(
                id=f"order-{place}",
                prompt=(Message("user", f"Where is order {place}? Ask the warehouse, then the carrier."),),
                meta={"latencies": latencies(self._seed, place, scale=self._scale)},
            )
            for place in range(self._episodes)
        ]

    def setup(self, task: Task) -> None:
        self._turn = 0

    async def astep(self, action: Message) -> Step:
        """Answer after this turn's latency."""
        self.accept(action)
        await asyncio.sleep(self.task.meta["latencies"][self._turn])
        self._turn += 1
        answer = Message("user", _answer(self._turn, self.task.id))
        return self.transition(answer, stop_reason="answered" if self._turn == TURNS else "")


def _answer(turn: int, task_id: str) -> str:
    return f"Answer {turn} about {task_id}: not here, ask the next."


def latencies(seed: int, episode: int, *, scale: float = 1.0) -> tuple[float, ...]:
    """Seconds that the tool of each turn of an episode takes, (TURNS,)."""
    generators = (np.random.default_rng(derive(seed, "latency", episode, turn)) for turn in range(TURNS))
    return tuple(scale * generator.lognormal(math.log(_MEDIAN_S), _SIGMA) for generator in generators)


class ExactLength:
    """An engine whose completions end after exactly ``max_tokens``: what is said decides nothing about how
    much there is to do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        """See :class:`agentrl.engine.Engine`."""
        completion = await self._engine.generate(prompt_ids, replace(sampling, stop_token_ids=()))
        assert len(completion.token_ids) == sampling.max_tokens
        return replace(completion, finish="stop")

    async def score(self, token_ids: IntArray, temperature: float) -> FloatArray:
        """See :class:`agentrl.engine.Engine`."""
        return await self._engine.score(token_ids, temperature)

    async def load(self, adapter: Adapter | None, version: int) -> None:
        """See :class:`agentrl.engine.Engine`."""
        await self._engine.load(adapter, version)

    async def close(self) -> None:
        """See :class:`agentrl.engine.Engine`."""
        await self._engine.close()


# -- the two ways --


class _Contest:
    """Runs the same episodes in both ways."""

    def __init__(self, engine: Engine, chat: Callable[[Env], Chat], sizes: Sizes) -> None:
        self._engine, self._chat, self._sizes = engine, chat, sizes

    async def round(self, seed: int) -> _Figures:
        """The figures of one seed."""
        episodes, scale = self._sizes.episodes, self._sizes.scale
        make_env = partial(SlowTools, seed=seed, episodes=episodes, scale=scale)
        waits = [task.meta["latencies"] for task in make_env().task_list("train")]
        longest = max(range(episodes), key=lambda place: sum(waits[place]))
        ways = {"agentrl": self._rollouts, "lockstep": self._lockstep}
        await self.engine_s(seed, range(episodes))  # what a cache keeps of these episodes, both ways find
        seconds, said = dict[str, float](), dict[str, list[Conversation]]()
        for name in reversed(ways) if seed % 2 else ways:
            seconds[name], said[name] = await self._timed(ways[name], make_env, _plans(seed, range(episodes)))
        pairs = zip(said["agentrl"], said["lockstep"], strict=True)
        return _Figures(
            agentrl=seconds["agentrl"],
            lockstep=seconds["lockstep"],
            limit=sum(waits[longest]) + await self.engine_s(seed, [longest]),
            engine=await self.engine_s(seed, range(episodes)),
            latencies=sum(map(sum, waits)),
            slowest=max(map(max, waits)),
            same=sum(one == other for one, other in pairs),
        )

    async def engine_s(self, seed: int, places: Iterable[int]) -> float:
        """Seconds for the episodes at ``places``, in lockstep, with tools that answer at once."""
        make_env = partial(SlowTools, seed=seed, episodes=self._sizes.episodes, scale=0.0)
        seconds, _ = await self._timed(self._lockstep, make_env, _plans(seed, places))
        return seconds

    async def _timed(
        self, way: _Way, make_env: Callable[[], Env], plans: Sequence[EpisodePlan]
    ) -> tuple[float, list[Conversation]]:
        """Seconds from the plans to the conversations, and these."""
        began = time.perf_counter()
        conversations = await way(make_env, plans)
        return time.perf_counter() - began, conversations

    async def _rollouts(
        self, make_env: Callable[[], Env], plans: Sequence[EpisodePlan]
    ) -> list[Conversation]:
        count = len(plans)
        rollouts = Rollouts(make_env, chat=self._chat, engine=self._engine, limits=_LIMITS, in_flight=count)
        groups = await rollouts.groups(plans, sampling=_SAMPLING)
        episodes = [episode for group in groups for episode in group.trajectories]
        return [
            ([turn.completion.token_ids.tolist() for turn in episode.turns], episode.messages)
            for episode in episodes
        ]

    async def _lockstep(
        self, make_env: Callable[[], Env], plans: Sequence[EpisodePlan]
    ) -> list[Conversation]:
        return await lockstep(make_env, plans, chat=self._chat, engine=self._engine, sampling=_SAMPLING)


_Way = Callable[[Callable[[], Env], Sequence[EpisodePlan]], Awaitable[list[Conversation]]]


def _plans(seed: int, places: Iterable[int]) -> list[EpisodePlan]:
    return [
        EpisodePlan(split="train", index=at, sibling=0, env_seed=0, seed=derive(seed, "rollout", at))
        for at in places
    ]


def _tiny_model(folder: str) -> str:
    """The packaged tiny model of the default size, with a tokenizer of these episodes' text."""
    env = SlowTools(seed=0, episodes=Sizes().episodes, scale=0.0)
    texts = [message.content for task in env.task_list("train") for message in task.prompt]
    shape = TinyShape(**TinyConfig().model_dump(exclude={"texts"}))
    make_tiny_model(folder, texts=[*texts, _answer(1, "order-1")], seed=0, shape=shape)
    return folder


if __name__ == "__main__":
    main()
