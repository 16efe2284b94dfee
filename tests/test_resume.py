"""A run that was killed, at any instant and as often as one likes, has the numbers of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agentrl.errors import BadConfig
from agentrl.log import Row, RunFolder, read_rows
from agentrl.models import load_tokenizer
from agentrl.resume import Process, accepted_changes, tokenizer_digest

# -- killing real processes --

# Imports once, then forks a process for each run: most of a start would be imports, and kills would hit them.
_NURSERY = """
import json, os, signal, sys, time, traceback
import accelerate, matplotlib.figure, peft, transformers
from agentrl import train
from agentrl.engines.embedded import EmbeddedEngine
from kills import kill_before

def run(job):
    os.chdir(job["folder"])
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    if job["before"]:
        kill_before(*job["before"], engine=EmbeddedEngine)
    try:
        train(job["config"], resume=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)

print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        run(job)
    if job["after_s"] is not None:
        time.sleep(job["after_s"])
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

CONFIG: dict[str, Any] = {
    "name": "run",
    "steps": 6,
    "environment": {"id": "calculator", "args": {"levels": [1], "max_operand": 9, "reward": "format"}},
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
    "warm_start": {"episodes": 80, "steps": 40, "episodes_per_step": 8, "learning_rate": 1e-2},
    "rollout": {"tasks_per_step": 4, "group_size": 4, "max_turn_tokens": 32, "max_episode_tokens": 192},
    "lora": {"r": 4, "train_norms": True},
    "optimizer": {"learning_rate": 1e-2},
    "algorithm": {"minibatches": 2},
    "engine": {"max_sequences": 16, "deterministic": True},
    "evaluation": {"tasks": 6, "samples": 2, "k": [1, 2], "every": 2, "curve_tasks": 3},
    "checkpoint": {"every": 2, "keep": 1},
    "log": {"trackers": []},
}


class Nursery:
    """Starts runs of CONFIG and kills them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._orders, self._answers = process.stdin, process.stdout

    def run(
        self, folder: Path, *, after_s: float | None = None, before: tuple[str, int] | None = None
    ) -> bool:
        """Run or resume in ``folder``, killed ``after_s`` seconds or ``before`` a call; whether it ended by
        itself."""
        folder.mkdir(exist_ok=True)
        job = {"folder": str(folder), "config": CONFIG, "after_s": after_s, "before": before}
        self._orders.write(json.dumps(job) + "\n")
        self._orders.flush()
        code = int(self._answers.readline())
        assert code in (0, -signal.SIGKILL), (folder / "output.txt").read_text()
        return code == 0


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-c", _NURSERY],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Nursery(process)


@pytest.fixture(scope="module")
def whole(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing disturbed, and how many seconds it took."""
    folder, began = tmp_path_factory.mktemp("whole"), time.perf_counter()
    assert nursery.run(folder)
    return folder, time.perf_counter() - began


def rows(folder: Path) -> list[Row]:
    """The metrics without what a clock says."""
    return [
        {key: value for key, value in row.items() if not key.startswith("time/")}
        for row in read_rows(RunFolder(folder / "runs" / "run"))
    ]


def files(folder: Path) -> dict[str, bytes]:
    """What must be equal byte for byte."""
    run = folder / "runs" / "run"
    exact = ("adapter_model.safetensors", "adapter_config.json", "before.json", "model.safetensors")
    found = (path for path in run.rglob("*") if path.name in exact)
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


def check_equal(folder: Path, whole: Path) -> None:
    assert rows(folder) == rows(whole)
    assert files(folder) == files(whole)
    assert not list(folder.rglob("*.partial"))


@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_no_number(
    nursery: Nursery, whole: tuple[Path, float], tmp_path: Path
) -> None:
    undisturbed, seconds = whole
    assert any(row.get("loss/policy") for row in rows(undisturbed))
    moments, kills, runs = random.Random(0), 0, 0
    while kills < 30:
        folder = tmp_path / str(runs)
        while not nursery.run(folder, after_s=moments.uniform(0, seconds) if kills < 30 else None):
            kills += 1
        check_equal(folder, undisturbed)
        runs += 1


