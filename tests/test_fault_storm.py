"""A storm of faults over the calculator: nothing crashes or stalls, no faulted episode is trained on or
counted, and the metrics count exactly what was injected."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import agentrl
from agentrl.chats import Chats
from agentrl.config import RolloutConfig
from agentrl.engine import Sampling
from agentrl.engines.embedded import EmbeddedEngine
from agentrl.environments.calculator import Calculator, Operator
from agentrl.errors import EngineError, ToolError, WorldError
from agentrl.evaluation import run_evaluation
from agentrl.log import Row, RunFolder, read_rows
from agentrl.metrics import describe_groups
from agentrl.models import load_tokenizer
from agentrl.reward import Evidence
from agentrl.rollout import EpisodePlan, Rollouts
from agentrl.seeds import derive
from agentrl.threads import in_thread
from agentrl.tiny import TinyShape, make_tiny_model
from agentrl.tools import tool
from agentrl.types import Completion, IntArray, Score
from agentrl.workers import Done, Probe, WorkerPool

JUDGE = """
import os

def judge(job):
    return {"right": job["answer"] == job["truth"], "pid": os.getpid()}

def right(job):
    return job["answer"] == job["truth"]

def work(job):
    return right(job) if job.get("probe") else judge(job)
"""
LONG = int(os.environ.get("AGENTRL_STORM", "60"))  # steps of the slow test, a multiple of 20; once: 200
TOOL_DEADLINE_S = 0.3
RESULT_CHARS = 60
ARGS = {
    "levels": [1, 2],
    "max_operand": 9,
    "train_tasks": 64,
    "test_tasks": 16,
    "tool_deadline_s": TOOL_DEADLINE_S,
    "max_result_chars": RESULT_CHARS,
}


class Injector:
    """Decides by its seed which event of which kind fails, and counts what it did."""

    def __init__(self, *, seed: int, shares: Mapping[str, float], split: str = "train") -> None:
        self.shares, self.split = shares, split
        self.injected: Counter[str] = Counter()
        self.over = threading.Event()  # a tool that hangs, hangs until then
        self._seed, self._events, self._lock = seed, Counter[str](), threading.Lock()

    def strike(self, event: str, *kinds: str) -> str:
        """Which of ``kinds`` befalls this ``event``; "" for none."""
        with self._lock:
            self._events[event] += 1
            drawn = derive(self._seed, event, self._events[event]) / 2**63
            for kind in kinds:
                if drawn < self.shares[kind]:
                    self.injected[kind] += 1
                    return kind
                drawn -= self.shares[kind]
            return ""


STORM = {
    "tool_world": 1 / 50,
    "tool_error": 1 / 50,
    "tool_hang": 1 / 100,
    "tool_flood": 1 / 100,
    "reward_world": 1 / 100,
    "worker_killed": 1 / 100,
    "engine": 1 / 50,
}
GALE = {kind: 3 * share for kind, share in STORM.items()}  # for short runs that shall meet everything


class Judge:
    """Scores in one worker process, which a storm kills while it judges."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool, self._alone, self._pid = pool, threading.Lock(), 0

    def __call__(self, evidence: Evidence, *, kill: bool = False) -> Score:
        answer = evidence.answer.removeprefix(r"\boxed{").removesuffix("}")
        with self._alone:
            if kill:
                self._kill_in_a_moment()
            outcome = self._pool.call({"answer": answer, "truth": str(evidence.task.truth["answer"])})
            assert isinstance(outcome, Done)
            self._pid = outcome.value["pid"]
        return Score(float(outcome.value["right"]))

    def _kill_in_a_moment(self) -> None:
        if not self._pid:
            outcome = self._pool.call({"answer": "", "truth": ""})
            assert isinstance(outcome, Done)
            self._pid = outcome.value["pid"]
        os.kill(self._pid, signal.SIGSTOP)  # it takes up the request and does not answer
        threading.Timer(0.05, os.kill, (self._pid, signal.SIGKILL)).start()


