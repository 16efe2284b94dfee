"""A pool of killable worker processes, for work on a policy's output that may never end or eat all memory.

A worker imports one function, proves itself on a probe with a known answer, and then serves one request at a
time: plain JSON in, plain JSON out, over pipes, nothing pickled. It is used again until it fails. A request
has a deadline in wall-clock seconds, counted from when a worker takes it up (waiting for a free worker is not
counted), and a memory cap above what an idle worker has.

Three ends of a request: ``Done``; ``Limit``, where it went over a limit or killed its worker while another
worker still answers the probe, so the request is to blame; WorkerLost, where the probe fails too and the
world is to blame. A request whose worker died is put to a fresh one once: what kills from outside has gone by
then, and is counted as a fault that was healed; what the request does itself, it does again. What the
function raises is a bug and reaches the caller as WorkerBug with the worker's traceback.

Covered: wall clock, address space (on Linux), a minimal environment, death with the parent, replacement of
what failed. Not covered: isolation. A worker runs our code on the policy's text, never the policy's code: for
that there are sandboxes. POSIX only.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Literal, Self

from agentrl.errors import AgentRLError, WorkerLost
from agentrl.faults import healed
from agentrl.worker_process import HEADER_BYTES, frame

__all__ = ["Done", "Limit", "Probe", "WorkerBug", "WorkerPool", "shared_pool"]

_START_S = (
    120.0  # to import and answer the probe: one second on an idle machine, many where all cores are busy
)
_MAX_REPLY_BYTES = 16 << 20
_BOOT = (
    "import json, sys; start = json.loads(sys.argv[1]); sys.path[:] = start.pop('path'); "
    "from agentrl.worker_process import serve; serve(**start)"
)


class WorkerBug(AgentRLError):
    """The worker's function raised: a bug, with the worker's traceback."""


@dataclass(frozen=True, slots=True)
class Done:
    """What the function returned."""

    value: Any  # plain JSON data


@dataclass(frozen=True, slots=True)
class Limit:
    """The request went over a limit; its worker is gone."""

    kind: Literal["deadline", "memory", "crash"]  # crash: the worker died otherwise, of a stack overflow say


@dataclass(frozen=True, slots=True)
class Probe:
    """A request with a known answer: while a worker gives it, the world is in order."""

    payload: Any
    answer: Any


class WorkerPool:
    """Up to ``size`` workers that run ``target``, a ``"module:function"`` of one JSON value; started lazily.

    Any number of threads may call. ``deadline_s`` is wall clock per request, ``memory_mib`` what a request
    may add to an idle worker.
    """

    def __init__(self, target: str, *, size: int, deadline_s: float, memory_mib: int, probe: Probe) -> None:
        if size < 1 or memory_mib < 1 or not 0 < deadline_s < math.inf:
            raise ValueError(
                f"a worker pool can't have size={size}, deadline_s={deadline_s}, memory_mib={memory_mib}: "
                "each is above 0 and finite"
            )
        self._target = target
        self._deadline_s = deadline_s
        self._memory_mib = memory_mib
        self._probe = probe
        self._free = threading.Semaphore(size)  # every holder has a deadline, so nobody waits for ever
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._closed = False

    def call(self, payload: Any) -> Done | Limit:
        """Run the function on ``payload``; blocks until a worker is free and has answered or failed.

        Raises WorkerLost (the world's fault), WorkerBug, and TypeError for a payload that JSON can't carry.
        """
        request = frame({"payload": payload})
        with self._free:
            outcome = self._ask(request)
            if outcome == Limit("crash"):
                outcome = self._ask_again(request)
            if isinstance(outcome, Limit):
                self._prove(outcome)
            return outcome

    def close(self) -> None:
        """Kill every worker; the calls that these were busy with raise WorkerLost. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()  # whoever holds it lets go of it
        for worker in idle:
            worker.let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: bytes, *, fresh: bool = False) -> Done | Limit:
        worker = self._take(fresh=fresh)
        fit = False
        try:
            reply = worker.ask(request, deadline_s=self._deadline_s)
            fit = "value" in reply and not reply["worn"]
        finally:  # also where Ctrl-C came between question and answer: nobody else may get this answer
            self._give_back(worker, fit=fit)
        if "bug" in reply:
            raise WorkerBug(f"{self._target} raised in its worker process:\n{reply['bug']}")
        return Limit(reply["limit"]) if "limit" in reply else Done(reply["value"])

    def _ask_again(self, request: bytes) -> Done | Limit:
        """Put ``request``, whose worker died, to a new one: an idle one may be dead as well."""
        outcome = self._ask(request, fresh=True)
        if outcome != Limit("crash"):
            healed(
                WorkerLost(f"a worker of {self._target} was killed from outside; another one did its work")
            )
        return outcome

    def _prove(self, outcome: Limit) -> None:
        """Raise WorkerLost unless a known-good request succeeds, in an idle worker or else in a fresh one."""
        answer = self._ask(frame({"payload": self._probe.payload}))
        if answer != Done(self._probe.answer):
            raise WorkerLost(
                f"a worker of {self._target} failed ({outcome.kind}), then the good probe gave {answer}: "
                "the machine is overloaded or the installation broken; use fewer workers or a longer deadline"
            )

    def _take(self, *, fresh: bool) -> _Worker:
        with self._lock:
            worker = self._idle.pop() if self._idle and not fresh else None
        worker = worker or _start(self._options(), self._probe)
        with self._lock:
            self._busy.add(worker)
            closed = self._closed
        if closed:
            self._give_back(worker, fit=False)
            raise WorkerLost(f"the pool of {self._target} is closed: make a new one")
        return worker

    def _give_back(self, worker: _Worker, *, fit: bool) -> None:
        with self._lock:
            self._busy.discard(worker)
            fit = fit and not self._closed
            if fit:
                self._idle.append(worker)
        if not fit:
            worker.let_go()

    def _options(self) -> dict[str, Any]:
        return {
            "path": [os.path.abspath(entry) for entry in sys.path],  # "" means here, for us as for the worker
            "target": self._target,
            "probe": self._probe.payload,
            "start_s": _START_S,
            "deadline_s": self._deadline_s,
            "memory_mib": self._memory_mib,
        }


