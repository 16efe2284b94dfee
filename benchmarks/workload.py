"""The step that grpo_step.py times, the same for every library, and how a child process serves it.

A child is told over stdin to run one step and answers with one line of JSON. What a library prints goes to
stderr.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "GROUP",
    "LEARNING_RATE",
    "PROMPTS",
    "RANK",
    "TOKENS",
    "Commands",
    "StepReport",
    "peak_mib",
    "prompts",
    "spread_rewards",
]

PROMPTS = 4  # a step
GROUP = 8  # completions of a prompt
TOKENS = 64  # of a prompt, and of a completion
RANK = 16  # of LoRA, on all linear layers
LEARNING_RATE = 1e-5

_WORDS = ("time", "people", "way", "water", "word", "day", "place", "year", "work", "man", "house", "world")
_FILLERS = (".", " a", "1", "!", ",")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step of one library."""

    seconds: float  # wall clock of the whole step
    rollout_s: float  # of which sampling
    swap_s: float  # of which handing the new weights to the engine; 0 where it samples with the learner's
    peak_mib: float  # most memory so far: see peak_mib


class Commands:
    """The child's end of the pipes: ``for step in commands`` waits for the parent to ask for a step."""

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # a stray print() must not look like an answer

    def __iter__(self) -> Iterator[int]:
        """Numbers of steps, from 0, until the parent closes the pipe."""
        self._send({"ready": True})
        for step, _ in enumerate(sys.stdin):
            yield step

    def answer(self, report: StepReport) -> None:
        """Tell the parent how the step went."""
        self._send(asdict(report))

    def _send(self, message: dict[str, Any]) -> None:
        self._replies.write(json.dumps(message) + "\n")


def prompts(tokenizer: Any) -> list[str]:
    """PROMPTS different texts of exactly TOKENS tokens each, special ones included."""
    return [_prompt(tokenizer, random.Random(place)) for place in range(PROMPTS)]


def _prompt(tokenizer: Any, generator: random.Random) -> str:
    text = "Write on:"
    while (length := len(tokenizer.encode(text))) < TOKENS:
        pieces = (f" {generator.choice(_WORDS)}", *_FILLERS)
        # The first that fits: near the end a word may have too many tokens, and ".." may be one.
        text += next(piece for piece in pieces if length < len(tokenizer.encode(text + piece)) <= TOKENS)
    return text


def spread_rewards(step: int) -> list[float]:
    """(PROMPTS * GROUP,) rewards, group after group: 0 to 1 in equal steps within each group, shuffled."""
    generator = random.Random(step)
    levels = [level / (GROUP - 1) for level in range(GROUP)]
    return [reward for _ in range(PROMPTS) for reward in generator.sample(levels, GROUP)]


def peak_mib() -> float:
    """Most memory so far: of the GPU, what this process has reserved; without one, what was resident of this
    process and of those that it started, added up.

    Each has its peak at a time of its own, so together they never had more. From /proc, because ru_maxrss
    begins at the size of the process that started this one. Linux only.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**20
    return sum(_peaks_kib(Path("/proc/self"))) / 1024


def _peaks_kib(process: Path) -> Iterator[int]:
    try:
        status = (process / "status").read_text(encoding="ascii", errors="replace")
        threads = list((process / "task").iterdir())
        children = [pid for thread in threads for pid in (thread / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended just now
        return
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    if found is not None:  # one that has ended and not been waited for has no memory
        yield int(found.group(1))
    for pid in children:
        yield from _peaks_kib(Path("/proc", pid))
