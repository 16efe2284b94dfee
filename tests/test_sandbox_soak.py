"""Many submissions, attacks among them: no false verdict, and nothing grows or stays; load changes nothing.

AGENTRL_SOAK is the number of submissions (10,000 by hand), AGENTRL_LOAD a share of the 600 of the load test.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from agentrl.attacks.bait import children, containers, count_descriptors, leftovers, processes_marked
from agentrl.attacks.catalogue import VERDICTS
from agentrl.attacks.targets import RIGHT, WRONG, problem_of
from agentrl.judge import CallTest, Judge, Problem
from agentrl.registry import make_sandbox
from agentrl.sandbox import Backend, Limits

_SUBMISSIONS = int(os.environ.get("AGENTRL_SOAK", "300"))
_LOAD = float(os.environ.get("AGENTRL_LOAD", "0.04"))
_WORKERS = 2
_LIMITS = Limits(cpu_s=1, wall_s=4, memory_mib=128, pids=32, disk_mib=16)
_GROWTH_MIB = 48  # of this process, after the first fifth

pytestmark = pytest.mark.slow

_backends = pytest.mark.parametrize(
    "name", ["zygote", "bubblewrap", pytest.param("docker", marks=pytest.mark.docker)]
)


@dataclass(frozen=True, slots=True)
class _Submission:
    source: str
    kind: str
    verdicts: tuple[str, ...]  # that it may have


_KNOWN = (
    _Submission(RIGHT["call"], "call", ("AC",)),
    _Submission(RIGHT["assert"], "assert", ("AC",)),
    _Submission(RIGHT["stdin"], "stdin", ("AC",)),
    _Submission(WRONG["call"], "call", ("WA",)),
    _Submission(WRONG["assert"], "assert", ("WA",)),
    _Submission(WRONG["stdin"], "stdin", ("WA",)),
    _Submission("def solve(number):\n    raise KeyError(number)\n", "call", ("RE",)),
    _Submission("def solve(number)\n", "call", ("CE",)),
    _Submission("def solve(number):\n    while True: pass\n", "call", ("TLE",)),
    _Submission("def solve(number):\n    return bytearray(b'x' * (300 << 20))[::4096]\n", "call", ("MLE",)),
)
_NEVER = ("WA", "RE", "TLE", "MLE", "OLE", "CE")


def _drawn(count: int) -> list[_Submission]:
    """Four known ones to each attack."""
    rng = random.Random(0)
    attacks = [
        _Submission(attack.source, kind, _NEVER)
        for attack in VERDICTS
        for kind in attack.kinds
        if kind != "files"
    ]
    return [rng.choice(attacks) if rng.random() < 0.2 else rng.choice(_KNOWN) for _ in range(count)]


def _available(name: str) -> Backend:
    backend = make_sandbox(name)
    if not backend.survey().available:
        required = os.environ.get("AGENTRL_REQUIRE", "").split(",")
        assert {"bubblewrap": "bwrap"}.get(name, name) not in required, backend.survey().note
        pytest.skip(backend.survey().note)
    return backend


def _resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True, slots=True)
class _Traces:
    mib: float
    descriptors: int
    processes: int
    paths: int
    containers: int

    @classmethod
    def now(cls) -> _Traces:
        word = f"-{os.getpid()}-"
        return cls(
            _resident_mib(), count_descriptors(), len(children()), len(leftovers(word)), len(containers())
        )


def _wrong(judge: Judge, submissions: Sequence[_Submission]) -> list[str]:
    """What had another verdict than it must have, judged by two workers."""
    problems = {kind: problem_of(kind) for kind in ("call", "assert", "stdin")}

    def judged(submission: _Submission) -> str:
        judgement = judge.judge(submission.source, problems[submission.kind])
        right = judgement.verdict in submission.verdicts and judgement.fault != "world"
        return "" if right else f"{judgement.verdict} {judgement.fault} for {submission.source[:200]}"

    with ThreadPoolExecutor(_WORKERS) as pool:
        return [wrong for wrong in pool.map(judged, submissions) if wrong]


@_backends
def test_many_submissions_have_their_verdicts_and_leave_nothing(name: str) -> None:
    backend = _available(name)
    before = _Traces.now()
    submissions = _drawn(_SUBMISSIONS // (10 if name == "docker" else 1))
    first = len(submissions) // 5
    judge = Judge(backend, limits=_LIMITS, at_once=_WORKERS)
    try:
        wrong = _wrong(judge, submissions[:first])
        early = _Traces.now()
        wrong += _wrong(judge, submissions[first:])
        late = _Traces.now()
    finally:
        backend.close()
    after = _settled(before)
    assert wrong == []
    assert late.mib - early.mib < _GROWTH_MIB
    assert late.descriptors - early.descriptors <= 8
    assert late.processes - early.processes <= 8
    assert late.paths - early.paths <= 8
    assert after.descriptors <= before.descriptors
    assert (after.processes, after.paths, after.containers) <= (
        before.processes,
        before.paths,
        before.containers,
    )


def _settled(before: _Traces) -> _Traces:
    """What is there once what must go has had a moment to."""
    until = time.monotonic() + 10
    while True:
        now = _Traces.now()
        more = (now.processes, now.paths, now.containers) > (
            before.processes,
            before.paths,
            before.containers,
        )
        if not more or time.monotonic() > until:
            return now
        time.sleep(0.1)


# A trainer that judges until it is killed; argv: backend, mark.
_TRAINER = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
os.environ["AGENTRL_MARK"] = sys.argv[2]
from agentrl.judge import CallTest, Judge, Problem
from agentrl.registry import make_sandbox
from agentrl.sandbox import Limits
problem = Problem(entry_point="f", tests=(CallTest(id="t", args=(1,), expected=2),))
leaves = f'''
import os, time
os.environ["AGENTRL_MARK"] = {sys.argv[2]!r}
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        os.execv("/bin/sh", ["sh", "-c", "sleep 60; : " + {sys.argv[2]!r}])
def f(x):
    time.sleep(0.5)
    return 2
'''
backend = make_sandbox(sys.argv[1])
judge = Judge(backend, limits=Limits(cpu_s=5, wall_s=30, memory_mib=128, pids=32, disk_mib=16), at_once=2)
def work(_):
    verdict = judge.judge(leaves, problem).verdict
    print(verdict, flush=True)
with ThreadPoolExecutor(2) as pool:
    list(pool.map(work, range(10_000)))
"""


