"""A pool of killable worker processes, for work on a policy's output that may never end or eat all memory.

A worker imports one function, proves itself on a probe with a known answer, and then serves one request at a
time: plain JSON in, plain JSON out, over pipes, nothing pickled. It is used again until it fails. A request
has a deadline in wall-clock seconds, counted from when a worker takes it up (waiting for a free worker is not
counted), and a memory cap above what an idle worker has.

Short requests stand in line in a worker's pipe, so that it need not wait for the next one. The caller whose
request is at the front holds the worker until it is answered, then hands it on to the one behind: what goes
wrong is therefore its own. Who stood behind a request that cost the worker is put to another one, first of
all, unblamed.

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
import math
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from agentrl.errors import WorkerLost
from agentrl.faults import healed
from agentrl.worker_handle import Died, Late, Probe, Worker, WorkerBug, start_worker
from agentrl.worker_process import frame

__all__ = ["Done", "Limit", "Probe", "WorkerBug", "WorkerPool", "shared_pool"]

# Work that may stand in a pipe behind one request. A busy parent brings the next one late: switching between
# its threads takes Python up to 5 ms, once or twice. Requests that take longer never stand behind another.
_AHEAD_S = 0.01
_MOST_AHEAD = 15  # requests, be they as short as they may: one that hangs delays no more


@dataclass(frozen=True, slots=True)
class Done:
    """What the function returned."""

    value: Any  # plain JSON data


@dataclass(frozen=True, slots=True)
class Limit:
    """The request went over a limit; its worker is gone."""

    kind: Literal["deadline", "memory", "crash"]  # crash: the worker died otherwise, of a stack overflow say


@dataclass(slots=True, eq=False)
class _Line:
    """A worker, and whose requests stand in its pipe behind the one that it works on."""

    worker: Worker
    behind: deque[_Request] = field(default_factory=deque)
    since: float = field(default_factory=time.monotonic)  # when it took up the request at the front
    is_open: bool = False  # to others
    is_spoilt: bool = False  # an answer will come that nobody waits for any more


@dataclass(slots=True, eq=False)
class _Request:
    """One framed request. Its caller waits for one of the pool's places, each good for one worker."""

    data: bytes
    turn: threading.Lock = field(default_factory=threading.Lock)  # taken until the place is there
    line: _Line | None = None  # what the caller holds; comes with the place where ``data`` is at its front

    def __post_init__(self) -> None:
        self.turn.acquire()


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
        self._lock = threading.Lock()  # for all below
        self._free = size  # places; every holder of one has a deadline, so nobody waits for ever
        self._waiting: deque[_Request] = deque()  # in order; empty while a place is free
        self._idle: list[_Line] = []
        self._busy: set[_Line] = set()
        self._typical_s = _AHEAD_S  # of a request, a running mean
        self._closed = False

    def call(self, payload: Any) -> Done | Limit:
        """Run the function on ``payload``; blocks until a worker is free and has answered or failed.

        Raises WorkerLost (the world's fault), WorkerBug, and TypeError for a payload that JSON can't carry.
        """
        request = _Request(frame({"payload": payload}))
        self._wait_for_place(request)
        try:
            outcome = self._ask(request, request.data)
            if outcome == Limit("crash"):
                outcome = self._ask_again(request)
            if isinstance(outcome, Limit):
                self._prove(request, outcome)
            return outcome
        finally:
            self._hand_on(request)

    def close(self) -> None:
        """Kill every worker; the calls that these were busy with raise WorkerLost. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for line in self._busy:
                line.worker.kill()  # whoever holds it lets go of it
        for line in idle:
            line.worker.let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- with a place --

    def _ask(self, request: _Request, data: bytes, *, fresh: bool = False) -> Done | Limit:
        """What becomes of ``data``: in the line that came with the place, else in an idle or a new one."""
        sent = request.line is not None
        line = request.line = request.line or self._take(fresh=fresh)
        fit = False
        try:
            reply = self._reply(line, None if sent else data, alone=fresh)
            self._learn(reply.get("seconds", self._deadline_s))
            fit = "value" in reply and not reply["worn"]
        finally:  # also where Ctrl-C came between question and answer: nobody else may get this answer
            if not fit:
                request.line = None
                self._discard(line)
        if "bug" in reply:
            raise WorkerBug(f"{self._target} raised in its worker process:\n{reply['bug']}")
        return Limit(reply["limit"]) if "limit" in reply else Done(reply["value"])

    def _reply(self, line: _Line, data: bytes | None, *, alone: bool) -> dict[str, Any]:
        """The reply to ``data``, or to what ``line`` has at its front; ``{"limit": kind}`` where none is."""
        try:
            if data is not None:
                line.since = time.monotonic()
                line.worker.send(data, line.since + self._deadline_s)
                with self._lock:
                    line.is_open = not alone
                    self._fill(line)
            return line.worker.receive(line.since + self._deadline_s)
        except Late:
            return {"limit": "deadline"}
        except Died:
            return {"limit": "crash"}

    def _learn(self, seconds: float) -> None:
        with self._lock:
            self._typical_s += (seconds - self._typical_s) / 8

    def _ask_again(self, request: _Request) -> Done | Limit:
        """Put ``request``, whose worker died, to a new one: an idle one may be dead as well."""
        outcome = self._ask(request, request.data, fresh=True)
        if outcome != Limit("crash"):
            healed(
                WorkerLost(f"a worker of {self._target} was killed from outside; another one did its work")
            )
        return outcome

    def _prove(self, request: _Request, outcome: Limit) -> None:
        """Raise WorkerLost unless a known-good request succeeds, in an idle worker or else in a fresh one."""
        answer = self._ask(request, frame({"payload": self._probe.payload}))
        if answer != Done(self._probe.answer):
            raise WorkerLost(
                f"a worker of {self._target} failed ({outcome.kind}), then the good probe gave {answer}: "
                "the machine is overloaded or the installation broken; use fewer workers or a longer deadline"
            )

    def _take(self, *, fresh: bool) -> _Line:
        with self._lock:
            line = self._idle.pop() if self._idle and not fresh else None
            closed = self._closed
        if line is None and not closed:
            line = _Line(
                start_worker(
                    self._target, self._probe, deadline_s=self._deadline_s, memory_mib=self._memory_mib
                )
            )
        with self._lock:
            if line is not None and not self._closed:
                self._busy.add(line)
                return line
        if line is not None:
            line.worker.let_go()
        raise WorkerLost(f"the pool of {self._target} is closed: make a new one")

    def _discard(self, line: _Line) -> None:
        with self._lock:
            self._forget(line)
        line.worker.let_go()

    # -- places --

    def _wait_for_place(self, request: _Request) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            if self._waiting or not self._join_any(request):
                self._waiting.append(request)
        try:
            request.turn.acquire()
        except BaseException:  # Ctrl-C
            self._withdraw(request)
            raise

    def _hand_on(self, request: _Request) -> None:
        """Give the place of ``request``, and the worker that it leaves behind, to whoever is next."""
        line = request.line
        with self._lock:
            over = line if line is not None and self._is_over(line) else None
            if over is not None:
                self._forget(over)
            elif line is not None and line.behind:
                self._serve_next(line)
                return
            elif line is not None:
                self._rest(line)
            self._free += 1
            self._give_places()
        if over is not None:
            over.worker.let_go()

    def _withdraw(self, request: _Request) -> None:
        """Take a request back whose caller was interrupted while it waited."""
        with self._lock:
            if request in self._waiting:
                self._waiting.remove(request)
                return
            line = next((line for line in self._busy if request in line.behind), None)
            if line is not None:
                after = deque[_Request]()
                while (last := line.behind.pop()) is not request:
                    after.appendleft(last)
                line.is_open, line.is_spoilt = False, True
                self._put_back(after)
                return
        if request.line is not None:  # its turn came with the interrupt
            self._discard(request.line)
            request.line = None
        self._hand_on(request)

    # -- under the lock --

    def _is_over(self, line: _Line) -> bool:
        return self._closed or (line.is_spoilt and not line.behind)

    def _serve_next(self, line: _Line) -> None:
        heir = line.behind.popleft()
        line.since = time.monotonic()
        heir.line = line
        heir.turn.release()
        self._fill(line)

    def _rest(self, line: _Line) -> None:
        line.is_open = False
        self._busy.discard(line)
        self._idle.append(line)

    def _give_places(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            self._waiting.popleft().turn.release()

    def _fill(self, line: _Line) -> None:
        while self._waiting and self._join(line, self._waiting[0]):
            self._waiting.popleft()

    def _join_any(self, request: _Request) -> bool:
        shortest_first = sorted(self._busy, key=lambda line: len(line.behind))
        return any(self._join(line, request) for line in shortest_first)

    def _join(self, line: _Line, request: _Request) -> bool:
        """Let ``request`` stand in ``line``; whether there was room."""
        most = min(int(_AHEAD_S / self._typical_s), _MOST_AHEAD)
        joined = line.is_open and len(line.behind) < most and line.worker.send_at_once(request.data)
        if joined:
            line.behind.append(request)
        return joined

    def _forget(self, line: _Line) -> None:
        self._busy.discard(line)
        self._put_back(line.behind)
        line.behind = deque()

    def _put_back(self, requests: deque[_Request]) -> None:
        """Let those who stood in a line that is gone be the next."""
        self._waiting.extendleft(reversed(requests))
        self._give_places()


def shared_pool(target: str, *, size: int, deadline_s: float, memory_mib: int, probe: Probe) -> WorkerPool:
    """This process's one pool of that configuration; closed at exit. A forked child has its own."""
    key = (target, size, deadline_s, memory_mib, probe.text)
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


_Shared = dict[tuple[str, int, float, int, str], WorkerPool]
_shared: _Shared = {}
_shared_lock = threading.Lock()
_parents: list[_Shared] = []
atexit.register(_close_shared)
os.register_at_fork(after_in_child=_forget_shared)
