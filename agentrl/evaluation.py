"""pass@k on held-out tasks: the rollouts of training without gradients.

An episode passes when its return reaches ``success``. Every task has n episodes; invalid ones (the world
failed) are left out and counted. Intervals are clustered by task (``agentrl.statistics``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from agentrl.chats import Chats
from agentrl.checkpoint import read_adapter
from agentrl.config import EngineConfig, RolloutConfig
from agentrl.engine import Adapter, Engine, Sampling
from agentrl.env import Env
from agentrl.errors import BadConfig, BadData
from agentrl.faults import commonest_failure
from agentrl.models import (
    context_length,
    default_device,
    load_model,
    load_settings,
    load_tokenizer,
    stop_token_ids,
)
from agentrl.preflight import check_bare
from agentrl.registry import make
from agentrl.rollout import EpisodePlan, Rollouts
from agentrl.seeds import derive
from agentrl.serving import Served, open_engine
from agentrl.statistics import Estimate, PassReport, TaskCount, paired, pass_at_k, report_pass
from agentrl.threads import in_compute_thread, run_sync
from agentrl.types import Group

__all__ = [
    "Evaluation",
    "Measurement",
    "compare",
    "evaluate",
    "evaluation_plans",
    "run_evaluation",
    "tasks_available",
]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How a policy did on P tasks."""

    counts: tuple[TaskCount, ...]  # (P,) in the order of the tasks
    k: tuple[int, ...]  # what to report pass@k for
    mean_return: float | None  # over valid episodes; None where there is none
    failure: str = ""  # the commonest of the world's, where episodes are invalid

    @property
    def reports(self) -> dict[str, PassReport]:
        """``{"pass@1": ..., "pass@8": ...}``."""
        return {f"pass@{k}": report_pass(self.counts, k) for k in self.k}

    def to_json(self) -> dict[str, Any]:
        """Each pass@k with its 95 % interval, and what qualifies it; None above 2 % invalid episodes."""
        reports = self.reports
        figures = {name: report.headline and asdict(report.headline) for name, report in reports.items()}
        first = next(iter(reports.values()))
        qualifiers = {name: {"best": r.best, "worst": r.worst} for name, r in reports.items() if r.invalid}
        return {
            **figures,
            "return": self.mean_return,
            "tasks": first.tasks,
            "samples": self.counts[0].valid + self.counts[0].invalid,
            "invalid": first.invalid,
            **({"bounds": qualifiers, "failure": self.failure} if qualifiers else {}),
        }


@dataclass(frozen=True, slots=True)
class Measurement:
    """A policy's sampled evaluation and, beside it, its greedy one."""

    sampled: Evaluation
    greedy: Evaluation | None = None

    @property
    def figures(self) -> dict[str, Any]:
        """pass@k by name, and ``greedy``: pass@1 of the likeliest answers."""
        figures = self.sampled.to_json()
        return figures if self.greedy is None else figures | {"greedy": self.greedy.to_json()["pass@1"]}

    def write(self, path: Path) -> None:
        """Keep the counts, for a run that goes on later and to compare two runs; whole or not at all."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What ``write`` kept."""
        kept = json.loads(path.read_text(encoding="utf-8"))
        greedy = kept["greedy"]
        return cls(_evaluation(kept["sampled"]), None if greedy is None else _evaluation(greedy))


def _evaluation(kept: Mapping[str, Any]) -> Evaluation:
    counts = tuple(TaskCount(**count) for count in kept["counts"])
    return Evaluation(**{**kept, "counts": counts, "k": tuple(kept["k"])})


def evaluation_plans(*, split: str, tasks: int, samples: int, seed: int) -> list[EpisodePlan]:
    """``samples`` episodes of each of the first ``tasks`` tasks of ``split``; the same seed, the same
    episodes."""
    return [
        EpisodePlan(
            split=split,
            index=index,
            sibling=sibling,
            env_seed=derive(seed, "evaluation", index) % 2**32,
            seed=derive(seed, "evaluation", index, sibling),
        )
        for index in range(tasks)
        for sibling in range(samples)
    ]


def tasks_available(make_env: Callable[[], Env], split: str, *, wanted: int) -> int:
    """``wanted``, or fewer where ``split`` has fewer tasks. Raises BadData for an empty split."""
    env = make_env()
    check_bare(env)
    with closing(env):
        tasks = env.task_list(split)
        available = len(tasks) if isinstance(tasks, Sequence) else len(tasks.first(wanted))
    if not available:
        raise BadData(
            f"the split {split!r} of {type(env).__name__} has no tasks: nothing can be measured on it"
        )
    return min(wanted, available)


