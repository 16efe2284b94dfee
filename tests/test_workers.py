import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentrl.errors import WorkerLost
from agentrl.faults import Ledger
from agentrl.types import Fault
from agentrl.workers import Done, Limit, Probe, WorkerBug, WorkerPool, shared_pool

JOBS = """
import os, signal, sys, time

kept = []

def work(job):
    action, value = job
    if action == "sleep":
        time.sleep(value)
    elif action == "spin":
        return 10 ** 10 ** 10
    elif action == "allocate":
        return len(bytearray(value << 20))
    elif action == "keep":
        kept.append(bytearray(value << 20))
    elif action == "fail":
        return 1 // value
    elif action == "die":
        os.kill(os.getpid(), value)
    elif action == "print":
        print("noise", flush=True)
        os.write(1, b"noise")
        print("noise", file=sys.stderr)
    elif action == "echo":
        return value
    elif action == "environment":
        return dict(os.environ)
    elif action == "return":
        return {"set": {1}, "huge": "x" * (17 << 20)}[value]
    elif action == "break_the_world":
        open(value, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "probe":
        return "broken" if os.path.exists(value) else "fine"
    return os.getpid()
"""
DEADLINE_S = 1.0


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "jobs.py").write_text(JOBS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def make_pool(jobs: Path, size: int = 1, deadline_s: float = DEADLINE_S) -> WorkerPool:
    probe = Probe(["probe", str(jobs / "broken")], "fine")
    return WorkerPool("jobs:work", size=size, deadline_s=deadline_s, memory_mib=64, probe=probe)


@pytest.fixture(scope="module")  # it outlives whatever is done to its workers
def pool(jobs: Path) -> Iterator[WorkerPool]:
    with make_pool(jobs) as made:
        yield made


def pid(pool: WorkerPool) -> int:
    outcome = pool.call(["pid", None])
    assert isinstance(outcome, Done)
    return int(outcome.value)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_worker_serves_request_after_request(pool: WorkerPool) -> None:
    first = pid(pool)
    assert first != os.getpid()
    assert pool.call(["print", None]) == Done(first)  # stray output does not reach the replies
    assert pool.call(["allocate", 1]) == Done(1 << 20)
    assert pid(pool) == first


@pytest.mark.parametrize(
    ("job", "kind"),
    [
        (["sleep", 60], "deadline"),
        (["spin", None], "deadline"),  # one bytecode that holds the interpreter: no signal handler ever runs
        (["allocate", 512], "memory"),
        (["die", signal.SIGSEGV], "crash"),
    ],
)
def test_a_request_over_a_limit_ends_there_and_its_worker_is_replaced(
    pool: WorkerPool, job: Any, kind: str
) -> None:
    first = pid(pool)
    assert pool.call(job) == Limit(kind)  # type: ignore[arg-type]
    assert not is_running(first)
    assert pid(pool) != first


def test_a_request_whose_worker_is_killed_from_outside_is_answered_by_another_one(pool: WorkerPool) -> None:
    first = pid(pool)
    os.kill(first, signal.SIGSTOP)  # so that it dies with the request taken up and unanswered
    threading.Timer(0.1, os.kill, (first, signal.SIGKILL)).start()
    with (ledger := Ledger()).opened():
        outcome = pool.call(["allocate", 1])
    assert outcome == Done(1 << 20)
    (fault,) = ledger.faults
    assert fault.boundary == "worker"
    assert "killed from outside" in fault.message
    assert not is_running(first)


def test_a_worker_killed_while_idle_costs_no_answer(pool: WorkerPool) -> None:
    os.kill(pid(pool), signal.SIGKILL)
    assert pool.call(["allocate", 1]) == Done(1 << 20)


def test_a_request_that_kills_every_worker_is_to_blame_itself(pool: WorkerPool) -> None:
    with (ledger := Ledger()).opened():
        assert pool.call(["die", signal.SIGKILL]) == Limit("crash")
    assert ledger.faults == []


def test_a_hostile_request_leaves_its_neighbours_alone(jobs: Path) -> None:
    with make_pool(jobs, size=2) as pool, ThreadPoolExecutor(40) as threads:
        pid(pool)
        hostile = threads.submit(pool.call, ["spin", None])
        others = [threads.submit(pool.call, ["allocate", 1]) for _ in range(200)]
        assert {other.result().value for other in others} == {1 << 20}  # type: ignore[union-attr]
        assert hostile.result() == Limit("deadline")


def test_waiting_for_a_free_worker_does_not_count(pool: WorkerPool) -> None:
    with ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(pool.call, [["sleep", 0.4 * DEADLINE_S]] * 4))
    assert len({outcome.value for outcome in outcomes}) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (["fail", 0], "ZeroDivisionError"),
        (["return", "set"], "not JSON serializable"),
        (["return", "huge"], "bytes"),
    ],
)
def test_a_bug_of_the_function_reaches_the_caller(pool: WorkerPool, job: Any, said: str) -> None:
    with pytest.raises(WorkerBug, match=said) as caught:
        pool.call(job)
    assert said == "bytes" or "jobs.py" in str(caught.value) or "worker_process" in str(caught.value)
    assert pid(pool) > 0


