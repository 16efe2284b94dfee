r"""Boxed answers verified a second, and what a hostile answer costs.

    python benchmarks/verify.py        # GSM8K and MATH-500 from the folder AGENTRL_DATA, else made-up answers

agentrl's `boxed` reward asks math-verify in killable worker processes, one a core here. The peer is
math-verify called directly, in one process a core, each with its share of the answers handed over
beforehand and no time-outs: that is the limit, for nothing is passed to and fro. Aim: at least 0.8 of it.
Every truth is verified against itself, against itself written otherwise, and against a wrong answer; both
sides read a truth that they have met before from memory. Two integers are compared without a worker: of
GSM8K's answers the rate without it is that of the same with a sign of currency in front ("priced").

An answer may be built to stall (`10^{10^{10}}`) or to eat all memory (`((9!)!)!`). Each goes through the
workers while its neighbours are verified: it may take 2 s and 512 MiB above an idle worker, and no
neighbour's verdict may change. Its seconds include the probe, mostly a new worker's start, that tells whether
the answer or the machine is to blame. Beside it stands math-verify alone with its own time-outs. Linux only.
"""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

from report import Row, make_parser, report

from agentrl.registry import make_reward
from agentrl.reward import Evidence, Reward
from agentrl.types import Message, Score, Task

__all__ = ["Pair", "hostile_rows", "main", "make_pairs", "throughput_rows"]

_DEADLINE_S, _MEMORY_MIB = 2.0, 512
_IN_FLIGHT = 64  # episodes that wait for their verdict at once
_HOSTILE = (r"10^{10^{10}}", r"((9!)!)!")
_COMPUTED = "2^{10}"  # a truth to compare them with: beside a plain number they would not be computed
_REPEATS = 3  # of which the median counts
_PATIENCE_S = 60.0  # with math-verify alone


@dataclass(frozen=True, slots=True)
class Pair:
    """A truth and what an episode answered."""

    truth: str
    answer: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes of each")
    options = parser.parse_args(arguments)
    most, repeats = (12, 1) if options.quick else (1000, _REPEATS)
    given = {name: make_pairs(truths)[: 3 * most] for name, truths in _truths().items()}
    integers, *others = given
    priced = [Pair(pair.truth, rf"\${pair.answer}") for pair in given[integers]]
    sets = {integers: given[integers], f"{integers}, priced": priced} | {name: given[name] for name in others}
    rows = [
        row
        for name, pairs in sets.items()
        for row in throughput_rows(name, pairs, workers=options.workers, repeats=repeats)
    ]
    hostile = _HOSTILE[:1] if options.quick else _HOSTILE
    rows += hostile_rows(hostile, priced[:600], workers=options.workers)
    report(rows, title=f"Verification of boxed answers, {options.workers} processes", json_path=options.json)


# -- answers --


def make_pairs(truths: Sequence[str]) -> list[Pair]:
    """Three answers to each truth: itself, itself written otherwise, and a wrong one; shuffled."""
    pairs = [
        Pair(truth, answer) for truth in truths for answer in (truth, _written_otherwise(truth), f"7{truth}")
    ]
    random.Random(0).shuffle(pairs)
    return pairs


def _written_otherwise(truth: str) -> str:
    """A number with another decimal, anything else with a blank and a full stop."""
    if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", truth) is None:
        return f" {truth} ."
    return f"{truth}0" if "." in truth else f"{truth}.0"


def _truths() -> dict[str, list[str]]:
    """The truths of GSM8K's and MATH-500's test sets, or made-up ones like them."""
    folder = os.environ.get("AGENTRL_DATA")
    if folder is None:
        return {"GSM8K-like": _arithmetic_truths(), "MATH-like": _latex_truths()}
    gsm8k = [row["answer"].rpartition("####")[2] for row in _json_lines(Path(folder, "gsm8k", "test.jsonl"))]
    math = [row["answer"] for row in _json_lines(Path(folder, "math500", "test.jsonl"))]
    return {"GSM8K": [truth.replace(",", "").strip() for truth in gsm8k], "MATH-500": math}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _arithmetic_truths() -> list[str]:
    generator = random.Random(0)
    return [str(generator.randint(1, 10_000)) for _ in range(1000)]


