"""A worker process as its parent holds it: started and proved, asked over two pipes, killed.

Frames are those of ``agentrl.worker_process``. A handle knows no queue and no policy: what a failure means,
and who asks next, is the pool's business (``agentrl.workers``). POSIX only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO, Any

from agentrl.errors import AgentRLError, WorkerLost
from agentrl.worker_process import HEADER_BYTES

__all__ = ["Died", "Late", "Probe", "Worker", "WorkerBug", "start_worker"]

_START_S = (
    120.0  # to import and answer the probe: one second on an idle machine, many where all cores are busy
)
_MAX_REPLY_BYTES = 16 << 20
_READ_BYTES = 1 << 16  # what a pipe holds
_BOOT = (
    "import json, sys; start = json.loads(sys.argv[1]); sys.path[:] = start.pop('path'); "
    "from agentrl.worker_process import serve; serve(**start)"
)


class WorkerBug(AgentRLError):
    """The worker's function raised: a bug, with the worker's traceback."""


class Late(Exception):
    """The deadline passed."""


class Died(Exception):
    """The worker closed its pipe."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A request with a known answer: while a worker gives it, the world is in order. Plain JSON data."""

    payload: Any
    answer: Any
    text: str = field(init=False, repr=False)  # both as JSON: equal probes have equal texts

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", json.dumps([self.payload, self.answer], sort_keys=True))


def start_worker(target: str, probe: Probe, *, deadline_s: float, memory_mib: int) -> Worker:
    """A worker that has answered ``probe``. Raises WorkerLost and WorkerBug."""
    options = {
        "path": [os.path.abspath(entry) for entry in sys.path],  # "" means here, for us as for the worker
        "target": target,
        "probe": probe.payload,
        "start_s": _START_S,
        "deadline_s": deadline_s,
        "memory_mib": memory_mib,
    }
    with tempfile.TemporaryFile() as log:
        try:
            worker = Worker(options, log)
        except OSError as error:
            raise WorkerLost(
                f"can't start a worker of {target}: {error}; free memory or processes"
            ) from error
        answer = None
        try:
            answer = worker.receive(time.monotonic() + _START_S)
        except (Late, Died) as error:
            how = "did not start in time" if isinstance(error, Late) else "died while starting"
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


class Worker:
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
        self._room, self._replies = select.poll(), select.poll()
        self._room.register(self._stdin, select.POLLOUT)
        self._replies.register(self._stdout, select.POLLIN)
        self._unread = bytearray()

    def send(self, data: bytes, until: float) -> None:
        """Write one frame of any size. Raises Late after ``until`` (monotonic), and Died."""
        view = memoryview(data)
        while view:
            _wait(self._room, until)
            try:
                view = view[os.write(self._stdin, view) :]
            except BrokenPipeError:
                raise Died from None

    def send_at_once(self, data: bytes) -> bool:
        """Write one frame if that takes no waiting; whether it did. Never a part of one."""
        if len(data) > select.PIPE_BUF:  # what is longer may be torn
            return False
        try:
            os.write(self._stdin, data)
        except (BlockingIOError, BrokenPipeError):
            return False
        return True

    def receive(self, until: float) -> dict[str, Any]:
        """The next reply. Raises Late after ``until`` (monotonic), Died, and WorkerBug for a huge one."""
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

    def _read(self, size: int, until: float) -> bytes:
        """The next ``size`` bytes; what came with them is kept for the next call."""
        while len(self._unread) < size:
            _wait(self._replies, until)
            chunk = os.read(self._stdout, _READ_BYTES)
            if not chunk:
                raise Died
            self._unread += chunk
        data = bytes(self._unread[:size])
        del self._unread[:size]
        return data


def _wait(poll: select.poll, until: float) -> None:
    if not poll.poll(max(until - time.monotonic(), 0) * 1000):
        raise Late


def _minimal_environment() -> dict[str, str]:
    """What Python may need to start, and one thread for each numerical library: nothing of the user's."""
    loader = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ}
    return {**loader, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
