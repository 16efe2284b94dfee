"""What transformers computes, plainly: the tests' measure of engines."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from agentrl.types import IntArray

__all__ = ["expected_logprobs"]


def expected_logprobs(model: Any, prompt: IntArray, said: IntArray, *, temperature: float = 1.0) -> Any:
    """(C,) what a transformers model gives the completion in one pass over all of it."""
    whole = torch.from_numpy(np.concatenate([prompt, said])).long()
    with torch.no_grad():
        logits = model(input_ids=whole[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)[range(len(said)), whole[len(prompt) :]].numpy()
