"""Where a step's seconds and bytes go: a few steps of a configuration, measured and laid out.

The base is made as a run would make it, warm start included, in a folder that is thrown away. The first step
is not counted: it pays for what is made once. Seconds of parts are those of the thread that computes; what
episodes do beside it (tools, rewards) overlaps and is given per episode.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from agentrl.config import RunConfig, dump_config
from agentrl.files import writing
from agentrl.log import Display, RunFolder, RunLog
from agentrl.models import default_device, load_tokenizer
from agentrl.preflight import check_run
from agentrl.prepare import prepare_base
from agentrl.registry import make
from agentrl.threads import in_compute_thread, run_sync
from agentrl.trainer import Trainer

__all__ = ["BenchReport", "bench", "bench_table"]

_MIB = 2**20
# Stage of a step -> its parts, by metric; what is left of the stage is shown as "the rest".
_STAGES: Mapping[str, tuple[str, ...]] = {
    "time/rollout_s": ("time/prefill_s", "time/decode_s"),
    "time/update_s": ("time/score_s", "time/forward_s", "time/backward_s", "time/optimizer_s"),
    "time/load_s": (),
}
_NAMES = {
    "time/rollout_s": "rollout",
    "time/prefill_s": "prefill",
    "time/decode_s": "decode",
    "time/update_s": "update",
    "time/score_s": "logprobs of old and reference",
    "time/forward_s": "forward, logprobs and loss",
    "time/backward_s": "backward",
    "time/optimizer_s": "optimizer",
    "time/load_s": "adapter to the engine",
}


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Medians over the measured steps."""

    steps: int
    threads: int
    row: Mapping[str, float]  # a step's metrics
    memory_mib: Mapping[str, float]  # by what holds it; "peak": the most that the process has had

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def bench(
    config: RunConfig,
    *,
    steps: int = 3,  # measured
    profile: Path | None = None,  # where the trace of one more step goes, for Perfetto or chrome://tracing
    display: Display,
) -> BenchReport:
    """Measure ``steps`` training steps of ``config``; blocks. Raises UserError as a run would."""
    check_run(config, device=default_device())
    with tempfile.TemporaryDirectory(prefix="agentrl-bench-") as folder:
        return run_sync(_measure(config, Path(folder), steps=steps, profile=profile, display=display))


async def _measure(
    config: RunConfig, folder: Path, *, steps: int, profile: Path | None, display: Display
) -> BenchReport:
    def make_env() -> Any:
        return make(config.environment.id, **config.environment.args)

    async with AsyncExitStack() as stack:
        log = stack.enter_context(RunLog(RunFolder(folder / config.name), config_text=dump_config(config)))
        base = await prepare_base(config, make_env, log=log, display=display)
        trainer = await Trainer.load(
            config, base, tokenizer=load_tokenizer(base), make_env=make_env, on_note=display.note
        )
        stack.push_async_callback(trainer.close)
        rows = [await _step(trainer, step) for step in range(1 + steps)][1:]
        if profile is not None:
            await _trace(trainer, 1 + steps, profile)
        threads = await in_compute_thread(torch.get_num_threads)
        names = [name for name in rows[0] if all(name in row for row in rows)]
        medians = {name: statistics.median(row[name] for row in rows) for name in names}
        return BenchReport(steps, threads, medians, trainer.memory_mib() | {"peak": _peak_mib()})


async def _step(trainer: Trainer, step: int) -> dict[str, float]:
    began = time.perf_counter()
    rolled = await trainer.roll_out(step)
    row = await trainer.learn(step, rolled, waited_s=time.perf_counter() - began)
    return row | {"time/step_s": time.perf_counter() - began}


async def _trace(trainer: Trainer, step: int, path: Path) -> None:
    """Write a torch trace of one step; it sees the compute thread."""
    profiler = torch.profiler.profile(acc_events=True)  # without it torch 2.11 warns that cycles are cleared
    await in_compute_thread(profiler.start)
    try:
        await _step(trainer, step)
    finally:
        await in_compute_thread(profiler.stop)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))


def bench_table(report: BenchReport) -> list[Table]:
    """Seconds, tokens and memory, for a terminal."""
    return [_seconds(report), _tokens(report.row), _memory(report.memory_mib)]


def _seconds(report: BenchReport) -> Table:
    row = report.row
    table = Table(
        "stage",
        "part",
        "seconds",
        "share",
        title=f"a step, median of {report.steps}, {report.threads} threads",
    )
    whole = row["time/step_s"]

    def add(stage: str, part: str, seconds: float) -> None:
        table.add_row(stage, part, f"{seconds:.3f}", f"{seconds / whole:.1%}")

    for stage, every in _STAGES.items():
        parts = [part for part in every if part in row]  # a server does not say what its requests cost
        add(_NAMES[stage], "", row[stage])
        for part in parts:
            add("", _NAMES[part], row[part])
        if parts:
            add("", "the rest", row[stage] - sum(row[part] for part in parts))
    add("everything", "", whole)
    for name in ("engine", "env", "tools", "reward"):
        if (key := f"time/episode_{name}_s") in row:
            table.add_row("an episode's", f"{name}, mean", f"{row[key]:.4f}", "")
    return table


def _tokens(row: Mapping[str, float]) -> Table:
    table = Table("tokens of a step", "count", "tokens/s")
    for name, seconds in (("prefill", "time/prefill_s"), ("decode", "time/decode_s"), ("reused", "")):
        if f"rollout/{name}_tokens" not in row:
            continue
        count = row[f"rollout/{name}_tokens"]
        spent = row.get(seconds, 0.0)  # vLLM does not say
        rate = f"{count / spent:,.0f}" if spent else ""
        table.add_row(name, f"{count:,.0f}", rate)
    packed = row["update/tokens"]
    table.add_row("update, packed", f"{packed:,.0f}", f"{packed / row['time/update_s']:,.0f}")
    table.add_row("rollout, sampled", "", f"{row['time/rollout_tokens_per_s']:,.0f}")
    return table


def _memory(memory: Mapping[str, float]) -> Table:
    table = Table("memory", "MiB")
    for name, size in memory.items():
        table.add_row(name, f"{size:,.1f}")
    return table


def _peak_mib() -> float:
    """The most memory that this process has had: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / _MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / _MIB if sys.platform == "darwin" else peak / 1024