class Stormy(Calculator):
    """The calculator in a storm."""

    injector: ClassVar[Injector]
    judge: ClassVar[Judge]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, reward=lambda evidence: 0.0)  # score() is what counts

    @property
    def in_storm(self) -> bool:
        return self.task.id.startswith(self.injector.split)

    @tool
    async def calculate(self, a: int, op: Operator, b: int) -> int | str:
        """Do one operation on two integers."""  # async: no busy machine makes an ordinary call late
        kinds = ("tool_world", "tool_error", "tool_hang", "tool_flood")
        struck = self.injector.strike("tool", *kinds) if self.in_storm else ""
        if struck == "tool_world":
            raise WorldError("the calculator's battery is gone")
        if struck == "tool_error":
            raise ToolError("try again")
        if struck == "tool_hang":
            await in_thread(self.injector.over.wait, 60)
        if struck == "tool_flood":
            return "9" * 10_000_000
        return {"+": a + b, "-": a - b, "*": a * b}[op] if max(abs(a), abs(b)) < 10**15 else "too large"

    def score(self) -> Score:
        struck = self.injector.strike("score", "reward_world", "worker_killed") if self.in_storm else ""
        if struck == "reward_world":
            raise WorldError("the judge is out")
        evidence = Evidence(self.task, self.messages, self, self.completion_tokens)
        return self.judge(evidence, kill=struck == "worker_killed")


class GoldEngine:
    """Says what is right turn by turn, in every fourth episode a wrong answer; fails in the storm."""

    def __init__(self, tokenizer: Any, injector: Injector) -> None:
        env = Calculator(**ARGS)
        self._tokenizer, self._injector, self._splits = tokenizer, injector, questions(ARGS)
        self._gold = {
            task.prompt[-1].content: [*map(_as_text, env.gold(task))]
            for split in env.splits
            for task in env.task_list(split)
        }

    async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        """See :class:`agentrl.engine.Engine`."""
        await asyncio.sleep(0)
        prompt = self._tokenizer.decode(prompt_ids)
        asked = question(prompt)
        if self._splits[asked] == self._injector.split and self._injector.strike("engine", "engine"):
            raise EngineError("out of memory")
        said = self._gold[asked]
        turn = prompt.count("<|im_start|>assistant") - 1
        wrong = turn == len(said) - 1 and sampling.seed % 4 == 0
        ids = self._tokenizer.encode(r"\boxed{-7}" if wrong else said[turn], add_special_tokens=False)
        ids.append(self._tokenizer.eos_token_id)
        assert len(ids) <= sampling.max_tokens
        return Completion(ids, np.full(len(ids), -1.0), np.zeros(len(ids)), "stop")


def questions(args: Mapping[str, Any]) -> dict[str, str]:
    """The split of every question."""
    env = Calculator(**args)
    return {task.prompt[-1].content: split for split in env.splits for task in env.task_list(split)}


def question(prompt: str) -> str:
    """What the user asks in a prompt."""
    return prompt.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]


