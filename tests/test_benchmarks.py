"""The benchmarks run: their options, their rows, and the parts that can be checked without a clock."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agentrl.attempts import EpisodePlan
from agentrl.bench import BenchReport
from agentrl.chats import Chats
from agentrl.engine import Sampling
from agentrl.sandboxing.doctor import survey_all
from agentrl.tiny import TinyShape, make_tiny_model

_BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a file of the benchmarks' folder, as one of its scripts does."""
    monkeypatch.syspath_prepend(_BENCHMARKS)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize(
    "script",
    [
        "async_rollouts",
        "env_overhead",
        "grpo_step",
        "sandbox_throughput",
        "startup",
        "training_step",
        "verify",
    ],
)
def test_a_benchmark_says_how_it_is_run(script: str, load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        load(script).main(["--help"])
    said = capsys.readouterr().out
    assert f"python benchmarks/{script}.py" in said
    assert "--json" in said


def test_env_overhead_writes_a_row_for_each_way_to_step(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    load("env_overhead").main(["--quick", "--no-peer", "--json", str(path)])
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [row["aim"] for row in rows] == [100, None, 100, None, 1000]
    assert all(set(row) == {"name", "microseconds", "aim"} and row["microseconds"] > 0 for row in rows)
    said = capsys.readouterr().out
    assert all(row["name"] in said for row in rows)


@pytest.mark.slow
def test_async_rollouts_says_the_same_in_both_ways_and_beats_no_limit(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    load("async_rollouts").main(["--quick", "--json", str(path)])
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [row["name"] for row in rows] == ["seed 0", "mean"]
    assert all(row["same"] == "4/4" for row in rows)
    assert all(0 < row["slowest_s"] < row["latencies_s"] for row in rows)
    assert all(row["agentrl_s"] > row["slowest_s"] < row["lockstep_s"] for row in rows)
    assert all(row["ratio"] == pytest.approx(row["lockstep_s"] / row["agentrl_s"]) for row in rows)
    assert all(row["limit_s"] > row["slowest_s"] and row["engine_s"] > 0 for row in rows)


def test_latencies_are_log_normal_and_belong_to_their_episode_and_turn(load: Any) -> None:
    benchmark = load("async_rollouts")
    drawn = [benchmark.latencies(0, episode) for episode in range(2000)]
    flat = np.array(drawn).ravel()
    assert np.median(flat) == pytest.approx(0.2, rel=0.1)
    assert np.quantile(flat, 0.99) == pytest.approx(5.0, rel=0.2)
    assert len(set(flat)) == len(flat)
    assert benchmark.latencies(0, 7, scale=0.5) == pytest.approx([0.5 * one for one in drawn[7]])


def test_lockstep_samples_a_turn_of_all_episodes_at_once_and_waits_for_the_last_tool(
    load: Any, scripted_engine: Any, tokenizer: Any
) -> None:
    benchmark, engine = load("async_rollouts"), scripted_engine([5] * 8)
    plans = [EpisodePlan(split="train", index=place, sibling=0, env_seed=0, seed=place) for place in range(3)]
    said = asyncio.run(
        load("lockstep").lockstep(
            partial(benchmark.SlowTools, seed=0, episodes=3, scale=1e-3),
            plans,
            chat=Chats(tokenizer),
            engine=benchmark.ExactLength(engine),
            sampling=Sampling(max_tokens=8, seed=0),
        )
    )
    assert [len(batch) for batch in engine.batches] == [3] * benchmark.TURNS
    assert [tokens for tokens, _ in said] == [[[5] * 8] * benchmark.TURNS] * 3
    assert all(len(messages) == 1 + 2 * benchmark.TURNS for _, messages in said)


def test_startup_writes_a_row_for_each_start(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    load("startup").main(["--quick", "--no-peer", "--json", str(path)])
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [row["aim"] for row in rows] == [0.5, 1.0, None, None]
    assert all(set(row) == {"name", "seconds", "aim"} and row["seconds"] > 0 for row in rows)


def test_startup_without_its_peer_says_so(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load("report"), "find_spec", lambda name: None)
    load("startup").main(["--quick"])
    printed = capsys.readouterr().out
    assert "TRL is not installed here: pip install -e '.[bench]'" in printed
    assert "GRPOTrainer" not in printed


@pytest.mark.slow
def test_sandbox_throughput_writes_a_row_for_each_way_to_execute(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    names = [name for name in ("zygote", "bubblewrap") if survey_all()[name].available]
    load("sandbox_throughput").main(
        ["--quick", "--no-peer", "--backends", ",".join(names), "--json", str(path)]
    )
    rows = json.loads(path.read_text(encoding="utf-8"))
    rates = [row for row in rows if row["at_1"] is not None]
    alone = ["bwrap alone"] if "bubblewrap" in names else []
    assert [row["name"] for row in rates] == ["plain subprocess", *names, *alone]
    assert all(row[f"at_{at_once}"] > 0 for row in rates for at_once in (1, 2, 4, 8))
    assert [row["aim"] for row in rows if row["at_1"] is None] == [150, 5.0] * len(names)


@pytest.mark.slow
def test_verify_writes_its_rows_and_a_hostile_answer_changes_no_verdict(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AGENTRL_DATA", raising=False)
    path = tmp_path / "rows.json"
    load("verify").main(["--quick", "--workers", "1", "--json", str(path)])
    rows = json.loads(path.read_text(encoding="utf-8"))
    columns = {"name", "per_second", "of_peer", "seconds", "added_mib", "differing"}
    assert all(set(row) == columns for row in rows)
    throughput = [row for row in rows if row["per_second"] is not None]
    assert [row["name"].split(",")[0] for row in throughput] == ["agentrl boxed", "math-verify alone"] * 3
    assert all(row["differing"] == 0 for row in throughput)
    hostile = rows[len(throughput)]
    assert hostile["seconds"] >= 2
    assert hostile["differing"] == 0


def test_verify_compares_with_the_peer_and_finds_the_same_verdicts(load: Any) -> None:
    verify = load("verify")
    pairs = verify.make_pairs(["12", r"\frac{1}{2}"])
    ours, theirs = verify.throughput_rows("two truths", pairs, workers=1, repeats=1)
    assert (ours["name"], theirs["name"]) == ("agentrl boxed, two truths", "math-verify alone, two truths")
    assert ours["differing"] == theirs["differing"] == 0
    assert ours["of_peer"] == pytest.approx(ours["per_second"] / theirs["per_second"])


def test_every_truth_is_asked_with_right_and_wrong_answers(load: Any) -> None:
    pairs = load("verify").make_pairs(["12", r"\frac{1}{2}"])
    assert sorted(pair.answer for pair in pairs if pair.truth == "12") == ["12", "12.0", "712"]
    assert len(pairs) == 6


def test_prompts_have_exactly_as_many_tokens_as_the_workload_says(load: Any, tokenizer: Any) -> None:
    workload = load("workload")
    texts = workload.prompts(tokenizer)
    assert [len(tokenizer.encode(text)) for text in texts] == [workload.TOKENS] * workload.PROMPTS
    assert len(set(texts)) == workload.PROMPTS


def test_rewards_are_spread_within_every_group(load: Any) -> None:
    workload = load("workload")
    rewards = workload.spread_rewards(0)
    groups = [rewards[at : at + workload.GROUP] for at in range(0, len(rewards), workload.GROUP)]
    assert len(groups) == workload.PROMPTS
    assert all(sorted(group) == sorted(groups[0]) and len(set(group)) == workload.GROUP for group in groups)
    assert workload.spread_rewards(1) != rewards


def test_the_floor_counts_the_matrices_of_the_model(load: Any) -> None:
    config = SimpleNamespace(
        hidden_size=640,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        intermediate_size=2048,
        vocab_size=262_144,
    )
    floor = load("grpo_step").floor_of(config, bytes_each=2)
    assert floor.weights_bytes == pytest.approx(268.1e6 * 2, rel=1e-3)  # Gemma 3 270M, in bfloat16
    assert floor.rollout_bytes == 64 * floor.weights_bytes
    assert floor.rollout_flops + floor.update_flops == pytest.approx(3.5e12, rel=0.05)


def test_the_floor_is_the_slower_of_arithmetic_and_reading(load: Any) -> None:
    floor = load("grpo_step").Floor(
        rollout_flops=4.0, update_flops=6.0, rollout_bytes=8.0, update_bytes=1.0, weights_bytes=2**20
    )
    row = floor.row(2.0, 1.0)
    assert (row["rollout_s"], row["update_s"], row["seconds_per_step"], row["peak_mib"]) == (
        8.0,
        3.0,
        11.0,
        1.0,
    )


@pytest.mark.parametrize(
    ("status", "measured"), [(0, ["agentrl", "agentrl, vLLM", "trl"]), (1, ["agentrl", "trl"])]
)
def test_the_step_over_vllm_is_left_out_where_its_python_has_no_vllm(
    status: int, measured: list[str], load: Any, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexit {status}\n", encoding="utf-8")
    python.chmod(0o755)
    names = ["agentrl", "agentrl, vLLM", "trl"]
    pythons = load("grpo_step").interpreters(names, vllm=str(python), trl="other")
    assert list(pythons) == measured
    assert pythons["agentrl"] == sys.executable
    assert pythons["trl"] == "other"


def test_peak_memory_counts_the_processes_that_were_started(load: Any) -> None:
    workload = load("workload")
    alone = workload.peak_mib()
    code = "block = bytearray(64 << 20); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        together = workload.peak_mib()
        child.kill()
    assert together > alone + 64


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["embedded", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_agentrls_side_of_the_step_answers_what_it_is_told_to_run(engine: str, tmp_path: Path) -> None:
    # Heads of 32: vLLM's attention on a CPU has no smaller ones.
    shape = TinyShape(hidden_size=64, intermediate_size=64, layers=2, heads=2, kv_heads=1, vocab_size=320)
    make_tiny_model(tmp_path, texts=["Write on: time."], seed=0, shape=shape)
    done = subprocess.run(
        [sys.executable, str(_BENCHMARKS / "grpo_step_agentrl.py"), str(tmp_path), "1", "bfloat16", engine],
        input="step\nstep\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    ready, *reports = (json.loads(line) for line in done.stdout.splitlines())
    assert ready == {"ready": True}
    assert len(reports) == 2, done.stderr
    assert all(report["seconds"] > report["rollout_s"] + report["swap_s"] for report in reports)
    assert all(report["rollout_s"] > 0 < report["swap_s"] and report["peak_mib"] > 0 for report in reports)


def test_arithmetic_counts_every_weight_of_every_token_once_forward(load: Any) -> None:
    matrices = load("arithmetic").Matrices(linear=100, adapter=10, head=1000)
    assert matrices.sampling(3, 2) == 2 * (3 * 110 + 2 * 1000)
    # Backward: what reaches the inputs of all matrices, and the adapter's own gradient.
    assert matrices.update(3, 2) == matrices.sampling(3, 2) + 2 * (3 * 120 + 2 * 1000)


def test_a_training_step_s_row_is_of_what_the_step_computed(load: Any) -> None:
    matrices = load("arithmetic").Matrices(linear=100, adapter=10, head=1000)
    row = {
        "time/step_s": 9.0,
        "time/rollout_s": 4.0,
        "time/update_s": 5.0,
        "time/rollout_tokens_per_s": 2.0,  # 8 sampled in all, each turn's first out of its prompt's logits
        "rollout/prefill_tokens": 30.0,
        "rollout/decode_tokens": 6.0,
        "update/tokens": 20.0,
        "update/trained_tokens": 8.0,
    }
    measured = BenchReport(steps=1, threads=1, row=row, memory_mib={"peak": 7.0})
    found = load("training_step").row_of("4 tasks", measured, matrices, 1000.0)
    assert found["update_tok_s"] == 4.0
    assert found["rollout_mfu"] == pytest.approx(matrices.sampling(36, 8) / 4 / 1000)
    assert found["update_mfu"] == pytest.approx(matrices.update(20, 8) / 5 / 1000)
    assert found["peak_mib"] == 7.0
