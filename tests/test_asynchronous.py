"""Rollouts ahead of the update: they overlap it, grow no staler than allowed, and none is lost or left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import agentrl
from agentrl.engine import Adapter, Sampling
from agentrl.learner import Learner
from agentrl.log import Row, RunFolder, RunLog, read_rows
from agentrl.seeds import derive
from agentrl.threads import in_thread, run_sync
from agentrl.tool_env import ToolEnv
from agentrl.types import Completion, FloatArray, IntArray, Message, Sample, Task

SEED, TASKS, SIBLINGS, STEPS = 4, 3, 4, 6
EPISODES = TASKS * SIBLINGS


class Letters(ToolEnv):
    """Rewards an answer of an odd number of characters: about half of what chance says."""

    on_score: ClassVar[Callable[[Letters], None]] = staticmethod(lambda env: None)
    begun: ClassVar[list[Letters]] = []
    closed = False

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(id=f"{split}-{index}", prompt=(Message("user", f"Say {index}"),)) for index in range(6)]

    def reward(self, evidence: Any) -> float:
        type(self).on_score(self)
        return float(len(evidence.messages[-1].content) % 2)

    def reset(self, **settings: Any) -> Any:
        self.begun.append(self)
        return super().reset(**settings)

    def close(self) -> None:
        self.closed = True


class Chance:
    """Samples every token evenly from the vocabulary, beside the learner, as an engine elsewhere does."""

    def __init__(self, tokenizer: Any) -> None:
        self._words = len(tokenizer)
        self.version, self.closed = 0, False
        self.loaded: list[int] = []
        self._figures = 0.0

    async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        """See :class:`agentrl.engine.Engine`."""
        random, version = np.random.default_rng(sampling.seed), self.version
        await asyncio.sleep(0)
        ids = random.integers(0, self._words, sampling.max_tokens)
        self._figures += len(ids)
        even = np.full(len(ids), -np.log(self._words))
        return Completion(ids, even, np.full(len(ids), version), "length")

    async def score(self, token_ids: IntArray, temperature: float) -> FloatArray:
        """See :class:`agentrl.engine.Engine`."""
        return np.full(len(token_ids), -np.log(self._words), np.float32)

    async def load(self, adapter: Adapter | None, version: int) -> None:
        """See :class:`agentrl.engine.Engine`."""
        self.loaded.append(version)
        self.version = version

    async def close(self) -> None:
        """See :class:`agentrl.engine.Engine`."""
        self.closed = True

    def take_figures(self) -> dict[str, float]:
        """See :class:`agentrl.engine.Measured`."""
        taken, self._figures = self._figures, 0.0
        return {"rollout/decode_tokens": taken}


class Credulous:
    """Takes the engine's word for what it serves."""

    def __init__(self, *_: Any, **settings: Any) -> None:
        """Whatever a canary is given."""

    async def prove(self, adapter: Adapter, version: int) -> dict[str, float]:
        """See :class:`agentrl.canary.Canary`."""
        return {}


def settings(output: Path, model: Path) -> dict[str, Any]:
    return {
        "name": "run",
        "seed": SEED,
        "steps": STEPS,
        "output": str(output),
        "environment": {"id": f"{__name__}:Letters"},
        "model": {"path": str(model)},
        "rollout": {
            "tasks_per_step": TASKS,
            "group_size": SIBLINGS,
            "max_turn_tokens": 6,
            "max_episode_tokens": 64,
        },
        "lora": {"r": 2},
        "engine": {"kind": "vllm", "max_sequences": 8},
        "algorithm": {"max_staleness": 2, "kl": 0.01},  # has every step make an update
        "evaluation": {"tasks": 2, "samples": 1},
        "checkpoint": {"every": 2},
        "log": {"trackers": [], "transcripts": TASKS},
    }


@pytest.fixture
def config(tmp_path: Path, tiny_checkpoint: Path) -> Callable[..., dict[str, Any]]:
    """Makes ``settings``; sections given replace single ones."""

    def make(**changes: Any) -> dict[str, Any]:
        values = settings(tmp_path, tiny_checkpoint)
        for key, change in changes.items():
            values[key] = {**values[key], **change} if isinstance(change, Mapping) else change
        return values

    return make


