"""Adapters on vLLM's CPU backend: our products against their definition and against vLLM's own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from agentrl.engines.vllm_worker import HOME_VARIABLE, OWNER_VARIABLE

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

INPUTS, RANK, SLICES, SLOTS = 24, 8, (12, 4, 4), 3  # as query, key and value are one layer
IDS = [11, 12, 13]  # of the adapters in the slots


@pytest.fixture
def matrices() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A (slots, 1, rank, inputs) and B (slots, 1, slice, rank) of each slice."""
    torch.manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, INPUTS) for _ in SLICES)
    return a, tuple(torch.randn(SLOTS, 1, width, RANK) for width in SLICES)


def wrapper(kind: Any, ids: list[int]) -> Any:
    """One of that class, told which adapter each of the next tokens has; 0: none."""
    from vllm.lora.layers import LoRAMapping

    made = kind(64, 16, "cpu")
    made.update_metadata(LoRAMapping(tuple(ids), tuple(ids), is_prefill=True), list(IDS), SLOTS, 100)
    return made


def added(kind: Any, ids: list[int], matrices: Any, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """What it adds to ones, for each token a row (T, outputs)."""
    a, b = ([matrix.to(dtype) for matrix in side] for side in matrices)
    y = torch.ones(len(ids), sum(SLICES), dtype=dtype)
    x = torch.randn(len(ids), INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)
    wrapper(kind, ids).add_lora_linear(y, x, tuple(a), tuple(b), 0.5, SLICES)
    return y - 1


def defined(ids: list[int], matrices: Any) -> Tensor:
    x = torch.randn(len(ids), INPUTS, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(len(ids), sum(SLICES))
    for token, number in enumerate(ids):
        if number:
            slot = IDS.index(number)
            parts = [b[slot, 0] @ (a[slot, 0] @ x[token]) for a, b in zip(*matrices, strict=True)]
            y[token] = 0.5 * torch.cat(parts)
    return y


@pytest.mark.parametrize(
    "ids",
    [[12] * 9, [11, 11, 12, 12, 13], [0, 12, 0, 11, 12, 0], [0, 0, 0], [13]],
    ids=["one adapter", "several", "some tokens with none", "none", "one token"],
)
def test_every_token_gets_its_own_adapters_product(ids: list[int], matrices: Any) -> None:
    from agentrl.engines.vllm_lora import PunicaByAdapter

    got = added(PunicaByAdapter, ids, matrices)
    torch.testing.assert_close(got, defined(ids, matrices), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_it_is_what_vllm_computes(matrices: Any, dtype: torch.dtype, off: float) -> None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from agentrl.engines.vllm_lora import PunicaByAdapter

    assert not issubclass(PunicaWrapperCPU, PunicaByAdapter)
    ids = [11, 13, 13, 12, 11]
    ours, theirs = (added(kind, ids, matrices, dtype=dtype) for kind in (PunicaByAdapter, PunicaWrapperCPU))
    torch.testing.assert_close(ours, theirs, rtol=off, atol=5 * off)


def test_batches_follow_each_other(matrices: Any) -> None:
    from vllm.lora.layers import LoRAMapping

    from agentrl.engines.vllm_lora import PunicaByAdapter

    first, second = [11, 12, 12], [13, 13]
    kept = wrapper(PunicaByAdapter, first)
    kept.update_metadata(LoRAMapping(tuple(second), tuple(second), is_prefill=True), list(IDS), SLOTS, 100)
    y, x = torch.zeros(2, sum(SLICES)), torch.randn(2, INPUTS, generator=torch.Generator().manual_seed(1))
    kept.add_lora_linear(y, x, *matrices, 0.5, SLICES)
    torch.testing.assert_close(y, defined(second, matrices), rtol=1e-4, atol=1e-4)


def test_a_worker_that_vllm_starts_uses_it_and_its_owner_does_not(tmp_path: Any) -> None:
    program = (
        "import vllm.platforms\n"
        "import agentrl.engines.vllm_worker\n"
        "from vllm.lora.punica_wrapper import get_punica_wrapper\n"
        "print(type(get_punica_wrapper(64, 16, device='cpu')).__name__)\n"
    )
    environment = {**os.environ, HOME_VARIABLE: str(tmp_path)}
    told = {**environment, OWNER_VARIABLE: str(os.getpid())}
    names = [
        subprocess.run(
            [sys.executable, "-c", program], env=env, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        for env in (told, environment)
    ]
    assert names == ["PunicaByAdapter", "PunicaWrapperCPU"]