class _Late(Exception):
    """The deadline passed."""


class _Died(Exception):
    """The worker closed its pipe."""


def _start(options: dict[str, Any], probe: Probe) -> _Worker:
    """A worker that has answered ``probe``. Raises WorkerLost and WorkerBug."""
    target = options["target"]
    with tempfile.TemporaryFile() as log:
        try:
            worker = _Worker(options, log)
        except OSError as error:
            raise WorkerLost(
                f"can't start a worker of {target}: {error}; free memory or processes"
            ) from error
        answer = None
        try:
            answer = worker.read_reply(time.monotonic() + _START_S)
        except (_Late, _Died) as error:
            how = "did not start in time" if isinstance(error, _Late) else "died while starting"
            log.seek(0)
            said = log.read().decode(errors="replace").strip()[-2000:] or "it said nothing"
            raise WorkerLost(f"a worker of {target} {how}: {said}") from None
        finally:  # also for Ctrl-C
            if answer != {"value": probe.answer}:
                worker.let_go()
    if "bug" in answer:
        raise WorkerBug(f"{target} raised while starting in its worker process:\n{answer['bug']}")
    if answer != {"value": probe.answer}:
        raise WorkerLost(f"a worker of {target} answered its probe with {answer}, not {probe.answer!r}")
    return worker


class _Worker:
    """One process and its two pipes. Only its holder may use it; ``kill`` is for anyone."""

    def __init__(self, options: dict[str, Any], log: IO[bytes]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", "-c", _BOOT, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            bufsize=0,
            env=_minimal_environment(),
            start_new_session=True,  # Ctrl-C is for the parent
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)

    def ask(self, request: bytes, *, deadline_s: float) -> dict[str, Any]:
        """The reply to one framed request; ``{"limit": kind}`` where there is none."""
        until = time.monotonic() + deadline_s
        try:
            self._write(request, until)
            return self.read_reply(until)
        except _Late:
            return {"limit": "deadline"}
        except _Died:
            return {"limit": "crash"}

    def read_reply(self, until: float) -> dict[str, Any]:
        """The next reply. Raises _Late after ``until`` (monotonic), _Died, and WorkerBug for a huge one."""
        size = int.from_bytes(self._read(HEADER_BYTES, until), "big")
        if size > _MAX_REPLY_BYTES:
            raise WorkerBug(f"a worker returned {size} bytes of JSON; {_MAX_REPLY_BYTES} are allowed")
        reply: dict[str, Any] = json.loads(self._read(size, until))
        return reply

    def kill(self) -> None:
        """End the process."""
        self._process.kill()

    def let_go(self) -> None:
        """End the process and close its pipes; idempotent."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: dead, only not reaped
            self._process.wait(timeout=5)

    def _write(self, data: bytes, until: float) -> None:
        view = memoryview(data)
        while view:
            _wait(self._stdin, select.POLLOUT, until)
            try:
                view = view[os.write(self._stdin, view) :]
            except BrokenPipeError:
                raise _Died from None

    def _read(self, size: int, until: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            _wait(self._stdout, select.POLLIN, until)
            chunk = os.read(self._stdout, size - len(data))
            if not chunk:
                raise _Died
            data += chunk
        return bytes(data)


def _wait(descriptor: int, event: int, until: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(until - time.monotonic(), 0) * 1000):
        raise _Late


def _minimal_environment() -> dict[str, str]:
    """What Python may need to start, and one thread for each numerical library: nothing of the user's."""
    loader = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ}
    return {**loader, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def shared_pool(target: str, *, size: int, deadline_s: float, memory_mib: int, probe: Probe) -> WorkerPool:
    """This process's one pool of that configuration; closed at exit. A forked child has its own."""
    key = json.dumps([target, size, deadline_s, memory_mib, probe.payload, probe.answer], sort_keys=True)
    with _shared_lock:
        if key not in _shared:
            _shared[key] = WorkerPool(
                target, size=size, deadline_s=deadline_s, memory_mib=memory_mib, probe=probe
            )
        return _shared[key]


def _close_shared() -> None:
    for pool in _shared.values():
        pool.close()


def _forget_shared() -> None:
    """In a forked child: two processes on one worker's pipes would get each other's answers."""
    global _shared, _shared_lock
    _parents.append(_shared)  # kept, neither closed nor dropped: the workers are the parent's
    _shared, _shared_lock = {}, threading.Lock()


_shared: dict[str, WorkerPool] = {}
_shared_lock = threading.Lock()
_parents: list[dict[str, WorkerPool]] = []
atexit.register(_close_shared)
os.register_at_fork(after_in_child=_forget_shared)
