"""Held-out measurement: exact counts, faults left out, fresh environments, any caller."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import agentrl
from agentrl.chats import Chats
from agentrl.config import EngineConfig, LoraConfig, RolloutConfig
from agentrl.engine import Sampling
from agentrl.env import Env
from agentrl.errors import BadConfig, BadData, WorldError
from agentrl.evaluation import (
    Evaluation,
    Measurement,
    compare,
    evaluate,
    evaluation_plans,
    run_evaluation,
    tasks_available,
)
from agentrl.rollout import Rollouts
from agentrl.statistics import TaskCount
from agentrl.tool_env import ToolEnv
from agentrl.types import Message, Task

SAMPLING = Sampling(max_tokens=12, seed=0)


def count(task: str, valid: int, correct: int, invalid: int = 0) -> TaskCount:
    return TaskCount(task_id=task, valid=valid, correct=correct, invalid=invalid)


def measured(
    make_env: Any, engine: Any, tokenizer: Any, *, tasks: int, samples: int, **settings: Any
) -> Evaluation:
    rollouts = Rollouts(
        make_env,
        chat=Chats(tokenizer),
        engine=engine,
        limits=RolloutConfig(max_turn_tokens=32, max_episode_tokens=256, retries=0),
        in_flight=4,
        deterministic=True,
    )
    plans = evaluation_plans(split="test", tasks=tasks, samples=samples, seed=3)
    return asyncio.run(run_evaluation(rollouts, plans, sampling=SAMPLING, **({"k": (1, 2)} | settings)))


class Marks(ToolEnv):
    """The reward is a tenth of the answer, and the world ends where it is asked to."""

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(id=f"{split}-{index}", prompt=(Message("user", f"{index}"),)) for index in range(3)]

    def reward(self, evidence: Any) -> float:
        if evidence.answer == "end":
            raise WorldError("as you wish")
        return float(evidence.answer) / 10


def test_passes_are_counted_and_the_worlds_faults_left_out(scripted_engine: Any, tokenizer: Any) -> None:
    said = iter(["10", "0", "10", "10", "end", "10", "5", "end", "0", "5", "5", "5"])
    evaluation = measured(Marks, scripted_engine(lambda prompt: next(said)), tokenizer, tasks=3, samples=4)
    # Deterministic rounds of four ask task by task.
    assert evaluation.counts == (count("test-0", 4, 3), count("test-1", 2, 1, 2), count("test-2", 4, 0))
    assert evaluation.mean_return == pytest.approx((1 + 0 + 1 + 1 + 1 + 0.5 + 0 + 0.5 + 0.5 + 0.5) / 10)
    first, second = evaluation.reports["pass@1"], evaluation.reports["pass@2"]
    assert first.estimate is not None
    assert second.estimate is not None
    assert first.estimate.value == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert second.estimate.value == pytest.approx((1 + 1 + 0) / 3)
    assert (first.invalid, first.headline) == (pytest.approx(2 / 12), None)
    figures = evaluation.to_json()
    assert (figures["pass@1"], figures["tasks"], figures["samples"]) == (None, 3, 4)
    assert figures["failure"] == (
        "2 failed at the boundary 'reward', the last one, of task 'test-1', with: as you wish"
    )
    assert figures["bounds"]["pass@1"] == {"best": pytest.approx(1.5 / 3), "worst": pytest.approx(1 / 3)}


def test_what_counts_as_a_pass_is_a_threshold(scripted_engine: Any, tokenizer: Any) -> None:
    for success, correct in ((1.0, 0), (0.5, 2)):
        engine = scripted_engine("5")
        evaluation = measured(Marks, engine, tokenizer, tasks=1, samples=2, success=success)
        assert evaluation.counts == (count("test-0", 2, correct),)


def test_every_episode_is_reported_when_it_ends(scripted_engine: Any, tokenizer: Any) -> None:
    ended: list[int] = []
    measured(Marks, scripted_engine("1"), tokenizer, tasks=3, samples=2, on_episode=lambda: ended.append(1))
    assert len(ended) == 6


def test_the_same_seed_plans_the_same_episodes() -> None:
    plans = evaluation_plans(split="test", tasks=3, samples=2, seed=5)
    assert plans == evaluation_plans(split="test", tasks=3, samples=2, seed=5)
    assert [(plan.index, plan.sibling) for plan in plans] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({plan.seed for plan in plans}) == 6
    assert len({plan.env_seed for plan in plans}) == 3
    other = evaluation_plans(split="test", tasks=3, samples=2, seed=6)
    assert not {plan.seed for plan in plans} & {plan.seed for plan in other}


def test_a_split_may_have_fewer_tasks_than_wanted_but_not_none(sums: type[Env]) -> None:
    class Streamed(sums):  # type: ignore[misc, valid-type]
        splits = ("test", "void")
        closed = 0

        def tasks(self, split: str) -> Iterator[Task]:
            return iter([Task(id="a", prompt=())] * 5 if split == "test" else [])

        def close(self) -> None:
            Streamed.closed += 1

    assert tasks_available(sums, "test", wanted=5) == 5
    assert tasks_available(sums, "test", wanted=50) == 12
    assert tasks_available(Streamed, "test", wanted=50) == 5
    with pytest.raises(BadData, match="the split 'void' of Streamed has no tasks"):
        tasks_available(Streamed, "void", wanted=1)
    assert Streamed.closed == 2


def test_a_measurement_is_read_back_as_it_was(tmp_path: Path) -> None:
    sampled = Evaluation((count("a", 4, 1), count("b", 3, 3, 1)), (1, 2), 0.5, "1 failed")
    greedy = Evaluation((count("a", 1, 1), count("b", 1, 0)), (1,), 0.5)
    for measurement in (Measurement(sampled, greedy), Measurement(sampled)):
        measurement.write(tmp_path / "before.json")
        assert Measurement.read(tmp_path / "before.json") == measurement
    assert [path.name for path in tmp_path.iterdir()] == ["before.json"]
    assert Measurement(sampled, greedy).figures["greedy"]["value"] == 0.5
    assert json.dumps(Measurement(sampled, greedy).figures)


def test_a_gain_is_paired_over_the_tasks_that_both_could_measure() -> None:
    before = Evaluation((count("a", 4, 1), count("b", 4, 2), count("c", 0, 0, 4)), (1,), 0.5)
    after = Evaluation((count("a", 4, 3), count("b", 4, 4), count("c", 4, 4)), (1,), 0.9)
    gain = compare(before, after)
    assert gain is not None
    assert gain.value == pytest.approx(0.5)
    nothing = Evaluation(tuple(count(one.task_id, 0, 0, 4) for one in before.counts), (1,), None)
    assert compare(nothing, after) is None


def test_other_tasks_than_each_others_are_not_compared() -> None:
    one = Evaluation((count("a", 4, 1), count("b", 4, 2)), (1,), 0.5)
    for others in ((count("a", 4, 1),), (count("b", 4, 2), count("a", 4, 1))):
        with pytest.raises(BadData, match="measure both on the same tasks"):
            compare(one, Evaluation(others, (1,), 0.5))
    unnamed = Evaluation((count("a", 4, 1), count("test[1]", 0, 0, 4)), (1,), 0.5)
    assert compare(one, unnamed) is not None


# -- the public function, with the engine --


@pytest.fixture
def adapter(make_model: Any, tmp_path: Path) -> Path:
    from agentrl.checkpoint import write_adapter
    from agentrl.config import AlgorithmConfig, BatchConfig, OptimizerConfig
    from agentrl.engine import Adapter
    from agentrl.learner import Learner

    learner = Learner(
        make_model(),
        lora=LoraConfig(r=2, train_norms=True),
        algorithm=AlgorithmConfig(),
        optimizer=OptimizerConfig(),
        batch=BatchConfig(),
        steps=1,
        seed=0,
    )
    published = learner.publish()
    # With every norm turned off all tokens are equally likely, and greedy says the first: "!".
    silent = {name: tensor * 0 for name, tensor in published.tensors.items()}
    write_adapter(tmp_path, Adapter(published.config, silent))
    return tmp_path


class Exclaims(Marks):
    """Rewards nothing but exclamation marks, which are cut off."""

    def reward(self, evidence: Any) -> float:
        return float(evidence.messages[-1].content == "!" * 12)


def test_evaluate_measures_a_checkpoint_and_its_adapter(tiny_checkpoint: Path, adapter: Path) -> None:
    settings = {"n": 1, "tasks": 3, "sampling": Sampling(max_tokens=12, temperature=0.0, seed=0)}
    bare = evaluate(Exclaims, model=tiny_checkpoint, **settings)
    adapted = evaluate(Exclaims, model=tiny_checkpoint, adapter=adapter, **settings)
    assert [one.correct for one in bare.counts] == [0, 0, 0]
    assert [one.correct for one in adapted.counts] == [1, 1, 1]


def test_an_instance_is_copied_for_every_episode_and_left_as_it_is(tiny_checkpoint: Path) -> None:
    read: list[str] = []

    class Kept(Exclaims):
        def __init__(self, note: Any) -> None:
            super().__init__()
            self.note = note
            self.used = False

        def tasks(self, split: str) -> Sequence[Task]:
            read.append(split)
            return super().tasks(split)

        def setup(self, task: Task) -> None:
            assert not self.used
            self.used = True

    env = Kept(note=object())  # of no equal but itself
    evaluation = agentrl.evaluate(env, model=tiny_checkpoint, n=2, tasks=3, sampling=SAMPLING)
    assert [one.valid for one in evaluation.counts] == [2, 2, 2]
    assert not env.used
    assert read == ["test"]


def test_evaluate_works_under_a_running_event_loop(tiny_checkpoint: Path) -> None:
    async def notebook() -> Evaluation:
        return agentrl.evaluate(Exclaims, model=tiny_checkpoint, n=2, tasks=2, sampling=SAMPLING)

    assert [one.valid for one in asyncio.run(notebook()).counts] == [2, 2]


def test_the_same_seed_measures_the_same(tiny_checkpoint: Path) -> None:
    class Even(Marks):
        def reward(self, evidence: Any) -> float:
            return float(len(evidence.messages[-1].content) % 2)

    def counts(seed: int) -> tuple[TaskCount, ...]:
        settings = {"n": 8, "tasks": 3, "seed": seed, "sampling": SAMPLING}
        return evaluate(Even, model=tiny_checkpoint, **settings).counts

    assert counts(1) == counts(1) != counts(2)


def test_rounds_are_kept_where_the_engine_is_to_be_deterministic(
    tiny_checkpoint: Path, scripted_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Marks):
        """The first of a round ends long before the last."""

        def reward(self, evidence: Any) -> float:
            time.sleep(0.02 * int(evidence.task.id[-1]))
            return 1.0

    engine = scripted_engine("1")

    async def open_scripted(settings: EngineConfig, served: Any, **callbacks: Any) -> Any:
        return engine

    monkeypatch.setattr("agentrl.evaluation.open_engine", open_scripted)
    rounds = EngineConfig(max_sequences=3, deterministic=True)
    evaluate(Slow, model=tiny_checkpoint, n=4, tasks=3, engine=rounds)
    assert [len(batch) for batch in engine.batches] == [3, 3, 3, 3]
    assert engine.closed


@pytest.mark.parametrize("k", [(1, 9), (0,), ()])
def test_a_k_that_can_not_be_estimated_is_refused_before_anything_is_loaded(k: tuple[int, ...]) -> None:
    with pytest.raises(BadConfig, match=r"at most n, 8"):
        evaluate(Marks, model="nowhere", n=8, k=k)


def test_a_stalled_evaluation_says_what_it_waits_for(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()

    class Slow(ToolEnv):
        def tasks(self, split: str) -> Sequence[Task]:
            return [Task(id=f"{split}-0", prompt=(Message("user", "?"),))]

        def reward(self, evidence: Any) -> float:
            return float(told.wait(30))

    def on_note(note: str) -> None:
        if "task 'test-0', sibling 0, on the reward" in note:
            told.set()

    patient = RolloutConfig
    monkeypatch.setattr("agentrl.evaluation.RolloutConfig", partial(patient, stall_s=0.02))
    settings: dict[str, Any] = {"n": 1, "sampling": SAMPLING, "on_note": on_note}
    assert evaluate(Slow, model=tiny_checkpoint, context=256, **settings).mean_return == 1.0