def _as_text(message: Any) -> str:
    if not message.tool_calls:
        return str(message.content)
    (call,) = message.tool_calls
    spelled = json.dumps({"name": call.name, "arguments": dict(call.arguments)})
    return f"<tool_call>\n{spelled}\n</tool_call>"


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    folder = tmp_path_factory.mktemp("judge")
    (folder / "storm_judge.py").write_text(JUDGE)
    probe = Probe({"probe": True, "answer": "1", "truth": "1"}, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        with WorkerPool("storm_judge:work", size=1, deadline_s=60, memory_mib=64, probe=probe) as pool:
            yield Judge(pool)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with room for two calls and a tokenizer that knows the calculator's words."""
    path = tmp_path_factory.mktemp("checkpoint")
    env = Calculator(**ARGS)
    texts = [
        text
        for task in env.task_list("train")[:40]
        for text in (env.system, task.prompt[-1].content, *map(_as_text, env.gold(task)))
    ]
    shape = TinyShape(
        hidden_size=16, intermediate_size=32, layers=1, heads=2, kv_heads=1, vocab_size=384, max_position=1024
    )
    make_tiny_model(path, texts=texts, seed=0, shape=shape)
    return path


@pytest.fixture
def storm(judge: Judge) -> Iterator[Callable[..., Injector]]:
    """Begins a storm; its hanging tools come back at the end."""
    begun: list[Injector] = []

    def begin(**settings: Any) -> Injector:
        Stormy.injector, Stormy.judge = Injector(**settings), judge
        begun.append(Stormy.injector)
        return Stormy.injector

    yield begin
    for injector in begun:
        injector.over.set()


def rollouts(engine: GoldEngine, tokenizer: Any, *, retries: int) -> Rollouts:
    return Rollouts(
        lambda: Stormy(**ARGS),
        chat=Chats(tokenizer),
        engine=engine,  # type: ignore[arg-type]  # nothing else of an engine is asked for
        limits=RolloutConfig(max_turn_tokens=128, max_episode_tokens=1024, retries=retries, deadline_s=300.0),
        in_flight=16,
        deterministic=True,  # a tool that hangs holds a round up, and must not hold it for ever
    )


def plans(split: str, *, tasks: int, siblings: int) -> list[EpisodePlan]:
    return [
        EpisodePlan(split=split, index=index, sibling=sibling, env_seed=index, seed=derive(1, index, sibling))
        for index in range(tasks)
        for sibling in range(siblings)
    ]


def counted(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """What the metrics say of the storm, in the injector's words; every key stands in every row."""
    names = {
        "fault/tool": "tool_world",
        "fault/reward": "reward_world",
        "fault/worker": "worker_killed",
        "fault/engine": "engine",
        "fault/environment": "nothing of the kind",
        "tool/error": "tool_error",
        "tool/late": "tool_hang",
        "tool/cut": "tool_flood",
    }
    return Counter({name: int(sum(row[key] for row in rows)) for key, name in names.items()})


def test_without_retries_every_fault_that_is_not_healed_costs_one_episode(
    storm: Callable[..., Injector], checkpoint: Path
) -> None:
    injector = storm(seed=3, shares=GALE)
    tokenizer = load_tokenizer(checkpoint)
    running = rollouts(GoldEngine(tokenizer, injector), tokenizer, retries=0)
    sampling = Sampling(max_tokens=1, seed=0)
    groups = asyncio.run(running.groups(plans("train", tasks=32, siblings=4), sampling=sampling))

    injected = injector.injected
    assert set(injected) == set(STORM)  # all of them
    row = describe_groups(groups)
    assert counted([row]) == injected
    episodes = [trajectory for group in groups for trajectory in group.trajectories]
    invalid = [trajectory for trajectory in episodes if not trajectory.valid]
    assert len(invalid) == injected["tool_world"] + injected["reward_world"] + injected["engine"]
    assert row["episode/valid"] == 1 - len(invalid) / len(episodes)
    assert row["fault/retried"] == injected["worker_killed"]
    assert all(not t.turns and t.score is None for t in invalid)
    assert all(t.turns and t.score is not None for group in groups for t in group.valid)
    # An error or a flood is an observation that the episode goes on from, to the right answer or the wrong.
    assert {trajectory.stop_reason for group in groups for trajectory in group.valid} == {"answered"}


def test_retries_heal_all_but_the_most_unlucky_to_what_a_calm_day_gives(
    storm: Callable[..., Injector], checkpoint: Path
) -> None:
    tokenizer = load_tokenizer(checkpoint)
    planned, sampling = plans("test", tasks=16, siblings=4), Sampling(max_tokens=1, seed=0)
    shares = {**dict.fromkeys(STORM, 0.0), "tool_world": 0.1, "reward_world": 0.2, "engine": 0.1}
    outcomes = []
    for current in (dict.fromkeys(STORM, 0.0), shares):
        injector = storm(seed=5, shares=current, split="test")
        running = rollouts(GoldEngine(tokenizer, injector), tokenizer, retries=1)
        outcomes.append(asyncio.run(run_evaluation(running, planned, sampling=sampling, k=(1,))))
    calm, stormy = outcomes
    assert sum(injector.injected.values()) > 20
    assert sum(count.invalid for count in calm.counts) == 0
    assert 0 < sum(count.invalid for count in stormy.counts) < sum(injector.injected.values()) / 2
    for before, after in zip(calm.counts, stormy.counts, strict=True):
        assert after.valid + after.invalid == before.valid
        assert before.correct - after.invalid <= after.correct <= before.correct  # none is counted as wrong
        assert before.valid - before.correct >= after.valid - after.correct
    assert stormy.reports["pass@1"].headline is None  # above 2 % invalid


def configured(name: str, output: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": name,
        "steps": 10,
        "output": str(output),
        "environment": {"id": f"{__name__}:Stormy", "args": ARGS},
        "rollout": {
            "tasks_per_step": 4,
            "group_size": 4,
            "max_turn_tokens": 128,
            "max_episode_tokens": 1024,
            "max_invalid": 0.5,
            "deadline_s": 300.0,
        },
        "lora": {"r": 2},
        "engine": {"max_sequences": 16, "deterministic": True},
        "evaluation": {"tasks": 2, "samples": 2},
        "log": {"trackers": [], "transcripts": 1},
    }
    for key, change in changes.items():
        values[key] = {**values.get(key, {}), **change} if isinstance(change, Mapping) else change
    return values


def train_rows(folder: Path) -> list[Row]:
    return [row for row in read_rows(RunFolder(folder)) if row["phase"] == "train"]


def test_a_run_of_ten_steps_counts_what_was_injected(
    storm: Callable[..., Injector], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    injector = storm(seed=3, shares=GALE)
    gold = GoldEngine(load_tokenizer(checkpoint), injector)
    monkeypatch.setattr(EmbeddedEngine, "generate", lambda self, ids, sampling: gold.generate(ids, sampling))
    summary = agentrl.train(configured("storm", tmp_path, model={"path": str(checkpoint)}))

    assert summary["steps"] == 10
    rows = train_rows(tmp_path / "storm")
    assert len(rows) == 10
    assert set(injector.injected) == set(STORM)
    assert counted(rows) == injector.injected
    assert all(0 < row["reward/mean"] < 1 for row in rows)
    assert any(row.get("loss/policy") for row in rows)


@pytest.mark.slow
def test_many_steps_in_a_storm_learn_what_a_calm_run_learns(
    storm: Callable[..., Injector], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = dict.fromkeys(STORM, 0.0)
    storm(seed=0, shares=calm)
    narrow = {"levels": [1], "train_tasks": 4000, "test_tasks": 200}
    agentrl.train(
        configured(
            "base",
            tmp_path,
            steps=0,
            environment={"args": {**ARGS, **narrow}},
            model={"tiny": {"hidden_size": 64, "intermediate_size": 192, "layers": 2}},
            warm_start={
                "episodes": 2000,
                "steps": 400,
                "learning_rate": 2e-3,
                "probe_every": 5,
                "probe_tasks": 64,
                "until": 0.4,
            },
            rollout={"max_turn_tokens": 48, "max_episode_tokens": 256},
        )
    )
    base = tmp_path / "base" / "warm_start"
    curves = []
    for name, shares in (("calm", calm), ("storm", STORM)):
        injector = storm(seed=1, shares=shares)
        with monkeypatch.context() as patch:
            patch.setattr(EmbeddedEngine, "generate", failing(injector, load_tokenizer(base), narrow))
            agentrl.train(
                configured(
                    name,
                    tmp_path,
                    model={"path": str(base)},
                    steps=LONG,
                    environment={"args": {**ARGS, **narrow}},
                    rollout={"max_turn_tokens": 48, "max_episode_tokens": 256, "tasks_per_step": 8},
                    lora={"r": 16, "alpha": 32, "train_norms": True},
                    optimizer={"learning_rate": 2e-3, "warmup_steps": 10, "grad_clip": 0.3},
                )
            )
        rows = train_rows(tmp_path / name)
        assert len(rows) == LONG
        assert counted(rows) == injector.injected
        curves.append(np.array([row["reward/mean"] for row in rows]))
    assert set(injector.injected) == set(STORM)
    calm_curve, stormy_curve = (curve.reshape(-1, 20).mean(1) for curve in curves)
    # A mean of 640 episodes each; two runs of one configuration with different seeds differ by as much.
    assert np.abs(calm_curve - stormy_curve).mean() < 0.1
    assert stormy_curve[-1] > stormy_curve[0]


def failing(injector: Injector, tokenizer: Any, narrow: Mapping[str, Any]) -> Callable[..., Any]:
    """The engine's generate, struck where it is asked about a task of the storm's split."""
    splits, generate = questions({**ARGS, **narrow}), EmbeddedEngine.generate

    async def in_storm(self: EmbeddedEngine, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        split = splits[question(tokenizer.decode(prompt_ids))]
        if split == injector.split and injector.strike("engine", "engine"):
            raise EngineError("out of memory")
        return await generate(self, prompt_ids, sampling)

    return in_storm