@pytest.mark.slow
def test_a_kill_in_any_stage_changes_no_number(
    nursery: Nursery, whole: tuple[Path, float], tmp_path: Path
) -> None:
    for before in (
        ("save", 3),  # the base that is being made
        ("row", 20),  # of the warm start
        ("rename", 2),  # clearing away what that left
        ("row", 41),  # the base's evaluation, which is in before.json already
        ("rollout", 3),
        ("update", 2),  # after the first of the step's two minibatches
        ("row", 2),
        ("save", 10),  # of the first checkpoint
        ("rename", 1),
        ("rename", 2),  # of the second
        ("row", 2),
        ("rename", 2),  # while an old one is removed
        ("save", 10),  # of the last
        ("row", 3),  # the last evaluation
        ("save", 7),  # of the summary
    ):
        assert not nursery.run(tmp_path, before=before), f"the run ended before {before}"
    assert nursery.run(tmp_path)
    check_equal(tmp_path, whole[0])


# -- what a run must have in common with the one that began --

BEFORE = (
    "steps: 4\nlora: {r: 2, alpha: 4}\nenvironment: {id: x, args: {levels: [1, 2]}}\nlog: {trackers: []}\n"
)


def changes(now: str, *accept: str) -> list[str]:
    return accepted_changes(Path("runs/mine"), BEFORE, now, accept=accept)


def test_the_order_of_keys_and_what_changes_no_number_may_differ() -> None:
    environment = {"args": {"levels": [1, 2]}, "id": "x"}
    values = {"environment": environment, "steps": 4, "lora": {"alpha": 4, "r": 2}}
    assert changes(json.dumps(values)) == []
    assert changes(json.dumps({**values, "name": "moved", "log": {"trackers": ["wandb"]}})) == []


def test_the_keys_that_differ_are_named_with_the_way_to_accept_them() -> None:
    now = BEFORE.replace("[1, 2]", "[1], seed: 3").replace("steps: 4", "steps: 6")
    with pytest.raises(BadConfig) as caught:
        changes(now, "lora")
    said = str(caught.value)
    for part in (
        "steps was 4 and is 6",
        "environment.args.levels was [1, 2] and is [1]",
        "environment.args.seed was 'not set' and is 3",
        "--accept lora,steps,environment.args.levels,environment.args.seed",
    ):
        assert part in said
    assert "alpha" not in said


def test_a_key_is_accepted_by_its_name_or_by_its_sections() -> None:
    now = BEFORE.replace("[1, 2]", "[1]").replace("steps: 4", "steps: 6")
    assert changes(now, "environment", "steps") == ["steps", "environment.args.levels"]
    assert changes(now, "environment.args.levels", "steps") == ["steps", "environment.args.levels"]
    with pytest.raises(BadConfig, match="steps was 4"):
        changes(now, "environment", "lora")


def test_what_is_accepted_is_a_setting() -> None:
    with pytest.raises(BadConfig, match="accept names 'step', which is no setting; did you mean 'steps'"):
        changes(BEFORE, "environment", "step")
    assert changes(BEFORE, "tokenizer") == []


def test_the_shape_of_the_adapter_can_not_be_accepted() -> None:
    with pytest.raises(BadConfig, match=r"lora.r was 2 and is 8 \(what it made is there") as caught:
        changes(BEFORE.replace("r: 2", "r: 8"), "lora")
    assert "--accept" not in str(caught.value)


def test_a_process_tells_what_differs_and_restores_its_threads() -> None:
    process = Process(2, {"torch": "2.11.0", "python": "3.11.7"})
    assert Process.from_json(process.to_json()) == process
    assert process.differences(process) == []
    now = Process(1, {"torch": "2.12.0", "python": "3.11.7"})
    assert process.differences(now) == ["torch was 2.11.0 and is 2.12.0"]
    before = torch.get_num_threads()
    try:
        assert process.restore_threads() == before
        assert torch.get_num_threads() == Process.current().threads == 2
    finally:
        torch.set_num_threads(before)


def test_the_tokenizers_digest_changes_with_its_words_and_with_its_template(
    tokenizer: Any, tiny_checkpoint: Path
) -> None:
    def loaded() -> Any:
        return load_tokenizer(tiny_checkpoint)

    taught, templated = loaded(), loaded()
    taught.add_tokens(["word"])
    templated.chat_template += " "
    digests = [tokenizer_digest(one) for one in (tokenizer, loaded(), taught, templated)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