def serve(patch: pytest.MonkeyPatch, kind: Callable[[Any], Chance] = Chance) -> list[Chance]:
    """Have runs served by engines of ``kind``; those that were opened."""
    opened: list[Chance] = []

    async def open_engine(section: Any, served: Any, **rest: Any) -> Chance:
        opened.append(kind(served.tokenizer))
        return opened[-1]

    patch.setattr("agentrl.trainer.open_engine", open_engine)
    patch.setattr("agentrl.serving.check_engine", lambda config, device: None)
    patch.setattr("agentrl.trainer.Canary", Credulous)
    return opened


def remember_updates(patch: pytest.MonkeyPatch, remember: Callable[[int, list[Sample]], None]) -> None:
    """Call ``remember`` with step (from 0) and samples before each update."""
    update = Learner.update

    def remembered(self: Learner, samples: list[Sample], *, step: int, **rest: Any) -> dict[str, float]:
        remember(step, samples)
        return update(self, samples, step=step, **rest)

    patch.setattr(Learner, "update", remembered)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Chance]:
    return serve(monkeypatch)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[list[Sample]]:
    """The samples of every update."""
    seen: list[list[Sample]] = []
    remember_updates(monkeypatch, lambda step, samples: seen.append(list(samples)))
    return seen


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    Letters.begun.clear()
    yield
    Letters.on_score = staticmethod(lambda env: None)
    assert run_sync(tasks_in_flight()) == []
    assert [env for env in Letters.begun if not env.closed] == []


async def tasks_in_flight() -> list[str]:
    """Of the loop that runs work, without this one."""
    return [str(task.get_coro()) for task in asyncio.all_tasks() if task is not asyncio.current_task()]


def rows(output: Path) -> list[Row]:
    return [row for row in read_rows(RunFolder(output / "run")) if row["phase"] == "train"]


def seeds_of(step: int) -> set[int]:
    """Of the first request of each episode of ``step`` (from 0)."""
    return {
        derive(derive(SEED, "rollout", step, place, sibling), 0)
        for place in range(TASKS)
        for sibling in range(SIBLINGS)
    }


def in_step(env: Letters, step: int) -> bool:
    return env.np_random_seed in {derive(SEED, "environment", step, place) % 2**32 for place in range(TASKS)}


# -- overlap --


