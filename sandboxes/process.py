"""A plain child process, for trusted code only: it must be asked for by name.

Covered: the wall clock, output caps, an environment of its own, a working directory of its own, death of its
process group when the run is over. Not covered: everything else. It can read and change whatever its user
can, and a process that leaves the group lives on. POSIX only.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from agentrl.sandbox import (
    GUARANTEES,
    LIMITS,
    ExecResult,
    Limits,
    SandboxLost,
    Survey,
    Talk,
    check_enforced,
    lowered,
)
from agentrl.sandboxing.beneath import read_beneath, remove_all, write_beneath
from agentrl.sandboxing.pump import Clock, Pipes, Pumped, drive, outcome, refused

__all__ = ["Process"]

_ENFORCED = {"wall_s": "SIGKILL to the process group", "output_kib": "counted as it is read"}


class Process:
    """Opens sandboxes that are plain processes."""

    name = "process"

    def __init__(self) -> None:
        self._open: set[_Session] = set()
        self._lock = threading.Lock()

    def survey(self) -> Survey:
        """What little there is."""
        why = "a plain process shares it with the host; for trusted code set it to None, else take another"
        missing = {what: why for what in (*LIMITS, *GUARANTEES) if what not in _ENFORCED}
        return Survey(
            available=os.name == "posix", enforced=_ENFORCED, missing=missing, note="trusted code only"
        )

    def open(self, limits: Limits) -> _Session:
        """A session in a new temporary folder."""
        check_enforced(self.name, self.survey(), limits, trusted=True)
        session = _Session(limits, on_close=self._forget)
        with self._lock:
            self._open.add(session)
        return session

    def sweep(self) -> int:
        """Nothing is kept outside of temporary folders, which are the host's to sweep."""
        return 0

    def close(self) -> None:
        """Close every session."""
        with self._lock:
            sessions = list(self._open)
        for session in sessions:
            session.close()

    def _forget(self, session: _Session) -> None:
        with self._lock:
            self._open.discard(session)


class _Session:
    """A folder, and one process at a time."""

    def __init__(self, limits: Limits, *, on_close: Callable[[_Session], None]) -> None:
        self._limits = limits
        self._on_close = on_close
        self._closing = threading.Event()
        self._running = threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="agentrl-process-"))

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | Talk = b"",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
    ) -> ExecResult:
        """See :class:`agentrl.sandbox.Sandbox`."""
        allowed = lowered(self._limits, limits)
        try:
            for path, data in (files or {}).items():
                self.write(path, data)
        except OSError as error:  # what lies there, or how much, is the code's own doing
            return refused(f"a file can't be written: {error}")
        asked = time.monotonic()
        with self._running:
            folder = self._enter()
            queue_ms = (time.monotonic() - asked) * 1000
            try:
                child = subprocess.Popen(
                    list(argv),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=folder,
                    env=_environment(folder),
                    start_new_session=True,
                )
            except (FileNotFoundError, ValueError) as error:  # a word with a NUL is the latter
                return refused(str(error), exit_code=127)
            except OSError as error:
                if error.errno in (errno.E2BIG, errno.EACCES, errno.ENOEXEC):
                    return refused(str(error))
                raise SandboxLost(f"a process can't be started: {error}") from error
            try:
                pumped = _pump(child, self._closing, stdin=stdin, limits=allowed)
            finally:  # also where a talk raised; it was killed by then
                _, wait_status, usage = os.wait4(child.pid, 0)
                child.returncode = os.waitstatus_to_exitcode(wait_status)
        return _result(pumped, child.returncode, usage, queue_ms=queue_ms)

    def read(self, path: str, *, most_bytes: int = 1 << 20) -> bytes:
        """See :class:`agentrl.sandbox.Sandbox`."""
        return read_beneath(self._enter(), path, most_bytes=most_bytes)

    def write(self, path: str, data: bytes) -> None:
        """See :class:`agentrl.sandbox.Sandbox`."""
        write_beneath(self._enter(), path, data)

    def close(self) -> None:
        """Kill what runs, then remove the folder."""
        self._closing.set()
        with self._running:
            remove_all(self._folder)
        self._on_close(self)

    def _enter(self) -> Path:
        """The folder, for us to enter. Raises SandboxLost."""
        if self._closing.is_set():
            raise SandboxLost("this sandbox is closed: open another")
        with suppress(OSError):  # the code inside may even have removed it
            self._folder.chmod(0o700)
        return self._folder


def _pump(
    child: subprocess.Popen[bytes], closing: threading.Event, *, stdin: bytes | Talk, limits: Limits
) -> Pumped:
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    pipes = Pipes(*(os.dup(pipe.fileno()) for pipe in (child.stdin, child.stdout, child.stderr)))
    for pipe in (child.stdin, child.stdout, child.stderr):
        pipe.close()
    exited = os.pidfd_open(child.pid)
    try:
        clock = Clock(exited, cpu_s=lambda: 0.0, kill=lambda: _kill_group(child.pid), closing=closing)
        return drive(pipes, clock, stdin=stdin, limits=limits)
    finally:
        os.close(exited)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)  # its leader is not reaped yet, so the number is still its own
    except (ProcessLookupError, PermissionError):
        return


def _result(pumped: Pumped, code: int, usage: resource.struct_rusage, *, queue_ms: float) -> ExecResult:
    status, fault = outcome(pumped.end, code)
    return ExecResult(
        status=status,
        fault=fault,
        exit_code=code if code >= 0 and status in ("ok", "error") else None,
        signal=-code if code < 0 else None,
        stdout=pumped.stdout.data,
        stderr=pumped.stderr.data,
        truncated=pumped.stdout.dropped + pumped.stderr.dropped,
        cpu_ms=(usage.ru_utime + usage.ru_stime) * 1000,
        wall_ms=pumped.wall_s * 1000,
        queue_ms=queue_ms,
        peak_bytes=usage.ru_maxrss * 1024,
    )


def _environment(folder: Path) -> dict[str, str]:
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "LANG": "C.UTF-8",
    }