async def run_evaluation(
    rollouts: Rollouts,
    plans: Sequence[EpisodePlan],
    *,
    sampling: Sampling,
    k: Sequence[int],
    success: float = 1.0,
    on_episode: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run ``plans`` and count what passed."""
    groups = await rollouts.groups(plans, sampling=sampling, on_episode=on_episode)
    returns = [trajectory.reward for group in groups for trajectory in group.valid]
    counts = tuple(_count(group, success) for group in groups)
    mean_return = float(np.mean(returns)) if returns else None
    return Evaluation(counts, tuple(k), mean_return, commonest_failure(groups))


def _count(group: Group, success: float) -> TaskCount:
    correct = sum(trajectory.reward >= success for trajectory in group.valid)
    invalid = len(group.trajectories) - len(group.valid)
    return TaskCount(task_id=group.task.id, valid=len(group.valid), correct=correct, invalid=invalid)


def compare(before: Evaluation, after: Evaluation, k: int = 1) -> Estimate | None:
    """The paired gain in pass@k over the tasks that both could measure, with its 95 % interval.

    None where there is no such task. Raises BadData for evaluations of other tasks than each other's.
    """
    _check_same_tasks(before.counts, after.counts)
    pairs = [
        (pass_at_k(b.valid, b.correct, k), pass_at_k(a.valid, a.correct, k))
        for b, a in zip(before.counts, after.counts, strict=True)
        if min(b.valid, a.valid) >= k
    ]
    return paired([pair[0] for pair in pairs], [pair[1] for pair in pairs]) if pairs else None


def _check_same_tasks(before: Sequence[TaskCount], after: Sequence[TaskCount]) -> None:
    """Raises BadData. A task without a valid episode may have nothing but a stand-in for its name."""
    if len(before) != len(after):
        raise BadData(
            f"{len(before)} tasks can't be compared with {len(after)}: measure both on the same tasks"
        )
    for one, other in zip(before, after, strict=True):
        if one.valid and other.valid and one.task_id != other.task_id:
            raise BadData(
                f"the task {one.task_id!r} can't be compared with {other.task_id!r}: measure both on the "
                "same tasks in the same order"
            )


def evaluate(
    environment: str | Env | type[Env] | Callable[..., Env],
    *,
    model: str | Path,
    adapter: str | Path | None = None,  # a PEFT adapter's folder
    n: int = 8,
    k: Iterable[int] = (1,),
    tasks: int = 100,
    split: str = "test",
    seed: int = 0,
    sampling: Sampling | None = None,  # max_tokens of a turn, temperature, top_p, top_k; its seed is not used
    context: int = 2048,  # tokens of a whole conversation; at most the model's
    engine: EngineConfig | None = None,  # None: the embedded one
    success: float = 1.0,  # the return from which an episode passes
    args: Mapping[str, Any] | None = None,  # keyword arguments of the environment
    on_episode: Callable[[], None] = lambda: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Evaluation:
    """Measure pass@k of ``model`` (a folder or hub id) on ``environment``; blocks until done.

    ``engine`` is what a run's ``engine`` section may be: of a model that a server has, only the tokenizer,
    the chat template and the configs are read from ``model``.

    Every episode has an environment of its own; of an instance, which is left as it is, that is a copy. Works
    under a running event loop, too. Raises UserError for what can't be loaded or does not fit together.
    """
    ks = tuple(k)
    if not ks or max(ks) > n or min(ks) < 1:
        raise BadConfig(f"k is {list(ks)}: each must be at least 1 and at most n, {n}; raise -n or lower -k")
    engine = engine or EngineConfig()
    sampling = sampling or Sampling(max_tokens=512, seed=0)
    if sampling.temperature == 0 and n > 1:
        raise BadConfig(f"n is {n}, all the same with a temperature of 0: take 1 (-n 1, or --greedy)")
    make_env = _factory(environment, dict(args or {}))
    available = tasks_available(make_env, split, wanted=tasks)
    plans = evaluation_plans(split=split, tasks=available, samples=n, seed=seed)
    loaded, known = _load(model, engine)
    tokenizer = load_tokenizer(model)
    chats = Chats(tokenizer, stop_token_ids=stop_token_ids(known), on_certificate=on_note)
    context = min(context, context_length(known))
    limits = RolloutConfig(max_turn_tokens=min(sampling.max_tokens, context), max_episode_tokens=context)
    loras = None if adapter is None else read_adapter(adapter)
    served = Served(
        base=model,
        model=loaded,
        tokenizer=tokenizer,
        limits=limits,
        max_lora_rank=None if loras is None else int(loras.config["r"]),
        lora_modules=None if loras is None else _names(loras.config["target_modules"]),
        training=False,
        seed=seed,
    )

    async def run(serving: Engine) -> Evaluation:
        rollouts = Rollouts(
            make_env,
            chat=chats,
            engine=serving,
            limits=limits,
            in_flight=engine.max_sequences,
            deterministic=engine.deterministic,
            on_stall=on_note,
        )
        return await run_evaluation(
            rollouts, plans, sampling=sampling, k=ks, success=success, on_episode=on_episode
        )

    return run_sync(_with_engine(engine, served, loras, run, on_note=on_note))


def _names(targets: str | Iterable[str]) -> list[str] | None:
    """The last parts of the names that PEFT's target modules are; None for a pattern."""
    return None if isinstance(targets, str) else sorted({name.rpartition(".")[2] for name in targets})


async def _with_engine(
    settings: EngineConfig,
    served: Served,
    adapter: Adapter | None,
    run: Callable[[Engine], Awaitable[Evaluation]],
    *,
    on_note: Callable[[str], None],
) -> Evaluation:
    """What ``run`` returns with an engine that serves ``adapter`` and is closed afterwards."""
    engine = await open_engine(settings, served, on_note=on_note)
    try:
        if adapter is not None:
            await engine.load(adapter, 0)
        return await run(engine)
    finally:
        await engine.close()


def _load(model: str | Path, engine: EngineConfig) -> tuple[Any | None, Any]:
    """The model where ``engine`` serves it from this process, and what has its config in any case."""
    if engine.kind != "embedded":
        return None, load_settings(model)
    # In the thread that will compute: a second one with a team of its own would halve the speed of both.
    loaded = run_sync(in_compute_thread(load_model, model, device=default_device()))
    return loaded, loaded


def _factory(
    environment: str | Env | type[Env] | Callable[..., Env], args: Mapping[str, Any]
) -> Callable[[], Env]:
    """Makes an environment for each episode."""
    made = make(environment, **args)
    if environment is not made:
        return lambda: make(environment, **args)
    check_bare(made)
    # What task lists are remembered by stays one object: a copy of it would have them read again.
    return lambda: copy.deepcopy(made, {id(made._settings): made._settings})
