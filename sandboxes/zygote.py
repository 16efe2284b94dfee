"""A warm Python, forked into fresh namespaces for each run: isolated, and in less than a Python's start.

Covered: every limit, through a control group for each session; every guarantee, through pid, mount, ipc, uts
and net namespaces for each run (a user namespace where this process is not root), a root with nothing but
/usr and the interpreter, read-only, a uid of the session's own, no capabilities, a seccomp filter, and
``/work``, ``/tmp`` and ``/dev/shm`` of bounded size. ``python3 -c CODE`` and ``python3 FILE`` cost a fork;
other commands are executed. Not covered: a network; faults of the kernel; string hashes and addresses, which
runs of one zygote share. Linux only.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from agentrl.errors import BadConfig
from agentrl.sandbox import (
    ExecResult,
    Limits,
    SandboxLost,
    Survey,
    Talk,
    check_command,
    check_enforced,
    lowered,
)
from agentrl.sandboxing.beneath import read_beneath, unlock, write_beneath
from agentrl.sandboxing.hierarchy import Hierarchy, find
from agentrl.sandboxing.pump import overfull, refused
from agentrl.sandboxing.seccomp import telltale_filter
from agentrl.sandboxing.turns import Turn
from agentrl.sandboxing.zygote_handle import ZygoteHandle, ZygoteSettings
from agentrl.sandboxing.zygote_run import ZygoteRun

__all__ = ["PRELOAD", "Zygote"]

# What submissions commonly import. Each costs every fork the pages that it fills.
PRELOAD = (
    "bisect",
    "collections",
    "dataclasses",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "string",
    "typing",
)
_FILES_PER_MIB = 256  # of a file system in memory: small ones cost more than they hold
_CROWD = 2  # sessions of each zygote before another one is started
_FIRST_UID, _UIDS = 1 << 20, 1 << 30
_SPARE_PIDS = 1  # the init
_ENDS = "no signal from within reaches its init, with which the kernel ends them all"
_NAMESPACES = {"mnt": "files", "ipc": "processes", "uts": "processes", "net": "network", "pid": "survivors"}
_PROBE = """
import json, os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
rights = {name: int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
rights |= {name: int(status[name]) for name in ("NoNewPrivs", "Seccomp")} | {"root": os.getuid() == 0}
links = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "ipc", "uts", "net", "pid")}
print(json.dumps({"rights": rights, "namespaces": links}))
"""
_NO_RIGHTS = {
    **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0),
    "NoNewPrivs": 1,
    "Seccomp": 2,
    "root": False,
}
_MEANS = {
    "wall_s": "SIGKILL to the init of the pid namespace, from outside",
    "output_kib": "counted as it is read",
    "disk_mib": "sized tmpfs",
    "files": "mount namespace, pivot_root and chroot: /usr and the interpreter, read-only",
    "processes": "pid and ipc namespaces; as root, a uid of the session's own",
    "privileges": "an unprivileged uid, no capabilities, no_new_privs, seccomp",
    "network": "net namespace with a loopback of its own",
    "environment": "made anew; the zygote is started without one",
    "survivors": f"pid namespace: {_ENDS}",
}


class Zygote:
    """Opens sandboxes whose runs are forks of warm Pythons.

    ``preload``: modules that are imported before a run begins. ``packages``: folders of the host with
    packages that runs may import; none of the interpreter's own are there otherwise. ``zygotes``: at most at
    once; None: one for every two cores. Each ends after ``recycle`` sessions.
    """

    name = "zygote"

    def __init__(
        self,
        *,
        preload: Sequence[str] = PRELOAD,
        packages: Sequence[str | Path] = (),
        zygotes: int | None = None,
        recycle: int = 2000,
    ) -> None:
        self._settings = ZygoteSettings(
            preload=tuple(preload), packages=tuple(map(str, packages)), seccomp=telltale_filter()
        )
        self._most = zygotes or max(1, (os.cpu_count() or 1) // 2)
        self._recycle = recycle
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._pid = os.getpid()
        self._hierarchy: Hierarchy | None = None
        self._survey: Survey | None = None
        self._zygotes: dict[ZygoteHandle, int] = {}  # and how many sessions each has begun
        self._open: dict[_Session, ZygoteHandle] = {}

    def survey(self) -> Survey:
        """What it enforces here; starts a zygote the first time."""
        with self._lock:
            return self._surveyed()

    def open(self, limits: Limits) -> _Session:
        """A session with a file system and a control group of its own."""
        if limits.network:
            raise BadConfig("the sandbox 'zygote' has no network: set network=False, or choose 'docker'")
        with self._lock:
            check_enforced(self.name, self._surveyed(), limits)
            zygote = self._choose()
            self._zygotes[zygote] += 1
            assert self._hierarchy is not None
            session = _Session(
                limits,
                zygote=zygote,
                number=next(self._numbers),
                hierarchy=self._hierarchy,
                on_close=self._forget,
            )
            self._open[session] = zygote
        return session

    def sweep(self) -> int:
        """Remove the control groups of processes that are gone; zygotes and their mounts go with those."""
        return find().sweep()

    def close(self) -> None:
        """Close every session and end every zygote."""
        with self._lock:
            sessions = list(self._open) if self._pid == os.getpid() else []
        for session in sessions:
            session.close()
        with self._lock:
            zygotes = list(self._zygotes) if self._pid == os.getpid() else []
            self._begin_anew()
        for zygote in zygotes:
            zygote.close()

    def _surveyed(self) -> Survey:
        if self._pid != os.getpid():  # forked: what there is belongs to the parent
            self._begin_anew()
        if self._survey is None:
            self._survey = self._look()
        return self._survey

    def _look(self) -> Survey:
        try:
            self._hierarchy = find()
            self._hierarchy.sweep()
            failed = self._probe(self._hierarchy)
        except (OSError, SandboxLost) as error:
            return Survey(available=False, note=str(error))
        means = {**_MEANS, **self._hierarchy.enforced}
        enforced = {what: how for what, how in means.items() if what not in failed}
        missing = {**self._hierarchy.missing, **failed}
        return Survey(
            available=True,
            enforced=enforced,
            missing=missing,
            note="as root" if os.geteuid() == 0 else "in a user namespace",
        )

    def _probe(self, hierarchy: Hierarchy) -> dict[str, str]:
        """What a run finds not to be as it should, by guarantee. Raises SandboxLost where there is no run."""
        not_limited: dict[str, Any] = dict.fromkeys(hierarchy.missing)
        limits = replace(Limits(), **not_limited)
        session = _Session(
            limits,
            zygote=self._choose(),
            number=next(self._numbers),
            hierarchy=hierarchy,
            on_close=lambda session: None,
        )
        try:
            result = session.run(["python3", "-I", "-c", _PROBE])
        finally:
            session.close()
        if result.status != "ok":
            raise SandboxLost(
                f"a first run ended as {result.status}: {result.stderr.decode(errors='replace')}"
            )
        seen = json.loads(result.stdout)
        ours = {name: os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES}
        failed = {
            promise: f"a run shares the host's {name} namespace: run as root or allow user namespaces"
            for name, promise in _NAMESPACES.items()
            if seen["namespaces"][name] == ours[name]
        }
        if seen["rights"] != _NO_RIGHTS:
            failed["privileges"] = f"a run has more than none: {seen['rights']}; use docker"
        return failed

    def _choose(self) -> ZygoteHandle:
        """The one with the fewest sessions, where none may be started."""
        for zygote in [zygote for zygote in self._zygotes if not zygote.is_alive]:
            del self._zygotes[zygote]
            zygote.close()
        users = list(self._open.values())
        for zygote, begun in list(self._zygotes.items()):
            if begun >= self._recycle and zygote not in users:
                del self._zygotes[zygote]
                zygote.close()
        young = [zygote for zygote, begun in self._zygotes.items() if begun < self._recycle]
        best = min(young, key=users.count, default=None)
        if best is None or (len(young) < self._most and users.count(best) >= _CROWD):
            best = ZygoteHandle(self._settings)
            self._zygotes[best] = 0
        return best

    def _forget(self, session: _Session) -> None:
        with self._lock:
            self._open.pop(session, None)


class _Session:
    """A file system in memory and a control group; one run at a time."""

    def __init__(
        self,
        limits: Limits,
        *,
        zygote: ZygoteHandle,
        number: int,
        hierarchy: Hierarchy,
        on_close: Callable[[_Session], None],
    ) -> None:
        self._limits = limits
        self._zygote = zygote
        self._number = number
        self._on_close = on_close
        self._closing = threading.Event()
        self._running = Turn()
        self._files = threading.Lock()  # so that nobody reads in a folder that is being closed
        self._uid = random.SystemRandom().randrange(_FIRST_UID, _UIDS)
        self._owner = self._uid if os.geteuid() == 0 else None
        self._options = _tmpfs_options(limits)
        with ExitStack() as undo:
            try:
                self._group = hierarchy.make(limits, spare_pids=_SPARE_PIDS)
                undo.callback(self._group.close)
                self._entries = []
                for path in self._group.procs:
                    self._entries.append(_open_entry(path))
                    undo.callback(os.close, self._entries[-1])
            except OSError as error:
                raise SandboxLost(f"no control group for a sandbox: {error}") from error
            self._root = zygote.open_session(number, uid=self._uid, options=self._options)
            undo.pop_all()
        self._folder = Path(f"/proc/self/fd/{self._root}/work")

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
            if not self._group.limit(allowed, spare_pids=_SPARE_PIDS):
                return overfull()
            self._group.begin()
            start = partial(self._zygote.start, uid=self._uid, options=self._options)
            with ZygoteRun(self._group, self._closing, owner=self._owner) as run:
                run.start(partial(start, self._number), argv, entries=self._entries)
                queue_ms = (time.monotonic() - asked) * 1000
                pumped = run.drive(stdin=stdin, limits=allowed)
                return run.result(pumped, queue_ms=queue_ms)

    def read(self, path: str, *, most_bytes: int = 1 << 20) -> bytes:
        """See :class:`agentrl.sandbox.Sandbox`."""
        with self._files:
            return read_beneath(self._enter(), path, most_bytes=most_bytes)

    def write(self, path: str, data: bytes) -> None:
        """See :class:`agentrl.sandbox.Sandbox`."""
        with self._files:
            write_beneath(self._enter(), path, data, owner=self._owner)

    def close(self) -> None:
        """Kill what runs, then give back the file system and the control group."""
        self._closing.set()
        with self._running, self._files:
            if self._root >= 0:
                os.close(self._root)
                self._root = -1
                for entry in self._entries:
                    os.close(entry)
                self._zygote.close_session(self._number)
                self._group.close()
        self._on_close(self)

    def _enter(self) -> Path:
        """The working directory, for whoever owns it to enter. Raises SandboxLost."""
        if self._closing.is_set():
            raise SandboxLost("this sandbox is closed: open another")
        unlock(self._folder)
        return self._folder


def _open_entry(path: Path) -> int:
    """Through which a process enters a group.

    Of v1 the file for a single thread: moving a whole process waits for every fork on the machine.
    """
    single = path.with_name("tasks")
    return os.open(single if single.exists() else path, os.O_WRONLY | os.O_CLOEXEC)


def _tmpfs_options(limits: Limits) -> str:
    if limits.disk_mib is None:
        return "size=0,nr_inodes=0"
    return f"size={int(limits.disk_mib * 2**20)},nr_inodes={int(limits.disk_mib * _FILES_PER_MIB) + 64}"
