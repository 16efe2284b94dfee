"""What a set of episodes says about a policy: pass@k per task, means over tasks, and how sure one can be.

Pure functions of counts and arrays; nothing is resampled and no generator is used. P tasks; a task has n
valid samples, of which c are correct. Tasks are the clusters: the siblings of one task are not independent,
so the spread is taken over per-task values. ``paired`` compares two runs on the same tasks; a gain means that
its lower end is above 0.

Sources: pass@k arXiv 2107.03374; clustered errors arXiv 2411.00640; Wilson, JASA 22 (1927).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtrit

__all__ = [
    "Estimate",
    "PassReport",
    "TaskCount",
    "avg_at_k",
    "estimate",
    "paired",
    "pass_at_k",
    "pass_hat_k",
    "report_pass",
]

MAX_INVALID = 0.02  # of all samples; above it a headline figure would hide what went wrong


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tasks with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCount:
    """How the samples of one task went."""

    task_id: str
    valid: int  # n
    correct: int  # c, of the valid ones
    invalid: int = 0  # the world failed: left out of n

    def __post_init__(self) -> None:
        if not (0 <= self.correct <= self.valid and self.invalid >= 0):
            raise ValueError(
                f"task {self.task_id!r} counts {self.correct} correct, {self.valid} valid and {self.invalid} "
                "invalid samples: none is negative and correct is at most valid"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PassReport:
    """pass@k (or pass^k) over tasks, with all that could make the figure misleading."""

    k: int
    estimate: Estimate | None  # over the tasks with at least k valid samples; None where there is none
    best: float  # over all tasks, if every invalid sample had been correct
    worst: float  # over all tasks, if every invalid sample had been wrong
    tasks: int  # P, all of them
    short_tasks: tuple[str, ...]  # ids of tasks with fewer than k valid samples: not in the estimate
    invalid: float  # the invalid fraction of all samples

    @property
    def headline(self) -> Estimate | None:
        """The figure to quote; None above 2 % invalid: then only ``best`` and ``worst`` are honest."""
        return self.estimate if self.invalid <= MAX_INVALID else None


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that at least one of k samples is correct: 1 - C(n-c, k) / C(n, k), unbiased."""
    _check_counts(n, c, k)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """The probability that all of k samples are correct, pass^k: C(c, k) / C(n, k), unbiased."""
    _check_counts(n, c, k)
    return math.comb(c, k) / math.comb(n, k)


def avg_at_k(n: int, c: int) -> float:
    """The fraction of the n samples that is correct: c / n."""
    _check_counts(n, c, 1)
    return c / n


def estimate(values: npt.ArrayLike, *, proportion: bool = True, confidence: float = 0.95) -> Estimate:
    """The mean of per-task values (P,) with its interval.

    ``proportion``: values lie in [0, 1], and so does the interval. It is Student's t over tasks, or, where
    the mean is within 3 standard errors of 0 or 1, Wilson's at the effective n = mean (1 - mean) / SE^2 (P
    where SE is 0). Otherwise (returns of any scale) it is Student's t; one task alone leaves it unbounded.
    """
    tasks = _per_task(values)
    if not proportion:
        return _student(tasks, confidence=confidence, bounds=(-math.inf, math.inf))
    if tasks.min() < 0 or tasks.max() > 1:
        raise ValueError(
            f"per-task values from {tasks.min():g} to {tasks.max():g} are no proportions in [0, 1]: "
            "pass proportion=False"
        )
    mean, error = float(tasks.mean()), _standard_error(tasks)
    if len(tasks) == 1 or min(mean, 1 - mean) <= 3 * error:
        effective_n = mean * (1 - mean) / error**2 if error > 0 else len(tasks)
        return _wilson(mean, effective_n, confidence=confidence)
    return _student(tasks, confidence=confidence, bounds=(0.0, 1.0))


def paired(
    before: npt.ArrayLike, after: npt.ArrayLike, *, proportion: bool = True, confidence: float = 0.95
) -> Estimate:
    """The mean of ``after - before`` over the same tasks in the same order, (P,) each, with Student's t.

    ``proportion``: values lie in [0, 1], so the interval is cut to [-1, 1].
    """
    first, second = _per_task(before), _per_task(after)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} tasks before, {len(second)} after: only the same tasks can be paired")
    bounds = (-1.0, 1.0) if proportion else (-math.inf, math.inf)
    return _student(second - first, confidence=confidence, bounds=bounds)


def report_pass(
    counts: Sequence[TaskCount],
    k: int,
    *,
    measure: Callable[[int, int, int], float] = pass_at_k,
    confidence: float = 0.95,
) -> PassReport:
    """``measure`` (``pass_at_k`` or ``pass_hat_k``) over tasks.

    Raises ValueError where fewer than k samples of a task were drawn, valid or not.
    """
    drawn = [count.valid + count.invalid for count in counts]
    fewest = min(drawn, default=0)
    if fewest < max(k, 1):
        raise ValueError(
            f"pass at k = {k} of {len(counts)} tasks, of which one has {fewest} samples: k is at least 1, "
            "and every task needs k samples"
        )
    enough = [measure(count.valid, count.correct, k) for count in counts if count.valid >= k]
    return PassReport(
        k=k,
        estimate=estimate(enough, confidence=confidence) if enough else None,
        best=_mean(measure(n, c.correct + c.invalid, k) for n, c in zip(drawn, counts, strict=True)),
        worst=_mean(measure(n, c.correct, k) for n, c in zip(drawn, counts, strict=True)),
        tasks=len(counts),
        short_tasks=tuple(count.task_id for count in counts if count.valid < k),
        invalid=sum(count.invalid for count in counts) / sum(drawn),
    )


def _check_counts(n: int, c: int, k: int) -> None:
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n = {n}, c = {c}, k = {k} can't be: 0 <= c <= n and 1 <= k <= n")


def _mean(values: Iterable[float]) -> float:
    collected = list(values)
    return math.fsum(collected) / len(collected)


def _per_task(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    tasks = np.asarray(values, dtype=np.float64)
    if tasks.ndim != 1 or tasks.size == 0 or not np.isfinite(tasks).all():
        raise ValueError(f"per-task values of shape {tasks.shape}: give one finite number for each task")
    return tasks


def _standard_error(tasks: npt.NDArray[np.float64]) -> float:
    """Of the mean (ddof 1); of one task it is 0, and callers must not trust it."""
    if (tasks == tasks[0]).all():  # numpy's std of equal values is a rounding error, not 0
        return 0.0
    return float(tasks.std(ddof=1)) / math.sqrt(len(tasks))


def _student(tasks: npt.NDArray[np.float64], *, confidence: float, bounds: tuple[float, float]) -> Estimate:
    mean = float(tasks.mean())
    if len(tasks) == 1:
        return Estimate(mean, *bounds)
    reach = float(stdtrit(len(tasks) - 1, (1 + confidence) / 2)) * _standard_error(tasks)
    return Estimate(mean, max(mean - reach, bounds[0]), min(mean + reach, bounds[1]))


def _wilson(mean: float, n: float, *, confidence: float) -> Estimate:
    z = float(ndtri((1 + confidence) / 2))
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2)
    low = max(centre - reach, 0.0) if mean > 0 else 0.0  # exactly, where rounding would leave 1e-18
    high = min(centre + reach, 1.0) if mean < 1 else 1.0
    return Estimate(mean, low, high)