def test_the_next_steps_rollouts_go_on_while_the_learner_updates(
    config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updating, sampled, second = threading.Event(), threading.Event(), seeds_of(1)

    class Waiting(Chance):
        """Answers the second step's requests once the first update has begun."""

        async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
            if sampling.seed in second:
                assert await in_thread(updating.wait, 60)
                sampled.set()
            return await super().generate(prompt_ids, sampling)

    waited: list[bool] = []

    def on_update(step: int, samples: list[Sample]) -> None:
        updating.set()
        waited.append(sampled.wait(60))

    serve(monkeypatch, Waiting)
    remember_updates(monkeypatch, on_update)
    agentrl.train(config(steps=3, algorithm={"max_staleness": 1}))
    assert waited == [True, True, True]


def test_staleness_is_at_most_what_is_allowed_and_is_reported(
    config: Callable[..., dict[str, Any]],
    engines: list[Chance],
    given: list[list[Sample]],
    tmp_path: Path,
) -> None:
    agentrl.train(config())
    assert engines[0].loaded == [1, 2, 3, 4, 5, 6]
    found = rows(tmp_path)
    assert len(found) == len(given) == STEPS
    for step, (row, samples) in enumerate(zip(found, given, strict=True)):
        behind = [step - int(sample.versions[sample.mask].min()) for sample in samples]
        assert len(behind) == EPISODES
        assert (row["staleness/mean"], row["staleness/max"]) == (np.mean(behind), max(behind))
        assert row["staleness/max"] <= min(step, 2)
        assert row["staleness/dropped"] == 0
    assert max(row["staleness/max"] for row in found) > 0


def test_samples_of_another_policy_are_corrected_where_nothing_is_said(
    config: Callable[..., dict[str, Any]], engines: list[Chance], tmp_path: Path
) -> None:
    agentrl.train(config(steps=2))
    for row in rows(tmp_path):
        assert 0 < row["mismatch/ess"] < 1
        assert 0 < row["mismatch/kept"] <= 1
    assert "importance: truncate" in (tmp_path / "run" / "config.yaml").read_text()


# -- what is too old --


class Lagging(Chance):
    """The first sibling of every group is answered by the weights that the run began with."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.slow = {
            derive(derive(SEED, "rollout", step, place, 0), 0)
            for step in range(STEPS)
            for place in range(TASKS)
        }

    async def generate(self, prompt_ids: IntArray, sampling: Sampling) -> Completion:
        completion = await super().generate(prompt_ids, sampling)
        versions = np.zeros_like(completion.versions)
        if sampling.seed not in self.slow:
            return completion
        return Completion(completion.token_ids, completion.logprobs, versions, completion.finish)


def test_what_is_too_old_is_dropped_and_counted_and_its_reward_stays_in_the_baseline(
    config: Callable[..., dict[str, Any]],
    given: list[list[Sample]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve(monkeypatch, Lagging)
    agentrl.train(config(algorithm={"max_staleness": 1, "advantage": "dr_grpo"}))
    found = rows(tmp_path)
    assert [row["staleness/dropped"] for row in found] == [0, 0, 3, 3, 3, 3]
    assert [row["staleness/max"] for row in found] == [0, 1, 2, 3, 4, 5]
    assert [len(samples) for samples in given] == [12, 12, 9, 9, 9, 9]
    assert all(sample.sibling for samples in given[2:] for sample in samples)
    shares = set()
    for sample in (sample for samples in given[2:] for sample in samples):
        assert sample.advantages is not None
        # A reward of 0 or 1 minus the mean of four siblings, not of the three that are left.
        (value,) = set((4 * sample.advantages[sample.mask]).tolist())
        assert value == int(value)
        shares.add(int(value))
    assert shares & {-3, -1, 1, 3}


def test_a_step_of_which_everything_is_too_old_trains_nothing(
    config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(Chance):
        """Never serves what it is given."""

        async def load(self, adapter: Adapter | None, version: int) -> None:
            self.loaded.append(version)

    (engines,) = [serve(monkeypatch, Stuck)]
    agentrl.train(config(algorithm={"max_staleness": 1}))
    found = rows(tmp_path)
    assert [row["staleness/dropped"] for row in found] == [0, 0, *[EPISODES] * 4]
    assert ["loss/policy" in row for row in found] == [True, True, *[False] * 4]
    assert engines[0].loaded == [1, 2]


# -- figures --


@pytest.mark.parametrize(("staleness", "every"), [(0, 1), (0, 0), (2, 0)])
def test_the_engines_figures_are_those_of_the_training_episodes(
    config: Callable[..., dict[str, Any]],
    engines: list[Chance],
    tmp_path: Path,
    staleness: int,
    every: int,
) -> None:
    evaluation = {"every": every, "curve_tasks": 2} if every else {}
    agentrl.train(config(algorithm={"max_staleness": staleness}, evaluation=evaluation))
    found = rows(tmp_path)
    sampled = [row["episode/tokens"] * EPISODES for row in found]
    counted = [row["rollout/decode_tokens"] for row in found]
    assert sum(counted) == sum(sampled)
    if not staleness:
        assert counted == sampled


# -- the end, by whatever comes --


def test_a_bug_in_a_rollout_ahead_ends_the_run_and_leaves_nothing_open(
    config: Callable[..., dict[str, Any]], engines: list[Chance], tmp_path: Path
) -> None:
    def on_score(env: Letters) -> None:
        if in_step(env, 2):
            raise ZeroDivisionError

    Letters.on_score = staticmethod(on_score)
    with pytest.raises(ZeroDivisionError) as caught:
        agentrl.train(config())
    assert any("Letters" in note for note in caught.value.__notes__)
    assert len(rows(tmp_path)) <= 2
    assert engines[0].closed


def test_a_signal_saves_the_step_and_ends_the_rollouts_ahead(
    config: Callable[..., dict[str, Any]], engines: list[Chance], tmp_path: Path
) -> None:
    sent: list[int] = []

    def on_score(env: Letters) -> None:
        if not sent and in_step(env, 1):
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    Letters.on_score = staticmethod(on_score)
    stopped = agentrl.train(config(steps=50))
    assert stopped["signal"] == signal.SIGTERM
    last = stopped["stopped_at"]
    assert 1 <= last < 50
    assert (tmp_path / "run" / "checkpoints" / f"step_{last:06d}" / "state.json").is_file()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, last + 1))
    assert engines[0].closed


# -- killed --


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the run does for its own errors happens."""


def trained(journal: Path) -> dict[int, list[tuple[str, int]]]:
    """Task and sibling of every sample by step (from 0), as the update that counted last was given them."""
    found: dict[int, list[tuple[str, int]]] = {}
    for line in journal.read_text().splitlines():
        entry = json.loads(line)
        found = {step: samples for step, samples in found.items() if step < entry["step"]}
        found[entry["step"]] = sorted((task, sibling) for task, sibling in entry["samples"])
    return found


def keep_journal(patch: pytest.MonkeyPatch, journal: Path) -> None:
    """Write down what every update trains on."""

    def write(step: int, samples: list[Sample]) -> None:
        entry = {"step": step, "samples": [(sample.task_id, sample.sibling) for sample in samples]}
        with journal.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    remember_updates(patch, write)


def check_accounts(output: Path) -> None:
    """Every task that was drawn was trained exactly once a pass, with each of its siblings, and is in its
    step's row and transcripts."""
    found = trained(output / "journal.jsonl")
    assert sorted(found) == list(range(STEPS))
    tasks = {step: {task for task, _ in samples} for step, samples in found.items()}
    for step, samples in found.items():
        assert samples == [(task, sibling) for task in sorted(tasks[step]) for sibling in range(SIBLINGS)]
        path = RunFolder(output / "run").transcripts(step + 1)
        assert {json.loads(line)["task_id"] for line in path.read_text().splitlines()} == tasks[step]
    every = {f"train-{index}" for index in range(6)}
    for first in range(0, STEPS, 2):
        assert tasks[first] | tasks[first + 1] == every
        assert not tasks[first] & tasks[first + 1]
    assert [row["step"] for row in rows(output)] == list(range(1, STEPS + 1))
    assert all(row["staleness/dropped"] == 0 and row["episode/valid"] == 1 for row in rows(output))


def test_the_tasks_of_a_run_that_was_killed_are_each_trained_once(
    config: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch)
    keep_journal(monkeypatch, tmp_path / "journal.jsonl")
    for owner, name, calls in ((RunLog, "step", 2), (Learner, "publish", 4), (Chance, "generate", 40)):
        function, count = getattr(owner, name), iter(range(1, 10**6))

        def killed(
            *args: Any, _do: Any = function, _count: Any = count, _at: int = calls, **rest: Any
        ) -> Any:
            if next(_count) == _at:
                raise Killed
            return _do(*args, **rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(Killed):
                agentrl.train(config(), resume=True)
    agentrl.train(config(), resume=True)
    check_accounts(tmp_path)


_NURSERY = """
import json, os, sys, traceback
from pathlib import Path
import pytest
import test_asynchronous as here
from agentrl import train
from kills import kill_before

output, model = map(Path, sys.argv[1:])
for line in sys.stdin:
    before = json.loads(line)
    child = os.fork()
    if not child:
        patch = pytest.MonkeyPatch()
        here.serve(patch)
        here.keep_journal(patch, output / "journal.jsonl")
        if before:
            kill_before(*before, engine=here.Chance)
        try:
            train(here.settings(output, model), resume=True)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)
"""


@pytest.mark.slow
def test_the_tasks_of_a_process_that_was_killed_at_several_moments_are_each_trained_once(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    moments = [
        ("rollout", 20),  # while nothing is trained
        ("update", 1),
        ("save", 10),  # of the first checkpoint
        ("rollout", 60),  # several steps' in flight
        ("row", 2),
        ("rename", 1),
        ("update", 2),
        ("rollout", 45),
    ]
    orders = "".join(json.dumps(before) + "\n" for before in [*moments, None])
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", _NURSERY, str(tmp_path), str(tiny_checkpoint)],
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"},
        input=orders,
        capture_output=True,
        text=True,
        timeout=600,
    )
    codes = [line for line in done.stderr.splitlines() if line.lstrip("-").isdigit()]
    assert codes == [str(-signal.SIGKILL)] * len(moments) + ["0"], done.stderr
    check_accounts(tmp_path)