def _latex_truths() -> list[str]:
    generator = random.Random(1)
    forms = (
        r"\frac{%d}{%d}",
        r"%d\sqrt{%d}",
        r"(%d, %d]",
        r"x^2 + %dx - %d",
        r"\{%d, %d\}",
        r"%d + %di",
        r"\begin{pmatrix} %d \\ %d \end{pmatrix}",
        r"%d^{\circ}%.0s",
    )
    numbers = [generator.sample(range(2, 100), 2) for _ in range(500)]
    return [forms[at % len(forms)] % tuple(pair) for at, pair in enumerate(numbers)]


# -- throughput --


def throughput_rows(name: str, pairs: Sequence[Pair], *, workers: int, repeats: int) -> list[Row]:
    """agentrl and the peer on ``pairs``, in turn; the median of ``repeats`` counts."""
    reward = _boxed(workers)
    _verdicts(reward, pairs[: 4 * workers])  # the workers are up
    ours, theirs = list[float](), list[float]()
    with _direct_processes(pairs, workers) as direct:
        for _ in range(repeats):
            began = time.perf_counter()
            verdicts = _verdicts(reward, pairs)
            ours.append(time.perf_counter() - began)
            seconds, expected = direct()
            theirs.append(seconds)
    rates = len(pairs) / median(ours), len(pairs) / median(theirs)
    differing = sum(one != other for one, other in zip(verdicts, expected, strict=True))
    return [
        _row(f"agentrl boxed, {name}", per_second=rates[0], share=rates[0] / rates[1], differing=differing),
        _row(f"math-verify alone, {name}", per_second=rates[1], share=1.0, differing=0),
    ]


def _boxed(workers: int) -> Reward:
    return make_reward("boxed", workers=workers, deadline_s=_DEADLINE_S, memory_mib=_MEMORY_MIB)


def _verdicts(reward: Reward, pairs: Sequence[Pair]) -> list[bool]:
    """The verdicts of ``reward``, asked from many threads as rollouts ask."""
    with ThreadPoolExecutor(_IN_FLIGHT) as threads:
        return [outcome.value == 1.0 for outcome in threads.map(_asking(reward), pairs)]


def _asking(reward: Reward) -> Callable[[Pair], Score]:
    def ask(pair: Pair) -> Score:
        task = Task(id="one", prompt=(), truth={"answer": pair.truth})
        score = reward(Evidence(task, (Message("assistant", rf"\boxed{{{pair.answer}}}"),)))
        assert isinstance(score, Score)
        return score

    return ask


@contextmanager
def _direct_processes(
    pairs: Sequence[Pair], workers: int
) -> Iterator[Callable[[], tuple[float, list[bool]]]]:
    """Processes that have imported math-verify and hold their share; each call lets them verify all of it."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for place in range(workers):
        pipe, theirs = context.Pipe()
        process = context.Process(target=_verify_directly, args=(theirs, pairs[place::workers]), daemon=True)
        process.start()
        pipes.append(pipe)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()

    def run() -> tuple[float, list[bool]]:
        began = time.perf_counter()
        for pipe in pipes:
            pipe.send("go")
        shares = [pipe.recv() for pipe in pipes]
        seconds = time.perf_counter() - began
        return seconds, [shares[at % workers][at // workers] for at in range(len(pairs))]

    try:
        yield run
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _verify_directly(pipe: Any, pairs: Sequence[Pair]) -> None:
    """math-verify as fast as it goes: no time-outs, no text in front of the box, the first extraction."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every call without a time-out
    config = (LatexExtractionConfig(boxed_match_priority=0),)

    def read(text: str) -> list[Any]:
        boxed = rf"\boxed{{{text.strip().removesuffix('.')}}}"
        parsed: list[Any] = parse(boxed, config, extraction_mode="first_match", parsing_timeout=None)
        return parsed

    truth = functools.lru_cache(maxsize=4096)(read)
    verify(truth("1"), read("1"), timeout_seconds=None)
    pipe.send("ready")
    while True:
        pipe.recv()
        pipe.send([bool(verify(truth(p.truth), read(p.answer), timeout_seconds=None)) for p in pairs])