@_backends
def test_a_trainer_killed_in_the_middle_is_swept_by_the_next_start(name: str) -> None:
    backend = _available(name)
    mark = f"agentrl-mark-{random.SystemRandom().getrandbits(64):016x}"
    trainer = subprocess.Popen(
        [sys.executable, "-c", _TRAINER, name, mark],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert trainer.stdout is not None
    assert [trainer.stdout.readline() for _ in range(3)] == [b"AC\n"] * 3
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    until = time.monotonic() + 30
    while True:
        backend.sweep()
        left = [
            *processes_marked(mark),
            *(path for path in leftovers(f"-{trainer.pid}-") if "agentrl" in path),
        ]
        if not left or time.monotonic() > until:
            break
        time.sleep(0.2)
    backend.close()
    assert left == []


@contextmanager
def _overcommitted() -> Iterator[None]:
    """Four busy processes for each core."""
    code = "while True: pass"
    burners = [
        subprocess.Popen([sys.executable, "-c", code]) for _ in range(4 * len(os.sched_getaffinity(0)))
    ]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


@contextmanager
def _idle() -> Iterator[None]:
    yield


@pytest.mark.parametrize("load", [_idle, _overcommitted])
@pytest.mark.parametrize("name", ["zygote", "bubblewrap"])
def test_load_changes_no_verdict(name: str, load: object) -> None:
    """CPU time is what counts: 60 % of the limit always passes, 200 % never does."""
    backend = _available(name)
    limits = Limits(cpu_s=1, wall_s=120, memory_mib=128, pids=32, disk_mib=16)
    problem = Problem(entry_point="solve", tests=(CallTest(id="t", args=(1,), expected=2),))
    source = (
        "import time\ndef solve(number):\n    until = time.process_time() + {seconds}\n"
        "    while time.process_time() < until: pass\n    return 2\n# {number}\n"
    )
    few, many = (max(round(count * _LOAD), 2) for count in (100, 500))
    quick = [source.format(seconds=0.6, number=number) for number in range(many)]
    slow = [source.format(seconds=2.0, number=number) for number in range(few)]
    judge = Judge(backend, limits=limits, at_once=4)
    with load():  # type: ignore[operator]
        verdicts = [judgement.verdict for judgement in judge.judge_all([*quick, *slow], problem)]
    backend.close()
    assert verdicts == ["AC"] * many + ["TLE"] * few
