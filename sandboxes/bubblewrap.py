"""Bubblewrap: fresh namespaces and a control group for every run, without a daemon and without root.

Covered: every limit and guarantee of ``agentrl.sandbox``. The code sees /usr read-only, a minimal /etc, its
own /work, /tmp, /proc and /dev; it runs with no capability, under a uid of its own where we are root, behind
a system call filter. Not covered: bugs of the kernel, which it shares with the host; for these take docker
with gVisor. An exit code of 129 to 192 is taken for the shell's way of telling a signal.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from agentrl.errors import CannotWrite
from agentrl.sandbox import (
    ExecResult,
    Fault,
    Limits,
    SandboxLost,
    Status,
    Survey,
    Talk,
    check_command,
    check_enforced,
    lowered,
)
from agentrl.sandboxing.beneath import read_beneath, unlock, write_beneath
from agentrl.sandboxing.bwrap import SPARE_PIDS, Ended, Launcher, Running
from agentrl.sandboxing.bwrap_view import View, find_programs, make_etc
from agentrl.sandboxing.hierarchy import Hierarchy, find
from agentrl.sandboxing.private import private_folders
from agentrl.sandboxing.pump import Pumped, outcome, overfull, refused
from agentrl.sandboxing.seccomp import deny_list
from agentrl.sandboxing.turns import Turn
from agentrl.sandboxing.workdirs import WorkDir, make_folder, sweep

__all__ = ["Bubblewrap"]

_UNLIMITED = Limits(
    cpu_s=None, wall_s=60, memory_mib=None, pids=None, disk_mib=None, output_kib=64, network=False
)
_ENFORCED = {
    "wall_s": "killed from outside when the clock says so",
    "output_kib": "counted as it is read; killed at sixteen times that",
    "files": "only /usr and a minimal /etc are seen, read-only, and nothing of this library there",
    "processes": "a PID namespace for every run; no tracing",
    "network": "a network namespace for every run, with nothing in it",
    "environment": "started with none; nothing of the host's /proc is seen",
    "survivors": "PID namespace and control group are killed from outside until none is left",
}
_NO_NAMESPACES = (
    "user namespaces must be allowed: sysctl kernel.unprivileged_userns_clone=1, "
    "kernel.apparmor_restrict_unprivileged_userns=0 and user.max_user_namespaces above 0; inside docker, run "
    "the container with --security-opt seccomp=unconfined --security-opt systempaths=unconfined"
)
_NO_SIZE = "a working directory of a given size needs a mount: run as root"
_BATCH = 64 * os.sysconf("SC_PAGE_SIZE")  # that the kernel charges at once (MEMCG_CHARGE_BATCH)
_sessions = itertools.count()


@dataclass(frozen=True, slots=True)
class _Host:
    """What all sessions of a backend share."""

    launcher: Launcher
    hierarchy: Hierarchy
    folder: Path
    view: View  # its working directory is each session's


class Bubblewrap:
    """Opens sandboxes under bubblewrap."""

    name = "bubblewrap"

    def __init__(self, *, folders: Sequence[str] = (), path: str = "/usr/local/bin:/usr/bin:/bin") -> None:
        """``folders``: of the host, seen read-only inside under the same names; ``path``: of programs."""
        self._folders = tuple(os.path.abspath(folder) for folder in folders)
        self._path = path
        self._lock = threading.RLock()
        self._open: set[_Session] = set()
        self._surveyed: tuple[Survey, _Host | None] | None = None
        self._is_swept = False

    def survey(self) -> Survey:
        """What it enforces here, tried out once."""
        with self._lock:
            if self._surveyed is None:
                self._surveyed = self._look()
            return self._surveyed[0]

    def open(self, limits: Limits) -> _Session:
        """A session with an empty working directory."""
        check_enforced(self.name, self.survey(), limits)
        with self._lock:
            if not self._is_swept:
                self._is_swept = True
                self.sweep()
            assert self._surveyed is not None
            host = self._surveyed[1]
            assert host is not None
            session = _Session(host, limits, on_close=self._forget)
            self._open.add(session)
        return session

    def sweep(self) -> int:
        """Kill what runs in groups whose owners are gone; remove these, mounts and folders."""
        return find().sweep() + sweep(self.name)

    def close(self) -> None:
        """Close every session."""
        with self._lock:
            sessions = list(self._open)
        for session in sessions:
            session.close()
        with self._lock:
            host = self._surveyed[1] if self._surveyed else None
            self._surveyed = None
        if host is not None:
            host.launcher.close()
            shutil.rmtree(host.folder, ignore_errors=True)

    def _forget(self, session: _Session) -> None:
        with self._lock:
            self._open.discard(session)

    def _look(self) -> tuple[Survey, _Host | None]:
        if sys.platform != "linux":
            return Survey(available=False, note="bubblewrap needs Linux"), None
        programs = find_programs()
        if isinstance(programs, str):
            return Survey(available=False, note=programs), None
        hierarchy = find()
        try:
            folder = make_folder(self.name)
            make_etc(folder / "etc")
            (folder / "nothing").mkdir(mode=0o755)
            launcher = Launcher(programs)
        except (OSError, CannotWrite) as error:
            return Survey(available=False, note=f"there is no folder or group for sandboxes: {error}"), None
        view = View(
            etc=folder / "etc",
            work=folder,
            folders=self._folders,
            hidden=private_folders(),
            nothing=folder / "nothing",
            path=self._path,
            size_mib=None,
            network=False,
        )
        host = _Host(launcher, hierarchy, folder, view)
        try:
            is_sized = _try_out(host)
        except SandboxLost as error:
            host.launcher.close()
            shutil.rmtree(folder, ignore_errors=True)
            return Survey(available=False, note=f"{error}; {_NO_NAMESPACES}"), None
        enforced, missing = {**_ENFORCED, **host.hierarchy.enforced}, {**host.hierarchy.missing}
        (enforced if is_sized else missing)["disk_mib"] = "tmpfs of that size" if is_sized else _NO_SIZE
        if deny_list() is None:
            missing["privileges"] = "no system call filter is known for this machine's architecture"
        else:
            enforced["privileges"] = "no capabilities, no_new_privs, a system call filter"
        return Survey(available=True, enforced=enforced, missing=missing, note=programs.version), host


class _Session:
    """A working directory, a control group, and one bubblewrap at a time."""

    def __init__(self, host: _Host, limits: Limits, *, on_close: Callable[[_Session], None]) -> None:
        self._host = host
        self._limits = limits
        self._on_close = on_close
        self._closing = threading.Event()
        self._running = Turn()
        self._owner = _fresh_uid() if os.geteuid() == 0 else None
        with ExitStack() as undo:
            try:
                self._work = WorkDir("bubblewrap", size_mib=limits.disk_mib, owner=self._owner)
                undo.callback(self._work.remove)
                if limits.disk_mib is not None and not self._work.is_sized:
                    raise SandboxLost("no file system can be mounted for a sandbox's files")
                self._group = host.hierarchy.make(limits, spare_pids=SPARE_PIDS)
            except OSError as error:
                raise SandboxLost(f"a sandbox can't be made: {error}") from error
            undo.pop_all()
        self._view = replace(
            host.view, work=self._work.path, size_mib=limits.disk_mib, network=limits.network
        )

    @property
    def is_sized(self) -> bool:
        """Whether the working directory has the size that was asked for."""
        return self._work.is_sized

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | Talk = b"",
        files: Mapping[str, bytes] | None = None,
        limits: Limits | None = None,
    ) -> ExecResult:
        """See :class:`agentrl.sandbox.Sandbox`."""
        check_command(argv, stdin)
        allowed = lowered(self._limits, limits)
        asked = time.monotonic()
        with self._running:
            self._enter()
            try:
                for path, data in (files or {}).items():
                    self.write(path, data)
            except OSError as error:  # what lies there, or how much, is the code's own doing
                return refused(f"a file can't be written: {error}")
            if argv[0][:1] in ("", "-"):  # an option of the shell's or bubblewrap's, perhaps
                return refused("no program has a name that is empty or begins with '-'", exit_code=127)
            if not all(map(_can_be_passed, argv)):
                return refused("a word has a NUL or no bytes, so that no command has it", exit_code=127)
            if not self._group.limit(allowed, spare_pids=SPARE_PIDS):
                return overfull()
            self._group.begin()
            with Running(self._group) as running:
                try:
                    running.start(self._host.launcher, argv, self._view, owner=self._owner)
                except OSError as error:
                    raise SandboxLost(f"bubblewrap can't be started: {error}") from error
                queue_ms = (time.monotonic() - asked) * 1000
                pumped = running.drive(stdin=stdin, limits=allowed, closing=self._closing)
                ended = running.wait()
            if ended.errno == errno.E2BIG:
                return refused("the command is longer than the kernel takes")
            return self._result(pumped, ended, limits=allowed, queue_ms=queue_ms)

    def read(self, path: str, *, most_bytes: int = 1 << 20) -> bytes:
        """See :class:`agentrl.sandbox.Sandbox`."""
        return read_beneath(self._enter(), path, most_bytes=most_bytes)

    def write(self, path: str, data: bytes) -> None:
        """See :class:`agentrl.sandbox.Sandbox`."""
        write_beneath(self._enter(), path, data, owner=self._owner)

    def close(self) -> None:
        """Kill what runs, then remove directory and group."""
        self._closing.set()
        with self._running:
            try:
                self._group.close()
            finally:
                self._work.remove()
        self._on_close(self)

    def _enter(self) -> Path:
        """The working directory, for whoever owns it to enter. Raises SandboxLost."""
        if self._closing.is_set():
            raise SandboxLost("this sandbox is closed: open another")
        unlock(self._work.path)
        return self._work.path

    def _result(self, pumped: Pumped, ended: Ended, *, limits: Limits, queue_ms: float) -> ExecResult:
        status: Status
        fault: Fault
        if self._group.oom_kills() or (pumped.end == "exit" and _had_no_memory(ended, limits)):
            code, status, fault = -9, "memory", "policy"
        elif pumped.end != "exit":
            code, (status, fault) = -9, outcome(pumped.end, -9)
        elif ended.code is not None:
            code = 128 - ended.code if 128 < ended.code <= 192 else ended.code
            status, fault = outcome("exit", code)
        elif ended.own_code is None or ended.own_code < 0:  # somebody outside, since nobody inside can
            code, status, fault = -9, "lost", "world"
        elif pumped.stderr.data.startswith(b"bwrap: execvp "):
            code, status, fault = 127, "error", "policy"
        else:
            said = os.strerror(ended.errno) if ended.errno else pumped.stderr.data.decode(errors="replace")
            raise SandboxLost(f"bubblewrap failed: {said.strip()}")
        return ExecResult(
            status=status,
            fault=fault,
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            stdout=pumped.stdout.data,
            stderr=pumped.stderr.data,
            truncated=pumped.stdout.dropped + pumped.stderr.dropped,
            cpu_ms=ended.cpu_s * 1000,
            wall_ms=pumped.wall_s * 1000,
            queue_ms=queue_ms,
            peak_bytes=ended.peak_bytes,
            flags=("pids_hit",) if self._group.pids_hit() else (),
        )


def _try_out(host: _Host) -> bool:
    """Run something; whether working directories have sizes here. Raises SandboxLost."""
    session = _Session(host, _UNLIMITED, on_close=lambda _: None)
    try:
        result = session.run(["true"])
        if result.status != "ok":
            said = result.stderr.decode(errors="replace").strip()
            raise SandboxLost(f"a trial run ended with {result.status}: {said}")
        return session.is_sized
    finally:
        session.close()


def _had_no_memory(ended: Ended, limits: Limits) -> bool:
    """Whether files left so little that bubblewrap failed: not all that the kernel then refuses is a kill."""
    if limits.memory_mib is None or ended.code is not None or ended.own_code is None:
        return False
    is_stillborn = ended.own_code > 0 or not ended.has_begun
    return is_stillborn and ended.peak_bytes >= int(limits.memory_mib * 2**20) - _BATCH


def _can_be_passed(word: str) -> bool:
    try:
        return b"\0" not in os.fsencode(word)
    except UnicodeEncodeError:  # half of a character
        return False


def _fresh_uid() -> int:
    """A uid that nobody else on the host has: by process, and 64 of them in turn."""
    return 1_600_000_000 + os.getpid() % 2**22 * 64 + next(_sessions) % 64
