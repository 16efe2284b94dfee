"""The steps of a training configuration: tokens a second of rollout and update, and how much of the device
they use.

    python benchmarks/training_step.py configs/calculator-vllm.yaml model.path=DIR engine=embedded
    python benchmarks/training_step.py ... warm_start=null --tasks 4 32 128

Meant for a GPU, where the configuration's own batch is small: --tasks takes several numbers of tasks a step,
each measured in turn. A base that a run has warm-started (runs/NAME/base) spares a warm start for each:
without spread in the rewards there is no update to measure.

Model FLOP utilisation (mfu) is the arithmetic of the matrices (arithmetic.py) over the seconds of the stage
and the rate of a large matrix product in the base's dtype, which is measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from arithmetic import Matrices, matrices_of
from machine import device_name, matmul_rate, read_rate
from report import Row, make_parser, report
from transformers import AutoConfig

from agentrl.bench import BenchReport, bench
from agentrl.config import RunConfig
from agentrl.configfile import load_config
from agentrl.log import Display
from agentrl.models import default_device

__all__ = ["main", "row_of"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for."""
    options = _options(arguments)
    tasks = options.tasks or [_load(options).rollout.tasks_per_step]
    configs = {f"{count} tasks": _load(options, count) for count in tasks}
    first = next(iter(configs.values()))
    if first.model.path is None:
        raise SystemExit(f"{options.config} has no model.path; name the model whose steps are to be measured")
    shape = AutoConfig.from_pretrained(first.model.path).get_text_config()
    matrices = matrices_of(shape, rank=first.lora.r)
    dtype = shape.dtype if first.model.dtype == "auto" else getattr(torch, first.model.dtype)
    device = default_device()
    flops = matmul_rate(dtype, device=device)
    rows = [
        row_of(name, _measure(config, steps=1 if options.quick else options.steps), matrices, flops)
        for name, config in configs.items()
    ]
    notes = [
        f"{device_name()}, {str(dtype).removeprefix('torch.')}: a matrix product makes "
        f"{flops / 1e12:.3g} TFLOP/s, reading memory {read_rate(device=device) / 1e9:,.0f} GB/s",
        f"{first.rollout.group_size} episodes a task; tokens/s of the rollout count what was sampled, of the "
        "update what was packed",
    ]
    report(rows, title=f"A training step of {first.name}", notes=notes, json_path=options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("config", help="a training configuration's file or name")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to replace")
    parser.add_argument(
        "--tasks", type=int, nargs="+", metavar="N", help="tasks a step (the configuration's)"
    )
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="measured steps of each (5)")
    return parser.parse_intermixed_args(arguments)


def _load(options: argparse.Namespace, tasks: int | None = None) -> RunConfig:
    """The configuration, with so many tasks a step and all their episodes in flight at once."""
    config = load_config(options.config, options.overrides)
    if tasks is None:
        return config
    at_once = tasks * config.rollout.group_size
    wider = [f"rollout.tasks_per_step={tasks}", f"engine.max_sequences={at_once}"]
    return load_config(options.config, [*options.overrides, *wider])


def _measure(config: RunConfig, *, steps: int) -> BenchReport:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with Display() as display:
        return bench(config, steps=steps, display=display)


def row_of(name: str, measured: BenchReport, matrices: Matrices, flops_per_s: float) -> Row:
    """A row of the table: medians over the measured steps."""
    row = measured.row
    computed = row["rollout/prefill_tokens"] + row["rollout/decode_tokens"]
    sampled = row["time/rollout_tokens_per_s"] * row["time/rollout_s"]
    rollout = matrices.sampling(int(computed), int(sampled))
    update = matrices.update(int(row["update/tokens"]), int(row["update/trained_tokens"]))
    return {
        "name": name,
        "step_s": row["time/step_s"],
        "rollout_s": row["time/rollout_s"],
        "update_s": row["time/update_s"],
        "rollout_tok_s": row["time/rollout_tokens_per_s"],
        "update_tok_s": row["update/tokens"] / row["time/update_s"],
        "rollout_mfu": rollout / row["time/rollout_s"] / flops_per_s,
        "update_mfu": update / row["time/update_s"] / flops_per_s,
        "peak_mib": measured.memory_mib["peak"],
    }


if __name__ == "__main__":
    main()