def test_a_payload_that_json_can_not_carry_costs_no_worker(pool: WorkerPool) -> None:
    first = pid(pool)
    with pytest.raises(TypeError):
        pool.call({1, 2})
    assert pid(pool) == first


def test_a_failure_is_the_worlds_where_the_probe_fails_too(pool: WorkerPool, jobs: Path) -> None:
    pid(pool)
    with pytest.raises(WorkerLost, match="probe"):
        pool.call(["break_the_world", str(jobs / "broken")])
    with pytest.raises(WorkerLost, match="'fine'"):
        pid(pool)
    (jobs / "broken").unlink()
    assert pid(pool) > 0


def test_a_function_that_can_not_be_imported_is_a_bug_with_its_traceback(jobs: Path) -> None:
    with (
        WorkerPool("nowhere:work", size=1, deadline_s=1, memory_mib=64, probe=Probe(1, 1)) as pool,
        pytest.raises(WorkerBug, match="No module named 'nowhere'"),
    ):
        pool.call(1)


def test_a_worker_that_can_not_start_is_the_worlds_fault(jobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_pool(jobs) as pool:
        monkeypatch.setattr(sys, "executable", str(jobs / "no-python"))
        with pytest.raises(WorkerLost, match="no-python"):
            pool.call(["pid", None])


def test_a_worker_that_has_grown_is_replaced_before_the_next_request(pool: WorkerPool) -> None:
    first = pool.call(["keep", 40])
    assert isinstance(first, Done)
    assert pid(pool) != first.value


def test_a_worker_sees_nothing_of_the_users_environment(jobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    with make_pool(jobs) as pool:
        seen = pool.call(["environment", None])
    assert isinstance(seen, Done)
    assert "SECRET_TOKEN" not in seen.value
    assert "HOME" not in seen.value


def test_a_closed_pool_has_no_workers_and_takes_no_calls(jobs: Path) -> None:
    pool = make_pool(jobs)
    idle = pid(pool)
    with ThreadPoolExecutor(1) as threads:
        busy = threads.submit(pool.call, ["sleep", 60])
        time.sleep(0.1)
        pool.close()
        with pytest.raises(WorkerLost, match="closed"):
            busy.result()
    assert not is_running(idle)
    with pytest.raises(WorkerLost, match="closed"):
        pool.call(["pid", None])
    pool.close()


# -- requests in one worker's pipe --

Asked = tuple[Done | Limit | WorkerBug | WorkerLost, list[Fault]]


def ask(pool: WorkerPool, job: Any) -> Asked:
    """How a call ended, and the faults that it met."""
    with (ledger := Ledger()).opened():
        try:
            return pool.call(job), ledger.faults
        except (WorkerBug, WorkerLost) as error:
            return error, ledger.faults


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.001)


@contextmanager
def in_line(pool: WorkerPool, *queue: Any) -> Iterator[tuple[int, list[Future[Asked]]]]:
    """The only worker's pid and the calls of ``queue``, all in its pipe; it stands still in the block."""
    for _ in range(40):  # short ones, after which others are let into the pipe
        worker = pid(pool)
    os.kill(worker, signal.SIGSTOP)
    with ThreadPoolExecutor(len(queue)) as threads:
        calls = []
        for behind, job in enumerate(queue):
            calls.append(threads.submit(ask, pool, job))
            wait_until(lambda: [len(line.behind) for line in pool._busy if line.is_open] == [behind])  # noqa: B023
        try:
            yield worker, calls
        finally:
            if is_running(worker):
                os.kill(worker, signal.SIGCONT)


@pytest.mark.parametrize(
    ("job", "end"),
    [
        (["spin", None], Limit("deadline")),
        (["allocate", 512], Limit("memory")),
        (["die", signal.SIGSEGV], Limit("crash")),
        (["fail", 0], WorkerBug),
        (["return", "huge"], WorkerBug),
        (["keep", 40], Done),  # a worn worker
    ],
)
def test_those_behind_a_request_that_costs_the_worker_are_answered_by_another_unblamed(
    jobs: Path, job: Any, end: Any
) -> None:
    with make_pool(jobs, deadline_s=3.0) as pool:
        with in_line(pool, job, *[["pid", None]] * 3) as (worker, (first, *others)):
            pass
        outcome, faults = first.result()
        assert outcome == end or type(outcome) is end
        assert faults == []
        assert not is_running(worker)
        ends = [other.result() for other in others]
        assert ends == [ends[0]] * 3
        assert isinstance(ends[0][0], Done)
        assert ends[0][0].value != worker
        assert ends[0][1] == []


def test_a_worker_killed_from_outside_is_a_fault_of_the_request_it_worked_on_alone(jobs: Path) -> None:
    with make_pool(jobs, deadline_s=3.0) as pool:
        with in_line(pool, *[["allocate", 1]] * 4) as (worker, calls):
            os.kill(worker, signal.SIGKILL)
        outcomes, faults = zip(*[call.result() for call in calls], strict=True)
        assert set(outcomes) == {Done(1 << 20)}
        assert [[fault.boundary for fault in met] for met in faults] == [["worker"], [], [], []]


def test_several_hostile_requests_in_one_pipe_each_pay_for_themselves_only(jobs: Path) -> None:
    queue = [["spin", None], ["pid", None], ["die", signal.SIGSEGV], ["spin", None], ["pid", None]]
    with make_pool(jobs) as pool:
        with in_line(pool, *queue) as (_, calls):
            pass
        outcomes = [call.result()[0] for call in calls]
        expected = [Limit("deadline"), Done, Limit("crash"), Limit("deadline"), Done]
        assert [type(o) if isinstance(o, Done) else o for o in outcomes] == expected


def test_a_deadline_counts_from_when_a_worker_takes_the_request_up(jobs: Path) -> None:
    with make_pool(jobs, deadline_s=2.0) as pool:
        with in_line(pool, *[["sleep", 0.8]] * 3, ["spin", None]) as (worker, calls):
            began = time.monotonic()
        *sleepers, spinner = [call.result() for call in calls]
        assert sleepers == [(Done(worker), [])] * 3  # the last one was done 2.4 s after it was sent
        assert spinner == (Limit("deadline"), [])
        assert time.monotonic() - began > 3 * 0.8 + 2.0


def test_what_is_too_long_for_the_pipe_is_answered_in_its_turn(jobs: Path) -> None:
    with make_pool(jobs, deadline_s=3.0) as pool, ThreadPoolExecutor(4) as threads:
        with in_line(pool, ["pid", None], ["pid", None]) as (worker, _):
            more = [threads.submit(ask, pool, ["pid", "x" * length]) for length in (5000, 500_000, 10, 5000)]
        assert [call.result() for call in more] == [(Done(worker), [])] * 4


def test_long_requests_do_not_stand_behind_one_another(jobs: Path) -> None:
    with make_pool(jobs, size=2) as pool, ThreadPoolExecutor(8) as threads:
        list(threads.map(pool.call, [["sleep", 0.05]] * 16))
        hangs = threads.submit(pool.call, ["sleep", 0.9 * DEADLINE_S])
        others = [threads.submit(pool.call, ["sleep", 0.01]) for _ in range(7)]
        for other in others:
            assert isinstance(other.result(), Done)
        assert not hangs.done()


def test_closing_ends_the_calls_that_stand_in_line_too(jobs: Path) -> None:
    pool = make_pool(jobs, deadline_s=5.0)
    with in_line(pool, *[["pid", None]] * 3) as (worker, calls), ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(ask, pool, ["pid", "x" * 5000])
        pool.close()
        for call in (*calls, waiting):
            error, faults = call.result()
            assert isinstance(error, WorkerLost)
            assert "closed" in str(error)
            assert faults == []
    assert not is_running(worker)


def test_many_threads_get_each_their_own_answer(jobs: Path) -> None:
    with make_pool(jobs, size=2) as pool, ThreadPoolExecutor(40) as threads:
        outcomes = threads.map(pool.call, [["echo", at] for at in range(2000)])
        assert [outcome.value for outcome in outcomes] == list(range(2000))  # type: ignore[union-attr]


@pytest.mark.parametrize("limits", [(0, 1.0, 64), (1, 0.0, 64), (1, float("inf"), 64), (1, 1.0, 0)])
def test_limits_that_make_no_sense_are_refused(limits: tuple[int, float, int]) -> None:
    size, deadline_s, memory_mib = limits
    with pytest.raises(ValueError, match="above 0"):
        WorkerPool("jobs:work", size=size, deadline_s=deadline_s, memory_mib=memory_mib, probe=Probe(1, 1))


def run_script(jobs: Path, body: str) -> subprocess.CompletedProcess[str]:
    script = """
        import os, signal, threading, time
        from agentrl.workers import Probe, shared_pool
        pool = lambda: shared_pool(
            "jobs:work", size=1, deadline_s=5.0, memory_mib=64, probe=Probe(["probe", ""], "fine")
        )
        pid = lambda: pool().call(["pid", None]).value
    """
    source = textwrap.dedent(script) + textwrap.dedent(body)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(jobs), *sys.path])}
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", source]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "end",
    [
        "",  # leaving the program
        "os.kill(os.getpid(), signal.SIGKILL)",  # idle when the parent dies
        # busy when the parent dies, where Python can't look at the pipe
        "threading.Thread(target=pool().call, args=(['spin', None],), daemon=True).start(); "
        "time.sleep(0.1); os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_workers_die_with_their_parent(jobs: Path, end: str) -> None:
    worker = int(run_script(jobs, "print(pid(), flush=True)\n" + end).stdout)
    until = time.monotonic() + 30
    while is_running(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(worker)


def test_a_forked_child_has_workers_of_its_own(jobs: Path) -> None:
    body = """
        mine = pid()
        child = os.fork()
        if child == 0:
            os._exit(pid() == mine)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), pid() == mine)
    """
    finished = run_script(jobs, body)
    assert (finished.stdout.split(), finished.stderr) == (["0", "True"], "")


def test_an_interrupted_caller_leaves_its_answer_to_nobody(jobs: Path) -> None:
    body = """
        for _ in range(40):
            worker = pid()

        def interrupt(job):
            "SIGINT while the main thread waits, behind a request that the worker does not answer yet."
            global worker
            worker = pid()
            os.kill(worker, signal.SIGSTOP)
            answers = []
            ask = lambda value: answers.append(pool().call(["echo", value]).value)
            threads = [threading.Thread(target=ask, args=(1,)), threading.Thread(target=ask, args=(2,))]
            threads[0].start()
            time.sleep(0.1)
            threading.Timer(0.1, threads[1].start).start()
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                pool().call(job)
            except KeyboardInterrupt:
                os.kill(worker, signal.SIGCONT)
            for thread in threads:
                thread.join()
            return answers

        print(sorted(interrupt(["echo", 3])), pool().call(["echo", 4]).value)
        print(sorted(interrupt(["echo", "x" * 5000])), pool().call(["echo", 5]).value)
    """
    finished = run_script(jobs, body)
    assert (finished.stdout.splitlines(), finished.stderr) == (["[1, 2] 4", "[1, 2] 5"], "")


def test_one_pool_serves_all_that_ask_for_the_same_configuration(jobs: Path) -> None:
    def shared(size: int) -> WorkerPool:
        return shared_pool("jobs:work", size=size, deadline_s=1.0, memory_mib=64, probe=Probe(1, 1))

    assert shared(1) is shared(1)
    assert shared(1) is not shared(2)
