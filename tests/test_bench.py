"""Where a step's seconds and bytes go, measured on a real step of a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from agentrl.bench import BenchReport, bench, bench_table
from agentrl.config import RunConfig
from agentrl.log import Display

_SMALL = {
    "name": "small",
    "environment": {"id": "calculator", "args": {"levels": [1]}},
    "model": {"tiny": {"hidden_size": 32, "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 1}},
    "steps": 3,
    "rollout": {"tasks_per_step": 2, "group_size": 2, "max_turn_tokens": 8, "max_episode_tokens": 256},
    "algorithm": {"kl": 0.1},  # so that there is an update although every reward is 0
    "log": {"trackers": []},
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchReport, Path]:
    folder = tmp_path_factory.mktemp("bench")
    config = RunConfig.model_validate({**_SMALL, "output": str(folder / "runs")})
    return bench(config, steps=2, profile=folder / "trace.json", display=Display()), folder


def test_the_parts_of_a_stage_are_no_longer_than_it(measured: tuple[BenchReport, Path]) -> None:
    row = measured[0].row
    assert 0 < row["time/prefill_s"] + row["time/decode_s"] <= row["time/rollout_s"]
    parts = ("score", "forward", "backward", "optimizer")
    assert 0 < sum(row[f"time/{part}_s"] for part in parts) <= row["time/update_s"]
    assert row["time/rollout_s"] + row["time/update_s"] <= row["time/step_s"]


def test_memory_is_told_by_what_holds_it(measured: tuple[BenchReport, Path]) -> None:
    memory = measured[0].memory_mib
    assert list(memory) == ["base", "adapter and gradient", "optimizer", "cache", "peak"]
    assert all(size > 0 for size in memory.values())
    assert sum(list(memory.values())[:-1]) < memory["peak"]


def test_the_tables_name_every_part(measured: tuple[BenchReport, Path]) -> None:
    console = Console(width=100)
    with console.capture() as said:
        for table in bench_table(measured[0]):
            console.print(table)
    for name in ("prefill", "decode", "backward", "optimizer", "reward, mean", "tokens/s", "peak"):
        assert name in said.get()
    assert json.loads(json.dumps(measured[0].to_json()))["steps"] == 2


def test_a_server_that_does_not_say_what_it_costs_has_no_parts(measured: tuple[BenchReport, Path]) -> None:
    report, unsaid = measured[0], ("prefill", "reused", "decode")
    row = {key: value for key, value in report.row.items() if not any(name in key for name in unsaid)}
    console = Console(width=100)
    with console.capture() as said:
        for table in bench_table(replace(report, row=row)):
            console.print(table)
    assert not any(name in said.get() for name in unsaid)
    assert all(name in said.get() for name in ("rollout", "the rest", "rollout, sampled"))


def test_an_engine_that_counts_tokens_and_no_seconds_has_no_rates(
    measured: tuple[BenchReport, Path],
) -> None:
    report = measured[0]
    row = {key: value for key, value in report.row.items() if key not in ("time/prefill_s", "time/decode_s")}
    console = Console(width=100)
    with console.capture() as said:
        for table in bench_table(replace(report, row=row)):
            console.print(table)
    assert f"{row['rollout/prefill_tokens']:,.0f}" in said.get()


def test_the_trace_shows_the_kernels_and_no_run_is_left_behind(measured: tuple[BenchReport, Path]) -> None:
    _, folder = measured
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert any(event.get("name") == "aten::linear" for event in events)
    assert not (folder / "runs").exists()
