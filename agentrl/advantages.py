"""Advantages: how much better an episode did than its group. Pure numpy, no randomness.

An estimator takes the returns of a group's valid episodes, (G,), and gives one number an episode, (G,)
float64; invalid siblings never reach it. A group without spread carries no signal: its advantages are exactly
0, not rounding noise. The formulas are of GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783) and RLOO
(2402.14740).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from agentrl.types import Sample

__all__ = [
    "ADVANTAGES",
    "Estimator",
    "dr_grpo",
    "group_relative",
    "grpo",
    "is_informative",
    "rloo",
    "with_advantages",
]

Float64Array = npt.NDArray[np.float64]
Estimator = Callable[[npt.ArrayLike], Float64Array]  # returns of a group (G,) -> advantages (G,)

_STD_FLOOR = 1e-6  # added to the standard deviation, as in GRPO's published code


def grpo(rewards: npt.ArrayLike) -> Float64Array:
    """``(r - mean) / (std + 1e-6)`` with the sample standard deviation (ddof 1); (G,). A group of one: 0."""
    returns = _returns(rewards)
    if not is_informative(returns):
        return np.zeros_like(returns)
    return _centred(returns) / (float(returns.std(ddof=1)) + _STD_FLOOR)


def dr_grpo(rewards: npt.ArrayLike) -> Float64Array:
    """``r - mean``, (G,): hard and easy tasks keep their scale. A group of one: 0."""
    return _centred(_returns(rewards))


def rloo(rewards: npt.ArrayLike) -> Float64Array:
    """``r`` minus the mean of the others, (G,). A group of one has no others: ``r`` itself."""
    returns = _returns(rewards)
    if returns.size == 1:
        return returns
    return _centred(returns) * (returns.size / max(returns.size - 1, 1))


ADVANTAGES: Mapping[str, Estimator] = MappingProxyType({"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo})


def is_informative(rewards: npt.ArrayLike) -> bool:
    """Whether the returns of a group (G,) differ at all; where they do not, a relative advantage is 0."""
    returns = _returns(rewards)
    return returns.size > 0 and bool(returns.max() > returns.min())


def group_relative(
    rewards: npt.ArrayLike, episodes: Sequence[Sequence[Sample]], *, estimator: Estimator
) -> list[Sample]:
    """The samples of one group with their advantages, episode after episode.

    ``rewards`` (G,) are the returns of the group's valid episodes, ``episodes`` (G,) the samples of each:
    one, or more where the history was rewritten, which then share the episode's advantage. Raises ValueError
    where the two differ in G.
    """
    advantages = estimator(rewards)
    if len(advantages) != len(episodes):
        raise ValueError(
            f"{len(advantages)} rewards for {len(episodes)} episodes; hand in one return an episode"
        )
    return [
        sample
        for advantage, samples in zip(advantages, episodes, strict=True)
        for sample in with_advantages(samples, float(advantage))
    ]


def with_advantages(samples: Sequence[Sample], value: float) -> list[Sample]:
    """The samples of one episode with ``value`` on every trained token and 0 on every other."""
    return [dataclasses.replace(sample, advantages=np.where(sample.mask, value, 0.0)) for sample in samples]


def _returns(rewards: npt.ArrayLike) -> Float64Array:
    returns = np.array(rewards, dtype=np.float64)
    if returns.ndim != 1 or not np.isfinite(returns).all():
        raise ValueError(f"the returns of a group must be finite numbers of shape (G,), not {rewards!r}")
    return returns


def _centred(returns: Float64Array) -> Float64Array:
    # The mean of equal numbers is not always that number: 0.1 three times has the mean 0.10000000000000002.
    return returns - returns.mean() if is_informative(returns) else np.zeros_like(returns)
