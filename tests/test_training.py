"""The loop: end to end, stopped and resumed to the same numbers, from any caller."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import agentrl
from agentrl.checkpoint import Checkpoints
from agentrl.engine import Adapter
from agentrl.errors import BadConfig, CannotWrite, UserError, WorldError
from agentrl.evaluation import Measurement, compare
from agentrl.learner import Learner, Optimization
from agentrl.log import Row, RunFolder, RunLog, read_rows
from agentrl.seeds import derive
from agentrl.threads import in_compute_thread, run_sync
from agentrl.tool_env import ToolEnv
from agentrl.types import Message, Sample, Task

SEED = 4


class Letters(ToolEnv):
    """Rewards an odd number of characters, cut off or not: half of what random weights say."""

    on_score: ClassVar[Callable[[Letters], None]] = staticmethod(lambda env: None)

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(id=f"{split}-{index}", prompt=(Message("user", f"Say {index}"),)) for index in range(5)]

    def reward(self, evidence: Any) -> float:
        type(self).on_score(self)
        return float(len(evidence.messages[-1].content) % 2)


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    yield
    Letters.on_score = staticmethod(lambda env: None)


def settings(name: str, output: Path, model: Path) -> dict[str, Any]:
    """Four steps that take a few tenths of a second."""
    return {
        "name": name,
        "seed": SEED,
        "steps": 4,
        "output": str(output),
        "environment": {"id": f"{__name__}:Letters"},
        "model": {"path": str(model)},
        "rollout": {"tasks_per_step": 3, "group_size": 4, "max_turn_tokens": 6, "max_episode_tokens": 64},
        "lora": {"r": 2, "train_norms": True},
        "optimizer": {"learning_rate": 1e-2},
        "algorithm": {"minibatches": 2},
        "engine": {"max_sequences": 8, "deterministic": True},
        "evaluation": {"tasks": 3, "samples": 2, "k": [1, 2], "every": 2, "curve_tasks": 2},
        "checkpoint": {"every": 3},
        "log": {"trackers": []},
    }


@pytest.fixture
def config(tmp_path: Path, tiny_checkpoint: Path) -> Callable[..., dict[str, Any]]:
    """Makes ``settings``; sections given replace single ones."""

    def make(name: str = "run", **changes: Any) -> dict[str, Any]:
        values = settings(name, tmp_path, tiny_checkpoint)
        for key, change in changes.items():
            values[key] = {**values[key], **change} if isinstance(change, Mapping) else change
        return values

    return make


def rows(folder: Path) -> list[Row]:
    """The metrics without what a clock says."""
    return [
        {key: value for key, value in row.items() if not key.startswith("time/")}
        for row in read_rows(RunFolder(folder))
    ]


def files(folder: Path) -> dict[str, bytes]:
    """What the last checkpoint holds, by name."""
    (path,) = (path for path in (folder / "checkpoints").iterdir() if path.name == "step_000004")
    return {file.name: file.read_bytes() for file in path.iterdir()}


def interrupt_in_step(step: int) -> Callable[[Letters], None]:
    """Sends this process a Ctrl-C when an episode of ``step`` (from 0) is scored."""
    sent: list[int] = []

    def on_score(env: Letters) -> None:
        if not sent and env.np_random_seed == derive(SEED, "environment", step, 0) % 2**32:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGINT)

    return on_score


class Counted(Letters):
    """As many tasks as a reader finds when it reads them."""

    def tasks(self, split: str) -> Iterator[Task]:  # type: ignore[override]
        yield from super().tasks(split)

    def gold(self, task: Task) -> Sequence[Message]:
        return (Message("assistant", "a"),)


@pytest.mark.parametrize("given", [Counted, {"environment": Counted}, {"environment": {"id": Counted()}}])
def test_an_environment_without_a_name_is_refused(given: Any) -> None:
    with pytest.raises(UserError, match=r"'module:Counted', or agentrl\.register\('counted', Counted\)"):
        agentrl.train(given)


class Door(Letters):
    """Counts who came in and has not left."""

    inside = 0

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        Door.inside += 1

    def gold(self, task: Task) -> Sequence[Message]:
        return (Message("assistant", "a"),)

    def close(self) -> None:
        Door.inside -= 1


def test_every_environment_of_a_run_is_closed(config: Callable[..., dict[str, Any]]) -> None:
    values = config(environment={"id": f"{__name__}:Door"}, steps=1, lora={"train_norms": False})
    probing = {"probe_every": 1, "probe_tasks": 2}
    agentrl.train({**values, "warm_start": {"steps": 2, "episodes": 2, "episodes_per_step": 2, **probing}})
    assert Door.inside == 0


def test_resuming_a_run_that_there_is_none_of_says_that_a_new_one_begins(
    config: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def stop(*args: Any, **kwargs: Any) -> None:
        raise BadConfig("far enough")

    monkeypatch.setattr("agentrl.training.prepare_base", stop)
    with pytest.raises(BadConfig, match="far enough"):
        agentrl.train(config("typo"), resume=True)
    assert "typo to go on with: a new one begins" in capsys.readouterr().out


def test_a_tiny_model_reads_a_stream_of_few_tasks_again(config: Callable[..., dict[str, Any]]) -> None:
    tiny = {"hidden_size": 16, "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "texts": 12}
    model, environment = {"path": None, "tiny": tiny}, {"id": f"{__name__}:Counted"}
    assert agentrl.train(config(steps=0, model=model, environment=environment))["tasks"] == 3


def test_the_calculator_is_trained_end_to_end_from_nothing(tmp_path: Path) -> None:
    summary = agentrl.train(
        {
            "name": "calculator",
            "steps": 2,
            "output": str(tmp_path),
            "environment": {"id": "calculator", "args": {"levels": [1], "max_operand": 9}},
            "model": {
                "tiny": {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "layers": 2,
                    "heads": 2,
                    "kv_heads": 1,
                    "vocab_size": 320,
                    "texts": 40,
                }
            },
            "warm_start": {
                "episodes": 24,
                "steps": 12,
                "episodes_per_step": 8,
                "learning_rate": 1e-2,
                "probe_every": 6,
                "probe_tasks": 6,
            },
            "rollout": {
                "tasks_per_step": 4,
                "group_size": 4,
                "max_turn_tokens": 32,
                "max_episode_tokens": 192,
            },
            "lora": {"r": 4, "train_norms": True},
            "engine": {"max_sequences": 16, "deterministic": True},
            "evaluation": {
                "tasks": 6,
                "samples": 2,
                "k": [1, 2],
                "greedy": True,
                "every": 1,
                "curve_tasks": 3,
            },
        }
    )
    folder = tmp_path / "calculator"
    assert summary == json.loads((folder / "summary.json").read_text())
    for moment in ("before", "after"):
        assert summary[moment]["tasks"] == 6
        for measure in ("pass@1", "pass@2", "greedy"):
            assert {"value", "low", "high"} <= summary[moment][measure].keys()
    assert (summary["steps"], summary["tasks"], set(summary["gain"])) == (2, 6, {"pass@1", "pass@2"})
    written = {path.name for path in folder.iterdir()}
    assert written >= {"base", "warm_start", "config.yaml", "curve.png", "metrics.jsonl"}
    before, after = (Measurement.read(folder / f"{moment}.json") for moment in ("before", "after"))
    gain = compare(before.sampled, after.sampled, 2)
    assert gain is not None
    assert asdict(gain) == summary["gain"]["pass@2"]
    assert [path.name for path in sorted(folder.glob("trajectories/*"))] == [
        "step_000001.jsonl",
        "step_000002.jsonl",
    ]
    assert list(folder.glob("tensorboard/events*"))
    assert not list(folder.rglob("*.partial"))
    found = [(row["phase"], row["step"]) for row in rows(folder)]
    assert found[:12] == [("warm_start", step) for step in range(1, 13)]
    assert found[12:] == [("evaluation", 0), ("train", 1), ("evaluation", 1), ("train", 2), ("evaluation", 2)]
    losses = [row["loss/nll"] for row in rows(folder)[:12]]
    assert losses[-1] < losses[0] - 1
    assert "probe/pass@1" in rows(folder)[5]
    checkpoint = folder / "checkpoints" / "step_000002"
    base = AutoModelForCausalLM.from_pretrained(folder / "warm_start")
    assert peft.PeftModel.from_pretrained(base, str(checkpoint)).peft_config["default"].r == 4


def test_a_run_that_was_stopped_and_resumed_has_the_numbers_of_one_that_was_not(
    config: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = agentrl.train(config("whole"))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    Letters.on_score = staticmethod(interrupt_in_step(1))
    assert agentrl.train(config("parted")) == {"stopped_at": 2, "signal": signal.SIGINT}
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    said = capsys.readouterr().out
    assert "stopped after step 2 of 4" in said
    assert "--resume" in said
    assert [path.name for path in (tmp_path / "parted" / "checkpoints").iterdir()] == ["step_000002"]

    parted = agentrl.train(config("parted"), resume=True)
    assert rows(tmp_path / "parted") == rows(tmp_path / "whole")
    assert any(row.get("loss/policy") for row in rows(tmp_path / "whole"))
    one, other = files(tmp_path / "whole"), files(tmp_path / "parted")
    assert (
        one.keys()
        == other.keys()
        == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "manifest.json",
            "optimizer.pt",
            "state.json",
        }
    )
    assert one["adapter_model.safetensors"] == other["adapter_model.safetensors"]
    assert one["adapter_config.json"] == other["adapter_config.json"]
    assert {**whole, "seconds": 0} == {**parted, "seconds": 0}


def test_a_resumed_run_goes_on_behind_the_newest_checkpoint_and_forgets_what_came_after(
    config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    agentrl.train(config("whole"))
    agentrl.train(config("killed"))
    folder = tmp_path / "killed"
    for path in (folder / "checkpoints" / "step_000004").iterdir():  # killed in step 4, after one at step 3
        path.unlink()
    (folder / "summary.json").unlink()
    agentrl.train(config("killed"), resume=True)
    assert rows(folder) == rows(tmp_path / "whole")
    assert (
        files(folder)["adapter_model.safetensors"] == files(tmp_path / "whole")["adapter_model.safetensors"]
    )


def test_a_run_without_a_checkpoint_resumes_from_its_base(
    config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    agentrl.train(config("whole"))
    Letters.on_score = staticmethod(raise_in_step(2))
    with pytest.raises(ZeroDivisionError) as caught:
        agentrl.train(config("crashed"))
    assert any("Letters" in note for note in caught.value.__notes__)
    Letters.on_score = staticmethod(lambda env: None)
    before = (tmp_path / "crashed" / "before.json").stat().st_mtime_ns
    agentrl.train(config("crashed"), resume=True)
    assert rows(tmp_path / "crashed") == rows(tmp_path / "whole")
    assert (tmp_path / "crashed" / "before.json").stat().st_mtime_ns == before


def raise_in_step(step: int) -> Callable[[Letters], None]:
    def on_score(env: Letters) -> None:
        if env.np_random_seed == derive(SEED, "environment", step, 0) % 2**32:
            raise ZeroDivisionError

    return on_score


def test_another_configuration_is_not_resumed_and_the_difference_is_named(
    config: Callable[..., dict[str, Any]],
) -> None:
    Letters.on_score = staticmethod(interrupt_in_step(0))
    agentrl.train(config())
    with pytest.raises(BadConfig) as caught:
        agentrl.train(config(optimizer={"learning_rate": 0.5}, steps=9), resume=True)
    assert "optimizer.learning_rate was 0.01 and is 0.5" in str(caught.value)
    assert "steps was 4 and is 9" in str(caught.value)
    with pytest.raises(BadConfig, match="holds a run: continue it with --resume"):
        agentrl.train(config())


def test_a_finished_run_is_not_run_again(config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    summary = agentrl.train(config(steps=1))
    before = rows(tmp_path / "run")
    assert agentrl.train(config(steps=1), resume=True) == summary
    assert rows(tmp_path / "run") == before
    with pytest.raises(BadConfig, match="steps was 1 and is 2"):
        agentrl.train(config(steps=2), resume=True)


def test_a_warm_start_that_was_cut_off_begins_anew(
    config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Letters, "gold", lambda self, task: (Message("assistant", "a"),), raising=False)
    values = config(steps=1) | {"warm_start": {"episodes": 4, "steps": 2, "episodes_per_step": 2}}
    whole = agentrl.train(values | {"name": "whole"})
    assert (
        agentrl.train(values | {"name": "cut"}, resume=True).keys() == whole.keys()
    )  # nothing to resume yet
    folder = RunFolder(tmp_path / "cut")
    folder.warm_start.rename(folder.root / "warm_start.partial")
    folder.summary.unlink()
    for path in folder.checkpoints.rglob("*.*"):
        path.unlink()
    for path in folder.checkpoints.iterdir():
        path.rmdir()
    lines = folder.metrics.read_text().splitlines(keepends=True)
    folder.metrics.write_text(lines[0])
    agentrl.train(values | {"name": "cut"}, resume=True)
    assert rows(folder.root) == rows(tmp_path / "whole")


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the run does for its own errors happens."""


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (RunLog, "step", 1),  # the base's evaluation is kept, its row is not written
        (Path, "rename", 2),  # of the second checkpoint
        pytest.param(Optimization, "step", 3, marks=pytest.mark.slow),  # within the second step
        pytest.param(os, "fsync", 12, marks=pytest.mark.slow),  # within the first checkpoint
        pytest.param(RunLog, "summary", 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_has_the_numbers_of_one_that_was_not(
    config: Callable[..., dict[str, Any]],
    undisturbed: Path,
    tmp_path: Path,
    owner: Any,
    name: str,
    calls: int,
) -> None:
    function, count = getattr(owner, name), iter(range(1, 10**6))

    def killed(*args: Any, **settings: Any) -> Any:
        if next(count) == calls:
            raise Killed
        return function(*args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            agentrl.train(config("killed"), resume=True)
    agentrl.train(config("killed"), resume=True)
    folder = tmp_path / "killed"
    assert rows(folder) == rows(undisturbed)
    assert files(folder)["adapter_model.safetensors"] == files(undisturbed)["adapter_model.safetensors"]
    assert not list(folder.rglob("*.partial"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The folder of a run from beginning to end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    agentrl.train(settings("run", folder, tiny_checkpoint))
    return folder / "run"


def test_the_programs_own_generators_play_no_part(
    config: Callable[..., dict[str, Any]], undisturbed: Path, tmp_path: Path
) -> None:
    Letters.on_score = staticmethod(interrupt_in_step(1))
    agentrl.train(config())
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    agentrl.train(config(), resume=True)
    assert rows(tmp_path / "run") == rows(undisturbed)


def test_a_resumed_run_splits_its_sums_over_as_many_threads_as_it_began_with(
    config: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    update = Learner.update

    def remember(self: Learner, samples: list[Sample], **settings: Any) -> dict[str, float]:
        seen.append(torch.get_num_threads())
        return update(self, samples, **settings)

    monkeypatch.setattr(Learner, "update", remember)
    before = computing(torch.get_num_threads)
    try:
        Letters.on_score = staticmethod(interrupt_in_step(0))
        computing(torch.set_num_threads, 1)
        agentrl.train(config())
        computing(torch.set_num_threads, 2)
        agentrl.train(config(), resume=True)
        assert seen == [1, 1, 1, 1]
        assert computing(torch.get_num_threads) == 2
    finally:
        computing(torch.set_num_threads, before)


def computing(function: Callable[..., Any], *args: Any) -> Any:
    return run_sync(in_compute_thread(function, *args))


def test_a_finished_run_goes_on_with_more_steps_where_that_is_accepted(
    config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    agentrl.train(config(steps=2))
    before = rows(tmp_path / "run")
    longer = agentrl.train(config(steps=4, log={"transcripts": 1}), resume=True, accept=["steps"])
    assert (longer["steps"], rows(tmp_path / "run")[: len(before)]) == (4, before)
    assert steps(RunFolder(tmp_path / "run")) == [1, 2, 3, 4]
    assert agentrl.train(config(steps=4), resume=True) == longer
    with pytest.raises(BadConfig, match=r"steps is 3, but .* has 4 of them behind it"):
        agentrl.train(config(steps=3), resume=True, accept=["steps"])
    with pytest.raises(BadConfig, match="accept is .* without resume"):
        agentrl.train(config(steps=5), accept=["steps"])


def test_the_base_is_measured_anew_where_it_is_to_be_measured_otherwise(
    config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    agentrl.train(config(steps=1))
    longer = config(steps=2, evaluation={"tasks": 5})
    summary = agentrl.train(longer, resume=True, accept=["steps", "evaluation.tasks"])
    assert (summary["before"]["tasks"], summary["after"]["tasks"]) == (5, 5)
    assert [row["step"] for row in rows(tmp_path / "run") if row["phase"] == "evaluation"] == [0, 2]


def test_another_tokenizer_is_not_resumed(
    config: Callable[..., dict[str, Any]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    Letters.on_score = staticmethod(interrupt_in_step(0))
    agentrl.train(config(model={"path": str(model)}))
    with (model / "chat_template.jinja").open("a") as template:
        template.write("{# another #}")
    with pytest.raises(BadConfig, match=r"tokenizer of .*model is not the one .*--accept tokenizer"):
        agentrl.train(config(model={"path": str(model)}), resume=True)


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_behind_what_was_saved(
    config: Callable[..., dict[str, Any]], undisturbed: Path, tmp_path: Path
) -> None:
    write = Path.write_bytes

    def full(self: Path, data: Any) -> int:
        if self.name == "optimizer.pt" and "step_000003" in str(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(CannotWrite, match="step_000003 could not be written: No space left"):
            agentrl.train(config())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    agentrl.train(config(), resume=True)
    assert rows(tmp_path / "run") == rows(undisturbed)


def test_a_folder_that_can_not_be_written_is_one_clear_error(
    config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadConfig, match="write in .*file/run"):
        agentrl.train({**config(), "output": str(tmp_path / "file")})


def test_train_works_under_a_running_event_loop(config: Callable[..., dict[str, Any]]) -> None:
    async def notebook() -> dict[str, Any]:
        return agentrl.train(config(steps=1))

    assert asyncio.run(notebook())["steps"] == 1


def test_no_step_is_an_evaluation_alone(config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    summary = agentrl.train(config(steps=0))
    assert summary["gain"]["pass@1"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert [(row["phase"], row["step"]) for row in rows(tmp_path / "run")] == [("evaluation", 0)]


# -- what the learner is given --


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[list[Sample]]:
    """The samples of every update."""
    seen: list[list[Sample]] = []
    update = Learner.update

    def remember(self: Learner, samples: list[Sample], **settings: Any) -> dict[str, float]:
        seen.append(list(samples))
        return update(self, samples, **settings)

    monkeypatch.setattr(Learner, "update", remember)
    return seen


def advantages(samples: Sequence[Sample]) -> list[float]:
    """One for each sample; every trained token has it and no other."""
    found = []
    for sample in samples:
        assert sample.advantages is not None
        (value,) = set(sample.advantages[sample.mask].tolist())
        assert not sample.advantages[~sample.mask].any()
        found.append(value)
    return found


def test_shuffled_rewards_stay_in_their_group(
    config: Callable[..., dict[str, Any]], given: list[list[Sample]]
) -> None:
    for name, shuffle in (("plain", False), ("shuffled", True)):
        agentrl.train(config(name, steps=1, algorithm={"shuffle_rewards": shuffle}))
    plain, shuffled = given
    assert [s.token_ids.tolist() for s in plain] == [s.token_ids.tolist() for s in shuffled]
    pairs = list(zip(advantages(plain), advantages(shuffled), strict=True))
    groups = [pairs[first : first + 4] for first in range(0, 12, 4)]
    for group in groups:
        assert sorted(one for one, _ in group) == pytest.approx(sorted(other for _, other in group))
    assert any(one != other for one, other in pairs)
    assert len({tuple(sorted(one for one, _ in group)) for group in groups}) > 1


def test_invalid_episodes_are_counted_and_take_no_part_in_their_groups_advantages(
    config: Callable[..., dict[str, Any]], given: list[list[Sample]], tmp_path: Path
) -> None:
    trained = {derive(SEED, "environment", 0, place) % 2**32 for place in range(3)}
    scored = iter(range(100))

    def on_score(env: Letters) -> None:
        if env.np_random_seed in trained and next(scored) % 3 == 0:
            raise WorldError("the judge is gone")

    Letters.on_score = staticmethod(on_score)
    agentrl.train(config(steps=1, rollout={"retries": 0, "max_invalid": 0.5}))
    (row,) = (row for row in rows(tmp_path / "run") if row["phase"] == "train")
    assert (row["fault/reward"], row["episode/valid"]) == (4.0, pytest.approx(8 / 12))
    (samples,) = given
    assert len(samples) == 8
    by_task: dict[str, list[float]] = {}
    for sample, value in zip(samples, advantages(samples), strict=True):
        by_task.setdefault(sample.task_id, []).append(value)
    assert all(sum(values) == pytest.approx(0, abs=1e-5) for values in by_task.values())
    assert any(any(values) for values in by_task.values())


def test_the_engine_samples_with_what_was_learnt_last(
    config: Callable[..., dict[str, Any]], given: list[list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[Adapter] = []
    publish = Learner.publish

    def remember(self: Learner) -> Adapter:
        published.append(publish(self))
        return published[-1]

    monkeypatch.setattr(Learner, "publish", remember)
    agentrl.train(config(steps=3, algorithm={"minibatches": 1}))
    versions = [{int(v) for s in samples for v in s.versions[s.mask]} for samples in given]
    assert versions == [{0}, {1}, {2}]
    assert len(published) >= 3
    assert not np.array_equal(*(next(iter(adapter.tensors.values())).numpy() for adapter in published[:2]))


def test_strictly_on_policy_the_learner_and_the_engine_agree(
    config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    agentrl.train(config(steps=3, algorithm={"minibatches": 1, "kl": 0.01}))
    learnt = [row for row in rows(tmp_path / "run") if "mismatch/mean" in row]
    assert len(learnt) == 3
    assert all(row["mismatch/mean"] < 1e-4 for row in learnt)
    assert learnt[0]["loss/kl"] == pytest.approx(0, abs=1e-6)  # the new adapter is nothing
    assert learnt[-1]["loss/kl"] > 0


# -- signals to a real process --

_ENVIRONMENT = """
from agentrl import Message, Task, ToolEnv

class Letters(ToolEnv):
    def tasks(self, split):
        return [Task(id=f"{split}-{i}", prompt=(Message("user", f"Say {i}"),)) for i in range(5)]

    def reward(self, evidence):
        return float(len(evidence.messages[-1].content) % 2)
"""


def start(path: Path, *options: str) -> subprocess.Popen[str]:
    code = "from agentrl.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", code, "train", str(path), *options],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(
    process: subprocess.Popen[str], number: signal.Signals, *, when: Callable[[], bool]
) -> tuple[str, str]:
    """Send the signal as soon as ``when`` holds; what the process printed."""
    deadline = time.monotonic() + 90
    try:
        while not when():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        return process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # has it print where its threads are
        pytest.fail(f"{number.name} did not end the run: {process.communicate(timeout=10)}")
    finally:
        process.kill()


@pytest.mark.slow
def test_signals_finish_the_step_save_and_say_how_to_resume(
    config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "letters.py").write_text(_ENVIRONMENT)
    values = config(
        environment={"id": f"{tmp_path}/letters.py:Letters"}, steps=100_000, checkpoint={"every": 10**6}
    )
    path = tmp_path / "long.yaml"
    path.write_text(json.dumps(values))
    folder = RunFolder(tmp_path / "run")
    done = 0
    for number, options in ((signal.SIGINT, ()), (signal.SIGTERM, ("--resume",))):
        process = start(path, *options)
        out, err = stop(process, number, when=partial(has_gone_beyond, folder, done))
        assert process.returncode == 128 + number, err
        last = steps(folder)[-1]
        assert f"stopped after step {last} of 100000, saved in {folder.checkpoints}/step_{last:06d}" in out
        assert "go on with the same command and --resume" in out
        (state,) = folder.checkpoints.glob(f"step_{last:06d}/state.json")
        assert json.loads(state.read_text())["step"] == last
        assert steps(folder) == list(range(1, last + 1))
        done = last
    assert "Traceback" not in err


def test_a_signal_while_the_last_step_is_saved_is_heard(
    config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoints.save

    def interrupted(self: Checkpoints, *args: Any, **settings: Any) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # until the main thread has heard it
        return save(self, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupted)
        stopped = agentrl.train(config(steps=1))
    assert stopped == {"stopped_at": 1, "signal": signal.SIGINT}
    assert not RunFolder(tmp_path / "run").after.exists()
    assert agentrl.train(config(steps=1), resume=True)["steps"] == 1


def has_gone_beyond(folder: RunFolder, done: int) -> bool:
    return max(steps(folder), default=0) > done


def steps(folder: RunFolder) -> list[int]:
    return [row["step"] for row in read_rows(folder) if row["phase"] == "train"]


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_the_run_at_once_and_it_can_be_resumed(
    config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "letters.py").write_text(_ENVIRONMENT)
    values = config(environment={"id": f"{tmp_path}/letters.py:Letters"}, evaluation={"samples": 500})
    path = tmp_path / "short.yaml"
    path.write_text(json.dumps(values))
    folder = RunFolder(tmp_path / "run")
    process = start(path)
    out, err = stop(process, signal.SIGTERM, when=folder.config.is_file)
    assert process.returncode == 143, err
    assert "the same command with --resume" in out
    assert "Traceback" not in err
    finished = start(path, "--resume")
    finished.communicate(timeout=200)
    assert finished.returncode == 0
    assert steps(folder) == [1, 2, 3, 4]
