"""One step of GRPO on a real model: agentrl beside TRL, and what the machine allows at most.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/grpo_step.py --model DIR
    python benchmarks/grpo_step.py --model DIR --vllm-python ENVIRONMENT/bin/python
    python benchmarks/grpo_step.py --model DIR --dtype float32 --only agentrl "trl, contiguous head"

Gemma 3 270M, LoRA of rank 16 on all linear layers, 4 prompts of 64 tokens x 8 completions of exactly 64 at
temperature 1, a bfloat16 base with float32 adapters, no KL, no dropout. Each library has a process of its
own; their steps alternate, so all see the same machine. The first step of each is warm-up. Linux only. All
run on the GPU where there is one.

A CPU without instructions for bfloat16 multiplies it at a hundredth of its rate for float32: there --dtype
float32 compares the libraries, and the aims, which are about bfloat16, are not named.

agentrl samples with its embedded engine, and with vLLM, whose step ends when vLLM serves the new adapter.
vLLM and TRL seldom fit into one environment, so each may have an interpreter of its own, with agentrl
installed where it is vLLM's; without vLLM its row is left out. Memory is that of all processes that a library
starts; on a GPU what its own process reserves there, so vLLM's is missing. All libraries stay loaded: --only
names those that a small machine has room for together.

The floor is the arithmetic and the bytes that no implementation can leave out, over the rates measured here:
the longer of the two for the rollout, likewise for the update. Prompts count once for their group. Weights
are read once a sampled token, activations and the cache not at all.

TRL runs twice: as its settings allow, which the aims are about, and with one line of ours that frees it of
the copies of the head's weights that transformers' prompt pass makes on a CPU (see grpo_step_trl.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Any, Self

import torch
from arithmetic import matrices_of
from machine import device_name, matmul_rate, read_rate
from report import Row, make_parser, report
from transformers import AutoConfig
from workload import GROUP, PROMPTS, RANK, TOKENS, StepReport

__all__ = ["Floor", "floor_of", "interpreters", "main"]

_HERE = Path(__file__).parent
_END_S = 30  # that a process has to end by itself
_VLLM = "agentrl, vLLM"
_LIBRARIES = {  # the script and its last argument
    "agentrl": ("grpo_step_agentrl.py", "embedded"),
    _VLLM: ("grpo_step_agentrl.py", "vllm"),
    "trl": ("grpo_step_trl.py", ""),
    "trl, contiguous head": ("grpo_step_trl.py", "contiguous-head"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = matmul_rate(dtype, device=device), read_rate(device=device)
    floor = floor_of(AutoConfig.from_pretrained(options.model).get_text_config(), bytes_each=dtype.itemsize)
    pythons = interpreters(options.only, vllm=options.vllm_python, trl=options.trl_python)
    measured = _alternate(options, pythons)
    rows = [*(_row(name, reports) for name, reports in measured.items()), floor.row(*rates)]
    notes = _notes(rows, floor, rates)
    if options.dtype == "bfloat16":
        notes.append("aims: 0.20 of trl's time and 0.50 of its memory; with vLLM 0.25 of its time")
    if _VLLM in options.only and _VLLM not in pythons:
        notes.append(f"no row for {_VLLM}: {options.vllm_python} has no vllm; see --vllm-python")
    report(rows, title=_title(options), notes=notes, json_path=options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, metavar="PATH", help="folder of Gemma 3 270M, or a hub id")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="measured steps of each (5)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the base")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="of each process")
    for name in ("vllm", "trl"):
        about = f"Python that has {name} (this one)"
        parser.add_argument(f"--{name}-python", default=sys.executable, metavar="PATH", help=about)
    names = list(_LIBRARIES)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="libraries to measure (all)")
    return parser.parse_args(arguments)


def interpreters(names: Sequence[str], *, vllm: str, trl: str) -> dict[str, str]:
    """The Python of each library in ``names``, without agentrl over vLLM where ``vllm`` has no vLLM."""
    pythons = {"agentrl": sys.executable, _VLLM: vllm, "trl": trl, "trl, contiguous head": trl}
    if _VLLM in names:
        looks = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        if subprocess.run([vllm, "-c", looks], timeout=600).returncode:
            del pythons[_VLLM]
    return {name: pythons[name] for name in names if name in pythons}


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """What one step takes at least."""

    rollout_flops: float
    update_flops: float
    rollout_bytes: float  # of weights, read
    update_bytes: float
    weights_bytes: float  # of the frozen base

    def row(self, flops_per_s: float, bytes_per_s: float) -> Row:
        """Seconds at these rates, as a row of the table."""
        rollout = max(self.rollout_flops / flops_per_s, self.rollout_bytes / bytes_per_s)
        update = max(self.update_flops / flops_per_s, self.update_bytes / bytes_per_s)
        return {
            "name": "floor",
            "seconds_per_step": rollout + update,
            "rollout_s": rollout,
            "update_s": update,
            "swap_s": None,
            "peak_mib": self.weights_bytes / 2**20,
        }


def floor_of(config: Any, *, bytes_each: int) -> Floor:
    """The floor for a dense model of this configuration, from its matrices alone, of so many bytes a
    weight."""
    matrices = matrices_of(config, rank=RANK)
    prompt, sampled = PROMPTS * TOKENS, PROMPTS * GROUP * TOKENS
    weights = (matrices.linear + matrices.head) * bytes_each
    return Floor(
        rollout_flops=matrices.sampling(prompt + sampled, sampled),
        update_flops=matrices.update(prompt + sampled, sampled),
        rollout_bytes=TOKENS * weights,
        update_bytes=2 * weights,
        weights_bytes=weights,
    )


class _Child:
    """A library in a process of its own that runs a step when told to."""

    def __init__(self, library: str, python: str, *, model: str, dtype: str, threads: int) -> None:
        self._name = library
        script, variant = _LIBRARIES[library]
        self._process = subprocess.Popen(
            [python, str(_HERE / script), model, str(threads), dtype, variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )
        self._receive()  # it is ready

    def step(self) -> StepReport:
        """Run one step to its end."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return StepReport(**self._receive())

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the process of {self._name} ended with code {self._process.wait()}; see above")
        return dict(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # no more steps: it ends, and with it what it has started
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _alternate(options: argparse.Namespace, pythons: Mapping[str, str]) -> dict[str, list[StepReport]]:
    """Reports of each library, in turn, after one step of warm-up each."""
    reports: dict[str, list[StepReport]] = {library: [] for library in pythons}
    with ExitStack() as stack:
        children = {
            library: stack.enter_context(
                _Child(library, python, model=options.model, dtype=options.dtype, threads=options.threads)
            )
            for library, python in pythons.items()
        }
        for step in range(1 + (1 if options.quick else options.steps)):
            for library, child in children.items():
                report = child.step()
                print(f"{library}, step {step}: {report.seconds:.2f} s", file=sys.stderr)
                if step:
                    reports[library].append(report)
    return reports


def _row(name: str, reports: Sequence[StepReport]) -> Row:
    seconds, rollout, swap = (
        mean(getattr(r, part) for r in reports) for part in ("seconds", "rollout_s", "swap_s")
    )
    return {
        "name": name,
        "seconds_per_step": seconds,
        "rollout_s": rollout,
        "update_s": seconds - rollout - swap,
        "swap_s": swap,
        "peak_mib": max(r.peak_mib for r in reports),
    }


def _title(options: Any) -> str:
    return (
        f"One GRPO step: {PROMPTS} prompts x {GROUP} completions, {TOKENS} + {TOKENS} tokens, "
        f"LoRA r {RANK}, {options.dtype}, {device_name()}, {options.threads} threads"
    )


def _notes(rows: Sequence[Row], floor: Floor, rates: tuple[float, float]) -> list[str]:
    *measured, least = rows
    theirs = [row for row in measured if str(row["name"]).startswith("trl")]
    ours = [row for row in measured if row not in theirs]
    compared = [
        f"{our['name']}: {_ratio(our, their, 'seconds_per_step')} of the time and "
        f"{_ratio(our, their, 'peak_mib')} of the memory of {their['name']}"
        for our in ours
        for their in theirs
    ]
    floors = [f"{_ratio(row, least, 'seconds_per_step')} times into {row['name']}'s" for row in ours]
    return [
        *compared,
        *([f"the floor's time goes {', '.join(floors)}"] if floors else []),
        f"floor, rollout + update: {floor.rollout_flops / 1e12:.2f} + {floor.update_flops / 1e12:.2f} TFLOP "
        f"at {rates[0] / 1e9:.0f} GFLOP/s,",
        f"  {floor.rollout_bytes / 1e9:.1f} + {floor.update_bytes / 1e9:.1f} GB of weights at "
        f"{rates[1] / 1e9:.1f} GB/s; its memory is the weights alone",
    ]


def _ratio(one: Row, other: Row, column: str) -> str:
    return f"{float(one[column] or 0) / float(other[column] or 1):.2f}"


if __name__ == "__main__":
    main()