# -- hostile answers --


def hostile_rows(answers: Sequence[str], neighbours: Sequence[Pair], *, workers: int) -> list[Row]:
    """What each of ``answers`` cost, through the workers with ``neighbours`` and alone."""
    reward = _boxed(workers)
    expected = _verdicts(reward, neighbours)  # the workers are up, too
    ask, rows = _asking(reward), list[Row]()
    for answer in answers:
        with _Memory() as memory, ThreadPoolExecutor(_IN_FLIGHT) as threads:
            hostile = threads.submit(_timed, ask, Pair(_COMPUTED, answer))
            verdicts = list(threads.map(_is_right(ask), neighbours))
            seconds, score = hostile.result()
        assert score.value == 0.0
        differing = sum(one != other for one, other in zip(verdicts, expected, strict=True))
        name = rf"agentrl boxed, \boxed{{{answer}}}"
        rows.append(_row(name, seconds=seconds, added_mib=memory.added_mib, differing=differing))
        rows.append(_alone(answer))
    return rows


def _alone(answer: str) -> Row:
    """The same answer given to math-verify as its README says, in a process that is killed in the end."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_verify_once, args=(theirs, answer), daemon=True)
    process.start()
    theirs.close()
    pipe.recv()
    with _Memory(process.pid) as memory:
        began = time.perf_counter()
        pipe.send("go")
        pipe.poll(_PATIENCE_S)  # for its verdict, or its end
        seconds = time.perf_counter() - began
    process.kill()
    process.join()
    name = rf"math-verify alone, \boxed{{{answer}}}"
    return _row(name, seconds=seconds, added_mib=memory.added_mib, differing=None)


def _verify_once(pipe: Any, answer: str) -> None:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    verify(parse(r"\boxed{1}"), parse(r"\boxed{1}"))
    pipe.send("ready")
    pipe.recv()
    pipe.send(verify(parse(r"\boxed{1}"), parse(rf"\boxed{{{answer}}}")))


def _is_right(ask: Callable[[Pair], Score]) -> Callable[[Pair], bool]:
    return lambda pair: ask(pair).value == 1.0


def _timed(ask: Callable[[Pair], Score], pair: Pair) -> tuple[float, Score]:
    began = time.perf_counter()
    score = ask(pair)
    return time.perf_counter() - began, score


class _Memory:
    """How much more resident memory one process took while this is open: ``pid``, or the largest child."""

    def __init__(self, pid: int | None = None) -> None:
        self._pid = pid

    def __enter__(self) -> Self:
        self._idle_mib = self._largest_mib = self._now_mib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def added_mib(self) -> float:
        """The largest that was seen, less what it had at the start."""
        return self._largest_mib - self._idle_mib

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._largest_mib = max(self._largest_mib, self._now_mib())

    def _now_mib(self) -> float:
        pids = _children() if self._pid is None else [str(self._pid)]
        found = (re.search(r"VmRSS:\s+(\d+) kB", _read(Path("/proc", pid, "status"))) for pid in pids)
        return max((int(match.group(1)) / 1024 for match in found if match), default=0.0)


def _children() -> list[str]:
    listings = Path("/proc/self/task").glob("*/children")
    return [pid for listing in listings for pid in _read(listing).split()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return ""


def _row(
    name: str,
    *,
    per_second: float | None = None,
    share: float | None = None,
    seconds: float | None = None,
    added_mib: float | None = None,
    differing: int | None,
) -> Row:
    return {
        "name": name,
        "per_second": per_second,  # verifications
        "of_peer": share,  # per_second over the peer's
        "seconds": seconds,  # of the hostile answer
        "added_mib": added_mib,  # resident, to the process at rest
        "differing": differing,  # verdicts: from the peer's, or from those without the hostile answer
    }


if __name__ == "__main__":
    main()
